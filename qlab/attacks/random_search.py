r"""Random and coordinate search: the plainest attacks without gradients, and what a gradient must beat.

RandomSearch      K random points of the ball:
                  corners  x + eps d / ||d||_p, d in {-1, 1}^N
                  ball     x + eps u, u uniform in the cube for l_inf, of uniform direction and radius for l_2 and l_1
CoordinateSearch  for each block B of coordinates in random order:
                  x'_B <- an end of the l_inf ball, where that raises the margin

A gradient attack that misses an example which random points break has followed a gradient that points nowhere. On a linear net of
two classes one pass of CoordinateSearch finds the optimum: each coordinate goes to the end that the sign of its weight names, and
the margin grows by eps ||w||_1 where the range allows.

The K directions of RandomSearch are shared by the examples of a batch: for each example they are independent draws, and what is
found for it does not hang on when others break.

CoordinateSearch asks about the next A blocks at once, each moved alone to either end, and then about all improving moves together;
the best of these points is kept. So the margin never falls, and questions come in batches also for a single example. A move that
would change nothing is not asked about, and an example is left alone once a whole pass moves nothing.

The loss of a net with sign activations is a staircase: most moves of one coordinate change nothing, and a search that keeps only
what raises the margin stands still. So moves that leave it as it is are made too (`ties`), towards an end chosen at random.

Source: random points as a check of gradient attacks: Athalye, Carlini, Wagner 2018, arXiv 1802.00420. Search over ends of blocks:
Moon, An, Song 2019, arXiv 1905.06635, in a plainer form.

Shapes: x (N, ...), n of the examples, k candidates of each.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, Norm, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.losses import margin, misclassified
from qlab.attacks.victim import Victim
from qlab.errors import InputError, UnknownNameError

__all__ = ["CoordinateSearch", "RandomSearch", "reach", "score", "spread"]

DRAWN = 64  # directions at a time: which ones there are must not hang on how many examples are left
LEAST = 1e-300


def score(z: Tensor, y: Tensor) -> Tensor:
    """Return the margin, (n,) float64, made positive also where a tie of logits is decided against the label.

    Raises:
        InputError: logits that are not finite.
    """
    m = margin(z, y).double()
    if not bool(m.isfinite().all()):
        raise InputError(
            "the net's logits hold NaN or infinite values at a point that the attack proposed, although they are finite on the "
            "inputs: an operation overflows"
        )
    return torch.where(misclassified(z, y), m.clamp(min=LEAST), m)


def reach(ball: Ball) -> Tensor:
    """Return eps, (N,); the diameter of the range where the ball is the whole range."""
    diameter = norms((ball.high - ball.low).expand(1, *ball.x.shape[1:]), ball.norm)
    return torch.where(ball.eps.isinf(), diameter, ball.eps)


def spread(values: Tensor, dim: int) -> Tensor:
    """Return values (n,) as (n, 1, ...) with `dim` dimensions."""
    return values.reshape(-1, *(1,) * (dim - 1))


@dataclass(frozen=True)
class RandomSearch(Attack):
    """Random points of the ball.

    Args:
        points: K, for each example.
        where: "corners" or "ball".
    """

    points: int = 10_000
    where: Literal["corners", "ball"] = "corners"

    def __post_init__(self) -> None:
        if self.points < 1:
            raise InputError(f"points is {self.points!r}; expected at least 1")
        if self.where not in ("corners", "ball"):
            raise UnknownNameError("place of random points", self.where, ["corners", "ball"])

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Ask about K points of each example, about `batch` points at a time."""
        asked = 0
        while asked < self.points:
            drawn = self._directions(ledger.ball, noise)[: self.points - asked]
            start = 0
            while start < len(drawn):
                at = ledger.active
                if not len(at):
                    return
                d = drawn[start : start + max(1, self.batch // len(at))]
                self._ask(victim, ledger, at, d)
                start += len(d)
                yield (asked + start) / self.points
            asked += len(drawn)

    def _directions(self, ball: Ball, noise: torch.Generator) -> Tensor:
        """Return some points of the unit ball, (k, ...) float64."""
        shape = (DRAWN, *ball.x.shape[1:])
        if self.where == "corners":
            d = 2 * torch.randint(0, 2, shape, generator=noise, dtype=torch.int8).double() - 1
            d = d if ball.norm == "linf" else d / norms(d[:1], ball.norm)
        elif ball.norm == "linf":
            d = 2 * torch.rand(shape, generator=noise, dtype=torch.float64) - 1
        else:
            d = torch.randn(shape, generator=noise, dtype=torch.float64)
            radius = torch.rand(DRAWN, generator=noise, dtype=torch.float64)
            d = d * spread(radius / norms(d, ball.norm), d.dim())
        return d.to(ball.x.device)

    @staticmethod
    def _ask(victim: Victim, ledger: Ledger, at: Tensor, d: Tensor) -> None:
        """Ask about the points in directions d (k, ...) for the examples at (n,), and book the best of each."""
        k = len(d)
        rows = at.repeat_interleave(k)
        ball = ledger.ball.take(rows)
        points = ball.project(ball.x.double() + spread(reach(ball), d.dim()) * d.repeat(len(at), *(1,) * (d.dim() - 1)))
        z = victim.logits(points)
        best = score(z, ledger.y[rows]).reshape(len(at), k).argmax(1) + k * torch.arange(len(at), device=at.device)
        ledger.see(at, points[best], z[best])
        ledger.step(at, points[best], margin(z[best], ledger.y[at]))


@dataclass(frozen=True)
class CoordinateSearch(Attack):
    """Greedy search over the ends of the l_inf ball, a block of coordinates at a time.

    Args:
        block: side of a block: block x block pixels of one channel for pictures (N, c, h, w), runs of `block` coordinates else.
        passes: how often all blocks are gone through.
        together: A, blocks asked about at once.
        ties: make moves that leave the margin as it is, too.
    """

    block: int = 1
    passes: int = 2
    together: int = 8
    ties: bool = True

    norms: ClassVar[tuple[Norm, ...]] = ("linf",)

    def __post_init__(self) -> None:
        for name in ("block", "passes", "together"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected at least 1")

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Go through all blocks in random order."""
        walk = _Walk(victim, ledger, self.ties)
        block = blocks(ledger.ball.x.shape[1:], self.block).to(ledger.y.device)
        count = int(block.max()) + 1
        going = torch.ones_like(ledger.broken)
        for r in range(self.passes):
            before = walk.points.clone()
            groups = torch.randperm(count, generator=noise).to(block.device).split(self.together)
            for g, group in enumerate(groups):
                at = ledger.active
                at = at[going[at]]
                if not len(at):
                    return
                masks = block == group[:, None]
                turned = torch.randint(0, 2, (len(group),), generator=noise).to(block.device)
                for part in at.split(max(1, self.batch // (2 * len(group)))):
                    walk.improve(part, masks, turned)
                ledger.step(at, walk.points[at].reshape(-1, *walk.shape), walk.margin[at])
                yield (r + (g + 1) / len(groups)) / self.passes
            going &= (walk.points != before).any(1)


def blocks(shape: torch.Size, block: int) -> Tensor:
    """Return which block each coordinate of an input belongs to, (D,) int64 from 0."""
    if len(shape) == 3:
        c, h, w = shape
        rows, columns = torch.arange(h) // block, torch.arange(w) // block
        down, across = -(-h // block), -(-w // block)
        return ((torch.arange(c)[:, None, None] * down + rows[:, None]) * across + columns).flatten()
    return torch.arange(shape.numel()) // block


class _Walk:
    """Where the search stands, for each example of a batch.

    Args:
        victim, ledger: as for `search`.
        ties: whether to move where the score stays as it is.

    Attributes:
        points: (N, D) the points.
        value: (N,) their scores.
        margin: (N,) their margins.
    """

    def __init__(self, victim: Victim, ledger: Ledger, ties: bool) -> None:
        self.victim, self.ledger = victim, ledger
        self.better = torch.ge if ties else torch.gt
        ball = ledger.ball
        self.shape = ball.x.shape[1:]
        self.low, self.high = (ball.clip(end).flatten(1) for end in ball.edges)
        self.points = ball.x.flatten(1).clone()
        self.value = score(ledger.z, ledger.y)
        self.margin = ledger.margin.clone()

    def improve(self, at: Tensor, masks: Tensor, turned: Tensor) -> None:
        """Move the blocks masks (A, D) of the examples at (n,) where that raises their margin.

        Args:
            at: indices.
            masks: the blocks.
            turned: (A,) 1 where the upper end of a block comes first, 0 where the lower one does: the first of equals is chosen.
        """
        here, before = self.points[at], self.value[at]
        ends = torch.stack([self.low[at], self.high[at]], 1)
        ends = ends[:, torch.stack([turned, 1 - turned], 1)]  # (n, A, 2, D)
        alone = torch.where(masks[:, None], ends, here[:, None, None])
        values = self._ask(at, alone.flatten(1, 2)).unflatten(1, (len(masks), 2))
        value, end = values.max(2)  # (n, A)
        raises = self.better(value, before[:, None])
        better_end = ends.gather(2, end[:, :, None, None].expand(-1, -1, 1, ends.shape[3]))[:, :, 0]
        all_of_them = here
        for a in range(len(masks)):
            all_of_them = torch.where(raises[:, a, None] & masks[a], better_end[:, a], all_of_them)
        done = self.ledger.broken[at] & self.ledger.early
        several = ((raises.sum(1) > 1) & ~done).nonzero()[:, 0]
        if len(several):
            self._ask(at[several], all_of_them[several, None])

    def _ask(self, at: Tensor, points: Tensor) -> Tensor:
        """Ask about points (n, k, D), stand on the best where it is better; return scores (n, k), -inf where nothing changes."""
        y, here = self.ledger.y[at], self.points[at]
        new = (points != here[:, None]).any(2)
        which = new.nonzero()[:, 0]
        values = torch.full(new.shape, -torch.inf, dtype=torch.float64, device=at.device)
        if not len(which):
            return values
        z = self.victim.logits(points[new].reshape(-1, *self.shape))
        values[new] = score(z, y[which])
        best, k = values.max(1)
        better = self.better(best, self.value[at])
        moved = at[better]
        # Rows of z are those of `new`, counted along.
        row = (new.flatten().cumsum(0) - 1).reshape(new.shape)[torch.arange(len(at), device=at.device), k][better]
        stand = points[better, k[better]]
        self.points[moved], self.value[moved] = stand, best[better]
        self.margin[moved] = margin(z[row], self.ledger.y[moved]).double()
        self.ledger.see(moved, stand.reshape(-1, *self.shape), z[row])
        return values
