"""Curvature as static figures: the spectrum of a Hessian, curvature along directions, pairs of flips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.diagnose.curvature import Curvature
    from qlab.diagnose.discrete import FlipPairs, Stein

__all__ = ["curvature_figure", "flip_pairs_figure", "stein_figure"]

FLOOR = 1e-7  # of the density: below it nothing is drawn


def curvature_figure(found: Curvature) -> Figure:
    """Draw the spectral density on a log axis with the top eigenvalues marked; without a density, the eigenvalues alone.

    Args:
        found: as from `qlab.diagnose.curvature`.
    """
    figure = Figure(figsize=(7, 3.4), dpi=80, layout="constrained")
    axes = figure.subplots()
    points = np.concatenate([found.nodes.reshape(-1), found.eigenvalues, [0.0]])
    low, high = points.min(), points.max()
    pad = 0.06 * (high - low) or 1.0
    # A Gaussian of width sigma would fall between the points of an even grid: the nodes are points too.
    t = np.unique(np.concatenate([np.linspace(low - pad, high + pad, 2000), points]))
    if found.nodes.size:
        # A picture is a few hundred pixels wide; narrower Gaussians are drawn as wide as a pixel.
        sigma2 = max(found.sigma2, ((high - low + 2 * pad) / 300) ** 2)
        nodes, weights = found.nodes.reshape(-1), found.weights.reshape(-1)
        p = np.exp(-((t[:, None] - nodes) ** 2) / (2 * sigma2)) @ weights
        p /= len(found.nodes) * np.sqrt(2 * np.pi * sigma2)
        axes.fill_between(t, FLOOR, np.maximum(p, FLOOR), color=COLOURS[0], alpha=0.3)
        axes.plot(t, np.maximum(p, FLOOR), color=COLOURS[0], lw=1.2, label="density")
        axes.set_yscale("log")
        axes.set_ylabel("spectral density")
    for i, value in enumerate(found.eigenvalues):
        label = "largest by magnitude" if i == 0 else None
        axes.axvline(value, color=COLOURS[1], ls="--", lw=1.2, label=label)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set(title=f"Hessian of the loss: {found.function}", xlabel="eigenvalue")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.set_label(found.summary())
    return figure


def stein_figure(found: Stein) -> Figure:
    """Draw the curvature along each direction with two standard errors.

    Args:
        found: as from `qlab.diagnose.discrete.stein`.
    """
    figure = Figure(figsize=(6, 3), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.6", lw=0.8)
    axes.errorbar(range(len(found.values)), found.values, 2 * found.errors, fmt="o", color=COLOURS[0], ms=4, capsize=2)
    axes.set(
        title=f"smoothed curvature, width {found.s:g}", xlabel="direction", ylabel="v'Hv, with two standard errors"
    )
    axes.set_xticks(range(len(found.values)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(found.summary())
    return figure


def flip_pairs_figure(found: FlipPairs) -> Figure:
    """Draw the matrix of second differences; its diagonal, where two flips undo each other, is left out.

    Args:
        found: as from `qlab.diagnose.discrete.flip_pairs`.
    """
    figure = Figure(figsize=(5, 4), dpi=80, layout="constrained")
    axes = figure.subplots()
    shown = found.second.copy()
    np.fill_diagonal(shown, np.nan)
    limit = float(np.nanmax(np.abs(shown))) if len(shown) > 1 else 1.0
    image = axes.imshow(shown, cmap="PuOr", vmin=-(limit or 1.0), vmax=limit or 1.0)
    figure.colorbar(image, ax=axes, label="L(i, j) - L(i) - L(j) + L")
    layer = found.name.replace(".parametrizations", "").replace(".original", "")
    at = range(0, len(shown), max(1, len(shown) // 6))
    axes.set_xticks(at)
    axes.set_yticks(at)
    axes.set(title=f"pairs of flips, {layer}", xlabel="weight j", ylabel="weight i")
    figure.set_label(found.summary())
    return figure
