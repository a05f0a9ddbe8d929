r"""What a factor beta on the logits does to an attack's gradient: everything over a grid of beta, found once.

    d l(beta) / dx = beta psi J,       psi = softmax(beta z) - e_y,       J = dz / dx  (d x D)

A large beta saturates the softmax, and psi vanishes on examples that are right; a small one leaves psi large and beta J small. The
norm of the input Hessian, h(beta), has its maximum between. None of it moves the decisions: argmax beta z is the same for all beta.
What rounding makes of psi depends on the dtype, and is measured in it, example by example:

    healthy            entry y of psi is there
    wrong direction    it was rounded to 0: only the pull to other classes is left
    dead               all of psi was rounded to 0

An example whose psi is healthy may still have no gradient: where J is zero (dead backward rules) no temperature helps. `lost`
counts those with a gradient of exact zeros, whatever the reason; float64 tells rounding from a dead net. Means and shares are over
the examples that are right without an attack, for psi of the others never vanishes.

Through sign activations J and all that hangs on it are those of the backward rules.

Shapes: K betas, N examples, d classes, D inputs.

Source: Gupta, Ajanthan, AAAI 2022, arXiv 2003.13511.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.ball import Norm
from qlab.attacks.base import Attack
from qlab.attacks.losses import ce
from qlab.attacks.pgd import PGD
from qlab.attacks.scaling import HNS, NJS, Fixed, Scaling, hessian_norm, hns_beta, jacobians
from qlab.attacks.victim import deployed
from qlab.diagnose.base import Result, check
from qlab.diagnose.recording import ready
from qlab.diagnose.vanishing import DTYPES
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["BETAS", "REGIMES", "Temperature", "Woken", "temperature", "tempering"]

Floats = NDArray[np.float64]
BETAS = tuple(float(b) for b in np.logspace(-3, 2, 51))
REGIMES = ("healthy", "wrong direction", "dead")
RULES: dict[str, Scaling] = {"NJS": NJS(), "HNS": HNS()}
_NUMBERS = 2**22  # in the gradients that are held at once


@dataclass(frozen=True)
class Woken:
    """What one dtype makes of the gradient; see the module docstring.

    Attributes:
        psi: (K, N) ||psi||_2.
        gradient: (K, N) ||d l / dx||_2.
        signs: (K, N) ||sign(d l / dx)||_2 / sqrt(D): 1 where every input is moved, 0 where none is.
        underflow: (K, N) share of psi's d entries that are exactly 0; in exact arithmetic none is.
        regime: (K, N) index of `REGIMES`.
        same: (K, N) whether argmax beta z is the net's decision.
        accuracy: (K,) share of examples that an attack at this beta leaves right; NaN where it was not made (yet).
        rules: the same for "NJS" and "HNS".
        counted: (N,) the examples that means and shares are over: those that are right, or all where none is.
    """

    psi: Floats
    gradient: Floats
    signs: Floats
    underflow: Floats
    regime: NDArray[np.int8]
    same: NDArray[np.bool_]
    accuracy: Floats
    rules: Mapping[str, float]
    counted: NDArray[np.bool_]

    def mean(self, values: NDArray[Any]) -> Floats:
        """Return means (K,) of values (K, N) over the examples that count."""
        return values[:, self.counted].mean(1)

    @property
    def lost(self) -> Floats:
        """Share of examples with an input gradient of exact zeros, (K,)."""
        return self.mean(self.signs == 0)

    @property
    def shares(self) -> Floats:
        """Share of examples in each regime, (3, K)."""
        return np.stack([self.mean(self.regime == i) for i in range(len(REGIMES))])


@dataclass(frozen=True)
class Temperature(Result):
    """A net's gradients over temperatures; see the module docstring.

    Attributes:
        betas: (K,) factors on the logits.
        dtypes: by name, what each makes of it; the first is the net's own unless others were asked for.
        logits: (N, d) of the net, in float64.
        labels: (N,).
        singular: (N, min(d, D)) singular values of J.
        h: (K, N) norm of the input Hessian.
        beta1: NJS's factor of the net.
        njs, hns: (N,) beta that the rules give each example, at the clean inputs.
        attack: which one gave the accuracies; empty where none was made.
        eps: its radius.
        norm: of its ball.
    """

    betas: Floats
    dtypes: Mapping[str, Woken]
    logits: Floats
    labels: NDArray[np.int64]
    singular: Floats
    h: Floats
    beta1: float
    njs: Floats
    hns: Floats
    attack: str
    eps: float
    norm: Norm

    @property
    def own(self) -> str:
        """Name of the first dtype."""
        return next(iter(self.dtypes))

    @property
    def clean(self) -> float:
        """Share of examples that are classified correctly before any attack."""
        return float((self.logits.argmax(1) == self.labels).mean())

    @property
    def gap(self) -> Floats:
        """Delta = z_y - max_{j != y} z_j at beta 1, (N,)."""
        other = self.logits.copy()
        other[np.arange(len(other)), self.labels] = -np.inf
        return self.logits[np.arange(len(other)), self.labels] - other.max(1)

    @property
    def spread(self) -> Floats:
        """Mean singular value of beta J over all examples, (K,)."""
        return self.betas * self.singular.mean()

    def nearest(self, beta: float) -> int:
        """Return the index of the beta of the grid that is nearest, by ratio."""
        return int(np.abs(np.log(self.betas) - math.log(beta)).argmin())

    def probabilities(self, example: int) -> Floats:
        """Return softmax(beta z) of one example for every beta, (K, d)."""
        a = self.betas[:, None] * (self.logits[example] - self.logits[example].max())
        e = np.exp(a)
        return e / e.sum(1, keepdims=True)

    def frame(self) -> pd.DataFrame:
        """Return one row per dtype and beta: means over examples, shares of the regimes, accuracy under attack."""
        import pandas as pd

        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "dtype": name,
                        "beta": self.betas,
                        "error signal": w.mean(w.psi),
                        "singular value": self.spread,
                        "gradient": w.mean(w.gradient),
                        "signs": w.mean(w.signs),
                        "hessian": w.mean(self.h),
                        "lost": w.lost,
                        "underflow": w.mean(w.underflow),
                        **dict(zip(REGIMES, w.shares, strict=True)),
                        "same decision": w.same.mean(1),
                        "accuracy": w.accuracy,
                    }
                )
                for name, w in self.dtypes.items()
            ],
            ignore_index=True,
        )

    def figure(self) -> Figure:
        """Return norms, regimes and the attack's accuracy against beta, with the betas of NJS and HNS."""
        from qlab.plots.temperature import temperature_figure

        return temperature_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        at, w = self.nearest(1.0), self.dtypes[self.own]
        healthy, wrong, dead = w.shares[:, at]
        text = (
            f"Logits of {len(self.labels)} examples, {self.clean:.1%} of them right: median gap {np.median(self.gap):.3g}, mean "
            f"singular value of the input Jacobian {self.singular.mean():.3g}. At beta {self.betas[at]:.3g} in {self.own} the "
            f"error signal of those that are right is healthy for {healthy:.0%}, has the wrong direction for {wrong:.0%} and is "
            f"zero for {dead:.0%}; their input gradient is exactly zero for {w.lost[at]:.0%}"
        )
        for name, other in list(self.dtypes.items())[1:]:
            text += f", in {name} for {other.lost[at]:.0%}"
        text += (
            f". NJS takes beta {np.median(self.njs):.3g} (median), HNS {np.median(self.hns):.3g}. "
            f"{w.same.mean():.0%} of decisions are the same at all temperatures."
        )
        if np.isfinite(w.accuracy).any():
            best = int(np.nanargmin(w.accuracy))
            text += (
                f" {self.attack} ({self.norm}, eps {self.eps:.4g}) leaves {w.accuracy[at]:.1%} right at beta "
                f"{self.betas[at]:.3g} and {w.accuracy[best]:.1%} at beta {self.betas[best]:.3g}"
            )
            text += (
                "".join(f", {value:.1%} with {name}" for name, value in w.rules.items() if math.isfinite(value)) + "."
            )
        return text


