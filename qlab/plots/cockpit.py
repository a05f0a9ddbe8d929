"""Schedules of many methods on one time axis, and what steered runs recorded, as static figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qlab.cockpit import LR, WINDOW, smoothed
from qlab.errors import InputError
from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.cockpit import Schedules, Telemetry

__all__ = ["schedules_figure", "telemetry_figure"]

_HIGH = 0.72  # of a row
_NAMED = 3  # methods of one learning-rate curve that are named
_DASHES = ("-", "--", ":", "-.")


def schedules_figure(result: Schedules) -> Figure:
    """Draw a row per scheduled quantity, all over one time axis, with the true values beside it.

    Args:
        result: as from `qlab.cockpit.schedules`.
    """
    rows = [(f"{c.method}  {c.quantity}", c) for c in result.curves if c.quantity != LR]
    for names, curve in result.rates().items():
        more = f" + {len(names) - _NAMED}" if len(names) > _NAMED else ""
        rows.append((f"{', '.join(names[:_NAMED])}{more}  {LR}", curve))
    figure = Figure(figsize=(9, 1.0 + 0.36 * len(rows)), dpi=80, layout="constrained")
    axes = figure.subplots()
    for i, (_, curve) in enumerate(rows):
        floor = len(rows) - 1 - i
        colour = "0.35" if curve.quantity == LR else COLOURS[i % len(COLOURS)]
        height = floor + _HIGH * curve.normalised
        axes.axhline(floor, color="0.88", lw=0.8, zorder=0)
        axes.fill_between(result.progress, floor, height, color=colour, alpha=0.15, lw=0)
        axes.plot(result.progress, height, color=colour, lw=1.5)
        first, last = curve.values[0], curve.values[-1]
        said = f"{first:.3g}" if curve.low == curve.high else f"{first:.3g} → {last:.3g}{' (log)' if curve.log else ''}"
        axes.annotate(said, (1.01, floor + 0.15), xycoords=("axes fraction", "data"), fontsize=8)
    axes.set_yticks([len(rows) - 1 - i + 0.3 for i in range(len(rows))], [name for name, _ in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(-0.15, len(rows)), xlabel="progress of the run")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.set_label(result.summary())
    return figure


def telemetry_figure(runs: Mapping[str, Telemetry]) -> Figure:
    """Draw runs over one another: schedule, residual, distance of latent weights, flips.

    Args:
        runs: label -> what was recorded, as many as there are colours.

    Raises:
        InputError: for no run, or more than can be told apart.
    """
    if not 1 <= len(runs) <= len(COLOURS):
        raise InputError(f"telemetry_figure got {len(runs)} runs; it can tell 1 to {len(COLOURS)} apart")
    figure = Figure(figsize=(9, 5), dpi=80, layout="constrained")
    schedule, residual, distance, flips = figure.subplots(2, 2).flat
    many = len({name for t in runs.values() for name in t.quantities}) > 1
    for (label, t), colour, dash in zip(runs.items(), COLOURS, (*_DASHES, *_DASHES), strict=False):
        v = t.values
        for k, name in enumerate(t.quantities):
            said = f"{label}: {name}" if many else label  # one of several is thinner
            schedule.plot(v["step"], v[name], color=colour, ls=dash, lw=1.5 - 0.5 * (k > 0), label=said)
        if not t.quantities:
            schedule.plot(v["step"], v["lr"], color=colour, ls=dash, lw=1.5, label=f"{label}: learning rate")
        residual.plot(v["step"], v["residual"], color=colour, ls=dash, lw=1.5, label=label)
        distance.plot(v["step"], v["distance"], color=colour, ls=dash, lw=1.5, label=label)
        flips.plot(v["step"], 100 * smoothed(v["flips"]), color=colour, ls=dash, lw=1.5, label=label)
        if t.branched is not None:
            for axes in (schedule, residual, distance, flips):
                axes.axvline(t.branched, color=colour, lw=0.8, ls=":")
    names = sorted({name for t in runs.values() for name in t.quantities})
    schedule.set(title=f"Scheduled: {', '.join(names) or 'the learning rate'}", xlabel="step")
    residual.set(title="Forward less deployed weight, mean size", xlabel="step")
    distance.set(title="Latent weight to its nearest level, mean", xlabel="step")
    flips.set(title=f"Weights that flip in a step, % (mean of {WINDOW})", xlabel="step")
    for axes in (schedule, residual, distance, flips):
        _finish(axes)
    figure.set_label(" ".join(f"{label}: {t.summary()}" for label, t in runs.items()))
    return figure


def _finish(axes: Axes) -> None:
    """Choose a scale, name the lines, and say where there are none."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]  # not where a run branched off
    drawn = [np.asarray(line.get_ydata(), float) for line in named]
    values = [v for v in drawn if len(v) > 1]
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.zeros(0)
    axes.spines[["top", "right"]].set_visible(False)
    if not len(finite):
        axes.text(
            0.5, 0.5, "no quantized weights" if values else "nothing trained yet", transform=axes.transAxes, ha="center"
        )
        return
    if finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
    elif finite.min() >= 0:
        axes.set_ylim(0, 1.1 * finite.max() or 1.0)
    axes.legend(frameon=False, fontsize=8)
