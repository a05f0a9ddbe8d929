r"""Boundary attack: a random walk along the decision boundary towards the input, from decisions alone.

    x^_0     = a misclassified point: the nearest input of another class, or noise, moved towards x to the boundary by bisection
    step     D = ||x^_k - x||_p
      l_2    o = x + D (x^_k + delta D u - x) / ||x^_k + delta D u - x||_2       u orthogonal to x^_k - x, ||u||_2 = 1: on the sphere
             s = o + (x - o) (1 - (1 - e) D / ||o - x||_2)                       nearer by the share e
      l_inf  o = clip(x^_k + delta D u, x - D, x + D)                            u in {-1, 0, 1}^N, random density
             s = clip(o, x - (1 - e) D, x + (1 - e) D)                           nearer by the share e: the cube shrinks
    x^_{k+1} = s if s is misclassified, else x^_k

Both are moved into the range. Only argmax is used: any increasing function of the logits, and any scale, gives the same walk. Sizes
belong to each example and follow its success: log delta rises by a (1 - 1/2) where o is misclassified and falls by a / 2 else, so half
of the orthogonal steps succeed; e likewise with a quarter of s. An example is left alone once e falls below `converged`.

Deviations from the paper: sizes change a little at every step, where the paper looks at the success over the last ones; a step of the
l_inf version is ours, the paper has l_2 only; x^_0 is found by bisection, as in the code of Foolbox.

A radius eps bounds what counts as found, not the walk, which begins far away.

Source: Brendel, Rauber, Bethge 2018, arXiv 1712.04248 (l_2).

Shapes: x (N, ...), n of the examples.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, Norm, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.losses import margin, misclassified
from qlab.attacks.random_search import spread
from qlab.attacks.victim import Victim
from qlab.errors import InputError, UnknownNameError

__all__ = ["Boundary"]

ORTHOGONAL_TARGET, SOURCE_TARGET = 0.5, 0.25  # success rates that the sizes aim at
TRIES = 64  # noise points asked about for each example that has no other start
LARGEST = 0.5  # of e: a step cannot go all the way


@dataclass(frozen=True)
class Boundary(Attack):
    """Boundary attack.

    Args:
        steps: T; two questions each.
        start: "class": the nearest input of the batch that the net takes for another class, noise where there is none; "noise".
        orthogonal: delta to begin with, as a share of the distance.
        source: e to begin with, as a share of the distance.
        adapt: a, how fast sizes follow success.
        converged: e below which an example is left alone.
        bisections: halvings of the line from x to the start.
    """

    steps: int = 2000
    start: Literal["class", "noise"] = "class"
    orthogonal: float = 0.1
    source: float = 0.1
    adapt: float = 0.1
    converged: float = 1e-7
    bisections: int = 10

    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    keep: ClassVar[Literal["worst", "nearest"]] = "nearest"
    needs_eps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.bisections < 0:
            raise InputError(
                f"steps is {self.steps!r} and bisections {self.bisections!r}; expected at least 1 and at least 0"
            )
        if self.start not in ("class", "noise"):
            raise UnknownNameError("start", self.start, ["class", "noise"])
        for name in ("orthogonal", "source", "adapt"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected a number between 0 and 1")
        if not self.converged >= 0:
            raise InputError(f"converged is {self.converged!r}; expected 0 or above")

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Start, then walk."""
        ball, y = ledger.ball, ledger.y
        points, at = self._starts(victim, ledger, noise)
        points = self._bisect(victim, ledger, at, points)
        draw = _sphere if ball.norm == "l2" else _cube
        delta = torch.full_like(ball.eps, self.orthogonal).clone()
        e = torch.full_like(ball.eps, self.source).clone()
        for k in range(self.steps):
            at = at[e[at] >= self.converged]
            if not len(at):
                return
            proposals = draw(ball, at, points[at], delta[at], e[at], noise)
            z = victim.logits(torch.cat(proposals))
            orthogonal, nearer = misclassified(z, y[at].repeat(2)).chunk(2)
            moved = at[nearer]
            points[moved] = proposals[1][nearer]
            ledger.see(moved, points[moved], z[len(at) :][nearer])
            ledger.step(at, points[at], margin(z[len(at) :], y[at]))
            delta[at] *= torch.exp(self.adapt * (orthogonal.double() - ORTHOGONAL_TARGET))
            e[at] = (e[at] * torch.exp(self.adapt * (nearer.double() - SOURCE_TARGET))).clamp(max=LARGEST)
            yield (k + 1) / self.steps

    def _starts(self, victim: Victim, ledger: Ledger, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return misclassified points (N, ...), and for which examples (n,) there are some."""
        ball, y = ledger.ball, ledger.y
        points = ball.x.clone()
        found = ~ledger.clean
        if self.start == "class":
            flat = ball.x.flatten(1).double()
            apart = torch.cdist(flat, flat, p=2.0 if ball.norm == "l2" else math.inf)
            other = (
                ledger.z.argmax(-1) != y[:, None]
            )  # (N, N): whether the input of the column is taken for another class
            nearest = apart.masked_fill(~other, torch.inf).argmin(1)
            found |= other.any(1)
            at = (found & ledger.clean).nonzero()[:, 0]
            points[at] = ball.x[nearest[at]]
            ledger.see(at, points[at], ledger.z[nearest[at]])
        for t in range(TRIES):
            at = (~found).nonzero()[:, 0]
            if not len(at):
                break
            points[at] = _noise(ball, noise, corner=t % 2 == 1)[at]
            found[at] = ledger.ask(at, points[at])[1]
        return points, (found & ledger.clean).nonzero()[:, 0]

    def _bisect(self, victim: Victim, ledger: Ledger, at: Tensor, points: Tensor) -> Tensor:
        """Return points (N, ...) moved towards x up to the boundary, those of the examples at (n,)."""
        near, far = torch.zeros_like(ledger.ball.eps), torch.ones_like(ledger.ball.eps)
        start, x = points[at].double(), ledger.ball.x[at].double()
        for _ in range(self.bisections if len(at) else 0):
            middle = (near[at] + far[at]) / 2
            tried = ledger.ball.clip((x + spread(middle, x.dim()) * (start - x)).to(points.dtype))
            z = victim.logits(tried)
            wrong = misclassified(z, ledger.y[at])
            near[at], far[at] = torch.where(wrong, near[at], middle), torch.where(wrong, middle, far[at])
            moved = at[wrong]
            points[moved] = tried[wrong]
            ledger.see(moved, points[moved], z[wrong])
        return points


def _noise(ball: Ball, noise: torch.Generator, corner: bool) -> Tensor:
    """Return a random point of the range for each example, or a random corner of it, (N, ...)."""
    x = ball.x.double()
    # A range without ends is taken to be three times as wide as the inputs.
    width = x.max() - x.min()
    low = torch.where(ball.low.isinf(), x.min() - width, ball.low.double())
    high = torch.where(ball.high.isinf(), x.max() + width, ball.high.double())
    u = torch.rand(x.shape, generator=noise, dtype=torch.float64).to(x.device)
    u = u.round() if corner else u
    return ball.clip((low + u * (high - low)).to(ball.x.dtype))


def _sphere(
    ball: Ball, at: Tensor, points: Tensor, delta: Tensor, e: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return an orthogonal step on the l_2 sphere around x, and that step brought nearer, (n, ...) each."""
    x = ball.x[at].double()
    away = points.double() - x
    D = norms(away, "l2")
    u = torch.randn(ball.x.shape, generator=noise, dtype=torch.float64).to(x.device)[at]
    along = (u * away).flatten(1).sum(1) / D.square()
    u = u - spread(along, u.dim()) * away
    u = u * spread(delta * D / norms(u, "l2"), u.dim())
    o = ball.clip((x + (away + u) / spread((1 + delta.square()).sqrt(), u.dim())).to(points.dtype))
    away = o.double() - x
    shrink = ((1 - e) * D / norms(away, "l2")).clamp(max=1)  # clipping may have brought it nearer already
    return o, ball.clip((x + spread(shrink, u.dim()) * away).to(points.dtype))


def _cube(
    ball: Ball, at: Tensor, points: Tensor, delta: Tensor, e: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a step within the l_inf ball of the distance around x, and that step brought nearer, (n, ...) each."""
    x = ball.x[at].double()
    D = norms(points.double() - x, "linf")
    shape = ball.x.shape
    N = shape[1:].numel()
    signs = 2.0 * torch.randint(0, 2, shape, generator=noise, dtype=torch.int8).double() - 1
    # Most coordinates of a near point stand at an end already, and to move them loses ground: some steps move only a few.
    density = N ** -torch.rand(len(ball.x), generator=noise, dtype=torch.float64)
    kept = torch.rand(shape, generator=noise, dtype=torch.float64) < spread(density, len(shape))
    u = (signs * kept).to(x.device)[at]
    reach = spread(D, u.dim())
    o = ball.clip(
        (x + (points.double() - x + spread(delta, u.dim()) * reach * u).clamp(-reach, reach)).to(points.dtype)
    )
    reach = spread((1 - e) * D, u.dim())
    return o, ball.clip((x + (o.double() - x).clamp(-reach, reach)).to(points.dtype))
