r"""The true minimal perturbation of tiny nets, and how much every attack overestimates it.

    d(x) = inf { ||x' - x||_p :  argmax f(x') != y,  low <= x' <= high }

Three exact methods, for nets that are affine maps with scalar functions of few lines between them (`qlab.attacks.exact_layers`):

    plane      two inputs: the range is cut into cells of one class each                                 any norm
    patterns   a first layer of few signs: the classes of all its patterns, nearest bound first          any norm
    milp       small ReLU or sign nets: mixed-integer programs in growing balls, with a time limit       l_inf, l1

The net is taken as a function of real numbers with the parameters that it has, the first of equal logits wins, and sign(0) = +1
decides which side owns a boundary. So d may be attained or only approached; both are told apart. A net that rounds (float32) moves
its boundaries by its rounding: truth and attack agree up to that.

Sources: Tjeng, Xiao, Tedrake 2019, arXiv 1711.07356 (verification by MILP); Khalil, Gupta, Dilkina 2019, arXiv 1810.03538 (MILP
attack on binary nets). Cells of a line arrangement and the order of patterns are ours.

Shapes: x (N, ...), D numbers each.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.ball import Ball, Norm
from qlab.attacks.base import Attacked
from qlab.attacks.exact_cells import Box, Nearest
from qlab.attacks.exact_layers import Stages, read
from qlab.attacks.exact_milp import Milp
from qlab.attacks.exact_patterns import MAX_PATTERNS, Patterns, count_patterns
from qlab.attacks.exact_plane import Plane, decompose, distances
from qlab.attacks.losses import misclassified
from qlab.attacks.victim import checked
from qlab.diagnose.base import Result
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Exact", "exact_adversary", "exact_search", "overestimation"]

Method = Literal["auto", "plane", "patterns", "milp"]
FEW = 2**8  # patterns; with more of them, mixed-integer programs are quicker (measured on nets of 64 inputs)
SOLVER = 1e-6  # what a mixed-integer solver calls equal


@dataclass(frozen=True)
class Exact(Result):
    """The true distance of each of N examples to another class.

    Attributes:
        method: "plane", "patterns" or "milp".
        norm: of the distance.
        x, y: examples and labels.
        lower, upper: (N,) proven bounds of d; equal where it is known, 0 where the example is misclassified to begin with, infinite
            where the range holds no other class.
        point: (N, ...) float64, at distance `upper`, in the closure of the nearest cell; NaN where there is none.
        witness: (N, ...) of the dtype of x: a point just beyond, inside that cell.
        confirmed: (N,) whether the net itself misclassifies the witness.
        attained: (N,) whether a point at distance d itself is of another class; False: it is only approached.
        clean: (N,) whether the example was classified correctly.
        low, high: the range.
        solved: cells, programs or polygons looked at.
        plane: the polygons, for nets of two inputs.
    """

    method: str
    norm: Norm
    x: Tensor
    y: Tensor
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    point: Tensor
    witness: Tensor
    confirmed: NDArray[np.bool_]
    attained: NDArray[np.bool_]
    clean: NDArray[np.bool_]
    low: Tensor
    high: Tensor
    solved: int
    plane: Plane | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,) whether both bounds agree, up to what the solver calls equal."""
        with np.errstate(invalid="ignore"):
            gap = np.where(np.isinf(self.lower) & np.isinf(self.upper), 0.0, self.upper - self.lower)
        return gap <= SOLVER * (1 + np.where(np.isinf(self.upper), 0.0, self.upper))

    def robust(self, eps: float) -> NDArray[np.bool_]:
        """Return whether it is proven that no point within eps is of another class, (N,)."""
        return (self.lower > eps) | ((self.lower == eps) & (self.upper == eps) & ~self.attained)

    def broken(self, eps: float) -> NDArray[np.bool_]:
        """Return whether it is proven that some point within eps is of another class, (N,)."""
        return (self.upper < eps) | ((self.upper == eps) & self.attained)

    def frame(self) -> pd.DataFrame:
        """Return one row per example: label, clean, lower, upper, attained, confirmed."""
        import pandas as pd

        names = ("clean", "lower", "upper", "attained", "confirmed")
        return pd.DataFrame({"label": self.y.cpu().numpy(), **{name: getattr(self, name) for name in names}})

    def figure(self) -> Figure:
        """Return the share of examples that are robust over eps; for two inputs also the cells with the nearest points."""
        from qlab.plots.exact import exact_figure

        return exact_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        there = self.clean & np.isfinite(self.upper)
        text = (
            f"True minimal perturbation ({self.norm}, by {_WORDS[self.method]}) of {len(self)} examples, of which "
            f"{int(self.clean.sum())} are classified correctly"
        )
        if there.any():
            text += (
                f": median {np.median(self.upper[there]):.4g}, smallest {self.upper[there].min():.4g}; it is attained for "
                f"{int(self.attained[there].sum())} of {int(there.sum())} and only approached for the others"
            )
        alone = int((self.clean & np.isinf(self.lower)).sum())
        open_ = int((self.clean & ~self.known).sum())
        text += f". {alone} have no other class in the range" if alone else ""
        text += f". For {open_} only bounds are known" if open_ else ""
        return text + "."


