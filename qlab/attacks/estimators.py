r"""Where an attack's gradients come from.

    Estimator.gradient(victim, x, f) -> v (n,), g (n, ...)          v = f(net(x)),  g ~ d v_n / d x_n

f maps logits (n, d) to one number for each example (n,): a loss, a difference of logits. The plain estimator is back-propagation
as the net defines it: exact for float nets and for nets whose weights alone are quantized, the surrogate's gradient where
activations are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlab.errors import InputError

if TYPE_CHECKING:
    from qlab.attacks.victim import Victim

__all__ = ["BACKPROP", "Backprop", "Estimator", "Value"]

Value = Callable[[Tensor], Tensor]
"""Logits (n, d) to one number for each example (n,), differentiable; it may be called several times with the same n."""


class Estimator(ABC):
    """A way to a gradient; see the module docstring."""

    def bind(self, victim: Victim) -> Victim:
        """Return the victim whose gradients are taken: the net itself, or a copy with other backward rules."""
        return victim

    @abstractmethod
    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, d), v = f(logits) (n,) and its gradient (n, ...), all detached.

        Args:
            victim: what `bind` returned.
            x: (n, ...) points.
            f: what is differentiated.
            generator: of this step's noise, if it needs any.
        """


@dataclass(frozen=True)
class Backprop(Estimator):
    """The gradient that back-propagation gives, summed over examples: no mean that would scale it down into underflow."""

    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, values and gradients of one forward and one backward pass."""
        x = x.detach().requires_grad_()
        z = victim.differentiable(x)
        v = f(z)
        if not v.requires_grad:
            raise InputError(
                "no gradient reaches the inputs: an operation in this net is not differentiable (a packed net has no gradient at "
                "all). Attack the torch net it was made from, or take an attack without gradients: Square, Boundary, RandomSearch"
            )
        (g,) = torch.autograd.grad(v.sum(), x)
        return z.detach(), v.detach(), g


BACKPROP = Backprop()
