"""AttackReplay without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.replay import AttackReplay
from qlab.widgets.replay_payload import pictures_of
from torch import Tensor, nn

from qlab.attacks.replay import Replay, replay
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize

OPTIONS: dict[str, Any] = {"steps": 4, "questions": 4, "side": 17}


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    """A binary net on small pictures whose first ten examples it has right; the last one is labelled wrong."""
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 1, generator=torch.Generator().manual_seed(i))
    net = quantize(net, weights=Sign, activations=Sign).eval().requires_grad_(False)
    x = torch.rand(11, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[10] = (y[10] + 1) % 3
    return net, x, y


@pytest.fixture
def view(setting: tuple[nn.Module, Tensor, Tensor]) -> AttackReplay:
    return AttackReplay(*setting, example=2, eps=0.2, **OPTIONS)


@pytest.fixture(scope="module")
def found(setting: tuple[nn.Module, Tensor, Tensor]) -> Replay:
    return replay(*setting, 2, 0.2, eta=0.02, **OPTIONS)


def message(view: AttackReplay, **content: Any) -> None:
    view._on_message(view, content, [])


def floats(data: bytes, *shape: int) -> np.ndarray:
    return np.frombuffer(data, "<f4").reshape(shape)


def test_the_plain_path_is_there_before_anything_runs(view: AttackReplay, found: Replay) -> None:
    (path,) = view.paths
    assert path["name"] == "plain"
    assert np.allclose(floats(path["margin"], 5), found["plain"].margin)
    assert view.ground["side"] == 9
    assert not view.choices["complete"]
    assert "PGD, plain gradient" in view.caption


def test_all_paths_come_in_a_job(view: AttackReplay, found: Replay) -> None:
    message(view, type="ready")
    job = view._latest.job
    assert job is not None
    job.result(60)
    assert job.wait(60)
    assert [path["name"] for path in view.paths] == ["plain", "hns", "bpda", "nes", "square"]
    for sent in view.paths:
        path = found[sent["name"]]
        assert np.allclose(floats(sent["at"], 5, 2), found.coordinates(path.name), atol=1e-6)
        assert np.allclose(floats(sent["arrows"], 5, 2), found.arrows(path.name), equal_nan=True, atol=1e-6)
        assert np.allclose(floats(sent["loss"], 5), path.loss, equal_nan=True)
        assert list(sent["zero"]) == path.zero.astype(int).tolist()
        assert list(sent["wrong"]) == path.wrong.astype(int).tolist()
        assert (sent["broke"], sent["moved"], sent["zeros"]) == (path.broke, path.moved, int(path.zero.sum()))
        assert sent["first"] == (path.name in found.first())
        with np.errstate(divide="ignore"):
            assert np.allclose(floats(sent["log_steepness"], 5), np.log10(path.steepness), equal_nan=True)
    assert np.allclose(floats(view.ground["margin"], 17, 17), found.landscape.margin)
    assert np.allclose(floats(view.ground["ball"], *found.ball.shape), found.ball)
    assert view.choices["complete"]
    assert view.status["phase"] == "idle"
    assert view.caption.startswith(found.summary())
    flat = [{k: v for k, v in d.items() if not isinstance(v, bytes)} for d in (view.ground, *view.paths)]
    json.dumps([flat, view.settings, view.choices, view.status], allow_nan=False)  # nothing odd is sent
    message(view, type="ready")  # a second page starts nothing
    assert view._latest.job is job


def test_pictures_are_the_example_and_what_was_added(view: AttackReplay, found: Replay) -> None:
    view.run().result(60)
    sent = view.pictures
    x = found.x.double().numpy()
    assert sent["shape"] == [1, 3, 4]
    assert np.abs(np.frombuffer(sent["clean"], "u1") / 255 - x.ravel()).max() <= 0.5 / 255 + 1e-9
    for path in found.paths:
        delta = np.frombuffer(sent["deltas"][path.name], "i1").reshape(5, -1) / 127 * sent["scale"]
        assert np.abs(delta - (path.rows - x.reshape(1, -1))).max() <= 0.5 / 127 * 0.2 + 1e-7


def test_pictures_that_would_be_too_much_are_thinned_or_left_out(
    found: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlab.widgets.replay_payload._ROOM", 3 * 5 * 12)
    sent = pictures_of(found)
    assert sent["every"] == 2
    whole = found["square"].rows[::2] - found.x.double().numpy().reshape(1, -1)
    delta = np.frombuffer(sent["deltas"]["square"], "i1").reshape(3, 12) / 127 * sent["scale"]
    assert np.abs(delta - whole).max() <= 0.5 / 127 * 0.2 + 1e-7
    monkeypatch.setattr("qlab.widgets.replay_payload._ROOM", 50)
    assert pictures_of(found) == {}


def test_vectors_have_no_pictures(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = setting
    assert AttackReplay(net, x.flatten(1), y, **OPTIONS).pictures == {}


def test_the_slider_asks_for_nothing_to_be_computed(view: AttackReplay) -> None:
    view.run().result(60)
    job = view._latest.job
    message(view, type="choose", step=2)
    assert view._latest.job is job
    assert view.settings["step"] == 2
    assert "Margins at step 2" in view.caption


def test_another_radius_or_loss_runs_the_attackers_again(
    view: AttackReplay, setting: tuple[nn.Module, Tensor, Tensor]
) -> None:
    view.run().result(60)
    message(view, type="choose", eps=0.1, loss="margin", example=3)
    job = view._latest.job
    assert job is not None
    job.result(60)
    assert job.wait(60)
    again = replay(*setting, 3, 0.1, eta=0.01, loss="margin", **OPTIONS)
    assert view.found is not None
    for path in again.paths:
        assert torch.equal(view.found[path.name].points, path.points)


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"type": "dance"},
        {"type": "choose", "example": 11},
        {"type": "choose", "example": "1"},
        {"type": "choose", "example": None},
        {"type": "choose", "step": 5},
        {"type": "choose", "step": True},
        {"type": "choose", "eps": -1},
        {"type": "choose", "eps": float("nan")},
        {"type": "choose", "loss": "hinge"},
        {"type": "choose", "fault": 3},
        {"type": "choose", "colour": "red"},
    ],
)
def test_messages_that_mean_nothing_are_told_and_change_nothing(view: AttackReplay, content: Any) -> None:
    before = dict(view.settings)
    view._on_message(view, content, [])
    assert view.status["error"]
    assert view.settings == before
    message(view, type="choose", step=1)
    assert "error" not in view.status


def test_an_example_that_is_lost_already_is_told_and_leaves_no_stale_paths(view: AttackReplay) -> None:
    view.run().result(60)
    job = view.choose(example=10)
    assert job is not None
    job.wait(60)
    assert "misclassified already" in view.status["error"]
    assert view.paths == []
    assert view.ground == {}
    view.choose(example=2).result(60)
    assert len(view.paths) == 5


def test_stopping_keeps_the_paths_that_there_are(view: AttackReplay) -> None:
    def stop(change: Any) -> None:
        if len(view.paths) == 2:
            message(view, type="stop")

    view._latest._min_interval = 0.0
    view.observe(stop, "paths")
    job = view.run()
    assert job.wait(60)
    assert job.status == "cancelled"
    assert [path["name"] for path in view.paths] == ["plain", "hns"]
    assert not view.choices["complete"]
    assert "Stopped" in view.status["text"]


def test_state_gives_the_same_view_again(view: AttackReplay, setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    view.choose(step=3, example=4, eps=0.3, loss="dlr").result(60)
    state = json.dumps(view.state())
    again = AttackReplay.from_state(state, *setting, **OPTIONS)
    assert again.state() == view.state()
    assert again.settings == view.settings
    for wrong in (
        {},
        {"widget": "BitLab"},
        view.state() | {"settings": {"example": 1}},
        view.state() | {"version": True},
    ):
        with pytest.raises(InputError):
            AttackReplay.from_state(wrong, *setting, **OPTIONS)
    bad = view.state()["settings"] | {"loss": "<script>"}
    with pytest.raises(UnknownNameError):
        AttackReplay.from_state(view.state() | {"settings": bad}, *setting, **OPTIONS)


def test_traits_set_by_the_browser_change_nothing_that_python_uses(view: AttackReplay) -> None:
    before = view.state()
    view.set_state({"settings": {"example": 99, "loss": "<script>"}, "ground": {}})
    assert view.state() == before


def test_the_static_twin_is_a_picture_with_words(view: AttackReplay) -> None:
    assert "image/png" not in view._repr_mimebundle_()[0]  # it would delay the first paint
    view.run().result(60)
    data, metadata = view._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert view.found is not None
    assert metadata["image/png"]["alt"] == view.found.summary()
    assert "AttackReplay" in data["text/plain"]


def test_nets_and_arguments_that_do_not_fit_are_refused(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = setting
    with pytest.raises(InputError, match="together"):
        AttackReplay(net)
    with pytest.raises(InputError, match="misclassified"):
        AttackReplay(net, x, y, example=10)
    with pytest.raises(InputError):
        AttackReplay(net, x[:, :, :2], y)
    with pytest.raises(UnknownNameError, match="fault"):
        AttackReplay(fault="tired")
    with pytest.raises(UnknownNameError, match="attacker"):
        AttackReplay(net, x, y, attackers=("plain", "sqare"))


def test_without_a_net_one_of_the_labs_own_is_trained_in_the_job() -> None:
    view = AttackReplay(data="moons", fault="dead", steps=4, questions=2, side=9)
    assert view.paths == []
    assert view.settings["example"] is None
    view.run().result(120)
    assert view.settings["example"] is not None
    assert view.settings["eps"] == 0.5
    assert view.ground["two"]
    assert {path["name"]: path["moved"] for path in view.paths} == {
        "plain": False, "hns": False, "bpda": True, "nes": True, "square": True,
    }  # fmt: skip
    assert view.choices["examples"] > 100
    again = AttackReplay.from_state(view.state(), steps=4, questions=2, side=9)
    assert again.state() == view.state()
    view.choose(fault="none").result(120)
    assert all(path["moved"] for path in view.paths)
    assert "Margins at step 4" in view.caption
