r"""BinaryRelax: weights are pulled towards scaled signs, ever harder, then put on them.

The constraint w in Q = {s b : s >= 0, b in {-1, +1}^n} of a layer is replaced by eta/2 dist(w, Q)^2. With the projection
q(theta) = s sign(theta), s = mean|theta| of the layer:

    phase I     w = (theta + eta q(theta)) / (1 + eta)       = argmin_w  eta/2 dist(w, Q)^2 + 1/2 |w - theta|^2
                eta <- rate eta, once an epoch
    phase II    w = q(theta)
    always      theta <- theta - lr dl/dw                    the gradient at w goes to theta unchanged

w never changes the sign of theta. eta = 0 is plain training in float; phase II is BinaryConnect with the scale s and no
clamp. Deployed: s sign(theta).

Schedule: the paper's run has `schedule_epochs` epochs, phase II begins at the share `phase2` of it; both are stretched over
the run at hand.

Source: Yin, Zhang, Lyu, Osher, Qi, Xin, BinaryRelax: A Relaxation Approach for Training Deep Neural Networks with Quantized
Weights, SIAM J. Imaging Sci. 2018, arXiv 1801.06313; constants from the authors' code (penhunt/binaryrelax): eta from 1,
rate 1.04, 200 epochs, phase II from epoch 150, so eta = 359 at the switch; SGD with lr 0.1, momentum 0.9, weight decay 1e-4.
Deviations: Adam at 0.01 by default, and no weight decay, since a run of a few hundred steps is too short for theirs; they
start from a trained float net and leave the last layer in float (`keep=("last",)`); their lr falls in steps of 0.1.

Shapes: theta, w are those of the layer's weight, s is a scalar.
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
from qlab.proximal import mean_abs, prox_squared_distance, scaled_signs
from qlab.quantizers import Quantizer, hard_sign
from qlab.quantizers.base import Rule
from qlab.quantizers.declared import Declared

__all__ = ["BinaryRelax", "RelaxedSigns"]

LARGEST_ETA = 1e300


class RelaxedSigns(Quantizer):
    """w between theta and s sign(theta), gradient passed on unchanged; deployed s sign(theta).

    Args:
        eta: at the start; `anneal(eta=..., phase=...)` moves it.
    """

    bits = 1
    elementwise = False
    eta: Tensor
    phase: Tensor

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("eta", torch.tensor(eta, dtype=torch.float64))
        self.register_buffer("phase", torch.tensor(1.0))

    def forward(self, latent: Tensor) -> Tensor:
        """Return (theta + eta q) / (1 + eta), in phase II q."""
        theta = latent.detach()
        eta = torch.where(self.phase >= 2, torch.full_like(self.eta, math.inf), self.eta)
        w = prox_squared_distance(theta, scaled_signs(theta), eta)
        return Declared.apply(latent, w, latent.new_ones(()))

    def hard(self, latent: Tensor) -> Tensor:
        """Return s sign(theta)."""
        return self.scale(latent) * self.level(latent)

    def scale(self, latent: Tensor) -> Tensor:
        """Return s = mean|theta|, a scalar."""
        return mean_abs(latent)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the identity: the gradient passes as it is."""
        return lambda x: x

    def extra_repr(self) -> str:
        """Name eta and the phase."""
        return f"eta={float(self.eta):g}, phase={int(self.phase)}"


class BinaryRelax(Method):
    """BinaryRelax with the authors' schedule.

    Args:
        net: a plain net or the spec of one.
        eta: weight of the penalty in the first epoch.
        rate: factor of eta per epoch of the schedule.
        schedule_epochs: epochs of the run for which `rate` was chosen; stretched over the run at hand.
        phase2: share of the run after which weights are the scaled signs; 1 for never.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["binary_relax"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        eta: float = 1.0,
        rate: float = 1.04,
        schedule_epochs: int = 200,
        phase2: float = 0.75,
        **kwargs: Any,
    ) -> None:
        for name, value, good, expected in (
            ("eta", eta, 0 <= eta < math.inf, "a number of at least 0"),
            ("rate", rate, 1 <= rate < math.inf, "a number of at least 1"),
            ("schedule_epochs", schedule_epochs, 1 <= schedule_epochs < math.inf, "a finite number of at least 1"),
            ("phase2", phase2, 0 <= phase2 <= 1, "a share of the run in [0, 1]"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        if eta > 0 and not math.log(eta) + schedule_epochs * math.log(rate) < math.log(LARGEST_ETA):
            raise InputError(
                f"with eta={eta!r}, rate={rate!r} and schedule_epochs={schedule_epochs!r} eta rate^schedule_epochs is above "
                f"{LARGEST_ETA:g}; lower one of them"
            )
        super().__init__(net, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the relaxed signs of one weight."""
        return RelaxedSigns(self.h.eta)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return eta, multiplied by the rate after every epoch of the schedule, and the phase, 1 or 2."""
        h = self.h
        epoch = math.floor(progress * h.schedule_epochs + 1e-9)
        return {"eta": h.eta * h.rate**epoch, "phase": 2.0 if progress >= h.phase2 else 1.0}
