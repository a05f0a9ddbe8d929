r"""Surrogate derivatives of sign: the whole family, each with the smooth function it is the derivative of.

| name       | d(x)                                              | F(x), F' = d                              |
|------------|---------------------------------------------------|-------------------------------------------|
| identity   | 1                                                 | x                                         |
| clipped    | 1[\|x\| <= 1]                                     | clip(x, -1, 1)                            |
| polynomial | max(0, 2 - 2\|x\|)                                | 2x - x\|x\| on [-1, 1], sign outside      |
| tanh       | k (1 - tanh^2(k x))                               | tanh(k x)                                 |
| swish      | b (2 - b x tanh(b x / 2)) / (1 + cosh(b x))       | 2 s(bx) (1 + b x (1 - s(bx))) - 1         |
| erf        | 2k / sqrt(pi) exp(-(k x)^2)                       | erf(k x)                                  |

s is the logistic function. All but identity integrate to 2, the jump of sign. Swish is negative for |b x| > 2.3994.

Source: Bengio et al. 2013 (identity); Hubara et al. 2016, arXiv 1602.02830 (clipped); Liu et al., Bi-Real Net, arXiv
1808.00278 (polynomial); Darabi et al., BNN+, arXiv 1812.11800 (swish, b = 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Rule

__all__ = ["SURROGATES", "Surrogate", "SurrogateName", "surrogate"]

SurrogateName = Literal["identity", "clipped", "polynomial", "tanh", "swish", "erf"]


@dataclass(frozen=True)
class Surrogate:
    """A pseudo-derivative and, where it is known, the function it is the derivative of.

    Args:
        name: "custom" for a user's own.
        derivative: elementwise map d.
        primitive: elementwise map F with F' = d and F(0) = 0.
        sharpness: k or b of the table; None where the surrogate has none.
    """

    name: str
    derivative: Rule
    primitive: Rule | None = None
    sharpness: float | None = None


def _identity() -> Surrogate:
    return Surrogate("identity", torch.ones_like, lambda x: x)


def _clipped() -> Surrogate:
    return Surrogate("clipped", lambda x: (x.abs() <= 1).to(x.dtype), lambda x: x.clamp(-1, 1))


def _polynomial() -> Surrogate:
    def primitive(x: Tensor) -> Tensor:
        y = x.clamp(-1, 1)
        return 2 * y - y * y.abs()

    return Surrogate("polynomial", lambda x: (2 - 2 * x.abs()).clamp(min=0), primitive)


def _tanh(k: float) -> Surrogate:
    return Surrogate("tanh", lambda x: k * (1 - torch.tanh(k * x) ** 2), lambda x: torch.tanh(k * x), k)


def _swish(b: float) -> Surrogate:
    def bounded(x: Tensor) -> Tensor:
        return (b * x).clamp(-700, 700)  # beyond it s s' is 0 to double precision; unbounded, inf * 0 would be NaN

    def derivative(x: Tensor) -> Tensor:
        # 1 / (1 + cosh(y)) = 2 s(y) s(-y): the same number, without the overflow of cosh
        y = bounded(x)
        return b * (2 - y * torch.tanh(y / 2)) * 2 * torch.sigmoid(y) * torch.sigmoid(-y)

    def primitive(x: Tensor) -> Tensor:
        y = bounded(x)
        s = torch.sigmoid(y)
        return 2 * s * (1 + y * (1 - s)) - 1

    return Surrogate("swish", derivative, primitive, b)


def _erf(k: float) -> Surrogate:
    scale = 2 * k / math.sqrt(math.pi)
    return Surrogate("erf", lambda x: scale * torch.exp(-((k * x) ** 2)), lambda x: torch.erf(k * x), k)


_PLAIN: dict[str, Callable[[], Surrogate]] = {"identity": _identity, "clipped": _clipped, "polynomial": _polynomial}
_SHARP: dict[str, tuple[Callable[[float], Surrogate], float]] = {
    "tanh": (_tanh, 1.0),
    "swish": (_swish, 5.0),
    "erf": (_erf, 1.0),
}

SURROGATES: tuple[str, ...] = (*_PLAIN, *_SHARP)
"""The names `surrogate` knows."""


def surrogate(which: str | Rule | Surrogate = "clipped", sharpness: float | None = None) -> Surrogate:
    """Return a surrogate by name, or make one of a user's own derivative.

    Args:
        which: a name of `SURROGATES`, an elementwise map d(x), or a `Surrogate`.
        sharpness: k of tanh (default 1) and erf (default 1), b of swish (default 5).

    Raises:
        UnknownNameError: for an unknown name.
        InputError: for a sharpness that is not positive, or given to a surrogate that has none; for a function that
            does not keep shape and dtype.
    """
    if isinstance(which, Surrogate):
        return which
    if callable(which):
        probe = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3)
        out = which(probe)
        if not isinstance(out, Tensor) or out.shape != probe.shape or out.dtype != probe.dtype:
            raise InputError(
                "a surrogate derivative must map a tensor to one of the same shape and dtype, elementwise; "
                f"for a float64 tensor of shape (2, 3) this one returned {getattr(out, 'dtype', type(out))} "
                f"of shape {tuple(getattr(out, 'shape', ()))}"
            )
        return Surrogate("custom", which)
    if which in _PLAIN:
        if sharpness is not None:
            raise InputError(
                f"the {which} surrogate has no sharpness; it was given {sharpness}. Those that have one: {', '.join(_SHARP)}."
            )
        return _PLAIN[which]()
    if which in _SHARP:
        make, default = _SHARP[which]
        k = default if sharpness is None else float(sharpness)
        if not (math.isfinite(k) and k > 0):
            raise InputError(f"sharpness must be a positive number, not {sharpness!r}")
        return make(k)
    raise UnknownNameError("surrogate", which, SURROGATES)
