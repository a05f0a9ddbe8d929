r"""SAWB: the clip of a uniform grid from two moments of the tensor, close to the one of least squared error.

    clip = c1 sqrt(mean x^2) - c2 mean|x|                    (c1, c2) fitted for each number of levels
    step = clip / top,   x_q = step code(x / step)
    backward: dL/dx = dL/dx_q                                straight through, beyond the clip too

Grids, as codes; top is the largest code:

    half     -(2^k - 1), ..., -3, -1, 1, 3, ..., 2^k - 1     2^k levels, none at zero: what `COEFFICIENTS` are fitted for
    narrow   -(2^(k-1) - 1), ..., 2^(k-1) - 1                2^k - 1 levels with zero; 4 bits have coefficients of their own
    wide     -2^(k-1), ..., 2^(k-1)                          2^k + 1 levels, one more than k bits can code: the code of LUQ

A ratio of the two moments below that of every unimodal distribution (nearly all |x| alike) makes the formula small or
negative, though the best clip is then max|x|. So the clip is never taken below sqrt(mean x^2), and is 1 for zeros.

Activations are rectified first and quantized to 0, ..., 2^k - 1. In training their moments are those of the batch, and a
running average of them is kept; in eval mode the running average is used, so that an answer does not depend on what else
is in the batch.

Source: Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019 (SAWB); coefficients and the wide
grid from public implementations, (12.1, 12.2) from the code of LUQ (Chmiel et al., arXiv 2112.10769).
Deviations: the floor of the clip. The code of LUQ quantizes activations up to twice the clip; `reach=2` does so, but for
rectified normal values the squared error is then about four times that of `reach=1`.

Shapes: x of any shape; clip and step are scalars of the dtype of x.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers.base import Quantizer, Rule

__all__ = ["COEFFICIENTS", "LUQ", "NARROW_4", "SAWB", "Grid", "SAWBActivation", "has_coefficients", "sawb_clip"]

Grid = Literal["half", "narrow", "wide"]

COEFFICIENTS: dict[int, tuple[float, float]] = {
    2: (3.12, 2.064),
    3: (7.509, 6.892),
    4: (12.68, 12.80),
    5: (17.74, 18.64),
}
"""(c1, c2) for k bits, 2^k levels."""

NARROW_4 = (12.035, 12.03)
"""(c1, c2) for the 15 levels of the narrow 4-bit grid."""

LUQ = (12.1, 12.2)
"""(c1, c2) in the code of LUQ, for the 17 levels of its 4-bit weights."""


def has_coefficients(bits: object) -> bool:
    """Return whether `bits` is a whole number that there are coefficients for."""
    return type(bits) is int and bits in COEFFICIENTS


def _coefficients(bits: int, grid: Grid) -> tuple[float, float]:
    if not has_coefficients(bits):
        raise InputError(f"SAWB has coefficients for {', '.join(map(str, COEFFICIENTS))} bits, not for {bits!r}")
    if bits == 4 and grid != "half":
        return NARROW_4 if grid == "narrow" else LUQ
    return COEFFICIENTS[bits]


def _from_moments(second: Tensor, first: Tensor, c1: float, c2: float) -> Tensor:
    rms = second.sqrt()
    clip = torch.maximum(c1 * rms - c2 * first, rms)
    return torch.where(rms > 0, clip, torch.ones_like(clip))


def sawb_clip(x: Tensor, bits: int = 4, coefficients: tuple[float, float] | None = None) -> Tensor:
    """Return the clip c1 sqrt(mean x^2) - c2 mean|x|, at least sqrt(mean x^2); 1 for a tensor of zeros.

    Args:
        x: of any shape, not empty.
        bits: 2 to 5, for the coefficients of `COEFFICIENTS`.
        coefficients: (c1, c2) instead of those.

    Returns:
        A scalar of the dtype of x, differentiable in it; detach it where the clip counts as a constant.

    Raises:
        InputError: for bits without coefficients.
    """
    c1, c2 = _coefficients(bits, "half") if coefficients is None else coefficients
    return _from_moments(x.square().mean(), x.abs().mean(), c1, c2)


def _codes(y: Tensor, low: int, top: int, odd: bool) -> Tensor:
    """Return the code nearest to y = x / step: whole numbers from low to top, or only the odd ones."""
    return ((y / 2).floor() * 2 + 1 if odd else y.round()).clamp(low, top)


class _ToGrid(torch.autograd.Function):
    """step code(x / step); straight through, or only where x > 0 after a rectifier (low = 0)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: Tensor, low: int, top: int, odd: bool) -> Tensor:
        return step * _codes(x / step, low, top, odd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: Tensor) -> None:
        x, _, ctx.low, _, _ = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def _through(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x > 0).to(x.dtype) if ctx.low == 0 else g.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _ToGrid._through(ctx, g), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _ToGrid._through(ctx, tangent)


