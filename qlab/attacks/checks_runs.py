"""The runs behind the checks: each attack is made once, and every check that needs it looks at the same result.

A run is known by the attack's settings, its radius, the examples it is made on and the net it is made against: the net as it is,
or a copy of it in float64. Everything that broke an example of the net as it is, within eps, counts towards the worst case.

Shapes: x (N, ...), y (N,), successes (N,).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.ball import Norm
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.losses import ce, margin, misclassified
from qlab.attacks.pgd import PGD
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update

__all__ = ["BUDGETS", "Budget", "Exam"]

T = TypeVar("T")
Work = Generator[Update, None, T]

Successes = NDArray[np.bool_]


@dataclass(frozen=True)
class Budget:
    """How much the checks may ask.

    Args:
        steps: T of the gradient attacks.
        restarts: of check 7.
        queries: of the search with squares, for each example.
        points: random points for each example that the gradient attack did not break.
        looked: examples whose gradients are compared with smoothed ones.
        traced: examples whose paths are kept.
    """

    steps: int = 20
    restarts: int = 10
    queries: int = 1000
    points: int = 10_000
    looked: int = 32
    traced: int = 64

    def __post_init__(self) -> None:
        small = [name for name, value in vars(self).items() if value < (2 if name == "restarts" else 1)]
        if small:
            raise InputError(f"the budget's {', '.join(small)} is too small; expected at least 1, and 2 restarts")


BUDGETS: dict[str, Budget] = {
    "quick": Budget(restarts=5, queries=300, points=1000, looked=16, traced=32),
    "standard": Budget(),
    "thorough": Budget(steps=100, queries=5000, points=50_000, looked=64),
}


def budget_of(budget: str | Budget) -> Budget:
    """Return a budget by its name; one of your own as it is.

    Raises:
        UnknownNameError: no such budget.
    """
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise UnknownNameError("budget", budget, BUDGETS)
    return BUDGETS[budget]


@dataclass
class Exam:
    """A net, a batch, and the runs made so far.

    Args:
        net: deployed, in eval mode.
        x, y: the batch.
        eps, norm, low, high, fast: as for an attack.
        twin: a float net that transfer attacks start from.
        budget: how much to ask.
        seed: of all random choices.
        random: whether it answers twice differently: it is attacked on the mean of draws alone.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    norm: Norm
    low: float | Tensor
    high: float | Tensor
    fast: Any = None
    twin: nn.Module | None = None
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    random: bool = False
    forward: int = 0
    backward: int = 0

    def __post_init__(self) -> None:
        self._runs: dict[Any, Attacked] = {}
        self.broken: Successes = np.zeros(len(self.x), bool)
        self.tried: dict[Attack, Successes] = {}

    def __len__(self) -> int:
        return len(self.x)

    # The net

    @cached_property
    def z(self) -> Tensor:
        """Logits (N, d) of the batch, as the attacks see them."""
        with torch.no_grad():
            return self.net(self.x)

    @cached_property
    def clean(self) -> Successes:
        """Which examples are classified correctly, (N,)."""
        return (~misclassified(self.z, self.y)).cpu().numpy()

    @cached_property
    def double(self) -> nn.Module:
        """A copy of the net in float64.

        Raises:
            InputError: the net works in its own precision alone.
        """
        net = copy.deepcopy(self.net).double().eval()
        try:
            with torch.no_grad():
                net(self.x[:2].double())
        except RuntimeError as error:
            raise InputError(f"the net does not work in float64: {error}") from error
        return net

    @cached_property
    def differentiable(self) -> bool:
        """Whether any gradient reaches the inputs."""
        x = self.x[:1].detach().clone().requires_grad_()
        z = self.net(x)
        # Logits may have a graph that ends at the weights.
        return z.requires_grad and torch.autograd.grad(z.sum(), x, allow_unused=True)[0] is not None

    @cached_property
    def width(self) -> float:
        """Largest width of the range of inputs."""
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in (self.low, self.high))
        return float((high - low).max())

    def whole(self, share: float = 1.0) -> float:
        """Return the radius within which all points lie that differ from x by that share of the range everywhere."""
        D = self.x[0].numel()
        return share * self.width * {"linf": 1.0, "l2": math.sqrt(D), "l1": float(D)}[self.norm]

    def gradients(self, which: Literal["ce", "margin"], precise: bool) -> Tensor:
        """Return the gradient at the inputs (N, ...) of a loss of the batch, in float64 or in the net's own precision."""
        net = self.double if precise else self.net
        loss = {"ce": ce, "margin": margin}[which]
        parts = []
        for x, y in zip(self.x.split(256), self.y.split(256), strict=True):
            x = (x.double() if precise else x).detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(loss(net(x), y).sum(), x)
            parts.append(g)
            self.backward += len(x)
        return torch.cat(parts)

    # The runs

    def pgd(self, **settings: Any) -> PGD:
        """Return the gradient attack under examination, with some settings of its own."""
        return PGD(**({"steps": self.budget.steps, "eta": None, "seed": self.seed} | settings))

    @property
    def eta(self) -> float:
        """The step length of the gradient attack at eps."""
        return self.eps / 4 if self.norm == "linf" else 2.5 * self.eps / self.budget.steps

    def run(
        self,
        attack: Attack,
        eps: float | None = None,
        *,
        precise: bool = False,
        only: Successes | None = None,
        trace: bool = False,
    ) -> Work[Attacked]:
        """Make a run, or return the one that was made before.

        Args:
            attack: with its settings.
            eps: radius; the one under examination by default.
            precise: against the copy in float64.
            only: (N,) on these examples alone, at least one.
            trace: keep the iterates.
        """
        eps = self.eps if eps is None else eps
        key = (attack, eps, precise, None if only is None else only.tobytes(), trace)
        if key not in self._runs:
            at = slice(None) if only is None else torch.from_numpy(only).to(self.x.device)
            x, net, low, high, fast = self.x[at], self.net, self.low, self.high, self.fast
            if precise:
                net, fast = self.double, None
                # The range as the batch has it: 0.1 in float32 is not 0.1 in float64.
                low, high = (torch.as_tensor(v, device=x.device).to(x.dtype).double() for v in (low, high))
                x = x.double()
            found: Attacked | None = None
            for update in attack.attacking(
                net, x, self.y[at], eps, norm=self.norm, low=low, high=high, fast=fast, trace=trace
            ):
                found = update.value or found
                yield Update(update.fraction, update.text)
            assert found is not None
            self._runs[key] = found
            self.forward += found.forward
            self.backward += found.backward
            if not precise and eps <= self.eps:
                self.broken |= self.spread(found, only)
                if only is None and eps == self.eps:
                    self.tried[attack] = found.success
        return self._runs[key]

    def spread(self, found: Attacked, only: Successes | None) -> Successes:
        """Return what a run on some examples broke, as (N,)."""
        if only is None:
            return found.success
        success = np.zeros(len(self), bool)
        success[only] = found.success
        return success

    def successes(self, attack: Attack, eps: float | None = None, **how: Any) -> Work[Successes]:
        """Make a run and return what it broke, (N,); see `run`."""
        found = yield from self.run(attack, eps, **how)
        return self.spread(found, how.get("only"))

    def plain(self) -> Work[Successes]:
        """Return what the gradient attack under examination broke, (N,): nothing where there is no gradient."""
        if not self.differentiable:
            return ~self.clean
        return (yield from self.successes(self.pgd()))

    def restarted(self) -> Work[list[Successes]]:
        """Return what 1, 2, ... R runs of the gradient attack from different start points broke, each on what was left."""
        found = [(yield from self.plain())]
        for r in range(1, self.budget.restarts if self.differentiable else 1):
            success = found[-1].copy()
            if not success.all():
                success |= yield from self.successes(self.pgd(seed=self.seed + r), only=~found[-1])
            found.append(success)
        return found

    def path(self) -> Work[Attacked]:
        """Return the first examples with their paths of twice the steps, nothing stopped early."""
        only = np.arange(len(self)) < self.budget.traced
        return (
            yield from self.run(
                self.pgd(steps=2 * self.budget.steps, eta=self.eta, early_stop=False), only=only, trace=True
            )
        )

    # What vanished

    @cached_property
    def rounded(self) -> Successes:
        """Which examples have p_y == 1 in the net's own precision, (N,): the pull away from the label is rounded away."""
        p = self.z.softmax(-1).gather(1, self.y[:, None])[:, 0]
        return (p == 1).cpu().numpy()

    @cached_property
    def dead(self) -> Successes:
        """Which correct examples have an input gradient of the cross-entropy of exactly zero, (N,)."""
        g = self.gradients("ce", precise=False).flatten(1)
        return (g == 0).all(1).cpu().numpy() & self.clean

    @property
    def vanished(self) -> Successes:
        """Which examples' gradients have lost something to rounding, (N,)."""
        return self.rounded | self.dead

    def noise(self, purpose: str) -> torch.Generator:
        """Return a generator of its own for a purpose."""
        return generator(f"honesty {purpose}", self.seed)
