r"""Moments of activations under a Gaussian, in closed form or by quadrature that sees no kinks.

| phi      | E[phi(u)^2], s = 1 / sqrt(q)                      | E[d(u)^2]                 | E[phi(u_1) phi(u_2)]  |
|----------|---------------------------------------------------|---------------------------|-----------------------|
| sign     | 1                                                 | erf(s / sqrt 2) (clipped) | 2 / pi arcsin c       |
| hardtanh | q (erf(s / sqrt 2) - 2 s n(s)) + erfc(s / sqrt 2) | erf(s / sqrt 2)           | one integral          |
| relu     | q / 2                                             | 1 / 2                     | q / (2 pi) a(c)       |
| tanh     | quadrature                                        | quadrature                | two integrals         |
| identity | q                                                 | 1                         | q c                   |

u ~ N(0, q), u_1 and u_2 of correlation c, n the standard normal density, a(c) = sqrt(1 - c^2) + c (pi - arccos c).

Source: Cho, Saul 2009 (relu); Sheppard 1899 (sign).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Rule
from qlab.quantizers.surrogates import Surrogate, surrogate

__all__ = [
    "ACTIVATIONS",
    "PHI",
    "SLOPE",
    "ActivationName",
    "checked",
    "cross_moment",
    "rule_of",
    "second_moment",
    "slope_moment",
]

Floats = NDArray[np.float64]
ActivationName = Literal["sign", "hardtanh", "relu", "tanh", "identity"]
ACTIVATIONS: tuple[ActivationName, ...] = ("sign", "hardtanh", "relu", "tanh", "identity")

PHI: dict[str, Rule] = {
    "sign": lambda u: torch.where(u >= 0, 1.0, -1.0).to(u.dtype),
    "hardtanh": lambda u: u.clamp(-1, 1),
    "relu": lambda u: u.clamp(min=0),
    "tanh": torch.tanh,
    "identity": lambda u: u,
}
SLOPE: dict[str, Rule] = {
    "hardtanh": lambda u: (u.abs() <= 1).to(u.dtype),
    "relu": lambda u: (u > 0).to(u.dtype),
    "tanh": lambda u: 1 - torch.tanh(u) ** 2,
    "identity": torch.ones_like,
}


def checked(activation: str, q: float, sigma_w2: float, sigma_b2: float) -> None:
    """Raise for an activation there is not, or a variance that is none."""
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation of mean field", activation, ACTIVATIONS)
    for what, value in (("q", q), ("sigma_w2", sigma_w2), ("sigma_b2", sigma_b2)):
        if not (value >= 0):
            raise InputError(f"{what} is a variance: at least 0, not {value!r}")


def rule_of(activation: str, which: str | Rule | Surrogate | None) -> Surrogate | None:
    """Return the backward rule of sign, clipped by default; None for activations with a derivative of their own."""
    if activation == "sign":
        return surrogate("clipped" if which is None else which)
    if which is not None:
        raise InputError(f"{activation} has a derivative of its own; a surrogate is for sign")
    return None


def _density(z: Floats) -> Floats:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _pieces(breaks: tuple[float, ...], order: int = 80, reach: float = 10.0) -> tuple[Floats, Floats]:
    """Return nodes and weights of E[f(z)], z ~ N(0, 1), for f smooth between the breaks: Gauss-Legendre on every piece.

    Gauss-Hermite converges slowly where f has a kink; this does not see it.
    """
    t, w = np.polynomial.legendre.leggauss(order)
    inner = sorted({min(max(b, -reach), reach) for b in breaks} | {-reach, 0.0, reach})
    nodes, weights = [], []
    for a, b in pairwise(inner):
        z = (a + b) / 2 + (b - a) / 2 * t
        nodes.append(z)
        weights.append((b - a) / 2 * w * _density(z))
    return np.concatenate(nodes), np.concatenate(weights)


def _kinks(q: float) -> tuple[float, ...]:
    """Return where sqrt(q) z crosses -1 and 1, and where a steep tanh turns."""
    s = 1 / math.sqrt(q) if q > 0 else math.inf
    return (-4 * s, -s, s, 4 * s)


def second_moment(q: float, activation: ActivationName) -> float:
    """Return E[phi(sqrt(q) z)^2]."""
    if activation == "sign":
        return 1.0
    if activation == "identity":
        return q
    if activation == "relu":
        return q / 2
    if q == 0:
        return 0.0
    if activation == "hardtanh":
        s = 1 / math.sqrt(q)
        inside = math.erf(s / math.sqrt(2))
        return q * (inside - 2 * s * math.exp(-(s**2) / 2) / math.sqrt(2 * math.pi)) + math.erfc(s / math.sqrt(2))
    z, w = _pieces(_kinks(q))
    return float(w @ np.tanh(math.sqrt(q) * z) ** 2)


def slope_moment(q: float, activation: ActivationName, which: str | Rule | Surrogate | None) -> float:
    """Return E[d(sqrt(q) z)^2] of the derivative, or of a surrogate for sign."""
    rule = rule_of(activation, which)
    if activation == "identity":
        return 1.0
    if activation == "relu":
        return 0.5
    if activation == "hardtanh" or (rule is not None and rule.name == "clipped"):
        return math.erf(1 / math.sqrt(2 * q)) if q > 0 else 1.0
    slope = rule.derivative if rule is not None else SLOPE[activation]
    z, w = _pieces(_kinks(q) if q > 0 else ())
    return float(w @ slope(torch.from_numpy(math.sqrt(q) * z)).numpy() ** 2)


def cross_moment(c: float, q: float, activation: ActivationName) -> float:
    """Return E[phi(u_1) phi(u_2)] for variance q and correlation c."""
    if activation == "sign":
        return 2 / math.pi * math.asin(c)
    if activation == "identity":
        return q * c
    if activation == "relu":
        return q * (math.sqrt(1 - c**2) + c * (math.pi - math.acos(c))) / (2 * math.pi)
    if q == 0:
        return 0.0
    if c >= 1 - 1e-15:
        return second_moment(q, activation)
    if c <= -1 + 1e-15:
        return -second_moment(q, activation)
    # E[phi(u_1) E[phi(u_2) | u_1]]: u_2 given u_1 = sqrt(q) z has mean sqrt(q) c z and variance q (1 - c^2).
    z, w = _pieces(_kinks(q))
    s = math.sqrt(q * (1 - c**2))
    mean = math.sqrt(q) * c * z
    if activation == "hardtanh":
        inner = _clipped_mean(mean, s)
        return float((w * np.clip(math.sqrt(q) * z, -1, 1)) @ inner)
    t, v = _pieces(_kinks(s**2), order=40)
    inner = np.tanh(mean[:, None] + s * t) @ v
    return float((w * np.tanh(math.sqrt(q) * z)) @ inner)


def _clipped_mean(m: Floats, s: float) -> Floats:
    """Return E[clip(m + s z, -1, 1)]."""
    from scipy.special import ndtr

    a, b = (-1 - m) / s, (1 - m) / s
    return -ndtr(a) + (1 - ndtr(b)) + m * (ndtr(b) - ndtr(a)) + s * (_density(a) - _density(b))