def temperature(
    net: nn.Module, x: Tensor, y: Tensor, betas: Sequence[float] | Floats = BETAS, **settings: Any
) -> Temperature:
    """Return what factors on the logits do to the gradients of a net; arguments and errors as of `tempering`."""
    return last(tempering(net, x, y, betas, **settings), Temperature)


def tempering(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    betas: Sequence[float] | Floats = BETAS,
    *,
    dtypes: Sequence[str] | None = None,
    eps: float | None = None,
    norm: Norm = "linf",
    low: float = 0.0,
    high: float = 1.0,
    attack: Attack | None = None,
) -> Generator[Update, None, None]:
    """Yield what `temperature` returns, growing: the gradients in one dtype after the other, then one attack after the other.

    Args:
        net: a method of the lab (what it deploys is looked at) or a torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        betas: (K,) positive factors on the logits, rising.
        dtypes: names of `qlab.diagnose.vanishing.DTYPES`; the net's own and float64 by default.
        eps: radius of attacks at every beta, in the units of x; None for none.
        norm: of their ball.
        low, high: range of inputs for them.
        attack: whose `scaling` is set to each beta, NJS and HNS; PGD of 20 steps by default.

    Raises:
        InputError: betas that are not positive or do not rise; an attack without a scaling; logits that overflow in a dtype; see
            also `qlab.diagnose.base.check`.
        UnknownNameError: no such dtype.
    """
    grid = np.asarray(betas, dtype=np.float64).reshape(-1)
    if not (len(grid) and (grid > 0).all() and np.isfinite(grid).all() and (np.diff(grid) > 0).all()):
        raise InputError(f"betas are {list(grid[:5])}; expected positive numbers that rise")
    attack = PGD() if attack is None else attack
    if not hasattr(attack, "scaling"):
        raise InputError(f"{attack.name} has no `scaling`; a temperature changes nothing about it")
    net = deployed(net)
    check(net, x, y)
    own = next((name for name, dtype in DTYPES.items() if dtype == x.dtype), str(x.dtype).removeprefix("torch."))
    names = list(dict.fromkeys((own, "float64") if dtypes is None else dtypes))
    for name in names:
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, DTYPES)
    if not names:
        raise InputError(f"name at least one dtype of {', '.join(DTYPES)}")
    found = _of_the_net(net, x, y, grid, attack, eps, norm)
    nets: dict[str, tuple[nn.Module, Tensor]] = {}
    tries = len(names) * (len(grid) + len(RULES)) if eps is not None else 0
    total, done = len(names) * 4 + tries, 0
    for name in names:
        try:
            there, points, _ = ready(net, x, y, "cross_entropy", grid.tolist(), DTYPES[name], 1)
        except RuntimeError as error:
            raise InputError(f"the net does not run in {name}: {error}; name the dtypes it does run in") from error
        nets[name] = there, points
        found = replace(found, dtypes={**found.dtypes, name: _woken(there, points, y, grid)})
        done += 4
        yield Update(done / total, f"gradients in {name}", found)
    if eps is None:
        return
    for name, (there, points) in nets.items():
        rules: list[tuple[int | str, Scaling]] = [(k, Fixed(float(b))) for k, b in enumerate(grid)]
        for key, rule in [*rules, *RULES.items()]:
            tried = replace(attack, scaling=rule)  # type: ignore[call-arg]
            accuracy = tried(there, points, y, eps, norm=norm, low=low, high=high).accuracy
            found = replace(found, dtypes={**found.dtypes, name: _with(found.dtypes[name], key, accuracy)})
            done += 1
            what = f"beta {grid[key]:.3g}" if isinstance(key, int) else key
            yield Update(done / total, f"{attack.name} in {name}, {what}", found)


