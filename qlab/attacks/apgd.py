r"""Auto-PGD: projected gradient descent with momentum that finds its step length itself, one for each example.

    z       = P( x_k + eta dir(g_k) )                                      dir = sign for l_inf, g / ||g||_2 for l2
    x_{k+1} = P( x_k + alpha (z - x_k) + (1 - alpha) (x_k - x_{k-1}) )     alpha = 1 for the first step, then 0.75

eta starts at 2 eps. At a checkpoint w_j it is halved, and the walk goes on from its best point x_best and the gradient there, where

    (1)  #{ k in window j : L(x_{k+1}) > L(x_k) } <= rho |window j|        rho = 0.75: it mostly jumps to and fro, or
    (2)  eta was not halved at w_{j-1}, and L(x_best) did not grow since.

Windows have p_1 = 0.22 T, p_{j+1} = max(p_j - 0.03 T, 0.06 T) steps, each rounded down and at least 1.

For l1 the steps are sparse: the signs of the s largest entries of g, divided by s, without momentum. eta starts at eps, s at a
fifth of the coordinates. After every 0.04 T steps s becomes 2/3 of the number of coordinates in which x_best differs from x. Where
that number fell by over 5 %, eta starts again at eps and the walk goes on from x_best; elsewhere eta is divided by 1.5, down to
eps / 10.

`APGD` maximises a loss, `APGDT` a targeted one towards each of the nearest classes in turn. With `qlab.attacks.scaling` the logits
are multiplied by beta first.

Source: Croce, Hein 2020, arXiv 2003.01690; Croce, Hein 2021, arXiv 2103.01208 (l1); public code: fra31/auto-attack.

Deviations from that code. (a) In the first window it compares L(x_1) with a zero, and after a restart with the loss of the point
that was left; here L(x_k) is always the loss where the step began. (b) Condition (2) is asked at w_1 too, about w_0 = 0, as in the
paper. (c) beta is found at the start of each walk and kept: if it changed from step to step, losses could not be compared. (d) No
gradient is taken at the last point. (e) The l1 attack has one radius, not a falling row of three.

Shapes: n examples under attack, D = x.numel() / N; x (n, ...), losses and step lengths (n,).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, norms
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.estimators import BACKPROP, Estimator
from qlab.attacks.losses import Loss, fitting, nearest_classes, targeted_dlr, targeted_margin
from qlab.attacks.pgd import direction
from qlab.attacks.scaling import UNSCALED, Scaling
from qlab.attacks.victim import Victim
from qlab.errors import InputError, UnknownNameError

__all__ = ["APGD", "APGDT", "checkpoints"]

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (n, d), labels (n,) and a third number for each example (n,) - its target - to one loss each (n,)."""

RHO = 0.75  # share of steps that must raise the loss
ALPHA = 0.75  # share of the new step in a step; the rest is momentum
SPARSE, FALL, SHRINK, LEAST = (
    0.2,
    0.95,
    1.5,
    10.0,
)  # l1: first share of coordinates; what counts as fewer; divisors of s, eta; of eps


def checkpoints(steps: int) -> tuple[int, ...]:
    """Return the numbers of steps after which step lengths are looked at: w_1 < w_2 < ... <= T.

    For T = 100: 22, 41, 57, 70, 80, 87, 93, 99.
    """
    window, least, fall = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at, found = 0, []
    while at + window <= steps:
        at += window
        found.append(at)
        window = max(window - fall, least)
    return tuple(found)


