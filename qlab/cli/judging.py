"""`qlab reproduce` and `qlab bench`: run, print, write JSON, and say the verdict by the exit status."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from qlab import provenance
from qlab.cli.shelves import lines
from qlab.errors import InputError

__all__ = ["bench", "reproduce"]

STATUS = {"holds": 0, "fails": 3, "undecided": 4}


def _writable(path: str | None) -> None:
    """Raise before a long run if its result could not be written.

    Raises:
        InputError: the folder of `path` is not there, or `path` is a folder.
    """
    if path is not None and (not Path(path).parent.is_dir() or Path(path).is_dir()):
        raise InputError(f"--json {path}: cannot be written; name a file in a folder that exists")


def _command(arguments: list[str]) -> str:
    return shlex.join(["qlab", *arguments])


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def reproduce(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run an experiment and return 0, 3 or 4 for a claim that holds, fails or is undecided.

    Raises:
        UnknownNameError: no such experiment, or a data set that it does not take.
        InputError: options out of range.
    """
    from qlab.experiments import EXPERIMENTS

    if options.list:
        print(lines((entry.name, entry.title) for entry in EXPERIMENTS.values()))
        return 0
    _ = EXPERIMENTS[options.name]  # an unknown name is said before torch is imported
    _writable(options.json)
    result = EXPERIMENTS.load(options.name).run(
        scale=options.scale, seeds=options.seeds, data=options.data, workers=options.workers, fresh=options.fresh
    )
    print(result.table().to_string())
    print(f"\n{result.summary()}\n\nrule: {result.rule}\nverdict: {result.verdict}")
    if options.json:
        result.to_json(options.json, _command(arguments))
    return STATUS[result.verdict]


def bench(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run a benchmark and return 0 if all its goals are kept, else 3.

    Raises:
        UnknownNameError: no such benchmark.
        QlabError: qlab does not run from a checkout.
    """
    from qlab import bench as frame

    if options.list:
        print(lines(frame.benchmarks().items()))
        return 0
    target = options.json and options.json.replace("{device}", _slug(provenance.device_name()))
    _writable(target)
    rows = frame.run(options.name, progress=lambda row: print(row, flush=True))
    if target:
        Path(target).write_text(frame.report(options.name, rows, _command(arguments)), encoding="utf-8")
    return 3 if any(row.holds is False for row in rows) else 0