def _of_the_net(
    net: nn.Module, x: Tensor, y: Tensor, betas: Floats, attack: Attack, eps: float | None, norm: Norm
) -> Temperature:
    """Return what does not depend on a dtype: the Jacobian's singular values, h, and the betas of the rules."""
    njs = NJS()
    logits, singular, h, hns = [], [], [], []
    done = 0
    for z, J in jacobians(net, x):
        J = J.double()
        G = J @ J.transpose(1, 2)
        logits.append(z.double())
        singular.append(torch.linalg.svdvals(J))
        h.append(hessian_norm(torch.as_tensor(betas, device=z.device), z, G))
        hns.append(hns_beta(z, G, y[done : done + len(z)]))
        done += len(z)
    z, mu = torch.cat(logits), torch.cat(singular)
    mean = float(mu[: njs.images].mean())
    beta1 = 1 / mean if mean > 0 else 1.0
    arrays: dict[str, Any] = {
        "logits": z,
        "labels": y,
        "singular": mu,
        "h": torch.cat(h).T,
        "njs": njs.factors(beta1, None, z, y),
        "hns": torch.cat(hns),
    }
    return Temperature(
        betas=betas,
        dtypes={},
        beta1=beta1,
        attack="" if eps is None else attack.described,
        eps=math.nan if eps is None else float(eps),
        norm=norm,
        **{name: value.cpu().numpy() for name, value in arrays.items()},
    )


