"""A figure of an experiment: every run as a dot, the mean of each arm as a bar, one panel per metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qlab.plots.figure import Figure

if TYPE_CHECKING:
    from qlab.experiments.base import Result

__all__ = ["experiment_figure", "experiment_text"]

_PANELS = 3


def experiment_figure(result: Result) -> Figure:
    """Draw the first metrics of an experiment, arm by arm.

    Args:
        result: what `Experiment.run` returned; up to three of its metrics are drawn, in their order.

    Returns:
        A figure whose label is its alternative text.
    """
    arms = list(dict.fromkeys(result.frame["arm"]))
    metrics = [metric for metric in result.metrics if (result.frame["metric"] == metric.name).any()][:_PANELS]
    figure = Figure(figsize=(3.2 + 2.6 * max(1, len(metrics)), 1.3 + 0.32 * max(1, len(arms))), layout="constrained")
    axes = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
    for panel, metric in zip(axes, metrics, strict=False):
        rows = result.frame[result.frame["metric"] == metric.name]
        for i, arm in enumerate(arms):
            values = metric.scale * rows.loc[rows["arm"] == arm, "value"].to_numpy()
            panel.plot(values, np.full(len(values), i), "o", color="0.35", markersize=5, alpha=0.7, markeredgewidth=0)
            if len(values):
                panel.plot([values.mean()], [i], "|", color="black", markersize=15, markeredgewidth=2)
        if metric.log:
            panel.set_xscale("symlog", linthresh=1e-3)
        panel.set_xlabel(f"{metric.label}, {metric.unit}" if metric.unit else metric.label)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{result.experiment} on {result.data}, {result.scale} scale: the claim {_says(result)}", fontsize=10
    )
    figure.set_label(experiment_text(result))
    return figure


def experiment_text(result: Result) -> str:
    """Return the figure in words: the verdict and the mean of every arm in the first metric."""
    table = result.table()
    if table.empty:
        return f"No run of experiment {result.experiment} finished."
    first = table.columns[0]
    means = "; ".join(f"{arm}: {entry}" for arm, entry in table[first].items())
    return (
        f"Dots of single runs and bars of means per arm for experiment {result.experiment} on {result.data}; "
        f"the claim {_says(result)}. {first}, mean ± standard deviation: {means}."
    )


def _says(result: Result) -> str:
    return "is undecided" if result.verdict == "undecided" else result.verdict
