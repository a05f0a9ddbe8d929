r"""Indicators of attack failure: six ways in which one attack fails without saying so.

unavailable gradients    share of examples with a gradient of exactly zero at an iterate, while not yet misclassified
unstable predictions     mean_r min(1, |L(x' + r) - L(x')| / |L(x')|),  r uniform in a small ball about where the attack stands
silent success           an iterate was misclassified and the last one is not
incomplete optimisation  L rescaled to [0, 1] along the path, running maximum: its growth over the last ten steps > 0.05
transfer failure         misclassified by the simulated net, and not by the packed one that is shipped
unconstrained failure    not broken even where every point of the range is allowed

The first four need the iterates: `attack(..., trace=True)`, best with `early_stop=False`. The fifth compares the net with `fast`,
the net of the same logits that answers in its place: it also is a test of that net's kernels. An indicator tells that *this run* is
not to be trusted; what it says of the net is for the checks of `qlab.attacks.honesty`.

L is the margin: the cross-entropy of a well trained net is so near zero that any change of it is large beside it.

Source: Pintor et al. 2022, arXiv 2106.09947; the loss, the ball about the last iterate and its radius are ours.

Shapes: N examples, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.ball import Ball
from qlab.attacks.base import Attacked
from qlab.attacks.losses import margin, misclassified
from qlab.attacks.victim import deployed
from qlab.data.seeding import generator
from qlab.errors import InputError

__all__ = ["Indicator", "indicators"]

POINTS = 100
SMALL = 0.1  # radius of the ball of unstable predictions, in eps
UNSTABLE = 0.5
LAST = 10
INCOMPLETE = 0.05
SHARES = {"silent success": 0.05, "incomplete optimisation": 0.1}  # allowed shares of examples; none of the others


@dataclass(frozen=True)
class Indicator:
    """One indicator for one run.

    Args:
        name: as in the module docstring.
        value: its mean over examples.
        limit: above which it is raised.
        each: (N,) its value for each example.
        words: what to do about it.
    """

    name: str
    value: float
    limit: float
    each: NDArray[np.float64]
    words: str

    @property
    def raised(self) -> bool:
        """Whether it warns."""
        return self.value > self.limit


def indicators(
    net: nn.Module,
    found: Attacked,
    *,
    fast: Callable[[Tensor], Tensor] | None = None,
    unbounded: Attacked | None = None,
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    seed: int = 0,
) -> tuple[Indicator, ...]:
    """Return the indicators that can be had of a run.

    Args:
        net: what was attacked.
        found: the run, with its iterates for the first four indicators.
        fast: the packed net, for transfer failure.
        unbounded: the same attack on the same examples without a bound, for unconstrained failure.
        low, high: the range of inputs.
        seed: of the random points.

    Raises:
        InputError: a run without iterates, where neither `fast` nor `unbounded` is given.
    """
    net = deployed(net)
    out: list[Indicator] = []
    if found.trace:
        out = _of_path(net, found, low, high, seed)
    if fast is not None:
        out.append(_transfer(net, fast, found))
    if unbounded is not None:
        failed = ~unbounded.success
        out.append(
            _indicator(
                "unconstrained failure", failed, "the attack is broken for this net, whatever eps: see the checks"
            )
        )
    if not out:
        raise InputError("this run has no iterates: attack with trace=True, best also with early_stop=False")
    return tuple(out)


def _indicator(name: str, each: NDArray[np.bool_] | NDArray[np.float64], words: str, limit: float = 0.0) -> Indicator:
    each = each.astype(np.float64)
    return Indicator(name, float(each.mean()) if len(each) else 0.0, limit, each, words)


def _of_path(net: nn.Module, found: Attacked, low: float | Tensor, high: float | Tensor, seed: int) -> list[Indicator]:
    """Return the four that look at the iterates."""
    steps = found.trace or ()
    with torch.no_grad():
        wrong = torch.stack([misclassified(net(step.points), found.y) for step in steps])  # (T, N)
    clean = torch.as_tensor(found.clean, device=wrong.device)
    before = wrong.cumsum(0) == 0  # not broken yet
    out = []
    if all(step.gradient is None for step in steps[:-1]) and len(steps) > 1:
        pass  # an attack without gradients has none to miss
    else:
        zero = [
            (step.gradient.flatten(1) == 0).all(1) & before[t] & step.loss.isfinite()
            for t, step in enumerate(steps)
            if step.gradient is not None
        ]
        dead = torch.stack(zero).any(0) & clean if zero else torch.zeros_like(clean)
        out.append(
            _indicator(
                "unavailable gradients",
                dead.cpu().numpy(),
                "another loss or temperature; BPDA or smoothing if the gradient is zero for these too",
            )
        )
    out.append(_unstable(net, found, low, high, seed))
    silent = (wrong.any(0) & ~wrong[-1] & clean).cpu().numpy()
    out.append(
        _indicator("silent success", silent, "keep the best iterate, not the last one", SHARES["silent success"])
    )
    out.append(_incomplete(torch.stack([step.loss for step in steps]), (wrong.any(0) | ~clean)))
    return out


def _unstable(net: nn.Module, found: Attacked, low: float | Tensor, high: float | Tensor, seed: int) -> Indicator:
    """Return how much the margin changes about where the attack stands."""
    x = (found.trace or ())[-1].points
    radius = SMALL * found.eps if np.isfinite(found.eps) else SMALL
    ball = Ball.of(x, radius, found.norm, low, high)
    noise = generator("unstable predictions", seed)
    with torch.no_grad():
        m = margin(net(x), found.y).double()
        total = torch.zeros_like(m)
        for _ in range(POINTS):
            moved = margin(net(ball.random(noise)), found.y).double()
            total += ((moved - m).abs() / m.abs().clamp(min=1e-12)).clamp(max=1)
    each = (total / POINTS).cpu().numpy()
    return _indicator("unstable predictions", each, "smoothing (NES), or EOT for a random net", UNSTABLE)


def _incomplete(losses: Tensor, done: Tensor) -> Indicator:
    """Return for which examples that were not broken the loss (T, N) still grew at the end."""
    losses = losses[losses.isfinite().any(1)].double()
    grown = torch.zeros(losses.shape[1], dtype=torch.bool, device=losses.device)
    if len(losses) > LAST:
        filled = torch.where(losses.isfinite(), losses, -torch.inf)
        best = filled.cummax(0).values
        lowest = torch.where(losses.isfinite(), losses, torch.inf).amin(0)
        wide = best[-1] - lowest
        grown = (wide > 0) & ((best[-1] - best[-1 - LAST]) > INCOMPLETE * wide)
    each = (grown & ~done).cpu().numpy()
    name = "incomplete optimisation"
    return _indicator(name, each, "more steps, or another step size", SHARES[name])


def _transfer(net: nn.Module, fast: Callable[[Tensor], Tensor], found: Attacked) -> Indicator:
    """Return which adversarial examples of the simulated net the packed one classifies correctly."""
    with torch.no_grad():
        simulated = misclassified(net(found.adversarial), found.y)
        packed = misclassified(fast(found.adversarial), found.y)
    each = (simulated & ~packed).cpu().numpy()
    return _indicator("transfer failure", each, "the packed net is not the simulated one: compare their logits")
