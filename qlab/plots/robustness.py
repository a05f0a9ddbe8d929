"""Robust accuracy against eps, with intervals; who broke how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlab.attacks.checks import wilson
from qlab.errors import InputError
from qlab.plots.figure import Figure

if TYPE_CHECKING:
    from qlab.attacks.evaluation import Evaluation
    from qlab.experiments.base import Result
    from qlab.experiments.verdict import Metric

__all__ = ["evaluation_figure", "left_figure"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind, too
MARKERS = "os^Dvx"


def evaluation_figure(found: Sequence[Evaluation] | Mapping[str, Evaluation]) -> Figure:
    """Return accuracy against eps for one or more nets, with 95 % intervals; for one net, bars of who broke how many beside it.

    Of an evaluation that is not `complete` no robust accuracy is drawn: the clean one stands alone.

    Raises:
        InputError: nothing to draw, or evaluations in different norms.
    """
    named = dict(found) if isinstance(found, Mapping) else {f"net {i + 1}": e for i, e in enumerate(found)}
    if not named:
        raise InputError("there is no evaluation to draw; expected at least one")
    if len({e.norm for e in named.values()}) > 1:
        raise InputError(
            f"the norms are {', '.join(e.norm for e in named.values())}; expected one, the axis is its eps"
        )
    single = len(named) == 1
    figure = Figure(figsize=(8.4, 3.4) if single else (5.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if single else 1, squeeze=False)[0]
    words = []
    for i, (name, e) in enumerate(named.items()):
        stated = e.eps if e.complete else ()
        grid = np.array([0.0, *stated])
        rows = np.array([(e.clean.mean(), *wilson(int(e.clean.sum()), len(e))), *(e.accuracy(v) for v in stated)])
        shares, bounds = rows[:, 0], rows[:, 1:]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes[0].plot(grid, 100 * shares, color=colour, marker=marker, label=name)
        axes[0].fill_between(grid, 100 * bounds[:, 0], 100 * bounds[:, 1], color=colour, alpha=0.15, linewidth=0)
        told = ", ".join(f"{100 * s:.1f} % at {g:.3g}" for g, s in zip(grid, shares, strict=True))
        words.append(f"{name}: {told}{'' if e.complete else ', no robust accuracy is stated'}")
    first = next(iter(named.values()))
    axes[0].set(xlabel=f"eps ({first.norm})", ylabel="accuracy, worst case (%)", ylim=(-2, 102))
    axes[0].grid(alpha=0.25)
    if not single:
        axes[0].legend(frameon=False, fontsize=8)
    if single:
        table = first.frame()
        left = np.zeros(len(first.eps))
        for k, attack in enumerate(first.attacks):
            broke = table.loc[table["attack"] == attack, "broken"].to_numpy()
            axes[1].barh(
                range(len(first.eps)), broke, left=left, color=COLOURS[k % len(COLOURS)], label=attack,
                hatch=("", "//", "..", "xx")[k // len(COLOURS) % 4], edgecolor="white",
            )  # fmt: skip
            left += broke
        axes[1].set(xlabel="examples broken, in the order of attacks", ylabel="eps")
        axes[1].set_yticks(range(len(first.eps)), [f"{v:.3g}" for v in first.eps])
        axes[1].legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.set_label("Accuracy left by the worst of all attacks. " + "; ".join(words) + ".")
    return figure


def left_figure(result: Result, metrics: Sequence[Metric]) -> Figure:
    """Return what each attack leaves of each net: dots of single runs and bars of means, one row for each attack.

    Args:
        result: of an experiment whose arms are nets and whose metrics are accuracies after attacks.
        metrics: the attacks, from top to bottom.
    """
    arms = list(dict.fromkeys(result.frame["arm"]))
    figure = Figure(figsize=(8.6, 0.6 + 0.24 * len(metrics)), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    words = []
    for i, (arm, axis) in enumerate(zip(arms, axes, strict=True)):
        said = []
        for row, metric in enumerate(metrics):
            values = result.frame.query("arm == @arm and metric == @metric.name")["value"].to_numpy() * metric.scale
            if not len(values):
                continue
            axis.scatter(
                values, np.full(len(values), row), s=14, color=COLOURS[i % len(COLOURS)], alpha=0.6, linewidths=0
            )
            axis.plot([values.mean()] * 2, [row - 0.36, row + 0.36], color="black", linewidth=1.6)
            said.append(f"{metric.label} {values.mean():.1f} %")
        axis.set(title=arm, xlim=(-3, 103))
        axis.set_xlabel("still right (%)")
        axis.grid(alpha=0.25)
        words.append(f"{arm}: {', '.join(said)}")
    axes[0].set_yticks(range(len(metrics)), [metric.label for metric in metrics])
    axes[0].invert_yaxis()
    figure.set_label(
        f"What attacks leave of each net, experiment {result.experiment} on {result.data}; the claim: {result.verdict}. "
        + "; ".join(words)
        + "."
    )
    return figure
