r"""The fast gradient sign method, once and repeated: settings of projected gradient descent.

    FGSM    x' = P( x + eps dir(grad_x L) )                 one step of the whole radius from x itself
    BIM     x_{t+1} = P( x_t + eta dir(grad_x L) )          T steps from x itself, eta = eps / T

With `random_start` the one step of FGSM starts at a random point of the ball and is projected back into it; with a scaling rule of
`qlab.attacks.scaling` as well, this is FGSM++ as published. Directions, losses and projections are those of `PGD`. One step is a
weak attack and a good witness: a net that one step breaks more often than many steps do hides its gradients.

Source: Goodfellow, Shlens, Szegedy 2015, arXiv 1412.6572 (FGSM); Kurakin, Goodfellow, Bengio 2017, arXiv 1607.02533 (BIM; there the
step is one grey level); Gupta, Ajanthan 2022, arXiv 2003.13511 (FGSM++).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from qlab.attacks.ball import Ball
from qlab.attacks.pgd import PGD

__all__ = ["BIM", "FGSM"]


@dataclass(frozen=True)
class FGSM(PGD):
    """One gradient step of length eps: PGD(steps=1, eta=eps, random_start=False).

    Args:
        restarts: steps from different start points.
        random_start: start at a random point of the ball, as FGSM++ does; the first step starts at x itself otherwise.
        loss, scaling, estimator: as for `PGD`.
    """

    steps: int = field(default=1, init=False)
    eta: float | None = field(default=None, init=False)
    random_start: bool = False

    def length(self, ball: Ball) -> Tensor:
        """Return eps for each example, (n,) float64."""
        return ball.radius


@dataclass(frozen=True)
class BIM(PGD):
    """The basic iterative method, or iterative FGSM: PGD(eta=eps / steps, random_start=False).

    Args:
        steps: T.
        eta: length of a step; eps / T by default, so that the last step just reaches the edge of the ball.
        random_start, restarts, loss, scaling, estimator: as for `PGD`.
    """

    steps: int = 10
    random_start: bool = False

    def length(self, ball: Ball) -> Tensor:
        """Return eta for each example, (n,) float64."""
        return super().length(ball) if self.eta is not None else ball.radius / self.steps
