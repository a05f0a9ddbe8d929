"""The frame of experiments with fake cells: parallel runs, what is kept, what an interruption or a failure costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlab.errors import DataNotFoundError, InputError, UnknownNameError
from qlab.experiments import EXPERIMENTS
from qlab.experiments.base import Experiment, Plan, Result
from qlab.experiments.cells import Cell, CellFunction, Store, run_cells, source_digest, write_atomic
from qlab.experiments.inputs import data_digest, load_data
from qlab.experiments.verdict import Difference, Every, Metric, Rule
from tests.experiments import fake_cells

ACC = Metric("test/acc", "test accuracy", "%", 100)
FLIPS = Metric("flips", "sign changes", digits=0)


def experiment(function: CellFunction = fake_cells.accuracy, parallel: bool = False, **extra: Any) -> Experiment:
    """Two arms, accuracies of about 90 % and 50 %, three seeds."""
    return Experiment(
        name="fake",
        title="A fake experiment",
        claim="new is more than 10 points better than old",
        rule=Rule((Difference(ACC, "new", "old", margin=0.1), Every(FLIPS, ("new",), ">", 0))),
        metrics=(ACC, FLIPS),
        function=function,
        plan=lambda scale, data: Plan(
            arms={"new": {"mean": 0.9, **extra}, "old": {"mean": 0.5}}, seeds=3, parallel=parallel
        ),
        data=("digits", "fashion_mnist"),
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return experiment().run(progress=False, cache=tmp_path_factory.mktemp("cache"))


def store(folder: Path) -> Store:
    return Store(folder, {"versions": {"torch": "2"}}, warn=lambda line: None)


CELLS = [Cell(arm, seed, {"mean": mean}) for seed in range(3) for arm, mean in (("new", 0.9), ("old", 0.5))]


# -------------------------------------------------------------------------------------------------------- the result


def test_frame_has_one_row_per_run_and_metric(result: Result) -> None:
    assert list(result.frame.columns) == ["arm", "seed", "metric", "value"]
    assert len(result.frame) == 2 * 3 * 3
    assert not result.frame.duplicated(["arm", "seed", "metric"]).any()


def test_claim_with_a_large_effect_holds(result: Result) -> None:
    assert result.verdict == "holds"
    assert [part.outcome for part in result.evidence] == ["holds", "holds"]


def test_table_is_mean_and_standard_deviation_per_arm(result: Result) -> None:
    table = result.table()
    assert list(table.index) == ["new", "old"]
    assert list(table.columns) == ["test accuracy, %", "sign changes"]
    rows = result.frame.query("arm == 'new' and metric == 'test/acc'")["value"]
    assert table.loc["new", "test accuracy, %"] == f"{100 * rows.mean():.1f} ± {100 * rows.std(ddof=1):.1f}"


def test_summary_tells_claim_verdict_and_numbers(result: Result) -> None:
    text = result.summary()
    assert "\n" not in text
    assert '"new is more than 10 points better than old" holds' in text
    assert "40.0 points" in text
    assert "6 runs, 3 seeds" in text


def test_json_has_the_promised_keys_and_is_strict_json(result: Result, tmp_path: Path) -> None:
    result.to_json(tmp_path / "result.json", command="qlab reproduce fake")
    record = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    promised = ["experiment", "claim", "verdict", "rule", "command", "device", "versions", "seeds", "rows"]
    assert list(record) == [*promised, "scale", "data", "seconds", "evidence"]
    assert record["command"] == "qlab reproduce fake"
    assert record["seeds"] == [0, 1, 2]
    assert record["rows"][0].keys() == {"arm", "seed", "metric", "value"}
    assert {"qlab", "torch", "python"} <= record["versions"].keys()


def test_a_result_read_back_says_the_same(result: Result, tmp_path: Path) -> None:
    result.to_json(tmp_path / "result.json")
    again = experiment().read(tmp_path / "result.json")
    assert again.summary() == result.summary()
    assert again.table().equals(result.table())
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(InputError, match="not a result"):
        experiment().read(tmp_path / "other.json")


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def full_disk(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_is_not_finite_becomes_null_and_leaves_the_claim_undecided(tmp_path: Path) -> None:
    for kept in (False, True):  # computed, then from the cache
        result = experiment(fake_cells.not_a_number).run(progress=False)
        result.to_json(tmp_path / "result.json")
        rows = json.loads((tmp_path / "result.json").read_text())["rows"]
        assert [row["value"] for row in rows if row["seed"] == 1 and row["metric"] == "test/acc"] == [None, None], kept
        assert result.verdict == "undecided"


def test_figure_draws_every_run_and_says_so_in_words(result: Result) -> None:
    figure = result.figure()
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o")
    assert drawn == 6
    assert "the claim holds" in figure.get_label()
    assert "new: 90." in figure.get_label()


# ----------------------------------------------------------------------------------------------------------- the shelf


def test_listing_experiments_imports_neither_torch_nor_pandas() -> None:
    code = """
import sys
from qlab.experiments import EXPERIMENTS
print(*EXPERIMENTS, *(name for name in ("torch", "pandas") if name in sys.modules))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == list(EXPERIMENTS)


