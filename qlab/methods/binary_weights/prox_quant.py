r"""ProxQuant: the float weights themselves are trained, and a proximal step pulls them towards +-1 after every update.

    theta <- prox_t( theta - lr dl/dtheta ),   t = lr lambda_t;     then clip to [-1, 1]

    R = sum min(|x - 1|, |x + 1|)              prox_t: a step of t towards sign(x) that stops there        "l1"
    R = 1/2 sum min((x - 1)^2, (x + 1)^2)      prox_t: (x + t sign(x)) / (1 + t)                           "squared"

The gradient is taken at the weights that are not quantized; BinaryConnect takes it at the signs (its step is the prox with t
= 1 before the forward pass, undone after it). lambda_t grows from zero in proportion to the epoch. At the share `freeze` of
the run weights become their signs and stay; what is left in float (batch norm) trains on. The prox never changes a sign, and
+-1 are its fixed points.

The prox binarizes by sum t = sum lr lambda_t, which has to reach the distance of the weights from +-1. So
    * weights must be of order 1 when training starts: `start="uniform"` draws U(-1, 1); the authors start from a trained net;
    * a learning rate that falls to zero switches the prox off: it is constant here.

Schedule: lambda = reg_rate * epoch of a run of `schedule_epochs`, stretched over the run at hand.

Source: Bai, Wang, Liberty, ProxQuant: Quantized Neural Networks via Proximal Operators, ICLR 2019, arXiv 1810.00861; constants
from the authors' code (allenbai01/ProxQuant): reg_rate 1e-4 in 300 epochs, freeze at epoch 200, Adam at 0.01, batch 128, from
a trained float net (`reg_rate=1e-4, schedule_epochs=300, lr=0.01, start="net"`).
Deviations: the defaults are for runs of some hundred steps, in which sum t of the authors' rate would be 0.01 and the freeze a
bare sign. They keep batch norm, shortcuts and the last bias in float; ternary weights, which they have too, stand in
`qlab.proximal.ternary` only: their two scales for each layer do not fit one scale and levels.

Shapes: theta is that of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.proximal import prox_distance, prox_squared_distance
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.base import Rule

__all__ = ["ProxQuant", "Pulled"]

REGULARIZERS = {"l1": prox_distance, "squared": prox_squared_distance}


class Pulled(Quantizer):
    """The weight itself, until it is frozen at its sign; deployed sign(theta).

    Args:
        start: "uniform" for U(-1, 1), "net" for the net's own weights.
    """

    bits = 1
    lambda_: Tensor
    frozen: Tensor

    def __init__(self, start: Literal["uniform", "net"] = "uniform") -> None:
        super().__init__()
        self.start = start
        self.register_buffer("lambda_", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("frozen", torch.tensor(0.0))

    def forward(self, latent: Tensor) -> Tensor:
        """Return theta; once frozen sign(theta), with a gradient of zero."""
        return torch.where(self.frozen > 0, hard_sign(latent.detach()), latent)

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the identity."""
        return lambda x: x

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents as `start` says."""
        return latent if self.start == "net" else 2 * torch.rand(latent.shape, generator=generator) - 1

    def extra_repr(self) -> str:
        """Name lambda and whether the weight is frozen."""
        return f"lambda={float(self.lambda_):g}" + (", frozen" if self.frozen > 0 else "")


class ProxQuant(Method):
    """ProxQuant for binary weights.

    Args:
        net: a plain net or the spec of one.
        regularizer: "l1", the W-shaped one of the paper, or "squared".
        reg_rate: lambda grows by it in every epoch of the schedule; the authors' 1e-4.
        schedule_epochs: epochs of the run for which `reg_rate` was chosen, stretched over the run at hand; the authors' 300.
        freeze: share of the run after which weights are their signs and stay; 1 for never.
        start: "uniform" draws U(-1, 1), "net" takes the net's own weights, as the authors do with a trained one.
        lr: learning rate; the authors' 0.01.
        lr_schedule: constant, as the authors': the prox steps have the size lr lambda.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["prox_quant"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        regularizer: Literal["l1", "squared"] = "l1",
        reg_rate: float = 0.01,
        schedule_epochs: int = 60,
        freeze: float = 2 / 3,
        start: Literal["uniform", "net"] = "uniform",
        lr: float = 0.1,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "constant",
        **kwargs: Any,
    ) -> None:
        for name, value, good, expected in (
            ("regularizer", regularizer, regularizer in REGULARIZERS, "'l1' or 'squared'"),
            ("reg_rate", reg_rate, 0 <= reg_rate < math.inf, "a number of at least 0"),
            ("schedule_epochs", schedule_epochs, 1 <= schedule_epochs < math.inf, "a finite number of at least 1"),
            ("freeze", freeze, 0 < freeze <= 1, "a share of the run in (0, 1]"),
            ("start", start, start in ("uniform", "net"), "'uniform' or 'net'"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        if not reg_rate * schedule_epochs < math.inf:
            raise InputError(
                f"with reg_rate={reg_rate!r} and schedule_epochs={schedule_epochs!r} lambda overflows at the end of the run; "
                "lower one of them"
            )
        super().__init__(net, lr=lr, lr_schedule=lr_schedule, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the pulled weight."""
        return Pulled(self.h.start)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return lambda, in proportion to the epoch of the schedule, and whether weights are frozen (0 or 1)."""
        h = self.h
        epoch = math.floor(progress * h.schedule_epochs + 1e-9)
        return {"lambda_": h.reg_rate * epoch, "frozen": float(h.freeze < 1 and progress >= h.freeze)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hide frozen weights from the optimizer, whose momentum and weight decay would move them."""
        for t in quantized_tensors(self.net):
            if t.quantizer.get_buffer("frozen") > 0:
                t.latent.grad = None

    def post_step(self) -> None:
        """Take the proximal step with the learning rate in force, then clip to [-1, 1]."""
        self.prox_step(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    @torch.no_grad()
    def prox_step(self, lr: float) -> None:
        """Put every weight at its prox with t = lr lambda, clipped to [-1, 1]; frozen ones at their signs."""
        prox = REGULARIZERS[self.h.regularizer]
        for t in quantized_tensors(self.net):
            q = hard_sign(t.latent)
            if t.quantizer.get_buffer("frozen") > 0:
                t.latent.copy_(q)
            else:
                t.latent.copy_(prox(t.latent, q, lr * float(t.quantizer.get_buffer("lambda_"))).clamp(-1, 1))
