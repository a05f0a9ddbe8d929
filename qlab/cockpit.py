"""What the annealing cockpit shows: every method's schedule on one time axis, and what a steered run recorded.

    schedules()                                     # every method of the catalog
    schedules(["adaste", "ste"], {"adaste": {"alpha": 0.1}}).figure()

A method anneals quantities of its own kind: a temperature, the height of a well, a share. What they have in common is the time
they are given, so each is drawn over the progress of the run, in [0, 1], and between its own lowest and highest value; the values
themselves stand beside it. A quantity that is positive and spans more than a factor of 20 is drawn on a logarithmic scale.

The runs are in `qlab.steering`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.diagnose.base import Result
from qlab.errors import InputError, QlabError
from qlab.methods.catalog import CATALOG
from qlab.quantizers import QuantizedTensor

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = [
    "COLUMNS",
    "LR",
    "WINDOW",
    "Comparison",
    "Curve",
    "Schedules",
    "Telemetry",
    "compare",
    "distance",
    "mean",
    "measure",
    "residual",
    "schedules",
    "smoothed",
]

LR = "lr factor"
"""Name of the curve of the learning rate, as a share of its start."""

COLUMNS = ("step", "tick", "progress", "epoch", "loss", "lr", "residual", "distance", "flips", "accuracy")
"""What is recorded besides the scheduled quantities. `accuracy` is of the deployed net on the test part, at kept moments only."""

WINDOW = 9
"""Steps over which a share of flips, or a loss, is averaged in a picture."""

_EQUAL = 1.25  # ratio up to which two runs are called equal
_WIDE = 20.0  # highest over lowest value from which on a scale is logarithmic


@dataclass(frozen=True, eq=False)
class Curve:
    """One scheduled quantity over the run.

    Args:
        method: its name.
        quantity: its name, or `LR`.
        values: (P,) at the progress of the `Schedules`.
    """

    method: str
    quantity: str
    values: NDArray[np.float64]

    @property
    def low(self) -> float:
        """The lowest finite value."""
        return float(self._finite.min())

    @property
    def high(self) -> float:
        """The highest finite value."""
        return float(self._finite.max())

    @property
    def log(self) -> bool:
        """Whether it is drawn on a logarithmic scale."""
        return self.low > 0 and self.high > _WIDE * self.low

    @property
    def normalised(self) -> NDArray[np.float64]:
        """(P,) between its own lowest (0) and highest (1) value; 1/2 where it is constant. Infinite values are clipped."""
        low, high = self.low, self.high
        if high == low:
            return np.where(np.isnan(self.values), np.nan, 0.5)
        v = np.clip(self.values, low, high)
        return (np.log(v / low) / np.log(high / low)) if self.log else (v - low) / (high - low)

    @property
    def _finite(self) -> NDArray[np.float64]:
        finite = self.values[np.isfinite(self.values)]
        return finite if len(finite) else np.zeros(1)

    def summary(self) -> str:
        """Say from where to where it goes."""
        first, last = self.values[0], self.values[-1]
        if self.high == self.low:
            return f"{self.quantity} stays at {self.low:.3g}"
        inside = "" if {first, last} >= {self.low, self.high} else f" (between {self.low:.3g} and {self.high:.3g})"
        return f"{self.quantity} goes from {first:.3g} to {last:.3g}{inside}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True, eq=False)
class Schedules(Result):
    """The schedules of several methods.

    Args:
        progress: (P,) of the run, from 0 to 1.
        curves: one per method and quantity, the learning rate of each method last.
        left_out: method -> why it could not be built here.
    """

    progress: NDArray[np.float64]
    curves: tuple[Curve, ...]
    left_out: Mapping[str, str]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, each once."""
        return tuple(dict.fromkeys(c.method for c in self.curves))

    def frame(self) -> pd.DataFrame:
        """Return one row per method, quantity and progress: its value and its height in the picture."""
        import pandas as pd

        parts = [
            pd.DataFrame(
                {
                    "method": c.method,
                    "quantity": c.quantity,
                    "progress": self.progress,
                    "value": c.values,
                    "normalised": c.normalised,
                }
            )
            for c in self.curves
        ]
        return pd.concat(parts, ignore_index=True)

    def figure(self) -> Figure:
        """Draw every schedule on one time axis."""
        from qlab.plots.cockpit import schedules_figure

        return schedules_figure(self)

    def rates(self) -> dict[tuple[str, ...], Curve]:
        """Return the curves of the learning rate, methods of equal ones together."""
        found: dict[bytes, list[Curve]] = {}
        for c in self.curves:
            if c.quantity == LR:
                found.setdefault(c.values.tobytes(), []).append(c)
        return {tuple(c.method for c in equal): equal[0] for equal in found.values()}

    def summary(self) -> str:
        """Say what every method anneals."""
        annealed = [c for c in self.curves if c.quantity != LR]
        quiet = [m for m in self.methods if m not in {c.method for c in annealed}]
        said = [
            f"{m}: " + ", ".join(c.summary() for c in annealed if c.method == m)
            for m in dict.fromkeys(c.method for c in annealed)
        ]
        if quiet:
            said.append(f"{', '.join(quiet)}: nothing but the learning rate")
        head = f"{len(annealed)} scheduled quantities of {len(self.methods)} methods over one run. "
        return head + "; ".join(said) + "."


