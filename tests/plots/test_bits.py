"""Figures of bits: they draw the numbers of the records they are given, and say them in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qlab.binary.cost import Cost, Crossover, Point
from qlab.binary.dots import DotProduct, LayerBits
from qlab.binary.kernels import reference
from qlab.plots.bits import MAX_WORDS, bits_figure, cost_figure, crossover_figure, dot_figure


def draws(seed: int, *shape: int) -> Any:
    return 1 - 2 * np.random.default_rng(seed).integers(0, 2, shape)


def layer(units: int = 5, channels: int = 70) -> LayerBits:
    words = reference.pack(draws(0, units, 3, 3, channels))
    return LayerBits("conv", "binary_conv2d", words, ("unit", "row", "column", "word"), channels)


def product(k: int = 400, threshold: int | None = 3) -> DotProduct:
    a, w, counted = (reference.pack(x) for x in (draws(1, k), draws(2, k), np.full(k, -1)))
    signs, popcount = (np.bitwise_count(x).astype(np.int64) for x in (counted, a ^ w))
    empty = np.zeros((len(a), 0), np.int64)
    first = 64 * np.arange(len(a))
    sums = (signs - 2 * popcount).cumsum()
    return DotProduct(
        "fc", 0, 1, None, a, w, a ^ w, counted, empty, first, np.ones(len(a), bool), signs, popcount, sums,
        float(sums[-1]), threshold,
    )  # fmt: skip


def test_every_bit_has_a_pixel_and_padding_a_colour_of_its_own() -> None:
    drawn = bits_figure(layer()).axes[0].images[0].get_array()
    assert drawn is not None
    assert drawn.shape == (5, 9 * 128)
    signs = layer().signs.reshape(5, 9, 70)
    tiles = np.asarray(drawn).reshape(5, 9, 128)
    np.testing.assert_array_equal(tiles[..., :70], (1 - signs) // 2)
    assert (tiles[..., 70:] == 2).all()


def test_a_layer_with_more_bits_than_pixels_is_drawn_in_part_and_says_so() -> None:
    figure = bits_figure(layer(units=300, channels=1000))
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None
    assert drawn.shape == (256, 4096)
    assert "Drawn are 256 units and 4096 bits of each." in figure.get_label()


def test_a_dot_product_is_drawn_word_by_word_with_its_running_sum_and_threshold() -> None:
    found = product()
    *words, sums = dot_figure(found).axes
    assert len(words) == MAX_WORDS
    for t, panel in enumerate(words):
        a, w, xor = np.asarray(panel.images[0].get_array())
        np.testing.assert_array_equal(xor == 4, (a != w))
        assert (xor == 4).sum() == found.popcount[t]
        assert sum(text.get_text() == "x" for text in panel.texts) == found.popcount[t]  # marked, not coloured alone
        assert f"{found.signs[t]} - 2 x {found.popcount[t]}" in panel.get_title(loc="left")
    np.testing.assert_array_equal(sums.get_lines()[0].get_ydata(), [0, *found.sums])
    said = [text.get_text() for text in sums.texts]
    assert f"z = {found.z}" in said
    assert "threshold 3" in said


def test_a_dot_product_without_a_threshold_has_no_line_for_it() -> None:
    figure = dot_figure(product(k=64, threshold=None))
    assert not [text for text in figure.axes[-1].texts if "threshold" in text.get_text()]
    assert "z = 64 - 2 x" in figure.get_label()


def test_words_outside_the_picture_are_passed_over() -> None:
    found = product(k=128)
    outside = replace(
        found,
        inside=np.array([False, True]),
        counted=found.counted * np.array([0, 1], np.uint64),
        signs=found.signs * [0, 1],
        popcount=found.popcount * [0, 1],
    )
    figure = dot_figure(outside)
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes[:-1]] == ["word 1"]
    assert "1 of 2 words lie outside the picture." in figure.get_label()


def test_costs_are_bars_of_kilobytes_and_milliseconds() -> None:
    rows = ({"layer": "fc", "kind": "Linear", "runs": "bits", "packed_bytes": 1024, "float_bytes": 32768},)
    cost = Cost(rows, 2048, 8, {"torch": (2e-3, 4e-3, 3e-3), "numba": (1e-3,)}, (), 1, "a machine")
    figure = cost_figure(cost)
    sizes, times = figure.axes
    assert [bar.get_width() for bar in sizes.patches] == [32, 1, 1, 1]  # float32: fc and the rest; packed: the same
    assert [bar.get_width() for bar in times.patches] == pytest.approx([3, 1])
    assert "torch 3 ms, numba 1 ms (a machine, 1 thread)" in figure.get_label()


def test_a_crossover_has_a_line_per_way_with_a_dash_and_mark_of_its_own() -> None:
    points = tuple(Point("vector", n, n * 1e-6, 1e-6, 2e-6, float(n), n / 2) for n in (1, 2, 4))
    figure = crossover_figure(Crossover(points, (), 2, "a machine"))
    (axes,) = figure.axes
    lines = axes.get_lines()[:3]
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata(), float), [1, 2, 4])
    np.testing.assert_allclose(np.asarray(lines[2].get_ydata(), float), [2, 2, 2])
    assert len({line.get_linestyle() for line in lines}) == len({line.get_marker() for line in lines}) == 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "win from n = 2 on, with packing of the activations from n = 4 on" in figure.get_label()


def test_nothing_measured_yet_is_an_empty_chart_that_says_so() -> None:
    assert crossover_figure(Crossover((), (), 1, "a machine")).get_label() == "Nothing was measured yet."
