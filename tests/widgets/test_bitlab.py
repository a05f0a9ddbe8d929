"""BitLab without a browser: messages in, what is shown out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets import BitLab
from torch import Tensor, nn

import qlab
from qlab.binary import inspect
from qlab.errors import InputError, UnknownNameError
from tests.binary.conftest import binary_net, images


@pytest.fixture(scope="module")
def lenet() -> tuple[Any, Tensor]:
    x = images(3, 1, 28, 28)
    return qlab.binary.compile(binary_net("lenet", (1, 28, 28)), x), x


@pytest.fixture
def lab(lenet: tuple[Any, Tensor]) -> BitLab:
    return BitLab(*lenet)


def message(lab: BitLab, **content: Any) -> None:
    lab._on_message(lab, content, [])


def test_the_bits_are_there_before_the_net_has_run(lab: BitLab, lenet: tuple[Any, Tensor]) -> None:
    bits = inspect.bits(lenet[0], lab.settings["layer"])
    assert lab.weights["words"] == bits.words.astype("<u8").tobytes()
    assert lab.dot == {}
    assert len(lab.weights["words"]) < 2**20


def test_ready_runs_the_example_and_shows_the_dot_product_of_inspect(lab: BitLab, lenet: tuple[Any, Tensor]) -> None:
    message(lab, type="ready")
    lab._follow.job.result() if hasattr(lab._follow, "job") else lab.look().result()
    s = lab.settings
    expected = inspect.dot(*lenet, s["layer"], s["unit"], (s["row"], s["column"]))
    assert lab.dot["z"] == expected.z == lab.dot["simulated"]
    assert np.frombuffer(lab.dot["sums"], "<i4").tolist() == expected.sums.tolist()
    assert str(expected.z) in lab.caption


def test_another_place_is_shown_and_a_wrong_one_changes_nothing(lab: BitLab) -> None:
    lab.look().result()
    message(lab, type="choose", unit=5, row=0, column=0)
    assert lab.settings["unit"] == 5
    assert lab.dot["unit"] == 5
    before = dict(lab.settings)
    message(lab, type="choose", unit=99)
    assert lab.settings == before
    assert "unit is 99" in lab.status["error"]
    message(lab, type="choose", unit=6)
    assert "error" not in lab.status


def test_another_layer_brings_its_own_bits(lab: BitLab) -> None:
    job = lab.choose(layer="hidden.0", unit=3)
    assert job is not None
    job.result()
    assert lab.weights["layer"] == "hidden.0"
    assert lab.dot["layer"] == "hidden.0"
    assert lab.dot["position"] is None


def test_the_cost_is_measured_in_a_job_and_stays(lab: BitLab) -> None:
    lab.measure("cost", wait=True)
    assert {row["name"] for row in lab.latency["rows"]} >= {"torch", "numba"}
    assert all(row["seconds"] > 0 for row in lab.latency["rows"])
    assert lab.status["phase"] == "idle"


def test_state_gives_the_same_view_again(lab: BitLab, lenet: tuple[Any, Tensor]) -> None:
    lab.choose(layer="hidden.3", unit=7, example=2)
    again = BitLab.from_state(lab.state(), *lenet)
    assert again.settings == lab.settings
    with pytest.raises(InputError, match="not one of BitLab"):
        BitLab.from_state({"widget": "BitLab"}, *lenet)


def test_the_static_twin_is_a_picture_with_words(lab: BitLab) -> None:
    lab.look().result()
    data, metadata = lab._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert metadata["image/png"]["alt"]
    assert "BitLab" in data["text/plain"]


@pytest.mark.parametrize(
    "content", [None, {"type": "dance"}, {"type": "measure", "what": 3}, {"type": "choose", "unit": "a"}]
)
def test_messages_that_mean_nothing_are_told_and_never_raised(lab: BitLab, content: Any) -> None:
    lab._on_message(lab, content, [])
    assert lab.status["error"]


def test_nets_batches_and_names_that_do_not_fit_are_refused(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    with pytest.raises(InputError, match="expected"):
        BitLab(packed, x[:, :, :5])
    with pytest.raises(UnknownNameError, match="Known"):
        BitLab(packed, x, layer="hidden.9")
    with pytest.raises(InputError, match="unit is 99"):
        BitLab(packed, x, unit=99)
    floats = qlab.binary.compile(nn.Linear(4, 3).eval(), torch.zeros(1, 4))
    with pytest.raises(InputError, match="bits"):
        BitLab(floats, torch.zeros(1, 4))


def test_a_measurement_is_stopped_by_a_message_and_a_second_one_is_refused_meanwhile(lab: BitLab) -> None:
    told: list[str] = []

    def stop(change: Any) -> None:
        message(lab, type="measure", what="cost")
        told.append(lab.status.get("error", ""))
        message(lab, type="stop")

    lab.observe(stop, "crossing")
    job = lab.measure("crossover")
    assert job.wait(60)
    assert job.status == "cancelled"
    assert "The crossover is being measured; stop that first." in told
    assert lab.crossover is not None
    assert lab.status["phase"] == "idle"


def test_a_wide_layer_is_sent_in_part_below_a_megabyte() -> None:
    x = images(1, 2100)
    wide = qlab.binary.compile(binary_net("mlp", (2100,), hidden=(2100, 2100)), x)
    lab = BitLab(wide, x)
    w = lab.weights
    assert len(w["words"]) == 8 * w["units"] * w["width"] < 2**20
    assert w["left_out"] == [2100 - w["units"], 0]
    assert w["left_out"][0] > 0
    assert lab.bits.words.nbytes > 2**19


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"layer": 3},
        {"layer": "fc"},
        {"layer": "hidden.0", "row": 1},
        {"unit": "1"},
        {"unit": True},
        {"column": 1e9},
        {"unit": -1},
        {"innerHTML": "x"},
    ],
)
def test_a_state_with_hostile_settings_is_refused(lenet: tuple[Any, Tensor], settings: Any) -> None:
    with pytest.raises((InputError, UnknownNameError)):
        BitLab.from_state({"widget": "BitLab", "version": 1, "settings": settings}, *lenet)


def test_traits_set_by_the_browser_change_nothing_that_python_uses(lab: BitLab) -> None:
    before = lab.state()
    lab.set_state({"settings": {"layer": "<script>"}, "status": {"phase": "cost"}})
    assert lab.state() == before
