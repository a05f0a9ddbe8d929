"""The benchmark frame: what is timed in which order, and how a goal is judged. No test here measures real time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlab import bench, provenance
from qlab.bench import Comparison, GoalKind, compare
from qlab.cli import main
from qlab.errors import InputError, QlabError, UnknownNameError

BENCHMARK = '''"""A benchmark of nothing.

More words.
"""

from qlab.bench import Comparison


def comparisons():
    yield Comparison("nothing", lambda: 2.0, lambda: 1.0, "less", goal={goal}, rounds=3, warmup=0)
'''


def timed(*seconds: float) -> Callable[[], float]:
    """Return a callable that says it took these seconds, one after the other."""
    times = iter(seconds)
    return lambda: next(times)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the benchmarks folder of a checkout of its own."""
    monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    return folder


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = compare(Comparison("x", timed(1.0, 8.0, 3.0), timed(1.0, 2.0, 6.0), "y", rounds=3, warmup=0))
    assert row.ours_s == 3.0
    assert row.peer_s == 2.0
    assert row.ratio == 1.0  # of 1, 4, 0.5; not 3 / 2
    assert row.rounds == 3


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    row = compare(Comparison("x", timed(1.0, 2.0, 3.0, 4.0, 5.0), timed(*[2.0] * 5), "y", rounds=5, warmup=0))
    assert row.ours_spread == pytest.approx((4 - 2) / 3)
    assert row.peer_spread == 0


@pytest.mark.parametrize(
    ("kind", "goal", "holds"),
    [
        ("ratio", 1.5, True),
        ("ratio", 1.49, False),
        ("seconds", 3.0, True),
        ("seconds", 2.9, False),
        ("extra seconds", 1.0, True),
        ("extra seconds", 0.9, False),
        ("ratio", None, None),
    ],
)
def test_a_goal_bounds_what_it_says(kind: GoalKind, goal: float | None, holds: bool | None) -> None:
    row = compare(Comparison("x", lambda: 3.0, lambda: 2.0, "y", goal, kind, rounds=2))
    assert row.holds is holds


def test_runs_are_interleaved_and_take_turns_in_going_first() -> None:
    calls: list[str] = []

    def side(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    compare(Comparison("x", side("ours"), side("peer"), "y", rounds=3, warmup=1))
    assert calls == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]


def test_wall_time_is_taken_where_the_work_returns_no_seconds() -> None:
    row = compare(Comparison("x", lambda: None, lambda: 1.0, "y", rounds=1, warmup=0))
    assert 0 < row.ours_s < 1


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}])
def test_counts_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="x: rounds must be"):
        Comparison("x", lambda: None, lambda: None, "y", **wrong)


def test_benchmarks_are_listed_without_being_imported(checkout: Path) -> None:
    (checkout / "broken.py").write_text('"""Raises when imported."""\n\nraise RuntimeError\n')
    (checkout / "_helper.py").write_text('"""No benchmark."""\n')
    assert bench.benchmarks() == {"broken": "Raises when imported."}


def test_an_unknown_benchmark_names_the_known(checkout: Path) -> None:
    (checkout / "nothing.py").write_text(BENCHMARK)
    with pytest.raises(UnknownNameError, match=r"unknown benchmark 'nothin'\. Did you mean 'nothing'"):
        bench.run("nothin")


def test_outside_a_checkout_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "qlab" / "bench.py"))
    with pytest.raises(QlabError, match="clone the project"):
        bench.benchmarks()


@pytest.mark.parametrize(("goal", "status"), [("2.0", 0), ("1.9", 3), ("None", 0)])
def test_the_command_writes_its_rows_and_says_by_its_status_if_goals_are_kept(
    checkout: Path, goal: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "nothing.py").write_text(BENCHMARK.format(goal=goal))
    out = checkout / "out.json"
    assert main(["bench", "nothing", "--json", str(out)]) == status
    document = json.loads(out.read_text())
    assert {"benchmark", "command", "commit", "device", "threads", "versions", "rows"} <= set(document)
    (row,) = document["rows"]
    assert {"name", "ours_s", "peer", "peer_s", "ratio", "goal", "holds"} <= set(row)
    assert (row["ours_s"], row["peer"], row["peer_s"], row["ratio"]) == (2.0, "less", 1.0, 2.0)
    assert "nothing: 2 s" in capsys.readouterr().out


def test_the_list_names_every_benchmark_of_this_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bench.benchmarks())
    assert all(len(line.split()) > 1 for line in lines), "a benchmark without a title"


def test_no_json_is_begun_that_could_not_be_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "nothing.py").write_text('"""Fails when run."""\n\nraise RuntimeError\n')
    assert main(["bench", "nothing", "--json", str(checkout / "no" / "such" / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_commit_is_none_without_git(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None


def test_versions_name_what_decides_a_result() -> None:
    versions = provenance.versions()
    assert {"python", "qlab", "torch", "pytorch-lightning", "numpy"} == set(versions)
    assert "unknown" not in versions.values()


@pytest.mark.parametrize(("goal", "holds"), [(3.9, True), (4.1, False)])
def test_times_is_a_bound_from_below(goal: float, holds: bool) -> None:
    row = compare(Comparison("x", lambda: 0.5, lambda: 2.0, "y", goal, "times", rounds=2))
    assert row.holds is holds
    assert "4.0 times" in str(row)


def test_rate_and_its_share_of_the_limit() -> None:
    row = compare(Comparison("x", lambda: 0.5, lambda: 2.0, "y", rounds=1, operations=1e12, limit=4e12))
    assert row.rate == 2e12
    assert row.of_limit == 0.5
    assert "2.00 Tera-operations a second, 50% of the limit" in str(row)


def test_other_units_than_seconds() -> None:
    row = compare(Comparison("size", lambda: 3.0, lambda: 33.0, "float", 11.0, "times", rounds=1, unit="KB"))
    assert row.holds
    assert "3 KB" in str(row)
