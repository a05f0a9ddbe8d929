r"""Information retention: balanced, standardised signs with power-of-two scales, and tanh slopes that keep weights alive.

IMB, information-maximised binarization, for each filter w of n weights (the n - 1 deviation):

    z   = (w - mean(w)) / std(w)
    s   = 2^round(log2(mean |z|))                               no gradient
    w_q = s sign(z)                                             sign(0) = +1

The gradient flows through mean and deviation: it is orthogonal to w and sums to zero over each filter. Since mean |z| < 1,
s <= 1: a product of w_q costs a shift of at most a few bits.

Backward of sign, at z for weights and at a for activations:

    g(x) = k tanh(t x),   g'(x) = k t (1 - tanh^2(t x)),   k = max(1 / t, 1)

EDE, the error decay estimator, moves t over the run (identity -> tanh -> sign). DTE, the distribution-sensitive two-stage
estimator, caps it besides, so that a share eps of the weights of a layer keeps a usable slope, with q_eps the eps-quantile of
|z|:

    t <- min(t, t_cap)
    relative:  g'(z) >= tau g'(0) for a share eps:   t_cap = arccosh(1 / sqrt(tau)) / q_eps
    absolute:  g'(z) >= tau       for a share eps:   the same where it is at most 1, else the largest t >= 1 with
                                                     arccosh(sqrt(t / tau)) / t >= q_eps

eps = 0 is EDE. Source: Qin et al., IR-Net, CVPR 2020, arXiv 1909.10788, and its authors' code (IMB there "Libra parameter
binarization", EDE); Qin et al., DIR-Net, IJCV 2023, arXiv 2109.12338 (DTE). The form of the cap is a reconstruction: the paper
describes it, its formula could not be had.
Deviation: the deviation is bounded from below by 1e-8, so that a constant filter gives zeros and not NaN.

Shapes: a weight (O, ...) has O filters; a bias (O,) counts as one.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers.base import Quantizer, Rule
from qlab.quantizers.filters import filter_dims
from qlab.quantizers.sign import hard_sign

__all__ = ["IMB", "TanhSign", "balanced", "entropy", "live_share", "power_of_two", "slope", "updatable_cap"]

Form = Literal["relative", "absolute"]

SMALLEST_DEVIATION = 1e-8


# ----------------------------------------------------------------------------------------------------------- forward: IMB


def balanced(w: Tensor) -> Tensor:
    """Return z, every filter with zero mean and unit (n - 1) deviation; zero, with a gradient of zero, for a constant filter."""
    dims = filter_dims(w)
    centred = w - w.mean(dims, keepdim=True)
    deviation = centred.std(dims, keepdim=True)
    varies = deviation > SMALLEST_DEVIATION
    return torch.where(varies, centred / torch.where(varies, deviation, 1.0), torch.zeros_like(w))


def power_of_two(z: Tensor) -> Tensor:
    """Return s of each filter, broadcast against z; 1 for a filter of zeros."""
    a = z.detach().abs().mean(filter_dims(z), keepdim=True)
    return torch.where(a > 0, torch.exp2(torch.log2(a).round()), torch.ones_like(a))


def entropy(p: Tensor) -> Tensor:
    """Return the entropy, in bits, of a sign that is +1 with probability p; elementwise, at most 1."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)


# --------------------------------------------------------------------------------------------------- backward: EDE and DTE


def slope(x: Tensor, t: float | Tensor) -> Tensor:
    """Return g'(x) = k t (1 - tanh^2(t x)), elementwise; k t = max(1, t)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.clamp(min=1) * (1 - torch.tanh(t * x) ** 2)


def live_share(z: Tensor, t: float | Tensor, tau: float = 0.1, form: Form = "absolute") -> Tensor:
    """Return the share of values whose slope is at least tau ("absolute") or tau times the slope at zero ("relative")."""
    least = tau if form == "absolute" else tau * slope(torch.zeros((), dtype=z.dtype, device=z.device), t)
    return (slope(z, t) >= least).to(torch.float64).mean()


def updatable_cap(z: Tensor, eps: float, tau: float = 0.1, form: Form = "relative") -> Tensor:
    """Return t_cap, a scalar tensor: the largest t that leaves a share eps of the values z a slope as `form` asks.

    Args:
        z: any shape; the slopes depend on |z| alone.
        eps: share in [0, 1]; 0 gives infinity.
        tau: least slope, in (0, 1).
        form: relative to the slope at zero, or absolute.
    """
    if eps == 0 or z.numel() == 0:
        return torch.tensor(math.inf, dtype=torch.float64, device=z.device)
    # The ceil(eps n)-th smallest: the share is then at least eps, and there is no limit on the size of a layer.
    rank = min(max(math.ceil(eps * z.numel() - 1e-9), 1), z.numel())
    q = z.detach().abs().flatten().kthvalue(rank).values.to(torch.float64)
    cap = math.acosh(1 / math.sqrt(tau)) / q
    if form == "absolute" and bool(cap > 1):
        return torch.full_like(cap, _absolute_cap(float(q), tau))
    return cap


def _absolute_cap(q: float, tau: float) -> float:
    """Return the largest t >= 1 with arccosh(sqrt(t / tau)) / t >= q; it is there, for at t = 1 the inequality holds."""

    def excess(t: float) -> float:
        return math.acosh(math.sqrt(t / tau)) / t - q

    if q == 0:
        return math.inf
    end = 2.0
    while excess(end) > 0:
        end *= 2
    # Left of its maximum, which is there for tau > 0.58, the left side stays above its value at 1: one root is to be found.
    return float(brentq(excess, 1.0, end, xtol=1e-13, rtol=1e-14))


class _TanhSign(torch.autograd.Function):
    """sign(x) forward, g'(x) times the incoming gradient backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, t: Tensor) -> Tensor:
        return hard_sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, t = ctx.saved_tensors
        return g * slope(x, t), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, t = ctx.saved_tensors
        return tangent * slope(x, t)


