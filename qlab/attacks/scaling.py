r"""Temperature scaling: attack beta f(x) instead of f(x), where beta > 0 wakes a saturated softmax up.

    d l(beta) / dx = beta psi J,     psi = p(beta) - e_y,   p(beta) = softmax(beta z),   J = dz / dx        (d x D)

The decision of the net is the same for every beta; the attacker's loss is not. For beta -> inf psi vanishes on examples that are
right, for beta -> 0 beta J does. beta is a constant for the backward pass. Two rules choose it; with PGD they are PGD++, with FGSM
FGSM++:

    attack = PGD(scaling=NJS()),   attack = PGD(scaling=HNS())

NJS, network Jacobian scaling. beta1, one number for the net, makes the mean singular value of beta1 J equal 1. At every step an
example whose softmax still saturates, 1 - softmax(beta1 z)_y <= rho, is scaled down by Proposition 1:

    beta < beta_rho = log((d - 1) (1 - rho) / rho) / gamma    =>    1 - max softmax(beta z) > rho,     gamma = max z - min z

HNS, Hessian norm scaling. One number for each example, found at the start point: the maximum of the norm of the loss's Hessian by
the input. Where the net is piecewise linear, with S = diag(p) - p p' and the Gram matrix G = J J',

    h(beta) = || beta^2 J' S J ||_F = beta^2 sqrt(tr(S G S G))

so no D x D matrix is made. S annihilates constants: rows of J count only by their difference from the top class's, which is how h
is computed, free of cancellation where p is nearly one-hot. With two classes h is greatest where t tanh(t / 2) = 2,
t = beta (z_1 - z_2) = 2.39936, whatever J is.

Deviations from the paper's code, on purpose: a logarithmic grid (its 100 equally spaced points, `grid="reference"`, have about two
near the maximum); logits whose top two tie, where that grid is infinite, get beta = 1 / gamma; a Jacobian of zeros gives beta = 1.
Through sign activations J is the product of backward rules; on smooth nets h lacks the term of dJ / dx.

Source: Gupta, Ajanthan, AAAI 2022, arXiv 2003.13511.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from qlab.attacks.victim import Victim

__all__ = [
    "HNS",
    "NJS",
    "UNSCALED",
    "Fixed",
    "Scaling",
    "Unscaled",
    "beta_rho",
    "hessian_norm",
    "hns_beta",
    "hns_grid",
    "jacobians",
    "njs_beta1",
    "scaled",
]

Grid = Literal["log", "reference"]
GRIDS: dict[str, int] = {"log": 200, "reference": 100}
TIE = 1e-6  # share of gamma below which the top two logits count as equal
_NUMBERS = 2**22  # in the Jacobians that are made at once, or the probabilities of a grid


class Scaling(ABC):
    """A rule for beta: `bind` once for a net, `start` once for each start point, `factors` at every step."""

    def bind(self, victim: Victim, x: Tensor, y: Tensor) -> Any:
        """Return what is found once for a net on clean inputs x (N, ...), y (N,)."""
        return None

    def start(self, bound: Any, victim: Victim, x1: Tensor, y: Tensor) -> Tensor | None:
        """Return what is found once for each start point x1 (n, ...): one number each (n,), or None."""
        return None

    @abstractmethod
    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return beta (n,) for logits z (n, d) without a graph."""


@dataclass(frozen=True)
class Unscaled(Scaling):
    """beta = 1: the attack as its paper has it."""

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return ones (n,)."""
        return torch.ones(len(z), dtype=z.dtype, device=z.device)


UNSCALED = Unscaled()


@dataclass(frozen=True)
class Fixed(Scaling):
    """One beta for all.

    Args:
        beta: the factor, positive.
    """

    beta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise InputError(
                f"beta is {self.beta!r}; expected a positive number: another would change the net's decisions"
            )

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return beta, (n,)."""
        return torch.full((len(z),), self.beta, dtype=z.dtype, device=z.device)


