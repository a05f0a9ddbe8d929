"""README.md and docs/: what they say of the project is so."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

import qlab
from qlab.cli import _parser
from qlab.data import DATA
from qlab.methods import hyperparameters
from qlab.methods.catalog import CATALOG, PAPERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE = runpy.run_path(str(ROOT / "docs" / "make.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Return every line of the README that calls qlab, as words, and those in tables."""
    lines = [line for block in blocks("sh") for line in block.splitlines()] + re.findall(r"`(qlab [^`]+)`", README)
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w[:1] == ["qlab"] and (w[1:] == ["methods"] or len(w) > 2) and "NAME" not in w]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "methods.md"], ids=lambda p: p.name)
def test_tables_are_those_of_the_catalog(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == MAKE["documents"]()[path], "run python docs/make.py tables"


def test_every_method_and_every_paper_stands_in_the_tables() -> None:
    for name in CATALOG:
        assert f"| `{name}` |" in README
    for paper in PAPERS:
        assert paper.title in README


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="one pair of markers"):
        MAKE["filled"]("# no tables here\n")


@pytest.mark.parametrize("document", ["README.md", "docs/methods.md", "docs/architecture.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.MULTILINE)) | set(
        re.findall(r"`make ([a-z-]+)`", README)
    )
    assert {"lab", "test", "demo"} <= named <= targets


def test_first_lines_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, *_ = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 5
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    accuracy, net = capsys.readouterr().out.split(" ", 1)
    assert float(accuracy) > 0.85
    assert net.startswith("MLP(")


def test_the_lines_on_packed_bits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, code, *_ = blocks("python")
    data = qlab.data.load("two_moons", n=400)
    net = qlab.build("mlp", (2,), 2, hidden=(16, 16), seed=0)
    method = qlab.methods.create("ste", net, activations="sign", keep=["first", "last"])
    names = {
        "qlab": qlab,
        "run": qlab.fit(method, data, epochs=1, progress=False),
        "x": data.transform(data.split("test").x),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert names["packed"].certificate.exact  # type: ignore[attr-defined]
    assert qlab.binary.load(tmp_path / "net.safetensors").graph.layers == names["packed"].graph.layers  # type: ignore[attr-defined]


def test_the_lines_on_diagnosis_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, code, _ = blocks("python")
    data = qlab.data.load("two_moons", n=400)
    method = qlab.methods.create("ste", qlab.build("mlp", (2,), 2, hidden=(16, 16), seed=0), activations="sign")
    run = qlab.fit(method, data, epochs=1, progress=False)
    test = data.split("test")
    exec(compile(code, "README.md", "exec"), {"qlab": qlab, "run": run, "x": data.transform(test.x), "y": test.y})
    assert capsys.readouterr().out.strip()


def test_the_lines_on_attacks_run(capsys: pytest.CaptureFixture[str]) -> None:
    *_, code = blocks("python")
    data = qlab.data.load("digits")
    net = qlab.build("mlp", data.input_shape, data.num_classes, hidden=(32,), seed=0)
    run = qlab.fit(qlab.methods.create("adaste", net), data, epochs=3, progress=False)
    exec(compile(code, "README.md", "exec"), {"qlab": qlab, "run": run, "data": data})
    assert "Robust accuracy, worst case over attacks" in capsys.readouterr().out


def test_commands_are_understood() -> None:
    seen = set()
    for _, command, *rest in commands():
        seen.add(command)
        if command in ("methods", "describe", "diagnose", "attack", "pack", "reproduce", "bench"):
            assert _parser().parse_args([command, *rest]).command == command
            continue
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        method, data = options.get("--method"), options.get("--data")
        assert method is None or method in CATALOG
        assert data is None or data in DATA
        for option in options:
            if option.startswith("--method."):
                assert option.removeprefix("--method.") in [h.name for h in hyperparameters(CATALOG.load(str(method)))]
            elif option.startswith("--data."):
                assert option.removeprefix("--data.") in inspect.signature(DATA.load(str(data))).parameters
            else:
                assert option in (
                    "--method",
                    "--data",
                    "--ckpt_path",
                    "--trainer.max_epochs",
                    "--robust",
                    "--robust.eps",
                )
    assert seen == {"methods", "describe", "fit", "test", "diagnose", "attack", "pack", "reproduce", "bench"}


def test_the_picture_is_one_and_small() -> None:
    path = ROOT / "docs" / "studio.png"
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert min(image.size) > 300


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"@@\w*@@", README) == [], "measure it and write the figure down"
