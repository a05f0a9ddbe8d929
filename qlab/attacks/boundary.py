r"""Boundary attack: a random walk along the decision boundary towards the input, from decisions alone.

x^_0 is a misclassified point, the nearest input of another class or noise, moved towards x to the boundary by bisection. Each step
asks two questions at the distance D = ||x^ - x||_p, and moves where the net is wrong.

l_2     o = x + D v / ||v||_2,  v = x^ - x + delta D u      u orthogonal to x^ - x, ||u||_2 = 1: a step on the sphere around x
        s = x + (1 - e) D (o - x) / ||o - x||_2             that step brought nearer by the share e
        x^ <- s if s is misclassified

l_inf   o = x + clip(x^ - x with a run of coordinates put to an end +-D, (1 - TRIFLE) D)      a step on the cube around x
        s = x + clip(x^ - x, (1 - e) D)                                                       the cube made smaller by the share e
        x^ <- s or o, the nearer of those that are misclassified

All points are moved into the range. Only argmax is used: any increasing function of the logits, any scale, gives the same walk.

Sizes belong to each example and follow its success: delta grows by exp(a (1 - q)) where o is misclassified and falls by exp(-a q)
else, so that a share q of these steps succeeds; e likewise with s. In l_2, q is 1/2 for o and 1/4 for s, and an example is left
alone once e falls below `converged`. In l_inf, q is 1/4 for both, delta is the share of coordinates that a run takes, and the walk
goes on to the end, since there may always be a better run. Where a run would change nothing, its sign is turned round.

Deviations from the paper: sizes change a little at every step, where the paper looks at the success over the last ones; the paper
has l_2 only, and the l_inf step borrows its runs of coordinates from RayS; x^_0 is found by bisection, as in the code of Foolbox.

A radius eps bounds what counts as found, not the walk, which begins far away.

Source: Brendel, Rauber, Bethge 2018, arXiv 1712.04248; Chen, Gu 2020, arXiv 2006.12792 (RayS).

Shapes: x (N, ...), n of the examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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

HALF, QUARTER = 0.5, 0.25  # success rates that the sizes aim at
TRIFLE = 1e-3  # an l_inf run must gain so much of the distance: what it gains beyond, s finds out
LEAST = 1e-6  # of e in l_inf
TINY = 1e-12
TRIES = 64  # noise points asked about for each example that has no other start


@dataclass(frozen=True)
class Boundary(Attack):
    """Boundary attack.

    Args:
        steps: T; two questions each.
        start: "class": the nearest input of the batch that the net takes for another class, noise where there is none; "noise".
        orthogonal: delta to begin with.
        source: e to begin with.
        adapt: a, how fast sizes follow success.
        converged: e below which an example is left alone (l_2).
        bisections: halvings of the line from x to the start.
    """

    steps: int = 2000
    start: Literal["class", "noise"] = "class"
    orthogonal: float = 0.3
    source: float = 0.1
    adapt: float = 0.3
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
        ball = ledger.ball
        points, at = self._starts(victim, ledger, noise)
        points = self._bisect(victim, ledger, at, points)
        walk = (_Sphere if ball.norm == "l2" else _Cube)(ball, self)
        for k in range(self.steps):
            at = at[walk.going[at]]
            if not len(at):
                return
            proposals = walk.propose(at, points[at], noise)
            z = victim.logits(torch.cat(proposals))
            wrong = misclassified(z, ledger.y[at].repeat(2)).reshape(2, -1)
            which = walk.choose(at, wrong)  # (n,): 0 or 1, and -1 to stay
            moved, row = at[which >= 0], (which >= 0).nonzero()[:, 0] + len(at) * which[which >= 0]
            points[moved] = torch.cat(proposals)[row]
            ledger.see(moved, points[moved], z[row])
            ledger.step(at, points[at], margin(z[len(at) :], ledger.y[at]))
            walk.learn(at, wrong)
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


class _Walk(ABC):
    """Steps of a batch and their sizes.

    Args:
        ball: around the inputs.
        attack: the settings.

    Attributes:
        delta: (N,) float64 size of steps at the same distance.
        e: (N,) float64 size of steps towards the input.
        going: (N,) whether an example is worth another step.
    """

    targets: ClassVar[tuple[float, float]]

    def __init__(self, ball: Ball, attack: Boundary) -> None:
        self.ball, self.adapt = ball, attack.adapt
        self.delta = torch.full_like(ball.x.flatten(1)[:, 0], attack.orthogonal, dtype=torch.float64)
        self.e = torch.full_like(self.delta, attack.source)
        self.going = torch.ones_like(self.delta, dtype=torch.bool)

    @abstractmethod
    def propose(self, at: Tensor, points: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return o and s for the examples at (n,) that stand at points (n, ...)."""

    @abstractmethod
    def choose(self, at: Tensor, wrong: Tensor) -> Tensor:
        """Return where to move (n,), 0 for o, 1 for s, -1 for nowhere, from which are misclassified, (2, n)."""

    def learn(self, at: Tensor, wrong: Tensor) -> None:
        """Let sizes follow success (2, n)."""
        for size, success, target in zip((self.delta, self.e), wrong.double(), self.targets, strict=True):
            size[at] *= torch.exp(self.adapt * (success - target))
        self.e.clamp_(max=HALF)  # a step cannot go all the way


