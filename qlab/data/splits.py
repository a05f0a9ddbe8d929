"""Parts of a data set: the tensors of a part, how parts are cut, and what their pixels are on average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Source", "Split", "channel_statistics", "strata", "stratified_order"]

_CHUNK = 1 << 20  # values that are looked at once; bounds the memory in use


@dataclass(frozen=True)
class Split:
    """The raw tensors of one part.

    Args:
        x: (N, C, H, W) uint8 (or float32, for arrays of your own), (N, D) float32, or tokens (N, T) int64.
        y: (N,) int64, in [0, number of classes); of tokens (N, T), a label for each.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Source:
    """A data set as it is stored: the parts it has of its own, and the names of its classes."""

    train: Split
    class_names: tuple[str, ...]
    test: Split | None = None
    val: Split | None = None


def strata(y: Tensor) -> Tensor:
    """Return the class (N,) by which parts are cut in proportion; windows with labels (N, T) are all of one."""
    return y if y.ndim == 1 else y.new_zeros(len(y))


def stratified_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random permutation of the samples of which every beginning holds each class in proportion.

    The k-th of the n_c samples of class c (in random order) stands at the quantile (k + 1/2) / n_c, and samples are sorted by
    quantile. In any beginning of the permutation the count of a class differs from its share by less than one sample per class.

    Args:
        y: (N,) labels.
        generator: draws the order within classes and among equal quantiles.

    Returns:
        (N,) int64.
    """
    order = torch.randperm(len(y), generator=generator)
    labels, by_class = torch.sort(y[order], stable=True)
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts
    quantile = torch.empty(len(y), dtype=torch.float64)
    quantile[by_class] = ((torch.arange(len(y)) - first[labels]).double() + 0.5) / counts[labels]
    return order[torch.argsort(quantile, stable=True)]


def channel_statistics(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel, on the [0, 1] scale for uint8.

    Goes through the set in chunks, so neither a memory map nor the float copy of a set has to fit into memory. A constant
    channel gets the standard deviation 1, so that it normalises to zero.

    Args:
        x: (N, C, H, W) or (N, D), uint8 or float.
        rows: (M,) int64, the samples that count; None for all.

    Returns:
        mean, std: float32 of shape (C,) or (D,). The deviation is that of the population (divided by N).
    """
    step = max(1, _CHUNK // max(1, x[0].numel()))
    n = len(x) if rows is None else len(rows)

    def chunks() -> Iterator[np.ndarray]:
        """Yield (C, number of values) arrays."""
        for start in range(0, n, step):
            part = x[start : start + step] if rows is None else x.index_select(0, rows[start : start + step])
            yield part.numpy().swapaxes(0, 1).reshape(x.shape[1], -1)

    if x.dtype == torch.uint8:
        # Counting the 256 values is exact, and several times as fast as summing floats.
        counts = np.zeros((x.shape[1], 256), np.int64)
        for chunk in chunks():
            for channel, values in enumerate(chunk):
                counts[channel] += np.bincount(values, minlength=256)
        share = counts / counts.sum(1, keepdims=True)
        levels = np.arange(256) / 255
        mean = share @ levels
        std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    else:
        total = n * (x[0].numel() // x.shape[1])
        mean = sum(chunk.sum(1, dtype=np.float64) for chunk in chunks()) / total
        std = np.sqrt(sum(((chunk - mean[:, None]) ** 2).sum(1) for chunk in chunks()) / total)
    std = np.where(std > 1e-7 * np.abs(mean), std, 1.0)  # below the resolution of float32 it is rounding
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
