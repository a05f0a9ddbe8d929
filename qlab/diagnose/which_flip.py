r"""Which flip changed a prediction? Answered by running the net with and without each.

Let m(w) = z_c - max_{i != c} z_i be the margin of the class c that is predicted with the weights of step a, and e_1, e_2, ... the
flips between steps a and b in the order of time:

    change_k = m(e_1 ... e_k) - m(e_1 ... e_{k-1})          these sum to m(w_b) - m(w_a)
    alone_k  = m(w_a with this weight alone as after e_k) - m(w_a)
    undone_k = m(w_b with this weight as at step a) - m(w_b)

the first k at which the prediction differs, and a minimal set: flips until then which, done alone on the weights of step a,
change the prediction too, and of which none can be left out.

All of it is of the deployed function: hard weights, in float64. Float layers, biases and batch norm are not recorded; they are
those of the net that is given.

Shapes: E flips.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result, check
from qlab.diagnose.flips import flips, interval, places, scrub
from qlab.diagnose.history import History
from qlab.errors import InputError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["WhichFlip", "margin_of", "one_example", "tracing", "which_flip"]

MEMORY = 64 * 2**20  # bytes of stacked weights in one batch of nets
MAX_FLIPS = 20_000


@dataclass(frozen=True, eq=False)
class WhichFlip(Result):
    """The flips between two steps and what each did to the prediction for one example.

    Args:
        step_a, step_b: the interval.
        class_a, class_b: predictions with the weights of either end.
        margin_a, margin_b: of class_a.
        steps: (E,) when each flip happened; flips of one step are in the order of tensors and indices.
        layers: (E,) tensor of each.
        indices: (E,) place in it.
        values: (E, 2) value before and after.
        margins: (E,) margin after the flips up to this one.
        changes: (E,) change of the margin by this one.
        alone: (E,) change by this weight's flip alone, on the weights of step a.
        undone: (E,) change by taking this weight back, on the weights of step b; NaN where it ends as it began.
        first: number of the first flip after which the prediction differs; None where it never does.
        minimal: numbers of the flips of a minimal set that suffices; empty where the prediction never changes.
        todo: share of the flips not followed yet.
    """

    step_a: int
    step_b: int
    class_a: int
    class_b: int
    margin_a: float
    margin_b: float
    steps: NDArray[np.int64]
    layers: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    values: NDArray[np.float64]
    margins: NDArray[np.float64]
    changes: NDArray[np.float64]
    alone: NDArray[np.float64]
    undone: NDArray[np.float64]
    first: int | None
    minimal: tuple[int, ...]
    todo: float = 0.0

    def frame(self) -> pd.DataFrame:
        """Return one row per flip in the order of time."""
        import pandas as pd

        chosen = set(self.minimal)
        return pd.DataFrame(
            {
                "step": self.steps,
                "layer": self.layers,
                "index": self.indices,
                "before": self.values[:, 0],
                "after": self.values[:, 1],
                "margin": self.margins,
                "change": self.changes,
                "alone": self.alone,
                "undone": self.undone,
                "minimal_set": [k in chosen for k in range(len(self.steps))],
            }
        )

    def figure(self) -> Figure:
        """Draw the margin flip by flip."""
        from qlab.plots.flips import which_flip_figure

        return which_flip_figure(self)

    def summary(self) -> str:
        """Say which flip changed the prediction, and which flips suffice."""
        head = (
            f"Deployed function, steps {self.step_a} to {self.step_b}: {len(self.steps):,} flips took the margin of class "
            f"{self.class_a} from {self.margin_a:.3g} to {self.margin_b:.3g}"
        )
        if self.first is None:
            return f"{head}; the prediction is {self.class_a} after every one of them."
        k = self.first
        which = f"{self.layers[k]}[{', '.join(map(str, self.indices[k]))}]"
        after = (
            f"the prediction then is {self.class_b}"
            if self.class_b != self.class_a
            else "but it returns before the end"
        )
        names = ", ".join(f"{self.layers[i]}[{', '.join(map(str, self.indices[i]))}]" for i in self.minimal[:5])
        more = ", ..." if len(self.minimal) > 5 else ""
        return (
            f"{head}. The flip of {which} at step {self.steps[k]} (number {k + 1}) is the first after which the prediction "
            f"differs; {after}. {len(self.minimal)} flip{'s' if len(self.minimal) != 1 else ''} of those until then "
            f"suffice: {names}{more}."
        )


def one_example(x: Tensor) -> Tensor:
    """Return one example in float64; raise an InputError for anything else."""
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != 1:
        given = f"inputs of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"the input is {given}; expected one example of shape (1, ...), such as x[3:4]")
    return x.double()


def which_flip(history: History, net: nn.Module, x: Tensor, step_a: int, step_b: int) -> WhichFlip:
    """Return which flips between two steps changed the prediction for one example, by running the net with and without each.

    Args:
        history: recorded during the training of this net.
        net: a method of the lab or its net; of it come float layers, biases and batch norm.
        x: (1, ...) one example as the net takes it.
        step_a, step_b: the interval.

    Raises:
        InputError: for more than one example, steps that were not recorded, more than 20,000 flips in the interval, another
            net, or what `check` refuses.
    """
    return last(tracing(history, net, x, step_a, step_b), WhichFlip)


def tracing(history: History, net: nn.Module, x: Tensor, step_a: int, step_b: int) -> Iterator[Update]:
    """Do `which_flip` as a piece of work: the margin flip by flip first, then each flip alone, then a minimal set.

    Args, Raises: as of `which_flip`; values are `WhichFlip`s, NaN where not computed yet.
    """
    x = one_example(x)
    first, last = interval(history, step_a, step_b)
    hard = scrub(history, net, step_a).double()
    check(hard, x, None, labels=False)
    many = flips(history, step_a, step_b, top=0).total
    if many > MAX_FLIPS:
        raise InputError(
            f"there are {many:,} flips between steps {step_a} and {step_b}; choose an interval with at most {MAX_FLIPS:,}"
        )
    events = _Events(history, first, last)
    names = places(history, hard)
    nets = _Nets(hard, x, [names[t.name] for t in history.tensors], events)
    size = len(events.steps)
    a, b = events.state(first), events.state(last)
    z_a, z_b = nets.logits(np.stack([a, b]))
    c = int(z_a.argmax())
    nan = np.full(size, np.nan)
    known: dict[str, Any] = {
        "step_a": step_a,
        "step_b": step_b,
        "class_a": c,
        "class_b": int(z_b.argmax()),
        "margin_a": margin_of(z_a, c),
        "margin_b": margin_of(z_b, c),
        "steps": events.steps,
        "layers": tuple(history.tensors[t].name for t, _ in events.where),
        "indices": tuple(tuple(map(int, np.unravel_index(i, history.tensors[t].shape))) for t, i in events.where),
        "values": events.values,
    }
    margins, alone, undone = nan.copy(), nan.copy(), nan.copy()
    classes = np.full(size, c)

    def result(first_change: int | None, minimal: tuple[int, ...], todo: float) -> WhichFlip:
        changes = np.diff(margins, prepend=known["margin_a"])
        return WhichFlip(
            **known,
            margins=margins.copy(),
            changes=changes,
            alone=alone.copy(),
            undone=undone.copy(),
            first=first_change,
            minimal=minimal,
            todo=todo,
        )

    for low in range(0, size, nets.chunk):
        z = nets.logits(events.prefixes(a, low, min(low + nets.chunk, size)))
        for k, row in enumerate(z, low):
            margins[k], classes[k] = margin_of(row, c), int(row.argmax())
        yield Update((low + len(z)) / size / 3, f"{low + len(z)} of {size} flips done", result(None, (), 1.0))
    turned = np.flatnonzero(classes != c)
    first_change = int(turned[0]) if len(turned) else None
    for low in range(0, size, nets.chunk):
        some = range(low, min(low + nets.chunk, size))
        z = nets.logits(events.each(a, some, events.values[some, 1]))
        back = nets.logits(events.each(b, some, a[events.column[some]]))
        for k, row, other in zip(some, z, back, strict=True):
            alone[k] = margin_of(row, c) - known["margin_a"]
            returns = a[events.column[k]] == b[events.column[k]]
            undone[k] = np.nan if returns else margin_of(other, c) - known["margin_b"]
        yield Update(
            1 / 3 + (low + len(z)) / size / 3, f"{low + len(z)} of {size} flips alone", result(first_change, (), 0.5)
        )
    minimal: tuple[int, ...] = ()
    if first_change is not None:
        minimal = yield from _minimal(nets, events, a, c, first_change, lambda: result(first_change, (), 0.2))
    yield Update(1.0, f"{size} flips", result(first_change, minimal, 0.0))


def margin_of(z: Tensor, c: int) -> float:
    """Return z_c - max_{i != c} z_i of logits (d,)."""
    others = torch.cat([z[:c], z[c + 1 :]])
    return float(z[c] - others.max()) if len(others) else float("nan")


class _Events:
    """The flips between two rows of a history, in the order of time.

    A state is the values (M,) of the M weights that move in the interval; all others stay put.

    Attributes:
        steps: (E,) of each flip.
        where: (E,) tensor and flat index of each.
        values: (E, 2) before and after.
        column: (E,) place of its weight in a state.
        tensor, index: (M,) tensor and flat index of each weight of a state.
    """

    def __init__(self, history: History, first: int, last: int) -> None:
        courses, tensors, indices = [], [], []
        for j, t in enumerate(history.tensors):
            codes = history.codes(t.name, first, last + 1)
            moving = np.flatnonzero((codes != codes[0]).any(0))
            courses.append(t.values(codes[:, moving]))
            tensors.append(np.full(len(moving), j))
            indices.append(moving)
        self.tensor, self.index = np.concatenate(tensors), np.concatenate(indices)
        self._courses = np.concatenate(courses, 1)
        rows, self.column = np.nonzero(self._courses[1:] != self._courses[:-1])  # sorted by time, tensor, index
        self.steps = history.steps[first + 1 + rows]
        self.values = np.stack([self._courses[rows, self.column], self._courses[rows + 1, self.column]], 1)
        self.where = [(int(self.tensor[m]), int(self.index[m])) for m in self.column]
        self.first = first

    def state(self, row: int) -> NDArray[np.float64]:
        """Return the values at a row of the history."""
        values: NDArray[np.float64] = self._courses[row - self.first]
        return values

    def applied(self, state: NDArray[np.float64], numbers: Sequence[int]) -> NDArray[np.float64]:
        """Return a state after some of the flips, given in the order of time."""
        now = state.copy()
        for k in numbers:
            now[self.column[k]] = self.values[k, 1]
        return now

    def prefixes(self, state: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
        """Return the states (high - low, M) after flips 0 ... k, for k from low to high (exclusive)."""
        states = np.tile(self.applied(state, range(low)), (high - low, 1))
        for k in range(low, high):
            states[k - low :, self.column[k]] = self.values[k, 1]
        return states

    def each(self, state: NDArray[np.float64], numbers: range, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the states (K, M) in which the weight of one flip has another value, for K flips."""
        states = np.tile(state, (len(numbers), 1))
        states[np.arange(len(numbers)), self.column[numbers]] = values
        return states


