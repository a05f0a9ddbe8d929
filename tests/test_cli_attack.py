"""`qlab attack`: what is left of a checkpoint's net, in words, as a page and as JSON, never without the panel's verdict."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qlab
from qlab.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    data = qlab.data.load("digits")
    net = qlab.build("mlp", data.input_shape, data.num_classes, hidden=[32], seed=0)
    run = qlab.fit(qlab.methods.create("full_precision", net), data, epochs=6, root=root, progress=False)
    return Path(run.checkpoint)


@pytest.fixture(scope="module")
def attacked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Path]:
    folder = tmp_path_factory.mktemp("report")
    page, document = folder / "report.html", folder / "report.json"
    words = ["attack", str(checkpoint), "--data", "digits", "--suite", "quick", "--eps", "0.05,0.2", "--samples", "40"]
    status = main([*words, "--html", str(page), "--json", str(document)])
    return status, page, document


def test_an_ordinary_float_net_is_attacked_and_its_gradients_are_believed(attacked: tuple[int, Path, Path]) -> None:
    status, _, path = attacked
    document = json.loads(path.read_text())
    assert status == 0
    assert document["complete"]
    first, second = document["robust_accuracy"]
    assert first["eps"] == 0.05
    assert first["low"] <= first["accuracy"] <= first["high"] <= 1
    assert second["accuracy"] < first["accuracy"] < document["clean_accuracy"]
    assert len(document["records"]) == 80
    assert len(document["honesty"]) == 17
    assert "Honesty panel" in document["summary"]


def test_the_page_holds_verdict_tables_and_pictures_and_fetches_nothing(attacked: tuple[int, Path, Path]) -> None:
    page = attacked[1].read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "Honesty panel" in page
    assert page.count('src="data:image/png;base64,') == 3
    assert all(link.startswith("data:") for link in re.findall(r"""(?:src|href)=["']([^"']*)""", page))
    assert "<script" not in page


def test_finished_attacks_are_read_again(
    checkpoint: Path, attacked: tuple[int, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in checkpoint.with_suffix(".attacks").iterdir()}
    assert kept
    document = tmp_path / "again.json"
    words = ["attack", str(checkpoint), "--data", "digits", "--suite", "quick", "--eps", "0.05,0.2", "--samples", "40"]
    main([*words, "--budget", "0", "--json", str(document)])
    assert "No robust accuracy is stated" in capsys.readouterr().out
    again = json.loads(document.read_text())
    assert again["robust_accuracy"] is None
    assert {path: path.stat().st_mtime_ns for path in checkpoint.with_suffix(".attacks").iterdir()} == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eps", "big"], "numbers with commas"),
        (["--eps", "-0.1"], "positive numbers"),
        (["--suite", "best"], "standard"),
        (["--norm", "l3"], "linf"),
        (["--html", "/no/such/folder/report.html"], "folder that exists"),
        (["--samples", "0"], "samples must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    checkpoint: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", str(checkpoint), "--data", "digits", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_no_accuracy_is_printed_before_the_panel(
    checkpoint: Path,
    attacked: tuple[int, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = importlib.import_module("qlab.attacks.suite")  # the package has a function of this name

    whole = suite.evaluating

    def interrupted(*words: Any, **options: Any) -> Iterator[Any]:
        for update in whole(*words, **options):
            if update.text.startswith("honesty panel"):
                raise KeyboardInterrupt
            yield update

    monkeypatch.setattr(suite, "evaluating", interrupted)
    document = tmp_path / "half.json"
    words = ["attack", str(checkpoint), "--data", "digits", "--suite", "quick", "--eps", "0.05,0.2", "--samples", "40"]
    assert main([*words, "--json", str(document)]) == 130
    printed = capsys.readouterr().out
    table, summary = printed.split("40 examples, ")
    assert table.count("not stated") == 10
    assert "%" not in table
    assert "No robust accuracy is stated: the honesty panel has not run" in summary
    half = json.loads(document.read_text())
    assert half["robust_accuracy"] is None
    assert sum(row["broken"] for row in half["attacks"]) > 0
    assert all(row["accuracy"] is None and row["done"] for row in half["attacks"])
