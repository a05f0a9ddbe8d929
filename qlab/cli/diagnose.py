"""`qlab diagnose`: what is wrong with a checkpoint's net, as one batch of data shows it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab.cli.checkpoint import named_data, opened
from qlab.errors import InputError

if TYPE_CHECKING:
    from qlab.diagnose.doctor import Diagnosis

__all__ = ["diagnose"]

COLOURS = {"high": "bold red", "medium": "yellow", "low": "cyan", "info": "dim"}


def diagnose(options: argparse.Namespace) -> int:
    """Run the doctor on a checkpoint's deployed and training-time net, and print what it found; return 0.

    Raises:
        CheckpointError: a checkpoint that cannot be read.
        UnknownNameError: no such data set.
        InputError: no data set is known, data of another shape, a number of examples that is too small, or a file that cannot
            be written.
    """
    target = None if options.json is None else Path(options.json)
    if target is not None and (not target.parent.is_dir() or target.is_dir()):
        raise InputError(f"{target} cannot be written; name a file in a folder that exists")
    if options.examples < 16:
        raise InputError(f"a batch of {options.examples} examples tells too little; expected at least 16")
    given = named_data(options)

    from qlab.diagnose.doctor import doctor

    method, data = opened(options.checkpoint, given)
    if data is None:
        raise InputError("a diagnosis needs data, and there is no config.yaml beside the checkpoint: say --data NAME")
    name = given["name"]
    split = data.split("test", options.examples)
    x, y = data.transform(split.x), split.y
    deployed = method.deployed(data.calibration(method.calibration_batches))
    found = {
        "deployed net": doctor(deployed, x, y),
        "training-time net": doctor(method, x, y),
    }
    _print(options.checkpoint, method.info.name, name, found)
    if target is not None:
        target.write_text(json.dumps(_document(options.checkpoint, method.info.name, name, found), indent=1) + "\n")
    return 0


def _print(checkpoint: str, method: str, data: str, found: dict[str, Diagnosis]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{escape(checkpoint)}: {method}, on test data of {data}")
    for which, diagnosis in found.items():
        alarms = len(diagnosis.alarms)
        verdict = f"{alarms} alarm{'s' if alarms != 1 else ''}" if alarms else "no alarm"
        console.print(
            f"\n[bold]{which}[/bold], {diagnosis.function} function, {diagnosis.examples} examples: accuracy "
            f"{diagnosis.accuracy:.1%}, loss {diagnosis.loss:.3g}; [bold]{verdict}[/bold]"
        )
        for number, f in enumerate(diagnosis.findings, 1):
            where = f" in {escape(f.layer)}" if f.layer else ""
            console.print(
                f"  {number}. [{COLOURS[f.severity]}]{f.severity}[/{COLOURS[f.severity]}]  {f.name}{where} "
                f"({f.function} function)"
            )
            console.print(f"     {escape(f.evidence)}")
            console.print(f"     Try: {escape(f.fix)} Lesson: {f.lesson}")


def _document(checkpoint: str, method: str, data: str, found: dict[str, Diagnosis]) -> dict[str, Any]:
    import math

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    from qlab.provenance import versions

    return {
        "checkpoint": checkpoint,
        "method": method,
        "data": data,
        "versions": versions(),
        "nets": {
            which: {
                "function": d.function,
                "examples": d.examples,
                "accuracy": number(d.accuracy),
                "loss": number(d.loss),
                "healthy": d.healthy,
                "findings": [asdict(f) for f in d.findings],
                "summary": d.summary(),
            }
            for which, d in found.items()
        },
    }
