r"""DoReFa-Net: weights, activations and gradients of k bits, each with its own bounded map to [0, 1].

    quantize_k(r) = round((2^k - 1) r) / (2^k - 1),   r in [0, 1]               gradient: identity

    weights, k = 1:   w = E|theta| sign(theta)                                   E over the layer; gradient: identity
    weights, k > 1:   r = tanh(theta) / (2 max|tanh(theta)|) + 1/2
                      w = 2 quantize_k(r) - 1                                    the maximum is a constant in the gradient
    activations:      a = quantize_k(clip(x, 0, 1))                              gradient 1 on [0, 1]
    gradients:        g_q = 2m (quantize_k(g / (2m) + 1/2 + noise) - 1/2)        m = max|g| of each sample,
                      noise ~ U(-1/2, 1/2) / (2^k - 1)

So dw/dtheta = (1 - tanh^2(theta)) / max|tanh(theta)|. The weights have 2^k levels (2j - n)/n, n = 2^k - 1: an even number, none
at zero. The noise makes the rounding of gradients stochastic and unbiased; a gradient of zero lies between two levels and is
drawn to +-m/n. Gradients are quantized at the output of every layer with quantized weights, in training steps only.

Source: Zhou, Wu, Ni, Zhou, Wen, Zou, DoReFa-Net, arXiv 1606.06160; the constant maximum as in plumerai's larq.
Deviations: (2^k - 1) r + noise + rounding is written as floor((2^k - 1) r + u), u ~ U[0, 1): the same distribution, and r = 1
stays in range. The paper's best-known setting is 1, 2 and 6 bits; the defaults here are 2 and 2 bits with float gradients.

Shapes: theta, w those of the weight; g (N, ...), m (N, 1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, Uniform, hard_sign
from qlab.quantizers.declared import Declared
from qlab.quantizers.gradients import quantized_outputs, unit_noise

__all__ = ["DoReFa", "DoReFaWeight", "LayerSign", "quantize_gradient", "quantize_k"]


def quantize_k(r: Tensor, k: int) -> Tensor:
    """Return the multiple of 1 / (2^k - 1) nearest to r in [0, 1], ties to even."""
    n = 2**k - 1
    return (r * n).round() / n


def quantize_gradient(g: Tensor, k: int, u: Tensor) -> Tensor:
    """Return g rounded at random to 2^k levels between -m and m, without bias.

    Args:
        g: gradients (N, ...).
        k: bits.
        u: draws from U[0, 1), of the shape of g.

    Returns:
        2m (floor(n (g / (2m) + 1/2) + u) / n - 1/2), n = 2^k - 1, m = max|g| of each sample; zeros for a sample of zeros.
    """
    n = 2**k - 1
    m = g.abs().amax(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g.abs()
    r = g / torch.where(m > 0, 2 * m, torch.ones_like(m)) + 0.5
    return 2 * m * ((n * r + u).floor().clamp(max=n) / n - 0.5)


def _most(t: Tensor) -> Tensor:
    """Return max|t|, at least the smallest normal number; 1 for zeros, so that the gradient is finite and can move them."""
    most = t.abs().max()
    return torch.where(most > 0, most.clamp(min=torch.finfo(t.dtype).tiny), torch.ones_like(most))


class DoReFaWeight(Quantizer):
    """Weights at 2^k levels in [-1, 1], k > 1.

    Args:
        bits: k, 2 to 16.
    """

    elementwise = False

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        self.bits = bits

    def level(self, latent: Tensor) -> Tensor:
        """Return (2j - n) / n with j = round(n r)."""
        n = 2**self.bits - 1
        t = torch.tanh(latent)
        return (2 * (n * (t / (2 * _most(t)) + 0.5)).round() - n) / n

    def forward(self, latent: Tensor) -> Tensor:
        """Return w."""
        theta = latent.detach()
        t = torch.tanh(theta)
        return Declared.apply(latent, self.level(theta), (1 - t**2) / _most(t))

    def hard(self, latent: Tensor) -> Tensor:
        """Return w."""
        return self.level(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the 2^k levels."""
        n = 2**self.bits - 1
        return torch.arange(-n, n + 1, 2, dtype=dtype) / n

    def extra_repr(self) -> str:
        """Name the bits."""
        return f"bits={self.bits}"


class LayerSign(Quantizer):
    """E|theta| sign(theta), one scale for the layer; the gradient passes unchanged."""

    bits = 1
    elementwise = False

    def scale(self, latent: Tensor) -> Tensor:
        """Return E|theta|, a scalar, not below the smallest normal number."""
        return latent.abs().mean().clamp(min=torch.finfo(latent.dtype).tiny)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)

    def forward(self, latent: Tensor) -> Tensor:
        """Return E|theta| sign(theta)."""
        theta = latent.detach()
        return Declared.apply(latent, self.hard(theta), theta.new_ones(()))

    def hard(self, latent: Tensor) -> Tensor:
        """Return E|theta| sign(theta)."""
        return self.scale(latent) * hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)


class DoReFa(Method):
    """DoReFa-Net.

    Args:
        net: a plain net or the spec of one.
        weight_bits: k of the weights, 1 to 16; None leaves them in float.
        activation_bits: k of the activations, 1 to 16; None leaves the nonlinearities.
        gradient_bits: k of the gradients of layer outputs, 1 to 16; None leaves them in float.
        keep: layers left in float; the paper's first and last.

    Raises:
        InputError: for bits out of range.
    """

    info = CATALOG["dorefa"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        weight_bits: int | None = 2,
        activation_bits: int | None = 2,
        gradient_bits: int | None = None,
        keep: Sequence[str] = ("first", "last"),
        **kwargs: Any,
    ) -> None:
        for name, bits in (
            ("weight_bits", weight_bits),
            ("activation_bits", activation_bits),
            ("gradient_bits", gradient_bits),
        ):
            if bits is not None and not (type(bits) is int and 1 <= bits <= 16):
                raise InputError(f"{name} must be a whole number from 1 to 16, or None for float, not {bits!r}")
        if weight_bits is None and gradient_bits is not None:
            raise InputError("gradients are quantized behind layers with quantized weights: give weight_bits too")
        super().__init__(net, keep=keep, **kwargs)
        self._passes = 0

    def weight_quantizer(self) -> Quantizer | None:
        """Return the quantizer of one weight."""
        bits = self.h.weight_bits
        return None if bits is None else LayerSign() if bits == 1 else DoReFaWeight(bits)

    def activation_quantizer(self) -> Quantizer | None:
        """Return quantize_k(clip(x, 0, 1))."""
        bits = self.h.activation_bits
        return None if bits is None else Uniform(bits, signed=False, limit=1.0)

    def begin_step(self, total: int) -> None:
        """Prepare the step, and count its backward passes from zero."""
        super().begin_step(total)
        self._passes = 0

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss; layers with quantized weights get quantized gradients back."""
        bits = self.h.gradient_bits
        if bits is None:
            return super().objective(x, y)
        noise = generator("dorefa", self.h.seed, self.steps, self._passes)  # a step may have several passes
        self._passes += 1
        with quantized_outputs(self.net, lambda name, g: quantize_gradient(g, bits, unit_noise(g, noise))):
            logits = self.net(x)
        return self.loss(logits, y)