class _Nets:
    """One example through nets that differ in a few weights, many at once."""

    def __init__(self, net: nn.Module, x: Tensor, names: Sequence[str], events: _Events) -> None:
        self.net, self.x, self.names, self.events = net, x, names, events
        self.parameters = {name: p.detach() for name, p in net.named_parameters()}
        size = sum(self.parameters[name].numel() for name in names)
        self.chunk = max(1, MEMORY // (8 * max(size, x.numel())))

    def logits(self, states: NDArray[np.float64]) -> Tensor:
        """Return the logits (K, d) of the nets in K states (K, M)."""
        stack = {}
        for j in np.unique(self.events.tensor):
            mine = self.events.tensor == j
            w = self.parameters[self.names[j]]
            flat = w.reshape(1, -1).repeat(len(states), 1)
            flat[:, torch.from_numpy(self.events.index[mine])] = torch.from_numpy(states[:, mine]).to(w)
            stack[self.names[j]] = flat.reshape(-1, *w.shape)

        def one(some: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.net, self.parameters | some, (self.x,))[0]

        with torch.no_grad():
            return torch.func.vmap(one)(stack) if stack else self.net(self.x).expand(len(states), -1)


def _minimal(
    nets: _Nets, events: _Events, a: NDArray[np.float64], c: int, last: int, so_far: Callable[[], WhichFlip]
) -> Generator[Update, None, tuple[int, ...]]:
    """Yield heartbeats; return flips of 0 ... last that change the prediction, none of which can be left out.

    Halves are left out while that is possible, then single flips, in the order of time, until no single one can be.
    """

    def changed(sets: list[list[int]]) -> list[bool]:
        verdicts: list[bool] = []
        for low in range(0, len(sets), nets.chunk):
            z = nets.logits(np.stack([events.applied(a, some) for some in sets[low : low + nets.chunk]]))
            verdicts += [int(row.argmax()) != c for row in z]
        return verdicts

    kept = list(range(last + 1))
    parts = 2
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        pieces = [kept[i : i + size] for i in range(0, len(kept), size)]
        without = [[k for k in kept if k not in set(piece)] for piece in pieces]
        yield Update(2 / 3, f"{len(kept)} flips suffice", so_far())
        good = [rest for rest, is_changed in zip(without, changed(without), strict=True) if rest and is_changed]
        if good:
            kept, parts = good[0], max(parts - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(2 * parts, len(kept))
    return tuple(kept)
