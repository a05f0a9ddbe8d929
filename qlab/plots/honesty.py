"""The honesty panel as a table, and the curve of one of its checks."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.attacks.checks import Check
    from qlab.attacks.honesty import Honesty

__all__ = ["curve_figure", "honesty_figure"]

STYLE = {  # state -> mark, word, colour
    "pass": ("✓", "pass", COLOURS[2]),
    "warn": ("!", "warn", COLOURS[4]),
    "fail": ("✗", "fail", COLOURS[1]),
    "skipped": ("-", "skipped", "0.55"),
}
WORDS = 104  # characters of evidence in a line
LINES = 2


def honesty_figure(panel: Honesty) -> Figure:
    """Draw a row for each check: number, mark and colour of its state, name, mechanism of a failure, evidence.

    Args:
        panel: as from `qlab.attacks.honesty.honesty`, complete or not.
    """
    rows = panel.checks
    figure = Figure(figsize=(13, 1.0 + 0.38 * max(1, len(rows))), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 13)
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    axes.axis("off")
    for i, check in enumerate(rows):
        mark, word, colour = STYLE[check.state]
        axes.barh(i, 0.9, 0.8, left=0.45, color=colour)
        axes.text(0.35, i, str(check.number), ha="right", va="center", fontsize=9)
        axes.text(0.9, i, f"{mark} {word}", ha="center", va="center", fontsize=9, color="white", weight="bold")
        axes.text(1.45, i, check.name, va="center", fontsize=9)
        if check.state in ("fail", "warn"):
            axes.text(4.15, i, check.mechanism, ha="center", va="center", fontsize=8, color=colour, weight="bold")
        lines = fill(check.words, WORDS, max_lines=LINES, placeholder=" ...")
        axes.text(4.65, i, lines, va="center", fontsize=8.5, color="0.25", linespacing=1.0)
        axes.axhline(i + 0.5, color="0.9", linewidth=0.6)
    axes.set_title(fill(panel.summary(), 150, max_lines=4, placeholder=" ..."), fontsize=10, loc="left")
    figure.set_label(panel.summary())
    return figure


def curve_figure(check: Check) -> Figure:
    """Draw what a check saw.

    Args:
        check: one with a curve.

    Raises:
        InputError: it has none.
    """
    from qlab.errors import InputError

    if check.curve is None:
        raise InputError(f"check {check.number} ({check.name}) has no curve; its evidence: {check.words}")
    curve = check.curve
    figure = Figure(figsize=(5, 3.2), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.x, curve.y, color=COLOURS[0], marker="o", markersize=4)
    if curve.log:
        axes.set_xscale("log")
    axes.set_xlabel(curve.x_name)
    axes.set_ylabel(curve.y_name)
    axes.set_ylim(bottom=min(0.0, float(curve.y.min())))
    axes.set_title(f"{check.number} {check.name}: {check.state}", fontsize=10, loc="left")
    figure.set_label(f"Check {check.number}, {check.name}: {check.state}. {check.words}")
    return figure
