r"""AdaSTE: an adaptive straight-through estimator from a bilevel program.

Every binary weight is the minimiser of an inner energy, a double well tilted by its latent theta:

    E(w; theta) = 1/2 (w - theta)^2 + mu/2 (|w| - 1 - alpha)^2,   w in [-1, 1]
    w*(theta)   = clip((theta + mu (1 + alpha) s) / (1 + mu), -1, 1),   s = sign(theta), sign(0) = +1

With A = mu alpha >= 1, w* = sign(theta) exactly. Training is the bilevel program min_theta l(w*(theta)). Relaxed by a
multiplier 1/beta and with the loss linearised (l' = dl/dw at w*), its gradient is a finite difference of the same
closed form:

    g = (w*(theta) - w*(theta - beta l')) / beta = c l'

beta is chosen for each weight and step to make |g| largest. With t = |theta|, K = 1 + 2 mu + A:

    s l' <= 0 (further into the present sign):   c = 1 / (1 + mu)                       t < 1 - A
                                                 c = 0                                  t >= 1 - A
    s l' > 0  (towards the other sign):          c = (t + 2 mu (1 + alpha)) / ((1 + mu) t)      t <= 1 - A
                                                 c = K / ((1 + mu) t)                           1 - A < t <= K
                                                 c = 2 / (t + 1 - A)                            t > K

and c <- min(c, c_max). For A > 1 read A = 1: then c = 2 / t. So a saturated weight that the loss wants to flip always
feels it. Inside the dead zone |l'| <= tol the estimator is plain straight-through (c = 1 / (1 + mu) for A < 1, else
1), as in the authors' code; most |l'| of a mean loss lie there.

mode="reference" is the rule of the authors' code, which differs: it caps at 0.5, reflects theta through 0 once A >= 1
(c = 1 / t), and its middle region holds the signed theta, so that it is not symmetric. mode="exact" is the true
derivative of w*, for contrast: it moves no saturated weight.

Schedule: mu <- min(mu rate, 1 / alpha) once an epoch of the paper's run of `schedule_epochs`; stretched over the run
at hand.

Source: Le, Høier, Lin, Zach, CVPR 2022, arXiv 2112.02880; constants from the authors' code (intellhave/AdaSTE).
The regions of c are derived from the energy and checked against brute force over beta.
Deviations: theta = 0 counts as positive, as in the forward map (the authors leave it straight-through); the cosine
moves every step rather than every epoch; batch-norm statistics for the signs are re-estimated before evaluation
instead of by a second forward in every step; the momentum of batch norm is torch's 0.1, not the authors' 0.2.

Shapes: theta, w*, l', c are those of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.methods.momentum import BiasCorrectedMomentum
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors

__all__ = [
    "AdaSTE",
    "DoubleWell",
    "energy",
    "minimizer",
    "slope",
    "slope_exact",
    "slope_reference",
]

Mode = Literal["derived", "reference", "exact"]


def energy(w: Tensor, theta: Tensor, mu: float | Tensor, alpha: float) -> Tensor:
    """Return the inner energy E(w; theta) for w in [-1, 1], elementwise."""
    return 0.5 * (w - theta) ** 2 + 0.5 * mu * (w.abs() - 1 - alpha) ** 2


def _saturation(mu: float | Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return mu and A = min(mu alpha, 1) as float64 scalars; mu = 1 / alpha gives A = 1 whatever the rounding."""
    mu = torch.as_tensor(mu, dtype=torch.float64)
    A = mu * alpha
    return mu, torch.where(A >= 1 - 1e-12, torch.ones_like(A), A)


def minimizer(theta: Tensor, mu: float | Tensor, alpha: float) -> Tensor:
    """Return w*(theta) = argmin over [-1, 1] of E(w; theta), elementwise."""
    mu, A = _saturation(mu, alpha)
    s = hard_sign(theta)
    w = ((theta + mu * (1 + alpha) * s) / (1 + mu)).clamp(-1, 1)
    return torch.where(A < 1, w, s)  # at A = 1 the quotient is s up to rounding; it must be s exactly


def slope_exact(theta: Tensor, dl: Tensor, mu: float | Tensor, alpha: float) -> Tensor:
    """Return the derivative of w*: 1 / (1 + mu) where it is not saturated, else 0."""
    mu, A = _saturation(mu, alpha)
    return (theta.abs() < 1 - A).to(theta.dtype) / (1 + mu)


