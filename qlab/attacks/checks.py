r"""The rules by which a check passes or fails, and what a check is.

Attacks are compared example by example, s_i in {0, 1} being whether one broke example i:

    b = #{ i : s_i(other) = 1, s_i(reference) = 0 },   c = #{ i : s_i(other) = 0, s_i(reference) = 1 }
    gap = A(reference) - A(other) = (b - c) / n
    p   = P( X >= b ),   X ~ Binomial(b + c, 1/2)                 McNemar's test, exact and one-sided

`reference` is beaten by `other` where p < 0.05, divided by the number of others that were tried, and, for n >= 500, the gap is more
than one point. The published rule asks of n >= 500 for the point alone; with many attacks to choose the best from, six examples of
500 come about by chance.

"A few" examples are counted against an allowed share q: too many are more than q n, and so many that a true share of q / 2 would
show them in less than 5 % of all samples.

Source: Carlini et al. 2019, arXiv 1902.06705 (per-example comparison); McNemar 1947; Wilson 1927.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest

from qlab.errors import InputError

__all__ = ["MECHANISMS", "Check", "Comparison", "Curve", "Mechanism", "State", "compare", "too_many", "wilson"]

State = Literal["pass", "warn", "fail", "skipped"]
Mechanism = Literal["V", "S", "R", "V or S", "tuning", "bookkeeping"]

MECHANISMS: dict[Mechanism, str] = {
    "V": "vanishing gradients",
    "S": "shattered gradients",
    "R": "randomness",
    "V or S": "vanishing or shattered gradients",
    "tuning": "an attack that is not at its best",
    "bookkeeping": "bookkeeping of the attack",
}

ALPHA = 0.05
TOL = 0.01
MANY = 500  # examples from which on one point is more than chance


@dataclass(frozen=True)
class Curve:
    """What a check saw, as points of a curve.

    Args:
        x, y: (K,) each.
        x_name, y_name: of the axes.
        log: whether x is best drawn on a logarithmic axis.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_name: str
    y_name: str = "accuracy"
    log: bool = False

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike, x_name: str, y_name: str = "accuracy", log: bool = False) -> Curve:
        """Return the curve of anything that is an array."""
        return cls(np.asarray(x, float), np.asarray(y, float), x_name, y_name, log)


@dataclass(frozen=True)
class Check:
    """One check of the battery and how it ended.

    Args:
        number: in the battery of 17.
        name: in a few words.
        condition: for a pass, in words.
        state: "pass", "warn", "fail" or "skipped".
        mechanism: what a failure comes from; what it would suggest where there is none.
        evidence: numbers by name.
        words: the evidence in words; why it was skipped.
        repair: what to try.
        curve: of what it saw, if it has one.
        examples: (N,) the examples that the failure is about, if there are such.
    """

    number: int
    name: str
    condition: str
    state: State
    mechanism: Mechanism
    words: str
    repair: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    curve: Curve | None = None
    examples: NDArray[np.bool_] | None = None

    @property
    def masking(self) -> bool:
        """Whether it failed, and that speaks of masking and not of an attack that could be tuned better."""
        return self.state == "fail" and self.mechanism not in ("tuning", "bookkeeping")


@dataclass(frozen=True)
class Comparison:
    """Two attacks on the same examples; see the module docstring.

    Args:
        n: examples.
        gained: b, broken by the other alone.
        lost: c, broken by the reference alone.
        trials: how many others were compared with the reference, this one being one of them.
    """

    n: int
    gained: int
    lost: int
    trials: int = 1

    @property
    def gap(self) -> float:
        """A(reference) - A(other): positive where the other is the stronger attack."""
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        """The probability of at least b of b + c, were both attacks equally strong."""
        return float(binom.sf(self.gained - 1, self.gained + self.lost, 0.5))

    def beaten(self, tol: float = TOL) -> bool:
        """Return whether the other attack is the stronger one, by more than chance, and more than tol where n >= 500."""
        return self.p * self.trials < ALPHA and (self.n < MANY or self.gap > tol)


def compare(reference: NDArray[np.bool_], other: NDArray[np.bool_], trials: int = 1) -> Comparison:
    """Return how two attacks compare, from what each broke, (N,) each.

    Raises:
        InputError: successes of different numbers of examples, or of none.
    """
    if reference.shape != other.shape or reference.ndim != 1 or not len(reference):
        raise InputError(
            f"successes have shapes {reference.shape} and {other.shape}; expected the same examples, (N,) with N >= 1"
        )
    return Comparison(len(reference), int((other & ~reference).sum()), int((reference & ~other).sum()), trials)


def strongest(reference: NDArray[np.bool_], others: Mapping[str, NDArray[np.bool_]]) -> tuple[str, Comparison]:
    """Return which of several attacks leaves the least accuracy, and how it compares, its choice being accounted for."""
    name = max(others, key=lambda k: int(others[k].sum()))
    return name, compare(reference, others[name], trials=len(others))


def too_many(count: int, n: int, allowed: float) -> bool:
    """Return whether `count` of n examples are more than the share allowed, and not by chance; see the module docstring."""
    return count > allowed * n and float(binom.sf(count - 1, n, allowed / 2)) < ALPHA


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, from `count` of n.

    Raises:
        InputError: counts that are no counts.
    """
    if not 0 <= count <= n or n < 1:
        raise InputError(f"{count} of {n} is no share; expected 0 <= count <= n and n >= 1")
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def share(successes: NDArray[np.bool_]) -> str:
    """Return the accuracy after an attack with its interval, in words."""
    n = len(successes)
    low, high = wilson(int(n - successes.sum()), n)
    return f"{1 - successes.mean():.1%} ({low:.1%} to {high:.1%})"
