r"""Where gradients vanish: the numbers behind the microscope, for a grid of temperatures and dtypes at once.

    back-propagated   ||dl/dh_l|| per layer, through straight-through rules, in the dtype named
    smoothed          the same with activations as tanh steps, in float64: what is there to be found
    mean field        what a random net with weights of the same size would have, from the gradient at the logits
    J                 singular values of d logits / d layer; the gradient at a layer is J' times the one at the logits

A gradient that is 0 in float32 and not in float64 was lost to rounding, and a small beta brings it back. One that is 0 in every
dtype at every beta is lost in the net: dead units, or pre-activations beyond the backward rule.

See `qlab.diagnose.signal` (dtypes), `qlab.diagnose.wake` (temperature), `qlab.diagnose.jacobian`, `qlab.diagnose.meanfield`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result, check
from qlab.diagnose.jacobian import Jacobian, jacobian
from qlab.diagnose.meanfield_chain import predicted_gradients
from qlab.diagnose.recording import smooth_activations
from qlab.diagnose.signal import Signal, Thresholds, signal, thresholds
from qlab.diagnose.wake import Wake, wake
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["DTYPES", "Vanishing", "smallest", "vanishing", "vanishings"]

Floats = NDArray[np.float64]
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BETAS = tuple(float(b) for b in np.logspace(-3, 2, 61))
SHARP = 5.0


@dataclass(frozen=True)
class Vanishing(Result):
    """Gradients per layer over temperatures and dtypes. What has not been computed yet is missing or None.

    Attributes:
        layers: `signal` at beta 1 in the net's own dtype: saturation, degeneration, dead units.
        wakes: dtype -> `wake` by back-propagation.
        smoothed: `wake` of the smoothed function in float64; None for a net whose back-propagated gradients are exact.
        predicted: (L,) mean-field gradient norms relative to the one at the logits; None where mean field does not apply.
        why_not: why it does not.
        jacobian: of the logits by every layer, for some of the examples; None where it was not asked for.
        batch: B: gradients are divided by it.
        k: sharpness of the tanh steps.
        failed: dtype -> why the net does not run in it.
    """

    layers: Signal
    wakes: dict[str, Wake]
    smoothed: Wake | None
    predicted: Floats | None
    why_not: str
    jacobian: Jacobian | None
    batch: int
    k: float
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, "input" first."""
        return self.layers.names

    @property
    def betas(self) -> Floats:
        """The grid of factors on the logits."""
        return next(iter(self.wakes.values())).betas

    def thresholds(self, dtype: str) -> Thresholds:
        """Return the gaps from which on cross-entropy's gradient is wrong, and zero, for one competitor."""
        self._wake(dtype)
        return thresholds(DTYPES[dtype], 2, self.batch)

    def nearest(self, beta: float) -> int:
        """Return the index of the grid's beta next to this one."""
        if not beta > 0:
            raise InputError(f"beta must be positive, not {beta!r}")
        return int(np.abs(np.log(self.betas / beta)).argmin())

    def log_expected(self) -> Floats | None:
        """Return log10 of `expected` at every beta, (K, L); -inf for 0."""
        rows = [row for row in map(self.expected, self.betas.tolist()) if row is not None]
        with np.errstate(divide="ignore"):
            return np.log10(np.stack(rows)) if rows else None

    def expected(self, beta: float) -> Floats | None:
        """Return the mean-field gradient norms (L,) that belong to the float64 gradient at the logits."""
        if self.predicted is None:
            return None
        reference = self.wakes.get("float64", next(iter(self.wakes.values())))
        return self.predicted * float(np.median(reference.gradient[self.nearest(beta), -1]))

    def regimes(self, dtype: str) -> Floats:
        """Return shares of examples (K, 3) by the gap at every beta: right direction, wrong one, zero."""
        t, w = self.thresholds(dtype), self._wake(dtype)
        gap = w.betas[:, None] * w.gap
        wrong, zero = gap >= t.wrong, gap >= t.zero
        return np.stack([1 - (wrong | zero).mean(1), (wrong & ~zero).mean(1), zero.mean(1)], 1)

    def gaps(self) -> tuple[Floats, Floats, float]:
        """Return a histogram of log10 Delta at beta 1 (edges, shares of all examples) and the share with Delta <= 0.

        beta moves it along the axis by log10 beta.
        """
        gap = next(iter(self.wakes.values())).gap
        return *_log_histogram(gap, 24), float((gap <= 0).mean())

    def spectrum(self) -> tuple[Floats, Floats]:
        """Return a histogram of log10 of the input Jacobian's singular values: edges and shares; beta moves it by log10 beta."""
        values = np.zeros(0) if self.jacobian is None else self.jacobian.values[0].reshape(-1)
        return _log_histogram(values, 24)

    def frame(self) -> pd.DataFrame:
        """Return one row per dtype, beta and layer: median gradient norm, share of examples without any."""
        import pandas as pd

        parts = [w.frame().assign(function="back-propagated", dtype=name) for name, w in self.wakes.items()]
        if self.smoothed is not None:
            parts.append(self.smoothed.frame().assign(function="smoothed", dtype="float64"))
        return pd.concat(parts, ignore_index=True)

    def figure(self, beta: float = 1.0, dtype: str | None = None) -> Figure:
        """Return gradients per layer at one beta and dtype, the state of the units, lost gradients over beta, singular values.

        Args:
            beta: the grid's nearest is shown.
            dtype: a name of `DTYPES` that was computed; the first by default.
        """
        from qlab.plots.signal import vanishing_figure

        return vanishing_figure(self, beta, dtype or next(iter(self.wakes)))

    def summary(self, beta: float = 1.0, dtype: str | None = None) -> str:
        """Return the figures in words, at one beta and dtype."""
        dtype = dtype or next(iter(self.wakes))
        w, i = self._wake(dtype), self.nearest(beta)
        t = self.thresholds(dtype)
        gap = w.gap * w.betas[i]
        which = "exact" if all(self.layers.exact) else "deployed forward, surrogate backward"
        norm = float(np.median(w.gradient[i, 0]))
        text = (
            f"At beta {w.betas[i]:.3g} in {dtype} the back-propagated input gradient ({which}) is exactly zero for "
            f"{w.lost[i, 0]:.0%} of {gap.size} examples; its median norm is {norm:.3g}. The median gap of the logits is "
            f"{np.median(gap):.3g}: above {t.wrong:.1f} the softmax's gradient points the wrong way "
            f"({((gap >= t.wrong) & (gap < t.zero)).mean():.0%}), above {t.zero:.1f} it is 0 ({(gap >= t.zero).mean():.0%})."
        )
        if self.smoothed is not None:
            text += f" The smoothed function (sharpness {self.k:g}) has {np.median(self.smoothed.gradient[i, 0]):.3g} there."
        expected = self.expected(beta)
        if expected is not None:
            text += f" Mean field expects {expected[0]:.3g} of random weights of this size."
        elif self.why_not:
            text += f" No mean-field prediction: {self.why_not}."
        text += "".join(f" No {name}: {why}." for name, why in self.failed.items())
        s = self.layers
        if np.isfinite(s.saturation).any():
            j = int(np.nanargmax(s.saturation))
            text += (
                f" {s.saturation[j]:.0%} of pre-activations at {s.names[j]} are beyond 1, where the clipped rule "
                "passes nothing."
            )
        if self.jacobian is not None:
            text += (
                f" The Jacobian's mean singular value is {self.jacobian.mean[0]:.3g}: a factor of {self.jacobian.beta1:.3g} "
                "makes it 1."
            )
        return text

    def _wake(self, dtype: str) -> Wake:
        if dtype not in self.wakes:
            raise UnknownNameError("dtype that was computed", dtype, self.wakes)
        return self.wakes[dtype]


