"""TimeTravel without a browser: messages in, what is shown out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.film import film
from qlab.widgets.time_travel import TimeTravel
from torch import Tensor

import qlab
from qlab.callbacks import BitHistory
from qlab.diagnose.course import course
from qlab.diagnose.flips import flips
from qlab.diagnose.history import History, Recorder, Tracked
from qlab.diagnose.which_flip import which_flip
from qlab.errors import InputError, UnknownNameError
from tests.methods.conftest import train


@pytest.fixture(scope="module")
def trained() -> tuple[History, Any, Tensor]:
    bits = BitHistory()
    run = train("ste", epochs=4, callbacks=[bits])
    return bits.history, run.deployed, run.data.transform(run.data.split("test").x[:30])


@pytest.fixture(scope="module")
def undecided(trained: tuple[History, Any, Tensor]) -> int:
    """Return an example whose prediction changed during the training."""
    history, net, x = trained
    return next(i for i in range(len(x)) if course(history, net, x[i : i + 1]).turns)


@pytest.fixture
def travel(trained: tuple[History, Any, Tensor]) -> TimeTravel:
    return TimeTravel(*trained)


def message(travel: TimeTravel, **content: Any) -> None:
    travel._on_message(travel, content, [])


def test_the_film_of_a_layer_holds_its_weights_at_every_step(
    travel: TimeTravel, trained: tuple[History, Any, Tensor]
) -> None:
    history = trained[0]
    f = travel.frames
    steps = np.frombuffer(f["steps"], "<i4")
    assert steps.tolist() == history.steps.tolist()
    bits = np.frombuffer(f["bits"], np.uint8).reshape(len(steps), f["plane"])
    signs = 1 - 2 * np.unpackbits(bits, axis=1, count=f["rows"] * f["columns"], bitorder="little").astype(int)
    for r in (0, 5, len(steps) - 1):
        assert np.array_equal(signs[r], history.at(int(steps[r]))[f["layer"]].flatten().numpy())
    assert np.frombuffer(f["counts"], "<u2").tolist() == travel.flips.per_weight[f["layer"]].ravel().tolist()


def test_ready_follows_the_prediction_and_goes_to_its_last_turn(
    trained: tuple[History, Any, Tensor], undecided: int
) -> None:
    travel = TimeTravel(*trained, example=undecided)
    message(travel, type="ready")
    assert travel._look.job is not None
    travel._look.job.result()
    history, net, x = trained
    expected = course(history, net, x[undecided : undecided + 1])
    assert travel.course is not None
    assert travel.course.turns == expected.turns
    assert (travel.settings["since"], travel.settings["until"]) == expected.turns[-1]
    assert np.frombuffer(travel.prediction["margins"], "<f4") == pytest.approx(expected.margins)
    assert expected.summary() in travel.caption


def test_the_flips_that_are_found_are_those_of_which_flip(trained: tuple[History, Any, Tensor], undecided: int) -> None:
    travel = TimeTravel(*trained, example=undecided)
    travel.look().result()
    travel.find(wait=True)
    history, net, x = trained
    s = travel.settings
    expected = which_flip(history, net, x[undecided : undecided + 1], s["since"], s["until"])
    assert travel.answer is not None
    assert travel.answer.minimal == expected.minimal
    assert travel.found["first"] == (expected.first or 0) + 1
    assert travel.found["done"]
    assert sum(row["minimal"] for row in travel.found["rows"]) == min(len(expected.minimal), 12)
    assert travel.caption == expected.summary()
    assert travel.status["phase"] == "idle"
    data, metadata = travel._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert metadata["image/png"]["alt"] == expected.summary()


def test_another_place_is_shown_and_a_wrong_one_changes_nothing(
    travel: TimeTravel, trained: tuple[History, Any, Tensor]
) -> None:
    name = trained[0].tensors[-1].name
    message(travel, type="choose", layer=name, step=3)
    assert travel.frames["layer"] == travel.rate["layer"] == travel.settings["layer"] == name
    before = dict(travel.settings)
    for wrong, told in (
        ({"step": 10**6}, "was not recorded"),
        ({"example": 99}, "examples 0 to 29"),
        (
            {"since": 9, "until": 2},
            "earlier step first",
        ),
    ):
        message(travel, type="choose", **wrong)
        assert travel.settings == before
        assert told in travel.status["error"]
    message(travel, type="choose", step=4)
    assert "error" not in travel.status


def test_an_interval_that_was_chosen_stays_when_the_prediction_arrives(
    trained: tuple[History, Any, Tensor], undecided: int
) -> None:
    travel = TimeTravel(*trained, example=undecided)
    travel.choose(since=2, until=9)
    travel.look().result()
    assert (travel.settings["since"], travel.settings["until"]) == (2, 9)


def test_state_gives_the_same_view_again(travel: TimeTravel, trained: tuple[History, Any, Tensor]) -> None:
    travel.choose(step=7, example=2, since=1, until=8)
    again = TimeTravel.from_state(travel.state(), *trained)
    assert again.settings == travel.settings
    for wrong in ({"widget": "TimeTravel"}, {"widget": "BitLab", "version": 1, "settings": {}}, "[", 3):
        with pytest.raises(InputError):
            TimeTravel.from_state(wrong, *trained)


@pytest.mark.parametrize("settings", [None, {"layer": 3}, {"layer": "fc"}, {"step": True}, {"step": 1.5}, {"x": 1}])
def test_a_state_with_hostile_settings_is_refused(trained: tuple[History, Any, Tensor], settings: Any) -> None:
    with pytest.raises((InputError, UnknownNameError)):
        TimeTravel.from_state({"widget": "TimeTravel", "version": 1, "settings": settings}, *trained)


@pytest.mark.parametrize(
    "content", [None, {"type": "dance"}, {"type": "choose", "step": "a"}, {"type": "choose", "innerHTML": "x"}]
)
def test_messages_that_mean_nothing_are_told_and_never_raised(travel: TimeTravel, content: Any) -> None:
    travel._on_message(travel, content, [])
    assert travel.status["error"]


def test_traits_set_by_the_browser_change_nothing_that_python_uses(travel: TimeTravel) -> None:
    before = travel.state()
    travel.set_state({"settings": {"layer": "<script>"}, "status": {"phase": "find"}})
    assert travel.state() == before


def test_a_history_or_batch_that_does_not_fit_is_refused(trained: tuple[History, Any, Tensor]) -> None:
    history, net, x = trained
    with pytest.raises(InputError, match="another net"):
        TimeTravel(history, qlab.build("mlp", (2,), 2, hidden=(5,), seed=0).eval(), x)
    with pytest.raises(InputError, match="does not take"):
        TimeTravel(history, net, x[:, :1])
    with pytest.raises(UnknownNameError):
        TimeTravel(history, net, x, layer="nothing")
    with pytest.raises(InputError, match="was not recorded"):
        TimeTravel(history, net, x, step=-1)


def test_a_long_history_of_a_wide_layer_is_sent_in_part_below_a_megabyte() -> None:
    g = torch.Generator().manual_seed(0)
    recorder = Recorder([Tracked("w", (300, 400), (-1.0, 1.0))])
    for step in range(100):
        recorder.append(step, {"w": torch.randn(300, 400, generator=g)})
    history = recorder.history()
    f = film(history, flips(history), "w")
    assert len(f["bits"]) + len(f["counts"]) < 2**20
    assert f["left_out"][0] == 300 * 400 - f["rows"] * f["columns"] > 0
    assert f["left_out"][1] > 0
    steps = np.frombuffer(f["steps"], "<i4")
    assert (steps[0], steps[-1]) == (0, 99)
    bits = np.frombuffer(f["bits"], np.uint8).reshape(len(steps), f["plane"])[-1]
    signs = 1 - 2 * np.unpackbits(bits, count=f["rows"] * f["columns"], bitorder="little").astype(int)
    assert np.array_equal(signs, history.at(99)["w"].flatten()[: len(signs)].numpy())
