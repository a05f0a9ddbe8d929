"""A value forward and a slope backward, both given as tensors: for rules that need more than the latent weight alone.

    forward:   w  (any tensor, computed outside of autograd)
    backward:  dL/dlatent = slope * dL/dw

`PseudoDerivative` takes functions of the latent weight; here scheduled quantities, noise and scales may take part too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Declared"]


class Declared(torch.autograd.Function):
    """`Declared.apply(latent, value, slope)`: `value` forward, `slope` times the incoming gradient to `latent` backward.

    `value` has the shape of `latent`; `slope` is broadcast against it. Neither receives a gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(latent: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """Return the value, as a tensor of its own."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the slope."""
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """Return slope g."""
        (slope,) = ctx.saved_tensors
        return g * slope, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """Return slope times the tangent: forward mode sees the same rule."""
        (slope,) = ctx.saved_tensors
        return tangent * slope