class TanhSign(Quantizer):
    """Sign with the slope of k tanh(t x): EDE, and with eps > 0 the cap of DTE.

    Args:
        t: at the start; `anneal(t=...)` moves it.
        eps: share of values that keeps a usable slope; 0 for EDE.
        tau: least usable slope.
        form: "relative" to the slope at zero, or "absolute".
        batch: take the quantile anew from every tensor that comes in, for activations; else `refresh` sets the cap.
    """

    bits = 1
    t: Tensor
    cap: Tensor

    def __init__(
        self, t: float = 0.1, eps: float = 0.0, tau: float = 0.1, form: Form = "relative", batch: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.tau, self.form, self.batch = eps, tau, form, batch
        self.register_buffer("t", torch.tensor(t, dtype=torch.float64))
        self.register_buffer("cap", torch.tensor(math.inf, dtype=torch.float64))

    @property
    def sharpness(self) -> Tensor:
        """The t in force: the schedule's, or the cap where that is smaller."""
        return torch.minimum(self.t, self.cap)

    @property
    def k(self) -> Tensor:
        """max(1 / t, 1) of the t in force."""
        return (1 / self.sharpness).clamp(min=1)

    @torch.no_grad()
    def refresh(self, x: Tensor) -> None:
        """Set the cap for the values x that stand before the sign."""
        self.cap.copy_(updatable_cap(x, self.eps, self.tau, self.form))

    def forward(self, latent: Tensor) -> Tensor:
        """Return signs of the shape of `latent`."""
        t = self.sharpness
        if self.batch and self.eps > 0 and torch.is_grad_enabled():
            t = torch.minimum(t, updatable_cap(latent, self.eps, self.tau, self.form))
        return _TanhSign.apply(latent, t)

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(x)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule | None:
        """Return k tanh(t x) of the t in force; None where t depends on the batch."""
        if self.batch and self.eps > 0:
            return None
        t = float(self.sharpness)
        return lambda x: max(1 / t, 1.0) * torch.tanh(t * x)

    def extra_repr(self) -> str:
        """Name the constants."""
        cap = f", eps={self.eps:g}, tau={self.tau:g}, {self.form}" if self.eps else ""
        return f"t={float(self.sharpness):g}{cap}"


class IMB(Quantizer):
    """Balanced, standardised signs with a power-of-two scale for each filter.

    Args:
        estimator: the sign with its backward rule, applied to z.
    """

    bits = 1
    elementwise = False

    def __init__(self, estimator: Quantizer) -> None:
        super().__init__()
        self.estimator = estimator

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latent weight as it is.

        Raises:
            InputError: for filters of one weight, which balancing would erase.
        """
        if 0 < latent.numel() == (latent.shape[0] if latent.dim() > 1 else 1):
            raise InputError(
                f"a weight of shape {tuple(latent.shape)} has filters of one value, of which nothing is left once its mean is "
                "taken away; name the layer in keep=..., or use imb=False"
            )
        return latent

    @torch.no_grad()
    def refresh(self, latent: Tensor) -> None:
        """Set the estimator's cap, where it has one, for this weight."""
        if isinstance(self.estimator, TanhSign):
            self.estimator.refresh(balanced(latent))

    def forward(self, latent: Tensor) -> Tensor:
        """Return s sign(z)."""
        z = balanced(latent)
        return power_of_two(z) * self.estimator(z)

    def scale(self, latent: Tensor) -> Tensor:
        """Return s, (O, 1, ...)."""
        return power_of_two(balanced(latent))

    def level(self, latent: Tensor) -> Tensor:
        """Return sign(z)."""
        return hard_sign(balanced(latent))

    def hard(self, latent: Tensor) -> Tensor:
        """Return s sign(z)."""
        return self.scale(latent) * self.level(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)
