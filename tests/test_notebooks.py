"""The notebooks as they are committed: executed, small, readable without a kernel. That they run is checked by `make notebooks`."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 1_000_000
LOCAL_PATH = re.compile(r"(?<![\w.:/-])(/(home|root|Users|tmp|work|usr|var|opt|mnt|private)/|[A-Z]:\\)|site-packages")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def pictures(path: Path) -> list[dict[str, Any]]:
    return [output for output in outputs(path) if "image/png" in output.get("data", {})]


def test_the_tour_and_straight_through_are_there() -> None:
    assert {"00_tour", "01_straight_through"} <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_file_is_smaller_than_a_megabyte(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES


@every_notebook
def test_every_cell_was_executed_once_from_top_to_bottom(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run python docs/make.py notebooks"


@every_notebook
def test_outputs_hold_no_error_and_no_noise(path: Path) -> None:
    assert [o["ename"] for o in outputs(path) if o["output_type"] == "error"] == []
    assert [o["text"] for o in outputs(path) if o.get("name") == "stderr"] == []
    streams = "".join("".join(o["text"]) for o in outputs(path) if o["output_type"] == "stream")
    assert "\r" not in streams, "a progress bar was left on"


@every_notebook
def test_no_widget_state_or_live_view_is_stored(path: Path) -> None:
    assert set(load(path)["metadata"]) == {"kernelspec", "language_info"}
    assert load(path)["metadata"]["kernelspec"]["name"] == "python3"
    assert [cell["metadata"] for cell in load(path)["cells"] if cell["metadata"]] == []
    kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
    assert not {kind for kind in kinds if "widget" in kind}


@every_notebook
def test_pictures_can_be_opened_and_are_described_in_words(path: Path) -> None:
    assert len(pictures(path)) >= 3
    for output in pictures(path):
        image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        assert min(image.size) > 50
        assert len(output["metadata"]["image/png"]["alt"]) > 20


@every_notebook
def test_nothing_names_a_place_on_one_machine(path: Path) -> None:
    notebook = load(path)
    for output in (o for cell in notebook["cells"] for o in cell.get("outputs", ())):
        output.get("data", {}).pop("image/png", None)
    assert LOCAL_PATH.search(json.dumps(notebook, ensure_ascii=False).replace(r"\\", "\\")) is None


@every_notebook
def test_prose_asks_before_it_shows(path: Path) -> None:
    prose = "".join("".join(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    assert prose.count("**Before you") >= 5


def test_the_tour_opens_with_a_short_cell_that_shows_the_studio() -> None:
    first = code_cells(FOLDER / "00_tour.ipynb")[0]
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    assert lines[0] == "import qlab"
    assert len(lines) <= 5
    shown = "".join(first["outputs"][-1]["data"]["text/plain"])
    assert shown.startswith("Studio.")


def test_the_tour_leaves_a_picture_of_the_studio() -> None:
    alts = [output["metadata"]["image/png"]["alt"] for output in pictures(FOLDER / "00_tour.ipynb")]
    assert alts[0].startswith("Run A: validation accuracy of the deployed net")
