"""The Studio without a browser: messages are played to it, and real small runs trained."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import InputError, QlabError

pytest.importorskip("anywidget")

from qlab.widgets import Studio
from qlab.widgets.records import MAX_SHOWN, Record

LONG = 120.0

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def make(**options: Any) -> Studio:
    """Return a Studio whose runs take a second."""
    return Studio(**({"data": "two_moons", "method": "binary_connect", "epochs": 2, "namespace": {}} | options))


def play(studio: Studio, **message: Any) -> None:
    """Send what the browser would send."""
    studio._handle_custom_msg(message, [])


def settle(studio: Studio) -> None:
    """Wait for the run, and for what was looked up beside it."""
    assert studio.wait(LONG)
    if studio._peek.job is not None:
        assert studio._peek.job.wait(LONG)


def train_until(studio: Studio, reached: Callable[[Any], bool]) -> None:
    """Start a run and stop it, by a message, as soon as a picture of it satisfies `reached`."""
    enough = threading.Event()
    studio.observe(lambda change: enough.set() if reached(change.new) else None, "live")
    play(studio, type="train", settings=studio.settings)
    assert enough.wait(LONG)
    play(studio, type="stop")
    assert studio.wait(LONG)


def points(live: Any, metric: str) -> int:
    return next((len(s["x"]) // 4 for s in live.get("series", ()) if s["metric"] == metric), 0)


@pytest.fixture(scope="module")
def trained() -> Studio:
    """A Studio with one finished run, not to be changed."""
    studio = make()
    play(studio, type="train", settings=studio.settings)
    settle(studio)
    return studio


def test_a_fresh_studio_is_on_screen_without_pytorch() -> None:
    code = (
        "import sys; from qlab.widgets import Studio; s = Studio(); s._repr_mimebundle_(); "
        "print(sorted({'torch', 'pytorch_lightning', 'pandas', 'matplotlib'} & set(sys.modules)), "
        "s.preview['kind'], bool(s.preview['pixels']), len(s.shelves['methods']) > 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] images True True"


def test_ready_loads_the_controls_of_the_method_and_the_examples_of_the_data() -> None:
    studio = make(method="ste")
    play(studio, type="ready")
    settle(studio)
    from qlab.methods import CATALOG, hyperparameters

    expected = [h.name for h in hyperparameters(CATALOG.load("ste")) if h.kind != "other" and h.name != "seed"]
    assert [item["name"] for item in studio.controls["items"]] == expected
    assert studio.preview["data"] == "two_moons"
    assert studio.preview["nets"] == ["mlp"]
    assert studio.preview["histogram"]["weights"] > 0
    assert studio.status["text"].startswith("Ready")


def test_a_run_goes_to_its_end(trained: Studio) -> None:
    assert trained.status["phase"] == "done"
    assert trained.run is not None
    assert trained.run.completed
    (row,) = trained.rows
    assert row["label"] == "A"
    assert row["acc"] == pytest.approx(trained.run.metrics["val/acc"])
    assert row["latent"] == pytest.approx(trained.run.metrics["val/acc_latent"])
    assert points(trained.live, "val/acc") == 2
    assert points(trained.live, "train/loss") >= 2


def test_the_caption_quotes_the_runs_numbers(trained: Studio) -> None:
    assert trained.run is not None
    assert f"{trained.run.metrics['val/acc']:.1%}" in trained.caption
    assert "epoch 2.0 of 2" in trained.caption
    assert "the most frequent class alone gives 50%" in trained.caption


def test_the_static_twin_is_a_picture_with_its_numbers_in_words(trained: Studio) -> None:
    data, metadata = trained._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert len(data["image/png"]) < 150_000
    assert data["text/plain"] == f"Studio. {trained.caption}"
    assert metadata["image/png"]["alt"] == trained.figure().get_label()
    assert "application/vnd.jupyter.widget-view+json" in data


def test_no_message_to_the_browser_comes_near_a_megabyte(trained: Studio) -> None:
    for name in trained.keys:
        value = trained.get_state([name])
        text = json.dumps(value, default=lambda buffer: "x" * len(buffer))
        assert len(text) < 200_000, name


def test_stop_keeps_a_run_and_resume_ends_where_an_uninterrupted_run_ends() -> None:
    size = {"epochs": 10, "batch_size": 16}  # 900 steps: the stop comes in the midst of them
    whole = make(**size)
    whole.train(wait=True)
    studio = make(**size)
    train_until(studio, lambda live: points(live, "val/acc") >= 1)
    assert studio.status["phase"] == "stopped"
    assert studio.status["resumable"]
    partial = studio.run
    assert partial is not None
    assert not partial.completed

    play(studio, type="resume", settings=studio.settings)
    settle(studio)
    assert studio.status["phase"] == "done"
    assert len(studio.rows) == 1
    assert studio.run is not None
    assert whole.run is not None
    expected = whole.run.method.state_dict()
    for name, tensor in studio.run.method.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, expected[name]), name
    assert points(studio.live, "val/acc") == points(whole.live, "val/acc") == 10


def test_stop_while_pytorch_data_and_net_are_loading_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = make()
    loading, gate = threading.Event(), threading.Event()

    def slow(settings: Any) -> Any:
        loading.set()
        gate.wait(LONG)
        raise AssertionError("dropped with the job")

    monkeypatch.setattr(studio, "_load", slow)
    play(studio, type="train")
    assert loading.wait(LONG)
    play(studio, type="stop")
    assert studio.wait(LONG)
    assert studio.status["phase"] == "cancelled"
    assert studio.run is None
    gate.set()


def test_runs_are_compared_side_by_side_and_hidden() -> None:
    studio = make(epochs=1)
    studio.train(wait=True)
    studio.configure(method="full_precision", seed=3)
    studio.train(wait=True)
    assert [r["label"] for r in studio.rows] == ["A", "B"]
    assert [r["differs"] for r in studio.rows] == ["seed=0", "seed=3"]
    assert {studio.live["label"], *(s["label"] for s in studio.shown)} == {"A", "B"}
    assert studio.rows[0]["slot"] != studio.rows[1]["slot"]
    play(studio, type="compare", labels=["A"])
    assert studio.live == {}
    assert [s["label"] for s in studio.shown] == ["A"]
    play(studio, type="compare", labels=["A", "B"])
    assert studio.live["label"] == "B"
    assert len(studio.figure().axes) == 4
    play(studio, type="compare", labels=["Z"])
    assert "no run 'Z'" in studio.status["error"]
    assert list(studio.runs) == ["A", "B"]


def test_more_runs_than_colours_hide_the_oldest() -> None:
    studio = make()
    for i in range(MAX_SHOWN + 2):
        record = Record(chr(ord("A") + i), studio._settings, phase="done")
        studio._records.append(record)
        studio._show(record)
    assert [r.slot is not None for r in studio._records] == [False] * 2 + [True] * MAX_SHOWN
    assert len({r.slot for r in studio._visible}) == MAX_SHOWN
    play(studio, type="compare", labels=[r.label for r in studio._records])
    assert "at most 6" in studio.status["error"]


def test_a_run_is_sent_to_the_notebook(trained: Studio) -> None:
    play(trained, type="send", run="A", name="mine")
    assert trained._namespace == {"mine": trained.run}
    assert trained.status["about"] == "send"
    assert "variable mine" in trained.status["text"]
    assert trained.send() == "run"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"run": "A", "name": "1x"}, "cannot be a variable"),
        ({"run": "B", "name": "x"}, "choose one of A"),
        ({"run": "A", "name": ["x"]}, "expected a text"),
        ({"run": {}, "name": "x"}, "choose one of A"),
    ],
)
def test_what_cannot_be_sent_is_told(trained: Studio, message: dict[str, Any], expected: str) -> None:
    play(trained, type="send", **message)
    assert expected in trained.status["error"]


def test_without_a_notebook_sending_says_where_the_run_is() -> None:
    studio = make(namespace=None)
    with pytest.raises(InputError, match="no trained run"):
        studio.send()


def test_a_bad_hyperparameter_is_one_clear_message_without_a_traceback() -> None:
    studio = make()
    play(studio, type="train", settings=studio.settings | {"hyper": {"lr": "fast"}})
    settle(studio)
    assert studio.status["phase"] == "failed"
    assert studio.status["error"] == "lr is 'fast'; expected a finite number such as 0.01 or 3e-4."
    assert studio.status["detail"] == ""
    play(studio, type="train", settings=studio.settings | {"hyper": {"learning_rate": 1}})
    settle(studio)
    assert "unknown hyperparameter of binary_connect 'learning_rate'" in studio.status["error"]


def test_a_net_that_does_not_fit_the_data_is_one_clear_message() -> None:
    studio = make(net="resnet20")
    play(studio, type="train")
    settle(studio)
    assert studio.status["phase"] == "failed"
    assert studio.status["error"]
    assert studio.status["detail"] == ""


def test_a_bug_is_shown_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = make()

    def broken(settings: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(studio, "_load", broken)
    play(studio, type="train")
    settle(studio)
    assert studio.status["error"] == "ZeroDivisionError: a bug"
    assert "in broken" in studio.status["detail"]


def test_an_error_stays_while_the_controls_are_loaded_and_goes_with_the_next_good_setting() -> None:
    studio = make()
    job = studio.look()
    play(studio, type="settings", settings=studio.settings | {"epochs": "many"})
    assert job.wait(LONG)
    settle(studio)
    assert "epochs is 'many'" in studio.status["error"]
    play(studio, type="settings", settings=studio.settings | {"epochs": 3})
    assert "error" not in studio.status
    assert studio.settings["epochs"] == 3


def test_a_second_train_while_one_is_running_is_refused() -> None:
    studio = make(epochs=1000)
    enough = threading.Event()
    studio.observe(lambda change: enough.set(), "live")
    studio.train()
    assert enough.wait(LONG)
    with pytest.raises(InputError, match="still training"):
        studio.train()
    play(studio, type="resume")
    assert "still training" in studio.status["error"]
    studio.stop()
    assert studio.wait(LONG)


def test_hyperparameters_reach_the_method() -> None:
    studio = make(epochs=1, stochastic=True, lr="2e-3", keep=["last"])
    studio.train(wait=True)
    assert studio.run is not None
    hparams = studio.run.method.hparams
    assert (hparams.stochastic, hparams.lr, hparams.keep) == (True, 2e-3, ["last"])


def test_a_root_folder_gets_one_folder_per_run(tmp_path: Any) -> None:
    studio = make(epochs=1, root=tmp_path)
    studio.train(wait=True)
    studio.train(wait=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B"]
    assert (tmp_path / "B" / "checkpoint.ckpt").is_file()


def test_state_is_small_and_gives_the_same_view_again() -> None:
    studio = make(epochs=7, lr="0.5")
    studio.configure(name="other", guess=12)
    text = json.dumps(studio.state())
    assert len(text) < 2000
    again = Studio.from_state(text)
    assert again.state() == studio.state()
    assert again.settings == studio.settings
    settle(again)


@given(JSON | st.text(max_size=300) | st.binary(max_size=100))
@settings(max_examples=200, deadline=None)
def test_any_other_state_is_an_input_error(state: Any) -> None:
    with pytest.raises(InputError):
        Studio.from_state(state)


@given(st.sampled_from(["widget", "version", "settings"]), JSON)
@settings(max_examples=100, deadline=None)
def test_a_state_with_one_hostile_part_is_an_input_error_or_a_studio(part: str, value: Any) -> None:
    state = {"widget": "Studio", "version": 1, "settings": {}} | {part: value}
    try:
        studio = Studio.from_state(state)
    except InputError:
        return
    assert Studio.from_state(studio.state()).state() == studio.state()


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_no_message_from_the_browser_raises_into_the_kernel(content: Any) -> None:
    studio = make()
    studio._on_message(studio, content, [])
    assert studio.status["error"]
    assert studio._records == []


@given(
    st.sampled_from(["stop", "resume", "compare", "send", "settings"]),
    st.dictionaries(st.text(max_size=3), JSON),
    JSON,
    JSON,
)
@settings(max_examples=200, deadline=None)
def test_no_known_message_with_odd_contents_is_a_bug(kind: str, more: Any, first: Any, second: Any) -> None:
    studio = make()
    studio._records.append(Record("A", studio._settings, phase="done"))
    studio._on_message(
        studio, more | {"labels": first, "run": first, "name": second, "settings": second, "type": kind}, []
    )
    assert not studio.status.get("detail")
    settle(studio)


def test_traits_set_by_the_browser_change_no_settings() -> None:
    studio = make()
    before = studio.state()
    studio.set_state({"settings": {"data": "<script>"}, "status": {"phase": "training"}, "rows": [{"label": "X"}]})
    assert studio.state() == before
    assert studio.runs == {}


def test_a_setting_out_of_range_changes_nothing() -> None:
    studio = make()
    before = studio.state()
    with pytest.raises(QlabError, match="epochs"):
        studio.configure(epochs=0)
    with pytest.raises(QlabError, match="unknown field"):
        studio.configure(epoch=3)
    assert studio.state() == before


def test_the_histogram_moves_while_the_net_trains() -> None:
    studio = make(epochs=8)
    pictures: list[bytes] = []
    studio.observe(
        lambda change: pictures.append(change.new["histogram"]["share"]) if change.new.get("histogram") else None,
        "live",
    )
    studio.train(wait=True)
    assert len(set(pictures)) >= 2
    share = np.frombuffer(studio.live["histogram"]["share"], "<f4")
    assert share.sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(np.frombuffer(studio.live["histogram"]["levels"], "<f4"), [-1.0, 1.0])
