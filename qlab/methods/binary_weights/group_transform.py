r"""Group weight transformation: binary weights by an exact, differentiable map of whole groups of float weights.

No straight-through rule: the net that is trained computes with T(theta; p), its gradient is the derivative of that very
function, and T is moved from a float net (p = 1) to signs (p -> 0) during the run. The weights of a group share their
statistics. "power", the default:

    c = theta   or   theta - mean(theta)          r^2 = mean c^2,   u = c / r
    z = u (u^2 + delta^2)^((p - 1) / 2)           the signed power |u|^p, smoothed near 0
    T = a z / mean |z|                            mean |T| = a for every p

p = 1 is a c / mean|c|, a float net with normalised weights; p = 0 is +-a up to O(delta^2). Between them every weight keeps its
sign, so the deployed weights a sign(c) change with theta only. Nothing is clipped or saturates. Since T(k theta) = T(theta),
the gradient is orthogonal to theta within each group; momentum SGD with a large rate lets |theta| grow, weight decay shrinks
it, and both together turn theta by sqrt(2 lr decay) a step, whatever the scale of the loss: the recipe of float nets with batch
norm.

Other maps behind the same interface, for comparison:

    "poly"         z = c / max|c|, then K times z <- (3 z - z^3) / 2, the last step by a fraction; T = a z / mean|z|
    "soft"         z = u / sqrt(u^2 + 1 / beta^2);   T = a z / mean|z|                             saturates
    "tanh_group"   T = a tanh(beta u)                                                              saturates
    "tanh_el"      T = a tanh(beta theta), the relaxation of proximal mean-field                   saturates

Schedule: with q = min(1, progress / anneal), p = max(p_end, 1 - q), K = depth q, beta = sharpness^q; the last part of the run
is trained at the end of the schedule.

**A reconstruction.** The paper's abstract states the properties (deterministic, differentiable, exact back-propagation, groups,
momentum SGD with a large rate and L2, no further saturation, no auxiliary loss); its formula could not be had. The family above
has all of them and is not claimed to be the paper's. Results are of "group transform (power family)".

Source: Shulman, Exact Backpropagation in Binary Weighted Networks with Group Weight Transformations, 2021, arXiv 2107.01400.

Shapes: theta is that of a weight (O, I, ...), cut into G groups of n: one for each output channel (G = O), the layer (G = 1), or
each kernel (G = O I, of a convolution). A bias is one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, hard_sign

__all__ = ["Family", "GroupTransform", "GroupTransformation", "Groups", "gap", "grouped", "poly", "power", "soft"]

Family = Literal["power", "poly", "soft", "tanh_group", "tanh_el"]
Groups = Literal["channel", "layer", "kernel"]
Scale = Literal["one", "he", "initial"]

LARGEST_BETA = 1e35  # its square is a number, and so is it in float32


def grouped(theta: Tensor, groups: Groups) -> Tensor:
    """Return theta as (G, n): the rows are the groups."""
    if theta.dim() < 2 or groups == "layer":
        return theta.reshape(1, -1)
    return theta.flatten(0, 1).flatten(1) if groups == "kernel" and theta.dim() > 2 else theta.flatten(1)


def _divisor(x: Tensor) -> Tensor:
    """Return x, and 1 where it is zero: a group of zeros stays at zero, instead of 0 / 0."""
    return torch.where(x > 0, x, torch.ones_like(x))


def _root_mean_square(c: Tensor) -> Tensor:
    return _divisor(c.square().mean(1, keepdim=True)).sqrt()


def _normalised(z: Tensor) -> Tensor:
    return z / _divisor(z.abs().mean(1, keepdim=True))


def power(c: Tensor, p: float | Tensor, delta: float = 1e-3) -> Tensor:
    """Return z / mean|z|, z = u (u^2 + delta^2)^((p - 1) / 2), u = c / r, for c (G, n)."""
    u = c / _root_mean_square(c)
    return _normalised(u * (u.square() + delta**2) ** ((p - 1) / 2))


def poly(c: Tensor, K: float) -> Tensor:
    """Return z / mean|z|, z = c / max|c| contracted K times by (3 z - z^3) / 2, for c (G, n); K may be a fraction."""
    z = c / _divisor(c.abs().amax(1, keepdim=True))
    whole = int(K)
    for share in [1.0] * whole + ([K - whole] if whole < K else []):
        z = z + share * (z - z**3) / 2
    return _normalised(z)


def soft(c: Tensor, beta: float | Tensor) -> Tensor:
    """Return z / mean|z|, z = u / sqrt(u^2 + 1 / beta^2), u = c / r, for c (G, n)."""
    u = c / _root_mean_square(c)
    return _normalised(u / (u.square() + 1 / beta**2).sqrt())


def gap(T: Tensor, a: float | Tensor = 1.0) -> Tensor:
    """Return D = mean (|T| / a - 1)^2 of each group of T (G, n): 0 for binary weights."""
    return (T.abs() / a - 1).square().mean(1)


class GroupTransform(Quantizer):
    """T(theta) forward with its own derivative; deployed a sign(c).

    Args:
        family: "power", "poly", "soft", "tanh_group" or "tanh_el".
        groups: "channel", "layer" or "kernel".
        center: c = theta - mean(theta) of the group.
        delta: smoothing of "power" near zero, as a share of r.
        scale: a: "one", "he" for sqrt(2 / n), "initial" for the mean|c| that each group starts with.
    """

    bits = 1
    elementwise = False
    p: Tensor
    depth: Tensor
    beta: Tensor
    a: Tensor

    def __init__(
        self,
        family: Family = "power",
        groups: Groups = "channel",
        center: bool = False,
        delta: float = 1e-3,
        scale: Scale = "one",
    ) -> None:
        super().__init__()
        self.family, self.groups, self.center, self.delta, self.kind = family, groups, center, delta, scale
        for name, start in (("p", 1.0), ("depth", 0.0), ("beta", 1.0)):
            self.register_buffer(name, torch.tensor(start, dtype=torch.float64))
        self.register_buffer("a", torch.ones(()))

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Find a; latents start as the net's own."""
        c = self._centred(latent)
        if self.kind == "he":
            self.a = torch.full((), (2 / c.shape[1]) ** 0.5, device=self.a.device)
        elif self.kind == "initial":
            tiny = torch.finfo(c.dtype).tiny
            self.a = c.abs().mean(1, keepdim=True).clamp_min(tiny).to(self.a.device)
        return latent

    def _centred(self, latent: Tensor) -> Tensor:
        theta = grouped(latent, self.groups)
        return theta - theta.mean(1, keepdim=True) if self.center else theta

    def unscaled(self, latent: Tensor) -> Tensor:
        """Return T / a as groups (G, n)."""
        c = self._centred(latent)
        if self.family == "power":
            return power(c, float(self.p), self.delta)
        if self.family == "poly":
            return poly(c, float(self.depth))
        beta = float(self.beta)
        if self.family == "soft":
            return soft(c, beta)
        return torch.tanh(beta * (c / _root_mean_square(c) if self.family == "tanh_group" else c))

    def forward(self, latent: Tensor) -> Tensor:
        """Return T(theta)."""
        return (self.a.to(latent.dtype) * self.unscaled(latent)).reshape(latent.shape)

    def scale(self, latent: Tensor) -> Tensor | None:
        """Return a in the shape of the weight; None where it is 1."""
        if self.kind == "one":
            return None
        n = grouped(latent, self.groups).shape[1]
        return self.a.to(latent.dtype).expand(-1 if self.a.dim() else latent.numel() // n, n).reshape(latent.shape)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(c)."""
        return hard_sign(self._centred(latent)).reshape(latent.shape)

    def hard(self, latent: Tensor) -> Tensor:
        """Return a sign(c)."""
        a, level = self.scale(latent), self.level(latent)
        return level if a is None else a * level

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def extra_repr(self) -> str:
        """Name the family, the groups and where the schedule stands."""
        moved = {"power": f"p={float(self.p):g}", "poly": f"depth={float(self.depth):g}"}
        return f"{self.family}, {self.groups}, {moved.get(self.family, f'beta={float(self.beta):g}')}"


class GroupTransformation(Method):
    """Group weight transformation (power family, a reconstruction) with momentum SGD.

    Args:
        net: a plain net or the spec of one.
        family: "power", "poly", "soft", "tanh_group" or "tanh_el".
        groups: which weights share their statistics: "channel", "layer" or "kernel".
        center: subtract the mean of the group.
        delta: smoothing of "power" near zero, as a share of the group's root mean square.
        scale: a, the magnitude of a deployed weight: "one", where batch norm follows; "he", sqrt(2 / n); "initial", the
            mean magnitude that each group starts with.
        p_end: p at the end, of "power".
        depth: contractions at the end, of "poly".
        sharpness: beta at the end, of "soft", "tanh_group" and "tanh_el".
        anneal_share: share of the run over which the map is annealed.
        optimizer: "sgd" with momentum, as a float net has, or "adam".
        lr: learning rate.
        weight_decay: L2 on theta; with lr it sets how fast theta turns.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["group_transform"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        family: Family = "power",
        groups: Groups = "channel",
        center: bool = False,
        delta: float = 1e-3,
        scale: Scale = "one",
        p_end: float = 0.02,
        depth: float = 8.0,
        sharpness: float = 100.0,
        anneal_share: float = 0.8,
        optimizer: Literal["adam", "sgd"] = "sgd",
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        **kwargs: Any,
    ) -> None:
        for name, value, good, expected in (
            ("family", family, family in get_args(Family), f"one of {', '.join(get_args(Family))}"),
            ("groups", groups, groups in get_args(Groups), f"one of {', '.join(get_args(Groups))}"),
            ("scale", scale, scale in get_args(Scale), f"one of {', '.join(get_args(Scale))}"),
            ("delta", delta, 0 < delta < 1, "a number in (0, 1)"),
            ("p_end", p_end, 0 <= p_end < 1, "a number in [0, 1)"),
            ("depth", depth, 0 < depth <= 64, "a number in (0, 64]"),
            ("sharpness", sharpness, 1 < sharpness <= LARGEST_BETA, f"a number above 1, at most {LARGEST_BETA:g}"),
            ("anneal_share", anneal_share, 0 < anneal_share <= 1, "a share of the run in (0, 1]"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(net, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the transformation of one weight."""
        h = self.h
        return GroupTransform(h.family, h.groups, h.center, h.delta, h.scale)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return the quantity that the family anneals: p, depth or beta."""
        h = self.h
        q = min(1.0, progress / h.anneal_share)
        if h.family == "power":
            return {"p": max(h.p_end, 1 - q)}
        return {"depth": h.depth * q} if h.family == "poly" else {"beta": h.sharpness**q}
