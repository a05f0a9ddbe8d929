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
    from qlab.diagnose.signal import Signal
    from qlab.diagnose.vanishing import Vanishing
    from qlab.diagnose.wake import Wake

__all__ = ["jacobian_figure", "meanfield_figure", "signal_figure", "vanishing_figure", "wake_figure"]


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
    norms.legend(frameon=False, fontsize=8, loc="lower left")
    bars = (("saturated", found.saturation, "//"), ("degenerate", found.degenerate, ".."), ("dead", found.dead, ""))
    for i, (name, shares, hatch) in enumerate(bars):
        units.bar(at + 0.27 * (i - 1), shares, 0.25, color=COLOURS[(1, 2, 5)[i]], hatch=hatch, label=name)
    units.set_xticks(at, found.names, rotation=60, ha="right", fontsize=8)
    units.set(title="saturated, degenerate, dead", ylabel="share of units", ylim=(0, 1))
    units.legend(frameon=False, fontsize=8)
    wrong, zero = found.thresholds
    gaps.hist(found.gap, bins=30, color=COLOURS[0], alpha=0.6)
    gaps.set_ylim(0, 1.45 * gaps.get_ylim()[1])  # room for the names of the lines
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
        found: as from `qlab.diagnose.wake.wake`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=80, layout="constrained")
    norms, shares = figure.subplots(1, 2)
    middle = np.median(found.gradient, 2)
    some = sorted({0, len(found.names) // 3, 2 * len(found.names) // 3, len(found.names) - 1})
    for i, layer in enumerate(some):
        y = np.where(middle[:, layer] > 0, middle[:, layer], np.nan)
        norms.plot(found.betas, y, color=COLOURS[i], ls=("-", "--", "-.", ":")[i], label=found.names[layer])
    norms.set(title="gradient norm", xlabel="beta", ylabel="median over examples", xscale="log", yscale="log")
    norms.legend(frameon=False, fontsize=8, loc="lower left")
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
        if title != "correlation c" and np.max(predicted) > 3 * np.min(predicted) > 0:
            axes.set_yscale("log")
        elif title == "length q":
            axes.set_ylim(0, 1.3 * float(np.max(predicted if measured is None else [*predicted, *measured])) or 1)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def vanishing_figure(found: Vanishing, beta: float, dtype: str) -> Figure:
    """Draw gradients per layer at one beta and dtype, the state of the units, lost gradients over beta, and singular values.

    Args:
        found: as from `qlab.diagnose.vanishing.vanishing`.
        beta: the grid's nearest is shown.
        dtype: one of `found.wakes`.
    """
    i = found.nearest(beta)
    shown = found.wakes[dtype]
    figure = Figure(figsize=(11, 6.4), dpi=80, layout="constrained")
    norms, units, lost, spectrum = figure.subplots(2, 2).reshape(-1)
    at = np.arange(len(found.names))
    exact = "exact" if all(found.layers.exact) else "surrogate"
    _norms(norms, at, shown.gradient[i], COLOURS[0], "o", "-", f"back-propagated ({exact})")
    if found.smoothed is not None:
        _norms(
            norms, at, found.smoothed.gradient[i], COLOURS[1], "s", "--", f"smoothed, sharpness {found.k:g}, float64"
        )
    expected = found.expected(beta)
    if expected is not None:
        norms.plot(at, expected, color=COLOURS[2], ls=":", marker="^", ms=4, label="mean field")
    norms.set_yscale("log")
    norms.set_xticks(at, found.names, rotation=60, ha="right", fontsize=8)
    norms.set(title=f"gradient norm at beta {found.betas[i]:.3g}, {dtype}", ylabel="median, quartiles")
    norms.legend(frameon=False, fontsize=8, loc="lower left")
    s = found.layers
    bars = (("saturated", s.saturation, "//"), ("degenerate", s.degenerate, ".."), ("dead", s.dead, ""))
    for j, (name, shares, hatch) in enumerate(bars):
        units.bar(at + 0.27 * (j - 1), shares, 0.25, color=COLOURS[(1, 2, 5)[j]], hatch=hatch, label=name)
    units.set_xticks(at, found.names, rotation=60, ha="right", fontsize=8)
    units.set(title="state of the units", ylabel="share", ylim=(0, 1))
    units.legend(frameon=False, fontsize=8)
    for j, (name, woken) in enumerate(found.wakes.items()):
        lost.plot(woken.betas, woken.lost[:, 0], color=COLOURS[j], ls=("-", "--", "-.", ":")[j % 4], label=name)
    lost.axvline(found.betas[i], color="0.6", lw=0.8)
    lost.set(
        title="input gradient exactly 0", xlabel="beta", ylabel="share of examples", xscale="log", ylim=(-0.03, 1.03)
    )
    lost.legend(frameon=False, fontsize=8)
    if found.jacobian is not None:
        values = found.jacobian.values[0]
        values = values[values > 0] * found.betas[i]
        if values.size:
            spectrum.hist(
                values, bins=np.geomspace(values.min() * 0.99, values.max() * 1.01, 30), color=COLOURS[0], alpha=0.6
            )
        spectrum.axvline(1, color=COLOURS[1], ls="--", lw=1)
        spectrum.set(title="singular values of beta J, input to logits", xscale="log", ylabel="count")
    for axes in (norms, units, lost, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary(beta, dtype))
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
    if np.isfinite(high).any():
        # A lower quartile of 0 has no place on a log axis: the band goes down to the smallest norm there is.
        axes.fill_between(
            at, np.where(np.isfinite(low), low, norms[norms > 0].min()), high, color=colour, alpha=0.15, lw=0
        )
    gone = at[~np.isfinite(middle)]
    if gone.size:
        axes.plot(gone, np.zeros(gone.size), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
