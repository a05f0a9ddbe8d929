"""A run records what it did, stops cleanly, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch

import qlab
from qlab.callbacks import FlipRatio
from qlab.errors import CheckpointError, InputError, UnknownNameError
from qlab.methods import create
from tests.methods.conftest import moons, small_net, train


def test_names_are_enough(capfd: pytest.CaptureFixture[str]) -> None:
    run = qlab.fit("ste", "two_moons", epochs=1, progress=False)
    assert run.completed
    assert run.config["method"] == "ste"
    assert run.config["data"] == "two_moons"
    assert "two_moons" in repr(run)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_nothing_is_written_without_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train("ste", epochs=1)
    assert list(tmp_path.iterdir()) == []
    folder = run.checkpoint.parent
    assert folder.exists()
    del run
    assert not folder.exists()


def test_root_holds_checkpoint_history_and_record(tmp_path: Path) -> None:
    run = train("adaste", root=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.ckpt", "history.csv", "run.json"}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["seed"] == 0
    assert record["config"]["hyperparameters"]["mode"] == "derived"
    assert {"qlab", "torch", "pytorch-lightning", "python"} <= set(record["versions"])
    assert record["metrics"] == run.metrics
    assert pd.read_csv(tmp_path / "history.csv").shape == run.history.shape


def test_history_is_tidy_and_ends_with_the_metrics() -> None:
    run = train("ste", epochs=3)
    assert list(run.history.columns) == ["step", "epoch", "metric", "value"]
    val = run.history.query("metric == 'val/acc'")
    assert list(val.epoch) == [0, 1, 2]
    assert val.value.iloc[-1] == run.metrics["val/acc"]


def test_finished_run_goes_on_to_more_epochs() -> None:
    """With constant rates, two epochs and two more are four, bit for bit."""

    def fresh() -> Any:
        return create("ste", small_net(), lr_schedule="constant")

    whole = train("ste", method=fresh(), epochs=4)
    half = train("ste", method=fresh(), epochs=2)
    rest = train("ste", method=fresh(), epochs=4, resume=half)
    for a, b in zip(whole.method.parameters(), rest.method.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(rest.history.query("metric == 'val/acc'").epoch) == [0, 1, 2, 3]


def test_interrupt_keeps_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    part = train("ste", epochs=3, callbacks=[Interrupt()])
    assert not part.completed
    assert signal.getsignal(signal.SIGINT) is before
    rest = train("ste", epochs=3, resume=part)
    whole = train("ste", epochs=3)
    assert rest.metrics["test/acc"] == whole.metrics["test/acc"]


def test_stopped_run_has_a_checkpoint_that_loads() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    run = train("ste", epochs=3, callbacks=[Stop()])
    assert qlab.load(run.checkpoint).steps == 1
    assert "test/acc" not in run.metrics


def test_wrong_input_is_said_in_one_error() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'adaste'"):
        qlab.fit("adast", "digits")
    with pytest.raises(UnknownNameError, match="digits"):
        qlab.fit("ste", "digit")
    with pytest.raises(UnknownNameError, match="model"):
        qlab.fit("ste", "two_moons", net="mlq")
    with pytest.raises(InputError, match="epochs"):
        qlab.fit("ste", "two_moons", epochs=0)
    with pytest.raises(InputError, match="net="):
        qlab.fit(create("ste", small_net()), "two_moons", net="mlp")
    with pytest.raises(InputError, match="expected"):
        qlab.fit(create("ste", small_net()), "digits", epochs=1, progress=False)
    with pytest.raises(CheckpointError, match="no such"):
        qlab.fit("ste", "two_moons", epochs=1, progress=False, resume="nowhere.ckpt")


def test_run_without_an_end_is_refused() -> None:
    trainer = pl.Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.raises(InputError, match="needs an end"):
        trainer.fit(create("ste", small_net()), moons())


def test_deterministic_flag_is_given_back() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    train("ste", epochs=1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_flip_ratio_counts_the_weights_that_changed_level() -> None:
    class Recount(pl.Callback):
        def __init__(self) -> None:
            self.before: dict[str, torch.Tensor] = {}
            self.ratios: list[float] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.before = {k: v.sign() for k, v in pl_module.latent_weights().items()}

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            now = {k: v.sign() for k, v in pl_module.latent_weights().items()}
            flips = sum(int((now[k] != self.before[k]).sum()) for k in now)
            self.ratios.append(flips / sum(v.numel() for v in now.values()))

    recount = Recount()
    run = train("binary_connect", epochs=3, callbacks=[recount, FlipRatio()])
    logged = run.history.query("metric == 'quant/flip_ratio'").value
    assert list(logged) == pytest.approx(recount.ratios)
    assert max(recount.ratios) > 0
    per_layer = {m for m in run.history.metric if m.startswith("quant/flip_ratio/")}
    assert per_layer == {f"quant/flip_ratio/{name}" for name in run.method.hard_weights()}
