"""AttributionGuard without a browser: messages in, what is shown out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.attribution import AttributionGuard
from torch import Tensor, nn

from qlab.diagnose.attribution_twins import twins
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update
from qlab.quantizers import Sign, quantize


def nets() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 3),
        ).eval()
    return net, quantize(net, Sign, Sign)


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(5, 1, 6, 6, generator=g), torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture
def view() -> AttributionGuard:
    return AttributionGuard(*nets(), *data(), steps=8)


def message(view: AttributionGuard, **content: Any) -> None:
    view._on_message(view, content, [])


def test_the_input_is_there_before_the_nets_have_run(view: AttributionGuard) -> None:
    shown = np.frombuffer(view.picture["values"], "<f4").reshape(6, 6)
    np.testing.assert_array_equal(shown, data()[0][0, 0].numpy())
    assert view.maps == {}
    assert [m["name"] for m in view.choices["methods"]] == [
        "saliency",
        "integrated_gradients",
        "deeplift",
        "layer_gradcam",
    ]


def test_maps_are_those_of_the_plain_function(view: AttributionGuard) -> None:
    view.run().result()
    methods = ("saliency", "integrated_gradients", "deeplift", "layer_gradcam")
    expected = twins(*nets(), *data(), methods=methods, features=1, steps=8)
    for row, maps in zip(view.maps["rows"], (expected.float_net, expected.quantized_net), strict=True):
        assert row["difference"] == pytest.approx(maps.difference[0])
        for cell, reference in zip(row["cells"], (maps.ablation, *(m.scores for m in maps.maps)), strict=True):
            np.testing.assert_allclose(np.frombuffer(cell["scores"], "<f4"), reference[0], rtol=1e-6)
        for cell, m in zip(row["cells"][1:], maps.maps, strict=True):
            assert (cell["explains"], cell["verdict"]) == (m.explains, m.verdict.word)
            assert list(cell["zeros"]) == list(m.zeros[0])
    assert [c["explains"] for c in view.maps["rows"][1]["cells"]] == [
        "deployed",
        "surrogate",
        "surrogate",
        "deployed",
        "surrogate",
    ]
    assert view.maps["best"] == expected.quantized_net.best(0)
    assert view.caption == expected.summary()
    assert sum(len(c["scores"]) for r in view.maps["rows"] for c in r["cells"]) < 2**20
    assert view.status["phase"] == "idle"


def test_what_is_sent_is_json_beside_the_bytes(view: AttributionGuard) -> None:
    view.run().result()
    json.dumps(view.maps, default=lambda b: len(b), allow_nan=False)
    json.dumps(view.choices, allow_nan=False)


def test_another_example_is_shown_at_once_and_another_patch_is_computed(view: AttributionGuard) -> None:
    view.run().result()
    assert view.choose(example=3) is None
    assert (view.maps["example"], view.maps["target"]) == (3, 1)
    job = view.choose(patch=2)
    assert job is not None
    assert view.maps == {} or view.twins is not None
    job.result()
    assert view.twins is not None
    assert view.twins.quantized_net.ablation.shape == (5, 9)


def test_a_stopped_run_keeps_exact_ablation(view: AttributionGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> Any:
        partial = next(u for u in twinning(*nets(), *data(), features=1, steps=2) if u.value is not None)
        yield partial
        while True:
            yield Update(0.5, "more")

    from qlab.diagnose import attribution_twins

    twinning = attribution_twins.twinning
    monkeypatch.setattr(attribution_twins, "twinning", slow)
    job = view.run()
    while job.value is None:
        job.wait(0.01)
    view.stop()
    job.wait(60)
    assert job.status == "cancelled"
    assert [c["method"] for c in view.maps["rows"][0]["cells"]] == ["exact"]
    assert "Stopped" in view.status["text"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"type": "dance"},
        {"type": "choose", "example": "a"},
        {"type": "choose", "example": 99},
        {"type": "choose", "example": True},
        {"type": "choose", "patch": 3},
    ],
)
def test_messages_that_mean_nothing_are_told_and_change_nothing(view: AttributionGuard, content: Any) -> None:
    before = dict(view.settings)
    view._on_message(view, content, [])
    assert view.status["error"]
    assert view.settings == before
    message(view, type="choose", example=1)
    assert "error" not in view.status


def test_state_gives_the_same_view_again(view: AttributionGuard) -> None:
    view.choose(example=4)
    again = AttributionGuard.from_state(json.dumps(view.state()), *nets(), *data(), steps=8)
    assert again.settings == view.settings
    assert len(json.dumps(view.state())) < 300
    for wrong in (
        {"widget": "AttributionGuard"},
        {**view.state(), "version": True},
        {**view.state(), "widget": "x"},
        "{",
    ):
        with pytest.raises(InputError):
            AttributionGuard.from_state(wrong, *nets(), *data())


def test_the_static_twin_is_a_picture_with_words(view: AttributionGuard) -> None:
    assert "image/png" not in view._repr_mimebundle_()[0]
    view.figure()
    bundle, metadata = view._repr_mimebundle_()
    assert len(bundle["image/png"]) < 400_000
    assert "SURROGATE" in metadata["image/png"]["alt"]
    assert "AttributionGuard" in bundle["text/plain"]


def test_what_cannot_be_attributed_is_refused_before_anything_is_shown() -> None:
    x, y = data()
    with pytest.raises(InputError, match="training mode"):
        AttributionGuard(nets()[0].train(), nets()[1], x, y)
    with pytest.raises(InputError, match="classes 0 to 2"):
        AttributionGuard(*nets(), x, 3)
    with pytest.raises(InputError, match="at most 64"):
        AttributionGuard(*nets(), torch.rand(65, 1, 6, 6), 1)
    with pytest.raises(InputError, match="patch"):
        AttributionGuard(*nets(), x, y, patch=3)
    with pytest.raises(InputError, match="patch=1, 2 or 4"):
        AttributionGuard(*nets(), x, y, features=2)
    with pytest.raises(UnknownNameError):
        AttributionGuard(*nets(), x, y, methods=("lime",))