def schedules(
    names: Sequence[str] | None = None, options: Mapping[str, Mapping[str, Any]] | None = None, points: int = 201
) -> Schedules:
    """Return the schedules of methods of the catalog, each around a small net.

    Args:
        names: of methods; None is every one. Of every one, what cannot be built around the small net is left out and named.
        options: method -> hyperparameters.
        points: P, at which the run is looked at.

    Raises:
        UnknownNameError: for a method that there is not.
        InputError: for no method, fewer than two points, options of a method that is not asked for, or a method that does not
            go on the net.
    """
    if isinstance(names, str) or (names is not None and not names):
        raise InputError(f"names is {names!r}; expected names of methods such as ['adaste', 'ste'], or None for all")
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise InputError(f"points must be a whole number of at least 2, not {points!r}")
    asked = list(CATALOG) if names is None else list(dict.fromkeys(names))
    options = {} if options is None else options
    for name in options:
        if name not in asked:
            raise InputError(f"there are options for {name!r}, which is not asked for; asked for: {', '.join(asked)}")
    progress = np.linspace(0.0, 1.0, points)
    curves: list[Curve] = []
    left_out: dict[str, str] = {}
    for name in asked:
        try:
            curves += _curves(name, options.get(name, {}), progress)
        except QlabError as error:
            if names is not None or name in options:
                raise
            left_out[name] = str(error)
    return Schedules(progress, tuple(curves), left_out)


def _curves(name: str, options: Mapping[str, Any], progress: NDArray[np.float64]) -> list[Curve]:
    from qlab import methods, models

    net = models.build("mlp", (2,), 2, hidden=(4, 4), seed=0)
    method = methods.create(name, net, **options)
    rows = [method.schedule(float(p)) for p in progress]
    found = [Curve(name, q, np.array([float(row[q]) for row in rows])) for q in rows[0]]
    return [*found, Curve(name, LR, np.array([method.lr_factor(float(p)) for p in progress]))]


@dataclass(frozen=True, eq=False)
class Telemetry(Result):
    """What was recorded of a steered run.

    Args:
        method: its name.
        data: name of the data set.
        total: steps of the plan.
        values: column -> (R,), a row per step, the first of them before any; `COLUMNS` and the scheduled quantities.
        quantities: names of the latter.
        kept: steps that can be gone back to.
        branched: the step at which the run left its parent; None for one without.
    """

    method: str
    data: str
    total: int
    values: Mapping[str, NDArray[np.float64]]
    quantities: tuple[str, ...]
    kept: tuple[int, ...]
    branched: int | None = None

    @property
    def accuracy(self) -> float:
        """The last known accuracy of the deployed net on the test part."""
        known = self.values["accuracy"][np.isfinite(self.values["accuracy"])]
        return float(known[-1]) if len(known) else math.nan

    def frame(self) -> pd.DataFrame:
        """Return one row per step."""
        import pandas as pd

        return pd.DataFrame(dict(self.values))

    def figure(self) -> Figure:
        """Draw quantities, residual, distance and flips over the steps."""
        from qlab.plots.cockpit import telemetry_figure

        return telemetry_figure({self.method: self})

    def summary(self) -> str:
        """Say how far the run is, where its schedule stands, and how far the net is from what is deployed."""
        v = self.values
        done = int(v["step"][-1])
        parts = [f"{self.method} on {self.data}, {done} steps of a plan of {self.total}"]
        if self.branched is not None:
            parts[0] += f", branched off at step {self.branched}"
        if not done:
            return f"{parts[0]}: nothing trained yet."
        parts += [f"{name} went from {v[name][0]:.3g} to {v[name][-1]:.3g}" for name in self.quantities]
        if not v["residual"].any():
            parts.append("forward weights were the deployed ones at every step")
        elif np.isfinite(v["residual"][-1]):
            first, last = v["residual"][0], v["residual"][-1]
            parts.append(f"forward and deployed weights differ by {last:.2g} (at the start {first:.2g})")
        if np.isfinite(v["distance"][-1]):
            parts.append(f"latent weights lie {v['distance'][-1]:.2g} from their levels")
        if np.isfinite(v["flips"][-1]):
            parts.append(f"{100 * np.nanmean(v['flips'][-20:]):.2g} % of the weights flip a step")
        if np.isfinite(self.accuracy):
            parts.append(f"the deployed net is right on {100 * self.accuracy:.1f} % of the test part")
        return f"{parts[0]}: {'; '.join(parts[1:])}."


