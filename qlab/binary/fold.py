"""Folding: what stands between a binary layer and the next sign becomes one comparison of integers.

A binary layer gives integers z with |z| <= K. Whatever per-channel function f follows (bias, scale, batch norm, a monotone
nonlinearity) and then sign, is a function of one integer per channel with two values. If it switches at most once, it is

    sign(f(z)) = +1  <=>  (z >= T) xor flip           flip where f decreases, as with a negative batch-norm scale

T is found by asking f itself, in float32 as torch computes it, at every integer from -K to K. So the comparison equals the
net that was trained at ties and in every rounding, by construction and not up to them.

    batch norm:  f(z) = alpha z + beta,   alpha = gamma / sqrt(var + eps),   beta = bias - mean alpha

alpha and beta are read off torch's batch norm at 1 and 0, and whether it rounds once (FMA) or twice is seen by comparing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.binary.kernels import reference
from qlab.errors import InputError

__all__ = ["Affine", "Threshold", "fold_batch_norm", "fold_sign"]

NEVER = np.iinfo(np.int32).min
CHUNK = 2**20  # grid values evaluated at a time


@dataclass(frozen=True)
class Threshold:
    """Sign of a per-channel function of an integer: bit 1 (that is -1) where (z < threshold) xor flip.

    Args:
        threshold: int32 (C,).
        flip: bool (C,).
        ties: pairs of a channel and an integer at which the function is exactly zero, which counts as +1.
    """

    threshold: NDArray[np.int32]
    flip: NDArray[np.bool_]
    ties: int


@dataclass(frozen=True)
class Affine:
    """Batch norm in eval mode, y = alpha z + beta, as torch computes it.

    Args:
        alpha, beta: float32 (C,).
        fused: rounded once (FMA) or after each of the two operations.
    """

    alpha: NDArray[np.float32]
    beta: NDArray[np.float32]
    fused: bool


@torch.no_grad()
def fold_sign(f: Callable[[Tensor], Tensor], k: int, channels: int, spatial: bool) -> Threshold | None:
    """Return the threshold of sign(f(z)) over |z| <= k, or None where a channel's sign switches more than once.

    Args:
        f: takes (P, C, 1, 1) if `spatial`, else (P, C), and returns the same shape.
        k: fan-in K.
        channels: C.
        spatial: whether channels stand before two image dimensions.

    Raises:
        InputError: f gives NaN.
    """
    shape = (channels, 1, 1) if spatial else (channels,)
    threshold = np.full(channels, NEVER, np.int32)
    first: NDArray[np.bool_] | None = None
    last = np.zeros(channels, bool)
    switches = np.zeros(channels, np.int64)
    ties = 0
    rows = max(1, CHUNK // channels)
    for start in range(-k, k + 1, rows):
        z = torch.arange(start, min(start + rows, k + 1), dtype=torch.float32)
        grid = z.view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous()
        y = f(grid).reshape(-1, channels)
        if bool(y.isnan().any()):
            raise InputError("batch norm gives NaN: its statistics or weights are NaN or infinite")
        ties += int((y == 0).sum())
        positive = (y >= 0).numpy()
        before = positive[:1] if first is None else last[None]
        changed = np.concatenate([before, positive[:-1]]) != positive
        first = positive[0] if first is None else first
        last = positive[-1]
        switches += changed.sum(0)
        where = changed.any(0)
        threshold[where] = start + changed[:, where].argmax(0)
    if first is None or (switches > 1).any():
        return None
    # Starts at +1: it falls to -1 at the threshold, or never; starts at -1 and never switches: -1 throughout.
    flip = np.where(switches == 1, first, ~first)
    return Threshold(threshold, flip, ties)


@torch.no_grad()
def fold_batch_norm(norm: _BatchNorm, k: int = 512) -> Affine | None:
    """Return a batch norm in eval mode as alpha z + beta, exactly as torch computes it on this machine.

    Args:
        norm: with running statistics.
        k: integers up to which both ways of rounding are compared with torch.

    Returns:
        None where torch's result is neither of the two: the step then stays torch's own.

    Raises:
        InputError: statistics or weights are NaN or infinite.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return None
    state = [t.detach().float() for t in (mean, var, norm.weight, norm.bias) if t is not None]
    if not all(bool(t.isfinite().all()) for t in state):
        raise InputError("batch norm gives NaN: its statistics or weights are NaN or infinite")
    channels = len(mean)
    zeros = torch.zeros(channels)
    alpha = F.batch_norm(torch.ones(1, channels), zeros, var.cpu(), _cpu(norm.weight), zeros, eps=norm.eps)[0]
    own = nn.BatchNorm1d(channels, eps=norm.eps, affine=norm.affine).eval()
    own.load_state_dict({key: value.cpu() for key, value in norm.state_dict().items()})
    beta = own(torch.zeros(1, channels))[0]
    z = torch.linspace(-k, k, 257).round()[:, None].expand(-1, channels).contiguous()
    expected = own(z).numpy()
    for fused in (True, False):
        if np.array_equal(reference.affine(z.numpy(), alpha.numpy(), beta.numpy(), fused), expected):
            return Affine(alpha.numpy().copy(), beta.numpy().copy(), fused)
    return None


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()
