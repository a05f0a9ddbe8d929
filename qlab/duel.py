"""Two methods trained in lockstep: one net's start, one seed, the same batches, and where they part.

    result = duel("adaste", "ste", "two_moons", epochs=20)
    result.summary(), result.frame(), result.figure()

Both methods get the same plain net. What they train may still differ before the first step: a method that draws latent weights of
its own does so (from the same seed as the net, so that its signs are those of the net's own start). Step t of both is taken on the
same batch, then the deployed nets are compared:

    differ     of each layer, the share of weights whose deployed sign is not the same, sign(0) = 0
    disagree   share of the test part on which the deployed nets decide differently
    only_a     test examples that only the first net decides rightly; only_b the other way about

Where the nets decide differently and one of them is right, a fair coin says which if they are equally good; `p_value` is how often
the coin would be at least as one-sided (McNemar's test, exact). Of planar data, the decisions over the plane are kept too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.data.base import DataModule
from qlab.diagnose.base import Result
from qlab.errors import InputError
from qlab.jobs import Cancelled, Update, last
from qlab.methods.base import Method
from qlab.quantizers import layers
from qlab.stepping import Stepper, load, prepared, start

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Duel", "Plane", "duel", "dueling", "p_value"]

_LOOKS = 40  # comparisons of the deployed nets in one duel, about
_MARGIN = 0.15  # of the plane around the points, in units of their range
_TESTED = 2000  # test examples that are compared, at most


@dataclass(frozen=True, eq=False)
class Plane:
    """Decisions of both deployed nets over the plane.

    Args:
        u, v: (G,) coordinates, in the units of the data.
        a, b: (G, G) classes, a row per v.
        x: (M, 2) test points.
        y: (M,) their labels.
    """

    u: NDArray[np.float64]
    v: NDArray[np.float64]
    a: NDArray[np.int64]
    b: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.int64]

    @property
    def disagree(self) -> float:
        """Share of the plane on which the nets decide differently."""
        return float((self.a != self.b).mean())


@dataclass(frozen=True, eq=False)
class Duel(Result):
    """What two methods made of one start.

    Args:
        methods: the two names.
        data: name of the data set.
        total: steps of the duel; fewer are done where it was stopped.
        loss: (T, 2) of the batches, before each step.
        at: (E,) steps after which the deployed nets were compared, 0 first.
        accuracy: (E, 2) on the test part.
        layers: (L,) names.
        weights: (L,) weights in each.
        differ: (E, L) share of each layer's weights with another deployed sign.
        disagree: (E,) share of the test part that is decided differently.
        decisions: (M, 2) the last decisions on a mixed sample of the test part, in the order of `y`.
        y: (M,) its labels.
        plane: the last decisions over the plane; None where the data are not planar.
    """

    methods: tuple[str, str]
    data: str
    total: int
    loss: NDArray[np.float64]
    at: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    layers: tuple[str, ...]
    weights: NDArray[np.int64]
    differ: NDArray[np.float64]
    disagree: NDArray[np.float64]
    decisions: NDArray[np.int64]
    y: NDArray[np.int64]
    plane: Plane | None = None

    @property
    def names(self) -> tuple[str, str]:
        """The two methods, told apart by (A) and (B) where they have one name."""
        a, b = self.methods
        return (a, b) if a != b else (f"{a} (A)", f"{b} (B)")

    @property
    def apart(self) -> NDArray[np.float64]:
        """(E,) share of all weights with another deployed sign."""
        return (self.differ @ self.weights) / self.weights.sum()

    @property
    def table(self) -> NDArray[np.int64]:
        """(2, 2) test examples by whether the first (rows) and the second net (columns) is right: wrong, right."""
        right = self.decisions == self.y[:, None]
        return np.array([[int((right == (i, j)).all(1).sum()) for j in (False, True)] for i in (False, True)])

    @property
    def only_a(self) -> int:
        """Test examples that only the first net decides rightly."""
        return int(self.table[1, 0])

    @property
    def only_b(self) -> int:
        """Test examples that only the second net decides rightly."""
        return int(self.table[0, 1])

    @property
    def p_value(self) -> float:
        """How often equally good nets would be at least as unequal on the examples that one of them alone decides rightly."""
        return p_value(self.only_a, self.only_b)

    def frame(self) -> pd.DataFrame:
        """Return one row per comparison: step, mean losses since the last one, accuracies, what differs, layer by layer."""
        import pandas as pd

        a, b = (f"{name}_{k}" for k, name in zip("ab", self.methods, strict=True))
        pieces = [self.loss[lo:hi] for lo, hi in zip([0, *self.at[:-1]], self.at, strict=True)]
        losses = np.array([piece.mean(0) if len(piece) else (np.nan, np.nan) for piece in pieces])
        columns: dict[str, Any] = {"step": self.at, f"loss_{a}": losses[:, 0], f"loss_{b}": losses[:, 1]}
        columns |= {f"accuracy_{a}": self.accuracy[:, 0], f"accuracy_{b}": self.accuracy[:, 1]}
        columns |= {"disagree": self.disagree, "weights_differ": self.apart}
        return pd.DataFrame(columns | {f"differ_{name}": self.differ[:, i] for i, name in enumerate(self.layers)})

    def figure(self) -> Figure:
        """Draw losses, accuracies and what differs over the steps, and both decisions over the plane where there is one."""
        from qlab.plots.duel import duel_figure

        return duel_figure(self)

    def summary(self) -> str:
        """Say how far the nets are apart in weights and in decisions, and whether one is better."""
        a, b = self.names
        done = len(self.loss)
        said = (
            f"{a} against {b} on {self.data}, {done} of {self.total} steps on the same batches: of {self.weights.sum():,} deployed "
            f"weights {100 * self.apart[-1]:.1f} % have another sign (at the start {100 * self.apart[0]:.1f} %) and "
            f"{100 * self.disagree[-1]:.1f} % of {len(self.y)} test examples are decided differently. Right are {a} "
            f"{100 * self.accuracy[-1, 0]:.1f} %, {b} {100 * self.accuracy[-1, 1]:.1f} %; {self.only_a} only by {a}, "
            f"{self.only_b} only by {b}"
        )
        if not self.only_a + self.only_b:
            return f"{said}: neither is better."
        chance = f"a fair coin would be as one-sided with probability {self.p_value:.2g}"
        plane = "" if self.plane is None else f" They differ on {100 * self.plane.disagree:.1f} % of the plane."
        return f"{said}; {chance}.{plane}"


def p_value(only_a: int, only_b: int) -> float:
    """Return the exact two-sided probability that a fair coin, tossed only_a + only_b times, is as one-sided; 1 without a toss."""
    from scipy.stats import binomtest

    tosses = only_a + only_b
    return float(binomtest(only_a, tosses).pvalue) if tosses else 1.0


def duel(
    a: Method | str,
    b: Method | str,
    data: DataModule | str = "two_moons",
    *,
    net: nn.Module | str | None = None,
    epochs: int = 20,
    seed: int = 0,
    options_a: Mapping[str, Any] | None = None,
    options_b: Mapping[str, Any] | None = None,
    every: int | None = None,
    grid: int = 81,
) -> Duel:
    """Train two methods in lockstep on the same batches and compare what they deploy.

    Args:
        a, b: names of methods, or methods, untrained.
        data: a data set, or the name of one; a planar one is then small enough for a second or two.
        net: with names of methods: a plain net or the name of a model; None is one that suits the set.
        epochs: of both.
        seed: of the net's start, the order of the batches and the methods' noise.
        options_a, options_b: hyperparameters, with names of methods.
        every: steps between two comparisons of the deployed nets; None is about 40 comparisons.
        grid: G, points a side of the plane.

    Raises:
        UnknownNameError, InputError: for names, shapes or numbers that do not go together.
    """
    work = dueling(
        a, b, data, net=net, epochs=epochs, seed=seed, options_a=options_a, options_b=options_b, every=every, grid=grid
    )
    return last(work, Duel)


def dueling(
    a: Method | str,
    b: Method | str,
    data: DataModule | str = "two_moons",
    *,
    net: nn.Module | str | None = None,
    epochs: int = 20,
    seed: int = 0,
    options_a: Mapping[str, Any] | None = None,
    options_b: Mapping[str, Any] | None = None,
    every: int | None = None,
    grid: int = 81,
) -> Iterator[Update]:
    """Do `duel` as a piece of work: an update each step, with a `Duel` at each comparison.

    Cancelled, it compares the nets once more as they are and ends. Args, Raises: as of `duel`.
    """
    for name, value, least in (("grid", grid, 2), ("every", 1 if every is None else every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    loaded = load(data, seed)
    plain = net
    if isinstance(a, str) or isinstance(b, str):
        plain = start(loaded, net, seed)
    made = [
        prepared(method, loaded, net=plain if isinstance(method, str) else None, seed=seed, options=options)[0]
        for method, options in ((a, options_a), (b, options_b))
    ]
    if made[0] is made[1]:
        raise InputError("both methods are the same object; a duel needs two, such as two made by qlab.methods.create")
    steppers = [Stepper(method, loaded, epochs) for method in made]
    arena = _Arena(steppers, grid)
    total = steppers[0].total
    pause = max(1, total // _LOOKS) if every is None else every
    yield Update(0.0, "both nets at their start", arena.look())
    try:
        for step in range(1, total + 1):
            arena.step()
            seen = arena.look() if step % pause == 0 or step == total else None
            yield Update(step / total, f"step {step} of {total}", seen)
    except Cancelled:
        yield Update(len(arena.losses) / total, f"stopped at step {len(arena.losses)}", arena.look())


class _Arena:
    """Two trainings side by side, and what was seen of them."""

    def __init__(self, steppers: list[Stepper], grid: int) -> None:
        self.steppers = steppers
        data = steppers[0].data
        test = data.split("test", _TESTED)
        self.x, self.y = data.transform(test.x), test.y.flatten()  # of texts, every position
        self.losses: list[tuple[float, float]] = []
        self.looks: dict[int, dict[str, Any]] = {}
        self.plane: dict[str, Any] | None = None
        if data.input_shape == (2,) and test.x.dtype != torch.uint8:
            self.plane, self.points = _plane(test.x, test.y, grid)
            self.points = data.transform(self.points)

    def step(self) -> None:
        one, two = (stepper.step() for stepper in self.steppers)
        self.losses.append((one, two))

    @torch.no_grad()
    def look(self) -> Duel:
        """Compare the deployed nets as they are now."""
        nets = [stepper.deployed() for stepper in self.steppers]
        signs = [{name: layer.weight.sign() for name, layer in layers(net).items()} for net in nets]
        names = [name for name in signs[0] if name in signs[1] and signs[0][name].shape == signs[1][name].shape]
        if not names:
            raise InputError(
                "the two nets have no layer in common, so their weights cannot be compared; give both one net"
            )
        decisions = torch.stack([net(self.x).argmax(1).flatten() for net in nets], 1)
        self.looks[len(self.losses)] = {
            "accuracy": (decisions == self.y[:, None]).double().mean(0).tolist(),
            "differ": [float((signs[0][n] != signs[1][n]).double().mean()) for n in names],
            "disagree": float((decisions[:, 0] != decisions[:, 1]).double().mean()),
        }
        plane = None
        if self.plane is not None:
            side = len(self.plane["u"])
            classes = [net(self.points).argmax(1).reshape(side, side).numpy() for net in nets]
            plane = Plane(**self.plane, a=classes[0], b=classes[1])
        one, two = self.steppers
        looks = list(self.looks.values())
        return Duel(
            methods=(one.method.info.name, two.method.info.name),
            data=str(getattr(one.data, "name", type(one.data).__name__)),
            total=one.total,
            loss=np.array(self.losses, dtype=np.float64).reshape(-1, 2),
            at=np.array(list(self.looks)),
            accuracy=np.array([look["accuracy"] for look in looks]),
            layers=tuple(names),
            weights=np.array([signs[0][n].numel() for n in names]),
            differ=np.array([look["differ"] for look in looks]),
            disagree=np.array([look["disagree"] for look in looks]),
            decisions=decisions.numpy(),
            y=self.y.numpy(),
            plane=plane,
        )


def _plane(x: Tensor, y: Tensor, grid: int) -> tuple[dict[str, Any], Tensor]:
    """Return what a `Plane` holds besides decisions, and its points (G * G, 2), v by v."""
    low, high = x.amin(0), x.amax(0)
    room = _MARGIN * (high - low)
    u, v = (torch.linspace(float(lo), float(hi), grid) for lo, hi in zip(low - room, high + room, strict=True))
    points = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).reshape(-1, 2)
    return {"u": u.double().numpy(), "v": v.double().numpy(), "x": x.double().numpy(), "y": y.numpy()}, points
