"""A training run as snapshots: its curves, its histogram, stop and resume."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import qlab
from qlab.errors import InputError
from qlab.jobs import Job
from qlab.live import Snapshot, _forget_validation, _reporter, training, weight_histogram

LONG = 120.0


class Weights:
    """A stand-in for a method: just weights."""

    def __init__(self, latent: list[float], hard: list[float] | None = None) -> None:
        self.latent = {"layer": torch.tensor(latent)}
        self.hard = {} if hard is None else {"layer": torch.tensor(hard)}

    def latent_weights(self) -> dict[str, torch.Tensor]:
        return self.latent

    def hard_weights(self) -> dict[str, torch.Tensor]:
        return self.hard


def make() -> tuple[Any, Any]:
    data = qlab.data.load("two_moons", batch_size=64)
    net = qlab.build("mlp", data.input_shape, data.num_classes, seed=0)
    return qlab.methods.create("binary_connect", net), data


def weights(method: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items() if isinstance(tensor, torch.Tensor)}


def run_to_the_end(epochs: int, **options: Any) -> Snapshot:
    method, data = make()
    snapshots = [u.value for u in training(method, data, epochs=epochs, every=0.0, **options) if u.value is not None]
    return snapshots[-1]


def test_histogram_counts_every_finite_weight_once() -> None:
    values = np.random.default_rng(0).normal(size=1000).tolist()
    histogram = weight_histogram(Weights([*values, float("nan"), float("inf")], [1.0] * 1002))
    assert histogram.counts.sum() == 1000
    expected, _ = np.histogram(np.float32(values), histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    np.testing.assert_array_equal(histogram.levels, [1.0])


def test_histogram_of_far_latent_weights_has_logarithmic_bins_and_loses_none() -> None:
    values = [*np.linspace(-8000, 8000, 501).tolist(), 0.5, -0.5]
    histogram = weight_histogram(Weights(values, [-1.0, 1.0] * 251 + [1.0]))
    assert histogram.counts.sum() == len(values)
    widths = np.diff(histogram.edges)
    assert widths.max() > 100 * widths.min()
    np.testing.assert_allclose(histogram.edges, -histogram.edges[::-1])
    np.testing.assert_array_equal(histogram.levels, [-1.0, 1.0])


def test_histogram_of_a_float_net_has_no_levels() -> None:
    histogram = weight_histogram(Weights([0.1, 0.2, -0.3]))
    assert histogram.counts.sum() == 3
    assert len(histogram.levels) == 0


def test_histogram_of_many_distinct_deployed_values_has_no_levels() -> None:
    values = np.linspace(-1, 1, 100).tolist()
    assert len(weight_histogram(Weights(values, values)).levels) == 0


def test_training_ends_with_a_completed_run_and_all_curves() -> None:
    snapshot = run_to_the_end(3)
    assert snapshot.run is not None
    assert snapshot.run.completed
    assert snapshot.epoch == 3.0
    steps, _ = snapshot.history["val/acc"]
    assert len(steps) == 3
    assert steps[-1] == snapshot.step
    for metric in ("train/loss", "val/loss", "val/acc_latent", "quant/flip_ratio"):
        steps, values = snapshot.history[metric]
        assert len(steps) == len(values) >= 3
        assert (np.diff(steps) >= 0).all()


def test_curves_hold_each_epochs_validation_once_and_agree_with_the_runs_history() -> None:
    snapshot = run_to_the_end(3)
    assert snapshot.run is not None
    for metric in ("val/acc", "quant/flip_ratio"):
        history = snapshot.run.history
        recorded = history[history["metric"] == metric]["value"].to_numpy()
        np.testing.assert_allclose(snapshot.history[metric][1], recorded, rtol=1e-6)


def test_training_equals_fit_bit_for_bit() -> None:
    method, data = make()
    run = qlab.fit(method, data, epochs=2, progress=False)
    snapshot = run_to_the_end(2)
    assert snapshot.run is not None
    live = weights(snapshot.run.method)
    for name, tensor in weights(run.method).items():
        assert torch.equal(tensor, live[name]), name


def test_a_stopped_run_resumes_to_the_bits_of_an_uninterrupted_one() -> None:
    whole = run_to_the_end(6)
    method, data = make()
    far_enough = threading.Event()

    def listen(job: Job) -> None:
        if job.value is not None and job.value.step >= 20:
            far_enough.set()
            job.cancel()

    job = Job(lambda: training(method, data, epochs=6, every=0.0), listen).start()
    assert job.wait(LONG)
    assert far_enough.is_set()
    assert job.status == "cancelled"
    partial = job.value
    assert partial.run is not None
    assert not partial.run.completed
    assert 20 <= partial.step < whole.step

    method, data = make()
    resumed = run_to_the_end(6, resume=partial.run, before=partial)
    assert whole.run is not None
    assert resumed.run is not None
    assert resumed.run.completed
    assert resumed.step == whole.step
    expected = weights(whole.run.method)
    for name, tensor in weights(resumed.run.method).items():
        assert torch.equal(tensor, expected[name]), name
    steps, _ = resumed.history["train/loss"]
    assert (np.diff(steps) >= 0).all()
    assert steps[0] == partial.history["train/loss"][0][0]


def test_a_validation_broken_off_by_a_stop_leaves_no_value() -> None:
    method, _ = make()
    data = qlab.data.load("two_moons", batch_size=16)  # several validation batches
    stop = threading.Event()
    inbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    seen: list[int] = []

    class StopInSecondValidation(pl.Callback):
        def on_validation_batch_start(
            self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
        ) -> None:
            if trainer.current_epoch == 1:
                seen.append(batch_idx)
                if batch_idx == 2:
                    stop.set()

    callbacks = [StopInSecondValidation(), _reporter(inbox, stop, 0.0)]
    run = qlab.fit(method, data, epochs=5, callbacks=callbacks, progress=False)
    assert not run.completed
    assert seen == [0, 1, 2]
    posted = [inbox.get() for _ in range(inbox.qsize())]
    (step,) = [payload for kind, payload in posted if kind == "broken"]
    recorded = [payload[1] for kind, payload in posted if kind == "metrics"]
    measured = [metrics["val/acc"] for metrics in recorded if "val/acc" in metrics]
    assert len(measured) == 1
    before = run.history
    _forget_validation(run, step)
    kept = run.history[run.history["metric"] == "val/acc"]["value"].tolist()
    assert kept == pytest.approx(measured)
    assert run.metrics["val/acc"] == pytest.approx(measured[0])
    assert len(before[before["metric"] == "val/acc"]) == 2
    assert (before["metric"] == "train/loss").sum() == (run.history["metric"] == "train/loss").sum()


def test_closing_the_generator_stops_the_training_thread() -> None:
    method, data = make()
    updates = training(method, data, epochs=10_000, every=0.0)
    for update in updates:
        if update.value is not None and update.value.step > 3:
            break
    updates.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "qlab-training" and t.is_alive()]


def test_an_error_of_the_fit_is_raised_by_the_generator() -> None:
    method, data = make()
    with pytest.raises(InputError, match="epochs"):
        list(training(method, data, epochs=0))


def test_training_writes_nothing_into_the_working_folder_and_prints_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_to_the_end(1)
    assert list(tmp_path.iterdir()) == []
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
