"""Jobs: partial results survive, cancel is clean, nothing is swallowed, the newest request wins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qlab.errors import InputError
from qlab.jobs import Cancelled, Job, Latest, Update, background, last

LONG = 30.0  # seconds a test waits before it calls a thread stuck; nothing is expected to take that long


def counting(n: int) -> Iterator[Update]:
    for i in range(n):
        yield Update((i + 1) / n, f"{i + 1} of {n}", i)


def until(event: threading.Event) -> Iterator[Update]:
    """Yield for ever; set `event` once under way."""
    i = 0
    while True:
        yield Update(0.0, "working", i)
        i += 1
        event.set()


def test_a_finished_job_has_its_last_value_and_fraction_one() -> None:
    job = Job(lambda: counting(5))
    assert job.status == "pending"
    assert job.start().wait(LONG)
    assert (job.status, job.value, job.fraction, job.text) == ("done", 4, 1.0, "5 of 5")
    assert job.result() == 4


def test_an_iterator_is_as_good_as_a_generator_function() -> None:
    assert Job(iter([Update(0.5, "half", "a"), Update(1.0, "all", "b")])).start().result(LONG) == "b"


def test_work_runs_in_a_daemon_thread_that_is_not_the_callers() -> None:
    seen: list[threading.Thread] = []

    def work() -> Iterator[Update]:
        seen.append(threading.current_thread())
        yield Update(1.0)

    Job(work).start().result(LONG)
    assert seen[0] is not threading.current_thread()
    assert seen[0].daemon


def test_cancel_stops_at_a_yield_and_keeps_the_last_value() -> None:
    running = threading.Event()
    job = Job(lambda: until(running)).start()
    assert running.wait(LONG)
    job.cancel()
    assert job.wait(LONG)
    assert job.status == "cancelled"
    assert job.value >= 1
    assert job.error is None


def test_cancelled_work_may_tidy_up_and_yield_one_last_update() -> None:
    running, closed = threading.Event(), threading.Event()

    def work() -> Iterator[Update]:
        try:
            yield from until(running)
        except Cancelled:
            yield Update(0.5, "stopped", "partial result")
        finally:
            closed.set()

    job = Job(work).start()
    assert running.wait(LONG)
    job.cancel()
    assert job.result(LONG) == "partial result"
    assert closed.is_set()
    assert job.text == "stopped"


def test_cancel_before_start_means_that_nothing_runs() -> None:
    touched: list[int] = []

    def work() -> Iterator[Update]:
        touched.append(1)
        yield Update(1.0)

    job = Job(work)
    job.cancel()
    assert job.start().wait(LONG)
    assert job.status == "cancelled"
    assert touched == []


def test_an_exception_is_kept_with_its_traceback_and_raised_by_result() -> None:
    def work() -> Iterator[Update]:
        yield Update(0.25, "fine so far", "a quarter")
        raise ZeroDivisionError("in the middle")

    seen: list[str] = []
    job = Job(work, on_update=lambda job: seen.append(job.status)).start()
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        job.result(LONG)
    assert job.status == "failed"
    assert job.value == "a quarter"
    assert "in work" in job.traceback
    assert "ZeroDivisionError: in the middle" in job.text
    assert seen == ["running", "failed"]


def test_an_exception_without_a_listener_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> Iterator[Update]:
        yield Update(0.0)
        raise RuntimeError("nobody listens")

    assert Job(work).start().wait(LONG)
    assert "RuntimeError: nobody listens" in capfd.readouterr().err


def test_a_failing_listener_fails_the_job(capfd: pytest.CaptureFixture[str]) -> None:
    def listener(job: Job) -> None:
        raise KeyError("listener")

    job = Job(lambda: counting(3), on_update=listener).start()
    assert job.wait(LONG)
    assert job.status == "failed"
    assert isinstance(job.error, KeyError)
    assert "listener" in capfd.readouterr().err


def test_the_listener_hears_every_update_and_the_end() -> None:
    seen: list[tuple[str, Any]] = []
    Job(lambda: counting(3), on_update=lambda job: seen.append((job.status, job.value))).start().result(LONG)
    assert seen == [("running", 0), ("running", 1), ("running", 2), ("done", 2)]


def test_a_throttled_listener_hears_the_first_update_and_the_end() -> None:
    seen: list[tuple[str, Any]] = []
    job = Job(lambda: counting(1000), on_update=lambda job: seen.append((job.status, job.value)), min_interval=3600.0)
    job.start().result(LONG)
    assert seen == [("running", 0), ("done", 999)]


def test_an_update_without_value_leaves_the_last_one_standing() -> None:
    assert Job(iter([Update(0.1, "", "kept"), Update(0.2, "still there")])).start().result(LONG) == "kept"


def test_work_that_yields_something_else_fails_with_a_message() -> None:
    job = Job(iter([1, 2]), on_update=lambda job: None).start()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="yielded int"):
        job.result(LONG)


def test_work_that_is_no_generator_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="expected a generator function"):
        Job(3)  # type: ignore[arg-type]


def test_result_with_a_deadline_raises_timeout_error() -> None:
    gate = threading.Event()

    def work() -> Iterator[Update]:
        gate.wait(LONG)
        yield Update(1.0, "", "late")

    job = Job(work).start()
    with pytest.raises(TimeoutError):
        job.result(0.01)
    gate.set()
    assert job.result(LONG) == "late"


def test_latest_runs_only_the_newest_request() -> None:
    started: list[str] = []
    heard: list[Any] = []
    gate, first_running = threading.Event(), threading.Event()

    def work(name: str) -> Iterator[Update]:
        started.append(name)
        yield Update(0.5, "", f"{name} half")
        first_running.set()
        gate.wait(LONG)
        yield Update(1.0, "", name)

    latest = Latest(on_update=lambda job: heard.append((job.status, job.value)))
    first = latest.submit(lambda: work("first"))
    assert first_running.wait(LONG)
    second = latest.submit(lambda: work("second"))
    third = latest.submit(lambda: work("third"))
    gate.set()
    assert third.result(LONG) == "third"
    assert (first.status, second.status, third.status) == ("cancelled", "cancelled", "done")
    assert started == ["first", "third"]
    assert heard[1:] == [("running", "third half"), ("running", "third"), ("done", "third")]
    assert heard[0] == ("running", "first half")


def test_latest_never_runs_two_requests_at_once() -> None:
    busy, overlaps = threading.Lock(), []

    def work() -> Iterator[Update]:
        if not busy.acquire(blocking=False):
            overlaps.append(1)
        try:
            yield from counting(50)
        finally:
            busy.release()

    latest = Latest()
    jobs = [latest.submit(work) for _ in range(20)]
    assert jobs[-1].result(LONG) == 49
    assert overlaps == []


def test_background_returns_what_the_call_returns_or_raises() -> None:
    def work() -> Iterator[Update]:
        value = yield from background(lambda: 6 * 7)
        yield Update(0.5, "", value)
        yield from background(lambda: 1 // 0)

    job = Job(work, on_update=lambda job: None).start()
    with pytest.raises(ZeroDivisionError):
        job.result(LONG)
    assert job.value == 42


def test_cancel_is_noticed_during_a_blocking_background_call() -> None:
    gate, entered = threading.Event(), threading.Event()

    def blocking() -> None:
        entered.set()
        gate.wait(LONG)

    job = Job(lambda: background(blocking, "blocked")).start()
    assert entered.wait(LONG)
    job.cancel()
    assert job.wait(LONG)
    assert not gate.is_set()
    assert job.status == "cancelled"
    gate.set()


def test_last_runs_work_to_its_end_and_says_where_it_gave_nothing() -> None:
    assert last(iter([Update(0.1, "", 3), Update(0.5), Update(1.0, "", 4), Update(1.0)]), int) == 4
    with pytest.raises(RuntimeError, match="ended with NoneType, not int"):
        last(iter([Update(1.0)]), int)
