r"""BWN (binary-weight network): each filter is its signs times one scale, the pair that is closest to it.

    min over a > 0, B in {-1, +1}^n of |W - a B|^2:     B = sign(W),   a = |W|_1 / n
    residual:                                           |W|^2 - n a^2

    forward:   w = a sign(theta)                        one a for each output filter, sign(0) = +1
    backward:  d = 1[|theta| <= 1] the clipped straight-through slope, n the size of a filter

    "larq"       g_theta = a d g                        a counts as a constant
    "detached"   g_theta = d g                          the code of Bi-Real Net: a does not multiply the gradient
    "paper"      g_theta = (1/n + a d) g
    "full"       g_theta = a d g + sign(theta) mean(g sign(theta))      the chain rule through a, and d for sign

"paper" keeps of the chain rule through a only the term of the weight itself: "full" is what it comes from.

Source: Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net, ECCV 2016, arXiv 1603.05279; the gradients of plumerai's larq
(magnitude_aware_sign) and of liuzechun/Bi-Real-net (HardBinaryConv); the paper's is recalled, not confirmed.
Deviations: the authors' code also subtracts the mean of each filter. Their first and last layers stay in float; here that
is `keep=("first", "last")`.

Shapes: theta (O, I, ...), a (O, 1, ...), n = I times the size of the kernel; a bias (O,) is one filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors, surrogate
from qlab.quantizers.base import PseudoDerivative, Rule
from qlab.quantizers.declared import Declared
from qlab.quantizers.filters import filter_scale

__all__ = ["BWN", "Gradient", "ScaledSign"]

Gradient = Literal["larq", "detached", "paper", "full"]


class ScaledSign(Quantizer):
    """a sign(theta), a for each filter.

    Args:
        gradient: "larq", "detached", "paper" or "full"; see the module docstring.

    Raises:
        InputError: for a gradient that there is none of.
    """

    bits = 1
    elementwise = False

    def __init__(self, gradient: Gradient = "larq") -> None:
        super().__init__()
        if gradient not in get_args(Gradient):
            raise InputError(f"gradient must be one of {', '.join(get_args(Gradient))}, not {gradient!r}")
        self.gradient = gradient
        self.slope: Rule = surrogate("clipped").derivative

    def forward(self, latent: Tensor) -> Tensor:
        """Return a sign(theta)."""
        a = filter_scale(latent)
        if self.gradient in ("larq", "full"):
            sign = PseudoDerivative.apply(latent, hard_sign, self.slope)
            return (a if self.gradient == "full" else a.detach()) * sign
        theta, a = latent.detach(), a.detach()
        d = self.slope(theta)
        if self.gradient == "paper":
            d = a * d + a.numel() / theta.numel()  # 1 / n
        return Declared.apply(latent, a * hard_sign(theta), d)

    def scale(self, latent: Tensor) -> Tensor | None:
        """Return a."""
        return filter_scale(latent)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)

    def hard(self, latent: Tensor) -> Tensor:
        """Return a sign(theta)."""
        return filter_scale(latent) * hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def extra_repr(self) -> str:
        """Name the gradient."""
        return f"gradient={self.gradient}"


class BWN(Method):
    """Binary-weight network: signs with one scale for each filter.

    Args:
        net: a plain net or the spec of one.
        gradient: "larq", "detached", "paper" or "full".
        clamp: clip latent weights to [-1, 1] after every step: beyond it the slope is zero.

    Raises:
        InputError: for a gradient that there is none of.
    """

    info = CATALOG["bwn"]

    def __init__(
        self, net: nn.Module | Mapping[str, Any], *, gradient: Gradient = "larq", clamp: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(net, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the scaled sign of one weight."""
        return ScaledSign(self.h.gradient)

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)