def smallest(dtype: str) -> float:
    """Return log10 of the smallest number above 0 of a dtype, a name of `DTYPES`."""
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    info = torch.finfo(DTYPES[dtype])
    return math.log10(info.tiny) + math.log10(info.eps)


def vanishing(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    betas: Sequence[float] = BETAS,
    dtypes: Sequence[str] = ("float32", "float64", "float16"),
    batch: int = 1,
    k: float = SHARP,
    images: int = 16,
) -> Vanishing:
    """Return gradients per layer for every beta and dtype, with all that helps to read them.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        betas: positive factors on the logits.
        dtypes: names of `DTYPES`; the first is the one that is shown.
        batch: B of a mean over B examples.
        k: sharpness of the smoothed function.
        images: examples whose Jacobian is taken; 0 for none.

    Raises:
        UnknownNameError: no such dtype.
        InputError: see `qlab.diagnose.wake.wake`.
    """
    return last(vanishings(net, x, y, betas=betas, dtypes=dtypes, batch=batch, k=k, images=images), Vanishing)


def vanishings(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    betas: Sequence[float] = BETAS,
    dtypes: Sequence[str] = ("float32", "float64", "float16"),
    batch: int = 1,
    k: float = SHARP,
    images: int = 16,
) -> Generator[Update, None, None]:
    """Yield what `vanishing` returns, one part after the other; the first holds the first dtype."""
    for name in dtypes:
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, DTYPES)
    if not dtypes:
        raise InputError(f"name at least one dtype of {', '.join(DTYPES)}")
    net, _ = check(net, x, y)
    layers = signal(net, x, y, k=k, batch=batch)
    first = wake(net, x, y, betas, dtype=DTYPES[dtypes[0]], batch=batch)
    found = Vanishing(layers, {dtypes[0]: first}, None, None, "", None, batch, k)
    yield Update(0.2, f"gradients in {dtypes[0]}", found)
    try:
        relative = predicted_gradients(net, x)
        found = replace(found, predicted=np.array([relative[name] for name in found.names]))
    except InputError as error:
        found = replace(found, why_not=str(error))
    smooth = None if layers.smoothed is None else smooth_activations(net, k)
    if smooth is not None:
        woken = wake(smooth, x, y, betas, dtype=torch.float64, batch=batch)
        if woken.names == found.names:
            found = replace(found, smoothed=woken)
    yield Update(0.4, "smoothed function and mean field", found)
    for i, name in enumerate(dtypes[1:], 1):
        try:
            woken = wake(net, x, y, betas, dtype=DTYPES[name], batch=batch)
            found = replace(found, wakes=found.wakes | {name: woken})
        except InputError as error:  # too large for a half: the other dtypes say enough
            found = replace(found, failed=found.failed | {name: str(error)})
        yield Update(0.4 + 0.4 * i / len(dtypes), f"gradients in {name}", found)
    if images > 0:
        found = replace(found, jacobian=jacobian(net, x[:images], "all"))
    yield Update(1.0, "done", found)


def _log_histogram(values: Floats, bins: int) -> tuple[Floats, Floats]:
    """Return edges and shares of log10 of the positive values; shares are of all values."""
    logs = np.log10(values[values > 0])
    if not logs.size:
        return np.zeros(0), np.zeros(0)
    low, high = float(logs.min()), float(logs.max())
    counts, edges = np.histogram(logs, bins, (low, high) if high > low else (low - 0.1, high + 0.1))
    return edges, counts / values.size
