"""The committed JavaScript is what the sources say, small, and safe."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

WIDGETS = pathlib.Path(__file__).parents[2] / "widgets"
VIEWS = (
    "studio",
    "bitlab",
    "landscape",
    "mismatch",
    "vanishing",
    "time_travel",
    "attribution",
    "cockpit",
    "duel",
    "replay",
    "robustness",
    "temperature",
)
BUNDLES = tuple(f"{view}.{kind}" for view in VIEWS for kind in ("js", "css"))


@pytest.mark.parametrize("view", VIEWS)
def test_the_bundle_of_a_view_is_within_its_budget(view: str) -> None:
    assert (WIDGETS / "static" / f"{view}.js").stat().st_size < 200_000


@pytest.mark.parametrize("source", sorted((WIDGETS / "src").glob("*.js")), ids=lambda p: p.name)
def test_sources_build_the_page_from_text_alone_and_load_nothing(source: pathlib.Path) -> None:
    text = source.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"\.html\(", text)  # d3-selection's innerHTML
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_the_lock_file_names_no_registry() -> None:
    packages = json.loads((WIDGETS / "package-lock.json").read_text())["packages"]
    assert len(packages) > 5
    assert not [name for name, package in packages.items() if "resolved" in package]


def test_the_committed_bundle_is_what_the_sources_give(tmp_path: pathlib.Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        if os.environ.get("CI"):
            pytest.fail(
                "npm is missing, so nothing shows that widgets/static is built from widgets/src: install Node 20"
            )
        pytest.skip("NOT CHECKED that widgets/static is built from widgets/src: npm is missing (install Node 20)")
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(WIDGETS / name, tmp_path / name)
    shutil.copytree(WIDGETS / "src", tmp_path / "src")
    if (WIDGETS / "node_modules").is_dir() and not os.environ.get(
        "CI"
    ):  # installed by `npm ci`: no need of the network
        shutil.copytree(WIDGETS / "node_modules", tmp_path / "node_modules", symlinks=True)
    else:
        subprocess.run([npm, "ci"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([npm, "run", "build"], cwd=tmp_path, check=True, capture_output=True)
    for name in BUNDLES:
        built, committed = (tmp_path / "static" / name).read_bytes(), (WIDGETS / "static" / name).read_bytes()
        assert built == committed, (
            f"widgets/static/{name} is stale: run `npm ci && npm run build` in widgets/ and commit it"
        )
