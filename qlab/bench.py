"""The frame of `benchmarks/`: two ways to do the same work, timed in turns in one process, one row per comparison.

A benchmark is a file in `benchmarks/` of a checkout: its docstring's first line is its title, and its function
`comparisons()` yields `Comparison`s. Each has `ours` and `peer`, what a user would pick instead. The frame

1. runs both without timing (`warmup`: caches, allocator, thread pools);
2. times them in turns, swapping who goes first, so that a machine that slows down slows both;
3. keeps the medians, and judges the goal on the median of the per-round ratios: the two runs of a round share the machine's
   state, so their ratio is steadier than the ratio of two medians on a machine that others use.

    ratio = median_i(ours_i / peer_i)        spread = (third quartile - first quartile) / median

Times are wall-clock seconds (`time.perf_counter`). On a GPU the callables must synchronise.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import json
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qlab import provenance
from qlab.errors import InputError, QlabError, UnknownNameError

__all__ = ["Comparison", "Row", "benchmarks", "compare", "report", "run"]

GoalKind = Literal["ratio", "seconds", "extra seconds", "difference", "times"]


@dataclass(frozen=True)
class Comparison:
    """Two callables that do the same work.

    Args:
        name: what is compared.
        ours: qlab's way; its return value is ignored, or, if it is a float, taken as the seconds it took (a subprocess
            that times itself).
        peer: what a user would pick instead, doing the same work.
        peer_name: what that is.
        goal: a bound; None makes the row a figure without a goal.
        goal_kind: of what: "ratio" ours/peer, "seconds" of ours, "extra seconds" (or "difference" of figures) of ours over peer,
            all from above; "times", peer/ours, from below.
        rounds: timed runs of each.
        warmup: untimed runs of each before.
        unit: of what is compared. Other than "s", both sides return their figure, such as a size in KB.
        operations: how many the work takes, for the rate of ours.
        limit: the most operations a second that the device can do, for the fraction that ours reaches.
    """

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    goal: float | None = None
    goal_kind: GoalKind = "ratio"
    rounds: int = 15
    warmup: int = 2
    unit: str = "s"
    operations: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0:
            raise InputError(f"{self.name}: rounds must be at least 1 and warmup at least 0")


@dataclass(frozen=True)
class Row:
    """The result of a comparison; times in seconds, or in `unit`.

    Args:
        name: what was compared.
        ours_s: median time of qlab's way.
        peer: what it was compared with.
        peer_s: median time of that.
        ratio: median over the rounds of ours / peer.
        goal: the bound, None where there is none.
        holds: whether the bound is kept, None where there is none.
        goal_kind: what the bound is on.
        ours_spread: interquartile range of ours / median.
        peer_spread: interquartile range of peer / median.
        rounds: timed runs of each.
        unit: of ours and peer.
        rate: operations a second of ours, None where they are not counted.
        of_limit: rate as a fraction of the device's limit.
    """

    name: str
    ours_s: float
    peer: str
    peer_s: float
    ratio: float
    goal: float | None
    holds: bool | None
    goal_kind: GoalKind
    ours_spread: float
    peer_spread: float
    rounds: int
    unit: str = "s"
    rate: float | None = None
    of_limit: float | None = None

    def __str__(self) -> str:
        ours = f"{self.ours_s:.4g} {self.unit} ± {self.ours_spread:.0%}"
        if self.rate is not None:
            share = "" if self.of_limit is None else f", {self.of_limit:.0%} of the limit"
            ours += f" ({self.rate / 1e12:.2f} Tera-operations a second{share})"
        peer = f"{self.peer} {self.peer_s:.4g} {self.unit} ± {self.peer_spread:.0%}"
        ratio = f"{1 / self.ratio:.1f} times" if self.goal_kind == "times" else f"ratio {self.ratio:.3f}"
        goal = ""
        if self.goal is not None:
            bound = "at least" if self.goal_kind == "times" else f"{self.goal_kind} at most"
            goal = f"; {bound} {self.goal:g}: {'holds' if self.holds else 'MISSED'}"
        return f"{self.name}: {ours}, {peer}, {ratio}{goal}"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    own = work()
    wall = time.perf_counter() - start
    return own if isinstance(own, float) else wall


def _ratio(a: float, b: float) -> float:
    """Return a / b; figures, unlike times, may be 0."""
    return a / b if b else 1.0 if a == b else float("inf")


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / statistics.median(times)


def compare(comparison: Comparison) -> Row:
    """Time both sides of a comparison in turns and judge its goal."""
    for _ in range(comparison.warmup):
        comparison.ours()
        comparison.peer()
    ours: list[float] = []
    peer: list[float] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection that falls into one side's run is not that side's cost
    try:
        for i in range(comparison.rounds):
            sides = [(ours, comparison.ours), (peer, comparison.peer)]
            for times, work in sides if i % 2 == 0 else reversed(sides):
                times.append(_seconds(work))
    finally:
        if collecting:
            gc.enable()
    ratio = statistics.median(_ratio(a, b) for a, b in zip(ours, peer, strict=True))
    difference = statistics.median(map(operator.sub, ours, peer))
    measured = {
        "ratio": ratio,
        "seconds": statistics.median(ours),
        "extra seconds": difference,
        "difference": difference,
        "times": 1 / ratio if ratio else float("inf"),
    }[comparison.goal_kind]
    median = statistics.median(ours)
    rate = None if comparison.operations is None else comparison.operations / median
    goal = comparison.goal
    holds = None if goal is None else measured >= goal if comparison.goal_kind == "times" else measured <= goal
    return Row(
        name=comparison.name,
        ours_s=median,
        peer=comparison.peer_name,
        peer_s=statistics.median(peer),
        ratio=ratio,
        goal=goal,
        holds=holds,
        goal_kind=comparison.goal_kind,
        ours_spread=_spread(ours),
        peer_spread=_spread(peer),
        rounds=comparison.rounds,
        unit=comparison.unit,
        rate=rate,
        of_limit=None if rate is None or comparison.limit is None else rate / comparison.limit,
    )


def _checkout() -> Path:
    """Return the root of the checkout that this package runs from."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir():
        raise QlabError(
            "benchmarks are not part of the installed package: clone the project, `make install`, "
            "and run `qlab bench` from its .venv."
        )
    return root


