"""`qlab attack`: the robust accuracy of a checkpoint's net, by the worst case over a suite, with the honesty panel."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from qlab.cli.checkpoint import named_data, opened
from qlab.errors import InputError

__all__ = ["attack"]


def attack(options: argparse.Namespace) -> int:
    """Attack a checkpoint's deployed net and print what is left; return 0, or 3 where the panel finds masking.

    Raises:
        KeyboardInterrupt: Ctrl-C, after what there is has been printed and written.
        CheckpointError: a checkpoint that cannot be read.
        UnknownNameError: no such data set, suite or norm.
        InputError: no data set is known, data of another shape, an eps that is no number, a file that cannot be written.
    """
    eps = _numbers(options.eps)
    files = {name: _target(getattr(options, name)) for name in ("html", "json")}
    given = named_data(options)

    from qlab.attacks import report
    from qlab.attacks.evaluation import Evaluation
    from qlab.attacks.suite import SUITES, evaluating
    from qlab.errors import UnknownNameError

    if options.suite not in SUITES:
        raise UnknownNameError("suite of attacks", options.suite, SUITES)
    method, data = opened(options.checkpoint, given)
    if data is None:
        raise InputError("an attack needs data, and there is no config.yaml beside the checkpoint: say --data NAME")
    net = method.deployed(data.calibration(method.calibration_batches))
    twin = None
    if options.twin is not None:
        other, _ = opened(options.twin, given)
        twin = other.deployed(data.calibration(other.calibration_batches))
    root = Path(options.root) if options.root else Path(options.checkpoint).with_suffix(".attacks")
    work = evaluating(
        net,
        data,
        eps,
        attacks=options.suite,
        norm=options.norm,
        samples=options.samples,
        twin=twin,
        root=root,
        budget=math.inf if options.budget is None else options.budget,
        seed=options.seed,
    )
    found, stopped = _run(work)
    assert isinstance(found, Evaluation)
    title = f"{options.checkpoint}: {method.info.name} on {given['name']}"
    _print(title, found)
    if files["html"] is not None:
        files["html"].write_text(report.html(found, title), encoding="utf-8")
    if files["json"] is not None:
        files["json"].write_text(report.text(found, title), encoding="utf-8")
    if stopped:
        raise KeyboardInterrupt
    return 3 if found.honesty is not None and found.honesty.masked else 0


def _run(work: Any) -> tuple[Any, bool]:
    """Run to the end with a bar; return what there is, and whether Ctrl-C ended it (finished attacks are read next time)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    value = None
    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        try:
            for update in work:
                value = update.value if update.value is not None else value
                bar.update(task, completed=update.fraction, description=update.text)
        except KeyboardInterrupt:
            if value is None:
                raise
            return value, True
    return value, False


def _print(title: str, found: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(title)}[/bold]")
    table = Table(box=None, header_style="bold")
    for name in ("eps", "attack", "asked", "broken", "left"):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for row in found.frame().to_dict("records"):
        left = (
            "not run" if not row["done"] else "not stated" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.1%}"
        )
        table.add_row(f"{row['eps']:.4g}", escape(row["attack"]), str(row["asked"]), str(row["broken"]), left)
    console.print(table)
    console.print(escape(found.summary()))


def _numbers(words: str) -> list[float]:
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        raise InputError(
            f"--eps is {words!r}; expected numbers with commas between them, as 0.1,0.2, in the units of the data"
        ) from None
    return values


def _target(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path} cannot be written; name a file in a folder that exists")
    return path
