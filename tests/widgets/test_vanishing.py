"""VanishingMicroscope without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.vanishing import VanishingMicroscope
from torch import Tensor, nn

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 60, bias=False), nn.BatchNorm1d(60, affine=False), nn.ReLU(), nn.Linear(60, 4, bias=False)
        )
    net = quantize(net, weights=Sign, activations=Sign).eval()
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net, x, net(x).argmax(1)


@pytest.fixture
def microscope(setting: tuple[nn.Module, Tensor, Tensor]) -> VanishingMicroscope:
    return VanishingMicroscope(*setting)


def message(microscope: VanishingMicroscope, **content: Any) -> None:
    microscope._on_message(microscope, content, [])


def floats(data: bytes, *shape: int) -> np.ndarray:
    return np.frombuffer(data, "<f4").reshape(shape)


def test_gradients_for_all_temperatures_are_there_before_anything_runs(microscope: VanishingMicroscope) -> None:
    w = microscope.found.wakes["float32"]
    K, L = len(w.betas), len(w.names)
    norms = floats(microscope.curves["float32"]["norms"], 3, K, L)
    with np.errstate(divide="ignore"):
        assert np.allclose(norms[1], np.log10(np.median(w.gradient, 2)), atol=1e-4)
    assert np.allclose(floats(microscope.curves["float32"]["lost"], K, L), w.lost)
    assert np.allclose(
        floats(microscope.curves["float32"]["regimes"], K, 3), microscope.found.regimes("float32"), atol=1e-6
    )
    assert microscope.beta == pytest.approx(1)
    assert microscope.settings == {"index": microscope.found.nearest(1.0), "dtype": "float32"}
    assert "exactly zero" in microscope.caption


def test_the_rest_comes_in_a_job(microscope: VanishingMicroscope) -> None:
    message(microscope, type="ready")
    microscope.look().result(60)
    assert microscope.look().wait(60)
    assert set(microscope.curves) == {"float32", "float64", "float16", "bfloat16"}
    assert microscope.smoothed["norms"]
    assert microscope.expected
    assert microscope.spectrum["beta1"] == microscope.found.jacobian.beta1  # type: ignore[union-attr]
    assert microscope.status["phase"] == "idle"
    assert microscope.layers[3]["saturated"] == pytest.approx(microscope.found.layers.saturation[3])
    assert microscope.layers[0]["gain"] is not None
    json.dumps([microscope.layers, microscope.grid, microscope.settings, microscope.status])  # nothing odd is sent
    sizes = [len(v) for c in (*microscope.curves.values(), microscope.smoothed) for v in c.values()]
    assert sum(sizes) < 2**20


def test_what_float64_holds_and_float32_does_not_reaches_the_browser(microscope: VanishingMicroscope) -> None:
    microscope.look().result(60)
    w = microscope.found.wakes["float64"]
    norms = floats(microscope.curves["float64"]["norms"], 3, len(w.betas), len(w.names))
    smallest = np.median(w.gradient, 2)
    assert 0 < smallest[-1, 0] < 1e-60
    assert np.isfinite(norms[1, -1, 0])


def test_a_message_moves_the_view_and_a_wrong_one_changes_nothing(microscope: VanishingMicroscope) -> None:
    microscope.look().result(60)
    message(microscope, type="set", beta=0.01, dtype="float64")
    assert microscope.beta == pytest.approx(0.01)
    assert "float64" in microscope.caption
    before = dict(microscope.settings)
    message(microscope, type="set", beta=-3)
    assert "positive" in microscope.status["error"]
    assert microscope.settings == before
    message(microscope, type="set", beta=1.0)
    assert "error" not in microscope.status
    assert microscope.dtype == "float64"


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"type": "dance"},
        {"type": "set", "dtype": "int3"},
        {"type": "set", "dtype": 3},
        {"type": "set", "beta": "1"},
    ],
)
def test_messages_that_mean_nothing_are_told_and_never_raised(microscope: VanishingMicroscope, content: Any) -> None:
    microscope._on_message(microscope, content, [])
    assert microscope.status["error"]


def test_a_dtype_that_is_not_there_yet_is_told(microscope: VanishingMicroscope) -> None:
    with pytest.raises(InputError, match="still being computed"):
        microscope.set(dtype="float16")


def test_stopping_keeps_what_there_is(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    microscope = VanishingMicroscope(*setting)

    def stop(change: Any) -> None:
        if microscope.status["phase"] == "running" and len(microscope.curves) > 1:
            message(microscope, type="stop")

    microscope.observe(stop, "status")
    job = microscope.look()
    assert job.wait(60)
    assert job.status == "cancelled"
    assert "float32" in microscope.curves
    assert len(microscope.curves) < 4
    assert "Stopped" in microscope.status["text"]


def test_state_gives_the_same_view_again(
    microscope: VanishingMicroscope, setting: tuple[nn.Module, Tensor, Tensor]
) -> None:
    microscope.look().result(60)
    microscope.set(0.1, "float64")
    again = VanishingMicroscope.from_state(json.dumps(microscope.state()), *setting)
    assert again.settings == microscope.settings
    assert again.state() == microscope.state()
    for wrong in (
        {},
        {"widget": "BitLab", "version": 1, "beta": 1.0, "dtype": "float32"},
        microscope.state() | {"settings": {"beta": "x", "dtype": "float32"}},
        microscope.state() | {"version": True},
    ):
        with pytest.raises(InputError):
            VanishingMicroscope.from_state(wrong, *setting)
    with pytest.raises(UnknownNameError):
        VanishingMicroscope.from_state(microscope.state() | {"settings": {"beta": 1.0, "dtype": "<script>"}}, *setting)


def test_the_static_twin_is_a_picture_with_words(microscope: VanishingMicroscope) -> None:
    microscope.look().result(60)
    data, metadata = microscope._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert metadata["image/png"]["alt"] == microscope.caption
    assert "VanishingMicroscope" in data["text/plain"]


def test_traits_set_by_the_browser_change_nothing_that_python_uses(microscope: VanishingMicroscope) -> None:
    before = microscope.state()
    microscope.set_state({"settings": {"index": 99, "dtype": "<script>"}, "grid": {}})
    assert microscope.state() == before


def test_nets_and_arguments_that_do_not_fit_are_refused(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = setting
    with pytest.raises(InputError):
        VanishingMicroscope(net, x[:, :3], y)
    with pytest.raises(UnknownNameError):
        VanishingMicroscope(net, x, y, dtype="float8")
    with pytest.raises(InputError, match="beta"):
        VanishingMicroscope(net, x, y, beta=0)
    many = VanishingMicroscope(net, x.repeat(5, 1), y.repeat(5))
    assert many.grid["examples"] == 200
    assert many.grid["left_out"] == 50