class _Sphere(_Walk):
    """l_2."""

    targets = (HALF, QUARTER)

    def __init__(self, ball: Ball, attack: Boundary) -> None:
        super().__init__(ball, attack)
        self.converged = attack.converged

    def propose(self, at: Tensor, points: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.ball.x[at].double()
        dim = x.dim()
        away = points.double() - x
        D = norms(away, "l2")
        # Drawn in float32, which is fine enough for a direction and half the work.
        u = torch.randn(self.ball.x.shape, generator=noise).to(x.device)[at].double()
        u = u - spread((u * away).flatten(1).sum(1) / D.square(), dim) * away
        v = away + u * spread(self.delta[at] * D / norms(u, "l2").clamp(min=TINY), dim)
        o = self._inside(x + v * spread(D / norms(v, "l2"), dim))
        away = o.double() - x
        shrink = ((1 - self.e[at]) * D / norms(away, "l2")).clamp(max=1)  # the range may have brought it nearer already
        return o, self._inside(x + away * spread(shrink, dim))

    def _inside(self, points: Tensor) -> Tensor:
        return self.ball.clip(points.to(self.ball.x.dtype))

    def choose(self, at: Tensor, wrong: Tensor) -> Tensor:
        return torch.where(wrong[1], 1, -1)

    def learn(self, at: Tensor, wrong: Tensor) -> None:
        super().learn(at, wrong)
        self.going = self.e >= self.converged


class _Cube(_Walk):
    """l_inf."""

    targets = (QUARTER, QUARTER)

    def propose(self, at: Tensor, points: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.ball.x[at].double().flatten(1)
        away = points.double().flatten(1) - x
        D = norms(away, "linf")[:, None]
        N = x.shape[1]
        draws = torch.randint(0, 2 * N, (len(self.ball.x), 1), generator=noise).to(x.device)[at]
        first, end = draws % N, torch.where(draws < N, D, -D)
        run = (torch.arange(N, device=x.device) - first) % N < (self.delta[at, None] * N).round().clamp(min=1)
        there = self._inside(x + torch.where(run, end, away))
        same = (there == points).flatten(1).all(1)[:, None]
        turned = torch.where(run, torch.where(same, -end, end), away)
        o, s = (
            self._inside(x + move.clamp(-reach, reach))
            for move, reach in ((turned, (1 - TRIFLE) * D), (away, (1 - self.e[at, None]) * D))
        )
        return o, s

    def _inside(self, flat: Tensor) -> Tensor:
        return self.ball.clip(flat.reshape(-1, *self.ball.x.shape[1:]).to(self.ball.x.dtype))

    def choose(self, at: Tensor, wrong: Tensor) -> Tensor:
        o, s = wrong
        return torch.where(s & ~(o & (self.e[at] < TRIFLE)), 1, torch.where(o, 0, -1))

    def learn(self, at: Tensor, wrong: Tensor) -> None:
        super().learn(at, wrong)
        self.e.clamp_(min=LEAST)
        self.delta.clamp_(max=1.0)
        self.delta.clamp_(min=1 / self.ball.x[0].numel())