def slope(
    theta: Tensor, dl: Tensor, mu: float | Tensor, alpha: float, c_max: float = math.inf, tol: float = 0.0
) -> Tensor:
    """Return c of the derived rule: the largest finite difference over beta is c l'.

    Args:
        theta: latent weights.
        dl: l', the gradient at w*, of the same shape.
        mu: weight of the double well, a number or a scalar tensor.
        alpha: well offset.
        c_max: cap on c, which grows without bound as theta -> 0.
        tol: half width of the dead zone in l'.
    """
    further = slope_exact(theta, dl, mu, alpha)
    mu, A = _saturation(mu, alpha)
    t = theta.abs().clamp(min=torch.finfo(theta.dtype).tiny)
    K = 1 + 2 * mu + A
    jump = torch.where(t <= 1 - A, t + 2 * mu * (1 + alpha), K) / ((1 + mu) * t)
    towards = torch.where(t <= K, jump, 2 / (t + 1 - A))
    c = torch.where(hard_sign(theta) * dl > 0, towards, further).clamp(max=c_max)
    return torch.where(dl.abs() <= tol, _straight(mu, A), c) if tol > 0 else c


def slope_reference(
    theta: Tensor, dl: Tensor, mu: float | Tensor, alpha: float, c_max: float = 0.5, tol: float = 1e-3
) -> Tensor:
    """Return c as the authors' code computes it, its asymmetric middle region included; arguments as of `slope`."""
    mu, A = _saturation(mu, alpha)
    t = theta.abs()
    K = 1 + 2 * mu + A
    towards, zero, straight = theta * dl > 0, torch.zeros_like(theta), _straight(mu, A)
    outer = torch.where(towards, (K / ((1 + mu) * t)).clamp(0, c_max), zero)
    middle = torch.where(towards, ((2 * mu * (1 + alpha) - theta) / ((1 + mu) * t)).clamp(0, c_max), straight)
    soft = torch.where(t > 1 - A, outer, torch.where((t > 1e-6) & (t < 1 - A), middle, straight))
    binary = torch.where(t > 1e-3, torch.where(towards, (1 / t).clamp(0, c_max), zero), straight)
    return torch.where(dl.abs() > tol, torch.where(A < 1, soft, binary), straight)


def _straight(mu: Tensor, A: Tensor) -> Tensor:
    """Return the slope inside the dead zone: the derivative between the wells, 1 once w* is the sign."""
    return torch.where(A < 1, 1 / (1 + mu), torch.ones_like(mu))


class _BilevelGradient(torch.autograd.Function):
    """w*(theta) forward, c(theta, l') l' backward: not linear in l', so there is no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, mu: Tensor, alpha: float, rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return minimizer(theta, mu, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        theta, mu, _, ctx.rule = inputs
        ctx.save_for_backward(theta, mu)

    @staticmethod
    def backward(ctx: Any, dl: Tensor) -> tuple[Tensor, None, None, None]:
        theta, mu = ctx.saved_tensors
        return ctx.rule(theta, dl, mu) * dl, None, None, None


class DoubleWell(Quantizer):
    """w*(theta) with the adaptive backward rule; deployed weights are signs.

    Args:
        mode: "derived", "reference" or "exact".
        mu: at the start; `anneal(mu=...)` moves it.
        alpha: well offset.
        c_max: cap on c.
        tol: half width of the dead zone.
        start: how latents are initialised: "signs" (+-theta_scale with probability 1/2), "uniform" (U(-theta_scale,
            theta_scale)), or "net".
        theta_scale: of the start.
    """

    bits = 1
    mu: Tensor

    def __init__(
        self,
        mode: Mode = "derived",
        mu: float = 0.01,
        alpha: float = 0.01,
        c_max: float = 0.5,
        tol: float = 1e-3,
        start: Literal["signs", "uniform", "net"] = "net",
        theta_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.mode, self.alpha, self.c_max, self.tol = mode, alpha, c_max, tol
        self.start, self.theta_scale = start, theta_scale
        self.register_buffer("mu", torch.tensor(mu, dtype=torch.float64))

    def rule(self, theta: Tensor, dl: Tensor, mu: Tensor) -> Tensor:
        """Return c, elementwise."""
        if self.mode == "exact":
            return slope_exact(theta, dl, mu, self.alpha)
        rule = slope if self.mode == "derived" else slope_reference
        return rule(theta, dl, mu, self.alpha, self.c_max, self.tol)

    def forward(self, latent: Tensor) -> Tensor:
        """Return w*(theta)."""
        return _BilevelGradient.apply(latent, self.mu, self.alpha, self.rule)

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(theta)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents as `start` says."""
        if self.start == "net":
            return latent
        u = 2 * torch.rand(latent.shape, generator=generator) - 1
        return self.theta_scale * (hard_sign(u) if self.start == "signs" else u)

    def extra_repr(self) -> str:
        """Name mode and constants."""
        return f"{self.mode}, mu={float(self.mu):g}, alpha={self.alpha:g}, c_max={self.c_max:g}, tol={self.tol:g}"


