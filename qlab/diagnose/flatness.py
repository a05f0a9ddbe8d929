r"""Is a function of one tensor piecewise constant, and what does autograd claim of it?

f is run in float64 at points u_0, u_1, ..., u_8 = u_0 + rms(u_0) noise, and at points a billionth away from each:

    an output element varies    if it differs between two of the points u_k
    it is flat at u_k           if the point next to u_k gives the very same number

    piecewise constant:  at least one element varies, and those that vary are flat at 99 % of the points,
                         and where one varies, bisection ends at a jump, not at a slope

Many quantizers multiply their levels by a scale that follows the tensor (mean |w|, max |x|), which does change a little. There, the
changes of all neighbours are multiples of one vector, per output channel or per example, while those of far points are not:

    constant up to a scale:  the matrix of small changes has rank 1, that of large changes has not

A unit that is dead does not vary. A ReLU, a clip or a maximum that varies is not flat where it is active. A steep slope
(tanh(1000 x)) is told from a jump by the bisection. Autograd is then asked for the same derivative, which is zero, at u_0 and at
u_0 / (2 rms(u_0)), where a rule that u_0 saturates passes something: if it claims another one, f is straight-through.

Source: the definitions of a piecewise-constant function and of a straight-through derivative (Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Gradient", "Verdict", "judged", "judged_up_to_scale"]

POINTS = 8
TOLERANCE = 0.01  # share of points at which an element may happen to jump
WITNESSES = 4  # elements that are bisected; all must end at a jump
GROUPS = 64  # output channels or examples whose changes are decomposed

Gradient = Literal["straight-through", "zero"]


@dataclass(frozen=True)
class Verdict:
    """What is known of a piecewise-constant function.

    Args:
        gradient: whether autograd claims a derivative that is not zero.
        jump: largest jump found.
        levels: distinct values seen; None for more than 65,536, or where they are not of one grid.
        scaled: whether it is constant only up to a scale that follows the tensor.
    """

    gradient: Gradient
    jump: float
    levels: int | None
    scaled: bool = False


def judged(f: Callable[[Tensor], Tensor], u: Tensor, generator: torch.Generator) -> Verdict | None:
    """Return what is known of a piecewise-constant function, or None for one that is not, or that is random."""
    scale = float(u.square().mean().sqrt()) if u.numel() else 0.0
    if not 0 < scale < float("inf"):
        return None

    def noise() -> Tensor:
        return torch.randn(u.shape, dtype=u.dtype, generator=generator).to(u.device)

    with torch.no_grad():
        points = [u, *(u + scale * noise() for _ in range(POINTS))]
        values = torch.stack([f(point) for point in points])
        if not bool(values.isfinite().all()) or not torch.equal(values[0], f(u)):
            return None
        varies = ((values - values[0]).abs() > 1e-9 * values.abs().max()).any(0)
        if not bool(varies.any()):
            return None
        beside = torch.stack([f(point + 1e-9 * scale * noise()) for point in points])
        noise_floor = 1e-13 * float(values.abs().max())  # of `x + (q - x).detach()`, whose sum rounds
        if float(((beside - values).abs() > noise_floor)[:, varies].double().mean()) > TOLERANCE:
            return None
        jumps = _jumps(f, points, values, varies, generator)
    if jumps is None:
        return None
    unit = max(float(values.abs().max()), 1e-300)
    distinct = (values / unit * 1e9).round().unique()
    return Verdict(_claim(f, u, generator), jumps, len(distinct) if len(distinct) <= 2**16 else None)


def _jumps(
    f: Callable[[Tensor], Tensor], points: list[Tensor], values: Tensor, varies: Tensor, generator: torch.Generator
) -> float | None:
    """Return the largest jump of a few elements, or None where one of them rises on a slope."""
    elements = varies.flatten().nonzero()[:, 0]
    order = torch.randperm(len(elements), generator=generator)[:WITNESSES].to(elements.device)
    table = values.flatten(1)
    largest = 0.0
    for i in elements[order].tolist():
        k = int((table[:, i] - table[0, i]).abs().argmax())
        low, high = points[0], points[k]
        a, b = table[0, i], table[k, i]
        whole = float((b - a).abs())
        for _ in range(40):
            middle = (low + high) / 2
            m = f(middle).flatten()[i]
            if abs(m - a) <= 1e-9 * whole:
                low = middle
            else:
                high, b = middle, m
        jump = float((b - a).abs())
        if jump <= 1e-6 * whole:
            return None
        largest = max(largest, jump)
    return largest


def judged_up_to_scale(
    f: Callable[[Tensor], Tensor], u: Tensor, generator: torch.Generator, channels: bool
) -> Verdict | None:
    """Return what is known of a function that is piecewise constant up to a scale per output channel, or per example."""
    scale = float(u.square().mean().sqrt()) if u.numel() else 0.0
    if not 0 < scale < float("inf"):
        return None

    def changes(size: float) -> Tensor:
        """Return (groups, directions, rest)."""
        rows = []
        for _ in range(POINTS):
            d = torch.randn(u.shape, dtype=u.dtype, generator=generator).to(u.device)
            rows.append(f(u + size * scale * d) - base)
        stack = torch.stack(rows)
        axis = (2 if u.dim() > 2 else stack.dim() - 1) if channels else 1
        return stack.movedim(axis, 0).flatten(2)[:GROUPS]

    with torch.no_grad():
        base = f(u)
        if base.dim() < 2 or not torch.equal(base, f(u)):
            return None
        small, large = changes(1e-6), changes(1.0)
        if small.shape[-1] < 3 or not bool(small.isfinite().all() and large.isfinite().all()):
            return None
        s, t = torch.linalg.svdvals(small), torch.linalg.svdvals(large)
        moves = s[:, 0] > 1e-12 * scale  # a group whose scale none of the directions moved is constant: rank 0
        if not bool(moves.any()) or bool((s[moves, 1] > 1e-4 * s[moves, 0]).any()):
            return None
        # A clip or a ReLU with one active unit has rank 1 as well, but a scale moves every value that is not zero.
        moved = (small[moves] != 0).any(1).sum(1)
        if bool((moved < 3).any() or (t[:, 1] <= 1e-2 * t[:, 0]).all()):
            return None
    return Verdict(_claim(f, u, generator), float(large.abs().max()), None, scaled=True)


def _claim(f: Callable[[Tensor], Tensor], u: Tensor, generator: torch.Generator) -> Gradient:
    """Return whether autograd claims a derivative where there is none."""
    rms = float(u.square().mean().sqrt())
    for point in (u, u / (2 * rms)):  # a rule that u saturates passes something near zero
        leaf = point.clone().requires_grad_()
        try:
            with torch.enable_grad():
                out = f(leaf)
                if not out.requires_grad:
                    return "zero"
                weights = torch.randn(out.shape, dtype=out.dtype, generator=generator).to(out.device)
                (g,) = torch.autograd.grad(out, leaf, weights, allow_unused=True)
        except RuntimeError:  # code that has no backward
            return "zero"
        if g is not None and bool((g != 0).any()):
            return "straight-through"
    return "zero"
