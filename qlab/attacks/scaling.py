r"""Temperature scaling: attack beta f(x) instead of f(x), where beta > 0 wakes a saturated softmax up.

    d l(beta) / dx = beta J^T (p(beta) - e_y),     p(beta) = softmax(beta z)

The decision of the net is the same for every beta; the attacker's loss is not. beta is a constant for the backward pass.

Source: Gupta, Ajanthan, AAAI 2022, arXiv 2003.13511.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qlab.attacks.victim import Victim

__all__ = ["UNSCALED", "Fixed", "Scaling", "Unscaled"]


class Scaling(ABC):
    """A rule for beta: `bind` once for a net, `start` once for each start point, `factors` at every step."""

    def bind(self, victim: Victim, x: Tensor, y: Tensor) -> Any:
        """Return what is found once for a net on clean inputs x (N, ...), y (N,)."""
        return None

    def start(self, bound: Any, victim: Victim, x1: Tensor, y: Tensor) -> Tensor | None:
        """Return what is found once for each start point x1 (n, ...): one number each (n,), or None."""
        return None

    @abstractmethod
    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return beta (n,) for logits z (n, d) without a graph."""


@dataclass(frozen=True)
class Unscaled(Scaling):
    """beta = 1: the attack as its paper has it."""

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return ones (n,)."""
        return torch.ones(len(z), dtype=z.dtype, device=z.device)


UNSCALED = Unscaled()


@dataclass(frozen=True)
class Fixed(Scaling):
    """One beta for all.

    Args:
        beta: the factor, positive.
    """

    beta: float

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return beta, (n,)."""
        return torch.full((len(z),), self.beta, dtype=z.dtype, device=z.device)
