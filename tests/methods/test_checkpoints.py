"""Checkpoints from strangers: no code runs, one clear error each."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qlab
from qlab.errors import CheckpointError, QlabError
from tests.methods.conftest import train


class Payload:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("ste", epochs=1).save(tmp_path_factory.mktemp("good")) / "checkpoint.ckpt"


@pytest.mark.parametrize("place", ["top", "hyper_parameters", "state_dict", "qlab"])
def test_code_hidden_in_a_checkpoint_never_runs(good: Path, tmp_path: Path, place: str) -> None:
    content = torch.load(good, weights_only=True)
    mark = tmp_path / "mark"
    (content if place == "top" else content[place])["evil"] = Payload(mark)
    path = tmp_path / "evil.ckpt"
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="never executes"):
        qlab.load(path)
    with pytest.raises(CheckpointError, match="never executes"):
        train("ste", resume=path)
    assert not mark.exists()
    assert path.read_bytes() == before


def test_the_payload_of_these_tests_would_run_if_it_were_let(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    path.write_bytes(pickle.dumps({"qlab": Payload(tmp_path / "mark")}))
    with pytest.raises(CheckpointError):
        qlab.load(path)
    assert not (tmp_path / "mark").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt: there is no such"):
        qlab.load(tmp_path / "nowhere.ckpt")


def test_torch_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="names no method"):
        qlab.load(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        {"qlab": {"method": "no_such_method"}},
        {"qlab": {"method": "os:system"}},
        {"hyper_parameters": None},
        {"hyper_parameters": {"net": {"name": "mlp"}}},
        {"hyper_parameters": {"net": {"name": "mlp", "input_shape": [2], "num_classes": 2, "hidden": [10**9, 10**9]}}},
        {"hyper_parameters": {"net": {"name": "mlp", "input_shape": [2], "num_classes": 2}, "surprise": 1}},
        {"state_dict": {}},
    ],
)
def test_content_that_does_not_fit_is_one_error(good: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "changed.ckpt"
    torch.save(torch.load(good, weights_only=True) | change, path)
    with pytest.raises(QlabError):
        qlab.load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_only_our_error(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(1, 8))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(bytes(raw))
    with contextlib.suppress(QlabError):
        qlab.load(path)
