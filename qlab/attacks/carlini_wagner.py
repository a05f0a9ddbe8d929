r"""Carlini and Wagner's l2 attack: the nearest misclassified point, by Adam on distance plus weighted margin.

    minimise   ||x' - x||_2^2 / W^2  +  c h(x'),        h(x') = max( z_y - max_{i != y} z_i, -kappa )

    tanh     x' = low + (high - low) (1 + tanh v) / 2          v unbounded, started at (almost) x
    clamp    x' = clip(W v)                                    clipped after every step

W = max(high - low), so that a step length of Adam and a weight c mean the same in any units. For each example c is searched: where
a run finds a point, the upper end of its interval falls to c, else the lower end rises to c; the next c is the middle, or 10 c as
long as there is no upper end. Adam's averages begin anew in every run. Every tenth of a run, examples whose objective has not
fallen by 0.01% are left alone until the next.

Deviations. tanh is flat at the edge of the range, where pictures have their black background: an input there gets going so slowly
that the rule just given, as the authors' code has it, would leave it alone before it moves, and it would look robust. So an example
that was not broken yet in this run is left alone only if its objective has not fallen at all. And clamping, which has no flat
places, is the default here; the paper prefers tanh.

The step of Adam, lr W, is the resolution: examples that lie nearer to the boundary are broken, but their distance comes out coarse.
The margin follows the class of largest logit, which need not be the nearest: with many classes FAB often finds nearer points.

Source: Carlini, Wagner 2017, arXiv 1608.04644 (section 6.1); constants as in the authors' code.

Shapes: x (N, ...), c (n,), v (n, ...).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, Norm, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.estimators import BACKPROP, Estimator
from qlab.attacks.hyperplane import span
from qlab.attacks.losses import margin
from qlab.attacks.victim import Victim
from qlab.errors import InputError, UnknownNameError

__all__ = ["CarliniWagner"]

Box = Literal["tanh", "clamp"]
BOXES: tuple[Box, ...] = get_args(Box)

LARGEST = 1e10  # of c
INSIDE = 0.999999  # tanh never reaches the edge of the range
BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8  # Adam's


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Carlini and Wagner's l2 attack.

    Args:
        steps: of Adam in each run.
        searches: runs, each with another c.
        c: the first one.
        lr: Adam's step length, in units of v.
        kappa: confidence: only points misclassified by at least this margin of logits count.
        box: how points are kept in the range: "clamp" or "tanh", which needs a finite range.
        abort_early: leave an example alone for the rest of a run once it does not get better.
        estimator: where gradients come from.
    """

    steps: int = 1000
    searches: int = 9
    c: float = 1e-3
    lr: float = 0.01
    kappa: float = 0.0
    box: Box = "clamp"
    abort_early: bool = True
    estimator: Estimator = BACKPROP

    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    keep: ClassVar[Literal["worst", "nearest"]] = "nearest"
    needs_eps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.searches < 1:
            raise InputError(f"steps is {self.steps!r} and searches {self.searches!r}; expected at least 1 of each")
        if not self.c > 0 or not self.lr > 0 or not self.kappa >= 0:
            raise InputError(
                f"c is {self.c!r}, lr {self.lr!r} and kappa {self.kappa!r}; expected positive c and lr, and no negative kappa"
            )
        if self.box not in BOXES:
            raise UnknownNameError("box", self.box, BOXES)

    def prepare(self, victim: Victim, ball: Ball, y: Tensor) -> Any:
        """Raise where the range cannot be reached by a tanh."""
        if self.box == "tanh" and not bool((ball.high - ball.low).isfinite().all()):
            raise InputError("the range of inputs is unbounded, which a tanh cannot map to; give box='clamp'")

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Search c for all examples that were right to begin with."""
        everyone = ledger.active
        if not len(everyone):
            return
        taught = self.estimator.bind(victim)
        c = torch.full((len(everyone),), self.c, dtype=torch.float64, device=everyone.device)
        lower, upper = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for run in range(self.searches):
            found = torch.zeros_like(everyone, dtype=torch.bool)
            yield from self.run(taught, ledger, everyone, c, found, noise, run / self.searches)
            upper = torch.where(found, torch.minimum(upper, c), upper)
            lower = torch.where(found, lower, torch.maximum(lower, c))
            c = torch.where(upper.isinf(), 10 * c, (lower + upper) / 2).clamp(max=LARGEST)
            yield (run + 1) / self.searches

    def run(
        self,
        taught: Victim,
        ledger: Ledger,
        everyone: Tensor,
        c: Tensor,
        found: Tensor,
        noise: torch.Generator,
        share: float,
    ) -> Generator[float, None, None]:
        """Minimise with weights c (n,) for the examples of index `everyone` (n,); mark in `found` (n,) who was broken."""
        row = torch.arange(len(everyone), device=everyone.device)
        change = Change(ledger.ball, self.box)
        v = change.start(ledger.ball.x[everyone])
        first, second = torch.zeros_like(v), torch.zeros_like(v)
        before = torch.full_like(c, torch.inf)
        every = max(1, self.steps // 10)
        for t in range(self.steps):
            at = everyone[row]
            ball, y = ledger.ball.take(at), ledger.y[at]
            points = change.points(v)

            def h(z: Tensor, y: Tensor = y) -> Tensor:
                return -margin(z, y).clamp(max=self.kappa)

            z, value, g = self.estimator.gradient(taught, points, h, noise)
            delta = (points.double() - ball.x.double()) / change.width
            objective = norms(delta, "l2") ** 2 + c[row] * value.double()
            g = g.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            g = (2 * delta / change.width + _wide(c[row], g) * g) * change.slope(v)
            ledger.step(at, points, -objective, -g)
            # A point that is misclassified, but not by kappa, is neither a find nor a failure.
            m = margin(z, y)
            sure = m >= self.kappa
            says = sure | (m <= 0)
            wrong = torch.zeros_like(says)
            wrong[says] = ledger.see(at[says], points[says], z[says]) & sure[says]
            found[row] |= wrong
            if self.abort_early and t % every == 0:
                # Who has been broken must get better by this much to go on; who has not, at all.
                least = torch.where(found[row], 1e-4, 0.0) * before.abs().nan_to_num(posinf=0.0)
                going = objective < before - least
                row, v, first, second, g, before = (s[going] for s in (row, v, first, second, g, objective))
                if not len(row):
                    return
            first = BETA_1 * first + (1 - BETA_1) * g
            second = BETA_2 * second + (1 - BETA_2) * g**2
            step = first / (1 - BETA_1 ** (t + 1)) / ((second / (1 - BETA_2 ** (t + 1))).sqrt() + TINY)
            v = change.clip(v - self.lr * step)
            yield share + (t + 1) / self.steps / self.searches


class Change:
    """The change of variables: v (n, ...) in float64 to points in the dtype of x.

    Args:
        ball: for the range.
        box: "tanh" or "clamp".

    Attributes:
        width: W; 1 where the range is unbounded.
    """

    def __init__(self, ball: Ball, box: Box) -> None:
        self.ball, self.box = ball, box
        self.low, self.high = ball.low.double(), ball.high.double()
        self.width = span(ball)

    def start(self, x: Tensor) -> Tensor:
        """Return v of inputs x."""
        if self.box == "clamp":
            return x.double() / self.width
        return (INSIDE * (2 * (x.double() - self.low) / (self.high - self.low) - 1)).atanh()

    def points(self, v: Tensor) -> Tensor:
        """Return x' of v, in the range to the last bit."""
        wide = v * self.width if self.box == "clamp" else self.low + (self.high - self.low) * (1 + v.tanh()) / 2
        return self.ball.clip(wide.to(self.ball.x.dtype))

    def slope(self, v: Tensor) -> Tensor | float:
        """Return d x' / d v."""
        return self.width if self.box == "clamp" else (self.high - self.low) / 2 * (1 - v.tanh() ** 2)

    def clip(self, v: Tensor) -> Tensor:
        """Return v moved into the range."""
        if self.box == "tanh":
            return v
        return torch.minimum(torch.maximum(v, self.low / self.width), self.high / self.width)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
