"""Curves over one quantity, panel beside panel: losses along a line, paths of a single weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

__all__ = ["lines_figure"]

_DASHES = ("-", "--", "-.", ":")

Panel = Mapping[str, tuple[Any, Any]]
"""Label -> (x, y), both (N,)."""


def lines_figure(
    panels: Mapping[str, Panel],
    xlabel: str,
    ylabels: Sequence[str] = (),
    *,
    alt: str,
    guides: Sequence[float] = (),
    steps: bool = False,
) -> Figure:
    """Draw curves; lines are told apart by dash as well as by colour.

    Args:
        panels: title -> curves of the panel.
        xlabel: of every panel.
        ylabels: one per panel.
        alt: the figure in words.
        guides: levels to mark with a thin horizontal line.
        steps: draw steps that hold a value until the next x, for what changes at once.
    """
    figure = Figure(figsize=(1.0 + 4.2 * len(panels), 3.1), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axis, (title, curves)) in enumerate(zip(axes, panels.items(), strict=True)):
        for level in guides:
            axis.axhline(level, color="0.7", lw=0.8, zorder=0)
        for k, (label, (x, y)) in enumerate(curves.items()):
            axis.plot(
                np.asarray(x),
                np.asarray(y),
                color=COLOURS[k % len(COLOURS)],
                ls=_DASHES[k % len(_DASHES)],
                lw=1.5,
                label=label,
                drawstyle="steps-post" if steps else "default",
            )
        axis.set(title=title, xlabel=xlabel, ylabel=ylabels[i] if i < len(ylabels) else "")
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.set_label(alt)
    return figure
