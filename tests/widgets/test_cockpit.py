"""AnnealingCockpit without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from qlab.widgets.cockpit import CHANGES, AnnealingCockpit

from qlab.cockpit import compare, schedules
from qlab.errors import InputError
from qlab.methods import CATALOG
from qlab.steering import steer


@pytest.fixture
def cockpit() -> AnnealingCockpit:
    return AnnealingCockpit("adaste", epochs=4)


def message(cockpit: AnnealingCockpit, **content: Any) -> None:
    cockpit._on_message(cockpit, content, [])


def finish(cockpit: AnnealingCockpit) -> None:
    for latest in (cockpit._look, cockpit._flight):
        if latest.job is not None:
            latest.job.result(120)


def floats(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<f4")


def test_ready_shows_the_schedules_of_every_method_of_the_catalog(cockpit: AnnealingCockpit) -> None:
    message(cockpit, type="ready")
    finish(cockpit)
    found = schedules()
    rows = cockpit.instruments["rows"]
    named = {name for row in rows for name in row["methods"]} | {x["method"] for x in cockpit.instruments["left_out"]}
    assert named == set(CATALOG) == {m["name"] for m in cockpit.methods}
    row = next(r for r in rows if r["methods"] == ["adaste"] and r["quantity"] == "mu")
    curve = next(c for c in found.curves if (c.method, c.quantity) == ("adaste", "mu"))
    assert floats(row["heights"]) == pytest.approx(curve.normalised, abs=1e-6)
    assert floats(row["values"]) == pytest.approx(curve.values)
    assert cockpit.caption == cockpit.schedules.summary()  # type: ignore[union-attr]
    assert sum(len(r["heights"]) + len(r["values"]) for r in rows) < 2**20


def test_a_branch_is_the_steered_run_of_the_lab_and_gets_a_verdict(cockpit: AnnealingCockpit) -> None:
    message(cockpit, type="choose", moment=0.5)
    message(cockpit, type="branch")
    finish(cockpit)
    run = steer("adaste", epochs=4)
    run.advance()
    other = run.branch(18, frozen=True)
    other.advance(18)
    for packed, mine in ((cockpit.planned, run), (cockpit.branched, other)):
        values = mine.telemetry().values
        assert floats(packed["distance"]) == pytest.approx(values["distance"])
        assert floats(packed["progress"]) == pytest.approx(values["progress"])
    expected = compare(run.telemetry(), other.telemetry())
    assert cockpit.comparison == expected
    assert cockpit.verdict["verdict"] == expected.verdict
    assert expected.summary() in cockpit.caption
    assert cockpit.status["phase"] == "idle"
    data, metadata = cockpit._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert "branched off at step 18" in metadata["image/png"]["alt"]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_can_be_flown(change: str) -> None:
    cockpit = AnnealingCockpit("ste", epochs=2, moment=0.4, change=change)
    cockpit.branch(wait=True)
    assert cockpit.verdict["measure"] == "flips"
    assert cockpit.branched["branched"] == 9
    if change == "same":
        assert floats(cockpit.planned["loss"])[1:] == pytest.approx(floats(cockpit.branched["loss"])[1:])
        assert cockpit.verdict["verdict"] == "equal"


def test_the_run_is_trained_frozen_released_and_rewound(cockpit: AnnealingCockpit) -> None:
    message(cockpit, type="train")
    finish(cockpit)
    assert (cockpit.planned["now"], cockpit.planned["at"]) == (36, 1.0)
    message(cockpit, type="choose", moment=0.3)
    message(cockpit, type="rewind")
    finish(cockpit)
    assert cockpit.planned["now"] == 9
    message(cockpit, type="freeze")
    finish(cockpit)
    assert cockpit.planned["frozen"]
    message(cockpit, type="train")
    finish(cockpit)
    assert (cockpit.planned["now"], cockpit.planned["at"]) == (
        18,
        0.25,
    )  # a quarter of the plan further, the clock held
    message(cockpit, type="release")
    finish(cockpit)
    assert not cockpit.planned["frozen"]
    message(cockpit, type="train")
    finish(cockpit)
    assert (cockpit.planned["now"], cockpit.planned["at"]) == (45, 1.0)


def test_what_is_stopped_stays_and_can_be_trained_on() -> None:
    cockpit = AnnealingCockpit("ste", epochs=60)
    job = cockpit.train()
    while cockpit.run is None or cockpit.run.step < 5:
        job.wait(0.01)
    message(cockpit, type="stop")
    assert job.wait(60)
    assert job.status == "cancelled"
    stopped = cockpit.planned["now"]
    assert 0 < stopped < 540
    assert cockpit.status["text"] == "Stopped."
    cockpit.train(wait=True)
    whole = steer("ste", epochs=60)
    assert cockpit.run is not None
    assert np.array_equal(cockpit.run.telemetry().values["loss"], whole.advance().values["loss"], equal_nan=True)


def test_freezing_while_it_trains_goes_on_with_a_held_clock() -> None:
    cockpit = AnnealingCockpit("ste", epochs=60)
    job = cockpit.train()
    while cockpit.run is None or cockpit.run.step < 5:
        job.wait(0.01)
    cockpit.freeze(wait=True)
    ticks = cockpit.run.telemetry().values["tick"]
    held = int(ticks[-1])
    assert held < 540
    assert cockpit.run.step == held + 540 // 4
    assert set(ticks[held + 1 :]) == {held}


def test_another_method_begins_anew_and_another_moment_takes_the_branch_back(cockpit: AnnealingCockpit) -> None:
    cockpit.branch(wait=True)
    cockpit.choose(moment=0.25)
    assert cockpit.branched == cockpit.verdict == {}
    assert cockpit.planned["now"] == 36
    cockpit.choose(method="ste")
    assert cockpit.run is None
    assert cockpit.planned == {}


def test_another_moment_stops_a_branch_that_would_answer_another_question() -> None:
    cockpit = AnnealingCockpit("ste", epochs=60)
    job = cockpit.branch()
    while cockpit.run is None or cockpit.run.step < 5:
        job.wait(0.01)
    message(cockpit, type="choose", moment=0.25)
    assert job.wait(60)
    assert job.status == "cancelled"
    assert cockpit.branched == cockpit.verdict == {}
    cockpit.branch(wait=True)
    assert cockpit.branched["branched"] == 135


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"method": "nothing"}, "method is 'nothing'"),
        ({"data": 3}, "data is 3"),
        ({"change": "<b>"}, "change is '<b>'"),
        ({"epochs": 0}, "whole number from 1 to 200"),
        ({"epochs": True}, "epochs is True"),
        ({"seed": -1}, "seed is -1"),
        ({"moment": 1.5}, "from 0 to 1"),
        ({"moment": float("nan")}, "from 0 to 1"),
        ({"innerHTML": "x"}, "expected some of method"),
    ],
)
def test_a_wrong_setting_is_told_and_changes_nothing(cockpit: AnnealingCockpit, wrong: Any, told: str) -> None:
    before = cockpit.state()
    message(cockpit, type="choose", **wrong)
    assert told in cockpit.status["error"]
    assert cockpit.state() == before
    message(cockpit, type="choose", moment=0.1)
    assert "error" not in cockpit.status
    with pytest.raises(InputError):
        AnnealingCockpit.from_state(before | {"settings": before["settings"] | wrong})


@pytest.mark.parametrize("content", [None, 3, {"type": "dance"}, {"type": ["choose"]}])
def test_messages_that_mean_nothing_are_told_and_never_raised(cockpit: AnnealingCockpit, content: Any) -> None:
    cockpit._on_message(cockpit, content, [])
    assert cockpit.status["error"]


def test_state_gives_the_same_view_again(cockpit: AnnealingCockpit) -> None:
    cockpit.choose(moment=0.2, change="lr", epochs=3, seed=5)
    again = AnnealingCockpit.from_state(json.dumps(cockpit.state()))
    assert again.settings == cockpit.settings
    for wrong in ({"widget": "AnnealingCockpit"}, {"widget": "BitLab", "version": 1, "settings": {}}, "[", 3):
        with pytest.raises(InputError):
            AnnealingCockpit.from_state(wrong)


def test_before_anything_is_known_there_is_no_picture_to_wait_for(cockpit: AnnealingCockpit) -> None:
    assert "image/png" not in cockpit._repr_mimebundle_()[0]
    assert "not trained yet" in cockpit.caption
