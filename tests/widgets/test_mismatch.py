"""GradientMismatch without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.mismatch import GradientMismatch
from torch import Tensor, nn

import qlab
from qlab.diagnose.gradients import mismatch
from qlab.diagnose.honesty import circulation
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize, surrogate
from qlab.quantizers.drawn import KNOTS, drawn, redrawn, sampled

FLAT = (0.0, 0.0, 0.5, 1.0, 1.5, 1.0, 0.5, 0.0, 0.0)


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    plain = qlab.build("mlp", (6,), 3, hidden=(9, 7), seed=0).double()
    return quantize(plain, Sign, Sign).eval(), x, torch.randint(3, (40,), generator=draw)


@pytest.fixture
def view(net: tuple[nn.Module, Tensor, Tensor]) -> GradientMismatch:
    return GradientMismatch(*net)


def message(view: GradientMismatch, **content: Any) -> None:
    view._on_message(view, content, [])


def settled(view: GradientMismatch) -> None:
    job = view._follow.job
    assert job is not None
    job.result(60)


def test_the_drawing_is_there_before_anything_has_run(view: GradientMismatch) -> None:
    assert view.drawing["values"] == list(sampled("clipped"))
    assert view.layers == []
    x, F = (np.frombuffer(view.curves[name], "<f4") for name in ("x", "F"))
    primitive = drawn(KNOTS, sampled("clipped")).primitive
    assert primitive is not None
    np.testing.assert_allclose(F, primitive(torch.from_numpy(x.copy())).numpy(), atol=1e-6)
    assert "class MySign(Sign)" in view.code


def test_ready_compares_with_exact_flips(view: GradientMismatch, net: tuple[nn.Module, Tensor, Tensor]) -> None:
    message(view, type="ready")
    settled(view)
    model, x, y = net
    own = redrawn(model, drawn(KNOTS, sampled("clipped")))
    options: dict[str, Any] = {"loss": "cross_entropy", "beta": 0.3}
    expected = mismatch(own, x, y, references=["flip"], **options)
    assert [row["layer"] for row in view.layers] == ["hidden.0", "hidden.3", "fc"]
    for row, known in zip(view.layers, expected.rows, strict=True):
        assert row["reference"] == "flip"
        assert row["cosine"] == pytest.approx(known.cosine)
        g, t = (np.frombuffer(row[name], "<f4") for name in ("surrogate", "truth"))
        assert np.abs(g).max() == pytest.approx(1)
        assert float(g @ t) / np.linalg.norm(g) / np.linalg.norm(t) == pytest.approx(known.cosine, abs=1e-5)
        assert f"{row['layer']} {known.cosine:.2f}" in view.caption
    loops = circulation(own, x, y, loops=4, points=32, **options)
    assert view.honesty["circulation"] == pytest.approx(loops.mean)
    assert f"{loops.mean:.3f}" in view.caption


def test_a_drawing_changes_the_gradient_and_not_the_truth(view: GradientMismatch) -> None:
    message(view, type="ready")
    settled(view)
    before = {row["layer"]: dict(row) for row in view.layers}
    loops = dict(view.honesty)
    message(view, type="draw", values=list(FLAT))
    settled(view)
    after = {row["layer"]: row for row in view.layers}
    assert after["hidden.0"]["truth"] == before["hidden.0"]["truth"]
    assert after["hidden.0"]["surrogate"] != before["hidden.0"]["surrogate"]
    assert after["hidden.0"]["cosine"] != before["hidden.0"]["cosine"]
    assert view.honesty["circulation"] != loops["circulation"]
    assert view.drawing["values"] == list(FLAT)


def test_drawings_are_numbered_so_that_an_old_answer_undoes_nothing(view: GradientMismatch) -> None:
    message(view, type="draw", values=list(FLAT), serial=7)
    settled(view)
    assert view.drawing["serial"] == 7
    view.draw("tanh").result()
    assert view.drawing["serial"] == 7
    message(view, type="draw", values=list(FLAT), serial="<b>")
    settled(view)
    assert view.drawing["serial"] == 7


def test_a_named_surrogate_is_taken_at_the_knots(view: GradientMismatch) -> None:
    message(view, type="draw", values="tanh")
    settled(view)
    expected = surrogate("tanh").derivative(torch.tensor(KNOTS, dtype=torch.float64))
    assert view.drawing["values"] == expected.tolist()


def test_the_quantizer_to_take_home_is_the_drawing(view: GradientMismatch) -> None:
    view.draw(FLAT).result()
    q = view.quantizer()
    names: dict[str, Any] = {}
    exec(view.code, names)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    expected = drawn(KNOTS, FLAT).derivative(x)
    torch.testing.assert_close(q.surrogate.derivative(x), expected)
    torch.testing.assert_close(names["MySign"]().surrogate.derivative(x), expected)
    quantize(qlab.build("mlp", (4,), 2, seed=0), view.quantizer, view.quantizer)


def test_a_wrong_drawing_is_told_and_changes_nothing(view: GradientMismatch) -> None:
    before = dict(view.drawing)
    wrong: list[Any] = [
        [1.0],
        [float("nan")] * 9,
        ["a"] * 9,
        [1e9] * 9,
        None,
        3,
        "nothing",
        {"a": 1},
        [[1]] * 9,
        [True] * 9,
    ]
    for values in wrong:
        message(view, type="draw", values=values)
        assert view.status["error"]
        assert dict(view.drawing) == before
    message(view, type="draw", values=list(FLAT))
    settled(view)
    assert "error" not in view.status


def test_two_moons_are_trained_and_stopped() -> None:
    view = GradientMismatch()
    job = view.train(60, wait=True)
    assert job.status == "done"
    assert view.run is not None
    assert view.moons["steps"][-1] == 60
    grid = np.frombuffer(view.moons["decisions"], "<f4")
    assert grid.size == view.moons["grid"] ** 2
    assert view.status["phase"] == "idle"
    assert f"{view.run.accuracies[-1]:.1%}" in view.status["text"]

    def stop(change: Any) -> None:
        if change["new"]["steps"][-1] >= 20:
            message(view, type="train")
            told.append(view.status.get("error", ""))
            message(view, type="stop")

    told: list[str] = []
    view.observe(stop, "moons")
    job = view.train(5000)
    assert job.wait(60)
    assert job.status == "cancelled"
    assert "A run is going on; stop it first." in told
    assert 20 <= view.moons["steps"][-1] < 5000
    with pytest.raises(InputError, match="steps is 0"):
        view.train(0)


def test_without_a_net_a_small_one_is_trained_and_compared() -> None:
    view = GradientMismatch()
    view.look().result(60)
    assert [row["layer"] for row in view.layers] == ["hidden.0", "hidden.3", "fc"]
    assert [row["reference"] for row in view.layers] == ["coordinate", "flip", "coordinate"]
    assert view.moons["steps"][-1] == 60
    assert all(row["cosine"] is not None for row in view.layers)


def test_another_layer_is_chosen(view: GradientMismatch) -> None:
    view.look().result()
    view.choose("fc")
    assert view.settings == {"layer": "fc"}
    with pytest.raises(UnknownNameError, match="layer 'fd'"):
        view.choose("fd")


def test_state_gives_the_same_drawing_again(view: GradientMismatch, net: tuple[nn.Module, Tensor, Tensor]) -> None:
    view.draw(FLAT).result()
    view.choose("fc")
    state = json.dumps(view.state())
    again = GradientMismatch.from_state(state, *net)
    assert again.state() == view.state()
    again.look().result()
    assert again.settings == {"layer": "fc"}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"knots": [0, 1], "values": [1], "layer": ""},
        {"knots": [1, 0], "values": [1, 1], "layer": ""},
        {"knots": [0, 1], "values": "clipped", "layer": ""},
        {"knots": [0, 1], "values": [1, 1], "layer": 3},
        {"knots": [0, 1], "values": [1, 1], "layer": "", "innerHTML": "x"},
        {"knots": [0, 1e300], "values": [1, 1], "layer": ""},
    ],
)
def test_a_state_with_hostile_settings_is_refused(net: tuple[nn.Module, Tensor, Tensor], settings: Any) -> None:
    with pytest.raises(InputError):
        GradientMismatch.from_state({"widget": "GradientMismatch", "version": 1, "settings": settings}, *net)
    with pytest.raises(InputError, match="not one of GradientMismatch"):
        GradientMismatch.from_state({"widget": "GradientMismatch"}, *net)
    with pytest.raises(InputError, match="version"):
        GradientMismatch.from_state({"widget": "BitLab", "version": 1, "settings": settings}, *net)


def test_the_static_twin_is_a_picture_with_words(view: GradientMismatch) -> None:
    view.look().result()
    data, metadata = view._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert "Cosines" in metadata["image/png"]["alt"]
    assert view.caption in data["text/plain"]
    fresh = GradientMismatch()
    assert "image/png" not in fresh._repr_mimebundle_()[0]
    assert "drawn" in fresh.figure().get_label()


@pytest.mark.parametrize("content", [None, {"type": "dance"}, {"type": "choose", "layer": 3}, {"type": "choose"}, [1]])
def test_messages_that_mean_nothing_are_told_and_never_raised(view: GradientMismatch, content: Any) -> None:
    view._on_message(view, content, [])
    assert view.status["error"]


def test_nets_that_cannot_be_drawn_for_are_refused(net: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = net
    with pytest.raises(InputError, match="no Sign"):
        GradientMismatch(nn.Linear(6, 3).double().eval(), x, y)
    with pytest.raises(InputError, match="needs examples"):
        GradientMismatch(model)
    with pytest.raises(InputError, match="labels"):
        GradientMismatch(model, x, y[:3])
    with pytest.raises(InputError, match="9 knots and 1 values"):
        GradientMismatch(model, x, y, values=[1.0])


def test_traits_set_by_the_browser_change_nothing_that_python_uses(view: GradientMismatch) -> None:
    before = view.state()
    view.set_state({"drawing": {"values": ["<script>"]}, "settings": {"layer": "x"}})
    assert view.state() == before
    assert view.quantizer().surrogate.name == "drawn"


def test_everything_sent_is_below_a_megabyte(view: GradientMismatch) -> None:
    view.look().result()
    size = sum(len(row[name]) for row in view.layers for name in ("surrogate", "truth"))
    assert size + len(view.curves["x"]) < 2**20