def test_unknown_data_set_is_named_with_the_accepted_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"data set of experiment 'fake' 'digit'\. Did you mean 'digits'"):
        experiment().run(data="digit", progress=False)


@pytest.mark.parametrize(
    "arguments", [{"scale": "huge"}, {"seeds": 0}, {"seeds": [1, 1]}, {"seeds": [-1]}, {"seeds": []}, {"workers": 0}]
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected"):
        experiment().run(progress=False, **arguments)


def test_seeds_are_a_number_or_a_list() -> None:
    assert experiment().run(seeds=2, progress=False).seeds == (0, 1)
    assert experiment().run(seeds=[7, 5], progress=False).seeds == (7, 5)


# -------------------------------------------------------------------------------------------------- parallel processes


def test_parallel_gives_what_serial_gives(tmp_path: Path) -> None:
    serial = experiment().run(progress=False, workers=1, cache=tmp_path / "a").frame
    parallel = experiment().run(progress=False, workers=2, cache=tmp_path / "b").frame
    pids = {int(pid) for pid in parallel.query("metric == 'pid'")["value"]}
    assert os.getpid() not in pids
    assert parallel.query("metric != 'pid'").equals(serial.query("metric != 'pid'"))


def test_workers_compute_with_one_thread_and_start_without_torch(tmp_path: Path) -> None:
    outcomes = list(run_cells(fake_cells.threads, CELLS[:2], store(tmp_path), workers=2))
    assert [o.metrics for o in outcomes] == [{"threads": 1.0, "torch": 0.0}] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_failing_cell_is_named_and_loses_no_other(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    result = experiment(fake_cells.fails_on_seed_1, fails=True).run(workers=workers)
    (failure,) = result.failures
    assert (failure.cell.arm, failure.cell.seed, failure.error) == ("new", 1, "ValueError: the loss is NaN")
    assert "fails_on_seed_1" in failure.details
    assert len(result.frame[["arm", "seed"]].drop_duplicates()) == 5
    assert result.verdict == "undecided"
    assert "[new] seed 1 failed: ValueError: the loss is NaN" in capsys.readouterr().err


def test_cell_that_kills_its_process_is_found_and_loses_no_other(tmp_path: Path) -> None:
    cells = [dataclasses.replace(cell, settings={**cell.settings, "dies": cell.arm == "new"}) for cell in CELLS]
    outcomes = list(run_cells(fake_cells.dies_on_seed_1, cells, store(tmp_path), workers=2))
    assert len(outcomes) == len(cells)
    (failure,) = [o for o in outcomes if o.error]
    assert (failure.cell.arm, failure.cell.seed) == ("new", 1)
    assert "the process died" in failure.error


def test_leaving_early_ends_running_workers_and_keeps_what_is_done(tmp_path: Path) -> None:
    endless = [dataclasses.replace(cell, settings={**cell.settings, "endless": True}) for cell in CELLS[1:]]
    running = run_cells(fake_cells.never_ends, [CELLS[0], *endless], store(tmp_path), workers=2)
    first = next(running)
    assert first.cell == CELLS[0]
    running.close()  # returns although a worker is inside a cell that never ends
    assert not multiprocessing.active_children()
    assert store(tmp_path).load(CELLS[0]) is not None


# ------------------------------------------------------------------------------------------------------------ resuming


def marks(folder: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())


def test_interrupted_run_keeps_finished_cells_and_goes_on_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "marks"
    folder.mkdir()
    (folder / "interrupt").touch()
    fake = experiment(fake_cells.interrupts, marks=str(folder))
    fake = dataclasses.replace(fake, plan=lambda s, d: Plan({"new": {"mean": 0.9, "marks": str(folder)}}, seeds=3))
    with pytest.raises(KeyboardInterrupt):
        fake.run(workers=1)
    assert "interrupted: 1 of 3 runs are kept" in capsys.readouterr().err
    assert marks(folder) == ["0.9-0"]
    result = fake.run(workers=1)
    assert "1 of 3 runs were kept" in capsys.readouterr().err
    assert marks(folder) == ["0.9-0", "0.9-1", "0.9-2"]  # seed 0 was not computed again
    assert len(result.frame) == 9


def test_ctrl_c_ends_workers_and_keeps_what_is_done(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import signal, sys
            sys.path.insert(0, {root!r})
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would this
            from tests.experiments import fake_cells
            from qlab.experiments.base import Experiment, Plan
            from qlab.experiments.verdict import Rule

            if __name__ == "__main__":
                arms = {{"quick": {{"mean": 0.9}}, "endless": {{"mean": 0.9, "endless": True}}}}
                fake = Experiment("fake", "", "", Rule(()), (), fake_cells.never_ends, lambda s, d: Plan(arms), ("digits",))
                fake.run(seeds=1, workers=2)
        """).format(root=str(Path(__file__).parents[2]))
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "QLAB_CACHE": str(tmp_path)},
    ) as process:
        assert process.stderr is not None
        try:
            line = next((line for line in process.stderr if "[quick] seed 0 in" in line), "")
            assert "1/2" in line
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the workers as well
            _, errors = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode not in (0, None)
    assert "interrupted: 1 of 2 runs are kept" in errors
    assert errors.count("Traceback") == 1  # the KeyboardInterrupt of the script itself, none of a worker
    assert len(list((tmp_path / "experiments" / "fake").glob("*.json"))) == 1


def test_second_run_computes_nothing_unless_fresh(tmp_path: Path) -> None:
    fake = experiment(marks=str(tmp_path))
    before = {path.name for path in tmp_path.iterdir()}
    first = fake.run(progress=False, cache=tmp_path / "c")
    count = len(list(tmp_path.glob("0.9-*")))
    second = fake.run(progress=False, cache=tmp_path / "c")
    assert before == set()
    assert second.frame.equals(first.frame)
    for mark in tmp_path.glob("0.9-*"):
        mark.unlink()
    fake.run(progress=False, cache=tmp_path / "c")
    assert not list(tmp_path.glob("0.9-*"))
    fake.run(progress=False, cache=tmp_path / "c", fresh=True)
    assert len(list(tmp_path.glob("0.9-*"))) == count == 3


@pytest.mark.parametrize("change", ["settings", "seed", "arm", "versions"])
def test_a_changed_setting_is_another_cell(tmp_path: Path, change: str) -> None:
    cell, context = CELLS[0], {"versions": {"torch": "2"}}
    changed, other = cell, context
    if change == "settings":
        changed = dataclasses.replace(cell, settings={"mean": 0.8})
    elif change == "seed":
        changed = dataclasses.replace(cell, seed=9)
    elif change == "arm":
        changed = dataclasses.replace(cell, arm="newer")
    else:
        other = {"versions": {"torch": "3"}}
    next(iter(run_cells(fake_cells.accuracy, [cell], store(tmp_path))))
    assert store(tmp_path).load(cell) is not None
    assert Store(tmp_path, other, warn=pytest.fail).load(changed) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"arm": "new"}', "half", "other cell", "\xff\xfe"])
def test_damaged_file_is_told_of_and_computed_again(tmp_path: Path, content: str) -> None:
    lines: list[str] = []
    kept = Store(tmp_path, {}, lines.append)
    next(iter(run_cells(fake_cells.accuracy, CELLS[:1], kept)))
    path = kept.path(CELLS[0])
    good = path.read_text()
    if content == "half":
        content = good[: len(good) // 2]
    elif content == "other cell":
        content = good.replace('"seed": 0', '"seed": 5')
    path.write_bytes(content.encode("latin-1"))
    (again,) = run_cells(fake_cells.accuracy, CELLS[:1], kept)
    assert not again.kept
    assert len(lines) == 1
    assert "[new] seed 0 runs again" in lines[0]
    assert path.read_text() != content
    assert kept.load(CELLS[0]) is not None


def test_failed_cell_is_not_kept(tmp_path: Path) -> None:
    cell = Cell("new", 1, {"mean": 0.9, "fails": True})
    (outcome,) = run_cells(fake_cells.fails_on_seed_1, [cell], store(tmp_path))
    assert outcome.error
    assert not list(tmp_path.iterdir())


def test_full_disk_costs_the_resume_not_the_run(tmp_path: Path) -> None:
    lines: list[str] = []
    blocked = tmp_path / "file"
    blocked.touch()  # a file where the folder should be
    (outcome,) = run_cells(fake_cells.accuracy, CELLS[:1], Store(blocked / "folder", {}, lines.append))
    assert outcome.metrics
    assert any("could not be kept" in line for line in lines)


def test_source_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "digested"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest(["digested"])
    assert source_digest(["digested", "digested"]) == before
    (package / "part.py").write_text("x = 2\n")
    assert source_digest(["digested"]) != before
    assert "digested.part" not in sys.modules  # read, not run
    with pytest.raises(ModuleNotFoundError):
        source_digest(["digested_not"])


def pictures(folder: Path, brightness: int = 0) -> None:
    """Two classes of twenty pictures each in folder/image_folder."""
    draws = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "image_folder" / name).mkdir(parents=True, exist_ok=True)
        for i in range(20):
            pixels = draws.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(brightness if i == 7 else 0)).save(
                folder / "image_folder" / name / f"{i}.png"
            )


def test_changed_pictures_are_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLAB_DATA", str(tmp_path))
    pictures(tmp_path)
    before = data_digest("image_folder")
    assert data_digest("image_folder") == before
    pictures(tmp_path, brightness=50)
    assert data_digest("image_folder") != before


def test_missing_data_is_one_error_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLAB_DATA", raising=False)
    fake = dataclasses.replace(experiment(marks=str(tmp_path)), data=("image_folder",))
    with pytest.raises(DataNotFoundError, match="image_folder in QLAB_DATA"):
        fake.run(progress=False)
    assert not list(tmp_path.glob("0.9-*"))


def test_data_sets_are_loaded_by_name_and_names_of_other_inputs_pass() -> None:
    assert load_data("digits", batch_size=7).batch_size == 7
    assert data_digest("a problem that is no data set") == ""
