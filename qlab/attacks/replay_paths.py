"""The attackers of a replay, and the path of one; see `qlab.attacks.replay`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.base import Attack, Attacked, Step
from qlab.attacks.losses import Loss, margin, misclassified
from qlab.attacks.pgd import PGD
from qlab.attacks.victim import deployed
from qlab.errors import InputError

__all__ = ["ATTACKERS", "Attacker", "Path", "Settings", "attackers_for", "flat", "path_of"]

Floats = NDArray[np.float64]
SIGMA = 0.25  # width of NES's neighbourhood, in units of eps
STAND_IN = "identity"  # the backward rule that BPDA takes: one that is nowhere dead


def flat(points: Tensor) -> Floats:
    """Return points (n, ...) as rows (n, D) in float64."""
    return points.detach().flatten(1).double().cpu().numpy()


@dataclass(frozen=True)
class Settings:
    """What all attackers of a replay share; see `replaying`."""

    eps: float
    steps: int
    eta: float | None
    questions: int
    random_start: bool
    loss: str | Loss
    seed: int

    def pgd(self, **more: Any) -> PGD:
        """Return PGD with these settings and one more."""
        return PGD(
            steps=self.steps, eta=self.eta, random_start=self.random_start, loss=self.loss, seed=self.seed,
            early_stop=False, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class Attacker:
    """One way to attack.

    Args:
        title: its name in words.
        make: settings to an attack.
        every: its trace is looked at every so many entries.
    """

    title: str
    make: Callable[[Settings], Attack]
    every: Callable[[Settings], int] = lambda s: 1


def _scaled(name: str) -> Callable[[Settings], Attack]:
    def make(s: Settings) -> Attack:
        from qlab.attacks import scaling

        return s.pgd(scaling=getattr(scaling, name)())

    return make


def _bpda(s: Settings) -> Attack:
    from qlab.attacks.estimators import BPDA

    return s.pgd(estimator=BPDA(STAND_IN))


def _nes(s: Settings) -> Attack:
    from qlab.attacks.estimators import NES

    return s.pgd(estimator=NES(samples=s.questions // 2, sigma=SIGMA * s.eps))


def _square(s: Settings) -> Attack:
    from qlab.attacks.square import Square

    return Square(queries=s.steps * s.questions + 1, seed=s.seed, early_stop=False)


ATTACKERS: dict[str, Attacker] = {
    "plain": Attacker("PGD, plain gradient", lambda s: s.pgd()),
    "hns": Attacker("PGD, temperature (HNS)", _scaled("HNS")),
    "njs": Attacker("PGD, temperature (NJS)", _scaled("NJS")),
    "bpda": Attacker("PGD, another backward rule (BPDA)", _bpda),
    "nes": Attacker("PGD, NES", _nes),
    "square": Attacker("Square", _square, every=lambda s: s.questions),
}


def attackers_for(net: nn.Module) -> tuple[str, ...]:
    """Return the attackers that make sense for a net: BPDA only where activations are quantized."""
    from qlab.attacks.stand_in import with_stand_ins

    names: tuple[str, ...] = ("plain", "hns", "bpda", "nes", "square")
    try:
        with_stand_ins(deployed(net), STAND_IN)
    except InputError:
        names = tuple(name for name in names if name != "bpda")
    return names


@dataclass(frozen=True)
class Path:
    """The way of one attacker: T + 1 iterates.

    Attributes:
        name: of the attacker.
        title: the same in words.
        attack: name and settings of the attack.
        points: (T + 1, ...) iterates.
        margin: (T + 1,) of the deployed net there.
        wrong: (T + 1,) whether the net takes them for another class.
        loss: (T + 1,) what the attacker maximises there; NaN where it does not look.
        gradient: (T + 1, ...) what it follows from there on; NaN where it follows none.
        zero: (T + 1,) whether that is exactly zero, in every coordinate.
        forward, backward: questions and backward passes in all, those of the example itself among them.
    """

    name: str
    title: str
    attack: str
    points: Tensor
    margin: Floats
    wrong: NDArray[np.bool_]
    loss: Floats
    gradient: Tensor
    zero: NDArray[np.bool_]
    forward: int
    backward: int

    @property
    def rows(self) -> Floats:
        """Iterates as rows, (T + 1, D)."""
        return flat(self.points)

    @property
    def broke(self) -> int | None:
        """The first iterate that the net takes for another class; None if there is none."""
        return int(self.wrong.argmax()) if self.wrong.any() else None

    @property
    def moved(self) -> bool:
        """Whether it ever left the point where it stood first."""
        return bool((self.points != self.points[:1]).any())

    @property
    def follows(self) -> NDArray[np.bool_]:
        """(T + 1,) whether it looked at a gradient there, zero or not."""
        return ~self.gradient.flatten(1).isnan().any(1).cpu().numpy()

    @property
    def steepness(self) -> Floats:
        """(T + 1,) ||gradient||_2; NaN where it follows none."""
        g = flat(self.gradient)
        largest = np.abs(g).max(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            size = largest[:, 0] * np.linalg.norm(g / largest, axis=1)  # squares of tiny numbers would underflow
        return np.where(self.zero, 0.0, size)


def path_of(net: nn.Module, name: str, title: str, attacked: Attacked, every: int) -> Path:
    """Return the way of an attack on one example.

    Args:
        net: the deployed net.
        name, title: of the attacker.
        attacked: with its trace.
        every: entries of the trace that make a step; from 2 on, the attack stood at x before the first of them.

    Raises:
        InputError: an attack that keeps no iterates.
    """
    trace = attacked.trace or ()
    x, y = attacked.x, attacked.y
    if every > 1:  # a search that stands at x to begin with
        nan = torch.full((1,), math.nan, dtype=torch.float64, device=x.device)
        trace = (Step(x, nan, None), *trace[every - 1 :: every])
    if not trace:
        raise InputError(f"{title} keeps no iterates; take an attack that calls `ledger.step`")
    points = torch.cat([step.points for step in trace])
    missing = torch.full_like(x, math.nan)
    gradient = torch.cat([missing if step.gradient is None else step.gradient for step in trace])
    with torch.no_grad():
        z = net(points)
    return Path(
        name,
        title,
        attacked.attack,
        points,
        margin(z, y.expand(len(z))).double().cpu().numpy(),
        misclassified(z, y.expand(len(z))).cpu().numpy(),
        torch.cat([step.loss for step in trace]).double().cpu().numpy(),
        gradient,
        (gradient == 0).flatten(1).all(1).cpu().numpy(),
        attacked.forward,
        attacked.backward,
    )