_WORDS = {"plane": "cells of the plane", "patterns": "all sign patterns", "milp": "mixed-integer programs"}


def exact_adversary(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    method: Method = "auto",
    time_limit: float = 30.0,
) -> Exact:
    """Return d(x) = inf { ||x' - x||_p : argmax f(x') != y, low <= x' <= high } of each example.

    Args:
        net: a tiny net in eval mode; of a method of the lab, what it deploys.
        x: (N, ...) inputs within the range.
        y: (N,) int64 labels.
        norm: "linf", "l2" or "l1".
        low, high: the range of inputs.
        method: see the module; "auto" takes the plane for two inputs, patterns where they are few or the norm is l2, else "milp".
        time_limit: seconds for each example, of "milp" alone; bounds remain where it is passed.

    Raises:
        InputError: what `checked` says; a net that is no chain of known layers, too large for the method, or a norm that it lacks.
        UnknownNameError: no such method or norm.
    """
    return last(exact_search(net, x, y, norm=norm, low=low, high=high, method=method, time_limit=time_limit), Exact)


def exact_search(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    method: Method = "auto",
    time_limit: float = 30.0,
) -> Generator[Update, None, None]:
    """Yield progress of `exact_adversary`; a value is the result on the examples done so far, the first ones."""
    if method not in get_args(Method):
        raise UnknownNameError("exact method", method, get_args(Method))
    if not time_limit > 0:
        raise InputError(f"time_limit is {time_limit!r}; expected seconds, more than 0")
    net = checked(net, x, y, len(x))
    ball = Ball.of(x.detach(), np.inf, norm, low, high)
    stages = read(net, x)
    flat = _flat(x)
    edges = [_flat(torch.broadcast_to(end, x.shape[1:])[None])[0] for end in (ball.low, ball.high)]
    box = Box(edges[0], edges[1])
    how = _choose(method, stages, norm)
    with torch.no_grad():
        z = net(x)
    clean = (~misclassified(z, y)).cpu().numpy()
    _same_function(stages, flat, z, net)
    labels = y.cpu().numpy()
    found: list[_Found] = []
    solved = 0
    plane: Plane | None = None

    def result() -> Exact:
        n = len(found)
        parts = [
            np.array([getattr(f, name) for f in found]) for name in ("lower", "upper", "point", "inner", "attained")
        ]
        lower, upper, point, inner, attained = parts
        points = torch.from_numpy(point).reshape(n, *x.shape[1:])
        # one step beyond the boundary that the dtype of x can tell
        step = np.sqrt(torch.finfo(x.dtype).eps)
        witness = torch.from_numpy(point + step * (inner - point)).reshape(n, *x.shape[1:]).to(x)
        with torch.no_grad():
            wrong = misclassified(net(witness.nan_to_num()), y[:n]).cpu().numpy()
        return Exact(
            how,
            norm,
            x[:n].detach(),
            y[:n],
            lower,
            upper,
            points,
            witness,
            wrong & np.isfinite(upper),
            attained.astype(bool),
            clean[:n],
            ball.low,
            ball.high,
            solved,
            plane,
        )

    if how == "plane":
        cutting = decompose(stages, box)
        while plane is None:
            try:
                yield Update(0.9 * next(cutting), "Cutting the range into cells")
            except StopIteration as stop:
                plane = stop.value
        solved = len(plane.classes)
        seen = distances(plane, flat, labels, norm, float((box.high - box.low).max()))
        for i in range(len(x)):
            at = Nearest(seen.distance[i], seen.point[i], seen.inner[i], bool(seen.attained[i]))
            found.append(_Found.of(at if np.isfinite(at.distance) else None, flat[i], clean[i]))
        yield Update(1.0, f"{solved:,} cells", result())
        return
    patterns = Patterns.of(stages) if how == "patterns" else None
    for i in range(len(x)):
        if not clean[i]:
            found.append(_Found.of(None, flat[i], False))
        elif patterns is not None:
            near, count = patterns.nearest(flat[i], int(labels[i]), norm, box)
            found.append(_Found.of(near, flat[i], True))
            solved += count
        else:
            bounds = Milp(stages, flat[i], int(labels[i]), norm, box, time_limit).solve()
            found.append(_Found.of(bounds.nearest, flat[i], True, bounds.lower))
            solved += bounds.solved
        yield Update((i + 1) / len(x), f"{i + 1} of {len(x)} examples", result())


