"""Losses of logits (N, classes, ...) against labels (N, ...)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "squared_hinge"]


def squared_hinge(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean over samples and classes of max(0, 1 - t z)^2, t = +1 for the label and -1 for the others.

    Args:
        logits: (N, classes, ...).
        y: (N, ...) labels.

    Reference: the loss of BinaryConnect and BinaryNet (Courbariaux et al. 2015, 2016).
    """
    t = 2 * F.one_hot(y, logits.shape[1]).movedim(-1, 1).to(logits.dtype) - 1
    return (1 - t * logits).clamp(min=0).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squared_hinge": squared_hinge,
}
