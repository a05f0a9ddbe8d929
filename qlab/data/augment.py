"""Augmentation of a whole batch in a few tensor operations, without a loop over samples.

Shapes: x (N, C, H, W), any dtype and device; one offset, coin or centre per sample, shape (N,).

    crop     pads every picture with `padding` black pixels and cuts an H x W window at (top, left), 0 <= top, left <= 2 padding
    mirror   reverses the columns of the pictures whose coin is true
    cutout   sets a size x size square around a random pixel to zero, cut off at the border

Crop and mirror work on the raw uint8 pixels, before normalisation, which moves a quarter of the bytes that floats would take.
Cutout works after normalisation, where zero is the training mean. The random numbers are drawn on the CPU and are few: runs on
a CPU and on a GPU see the same pictures.

Reference: crop and mirror as in He et al. 2015 (arXiv:1512.03385, section 4.2); cutout of DeVries and Taylor 2017
(arXiv:1708.04552).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation", "augmented", "crop", "cutout", "mirror"]


def crop(x: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Cut window n of the zero-padded picture n at (top[n], left[n]).

    Args:
        x: (N, C, H, W).
        top: (N,) int64 in [0, 2 padding].
        left: (N,) int64 in [0, 2 padding].
        padding: width of the black border, pixels.

    Returns:
        (N, C, H, W), `out[n, :, i, j] = padded[n, :, top[n] + i, left[n] + j]`.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, 2p+1, 2p+1, H, W)
    return windows[torch.arange(n, device=x.device), :, top, left]


def mirror(x: Tensor, coins: Tensor) -> Tensor:
    """Reverse the columns of picture n where coins[n] is true; x (N, C, H, W), coins (N,) bool."""
    return torch.where(coins[:, None, None, None], x.flip(-1), x)


def cutout(x: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """Set to zero the square of side `size` whose centre is (row[n], column[n]).

    The square covers rows `row - size // 2` to `row - size // 2 + size - 1` and likewise columns, as far as they exist.

    Args:
        x: (N, C, H, W).
        row: (N,) int64 in [0, H).
        column: (N,) int64 in [0, W).
        size: side of the square, pixels.
    """
    start = size // 2
    i = torch.arange(x.shape[2], device=x.device) - (row[:, None] - start)  # (N, H), offset from the upper edge
    j = torch.arange(x.shape[3], device=x.device) - (column[:, None] - start)
    hole = ((i >= 0) & (i < size))[:, :, None] & ((j >= 0) & (j < size))[:, None, :]
    return x.masked_fill(hole[:, None], 0)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirror and cutout; each is off at 0 or False.

    Args:
        padding: pixels of black border for the random crop.
        mirror: whether a picture is mirrored with probability 1/2.
        cutout: side of the erased square, pixels.
    """

    padding: int = 4
    mirror: bool = True
    cutout: int = 0

    def move(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and mirror raw pixels (N, C, H, W)."""
        n = len(x)
        if self.padding:
            offsets = torch.randint(2 * self.padding + 1, (2, n), generator=generator).to(x.device)
            x = crop(x, offsets[0], offsets[1], self.padding)
        if self.mirror:
            x = mirror(x, torch.randint(2, (n,), generator=generator).bool().to(x.device))
        return x

    def erase(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Cut out a square of normalised inputs (N, C, H, W)."""
        if not self.cutout:
            return x
        row = torch.randint(x.shape[2], (len(x),), generator=generator).to(x.device)
        column = torch.randint(x.shape[3], (len(x),), generator=generator).to(x.device)
        return cutout(x, row, column, self.cutout)


def augmented(
    x: Tensor, transform: Callable[[Tensor], Tensor], augmentation: Augmentation | None, generator: torch.Generator
) -> Tensor:
    """Return raw inputs moved, normalised and erased, in this order; only normalised where there is no augmentation.

    Args:
        x: (N, ...) raw inputs.
        transform: normalises.
        augmentation: what is done, or None.
        generator: of its draws.
    """
    if augmentation is None:
        return transform(x)
    return augmentation.erase(transform(augmentation.move(x, generator)), generator)
