"""What every quantizer promises, and the one autograd Function most of them need.

A quantizer is a forward map together with its backward rule. The backward rule of a piecewise-constant map is not its
derivative (which is zero) but a declared pseudo-derivative d(x):

    forward:   x_q = q(x)
    backward:  dL/dx = dL/dx_q * d(x)

It is written as an autograd Function rather than as `x + (q(x) - x).detach()`: the sum rounds, and values that a uniform
quantizer clips land off its grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PseudoDerivative", "Quantizer", "Rule"]

Rule = Callable[[Tensor], Tensor]
"""An elementwise map of a tensor to one of the same shape."""


class PseudoDerivative(torch.autograd.Function):
    """`PseudoDerivative.apply(x, q, d)`: q(x) forward, d(x) times the incoming gradient backward.

    Both maps are elementwise and capture no tensors, so that every torch.func transform goes through; d is
    differentiated in its turn for second derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Rule, d: Rule) -> Tensor:
        """Return q(x)."""
        return q(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Rule, Rule], output: Tensor) -> None:
        """Keep the latent tensor and its pseudo-derivative."""
        x, _, ctx.d = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """Return g d(x)."""
        (x,) = ctx.saved_tensors
        return g * ctx.d(x), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """Return d(x) times the tangent: forward mode sees the same rule."""
        (x,) = ctx.saved_tensors
        return tangent * ctx.d(x)


class Quantizer(nn.Module, ABC):
    """A forward map with its own backward rule. `forward` keeps shape and dtype.

    Attributes:
        bits: bits of a deployed value; 32 is float.
        elementwise: whether each value is quantized by itself. False where a mean, a deviation or a scale of the whole tensor
            takes part: then there are no thresholds that hold for every value.
        stochastic: whether training draws what `forward` returns at random, by the noise of `resample`.
    """

    bits: int = 32
    elementwise: bool = True
    stochastic: bool = False

    @abstractmethod
    def forward(self, latent: Tensor) -> Tensor:
        """Return the tensor that the training-time net computes with."""

    def hard(self, latent: Tensor) -> Tensor:
        """Return the tensor that is deployed: on `levels()` exactly. The forward map itself, unless the method anneals."""
        return self.forward(latent)

    def scale(self, latent: Tensor) -> Tensor | None:
        """Return the positive float factor of the levels, broadcast against `latent`; None where it is 1.

        `hard(latent)` equals `scale(latent) * level(latent)` exactly: a deployed value costs `bits`, its scale one float for
        each channel or layer.
        """
        return None

    def level(self, latent: Tensor) -> Tensor:
        """Return which of `levels()` each value is deployed at; of a quantizer with a `scale`, to be overridden."""
        return self.hard(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Return the grid that `level` lands on for tensors of `dtype`, exactly, ascending, shape (L,); None for float."""
        return None

    def primitive(self) -> Rule | None:
        """Return the function F whose derivative is the backward rule, F' = d, elementwise; None where there is none known."""
        return None

    def anneal(self, **quantities: float) -> None:
        """Set the scheduled quantities this quantizer has a buffer for; it has no use for the others."""
        for name, value in quantities.items():
            if name in self._buffers:
                self.get_buffer(name).fill_(value)

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latent tensor that training starts from, of the shape of `latent`; the net's own by default.

        An activation has no latent tensor: its quantizer gets an empty one.
        """
        return latent

    def resample(self, generator: torch.Generator) -> None:
        """Draw this step's noise, for quantizers that have any."""

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` as its own latent tensor: what `torch.nn.utils.parametrize` asks for on assignment."""
        return value
