"""Runs at paper scale in pieces: every arm trains, pieces add up to the uninterrupted run, the record says what was done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import qlab
from qlab.errors import InputError, UnknownNameError
from qlab.experiments import paper_scale
from qlab.experiments.paper_scale import ARMS, StopAfter, main, piece
from qlab.methods import CATALOG, hyperparameters
from qlab.quantizers import layers

TINY: dict[str, Any] = {"subset": 60, "batch_size": 20}
FAST = ("askewsgd-vgg16", "binary_connect-resnet18")


def small(monkeypatch: pytest.MonkeyPatch, arm: str, epochs: int | None = None) -> None:
    """Make the arm's net narrow and, where it is to end, the run short."""
    settings = dict(ARMS[arm])
    narrow = {"width": 4} | ({"hidden": [8]} if settings["net"] == "vgg16" else {})
    settings |= {"net_options": settings["net_options"] | narrow}
    settings |= {} if epochs is None else {"epochs": epochs}
    monkeypatch.setitem(ARMS, arm, settings)


def run(arm: str, root: Path, **options: Any) -> dict[str, Any]:
    return piece(arm, root, **{"seconds": 1e6, "data": "digits", "data_options": TINY, "progress": False} | options)


def weights(root: Path, arm: str) -> dict[str, torch.Tensor]:
    state = torch.load(root / f"{arm}-seed0" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def ten_steps(arm: str, root: Path) -> None:
    record = run(arm, root, steps=10)
    assert record["steps"] == 10
    assert not record["completed"]
    assert record["total_steps"] == 3 * ARMS[arm]["epochs"]
    assert record["metrics"]["train/loss"] > 0
    untrained = qlab.build(ARMS[arm]["net"], (1, 8, 8), 10, seed=0, **ARMS[arm]["net_options"])
    trained = weights(root, arm)
    wrong = [k for k, v in trained.items() if not v.isfinite().all() and not k.endswith(".cap")]
    assert wrong == []
    assert len(trained) >= len(list(untrained.parameters()))


@pytest.mark.parametrize("arm", FAST)
def test_ten_steps_of_a_narrow_net(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, arm)
    ten_steps(arm, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in FAST and not arm.startswith("dir_net")])
