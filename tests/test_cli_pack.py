"""`qlab pack`: a checkpoint becomes a packed net that gives the deployed net's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qlab
from qlab.cli import main
from tests.methods.conftest import moons, small_net


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, qlab.Run]:
    """Return a checkpoint of a small binary net, and its run."""
    root = tmp_path_factory.mktemp("run")
    method = qlab.methods.create("ste", small_net(), activations="sign", keep=["first", "last"])
    run = qlab.fit(method, moons(), epochs=1, root=root, progress=False)
    assert run.checkpoint is not None
    return Path(run.checkpoint), run


def test_packed_net_on_disk_gives_the_bits_of_the_deployed_net(
    trained: tuple[Path, qlab.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, run = trained
    target = tmp_path / "net.safetensors"
    assert main(["pack", str(checkpoint), "--out", str(target)]) == 0
    text = capsys.readouterr().out
    assert "1 on bits" in text
    assert "They are the bits of the original net." in text
    packed = qlab.binary.load(target)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed(x), run.deployed(x))
    assert packed.certificate is not None
    assert packed.certificate.exact


def test_target_stands_beside_the_checkpoint_unless_it_is_named(trained: tuple[Path, qlab.Run]) -> None:
    checkpoint, _ = trained
    assert main(["pack", str(checkpoint), "--data", "two_moons"]) == 0
    assert checkpoint.with_suffix(".safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{checkpoint}", "--out", "nowhere/net.safetensors"], "cannot be written"),
        (["nothing.ckpt"], "no such checkpoint"),
        (["{checkpoint}", "--data", "digit"], "Did you mean 'digits'"),
        (["{checkpoint}", "--data", "digits"], "choose the data set it was trained on"),
    ],
)
def test_a_mistake_gives_one_clear_message(
    arguments: list[str], message: str, trained: tuple[Path, qlab.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", *(word.format(checkpoint=trained[0]) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