def _woken(net: nn.Module, x: Tensor, y: Tensor, betas: Floats) -> Woken:
    """Return what the dtype of net and inputs makes of the gradient."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = net(x)
    flat = z.detach()
    psis = torch.stack([_error_signal(beta, flat, y) for beta in betas.tolist()])
    decision = flat.argmax(-1)
    same = torch.stack([(beta * flat).argmax(-1) == decision for beta in betas.tolist()])
    factors = torch.as_tensor(betas, device=z.device).to(z.dtype)[:, None, None]
    gradient, signs = [], []
    for cotangents in (factors * psis).split(max(1, _NUMBERS // x.numel())):
        g = None
        if z.requires_grad:
            (g,) = torch.autograd.grad(z, x, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
        g = (x.new_zeros(len(cotangents), *x.shape) if g is None else g).flatten(2)
        gradient.append(g.double().norm(dim=2))
        signs.append((g != 0).double().mean(2).sqrt())
    own = psis.gather(2, y.expand(len(betas), -1)[..., None])[..., 0]
    regime = (own == 0).to(torch.int8) + (psis == 0).all(2).to(torch.int8)
    arrays: dict[str, Any] = {
        "psi": psis.double().norm(dim=2),
        "gradient": torch.cat(gradient),
        "signs": torch.cat(signs),
        "underflow": (psis == 0).double().mean(2),
        "regime": regime,
        "same": same,
        "counted": decision == y if bool((decision == y).any()) else torch.ones_like(y, dtype=torch.bool),
    }
    return Woken(
        **{name: value.cpu().numpy() for name, value in arrays.items()},
        accuracy=np.full(len(betas), np.nan),
        rules=dict.fromkeys(RULES, math.nan),
    )


def _error_signal(beta: float, z: Tensor, y: Tensor) -> Tensor:
    """Return psi (N, d) as autograd finds it in the dtype of z."""
    scaled = (beta * z).requires_grad_()
    with torch.enable_grad():
        (psi,) = torch.autograd.grad(ce(scaled, y).sum(), scaled)
    return psi


def _with(woken: Woken, key: int | str, accuracy: float) -> Woken:
    if isinstance(key, str):
        return replace(woken, rules={**woken.rules, key: accuracy})
    accuracies = woken.accuracy.copy()
    accuracies[key] = accuracy
    return replace(woken, accuracy=accuracies)
