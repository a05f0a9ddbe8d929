"""Pictures of a data set as a sheet, and the confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qlab.errors import InputError
from qlab.plots.figure import Figure

__all__ = ["confusion_figure", "picture_figure"]


def picture_figure(x: Tensor, titles: Sequence[str], *, columns: int = 10, alt: str = "") -> Figure:
    """Draw pictures in rows with a title above each.

    Args:
        x: (N, C, H, W) uint8 pictures as `data.split(...).x` holds them, C = 1 or 3.
        titles: N lines.
        columns: pictures in a row.
        alt: what the sheet shows, before the titles are listed.

    Raises:
        InputError: for tensors that are no pictures, or titles that do not match.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"picture_figure got a tensor of shape {tuple(x.shape)}; expected pictures (N, 1 or 3, H, W)")
    if len(titles) != len(x):
        raise InputError(f"picture_figure got {len(titles)} titles for {len(x)} pictures; give one each")
    rows = max(1, -(-len(x) // columns))
    figure = Figure(figsize=(0.95 * columns, 1.2 * rows), dpi=80, layout="constrained")
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, picture, title in zip(figure.axes, x.cpu().numpy(), titles, strict=False):
        axis.imshow(np.moveaxis(picture, 0, -1).squeeze(), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=8)
    figure.set_label((alt or f"{len(x)} pictures") + ": " + "; ".join(title.replace("\n", " ") for title in titles))
    return figure


def confusion_figure(y: Tensor, predicted: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw the confusion matrix: rows true classes, columns predicted ones, counts written in the cells.

    Args:
        y: (N,) true labels.
        predicted: (N,) labels given by the classifier.
        class_names: one per class.
    """
    n = len(class_names)
    counts = np.bincount((n * y + predicted).cpu().numpy(), minlength=n * n).reshape(n, n)
    figure = Figure(figsize=(2.2 + 0.42 * n, 1.4 + 0.38 * n), dpi=80, layout="constrained")
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    axis.imshow(share, cmap="cividis", vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        axis.text(
            j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color="w" if share[i, j] < 0.6 else "k"
        )
    axis.set_xticks(range(n), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0, fontsize=8)
    axis.set_yticks(range(n), class_names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    wrong = counts - np.diag(np.diag(counts))
    i, j = divmod(int(wrong.argmax()), n)
    worst = (
        f"most often confused: {class_names[i]} taken for {class_names[j]}, {wrong[i, j]} times" if wrong.any() else ""
    )
    figure.set_label(
        f"Confusion matrix of {n} classes: {int(np.trace(counts))} of {int(counts.sum())} right; {worst or 'no mistake'}."
    )
    return figure
