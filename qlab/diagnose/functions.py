r"""Which function a diagnosis looks at. A quantized net is four functions of the same latent weights w:

| name      | weights           | activations      | what it is                                                   |
|-----------|-------------------|------------------|--------------------------------------------------------------|
| deployed  | hard(w)           | hard             | what is shipped; piecewise constant in w                     |
| latent    | w                 | hard             | the float weights, which the shipped net never sees          |
| surrogate | F(w)              | F                | F' = the declared backward rule: its gradient is honest      |
| smoothed  | tanh steps of w   | tanh steps       | every jump at t is a tanh(k (w - t)); deployed for k -> inf  |

The straight-through gradient is the gradient of none of them: it takes forward values from `deployed` and derivatives from
`surrogate`.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.diagnose.base import plain
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Quantizer

__all__ = ["FUNCTIONS", "FunctionName", "steps", "variant"]

FunctionName = Literal["deployed", "latent", "surrogate", "smoothed"]
FUNCTIONS: tuple[FunctionName, ...] = ("deployed", "latent", "surrogate", "smoothed")


def variant(net: nn.Module, which: FunctionName, sharpness: float = 5.0) -> nn.Module:
    """Return one of the four functions as a net of its own, with parameters of the same names, shapes and values.

    A net without quantizers of the lab is returned as a copy, for all its functions are one.

    Args:
        net: a method of the lab (in training or not), or a torch module; latent weights stay latent.
        which: a name of `FUNCTIONS`.
        sharpness: k of "smoothed", per unit of the quantizer's input.

    Raises:
        UnknownNameError: no such function.
        InputError: a sharpness that is not positive; a quantizer whose backward rule is no derivative of a known function, for
            "surrogate"; one without a grid, for "smoothed".
    """
    if which not in FUNCTIONS:
        raise UnknownNameError("function of a quantized net", which, FUNCTIONS)
    if not (math.isfinite(sharpness) and sharpness > 0):
        raise InputError(f"sharpness must be a positive number, not {sharpness!r}")
    net = copy.deepcopy(plain(net)).eval()
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            for chain in module.parametrizations.values():  # type: ignore[operator]
                for i, step in enumerate(chain):
                    if isinstance(step, Quantizer):
                        chain[i] = nn.Identity() if which == "latent" else _as(step, which, sharpness)
    # With duplicates: one quantizer may stand in several places.
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, Quantizer) and ".parametrizations." not in f".{name}.":
            replacement = _as(module, "deployed" if which == "latent" else which, sharpness)
            if not name:
                return replacement
            net.set_submodule(name, replacement)
    return net.eval()


class Hard(nn.Module):
    """A quantizer as it is deployed."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return hard(x)."""
        return self.quantizer.hard(x)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value as its own latent tensor."""
        return value


class Primitive(nn.Module):
    """The function whose derivative is a quantizer's backward rule."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.F = quantizer.primitive()
        if self.F is None:
            raise InputError(
                f"the backward rule of {type(quantizer).__name__} is not the derivative of a known function, so this net has no "
                "surrogate function; look at 'smoothed' instead"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x)."""
        return self.F(x)  # type: ignore[misc]


class Smooth(nn.Module):
    """A staircase whose jumps are tanh(k (x - t)): l_0 + sum_j (l_j - l_{j-1}) (1 + tanh(k (x - t_j))) / 2."""

    def __init__(self, quantizer: Quantizer, sharpness: float) -> None:
        super().__init__()
        levels, thresholds = steps(quantizer)
        self.low, self.k = float(levels[0]), sharpness
        self.jumps = [(float(b - a), float(t)) for a, b, t in zip(levels, levels[1:], thresholds, strict=False)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the smoothed staircase."""
        y = torch.full_like(x, self.low)
        for jump, t in self.jumps:
            y = y + jump * (1 + torch.tanh(self.k * (x - t))) / 2
        return y


def _as(quantizer: Quantizer, which: FunctionName, sharpness: float) -> nn.Module:
    if which == "deployed":
        return Hard(quantizer)
    return Primitive(quantizer) if which == "surrogate" else Smooth(quantizer, sharpness)


def steps(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Return the levels (L,) of a quantizer and the thresholds (L - 1,) between them, in float64, found by bisection.

    Raises:
        InputError: for a quantizer without a grid, or whose hard map does not rise from level to level.
    """
    levels = quantizer.levels(torch.float64)
    if levels is None or len(levels) < 2:
        raise InputError(f"{type(quantizer).__name__} has no grid of levels, so its jumps cannot be smoothed")
    if not quantizer.elementwise:
        raise InputError(
            f"{type(quantizer).__name__} quantizes a tensor as a whole (a mean or a scale of its values takes part), so there are "
            "no thresholds that hold for every value"
        )
    levels = levels.detach().cpu()
    reach = 4 * float(levels.abs().max()) + 4
    low = torch.full((len(levels) - 1,), -reach, dtype=torch.float64)
    high = -low
    middles = (levels[:-1] + levels[1:]) / 2
    with torch.no_grad():
        if not bool((quantizer.hard(high) > middles).all() and (quantizer.hard(low) < middles).all()):
            raise InputError(f"the hard map of {type(quantizer).__name__} does not rise through all its levels")
        for _ in range(80):
            middle = (low + high) / 2
            above = quantizer.hard(middle) > middles
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return levels, high
