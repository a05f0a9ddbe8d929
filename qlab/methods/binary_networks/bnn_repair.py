r"""Repairs of binary neural networks: every training technique that the literature combines, as a switch of one method.

    w = sign of a normalised latent weight, maybe scaled         `weight_binarizer`, `weight_norm`, `scaling`
    a = sign(x), or 1[x >= 0]                                    `feature_binarizer`, `features`
    L = (1 - mu) CE + mu T^2 KL(teacher || student)              `teacher`, `teacher_loss`; other losses below
        + lam R                                                  `regularizer`

    wd             R = sum theta^2                               with stages="two" in the first stage only
    bnnplus_l1     R = sum | alpha - |u| |                       u: what stands before the sign of a weight
    bnnplus_l2     R = sum (alpha - |u|)^2                       alpha a constant, or the mean |u| of each filter
    distribution   R = sum over layers of the mean over channels of (m^2 - d^2)_+ + ((d - 4)_+)^2 + ((2 - |m| - d)_+)^2
                   m, d: mean and deviation of a channel before Sgn, over batch and positions; zero for m = 0, 2 <= d <= 4
    entropy        R = - sum over layers of the mean over channels of H(mean sigmoid(5 x)), H in bits
    label_smoothing  the labels of CE are smoothed by lam instead

Teacher losses, mu = teacher_weight: "kd" as above; "distribution" - sum softmax(z_t) log softmax(z_s) alone, without labels;
"attention" and "rbd" CE + mu times the distance of representations at the blocks of quantized layers (`qlab.methods.teacher`).

Stages, e = stage_end of the run:
    one            binary from the start
    two            progress < e: binary features, float weights u; then both binary. The learning-rate schedule runs twice
    progressive    w <- (1 - lam) u + lam w,  lam = min(progress / e, 1)
    soft_sign      features and weights tanh(beta .), beta = beta_end^(progress / e) from 1 on; signs once progress >= e

`deployed()` is binary at any moment. The quantities of scheduled surrogates (t, o, q, tau of ReCU) stand in
`qlab.quantizers.repair_surrogates` and `qlab.quantizers.repair`. What costs energy or area at inference (activations, double
residuals, gates, ...) are options of the nets `repair20` and `repair18`; the switches here cost nothing there, for a factor of each
filter is taken up by the batch norm behind it.

Source: de Putter, Corporaal, How to train accurate BNNs for embedded systems?, 2022, arXiv 2206.12322: the categories, and the
idea to switch one at a time. Its code is not public and its exact variants could not be had: the switches are those of the
papers they come from (ReActNet, arXiv 2003.03488; Real-to-Binary, arXiv 2003.11535; Bi-Real Net, arXiv 1808.00278; IR-Net, arXiv
1909.10788; BNN+, arXiv 1812.11800; Ding et al., Regularizing Activation Distribution, arXiv 1904.02823; Bop, arXiv 1906.02107).
Deviations: Adam keeps its state from the first stage to the second; the constants of "entropy" and the ramps of "progressive" and
"soft_sign" are the lab's; RBNN's rotation, FDA's noise adaptation and chains of teachers (train one run after the other) are left
out. Settings of the papers: Adam, lr 1e-3 or 2.5e-3, linear decay (here cosine), batch 256 to 512; SGD, lr 0.1.

Shapes: theta and w are those of the weight, x (N, C, ...), logits (N, classes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_networks.repair_losses import activation_loss, bnnplus, inputs_of_signs, sign_entropy
from qlab.methods.binary_weights.bop import BopOptimizer
from qlab.methods.catalog import CATALOG
from qlab.methods.teacher import Teacher, attention, distribution, features, kd, over_places, places, rbd
from qlab.quantizers import Quantizer, Uniform, layers, quantized_tensors
from qlab.quantizers.repair import FeatureSign, Norm, RepairWeight, Scaling
from qlab.quantizers.repair_surrogates import SCHEDULED

__all__ = ["BNNRepair", "recu_tau"]

Feature = Literal["identity", "clipped", "polynomial", "tanh", "swish", "erf", "ede", "dte", "rbnn", "reste", "fourier"]
Weight = Literal[Feature, "recu", "magnitude_aware"]
Features = Literal["signs", "halfwave", "float"]
TeacherLoss = Literal["kd", "distribution", "attention", "rbd"]
Regularizer = Literal["none", "wd", "bnnplus_l1", "bnnplus_l2", "distribution", "entropy", "label_smoothing"]
Stages = Literal["one", "two", "progressive", "soft_sign"]
Optimizer = Literal["adam", "adamw", "sgd", "bop"]
FirstLast = Literal["float", "int8", "binary"]

SWITCHES: dict[str, Any] = {
    "feature_binarizer": Feature,
    "weight_binarizer": Weight,
    "features": Features,
    "weight_norm": Norm,
    "scaling": Scaling,
    "teacher_loss": TeacherLoss,
    "regularizer": Regularizer,
    "stages": Stages,
    "optimizer": Optimizer,
    "first_last": FirstLast,
}
"""The switches that have names, with their values."""

STAGE = {"one": "one", "two": "mix", "progressive": "mix", "soft_sign": "soft"}
LARGEST_BETA = 1e35  # a number in float32 too
STAGE_END = {"one": 1.0, "two": 0.5, "progressive": 0.8, "soft_sign": 0.8}


def recu_tau(progress: float) -> float:
    """Return ReCU's tau = A e^p + B, from 0.85 to 0.99."""
    A = (0.99 - 0.85) / (math.e - 1)
    return A * math.exp(progress) + 0.85 - A