class AdaSTE(Method):
    """AdaSTE with the authors' optimizer and constants.

    Args:
        net: a plain net or the spec of one. The paper's nets have batch norm without scale and shift after every
            layer, the logits included: `affine=False, final_norm=True` of `qlab.models`.
        mode: "derived" (the rule of the module docstring), "reference" (the authors' code), "exact" (the true
            derivative).
        alpha: well offset.
        mu: double-well weight before the first epoch.
        mu_rate: factor of mu per epoch of the schedule, up to 1 / alpha.
        schedule_epochs: epochs of the run for which `mu_rate` was chosen; the schedule is stretched over the run at
            hand.
        c_max: cap on the slope c.
        tol: half width of the dead zone in the gradient; 0 for none.
        theta_init: start of the latents: "signs" +-theta_scale, "uniform" U(-theta_scale, theta_scale), "net" the
            net's own.
        theta_scale: see theta_init.
        scale: S, the factor of the gradient of latent weights. None is the authors' (10 n)^2 for n training samples.
        decay: r, the decay of latents beside it.
        lr: learning rate of latent weights.
        momentum: rho.
        float_lr: learning rate of parameters left in float.
        biases: binarize biases too, as the authors do with every parameter.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["adaste"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        mode: Mode = "derived",
        alpha: float = 0.01,
        mu: float = 0.01,
        mu_rate: float = 1.05,
        schedule_epochs: int = 700,
        c_max: float = 0.5,
        tol: float = 1e-3,
        theta_init: Literal["signs", "uniform", "net"] = "signs",
        theta_scale: float = 10.0,
        scale: float | None = None,
        decay: float = 1.0,
        lr: float = 3e-4,
        momentum: float = 0.9,
        float_lr: float = 0.1,
        biases: bool = True,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        lr_end: float = 1e-3,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
        keep: Sequence[str] = (),
        reestimate_bn: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("mode", mode, mode in ("derived", "reference", "exact")),
            ("theta_init", theta_init, theta_init in ("signs", "uniform", "net")),
            ("alpha", alpha, alpha > 0),
            ("mu", mu, mu >= 0),
            ("mu_rate", mu_rate, mu_rate >= 1),
            ("schedule_epochs", schedule_epochs, schedule_epochs >= 1),
            ("c_max", c_max, c_max > 0),
            ("tol", tol, tol >= 0),
            ("theta_scale", theta_scale, theta_scale > 0),
            ("scale", scale, scale is None or scale > 0),
            ("momentum", momentum, 0 <= momentum < 1),
        ):
            if not good:
                raise InputError(f"{name}={value!r} is out of range; see the docstring of AdaSTE")
        super().__init__(
            net,
            lr=lr,
            momentum=momentum,
            biases=biases,
            lr_schedule=lr_schedule,
            lr_end=lr_end,
            loss=loss,
            keep=keep,
            reestimate_bn=reestimate_bn,
            seed=seed,
        )

    def weight_quantizer(self) -> Quantizer:
        """Return the double well of one weight."""
        h = self.h
        return DoubleWell(h.mode, h.mu, h.alpha, h.c_max, h.tol, h.theta_init, h.theta_scale)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return mu: multiplied by the rate before every epoch of the schedule, capped at 1 / alpha."""
        h = self.h
        epoch = min(math.floor(progress * h.schedule_epochs + 1e-9), h.schedule_epochs - 1) + 1
        return {"mu": min(h.mu * h.mu_rate**epoch, 1 / h.alpha)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the authors' optimizer: scaled and decayed on latents, plain momentum on float parameters."""
        h = self.h
        latent = [t.latent for t in quantized_tensors(self.net)]
        binary = {id(p) for p in latent}
        groups: list[dict[str, Any]] = [
            {"params": latent, "scale": h.scale or self._reference_scale(), "decay": h.decay}
        ]
        rest = [p for p in self.parameters() if id(p) not in binary]
        if rest:
            groups.append({"params": rest, "lr": h.float_lr})
        return BiasCorrectedMomentum(groups, h.lr, h.momentum)

    def _reference_scale(self) -> float:
        """Return S = N^2 with N = 10 times the number of training samples: the authors' code multiplies by N twice."""
        n = self.training_samples()
        if n is None:
            raise InputError(
                "AdaSTE scales gradients by (10 n)^2 for n training samples, and n is not known here: give scale=..."
            )
        return (10.0 * n) ** 2
