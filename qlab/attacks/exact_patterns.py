r"""A net whose first layer has few signs: its answer is a function of the pattern of these signs, so all patterns are asked.

A first layer of h units with L levels each has L^h patterns; the rest of the net gives the class of each. A pattern is the cell
where every unit's z_i lies between two breaks, so it is no nearer than the farthest of these,

    d(x, pattern) >= max_i |z_i(x) - the interval of i| / ||w_i||_q,      1/p + 1/q = 1,

which needs no linear program, and which is infinite where a z_i does not get there within the range. Patterns of another class are
solved in the order of this bound until it passes the nearest found: the nearest found is then the nearest there is. See
`qlab.attacks.exact_cells` for one pattern.

Shapes: x (D,), P patterns, h units, L pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qlab.attacks.ball import Norm, dual
from qlab.attacks.exact_cells import Box, Nearest, inside, length, nearest
from qlab.attacks.exact_layers import TIE, Cell, Floats, Pieces, Stages, Whole
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
        cells: those that were looked at.
    """

    stages: Stages
    pieces: Whole
    classes: Whole
    cells: dict[int, tuple[Cell, Floats | None]] = field(default_factory=dict)

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

    def bounds(self, x: Floats, norm: Norm, box: Box) -> Floats:
        """Return a lower bound of the distance of x (D,) to each pattern, (P,)."""
        first = self.stages.stages[0]
        f = first.f
        assert isinstance(f, Pieces)
        z = first.W @ x + first.b
        plus, minus = np.maximum(first.W, 0), np.minimum(first.W, 0)
        least, most = plus @ box.low + minus @ box.high + first.b, plus @ box.high + minus @ box.low + first.b
        size = length(first.W, dual(norm))
        low, high = np.append(-np.inf, f.breaks), np.append(f.breaks, np.inf)
        gap = np.maximum(0, np.maximum(low - z[:, None], z[:, None] - high))  # (h, L)
        slack = TIE * (1 + np.abs(least) + np.abs(most))[:, None]
        never = (most[:, None] < low - slack) | (least[:, None] > high + slack)
        with np.errstate(divide="ignore", invalid="ignore"):
            # a unit without weights stays where it is
            far = np.where(gap > 0, gap / size[:, None], 0.0)
        return np.where(never, np.inf, far)[np.arange(len(z)), self.pieces].max(1)

    def nearest(self, x: Floats, y: int, norm: Norm, box: Box) -> tuple[Nearest | None, int]:
        """Return the nearest cell of another class than y, and how many were solved; None where the range holds none."""
        bounds = self.bounds(x, norm, box)
        others = np.flatnonzero((self.classes != y) & np.isfinite(bounds))
        best: Nearest | None = None
        solved = 0
        for p in others[np.argsort(bounds[others], kind="stable")]:
            if best is not None and bounds[p] > best.distance + (-_SAME if best.attained else _SAME):
                break
            cell, inner = self._cell(int(p), box)
            if inner is None:
                continue
            found = nearest(cell, x, norm, box, np.inf if best is None else best.distance + _SAME, inner)
            solved += 1
            if found is None:
                continue
            if best is None or found.distance < best.distance - _SAME or (found.attained and not best.attained):
                best = found
        return best, solved

    def _cell(self, p: int, box: Box) -> tuple[Cell, Floats | None]:
        """Return the cell of a pattern and a point of it, None if it has none; the same for all examples."""
        if p not in self.cells:
            rest = [np.zeros(len(s.b), np.int64) for s in self.stages.stages[1:-1]]  # constant: their inputs decide
            cell = self.stages.cell([self.pieces[p], *rest])
            self.cells[p] = cell, inside(cell, box)
        return self.cells[p]
