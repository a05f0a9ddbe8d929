r"""Mirror descent on binary weights: the gradient at w moves the weight in the coordinates of a mirror map.

With P(theta) = tanh(beta theta), or the softmax over the two levels, and w = P(theta):

    P^-1(w_new) = P^-1(w) - lr dl/dw

    "stable" (MD-tanh-S, MD-softmax-S)     keep theta:   w = tanh(beta theta),   theta <- theta - lr dl/dw
                                           the gradient at w goes to theta without the factor beta (1 - w^2): it looks like a
                                           straight-through estimator, and it is mirror descent
    "primal" (MD-tanh, MD-softmax)         keep w:       w <- (w - t) / (1 - w t),   t = tanh(beta lr dl/dw)
                                           = (E - 1) / (E + 1),   E = (1 + w) / (1 - w) exp(-2 beta lr dl/dw)

Both are the same trajectory while beta is constant. When beta grows, the stable form sharpens all weights at once and flips
none; in the primal form beta is a factor of the step, and w is not sharpened again: it has to walk to ±1 on its own, and in a
short run needs a larger lr to get there (0.1 on two moons). Deployed: the sign.

Softmax over (-1, +1) in theta_+, theta_- is the tanh in h = (theta_+ - theta_-) / 2, in both forms, with SGD and with Adam
(g_+ = -g_-): one number for each weight is kept. What `form` changes is the start: h is half the difference of two draws.

With Adam lr dl/dw is the step of Adam, lr m^ / (sqrt(v^) + eps), as in the authors' code.

Schedule: beta is multiplied by `beta_rate` at `beta_updates` equal steps of the run, up to 1e35.

Source: Ajanthan, Gupta, Torr, Hartley, Dokania, Mirror Descent View for Neural Network Quantization, AISTATS 2021, arXiv
1910.08237; constants from the authors' code (kartikgupta-at-anu/md-bnn), 100000 iterations of batch 128, Adam at 1e-3,
no weight decay, every parameter binary, batch norm without scale and shift:

    net, data             beta_rate (tanh-S / softmax-S / tanh / softmax)      updates of beta
    ResNet-18, CIFAR-10   1.02 / 1.02 / 1.01 / 1.02                            500 / 500 / 1000 / 500
    VGG-16, CIFAR-10      1.2  / 1.2  / 1.1  / 1.05                             50 / 50 / 100 / 200

with lr multiplied by 0.2 or 0.3 every 30000 iterations.
Deviations: the defaults (rate 1.1, 60 updates, lr 0.01, cosine) are for runs of some hundred steps;
|w| <= 1 - eps in the primal form, so that no weight is stuck at +-1 (they add 1e-20 to denominators).

Shapes: theta, h, w are those of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_weights.pmf import sharpness
from qlab.methods.catalog import CATALOG
from qlab.proximal import tanh_map, tanh_step
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.base import Rule
from qlab.quantizers.declared import Declared

__all__ = ["MirrorAdam", "MirrorDescent", "MirrorSGD", "MirrorWeight", "xavier"]

Form = Literal["tanh", "softmax"]
Variant = Literal["stable", "primal"]


def xavier(shape: torch.Size) -> float:
    """Return sqrt(6 / (fan_in + fan_out)) of a weight (O, K, ...); a bias (O,) counts as O inputs and outputs."""
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * field, (shape[1] if len(shape) > 1 else shape[0]) * field
    return math.sqrt(6 / (fan_in + fan_out))


class MirrorWeight(Quantizer):
    """w = tanh(beta theta) with the gradient passed on as it is, or w itself; deployed the sign.

    Args:
        form: "tanh" or "softmax": how the start is drawn.
        variant: "stable" keeps theta, "primal" keeps w.
        start: "xavier", the authors', or "net" for the net's own weights as theta.
    """

    bits = 1
    beta: Tensor

    def __init__(
        self, form: Form = "tanh", variant: Variant = "stable", start: Literal["xavier", "net"] = "xavier"
    ) -> None:
        super().__init__()
        self.form, self.variant, self.start = form, variant, start
        self.register_buffer("beta", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, latent: Tensor) -> Tensor:
        """Return tanh(beta theta), or w."""
        if self.variant == "primal":
            return latent.clone()
        return Declared.apply(latent, tanh_map(latent.detach(), self.beta), latent.new_ones(()))

    def hard(self, latent: Tensor) -> Tensor:
        """Return the sign."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the identity: the gradient passes as it is."""
        return lambda x: x

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw theta, and map it to w for the primal form (beta is 1 at the start)."""
        theta = latent
        if self.start == "xavier":
            draws = [
                2 * torch.rand(latent.shape, generator=generator) - 1 for _ in range(2 if self.form == "softmax" else 1)
            ]
            theta = xavier(latent.shape) * (draws[0] if len(draws) == 1 else (draws[0] - draws[1]) / 2)
        return theta if self.variant == "stable" else tanh_step(tanh_map(theta), torch.zeros_like(theta))

    def extra_repr(self) -> str:
        """Name form, variant and beta."""
        return f"{self.form}, {self.variant}, beta={float(self.beta):g}"


class _Mirrored:
    """An optimizer of torch whose step d is taken in the mirror's coordinates where a group has a `beta`.

        w <- tanh(atanh(w) - beta d)

    The optimizer starts from zero there, so that what it leaves is -d, to the last bit.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mirrored = [(w, w.clone(), g["beta"]) for g in self.param_groups if g["beta"] for w in g["params"]]
        try:
            for w, _, _ in mirrored:
                w.zero_()
            super().step()  # type: ignore[misc]
        except BaseException:  # an interrupt too: never leave zeros behind
            for w, before, _ in mirrored:
                w.copy_(before)
            raise
        for w, before, beta in mirrored:
            w.copy_(tanh_step(before, -beta * w))
        return loss


