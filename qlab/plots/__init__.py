"""Results as static figures: plain functions that take results and return a matplotlib figure, never pyplot.

Every figure has its message in words as its label (`figure.get_label()`), which is stored beside the picture.
matplotlib is imported with the first figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.lazy import lazy_names

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


__getattr__, __dir__ = lazy_names(__name__, {name: f"qlab.plots.{module}" for name, module in _HOME.items()}, __all__)
