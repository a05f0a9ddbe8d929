"""Accuracy of repairs against what they cost: one point for each arm, and the arms that none is better than in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from qlab.errors import InputError
from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.experiments.base import Result
    from qlab.experiments.verdict import Metric

__all__ = ["front", "repair_figure"]

FONT = 8  # points

_DIRECTIONS = 16
_ANGLES = np.pi / 4 + 2 * np.pi / _DIRECTIONS * np.arange(_DIRECTIONS)
_OFFSETS = np.concatenate([r * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1) for r in range(10, 150, 8)])
"""Where a number may stand, in points from its own: near ones first."""


def front(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return which points no other is at least as good as in both, and better in one: shape (N,), bool.

    Args:
        cost: (N,), less is better.
        value: (N,), more is better.
    """
    cheaper, better = cost[:, None] <= cost, value[:, None] >= value
    strictly = (cost[:, None] < cost) | (value[:, None] > value)
    return np.logical_not(np.any(cheaper & better & strictly, axis=0))


def repair_figure(result: Result, cost: str = "cost/energy", value: str = "test/acc") -> Figure:
    """Draw the mean of `value` with its standard error over seeds against the cost of each arm.

    Args:
        result: of the experiment "bnn_repair", or of any that reports both metrics.
        cost: name of the metric on the horizontal axis, logarithmic.
        value: name of the metric on the vertical axis.

    Raises:
        InputError: for a metric that no run reports.
    """
    across, up = _metric(result, cost), _metric(result, value)
    table = _means(result, across, up)
    best = front(table["cost"].to_numpy(), table["mean"].to_numpy())
    figure = Figure(figsize=(8.6, 5.4), dpi=80, layout="constrained")
    axis = figure.subplots()
    numbers = range(1, len(table) + 1)
    for number, (arm, row), on_front in zip(numbers, table.iterrows(), best, strict=True):
        colour = COLOURS[1 % len(COLOURS)] if on_front else "0.45"
        label = f"{number}  {arm}"
        axis.errorbar(
            row["cost"], row["mean"], row["error"], fmt="s" if on_front else "o", color=colour, ms=5, lw=1, label=label
        )
    line = table[best].sort_values("cost")
    axis.plot(line["cost"], line["mean"], color=COLOURS[1 % len(COLOURS)], lw=0.8, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"{across.label}, {across.unit}" if across.unit else across.label)
    axis.set_ylabel(f"{up.label}, {up.unit}" if up.unit else up.label)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.margins(0.12)  # room for the numbers
    axis.set_title(f"{result.experiment} on {result.data}, {result.scale} scale", fontsize=10)
    _number(figure, axis, table[["cost", "mean"]].to_numpy())
    names = ", ".join(f"{arm} ({row['mean']:.1f} at {row['cost']:.3g})" for arm, row in line.iterrows())
    figure.set_label(
        f"{up.label} against {across.label} of {len(table)} arms, mean and standard error over {len(result.seeds)} seeds. "
        f"No arm is both cheaper and better than these: {names}."
    )
    return figure


def _number(figure: Figure, axis: Axes, points: np.ndarray) -> None:
    """Write the number of each point beside it, further off and with a line to it where other numbers or points are in the way.

    Args:
        figure: laid out here, for where there is room is a matter of pixels.
        axis: with everything else drawn.
        points: (N, 2), numbered from 1.
    """
    figure.draw_without_rendering()
    seen = axis.transData.transform(points)
    low, high = axis.get_window_extent().get_points()
    half = figure.dpi / 72 * np.array([0.32 * FONT * len(str(len(points))) + 1, 0.5 * FONT + 1])  # of a number's box
    taken = np.empty((0, 2))
    for number, (point, pixel) in enumerate(zip(points, seen, strict=True), 1):
        spots = pixel + figure.dpi / 72 * _OFFSETS
        room = np.all((spots - half > low) & (spots + half < high), axis=1)
        for others, reach in ((taken, 2 * half), (seen, half + 3)):
            room &= ~np.any(np.all(np.abs(spots[:, None] - others) < reach, axis=2), axis=1)
        k = int(np.argmax(room))  # the first with room; the nearest where there is none
        taken = np.vstack([taken, spots[k]])
        far = k >= _DIRECTIONS
        axis.annotate(
            str(number), tuple(point), xytext=tuple(_OFFSETS[k]), textcoords="offset points", fontsize=FONT, ha="center",
            va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0} if far else None,
        )  # fmt: skip
    figure.set_layout_engine("none")  # what was placed stays where it is


def _metric(result: Result, name: str) -> Metric:
    known = {m.name: m for m in result.metrics}
    if name not in known or not (result.frame["metric"] == name).any():
        raise InputError(f"no run of {result.experiment} reports {name!r}; it reports {', '.join(known)}")
    return known[name]


def _means(result: Result, cost: Metric, value: Metric) -> pd.DataFrame:
    """Return cost, mean and standard error of each arm that reports both, in the arms' order."""
    found = result.frame.groupby(["metric", "arm"])["value"].agg(["mean", "std", "count"])
    means = found.loc[value.name]
    error = (means["std"] / np.sqrt(means["count"])).fillna(0.0)  # one seed has no deviation
    columns = {
        "cost": cost.scale * found.loc[cost.name]["mean"],
        "mean": value.scale * means["mean"],
        "error": value.scale * error,
    }
    return pd.DataFrame(columns).reindex(list(dict.fromkeys(result.frame["arm"]))).dropna()
