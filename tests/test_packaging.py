"""What an installation, a clone and an import promise."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import qlab

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("lab", "test", "dev")  # what constraints.txt covers
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINS = {re.sub("[-_.]+", "-", pin.name).lower(): pin for pin in CONSTRAINTS}
HEAVY = (
    "torch",
    "pytorch_lightning",
    "lightning",
    "pandas",
    "matplotlib",
    "numba",
    "cupy",
    "captum",
    "IPython",
    "ipywidgets",
)


def _requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def _modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running some code."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "qlab").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    widgets = ROOT / "widgets"
    views = {path.parent.relative_to(widgets) for path in widgets.rglob("*.py") if "node_modules" not in path.parts}
    found |= {".".join(("qlab", "widgets", *folder.parts)) for folder in views}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_package_has_an_init_file() -> None:
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        parts = package.split(".")
        folder = ROOT.joinpath("widgets", *parts[2:]) if parts[1:2] == ["widgets"] else ROOT.joinpath(*parts)
        assert (folder / "__init__.py").is_file(), package


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda requirement: requirement.name)
def test_the_pinned_version_satisfies_the_requirement(requirement: Requirement) -> None:
    pin = PINS[re.sub("[-_.]+", "-", requirement.name).lower()]
    (version,) = (Version(part.version) for part in pin.specifier)
    assert version in requirement.specifier


def test_constraints_pin_exact_public_versions_only() -> None:
    for pin in CONSTRAINTS:
        assert [part.operator for part in pin.specifier] == ["=="], pin
        assert pin.url is None, pin
        assert not any(Version(part.version).local for part in pin.specifier), pin
    assert len(PINS) == len(CONSTRAINTS), "a package is pinned twice"


def test_conda_environment_is_the_pip_one() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert environment["name"] == PYPROJECT["project"]["name"]
    assert pip == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert Version(python.split("=")[1]) in Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier


def test_the_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="qlab")
    assert callable(script.load())


def test_import_qlab_loads_nothing_heavy() -> None:
    loaded = _modules_after("import qlab")
    assert "qlab" in loaded
    assert not loaded & set(HEAVY)


def test_shelves_are_listed_without_anything_heavy() -> None:
    loaded = _modules_after(
        "import qlab\nfrom qlab.data import DATA\nfrom qlab.models import MODELS\nfrom qlab.experiments import EXPERIMENTS\n"
        "assert len(qlab.CATALOG) and len(DATA) and len(MODELS) and len(EXPERIMENTS)"
    )
    assert not loaded & set(HEAVY)


def test_computing_rooms_import_no_notebook_and_no_compiler() -> None:
    loaded = _modules_after(
        "import qlab\nqlab.quantize, qlab.harden, qlab.fit, qlab.load, qlab.build\n"
        "import torch\nassert not torch.cuda.is_initialized()"
    )
    assert "torch" in loaded
    assert not loaded & {"IPython", "ipywidgets", "anywidget", "numba", "cupy", "captum"}


@pytest.mark.parametrize("name", qlab.__all__)
def test_public_name_loads_and_is_listed(name: str) -> None:
    assert getattr(qlab, name) is not None
    assert name in dir(qlab)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qlab.quantise  # noqa: B018


def test_version_is_that_of_pyproject() -> None:
    assert qlab.__version__ == PYPROJECT["project"]["version"]


def test_every_entry_point_of_a_shelf_exists() -> None:
    from qlab.data import DATA
    from qlab.experiments import EXPERIMENTS
    from qlab.models import MODELS

    for shelf in (qlab.CATALOG, DATA, MODELS, EXPERIMENTS):
        for name in shelf:
            assert shelf.load(name) is not None
