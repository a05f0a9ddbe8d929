"""Training runs as one static picture: accuracy, loss, flip ratio and the latent weights, runs side by side.

    history_figure([run_a, run_b])      # a matplotlib Figure; figure.savefig("runs.png")
    history_text([run_a, run_b])        # the same message in words: alt text, screen readers, plain terminals

Lines are told apart by dash and label as well as by colour: solid is the deployed net, dashed the latent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qlab.errors import InputError
from qlab.live import WIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.live import Histogram
    from qlab.plots.figure import Figure

__all__ = ["COLOURS", "curves", "history_figure", "history_text"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#5D5D9F")
"""Okabe and Ito's palette for colour-blind readers, its two palest hues darkened to be legible on white."""

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Metric -> (steps, values)."""


def curves(run: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return a run's history as metric -> (steps, values), or a mapping of that form as it is.

    Raises:
        InputError: for anything else.
    """
    history = getattr(run, "history", run)
    if isinstance(history, Mapping):
        return dict(history)
    if not hasattr(history, "groupby"):
        raise InputError(
            f"history_figure got {type(run).__name__}; expected runs of qlab.fit or snapshots of a training"
        )
    return {
        str(metric): (rows["step"].to_numpy(float), rows["value"].to_numpy(float))
        for metric, rows in history.groupby("metric", sort=False)
    }


def history_figure(
    runs: Sequence[Any],
    labels: Sequence[str] | None = None,
    *,
    histograms: Sequence[Histogram | None] | None = None,
    chance: float | None = None,
) -> Figure:
    """Draw accuracy, loss and flip ratio against the step and the histogram of the latent weights.

    Args:
        runs: of `qlab.fit`, or snapshots of a training; at most as many as there are `COLOURS`.
        labels: one per run; A, B, C ... by default.
        histograms: one per run; by default those of the runs' trained methods.
        chance: accuracy of guessing, drawn as a reference line.

    Raises:
        InputError: for more runs than can be told apart, or labels that do not match.
    """
    from qlab.plots.figure import Figure

    labels = _labels(runs, labels)
    if histograms is None:
        histograms = [_histogram(run) for run in runs]
    figure = Figure(figsize=(9, 5), dpi=80, layout="constrained")
    accuracy, loss, flips, weights = figure.subplots(2, 2).flat
    if chance is not None:
        accuracy.axhline(chance, color="0.5", lw=1, ls=":")
        accuracy.annotate(
            "guessing", (0, chance), xycoords=("axes fraction", "data"), va="bottom", color="0.4", fontsize=8
        )
    for run, label, colour, histogram in zip(runs, labels, COLOURS, histograms, strict=False):
        data = curves(run)
        _line(accuracy, data.get("val/acc"), colour, "-", f"{label} deployed")
        _line(accuracy, data.get("val/acc_latent"), colour, "--", f"{label} latent")
        _line(loss, data.get("train/loss"), colour, "-", f"{label} training")
        _line(loss, data.get("val/loss"), colour, "--", f"{label} validation")
        _line(flips, data.get("quant/flip_ratio"), colour, "-", label)
        if histogram is not None:
            _weights(weights, histogram, colour, label)
    accuracy.set(title="Validation accuracy", xlabel="step")
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    loss.set(title="Loss", xlabel="step")
    flips.set(title="Share of weights that changed sign, per epoch", xlabel="step")
    weights.set(title="Latent weights; deployed levels dotted", xlabel="value", ylabel="share")
    flip_ratios = [curves(run)["quant/flip_ratio"][1] for run in runs if "quant/flip_ratio" in curves(run)]
    if any((values > 0).any() for values in flip_ratios):
        flips.set_yscale("log")
    for axes in (accuracy, loss, flips, weights):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.set_label(history_text(runs, labels))
    return figure


def history_text(runs: Sequence[Any], labels: Sequence[str] | None = None) -> str:
    """Return the picture's message in words: the last value of every metric, one line per run."""
    lines = []
    for run, label in zip(runs, _labels(runs, labels), strict=True):
        parts = []
        data = curves(run)
        for metric, name, form in _SPOKEN:
            if metric not in data:
                continue
            steps, values = data[metric]
            if len(values):
                parts.append(f"{name} {form.format(float(values[-1]))} at step {int(steps[-1])}")
        lines.append(f"Run {label}: " + ("; ".join(parts) or "nothing recorded yet") + ".")
    return "\n".join(lines) or "No run yet."


_SPOKEN = (
    ("val/acc", "validation accuracy of the deployed net", "{:.1%}"),
    ("val/acc_latent", "of the latent net", "{:.1%}"),
    ("train/loss", "training loss", "{:.3g}"),
    ("quant/flip_ratio", "share of weights that changed sign in an epoch", "{:.2g}"),
)


def _labels(runs: Sequence[Any], labels: Sequence[str] | None) -> list[str]:
    if len(runs) > len(COLOURS):
        raise InputError(f"history_figure got {len(runs)} runs; at most {len(COLOURS)} can be told apart, so pick some")
    names = [chr(ord("A") + i) for i in range(len(runs))] if labels is None else list(labels)
    if len(names) != len(runs):
        raise InputError(f"history_figure got {len(names)} labels for {len(runs)} runs; give one each")
    return names


def _histogram(run: Any) -> Histogram | None:
    from qlab.live import weight_histogram

    method = getattr(run, "method", None)
    return getattr(run, "histogram", None) if method is None else weight_histogram(method)


def _line(axes: Axes, series: tuple[np.ndarray, np.ndarray] | None, colour: str, dash: str, label: str) -> None:
    if series is None or not len(series[0]):
        return
    marker = "o" if len(series[0]) == 1 else None
    axes.plot(*series, color=colour, ls=dash, lw=1.5, marker=marker, label=label)


def _weights(axes: Axes, histogram: Histogram, colour: str, label: str) -> None:
    share = histogram.counts / max(histogram.counts.sum(), 1)
    axes.stairs(share, histogram.edges, color=colour, lw=1.5, label=label)
    if histogram.edges[-1] > WIDE:
        axes.set_xscale("symlog", linthresh=1)
    for level in histogram.levels:
        axes.axvline(level, color=colour, lw=1, ls=":")
