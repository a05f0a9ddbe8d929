r"""Gradient mismatch at the inputs: what an attack follows, against the change of the loss itself, example by example.

    g_n = d loss_n / d x_n   as back-propagated
    CDG_ni = (loss(x_n + eps e_i) - loss(x_n - eps e_i)) / (2 eps)
    grad_x E loss(x_n + s u),   u ~ N(0, I)

A cosine is taken in every example, for averages over examples would hide those whose gradient is zero; reported are the mean and
its 95 % interval over examples. Examples with a zero gradient have no cosine and are counted out. The reliability is that of the
mean correlation of halves, R = 2 m / (1 + m), m = mean_n r_n: a mean of 2 r_n / (1 + r_n) would be ruled by single r_n near -1.

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
from qlab.diagnose.smoothing import SIDES, rms, spearman_brown, subset
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

    def losses(steps: Tensor, sign: int) -> Tensor:
        """Return the losses (K, N) with sign * steps (K, N, F) added, the steps taken a part at a time."""
        out = []
        for some in steps.split(max(1, _ROWS // x.numel())):
            moved = x.flatten(1).repeat(len(some), 1, 1)
            moved[:, :, index] += sign * some
            with torch.no_grad():
                z = net(moved.reshape(-1, *x.shape[1:]))
            out.append(J.loss(J.beta * z, J.y.repeat(len(some))).reshape(len(some), N))
        return torch.cat(out)

    if reference == "coordinate":
        step = width * torch.eye(F, dtype=x.dtype, device=x.device)[:, None].expand(F, N, F)
        truth = ((losses(step, 1) - losses(step, -1)) / (2 * width)).T.double().cpu()
        R, drawn = 1.0, 0
    else:
        u = torch.randn(pairs, N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
        step = width * u
        v = (u * ((losses(step, 1) - losses(step, -1)) / (2 * width))[..., None]).double().cpu()
        truth, drawn = v.mean(0), pairs
        halves = zip(v[: pairs // 2].mean(0), v[pairs // 2 :].mean(0), strict=True)
        r = np.array([cosine(a, b) for a, b in halves])
        r = r[np.isfinite(r)]
        R = spearman_brown(float(r.mean())) if len(r) else math.nan
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