class MirrorAdam(_Mirrored, torch.optim.Adam):  # type: ignore[misc]
    """Adam in the mirror's coordinates."""


class MirrorSGD(_Mirrored, torch.optim.SGD):  # type: ignore[misc]
    """SGD with momentum in the mirror's coordinates."""


class MirrorDescent(Method):
    """Mirror descent for binary weights: MD-tanh-S by default.

    Args:
        net: a plain net or the spec of one.
        form: mirror map, "tanh" or "softmax" over the two levels.
        variant: "stable" keeps theta, "primal" the weights themselves.
        start: "xavier" draws theta as the authors do, "net" takes the net's own weights for it.
        beta_rate: factor of beta at every update.
        beta_updates: updates of beta in the whole run.
        lr: learning rate; the authors' 1e-3 in 100000 steps.
        optimizer: "adam", as the authors, or "sgd" with momentum.
        momentum: of sgd.
        lr_schedule: "cosine" to zero over the run, "exponential" to `lr_end` times the start, or "constant".
        lr_end: share of the learning rate left at the end of an exponential schedule.
        loss: "cross_entropy" or "squared_hinge".
        keep: layers left in float: "first", "last", or module names.
        biases: binarize biases too, as the authors do with every parameter.
        reestimate_bn: re-estimate batch-norm statistics with the hard weights before evaluation.
        seed: of the start.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["mirror_descent"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        form: Form = "tanh",
        variant: Variant = "stable",
        start: Literal["xavier", "net"] = "xavier",
        beta_rate: float = 1.1,
        beta_updates: int = 60,
        lr: float = 0.01,
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        lr_end: float = 1e-3,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
        keep: Sequence[str] = (),
        biases: bool = True,
        reestimate_bn: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value, good, expected in (
            ("form", form, form in ("tanh", "softmax"), "'tanh' or 'softmax'"),
            ("variant", variant, variant in ("stable", "primal"), "'stable' or 'primal'"),
            ("start", start, start in ("xavier", "net"), "'xavier' or 'net'"),
            ("beta_rate", beta_rate, 1 <= beta_rate < math.inf, "a number of at least 1"),
            ("beta_updates", beta_updates, beta_updates >= 0, "at least 0"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(
            net,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            lr_schedule=lr_schedule,
            lr_end=lr_end,
            loss=loss,
            keep=keep,
            biases=biases,
            reestimate_bn=reestimate_bn,
            seed=seed,
        )

    def weight_quantizer(self) -> Quantizer:
        """Return the mirrored weight."""
        return MirrorWeight(self.h.form, self.h.variant, self.h.start)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return beta."""
        return {"beta": sharpness(progress, self.h.beta_rate, self.h.beta_updates)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer; in the primal form with the mirror step on the weights."""
        h = self.h
        latent = [t.latent for t in quantized_tensors(self.net)]
        binary = {id(p) for p in latent}
        groups = [
            {"params": latent, "beta": 1.0 if h.variant == "primal" else 0.0},
            {"params": [p for p in self.parameters() if id(p) not in binary], "beta": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if h.optimizer == "sgd":
            return MirrorSGD(groups, lr=h.lr, momentum=h.momentum)
        return MirrorAdam(groups, lr=h.lr)

    def begin_step(self, total: int) -> None:
        """Give the optimizer the beta of this step."""
        super().begin_step(total)
        beta = next(t.quantizer.get_buffer("beta") for t in quantized_tensors(self.net))
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            if group["beta"]:
                group["beta"] = float(beta)
