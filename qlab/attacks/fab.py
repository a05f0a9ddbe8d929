r"""Fast adaptive boundary attack (FAB): the nearest misclassified point, by walking along the linearised decision boundary.

    f_s = z_s - z_y,  g_s = grad_x f_s                    at the current point x'
    s   = argmin_s |f_s| / ||g_s||_q                      the nearest of the linearised boundaries; q dual to p
    d_1 = proj(x') - x',   d_2 = proj(x) - x              nearest points of the plane w.u + b = 0 within the range,
                                                          w = g_s, b = f_s - w.x'; x the clean input
    alpha = min( a_1 / (a_1 + a_2), alpha_max ),          a_i = max(||d_i||_p, 1e-8)
    x'  <- clip( (1 - alpha) (x' + eta d_1) + alpha (x + eta d_2) )
    if x' is misclassified: book it, then  x' <- x + beta (x' - x)

Restarts begin at x + (1/2) min(eps, best distance) t / ||t||_p with random t. The targeted variant keeps s fixed and runs once for
each of the classes with the largest logits at x.

Only logits and their gradients are used, and the planes do not know how logits are scaled: a saturated softmax changes nothing.
All points that the net has answered for are booked, the one after the step back too. A noisy estimate of g_s is too long, so its
steps are too short: with NES or SPSA take many samples, and more steps.

Source: Croce, Hein 2020, arXiv 1907.02044; targeted variant and its use without the final line search as in AutoAttack, Croce, Hein
2020, arXiv 2003.01690.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.estimators import BACKPROP, Estimator
from qlab.attacks.hyperplane import nearest_plane, span, to_plane
from qlab.attacks.losses import nearest_classes
from qlab.attacks.victim import Victim
from qlab.errors import InputError

__all__ = ["FAB", "FABT"]

SMALL = 1e-8  # the least a_i: no division by zero on the boundary


@dataclass(frozen=True)
class FAB(Attack):
    """Fast adaptive boundary attack towards whichever class is nearest.

    With an eps, an example for which a run has found a point within it is left alone by the runs that follow (`early_stop`); its
    distance is then that of the first point near enough. Without one, all runs look for the nearest point.

    Args:
        steps: iterations of a run.
        restarts: runs; the first starts at x, the others near it.
        alpha_max: the largest pull towards x.
        eta: overshoot, at least 1: how far beyond the plane a step goes.
        beta: the step back towards x after a find, between 0 and 1.
        estimator: where gradients come from.
    """

    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    estimator: Estimator = BACKPROP

    keep: ClassVar[Literal["worst", "nearest"]] = "nearest"
    needs_eps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError(f"steps is {self.steps!r} and restarts {self.restarts!r}; expected at least 1 of each")
        if not 0 <= self.alpha_max <= 1 or not self.eta >= 1 or not 0 < self.beta < 1:
            raise InputError(
                f"alpha_max is {self.alpha_max!r}, eta {self.eta!r} and beta {self.beta!r}; expected alpha_max from 0 to 1, "
                "eta of at least 1, and beta between 0 and 1"
            )

    def pairs(self, ranked: Tensor) -> list[Tensor]:
        """Return the classes to go for in each run, (n, K) each, of all others in falling order of logits, (n, d - 1)."""
        return [ranked]

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Run all targets and restarts on the examples that were right to begin with, and are worth another run."""
        taught = self.estimator.bind(victim)
        everyone = ledger.active
        pairs = self.pairs(nearest_classes(ledger.z, ledger.y, ledger.classes - 1))
        done, runs = 0, len(pairs) * self.restarts
        for classes in pairs:
            for r in range(self.restarts):
                enough = ledger.broken & ledger.ball.eps.isfinite() & self.early_stop
                at = everyone[~enough[everyone]]
                if not len(at):
                    return
                ball, y, targets = ledger.ball.take(at), ledger.y[at], classes[at]
                points = ball.x
                if r:
                    points = _near(ledger.ball, ledger.distance, noise)[at]
                for t in range(self.steps):
                    z, f, w = nearest_plane(self.estimator, taught, ball, points, y, targets, noise)
                    ledger.step(at, points, f, w)
                    ledger.see(at, points, z)
                    points = self.step(ball, points, f, w)
                    _, wrong = ledger.ask(at, points)
                    points = torch.where(_wide(wrong, points), self.back(ball, points), points)
                    yield (done + (t + 1) / self.steps) / runs
                done += 1

    def step(self, ball: Ball, points: Tensor, f: Tensor, w: Tensor) -> Tensor:
        """Return the next points (n, ...): past the plane f + w.(u - x') = 0, pulled towards the clean input."""
        x, at = ball.x.double(), points.double()
        d = to_plane(
            torch.cat([at, x]),
            torch.cat([w, w]),
            torch.cat([f, f + (w.double() * (x - at)).flatten(1).sum(1)]),
            ball.norm,
            ball.low,
            ball.high,
        )
        a_1, a_2 = norms(d, ball.norm).clamp(min=SMALL).chunk(2)
        d_1, d_2 = d.chunk(2)
        alpha = _wide((a_1 / (a_1 + a_2)).clamp(max=self.alpha_max), x)
        out = (1 - alpha) * (at + self.eta * d_1) + alpha * (x + self.eta * d_2)
        return ball.clip(out.to(points.dtype))

    def back(self, ball: Ball, points: Tensor) -> Tensor:
        """Return points (n, ...) pulled towards the clean input."""
        x = ball.x.double()
        return ball.clip((x + self.beta * (points.double() - x)).to(points.dtype))


@dataclass(frozen=True)
class FABT(FAB):
    """Targeted FAB: one run for each of the classes nearest by logits.

    Args:
        targets: how many classes; all others where there are fewer.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise InputError(f"targets is {self.targets!r}; expected at least 1")

    def pairs(self, ranked: Tensor) -> list[Tensor]:
        """Return one class for each run, (n, 1) each."""
        return list(ranked[:, : self.targets].split(1, dim=1))


def _near(ball: Ball, best: Tensor, noise: torch.Generator) -> Tensor:
    """Return a random point at half of eps or of the best distance (N,), whichever is smaller; of the range without either."""
    draw = torch.randn if ball.norm != "linf" else torch.rand
    t = draw(ball.x.shape, generator=noise, dtype=torch.float64).to(ball.x.device)
    t = 2 * t - 1 if ball.norm == "linf" else t
    radius = torch.minimum(ball.eps, best)
    radius = torch.where(radius.isinf(), span(ball), radius)
    x = ball.x.double() + t * _wide(radius / 2 / norms(t, ball.norm), t)
    return ball.clip(x.to(ball.x.dtype))


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
