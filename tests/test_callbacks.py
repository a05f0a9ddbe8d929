"""Callbacks report what happened, change nothing of the training, and go on after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

import qlab
from qlab.callbacks import AnnealLog, BitHistory, MismatchProbe
from qlab.diagnose.coordinates import coordinate_cosine
from qlab.diagnose.history import History
from qlab.errors import InputError
from qlab.methods import create
from qlab.quantizers import harden
from qlab.runs import quiet
from tests.methods.conftest import moons, small_net, train


class Watch(pl.Callback):
    """Writes down the hard weights after every step, one by one."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def note(self, module: Any) -> None:
        self.seen.append({k: v.clone() for k, v in module.hard_weights().items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.note(pl_module)


@pytest.mark.parametrize("name", ["binary_connect", "adaste"])
def test_the_history_gives_back_the_hard_weights_of_every_step(name: str, tmp_path: Path) -> None:
    watch, bits = Watch(), BitHistory(path=tmp_path / "bits.npz")
    train(name, epochs=2, callbacks=[watch, bits])
    history = bits.history
    assert history.steps.tolist() == list(range(len(watch.seen)))
    for step, weights in enumerate(watch.seen):
        found = history.at(step)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[k], w) for k, w in weights.items())
    assert np.array_equal(History.load(tmp_path / "bits.npz").words, history.words)


def test_a_history_goes_on_after_a_resume() -> None:
    def fresh() -> Any:
        return create("binary_connect", small_net(), lr_schedule="constant")

    whole, first, second = BitHistory(), BitHistory(), BitHistory()
    train("binary_connect", method=fresh(), epochs=4, callbacks=[whole])
    half = train("binary_connect", method=fresh(), epochs=2, callbacks=[first])
    train("binary_connect", method=fresh(), epochs=4, resume=half, callbacks=[second])
    assert second.history.steps.tolist() == whole.history.steps.tolist()
    assert np.array_equal(second.history.words, whole.history.words)


def test_probes_change_nothing_of_the_training() -> None:
    bare = train("ste", epochs=3)
    probes = [BitHistory(), MismatchProbe(every=5), AnnealLog()]
    state = torch.get_rng_state()
    watched = train("ste", epochs=3, callbacks=probes)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(bare.method.state_dict().items(), watched.method.state_dict().items(), strict=True):
        if isinstance(a[1], Tensor):
            assert torch.equal(a[1], b[1])
    shared = bare.history.query("metric != 'train/loss'").reset_index(drop=True)
    kept = watched.history[watched.history.metric.isin(set(shared.metric))].reset_index(drop=True)
    assert shared.equals(kept)


def test_the_probe_logs_the_cosine_of_one_layer_in_turn() -> None:
    kept: list[tuple[Any, Tensor, Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step % 4 == 0:
                kept.append((harden(pl_module.net), batch[0][:16], batch[1][:16]))

    run = train("ste", epochs=2, callbacks=[Keep(), MismatchProbe(every=4, weights=10_000, examples=16)])
    rows = run.history[run.history.metric.str.startswith("quant/mismatch/")]
    layers = list(run.method.hard_weights())
    assert [m.removeprefix("quant/mismatch/") for m in rows.metric] == [
        layers[i % len(layers)] for i in range(len(kept))
    ]
    assert list(rows.step) == [4 * (i + 1) - 1 for i in range(len(kept))]
    for (net, x, y), value, metric in zip(kept, rows.value, rows.metric, strict=True):
        w = net.get_submodule(metric.removeprefix("quant/mismatch/")).weight  # the reference: one flip after the other
        beta = 1 / max(1.0, float(net(x).detach().std()))
        (g,) = torch.autograd.grad(F.cross_entropy(beta * net(x), y), w)
        flips = torch.zeros_like(w)
        with torch.no_grad():
            for i in range(w.numel()):
                before = float(w.view(-1)[i])
                ends = []
                for sign in (1.0, -1.0):
                    w.view(-1)[i] = sign
                    ends.append(F.cross_entropy(beta * net(x), y))
                w.view(-1)[i] = before
                flips.view(-1)[i] = (ends[0] - ends[1]) / 2
        assert value == pytest.approx(float(F.cosine_similarity(g.flatten(), flips.flatten(), dim=0)), abs=1e-3)


def test_the_cosine_of_a_linear_function_is_one() -> None:
    net = torch.nn.Linear(6, 2, bias=False).double()
    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(9, dtype=torch.int64)
    tiny = coordinate_cosine(
        net, x, y, "weight", signs=False, count=12, generator=torch.Generator().manual_seed(0), beta=1e-6
    )
    assert tiny == pytest.approx(1, abs=1e-6)


def test_scheduled_quantities_are_those_in_force() -> None:
    seen: dict[int, float] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            total = trainer.estimated_stepping_batches
            seen[trainer.global_step - 1] = pl_module.schedule((trainer.global_step - 1) / total)["mu"]

    run = train("adaste", epochs=2, callbacks=[Look(), AnnealLog(every=3)])
    rows = run.history.query("metric == 'quant/anneal/mu'")
    assert len(rows) >= 5
    for step, value in zip(rows.step, rows.value, strict=True):
        assert (step + 1) % 3 == 0
        assert value == pytest.approx(seen[step])
    assert "quant/anneal/lr" in set(run.history.metric)
    assert run.metrics["quant/anneal/mu"] == pytest.approx(rows.value.iloc[-1])


def test_a_float_net_is_silent() -> None:
    bits = BitHistory()
    run = train("full_precision", epochs=1, callbacks=[bits, MismatchProbe(every=2)])
    assert not any(m.startswith("quant/mismatch") for m in run.history.metric)
    with pytest.raises(InputError, match="nothing is recorded"):
        _ = bits.history


def test_checkpoints_hold_tensors_and_primitives_only(tmp_path: Path) -> None:
    run = train("ste", epochs=1, root=tmp_path, callbacks=[BitHistory(), MismatchProbe(every=3), AnnealLog()])
    content = torch.load(run.checkpoint, weights_only=True)
    assert any("BitHistory" in key for key in content["callbacks"])
    assert qlab.load(run.checkpoint).steps == run.method.steps


def test_any_trainer_and_logger_will_do(tmp_path: Path) -> None:
    method = create("ste", small_net())
    with quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            logger=CSVLogger(tmp_path, name="", version=0),
            callbacks=[BitHistory(), MismatchProbe(every=3), AnnealLog(every=2)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
            accelerator="cpu",
        )
        trainer.fit(method, datamodule=moons())
    rows = pd.read_csv(tmp_path / "version_0" / "metrics.csv")
    assert rows.filter(like="quant/mismatch/").notna().any(axis=None)
    # Of two batches that are accumulated the first ends before any step: nothing is logged of it.
    assert rows.loc[rows["quant/anneal/lr"].notna(), "step"].tolist() == list(range(1, int(trainer.global_step), 2))


@pytest.mark.parametrize("make", [BitHistory, MismatchProbe, AnnealLog])
def test_a_distance_that_is_not_positive_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match="every"):
        make(every=0)
    with pytest.raises(InputError, match="limit_mb"):
        BitHistory(limit_mb=0)
