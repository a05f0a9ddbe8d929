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


def test_stop_keeps_what_there_is_and_run_goes_on(view: Temperature, whole: Sweep) -> None:
    def stop(_: Any) -> None:
        known = np.isfinite(np.frombuffer(view.curves.get("float32", {}).get("accuracy", b""), "<f4")).sum()
        if view.status["phase"] == "running" and known >= 3:
            message(view, type="stop")

    view._latest._min_interval = 0.0
    view.observe(stop, "status")
    job = view.run()
    assert job.wait(120)
    assert job.status == "cancelled"
    assert "Stopped" in view.status["text"]
    assert view.sweep is not None
    kept = view.sweep.found.dtypes["float32"].accuracy
    assert 3 <= np.isfinite(kept).sum() < K
    assert not view.complete
    view.unobserve(stop, "status")
    message(view, type="run")
    finished(view)
    assert view.complete
    assert np.array_equal(view.sweep.found.dtypes["float32"].accuracy, whole.found.dtypes["float32"].accuracy)


def test_the_chosen_example_is_sent_with_its_own_curves(view: Temperature, whole: Sweep, setting: Any) -> None:
    finished(view).choose(example=5, dtype="float64")
    sent, found, w = view.chosen, whole.found, whole.found.dtypes["float64"]
    p = np.frombuffer(sent["p"], "<f4").reshape(K, 3)
    assert np.allclose(p, found.probabilities(5), atol=1e-6)
    assert np.allclose(p.sum(1), 1, atol=1e-6)
    with np.errstate(divide="ignore"):
        for name, values in (("psi", w.psi), ("gradient", w.gradient)):
            assert np.allclose(np.frombuffer(sent["curves"]["float64"][name], "<f4"), np.log10(values[:, 5]), atol=1e-4)
        assert np.allclose(np.frombuffer(sent["h"], "<f4"), np.log10(found.h[:, 5]), atol=1e-4)
    assert np.allclose(np.frombuffer(sent["curves"]["float64"]["alive"], "<f4"), w.signs[:, 5] ** 2)
    assert (sent["label"], sent["decision"]) == (found.labels[5], found.logits[5].argmax())
    levels = np.frombuffer(sent["picture"]["levels"], "u1") / 255
    x = setting[1][5].numpy().ravel()
    assert np.abs(levels * (x.max() - x.min()) + x.min() - x).max() <= 0.5 / 255 + 1e-6
    assert sent["picture"]["shape"] == [1, 3, 4]


def test_means_and_shares_are_over_the_right_examples(view: Temperature, whole: Sweep) -> None:
    finished(view)
    right = (whole.found.logits.argmax(1) == whole.found.labels).astype("u1")
    assert right.sum() == N - 1
    assert list(view.net["right"]) == right.tolist()
    assert view.net["counted"] == N - 1
    for name, w in whole.found.dtypes.items():
        alive = (w.signs[:, right == 1] ** 2).mean(1)
        assert np.allclose(np.frombuffer(view.curves[name]["alive"], "<f4"), alive)
        shares = np.frombuffer(view.curves[name]["shares"], "<f4").reshape(3, K)
        assert np.allclose(shares.sum(0), 1, atol=1e-6)


def test_a_dtype_that_the_logits_are_too_large_for_is_told_and_the_others_are_shown(view: Temperature) -> None:
    job = view.choose(c=1e5)
    assert job is not None
    job.result(120)
    assert view.complete
    assert set(view.curves) == {"float32", "float64"}
    assert "finite" in next(d["failed"] for d in view.choices["dtypes"] if d["name"] == "float16")
    with pytest.raises(InputError, match="finite"):
        view.choose(dtype="float16")
    assert view.settings["dtype"] == "float32"


def test_a_view_that_begins_in_such_a_dtype_shows_another_and_says_why(setting: Any) -> None:
    view = Temperature(*setting, dtype="float16", c=1e5, **OPTIONS)
    finished(view)
    assert view.settings["dtype"] == "float32"
    assert "finite" in view.status["error"]


def test_the_labs_own_net_is_trained_in_the_job_and_looks_robust_until_it_is_woken_up() -> None:
    view = Temperature(attack=PGD(5))
    assert view.found is None
    assert view.net == {}
    assert view.chosen == {}
    assert view.caption == "Nothing has been computed yet."

    def stop(_: Any) -> None:
        if view.sweep is not None and view.sweep.finished("float32"):
            view.stop()

    view.observe(stop, "status")
    job = view.run()
    assert job.wait(300)
    assert job.error is None
    assert view.found is not None
    w, at = view.found.dtypes["float32"], view.found.nearest(1.0)
    assert view.found.clean == 1
    assert w.shares[2, at] > 0.5  # dead
    assert w.accuracy[at] > max(w.rules.values()) + 0.3
    assert w.same.all()


def test_messages_stay_small(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = setting
    many = Temperature(net, x.repeat(20, 1, 1, 1), y.repeat(20), eps=0.1, attack=PGD(1))
    assert many.choices["left_out"] == 20 * N - 200
    finished(many)
    sizes = [len(b) for d in (many.net, many.regimes, many.chosen) for b in d.values() if isinstance(b, bytes)]
    sizes += [len(b) for c in many.curves.values() for b in c.values() if isinstance(b, bytes)]
    assert sum(sizes) < 2**18


def test_traits_set_by_the_browser_change_nothing_that_python_uses(view: Temperature) -> None:
    before = view.state()
    view.set_state({"settings": {"index": 99, "dtype": "<script>"}, "choices": {}})
    assert view.state() == before


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
