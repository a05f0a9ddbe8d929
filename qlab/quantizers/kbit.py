r"""A few bits on [-1, 1]: odd-symmetric, fixed-point and logarithmic levels, to the nearest or at random.

With k bits, n = 2^k - 1, u ~ U[0, 1) and AP2(x) = sign(x) 2^round(log2 |x|), AP2(0) = 0:

    odd      the nearest of -1, ..., -1/n, 1/n, ..., 1          at random: 2 floor(n (x + 1) / 2 + u) / n - 1
    linear   clip(round(x / s) s, -1, 1 - s),  s = 2^(1 - k)    at random: floor(x / s + u) s
    log      AP2(x) with magnitudes 2^(E - 2^(k-1) + 2), ..., 2^E, and 0 below the smallest over sqrt(2)
             at random: |x| in [2^e, 2^(e+1)) goes up with probability |x| / 2^e - 1; below the smallest level a to a with
             probability |x| / a

Rounding at random is unbiased within the range. One odd-symmetric bit is the sign, sign(0) = +1, and at random it is +1 with
probability clip((x + 1) / 2, 0, 1). Ties of "odd" go away from zero, those of "linear" to even, those of AP2 do not exist.

The gradient is passed where |x| <= window, which is 1 or a little more, and 0 beyond.

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, JMLR 18 (2018), arXiv 1609.07061; odd-symmetric
levels as in Xu et al., ICLR 2018. The code of the logarithmic levels (one sign bit, one code for zero) is a reconstruction.

Shapes: any; scales of rows (O, 1, ...) for weights (O, K, ...).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers.base import Quantizer, Rule
from qlab.quantizers.declared import Declared
from qlab.quantizers.sign import hard_sign

__all__ = ["Grid", "KBit", "ap2", "floor2", "linear_quantize", "linear_scaled", "log_quantize", "q_k"]

Grid = Literal["odd", "linear", "log"]


def floor2(x: Tensor) -> Tensor:
    """Return 2^floor(log2 |x|), exactly; 0 at 0, infinity and NaN as they are."""
    size = x.abs()
    mantissa = torch.frexp(size).mantissa  # in [1/2, 1), so that the quotient is a power of two, exactly
    return torch.where((size > 0) & size.isfinite(), size / (2 * mantissa), size)


def ap2(x: Tensor) -> Tensor:
    """Return sign(x) 2^round(log2 |x|), the power of two nearest in the exponent; 0 at 0. Exact: no logarithm is taken."""
    low = floor2(x)
    up = torch.frexp(x.abs()).mantissa >= math.sqrt(0.5)
    return torch.sign(x) * torch.where(up, 2 * low, low)


def q_k(x: Tensor, k: int, u: Tensor | None = None) -> Tensor:
    """Return the nearest of the 2^k odd-symmetric levels; with draws `u` from U[0, 1), one of the two around x at random.

    Args:
        x: any shape; beyond [-1, 1] it gets the outermost level.
        k: bits, at least 1.
        u: of the shape of x.
    """
    n = 2**k - 1
    if u is not None:
        return (2 * (n * (x.clamp(-1, 1) + 1) / 2 + u).floor().clamp(max=n) - n) / n
    if k == 1:
        return hard_sign(x)
    step = (x.abs() * (n / 2)).floor().clamp(max=(n - 1) // 2)
    return torch.copysign((2 * step + 1) / n, x + 0.0)  # -0 + 0 is +0, so that zero goes up as in sign


def linear_quantize(x: Tensor, k: int, u: Tensor | None = None) -> Tensor:
    """Return x on the fixed-point grid -1, -1 + s, ..., 1 - s, s = 2^(1 - k); arguments as of `q_k`, k at least 2."""
    s = 2.0 ** (1 - k)
    y = x.clamp(-1, 1 - s) / s
    return (y.round() if u is None else (y + u).floor().clamp(max=2 ** (k - 1) - 1)) * s


def linear_scaled(x: Tensor, k: int, u: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    """Return x on the multiples of D = max|x| / (2^(k-1) - 1), for tensors without a fixed range, such as gradients.

    Args:
        x: any shape.
        k: bits, at least 2.
        u: draws from U[0, 1) of the shape of x: rounds at random, without bias, with variance D^2 f (1 - f) for the fraction f.
        most: in place of max|x|; larger values are clipped to it.
    """
    codes = 2 ** (k - 1) - 1
    most = _most(x) if most is None else most
    D = torch.where(most > 0, most / codes, torch.ones_like(most))
    y = x / D
    return (y.round() if u is None else (y + u).floor()).clamp(-codes, codes) * D


def log_quantize(x: Tensor, k: int, u: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    """Return x on 0 and 2^(k-1) - 1 powers of two up to 2^E, with its sign.

    E is round(log2 max|x|), as AP2 rounds; for draws at random it is rounded up, for else the largest entries would be biased.

    Args:
        x: any shape.
        k: bits, at least 2.
        u: draws from U[0, 1) of the shape of x: rounds at random, without bias.
        most: in place of max|x|; larger values are clipped to 2^E.
    """
    most = _most(x) if most is None else most
    high = ap2(most) if u is None else _ceil2(most)
    low = high * 2.0 ** -(2 ** (k - 1) - 2)
    size = x.abs()
    if u is None:
        level = torch.where(size < low * math.sqrt(0.5), torch.zeros_like(size), torch.maximum(ap2(size), low))
    else:
        down = torch.where(size < low, torch.zeros_like(size), floor2(size))
        gap = torch.where(size < low, low.expand_as(size), down)  # the next level is one gap up: a from 0, 2L from L
        fraction = (size - down) / torch.where(gap > 0, gap, torch.ones_like(gap))
        level = down + gap * (u < fraction).to(x.dtype)
    return torch.sign(x) * torch.minimum(level, high)


def _most(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _ceil2(x: Tensor) -> Tensor:
    low = floor2(x)
    return torch.where(low < x, 2 * low, low)


class KBit(Quantizer):
    """k bits on [-1, 1], for weights or activations.

    Args:
        bits: k, 1 to 16; at least 2 for "linear" and "log", at most 8 for "log".
        grid: "odd", "linear" or "log" (with E = 0).
        rows: levels times a float of each row, max|W|, or mean|W| for one bit; for weights.
        stochastic: round at random in training mode, by draws that stay for the whole step; deterministic otherwise.
        window: largest |x| that the gradient passes at.
        uniform: latents of weights start from U(-1, 1), not from the net's own.

    Raises:
        InputError: for bits or a window out of range, or an unknown grid.
    """

    def __init__(
        self,
        bits: int = 1,
        grid: Grid = "odd",
        rows: bool = False,
        stochastic: bool = False,
        window: float = 1.0,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        if grid not in ("odd", "linear", "log"):
            raise InputError(f"grid must be 'odd', 'linear' or 'log', not {grid!r}")
        least, most = (1 if grid == "odd" else 2), (8 if grid == "log" else 16)
        if type(bits) is not int or not least <= bits <= most:
            raise InputError(f"bits of {grid} levels must be a whole number from {least} to {most}, not {bits!r}")
        if isinstance(window, bool) or not isinstance(window, int | float) or not window >= 1:
            raise InputError(f"window must be a number of at least 1, not {window!r}")
        self.bits = bits
        self.grid: Grid = grid
        self.elementwise = not rows
        self.rows, self.stochastic, self.window, self.uniform = rows, stochastic, float(window), uniform
        self.draw = 0

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents from U(-1, 1), where wanted."""
        return 2 * torch.rand(latent.shape, generator=generator) - 1 if self.uniform and latent.numel() else latent

    def resample(self, generator: torch.Generator) -> None:
        """Draw the seed of this step's draws."""
        if self.stochastic:
            self.draw = int(torch.randint(2**62, (), generator=generator))

    def _rounded(self, x: Tensor, u: Tensor | None) -> Tensor:
        if self.grid == "odd":
            return q_k(x, self.bits, u)
        if self.grid == "linear":
            return linear_quantize(x, self.bits, u)
        return log_quantize(x, self.bits, u, most=x.new_ones(()))

    def _scaled(self, latent: Tensor, u: Tensor | None) -> Tensor:
        s = self.scale(latent)
        return self._rounded(latent, u) if s is None else s * self._rounded(latent / s, u)

    def forward(self, latent: Tensor) -> Tensor:
        """Return the levels, times the scale of the row; in training mode of a stochastic quantizer drawn at random."""
        x = latent.detach()
        u = None
        if self.stochastic and self.training:
            draws = torch.Generator().manual_seed(self.draw)
            u = torch.rand(x.shape, generator=draws, dtype=x.dtype).to(x.device)
        return Declared.apply(latent, self._scaled(x, u), (x.abs() <= self.window).to(x.dtype))

    def scale(self, latent: Tensor) -> Tensor | None:
        """Return max|W| of each row, mean|W| for one bit, (O, 1, ...), at least the smallest normal number; None without."""
        if not self.rows:
            return None
        size = latent.abs()
        dims = tuple(range(1, latent.dim())) or (0,)  # a bias is one row
        s = size.mean(dims, keepdim=True) if self.bits == 1 else size.amax(dims, keepdim=True)
        return s.clamp(min=torch.finfo(latent.dtype).tiny)

    def level(self, latent: Tensor) -> Tensor:
        """Return the nearest level, without the scale."""
        s = self.scale(latent)
        return self._rounded(latent if s is None else latent / s, None)

    def hard(self, latent: Tensor) -> Tensor:
        """Return the nearest level times the scale."""
        return self._scaled(latent, None)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the 2^k levels of "odd" and "linear", the 2^k - 1 of "log", without the scale."""
        if self.grid == "odd":
            n = 2**self.bits - 1
            return torch.arange(-n, n + 1, 2, dtype=dtype) / n
        half = 2 ** (self.bits - 1)
        if self.grid == "linear":
            return torch.arange(-half, half, dtype=dtype) / half
        powers = torch.tensor([2.0**-e for e in range(half - 2, -1, -1)], dtype=dtype)
        return torch.cat([-powers.flip(0), powers.new_zeros(1), powers])

    def primitive(self) -> Rule:
        """Return the clip to the window."""
        end = self.window
        return lambda x: x.clamp(-end, end)

    def extra_repr(self) -> str:
        """Name bits, grid and options."""
        rows = ", scaled rows" if self.rows else ""
        return f"bits={self.bits}, {self.grid}{rows}{', stochastic' if self.stochastic else ''}, window={self.window:g}"
