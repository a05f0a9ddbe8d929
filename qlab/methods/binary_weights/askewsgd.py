r"""ASkewSGD: float weights, constrained to ever smaller intervals around the levels; only the velocity is constrained.

Training with weights in a finite set Q becomes a sequence of smooth problems, min l(w) with psi_eps(w_i) >= 0 for all i:

    phi(w) = (w - a)^2 (w - b)^2      between neighbouring levels a, b;   (w - c)^2 beyond the outermost level c
    psi_eps = eps - phi               binary, levels +-1: feasible where |w^2 - 1| <= sqrt(eps)

The feasible set is a union of intervals around the levels, disconnected for eps <= gap^4 / 16 (binary: 1), and shrinks to Q as
eps -> 0. It is never projected on. With u the stochastic gradient at w, every weight moves along

    v = argmin 1/2 |v + u|^2   with   v_i psi'(w_i) >= -alpha psi(w_i)   where psi(w_i) <= 0

    psi > 0:                          v = -u                                   feasible: the plain step
    -u psi' >= -alpha psi:            v = -u                                   the gradient repairs it fast enough
    else:                             v = clip(-alpha psi / psi', -M, M)       psi grows at the rate alpha
    psi' = 0, psi < 0 (a midpoint):   v = M                                    to the right, a convention
    w <- w + gamma v

Outside of the feasible set the loss has a say only where it repairs faster. The constrained velocity points to the level on the
own side of the midpoint: it never changes a sign. -v is handed to the optimizer in place of the gradient: SGD in the theory,
Adam in the experiments. Forward and backward pass see w itself, there is no straight-through rule; deployed: sign(w).

Schedule: eps = 1 for the first half of the paper's run of `schedule_epochs`, then times `eps_rate` an epoch; stretched over the
run at hand.

Source: Leconte, Schechtman, Moulines, AISTATS 2023, arXiv 2211.03741; constants also from the authors' code (aistats2023/537).
Deviations: binary weights are clamped to [-1, 1] after a step, as the authors' code does and Algorithm 1 does not; a midpoint
moves by the convention above, where their code takes the plain gradient. The learning rate follows a cosine here; the paper
halves it at epochs 20 and 40 (`lr_schedule="constant", halvings=(0.2, 0.4)`). The paper's table names eps 0.88 at epoch 50, where
its own formula 0.88^(e - 50) gives 1; the formula is followed, which also gives the table's 0.15 and 0.006.

Shapes: w, u, v, phi, psi are those of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.base import Rule

__all__ = ["ASkewSGD", "Interval", "direction", "neighbours", "phi", "psi_slope", "widest"]


def neighbours(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the levels a <= w < b on both sides of each weight; beyond the outermost level c both are c."""
    k = torch.bucketize(w, levels, right=True)  # how many levels are at or below w
    last = len(levels) - 1
    return levels[(k - 1).clamp(min=0)], levels[k.clamp(max=last)]


def phi(w: Tensor, levels: Tensor) -> Tensor:
    """Return phi(w) >= 0, zero on the levels; see the module docstring.

    Args:
        w: weights.
        levels: (K,), ascending.
    """
    return _phi(w, *neighbours(w, levels))


def _phi(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, ((w - a) * (w - b)).square(), (w - a).square())


def psi_slope(w: Tensor, levels: Tensor) -> Tensor:
    """Return psi'(w) = -phi'(w), which does not depend on eps; zero on levels and at midpoints."""
    return _psi_slope(w, *neighbours(w, levels))


