"""Flips of weights during a training, as static figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.diagnose.course import Course
    from qlab.diagnose.flips import Flips
    from qlab.diagnose.which_flip import WhichFlip

__all__ = ["course_figure", "flips_figure", "which_flip_figure"]

BINS = 60  # of the flip rate over time
DASHES = ("-", "--", ":", "-.")


def flips_figure(result: Flips) -> Figure:
    """Draw the flip rate of every tensor over time and how often weights flipped.

    Args:
        result: as from `qlab.diagnose.flips.flips`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=80, layout="constrained")
    rate, often = figure.subplots(1, 2)
    pieces = np.array_split(np.arange(len(result.steps)), min(BINS, max(1, len(result.steps))))
    for j, (name, size) in enumerate(zip(result.names, result.sizes, strict=True)):
        if len(result.steps):
            at = [result.steps[piece[-1]] for piece in pieces]
            share = [100 * result.counts[piece, j].mean() / size for piece in pieces]
            rate.plot(at, share, color=COLOURS[j % len(COLOURS)], ls=DASHES[j % len(DASHES)], label=name, lw=1.3)
    rate.set(title="Weights that flip, per record", xlabel="step", ylabel="% of the layer")
    rate.set_ylim(bottom=0)
    if len(result.names) <= 8 and len(result.steps):
        rate.legend(frameon=False, fontsize=8)
    n = np.concatenate([counts.ravel() for counts in result.per_weight.values()])
    top = int(min(n.max(), 30))
    heights = np.bincount(np.minimum(n, top), minlength=top + 1)
    often.bar(np.arange(top + 1), heights, color=[COLOURS[1] if k >= 3 else COLOURS[0] for k in range(top + 1)])
    often.set_yscale("log")
    often.set(title="How often a weight flipped (3 or more: oscillating)", xlabel="flips", ylabel="weights")
    often.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (rate, often):
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(result.summary())
    return figure


def which_flip_figure(result: WhichFlip) -> Figure:
    """Draw the margin of the first prediction flip by flip, with the flip that changed it and the minimal set.

    Args:
        result: as from `qlab.diagnose.which_flip.which_flip`.
    """
    figure = Figure(figsize=(9, 3.2), dpi=80, layout="constrained")
    axes = figure.subplots()
    numbers = np.arange(len(result.steps) + 1)
    axes.step(numbers, [result.margin_a, *result.margins], where="post", color=COLOURS[0], lw=1.4)
    axes.axhline(0, color="0.5", lw=0.8)
    if result.minimal:
        chosen = np.array(result.minimal)
        axes.plot(chosen + 1, result.margins[chosen], "s", color=COLOURS[2], ms=6, mfc="none", label="a minimal set")
    if result.first is not None:
        axes.plot([result.first + 1], [result.margins[result.first]], "o", color=COLOURS[1], label="prediction changes")
    if result.first is not None:
        axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title=f"Flips in the order of time, steps {result.step_a} to {result.step_b}",
        xlabel="flips done",
        ylabel=f"margin of class {result.class_a}",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(result.summary())
    return figure


def course_figure(result: Course) -> Figure:
    """Draw the margin of the class that is predicted last over the steps, and the class that is predicted.

    Args:
        result: as from `qlab.diagnose.course.course`.
    """
    figure = Figure(figsize=(9, 2.8), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.plot(result.steps, result.margins, color=COLOURS[0], lw=1.3)
    axes.axhline(0, color="0.5", lw=0.8)
    begins = [0, *(np.flatnonzero(np.diff(result.classes)) + 1).tolist()]
    reach, room = float(np.ptp(result.steps)) or 1.0, float("-inf")
    for i in begins:
        if result.steps[i] - room >= 0.025 * reach:  # else the numbers would overlap
            where = (result.steps[i], result.margins[i])
            axes.annotate(
                str(result.classes[i]),
                where,
                (0, 7),
                textcoords="offset points",
                fontsize=9,
                color=COLOURS[1],
                ha="center",
            )
            room = float(result.steps[i])
    last = int(result.classes[-1])
    if result.turns:
        axes.annotate(str(last), (result.steps[-1], result.margins[-1]), (0, 7), textcoords="offset points", fontsize=9)
    axes.set(title="Predicted class (numbers) over the training", xlabel="step", ylabel=f"margin of class {last}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(result.summary())
    return figure
