"""MethodDuel without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from qlab.widgets.duel import MethodDuel

from qlab.duel import duel
from qlab.errors import InputError
from qlab.methods import CATALOG


@pytest.fixture
def fight() -> MethodDuel:
    return MethodDuel("adaste", "ste", epochs=2)


def message(fight: MethodDuel, **content: Any) -> None:
    fight._on_message(fight, content, [])


def finish(fight: MethodDuel) -> None:
    assert fight._job.job is not None
    fight._job.job.result(120)


def floats(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<f4")


def test_a_duel_is_that_of_the_lab(fight: MethodDuel) -> None:
    message(fight, type="start")
    finish(fight)
    expected = duel("adaste", "ste", epochs=2)
    shown = fight.result
    assert shown["done"]
    for k in (0, 1):
        assert floats(shown["accuracy"][k]) == pytest.approx(expected.accuracy[:, k])
    assert floats(shown["apart"]) == pytest.approx(expected.apart)
    assert shown["table"] == expected.table.tolist()
    assert [row["differ"] for row in shown["layers"]] == pytest.approx(expected.differ[-1].tolist())
    assert expected.plane is not None
    assert shown["plane"]["a"] == expected.plane.a.astype(np.uint8).tobytes()
    assert fight.caption == expected.summary()
    assert fight.status["text"] == "Done."
    data, metadata = fight._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert metadata["image/png"]["alt"] == expected.summary()


def test_what_is_sent_is_small(fight: MethodDuel) -> None:
    fight.choose(epochs=200)
    job = fight.start()
    while fight.duel is None or len(fight.duel.loss) < 50:
        assert not job.wait(0.01)
    fight.stop()
    assert job.wait(60)
    sent = sum(len(v) for v in fight.result.values() if isinstance(v, bytes)) + len(fight.result["plane"]["a"])
    assert sent < 2**19
    assert not fight.result["done"]
    assert fight.status["text"] == "Stopped."
    assert f"{len(fight.duel.loss)} of {fight.duel.total} steps" in fight.caption


def test_another_choice_takes_the_result_back_for_good(fight: MethodDuel) -> None:
    fight.choose(epochs=100)
    job = fight.start()
    while fight.duel is None:
        job.wait(0.01)
    message(fight, type="choose", b="full_precision")
    assert job.wait(60)
    assert fight.duel is None
    assert fight.result == {}
    assert "adaste against full_precision" in fight.caption
    assert fight.status["phase"] == "idle"


def test_hyperparameters_go_with_the_method_that_they_were_given_for() -> None:
    fight = MethodDuel("ste", "ste", epochs=1, options_a={"lr": 0.5})
    fight.start(wait=True)
    expected = duel("ste", "ste", epochs=1, options_a={"lr": 0.5})
    assert fight.caption == expected.summary()
    fight.choose(a="full_precision")
    fight.start(wait=True)
    assert fight.caption == duel("full_precision", "ste", epochs=1).summary()


def test_an_error_of_the_work_is_shown(fight: MethodDuel) -> None:
    wrong = MethodDuel("ste", "ste", options_a={"speed": 3})
    message(wrong, type="start")
    wrong._job.job.wait(60)  # type: ignore[union-attr]
    assert "unknown hyperparameter of ste 'speed'" in wrong.status["error"]
    assert wrong.status["phase"] == "idle"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"a": "nothing"}, "a is 'nothing'"),
        ({"data": ["digits"]}, "data is ['digits']"),
        ({"epochs": 501}, "whole number from 1 to 500"),
        ({"seed": True}, "seed is True"),
        ({"innerHTML": "x"}, "expected some of a, b"),
    ],
)
def test_a_wrong_setting_is_told_and_changes_nothing(fight: MethodDuel, wrong: Any, told: str) -> None:
    before = fight.state()
    message(fight, type="choose", **wrong)
    assert told in fight.status["error"]
    assert fight.state() == before
    with pytest.raises(InputError):
        MethodDuel.from_state(before | {"settings": before["settings"] | wrong})


@pytest.mark.parametrize("content", [None, 3, {"type": "dance"}, {"type": ["start"]}])
def test_messages_that_mean_nothing_are_told_and_never_raised(fight: MethodDuel, content: Any) -> None:
    fight._on_message(fight, content, [])
    assert fight.status["error"]


def test_state_gives_the_same_view_again(fight: MethodDuel) -> None:
    fight.choose(a="full_precision", data="circles", seed=3)
    again = MethodDuel.from_state(json.dumps(fight.state()))
    assert again.settings == fight.settings
    for wrong in ({"widget": "MethodDuel"}, {"widget": "BitLab", "version": 1, "settings": {}}, "[", 3):
        with pytest.raises(InputError):
            MethodDuel.from_state(wrong)


def test_before_the_first_duel_there_is_nothing_to_draw(fight: MethodDuel) -> None:
    assert "image/png" not in fight._repr_mimebundle_()[0]
    assert {m["name"] for m in fight.methods} == set(CATALOG)
    with pytest.raises(InputError, match="start the duel first"):
        fight.figure()
