r"""BinaryConnect: weights are signs in forward and backward pass, gradients accumulate in clamped latent weights.

    forward:        w_q = H sign(w)                                        deterministic w_q = +H with probability s(w
        / H), else -H            stochastic,  s(x) = clip((x + 1) / 2, 0, 1)
    backward:       dL/dw = dL/dw_q
    after a step:   w <- clip(w, -H, H)

The stochastic weight has mean E[w_q] = clip(w, -H, H). H is 1 or "glorot": sqrt(1.5 / (fan_in + fan_out)) of each
layer. Latent weights start from U(-H, H) and their updates are multiplied by 1 / sqrt(1.5 / (fan_in + fan_out)), as
in the authors' code (squared for SGD, whose step is not free of the gradient's scale).

Deviation: the authors' stochastic version tests with the real-valued weights. Here, as for every method, the deployed
net has hard signs; the accuracy with real weights is logged beside it as `acc_latent`.

Source: Courbariaux, Bengio, David, BinaryConnect, NeurIPS 2015, arXiv 1511.00363; update scale and H from the code of
BinaryNet by the same author.

Shapes: latent w and w_q are those of the plain net's weights; K = fan_in, O = fan_out.
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
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.base import Rule

__all__ = ["Binarize", "BinaryConnect", "glorot"]


def glorot(shape: torch.Size) -> float:
    """Return sqrt(1.5 / (fan_in + fan_out)) of a weight (O, K, ...); a bias (O,) counts as O inputs and outputs."""
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * field, (shape[1] if len(shape) > 1 else shape[0]) * field
    return math.sqrt(1.5 / (fan_in + fan_out))


class _Binarize(torch.autograd.Function):
    """H sign(w - threshold); the gradient passes unchanged. Threshold 0 is deterministic, H (1 - 2u), u ~ U[0, 1), stochastic."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, threshold: Tensor, H: Tensor) -> Tensor:
        return hard_sign(w - threshold) * H.to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()


class Binarize(Quantizer):
    """Weights in {-H, +H}.

    Args:
        scale: H, 1.0 or "glorot".
        stochastic: draw signs; the draw of a step stays for the whole step. In eval mode the real weights, clipped.
    """

    bits = 1
    H: Tensor
    threshold: Tensor

    def __init__(self, scale: float | Literal["glorot"] = 1.0, stochastic: bool = False) -> None:
        super().__init__()
        self.glorot = scale == "glorot"
        self.stochastic = stochastic
        self.register_buffer("H", torch.tensor(1.0 if scale == "glorot" else float(scale)))
        self.register_buffer("threshold", torch.tensor(0.0), persistent=False)

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents from U(-H, H)."""
        if self.glorot:
            self.H.fill_(glorot(latent.shape))
        if self.stochastic:
            self.threshold = torch.zeros(latent.shape, dtype=latent.dtype, device=self.H.device)
        return (2 * torch.rand(latent.shape, generator=generator) - 1) * self.H.cpu()

    def resample(self, generator: torch.Generator) -> None:
        """Draw this step's thresholds: w >= H (1 - 2u) has probability s(w / H)."""
        if self.stochastic:
            u = torch.rand(self.threshold.shape, generator=generator)
            self.threshold.copy_((1 - 2 * u) * self.H.cpu())

    def forward(self, latent: Tensor) -> Tensor:
        """Return binary weights; in eval mode of the stochastic version the clipped real ones."""
        if self.stochastic and not self.training:
            return torch.minimum(torch.maximum(latent, -self.H.to(latent.dtype)), self.H.to(latent.dtype))
        return _Binarize.apply(latent, self.threshold, self.H)

    def hard(self, latent: Tensor) -> Tensor:
        """Return H sign(w)."""
        return hard_sign(latent) * self.H.to(latent.dtype)

    def primitive(self) -> Rule:
        """Return the identity: the gradient passes as it is."""
        return lambda x: x

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-H, +H)."""
        return torch.stack([-self.H, self.H]).to(dtype)


class BinaryConnect(Method):
    """BinaryConnect, deterministic or stochastic.

    Args:
        net: a plain net or the spec of one.
        stochastic: draw the sign of each weight anew every step.
        scale: H, "one" or "glorot".
        scale_lr: multiply the updates of latent weights by 1 / sqrt(1.5 / (fan_in + fan_out)), squared for sgd.
        lr: learning rate, before that multiplication. The default is recalled from the authors' code,
            not confirmed; it suits wide nets and long runs: a small net in a short run
            wants about ten times as much, as in notebooks/00_tour.
        lr_schedule: the paper's learning rate decays exponentially.
    """

    info = CATALOG["binary_connect"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        stochastic: bool = False,
        scale: Literal["one", "glorot"] = "one",
        scale_lr: bool = True,
        lr: float = 3e-3,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "exponential",
        **kwargs: Any,
    ) -> None:
        if scale not in ("one", "glorot"):
            raise InputError(f"scale must be 'one' or 'glorot', not {scale!r}")
        super().__init__(net, lr=lr, lr_schedule=lr_schedule, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the binarizer of one weight."""
        return Binarize("glorot" if self.h.scale == "glorot" else 1.0, self.h.stochastic)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return a group for the float parameters and one for each latent tensor, whose learning rate has its own scale."""
        latent = [t.latent for t in quantized_tensors(self.net)]
        binary = {id(p) for p in latent}
        power = 2 if self.h.optimizer == "sgd" else 1
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if id(p) not in binary]}]
        for p in latent:
            factor = glorot(p.shape) ** -power if self.h.scale_lr else 1.0
            groups.append({"params": [p], "lr": self.h.lr * factor})
        return [group for group in groups if group["params"]]

    def post_step(self) -> None:
        """Clip latent weights to [-H, H]."""
        for t in quantized_tensors(self.net):
            H = t.quantizer.get_buffer("H")
            t.latent.copy_(torch.minimum(torch.maximum(t.latent, -H), H))
