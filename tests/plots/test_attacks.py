"""The figure of an attack: it draws the examples that tell most, names its magnification, and says all of it in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.attacks.base import Attacked
from qlab.plots.attacks import SHOWN, attacked_figure, magnification


def result(x: Tensor, delta: Tensor, clean: list[bool], success: list[bool], **changed: Any) -> Attacked:
    n = len(x)
    distance = np.where(success, delta.flatten(1).abs().amax(1).numpy(), np.inf)
    settings: dict[str, Any] = {
        "attack": "Nudge", "norm": "linf", "eps": 0.1, "x": x, "y": torch.arange(n) % 10, "adversarial": x + delta,
        "clean": np.array(clean), "success": np.array(success), "distance": distance.astype(float),
        "margin": np.where(success, 0.5, -0.25), "at_end": np.array(success), "forward": 1, "backward": 0,
    }  # fmt: skip
    return Attacked(**{**settings, **changed})


def pictures(n: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, 6, 5, generator=g)
    return x, 0.02 * (2 * torch.randint(0, 2, x.shape, generator=g) - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_broken_examples_come_first_and_at_most_eight_are_drawn(channels: int) -> None:
    x, delta = pictures(12, channels)
    clean, success = [i != 1 for i in range(12)], [i in (1, 4, 9) for i in range(12)]
    figure = attacked_figure(result(x, delta, clean, success))
    assert len(figure.axes) == 3 * SHOWN
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["label 4", "label 9", "label 0", "label 2"]
    assert titles[SHOWN : SHOWN + 3] == ["broken\nat 0.02", "broken\nat 0.02", "held\nmargin -0.25"]
    assert "example 4, label 4: broken at distance 0.02" in figure.get_label()
    assert "example 0, label 0: held" in figure.get_label()
    assert "Nudge" in figure.get_label()


def test_the_rows_are_input_found_and_difference_with_its_factor() -> None:
    x, delta = pictures(2)
    figure = attacked_figure(result(x, delta, [True, True], [True, False]))
    both = torch.cat([x, x + delta])
    below, width = float(both.min()), float(both.max() - both.min())
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    np.testing.assert_allclose(drawn[0], (x[0, 0].numpy() - below) / width, atol=1e-6)
    np.testing.assert_allclose(drawn[2], ((x + delta)[0, 0].numpy() - below) / width, atol=1e-6)
    factor = magnification(delta.numpy(), width)
    assert factor > 10
    np.testing.assert_allclose(drawn[4], 0.5 + factor * delta[0, 0].numpy() / width, atol=1e-4)
    assert figure.axes[4].get_ylabel() == f"difference\nx {factor:g}"
    assert f"magnified {factor:g} times" in figure.get_label()


def test_the_magnification_fills_half_of_the_range_and_has_one_digit() -> None:
    assert magnification(np.array([0.1, -0.03]), 1.0) == 5
    assert magnification(np.array([-0.013]), 1.0) == 30
    assert magnification(np.array([0.9]), 1.0) == 1
    assert magnification(np.zeros(3), 1.0) == 1
    for size in np.geomspace(1e-4, 0.5, 50):
        factor = magnification(np.array([size]), 1.0)
        assert 0.25 < factor * size <= 0.5 + 1e-12


def test_examples_wrong_from_the_start_come_last() -> None:
    x, delta = pictures(3)
    figure = attacked_figure(result(x, 0 * delta, [False, True, True], [True, False, False]))
    assert figure.axes[5].get_title() == "wrong\nanyway"
    assert "example 0, label 0: misclassified from the start" in figure.get_label()


@pytest.mark.parametrize("shape", [(7,), (2, 9), (2, 6, 6)])
def test_inputs_that_are_no_pictures_give_a_histogram_of_distances(shape: tuple[int, ...]) -> None:
    x = torch.rand(20, *shape)
    delta = torch.linspace(0.01, 0.09, 20).reshape(-1, *(1,) * len(shape)).expand_as(x)
    clean, success = [i > 1 for i in range(20)], [i % 2 == 0 or i < 2 for i in range(20)]
    figure = attacked_figure(result(x, delta, clean, success))
    (axes,) = figure.axes
    counts = [bar.get_height() for bar in axes.patches]
    assert sum(counts) == 9  # i = 2, 4, ..., 18
    assert axes.get_title() == "9 held"
    assert "9 held, 2 were misclassified from the start" in figure.get_label()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["median 0.0521", "eps 0.1"]


def test_an_attack_without_radius_or_finds_is_drawn_too() -> None:
    x = torch.rand(4, 3)
    nothing = attacked_figure(result(x, torch.zeros(4, 3), [True] * 4, [False] * 4, eps=float("inf")))
    assert nothing.axes[0].texts[0].get_text() == "no example was broken"
    found = attacked_figure(result(x, torch.full((4, 3), 0.3), [True] * 4, [True] * 4, eps=float("inf"), norm="l2"))
    assert found.axes[0].get_xlabel() == "distance of what was found (l2)"
    assert sum(bar.get_height() for bar in found.axes[0].patches) == 4


def test_a_result_draws_itself() -> None:
    x, delta = pictures(2)
    found = result(x, delta, [True, True], [True, True])
    assert found.figure().get_label() == attacked_figure(found).get_label()
    assert found.figure()._repr_mimebundle_()[0]["image/png"]
