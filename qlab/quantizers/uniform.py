"""Uniform quantization with a straight-through gradient inside the range.

    signed:    code = round(clip(x / s, -(2^(k-1) - 1), 2^(k-1) - 1)),  s = limit / (2^(k-1) - 1)
    unsigned:  code = round(clip(x / s, 0, 2^k - 1)),                   s = limit / (2^k - 1)
    forward:   x_q = s code;      backward:  dL/dx = dL/dx_q 1[x within the range]

The signed grid is symmetric and holds zero: 2^k - 1 levels. Rounding is to the nearest, ties to even.

Source: Jacob et al. 2018, arXiv 1712.05877 (symmetric, narrow range).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers.base import Quantizer, Rule

__all__ = ["Uniform"]


class _Uniform(torch.autograd.Function):
    """Round to the grid of step s between codes low and high; the gradient passes up to `end`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, s: Tensor, end: Tensor, low: int, high: int) -> Tensor:
        return (x / s).clamp(low, high).round() * s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
        x, _, end, ctx.low, _ = inputs
        ctx.save_for_backward(x, end)
        ctx.save_for_forward(x, end)

    @staticmethod
    def _inside(ctx: Any) -> Tensor:
        x, end = ctx.saved_tensors
        return ((x >= (-end if ctx.low else 0)) & (x <= end)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        return g * _Uniform._inside(ctx), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent * _Uniform._inside(ctx)


class Uniform(Quantizer):
    """k-bit uniform quantizer with a fixed range.

    Args:
        bits: k, 1 to 16 (2 to 16 if signed: one signed bit would leave only the level 0).
        signed: a grid symmetric about zero (weights) or from zero up (activations after a ReLU).
        limit: the largest level. None: the largest magnitude of the weight when `qlab.quantize` puts the quantizer on
            it; activations need a number.

    Raises:
        InputError: for bits or a limit out of range; for an activation without a limit.
    """

    limit: Tensor

    def __init__(self, bits: int = 8, signed: bool = True, limit: float | None = None) -> None:
        super().__init__()
        least = 2 if signed else 1
        if not (isinstance(bits, int) and least <= bits <= 16):
            kind = "signed" if signed else "unsigned"
            raise InputError(f"bits of a grid that is {kind} must be a whole number from {least} to 16, not {bits!r}")
        if limit is not None and not 0 < limit < float("inf"):
            raise InputError(f"limit must be a positive number, not {limit!r}")
        self.bits = bits
        self.signed = signed
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.low = -self.high if signed else 0
        self.fixed = limit is not None
        self.register_buffer("limit", torch.tensor(1.0 if limit is None else float(limit), dtype=torch.float64))

    def _step(self, dtype: torch.dtype) -> Tensor:
        return (self.limit / self.high).to(dtype)

    def forward(self, latent: Tensor) -> Tensor:
        """Return the nearest levels, of the shape of `latent`."""
        step = self._step(latent.dtype)
        # The highest level may round to just below the limit, on which the largest weight of a tensor stands exactly.
        end = torch.maximum(self.limit.to(latent.dtype), self.high * step)
        return _Uniform.apply(latent, step, end, self.low, self.high)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the grid in the dtype of the tensors it quantizes, so that comparison is exact."""
        codes = torch.arange(self.low, self.high + 1, dtype=dtype, device=self.limit.device)
        return codes * self._step(dtype)

    def primitive(self) -> Rule:
        """Return the clip to the range: the gradient passes inside it."""
        end = float(self.limit)
        return lambda x: x.clamp(-end if self.low else 0, end)

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Take the range from the tensor unless it was given."""
        if not self.fixed:
            if latent.numel() == 0:
                raise InputError("an activation has no weight to take its range from: give Uniform(limit=...)")
            largest = latent.detach().abs().max()
            self.limit.copy_(torch.where(largest > 0, largest, torch.ones_like(largest)))
        return latent

    def extra_repr(self) -> str:
        """Name bits, sign and range."""
        return f"bits={self.bits}, signed={self.signed}, limit={float(self.limit):g}"
