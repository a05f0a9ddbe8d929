r"""PMF, proximal mean-field: every weight is a distribution over the levels, sharpened until it is one of them.

    u = softmax(beta theta) over the levels q,   w = q . u,     dl/dtheta = beta (diag(u) - u u^T) q dl/dw
    beta <- rate beta at fixed intervals;   deployed: argmax u

For binary levels q = (-1, +1) one latent number is enough. With h = (theta_+ - theta_-) / 2:

    w = tanh(beta h)          (u_+ = (1 + w) / 2)
    SGD on the pair:          h <- h - lr beta (1 - w^2) / 2 dl/dw
    SGD on h ("GD-tanh"):     h <- h - lr beta (1 - w^2) dl/dw

So GD-tanh with half the learning rate is PMF; with Adam, which is free of the gradient's scale, they are the same up to its
epsilon. This file trains h. Deployed: sign(h) = argmax u.

The gradient is the true one and vanishes with 1 - w^2 as beta grows: weights stop changing sign, and annealing has to be slow
against learning. Mirror descent (`mirror_descent`) drops the factor.

Schedule: beta is multiplied by `beta_rate` at `beta_updates` equal steps of the run, up to 1e35.

Source: Ajanthan, Dokania, Hartley, Torr, Proximal Mean-field for Neural Network Quantization, ICCV 2019, arXiv 1812.04353; GD-tanh
from the code of mirror descent by the same authors (kartikgupta-at-anu/md-bnn).
Deviations: rate and interval are tuned for each net by the authors; the defaults (1.1 at 60 steps, beta = 304 at the end) are
for short runs. The lab's nets keep their own start.

Shapes: h, w are those of the weight; u and theta have the levels as a last axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.proximal import tanh_map
from qlab.quantizers import Quantizer, hard_sign
from qlab.quantizers.base import Rule

__all__ = ["PMF", "MeanField", "sharpness"]

LARGEST_BETA = 1e35


def sharpness(progress: float, rate: float, updates: int) -> float:
    """Return beta at `progress` in [0, 1]: rate to the number of updates so far, at most 1e35."""
    exponent = math.floor(progress * updates + 1e-9) * math.log(rate)
    return math.exp(min(exponent, math.log(LARGEST_BETA)))


class MeanField(Quantizer):
    """w = tanh(beta h), the mean of a distribution over (-1, +1), with its true gradient; deployed sign(h)."""

    bits = 1
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, latent: Tensor) -> Tensor:
        """Return tanh(beta h)."""
        return tanh_map(latent, self.beta)

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(h), the likelier level."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the forward map itself: its derivative is the backward rule."""
        beta = float(self.beta)
        return lambda x: tanh_map(x, beta)

    def extra_repr(self) -> str:
        """Name beta."""
        return f"beta={float(self.beta):g}"


class PMF(Method):
    """Proximal mean-field for binary weights, by one latent number for each.

    Args:
        net: a plain net or the spec of one.
        beta_rate: factor of beta at every update.
        beta_updates: updates of beta in the whole run.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["pmf"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        beta_rate: float = 1.1,
        beta_updates: int = 60,
        **kwargs: Any,
    ) -> None:
        if not 1 <= beta_rate < math.inf:
            raise InputError(f"beta_rate must be a number of at least 1, not {beta_rate!r}")
        if not 0 <= beta_updates < math.inf:
            raise InputError(f"beta_updates must be a finite number of at least 0, not {beta_updates!r}")
        super().__init__(net, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the mean-field weight."""
        return MeanField()

    def schedule(self, progress: float) -> dict[str, float]:
        """Return beta."""
        return {"beta": sharpness(progress, self.h.beta_rate, self.h.beta_updates)}
