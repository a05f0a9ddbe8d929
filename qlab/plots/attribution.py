"""Attribution maps as static figures: inputs, exact ablation, and maps with their labels.

Orange counts for the class, purple with a minus against it; every map has its own scale, for their units differ. A score that is
exactly zero is hatched: dots where it is zero by construction or the references agree, slashes where the map says nothing though
the net changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from qlab.diagnose.attribution_maps import marks, plane
from qlab.errors import InputError
from qlab.plots.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.diagnose.attribution import AttributionMap, Attributions
    from qlab.diagnose.attribution_twins import Twins

__all__ = ["attribution_figure", "twins_figure"]

MARKED = 256  # cells of a map, up to which negative scores carry a minus
SUBJECT = {"deployed": "deployed net", "exact": "deployed net", "surrogate": "SURROGATE"}


def attribution_figure(maps: Attributions, examples: int = 3) -> Figure:
    """Draw a row per example: the input, exact ablation, and every map.

    Args:
        maps: as from `qlab.diagnose.attribution.attribute`.
        examples: how many, from the first.
    """
    n = min(examples, len(maps.x))
    if n < 1:
        raise InputError(f"examples must be at least 1, not {examples!r}")
    figure = Figure(figsize=(1.75 * (2 + len(maps.maps)), 0.9 + 1.8 * n), dpi=80, layout="constrained")
    axes = figure.subplots(n, 2 + len(maps.maps), squeeze=False)
    for i in range(n):
        _row(axes[i], maps, i, titled=i == 0)
    figure.set_label(maps.summary())
    return figure


def twins_figure(twins: Twins, example: int = 0) -> Figure:
    """Draw one example: the float net's maps above, those of its quantized twin below.

    Args:
        twins: as from `qlab.diagnose.attribution_twins.twins`.
        example: which of the batch.
    """
    if not 0 <= example < len(twins.same_class):
        raise InputError(f"example must be 0 to {len(twins.same_class) - 1}, not {example!r}")
    columns = 2 + len(twins.quantized_net.maps)
    figure = Figure(figsize=(1.75 * columns, 5.0), dpi=80, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for row, (label, maps) in enumerate((("float net", twins.float_net), ("quantized net", twins.quantized_net))):
        _row(axes[row], maps, example, titled=True)
        axes[row][0].set_ylabel(label)
    figure.set_label(twins.summary())
    return figure


def _row(axes: NDArray, maps: Attributions, i: int, titled: bool) -> None:
    axes[0].imshow(plane(maps.x[i]), cmap="gray_r", aspect=_aspect(maps.x[i]))
    axes[0].set_xlabel(f"class {maps.target[i]}", fontsize=8)
    _map(axes[1], maps.ablation[i][maps.groups], None)
    axes[1].set_xlabel(f"F(x) - F(x0) = {maps.difference[i]:.3g}", fontsize=8)
    for panel, m in zip(axes[2:], maps.maps, strict=False):
        _map(panel, m.scores[i][maps.groups], m.zeros[i][maps.groups])
        panel.set_xlabel(_under(m, i), fontsize=8)
    if titled:
        axes[0].set_title("input", fontsize=9)
        axes[1].set_title("exact ablation\n[deployed net]", fontsize=9)
        for panel, m in zip(axes[2:], maps.maps, strict=False):
            panel.set_title(f"{m.title}\n[{SUBJECT[m.explains]}]", fontsize=9)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])


def _under(m: AttributionMap, i: int) -> str:
    if m.silent[i]:
        return "NO INFORMATION"
    rank = f"rank {m.rank_ablation[i]:.2f}" if not np.isnan(m.rank_ablation[i]) else "no order"
    return rank + (f"\nmisses {m.relative[i]:.1%}" if m.complete else "")


def _map(axes: Axes, scores: NDArray[np.float64], zeros: NDArray[np.uint8] | None) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    from qlab.diagnose.guard import SILENT

    shown = plane(scores)
    top = float(np.abs(shown).max()) or 1.0
    axes.imshow(shown, cmap="PuOr_r", vmin=-top, vmax=top, interpolation="nearest", aspect=_aspect(scores))
    if shown.size <= MARKED:
        for r, c in np.argwhere(shown < -0.2 * top):
            axes.text(c, r, "-", ha="center", va="center", fontsize=8, color="w" if shown[r, c] < -0.5 * top else "k")
    if zeros is None:
        return
    codes = marks(zeros)
    for marked, hatch in (((codes > 0) & (codes != SILENT), "..."), (codes == SILENT, "/////")):
        cells = [Rectangle((c - 0.5, r - 0.5), 1, 1) for r, c in np.argwhere(marked)]
        axes.add_collection(PatchCollection(cells, hatch=hatch, facecolor="none", edgecolor="0.45", linewidth=0))


def _aspect(a: NDArray[np.float64]) -> Literal["equal", "auto"]:
    return "equal" if a.ndim >= 2 else "auto"
