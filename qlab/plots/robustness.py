"""Robust accuracy against eps, with intervals; who broke how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlab.errors import InputError
from qlab.plots.figure import Figure

if TYPE_CHECKING:
    from qlab.attacks.evaluation import Evaluation

__all__ = ["evaluation_figure"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind, too
MARKERS = "os^Dvx"


def evaluation_figure(found: Sequence[Evaluation] | Mapping[str, Evaluation]) -> Figure:
    """Return accuracy against eps for one or more nets, with 95 % intervals; for one net, bars of who broke how many beside it.

    Raises:
        InputError: nothing to draw.
    """
    named = dict(found) if isinstance(found, Mapping) else {f"net {i + 1}": e for i, e in enumerate(found)}
    if not named:
        raise InputError("there is no evaluation to draw; expected at least one")
    single = len(named) == 1
    figure = Figure(figsize=(8.4, 3.4) if single else (5.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if single else 1, squeeze=False)[0]
    words = []
    for i, (name, e) in enumerate(named.items()):
        grid = np.array([0.0, *e.eps])
        shares = np.array([e.clean.mean(), *(e.accuracy(v)[0] for v in e.eps)])
        bounds = np.array([e.accuracy(v)[1:] for v in e.eps])
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes[0].plot(grid, 100 * shares, color=colour, marker=marker, label=name)
        axes[0].fill_between(e.eps, 100 * bounds[:, 0], 100 * bounds[:, 1], color=colour, alpha=0.15, linewidth=0)
        words.append(f"{name}: " + ", ".join(f"{100 * s:.1f} % at {g:.3g}" for g, s in zip(grid, shares, strict=True)))
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
                [f"{v:.3g}" for v in first.eps], broke, left=left, color=COLOURS[k % len(COLOURS)], label=attack,
                hatch=("", "//", "..", "xx")[k // len(COLOURS) % 4], edgecolor="white",
            )  # fmt: skip
            left += broke
        axes[1].set(xlabel="examples broken, in the order of attacks", ylabel="eps")
        axes[1].legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.set_label("Accuracy left by the worst of all attacks. " + "; ".join(words) + ".")
    return figure
