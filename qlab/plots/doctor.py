"""A doctor's findings as a static figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.diagnose.doctor import Diagnosis

__all__ = ["doctor_figure"]

MAX_ROWS = 12
STYLE = {  # severity -> length of the bar, colour, hatch
    "high": (4, COLOURS[1], ""),
    "medium": (3, COLOURS[4], "//"),
    "low": (2, COLOURS[0], ".."),
    "info": (1, "0.7", ""),
}


def doctor_figure(diagnosis: Diagnosis) -> Figure:
    """Draw a bar per finding, the most severe on top, with its name, layer and severity in words.

    Args:
        diagnosis: as from `qlab.diagnose.doctor.doctor`.
    """
    shown = diagnosis.findings[:MAX_ROWS]
    figure = Figure(figsize=(9, 0.6 + 0.36 * max(1, len(shown))), dpi=80, layout="constrained")
    axes = figure.subplots()
    for i, finding in enumerate(shown):
        length, colour, hatch = STYLE[finding.severity]
        axes.barh(i, length, 0.6, color=colour, hatch=hatch, edgecolor="white")
        where = f" in {finding.layer}" if finding.layer else ""
        axes.annotate(f"  {finding.name}{where}", (length, i), va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [f.severity for f in shown])
    axes.set_xlim(0, 11)
    axes.set_xticks([])
    axes.set_ylim(max(1, len(shown)) - 0.4, -0.6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    alarms = len(diagnosis.alarms)
    rest = len(diagnosis.findings) - len(shown)
    title = "no finding" if not shown else "likeliest cause first" + (f"; {rest} more" if rest else "")
    axes.set_title(f"{alarms} alarm{'s' if alarms != 1 else ''}: {title}", fontsize=10, loc="left")
    figure.set_label(diagnosis.summary())
    return figure
