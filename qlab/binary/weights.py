"""Which weights are signs: every output channel holds +a and -a only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SignWeight", "sign_weight"]


@dataclass(frozen=True)
class SignWeight:
    """A weight of signs.

    Args:
        signs: int8 +-1, of the weight's shape (O, ...).
        scale: float32 (O,), the magnitude of each output channel; None where all are 1.
    """

    signs: NDArray[np.int8]
    scale: NDArray[np.float32] | None


@torch.no_grad()
def sign_weight(weight: Tensor) -> SignWeight | str:
    """Return a weight as signs and scales, or the reason why it is none.

    Args:
        weight: (O, ...) of a linear layer or a convolution.
    """
    w = weight.detach().cpu().float()
    if not bool(w.isfinite().all()):
        return "its weights hold NaN or infinities"
    magnitude = w.abs().flatten(1)
    scale = magnitude.amax(1)
    if not bool((magnitude == scale[:, None]).all()):
        levels = len(torch.unique(w))
        return f"its weights take {levels:,} values, not two per output channel"
    if not bool((scale > 0).all()):
        return "an output channel has only zero weights"
    signs = np.where(w.numpy() < 0, np.int8(-1), np.int8(1))
    return SignWeight(signs, None if bool((scale == 1).all()) else scale.numpy().copy())