@dataclass(frozen=True)
class _Found:
    """What is known of one example; see `Exact`."""

    lower: float
    upper: float
    point: NDArray[np.float64]
    inner: NDArray[np.float64]
    attained: bool

    @classmethod
    def of(cls, near: Nearest | None, x: NDArray[np.float64], clean: bool, lower: float | None = None) -> _Found:
        if not clean:
            return cls(0.0, 0.0, x, x, True)
        if near is None:
            nothing = np.full_like(x, np.nan)
            return cls(np.inf if lower is None else lower, np.inf, nothing, nothing, False)
        d = float(near.distance)
        return cls(d if lower is None else min(lower, d), d, near.point, near.inner, near.attained)


def _flat(x: Tensor) -> NDArray[np.float64]:
    return x.detach().double().cpu().flatten(1).numpy()


def _choose(method: Method, stages: Stages, norm: Norm) -> str:
    """Return the method to use.

    Raises:
        InputError: one that does not fit.
    """
    if method == "plane" and stages.inputs != 2:
        raise InputError(
            f"the net takes {stages.inputs} numbers; method='plane' is for two, 'patterns' and 'milp' for more"
        )
    if method == "auto":
        few = count_patterns(stages) <= (MAX_PATTERNS if norm == "l2" else FEW)
        method = "plane" if stages.inputs == 2 else "patterns" if few else "milp"
    if method == "milp" and norm == "l2":
        raise InputError(
            "mixed-integer linear programs know l_inf and l1 only; for l2 give a net of two inputs, or one with at most "
            f"{MAX_PATTERNS:,} sign patterns in its first layer"
        )
    return method


def _same_function(stages: Stages, x: NDArray[np.float64], z: Tensor, net: nn.Module) -> None:
    """Raise an InputError where the stages do not give the net's logits, as far as rounding allows."""
    ours, theirs = stages.logits(x)[0], z.double().cpu().numpy()
    size = max(1.0, float(np.abs(theirs).max()))
    off = np.abs(ours - theirs).max(1) > 1e3 * torch.finfo(z.dtype).eps * size
    if off.mean() > 0.05:  # a single example may lie on a boundary that rounding moves
        raise InputError(
            f"{type(net).__name__} gives other logits than its layers in exact arithmetic, for {off.mean():.0%} of "
            "the examples: rounding decides ties of its signs. Give the net and the inputs in float64, or break the ties "
            "(odd fan-in, batch norm)"
        )


def overestimation(exact: Exact, attacks: Sequence[Attacked]) -> pd.DataFrame:
    """Return how much each attack overestimates the truth, a row each.

    ratio = distance found / d, over the correctly classified examples for which d > 0 is known and the attack found something.

    Columns:
        attack, eps: as given.
        examples: correctly classified ones with another class within eps (for sure).
        missed: share of these that the attack did not break.
        found: how many it did.
        median_ratio, mean_ratio, max_ratio: over those found; 1 is exact.
        below: how many finds lie below the proven lower bound, by more than rounding: must be 0.

    Args:
        exact: of the same examples.
        attacks: results in the same norm. Those that look within a ball do not look for the nearest point: their ratio says how
            far out in the ball they end, their `missed` what they overlook.

    Raises:
        InputError: results of other examples or another norm.
    """
    import pandas as pd

    rows = []
    for attacked in attacks:
        if attacked.norm != exact.norm or len(attacked) != len(exact) or not torch.equal(attacked.x, exact.x):
            raise InputError(
                f"{attacked.attack} is a result in {attacked.norm} on {len(attacked)} examples; expected the {len(exact)} "
                f"examples of the exact result, in {exact.norm}"
            )
        if not torch.equal(attacked.y, exact.y):
            raise InputError(f"{attacked.attack} was given other labels than the exact search")
        there = exact.clean & exact.broken(attacked.eps)
        hit = exact.clean & attacked.success
        measured = hit & exact.known & (exact.upper > 0)
        ratio = attacked.distance[measured] / exact.upper[measured]
        rows.append(
            {
                "attack": attacked.attack,
                "eps": attacked.eps,
                "examples": int(there.sum()),
                "missed": float((there & ~attacked.success).sum() / max(1, there.sum())),
                "found": int(hit.sum()),
                "median_ratio": float(np.median(ratio)) if len(ratio) else np.nan,
                "mean_ratio": float(ratio.mean()) if len(ratio) else np.nan,
                "max_ratio": float(ratio.max()) if len(ratio) else np.nan,
                "below": int((hit & (attacked.distance < exact.lower - rounding(exact))).sum()),
            }
        )
    return pd.DataFrame(rows)


def rounding(exact: Exact) -> NDArray[np.float64]:
    """Return by how much rounding may move a boundary or a distance, (N,): of the inputs' dtype, and of the solver."""
    size = float(torch.maximum(exact.low.abs().max(), exact.high.abs().max()))
    D = exact.x[0].numel()
    unit = 64 * torch.finfo(exact.x.dtype).eps * size * (D if exact.norm == "l1" else np.sqrt(D))
    solver = SOLVER if exact.method == "milp" else 1e-9
    return unit + solver * (1 + np.where(np.isinf(exact.lower), 0.0, exact.lower))
