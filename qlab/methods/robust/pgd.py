r"""Adversarial training by projected gradient ascent.

    min_w  E  max_{x' in B(x)} loss(f_w(x'), y)

    x'_0     = P(x + u),  u ~ U(-eps, eps)
    x'_{t+1} = P(x'_t + eta sign(grad_x' loss))          T steps
    step on    objective(x'_T, y)                        the method's own, at x'_T alone

Danskin's theorem: where x'_T is a maximiser, the gradient there is one of the outer problem.

Batch norm of the inner attack is in train mode, as in the authors' code: it works by the statistics of the batch as it is moved.
The statistics that a net remembers come from the x'_T alone; those of the deployed net are re-estimated on clean inputs, as
for every method.

Source: Madry, Makelov, Schmidt, Tsipras, Vladu, Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018,
arXiv 1706.06083. CIFAR-10: eps 8/255, T = 7, eta = eps / 4; MNIST: eps 0.3, T = 40, eta 0.01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.methods.robust.base import RobustTraining, Statistics, ascend, aside

if TYPE_CHECKING:
    from qlab.methods.base import Method

__all__ = ["PGDTraining"]


@dataclass(frozen=True, kw_only=True)
class PGDTraining(RobustTraining):
    """Adversarial training by projected gradient ascent.

    Args:
        steps: T of the inner attack.
        eta: length of a step, in the units of the data set; None is eps / 4.
        random_start: start at a random point of the ball, not at x.
        batch_norm: by which statistics batch norm works in the inner attack: of the "batch", or the "running" ones.

    Raises:
        InputError: for a setting out of range.
    """

    steps: int = 7
    eta: float | None = None
    random_start: bool = True
    batch_norm: Statistics = "batch"

    name: ClassVar[str] = "pgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps")
        if self.eta is not None:
            self._check("eta", 0, math.inf)
        if not isinstance(self.random_start, bool):
            raise InputError(f"random_start of {self.name} must be True or False, not {self.random_start!r}")
        if self.batch_norm not in get_args(Statistics):
            raise InputError(f"batch_norm of {self.name} must be 'batch' or 'running', not {self.batch_norm!r}")

    @property
    def length(self) -> float:
        """eta."""
        return self.eps / 4 if self.eta is None else self.eta

    def adversarial(self, method: Method, x: Tensor, y: Tensor) -> Tensor:
        """Return x'_T, (N, ...)."""
        units = method.units.to(x)
        box = units.box(x, self.eps)
        points = x
        if self.random_start:
            u = 2 * torch.rand(x.shape, generator=self.noise(method), dtype=x.dtype).to(x.device) - 1
            points = torch.clamp(x + self.eps / units.std * u, *box)

        def loss(at: Tensor) -> Tensor:
            return len(y) * method.loss(method.net(at), y)

        with aside(method.net, self.batch_norm):
            return ascend(points, loss, self.steps, self.length / units.std, box)

    def objective(self, method: Method, x: Tensor, y: Tensor) -> Tensor:
        """Return the method's objective at x'_T."""
        return method.objective(self.adversarial(method, x, y), y)