def _title(path: Path) -> str:
    """Return the first line of a file's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def benchmarks() -> dict[str, str]:
    """Return name -> title of the benchmarks in the checkout, without importing them.

    Raises:
        QlabError: qlab does not run from a checkout.
    """
    files = sorted((_checkout() / "benchmarks").glob("[!_]*.py"))
    return {path.stem: _title(path) for path in files}


def run(name: str, progress: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run the comparisons of a benchmark one after the other.

    Args:
        name: a name of `benchmarks()`.
        progress: called with each row as it is measured.

    Raises:
        UnknownNameError: no such benchmark.
        QlabError: qlab does not run from a checkout.
    """
    known = benchmarks()
    if name not in known:
        raise UnknownNameError("benchmark", name, known)
    path = _checkout() / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"qlab_benchmark_{name}", path)
    if spec is None or spec.loader is None:
        raise QlabError(f"{path.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and multiprocessing look their module up by name
    spec.loader.exec_module(module)
    comparisons: Iterable[Comparison] = module.comparisons()
    rows = []
    for comparison in comparisons:
        rows.append(compare(comparison))
        progress(rows[-1])
    return rows


def report(name: str, rows: Iterable[Row], command: str) -> str:
    """Return the JSON text of a benchmark: `benchmark command commit device threads versions rows`."""
    import torch

    document = {
        "benchmark": name,
        "command": command,
        "commit": provenance.commit(_checkout()),
        "device": provenance.device_name(),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
