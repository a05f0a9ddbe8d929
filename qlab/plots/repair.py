"""Accuracy of repairs against what they cost: one point for each arm, and the arms that none is better than in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qlab.errors import InputError
from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.experiments.base import Result
    from qlab.experiments.verdict import Metric

__all__ = ["front", "repair_figure"]


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
        axis.annotate(str(number), (row["cost"], row["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    line = table[best].sort_values("cost")
    axis.plot(line["cost"], line["mean"], color=COLOURS[1 % len(COLOURS)], lw=0.8, zorder=0)
    axis.set_xscale("log")
    axis.set_xlabel(f"{across.label}, {across.unit}" if across.unit else across.label)
    axis.set_ylabel(f"{up.label}, {up.unit}" if up.unit else up.label)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"{result.experiment} on {result.data}, {result.scale} scale", fontsize=10)
    names = ", ".join(f"{arm} ({row['mean']:.1f} at {row['cost']:.3g})" for arm, row in line.iterrows())
    figure.set_label(
        f"{up.label} against {across.label} of {len(table)} arms, mean and standard error over {len(result.seeds)} seeds. "
        f"No arm is both cheaper and better than these: {names}."
    )
    return figure


def _metric(result: Result, name: str) -> Metric:
    known = {m.name: m for m in result.metrics}
    if name not in known or not (result.frame["metric"] == name).any():
        raise InputError(f"no run of {result.experiment} reports {name!r}; it reports {', '.join(known)}")
    return known[name]


def _means(result: Result, cost: Metric, value: Metric) -> pd.DataFrame:
    """Return cost, mean and standard error of each arm that reports both, in the arms' order."""
    wide = result.frame.pivot_table(index="arm", columns="metric", values="value", aggfunc=["mean", "std", "count"])
    wide = wide.reindex(list(dict.fromkeys(result.frame["arm"])))
    mean = wide["mean"]
    std = wide["std"].get(value.name, mean[value.name] * 0)  # one seed has no deviation
    error = (std / np.sqrt(wide["count"][value.name])).fillna(0.0)
    columns = {
        "cost": cost.scale * mean[cost.name],
        "mean": value.scale * mean[value.name],
        "error": value.scale * error,
    }
    return pd.DataFrame(columns).dropna()
