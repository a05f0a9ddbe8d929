r"""Gradient mismatch at the inputs: what an attack follows, against the change of the loss itself, example by example.

    g_n = d loss_n / d x_n   as back-propagated
    CDG_ni = (loss(x_n + eps e_i) - loss(x_n - eps e_i)) / (2 eps)
    grad_x E loss(x_n + s u),   u ~ N(0, I)

A cosine is taken in every example, for averages over examples would hide those whose gradient is zero; reported are the mean and
its 95 % interval over examples. Examples with a zero gradient have no cosine and are counted out.

Shapes: x (N, ...), D inputs each, F of them compared; K pairs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.diagnose.agreement import agreement, cosine
from qlab.diagnose.functions import variant
from qlab.diagnose.objective import Objective
from qlab.diagnose.smoothing import SIDES, reliability, rms, subset
from qlab.errors import InputError

__all__ = ["input_pairs"]

_ROWS = 2**22  # numbers in a batch of changed inputs, at most


def input_pairs(
    J: Objective, reference: str, width: float | None, pairs: int, coordinates: int | None, seed: int
) -> tuple[dict[str, Any], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return the numbers of a `Compared` without its names, and (surrogate, truth), (N F,) each."""
    net = variant(J.net, "deployed")
    x = J.x.detach()
    N, D = len(x), x[0].numel()
    width = rms(x - x.mean()) / 4 if width is None else width
    index = subset(D, coordinates, seed).to(x.device)
    F = len(index)
    g = _input_gradient(J).flatten(1)[:, index]

    def losses(steps: Tensor) -> Tensor:
        """Return the losses (K, N) with steps (K, N, F) added."""
        out = []
        for some in steps.split(max(1, _ROWS // x.numel())):
            moved = x.flatten(1).repeat(len(some), 1, 1)
            moved[:, :, index] += some.to(x)
            with torch.no_grad():
                z = net(moved.reshape(-1, *x.shape[1:]))
            out.append(J.loss(J.beta * z, J.y.repeat(len(some))).reshape(len(some), N))
        return torch.cat(out)

    if reference == "coordinate":
        step = width * torch.eye(F, dtype=x.dtype, device=x.device)[:, None].expand(F, N, F)
        truth = ((losses(step) - losses(-step)) / (2 * width)).T.double().cpu()
        R, drawn = 1.0, 0
    else:
        u = torch.randn(pairs, N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
        v = (u * ((losses(width * u) - losses(-width * u)) / (2 * width))[..., None]).double().cpu()
        truth, drawn = v.mean(0), pairs
        halves = [reliability(v[:, n]) for n in range(N)]
        known = [value for value in halves if math.isfinite(value)]
        R = float(np.mean(known)) if known else math.nan
    g = g.double().cpu()
    each = np.array([cosine(a, b) for a, b in zip(g, truth, strict=True)])
    each = each[np.isfinite(each)]
    c = float(each.mean()) if len(each) else math.nan
    error = SIDES * float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    a = agreement(g, truth)
    row = {
        "cosine": c,
        "low": c - error,
        "high": c + error,
        "corrected": c / math.sqrt(R) if R > 0 else math.nan,
        "reliability": R,
        "spearman": a.spearman,
        "sign_agreement": a.sign_agreement,
        "n": a.n,
        "nonzero": a.nonzero,
        "width": width,
        "pairs": drawn,
    }
    return row, (g.flatten().numpy(), truth.flatten().numpy())


def _input_gradient(J: Objective) -> Tensor:
    """Return d loss_n / d x_n, (N, ...), as back-propagated; examples do not see each other in eval mode."""
    x = J.x.detach().clone().requires_grad_()
    value = J.loss(J.beta * J.net(x), J.y).sum()
    if not value.requires_grad:
        raise InputError("no gradient reaches the inputs: an operation in this net is not differentiable")
    return torch.autograd.grad(value, x)[0]
