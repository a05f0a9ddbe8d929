r"""Is a gradient field the gradient of anything? Loop integrals and line integrals say so.

    circulation  |oint p . dl| / oint |p| dl                          over circles w + r (cos t a + sin t b)
    residual     |int g . dl - (L(w_1) - L(w_0))| / (int |g . dl| + |L(w_1) - L(w_0)|)     along segments

p is the field g in the plane of the loop (its components along a and b), so that both numbers lie in [0, 1] whatever the
dimension. A gradient has circulation 0 around every loop, and its line integral is the difference of the loss: residual 0. The
straight-through field has neither: it takes forward values from a staircase and derivatives from elsewhere, so no function has
it as its gradient, and descent along it may walk in circles.

Circles are integrated with the trapezoid rule, which converges exponentially for periodic analytic fields; segments with
Gauss-Legendre. Where the forward pass is piecewise constant the field itself has jumps, and no quadrature rule beats an error of
the order of jump x step there: `error` is the difference between the rule with all points and with every other one, in the same
units. The integral is over the smooth pieces only; a jump of the loss itself, which a true derivative would have as a spike, is in
the residual, not in the integral. So sign nets without a surrogate, whose gradient is 0 almost everywhere, have residual 1, and no
circulation to speak of (NaN: nothing flows).

Source: the curl test of vector calculus; Yin et al. 2019, arXiv 1903.05662 (the straight-through field is no gradient).

Shapes: M loops, T points of each, in the space of one weight tensor or of the whole batch of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.agreement import weight_names
from qlab.diagnose.base import Result
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Circulation", "Loops", "circulating", "circulation"]

INPUT = "input"
_STACK = 2**22  # numbers in a stack of points, at most


@dataclass(frozen=True)
class Loops:
    """Loop and line integrals in one space.

    Args:
        space: a layer, or "input".
        circulation: (M,) relative loop integrals, in [0, 1].
        error: (M,) their quadrature errors.
        residual: (M,) relative residuals of line integrals, in [0, 1].
        radius: of the loops, and length of the segments.
    """

    space: str
    circulation: NDArray[np.float64]
    error: NDArray[np.float64]
    residual: NDArray[np.float64]
    radius: float


@dataclass(frozen=True)
class Circulation(Result):
    """How far the back-propagated field is from a gradient.

    Args:
        spaces: one entry per layer and for the inputs.
        points: T of each loop.
        examples: N.
    """

    spaces: tuple[Loops, ...]
    points: int
    examples: int

    @property
    def mean(self) -> float:
        """Return the mean circulation over spaces and loops; NaN where the field is zero everywhere."""
        values = np.concatenate([loops.circulation for loops in self.spaces]) if self.spaces else np.array([])
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else math.nan

    def frame(self) -> pd.DataFrame:
        """Return a row per space and loop: space, loop, circulation, error, residual, radius."""
        import pandas as pd

        rows = [
            (s.space, i, s.circulation[i], s.error[i], s.residual[i], s.radius)
            for s in self.spaces
            for i in range(len(s.circulation))
        ]
        return pd.DataFrame(rows, columns=["space", "loop", "circulation", "error", "residual", "radius"])

    def figure(self) -> Figure:
        """Return the loops of every space as points, with their means."""
        from qlab.plots.mismatch import circulation_figure

        return circulation_figure(self)

    def summary(self) -> str:
        """Return the means in words."""
        parts = [
            f"{s.space} {_mean(s.circulation):.2g} (quadrature {_mean(s.error):.1g}), residual {_mean(s.residual):.2g}"
            for s in self.spaces
        ]
        return (
            "Back-propagated field (forward values of the net as it stands, derivatives as declared: surrogate where quantizers "
            f"are straight-through), {self.examples} examples, {self.points} points a loop. Mean circulation, 0 for a gradient, 1 "
            f"for a vortex: {'; '.join(parts)}."
        )


def circulation(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    spaces: Sequence[str] | None = None,
    *,
    loops: int = 8,
    points: int = 64,
    radius: float = 0.5,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seed: int = 0,
) -> Circulation:
    """Integrate the back-propagated gradient around random circles and along random segments.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        spaces: layers of `weight_names(net)`, and "input"; by default all that hold more than one number.
        loops: M of each space.
        points: T of each loop, an even number.
        radius: of the loops, as a fraction of the norm of the weight, or of the batch of inputs.
        loss: a name of `LOSSES`, or logits and labels to one loss per example; a smooth one, else its kinks are measured too.
        beta: what the logits are multiplied by.
        seed: of the planes.

    Raises:
        UnknownNameError: no such layer.
        InputError: numbers out of range, no spaces, one that holds a single number; and what `check` says.
    """
    return last(
        circulating(net, x, y, spaces, loops=loops, points=points, radius=radius, loss=loss, beta=beta, seed=seed),
        Circulation,
    )


def circulating(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    spaces: Sequence[str] | None = None,
    *,
    loops: int = 8,
    points: int = 64,
    radius: float = 0.5,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seed: int = 0,
) -> Iterator[Update]:
    """Compute `circulation` step by step: an update after each space, with all there is so far."""
    J = Objective(net, x, y, loss=loss, beta=beta)
    if loops < 1 or points < 4 or points % 2:
        raise InputError(
            f"loops is {loops} and points {points}; expected at least 1 loop, and an even number from 4 on"
        )
    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"radius is {radius!r}; expected a positive fraction of the norm")
    names = weight_names(J.net)
    sizes = {layer: J.theta[name].numel() for layer, name in names.items()} | {INPUT: x.numel()}
    if spaces is not None and (isinstance(spaces, str) or not spaces):
        raise InputError(f"spaces is {spaces!r}; expected a sequence of names, some of {', '.join(sizes)}")
    for space in spaces or ():
        if space not in sizes:
            raise UnknownNameError("layer", space, sizes)
        if sizes[space] < 2:
            raise InputError(f"{space} holds one number: there is no plane for a loop")
    todo = [space for space, n in sizes.items() if n > 1] if spaces is None else list(spaces)
    found = []
    for i, space in enumerate(todo):
        draw = torch.Generator().manual_seed(seed + i)
        if space == INPUT:
            at, centre = _of_inputs(J), J.x.detach()
        else:
            at, centre = _of_weight(J, names[space]), J.theta[names[space]]
        found.append(_loops(space, at, centre, loops, points, radius, draw))
        yield Update((i + 1) / len(todo), f"Loops in {space}", Circulation(tuple(found), points, len(x)))


def _of_weight(J: Objective, name: str) -> Callable[[Tensor], Tensor]:
    return lambda w: J.at({name: w})


def _of_inputs(J: Objective) -> Callable[[Tensor], Tensor]:
    return lambda x: J.loss(J.beta * torch.func.functional_call(J.net, J.theta, (x,)), J.y).mean()


def _loops(
    space: str,
    at: Callable[[Tensor], Tensor],
    centre: Tensor,
    M: int,
    T: int,
    radius: float,
    draw: torch.Generator,
) -> Loops:
    n = centre.numel()
    r = radius * (float(centre.norm()) or math.sqrt(n))
    planes = torch.randn(M, n, 2, generator=draw, dtype=torch.float64)
    planes = torch.linalg.qr(planes).Q.mT.to(centre)  # (M, 2, n): a and b of each loop
    t = 2 * math.pi * torch.arange(T, dtype=centre.dtype, device=centre.device) / T
    where, tangent = torch.stack([t.cos(), t.sin()], 1), torch.stack([-t.sin(), t.cos()], 1)  # (T, 2)
    nodes, weights = (torch.from_numpy(v).to(centre) for v in np.polynomial.legendre.leggauss(T // 2))
    way, weights = (nodes + 1) / 2, weights / 2  # on [0, 1]
    found = []
    for plane in planes:
        g, _ = _field(at, (centre.flatten() + r * where @ plane).reshape(T, *centre.shape))
        p = g.flatten(1) @ plane.T  # (T, 2)
        along, size = (p * tangent).sum(1).double(), p.norm(dim=1).double()
        total = float(size.sum())
        full, half = float(along.sum()), 2 * float(along[::2].sum())
        a = plane[0]
        segment = (centre.flatten() + r * way[:, None] * a).reshape(-1, *centre.shape)
        ends = torch.stack([centre.flatten(), centre.flatten() + r * a]).reshape(2, *centre.shape)
        slope = r * (_field(at, segment)[0].flatten(1) @ a).double()
        before, after = _field(at, ends)[1].double()
        rise, work, effort = (
            float(after - before),
            float(weights.double() @ slope),
            float(weights.double() @ slope.abs()),
        )
        found.append(
            (
                abs(full) / total if total > 0 else math.nan,
                abs(full - half) / total if total > 0 else math.nan,
                abs(work - rise) / (effort + abs(rise)) if effort + abs(rise) > 0 else math.nan,
            )
        )
    c, error, residual = np.array(found).T
    return Loops(space, c, error, residual, r)


def _field(at: Callable[[Tensor], Tensor], stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return back-propagated gradients and values at a stack of points."""
    chunk = max(1, _STACK // stack[0].numel())
    try:
        return torch.func.vmap(torch.func.grad_and_value(at), chunk_size=chunk)(stack)
    except RuntimeError:  # an autograd function that torch.func does not know: one point at a time
        return _one_by_one(at, stack)


def _one_by_one(at: Callable[[Tensor], Tensor], stack: Tensor) -> tuple[Tensor, Tensor]:
    gradients, values = [], []
    for point in stack:
        w = point.clone().requires_grad_()
        value = at(w)
        g = torch.autograd.grad(value, w, allow_unused=True)[0] if value.requires_grad else None
        gradients.append(torch.zeros_like(w) if g is None else g)
        values.append(value.detach())
    return torch.stack(gradients), torch.stack(values)


def _mean(values: NDArray[np.float64]) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
