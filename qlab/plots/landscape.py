"""Loss landscapes as static figures: functions side by side on one colour scale, exact staircases, trajectories.

Loss is viridis with contour lines; lines of equal share of flipped weights are dashed and carry their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.diagnose.exact_line import ExactLine
    from qlab.diagnose.landscape import Landscape
    from qlab.diagnose.trajectory import Trajectory

__all__ = ["exact_line_figure", "landscape_figure", "trajectory_figure"]

LEVELS = 12
_DASHES = ("-", "--", ":", "-.")


def landscape_figure(land: Landscape, path: Trajectory | None = None) -> Figure:
    """Draw every function of a landscape on one plane and colour scale, or as curves where it is a line.

    Args:
        land: as from `qlab.diagnose.landscape.landscape`.
        path: a trajectory to draw on the plane it gave the directions of.
    """
    return _line(land) if land.line else _planes(land, path)


def _planes(land: Landscape, path: Trajectory | None) -> Figure:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patheffects import withStroke

    low, high, log = land.scale()
    count = len(land.functions)
    figure = Figure(figsize=(1.4 + 3.3 * count, 3.5), dpi=80, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]
    levels = np.geomspace(low, high, LEVELS) if log else np.linspace(low, high, LEVELS)
    norm: Any = LogNorm(low, high) if log else Normalize(low, high)
    drawn: Any = None
    for axes, name in zip(panels, land.functions, strict=True):
        z = np.clip(np.nan_to_num(land.loss[name], nan=high, posinf=high), low, high)
        drawn = axes.pcolormesh(land.a, land.b, z.T, norm=norm, cmap="viridis", shading="nearest", rasterized=True)
        if np.ptp(z) > 0:
            axes.contour(land.a, land.b, z.T, levels=levels[1:-1], colors="white", linewidths=0.5, alpha=0.8)
        if name == "deployed" and np.isfinite(land.flipped).all():
            _flips(axes, land)
        if path is not None:
            axes.plot(path.a, path.b, color="white", lw=3)
            axes.plot(path.a, path.b, color="#D55E00", lw=1.5, marker="o", ms=2.5)
            words = axes.annotate(
                "start", (path.a[0], path.b[0]), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
            words.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        axes.plot([0], [0], "w*", mec="k", ms=9)
        axes.set_title(name + (f", k = {land.sharpness:g}" if name == "smoothed" else ""), fontsize=10)
        axes.set_xlabel(land.directions[0], fontsize=8)
    panels[0].set_ylabel(land.directions[-1], fontsize=8)
    figure.colorbar(
        drawn, ax=list(panels), label="loss" + (" (log scale)" if log else ""), extend="max", shrink=0.9, format="%.2g"
    )
    figure.set_label(land.summary() + ("" if path is None else " " + path.summary()))
    return figure


def _flips(axes: Axes, land: Landscape) -> None:
    top = float(land.flipped.max())
    shares = [s for s in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4) if s < top]
    if shares and min(land.flipped.shape) > 1:
        lines = axes.contour(
            land.a, land.b, land.flipped.T, levels=shares, colors="black", linewidths=0.9, linestyles="--"
        )
        axes.clabel(lines, fmt=lambda v: f"{100 * v:.0f} % flipped", fontsize=6)


def _line(land: Landscape) -> Figure:
    figure = Figure(figsize=(8, 4.6), dpi=80, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for name, colour, dash in zip(land.functions, COLOURS, _DASHES, strict=False):
        loss, noise = land.loss[name][:, 0], land.noise[name][:, 0]
        if np.isfinite(noise).any():
            top.fill_between(land.a, loss - noise, loss + noise, color=colour, alpha=0.18, lw=0)
        top.plot(land.a, loss, color=colour, ls=dash, label=name)
        bottom.plot(land.a, land.accuracy[name][:, 0], color=colour, ls=dash, label=name)
    if land.scale()[2]:
        top.set_yscale("log")
    top.legend(frameon=False, fontsize=8)
    top.set(ylabel="loss", title=f"along {land.directions[0]}")
    bottom.set(ylabel="accuracy", xlabel="a", ylim=(-0.02, 1.02))
    if np.isfinite(land.flipped).all():
        flips = bottom.twinx()
        flips.plot(land.a, 100 * land.flipped[:, 0], color="0.4", lw=1)
        flips.set_ylabel("flipped weights, % (grey)", fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top"]].set_visible(False)
        axes.axvline(0, color="0.7", lw=0.8)
    figure.set_label(land.summary())
    return figure


def exact_line_figure(line: ExactLine) -> Figure:
    """Draw the deployed loss as the staircase it is, and the share of flipped weights with its law.

    Args:
        line: as from `qlab.diagnose.exact_line.exact_line`.
    """
    from qlab.diagnose.exact_line import flip_share

    figure = Figure(figsize=(8, 4.6), dpi=80, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    top.stairs(line.loss, line.edges, baseline=None, color=COLOURS[0], lw=1)
    top.set(ylabel=f"deployed loss ({line.loss_name})", title=f"{len(line.loss):,} plateaus, each evaluated once")
    right = top.twinx()
    right.stairs(100 * line.accuracy, line.edges, baseline=None, color=COLOURS[1], lw=0.8, ls=":")
    right.set_ylabel("accuracy, % (dotted)", fontsize=8, color=COLOURS[1])
    bottom.stairs(100 * line.flipped, line.edges, baseline=None, color=COLOURS[0], label="flipped")
    t = np.linspace(line.edges[0], line.edges[-1], 201)
    bottom.plot(t, 100 * flip_share(t), color="0.3", ls="--", lw=1, label="arctan|t| / pi")
    bottom.legend(frameon=False, fontsize=8)
    bottom.set(xlabel="t", ylabel="% of weights")
    for axes in (top, bottom):
        axes.spines[["top"]].set_visible(False)
        axes.margins(x=0)
    figure.set_label(line.summary())
    return figure


def trajectory_figure(path: Trajectory) -> Figure:
    """Draw a path in its plane, and the shares of variance beside those of a random walk.

    Args:
        path: as from `qlab.diagnose.trajectory.trajectory`.
    """
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.4), dpi=80, layout="constrained")
    plane, bars = figure.subplots(1, 2)
    plane.plot(path.a, path.b, color="0.6", lw=1)
    dots = plane.scatter(path.a, path.b, c=path.steps, cmap="viridis", s=18, zorder=3)
    plane.annotate(
        f"step {path.steps[0]}", (path.a[0], path.b[0]), fontsize=8, xytext=(4, 4), textcoords="offset points"
    )
    plane.annotate(f"step {path.steps[-1]}", (0, 0), fontsize=8, xytext=(4, 4), textcoords="offset points")
    plane.margins(0.15)
    plane.set(xlabel="first component", ylabel="second component")
    figure.colorbar(dots, ax=plane, label="step", ticks=MaxNLocator(6, integer=True))
    table = path.components()
    bars.bar(table["k"] - 0.2, 100 * table["explained"], 0.38, color=COLOURS[0], label="this path")
    bars.bar(table["k"] + 0.2, 100 * table["null"], 0.38, color="0.75", hatch="//", label="a random walk")
    bars.set(xlabel="component", ylabel="% of the variance")
    bars.set_xticks(table["k"])
    bars.legend(frameon=False, fontsize=8)
    for axes in (plane, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(path.summary())
    return figure
