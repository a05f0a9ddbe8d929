"""The frame of an experiment: a claim, the runs that test it, and the result.

An `Experiment` plans cells (arm x seed), runs them in parallel (`qlab.experiments.cells`), judges them
(`qlab.experiments.verdict`) and returns a frozen `Result`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qlab.data.sources import cache_folder
from qlab.errors import InputError, UnknownNameError
from qlab.experiments.cells import (
    Cell,
    CellFunction,
    Outcome,
    Store,
    run_cells,
    source_digest,
    write_atomic,
)
from qlab.experiments.inputs import data_digest
from qlab.experiments.verdict import Evidence, Metric, Rule
from qlab.experiments.verdict import Outcome as Verdict
from qlab.provenance import available_cores, device_name, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Experiment", "Plan", "Result", "Scale"]

Scale: TypeAlias = Literal["laptop", "workstation", "paper"]


@dataclass(frozen=True)
class Plan:
    """What one scale runs on one data set.

    Args:
        arms: settings of each arm, primitives only; handed to the experiment's function.
        seeds: how many seeds are run where the user names none.
        parallel: whether cells run side by side, one thread each: faster for small nets, wrong for one that fills the
            machine (or the GPU, which is shared by no two cells whatever this says).
    """

    arms: Mapping[str, Mapping[str, Any]]
    seeds: int = 3
    parallel: bool = True


@dataclass(frozen=True, eq=False)
class Result:
    """The runs of an experiment and what they say about its claim.

    Args:
        frame: one row per run and metric; columns arm, seed, metric, value.
        verdict: "holds", "fails" or "undecided", by `rule`.
        evidence: the numbers behind the verdict, one entry per part of the rule.
        failures: outcomes of cells that did not finish.
        metrics: what the runs report, in the order of the table; the first is the one a figure shows first.
        seconds: computing time of all cells together, also of those that were kept from before.
        drawing: the experiment's own picture, where it has one.
    """

    experiment: str
    title: str
    claim: str
    rule: str
    verdict: Verdict
    evidence: tuple[Evidence, ...]
    frame: pd.DataFrame = field(repr=False)
    metrics: tuple[Metric, ...] = field(repr=False)
    scale: str
    data: str
    seeds: tuple[int, ...]
    device: str
    versions: dict[str, str] = field(repr=False)
    failures: tuple[Outcome, ...] = ()
    seconds: float = 0.0
    drawing: Callable[[Result], Figure] | None = field(default=None, repr=False)

    def table(self) -> pd.DataFrame:
        """Return mean ± standard deviation (n - 1) over seeds, one row per arm, one column per metric."""
        groups = {key: group.to_numpy() for key, group in self.frame.groupby(["arm", "metric"])["value"]}

        def entry(arm: str, metric: Metric) -> str:
            values = groups.get((arm, metric.name))
            if values is None:
                return "-"
            spread = f" ± {metric.number(float(values.std(ddof=1)))}" if len(values) > 1 else ""
            return metric.number(float(values.mean())) + spread

        def heading(metric: Metric) -> str:
            return f"{metric.label}, {metric.unit}" if metric.unit else metric.label

        arms = list(dict.fromkeys(self.frame["arm"]))
        columns = {heading(metric): [entry(arm, metric) for arm in arms] for metric in self.metrics}
        return pd.DataFrame(columns, index=pd.Index(arms, name="arm"))

    def summary(self) -> str:
        """Return one paragraph: the claim, the verdict, and the numbers that decided it."""
        runs = self.frame[["arm", "seed"]].drop_duplicates().shape[0]
        found = "; ".join(part.statement for part in self.evidence)
        missing = f" {len(self.failures)} runs did not finish." if self.failures else ""
        return (
            f"{self.title}. On {self.data} at {self.scale} scale ({runs} runs, {len(self.seeds)} seeds, {self.device}) "
            f'the claim "{self.claim}" {"is undecided" if self.verdict == "undecided" else self.verdict}: {found}.{missing}'
        )

    def figure(self) -> Figure:
        """Return a matplotlib figure of every run (or the experiment's own picture), with an alternative text."""
        if self.drawing is not None:
            return self.drawing(self)
        from qlab.plots.experiments import experiment_figure  # matplotlib loads only when a figure is wanted

        return experiment_figure(self)

    def to_json(self, path: str | Path, command: str = "") -> None:
        """Write the result as JSON, atomically: either the whole file or none.

        Args:
            path: the file.
            command: the command line that gives this result again.
        """
        rows = self.frame.to_dict("records")
        for row in rows:
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
        record = {
            "experiment": self.experiment,
            "claim": self.claim,
            "verdict": self.verdict,
            "rule": self.rule,
            "command": command,
            "device": self.device,
            "versions": self.versions,
            "seeds": list(self.seeds),
            "rows": rows,
            "scale": self.scale,
            "data": self.data,
            "seconds": round(self.seconds, 1),
            "evidence": {
                "checks": [asdict(part) for part in self.evidence],
                "failures": [{"arm": o.cell.arm, "seed": o.cell.seed, "error": o.error} for o in self.failures],
            },
        }
        write_atomic(Path(path), json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


_COPIED = ("experiment", "claim", "rule", "verdict", "scale", "data", "device", "versions")  # as they stand in a record


@dataclass(frozen=True)
class Experiment:
    """A claim of a paper that a machine can judge.

    Args:
        name: as on the shelf.
        title: one line.
        claim: what is claimed, in one sentence.
        rule: decides the verdict; its words go into every result.
        metrics: what a run reports, in the order of the table.
        function: `(settings, seed) -> {metric name: number}`, a module-level function of primitives.
        plan: `(scale, data) -> Plan`.
        data: accepted data sets; the first is the default.
        code: modules and packages whose source the numbers depend on, besides the function's own.
        drawing: a picture of its own, from the result: what `Result.figure` then returns.
    """

    name: str
    title: str
    claim: str
    rule: Rule
    metrics: tuple[Metric, ...]
    function: CellFunction
    plan: Callable[[Scale, str], Plan]
    data: tuple[str, ...]
    code: tuple[str, ...] = ()
    drawing: Callable[[Result], Figure] | None = None

    def run(
        self,
        scale: Scale = "laptop",
        seeds: int | Sequence[int] | None = None,
        data: str | None = None,
        progress: bool = True,
        workers: int | None = None,
        cache: str | Path | None = None,
        fresh: bool = False,
    ) -> Result:
        """Run every arm with every seed and judge the claim.

        Args:
            scale: "laptop" (minutes on two cores), "workstation", or "paper" (the paper's own settings).
            seeds: how many (0, 1, ...) or which; None for the plan's number.
            data: one of the accepted data sets; None for the first.
            progress: show a progress bar on stderr.
            workers: processes; None for one per core where the plan says that is faster, 1 for this process.
            cache: folder for finished cells; None for `QLAB_CACHE`, else the user's cache folder.
            fresh: compute every cell again.

        Returns:
            The result. Cells that failed are named in `Result.failures`.

        Raises:
            InputError: for a scale, seeds or workers that make no sense.
            UnknownNameError: for a data set that the experiment does not accept.
            DataNotFoundError, DataFileError: for one that cannot be had, or is damaged.
            KeyboardInterrupt: when interrupted; finished cells are kept and not run again by the next call.
        """
        if scale not in get_args(Scale):
            raise InputError(f"unknown scale {scale!r}; expected one of {', '.join(get_args(Scale))}")
        name = self.data[0] if data is None else data
        if name not in self.data:
            raise UnknownNameError(f"data set of experiment {self.name!r}", name, self.data)
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}; expected at least 1")
        plan = self.plan(scale, name)
        chosen = _seeds(plan.seeds if seeds is None else seeds)
        if workers is None:
            workers = available_cores() if plan.parallel and not _on_gpu() else 1

        console = Console(stderr=True, quiet=not progress)
        device, numbers = device_name(), versions()
        context = {
            "experiment": self.name,
            "function": f"{self.function.__module__}:{self.function.__qualname__}",
            "versions": numbers,
            "device": device,
            "data": data_digest(name),  # fetches the set, so that no two workers do and a missing file is one error
            "code": source_digest((self.function.__module__, *self.code)),
        }
        root = (Path(cache).expanduser() if cache is not None else cache_folder()) / "experiments" / self.name
        warnings = Console(stderr=True)  # a damaged file is told of even where no progress is wanted
        store = Store(root, context, lambda line: warnings.print(f"qlab: {line}", style="yellow", markup=False))
        cells = [Cell(arm, seed, dict(settings)) for seed in chosen for arm, settings in plan.arms.items()]
        outcomes = self._outcomes(cells, store, workers, fresh, console, f"{self.name} on {name}, {scale}")

        order = {arm: i for i, arm in enumerate(plan.arms)}
        done = sorted((o for o in outcomes if not o.error), key=lambda o: (order[o.cell.arm], o.cell.seed))
        frame = pd.DataFrame(
            [(o.cell.arm, o.cell.seed, metric, value) for o in done for metric, value in o.metrics.items()],
            columns=["arm", "seed", "metric", "value"],
        ).astype({"seed": int, "value": float})
        verdict, evidence = self.rule.judge(frame, chosen)
        return Result(
            experiment=self.name,
            title=self.title,
            claim=self.claim,
            rule=self.rule.words,
            verdict=verdict,
            evidence=evidence,
            frame=frame,
            metrics=self.metrics,
            scale=scale,
            data=name,
            seeds=chosen,
            device=device,
            versions=numbers,
            failures=tuple(o for o in outcomes if o.error),
            seconds=sum(o.seconds for o in done),
            drawing=self.drawing,
        )

    def read(self, path: str | Path) -> Result:
        """Return the result that `Result.to_json` wrote: its table, summary and figure; runs that failed are not in it.

        Raises:
            InputError: a file that is no result of this experiment.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record["experiment"] != self.name:
                raise ValueError(f"it is one of {record['experiment']!r}")
            frame = pd.DataFrame(record["rows"], columns=["arm", "seed", "metric", "value"])
            return Result(
                title=self.title,
                frame=frame.astype({"seed": int, "value": float}),
                metrics=self.metrics,
                evidence=tuple(Evidence(**part) for part in record["evidence"]["checks"]),
                seeds=tuple(record["seeds"]),
                seconds=record.get("seconds", math.nan),
                drawing=self.drawing,
                **{key: record[key] for key in _COPIED},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a result of `qlab reproduce {self.name} --json`: {error}") from error

    def _outcomes(
        self, cells: Sequence[Cell], store: Store, workers: int, fresh: bool, console: Console, what: str
    ) -> list[Outcome]:
        """Run the cells under a progress bar (a line per cell where stderr is no terminal)."""
        outcomes: list[Outcome] = []
        live = console.is_terminal or console.is_jupyter
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        shown: AbstractContextManager[Any] = bar if live else nullcontext()
        try:
            with shown, closing(run_cells(self.function, cells, store, workers, fresh)) as running:
                task = bar.add_task(what, total=len(cells))
                for outcome in running:
                    outcomes.append(outcome)
                    bar.update(task, completed=len(outcomes))
                    label = f"[{outcome.cell.arm}] seed {outcome.cell.seed}"
                    if outcome.error:
                        console.print(f"{label} failed: {outcome.error}", style="red", markup=False)
                    elif not live and not outcome.kept:
                        line = f"{what}: {len(outcomes)}/{len(cells)} {label} in {outcome.seconds:.1f} s"
                        console.print(line, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            done = sum(not outcome.error for outcome in outcomes)
            console.print(
                f"interrupted: {done} of {len(cells)} runs are kept in {store.root}; the same call goes on from there",
                soft_wrap=True,
            )
            raise
        kept = sum(outcome.kept for outcome in outcomes)
        if kept:
            console.print(f"{kept} of {len(cells)} runs were kept from before in {store.root}", soft_wrap=True)
        return outcomes


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise InputError(f"seeds are {seeds!r}; expected a number of at least 1, or distinct non-negative seeds")
    return chosen


def _on_gpu() -> bool:
    import torch  # here, so that planning and judging need no torch

    return torch.cuda.is_available()
