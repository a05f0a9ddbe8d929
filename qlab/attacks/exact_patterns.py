r"""A net whose first layer has few signs: its answer is a function of the pattern of these signs, so all patterns are asked.

A first layer of h units with L levels each has L^h patterns; the rest of the net gives the class of each. A pattern is the cell
where every unit's z_i lies between two breaks, so it is no nearer than the farthest of these,

    d(x, pattern) >= max_i |z_i(x) - the interval of i| / ||w_i||_q,      1/p + 1/q = 1,

which needs no linear program. Patterns of another class are solved in the order of this bound until it passes the nearest found:
the nearest found is then the nearest there is. See `qlab.attacks.exact_cells` for one pattern.

Shapes: x (D,), P patterns, h units, L pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlab.attacks.ball import Norm, dual
from qlab.attacks.exact_cells import Box, Nearest, length, nearest
from qlab.attacks.exact_layers import Floats, Pieces, Stages, Whole
from qlab.errors import InputError

__all__ = ["MAX_PATTERNS", "Patterns", "count_patterns"]

MAX_PATTERNS = 2**16
_SAME = 1e-9  # distances that close are the same


def count_patterns(stages: Stages) -> float:
    """Return the number of patterns of the first layer, infinite where it does not give a few levels."""
    f = stages.stages[0].f
    if not isinstance(f, Pieces) or not f.constant:
        return np.inf
    return float(len(f.intercepts)) ** len(stages.stages[0].b)


@dataclass(frozen=True)
class Patterns:
    """All patterns of a first layer and their classes.

    Args:
        stages: the net.
        pieces: (P, h) piece of each unit in each pattern.
        classes: (P,).
    """

    stages: Stages
    pieces: Whole
    classes: Whole

    @classmethod
    def of(cls, stages: Stages) -> Patterns:
        """Return the patterns of a net.

        Raises:
            InputError: a first layer without levels, or more than MAX_PATTERNS patterns.
        """
        count = count_patterns(stages)
        first = stages.stages[0]
        if count > MAX_PATTERNS or not isinstance(first.f, Pieces):
            raise InputError(
                f"the first layer has {len(first.b)} units, which is more than {MAX_PATTERNS:,} patterns, or units without levels; "
                "expected few signs there (method='milp' takes other nets)"
            )
        grid = np.indices((len(first.f.intercepts),) * len(first.b)).reshape(len(first.b), -1).T
        return cls(stages, grid, stages.classify(first.f.intercepts[grid], begin=1))

    def bounds(self, x: Floats, norm: Norm) -> Floats:
        """Return a lower bound of the distance of x (D,) to each pattern, (P,)."""
        first = self.stages.stages[0]
        f = first.f
        assert isinstance(f, Pieces)
        z = first.W @ x + first.b
        size = length(first.W, dual(norm))
        low, high = np.append(-np.inf, f.breaks), np.append(f.breaks, np.inf)
        gap = np.maximum(0, np.maximum(low - z[:, None], z[:, None] - high))  # (h, L)
        with np.errstate(divide="ignore", invalid="ignore"):
            # a unit without weights stays where it is
            far = np.where(size[:, None] > 0, gap / size[:, None], np.where(gap > 0, np.inf, 0.0))
        return far[np.arange(len(z)), self.pieces].max(1)

    def nearest(self, x: Floats, y: int, norm: Norm, box: Box) -> tuple[Nearest | None, int]:
        """Return the nearest cell of another class than y, and how many were solved; None where the range holds none."""
        first = self.stages.stages[0]
        bounds = self.bounds(x, norm)
        others = np.flatnonzero((self.classes != y) & np.isfinite(bounds))
        best: Nearest | None = None
        solved = 0
        rest = [np.zeros(len(s.b), np.int64) for s in self.stages.stages[1:-1]]  # constant there: their inputs decide
        for p in others[np.argsort(bounds[others], kind="stable")]:
            if best is not None and bounds[p] > best.distance + (-_SAME if best.attained else _SAME):
                break
            limit = np.inf if best is None else best.distance + _SAME
            found = nearest(_first_cell(self.stages, self.pieces[p], rest), x, norm, box, limit)
            solved += 1
            if found is None:
                continue
            nearer = best is None or found.distance < best.distance - _SAME
            if best is None or nearer or (found.attained and not best.attained):
                best = found
        assert first.f is not None
        return best, solved


def _first_cell(stages: Stages, pieces: Whole, rest: list[Whole]):  # type: ignore[no-untyped-def]
    return stages.cell([pieces, *rest])
