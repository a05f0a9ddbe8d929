"""The verdict rule: its interval, its error rates by simulation, and what it says in every case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qlab.errors import InputError
from qlab.experiments.verdict import RESAMPLES, Difference, Every, Metric, Rule, paired_interval

ACC = Metric("test/acc", "test accuracy", "%", 100)
FLIPS = Metric("flips", "sign changes", digits=0)
AHEAD = Difference(ACC, "new", "old", margin=0.1)


def frame(values: dict[str, list[float]], metric: str = "test/acc") -> pd.DataFrame:
    rows = [(arm, seed, metric, value) for arm, column in values.items() for seed, value in enumerate(column)]
    return pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"])


SIMULATIONS = 4000
DRAWS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "uniform": (lambda rng, shape: rng.uniform(-1, 1, size=shape), 0.0),
    "laplace": (lambda rng, shape: rng.laplace(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
}
# What the docstring of qlab.experiments.verdict states, in %, plus 1 % for the spread of 4000 simulations (its standard
# deviation is 0.35 % at a rate of 5 %, 0.5 % at 12 %).
STATED = {
    ("normal", 3): 5.1, ("normal", 5): 5.6, ("normal", 10): 4.9,
    ("uniform", 3): 7.7, ("uniform", 5): 6.1, ("uniform", 10): 4.2,
    ("laplace", 3): 3.2, ("laplace", 5): 3.3, ("laplace", 10): 4.2,
    ("exponential", 3): 11.0, ("exponential", 5): 12.0, ("exponential", 10): 9.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "n"), STATED)
def test_wrong_verdicts_are_as_rare_as_the_rule_states(name: str, n: int) -> None:
    draw, expectation = DRAWS[name]
    low, high = paired_interval(draw(np.random.default_rng([7, n]), (SIMULATIONS, n)))
    wrong = 100 * np.mean((low > expectation) | (high < expectation))
    assert abs(wrong - STATED[name, n]) < 1.0


@pytest.mark.parametrize(("n", "rate"), [(3, 20), (5, 14)])
def test_a_bootstrap_alone_would_be_too_narrow_at_few_seeds(n: int, rate: float) -> None:
    d = np.random.default_rng(3).normal(size=(1000, n))
    options = {"n_resamples": 999, "vectorized": True, "axis": -1, "random_state": np.random.default_rng(0)}
    interval = stats.bootstrap((d,), np.mean, **options).confidence_interval
    assert 100 * np.mean((interval.low > 0) | (interval.high < 0)) > rate


def test_interval_contains_the_t_interval_and_the_bootstrap_interval() -> None:
    d = np.array([0.1, 0.4, 0.2, 1.9, 0.3, 0.2, 0.15, 0.9])
    low, high = paired_interval(d)
    t = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    options = {"n_resamples": RESAMPLES, "random_state": np.random.default_rng(0)}
    bca = stats.bootstrap((d,), np.mean, **options).confidence_interval
    assert low == pytest.approx(min(t.low, bca.low), abs=1e-12)
    assert high == pytest.approx(max(t.high, bca.high), abs=1e-12)
    assert bca.high > t.high  # skewed to the right: here the bootstrap is the wider one


def test_interval_is_the_same_each_time_and_turns_with_the_sign() -> None:
    d = np.array([0.1, 0.3, 0.25, 0.2])
    assert paired_interval(d) == paired_interval(d)
    low, high = paired_interval(d)
    assert paired_interval(-d)[0] == pytest.approx(-high, rel=0.02)
    assert paired_interval(-d)[1] == pytest.approx(-low, rel=0.02)


def test_one_seed_gives_an_unbounded_interval() -> None:
    assert paired_interval([0.3]) == (-np.inf, np.inf)


def test_equal_differences_give_a_point() -> None:
    low, high = paired_interval([0.25, 0.25, 0.25])
    assert low == high == 0.25


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [np.inf, 1.0], 3.0])
def test_differences_that_are_missing_or_not_finite_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="finite differences"):
        paired_interval(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("new", "expected"),
    [([0.90, 0.92, 0.91], "holds"), ([0.52, 0.55, 0.5], "fails"), ([0.55, 0.7, 0.63], "undecided")],
)
def test_difference_is_judged_by_the_side_of_the_margin(new: list[float], expected: str) -> None:
    verdict, (evidence,) = Rule((AHEAD,)).judge(frame({"new": new, "old": [0.50, 0.52, 0.51]}), (0, 1, 2))
    assert verdict == expected
    assert evidence.numbers["differences"] == pytest.approx(np.array(new) - [0.50, 0.52, 0.51])


def test_runs_are_paired_by_seed_not_by_row() -> None:
    shuffled = frame({"new": [0.9, 0.7, 0.8], "old": [0.7, 0.5, 0.6]}).sample(frac=1, random_state=1)
    _, (evidence,) = Rule((AHEAD,)).judge(shuffled, (0, 1, 2))
    assert evidence.numbers["differences"] == pytest.approx([0.2, 0.2, 0.2])


def test_one_seed_is_undecided_however_large_the_difference() -> None:
    verdict, (evidence,) = Rule((AHEAD,)).judge(frame({"new": [0.99], "old": [0.1]}), (0,))
    assert verdict == "undecided"
    assert "one seed decides nothing" in evidence.statement


@pytest.mark.parametrize("missing", [{"new": [0.9, 0.91], "old": [0.5, 0.51, 0.52]}, {"old": [0.5, 0.5, 0.5]}, {}])
def test_missing_runs_leave_the_claim_undecided(missing: dict[str, list[float]]) -> None:
    verdict, (evidence,) = Rule((AHEAD,)).judge(frame(missing), (0, 1, 2))
    assert verdict == "undecided"
    assert evidence.outcome == "undecided"


def test_a_diverged_run_counts_as_missing() -> None:
    runs = frame({"new": [0.9, float("nan"), 0.92], "old": [0.5, 0.5, 0.5]})
    assert Rule((AHEAD,)).judge(runs, (0, 1, 2))[0] == "undecided"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0, 0], "holds"), ([0, 3, 0], "fails"), ([0, 0], "undecided"), ([0, 3], "fails")],
)
def test_every_fails_with_one_counterexample_and_waits_for_missing_runs(values: list[float], expected: str) -> None:
    verdict, (evidence,) = Rule((Every(FLIPS, ("stuck",), "==", 0),)).judge(
        frame({"stuck": values}, "flips"), (0, 1, 2)
    )
    assert verdict == expected
    assert [run["value"] for run in evidence.numbers["counterexamples"]] == [v for v in values if v]


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(InputError, match="unknown relation '~'"):
        Every(FLIPS, ("stuck",), "~", 0)


def test_rule_holds_only_if_all_parts_hold_and_fails_if_one_fails() -> None:
    runs = pd.concat([frame({"new": [0.9, 0.91, 0.9], "old": [0.5, 0.5, 0.5]}), frame({"new": [1, 2, 0]}, "flips")])
    ahead, moves = AHEAD, Every(FLIPS, ("new",), ">", 0)
    assert Rule((ahead,)).judge(runs, (0, 1, 2))[0] == "holds"
    assert Rule((ahead, moves)).judge(runs, (0, 1, 2))[0] == "fails"
    assert Rule((ahead, Every(FLIPS, ("old",), "==", 0))).judge(runs, (0, 1, 2))[0] == "undecided"


@pytest.mark.parametrize(
    ("flips", "expected", "found"),
    [
        ([1, 2, 3], "fails", "holds"),
        ([1, 2, 0], "undecided", "undecided"),
        ([1, 2], "undecided", "undecided"),
    ],
)
def test_where_a_run_is_not_what_the_claim_presupposes_the_verdict_is_undecided(
    flips: list[float], expected: str, found: str
) -> None:
    runs = pd.concat([frame({"new": [0.1, 0.1, 0.11], "old": [0.5, 0.52, 0.5]}), frame({"new": flips}, "flips")])
    rule = Rule((AHEAD,), given=(Every(FLIPS, ("new",), ">", 0),))
    verdict, evidence = rule.judge(runs, (0, 1, 2))
    assert (verdict, evidence[0].outcome, evidence[1].outcome) == (expected, found, "fails")
    assert "Undecided also unless" in rule.words
    assert "in every run of [new]." in rule.words


def test_several_comparisons_share_the_error() -> None:
    rule = Rule((AHEAD, Difference(ACC, "old", "new"), Every(FLIPS, ("new",), ">", 0)))
    assert rule.level == pytest.approx(0.975)
    assert "97.5 % interval" in rule.words


def test_rule_says_in_words_what_decides() -> None:
    words = Rule((AHEAD, Every(FLIPS, ("new", "old"), "==", 0))).words
    assert "test accuracy of [new] minus [old]" in words
    assert "above 10.0 points" in words
    assert "sign changes == 0 in every run of [new], [old]" in words
    assert "at 3 seeds" in words
