r"""Projected gradient descent, with restarts, losses, temperatures and gradient estimators to choose.

    x_1     = a random point of the ball (or x)
    L       = sum_i loss(beta_i f(x_t)_i, y_i)            a sum: a mean would scale gradients down, into underflow
    x_{t+1} = P( x_t + eta dir(grad_x L) )                dir = sign for l_inf, g / ||g||_2 for l2, sparse sign for l1

A step for l1 moves one in a hundred coordinates, those of the largest gradient among those that the range lets move; coordinates
that the gradient holds at the end of the range with no less force stay there, whatever the projection shrinks.

The best point of all iterates and restarts is kept for each example, not the last one. With a `scaling` rule of
`qlab.attacks.scaling` this is PGD++.

Source: Madry et al. 2018, arXiv 1706.06083; Gupta, Ajanthan 2022, arXiv 2003.13511 (PGD++); Tramer, Boneh 2019, arXiv 1904.13000
(sparse l1 steps).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, Norm
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.estimators import BACKPROP, Estimator
from qlab.attacks.losses import Loss, fitting
from qlab.attacks.scaling import UNSCALED, Scaling, scaled
from qlab.attacks.victim import Victim
from qlab.errors import InputError

__all__ = ["PGD", "direction"]

SPARSE = 0.01  # share of coordinates that an l1 step moves


def direction(g: Tensor, norm: Norm) -> Tensor:
    """Return the step of length 1 along gradients g (n, ...): the steepest one for l_inf and l2, a sparse one for l1.

    A gradient that is exactly zero gives no step; one that is merely tiny gives a whole one.
    """
    if norm == "linf":
        return g.sign()
    flat = g.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    flat = torch.where(largest > 0, flat / largest, torch.zeros_like(flat))  # a norm of tiny numbers would underflow
    if norm == "l2":
        return (flat / flat.norm(dim=1, keepdim=True).clamp(min=1)).reshape(
            g.shape
        )  # its largest entry is 1, or all are 0
    count = max(1, round(SPARSE * flat.shape[1]))
    top = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / count).reshape(g.shape)


def _sparse(points: Tensor, g: Tensor, ball: Ball) -> Tensor:
    """Return the step for l1 at points (n, ...) along gradients g (n, ...); see the module docstring."""
    held = ((g > 0) & (points >= ball.high)) | ((g < 0) & (points <= ball.low))
    step = direction(torch.where(held, 0.0, g), "l1")
    least = torch.where(step != 0, g.abs(), torch.inf).flatten(1).amin(1)
    return torch.where(held & (g.abs() >= least.reshape(-1, *(1,) * (g.dim() - 1))), g.sign(), step)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent.

    Args:
        steps: T.
        eta: length of a step, in the units of x; eps / 4 for l_inf and 2.5 eps / T else by default.
        restarts: runs from different start points.
        random_start: start at a random point of the ball; the first run starts at x itself otherwise.
        loss: a name of `losses.LOSSES`, or a function of logits and labels.
        scaling: the rule for beta.
        estimator: where gradients come from.
    """

    steps: int = 20
    eta: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str | Loss = "ce"
    scaling: Scaling = UNSCALED
    estimator: Estimator = BACKPROP

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError(f"steps is {self.steps!r} and restarts {self.restarts!r}; expected at least 1 of each")
        if self.eta is not None and not self.eta > 0:
            raise InputError(f"eta is {self.eta!r}; expected a positive step length")

    def prepare(self, victim: Victim, ball: Ball, y: Tensor) -> Any:
        """Return what the scaling rule finds for the net as a whole."""
        return self.scaling.bind(self.estimator.bind(victim), ball.x, y)

    def length(self, ball: Ball) -> Tensor:
        """Return eta for each example of a ball, (n,) float64."""
        if self.eta is not None:
            return torch.full_like(ball.eps, self.eta)
        return ball.radius / 4 if ball.norm == "linf" else 2.5 * ball.radius / self.steps

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Run all restarts on the examples that are still right."""
        taught = self.estimator.bind(victim)
        loss = fitting(self.loss, ledger.classes)
        for r in range(self.restarts):
            at = ledger.active
            if not len(at):
                return
            start = ledger.ball.random(noise)[at] if self.random_start or r else ledger.ball.x[at].clone()
            started = self.scaling.start(session, taught, start, ledger.y[at])
            points, y, ball = start, ledger.y[at], ledger.ball.take(at)
            for t in range(self.steps):
                f = scaled(loss, self.scaling, session, started, y)
                z, value, g = self.estimator.gradient(taught, points, f, noise)
                ledger.step(at, points, value, g)
                broken = ledger.see(at, points, z)
                if self.early_stop and bool(broken.any()):
                    at, points, g = at[~broken], points[~broken], g[~broken]
                    started = None if started is None else started[~broken]
                    y, ball = ledger.y[at], ledger.ball.take(at)
                if not len(at):
                    break
                eta = self.length(ball).reshape(-1, *(1,) * (points.dim() - 1))
                way = _sparse(points, g, ball) if ball.norm == "l1" else direction(g, ball.norm)
                points = ball.project(points + (eta * way).to(points.dtype))
                yield (r + t / self.steps) / self.restarts
            if len(at):
                ledger.ask(at, points)
                ledger.step(at, points, torch.full((len(at),), math.nan))
            yield (r + 1) / self.restarts