@dataclass(frozen=True)
class Comparison:
    """Two runs at the last step that both have.

    Args:
        measure: "residual"; "flips" where forward weights are the deployed ones anyway; "loss" of float nets.
        step: that step.
        a, b: the measure of either; of flips and loss, the mean over the last quarter of the steps.
    """

    measure: str
    step: int
    a: float
    b: float

    @property
    def verdict(self) -> str:
        """Whether b is "smaller", "equal" (within a quarter) or "larger"."""
        if self.b > _EQUAL * self.a:
            return "larger"
        return "smaller" if self.a > _EQUAL * self.b else "equal"

    def summary(self) -> str:
        """Say both numbers."""
        said = {
            "residual": "forward and deployed weights differ by {:.2g} in the branch, by {:.2g} as planned",
            "flips": "in the last quarter {:.2g} of the weights flip a step in the branch, {:.2g} as planned",
            "loss": "in the last quarter the loss is {:.2g} in the branch, {:.2g} as planned",
        }[self.measure].format(self.b, self.a)
        return f"At step {self.step} {said}."


def compare(a: Telemetry, b: Telemetry) -> Comparison:
    """Return how far a branch b has come from the run a that it left, at the last step that both have."""
    step = int(min(a.values["step"][-1], b.values["step"][-1]))
    name = measure(a)
    if name == "residual":
        return Comparison(name, step, *(float(t.values[name][step]) for t in (a, b)))
    since = max(1, step + 1 - max(1, step // 4))
    return Comparison(name, step, *(float(t.values[name][since : step + 1].mean()) if step else 0.0 for t in (a, b)))


def measure(run: Telemetry) -> str:
    """Return what runs of this kind are compared by; see `Comparison`."""
    first = run.values["residual"][0]
    if math.isnan(first):
        return "loss"
    return "residual" if first > 0 else "flips"


def smoothed(values: NDArray[np.float64], window: int = WINDOW) -> NDArray[np.float64]:
    """Return the running mean over the last `window` values; NaNs are passed over."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


@torch.no_grad()
def residual(tensors: list[QuantizedTensor]) -> float:
    """Return the mean of |q(w) - hard(w)| over all weights: training-time forward map less what is deployed.

    Args:
        tensors: as from `quantized_tensors`; their quantizers are copied, for some learn from what they are called with.

    Returns:
        NaN without tensors.
    """
    copies = [(t.latent.detach(), copy.deepcopy(t.quantizer)) for t in tensors]
    return mean([(q(w) - q.hard(w)).abs() for w, q in copies])


@torch.no_grad()
def distance(tensors: list[QuantizedTensor]) -> float:
    """Return the mean of |w - v| over all weights with a grid, v the deployed value nearest to the latent w; NaN without any."""
    return mean([d for t in tensors if (d := _to_grid(t)) is not None])


def _to_grid(t: QuantizedTensor) -> Tensor | None:
    w = t.latent.detach()
    levels = t.quantizer.levels(w.dtype)
    if levels is None:
        return None
    scale = t.quantizer.scale(w)
    u = w if scale is None else w / scale
    levels = levels.to(w.device)
    above = torch.searchsorted(levels, u.contiguous()).clamp(max=len(levels) - 1)
    below = (above - 1).clamp(min=0)
    gap = torch.minimum((u - levels[above]).abs(), (u - levels[below]).abs())
    return gap if scale is None else gap * scale


def mean(tensors: list[Tensor]) -> float:
    """Return the mean over the values of all tensors, in float64; NaN without any."""
    if not tensors:
        return math.nan
    return float(torch.cat([t.reshape(-1) for t in tensors]).double().mean())
