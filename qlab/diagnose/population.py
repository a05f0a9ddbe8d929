r"""A net whose coarse gradient and true gradient are both known: one hidden layer of steps on Gaussian inputs.

    y(Z; v, w) = v' sigma(Z w),  sigma = 1[. > 0],  Z (m, n) with entries from N(0, 1),  teacher (v*, w*), |w*| = 1
    loss = (y(Z; v, w) - y(Z; v*, w*))^2 / 2,  f = E loss,  theta = angle(w, w*),  wh = w / |w|

    f      = (v'(I + 11')v - 2 v'((1 - 2 theta / pi) I + 11')v* + v*'(I + 11')v*) / 8
    grad f = -(v'v*) / (2 pi |w|) u,   u the unit vector of (I - wh wh') w*

The coarse gradient replaces sigma' by mu': g = Z'(mu'(Z w) * v) (y - y*). Its mean is

    identity, mu' = 1:          ( |v|^2 wh - (v'v*) w* ) / sqrt(2 pi)
    relu, mu' = 1[z > 0]:       ( h wh - (v'v*) (wh + w*) ) / (2 sqrt(2 pi)),   h = |v|^2 + (1'v)^2 - (1'v)(1'v*) + v'v*

    <E g_relu, grad f> = sin(theta) (v'v*)^2 / (2 (2 pi)^(3/2) |w|) >= 0;   identity: twice that

So both point downhill. The paper writes cos(theta / 2) (wh + w*) / |wh + w*| for (wh + w*) / 2; they are equal. Both are the
gradient in w of another function than f, ( |v|^2 |w| - (v'v*) w*'w ) / sqrt(2 pi) for identity. Here they serve as a test bench
for every estimator of gradients.

Source: Yin et al., Understanding straight-through estimator in training activation quantized neural nets, ICLR 2019, arXiv
1903.05662.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import InputError, UnknownNameError

__all__ = ["COARSE", "Population"]

Coarse = Literal["identity", "relu", "clipped"]
COARSE: tuple[Coarse, ...] = ("identity", "relu", "clipped")


@dataclass(frozen=True)
class Population:
    """Student and teacher.

    Args:
        v: (m,) second layer of the student.
        w: (n,) first layer, not zero.
        v_star: (m,) of the teacher.
        w_star: (n,) of the teacher; scaled to norm 1.

    Raises:
        InputError: shapes that do not fit, or a first layer of zeros.
    """

    v: Tensor
    w: Tensor
    v_star: Tensor
    w_star: Tensor

    def __post_init__(self) -> None:
        if (
            self.v.dim() != 1
            or self.w.dim() != 1
            or self.v.shape != self.v_star.shape
            or self.w.shape != self.w_star.shape
        ):
            shapes = [tuple(t.shape) for t in (self.v, self.w, self.v_star, self.w_star)]
            raise InputError(f"v, w, v_star, w_star have shapes {shapes}; expected (m,), (n,), (m,), (n,)")
        if not float(self.w.detach().norm()) > 0 or not float(self.w_star.detach().norm()) > 0:
            raise InputError("w and w_star must not be zero: a step has no direction there")
        object.__setattr__(self, "w_star", self.w_star / self.w_star.norm())

    @property
    def theta(self) -> Tensor:
        """Return the angle between w and w*, stable near 0 and pi."""
        wh = self.w / self.w.norm()
        return 2 * torch.atan2((wh - self.w_star).norm(), (wh + self.w_star).norm())

    def loss(self) -> Tensor:
        """Return f."""
        v, t = self.v, self.v_star
        own, other = v @ v + v.sum() ** 2, t @ t + t.sum() ** 2
        both = (1 - 2 * self.theta / math.pi) * (v @ t) + v.sum() * t.sum()
        return (own - 2 * both + other) / 8

    def gradient(self) -> Tensor:
        """Return grad_w f (n,).

        Raises:
            InputError: w is parallel to w*, where f has a kink.
        """
        size = self.w.norm()
        wh = self.w / size
        across = self.w_star - (wh @ self.w_star) * wh
        if not float(across.norm()) > 1e4 * torch.finfo(across.dtype).eps:
            raise InputError("w is parallel to w_star, where the loss has a kink and no gradient")
        return -(self.v @ self.v_star) / (2 * math.pi * size) * across / across.norm()

    def coarse(self, which: Coarse = "relu") -> Tensor:
        """Return the mean coarse gradient E g (n,) for "identity" or "relu".

        Raises:
            UnknownNameError: another one; "clipped" has no closed form here.
        """
        v, t, wh = self.v, self.v_star, self.w / self.w.norm()
        if which == "identity":
            return ((v @ v) * wh - (v @ t) * self.w_star) / math.sqrt(2 * math.pi)
        if which != "relu":
            raise UnknownNameError("coarse gradient with a closed form", which, ("identity", "relu"))
        h = v @ v + v.sum() ** 2 - v.sum() * t.sum() + v @ t
        return (h * wh - (v @ t) * (wh + self.w_star)) / (2 * math.sqrt(2 * math.pi))

    def draw(self, samples: int, seed: int = 0) -> Tensor:
        """Return inputs Z (samples, m, n)."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(samples, len(self.v), len(self.w), generator=draw, dtype=torch.float64).to(self.w)

    def losses(self, Z: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the losses (B,) of inputs Z (B, m, n), at another w where one is given."""
        w = self.w if w is None else w
        return (_step(Z @ w) @ self.v - _step(Z @ self.w_star) @ self.v_star).square() / 2

    def coarse_samples(self, Z: Tensor, which: Coarse = "relu") -> Tensor:
        """Return the coarse gradients (B, n) of inputs Z (B, m, n): what back-propagation with mu' gives.

        Raises:
            UnknownNameError: no such coarse gradient.
        """
        if which not in COARSE:
            raise UnknownNameError("coarse gradient", which, COARSE)
        z = Z @ self.w
        error = _step(z) @ self.v - _step(Z @ self.w_star) @ self.v_star
        d = {"identity": torch.ones_like(z), "relu": _step(z), "clipped": ((z > 0) & (z < 1)).to(z)}[which]
        return torch.einsum("bmn,bm,b->bn", Z, d * self.v, error)


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z)
