r"""Square attack: random search with square changes, from logits alone.

l_inf:  x^_1     = P( x + eps * stripes )                 one random sign per channel and column
        x^_{t+1} = x^_t with one window moved to an end    x + eps or x - eps, one random sign per channel, at a random place
        kept where the margin grows                        max_{i != y} z_i - z_y

The window has side s = round(sqrt(p h w)): p is the share of the picture that it covers. p is halved at t = 10, 50, 200, 500, 1000,
2000, 4000, 6000, 8000 of 10,000 questions, and these places are rescaled to Q.

l_2:    delta starts as a grid of tiles of bumps eta, random signs, ||delta||_2 = eps. A step empties a window W2 and gives its mass
        to a window W1, for each channel:

        u        =  rho eta + delta_W1 / ||delta_W1||      rho a random sign, eta the bumps of Algorithm 3
        delta_W1 <- u / ||u|| sqrt( ||delta_{W1 or W2}||^2 + (eps^2 - ||delta||^2) / c ),     delta_W2 <- 0

        so that ||delta||_2 = eps again; the last term gives back what the range has clipped.

Every pixel is eligible, those of the last row and column too, which the public code leaves out. Where an l_inf window would change
nothing, its signs are turned round: no question is spent on the point where the search stands. Places are drawn for each example,
where the public code shares those of l_2 in a batch.

The loss of a net with sign activations is a staircase, and many windows leave it as it is. Such moves are made too (`ties`): the
search drifts over a step instead of standing on it. On nets whose margins are never equal this changes nothing.

Inputs that are no pictures: (N, C, W) are C channels of height 1, and all other shapes are one channel of height 1, so windows are
runs of p w neighbours and the first point is a random corner of the ball.

Source: Andriushchenko, Croce, Flammarion, Hein 2020, arXiv 1912.00049; code of fra31/auto-attack.

Shapes: x (N, c, h, w), n of the examples, windows (a, b).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlab.attacks.ball import Norm, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.random_search import reach, score
from qlab.attacks.victim import Victim
from qlab.errors import InputError

__all__ = ["Square", "bumps", "share", "side"]

HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 questions
TILES = 5  # the l_2 grid has so many tiles in a row
SMALLEST = 3  # side of the smallest l_2 window: half of it holds bumps of the other sign
TINY = 1e-12
CANCELLED = 1e-6  # the window held the same bumps with the other sign: the sum is what rounding left


def share(p: float, t: int, queries: int) -> float:
    """Return the share of the picture that a window covers at step t of Q questions: p halved at fixed places, rescaled to Q."""
    place = int(10_000 * t / queries)
    return p / 2 ** sum(place > limit for limit in HALVED)


def side(p: float, height: int, width: int) -> tuple[int, int]:
    """Return height and width of a window that covers a share p: a square where it fits, else all of the short side."""
    area = p * height * width
    square = max(1, round(math.sqrt(area)))
    short = min(height, width)
    if square <= short:
        return square, square
    long = min(max(height, width), max(1, round(area / short)))
    return (short, long) if height <= width else (long, short)


def bumps(height: int, width: int) -> Tensor:
    r"""Return eta (height, width), ||eta||_2 = 1: a bump in one half of the longer side, one of the other sign in the other half.

    A bump is a sum of nested rectangles, the k-th with weight 1 / k^2.
    """
    if height > width:
        return bumps(width, height).T
    half = width // 2
    eta = torch.cat([_bump(height, half), -_bump(height, width - half)], dim=1)
    return eta / eta.norm()


def _bump(height: int, width: int) -> Tensor:
    """Return one bump (height, width) of norm 1."""
    out = torch.zeros(height, width, dtype=torch.float64)
    if not out.numel():
        return out
    middle = height // 2, width // 2
    for k in range(max(middle) + 1):
        rows, columns = (slice(max(m - k, 0), m + k + 1) for m in middle)
        out[rows, columns] += 1 / (k + 1) ** 2
    return out / out.norm()


@dataclass(frozen=True)
class Square(Attack):
    """Square attack.

    Args:
        queries: Q, questions for each example at most, the one about the example itself among them.
        p: share of the picture that the first window covers.
        ties: make moves that leave the margin as it is, too.
    """

    queries: int = 5000
    p: float = 0.8
    ties: bool = True

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        if self.queries < 2:
            raise InputError(f"queries is {self.queries!r}; expected at least 2: the example itself and one candidate")
        if not 0 < self.p <= 1:
            raise InputError(f"p is {self.p!r}; expected a share of the picture, above 0 and at most 1")

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Ask Q - 1 times about a changed window of the best point."""
        # Random choices are made for all examples of the batch, so that the path of one does not hang on the fate of others.
        moves = (_Stripes if ledger.ball.norm == "linf" else _Bumps)(ledger, noise)
        best = moves.first()
        value = torch.full_like(ledger.margin, -torch.inf)
        logits = torch.zeros_like(ledger.z)  # of the best points
        for t in range(1, self.queries):
            at = ledger.active
            if not len(at):
                return
            points = best[at] if t == 1 else moves.next(best, at, share(self.p, t - 1, self.queries))
            z = victim.logits(points)
            m = score(z, ledger.y[at])
            found = (m > 0) & (m > value[at])
            if found.any():
                ledger.see(at[found], points[found], z[found])
            moves_to = m >= value[at] if self.ties else m > value[at]
            moved = at[moves_to]
            best[moved], value[moved], logits[moved] = points[moves_to], m[moves_to], z[moves_to]
            if ledger.traced:
                ledger.step(at, best[at], value[at])
            yield t / (self.queries - 1)
        at = ledger.active
        ledger.see(at, best[at], logits[at])


