r"""A surrogate of one's own, drawn by a few points: piecewise linear derivative, exact primitive.

    d(x) = v_k + (v_{k+1} - v_k) (x - t_k) / (t_{k+1} - t_k)      on [t_k, t_{k+1}],   0 outside [t_0, t_K]
    F(x) = int_0^x d                                              a quadratic on each piece, constant outside

The area under d is the height that a step has for back-propagation; sign's own is 2.

Shapes: knots t and values v (K + 1,).
"""

from __future__ import annotations

import copy
import itertools
import keyword
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.quantizers.apply import quantizers
from qlab.quantizers.sign import Sign
from qlab.quantizers.surrogates import Surrogate, surrogate

__all__ = ["KNOTS", "Drawn", "area", "code", "drawn", "redrawn", "sampled"]

KNOTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_MOST = 64


def _points(knots: Sequence[float], values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        t, v = tuple(float(k) for k in knots), tuple(float(k) for k in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"knots and values must be numbers: {error}") from error
    if len(t) != len(v) or not 2 <= len(t) <= _MOST:
        raise InputError(f"there are {len(t)} knots and {len(v)} values; expected equally many, from 2 to {_MOST}")
    if not all(math.isfinite(k) for k in t + v):
        raise InputError("knots and values must be finite numbers")
    if any(b - a < 1e-6 for a, b in itertools.pairwise(t)):
        raise InputError(f"knots must ascend, at least 1e-6 apart; they are {t}")
    return t, v


def drawn(knots: Sequence[float], values: Sequence[float]) -> Surrogate:
    """Return the surrogate whose derivative goes straight from point to point.

    Args:
        knots: t, ascending.
        values: v, of any sign.

    Raises:
        InputError: numbers that are not finite, too few or many, or knots that do not ascend.
    """
    t, v = _points(knots, values)
    pieces = tuple(zip(t, t[1:], v, v[1:], strict=False))

    def derivative(x: Tensor) -> Tensor:
        d = torch.zeros_like(x)
        for a, b, p, q in pieces:
            d = torch.where((x >= a) & (x <= b), p + (q - p) / (b - a) * (x - a), d)
        return d

    def from_left(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for a, b, p, q in pieces:
            step = x.clamp(a, b) - a
            total = total + step * (p + (q - p) / (2 * (b - a)) * step)
        return total

    below = float(from_left(torch.zeros((), dtype=torch.float64)))
    return Surrogate("drawn", derivative, lambda x: from_left(x) - below)


def area(knots: Sequence[float], values: Sequence[float]) -> float:
    """Return int d, the trapezoid sum."""
    t, v = _points(knots, values)
    return sum((b - a) * (p + q) / 2 for a, b, p, q in zip(t, t[1:], v, v[1:], strict=False))


def sampled(which: str, knots: Sequence[float] = KNOTS, sharpness: float | None = None) -> tuple[float, ...]:
    """Return the values of a named surrogate at the knots: a drawing to start from.

    Raises:
        UnknownNameError, InputError: from `surrogate`.
    """
    t, _ = _points(knots, knots)
    return tuple(surrogate(which, sharpness).derivative(torch.tensor(t, dtype=torch.float64)).tolist())


class Drawn(Sign):
    """Sign with a drawn surrogate.

    Args:
        knots, values: as in `drawn`.

    Raises:
        InputError: from `drawn`.
    """

    def __init__(self, knots: Sequence[float] = KNOTS, values: Sequence[float] | None = None) -> None:
        super().__init__(drawn(knots, sampled("clipped", knots) if values is None else values))


def code(knots: Sequence[float], values: Sequence[float], name: str = "MySign") -> str:
    """Return the Python text of a quantizer class with this drawing, ready to paste.

    Raises:
        InputError: from `drawn`, or a name that is no class name.
    """
    t, v = _points(knots, values)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"{name!r:.40} cannot be the name of a class")
    rows = [f"({', '.join(f'{value:.15g}' for value in row)})" for row in (t, v)]
    return (
        "from qlab.quantizers import Sign\n"
        "from qlab.quantizers.drawn import drawn\n\n\n"
        f"class {name}(Sign):\n"
        '    """Sign forward; backward a derivative drawn by hand."""\n\n'
        "    def __init__(self) -> None:\n"
        f"        knots = {rows[0]}\n"
        f"        values = {rows[1]}\n"
        "        super().__init__(drawn(knots, values))\n"
    )


def redrawn(net: nn.Module, which: Surrogate) -> nn.Module:
    """Return a copy of a net in which every `Sign` has this surrogate; what it answers is unchanged.

    Raises:
        InputError: a net without `Sign` quantizers.
    """
    net = copy.deepcopy(net)
    signs = [q for q in quantizers(net) if isinstance(q, Sign)]
    if not signs:
        raise InputError("this net has no Sign whose surrogate could be drawn; make one with qlab.quantize(net, Sign)")
    for q in signs:
        q.surrogate = which
    return net
