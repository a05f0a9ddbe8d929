"""Long work in a thread: progress, partial results, cancel; the newest request wins.

A piece of work is a generator that yields `Update(fraction, text, value)`. `Job` runs it in a daemon thread and looks
at its cancel flag at every yield, so work stops where its author left it consistent, never in the middle of a step. The
last value yielded is kept whatever happens - the end, a cancel, an exception - because half a result is a result.

    job = Job(lambda: training("adaste", data, epochs=20), on_update=show)      # qlab.live.training
    job.start()
    job.cancel()          # the training stops within a batch and checkpoints itself
    job.value.run         # what there is so far, with a checkpoint to resume from

A cancelled generator sees the exception `Cancelled` at its yield. It may catch it, tidy up and yield one last update.
Nothing here knows of notebooks, widgets or training.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from qlab.errors import InputError

__all__ = ["Cancelled", "Job", "Latest", "Status", "Update", "background", "last"]

T = TypeVar("T")

Status = Literal["pending", "running", "done", "cancelled", "failed"]


class Cancelled(Exception):
    """Thrown into a generator at its yield when its job is cancelled."""


@dataclass(frozen=True)
class Update:
    """One report of a piece of work.

    Args:
        fraction: share of the work done, in [0, 1].
        text: one line that says what is going on.
        value: the result so far; None leaves the last one standing.
    """

    fraction: float
    text: str = ""
    value: Any = None


class Job:
    """A generator of `Update`s run in a daemon thread.

    Args:
        work: a generator function without arguments, or an iterator of updates.
        on_update: called as `on_update(job)` in the worker thread after updates, and always once at the end. If it
            raises, the job fails with that error: a broken listener is not silently ignored.
        min_interval: at most one call of `on_update` in that many seconds (the last one always comes).

    Attributes:
        fraction, text, value: of the last update; `value` survives cancel and failure.
        error: the exception that ended a failed job, with its traceback; see `result`.
    """

    def __init__(
        self,
        work: Callable[[], Iterable[Update]] | Iterable[Update],
        on_update: Callable[[Job], None] | None = None,
        *,
        min_interval: float = 0.0,
    ) -> None:
        if not callable(work) and not isinstance(work, Iterable):
            raise InputError(
                f"Job got {type(work).__name__} as work; expected a generator function or an iterator of Update. "
                "Write `def work(): yield Update(...)` and pass `work` itself."
            )
        self._work = work
        self._on_update = on_update
        self._min_interval = min_interval
        self._cancel = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._after: Job | None = None
        self._told = float("-inf")
        self.status: Status = "pending"
        self.fraction = 0.0
        self.text = ""
        self.value: Any = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        return f"Job({self.status}, {100 * self.fraction:.0f} %, {self.text!r})"

    def start(self) -> Job:
        """Start the work in a thread and return the job; a job starts once, later calls change nothing."""
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._run, name="qlab-job", daemon=True)
                self._thread.start()
        return self

    def cancel(self) -> None:
        """Ask the work to stop at its next yield; returns at once. A job not yet started never runs."""
        self._cancel.set()
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self.status = "cancelled"
                self._ended.set()

    @property
    def cancelling(self) -> bool:
        """Whether cancel was asked for and the work has not ended yet."""
        return self._cancel.is_set() and not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended, at most `timeout` seconds; returns whether it has."""
        return self._ended.wait(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the last value.

        Raises:
            TimeoutError: the job has not ended after `timeout` seconds.
            Exception: the very error the work failed with.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"{self!r} has not ended after {timeout} s")
        if self.error is not None:
            raise self.error
        return self.value

    @property
    def traceback(self) -> str:
        """The failure's traceback as text; empty where there is none."""
        return "" if self.error is None else "".join(traceback.format_exception(self.error))

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after.wait()
                self._after = None  # else every request would keep all earlier ones alive
            if self._cancel.is_set():
                status: Status = "cancelled"
            else:
                self.status = "running"
                status = self._drive()
        except BaseException as error:  # kept, and shown by whoever listens: a thread has nobody to raise to
            self.error = error
            self.text = f"{type(error).__name__}: {error}"
            status = "failed"
        self.status = status
        try:
            self._tell(final=True)
        except BaseException as error:
            self.status, self.error = "failed", self.error or error
            traceback.print_exception(error)
        finally:
            self._ended.set()

    def _drive(self) -> Status:
        updates = iter(self._work() if callable(self._work) else self._work)
        try:
            for update in updates:
                self._take(update)
                if self._cancel.is_set():
                    self._throw_cancelled(updates)
                    return "cancelled"
                self._tell()
        finally:
            close = getattr(updates, "close", None)
            if close is not None:
                close()
        return "done"

    def _throw_cancelled(self, updates: Iterator[Update]) -> None:
        throw = getattr(updates, "throw", None)
        if throw is None:  # a plain iterator has nothing to tidy up
            return
        with suppress(Cancelled, StopIteration):
            self._take(throw(Cancelled()))

    def _take(self, update: Update) -> None:
        if not isinstance(update, Update):
            raise InputError(
                f"the work yielded {type(update).__name__}; expected qlab.jobs.Update(fraction, text, value)"
            )
        self.fraction = min(max(float(update.fraction), 0.0), 1.0)
        self.text = update.text
        if update.value is not None:
            self.value = update.value

    def _tell(self, final: bool = False) -> None:
        now = time.monotonic()
        if self._on_update is None:
            if final and self.error is not None:
                traceback.print_exception(self.error)
        elif final or now - self._told >= self._min_interval:
            self._told = now
            self._on_update(self)