@dataclass(frozen=True)
class NJS(Scaling):
    """Network Jacobian scaling: beta1 of the net, times a factor of Proposition 1 where an example's softmax saturates.

    Args:
        rho: least 1 - p_y, in (0, 1/2).
        images: M, the first of the clean inputs, whose Jacobians give beta1.
    """

    rho: float = 0.01
    images: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.rho < 0.5:
            raise InputError(f"rho is {self.rho!r}; expected a number in (0, 1/2), which two classes can reach")
        if self.images < 1:
            raise InputError(f"images is {self.images!r}; expected at least 1")

    def bind(self, victim: Victim, x: Tensor, y: Tensor) -> float:
        """Return beta1 of the first images."""
        return _inverse_mean(_counted(victim, x[: self.images]))

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return beta1 beta2, (n,)."""
        s = bound * z.double()
        p = torch.softmax(s, -1)
        rest = p.sum(-1) - p.gather(-1, y[:, None])[:, 0]
        # Saturated logits are not all equal, so beta_rho is finite there.
        return (bound * torch.where(rest <= self.rho, beta_rho(s, self.rho), torch.ones_like(rest))).to(z.dtype)


@dataclass(frozen=True)
class HNS(Scaling):
    """Hessian norm scaling: for each example the beta at which the loss's input Hessian is largest, at the start point.

    Args:
        grid: "log": 200 betas, evenly spaced by logarithm; "reference": the paper's 100, evenly spaced.
    """

    grid: Grid = "log"

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise UnknownNameError("grid", self.grid, GRIDS)

    def start(self, bound: Any, victim: Victim, x1: Tensor, y: Tensor) -> Tensor:
        """Return beta of each start point."""
        betas, done = [], 0
        for z, J in _counted(victim, x1):
            J = J.double()
            betas.append(hns_beta(z, J @ J.transpose(1, 2), y[done : done + len(z)], self.grid))
            done += len(z)
        return torch.cat(betas)

    def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
        """Return the start points' betas, (n,)."""
        assert started is not None
        return started.to(z.dtype)


