"""`qlab diagnose`: findings of a checkpoint in words and as JSON, and one clear error for what is no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qlab
from qlab.cli import main
from tests.methods.conftest import moons, small_net


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    method = qlab.methods.create("ste", small_net(), activations="sign", keep=["first", "last"])
    run = qlab.fit(method, moons(), epochs=8, root=root, progress=False)
    return Path(run.checkpoint)


def test_both_nets_are_examined(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    assert main(["diagnose", str(checkpoint), "--data", "two_moons", "--json", str(target)]) == 0
    text = capsys.readouterr().out
    assert "deployed net" in text
    assert "training-time net" in text
    assert text.count("no alarm") == 2
    document = json.loads(target.read_text())
    assert set(document["nets"]) == {"deployed net", "training-time net"}
    assert all(net["healthy"] and net["accuracy"] > 0.7 for net in document["nets"].values())


def test_a_sick_net_is_no_error(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    state = content["state_dict"]
    weight = next(k for k in state if k.endswith("weight") and state[k].dim() == 2)
    state[weight][0, 0] = float("nan")
    sick, target = tmp_path / "sick.ckpt", tmp_path / "sick.json"
    torch.save(content, sick)
    assert main(["diagnose", str(sick), "--data", "two_moons", "--json", str(target)]) == 0
    text = capsys.readouterr().out
    assert "1. high  NaN weights in" in text
    assert "Try:" in text
    first = json.loads(target.read_text())["nets"]["training-time net"]["findings"][0]
    assert first["name"] == "NaN weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.ckpt", "--data", "two_moons"], "no such checkpoint"),
        (["{broken}", "--data", "two_moons"], "not a readable checkpoint"),
        (["{checkpoint}", "--data", "two_moon"], "Did you mean 'two_moons'"),
        (["{checkpoint}", "--data", "digits"], "choose the data set it was trained on"),
        (["{checkpoint}"], "say --data NAME"),
        (["{checkpoint}", "--data", "two_moons", "--json", "nowhere/found.json"], "cannot be written"),
        (["{checkpoint}", "--data", "two_moons", "--examples", "3"], "at least 16"),
    ],
)
def test_a_mistake_gives_one_clear_message(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(["diagnose", *(word.format(checkpoint=checkpoint, broken=broken) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
