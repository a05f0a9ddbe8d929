r"""Regularizers of binary nets: of the weights and of the features that stand before a sign.

    bnnplus        sum | alpha - |u| |^power, least at u = +-alpha
    activation     mean over channels of (m^2 - d^2)_+ + ((d - 4)_+)^2 + ((2 - |m| - d)_+)^2
    sign_entropy   mean over channels of H(mean sigmoid(5 x)), H in bits

m and d are mean and deviation of a channel over batch and positions.

Source: Darabi et al., BNN+, arXiv 1812.11800; Ding, Chin, Liu, Marculescu, Regularizing Activation Distribution for Training
Binarized Deep Networks, CVPR 2019, arXiv 1904.02823, and the authors' code. The entropy is the lab's own.

Shapes: u that of a weight (O, ...), x (N, C, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from qlab.quantizers.filters import filter_scale
from qlab.quantizers.information import entropy
from qlab.quantizers.repair import FeatureSign

__all__ = ["activation_loss", "bnnplus", "inputs_of_signs", "sign_entropy"]

ENTROPY_SHARPNESS = 5.0


def bnnplus(u: Tensor, power: Literal[1, 2], alpha: float | None = 1.0) -> Tensor:
    """Return sum | alpha - |u| |^power; alpha None is the mean |u| of each filter, a constant in the gradient."""
    target = filter_scale(u.detach()) if alpha is None else alpha
    return (target - u.abs()).abs().pow(power).sum()


def _of_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def activation_loss(x: Tensor) -> Tensor:
    """Return the mean over channels of (m^2 - d^2)_+ + ((d - 4)_+)^2 + ((2 - |m| - d)_+)^2 for x (N, C, ...).

    The three terms are degeneration (all values have one sign), saturation (the surrogate's slope is zero) and gradient mismatch.
    """
    dims = _of_channels(x)
    m, d = x.mean(dims), x.std(dims, correction=0)
    degenerate, saturated, mismatched = m**2 - d**2, d - 4, 2 - m.abs() - d
    return (degenerate.clamp(min=0) + saturated.clamp(min=0) ** 2 + mismatched.clamp(min=0) ** 2).mean()


def sign_entropy(x: Tensor) -> Tensor:
    """Return the mean over channels of the entropy, in bits, of a soft sign of x (N, C, ...); 1 at most."""
    return entropy(torch.sigmoid(ENTROPY_SHARPNESS * x).mean(_of_channels(x))).mean()


@contextmanager
def inputs_of_signs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what every feature quantizer reads while the net runs inside the `with` block."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        found.append(inputs[0])

    hooks = [m.register_forward_pre_hook(keep) for m in net.modules() if isinstance(m, FeatureSign)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