def _psi_slope(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = -2 * (w - a) * (w - b) * ((w - a) + (w - b))
    return torch.where(a < b, inside, -2 * (w - a))


def widest(levels: Tensor) -> float:
    """Return the largest eps for which no two intervals meet: min gap^4 / 16."""
    return float(levels.diff().min()) ** 4 / 16


def direction(u: Tensor, w: Tensor, eps: float, alpha: float, M: float, levels: Tensor) -> Tensor:
    """Return the velocity v, elementwise.

    Args:
        u: gradient at w.
        w: weights.
        eps: half width of the constraint, in units of phi.
        alpha: rate at which a violation shrinks.
        M: largest constrained speed.
        levels: (K,), ascending.
    """
    a, b = neighbours(w, levels)  # of every weight, once for both
    psi, slope = eps - _phi(w, a, b), _psi_slope(w, a, b)
    free = (psi > 0) | (-u * slope >= -alpha * psi)
    repair = torch.where(slope == 0, math.inf, -alpha * psi / slope)
    return torch.where(free, -u, repair.clamp(-M, M))


class Interval(Quantizer):
    """The weight itself, with the width eps of its interval; deployed sign(w).

    Args:
        start: "uniform" for U(-1, 1), "net" for the net's own weights.
    """

    bits = 1
    eps: Tensor

    def __init__(self, start: Literal["uniform", "net"] = "uniform") -> None:
        super().__init__()
        self.start = start
        self.register_buffer("eps", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, latent: Tensor) -> Tensor:
        """Return w."""
        return latent

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(w)."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the identity."""
        return lambda x: x

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents as `start` says."""
        return latent if self.start == "net" else 2 * torch.rand(latent.shape, generator=generator) - 1

    def extra_repr(self) -> str:
        """Name eps."""
        return f"eps={float(self.eps):g}"


class ASkewSGD(Method):
    """ASkewSGD for binary weights.

    Args:
        net: a plain net or the spec of one. The paper's nets have batch norm without scale and shift after every layer.
        alpha: rate at which violations shrink; 0.5 is good in the paper, 0.1 to 5 were tried.
        M: largest constrained speed; any positive number will do in the theory.
        eps_rate: factor of eps per epoch once annealing has begun; the paper's 0.88.
        eps_constant: share of the run with eps = 1 before that.
        schedule_epochs: epochs of the run for which `eps_rate` was chosen, stretched over the run at hand.
        clamp: clip weights to [-1, 1] after every step.
        start: "uniform" draws U(-1, 1), "net" takes the net's own weights. Small weights are violated as soon as eps falls
            below 1, and are then pushed to their present sign: rounding. A wide start or a large rate prevents that.
        lr: learning rate of Adam; the paper's best is 0.06 in 100 epochs of 500 steps, short runs want more.
        lr_schedule: of the learning rate.
        halvings: shares of the run after each of which the learning rate is halved, besides; the paper's are 0.2 and 0.4.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["askewsgd"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        alpha: float = 0.5,
        M: float = 10.0,
        eps_rate: float = 0.88,
        eps_constant: float = 0.5,
        schedule_epochs: int = 100,
        clamp: bool = True,
        start: Literal["uniform", "net"] = "uniform",
        lr: float = 0.2,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        halvings: Sequence[float] = (),
        **kwargs: Any,
    ) -> None:
        for name, value, good, expected in (
            ("alpha", alpha, 0 <= alpha < math.inf, "a number of at least 0"),
            ("M", M, 0 < M < math.inf, "a positive number"),
            ("eps_rate", eps_rate, 0 < eps_rate <= 1, "in (0, 1]"),
            ("eps_constant", eps_constant, 0 <= eps_constant <= 1, "a share of the run in [0, 1]"),
            ("schedule_epochs", schedule_epochs, 1 <= schedule_epochs < math.inf, "a finite number of at least 1"),
            ("start", start, start in ("uniform", "net"), "'uniform' or 'net'"),
            (
                "halvings",
                halvings,
                isinstance(halvings, Sequence) and all(0 <= share <= 1 for share in halvings),
                "a list of shares of the run in [0, 1]",
            ),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(net, lr=lr, lr_schedule=lr_schedule, **kwargs)

    def weight_quantizer(self) -> Quantizer:
        """Return the interval of one weight."""
        return Interval(self.h.start)

    def schedule(self, progress: float) -> dict[str, float]:
        """Return eps: 1, then times `eps_rate` for every epoch of the schedule."""
        h = self.h
        epoch = math.floor(progress * h.schedule_epochs + 1e-9)
        begun = math.floor(h.eps_constant * h.schedule_epochs + 1e-9)
        return {"eps": h.eps_rate ** max(epoch - begun, 0)}

    def lr_factor(self, progress: float) -> float:
        """Return the share of `lr` in force at `progress` in [0, 1]."""
        return super().lr_factor(progress) * 0.5 ** sum(progress >= share for share in self.h.halvings)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put -v in the place of the gradient of every constrained weight."""
        for t in quantized_tensors(self.net):
            if t.latent.grad is not None:
                levels = t.quantizer.levels(t.latent.dtype)
                assert levels is not None
                eps = float(t.quantizer.get_buffer("eps"))
                v = direction(t.latent.grad, t.latent.detach(), eps, self.h.alpha, self.h.M, levels.to(t.latent.device))
                t.latent.grad = -v

    def post_step(self) -> None:
        """Clip weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)
