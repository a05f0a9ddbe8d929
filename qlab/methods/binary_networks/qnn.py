r"""QNN: weights, activations and gradients of a few bits in training too; with one bit of each of the first two, BNN.

    W_q = q(W),   s = a_q W_q,   a = BN(s),   a_q = q(a)              nothing is quantized after the last layer
    backward:     g_W = g_{W_q},   g_a = 1[|a| <= window] g_{a_q},    both products of the layer's backward pass use Q(g_s)
    after a step: W <- clip(W, -1, 1)

q has k bits on [-1, 1] (`qlab.quantizers.kbit`): one bit is the sign, sign(0) = +1, or at random +1 with probability
clip((x + 1) / 2, 0, 1), whose mean is clip(x, -1, 1). Draws stay for a step; evaluation and deployment are deterministic. The
gradient is that of the clip. Q, where wanted, rounds the gradient of every layer's output to k bits: to powers of two or, for
contrast, on an even grid up to the largest entry; to the nearest or at random, without bias.

Latents start from U(-1, 1), and their updates are multiplied by gamma_k = 1 / sqrt(1.5 / (fan_in + fan_out)) (its square for
SGD; the power of two next to it for shift-based AdaMax). `shift_norm` and `optimizer="shift_adamax"` are the paper's
shift-based batch norm and AdaMax (`qlab.methods.binary_networks.shift`). The loss is the squared hinge.

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, JMLR 18 (2018), arXiv 1609.07061; its one-bit
part is Binarized Neural Networks, NeurIPS 2016, arXiv 1602.02830. gamma_k, start and loss as in the authors' code.
Deviations: no layer of the paper is in float, and its nets have batch norm on the logits: `keep=()` with `final_norm=True` of
`qlab.models`. The default keeps the last layer in float, for nets without it. The first reads real inputs with binary weights,
which pack on the bit planes of the image. No code of quantized gradients is public: their codes, and their rounding at random,
are a reconstruction.

Shapes: W (O, K, ...) of the plain net; s, a and g_s (N, O, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_networks.shift import ShiftAdaMax, plain_norms, with_shift_norm
from qlab.methods.binary_weights.binary_connect import glorot
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, Sign, Surrogate, quantized_tensors
from qlab.quantizers.gradients import quantized_outputs, unit_noise
from qlab.quantizers.kbit import Grid, KBit, ap2, linear_scaled, log_quantize

__all__ = ["QNN"]


class QNN(Method):
    """Quantized neural network; binarized with the defaults.

    Args:
        net: a plain net or the spec of one.
        weight_bits: k of the weights, 1 to 16; None leaves them in float.
        activation_bits: k of the activations, 1 to 16; None leaves the nonlinearities.
        grid: levels of more than one bit: "odd" (an even number, none at zero), "linear" (fixed point) or "log" (powers of
            two, up to 8 bits).
        row_scale: weights are levels times a float of each row, max|W| (mean|W| for one bit).
        stochastic_neurons: draw the activations in training, as the authors' Torch code does.
        stochastic_weights: draw the weights in training.
        window: largest |a| that the gradient passes at. The paper widens it to 1.25 on ImageNet.
        gradient_bits: k of the gradients of layers' outputs, 2 to 8; the paper's 6. None leaves them in float.
        gradient_grid: "log", the paper's, or "linear".
        gradient_stochastic: round gradients at random; the paper rounds to the nearest.
        shift_norm: shift-based batch norm in place of every one but the last.
        optimizer: "adam", "sgd", or the paper's "shift_adamax".
        glorot_lr: multiply updates of latent weights by gamma_k.
        clamp: clip latent weights to [-1, 1] after every step.
        halvings: halve the learning rate this many times over the run, in place of `lr_schedule`: shifts to the right.
        lr: learning rate, for small nets and short runs. The paper has 0.003 or 0.001 with adam, 2^-6 or 2^-10 with
            shift_adamax.
        lr_schedule: the paper's with adam decays exponentially.
        loss: the paper's is the squared hinge.
        keep: layers left in float; none in the paper, whose nets have batch norm on the logits.

    Raises:
        InputError: for a hyperparameter out of range or without effect beside another, or `shift_norm` on a net without batch
            norm.
    """

    info = CATALOG["qnn"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        weight_bits: int | None = 1,
        activation_bits: int | None = 1,
        grid: Grid = "odd",
        row_scale: bool = False,
        stochastic_neurons: bool = False,
        stochastic_weights: bool = False,
        window: float = 1.0,
        gradient_bits: int | None = None,
        gradient_grid: Literal["log", "linear"] = "log",
        gradient_stochastic: bool = False,
        shift_norm: bool = False,
        optimizer: Literal["adam", "sgd", "shift_adamax"] = "adam",
        glorot_lr: bool = True,
        clamp: bool = True,
        halvings: int | None = None,
        lr: float = 0.03,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "exponential",
        loss: Literal["cross_entropy", "squared_hinge"] = "squared_hinge",
        keep: Sequence[str] = ("last",),
        **kwargs: Any,
    ) -> None:
        for name, value, good, expected in (
            ("optimizer", optimizer, optimizer in ("adam", "sgd", "shift_adamax"), "adam, sgd or shift_adamax"),
            ("gradient_grid", gradient_grid, gradient_grid in ("log", "linear"), "log or linear"),
            (
                "gradient_bits",
                gradient_bits,
                gradient_bits is None or _whole(gradient_bits, 2, 8),
                "None or from 2 to 8",
            ),
            ("halvings", halvings, halvings is None or _whole(halvings, 0, 60), "None or a whole number from 0 to 60"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        if gradient_bits is not None and weight_bits is None:
            raise InputError("gradients are quantized behind layers with quantized weights: give weight_bits too")
        if optimizer == "shift_adamax" and kwargs.get("weight_decay"):
            raise InputError("shift_adamax has no weight decay: weight_decay must be 0, or optimizer adam or sgd")
        super().__init__(
            net,
            optimizer=optimizer,  # type: ignore[arg-type]
            lr=lr,
            lr_schedule=lr_schedule,
            loss=loss,
            keep=keep,
            **kwargs,
        )
        if shift_norm:
            self.net = with_shift_norm(self.net)
        self._passes = 0

    def _check_hyperparameters(self) -> None:
        optimizer = self.hparams.pop("optimizer")  # checked above: the base class knows only two of the three
        super()._check_hyperparameters()
        self.hparams["optimizer"] = optimizer

    def weight_quantizer(self) -> Quantizer | None:
        """Return the levels of one weight."""
        h = self.h
        if h.weight_bits is None:
            return None
        grid: Grid = "odd" if h.weight_bits == 1 else h.grid
        return KBit(h.weight_bits, grid, rows=h.row_scale, stochastic=h.stochastic_weights, uniform=True)

    def activation_quantizer(self) -> Quantizer | None:
        """Return the levels of one place; one deterministic bit is the sign that all of the lab knows."""
        h = self.h
        if h.activation_bits is None:
            return None
        levels = KBit(
            h.activation_bits, "odd" if h.activation_bits == 1 else h.grid, False, h.stochastic_neurons, h.window
        )
        if h.activation_bits > 1 or h.stochastic_neurons:
            return levels
        end = levels.window
        return Sign(
            "clipped"
            if end == 1
            else Surrogate("clipped", lambda x: (x.abs() <= end).to(x.dtype), lambda x: x.clamp(-end, end))
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return a group for the float parameters and one for each latent tensor, with the scale of its updates."""
        h = self.h
        latent = [t.latent for t in quantized_tensors(self.net)]
        taken = {id(p) for p in latent}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if id(p) not in taken]}]
        for p in latent:
            factor = 1 / glorot(p.shape) if h.glorot_lr else 1.0
            if h.optimizer == "shift_adamax":
                groups.append({"params": [p], "scale": float(ap2(torch.tensor(factor, dtype=torch.float64)))})
            else:
                groups.append({"params": [p], "lr": h.lr * factor ** (2 if h.optimizer == "sgd" else 1)})
        return [group for group in groups if group["params"]]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer named by the hyperparameters."""
        if self.h.optimizer == "shift_adamax":
            return ShiftAdaMax(self.parameter_groups(), lr=self.h.lr)
        return super().make_optimizer()

    def lr_factor(self, progress: float) -> float:
        """Return the share of `lr` in force at `progress` in [0, 1]."""
        if self.h.halvings is None:
            return super().lr_factor(progress)
        return 2.0 ** -int(min(max(progress, 0.0), 1 - 1e-9) * (self.h.halvings + 1))

    def begin_step(self, total: int) -> None:
        """Prepare the step, and count its backward passes from zero."""
        super().begin_step(total)
        self._passes = 0

    def rewrite(self, g: Tensor, noise: torch.Generator) -> Tensor:
        """Return Q(g) of the gradient of a layer's output."""
        h = self.h
        u = unit_noise(g, noise) if h.gradient_stochastic else None
        return (log_quantize if h.gradient_grid == "log" else linear_scaled)(g, h.gradient_bits, u)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss; layers with quantized weights get quantized gradients back, where wanted."""
        if self.h.gradient_bits is None:
            return super().objective(x, y)
        noise = generator("qnn", self.h.seed, self.steps, self._passes)  # a step may have several passes
        self._passes += 1
        with quantized_outputs(self.net, lambda name, g: self.rewrite(g, noise)):
            logits = self.net(x)
        return self.loss(logits, y)

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)

    def hardened(self, calibration: Sequence[Tensor] | None = None) -> nn.Module:
        """Return the net as it would be shipped: shift-based batch norms become ordinary ones with powers of two."""
        return plain_norms(super().hardened(calibration))


def _whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
