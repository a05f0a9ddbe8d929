r"""The gradient of the Gaussian-smoothed loss, by antithetic pairs, with its own reliability.

    L_s(w) = E_{u ~ N(0, I)} L(w + s u)
    grad L_s = E[v],   v_k = u_k (L(w + s u_k) - L(w - s u_k)) / (2 s)

It exists where L is a staircase, needs no derivative, and is unbiased for every number of pairs. An estimate of few pairs is
noisy, though, and noise lowers any cosine with it. Two halves of the pairs tell by how much:

    r = cos(half 1, half 2)
    R = 2 r / (1 + r)       reliability of the whole (Spearman-Brown)
    c / sqrt(R)             the cosine without noise

Intervals: of a coordinate, mean +- 1.96 standard errors over pairs; of a cosine, the jackknife over pairs.

Source: Spall 1992; Nesterov, Spokoiny 2017 (Gaussian smoothing); Brown 1910, Spearman 1910 (reliability of two halves).

Shapes: K pairs, F smoothed coordinates; the others stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlab.diagnose.agreement import checked_index, cosine, weight_names
from qlab.diagnose.base import check
from qlab.diagnose.functions import variant
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError

__all__ = ["Cosine", "Smoothed", "perturbed_losses", "rms", "smoothed_gradient", "subset"]

_STACK = 2**23  # numbers in a stack of whole weights, at most
SIDES = 1.959963984540054  # normal quantile of 97.5 %


@dataclass(frozen=True)
class Cosine:
    """The cosine of a vector with a noisy estimate of the truth.

    Args:
        raw: c.
        low, high: interval of c, 95 %, by the jackknife over pairs; within [-1, 1].
        corrected: c / sqrt(R); NaN where R is not positive: the estimate is noise.
        reliability: R.
    """

    raw: float
    low: float
    high: float
    corrected: float
    reliability: float


@dataclass(frozen=True)
class Smoothed:
    """An estimate of grad L_s.

    Args:
        samples: v (K, F).
        index: (F,) positions in the flat weight.
        s: width of the smoothing.
    """

    samples: Tensor
    index: Tensor
    s: float

    @property
    def gradient(self) -> Tensor:
        """Return the mean of the samples, (F,)."""
        return self.samples.mean(0)

    @property
    def error(self) -> Tensor:
        """Return the standard errors of the gradient, (F,)."""
        return self.samples.std(0) / math.sqrt(len(self.samples))

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the 95 % intervals, (F,) each."""
        g, error = self.gradient, SIDES * self.error
        return g - error, g + error

    @property
    def reliability(self) -> float:
        """Return R = 2 r / (1 + r) of the two halves; NaN where one of them is zero."""
        return reliability(self.samples)

    def cosine(self, g: Tensor) -> Cosine:
        """Compare g (F,) with the smoothed gradient."""
        return compared(self.samples, g)


def reliability(samples: Tensor) -> float:
    """Return R = 2 r / (1 + r) with r the cosine of the means of the two halves of samples (K, F)."""
    half = len(samples) // 2
    return spearman_brown(cosine(samples[:half].mean(0), samples[half : 2 * half].mean(0)))


def spearman_brown(r: float) -> float:
    """Return 2 r / (1 + r), the reliability of a whole whose halves correlate by r; NaN for NaN."""
    return -math.inf if r <= -1 else 2 * r / (1 + r)


def compared(samples: Tensor, g: Tensor) -> Cosine:
    """Return the cosine of g (F,) with the mean of samples (K, F), corrected for noise, with its jackknife interval."""
    V, g = samples.double(), g.detach().double().flatten()
    K = len(V)
    total = V.sum(0)
    raw, R = cosine(g, total), reliability(V)
    # leaving out a pair: <g, total - v_k> and |total - v_k|^2 need inner products only
    along = (g @ total - V @ g) / g.norm()
    left = (total @ total - 2 * (V @ total) + (V * V).sum(1)).clamp(min=0).sqrt()
    c = along / left
    error = float(((K - 1) / K * (c - c.mean()).square().sum()).sqrt())
    corrected = raw / math.sqrt(R) if R > 0 else math.nan
    low, high = (float(np.clip(raw + side * error, -1, 1)) for side in (-SIDES, SIDES))
    return Cosine(raw, low, high, corrected, R)


def smoothed_gradient(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    layer: str,
    *,
    s: float | None = None,
    pairs: int = 200,
    index: Tensor | None = None,
    loss: str | Loss = "margin",
    beta: float = 1.0,
    seed: int = 0,
) -> Smoothed:
    """Return an unbiased estimate of grad L_s of the deployed net in the latent weights of a layer.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        layer: a name of `weight_names(net)`.
        s: width of the smoothing in units of the weight; its root mean square by default.
        pairs: K; the deployed net runs 2 K times.
        index: (F,) different positions in the flat weight that are smoothed, int64; all by default.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        beta: what the logits are multiplied by.
        seed: of the directions.

    Raises:
        UnknownNameError: no such layer.
        InputError: fewer than 4 pairs, a width that is not positive, an index out of range or twice; and what `check` says.
    """
    net, _ = check(net, x, y)
    J = Objective(variant(net, "deployed"), x, y, loss=loss, beta=beta)
    names = weight_names(J.net)
    if layer not in names:
        raise UnknownNameError("layer", layer, names)
    w = J.theta[names[layer]]
    s = rms(w) if s is None else s
    if pairs < 4 or not (math.isfinite(s) and s > 0):
        raise InputError(f"pairs is {pairs!r} and s {s!r}; expected at least 4 pairs and a positive width")
    index = checked_index(index, w)
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(pairs, len(index), generator=draw, dtype=torch.float64).to(w)
    up = perturbed_losses(J, names[layer], index, s * u)
    down = perturbed_losses(J, names[layer], index, -s * u)
    return Smoothed(u.double() * ((up - down).double() / (2 * s))[:, None], index, s)


def rms(w: Tensor) -> float:
    """Return the root mean square of a tensor, 1 for a tensor of zeros."""
    return float(w.detach().double().square().mean().sqrt()) or 1.0


def subset(n: int, most: int | None, seed: int) -> Tensor:
    """Return at most `most` of the positions 0 ... n - 1, drawn without replacement, in order."""
    if most is None or n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def perturbed_losses(J: Objective, name: str, index: Tensor, steps: Tensor) -> Tensor:
    """Return the losses (K,) with steps (K, F) added to the weights at flat positions index (F,)."""
    w = J.theta[name]
    out = []
    for some in steps.split(max(1, _STACK // w.numel())):
        stack = w.flatten().repeat(len(some), 1)
        stack[:, index] += some.to(w)
        out.append(losses(J, name, stack.reshape(-1, *w.shape)))
    return torch.cat(out)


def losses(J: Objective, name: str, stack: Tensor) -> Tensor:
    """Return `J.losses`; one after the other where the net holds an operation that torch.func does not know."""
    try:
        return J.losses({name: stack})
    except RuntimeError:
        with torch.no_grad():
            return torch.stack([J.at({name: w}) for w in stack])
