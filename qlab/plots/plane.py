"""Decision boundaries of classifiers of points in the plane."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.plots.figure import Figure

__all__ = ["decision_figure"]

_MARKS = (("o", "white"), ("s", "black"))
_GRID = 121  # points a side


def decision_figure(nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, *, columns: int = 4) -> Figure:
    """Draw where each net says class 1, with the points it is to tell apart.

    Args:
        nets: title -> net that maps (N, 2) to logits (N, 2), in eval mode on the CPU.
        x: (N, 2) points as the nets take them (normalised).
        y: (N,) labels 0 or 1.
        columns: panels in a row.

    Raises:
        InputError: for points that do not lie in the plane.
    """
    if x.ndim != 2 or x.shape[1] != 2:
        raise InputError(f"decision_figure got points of shape {tuple(x.shape)}; expected (N, 2)")
    low, high = x.amin(0) - 0.3, x.amax(0) + 0.3
    u, v = (torch.linspace(float(low[i]), float(high[i]), _GRID) for i in (0, 1))
    points = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).reshape(-1, 2)
    columns = min(columns, len(nets))
    rows = -(-len(nets) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * rows), dpi=80, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    said = []
    for axis in grid.flat[len(nets) :]:
        axis.set_axis_off()
    for axis, (title, net) in zip(grid.flat, nets.items(), strict=False):
        with torch.no_grad():
            p = net(points).softmax(1)[:, 1].reshape(_GRID, _GRID)
            right = (net(x).argmax(1) == y).float().mean().item()
        axis.contourf(u, v, p, levels=torch.linspace(0, 1, 11).tolist(), cmap="cividis", alpha=0.8)
        axis.contour(u, v, p, levels=[0.5], colors="black", linewidths=1.5)
        for label, (marker, colour) in enumerate(_MARKS):
            chosen = x[y == label]
            axis.scatter(chosen[:, 0], chosen[:, 1], s=9, marker=marker, color=colour, edgecolors="0.4", linewidths=0.4)
        axis.set_title(title, fontsize=9)
        axis.set_aspect("equal")
        said.append(f"{title} {right:.1%} right")
    figure.set_label("Decision boundaries (black) and class probability over the plane. " + "; ".join(said) + ".")
    return figure
