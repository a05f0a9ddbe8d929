r"""Where an adversarial example may lie: a ball around its input, and the range of all inputs.

    B = { x' : ||x' - x||_p <= eps,  low <= x' <= high }        p in {inf, 2, 1}

Projections keep a point of B as it is, and always return a point of B, to the last bit: distances are measured in float64 from the
numbers as they are stored, and what rounding has pushed out is moved in. For p = inf the projection is the nearest point; for p = 2
and 1 it is the projection on the ball, then on the range, which stays in the ball because x lies in the range.

Source: Madry et al. 2018, arXiv 1706.06083; Duchi et al. 2008 (projection on the l1 ball).

Shapes: x (N, ...), eps (N,), distances (N,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qlab.errors import InputError, UnknownNameError

__all__ = ["NORMS", "Ball", "Norm", "dual", "norms"]

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)


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
            torch.broadcast_shapes(lo.shape, hi.shape, x.shape[1:])
        except RuntimeError as error:
            raise InputError(
                f"the range has shapes {tuple(lo.shape)} and {tuple(hi.shape)}; expected numbers, or tensors that fit inputs of "
                f"shape {tuple(x.shape[1:])}"
            ) from error
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
        return Ball(self.x[index], self.eps[index], self.norm, self.low, self.high)

    def distance(self, points: Tensor) -> Tensor:
        """Return ||x' - x||_p of points (N, ...), (N,) in float64, from the numbers as they are stored."""
        return norms(points.double() - self.x.double(), self.norm)

    def contains(self, points: Tensor) -> Tensor:
        """Return whether points (N, ...) lie in ball and range, (N,), to the last bit."""
        inside = ((points >= self.low) & (points <= self.high)).flatten(1).all(1)
        return inside & (self.distance(points) <= self.eps)

    def clip(self, points: Tensor) -> Tensor:
        """Return points (N, ...) moved into the range alone."""
        return torch.minimum(torch.maximum(points, self.low), self.high)

    def project(self, points: Tensor) -> Tensor:
        """Return points (N, ...) of ball and range near the given ones; see the module docstring."""
        points = points.to(self.x.dtype)
        if self.norm == "linf":
            low, high = self.edges
            return self.clip(torch.minimum(torch.maximum(points, low), high))
        delta = self.clip(points).double() - self.x.double()
        delta = _onto_l2(delta, self.eps) if self.norm == "l2" else _onto_l1(delta, self.eps)
        out = self.clip(self.x.double().add(delta).to(self.x.dtype))
        step = torch.finfo(self.x.dtype).eps
        shrink = 1 - step
        while bool((outside := self.distance(out) > self.eps).any()):
            pulled = self.clip(self.x.double().add(delta * shrink).to(self.x.dtype))
            out = torch.where(_wide(outside, out), pulled, out)
            step *= 2
            shrink = max(0.0, 1 - step)
        return out

    @property
    def edges(self) -> tuple[Tensor, Tensor]:
        """The least and largest point of the l_inf ball, (N, ...) each, in the dtype of x, rounded into the ball."""
        eps = _wide(self.eps, self.x)
        x = self.x.double()
        ends = []
        for side in (-1.0, 1.0):
            end = (x + side * eps).to(self.x.dtype)
            # One rounding can put an end out of the ball by one unit in the last place.
            end = torch.where((end.double() - x).abs() > eps, _inward(end, side), end)
            ends.append(end)
        return ends[0], ends[1]

    def random(self, generator: torch.Generator) -> Tensor:
        """Return a random point of each ball, within the range, (N, ...): uniform for l_inf, uniform direction and radius else.

        An infinite radius counts as the width of the range.
        """
        shape, dtype = self.x.shape, self.x.dtype
        width = (self.high - self.low).double().max()
        eps = _wide(torch.where(self.eps.isinf(), width, self.eps), self.x)
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


def _inward(end: Tensor, side: float) -> Tensor:
    """Return the neighbour of a number towards the middle of its ball."""
    if end.dtype in (torch.float32, torch.float64):
        return torch.nextafter(end, torch.full_like(end, -side * math.inf))
    info = torch.finfo(end.dtype)  # torch knows no neighbours of half floats: one or two units down
    return end - side * (end.abs() * info.eps + info.tiny).to(end.dtype)


def _onto_l2(delta: Tensor, eps: Tensor) -> Tensor:
    size = norms(delta, "l2")
    return delta * _wide(torch.where(size > eps, eps / size, torch.ones_like(size)), delta)


def _onto_l1(delta: Tensor, eps: Tensor) -> Tensor:
    """Return the nearest points with ||delta||_1 <= eps: soft thresholding at the level that the sorted sizes give."""
    flat = delta.flatten(1)
    size = flat.abs().sort(dim=1, descending=True).values
    total = size.cumsum(1) - eps[:, None]
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    rho = (size * count > total).sum(1, keepdim=True).clamp(min=1)
    level = (total.gather(1, rho - 1) / rho).clamp(min=0)
    level = torch.where(eps[:, None].isinf(), torch.zeros_like(level), level)
    return (flat.sign() * (flat.abs() - level).clamp(min=0)).reshape(delta.shape)
