"""Results as static figures: plain functions that take results and return a matplotlib figure, never pyplot.

Every figure has its message in words as its label (`figure.get_label()`), which is stored beside the picture.
matplotlib is imported with the first figure.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlab.plots.experiments import experiment_figure
    from qlab.plots.figure import Figure
    from qlab.plots.lines import lines_figure
    from qlab.plots.pictures import confusion_figure, picture_figure
    from qlab.plots.plane import decision_figure
    from qlab.plots.surrogates import surrogate_figure
    from qlab.plots.training import history_figure, history_text
    from qlab.plots.weights import weights_figure

__all__ = [
    "Figure",
    "confusion_figure",
    "decision_figure",
    "experiment_figure",
    "history_figure",
    "history_text",
    "lines_figure",
    "picture_figure",
    "surrogate_figure",
    "weights_figure",
]

_HOME = {
    "Figure": "figure",
    "confusion_figure": "pictures",
    "decision_figure": "plane",
    "experiment_figure": "experiments",
    "history_figure": "training",
    "history_text": "training",
    "lines_figure": "lines",
    "picture_figure": "pictures",
    "surrogate_figure": "surrogates",
    "weights_figure": "weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qlab.plots.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
