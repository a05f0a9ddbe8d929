"""Bits, dot products of bits and what they cost, as static figures.

A bit that is 1 stands for -1: dark, with a minus sign where there is room for one; +1 is light, padding is hatched grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlab.binary.cost import Cost, Crossover
    from qlab.binary.dots import DotProduct, LayerBits

__all__ = ["bits_figure", "cost_figure", "crossover_figure", "dot_figure"]

MAX_UNITS, MAX_COLUMNS = 256, 4096  # beyond, a printed picture has no pixel for every bit
MAX_WORDS = 4
WORD = 64
MINUS, PLUS, PADDING = "#263238", "#f4efe1", "#9e9e9e"
DIFFERS, SAME = "#D55E00", "#ffffff"


def bits_figure(layer: LayerBits) -> Figure:
    """Draw the weights of a packed layer: a row per unit, a pixel per bit.

    Args:
        layer: as from `qlab.binary.inspect.bits`; at most 256 units and 4096 bits of each are drawn.
    """
    shown = layer.words[:MAX_UNITS].reshape(min(layer.units, MAX_UNITS), -1)[:, : MAX_COLUMNS // WORD]
    used = np.tile(layer.used, layer.words[0].size // len(layer.used))[: shown.shape[1]]
    codes = np.where(_bits(used), _bits(shown).astype(float), 2.0)
    figure = Figure(figsize=(9, min(4.0, 1.4 + 0.025 * len(shown))), dpi=80, layout="constrained")
    axes = figure.subplots()
    _cells(axes, codes, (PLUS, MINUS, PADDING))
    axes.set(title=f"{layer.layer}: dark -1, light +1, grey padding", xlabel="bit", ylabel="unit")
    rest = "" if shown.size == layer.words.size else f" Drawn are {len(shown)} units and {codes.shape[1]} bits of each."
    figure.set_label(layer.summary() + rest)
    return figure


def dot_figure(product: DotProduct) -> Figure:
    """Draw the first words of a dot product bit by bit, and the running sum over all of them with the threshold.

    Args:
        product: as from `qlab.binary.inspect.dot`.
    """
    words = [t for t in range(len(product.xor)) if product.signs[t]][:MAX_WORDS] or [0]
    figure = Figure(figsize=(9, 2.6 + 0.85 * len(words)), dpi=80, layout="constrained")
    *panels, sums = figure.subplots(len(words) + 1, 1, height_ratios=[1.0] * len(words) + [2.2])
    for panel, t in zip(panels, words, strict=True):
        counted = _bits(product.counted[t : t + 1])
        rows = [_bits(words[t : t + 1]) for words in (product.activation, product.weight)]
        differs = _bits(product.xor[t : t + 1])
        codes = np.stack([*(np.where(counted, row, 2) for row in rows), np.where(counted, 3 + differs, 2)]).astype(
            float
        )
        _cells(panel, codes, (PLUS, MINUS, PADDING, SAME, DIFFERS), marks=("", "-", "", "", "x"))
        panel.set_yticks(range(3), ["a", "w", "xor"], fontsize=8)
        panel.set_xticks([])
        tap = f"tap {tuple(map(int, product.taps[t]))}, " if product.taps.size else ""
        panel.set_title(
            f"word {t}: {tap}{product.signs[t]} signs, {product.popcount[t]} differ: "
            f"{product.signs[t]} - 2 x {product.popcount[t]} = {product.signs[t] - 2 * product.popcount[t]}",
            fontsize=9,
            loc="left",
        )
    steps = np.arange(len(product.sums) + 1)
    sums.step(steps, [0, *product.sums], where="post", color=COLOURS[0], lw=1.5)
    sums.plot([steps[-1]], [product.z], "o", color=COLOURS[0])
    sums.annotate(f"z = {product.z}", (steps[-1], product.z), textcoords="offset points", xytext=(-4, 6), ha="right")
    sums.axhline(0, color="0.7", lw=0.8)
    if product.threshold is not None and abs(product.threshold) <= product.k + 1:
        sums.axhline(product.threshold, color=COLOURS[1], ls="--", lw=1.2)
        sums.annotate(
            f"threshold {product.threshold}", (0, product.threshold), va="bottom", color=COLOURS[1], fontsize=8
        )
    sums.margins(y=0.2)
    sums.xaxis.get_major_locator().set_params(integer=True)
    sums.set(xlabel="words added", ylabel="running sum")
    sums.spines[["top", "right"]].set_visible(False)
    rest = len(product.xor) - len(words)
    figure.set_label(product.summary() + (f" Drawn bit by bit: {len(words)} words; {rest} more." if rest else ""))
    return figure


def cost_figure(cost: Cost) -> Figure:
    """Draw bytes of every layer, packed and in float32, and milliseconds per backend.

    Args:
        cost: as from `qlab.binary.inspect.cost`.
    """
    seconds = cost.seconds
    rows = max(len(cost.layers), len(seconds), 1)
    figure = Figure(figsize=(9, 1.5 + 0.34 * rows), dpi=80, layout="constrained")
    sizes, times = figure.subplots(1, 2)
    table = cost.frame()
    at = np.arange(len(table))
    bars = (("float_bytes", -0.2, "0.75", "", "float32"), ("packed_bytes", 0.2, COLOURS[0], "//", "packed"))
    for key, shift, colour, hatch, label in bars:
        kb = table[key].to_numpy(float) / 1024
        sizes.barh(at + shift, kb, 0.38, color=colour, hatch=hatch, label=label)
        for i, value in enumerate(kb):
            sizes.annotate(f" {value:,.1f}", (value, i + shift), va="center", fontsize=7)
    sizes.set_yticks(at, table["layer"])
    sizes.set(title="size", xlabel="KB")
    sizes.margins(x=0.15)
    sizes.legend(frameon=False, fontsize=8)
    names = list(seconds)
    times.barh(names, [1e3 * seconds[name] for name in names], color=COLOURS[2])
    for i, name in enumerate(names):
        times.annotate(f" {1e3 * seconds[name]:.3g}", (1e3 * seconds[name], i), va="center", fontsize=8)
    times.set(title=f"a batch of {cost.batch}", xlabel="ms")
    times.margins(x=0.18)
    for axes in (sizes, times):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(cost.summary())
    return figure


def crossover_figure(crossover: Crossover) -> Figure:
    """Draw seconds of one product by size on log axes, float and packed, a panel per kind of product.

    Args:
        crossover: as from `qlab.binary.inspect.crossover`.
    """
    from qlab.binary.cost import KINDS

    kinds = [kind for kind in KINDS if any(p.kind == kind for p in crossover.points)] or ["matrix"]
    figure = Figure(figsize=(1 + 4.2 * len(kinds), 3.2), dpi=80, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        points = [p for p in crossover.points if p.kind == kind]
        n = [p.n for p in points]
        lines = (
            ("float32", "float_s", "-", "o"),
            ("packed", "packed_s", "--", "s"),
            ("packing too", "packing_s", ":", "^"),
        )
        for colour, (label, key, dash, mark) in zip(COLOURS, lines, strict=False):
            seconds = [1e6 * getattr(p, key) for p in points]
            axes.plot(n, seconds, color=colour, ls=dash, marker=mark, ms=4, label=label)
        from_n = crossover.smallest(kind)
        if from_n is not None:
            axes.axvline(from_n, color="0.6", lw=0.8)
        if points:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8)
        axes.set(title=KINDS[kind], xlabel="n", ylabel="microseconds")
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(crossover.summary())
    return figure


def _bits(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return bits (..., 64 W) of words (..., W)."""
    data = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    return np.unpackbits(data, axis=-1, bitorder="little").astype(bool)


def _cells(axes: Axes, codes: NDArray[np.float64], colours: tuple[str, ...], marks: tuple[str, ...] = ()) -> None:
    """Draw a grid of codes 0, 1, ... in their colours, with a mark in each cell."""
    from matplotlib.colors import ListedColormap

    axes.imshow(
        codes, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto", interpolation="nearest"
    )
    for code, mark in enumerate(marks):
        for i, j in np.argwhere(codes == code) if mark else ():
            axes.text(j, i, mark, ha="center", va="center", color="w", fontsize=7)
