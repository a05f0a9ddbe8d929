"""The exact adversary as static figures: cells of the plane with nearest points, the true curve of robustness, attacks over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.attacks.base import Attacked
    from qlab.attacks.exact import Exact

__all__ = ["exact_figure", "overestimation_figure"]

MOST_ARROWS = 60
_DASHES = ("--", "-.", ":")


def exact_figure(result: Exact) -> Figure:
    """Draw the true share of robust examples over eps; for two inputs also the cells, and arrows to the nearest points.

    Args:
        result: as from `qlab.attacks.exact.exact_adversary`.
    """
    drawn = result.plane is not None
    figure = Figure(figsize=(8.8 if drawn else 4.8, 3.8), dpi=80, layout="constrained")
    axes = figure.subplots(1, 2 if drawn else 1, squeeze=False)[0]
    if drawn:
        _cells(axes[0], result)
    _truth(axes[-1], result)
    _finish(axes[-1], result)
    figure.set_label(result.summary())
    return figure


def overestimation_figure(exact: Exact, attacks: Sequence[Attacked]) -> Figure:
    """Draw the robust share that each attack leaves over eps against the truth, and its distances against the true ones.

    Args:
        exact: the truth.
        attacks: results on the same examples, in the same norm.
    """
    from qlab.attacks.exact import overestimation

    table = overestimation(exact, attacks)
    figure = Figure(figsize=(9.2, 3.8), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    _truth(left, exact)
    ends = exact.upper[np.isfinite(exact.upper) & exact.clean]
    right.axline((0, 0), slope=1, color="0.6", lw=1, label="the truth")
    for i, attacked in enumerate(attacks):
        colour, name = COLOURS[(i + 1) % len(COLOURS)], attacked.attack
        x, share = _curve(np.where(exact.clean, attacked.distance, 0.0))
        left.plot(x, share, drawstyle="steps-post", color=colour, ls=_DASHES[i % len(_DASHES)], lw=1.5, label=name)
        shown = exact.clean & attacked.success & np.isfinite(exact.upper)
        right.plot(
            exact.upper[shown], attacked.distance[shown], "os^vD"[i % 5], ms=4, alpha=0.6, color=colour, label=name
        )
    _finish(left, exact)
    right.set(xlabel=f"true distance ({exact.norm})", ylabel="distance found", title="Never below the line")
    if len(ends):
        right.set_xlim(0, 1.05 * float(ends.max()) or 1.0)
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    rows = "; ".join(
        f"{row.attack}: median {row.median_ratio:.3g} times the truth, misses {row.missed:.0%}"
        for row in table.itertuples()
    )
    figure.set_label(f"{exact.summary()} Attacks against it: {rows}.")
    return figure


def _curve(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eps and the share of examples farther away than eps."""
    x = np.sort(distance[np.isfinite(distance)])
    return np.append(0.0, x), 1 - np.arange(len(x) + 1) / len(distance)


def _truth(axes: Axes, result: Exact) -> None:
    x, share = _curve(result.upper)
    axes.plot(x, share, drawstyle="steps-post", color="black", lw=1.8, label="truth")
    if not result.known.all():
        x, share = _curve(result.lower)
        axes.plot(x, share, drawstyle="steps-post", color="0.5", lw=1.2, label="proven so far")


def _finish(axes: Axes, result: Exact) -> None:
    axes.set(
        xlabel=f"eps ({result.norm})",
        ylabel="robust and right",
        title="Share of examples that no point within eps breaks",
    )
    axes.title.set_fontsize(10)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _cells(axes: Axes, result: Exact) -> None:
    from matplotlib.collections import PolyCollection

    assert result.plane is not None
    colours = [COLOURS[c % len(COLOURS)] for c in result.plane.classes]
    cells = PolyCollection(
        list(result.plane.polygons), facecolors=colours, edgecolors="white", linewidths=0.3, alpha=0.35
    )
    axes.add_collection(cells)
    x = result.x.double().cpu().reshape(-1, 2).numpy()
    y, to = result.y.cpu().numpy(), result.point.reshape(-1, 2).numpy()
    for label in np.unique(y):
        at = y == label
        axes.plot(
            *x[at].T,
            "os^vD"[label % 5],
            ms=4,
            color=COLOURS[label % len(COLOURS)],
            mec="black",
            mew=0.4,
            label=f"class {label}",
        )
    for i in np.flatnonzero(result.clean & np.isfinite(result.upper))[:MOST_ARROWS]:
        axes.annotate(
            "", to[i], x[i], arrowprops={"arrowstyle": "->", "lw": 0.8, "color": "0.2", "shrinkA": 0, "shrinkB": 0}
        )
    corners = result.plane.vertices
    axes.set(xlim=(corners[:, 0].min(), corners[:, 0].max()), ylim=(corners[:, 1].min(), corners[:, 1].max()))
    axes.set_title(f"{len(result.plane.classes):,} cells; arrows to the nearest other class", fontsize=10)
    axes.set_aspect("equal")
    axes.legend(frameon=True, fontsize=8)
