"""Quantized gradients: what a layer's output gets back in the backward pass, replaced on its way.

    forward:   y = layer(x)
    backward:  dL/dx and dL/dw of the layer are computed from Q(dL/dy) in place of dL/dy

`quantized_outputs` does so for one forward pass: it hangs an identity behind each layer, whose backward rule is Q, and takes it
off again. The net itself never carries it: copies, checkpoints, deployed nets and traces are those of the plain method, and so
are gradients that a tool takes of `method.net` outside of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlab.quantizers.apply import layers, quantized_tensors

__all__ = ["Rewrite", "quantized_outputs", "unit_noise"]

Rewrite = Callable[[str, Tensor], Tensor]
"""Q: the layer's name and dL/dy, (N, ...), to what takes its place, of the same shape."""


class _Backward(torch.autograd.Function):
    """The identity; its incoming gradient is rewritten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, name: str, rewrite: Rewrite) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Rewrite], output: Tensor) -> None:
        _, ctx.name, ctx.rewrite = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rewrite(ctx.name, g), None, None


@contextmanager
def quantized_outputs(net: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """Within it, the outputs of layers with quantized weights get `rewrite` of their gradients; leave it before `backward`.

    Only layers that are called have an output to rewrite: a layer whose weight alone is used, as that of the loop of
    `qlab.models.recurrent`, keeps its gradient.

    Args:
        net: a quantized net; layers left in float keep their gradients.
        rewrite: called once in the backward pass for each such layer.
    """
    names = {t.name for t in quantized_tensors(net)}
    hooks = [
        layer.register_forward_hook(lambda module, inputs, y, name=name: _Backward.apply(y, name, rewrite))
        for name, layer in layers(net).items()
        if name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unit_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws from U[0, 1) of the shape, dtype and device of `like`; the same on every device."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)
