"""Binarization: sign with sign(0) = +1, and any surrogate derivative.

forward:   x_q = sign(x) in {-1, +1} backward:  dL/dx = dL/dx_q * d(x),  d from `qlab.quantizers.surrogates`
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.quantizers.base import PseudoDerivative, Quantizer, Rule
from qlab.quantizers.surrogates import Surrogate, surrogate

__all__ = ["Sign", "hard_sign"]


def hard_sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 where x < 0, in the dtype of x; torch.sign(0) = 0 would make a third level.

    NaN stays NaN: a sign of it would hide a diverged weight or spoiled data behind a plausible number.
    """
    return torch.where(x.isnan(), x, (x >= 0).to(x.dtype).mul(2).sub(1))


class Sign(Quantizer):
    """Sign with a surrogate derivative, for weights or activations.

    Args:
        which: surrogate name, elementwise function d(x), or `Surrogate`.
        sharpness: for tanh, swish, erf; see `surrogate`.

    Raises:
        UnknownNameError, InputError: from `surrogate`.
    """

    bits = 1

    def __init__(self, which: str | Rule | Surrogate = "clipped", sharpness: float | None = None) -> None:
        super().__init__()
        self.surrogate = surrogate(which, sharpness)

    def forward(self, latent: Tensor) -> Tensor:
        """Return signs of the shape of `latent`."""
        return PseudoDerivative.apply(latent, hard_sign, self.surrogate.derivative)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule | None:
        """Return the function whose derivative the surrogate is."""
        return self.surrogate.primitive

    def extra_repr(self) -> str:
        """Name the surrogate."""
        k = self.surrogate.sharpness
        return self.surrogate.name + (f", sharpness={k:g}" if k is not None else "")
