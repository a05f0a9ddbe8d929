"""Gradients over temperatures as a static figure: norms, what rounding leaves, and what an attack reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.attacks.temperature import Temperature

__all__ = ["temperature_figure"]

DASHES = ("-", "--", "-.", ":")


def temperature_figure(found: Temperature) -> Figure:
    """Draw norms against beta, regimes of the error signal in the net's own dtype, and accuracy under attack where there is one.

    Args:
        found: as from `qlab.attacks.temperature.temperature`.
    """
    attacked = any(np.isfinite(w.accuracy).any() for w in found.dtypes.values())
    figure = Figure(figsize=(12 if attacked else 8.4, 3.6), dpi=80, layout="constrained")
    panels = figure.subplots(1, 3 if attacked else 2)
    _norms(panels[0], found)
    _regimes(panels[1], found)
    if attacked:
        _accuracies(panels[2], found)
    for axes in panels:
        axes.set(xscale="log", xlabel="beta", xlim=_limits(found.betas))
        for name, beta, colour, dash in _marks(found):
            axes.axvline(beta, color=colour, ls=dash, lw=1, label=name if axes is panels[0] else None)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.set_label(found.summary())
    return figure


def _norms(axes: Axes, found: Temperature) -> None:
    woken = found.dtypes[found.own]
    lines = (
        ("error signal", woken.mean(woken.psi)),
        ("singular value of beta J", found.spread),
        ("input gradient", woken.mean(woken.gradient)),
        ("Hessian", woken.mean(found.h)),
    )
    for (name, values), colour, dash in zip(lines, COLOURS, DASHES, strict=False):
        axes.plot(found.betas, np.where(values > 0, values, np.nan), color=colour, ls=dash, label=name)
    axes.set(title=f"means over examples, {found.own}", yscale="log")


def _regimes(axes: Axes, found: Temperature) -> None:
    from qlab.attacks.temperature import REGIMES

    axes.stackplot(
        found.betas,
        *found.dtypes[found.own].shares,
        labels=REGIMES,
        colors=[COLOURS[2], COLOURS[4], COLOURS[1]],
        alpha=0.35,
    )
    for i, (name, woken) in enumerate(found.dtypes.items()):
        axes.plot(found.betas, woken.lost, color="0.15", ls=DASHES[i % 4], lw=1.2, label=f"zero gradient, {name}")
    axes.set(title=f"error signal in {found.own}", ylabel="share of right examples", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="center left")


def _accuracies(axes: Axes, found: Temperature) -> None:
    for i, (name, woken) in enumerate(found.dtypes.items()):
        axes.plot(found.betas, woken.accuracy, color=COLOURS[i % 6], ls=DASHES[i % 4], marker=".", ms=4, label=name)
    axes.axhline(found.clean, color="0.6", lw=0.8, label="clean")
    axes.set(title=f"right after the attack, eps {found.eps:.4g}", ylabel="share of examples", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8, loc="center left")


def _marks(found: Temperature) -> tuple[tuple[str, float, str, str], ...]:
    return (
        ("NJS (median)", float(np.median(found.njs)), COLOURS[3], ":"),
        ("HNS (median)", float(np.median(found.hns)), COLOURS[5], "--"),
    )


def _limits(betas: np.ndarray) -> tuple[float, float]:
    return (float(betas[0]), float(betas[-1])) if len(betas) > 1 else (float(betas[0]) / 2, float(betas[0]) * 2)