class SAWB(Quantizer):
    """Weights on a uniform grid whose clip follows the tensor's moments.

    Args:
        bits: k, 2 to 5.
        grid: "narrow", "half" or "wide"; see the module docstring.
        coefficients: (c1, c2); None takes those of bits and grid.

    Raises:
        InputError: for bits or a grid that there is none of.
    """

    elementwise = False

    def __init__(self, bits: int = 4, grid: Grid = "narrow", coefficients: tuple[float, float] | None = None) -> None:
        super().__init__()
        if grid not in ("half", "narrow", "wide"):
            raise InputError(f"grid must be 'half', 'narrow' or 'wide', not {grid!r}")
        self.coefficients = _coefficients(bits, grid) if coefficients is None else coefficients
        self.bits, self.grid = bits, grid
        self.odd = grid == "half"
        self.top = 2**bits - 1 if self.odd else 2 ** (bits - 1) - (grid == "narrow")

    def scale(self, latent: Tensor) -> Tensor:
        """Return the step, a scalar: clip / top."""
        return sawb_clip(latent.detach(), coefficients=self.coefficients) / self.top

    def level(self, latent: Tensor) -> Tensor:
        """Return the codes."""
        return _codes(latent / self.scale(latent), -self.top, self.top, self.odd)

    def forward(self, latent: Tensor) -> Tensor:
        """Return step times code, of the shape of `latent`."""
        return _ToGrid.apply(latent, self.scale(latent), -self.top, self.top, self.odd)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the codes from least to largest."""
        return torch.arange(-self.top, self.top + 1, 2 if self.odd else 1).to(dtype)

    def extra_repr(self) -> str:
        """Name bits and grid."""
        return f"bits={self.bits}, grid={self.grid}"


class SAWBActivation(Quantizer):
    """A rectifier whose output is quantized to 0, ..., 2^k - 1 steps.

    Args:
        bits: k, 2 to 5.
        coefficients: (c1, c2); None takes those of the code of LUQ for 4 bits, else those of `COEFFICIENTS`.
        reach: the largest level in clips.
        momentum: share of the present batch in the running moments.

    Raises:
        InputError: for bits that there are no coefficients for, or a reach or momentum out of range.
    """

    elementwise = False
    running_mean: Tensor  # of |x|
    running_var: Tensor  # of x^2, about zero; the two names are those under which statistics of the data are known

    def __init__(
        self,
        bits: int = 4,
        coefficients: tuple[float, float] | None = None,
        reach: float = 1.0,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.coefficients = _coefficients(bits, "wide") if coefficients is None else coefficients
        if not 0 < reach < math.inf:
            raise InputError(f"reach must be a positive number, not {reach!r}")
        if not 0 < momentum <= 1:
            raise InputError(f"momentum must lie in (0, 1], not {momentum!r}")
        self.bits, self.reach, self.momentum = bits, reach, momentum
        self.top = 2**bits - 1
        # Where no batch was seen yet: the moments of a rectified standard normal value.
        self.register_buffer("running_mean", torch.tensor(1 / math.sqrt(2 * math.pi)))
        self.register_buffer("running_var", torch.tensor(0.5))

    def step(self, x: Tensor) -> Tensor:
        """Return the step: in training from the moments of x, which enter the running ones; else from those."""
        if self.training:
            r = x.detach().clamp(min=0)
            first, second = r.mean(), r.square().mean()
            with torch.no_grad():
                self.running_mean.lerp_(first.to(self.running_mean), self.momentum)
                self.running_var.lerp_(second.to(self.running_var), self.momentum)
        else:
            first, second = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        return self.reach * _from_moments(second, first, *self.coefficients) / self.top

    def forward(self, latent: Tensor) -> Tensor:
        """Return the levels nearest to max(x, 0)."""
        return _ToGrid.apply(latent, self.step(latent), 0, self.top, False)

    def primitive(self) -> Rule:
        """Return the rectifier: the gradient passes where x > 0."""
        return torch.relu

    def extra_repr(self) -> str:
        """Name bits and reach."""
        return f"bits={self.bits}, reach={self.reach:g}"