def test_ten_steps_of_every_other_arm(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, arm)
    ten_steps(arm, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("net", paper_scale.NETS)
def test_ten_steps_of_dir_net_behind_its_teacher(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = f"full_precision-{net}"
    small(monkeypatch, teacher, epochs=1)
    small(monkeypatch, f"dir_net-{net}")
    with pytest.raises(InputError, match=f"complete the arm {teacher}"):
        run(f"dir_net-{net}", tmp_path)
    assert run(teacher, tmp_path)["completed"]
    ten_steps(f"dir_net-{net}", tmp_path)


@pytest.mark.parametrize("cut", [2, 3, 4])  # of 3 steps an epoch: within one, at its end, in the next
def test_pieces_give_the_bits_of_an_uninterrupted_run(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = FAST[0]
    small(monkeypatch, arm, epochs=2)
    whole = run(arm, tmp_path / "whole")
    first = run(arm, tmp_path / "cut", steps=cut)
    assert not first["completed"]
    second = run(arm, tmp_path / "cut")
    assert whole["completed"]
    assert second["completed"]
    a, b = weights(tmp_path / "whole", arm), weights(tmp_path / "cut", arm)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert second["metrics"]["test/acc"] == whole["metrics"]["test/acc"]
    assert [(p["from_step"], p["to_step"]) for p in second["pieces"]] == [(0, cut), (cut, 6)]


def test_record_says_what_was_run_where_and_for_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = FAST[0]
    small(monkeypatch, arm, epochs=2)
    devices = iter(["one GPU", "another GPU"])
    monkeypatch.setattr(paper_scale, "device_name", lambda: next(devices))
    run(arm, tmp_path, steps=3)
    record = run(arm, tmp_path)
    folder = tmp_path / f"{arm}-seed0"
    assert json.loads((folder / "result.json").read_text()) == record
    assert record["devices"] == ["one GPU", "another GPU"]
    assert [p["device"] for p in record["pieces"]] == record["devices"]
    assert record["seconds"] == pytest.approx(sum(p["seconds"] for p in record["pieces"]), abs=0.06)
    assert record["settings"]["options"]["lr"] == 0.06
    assert {"test/acc", "test/acc_latent", "train/loss"} <= set(record["metrics"])
    history = pd.read_csv(folder / "history.csv")
    assert (history["metric"] == "quant/flip_ratio").sum() == 2  # one for each epoch, over both pieces


def test_a_complete_run_is_not_touched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = FAST[0]
    small(monkeypatch, arm, epochs=1)
    record = run(arm, tmp_path)
    assert record["completed"]
    monkeypatch.setattr(qlab, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert run(arm, tmp_path) == record


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = FAST[0]
    small(monkeypatch, arm, epochs=2)
    run(arm, tmp_path, steps=1)
    with pytest.raises(InputError, match=r"other settings \(data_options\)"):
        run(arm, tmp_path, data_options=TINY | {"batch_size": 30})


def test_wrong_arm_and_wrong_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'askewsgd-vgg16'"):
        run("askewsgd-vgg", tmp_path)
    with pytest.raises(InputError, match="seconds=0"):
        run(FAST[0], tmp_path, seconds=0)


@pytest.mark.parametrize(("now", "step", "stops"), [(9.9, 5, False), (10.0, 5, True), (10.0, 6, False), (0.0, 3, True)])
def test_a_piece_ends_with_its_time_or_steps_but_not_on_the_last_step(now: float, step: int, stops: bool) -> None:
    trainer: Any = SimpleNamespace(global_step=0, estimated_stepping_batches=6, should_stop=False)
    callback = StopAfter(10.0, 3 if now == 0.0 else None, start=0.0, clock=lambda: now)
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step = step
    callback.on_train_batch_end(trainer)
    assert trainer.should_stop == stops


def test_command_runs_a_piece_and_reports_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = FAST[0]
    small(monkeypatch, arm, epochs=1)
    settings = ARMS[arm]
    monkeypatch.setitem(ARMS, arm, settings | {"data_options": settings["data_options"] | TINY})
    assert main([arm, "--root", str(tmp_path), "--data", "digits", "--seconds", "1000", "--quiet"]) == 0
    assert json.loads((tmp_path / f"{arm}-seed0" / "result.json").read_text())["completed"]
    assert main(["nothing", "--root", str(tmp_path)]) == 2
    assert "qlab: unknown arm 'nothing'" in capsys.readouterr().err.replace("Unknown", "unknown")


@pytest.mark.parametrize("arm", ARMS)
def test_settings_are_primitives_that_the_method_and_the_net_take(arm: str) -> None:
    settings = ARMS[arm]
    assert json.loads(json.dumps(settings)) == settings
    assert settings["options"].keys() <= {h.name for h in hyperparameters(CATALOG.load(settings["method"]))}
    with torch.device("meta"):
        net = qlab.build(settings["net"], (3, 32, 32), 10, **settings["net_options"])
    kept = [name for name in settings["options"].get("keep", []) if name not in ("first", "last")]
    pointwise = [name for name, layer in layers(net).items() if layer.weight.shape[2:] == (1, 1)]
    if settings["method"] == "dir_net":
        assert kept == pointwise


def test_epochs_of_mirror_descent_are_the_papers_100000_steps() -> None:
    for net in paper_scale.NETS:
        steps = ARMS[f"mirror_descent-{net}"]["epochs"] * paper_scale.STEPS_PER_EPOCH
        assert 100_000 <= steps < 100_000 + paper_scale.STEPS_PER_EPOCH
