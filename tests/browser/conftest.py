"""A real JupyterLab and a real Chromium, started once for all browser tests."""

from __future__ import annotations

import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ARTIFACTS = ROOT / "artifacts"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=swiftshader",
    "--enable-unsafe-swiftshader",
]
START_SECONDS = 120


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab."""

    url: str
    token: str
    root: pathlib.Path
    config: pathlib.Path

    def set_theme(self, theme: str) -> None:
        """Let pages opened from now on be "light" or "dark", without JupyterLab's question about news."""
        self._setting("themes", {"theme": f"JupyterLab {theme.title()}"})
        self._setting("notification", {"fetchNews": "false", "checkForUpdates": False})

    def _setting(self, name: str, values: dict[str, Any]) -> None:
        folder = self.config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(values))

    def notebook(self, name: str) -> str:
        """Return the address of a notebook below the root, alone in a fresh workspace."""
        return f"{self.url}/lab/workspaces/auto-{secrets.token_hex(4)}/tree/{name}?token={self.token}&reset"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    pytest.importorskip("jupyterlab")
    root = tmp_path_factory.mktemp("lab")
    config = tmp_path_factory.mktemp("config")
    token = secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTER_RUNTIME_DIR": str(tmp_path_factory.mktemp("runtime")),
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"]
    command += [f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}", "--LabApp.news_url=None"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: SimpleQueue[str] = SimpleQueue()
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr], daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        running = Lab(_address(process, lines), token, root, config)
        running.set_theme("light")
        yield running
    finally:
        process.terminate()
        process.wait(30)
        reader.join(30)
        process.stderr.close()


def _address(process: subprocess.Popen[str], lines: SimpleQueue[str]) -> str:
    log = ""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            log += lines.get(timeout=1)
        except Empty:
            continue
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab", log)
        if found:
            return f"http://127.0.0.1:{found[1]}"
    raise RuntimeError(f"JupyterLab did not start within {START_SECONDS} s:\n{log}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium on the path; install it (Debian: apt-get install chromium)")
        pytest.skip("there is no Chromium on the path; install it (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    lab.set_theme(request.param)
    yield request.param
    lab.set_theme("light")


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A fresh page 1000 pixels wide; an error that its JavaScript throws fails the test."""
    page = chromium.new_page(viewport={"width": 1000, "height": 1500})
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors, f"the page threw: {errors}"


def write_notebook(path: pathlib.Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            {
                "id": f"cell{i}",
                "cell_type": "code",
                "metadata": {},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for i, source in enumerate(cells)
        ],
    }
    path.write_text(json.dumps(notebook))