# ------------------------------------------------------------------------------------------------------------ the method


class BNNRepair(Method):
    """A binary network with the training repairs as switches.

    Args:
        net: a plain net or the spec of one; `repair20` and `repair18` have the topology repairs.
        feature_binarizer: surrogate of the features' sign.
        weight_binarizer: surrogate of the weights' sign, "recu", or "magnitude_aware".
        features: "signs", "halfwave" (0 and 1), or "float" (the net's own nonlinearities).
        weight_norm: of each filter before its sign: "none", "center", "standardize", "l2" or "scaled_ws".
        scaling: of each filter behind its sign: "none", "alpha", "alpha_chain" or "pow2".
        first_last: first and last layer "float", "int8" (weights) or "binary".
        feature_clip: half width of the window of the features' "clipped".
        weight_clip: half width of the window of the weights' "clipped" and "magnitude_aware".
        latent_clip: latent weights are clipped to this magnitude after every step; 0 leaves them.
        sharpness: of tanh, swish and erf; None is the surrogate's default.
        gain: of weight_norm "l2" and "scaled_ws".
        dte_eps: share of values that "dte" keeps live.
        teacher: the path of a checkpoint or a net; None trains without one.
        teacher_loss: "kd", "distribution", "attention" or "rbd".
        teacher_weight: mu: the share of "kd", in [0, 1]; the factor of "attention" and "rbd".
        temperature: T of "kd".
        regularizer: "none", "wd", "bnnplus_l1", "bnnplus_l2", "distribution", "entropy" or "label_smoothing".
        regularizer_weight: lam. Papers: wd 1e-5, label_smoothing 0.1.
        bnnplus_alpha: of the two bnnplus terms; None is the mean magnitude of each filter.
        stages: "one", "two", "progressive" or "soft_sign".
        stage_end: share of the run after which both are binary; None is 0.5 for "two" and 0.8 for the ramps.
        beta_end: of "soft_sign".
        optimizer: "adam", "adamw", "sgd" with momentum, or "bop" (flips binary weights; Adam on the rest).
        weight_decay: of the weights of float layers; not of latent weights, batch norm, thresholds and slopes.
        bop_gamma: share of a new gradient in Bop's average.
        bop_tau: Bop's threshold of a flip.
        keep: further layers left in float, by name.

    Raises:
        InputError: for a value that a switch does not have, a constant out of range, or switches that exclude each other.
    """

    info = CATALOG["bnn_repair"]
    optimizers_known = get_args(Optimizer)

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        feature_binarizer: Feature = "clipped",
        weight_binarizer: Weight = "clipped",
        features: Features = "signs",
        weight_norm: Norm = "none",
        scaling: Scaling = "none",
        first_last: FirstLast = "float",
        feature_clip: float = 1.0,
        weight_clip: float = 1.0,
        latent_clip: float = 1.0,
        sharpness: float | None = None,
        gain: float = 1.0,
        dte_eps: float = 0.1,
        teacher: str | nn.Module | None = None,
        teacher_loss: TeacherLoss = "kd",
        teacher_weight: float = 0.5,
        temperature: float = 1.0,
        regularizer: Regularizer = "none",
        regularizer_weight: float = 1e-4,
        bnnplus_alpha: float | None = 1.0,
        stages: Stages = "one",
        stage_end: float | None = None,
        beta_end: float = 100.0,
        optimizer: Optimizer = "adam",
        weight_decay: float = 0.0,
        bop_gamma: float = 1e-2,
        bop_tau: float = 1e-4,
        keep: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        # Kept apart: a teacher is no part of the method, its state or its hyperparameters.
        self.__dict__["_teacher"] = Teacher.of(teacher)
        teacher = Teacher.name_of(teacher)
        if first_last not in get_args(FirstLast):
            raise InputError(f"first_last must be one of {', '.join(get_args(FirstLast))}, not {first_last!r}")
        if first_last != "binary" and not isinstance(keep, str):  # a string is refused where layers are quantized
            keep = tuple(dict.fromkeys((*keep, "first", "last")))
        super().__init__(net, optimizer=optimizer, weight_decay=weight_decay, keep=keep, **kwargs)  # type: ignore[arg-type]
        if first_last == "int8":
            self._to_int8()

    def _check_hyperparameters(self) -> None:
        h = self.h
        super()._check_hyperparameters()
        for name, values in SWITCHES.items():
            if h[name] not in get_args(values):
                raise InputError(f"{name} must be one of {', '.join(get_args(values))}, not {h[name]!r}")
        end = h.stage_end
        for name, good, expected in (
            ("stage_end", end is None or 0 < end < 1, "in (0, 1)"),
            ("latent_clip", math.isfinite(h.latent_clip) and h.latent_clip >= 0, "at least 0"),
            (
                "teacher_weight",
                0 <= h.teacher_weight < math.inf and (h.teacher_loss != "kd" or h.teacher_weight <= 1),
                "at least 0 (kd: at most 1)",
            ),
            ("temperature", 0 < h.temperature < math.inf, "a positive number"),
            ("regularizer_weight", math.isfinite(h.regularizer_weight) and h.regularizer_weight >= 0, "at least 0"),
            (
                "bnnplus_alpha",
                h.bnnplus_alpha is None or 0 <= h.bnnplus_alpha < math.inf,
                "a number of at least 0, or None",
            ),
            ("beta_end", 1 < h.beta_end <= LARGEST_BETA, f"a number above 1, at most {LARGEST_BETA:g}"),
            ("bop_gamma", 0 < h.bop_gamma <= 1, "in (0, 1]"),
            ("bop_tau", h.bop_tau >= 0, "at least 0"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {h[name]!r}")
        if h.regularizer == "label_smoothing" and (h.loss != "cross_entropy" or h.regularizer_weight > 1):
            raise InputError("label_smoothing is of the cross entropy, by a share in [0, 1]: loss='cross_entropy'")
        if h.regularizer in ("distribution", "entropy") and h.features == "float":
            raise InputError(f"regularizer={h.regularizer!r} is of binary features; features='float' has none")
        plain = h.weight_binarizer == "identity" or (h.weight_binarizer == "clipped" and h.weight_clip >= 1)
        if h.optimizer == "bop" and not (plain and h.weight_norm == "none" and h.stages == "one"):
            raise InputError(
                "bop has no latent weights: it goes with weight_binarizer 'identity' or 'clipped' (weight_clip at least 1), "
                "weight_norm='none' and stages='one'"
            )

    def _to_int8(self) -> None:
        """Put the weights of the first and the last layer on an 8-bit grid of twice their starting range."""
        found = list(layers(self.net).values())
        for layer in dict.fromkeys((found[0], found[-1])):
            largest = float(layer.weight.detach().abs().max()) or 1.0
            quantizer = Uniform(8, limit=2 * largest).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", quantizer)
            layer.train(layer.training)

    def weight_quantizer(self) -> Quantizer:
        """Return the binary weight with its repairs."""
        h = self.h
        return RepairWeight(
            h.weight_binarizer,
            norm=h.weight_norm,
            scaling=h.scaling,
            stage=STAGE[h.stages],  # type: ignore[arg-type]
            gain=h.gain,
            sharpness=h.sharpness if h.weight_binarizer in ("tanh", "swish", "erf") else None,
            clip=h.weight_clip,
            eps=h.dte_eps,
            signs=h.optimizer == "bop",
        )

    def activation_quantizer(self) -> Quantizer | None:
        """Return the binary feature, or None."""
        h = self.h
        if h.features == "float":
            return None
        return FeatureSign(
            h.feature_binarizer,
            soft=h.stages == "soft_sign",
            halfwave=h.features == "halfwave",
            sharpness=h.sharpness if h.feature_binarizer in ("tanh", "swish", "erf") else None,
            clip=h.feature_clip,
            eps=h.dte_eps,
        )

    # ---- schedules --------------------------------------------------------------------------------------------------

    @property
    def stage_end(self) -> float:
        """The share of the run after which weights and features are binary."""
        end: float | None = self.h.stage_end
        return STAGE_END[self.h.stages] if end is None else end

    def schedule(self, progress: float) -> dict[str, float]:
        """Return the quantities of scheduled surrogates and of the stages."""
        h, e = self.h, self.stage_end
        used = [h.weight_binarizer] + ([] if h.features == "float" else [h.feature_binarizer])
        values = {SCHEDULED[name].quantity: SCHEDULED[name].path(progress) for name in used if name in SCHEDULED}
        if h.weight_binarizer == "recu":
            values["tau"] = recu_tau(progress)
        if h.stages == "two":
            values["lam"] = float(progress >= e)
        elif h.stages == "progressive":
            values["lam"] = min(progress / e, 1.0)
        elif h.stages == "soft_sign":
            values |= {"beta": h.beta_end ** min(progress / e, 1.0), "hardened": float(progress >= e)}
        return values

    def lr_factor(self, progress: float) -> float:
        """Return the share of `lr` in force; with two stages the schedule runs once in each."""
        if self.h.stages != "two":
            return super().lr_factor(progress)
        p, e = min(max(progress, 0.0), 1.0), self.stage_end
        return super().lr_factor(p / e if p < e else (p - e) / (1 - e))

    # ---- what a step minimises --------------------------------------------------------------------------------------

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch with teacher and regularizer."""
        h = self.h
        teacher: Teacher | None = self.__dict__["_teacher"]
        compared = self._compared() if teacher is not None and h.teacher_loss in ("attention", "rbd") else []
        with ExitStack() as stack:
            own = stack.enter_context(features(self.net, compared))
            before_signs = stack.enter_context(inputs_of_signs(self.net)) if self._reads_features else []
            logits = self.net(x)
        total = self._task(logits, y)
        if teacher is not None:
            total = self._taught(total, logits, own, *teacher(x, compared))
        return total + h.regularizer_weight * self._regularizer(before_signs) if self._adds else total

    def _compared(self) -> list[str]:
        """Return the places of quantized layers but the last one, whose output is no representation."""
        found = places(self.net)
        last = list(layers(self.net).values())[-1]
        return found[:-1] if parametrize.is_parametrized(last) else found

    @property
    def _reads_features(self) -> bool:
        return self.h.regularizer in ("distribution", "entropy")

    @property
    def _adds(self) -> bool:
        """Whether a regularizer is added to the loss: decay is off in the second of two stages."""
        h = self.h
        second = h.stages == "two" and self.steps / max(self._run_length, 1) >= self.stage_end  # as `schedule` has it
        return h.regularizer not in ("none", "label_smoothing") and not (h.regularizer == "wd" and second)

    def _task(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.h.regularizer == "label_smoothing":
            return F.cross_entropy(logits, y, label_smoothing=self.h.regularizer_weight)
        return self.loss(logits, y)

    def _taught(
        self, task: Tensor, logits: Tensor, own: dict[str, Tensor], given: Tensor, theirs: dict[str, Tensor]
    ) -> Tensor:
        h = self.h
        if h.teacher_loss == "kd":
            return (1 - h.teacher_weight) * task + h.teacher_weight * kd(logits, given, h.temperature)
        if h.teacher_loss == "distribution":
            return distribution(logits, given)
        return task + h.teacher_weight * over_places(attention if h.teacher_loss == "attention" else rbd, own, theirs)

    def _regularizer(self, before_signs: Sequence[Tensor]) -> Tensor:
        h = self.h
        if h.regularizer == "distribution":
            terms = [activation_loss(x) for x in before_signs]
        elif h.regularizer == "entropy":
            terms = [-sign_entropy(x) for x in before_signs]
        elif h.regularizer == "wd":
            terms = [latent.square().sum() for latent, _ in self._binary]
        else:
            power: Literal[1, 2] = 1 if h.regularizer == "bnnplus_l1" else 2
            terms = [bnnplus(q.prepared(latent), power, h.bnnplus_alpha) for latent, q in self._binary]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)

    # ---- optimizers -------------------------------------------------------------------------------------------------

    @property
    def _binary(self) -> list[tuple[nn.Parameter, RepairWeight]]:
        """The latent weights with their quantizers; first and last layers of 8 bits are none of them."""
        return [(t.latent, t.quantizer) for t in quantized_tensors(self.net) if isinstance(t.quantizer, RepairWeight)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the latent weights, the weights of float layers (with decay), and vectors and biases."""
        latents = [latent for latent, _ in self._binary]
        known = {id(p) for p in latents}
        rest = [p for p in self.parameters() if id(p) not in known]
        own: dict[str, Any] = {"lr": self.h.bop_gamma, "tau": self.h.bop_tau} if self.h.optimizer == "bop" else {}
        groups: list[dict[str, Any]] = [
            {"params": latents, "weight_decay": 0.0, **own},
            {"params": [p for p in rest if p.dim() > 1]},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer named by the hyperparameters."""
        h = self.h
        if h.optimizer == "adamw":
            return torch.optim.AdamW(self.parameter_groups(), lr=h.lr, weight_decay=h.weight_decay)
        if h.optimizer == "bop":
            groups = [{"tau": None, "weight_decay": h.weight_decay, **group} for group in self.parameter_groups()]
            return BopOptimizer(groups, lr=h.lr)
        return super().make_optimizer()

    def with_schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the optimizer and its learning-rate schedule; Bop's gamma stays as it is."""
        if self.h.optimizer != "bop":
            return super().with_schedule(optimizer)

        def moved(step: int) -> float:
            return self.lr_factor(step / max(self._run_length, 1))

        rules = [moved if group["tau"] is None else lambda step: 1.0 for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def post_step(self) -> None:
        """Clip latent weights."""
        if self.h.latent_clip > 0:
            for latent, _ in self._binary:
                latent.clamp_(-self.h.latent_clip, self.h.latent_clip)
