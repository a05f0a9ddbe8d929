r"""Surrogate derivatives of sign with a quantity that moves over the run: EDE, DTE, RBNN, ReSTE, FDA; and a clip of any width.

The forward map is sign(x), sign(0) = +1. The backward rule is g'(x; v) of a function g with a scheduled quantity v:

| name    | g(x; v)                                            | g'(x; v)                                             | v          |
|---------|----------------------------------------------------|------------------------------------------------------|------------|
| ede     | k tanh(t x), k = max(1/t, 1)                       | k t (1 - tanh^2(t x))                                | t 0.1 - 10 |
| dte     | the same, t capped so that a share eps stays live  | the same                                             | t 0.1 - 10 |
| rbnn    | k (sqrt2 t x - t^2 x \|x\| / 2), flat where g' = 0 | max(0, k (sqrt2 t - t^2 \|x\|)), k = max(1/t, 1)     | t .01 - 10 |
| reste   | sign(x) \|x\|^(1/o), linear below m, flat above c  | \|x\|^(1/o - 1) / o on [m, c], m^(1/o - 1) below     | o 1 - 3    |
| fourier | 4/pi sum_{i=0..q} sin((2i+1) w x) / (2i+1)         | 4w/pi sum_{i=0..q} cos((2i+1) w x) where \|x\| <= 1  | q 9 - 18   |

Schedules, progress p in [0, 1]: t = 0.1 100^p (ede, dte), t = 10^(3p - 2) (rbnn), o = 1 + 2p, q = min(9 + floor(10 p), 18).
Over the whole line g' integrates to 2 = the jump of sign (ede, dte, rbnn: 2k; reste: 2 c^(1/o), c = 1.5, m = 0.1; fourier, w =
0.1: 2.04 at q = 9 and 2.28 at q = 18). reste with o = 1 is the clip at c.

Source: Qin et al., IR-Net, CVPR 2020, arXiv 1909.10788 (ede), and DIR-Net, IJCV 2023, arXiv 2109.12338 (dte; the form of its
cap is a reconstruction, see `qlab.quantizers.information`); Lin et al., RBNN, NeurIPS 2020, arXiv 2009.13055; Wu et al., ReSTE,
ICCV 2023, arXiv 2308.06689; Xu et al., FDA-BNN, NeurIPS 2021. Derivatives and constants from the authors' code or from BiBench's;
the schedules of rbnn, reste and fourier are recalled, not confirmed.
Deviation: FDA's noise-adaptation branch, a small trained net whose share decays to zero, is left out.

Shapes: x of any shape, v a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Quantizer, Rule
from qlab.quantizers.information import slope, updatable_cap
from qlab.quantizers.sign import hard_sign
from qlab.quantizers.surrogates import SURROGATES, Surrogate, surrogate

__all__ = ["ESTIMATORS", "SCHEDULED", "RepairSign", "Scheduled", "clipped_at"]

ScheduledRule = Callable[[Tensor, Tensor], Tensor]
"""An elementwise map of (x, v), v a scalar tensor, to the shape of x."""

RESTE_FLAT, RESTE_LINEAR = 1.5, 0.1  # c and m of the table
FOURIER_OMEGA = 0.1


@dataclass(frozen=True)
class Scheduled:
    """A pseudo-derivative with a quantity that moves over the run.

    Args:
        name: of the surrogate.
        quantity: what its quantity is called in schedules and buffers.
        derivative: g'(x, v).
        primitive: g(x, v), with g(0) = 0.
        path: progress in [0, 1] to v.
    """

    name: str
    quantity: str
    derivative: ScheduledRule
    primitive: ScheduledRule
    path: Callable[[float], float]


def _k(t: Tensor) -> Tensor:
    return (1 / t).clamp(min=1)


def _ede(x: Tensor, t: Tensor) -> Tensor:
    return _k(t) * torch.tanh(t * x)


def _rbnn_slope(x: Tensor, t: Tensor) -> Tensor:
    return (_k(t) * (math.sqrt(2) * t - t**2 * x.abs())).clamp(min=0)


def _rbnn(x: Tensor, t: Tensor) -> Tensor:
    y = torch.minimum(x.abs(), math.sqrt(2) / t)
    return torch.sign(x) * _k(t) * (math.sqrt(2) * t * y - t**2 * y**2 / 2)


def _reste_slope(x: Tensor, o: Tensor) -> Tensor:
    a = x.abs()
    root = a.clamp(min=RESTE_LINEAR) ** (1 / o - 1)
    return torch.where(a < RESTE_LINEAR, root, root / o) * (a <= RESTE_FLAT).to(x.dtype)


def _reste(x: Tensor, o: Tensor) -> Tensor:
    a = x.abs().clamp(max=RESTE_FLAT)
    near = a * RESTE_LINEAR ** (1 / o - 1)
    return torch.sign(x) * torch.where(a < RESTE_LINEAR, near, a.clamp(min=RESTE_LINEAR) ** (1 / o))


def _fourier_slope(x: Tensor, q: Tensor) -> Tensor:
    # sum_{i=0..q} cos((2i+1) a) = sin(2 (q+1) a) / (2 sin a); its limit at a = 0 is q + 1
    a = FOURIER_OMEGA * x.clamp(-1, 1)
    zero = a.abs() < 1e-6
    terms = torch.where(
        zero, q + 1, torch.sin(2 * (q + 1) * a) / (2 * torch.sin(torch.where(zero, torch.ones_like(a), a)))
    )
    return 4 * FOURIER_OMEGA / math.pi * terms * (x.abs() <= 1).to(x.dtype)


def _fourier(x: Tensor, q: Tensor) -> Tensor:
    a = FOURIER_OMEGA * x.clamp(-1, 1)
    total = torch.zeros_like(a)
    for i in range(int(q) + 1):
        total = total + torch.sin((2 * i + 1) * a) / (2 * i + 1)
    return 4 / math.pi * total


SCHEDULED: dict[str, Scheduled] = {
    s.name: s
    for s in (
        Scheduled("ede", "t", slope, _ede, lambda p: 0.1 * 100.0**p),
        Scheduled("dte", "t", slope, _ede, lambda p: 0.1 * 100.0**p),
        Scheduled("rbnn", "t_rbnn", _rbnn_slope, _rbnn, lambda p: 10.0 ** (3 * p - 2)),
        Scheduled("reste", "o", _reste_slope, _reste, lambda p: 1 + 2 * p),
        Scheduled("fourier", "q", _fourier_slope, _fourier, lambda p: float(min(9 + math.floor(10 * p + 1e-9), 18))),
    )
}
"""The surrogates with a schedule, by name."""

ESTIMATORS: tuple[str, ...] = (*SURROGATES, *SCHEDULED)
"""The names `RepairSign` knows: those of `qlab.quantizers.surrogates`, and the scheduled ones."""


def clipped_at(c: float) -> Surrogate:
    """Return the surrogate of clip(x, -c, c): slope 1 where |x| <= c.

    Raises:
        InputError: for a width that is not positive.
    """
    if not (math.isfinite(c) and c > 0):
        raise InputError(f"the clip must be a positive number, not {c!r}")
    return Surrogate("clipped", partial(_inside, c=c), partial(torch.clamp, min=-c, max=c), None)


def _inside(x: Tensor, c: float) -> Tensor:
    return (x.abs() <= c).to(x.dtype)


class _Sign(torch.autograd.Function):
    """sign(x) forward, d(x, v) times the incoming gradient backward; d is differentiated in its turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, v: Tensor, d: ScheduledRule) -> Tensor:
        return hard_sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ScheduledRule], output: Tensor) -> None:
        x, v, ctx.d = inputs
        ctx.save_for_backward(x, v)
        ctx.save_for_forward(x, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, v = ctx.saved_tensors
        return g * ctx.d(x, v.to(x.dtype)), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, v = ctx.saved_tensors
        return tangent * ctx.d(x, v.to(x.dtype))


class RepairSign(Quantizer):
    """Sign with any of the surrogates, scheduled ones included.

    Args:
        which: a name of `ESTIMATORS`.
        sharpness: of tanh, swish and erf; None is the surrogate's default.
        clip: half width of the window of "clipped".
        eps: share of values that "dte" keeps live.

    Raises:
        UnknownNameError: for an unknown name.
        InputError: for constants out of range.
    """

    bits = 1

    def __init__(
        self, which: str = "clipped", sharpness: float | None = None, clip: float = 1.0, eps: float = 0.1
    ) -> None:
        super().__init__()
        if which not in ESTIMATORS:
            raise UnknownNameError("estimator", which, ESTIMATORS)
        if not 0 <= eps <= 1:
            raise InputError(f"eps must be a share in [0, 1], not {eps!r}")
        self.which, self.eps = which, eps
        self.scheduled = SCHEDULED.get(which)
        self.surrogate: Surrogate | None = None
        if self.scheduled is None:
            plain = clipped_at(clip) if which == "clipped" and sharpness is None else surrogate(which, sharpness)
            self.surrogate = plain
            self.derivative: ScheduledRule = partial(_without_quantity, plain.derivative)
        else:
            self.derivative = self.scheduled.derivative
            start = torch.tensor(self.scheduled.path(0.0), dtype=torch.float64)
            self.register_buffer(self.scheduled.quantity, start)

    def quantity(self, latent: Tensor) -> Tensor:
        """Return v in force for these values: the buffer's, capped by their distribution for "dte"; 0 where there is none."""
        if self.scheduled is None:
            return latent.new_zeros(())
        v = self.get_buffer(self.scheduled.quantity)
        if self.which == "dte" and self.eps and torch.is_grad_enabled():
            return torch.minimum(v, updatable_cap(latent.detach(), self.eps))
        return v

    def forward(self, latent: Tensor) -> Tensor:
        """Return signs of the shape of `latent`."""
        return _Sign.apply(latent, self.quantity(latent), self.derivative)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule | None:
        """Return g at the quantity of this moment; None for "dte", whose cap depends on the values."""
        if self.scheduled is None:
            return None if self.surrogate is None else self.surrogate.primitive
        if self.which == "dte" and self.eps:
            return None
        v, g = float(self.get_buffer(self.scheduled.quantity)), self.scheduled.primitive
        return lambda x: g(x, torch.as_tensor(v, dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        """Name the surrogate and where its quantity stands."""
        if self.scheduled is None:
            return self.which
        return f"{self.which}, {self.scheduled.quantity}={float(self.get_buffer(self.scheduled.quantity)):g}"


def _without_quantity(d: Rule, x: Tensor, v: Tensor) -> Tensor:
    return d(x)
