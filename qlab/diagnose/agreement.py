r"""How well one vector, a gradient that is believed, agrees with another, the truth.

    cosine          <g, t> / (|g| |t|)                      of all coordinates, the large ones before all
    spearman        correlation of the ranks                 of all coordinates, whatever their scale
    sign agreement  share of {i: t_i != 0} with sign g_i = sign t_i       a coin gives 1/2

Cosine and rank correlation are NaN where a vector is zero (or constant, for ranks), the sign agreement where the truth is: then
there is nothing to agree with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlab.diagnose.base import plain
from qlab.errors import InputError

__all__ = ["Agreement", "agreement", "checked_index", "cosine", "weight_names"]


@dataclass(frozen=True)
class Agreement:
    """Agreement of a vector with the truth.

    Args:
        cosine: in [-1, 1].
        spearman: rank correlation, ties share their mean rank.
        sign_agreement: share of equal signs where the truth is not zero; a believed gradient of 0 has no sign and counts as wrong.
        n: coordinates compared.
        nonzero: those of them where the truth is not zero.
    """

    cosine: float
    spearman: float
    sign_agreement: float
    n: int
    nonzero: int


def cosine(g: Tensor, t: Tensor) -> float:
    """Return <g, t> / (|g| |t|), NaN where one of them is zero."""
    g, t = g.detach().flatten().double(), t.detach().flatten().double()
    g, t = g / g.abs().max().clamp(min=1e-300), t / t.abs().max().clamp(min=1e-300)  # squares must not underflow
    size = float(g.norm() * t.norm())
    return float((g @ t).clamp(-size, size)) / size if size > 0 else math.nan


def agreement(g: Tensor, t: Tensor) -> Agreement:
    """Compare a believed gradient with the truth.

    Args:
        g: believed, any shape.
        t: truth, of the same shape.

    Raises:
        InputError: shapes that differ.
    """
    if g.shape != t.shape:
        raise InputError(f"the vectors have shapes {tuple(g.shape)} and {tuple(t.shape)}; expected equal ones")
    g, t = g.detach().flatten().double().cpu(), t.detach().flatten().double().cpu()
    moves = t != 0
    signs = float((g.sign() == t.sign())[moves].double().mean()) if bool(moves.any()) else math.nan
    return Agreement(cosine(g, t), _spearman(g.numpy(), t.numpy()), signs, len(g), int(moves.sum()))


def _spearman(g: np.ndarray, t: np.ndarray) -> float:
    from scipy.stats import rankdata

    if len(g) < 2 or np.ptp(g) == 0 or np.ptp(t) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(g), rankdata(t))[0, 1])


def weight_names(net: nn.Module) -> dict[str, str]:
    """Return layer -> name of its weight among the net's parameters: those with at least two axes, latent ones where quantized.

    A layer is named by its module; a parameter of another name than `weight` by itself.
    """
    names = {}
    for name, p in plain(net).named_parameters():
        if p.dim() >= 2 and p.is_floating_point():
            short = f".{name}".replace(".parametrizations.", ".").removesuffix(".original").removeprefix(".")
            names[short.removesuffix(".weight")] = name
    return names


def checked_index(index: Tensor | None, w: Tensor) -> Tensor:
    """Return positions (F,) in the flat weight on its device, all of them for None.

    Raises:
        InputError: no int64 vector, positions out of range, or the same position twice.
    """
    if index is None:
        return torch.arange(w.numel(), device=w.device)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or len(index) == 0:
        given = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise InputError(f"index is {given}; expected positions (F,) in the flat weight, int64")
    if int(index.min()) < 0 or int(index.max()) >= w.numel():
        raise InputError(f"index runs from {int(index.min())} to {int(index.max())}; there are {w.numel()} weights")
    if len(index.unique()) < len(index):
        raise InputError("index holds a position twice; expected different ones")
    return index.to(w.device)
