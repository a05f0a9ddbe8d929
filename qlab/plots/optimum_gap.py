"""The gap to the optimum: a row for each method, a dot for each start, the best signs at the left edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure

if TYPE_CHECKING:
    from qlab.experiments.base import Result

__all__ = ["optimum_gap_figure"]

_LINEAR = 1e-3  # gaps below it are drawn to a linear scale: zero is on the axis


def optimum_gap_figure(result: Result) -> Figure:
    """Draw the gap of every run, methods in the order of their mean gap.

    Args:
        result: of the experiment "optimum_gap".

    Returns:
        A figure whose label is its alternative text. At the right of each row: the share of starts that reach the optimum.
    """
    frame = result.frame
    gaps = {str(arm): rows["value"].to_numpy() for arm, rows in frame[frame["metric"] == "optimum/gap"].groupby("arm")}
    reached = frame[frame["metric"] == "optimum/reached"].groupby("arm")["value"].mean()
    order = sorted(gaps, key=lambda arm: float(gaps[arm].mean()))
    figure = Figure(figsize=(7.5, 1.5 + 0.32 * max(1, len(order))), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(order):
        values = gaps[arm]
        # Dots of one row are spread over it, for many starts end at the very same signs.
        height = i + 0.28 * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.array([i])
        axes.plot(values, height, "o", color="0.35", markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot([values.mean()] * 2, [i - 0.38, i + 0.38], color="C1", linewidth=2)
        if arm in reached.index:
            axes.annotate(
                f"{100 * reached[arm]:.0f} %",
                (1.01, i),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                annotation_clip=False,
            )
    axes.annotate(
        "reach it", (1.01, 1.0), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9, va="bottom"
    )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.set_xlim(left=-_LINEAR / 4)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("training loss above that of the best signs (dot: a start, bar: mean)")
    figure.suptitle(f"How far from the best signs: {result.data}, {len(result.seeds)} starts", fontsize=10)
    words = "; ".join(f"{arm}: mean gap {gaps[arm].mean():.3g}, best {gaps[arm].min():.3g}" for arm in order)
    figure.set_label(
        f"A row of dots for each method, a dot for each start: the training loss of the deployed signs on {result.data} above the "
        f"least of all signs, which is 0. {words or 'No run finished'}."
    )
    return figure
