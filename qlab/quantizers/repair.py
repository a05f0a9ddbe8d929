r"""Binary weights and features with every repair of the training side as a switch.

A weight theta of a filter of n values goes through

    u  = norm(theta)                    "none", or of each filter (n - 1 deviations)
                                          "center"       theta - mean
                                          "standardize"  (theta - mean) / std
                                          "l2"           gain theta / |theta|_2
                                          "scaled_ws"    gain (theta - mean) / (std sqrt(n))
    u  = clamp(2 sqrt2 (u - mean) / std, -Q, Q)           "recu" only;  Q = -mean|u| ln(2 - 2 tau), the Laplace quantile
    s  = sign(u),  backward g'(u)                         any surrogate
    w  = a s                                              "none": a = 1
                                                          "alpha": a = mean |u| of the filter, a constant in the gradient
                                                          "alpha_chain": the same, differentiated
                                                          "pow2": a = 2^round(log2 mean |u|), a constant

a = mean |u| minimises |u - a s|^2. The binarizer "magnitude_aware" computes with a s, a a constant, and deploys s alone; a batch
norm behind the layer takes up a. The gradient reaches theta through `norm` by the chain rule.

Stages: "one" uses w; "mix" uses (1 - lam) u + lam w with lam scheduled (a step of lam is two-stage training, a ramp progressive
binarization); "soft" uses a tanh(beta u) while `hardened` is 0, then w.

Features: s = sign(x) with any surrogate; "soft" uses tanh(beta x) while `hardened` is 0 and the net is in training mode;
half-wave features are (1 + s) / 2 in {0, 1}.

Source: de Putter, Corporaal, How to train accurate BNNs for embedded systems?, 2022, arXiv 2206.12322, for the categories; single
repairs: IR-Net, arXiv 1909.10788 (standardize, pow2); XNOR-Net, arXiv 1603.05279 (alpha); Bi-Real Net, arXiv 1808.00278
(magnitude aware); ReCU, ICCV 2021, arXiv 2103.12369 (recu, as in BiBench's code).

Shapes: theta (O, ...), a (O, 1, ...); a bias (O,) is one filter.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers.base import Quantizer, Rule
from qlab.quantizers.filters import filter_dims, filter_scale
from qlab.quantizers.information import SMALLEST_DEVIATION, balanced, power_of_two
from qlab.quantizers.repair_surrogates import RepairSign
from qlab.quantizers.sign import hard_sign

__all__ = ["FeatureSign", "Norm", "RepairWeight", "Scaling", "Stage", "laplace_clamp", "normalized"]

Norm = Literal["none", "center", "standardize", "l2", "scaled_ws"]
Scaling = Literal["none", "alpha", "alpha_chain", "pow2"]
Stage = Literal["one", "mix", "soft"]


def normalized(theta: Tensor, norm: Norm, gain: float = 1.0) -> Tensor:
    """Return u of each filter; see the module docstring."""
    if norm == "none":
        return theta
    dims = filter_dims(theta)
    if norm == "center":
        return theta - theta.mean(dims, keepdim=True)
    if norm == "standardize":
        return balanced(theta)
    if norm == "l2":
        length = torch.linalg.vector_norm(theta, dim=dims, keepdim=True)
        return gain * theta / length.clamp(min=SMALLEST_DEVIATION)
    n = math.prod(theta.shape[d] for d in dims)
    return gain / math.sqrt(n) * balanced(theta)


def laplace_clamp(u: Tensor, tau: Tensor | float) -> Tensor:
    """Return ReCU's weights: each filter standardised to deviation 2 sqrt2, then the layer clamped to [-Q, Q].

    Q = -mean|u| ln(2 - 2 tau) is the tau-quantile of a centred Laplace distribution with that mean magnitude, a constant in the
    gradient. Values beyond it get none.
    """
    z = 2 * math.sqrt(2) * balanced(u)
    Q = -z.detach().abs().mean() * torch.log(2 - 2 * torch.as_tensor(tau, dtype=z.dtype, device=z.device))
    return torch.minimum(torch.maximum(z, -Q), Q)


class RepairWeight(Quantizer):
    """A binary weight with the repairs of the training side.

    Args:
        binarizer: a surrogate of `repair_surrogates.ESTIMATORS`, "recu" or "magnitude_aware".
        norm: of each filter before the sign.
        scaling: factor of each filter behind it.
        stage: "one", "mix" or "soft".
        gain: of "l2" and "scaled_ws".
        sharpness: of tanh, swish and erf.
        clip: half width of the window of "clipped" and "magnitude_aware".
        eps: share of weights that "dte" keeps live.
        signs: draw the latents as the signs of the net's own weights, for an optimizer that flips them.

    Raises:
        UnknownNameError, InputError: for a switch or a constant that there is none of.
    """

    bits = 1

    def __init__(
        self,
        binarizer: str = "clipped",
        norm: Norm = "none",
        scaling: Scaling = "none",
        stage: Stage = "one",
        gain: float = 1.0,
        sharpness: float | None = None,
        clip: float = 1.0,
        eps: float = 0.1,
        signs: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("norm", norm, Norm), ("scaling", scaling, Scaling), ("stage", stage, Stage)):
            if value not in get_args(known):
                raise InputError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
        if not gain > 0:
            raise InputError(f"gain must be positive, not {gain!r}")
        self.binarizer, self.norm, self.scaling, self.stage, self.gain = binarizer, norm, scaling, stage, gain
        self.signs = signs
        inner = {"recu": "identity", "magnitude_aware": "clipped"}.get(binarizer, binarizer)
        self.sign = RepairSign(inner, sharpness if inner == binarizer else None, clip, eps)
        aware = binarizer == "magnitude_aware"
        self.elementwise = norm == "none" and scaling == "none" and binarizer not in ("recu", "dte") and not aware
        if binarizer == "recu":
            self.register_buffer("tau", torch.tensor(0.85, dtype=torch.float64))
        if stage == "mix":
            self.register_buffer("lam", torch.tensor(0.0, dtype=torch.float64))
        if stage == "soft":
            self.register_buffer("beta", torch.tensor(1.0, dtype=torch.float64))
            self.register_buffer("hardened", torch.tensor(0.0, dtype=torch.float64))

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latent weight as it is, or its signs.

        Raises:
            InputError: for filters of one weight, of which a norm with a mean leaves nothing.
        """
        single = 0 < latent.numel() == (latent.shape[0] if latent.dim() > 1 else 1)
        if single and (self.norm in ("center", "standardize", "scaled_ws") or self.binarizer == "recu"):
            raise InputError(
                f"a weight of shape {tuple(latent.shape)} has filters of one value, of which nothing is left once its mean is "
                "taken away; name the layer in keep=..., or use weight_norm='none' and another binarizer than 'recu'"
            )
        return hard_sign(latent) if self.signs else latent

    def prepared(self, latent: Tensor) -> Tensor:
        """Return u, what stands before the sign."""
        u = normalized(latent, self.norm, self.gain)
        return laplace_clamp(u, self.get_buffer("tau")) if self.binarizer == "recu" else u

    def _factor(self, u: Tensor) -> Tensor | None:
        """Return a of the training-time weight, or None where it is 1."""
        if self.scaling == "pow2":
            return power_of_two(u)
        if self.scaling == "alpha_chain":
            return filter_scale(u)
        return filter_scale(u.detach()) if self.scaling == "alpha" or self.binarizer == "magnitude_aware" else None

    def forward(self, latent: Tensor) -> Tensor:
        """Return the weight of training: w, or what the stage puts in its place."""
        u = self.prepared(latent)
        a, s = self._factor(u), self.sign(u)
        w = s if a is None else a * s
        if self.stage == "mix":
            lam = self.get_buffer("lam").to(u.dtype)
            return (1 - lam) * u + lam * w  # exactly u at 0 and w at 1
        if self.stage == "soft":
            soft = torch.tanh(self.get_buffer("beta").to(u.dtype) * u)
            return torch.where(self.get_buffer("hardened") > 0, w, soft if a is None else a * soft)
        return w

    def scale(self, latent: Tensor) -> Tensor | None:
        """Return a of what is deployed: none for "magnitude_aware" alone, whose batch norm takes it up."""
        if self.scaling == "none":
            return None
        u = self.prepared(latent)
        return power_of_two(u) if self.scaling == "pow2" else filter_scale(u)

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(u)."""
        return hard_sign(self.prepared(latent))

    def hard(self, latent: Tensor) -> Tensor:
        """Return a sign(u)."""
        a, s = self.scale(latent), self.level(latent)
        return s if a is None else a * s

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule | None:
        """Return the surrogate's function where each weight is binarized by itself in one stage, else None."""
        return self.sign.primitive() if self.elementwise and self.stage == "one" else None

    def extra_repr(self) -> str:
        """Name the switches."""
        return f"{self.binarizer}, norm={self.norm}, scaling={self.scaling}, stage={self.stage}"


