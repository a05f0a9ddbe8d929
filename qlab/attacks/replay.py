r"""Attack replay: the paths of several attackers of one example, drawn on one plane.

    found = replay(net, x, y, example=3, eps=0.2)
    found["hns"].broke              # the step at which PGD with a temperature broke it
    found.figure()

Every attacker makes T steps in the same ball around the same example. Those that are PGD share their start point, step length and
loss, and each differs in one thing from the plain one:

    plain     the gradient as the net back-propagates it, of the surrogates where activations are quantized
    hns, njs  the same of loss(beta z): a temperature that wakes a saturated softmax up
    bpda      the same with the identity as the backward rule of quantized activations: wakes a surrogate up that is zero
    nes       no gradient: differences of the loss at random neighbours
    square    no gradient and no loss: random changes, kept where the margin grows

A step of the first four costs a forward and a backward pass. A step of the last two costs `questions` forward passes; Square stands
at x to begin with and is looked at after every so many of its questions. What each spent is in `Path.forward`, `Path.backward`.

Where the gradient that an attacker follows is exactly zero, it does not move: `Path.zero`. The landscape beneath is the margin of
the deployed net, max_{i != y} z_i - z_y, on the plane of `qlab.attacks.replay_plane`; above 0 the label is lost.

Shapes: x (N, ...), D numbers in an input, T steps, T + 1 iterates.
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

from qlab.attacks import replay_plane
from qlab.attacks.ball import NORMS, Ball, Norm
from qlab.attacks.base import Attack
from qlab.attacks.losses import Loss, misclassified
from qlab.attacks.replay_paths import ATTACKERS, Attacker, Path, Settings, attackers_for, flat, path_of
from qlab.attacks.replay_plane import Landscape, Plane
from qlab.attacks.victim import checked
from qlab.diagnose.base import Result
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["ATTACKERS", "Attacker", "Path", "Replay", "attackers_for", "replay", "replaying"]

Floats = NDArray[np.float64]
SIDES = (9, 17, 33, 65)  # of the landscape's grids, coarse to fine


@dataclass(frozen=True)
class Replay(Result):
    """Paths of attackers of one example; more of them while a replay runs.

    Attributes:
        x, y: (1, ...), (1,) the example and its label.
        eps, norm: of the ball.
        low, high: (1, ...) the range of inputs.
        paths: one for each attacker.
        plane: that they are drawn on.
        landscape: the margin on it.
        ball: (V, 2) the cut of ball and plane; allowed: (V', 2) the part of it in the range of inputs.
    """

    x: Tensor
    y: Tensor
    eps: float
    norm: Norm
    low: Tensor
    high: Tensor
    paths: tuple[Path, ...]
    plane: Plane
    landscape: Landscape
    ball: Floats
    allowed: Floats

    def __getitem__(self, name: str) -> Path:
        for path in self.paths:
            if path.name == name:
                return path
        raise UnknownNameError("attacker", name, [path.name for path in self.paths])

    @property
    def label(self) -> int:
        """The label."""
        return int(self.y)

    def coordinates(self, name: str) -> Floats:
        """Return the iterates of an attacker on the plane, (T + 1, 2)."""
        return self.plane.coordinates(self[name].rows)

    def arrows(self, name: str) -> Floats:
        """Return P g / ||g||_2, the gradients' directions on the plane, (T + 1, 2).

        Their length is the share of the gradient in the plane; NaN where there is no gradient or where it is exactly zero.
        """
        path = self[name]
        g = flat(path.gradient)
        with np.errstate(invalid="ignore", divide="ignore"):
            g = g / np.abs(g).max(1, keepdims=True)
            return (g @ self.plane.axes.T) / np.linalg.norm(g, axis=1, keepdims=True)

    def in_plane(self, name: str) -> float:
        """Return the share of the length of a path that lies in the plane; NaN for one that does not move."""
        return replay_plane.in_plane(self.plane, self[name].rows)

    def first(self) -> tuple[str, ...]:
        """Return the attackers that broke the example at the earliest step; none if nobody did."""
        broke = {path.name: path.broke for path in self.paths if path.broke is not None}
        return tuple(name for name, step in broke.items() if step == min(broke.values()))

    def frame(self) -> pd.DataFrame:
        """Return a row per attacker and step: margin, wrong, loss, zero, steepness, distance from x, a and b on the plane."""
        import pandas as pd

        parts = []
        x = flat(self.x)
        for path in self.paths:
            at = self.coordinates(path.name)
            parts.append(
                pd.DataFrame(
                    {
                        "attacker": path.name,
                        "step": np.arange(len(path.margin)),
                        "margin": path.margin,
                        "wrong": path.wrong,
                        "loss": path.loss,
                        "zero": path.zero,
                        "steepness": path.steepness,
                        "distance": np.linalg.norm(path.rows - x, ord=_order(self.norm), axis=1),
                        "a": at[:, 0],
                        "b": at[:, 1],
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def figure(self) -> Figure:
        """Return the paths on the landscape, and margins and losses by step."""
        from qlab.plots.replay import replay_figure

        return replay_figure(self)

    def summary(self) -> str:
        """Return who moved and who broke it."""
        words = [f"{path.title} {self._told(path)}" for path in self.paths]
        kept = [self.in_plane(path.name) for path in self.paths]
        kept = [share for share in kept if not math.isnan(share)]
        drawn = f" The plane holds {min(kept):.0%} to {max(kept):.0%} of the length of a path." if kept else ""
        if len(self.x[0].flatten()) == 2:
            drawn = " The plane is the space of inputs itself."
        return (
            f"Attacks on the deployed net for one example of class {self.label}, {self.norm} ball of eps {self.eps:.4g}. "
            + "; ".join(words)
            + f".{drawn}"
        )

    def _told(self, path: Path) -> str:
        steps = len(path.margin) - 1
        followed = int(path.follows.sum())
        zeros = f" (gradient exactly zero at {int(path.zero.sum())} of {followed} points)" if path.zero.any() else ""
        if not path.moved:
            return f"does not move in {steps} steps{zeros}"
        if path.broke is None:
            return f"moves and does not break it in {steps} steps, margin {path.margin.max():.4g} at best{zeros}"
        return f"breaks it at step {path.broke}{zeros}"


def _order(norm: Norm) -> float:
    return {"linf": math.inf, "l2": 2, "l1": 1}[norm]


def replay(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    example: int = 0,
    eps: float = 0.1,
    attackers: Sequence[str] | Mapping[str, Attack] | None = None,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    steps: int = 20,
    eta: float | None = None,
    questions: int = 20,
    random_start: bool = False,
    loss: str | Loss = "ce",
    side: int = SIDES[-1],
    seed: int = 0,
) -> Replay:
    """Attack one example with several attackers and return their paths; arguments as those of `replaying`."""
    return last(
        replaying(
            net, x, y, example, eps, attackers, norm=norm, low=low, high=high, steps=steps, eta=eta, questions=questions,
            random_start=random_start, loss=loss, side=side, seed=seed,
        ),
        Replay,
    )  # fmt: skip


def replaying(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    example: int = 0,
    eps: float = 0.1,
    attackers: Sequence[str] | Mapping[str, Attack] | None = None,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    steps: int = 20,
    eta: float | None = None,
    questions: int = 20,
    random_start: bool = False,
    loss: str | Loss = "ce",
    side: int = SIDES[-1],
    seed: int = 0,
) -> Generator[Update, None, None]:
    """Yield progress with the `Replay` so far: the first path, then one more at a time, then finer landscapes.

    Args:
        net: a torch module in eval mode, or a method of the lab: what it deploys is attacked.
        x: (N, ...) inputs of at least two numbers, within the range.
        y: (N,) int64 labels.
        example: which of them.
        eps: radius of the ball, in the units of x.
        attackers: names of `ATTACKERS`, or attacks of your own by name; `attackers_for(net)` by default,
            as far as they are made for the norm.
        norm: "linf", "l2" or "l1".
        low, high: the range of inputs.
        steps: T of each attacker. Attacks of your own have their own number.
        eta: step length of PGD in the units of x; that of `PGD` by default.
        questions: what NES and Square ask in a step, at least 2.
        random_start: PGD starts at a random point of the ball, the same for all, in place of x.
        loss: that PGD maximises.
        side: G, points of the finest landscape in a row.
        seed: of start points and random changes.

    Raises:
        InputError: no such example, one that is misclassified already, numbers out of range; what an attack says.
        UnknownNameError: no such attacker, norm or loss.
    """
    _check_numbers(eps, steps, questions, side)
    if isinstance(example, bool) or not isinstance(example, int) or not 0 <= example < len(x):
        raise InputError(f"example is {example!r:.40}; expected a whole number from 0 to {len(x) - 1}")
    x1, y1 = x[example : example + 1].detach(), y[example : example + 1]
    if x1.numel() < 2:
        raise InputError("the inputs hold one number each; a path on a plane needs at least two")
    net = checked(net, x1, y1, 1)
    with torch.no_grad():
        if bool(misclassified(net(x1), y1)):
            raise InputError(
                f"example {example} is misclassified already, so there is nothing to attack; choose one that the net has right"
            )
    settings = Settings(float(eps), steps, eta, questions, random_start, loss, seed)
    chosen = _chosen(net, attackers, settings, norm)
    box = Ball.of(x1, float(eps), norm, low, high)
    sides = [s for s in SIDES if s < side] + [side]
    paths: list[Path] = []
    found: Replay | None = None
    work = len(chosen) + 1
    for k, (name, (title, attack, every)) in enumerate(chosen.items()):
        attacked: Any = None
        run = attack.attacking(net, x1, y1, float(eps), norm=norm, low=low, high=high, trace=True)
        for update in run:
            attacked = update.value or attacked
            yield Update((k + update.fraction) / work, title)
        paths.append(path_of(net, name, title, attacked, every))
        found = _replay(net, box, y1, tuple(paths), seed, sides[0])
        yield Update((k + 1) / work, title, found)
    assert found is not None
    for s in sides[1:]:
        found = replace(found, landscape=replay_plane.landscape(net, found.plane, x1, y1, s))
        done = 1.0 if s == side else (work - 1 + (s / side) ** 2) / work
        yield Update(done, f"landscape of {s} x {s} points", found)
    if len(sides) == 1:
        yield Update(1.0, "landscape", found)


def _check_numbers(eps: object, steps: object, questions: object, side: object) -> None:
    whole = {"steps": (steps, 1), "questions": (questions, 2), "side": (side, 2)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r:.40}; expected a whole number of at least {least}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise InputError(f"eps is {eps!r:.40}; expected a positive number, in the units of the inputs")


def _chosen(
    net: nn.Module, attackers: Sequence[str] | Mapping[str, Attack] | None, settings: Settings, norm: Norm
) -> dict[str, tuple[str, Attack, int]]:
    """Return title, attack and how often its trace is looked at, by name."""
    if isinstance(attackers, Mapping):
        if not attackers:
            raise InputError("there is no attacker; give at least one")
        return {name: (name, replace(attack, early_stop=False), 1) for name, attack in attackers.items()}
    if attackers is None:
        fitting = attackers_for(net)
        attackers = tuple(n for n in fitting if norm in ATTACKERS[n].make(settings).norms or norm not in NORMS)
    names = tuple(attackers)
    if not names or len(set(names)) != len(names):
        raise InputError(f"attackers is {names!r:.80}; expected at least one name, each of them once")
    for name in names:
        if name not in ATTACKERS:
            raise UnknownNameError("attacker", name, ATTACKERS)
    made = [(name, ATTACKERS[name]) for name in names]
    return {name: (a.title, a.make(settings), a.every(settings)) for name, a in made}


def _replay(net: nn.Module, box: Ball, y: Tensor, paths: tuple[Path, ...], seed: int, side: int) -> Replay:
    """Return the paths on their plane, with a landscape of so many points a side."""
    x, eps = flat(box.x)[0], float(box.eps[0])
    top = max(paths, key=lambda path: float(path.margin.max()))
    best = top.rows[int(top.margin.argmax())] - x
    plane = replay_plane.plane_of(x, [path.rows - x for path in paths], best, eps, box.norm, seed)
    ball = replay_plane.outline(plane, eps, box.norm)
    low, high = (flat(edge.expand_as(box.x))[0] for edge in (box.low, box.high))
    return Replay(
        box.x, y, eps, box.norm, box.low, box.high, paths, plane,
        replay_plane.landscape(net, plane, box.x, y, side), ball, replay_plane.allowed(plane, ball, x, low, high),
    )  # fmt: skip
