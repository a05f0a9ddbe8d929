"""Two methods in lockstep, as a static figure: what they lose, what they deploy, where they decide differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.cockpit import smoothed
from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.duel import Duel, Plane

__all__ = ["duel_figure"]

_LAYERS = 4  # that are drawn one by one
_DASHES = ("--", ":", "-.", (0, (1, 3)))
_MARKS = ("o", "s", "^", "D")


def duel_figure(result: Duel) -> Figure:
    """Draw losses, accuracies and what differs over the steps, and both decisions over the plane where there is one.

    Args:
        result: as from `qlab.duel.duel`.
    """
    flat = result.plane is None
    figure = Figure(figsize=(9, 3.0 if flat else 5.2), dpi=80, layout="constrained")
    grid = figure.add_gridspec(1 if flat else 2, 3)
    loss, accuracy, differ = (figure.add_subplot(grid[0, k]) for k in range(3))
    for k, (name, colour, dash) in enumerate(zip(result.names, COLOURS, ("-", "--"), strict=False)):
        steps = np.arange(1, len(result.loss) + 1)
        loss.plot(steps, smoothed(result.loss[:, k]), color=colour, ls=dash, lw=1.5, label=name)
        accuracy.plot(result.at, 100 * result.accuracy[:, k], color=colour, ls=dash, lw=1.5, label=name)
    differ.plot(result.at, 100 * result.apart, color="0.25", lw=2, label="all weights")
    for k, name in enumerate(result.layers[:_LAYERS]):
        differ.plot(result.at, 100 * result.differ[:, k], color=COLOURS[2 + k % 4], ls=_DASHES[k], lw=1.2, label=name)
    differ.plot(result.at, 100 * result.disagree, color=COLOURS[1], lw=1.5, marker=".", ms=4, label="decisions")
    loss.set(title="Loss of the batch (mean of 9)", xlabel="step")
    accuracy.set(title="Deployed accuracy, %", xlabel="step")
    differ.set(
        title="What differs, %",
        xlabel="step",
        ylim=(0, 140 * max(result.apart.max(), result.differ.max(), result.disagree.max()) or 1),
    )
    for axes in (loss, accuracy, differ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=7, ncols=2 if axes is differ else 1, loc="upper left" if axes is differ else "best"
        )
    if result.plane is not None:
        panels = [figure.add_subplot(grid[1, k]) for k in range(3)]
        _planes(panels, result.plane, result.names)
    figure.set_label(result.summary())
    return figure


def _planes(panels: list[Axes], plane: Plane, names: tuple[str, str]) -> None:
    top = max(1, int(max(plane.a.max(), plane.b.max(), plane.y.max())))
    for axes, name, classes in zip(panels, names, (plane.a, plane.b), strict=False):
        axes.pcolormesh(
            plane.u, plane.v, classes, cmap="cividis", vmin=0, vmax=top, shading="nearest", alpha=0.6, rasterized=True
        )
        axes.set_title(f"What {name} decides", fontsize=10)
        _points(axes, plane)
    apart = plane.a != plane.b
    panels[2].contourf(
        plane.u, plane.v, apart.astype(float), levels=[0.5, 1.5], colors=[COLOURS[1]], alpha=0.35, hatches=["//"]
    )
    panels[2].set_title(f"They differ on {100 * plane.disagree:.1f} %", fontsize=10)
    _points(panels[2], plane)


def _points(axes: Axes, plane: Plane) -> None:
    for label in np.unique(plane.y):
        chosen = plane.x[plane.y == label]
        face = "white" if label % 2 == 0 else "black"
        axes.scatter(
            chosen[:, 0], chosen[:, 1], s=9, marker=_MARKS[label % 4], color=face, edgecolors="0.3", linewidths=0.5
        )
    axes.set(aspect="equal", xlim=(plane.u[0], plane.u[-1]), ylim=(plane.v[0], plane.v[-1]))
    axes.tick_params(labelsize=7)
