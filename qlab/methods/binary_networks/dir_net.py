r"""DIR-Net: binary networks that retain information forward, backward, and from a float teacher.

    forward    w_q = s sign(z),  z = (w - mean) / std of each filter,  s = 2^round(log2 mean|z|)            IMB
               a_q = sign(a)
    backward   sign' <- k t (1 - tanh^2(t x)),  k = max(1 / t, 1),  x = z or a
               t(p) = t_min (t_max / t_min)^p  at the share p of the run,                                   EDE
               for the weights of each layer capped so that a share eps of them keeps a slope of at least
               tau times the largest                                                                        DTE
    loss       CE + gamma mean_l || H_l / ||H_l|| - h_l / ||h_l|| ||^2                                      RBD

h_l and H_l are the outputs of the student's and of the teacher's binary blocks, flattened for each sample. The teacher is a float
net of the same topology, trained before and frozen; without one the loss is CE. Deployed weights are signs and a power of
two for each filter, so that a layer is XNOR, popcount and a shift. IR-Net is the special case eps = 0 without a teacher (`ir_net`).

Schedule: t, once an epoch in the authors' code, here every step; the caps are refreshed every `refresh` steps.

Source: Qin, Zhang, Gong, Ding, Xu, Liu, DIR-Net, IJCV 131, 2023, arXiv 2109.12338; IMB and EDE as in the code of its
predecessor (htqin/IR-Net). Reconstruction: DTE and RBD are described in the paper, but their formulas could not be had; the
cap by a quantile, the normalised distance, its weight 1 and its places are this lab's. The paper trains 400 epochs; its t_min
for ResNet-20 is 1e-3.
Deviations: the teacher's nonlinearity is that of the net that was given (the paper's Hardtanh stands in `bireal18`); in a
block that ends in a nonlinearity (`resnet20`) the student's representation is the sign of it.

Shapes: w (O, K, ...), z as w, s (O, 1, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.methods.teacher import Teacher, features, kd, over_places, places, rbd
from qlab.quantizers import Quantizer, Sign, quantized_tensors
from qlab.quantizers.information import IMB, TanhSign

__all__ = ["DIRNet"]


class DIRNet(Method):
    """DIR-Net with its three parts, each of which can be switched off.

    Args:
        net: a plain net or the spec of one. Its batch norms need a shift: a sign has no threshold of its own.
        imb: balance, standardise and scale the weights of each filter; False: signs of the weights as they are.
        estimator: slope of the weights' sign: "dte", "ede" (no cap), or "clip", 1 on [-1, 1].
        activations: "ede", signs with the scheduled slope; "clip", signs with slope 1 on [-1, 1]; "float" leaves them.
        t_min: sharpness at the start. The authors' code: 0.1, and 1e-3 for ResNet-20 with binary activations.
        t_max: sharpness at the end.
        eps: of dte, share of the weights of a layer that keeps a usable slope; 0 is ede.
        tau: of dte, the least usable slope.
        cap: of dte, whether tau is "relative" to the slope at zero or "absolute".
        refresh: of dte, steps between two looks at the weights; 0 is once an epoch.
        activation_eps: share of each batch of activations that keeps a usable slope; 0 is no cap.
        teacher: path of a checkpoint of a float net of the same topology, or the net itself; None is no distillation. A
            checkpoint of this method holds the path, or "given": to train on, pass the net again.
        gamma: weight of the distance of representations, where there is a teacher.
        gamma_ramp: share of the run over which gamma rises linearly from 0.
        kd_weight: weight of the divergence of the logits from the teacher's, where there is one.
        representation: "vector", the whole block output of a sample, or "attention", its map of energy over positions.
        places: names of the modules whose outputs are compared; none are the blocks of the binary layers.
        optimizer: "adam" or "sgd" with momentum.
        lr: learning rate at the start; the authors' for ResNet-20.
        weight_decay: L2 on every parameter. It does not change balanced weights, but the size of their steps.
        keep: layers left in float; the paper's first and last (and 1x1 convolutions of shortcuts, which have to be named).

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["dir_net"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        imb: bool = True,
        estimator: Literal["dte", "ede", "clip"] = "dte",
        activations: Literal["ede", "clip", "float"] = "ede",
        t_min: float = 0.1,
        t_max: float = 10.0,
        eps: float = 0.1,
        tau: float = 0.1,
        cap: Literal["relative", "absolute"] = "relative",
        refresh: int = 0,
        activation_eps: float = 0.0,
        teacher: str | nn.Module | None = None,
        gamma: float = 1.0,
        gamma_ramp: float = 0.0,
        kd_weight: float = 0.0,
        representation: Literal["vector", "attention"] = "vector",
        places: Sequence[str] = (),
        optimizer: Literal["adam", "sgd"] = "sgd",
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        keep: Sequence[str] = ("first", "last"),
        **kwargs: Any,
    ) -> None:
        for name, value, good in (
            ("imb", imb, isinstance(imb, bool)),
            ("estimator", estimator, estimator in ("dte", "ede", "clip")),
            ("activations", activations, activations in ("ede", "clip", "float")),
            ("t_min", t_min, t_min > 0),
            ("t_max", t_max, t_min < t_max < math.inf),
            ("eps", eps, 0 <= eps <= 1),
            ("tau", tau, 0 < tau < 1),
            ("cap", cap, cap in ("relative", "absolute")),
            ("refresh", refresh, isinstance(refresh, int) and refresh >= 0),
            ("activation_eps", activation_eps, 0 <= activation_eps <= 1),
            ("gamma", gamma, 0 <= gamma < math.inf),
            ("gamma_ramp", gamma_ramp, 0 <= gamma_ramp <= 1),
            ("kd_weight", kd_weight, 0 <= kd_weight < math.inf),
            ("representation", representation, representation in ("vector", "attention")),
            ("places", places, not isinstance(places, str)),
        ):
            if not good:
                raise InputError(f"{name}={value!r} is out of range; see the docstring of {type(self).__name__}")
        self.__dict__["_teacher"] = Teacher.of(teacher)  # past the state, and the name alone reaches the checkpoint
        teacher = Teacher.name_of(teacher)
        places = list(places)
        super().__init__(net, optimizer=optimizer, lr=lr, weight_decay=weight_decay, keep=keep, **kwargs)
        self._epoch_steps = 1
        self.refresh_caps()

    # ---- quantizers and schedule ------------------------------------------------------------------------------------

    def weight_quantizer(self) -> Quantizer:
        """Return the sign of one weight, balanced with imb."""
        h = self.h
        eps = h.eps if h.estimator == "dte" else 0.0
        sign = Sign("clipped") if h.estimator == "clip" else TanhSign(h.t_min, eps, h.tau, h.cap)
        return IMB(sign) if h.imb else sign

    def activation_quantizer(self) -> Quantizer | None:
        """Return the sign of one nonlinearity, or None."""
        h = self.h
        if h.activations == "ede":
            return TanhSign(h.t_min, h.activation_eps, h.tau, h.cap, batch=True)
        return Sign("clipped") if h.activations == "clip" else None

    def schedule(self, progress: float) -> dict[str, float]:
        """Return t: from t_min to t_max, linear in its logarithm."""
        h = self.h
        return {"t": h.t_min * (h.t_max / h.t_min) ** progress}

    def refresh_caps(self) -> None:
        """Set the cap of every weight's slope by where the weights stand now."""
        for t in quantized_tensors(self.net):
            if isinstance(t.quantizer, IMB | TanhSign):
                t.quantizer.refresh(t.latent)

    def begin_step(self, total: int) -> None:
        """Prepare a step: schedule, noise, and where they are due the caps."""
        super().begin_step(total)
        if self.steps % (self.h.refresh or self._epoch_steps) == 0:
            self.refresh_caps()

    def on_train_start(self) -> None:
        """Fix the length of the run and of an epoch."""
        super().on_train_start()
        batches = self.trainer.num_training_batches
        if math.isfinite(batches):
            self._epoch_steps = math.ceil(batches / self.trainer.accumulate_grad_batches) * self.repeats
        elif self.h.estimator == "dte" and not self.h.refresh:
            raise InputError(
                "caps are refreshed once an epoch, but this data has no end: set refresh to a number of steps"
            )

    # ---- loss -------------------------------------------------------------------------------------------------------

    def compared(self) -> list[str]:
        """Return the places at which student and teacher are compared."""
        return list(self.h.places) or places(self.net)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss, with a teacher plus the distances from its representations and its logits."""
        h, teacher = self.h, self.__dict__["_teacher"]
        gamma = h.gamma
        if h.gamma_ramp > 0:
            gamma *= min(self.steps / max(h.gamma_ramp * self._run_length, 1), 1.0)
        if teacher is None or (gamma == 0 and h.kd_weight == 0):
            return super().objective(x, y)
        at = self.compared() if gamma > 0 else []
        with features(self.net, at) as found:
            logits = self.net(x)
        teacher_logits, expected = teacher(x, at)
        total = self.loss(logits, y)
        if gamma > 0:
            distance = partial(rbd, maps=h.representation == "attention")
            total = total + gamma * over_places(distance, found, expected)
        return total + h.kd_weight * kd(logits, teacher_logits) if h.kd_weight > 0 else total
