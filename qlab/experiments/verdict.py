"""The statistical rule of every experiment: when a claim holds, fails, or stays undecided.

Idea. Two arms are run with the same seeds; a seed fixes the split, the starting net and the order of the batches, so
the differences d_1 .. d_n of a metric over seeds are paired. The claim is that their expectation lies above a margin m.
With a 95 % interval [low, high] for the expectation:

    holds      low  > m        the whole interval lies on the claimed side
    fails      high < m        the whole interval lies on the other side
    undecided  otherwise

Which interval. The usual bias-corrected and accelerated (BCa) bootstrap is far too narrow for few seeds: with n = 3
normal differences whose expectation *is* the margin it lies wholly on one side in 28 % of all experiments, not in 5 %;
with n = 5 in 18 %, with n = 10 in 11 %. Student's t interval is exact for normal differences at every n, but knows
nothing of skewness. The interval used here is the hull of both, so a verdict needs the consent of both:

    low = min(low_t, low_BCa),    high = max(high_t, high_BCa)

At small n this is the t interval; for many skewed differences the bootstrap widens the side that t cuts short.
How often it lies wholly on one side of the true expectation (4000 simulated experiments each, n = 3 / 5 / 10):

    normal       5.1 % / 5.6 % / 4.9 %
    uniform      7.7 % / 6.1 % / 4.2 %
    Laplace      3.2 % / 3.3 % / 4.2 %
    exponential  11 %  / 12 %  / 9 %      nearly all of it on the side that the skewness hides

`tests/experiments/test_verdict.py` measures these rates. So: close to its 5 % for differences that are about symmetric
(as those of two arms are when neither is better), and up to 12 % for strongly skewed ones. A single seed decides
nothing. With k comparisons in one rule each interval has level 1 - 0.05/k (Bonferroni).

What the interval does not cover: it speaks of the training randomness on one data set, not of other data sets.

Reference: Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 14 (BCa).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Difference", "Every", "Evidence", "Metric", "Outcome", "Rule", "paired_interval"]

Outcome: TypeAlias = Literal["holds", "fails", "undecided"]

RESAMPLES = 1999
_RELATIONS = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal, "==": np.equal}


@dataclass(frozen=True)
class Metric:
    """How a number of a run is named and printed.

    Args:
        name: the key that a run reports, such as "test/acc".
        label: the words for it in tables, figures and rules.
        unit: printed behind the number; the difference of two percentages is printed in points.
        scale: what the stored value is multiplied with before printing (100 for shares in %).
        digits: decimals printed.
        log: whether a figure draws it on a logarithmic axis.
    """

    name: str
    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 1
    log: bool = False

    def show(self, value: float, difference: bool = False) -> str:
        """Return the value as printed, with its unit."""
        unit = "points" if difference and self.unit == "%" else self.unit
        return f"{self.number(value)} {unit}".strip()

    def number(self, value: float) -> str:
        """Return the value as printed, without its unit."""
        return f"{self.scale * value:.2g}" if self.log else f"{self.scale * value:.{self.digits}f}"


@dataclass(frozen=True)
class Evidence:
    """What one part of a rule found.

    Args:
        statement: the finding in words, with its numbers.
        outcome: what this part alone says.
        numbers: the numbers behind it, primitives only.
    """

    statement: str
    outcome: Outcome
    numbers: dict[str, Any] = field(default_factory=dict)


def paired_interval(
    differences: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval for the expectation of paired differences: the hull of Student's t and the BCa bootstrap.

    Args:
        differences: shape (..., n), one difference per seed in the last axis.
        confidence: nominal level, in (0, 1).
        seed: of the bootstrap's resampling; the same differences give the same interval.

    Returns:
        low and high, each of shape (...). With n = 1 they are -inf and inf. Where all differences are equal both bounds
        equal their mean: no spread was seen, and none is invented.

    Raises:
        InputError: for no differences, or some that are not finite.

    Reference:
        Efron, Tibshirani 1993, chapter 14; the rates of wrong verdicts stand in the module's docstring.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim == 0 or d.shape[-1] == 0 or not np.isfinite(d).all():
        raise InputError(f"expected finite differences of shape (..., n) with n >= 1, got {d!r}. Run more seeds.")
    n = d.shape[-1]
    mean = d.mean(-1)
    if n == 1:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * d.std(-1, ddof=1) / np.sqrt(n)
    with warnings.catch_warnings():
        # Equal differences have no BCa interval; SciPy warns and returns NaN, and the t interval (a point) remains.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        bootstrap = stats.bootstrap(
            (d,),
            np.mean,
            axis=-1,
            confidence_level=confidence,
            method="BCa",
            n_resamples=RESAMPLES,
            vectorized=True,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return np.fmin(mean - half, bootstrap.low), np.fmax(mean + half, bootstrap.high)


class Check(Protocol):
    """One part of a rule."""

    def words(self, confidence: float) -> str:
        """Return the condition under which this part holds."""
        ...

    def judge(self, frame: pd.DataFrame, seeds: Sequence[int], confidence: float) -> Evidence:
        """Return what the runs say about this part."""
        ...


@dataclass(frozen=True)
class Difference:
    """Claims that `metric` of `arm` exceeds that of `other` by more than `margin`, in expectation over seeds.

    Args:
        metric: what is compared; larger is on the claimed side.
        arm: the arm that is claimed to be ahead.
        other: the arm it is compared with, run with the same seeds.
        margin: in the unit of the stored value (0.1 is 10 points of accuracy).
    """

    metric: Metric
    arm: str
    other: str
    margin: float = 0.0

    def words(self, confidence: float) -> str:
        """Return the condition under which this part holds."""
        return (
            f"the {100 * confidence:.4g} % interval for {self.metric.label} of [{self.arm}] minus [{self.other}], "
            f"paired by seed, lies wholly above {self.metric.show(self.margin, difference=True)} (it fails if wholly below)"
        )

    def judge(self, frame: pd.DataFrame, seeds: Sequence[int], confidence: float) -> Evidence:
        """Return the interval of the paired differences and on which side of the margin it lies."""
        ours, theirs = (_values(frame, arm, self.metric.name, seeds) for arm in (self.arm, self.other))
        paired = np.isfinite(ours) & np.isfinite(theirs)
        d = (ours - theirs)[paired]
        numbers: dict[str, Any] = {
            "metric": self.metric.name,
            "arm": self.arm,
            "other": self.other,
            "margin": self.margin,
            "seeds": [seed for seed, there in zip(seeds, paired, strict=True) if there],
            "differences": d.tolist(),
        }
        what = f"{self.metric.label} of [{self.arm}] minus [{self.other}]"
        if not len(d):
            return Evidence(f"{what}: no seed for which both arms finished", "undecided", numbers)
        show = self.metric.show
        mean = float(d.mean())
        if len(d) == 1:
            statement = f"{what} is {show(mean, True)} in one run; one seed decides nothing"
            return Evidence(statement, "undecided", {**numbers, "mean": mean})
        low, high = (float(bound) for bound in paired_interval(d, confidence))
        numbers |= {"mean": mean, "low": low, "high": high, "confidence": confidence}
        outcome: Outcome = "holds" if low > self.margin else "fails" if high < self.margin else "undecided"
        statement = f"{what} is {show(mean, True)} (interval {show(low, True)} to {show(high, True)}, {len(d)} seeds)"
        if len(d) < len(seeds):
            statement += f"; {len(seeds) - len(d)} seeds are missing"
            outcome = "undecided"
        return Evidence(statement, outcome, numbers)


@dataclass(frozen=True)
class Every:
    """Claims something of every single run of some arms: one counterexample refutes it.

    Args:
        metric: what is looked at.
        arms: the arms it is claimed of.
        relation: one of > >= < <= ==.
        bound: in the unit of the stored value.
    """

    metric: Metric
    arms: tuple[str, ...]
    relation: str
    bound: float

    def __post_init__(self) -> None:
        if self.relation not in _RELATIONS:
            raise InputError(f"unknown relation {self.relation!r}; expected one of {' '.join(_RELATIONS)}")

    @property
    def condition(self) -> str:
        """What is claimed."""
        arms = ", ".join(f"[{arm}]" for arm in self.arms)
        return f"{self.metric.label} {self.relation} {self.metric.show(self.bound)} in every run of {arms}"

    def words(self, confidence: float) -> str:
        """Return the condition under which this part holds."""
        return f"{self.condition} (it fails with the first run where it is not)"

    def judge(self, frame: pd.DataFrame, seeds: Sequence[int], confidence: float) -> Evidence:
        """Return the range of the metric and the runs that contradict the claim."""
        values = np.stack([_values(frame, arm, self.metric.name, seeds) for arm in self.arms])
        there = np.isfinite(values)
        wrong = there & ~_RELATIONS[self.relation](values, self.bound)
        counterexamples = [
            {"arm": self.arms[i], "seed": seeds[j], "value": float(values[i, j])} for i, j in np.argwhere(wrong)
        ]
        numbers = {
            "metric": self.metric.name,
            "arms": list(self.arms),
            "relation": self.relation,
            "bound": self.bound,
            "runs": int(there.sum()),
            "missing": int((~there).sum()),
            "low": float(values[there].min()) if there.any() else None,
            "high": float(values[there].max()) if there.any() else None,
            "counterexamples": counterexamples,
        }
        outcome: Outcome = "fails" if counterexamples else "holds" if there.all() and there.size else "undecided"
        arms = ", ".join(f"[{arm}]" for arm in self.arms)
        if not there.any():
            return Evidence(f"{self.metric.label} of {arms}: no run finished", outcome, numbers)
        low, high = self.metric.show(values[there].min()), self.metric.show(values[there].max())
        span = low if low == high else f"{low} to {high}"
        statement = f"{self.metric.label} of {arms} is {span} in {there.sum()} runs"
        if counterexamples:
            statement += f", against the claim in {len(counterexamples)}"
        if not there.all():
            statement += f"; {(~there).sum()} runs are missing"
        return Evidence(statement, outcome, numbers)


@dataclass(frozen=True)
class Rule:
    """A claim holds if all its parts hold, fails if one fails, and is undecided otherwise.

    Args:
        checks: the parts.
        confidence: level of the rule; with k `Difference` parts each interval has level 1 - (1 - confidence)/k.
        given: what the claim presupposes. Where a run is not like that the claim says nothing of it: the verdict is undecided,
            whatever the parts say.
    """

    checks: tuple[Check, ...]
    confidence: float = 0.95
    given: tuple[Every, ...] = ()

    @property
    def level(self) -> float:
        """The level of each interval."""
        return 1 - (1 - self.confidence) / max(1, sum(isinstance(check, Difference) for check in self.checks))

    @property
    def words(self) -> str:
        """The rule in words."""
        parts = "; and ".join(check.words(self.level) for check in self.checks)
        interval = (
            ". The interval is the hull of Student's t and the BCa bootstrap interval over seeds: at 3 seeds a bootstrap "
            "alone is too narrow. Undecided otherwise, with one seed, or where runs are missing."
        )
        given = "".join(f" Undecided also unless {each.condition}." for each in self.given)
        return f"Holds if {parts}{interval}{given}"

    def judge(self, frame: pd.DataFrame, seeds: Sequence[int]) -> tuple[Outcome, tuple[Evidence, ...]]:
        """Return the verdict on the runs in `frame` and the evidence of each part.

        Args:
            frame: one row per run and metric with columns arm, seed, metric, value.
            seeds: the seeds that every arm should have been run with.
        """
        evidence = tuple(check.judge(frame, seeds, self.level) for check in self.checks)
        given = tuple(self._presupposed(each, frame, seeds) for each in self.given)
        outcomes = {part.outcome for part in evidence}
        if any(part.outcome != "holds" for part in given):
            return "undecided", given + evidence
        if "fails" in outcomes:
            return "fails", given + evidence
        return ("holds" if outcomes == {"holds"} else "undecided"), given + evidence

    def _presupposed(self, each: Every, frame: pd.DataFrame, seeds: Sequence[int]) -> Evidence:
        """Return what was found of a presupposition: not met, it leaves the claim open and does not refute it."""
        found = each.judge(frame, seeds, self.level)
        if found.outcome != "fails":
            return found
        low, high = (each.metric.show(found.numbers[end]) for end in ("low", "high"))
        return Evidence(f"the claim presupposes {each.condition}; it is {low} to {high}", "undecided", found.numbers)


def _values(frame: pd.DataFrame, arm: str, metric: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return the metric of an arm per seed, NaN where the run is missing."""
    rows = frame[(frame["arm"] == arm) & (frame["metric"] == metric)]
    return rows.set_index("seed")["value"].reindex(list(seeds)).to_numpy(dtype=np.float64)
