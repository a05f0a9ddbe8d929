r"""Where an adversarial example may lie: a ball around its input, and the range of all inputs.

    B = { x' : ||x' - x||_p <= eps,  low <= x' <= high }        p in {inf, 2, 1}

The projection of a point is the nearest point of B, and always lies in B, to the last bit: distances are measured in float64 from
the numbers as they are stored, and what rounding would push out is rounded towards x instead. A point of B stays as it is. With
a = |x' - x|, and c the room that the range leaves on that side, the nearest point keeps the signs of x' - x and has the sizes

    p = inf     min(a, eps, c)
    p = 2       min(s a, c)                    s in [0, 1] so that their norm is eps
    p = 1       min(max(a - t, 0), c)          t >= 0 so that their sum is eps

Projecting on the ball and clipping to the range after that, as many codes do, also ends in B, but gives radius away where the range
cuts in: at the black background of a picture, say.

Source: Madry et al. 2018, arXiv 1706.06083; Duchi et al. 2008 (projection on the l1 ball); Croce, Hein 2021, arXiv 2103.01208 (on
l1 ball and range together).

Shapes: x (N, ...), eps (N,), distances (N,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from qlab.errors import InputError, UnknownNameError

__all__ = ["NORMS", "Ball", "Norm", "dual", "norms"]

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)

SLACK = 2.0**-46
"""How far below eps, relatively, a projection ends: a sum of the same numbers in another order must not come out above eps."""


def norms(delta: Tensor, norm: Norm) -> Tensor:
    """Return ||delta_n||_p of each of (N, ...), (N,), in float64."""
    flat = delta.double().flatten(1)
    return torch.linalg.vector_norm(flat, ord={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


def dual(norm: Norm) -> Norm:
    """Return the norm q with 1/p + 1/q = 1: a linear function w changes by at most eps ||w||_q within the ball."""
    return {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]  # type: ignore[return-value]


@dataclass(frozen=True)
class Ball:
    """The points an attack may use, for each of N inputs.

    Args:
        x: (N, ...) the inputs, within the range.
        eps: (N,) float64 radii, in the units of x; infinite for no bound.
        norm: a name of `NORMS`.
        low, high: the range, broadcast against x.
    """

    x: Tensor
    eps: Tensor
    norm: Norm
    low: Tensor
    high: Tensor

    @classmethod
    def of(
        cls, x: Tensor, eps: float | Tensor, norm: Norm, low: float | Tensor = 0.0, high: float | Tensor = 1.0
    ) -> Ball:
        """Return the ball of one radius, or one for each input, around x (N, ...).

        Raises:
            UnknownNameError: no such norm.
            InputError: radii that are not positive; a range that is empty, or that does not hold all inputs.
        """
        if norm not in NORMS:
            raise UnknownNameError("norm", norm, NORMS)
        radii = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
        if radii.dim() > 1 or (radii.dim() == 1 and len(radii) != len(x)):
            raise InputError(
                f"eps has shape {tuple(radii.shape)}; expected one number, or one for each of {len(x)} inputs"
            )
        if not bool((radii > 0).all()):
            raise InputError(f"eps is {eps!r:.60}; expected a positive number, in the units of the inputs")
        lo, hi = (torch.as_tensor(v, device=x.device).to(x.dtype) for v in (low, high))
        try:
            fits = torch.broadcast_shapes(lo.shape, hi.shape, x.shape[1:]) == x.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"the range has shapes {tuple(lo.shape)} and {tuple(hi.shape)}; expected numbers, or tensors that fit inputs of "
                f"shape {tuple(x.shape[1:])}"
            )
        if not bool((lo < hi).all()):
            raise InputError(f"the range runs from {low!r:.40} to {high!r:.40}; expected low < high")
        if not bool(((x >= lo) & (x <= hi)).all()):
            raise InputError(
                f"the inputs run from {float(x.min()):.4g} to {float(x.max()):.4g}, outside the stated range, "
                f"{float(lo.min()):.4g} to {float(hi.max()):.4g}; give low and high as they are, or put the normalisation into "
                "the net (qlab.attacks.pixels does it for a data set of the lab)"
            )
        return cls(x, radii.expand(len(x)), norm, lo, hi)

    def take(self, index: Tensor) -> Ball:
        """Return the balls of some of the inputs, by index (n,)."""
        taken = Ball(self.x[index], self.eps[index], self.norm, self.low, self.high)
        if self.norm == "linf":
            taken.__dict__["box"] = (self.box[0][index], self.box[1][index])  # measured once, not at every step
        return taken

    def distance(self, points: Tensor) -> Tensor:
        """Return ||x' - x||_p of points (N, ...), (N,) in float64, from the numbers as they are stored."""
        return norms(points.to(torch.float64, copy=True).sub_(self.x), self.norm)

    def contains(self, points: Tensor) -> Tensor:
        """Return whether points (N, ...) lie in ball and range, (N,), to the last bit."""
        if self.norm == "linf" and points.dtype == self.x.dtype:
            low, high = self.box
            return ((points >= low) & (points <= high)).flatten(1).all(1)
        inside = ((points >= self.low) & (points <= self.high)).flatten(1).all(1)
        return inside & (self.distance(points) <= self.eps)

    def clip(self, points: Tensor) -> Tensor:
        """Return points (N, ...) moved into the range alone."""
        return torch.minimum(torch.maximum(points, self.low), self.high)

    def project(self, points: Tensor) -> Tensor:
        """Return the points (N, ...) of ball and range that are nearest to the given ones; see the module docstring."""
        points = points.to(self.x.dtype)
        if self.norm == "linf":
            low, high = self.box
            return torch.minimum(torch.maximum(points, low), high)
        out = (~self.contains(points)).nonzero()[:, 0]
        if not len(out):
            return points
        return points.index_copy(0, out, self.take(out)._nearest(points[out]))

    def _nearest(self, points: Tensor) -> Tensor:
        """Return the nearest points of B to points (n, ...) outside, for p = 2 and 1."""
        x = self.x.double()
        delta = points.double() - x
        side = torch.where(delta > 0, self.high, self.low)
        room = (side.double() - x).abs()
        a, c = delta.abs().flatten(1), room.flatten(1)
        shrink = _shrink_l2 if self.norm == "l2" else _shrink_l1
        size = shrink(a, c, (1 - 2 * SLACK) * self.eps)
        within = (1 - SLACK) * self.eps / norms(size, self.norm)  # below 1 only where that sum was rounded up
        size = (size * within.clamp(max=1)[:, None]).reshape(delta.shape)
        end = (x + delta.sign() * size).to(self.x.dtype)
        end = torch.where((end.double() - x).abs() > size, _inward(end, self.x), end)
        return torch.where((size >= room) & (delta != 0), side, end)

    @property
    def radius(self) -> Tensor:
        """eps (N,) where it is finite, else the width of the range: a length to measure steps by."""
        return torch.where(self.eps.isinf(), (self.high.double() - self.low.double()).max(), self.eps)

    @cached_property
    def box(self) -> tuple[Tensor, Tensor]:
        """The least and largest point of l_inf ball and range together, (N, ...) each, in the dtype of x."""
        low, high = self.edges
        return self.clip(low), self.clip(high)

    @property
    def edges(self) -> tuple[Tensor, Tensor]:
        """The least and largest point of the l_inf ball, (N, ...) each, in the dtype of x, rounded into the ball."""
        eps = _wide(self.eps, self.x)
        x = self.x.double()
        ends = []
        for side in (-1.0, 1.0):
            end = (x + side * eps).to(self.x.dtype)
            # One rounding can put an end out of the ball by one unit in the last place.
            ends.append(torch.where((end.double() - x).abs() > eps, _inward(end, self.x), end))
        return ends[0], ends[1]

    def random(self, generator: torch.Generator) -> Tensor:
        """Return a random point of each ball, within the range, (N, ...): uniform for l_inf, uniform direction and radius else.

        An infinite radius counts as `radius`.
        """
        shape, dtype = self.x.shape, self.x.dtype
        eps = _wide(self.radius, self.x)
        if self.norm == "linf":
            noise = 2 * torch.rand(shape, generator=generator, dtype=torch.float64).to(self.x.device) - 1
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.x.device)
            radius = torch.rand(len(self.x), generator=generator, dtype=torch.float64).to(self.x.device)
            noise = noise * _wide(radius / norms(noise, self.norm), self.x)
        return self.project((self.x.double() + eps * noise).to(dtype))


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values (N,) as (N, 1, ...), to be broadcast against (N, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def _inward(end: Tensor, x: Tensor) -> Tensor:
    """Return the neighbour of each number towards x, in their dtype."""
    if end.dtype != torch.float16:
        return torch.nextafter(end, x)
    bits, up = end.view(torch.int16), x > end  # not every device knows neighbours of float16
    moved = torch.where(end == 0, torch.where(up, 1, -32767), bits + torch.where((end > 0) == up, 1, -1)).to(
        torch.int16
    )
    return torch.where(end == x, end, moved.view(torch.float16))


def _shrink_l2(a: Tensor, c: Tensor, eps: Tensor) -> Tensor:
    """Return min(s a, c) for sizes a and rooms c (n, D), with the largest s in [0, 1] that keeps its l2 norm within eps (n,)."""
    largest = a.amax(1, keepdim=True)
    b2, d2, r2 = (
        (a / largest).square(),
        (c / largest).square(),
        (eps / largest[:, 0]).square(),
    )  # tiny squares would underflow
    limit = torch.where(c < a, c / a, 1.0)  # the s from which on a coordinate has no more room
    s = (r2 / b2.sum(1)).sqrt().clamp(max=1)
    while True:  # s grows with the set of coordinates that have no more room, until that set is right
        full = (limit < s[:, None]).double()
        used, free = torch.linalg.vecdot(full, d2), torch.linalg.vecdot(1 - full, b2)
        grown = torch.where(free > 0, ((r2 - used).clamp(min=0) / free).sqrt(), 1.0).clamp(max=1)
        if not bool((grown > s).any()):
            return torch.minimum(s[:, None] * a, c)
        s = torch.maximum(grown, s)


def _shrink_l1(a: Tensor, c: Tensor, eps: Tensor) -> Tensor:
    """Return min(max(a - t, 0), c) for sizes a and rooms c (n, D), with the least t >= 0 that keeps its sum within eps (n,)."""
    # As t falls from max a to 0, a coordinate starts to grow at t = a and has no more room at t = a - c.
    t, order = torch.cat([a, (a - c).clamp(min=0)], 1).sort(dim=1, descending=True)
    growing = torch.where(order < a.shape[1], 1.0, -1.0).double().cumsum(1)
    total = torch.cat([torch.zeros_like(t[:, :1]), (growing[:, :-1] * (t[:, :-1] - t[:, 1:])).cumsum(1)], 1)
    last = (total <= eps[:, None]).sum(1, keepdim=True) - 1
    level = t.gather(1, last) - (eps[:, None] - total.gather(1, last)) / growing.gather(1, last).clamp(min=1)
    return torch.minimum((a - level.clamp(min=0)).clamp(min=0), c)
