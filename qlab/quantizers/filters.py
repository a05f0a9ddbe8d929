"""Filters: the rows of a weight (O, I, ...), each with statistics of its own; a bias (O,) is one filter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filter_dims", "filter_scale"]


def filter_dims(w: Tensor) -> tuple[int, ...]:
    """Return the dimensions of one filter: all but the first; of a bias its only one; of a number none."""
    return tuple(range(1, w.dim())) or tuple(range(w.dim()))


def filter_scale(w: Tensor) -> Tensor:
    """Return a = mean |w| of each filter, (O, 1, ...); never below the smallest normal number, for it is a scale."""
    dims = filter_dims(w)
    a = w.abs().mean(dims, keepdim=True) if dims else w.abs()
    return a.clamp(min=torch.finfo(w.dtype).tiny)
