r"""LUQ: all three products of training in four bits, with a logarithmic, unbiased quantizer of the gradients.

Forward, round to nearest on a uniform grid (biased on purpose, for its squared error is least):

    weights, activations: INT4 with the clip of SAWB, straight through (`qlab.quantizers.sawb`)

Backward, the gradient x of a layer's *output* in FP4 (a sign, three bits of exponent, no mantissa), at random and without bias:

    a = max|x| / 2^e                                             e = 7: the octaves above the smallest level
    |x| <  a:                   sign(x) a with probability |x| / a, else 0
    |x| >= a, L = a 2^floor(log2(|x| / a)):  sign(x) 2L with probability (|x| - L) / L, else sign(x) L

    E[Q(x)] = x,   Var[Q(x)] = |x| (a - |x|) below a,   (|x| - L) (2L - |x|) above

The maximum, zero and a times powers of two stay as they are. Averaging `samples` draws (SMP) divides the variance by their
number. Rounding to the nearest level instead would be biased: everything below a/2 would be lost.

Source: Chmiel, Banner, Hoffer, Ben Yaacov, Soudry, LUQ, arXiv 2112.10769 (ICLR 2023: Accurate Neural Training with 4-bit Matrix
Multiplications at Standard Formats); constants of a public copy of the authors' code (aistats2023/537).
Deviations: weights take the 15 levels of the narrow grid, for the authors' -8, ..., 8 is one level more than four bits can code
(`grid="wide"`). The same holds of the gradients: 7 octaves, as in their code, are 17 values; `octaves=6` are 15. Activations are
quantized up to the clip rather than twice the clip (`reach=2`), and by running moments in eval mode. The maximum is that of the
present tensor; the paper also estimates it from past steps. The paper averages draws for the product that gives the weights'
gradient; here the average serves both products of the backward pass.

Shapes: x (N, ...) the gradient of a layer's output; a is one number for the tensor.
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
from qlab.quantizers import Quantizer
from qlab.quantizers.gradients import quantized_outputs, unit_noise
from qlab.quantizers.sawb import COEFFICIENTS, SAWB, Grid, SAWBActivation, has_coefficients

__all__ = ["LUQ", "log_quantize", "log_variance"]


def _floor_level(x: Tensor, octaves: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, y = |x| / a and L / a = 2^floor(log2 y), which is 0 below a."""
    most = x.abs().amax() if x.numel() else x.new_zeros(())
    a = torch.where(most > 0, most * 2.0**-octaves, torch.ones_like(most))
    a = a.clamp(min=torch.finfo(x.dtype).tiny)  # gradients so small that a would be no normal number
    y = x.abs() / a
    power = torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - 1)  # exact, as log2 would not be
    return a, y, torch.where(y < 1, torch.zeros_like(y), power)


def log_quantize(x: Tensor, u: Tensor, octaves: int = 7) -> Tensor:
    """Return x rounded at random to a level next to it, 0 or +-a 2^k, so that its expectation is x.

    Args:
        x: any shape.
        u: draws from U[0, 1), of the shape of x.
        octaves: e; the largest level, max|x|, is 2^e times the smallest.
    """
    a, y, low = _floor_level(x, octaves)
    gap = torch.where(low > 0, low, torch.ones_like(low))  # the next level is one gap up: 1 from 0, 2L from L
    return torch.sign(x) * a * (low + gap * (u < (y - low) / gap).to(x.dtype))


def log_variance(x: Tensor, octaves: int = 7) -> Tensor:
    """Return the variance of `log_quantize`, elementwise: (|x| - L)(next level - |x|)."""
    a, y, low = _floor_level(x, octaves)
    gap = torch.where(low > 0, low, torch.ones_like(low))
    return a**2 * (y - low) * (low + gap - y)


class LUQ(Method):
    """Four-bit training: INT4 weights and activations, FP4 gradients.

    Args:
        net: a plain net or the spec of one.
        weight_bits: bits of the weights, 2 to 5.
        activation_bits: bits of the activations, 2 to 5; None leaves the nonlinearities.
        octaves: e of the gradients' levels; None leaves gradients in float.
        samples: draws that a gradient is averaged over.
        grid: of the weights: "narrow", "half" or "wide"; see `qlab.quantizers.sawb`.
        reach: largest level of activations in clips; 2 in the authors' code.
        keep: layers left in float; the paper's first and last.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["luq"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        weight_bits: int = 4,
        activation_bits: int | None = 4,
        octaves: int | None = 7,
        samples: int = 1,
        grid: Grid = "narrow",
        reach: float = 1.0,
        keep: Sequence[str] = ("first", "last"),
        **kwargs: Any,
    ) -> None:
        known = f"one of {', '.join(map(str, COEFFICIENTS))}"
        for name, value, good, expected in (
            ("weight_bits", weight_bits, has_coefficients(weight_bits), known),
            ("activation_bits", activation_bits, activation_bits is None or has_coefficients(activation_bits), known),
            ("octaves", octaves, octaves is None or (type(octaves) is int and 1 <= octaves <= 60), "from 1 to 60"),
            ("samples", samples, type(samples) is int and samples >= 1, "a whole number of at least 1"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(net, keep=keep, **kwargs)
        self._passes = 0

    def weight_quantizer(self) -> Quantizer:
        """Return the SAWB grid of one weight."""
        return SAWB(self.h.weight_bits, self.h.grid)

    def activation_quantizer(self) -> Quantizer | None:
        """Return the rectifier with a SAWB grid."""
        bits = self.h.activation_bits
        return None if bits is None else SAWBActivation(bits, reach=self.h.reach)

    def begin_step(self, total: int) -> None:
        """Prepare the step, and count its backward passes from zero."""
        super().begin_step(total)
        self._passes = 0

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss; layers with quantized weights get FP4 gradients back."""
        if self.h.octaves is None:
            return super().objective(x, y)
        noise = generator("luq", self.h.seed, self.steps, self._passes)  # a step may have several passes
        self._passes += 1
        octaves, samples = self.h.octaves, self.h.samples

        def rewrite(name: str, g: Tensor) -> Tensor:
            draws = [log_quantize(g, unit_noise(g, noise), octaves) for _ in range(samples)]
            return draws[0] if samples == 1 else torch.stack(draws).mean(0)

        with quantized_outputs(self.net, rewrite):
            logits = self.net(x)
        return self.loss(logits, y)
