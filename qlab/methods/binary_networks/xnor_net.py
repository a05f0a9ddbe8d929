r"""XNOR-Net: signs of weights and inputs, with scales that keep the products of the float net.

    weights:  W ~ a B,   B = sign(W),  a = mean |W| of each filter              (as in BWN)
    inputs:   I ~ A H,   H = sign(I),  A = mean over channels of |I|            one number at each position
    product:  I * W ~ (H * B) . K a,   K = A * (box filter of the kernel's size, weight 1 / k^2)

A at a position is the scale of least squared error for the channels there, as a is for a filter. Later implementations,
the authors' own among them, leave out K: that is the default, and the net's inner products are then of signs alone.

Here a scale stands in front of the layer, as part of the activation: it gives A H. What that computes:

    "none"    H                          products of signs
    "mean"    A averaged over the image  one number for each sample: it commutes with every layer without a bias, so this is
                                         (H * B) . K a with K replaced by its mean over the image, exactly
    "map"     A H                        equals (H * B) . K a exactly where A is constant within the kernel's window: for
                                         every Linear layer and 1x1 convolution. For larger kernels A stands under the sum
                                         and not in front of it: sum_r A(p + r) H(p + r) B(r) for K(p) sum_r H(p + r) B(r);
                                         the difference is sum_r (A(p + r) - K(p)) H(p + r) B(r).

"map" is the nearer of the two to I * W before the sum, but its inner products are no longer of signs, so that such a net
cannot be packed. Nets with K in front of the sum need a layer of their own and are not offered.

    backward: straight-through, clipped to |x| <= 1; A counts as a constant.

Source: Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net, ECCV 2016, arXiv 1603.05279, sections 3.1 and 3.2.
Deviations: where the scale of the inputs stands, as said. Blocks are those of the net at hand: the paper's order is batch
norm, sign, convolution, pooling. First and last layers stay in float, as in the paper.

Shapes: I (N, C, H, W) with A (N, 1, H, W), or I (N, D) with A (N, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_weights.bwn import Gradient, ScaledSign
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, Sign, hard_sign, quantized_tensors, surrogate
from qlab.quantizers.declared import Declared

__all__ = ["InputSign", "XNORNet", "input_scale"]

InputScale = Literal["none", "mean", "map"]


def input_scale(x: Tensor, which: Literal["mean", "map"]) -> Tensor:
    """Return A, the mean of |x| over channels at each position; for "mean" over the positions too.

    Args:
        x: (N, C, ...) or (N, D).
        which: "map", (N, 1, ...), or "mean", (N, 1, 1, ...).
    """
    dims = (1,) if which == "map" else tuple(range(1, x.dim()))
    return x.abs().mean(dims, keepdim=True)


class InputSign(Quantizer):
    """sign(x) times the scale of its sample ("mean") or position ("map").

    Args:
        which: "mean" or "map".
    """

    bits = 1
    elementwise = False

    def __init__(self, which: Literal["mean", "map"] = "map") -> None:
        super().__init__()
        self.which = which
        self.slope = surrogate("clipped").derivative

    def forward(self, latent: Tensor) -> Tensor:
        """Return A sign(x); the gradient passes where |x| <= 1, times A."""
        x = latent.detach()
        a = input_scale(x, self.which)
        return Declared.apply(latent, a * hard_sign(x), a * self.slope(x))

    def hard(self, latent: Tensor) -> Tensor:
        """Return A sign(x)."""
        return self.scale(latent) * self.level(latent)

    def scale(self, latent: Tensor) -> Tensor:
        """Return A, not below the smallest normal number, which is all that `hard` and `forward` differ in."""
        return input_scale(latent, self.which).clamp(min=torch.finfo(latent.dtype).tiny)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(x)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def extra_repr(self) -> str:
        """Name the scale."""
        return self.which


class XNORNet(Method):
    """XNOR-Net: binary weights and activations, scales of filters and, where wanted, of inputs.

    Args:
        net: a plain net or the spec of one.
        gradient: of the weights: "larq", "detached", "paper" or "full"; see `qlab.methods.binary_weights.bwn`.
        input_scale: "none", "mean" or "map".
        clamp: clip latent weights to [-1, 1] after every step.
        keep: layers left in float; the paper's first and last.

    Raises:
        InputError: for a gradient or scale that there is none of.
    """

    info = CATALOG["xnor_net"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        gradient: Gradient = "larq",
        input_scale: InputScale = "none",
        clamp: bool = True,
        keep: Sequence[str] = ("first", "last"),
        **kwargs: Any,
    ) -> None:
        if input_scale not in ("none", "mean", "map"):
            raise InputError(f"input_scale must be 'none', 'mean' or 'map', not {input_scale!r}")
        super().__init__(net, keep=keep, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the scaled sign of one weight."""
        return ScaledSign(self.h.gradient)

    def activation_quantizer(self) -> Quantizer:
        """Return the sign of an input, with its scale where one is wanted."""
        return Sign("clipped") if self.h.input_scale == "none" else InputSign(self.h.input_scale)

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)
