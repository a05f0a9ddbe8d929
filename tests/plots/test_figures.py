"""The small figures: they draw the numbers they are given, say them in words, and show themselves in a notebook."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.live import Histogram
from qlab.plots import (
    Figure,
    confusion_figure,
    decision_figure,
    lines_figure,
    picture_figure,
    surrogate_figure,
    weights_figure,
)
from qlab.quantizers import SURROGATES, Surrogate, surrogate


def test_figure_shows_itself_as_png_with_its_label_as_words() -> None:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    figure.set_label("a rising line")
    data, metadata = figure._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size == (100, 50)
    assert data["text/plain"] == "a rising line"
    assert metadata["image/png"]["alt"] == "a rising line"


def test_every_listed_name_is_there() -> None:
    for name in qlab.plots.__all__:
        assert callable(getattr(qlab.plots, name))
    with pytest.raises(AttributeError, match="no attribute 'pie'"):
        _ = qlab.plots.pie


def test_no_figure_is_made_by_pyplot() -> None:
    sources = list(Path(qlab.plots.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        assert re.search(r"import.*pyplot|pylab", source.read_text(encoding="utf-8")) is None, source.name


def test_lines_draws_each_curve_with_a_dash_of_its_own() -> None:
    x = torch.arange(4)
    figure = lines_figure(
        {"left": {"a": (x, x), "b": (x, 2 * x)}, "right": {"c": (x, -x)}}, "t", ["value"], alt="words"
    )
    left, right = figure.axes
    a, b = left.get_lines()
    np.testing.assert_array_equal(b.get_ydata(), [0, 2, 4, 6])
    assert a.get_linestyle() != b.get_linestyle()
    assert (left.get_ylabel(), right.get_ylabel()) == ("value", "")
    assert figure.get_label() == "words"


def test_steps_hold_a_value_until_the_next_x() -> None:
    x = torch.arange(3)
    figure = lines_figure({"one": {"a": (x, x)}}, "t", alt="steps", guides=(0.5,), steps=True)
    guide, line = figure.axes[0].get_lines()
    assert list(guide.get_ydata()) == [0.5, 0.5]
    assert line.get_drawstyle() == "steps-post"


def test_weights_share_one_scale_and_name_the_fullest_bin() -> None:
    narrow = Histogram(np.linspace(-1, 1, 5), np.array([0, 3, 1, 0]), np.array([-1.0, 1.0]))
    wide = Histogram(np.array([-100.0, -1, 1, 100]), np.array([2, 0, 2]), np.zeros(0))
    figure = weights_figure({"before": narrow, "after": wide})
    before, after = figure.axes
    assert before.get_ylim() == after.get_ylim()
    assert (before.get_xscale(), after.get_xscale()) == ("linear", "symlog")
    assert "before: 4 weights within 1 of zero, the fullest bin from -0.5 to 0 holds 75.0%" in figure.get_label()


def test_pictures_are_drawn_pixel_by_pixel_under_their_titles() -> None:
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    figure = picture_figure(x, ["a", "b\nc", "d"], columns=2, alt="Three")
    assert len(figure.axes) == 4  # two rows of two, the last one empty
    np.testing.assert_array_equal(figure.axes[1].get_images()[0].get_array(), x[1, 0].numpy())
    assert figure.axes[3].get_images() == []
    assert figure.get_label() == "Three: a; b c; d"


@pytest.mark.parametrize(("shape", "titles"), [((2, 3), 2), ((2, 2, 4, 4), 2), ((2, 1, 4, 4), 1)])
def test_pictures_that_are_none_or_lack_titles_are_refused(shape: tuple[int, ...], titles: int) -> None:
    with pytest.raises(InputError, match="picture_figure got"):
        picture_figure(torch.zeros(shape, dtype=torch.uint8), ["x"] * titles)


def test_confusion_counts_true_classes_by_row() -> None:
    y, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    figure = confusion_figure(y, predicted, ["a", "b", "c"])
    share = np.asarray(figure.axes[0].get_images()[0].get_array())
    np.testing.assert_allclose(share, [[1 / 3, 2 / 3, 0], [0, 1, 0], [1, 0, 0]])
    assert "2 of 5 right; most often confused: a taken for b, 2 times" in figure.get_label()
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}
    assert written == {(0, 0): "1", (0, 1): "2", (1, 1): "1", (2, 0): "1"}


def test_confusion_without_a_mistake_says_so() -> None:
    assert "no mistake" in confusion_figure(torch.tensor([0, 1]), torch.tensor([0, 1]), ["a", "b"]).get_label()


def test_decision_boundary_lies_where_the_net_changes_its_mind() -> None:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))  # class 1 to the right of the vertical axis
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -0.5]])
    figure = decision_figure({"vertical": net}, x, torch.tensor([0, 1, 0]))
    boundary = figure.axes[0].collections[1].get_paths()[0].vertices
    assert len(boundary) > 10
    np.testing.assert_allclose(boundary[:, 0], 0, atol=0.02)
    assert "vertical 66.7% right" in figure.get_label()
    with pytest.raises(InputError, match=r"expected \(N, 2\)"):
        decision_figure({"vertical": net}, torch.zeros(3, 4), torch.zeros(3))


def test_surrogates_are_drawn_as_they_are_declared() -> None:
    figure = surrogate_figure(SURROGATES)
    assert [axis.get_title() for axis in figure.axes[: len(SURROGATES)]][1] == "clipped"
    lower = figure.axes[len(SURROGATES) + SURROGATES.index("polynomial")]
    x, d = lower.get_lines()[0].get_data()
    np.testing.assert_allclose(d, surrogate("polynomial").derivative(torch.as_tensor(x)))
    assert "polynomial: d(0) = 2, d(2) = 0" in figure.get_label()


def test_primitive_of_a_users_own_surrogate_is_integrated() -> None:
    stated, own = surrogate("erf"), Surrogate("own", surrogate("erf").derivative)
    figure = surrogate_figure([stated, own])
    (_, exact), (_, integrated) = (axis.get_lines()[1].get_data() for axis in figure.axes[:2])
    np.testing.assert_allclose(integrated, exact, atol=1e-6)
