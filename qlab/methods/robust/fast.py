r"""Fast adversarial training: a single large step from a random start.

    x'_0 = P(x + u),  u ~ U(-eps, eps)
    x'   = P(x'_0 + 1.25 eps sign(grad_x' loss))
    step on  objective(x', y)

It is `pgd` with T = 1 and eta = 1.25 eps. The random start is what makes it work: without it, or with a much longer step, training
collapses at some moment ("catastrophic overfitting"): one step finds nothing any more while PGD breaks everything, so look at the
accuracy under PGD along the run.

Batch norm of the inner step is in train mode, as in the authors' code, which also lets it move the running statistics; here
it does not.

Source: Wong, Rice, Kolter, Fast is better than free: Revisiting adversarial training, ICLR 2020, arXiv 2001.03994.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qlab.methods.robust.pgd import PGDTraining

__all__ = ["FastTraining"]


@dataclass(frozen=True, kw_only=True)
class FastTraining(PGDTraining):
    """Fast adversarial training.

    Args:
        steps: T of the inner attack; the paper's 1.
        eta: length of a step, in the units of the data set; None is 1.25 eps.

    Raises:
        InputError: for a setting out of range.
    """

    steps: int = 1

    name: ClassVar[str] = "fast"

    @property
    def length(self) -> float:
        """eta."""
        return 1.25 * self.eps if self.eta is None else self.eta
