"""Flipped weight bits as static figures: the harm of every single bit, and accuracy over the number of flips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.attacks.weight_bits import WeakestBits
    from qlab.attacks.weights import BitSearch

__all__ = ["search_figure", "weakest_figure"]

MAX_POINTS, MAX_LAYERS = 2000, 8
_DASHES = ("-", "--", "-.", ":")


def weakest_figure(result: WeakestBits) -> Figure:
    """Draw the change of loss and of accuracy of every flip, a sorted curve per layer.

    Args:
        result: as from `qlab.attacks.weights.weakest_bits`.
    """
    figure = Figure(figsize=(8.8, 3.5), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(result.layer.tolist()))[:MAX_LAYERS]
    for k, name in enumerate(names):
        at = result.layer == name
        for axes, values in ((left, result.delta[at]), (right, 100 * result.more_errors[at] / result.examples)):
            order = np.sort(values)[::-1]
            rank = np.unique(np.geomspace(1, len(order), MAX_POINTS).astype(int)) - 1
            style = {"color": COLOURS[k % len(COLOURS)], "ls": _DASHES[k % len(_DASHES)], "lw": 1.6}
            axes.plot(rank + 1, order[rank], label=name, **style)
    left.set(ylabel="change of the loss", title=f"{len(result):,} bits, one at a time")
    right.set(ylabel="accuracy lost, points", title=f"from {result.accuracy:.1%} on {result.examples} examples")
    for axes in (left, right):
        axes.set(xlabel="bits of a layer, the most harmful first", xscale="log")
        axes.axhline(0, color="0.7", lw=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.set_label(result.summary())
    return figure


def search_figure(result: BitSearch) -> Figure:
    """Draw accuracy and loss over the number of flips, of the search and of random flips with their spread.

    Args:
        result: as from `qlab.attacks.weights.bit_search`.
    """
    figure = Figure(figsize=(8.8, 3.5), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    flips = np.arange(len(result) + 1)
    panels = ((left, 100 * result.accuracy, 100 * result.random_accuracy), (right, result.loss, result.random_loss))
    for axes, found, random in panels:
        axes.plot(flips, found, color=COLOURS[1], marker="o", ms=3, lw=1.6, label="progressive search")
        if len(random):
            axes.fill_between(flips, random.min(0), random.max(0), color=COLOURS[0], alpha=0.2, lw=0)
            axes.plot(flips, random.mean(0), color=COLOURS[0], ls="--", lw=1.6, label=f"random, {len(random)} draws")
        axes.set(xlabel=f"bits flipped, of {result.bits:,}")
        axes.spines[["top", "right"]].set_visible(False)
    if result.test_accuracy is not None:
        left.plot(flips, 100 * result.test_accuracy, color=COLOURS[2], ls=":", lw=1.6, label="search, other examples")
    left.set(ylabel="accuracy, %", title="Accuracy of the deployed net")
    left.set_ylim(0, 102)
    right.set(ylabel="loss", title="Loss")
    left.legend(frameon=False, fontsize=8)
    figure.set_label(result.summary())
    return figure