class Latest:
    """Runs only the newest request: a new one cancels the one before and starts when that has ended.

    What a superseded job still reports is not passed on, so an old answer never overwrites a new one.

    Args:
        on_update: called as `on_update(job)` for the newest job only.
        min_interval: as in `Job`.
    """

    def __init__(self, on_update: Callable[[Job], None] | None = None, *, min_interval: float = 0.0) -> None:
        self._on_update = on_update
        self._min_interval = min_interval
        self._lock = threading.Lock()
        self.job: Job | None = None

    def submit(self, work: Callable[[], Iterable[Update]] | Iterable[Update]) -> Job:
        """Start `work` in place of whatever runs or waits, and return its job."""
        job = Job(work, self._pass_on if self._on_update else None, min_interval=self._min_interval)
        with self._lock:
            previous, self.job = self.job, job
            job._after = previous
        if previous is not None:
            previous.cancel()
        return job.start()

    def cancel(self) -> None:
        """Cancel the newest job, if there is one."""
        job = self.job
        if job is not None:
            job.cancel()

    def _pass_on(self, job: Job) -> None:
        if job is self.job and self._on_update is not None:
            self._on_update(job)


def background(call: Callable[[], T], text: str = "", *, heartbeat: float = 0.05) -> Generator[Update, None, T]:
    """Run a blocking call that cannot be interrupted (an import, a download) so that cancel is still noticed at once.

    Use it inside a piece of work: `data = yield from background(lambda: load("mnist"), "loading mnist")`. When the job is
    cancelled meanwhile, the call is left to finish in its daemon thread and its result is dropped.

    Args:
        call: what to run.
        text: the status line meanwhile.
        heartbeat: seconds between two yields.

    Returns:
        What `call` returns.

    Raises:
        Exception: whatever `call` raises.
    """
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="qlab-background", daemon=True).start()
    while True:
        try:
            value, error = outcome.get(timeout=heartbeat)
        except Empty:
            yield Update(0.0, text)
            continue
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # no error, so the value is a T


def last(updates: Iterable[Update], kind: type[T]) -> T:
    """Run work to its end here and now, and return the last value it yielded.

    Args:
        updates: as a generator gives them.
        kind: what the value is.

    Raises:
        RuntimeError: it yielded no such value, which is a bug in the work.
    """
    value: Any = None
    for update in updates:
        value = value if update.value is None else update.value
    if not isinstance(value, kind):
        raise RuntimeError(f"the work ended with {type(value).__name__}, not {kind.__name__}")
    return value