class FeatureSign(Quantizer):
    """Binary features.

    Args:
        which: a surrogate of `repair_surrogates.ESTIMATORS`.
        soft: compute with tanh(beta x) until `hardened` is set.
        halfwave: levels 0 and 1 instead of -1 and +1.
        sharpness: of tanh, swish and erf.
        clip: half width of the window of "clipped".
        eps: share of values that "dte" keeps live.

    Raises:
        UnknownNameError, InputError: from `RepairSign`.
    """

    bits = 1

    def __init__(
        self,
        which: str = "clipped",
        soft: bool = False,
        halfwave: bool = False,
        sharpness: float | None = None,
        clip: float = 1.0,
        eps: float = 0.1,
    ) -> None:
        super().__init__()
        self.sign = RepairSign(which, sharpness, clip, eps)
        self.soft, self.halfwave = soft, halfwave
        if soft:
            self.register_buffer("beta", torch.tensor(1.0, dtype=torch.float64))
            self.register_buffer("hardened", torch.tensor(0.0, dtype=torch.float64))

    def forward(self, latent: Tensor) -> Tensor:
        """Return the features of training; in eval mode those that are deployed."""
        s = self.sign(latent)
        if self.soft and self.training:
            soft = torch.tanh(self.get_buffer("beta").to(latent.dtype) * latent)
            s = torch.where(self.get_buffer("hardened") > 0, s, soft)
        return (1 + s) / 2 if self.halfwave else s

    def hard(self, latent: Tensor) -> Tensor:
        """Return the sign, or whether it is positive."""
        s = hard_sign(latent)
        return (1 + s) / 2 if self.halfwave else s

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1) or (0, 1)."""
        return torch.tensor([0, 1] if self.halfwave else [-1, 1], dtype=dtype)

    def primitive(self) -> Rule | None:
        """Return the surrogate's function; half of it for half-wave features; None while features are soft."""
        g = self.sign.primitive()
        if g is None or self.soft:
            return None
        return (lambda x: g(x) / 2) if self.halfwave else g

    def extra_repr(self) -> str:
        """Name what differs from plain signs."""
        return ", ".join(word for word, on in (("soft", self.soft), ("halfwave", self.halfwave)) if on)
