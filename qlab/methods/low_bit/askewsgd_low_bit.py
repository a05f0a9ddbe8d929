r"""ASkewSGD for weights of a few bits: float weights in ever smaller intervals around the levels of a SAWB grid.

The constraint, the velocity and their names are those of `qlab.methods.binary_weights.askewsgd`. Here they are taken in units of
the grid's step s, w' = clip(w / s, -top, top), and the velocity is turned back into units of the weight:

    v = s direction(u / s, w', eps, alpha, M),      so that a constrained v is -s alpha psi(w') / psi'(w')
    M = largest_step gap / lr                       gap between two levels: a plain step moves at most a quarter of it

The run has two phases. In the first the constraint is idle: eps is above the largest phi between two levels, e0 = gap^4 / 16
(1 / 16 for whole numbers); the weights train in float and the step s = clip / top follows them, clip by SAWB. In the second the
clip is frozen, weights are clamped to it, and eps falls:

    eps = e0 eps_rate^k + 1e-6                      k = 0 in the first phase, then the epochs since

Forward and backward pass see the float weights; deployed: s times the nearest code. Activations have a SAWB grid too, straight
through (`qlab.quantizers.sawb`).

Source: Leconte, Schechtman, Moulines, AISTATS 2023, arXiv 2211.03741, and the authors' code (aistats2023/537), which quantizes
3x3 convolutions only, in 200 epochs with Adam.
Deviations: their grid has the 17 levels -8, ..., 8, one more than four bits can code: `grid="wide"`; the default is the narrow one
of 15. Weights are clamped from the freeze on only. A clamp in every step, as theirs, feeds back on the clip: standard normal
weights without a gradient are cut at 2.37, then less and less, until 2.16 with the 17 levels; at 1.48 until 0.67 with two bits.
The default learning rate is that of a short run of a small net; the paper's are 0.06 (TinyImageNet) and 0.1 (ImageNet).

Shapes: w, u, v are those of the weight; s, clip, eps are scalars of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.binary_weights.askewsgd import direction, widest
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, quantized_tensors
from qlab.quantizers.base import Rule
from qlab.quantizers.sawb import COEFFICIENTS, SAWB, Grid, SAWBActivation, has_coefficients, sawb_clip

__all__ = ["ASkewSGDLowBit", "IntervalGrid"]

IDLE = 1e-6  # what eps keeps above its value, so that the constraint is idle at e0 and no interval is empty at the end


class IntervalGrid(SAWB):
    """The float weight forward, the nearest level of a SAWB grid deployed; the clip is a buffer, so that it can be frozen.

    Args:
        bits: k, 2 to 5.
        grid: "narrow", "half" or "wide"; see `qlab.quantizers.sawb`.
    """

    elementwise = True  # the clip does not move with the tensor it is asked about
    clip: Tensor
    eps: Tensor
    frozen: Tensor

    def __init__(self, bits: int = 4, grid: Grid = "narrow") -> None:
        super().__init__(bits, grid)
        self.register_buffer("clip", torch.tensor(1.0))
        self.register_buffer("eps", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("frozen", torch.tensor(0.0))

    @property
    def gap(self) -> int:
        """Return the distance between two levels, in codes."""
        return 2 if self.odd else 1

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Take the clip from the tensor; it stays as it is."""
        self.follow(latent)
        return latent

    def follow(self, latent: Tensor) -> None:
        """Set the clip to that of SAWB, unless it is frozen."""
        clip = sawb_clip(latent.detach(), coefficients=self.coefficients).to(self.clip)
        self.clip.copy_(torch.where(self.frozen > 0, self.clip, clip))

    def scale(self, latent: Tensor) -> Tensor:
        """Return the step s, a scalar: clip / top."""
        return self.clip.to(latent.dtype) / self.top

    def forward(self, latent: Tensor) -> Tensor:
        """Return w."""
        return latent

    def hard(self, latent: Tensor) -> Tensor:
        """Return s times the nearest code."""
        return self.scale(latent) * self.level(latent)

    def primitive(self) -> Rule:
        """Return the identity."""
        return lambda x: x

    def velocity(self, u: Tensor, w: Tensor, alpha: float, M: float) -> Tensor:
        """Return v in units of the weight.

        Args:
            u: gradient at w.
            w: weights.
            alpha: rate at which a violation shrinks.
            M: largest constrained speed, in codes.
        """
        s = self.scale(w)
        inside = (w / s).clamp(-self.top, self.top)  # beyond the outermost level a weight counts as on it: free
        return s * direction(u / s, inside, float(self.eps), alpha, M, self.levels(w.dtype).to(w.device))


