"""Attack replay: paths on a plane through the example, margins and losses by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.robustness import COLOURS, MARKERS

if TYPE_CHECKING:
    from qlab.attacks.replay import Replay

__all__ = ["replay_figure"]

LEVELS = 12
ARROW = 0.09  # length of an arrow that lies in the plane, in units of the drawing's side


def replay_figure(found: Replay) -> Figure:
    """Draw a replay: paths with arrows of the gradients on the margin's landscape, rings where a gradient is exactly zero."""
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    spec = figure.add_gridspec(2, 2, width_ratios=[1.45, 1])
    plane = figure.add_subplot(spec[:, 0])
    curves = [figure.add_subplot(spec[0, 1]), figure.add_subplot(spec[1, 1])]
    _landscape(plane, found)
    for i, path in enumerate(found.paths):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
        }
        _path(plane, found, path.name, i)
        steps = np.arange(len(path.margin))
        curves[0].plot(steps, path.margin, linewidth=1.3, label=path.title, **style)
        if path.loss.size and not np.isnan(path.loss).all():
            curves[1].plot(steps, path.loss, linewidth=1.3, **style)
        if path.broke is not None:
            curves[0].plot(path.broke, path.margin[path.broke], "*", color=style["color"], markersize=12, mec="black")
    curves[0].axhline(0, color="black", linewidth=0.8, linestyle="--")
    curves[0].set(ylabel="margin (above 0: lost)")
    curves[1].set(xlabel="step", ylabel="what each attacker maximises")
    curves[1].set_yscale("symlog", linthresh=1e-3)
    for axis in curves:
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    entries = [axis.get_legend_handles_labels() for axis in (curves[0], plane)]
    handles, labels = (first + second for first, second in zip(*entries, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.set_label(found.summary())
    return figure


def _landscape(axis: Any, found: Replay) -> None:
    land = found.landscape
    axis.contourf(land.a, land.b, land.margin, levels=LEVELS, cmap="Greys", alpha=0.45)
    if land.margin.min() <= 0 < land.margin.max():
        axis.contourf(land.a, land.b, land.margin, levels=[0, land.margin.max()], colors="none", hatches=["///"])
        axis.contour(land.a, land.b, land.margin, levels=[0], colors="black", linewidths=1.6)
    for polygon, dash, name in ((found.ball, "--", "cut of the ball"), (found.allowed, "-", "ball and range")):
        if len(polygon):
            closed = np.concatenate([polygon, polygon[:1]])
            axis.plot(*closed.T, color="black", linewidth=0.9, linestyle=dash, label=name)
    left, right, bottom, top = found.plane.extent
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    two = found.x[0].numel() == 2
    axis.set(
        xlabel="first input" if two else "towards the worst point found",
        ylabel="second input" if two else "next direction",
    )


def _path(axis: Any, found: Replay, name: str, i: int) -> None:
    path, at = found[name], found.coordinates(name)
    colour = COLOURS[i % len(COLOURS)]
    axis.plot(*at.T, color="white", linewidth=3.4, zorder=3)
    axis.plot(*at.T, color=colour, linewidth=1.6, marker=MARKERS[i % len(MARKERS)], markersize=4, zorder=4)
    arrows = found.arrows(name)
    shown = ~np.isnan(arrows).any(1)
    if shown.any():
        axis.quiver(
            *at[shown].T, *(2 * ARROW * found.plane.half * arrows[shown]).T, color=colour, angles="xy", scale_units="xy", scale=1,
            width=0.005, zorder=5,
        )  # fmt: skip
    if path.zero.any():
        axis.scatter(*at[path.zero].T, s=110 + 60 * i, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=6)
    if path.broke is not None:
        axis.plot(*at[path.broke], "*", color=colour, markersize=14, mec="black", zorder=7)
