"""Signal propagation as static figures: gradients per layer, over temperatures, singular values, mean field beside measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from qlab.diagnose.jacobian import Jacobian
    from qlab.diagnose.meanfield import MeanField
    from qlab.diagnose.signal import Signal, Wake

__all__ = ["jacobian_figure", "meanfield_figure", "signal_figure", "wake_figure"]


def signal_figure(found: Signal) -> Figure:
    """Draw gradient norms per layer (log axis), the share of saturated and dead units, and the gaps with the dtype's thresholds.

    Args:
        found: as from `qlab.diagnose.signal.signal`.
    """
    figure = Figure(figsize=(11, 3.6), dpi=80, layout="constrained")
    norms, units, gaps = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    at = np.arange(len(found.names))
    label = "exact" if all(found.exact) else "back-propagated (surrogate)"
    _norms(norms, at, found.gradient, COLOURS[0], "o", "-", label)
    if found.smoothed is not None:
        _norms(norms, at, found.smoothed, COLOURS[1], "s", "--", f"smoothed, sharpness {found.k:g}")
    norms.set_yscale("log")
    norms.set_xticks(at, found.names, rotation=60, ha="right", fontsize=8)
    norms.set(title="gradient norm per layer", ylabel="median, quartiles")
    norms.legend(frameon=False, fontsize=8)
    units.bar(at - 0.2, found.saturation, 0.38, color=COLOURS[1], hatch="//", label="saturated")
    units.bar(at + 0.2, found.dead, 0.38, color=COLOURS[5], label="dead")
    units.set_xticks(at, found.names, rotation=60, ha="right", fontsize=8)
    units.set(title="saturated and dead", ylabel="share of units", ylim=(0, 1))
    units.legend(frameon=False, fontsize=8)
    wrong, zero = found.thresholds
    gaps.hist(found.gap, bins=30, color=COLOURS[0], alpha=0.6)
    for x, text in ((wrong, "wrong direction"), (zero, "zero")):
        if found.gap.max() > 0.5 * x:
            gaps.axvline(x, color=COLOURS[1], ls="--", lw=1)
            gaps.annotate(
                text,
                (x, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
    gaps.set(title=f"gap of the logits, beta {found.beta:g}", xlabel="Delta", ylabel="examples")
    for axes in (norms, units, gaps):
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def wake_figure(found: Wake) -> Figure:
    """Draw the gradient norm of every layer against beta, and the shares of examples without a gradient.

    Args:
        found: as from `qlab.diagnose.signal.wake`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=80, layout="constrained")
    norms, shares = figure.subplots(1, 2)
    middle = np.median(found.gradient, 2)
    some = sorted({0, len(found.names) // 3, 2 * len(found.names) // 3, len(found.names) - 1})
    for i, layer in enumerate(some):
        y = np.where(middle[:, layer] > 0, middle[:, layer], np.nan)
        norms.plot(found.betas, y, color=COLOURS[i], ls=("-", "--", "-.", ":")[i], label=found.names[layer])
    norms.set(title="gradient norm", xlabel="beta", ylabel="median over examples", xscale="log", yscale="log")
    norms.legend(frameon=False, fontsize=8)
    shares.plot(found.betas, found.lost[:, 0], color=COLOURS[1], label="input gradient exactly 0")
    shares.plot(found.betas, found.certain, color=COLOURS[0], ls="--", label="p_y exactly 1")
    shares.set(title="lost to rounding", xlabel="beta", ylabel="share of examples", xscale="log", ylim=(-0.03, 1.03))
    shares.legend(frameon=False, fontsize=8)
    for axes in (norms, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def jacobian_figure(found: Jacobian) -> Figure:
    """Draw the singular values of every source's Jacobian: all examples, on a log axis, with their mean.

    Args:
        found: as from `qlab.diagnose.jacobian.jacobian`.
    """
    figure = Figure(figsize=(max(4.0, 1.5 + 0.8 * len(found.sources)), 3.4), dpi=80, layout="constrained")
    axes = figure.subplots()
    for i, values in enumerate(found.values):
        rank = values.shape[1]
        x = i + np.linspace(-0.3, 0.3, rank) if rank > 1 else np.array([float(i)])
        shown = np.where(values > 0, values, np.nan)
        axes.plot(np.broadcast_to(x, shown.shape), shown, ".", color=COLOURS[0], alpha=0.25, ms=3)
        axes.plot([i - 0.35, i + 0.35], [values.mean()] * 2, color=COLOURS[1], lw=2, label="mean" if i == 0 else None)
    axes.axhline(1, color="0.6", lw=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(found.sources)), found.sources, rotation=45, ha="right", fontsize=8)
    axes.set(title=f"singular values of d {found.target} / d layer", ylabel="singular value")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def meanfield_figure(found: MeanField) -> Figure:
    """Draw lengths, correlations and gradient norms by layer, predicted, and measured where there are measurements.

    Args:
        found: as from `qlab.diagnose.meanfield.meanfield`.
    """
    figure = Figure(figsize=(10, 3.2), dpi=80, layout="constrained")
    panels = figure.subplots(1, 3)
    rows = (
        ("length q", found.q, None if found.measured is None else found.measured.q),
        ("correlation c", found.c, None if found.measured is None else found.measured.c),
        ("gradient, relative", found.gradient, None if found.measured is None else found.measured.gradient),
    )
    for axes, (title, predicted, measured) in zip(panels, rows, strict=True):
        axes.plot(range(len(predicted)), predicted, color=COLOURS[0], label="mean field")
        if measured is not None:
            axes.plot(range(len(measured)), measured, "o", color=COLOURS[1], ms=4, label="measured")
        axes.set(title=title, xlabel="layer")
        if title != "correlation c":
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def _norms(
    axes: Axes,
    at: NDArray[np.int64],
    norms: NDArray[np.float64],
    colour: str,
    mark: str,
    dash: str,
    label: str,
) -> None:
    """Draw medians and quartiles of norms (L, N); layers without any gradient get no point, but a cross at the axis."""
    low, middle, high = (np.where(q > 0, q, np.nan) for q in np.quantile(norms, [0.25, 0.5, 0.75], axis=1))
    axes.plot(at, middle, color=colour, marker=mark, ls=dash, ms=4, label=label)
    axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
    gone = at[~np.isfinite(middle)]
    if gone.size:
        axes.plot(gone, np.zeros(gone.size), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
