"""Gradient mismatch as static figures: the surrogate against the truth, predicted against exact flips, circulation by space."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.diagnose.flip_oracle import FlipOracle
    from qlab.diagnose.gradients import Mismatch
    from qlab.diagnose.honesty import Circulation

__all__ = ["circulation_figure", "flip_figure", "mismatch_figure"]

MAX_LAYERS, MAX_POINTS = 6, 2000
_MARKS = ("o", "s", "^")


def mismatch_figure(result: Mismatch) -> Figure:
    """Draw the surrogate's gradient over the truth, a row per reference and a column per layer.

    Both axes are scaled to their largest magnitude, for a cosine does not see scale; points in the shaded quarters have the
    wrong sign.

    Args:
        result: as from `qlab.diagnose.mismatch`; at most the first 6 layers are drawn.
    """
    layers = list(dict.fromkeys(row.layer for row in result.rows))
    references = list(dict.fromkeys(row.reference for row in result.rows))
    shown = layers[:MAX_LAYERS]
    figure = Figure(
        figsize=(1.2 + 2.4 * max(1, len(shown)), 0.6 + 2.4 * max(1, len(references))), dpi=80, layout="constrained"
    )
    grid = figure.subplots(max(1, len(references)), max(1, len(shown)), squeeze=False)
    rows = {(row.layer, row.reference): row for row in result.rows}
    for i, reference in enumerate(references):
        for j, layer in enumerate(shown):
            axes = grid[i, j]
            row = rows.get((layer, reference))
            if row is None:
                axes.text(0.5, 0.5, "not compared", ha="center", va="center", color="0.4", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
            else:
                _scatter(axes, *result.points[layer, reference], COLOURS[i], _MARKS[i])
                axes.set_title(f"{layer}: cos {_number(row.cosine)}", fontsize=9)
            if j == 0:
                axes.set_ylabel("surrogate, scaled", fontsize=9)
            axes.set_xlabel(f"{reference}, scaled", fontsize=9)
    left = len(layers) - len(shown)
    figure.set_label(result.summary() + (f" Not drawn: {left} more layers." if left else ""))
    return figure


def flip_figure(result: FlipOracle) -> Figure:
    """Draw -2 w g over the exact loss change of each flip, and both as sorted curves.

    Args:
        result: as from `qlab.diagnose.flip_oracle`.
    """
    figure = Figure(figsize=(8.4, 3.4), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, result.predicted, result.delta, COLOURS[0], "o")
    left.set(xlabel="exact change of the loss, scaled", ylabel="predicted, -2 w g, scaled")
    left.set_title(f"{result.layer}: cos {_number(result.agreement.cosine)}", fontsize=10)
    order = np.argsort(result.delta)
    rank = np.arange(len(order))
    thin = np.linspace(0, len(order) - 1, min(len(order), MAX_POINTS)).astype(int)
    right.plot(rank[thin], result.predicted[order][thin], ".", ms=3, alpha=0.5, color=COLOURS[1], label="predicted")
    right.plot(rank[thin], result.delta[order][thin], color=COLOURS[0], lw=1.8, label="exact")
    right.axhline(0, color="0.7", lw=0.8, zorder=0)
    right.set(xlabel="flips, the best first", ylabel="change of the loss")
    right.set_title(f"{int((result.delta < 0).sum()):,} flips lower the loss", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    figure.set_label(result.summary())
    return figure


def circulation_figure(result: Circulation) -> Figure:
    """Draw every loop's circulation and every segment's residual, a row per space, on a log axis.

    Args:
        result: as from `qlab.diagnose.circulation`.
    """
    spaces = result.spaces
    figure = Figure(figsize=(8, 1.3 + 0.42 * max(1, len(spaces))), dpi=80, layout="constrained")
    axes = figure.subplots()
    floor = 1e-17
    for i, loops in enumerate(spaces):
        for k, (label, values) in enumerate((("circulation", loops.circulation), ("residual", loops.residual))):
            values = values[np.isfinite(values)]
            at = np.full(len(values), i + 0.16 * (2 * k - 1))
            said = label if i == 0 else None
            axes.plot(np.maximum(values, floor), at, _MARKS[k], color=COLOURS[k], ms=5, alpha=0.7, label=said)
        error = loops.error[np.isfinite(loops.error)]
        if len(error):
            said = "quadrature error" if i == 0 else None
            axes.plot([max(float(error.mean()), floor)], [i - 0.16], "|", color="0.3", ms=10, label=said)
    axes.set_yticks(range(len(spaces)), [loops.space for loops in spaces])
    axes.set_ylim(len(spaces) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(right=1.5)
    axes.set_xlabel("0 for a gradient, 1 for a vortex")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(result.summary())
    return figure


def _scatter(axes: Axes, g: NDArray[np.float64], t: NDArray[np.float64], colour: str, mark: str) -> None:
    g, t = (v / (np.abs(v).max() or 1.0) for v in (g, t))
    thin = np.linspace(0, len(g) - 1, min(len(g), MAX_POINTS)).astype(int)
    for x, y in ((-1.15, 0), (0, -1.15)):  # upper left and lower right: the signs differ
        axes.fill_between([x, x + 1.15], y, y + 1.15, color="0.92", zorder=0, lw=0)
    axes.axhline(0, color="0.7", lw=0.8, zorder=1)
    axes.axvline(0, color="0.7", lw=0.8, zorder=1)
    axes.plot(t[thin], g[thin], mark, color=colour, ms=3, alpha=0.5, mew=0)
    axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"
