"""Histograms of latent weights side by side, on one scale, with the deployed levels."""

from __future__ import annotations

from collections.abc import Mapping

from qlab.live import WIDE, Histogram
from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

__all__ = ["weights_figure"]


def weights_figure(histograms: Mapping[str, Histogram]) -> Figure:
    """Draw histograms of latent weights, one panel each, same height of axes.

    Args:
        histograms: title -> histogram, as from `qlab.live.weight_histogram`.
    """
    figure = Figure(figsize=(1.0 + 3.6 * len(histograms), 2.9), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(histograms), squeeze=False, sharey=True)[0]
    said = []
    for axis, (title, histogram) in zip(axes, histograms.items(), strict=True):
        share = histogram.counts / max(histogram.counts.sum(), 1)
        axis.stairs(share, histogram.edges, color=COLOURS[0], fill=True, alpha=0.35)
        axis.stairs(share, histogram.edges, color=COLOURS[0], lw=1.5)
        for level in histogram.levels:
            axis.axvline(level, color="0.3", lw=1, ls=":")
        if histogram.edges[-1] > WIDE:
            axis.set_xscale("symlog", linthresh=1)
        axis.set(title=title, xlabel="latent weight")
        axis.spines[["top", "right"]].set_visible(False)
        top = int(share.argmax())
        said.append(
            f"{title}: {int(histogram.counts.sum())} weights within {histogram.edges[-1]:g} of zero, "
            f"the fullest bin from {histogram.edges[top]:.2g} to {histogram.edges[top + 1]:.2g} holds {share[top]:.1%}"
        )
    axes[0].set_ylabel("share")
    figure.set_label("Histograms of latent weights, deployed levels dotted. " + "; ".join(said) + ".")
    return figure