def scaled(
    loss: Callable[[Tensor, Tensor], Tensor], scaling: Scaling, bound: Any, started: Tensor | None, y: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return f(z) = loss(beta z, y), for one step: beta is found at the first call, from the logits of the points themselves.

    Later calls (of an estimator that asks around a point) keep it. Were it found anew from each neighbour's logits, their
    difference would be a derivative through beta, which the rule holds constant.

    Args:
        loss: logits (n, d) and labels to losses (n,).
        scaling, bound, started: the rule, and what its `bind` and `start` returned.
        y: (n,) labels.
    """
    beta: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        if not beta:
            beta.append(scaling.factors(bound, started, z.detach(), y))
        return loss(beta[0][:, None] * z, y)

    return f


def jacobians(net: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (n, d) and J = dz / dx (n, d, D) of consecutive parts of x, d backward passes at once; all detached.

    Args:
        net: a torch module in eval mode; examples must not see each other. A net without any gradient has a J of zeros.
        x: (N, ...) inputs.
    """
    x, at, size = x.detach(), 0, 1  # the first part is one input, which tells how many classes there are
    while at < len(x):
        part = x[at : at + size].clone().requires_grad_()
        with torch.enable_grad():
            z = net(part)
        n, d = z.shape
        J = None
        if z.requires_grad:
            rows = torch.eye(d, dtype=z.dtype, device=z.device)[:, None].expand(d, n, d)
            (J,) = torch.autograd.grad(z, part, rows, is_grads_batched=True, allow_unused=True)
        J = part.new_zeros(d, *part.shape) if J is None else J
        yield z.detach(), J.detach().flatten(2).transpose(0, 1)
        at, size = at + size, max(1, _NUMBERS // (d * x[0].numel()))


def njs_beta1(net: nn.Module, x: Tensor) -> float:
    r"""Return beta1 = 1 / mean_{i,j} mu_j(J_i), the factor that makes the mean singular value 1.

    For f(x) = W x it is min(d, D) / ||W||_* (nuclear norm). 1 where all Jacobians are zero: no factor repairs that.

    Args:
        net: a torch module in eval mode.
        x: (M, ...) clean inputs.

    Source: Gupta, Ajanthan 2022, algorithm 1.
    """
    return _inverse_mean(jacobians(net, x))


def beta_rho(z: Tensor, rho: float) -> Tensor:
    r"""Return the bound of Proposition 1, (n,): below it the softmax of beta z leaves more than rho to the other classes.

        beta_rho = log((d - 1) (1 - rho) / rho) / (max z - min z)

    Infinite where all logits are equal.

    Args:
        z: (n, d) logits.
        rho: in (0, (d - 1) / d).

    Raises:
        InputError: rho out of range.
    """
    return _rise(rho, z.shape[-1]) / (z.amax(-1) - z.amin(-1))


def hessian_norm(beta: Tensor, z: Tensor, G: Tensor) -> Tensor:
    r"""Return h(beta) = beta^2 sqrt(tr(S G S G)), S = diag(p) - p p', p = softmax(beta z), (n, K) in float64.

    It is the Frobenius norm of the input Hessian of cross-entropy, for every label, where the net is piecewise linear.

    Args:
        beta: (K,) factors, or (n, K).
        z: (n, d) logits.
        G: (n, d, d) Gram matrices J J'.
    """
    z, G, beta = z.double(), G.double(), beta.double().expand(len(z), -1)
    top = z.argmax(-1)[:, None, None]
    row = G.gather(1, top.expand(-1, 1, G.shape[-1]))
    # The Gram matrix of the rows' differences from the top class's; its own row is 0, so p's entry for it does not matter.
    C = G - row - row.transpose(1, 2) + row.gather(2, top)
    p = torch.softmax(beta[..., None] * (z - z.amax(-1, keepdim=True))[:, None], -1)
    q = p.scatter(-1, top.expand(-1, p.shape[1], 1), 0.0)
    Cq = q @ C
    square = (q * (q @ (C * C))).sum(-1) - 2 * (q * Cq.square()).sum(-1) + (q * Cq).sum(-1).square()
    return beta.square() * square.clamp(min=0).sqrt()


def hns_grid(z: Tensor, grid: Grid = "log") -> Tensor:
    r"""Return the betas that HNS looks at, (n, K) in float64: from t_0 / gamma' to t_1 / gamma', gamma' = z_(1) - z_(2).

    t is what Proposition 1 has over gamma, at rho = 1 - 1/d - 0.01 and at rho = 1e-72. Infinite where the top two tie.

    Args:
        z: (n, d) logits.
        grid: as of `HNS`.
    """
    d = z.shape[-1]
    ends = _rise(1 - 1 / d - 0.01, d), _rise(1e-72, d)  # python's floats: in float32 the second rho is 0
    if grid == "log":
        t = torch.linspace(math.log(ends[0]), math.log(ends[1]), GRIDS[grid], dtype=torch.float64).exp()
    else:
        t = torch.linspace(*ends, GRIDS[grid], dtype=torch.float64)
    top = z.double().topk(2, dim=-1).values
    return t.to(z.device) / (top[:, :1] - top[:, 1:])


def hns_beta(z: Tensor, G: Tensor, y: Tensor, grid: Grid = "log") -> Tensor:
    """Return HNS's beta of each example, (n,) in float64.

    1 where the example is misclassified already and where h is largest at an end of the grid (zero everywhere, say); 1 / gamma
    where the top two logits tie, and 1 if all do.

    Args:
        z: (n, d) logits.
        G: (n, d, d) Gram matrices J J'.
        y: (n,) labels.
        grid: as of `HNS`.
    """
    z = z.double()
    one = z.new_ones(len(z))
    top = z.topk(2, dim=-1).values
    gamma = z.amax(-1) - z.amin(-1)
    tied = top[:, 0] - top[:, 1] <= TIE * gamma
    betas = torch.where(tied[:, None], 1.0, hns_grid(z, grid))
    rows = max(1, _NUMBERS // (betas.shape[1] * z.shape[1]))
    h = torch.cat([hessian_norm(*part) for part in zip(betas.split(rows), z.split(rows), G.split(rows), strict=True)])
    best = h.argmax(-1)
    inside = (best > 0) & (best < betas.shape[1] - 1)
    found = torch.where(inside, betas.gather(1, best[:, None])[:, 0], one)
    found = torch.where(tied, torch.where(gamma > 0, 1 / gamma, one), found)
    return torch.where(z.argmax(-1) == y, found, one)


def _rise(rho: float, d: int) -> float:
    """Return log((d - 1) (1 - rho) / rho)."""
    if not 0 < rho < (d - 1) / d:
        raise InputError(f"rho is {rho!r}; with {d} classes expected a number in (0, {(d - 1) / d:.4g})")
    return math.log((d - 1) * (1 - rho) / rho)


def _inverse_mean(parts: Iterator[tuple[Tensor, Tensor]]) -> float:
    mu = torch.cat([torch.linalg.svdvals(J.double()).flatten() for _, J in parts])
    mean = float(mu.mean())
    return 1 / mean if mean > 0 else 1.0


def _counted(victim: Victim, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the Jacobians of the victim's net, booking a question and d backward passes for each input."""
    for z, J in jacobians(victim.differentiable, x):
        victim.count["backward"] += len(z) * (z.shape[1] - 1)
        yield z, J