class ASkewSGDLowBit(Method):
    """ASkewSGD for weights of 2 to 5 bits.

    Args:
        net: a plain net or the spec of one.
        weight_bits: bits of the weights, 2 to 5; the paper's 2 and 4.
        activation_bits: bits of the activations, 2 to 5; None leaves the nonlinearities. The paper's 4.
        grid: of the weights: "narrow" (2^k - 1 levels), "half" (2^k, none at zero) or "wide" (2^k + 1, the authors').
        alpha: rate at which violations shrink.
        largest_step: what a constrained weight moves in a plain step at most, in gaps between levels.
        eps_rate: factor of eps per epoch once the clip is frozen.
        freeze: share of the run after which the clip is frozen and eps falls.
        schedule_epochs: epochs of the run for which `eps_rate` was chosen, stretched over the run at hand.
        keep: layers left in float.
        lr: learning rate of Adam.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["askewsgd_low_bit"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        weight_bits: int = 4,
        activation_bits: int | None = 4,
        grid: Grid = "narrow",
        alpha: float = 1.0,
        largest_step: float = 0.25,
        eps_rate: float = 0.95,
        freeze: float = 0.5,
        schedule_epochs: int = 200,
        keep: Sequence[str] = ("first", "last"),
        lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        known = f"one of {', '.join(map(str, COEFFICIENTS))}"
        for name, value, good, expected in (
            ("weight_bits", weight_bits, has_coefficients(weight_bits), known),
            ("activation_bits", activation_bits, activation_bits is None or has_coefficients(activation_bits), known),
            ("grid", grid, grid in ("narrow", "half", "wide"), "'narrow', 'half' or 'wide'"),
            ("alpha", alpha, 0 <= alpha < math.inf, "a number of at least 0"),
            ("largest_step", largest_step, 0 < largest_step < math.inf, "a positive number"),
            ("eps_rate", eps_rate, 0 < eps_rate <= 1, "in (0, 1]"),
            ("freeze", freeze, 0 <= freeze <= 1, "a share of the run in [0, 1]"),
            ("schedule_epochs", schedule_epochs, 1 <= schedule_epochs < math.inf, "a finite number of at least 1"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(net, keep=keep, lr=lr, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the grid of one weight with its intervals."""
        return IntervalGrid(self.h.weight_bits, self.h.grid)

    def activation_quantizer(self) -> Quantizer | None:
        """Return the rectifier with a SAWB grid."""
        return None if self.h.activation_bits is None else SAWBActivation(self.h.activation_bits)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return eps, and whether the clip is frozen."""
        h = self.h
        epoch = math.floor(progress * h.schedule_epochs + 1e-9)
        begun = math.floor(h.freeze * h.schedule_epochs + 1e-9)
        e0 = widest(self.weight_quantizer().levels(torch.float64))  # type: ignore[arg-type]
        return {"eps": e0 * h.eps_rate ** max(epoch - begun, 0) + IDLE, "frozen": float(epoch >= begun)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put -v in the place of the gradient of every constrained weight."""
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for t in quantized_tensors(self.net):
            if t.latent.grad is not None:
                assert isinstance(t.quantizer, IntervalGrid)
                lr = rate[id(t.latent)]
                M = self.h.largest_step * t.quantizer.gap / lr if lr > 0 else 0.0  # nothing moves; no infinity for Adam
                t.latent.grad = -t.quantizer.velocity(t.latent.grad, t.latent.detach(), self.h.alpha, M)

    def post_step(self) -> None:
        """Let the clip follow the weights; once it is frozen, clip the weights to it."""
        for t in quantized_tensors(self.net):
            assert isinstance(t.quantizer, IntervalGrid)
            t.quantizer.follow(t.latent)
            if t.quantizer.frozen > 0:
                t.latent.copy_(t.latent.minimum(t.quantizer.clip).maximum(-t.quantizer.clip))
