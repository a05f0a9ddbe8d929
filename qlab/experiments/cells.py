"""Independent cells of an experiment, run in parallel, each kept on disk as soon as it is done.

A cell is one arm with one seed: a plain function of primitives, `function(settings, seed) -> {metric: value}`, so that
a spawned process can run it. `run_cells` yields an `Outcome` per cell as they finish:

- A cell found in the store is not run again. The store's key covers everything that the numbers depend on (settings,
  seed, versions, device, source code): an interrupted experiment goes on where it stopped, a changed one starts afresh.
- A cell that raises, or whose process dies, becomes an `Outcome` with an error; the others go on.
- Leaving the generator early (KeyboardInterrupt, `close`) ends the workers at once; what is done stays in the store.

Small nets gain nothing from several threads per process, so each worker computes with one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Cell", "CellFunction", "Outcome", "Store", "run_cells", "source_digest", "write_atomic"]

CellFunction: TypeAlias = Callable[[dict[str, Any], int], dict[str, float]]

_DIED = 'the process died: killed, out of memory, or started from a script without `if __name__ == "__main__":`'


@dataclass(frozen=True)
class Cell:
    """One arm with one seed; `settings` holds primitives only."""

    arm: str
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: the cell.
        metrics: what it reported; empty where it failed.
        seconds: how long it took when it was computed.
        kept: whether it came from the store.
        error: one line where it failed, else empty.
        details: the traceback where there is one.
    """

    cell: Cell
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    kept: bool = False
    error: str = ""
    details: str = ""


def run_cells(
    function: CellFunction, cells: Sequence[Cell], store: Store, workers: int = 1, fresh: bool = False
) -> Generator[Outcome, None, None]:
    """Yield the outcome of every cell: the kept ones first, then each as it finishes.

    Args:
        function: a module-level function `(settings, seed) -> {metric: number}`.
        cells: what to run, in the order in which they are started.
        store: where finished cells are kept.
        workers: processes; 1 runs the cells in this process.
        fresh: compute every cell again, also those in the store.
    """
    todo = []
    for cell in cells:
        outcome = None if fresh else store.load(cell)
        if outcome is None:
            todo.append(cell)
        else:
            yield outcome
    finished = _serially(function, todo) if min(workers, len(todo)) <= 1 else _in_parallel(function, todo, workers)
    with contextlib.closing(finished):
        for outcome in finished:
            if not outcome.error:
                store.save(outcome)
            yield outcome


# ----------------------------------------------------------------------------------------------------------- running


def _attempt(function: CellFunction, cell: Cell) -> Outcome:
    """Run one cell; an exception becomes text, because not every exception survives the way between processes."""
    start = time.perf_counter()
    try:
        metrics = {name: float(value) for name, value in function(dict(cell.settings), cell.seed).items()}
    except Exception as error:
        return Outcome(cell, error=f"{type(error).__name__}: {error}", details=traceback.format_exc())
    return Outcome(cell, metrics, time.perf_counter() - start)


def _serially(function: CellFunction, cells: Sequence[Cell]) -> Generator[Outcome, None, None]:
    for cell in cells:
        yield _attempt(function, cell)


def _in_parallel(function: CellFunction, cells: Sequence[Cell], workers: int) -> Generator[Outcome, None, None]:
    """Run cells in a pool of processes. When a process dies, find out whose fault it was and go on with the rest.

    A pool breaks as a whole, so after a death every cell in flight is a suspect. Suspects are run again one at a time; a
    cell that kills its process while alone is the culprit.
    """
    waiting, suspects = list(cells), list[Cell]()
    while waiting or suspects:
        alone = bool(suspects)
        queue = suspects if alone else waiting
        running: dict[Future[Outcome], Cell] = {}
        with _pool(1 if alone else min(workers, len(queue))) as pool:
            try:
                while queue or running:
                    while queue and len(running) < (1 if alone else workers):
                        with _no_interrupt():
                            running[pool.submit(_attempt, function, queue[0])] = queue[0]
                        queue.pop(0)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        del running[future]
                        yield outcome
            except BrokenProcessPool:
                # Others may have finished in the same moment: their results are good.
                for future, cell in running.items():
                    if future.done() and future.exception() is None:
                        yield future.result()
                    elif alone:
                        yield Outcome(cell, error=_DIED)
                    else:
                        suspects.append(cell)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of spawned workers that end at once when the block is left, or when this process dies."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reader,))
    try:
        yield pool
    except BaseException:
        writer.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        writer.close()
        reader.close()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back while workers are started: they inherit the mask, so the terminal's signal never reaches them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: Connection) -> None:
    """Prepare a worker: one thread, deaf to Ctrl-C (the parent decides), ended when the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems without a signal mask
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    if "torch" in sys.modules:  # the main module, which a spawned process imports first, may have done so already
        sys.modules["torch"].set_num_threads(1)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------- keeping


class Store:
    """Finished cells as small JSON files, `<root>/<hash of everything the numbers depend on>.json`.

    Args:
        root: the folder; made when the first cell is saved.
        context: what all cells share: versions, device, source digest. JSON values only.
        warn: is told, in one line, of a file that cannot be used.
    """

    def __init__(self, root: Path, context: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.root = root
        self.context = dict(context)
        self._warn = warn

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        text = json.dumps({**self.context, **self._identity(cell)}, sort_keys=True)
        return self.root / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def load(self, cell: Cell) -> Outcome | None:
        """Return the kept outcome, or None where there is none or its file is damaged."""
        path = self.path(cell)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if {key: record[key] for key in self._identity(cell)} != self._identity(cell):
                raise ValueError("it belongs to another cell")
            metrics = {
                str(name): math.nan if value is None else float(value) for name, value in record["metrics"].items()
            }
            return Outcome(cell, metrics, float(record["seconds"]), kept=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(
                f"{path} cannot be used ({type(error).__name__}: {error}); [{cell.arm}] seed {cell.seed} runs again"
            )
            return None

    def save(self, outcome: Outcome) -> None:
        """Keep a finished cell; a disk that takes no file costs the resume, not the run."""
        metrics = {name: value if math.isfinite(value) else None for name, value in outcome.metrics.items()}
        record = {**self.context, **self._identity(outcome.cell), "metrics": metrics, "seconds": outcome.seconds}
        try:
            write_atomic(self.path(outcome.cell), json.dumps(record, allow_nan=False, indent=1))
        except OSError as error:
            self._warn(f"[{outcome.cell.arm}] seed {outcome.cell.seed} could not be kept in {self.root}: {error}")

    @staticmethod
    def _identity(cell: Cell) -> dict[str, Any]:
        # Through JSON, so that a tuple in the settings equals the list that a file gives back.
        settings: dict[str, Any] = json.loads(json.dumps(cell.settings))
        return {"arm": cell.arm, "seed": cell.seed, "settings": settings}


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def source_digest(modules: Sequence[str]) -> str:
    """Return a digest of the source files of modules and packages (with all they hold), without running them."""
    digest = hashlib.sha256()
    for name in sorted(set(modules)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no source for {name!r}", name=name)
        folders = list(spec.submodule_search_locations or ())
        files = sorted(path for folder in folders for path in Path(folder).rglob("*.py")) or [Path(spec.origin)]
        for path in files:
            digest.update(f"{name}:{path.name}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
