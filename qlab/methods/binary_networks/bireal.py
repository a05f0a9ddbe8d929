r"""Bi-Real Net's training: a polynomial slope for the signs of activations, the magnitude of a filter in its weights.

    activations:  a_q = sign(x),               backward d(x) = max(0, 2 - 2|x|)
    weights:      w = a sign(theta),           a = mean |theta| of each filter, a constant in the gradient
                  backward "detached"          g_theta = 1[|theta| <= 1] g             the authors' code
                  backward "larq"              g_theta = a 1[|theta| <= 1] g           the paper's equation with a as a factor
    deployed:     sign(theta), batch-norm statistics estimated anew for the signs

d is the derivative of F(x) = 2x - x|x| on [-1, 1], sign outside: the area between F and sign is 2/3, that of the clipped
estimator 1. The scale makes the step of a weight depend on its filter's size in training; afterwards it is not needed, for
a batch norm behind the layer takes up any positive factor. The net with real-valued shortcuts that gave the method its name
is `qlab.models`' bireal18.

Source: Liu, Wu, Luo, Yang, Liu, Cheng, Bi-Real Net, ECCV 2018, arXiv 1808.00278, sections 3.3 and 3.4; HardBinaryConv and
BinaryActivation of liuzechun/Bi-Real-net.
Deviations: trained from the net's own start with one optimizer; the paper starts ImageNet runs from a float net with clipped
activations.

Shapes: theta (O, I, ...), a (O, 1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_weights.bwn import ScaledSign
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, Sign, hard_sign, quantized_tensors

__all__ = ["BiRealNet", "MagnitudeAware"]


class MagnitudeAware(ScaledSign):
    """a sign(theta) in training, signs alone when deployed.

    Args:
        gradient: "detached" or "larq".
    """

    def scale(self, latent: Tensor) -> None:
        """Return None: what is deployed has no scale."""

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)


class BiRealNet(Method):
    """Bi-Real training of binary weights and activations.

    Args:
        net: a plain net or the spec of one.
        gradient: "detached" or "larq".
        deploy: "signs", as in the paper: each binary layer needs a batch norm directly behind it, which takes up the scale when its
            statistics are re-estimated; "scaled" keeps the scale of each filter, as does `reestimate_bn=False`.
        clamp: clip latent weights to [-1, 1] after every step: beyond it the slope is zero.
        keep: layers left in float; the paper's first and last.

    Raises:
        InputError: for a hyperparameter out of range; for signs without a scale in a net without batch norm.
    """

    info = CATALOG["bireal_net"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        gradient: Literal["detached", "larq"] = "detached",
        deploy: Literal["signs", "scaled"] = "signs",
        clamp: bool = True,
        keep: Sequence[str] = ("first", "last"),
        **kwargs: Any,
    ) -> None:
        for name, value, known in (
            ("gradient", gradient, ("detached", "larq")),
            ("deploy", deploy, ("signs", "scaled")),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        super().__init__(net, keep=keep, **kwargs)
        if deploy == "signs" and not any(isinstance(m, _BatchNorm) for m in self.net.modules()):
            raise InputError(
                "this net has no batch norm to take up the scale of its filters, so that its signs alone are another net: "
                "use deploy='scaled', or a net with batch norm"
            )

    def weight_quantizer(self) -> Quantizer:
        """Return the magnitude-aware sign of one weight."""
        signs = (
            self.h.deploy == "signs" and self.h.reestimate_bn
        )  # statistics of training are those of the scaled weights
        return (MagnitudeAware if signs else ScaledSign)(self.h.gradient)

    def activation_quantizer(self) -> Quantizer:
        """Return the sign with the polynomial slope."""
        return Sign("polynomial")

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)