@dataclass
class _Walk:
    """Where the examples under attack stand, one row each; `keep` drops rows everywhere."""

    at: Tensor
    """(n,) which examples they are."""
    y: Tensor
    target: Tensor
    beta: Tensor
    x: Tensor
    before: Tensor
    g: Tensor
    loss: Tensor
    x_best: Tensor
    g_best: Tensor
    loss_best: Tensor
    eta: Tensor
    rises: Tensor
    """Steps of this window that raised the loss."""
    loss_checked: Tensor
    """loss_best at the last checkpoint."""
    halved: Tensor
    """Whether eta was halved there."""
    support: Tensor
    """l1: number of coordinates of a step."""
    moved: Tensor
    """l1: coordinates in which x_best differed from the input at the last checkpoint."""

    def keep(self, rows: Tensor) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[rows])


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD with an untargeted loss.

    Args:
        steps: T.
        restarts: walks from different random points.
        loss: "ce", "dlr", "margin", or a function of logits and labels. DLR needs three classes; with two, the margin is taken.
        scaling: the rule for beta.
        estimator: where gradients come from; a mean over several passes for nets with noise (EOT).
    """

    steps: int = 100
    restarts: int = 1
    loss: str | Loss = "ce"
    scaling: Scaling = UNSCALED
    estimator: Estimator = BACKPROP

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError(f"steps is {self.steps!r} and restarts {self.restarts!r}; expected at least 1 of each")
        if isinstance(self.loss, str):
            fitting(self.loss, 10)

    def prepare(self, victim: Victim, ball: Ball, y: Tensor) -> Any:
        """Return what the scaling rule finds for the net as a whole."""
        return self.scaling.bind(self.estimator.bind(victim), ball.x, y)

    def goals(self, ledger: Ledger) -> list[tuple[Objective, Tensor]]:
        """Return what is maximised, one walk for each: a loss and the target of every example (N,)."""
        loss = fitting(self.loss, ledger.classes)
        return [(lambda z, y, t: loss(z, y), ledger.y)]

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Walk for each goal and restart on the examples that are still right."""
        taught = self.estimator.bind(victim)
        goals = self.goals(ledger)
        walks = len(goals) * self.restarts
        for i in range(walks):
            at = ledger.active
            if not len(at):
                return
            objective, target = goals[i // self.restarts]
            start = _start(ledger.ball, noise)[at]
            for share in self._walk(taught, ledger, noise, session, objective, at, target[at], start):
                yield (i + share) / walks

    def _walk(
        self,
        taught: Victim,
        ledger: Ledger,
        noise: torch.Generator,
        session: Any,
        objective: Objective,
        at: Tensor,
        target: Tensor,
        x: Tensor,
    ) -> Generator[float, None, None]:
        """Walk from points x (n, ...) of the examples `at` (n,) towards a larger objective."""

        def look(w: _Walk) -> tuple[Tensor, Tensor, Tensor]:
            def f(z: Tensor) -> Tensor:
                return objective(w.beta[:, None].to(z.dtype) * z, w.y, w.target)

            z, loss, g = self.estimator.gradient(taught, w.x, f, noise)
            ledger.step(w.at, w.x, loss, g)
            return z, loss, g

        started = self.scaling.start(session, taught, x, ledger.y[at])
        z, broken = ledger.ask(at, x)
        beta = self.scaling.factors(session, started, z, ledger.y[at])
        if self.early_stop:
            at, target, x, beta = at[~broken], target[~broken], x[~broken], beta[~broken]
        if not len(at):
            return
        ball = ledger.ball.take(at)
        sparse = ball.norm == "l1"
        nothing, D = torch.zeros_like(ball.eps), x[0].numel()
        w = _Walk(
            at, ledger.y[at], target, beta, x, x, x, nothing, x, x, nothing, (1 if sparse else 2) * ball.radius,
            rises=nothing, loss_checked=nothing, halved=nothing.bool(), support=nothing + SPARSE * D, moved=nothing + D,
        )  # fmt: skip
        _, w.loss, w.g = look(w)
        w.loss_best = w.loss_checked = w.loss
        w.g_best = w.g
        window = max(int(0.04 * self.steps), 1)
        checks = range(window, self.steps, window) if sparse else checkpoints(self.steps)
        for k in range(1, self.steps + 1):
            w.before, w.x = w.x, _step(w, ball, 1.0 if k == 1 else ALPHA)
            if k == self.steps:
                ledger.ask(w.at, w.x)
                ledger.step(w.at, w.x, torch.full_like(w.loss, torch.nan))
                return
            loss_before = w.loss
            z, w.loss, w.g = look(w)
            broken = ledger.see(w.at, w.x, z)
            w.rises = w.rises + (w.loss > loss_before)
            better = w.loss > w.loss_best
            w.x_best, w.g_best = _where(better, w.x, w.x_best), _where(better, w.g, w.g_best)
            w.loss_best = torch.where(better, w.loss, w.loss_best)
            if k in checks:
                _check_sparse(w, ball) if sparse else _check(w, k - max((c for c in checks if c < k), default=0))
            if self.early_stop and bool(broken.any()):
                w.keep(~broken)
                if not len(w.at):
                    return
                ball = ledger.ball.take(w.at)
            yield k / self.steps


@dataclass(frozen=True)
class APGDT(APGD):
    """Auto-PGD towards each of the nearest classes in turn.

    Args:
        loss: "dlr": the targeted DLR, which needs four classes, with fewer the margin z_t - z_y is taken; "margin": always that.
        targets: how many classes are tried, those of the largest logits at x first; all others where there are fewer.
    """

    loss: str | Loss = "dlr"
    targets: int = field(default=9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("dlr", "margin"):
            if isinstance(self.loss, str):
                raise UnknownNameError("targeted loss", self.loss, ("dlr", "margin"))
            raise InputError(
                'a targeted loss needs a target, so it can be no function of logits and labels: "dlr" or "margin"'
            )
        if self.targets < 1:
            raise InputError(f"targets is {self.targets!r}; expected at least 1")

    def goals(self, ledger: Ledger) -> list[tuple[Objective, Tensor]]:
        """Return the targeted loss with one target after the other, min(targets, d - 1) of them."""
        loss = targeted_dlr if self.loss == "dlr" and ledger.classes > 3 else targeted_margin
        return [(loss, t) for t in nearest_classes(ledger.z, ledger.y, self.targets).T]


def _start(ball: Ball, noise: torch.Generator) -> Tensor:
    """Return random points on the border of the ball, moved into the range, (N, ...)."""
    t = torch.randn(ball.x.shape, generator=noise, dtype=torch.float64)
    if ball.norm == "linf":
        t = 2 * torch.rand(ball.x.shape, generator=noise, dtype=torch.float64) - 1
    t = t.to(ball.x.device)
    return ball.project((ball.x.double() + _wide(ball.radius / norms(t, ball.norm), t) * t).to(ball.x.dtype))


def _step(w: _Walk, ball: Ball, alpha: float) -> Tensor:
    """Return x_{k+1} (n, ...)."""
    if ball.norm == "l1":
        return ball.project(w.x + (_wide(w.eta, w.x) * _sparse(w.g, w.support)).to(w.x.dtype))
    z = ball.project(w.x + (_wide(w.eta, w.x) * direction(w.g, ball.norm)).to(w.x.dtype))
    return ball.project(w.x + alpha * (z - w.x) + (1 - alpha) * (w.x - w.before))


def _sparse(g: Tensor, support: Tensor) -> Tensor:
    """Return the signs of the largest entries of gradients g (n, ...), divided by their number: lengths 1 in l1."""
    flat = g.flatten(1)
    rank = flat.abs().argsort(1, descending=True).argsort(1)
    signs = torch.where(rank < support.ceil().clamp(1, flat.shape[1])[:, None], flat.sign(), 0.0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).reshape(g.shape)


def _check(w: _Walk, window: int) -> None:
    """Halve eta and go back to the best point where conditions (1) or (2) say so."""
    halve = (w.rises <= RHO * window) | (~w.halved & (w.loss_best <= w.loss_checked))
    w.eta = torch.where(halve, w.eta / 2, w.eta)
    w.loss_checked, w.halved, w.rises = w.loss_best, halve, torch.zeros_like(w.rises)
    _go_back(w, halve)


def _check_sparse(w: _Walk, ball: Ball) -> None:
    """Set the number of coordinates of a step from x_best; begin again with long steps where it fell."""
    moved = (w.x_best != ball.x).flatten(1).sum(1).double()
    fell = moved / w.moved < FALL
    w.support, w.moved = moved / SHRINK, moved.clamp(min=1)
    w.eta = torch.where(fell, ball.radius, torch.maximum(w.eta / SHRINK, ball.radius / LEAST))
    _go_back(w, fell)


def _go_back(w: _Walk, rows: Tensor) -> None:
    w.x, w.g = _where(rows, w.x_best, w.x), _where(rows, w.g_best, w.g)
    w.loss = torch.where(rows, w.loss_best, w.loss)


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return the rows of one where `rows` (n,), of the other elsewhere."""
    return torch.where(_wide(rows, one), one, other)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, ...), to be broadcast against (n, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