class _Moves(ABC):
    """Candidates for a batch.

    Args:
        ledger: whose ball it is.
        noise: where random choices come from.
    """

    def __init__(self, ledger: Ledger, noise: torch.Generator) -> None:
        self.ball, self.noise = ledger.ball, noise
        shape = self.ball.x.shape
        self.shape = shape[1:]
        c, h, w = (
            shape[1:] if len(shape) == 4 else (shape[1], 1, shape[2]) if len(shape) == 3 else (1, 1, shape[1:].numel())
        )
        self.c, self.h, self.w = c, h, w

    @abstractmethod
    def first(self) -> Tensor:
        """Return the points to start from, (N, ...)."""

    @abstractmethod
    def next(self, best: Tensor, at: Tensor, p: float) -> Tensor:
        """Return changed best points of the examples at (n,), (n, ...): windows of share p."""

    def pictures(self, x: Tensor) -> Tensor:
        """Return x (n, ...) as (n, c, h, w)."""
        return x.reshape(len(x), self.c, self.h, self.w)

    def coins(self, *shape: int) -> Tensor:
        """Return heads or tails for each example, channel and what else, (N, c, *shape)."""
        draws = torch.randint(0, 2, (len(self.ball.x), self.c, *shape), generator=self.noise, dtype=torch.int8)
        return draws.to(self.ball.x.device).bool()

    def places(self, a: int, b: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the index of a random window of pictures (n, c, h, w) for the examples at (n,): what it takes is (n, c, a, b)."""
        count, device = len(self.ball.x), at.device
        top, left = (
            torch.randint(0, size - length + 1, (count,), generator=self.noise).to(device)[at, None]
            for size, length in ((self.h, a), (self.w, b))
        )
        rows, columns = top + torch.arange(a, device=device), left + torch.arange(b, device=device)
        examples = torch.arange(len(at), device=device)[:, None, None, None]
        channels = torch.arange(self.c, device=device)[None, :, None, None]
        return examples, channels, rows[:, None, :, None], columns[:, None, None, :]


class _Stripes(_Moves):
    """l_inf: windows moved to the ends of the ball."""

    def __init__(self, ledger: Ledger, noise: torch.Generator) -> None:
        super().__init__(ledger, noise)
        self.low, self.high = (self.pictures(self.ball.clip(end)) for end in self.ball.edges)

    def first(self) -> Tensor:
        """Return the vertical stripes, (N, ...)."""
        return torch.where(self.coins(1, self.w), self.high, self.low).reshape(self.ball.x.shape)

    def next(self, best: Tensor, at: Tensor, p: float) -> Tensor:
        """Return the best points of the examples at (n,) with one window moved to an end, (n, ...)."""
        window = self.places(*side(p, self.h, self.w), at)
        there = (at[:, None, None, None], *window[1:])
        low, high = self.low[there], self.high[there]
        up = self.coins(1, 1)[at]
        points = self.pictures(best[at])
        before, after = points[window], torch.where(up, high, low)
        same = (after == before).flatten(1).all(1)[:, None, None, None]
        points[window] = torch.where(same, torch.where(up, low, high), after)
        return points.reshape(len(at), *self.shape)


class _Bumps(_Moves):
    """l_2: mass moved from window to window."""

    def first(self) -> Tensor:
        """Return the grid of tiles, (N, ...)."""
        a, b = max(1, self.h // TILES), max(1, self.w // TILES)
        down, across = self.h // a, self.w // b
        top, left = (self.h - a * down) // 2, (self.w - b * across) // 2
        delta = torch.zeros(len(self.ball.x), self.c, self.h, self.w, dtype=torch.float64, device=self.ball.x.device)
        signs = 2 * self.coins(down, across).double() - 1
        tiles = signs[:, :, :, None, :, None] * self._eta(a, b)[:, :, None, :, None]
        delta[:, :, top : top + a * down, left : left + b * across] = tiles.reshape(
            len(delta), self.c, a * down, b * across
        )
        everyone = torch.arange(len(delta), device=delta.device)
        return self._points(everyone, delta)

    def next(self, best: Tensor, at: Tensor, p: float) -> Tensor:
        """Return the best points of the examples at (n,) with the mass of one window moved into another, (n, ...)."""
        a, b = _odd(side(p, self.h, self.w), (self.h, self.w))
        eta = self._eta(a, b)[at]
        filled, emptied = (self.places(a, b, at) for _ in range(2))
        delta = self.pictures(best[at].double() - self.ball.x[at].double())
        eps = reach(self.ball)[at][:, None, None, None]
        free = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
        new, old = torch.where(self.coins(1, 1)[at], eta, -eta), delta[filled]
        u = new + old / (old.norm(dim=(2, 3), keepdim=True) + TINY)
        length = u.norm(dim=(2, 3), keepdim=True)
        u = torch.where(length > CANCELLED, u / length, new)
        touched = torch.zeros_like(delta)
        touched[filled], touched[emptied] = 1, 1
        mass = (delta * touched).square().sum((2, 3), keepdim=True)
        delta[emptied] = 0
        delta[filled] = u * (mass + free / self.c).sqrt()
        return self._points(at, delta)

    def _eta(self, a: int, b: int) -> Tensor:
        """Return the bumps for each example, (N, 1, a, b), those of square windows turned at random."""
        eta = bumps(a, b).to(self.ball.x.device)
        turned = torch.rand(len(self.ball.x), generator=self.noise).to(eta.device) > 0.5
        if a != b:
            return eta.expand(len(turned), 1, a, b)
        return torch.where(turned[:, None, None, None], eta.T, eta)

    def _points(self, at: Tensor, delta: Tensor) -> Tensor:
        """Return points (n, ...) in ball and range for changes (n, c, h, w) scaled to length eps."""
        ball = self.ball.take(at)
        length = reach(ball) / norms(delta, "l2").clamp(min=TINY)
        moved = ball.x.double() + (delta * length[:, None, None, None]).reshape(ball.x.shape)
        return ball.project(moved)


def _odd(window: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    """Return a window of odd sides of at least 3, as far as the picture allows."""
    a, b = (min(max(length, SMALLEST) // 2 * 2 + 1, limit) for length, limit in zip(window, most, strict=True))
    return a, b
