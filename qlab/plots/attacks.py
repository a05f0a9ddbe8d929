"""What an attack found: pictures with their perturbation magnified, or distances where inputs are no pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from qlab.attacks.base import Attacked

__all__ = ["attacked_figure"]

SHOWN = 8
BINS = 30


def attacked_figure(result: Attacked) -> Figure:
    """Draw examples, what was found for them and the difference; for inputs that are no pictures, a histogram of distances.

    Args:
        result: of an attack. Pictures are (N, 1 or 3, H, W); at most 8 are drawn: those that were broken first, then those that
            held, and examples misclassified from the start last.
    """
    if result.x.dim() == 4 and result.x.shape[1] in (1, 3):
        return _pictures(result)
    return _distances(result)


def magnification(delta: NDArray[np.float64], width: float) -> float:
    """Return a factor, one digit where above 1, by which differences come to at most half of the range of inputs.

    Args:
        delta: differences.
        width: of the range of inputs.
    """
    largest = float(np.abs(delta).max(initial=0.0))
    if not largest > 0 or not width > 0:
        return 1.0
    factor = 0.5 * width / largest
    if factor <= 1:
        return 1.0
    digit = 10.0 ** math.floor(math.log10(factor))
    return math.floor(factor / digit) * digit


def _pictures(result: Attacked) -> Figure:
    order = np.argsort(np.where(~result.clean, 2, np.where(result.success, 0, 1)), kind="stable")[:SHOWN]
    before, after = (t[order.tolist()].double().cpu().numpy() for t in (result.x, result.adversarial))
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    width = high - low
    delta = after - before
    factor = magnification(delta, width)
    n = len(order)
    figure = Figure(figsize=(0.9 + 1.05 * max(n, 4), 4.0), dpi=80, layout="constrained")
    rows = figure.subplots(3, n, squeeze=False)
    words = []
    for k, i in enumerate(order):
        label = int(result.y[int(i)])
        said, told = _verdict(result, int(i))
        words.append(f"example {i}, label {label}: {told}")
        magnified = np.clip(0.5 * width + factor * delta[k], 0, width)
        for row, values, title in (
            (0, before[k] - low, f"label {label}"),
            (1, after[k] - low, said),
            (2, magnified, ""),
        ):
            axes = rows[row, k]
            signed = row == 2 and len(values) == 1
            axes.imshow(
                np.moveaxis(values / width, 0, -1).squeeze(-1)
                if len(values) == 1
                else np.moveaxis(values / width, 0, -1),
                cmap="RdBu_r" if signed else "gray_r",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if title:
                axes.set_title(title, fontsize=8)
    names = ("input", "found", f"difference\nx {factor:g}")
    for axes, name in zip(rows[:, 0], names, strict=True):
        axes.set_ylabel(name, fontsize=9)
    colours = "red above, blue below" if result.x.shape[1] == 1 else "grey where nothing changed"
    figure.set_label(
        f"{result.summary()} Drawn: {'; '.join(words)}. Differences are magnified {factor:g} times, {colours}."
    )
    return figure


def _verdict(result: Attacked, i: int) -> tuple[str, str]:
    """Return what became of an example, in a title and in words."""
    if not result.clean[i]:
        return "wrong\nanyway", "misclassified from the start"
    distance = f"{result.distance[i]:.3g}"
    if result.success[i]:
        return f"broken\nat {distance}", f"broken at distance {distance}"
    return f"held\nmargin {result.margin[i]:.2g}", f"held, largest margin {result.margin[i]:.3g}"


def _distances(result: Attacked) -> Figure:
    found = result.distance[result.success & result.clean]
    held = int((~result.success).sum())
    wrong = int((~result.clean).sum())
    figure = Figure(figsize=(5.6, 3.2), dpi=80, layout="constrained")
    axes = figure.subplots()
    if len(found):
        top = result.eps if math.isfinite(result.eps) else float(found.max())
        axes.hist(found, bins=np.linspace(0, top, BINS + 1).tolist(), color=COLOURS[0], edgecolor="white", lw=0.4)
        median = float(np.median(found))
        axes.axvline(median, color=COLOURS[1], ls="--", lw=1.2, label=f"median {median:.3g}")
    else:
        axes.text(0.5, 0.5, "no example was broken", transform=axes.transAxes, ha="center", va="center")
    if math.isfinite(result.eps):
        axes.axvline(result.eps, color="0.3", lw=1.2, label=f"eps {result.eps:.3g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel=f"distance of what was found ({result.norm})", ylabel="examples", title=f"{held} held")
    axes.set_xlim(left=0)
    axes.locator_params(axis="y", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = f" Drawn: distances of {len(found)} examples that were broken"
    if len(found):
        quarters = np.quantile(found, [0.25, 0.75])
        drawn += f", half of them between {quarters[0]:.3g} and {quarters[1]:.3g}"
    figure.set_label(f"{result.summary()}{drawn}; {held} held, {wrong} were misclassified from the start.")
    return figure
