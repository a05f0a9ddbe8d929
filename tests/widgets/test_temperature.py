"""Temperature without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.temperature import Temperature
from torch import Tensor, nn

from qlab.attacks.pgd import PGD
from qlab.attacks.temperature_sweep import Sweep, sweeping
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize

OPTIONS: dict[str, Any] = {"eps": 0.1, "attack": PGD(2)}
N, K = 12, 51


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    """A binary net on small pictures; the last example is labelled wrong."""
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 1, generator=torch.Generator().manual_seed(i))
    net = quantize(net, weights=Sign, activations=Sign).eval().requires_grad_(False)
    x = torch.rand(N, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[-1] = (y[-1] + 1) % 3
    return net, x, y


@pytest.fixture
def view(setting: tuple[nn.Module, Tensor, Tensor]) -> Temperature:
    return Temperature(*setting, **OPTIONS)


@pytest.fixture(scope="module")
def whole(setting: tuple[nn.Module, Tensor, Tensor]) -> Sweep:
    *_, last = [
        u.value for u in sweeping(*setting, tuple(float(b) for b in np.logspace(-3, 2, K)), **OPTIONS) if u.value
    ]
    return last


def message(view: Temperature, **content: Any) -> None:
    view._on_message(view, content, [])


def finished(view: Temperature) -> Temperature:
    view.run().result(120)
    return view


def test_the_first_gradients_are_there_before_anything_runs(view: Temperature) -> None:
    assert view.found is not None
    assert not view.complete
    assert view.net["examples"] == N
    assert view.settings["beta"] == pytest.approx(1.0)
    assert view.caption


def test_everything_sent_is_what_the_plain_function_gives(view: Temperature, whole: Sweep) -> None:
    message(view, type="ready")
    job = view._latest.job
    assert job is not None
    job.result(120)
    assert view.complete
    assert view.status["phase"] == "idle"
    for name, w in whole.found.dtypes.items():
        sent = view.curves[name]
        np.testing.assert_allclose(np.frombuffer(sent["accuracy"], "<f4"), w.accuracy, atol=1e-6)
        np.testing.assert_allclose(np.frombuffer(sent["lost"], "<f4"), w.lost, atol=1e-6)
        np.testing.assert_array_equal(np.frombuffer(view.regimes[name], "u1"), w.regime.astype("u1").ravel())
        assert sent["changed"] == (~w.same).sum(1).tolist()
    assert view.net["njs"] == pytest.approx(float(np.median(whole.found.njs)))
    assert view.net["hns"] == pytest.approx(float(np.median(whole.found.hns)))
    plain = [{k: v for k, v in d.items() if not isinstance(v, bytes | dict)} for d in (view.net, *view.curves.values())]
    json.dumps(
        [[{k: v for k, v in d.items() if not isinstance(v, bytes)} for d in plain], view.settings], allow_nan=False
    )
    message(view, type="ready")  # a second page starts nothing
    assert view._latest.job is job


def test_a_slider_only_picks(view: Temperature) -> None:
    finished(view)
    job = view._latest.job
    curves = view.curves
    message(view, type="choose", beta=0.0123, example=3, of="example", dtype="float64")
    assert view._latest.job is job
    assert view.curves == curves
    assert view.settings["example"] == 3
    assert abs(np.log10(view.settings["beta"]) - np.log10(0.0123)) <= 0.05 + 1e-9
    assert "Example 3" in view.caption


def test_decisions_are_the_same_at_every_temperature(view: Temperature) -> None:
    finished(view)
    for name in ("float32", "float64"):
        assert view.curves[name]["changed"] == [0] * K


def test_a_louder_net_is_computed_again_and_kept(view: Temperature) -> None:
    finished(view)
    job = view.choose(c=100.0)
    assert job is not None
    job.result(120)
    loud = view.found
    assert loud is not None
    assert "Logits times 100" in view.caption
    assert view.choose(c=1.0) is None  # nothing is missing there
    assert view.found is not loud
    assert {row["c"] for row in view.rows} == {1.0, 100.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0}, "positive number"),
        ({"beta": "hot"}, "positive number"),
        ({"c": -1.0}, "positive number"),
        ({"example": N}, f"from 0 to {N - 1}"),
        ({"example": 1.5}, "whole number"),
        ({"dtype": "float8"}, "float64"),
        ({"of": "all"}, "mean"),
        ({"colour": "red"}, "no field"),
    ],
)
def test_a_wrong_choice_changes_nothing_and_is_told(view: Temperature, changes: dict[str, Any], said: str) -> None:
    before = view.state()
    with pytest.raises((InputError, UnknownNameError), match=said):
        view.choose(**changes)
    message(view, type="choose", **changes)
    assert said in view.status["error"]
    assert view.state() == before


@pytest.mark.parametrize("content", [None, 3, {}, {"type": "explode"}, {"type": "choose", "beta": None}])
def test_a_bad_message_is_told_and_nothing_breaks(view: Temperature, content: Any) -> None:
    before = view.state()
    view._on_message(view, content, [])
    assert view.state() == before


def test_stop_keeps_what_there_is(view: Temperature) -> None:
    job = view.run()
    view.stop()
    job.wait(120)
    assert job.status in ("cancelled", "done")
    assert view.found is not None


def test_state_gives_the_same_view_again(view: Temperature, setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    view.choose(beta=0.1, example=2, of="example")
    state = json.loads(json.dumps(view.state()))
    again = Temperature.from_state(state, *setting, **OPTIONS)
    assert again.settings == view.settings
    for wrong in ({}, {"beta": 1}, [], "nonsense"):
        with pytest.raises(InputError):
            Temperature.from_state(wrong, *setting, **OPTIONS)


def test_a_static_picture_goes_along_once_all_is_there(view: Temperature) -> None:
    finished(view)
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "image/png" in data


def test_net_and_data_belong_together(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="together"):
        Temperature(setting[0])
