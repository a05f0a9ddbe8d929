r"""Small ReLU and sign nets as mixed-integer linear programs, solved by HiGHS through scipy.

    min ||x' - x||_p   over x' in the range, ||x' - x||_p <= r, binaries b:   z_t(x') - z_y(x') >= 0        for each class t != y

A scalar function of lines is slope_0 z + intercept_0 + sum_k [ rise_k relu(z - t_k) + jump_k H(z - t_k) ], and with bounds
l <= z - t_k <= u of interval arithmetic

    H = b       z - t >= l (1 - b),   z - t <= u b
    relu = a    a >= 0,  a >= z - t,  a <= z - t - l (1 - b),  a <= u b

The ball grows fourfold until a class is reached; a ball without one is proven empty, and small balls have tight bounds. The solver
calls 1e-6 zero, so the pattern of binaries that it finds is taken to `exact_cells.nearest` for the distance to the last bit, and
for whether it is real: where a unit stands on its break, b may be either, though sign(0) = +1. A pattern that is not real is cut
off, and the program solved again. Behind signs, where z takes the values of a lattice, b is decided between its points.

A program that is not finished in time leaves its dual bound: `lower` is proven anyway.

Sources: Tjeng, Xiao, Tedrake 2019, arXiv 1711.07356; Khalil, Gupta, Dilkina 2019, arXiv 1810.03538.

Shapes: x (D,), V variables (x', distances, then those of the units), units n.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlab.attacks.ball import Norm
from qlab.attacks.exact_cells import Box, Nearest, length, nearest
from qlab.attacks.exact_layers import Flags, Floats, Pieces, Stages, Whole, require_constant
from qlab.errors import InputError

__all__ = ["Milp", "MilpBounds"]

GROWTH, FIRST = 4.0, 1 / 32
_SAME = 1e-7  # distances that close are the same
_TRIES = 24  # patterns of one class that are not real, or do not attain the distance, before it is left
_CERTAIN = 1e-9


@dataclass(frozen=True)
class MilpBounds:
    """What is proven of one example: the nearest cell found (None: none), a lower bound, programs solved."""

    nearest: Nearest | None
    lower: float
    solved: int


@dataclass
class Milp:
    """The search for one example.

    Args:
        stages: the net.
        x, y: (D,) and its label.
        norm: "linf" or "l1".
        box: the range.
        time_limit: seconds.
    """

    stages: Stages
    x: Floats
    y: int
    norm: Norm
    box: Box
    time_limit: float
    solved: int = 0

    def solve(self) -> MilpBounds:
        """Return the nearest point of another class, and what is proven if time runs out."""
        self.end = time.monotonic() + self.time_limit
        far = float(length(np.maximum(self.x - self.box.low, self.box.high - self.x), self.norm))
        radius, proven = FIRST * float((self.box.high - self.box.low).max()), 0.0
        while True:
            radius = min(radius, far)
            best, lower, timely = self._within(radius)
            if best is not None:
                return MilpBounds(best, max(proven, min(lower, best.distance)), self.solved)
            if not timely:
                return MilpBounds(None, max(proven, min(lower, radius)), self.solved)
            if radius >= far:
                return MilpBounds(None, np.inf, self.solved)
            proven, radius = radius, GROWTH * radius

    def _within(self, radius: float) -> tuple[Nearest | None, float, bool]:
        """Return the nearest cell within a ball, a lower bound for all classes, and whether everything was finished."""
        best: Nearest | None = None
        lower, timely = np.inf, True
        for t in range(self.stages.classes):
            if t == self.y:
                continue
            program = _Program(self.stages, self.x, self.y, t, self.norm, self.box, radius)
            if not program.possible:
                continue
            settled = False  # whether a real pattern gave this class a bound
            for _ in range(_TRIES):
                limit = radius if best is None else best.distance + (0.0 if best.attained else _SAME)
                found, bound = self._solved(program, limit)
                if found is None and bound is None:  # no pattern left
                    settled = True
                    break
                assert bound is not None
                if not settled:
                    open_bound = bound
                if found is None:  # no time
                    break
                cell = self.stages.cell(program.pieces(found)).decides(t, self.y)
                near = None if cell is None else nearest(cell, self.x, self.norm, self.box)
                if near is not None:
                    if not settled:
                        lower, settled = min(lower, bound), True
                    if best is None or near.distance < best.distance - _SAME or (near.attained and not best.attained):
                        best = near
                    if best.attained:
                        break
                program.cut_off(found)
            if not settled:
                lower, timely = min(lower, open_bound), False
        return best, lower, timely

    def _solved(self, program: _Program, limit: float) -> tuple[Floats | None, float | None]:
        """Return a solution and the dual bound; (None, None) if there is none, (None, bound) if time ran out."""
        left = self.end - time.monotonic()
        if left <= 0:
            return None, 0.0
        self.solved += 1
        found = program.solve(limit, left)
        if found.status == 2:
            return None, None
        bound = found.mip_dual_bound
        if bound is None and found.status == 0:  # no binaries: a linear program, solved
            bound = found.fun
        bound = 0.0 if bound is None or not np.isfinite(bound) else max(0.0, float(bound))
        return found.x, bound


@dataclass
class _Program:
    """The program of one class and one ball."""

    stages: Stages
    x: Floats
    y: int
    t: int
    norm: Norm
    box: Box
    radius: float
    possible: bool = True
    rows: list[Floats] = field(default_factory=list)
    least: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        D = len(self.x)
        self.n_distances = 1 if self.norm == "linf" else D
        units = sum(len(s.b) * len(s.f.breaks) for s in self.stages if isinstance(s.f, Pieces))
        self.V = D + self.n_distances + 2 * units
        self.used = D + self.n_distances
        self.low, self.high = np.zeros(self.V), np.zeros(self.V)  # unused variables stay 0
        self.whole = np.zeros(self.V, bool)
        self.low[:D] = np.maximum(self.box.low, self.x - self.radius)
        self.high[:D] = np.minimum(self.box.high, self.x + self.radius)
        self.high[D : self.used] = self.radius
        for i in range(D):  # distances: -e <= x' - x <= e
            for side in (1.0, -1.0):
                row = np.zeros(self.V)
                row[i], row[D + (i if self.norm == "l1" else 0)] = side, 1.0
                self._row(row, side * self.x[i])
        self._layers()

    def _row(self, row: Floats, least: float) -> None:
        """Require row v >= least."""
        self.rows.append(row)
        self.least.append(least)

    def _layers(self) -> None:
        """Write the layers: values are E v + e, between lo and hi."""
        D = len(self.x)
        E, e = np.eye(D, self.V), np.zeros(D)
        lo, hi = self.low[:D].copy(), self.high[:D].copy()
        discrete = False
        self.on: list[tuple[Whole, list[list[int]]]] = []  # pieces that are sure, and binaries that count on top
        for stage in self.stages:
            plus, minus = np.maximum(stage.W, 0), np.minimum(stage.W, 0)
            lo, hi = plus @ lo + minus @ hi + stage.b, plus @ hi + minus @ lo + stage.b
            E, e = stage.W @ E, stage.W @ e + stage.b
            if isinstance(stage.f, Pieces):
                E, e, lo, hi = self._units(stage.f, E, e, lo, hi, discrete)
                discrete |= stage.f.constant
            elif stage.f is not None:
                require_constant(stage.f, np.abs(E).sum(1) > 0)
                raise InputError(
                    f"mixed-integer programs need functions of lines in every layer, but this net has {type(stage.f).__name__}"
                )
        a, c = E[self.t] - E[self.y], e[self.t] - e[self.y]
        size = float(np.abs(a).sum()) + abs(c)
        need = _thresholds(a, c, self.t < self.y)[1] if discrete else 0.0
        most = c + float(np.where(a > 0, a * self.high, a * self.low).sum())
        self.possible = most >= need - _CERTAIN * (1 + size)
        self._row(a, need - c)

    def _new(self, low: float, high: float, whole: bool) -> int:
        i = self.used
        self.low[i], self.high[i], self.whole[i] = low, high, whole
        self.used += 1
        return i

    def _units(
        self, f: Pieces, E: Floats, e: Floats, lo: Floats, hi: Floats, discrete: bool
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Write one layer of units and return its values and their bounds."""
        n = len(e)
        out, out_e = f.slopes[0] * E, f.slopes[0] * e + f.intercepts[0]
        sure, counted = np.zeros(n, np.int64), [[] for _ in range(n)]  # type: ignore[var-annotated]
        rises, jumps = np.diff(f.slopes), f.jumps
        for i in range(n):
            for k, t in enumerate(f.breaks):
                z, c = E[i], e[i] - t
                l, u = lo[i] - t, hi[i] - t
                off, on = _thresholds(z, c, bool(f.right[k])) if discrete and z.any() else (0.0, 0.0)
                margin = _CERTAIN * (1 + abs(l) + abs(u))
                if u < on - margin:
                    continue
                if l > off + margin:
                    sure[i] += 1
                    out[i] += rises[k] * z
                    out_e[i] += rises[k] * c + jumps[k]
                    continue
                l, u = min(l, on), max(u, off)
                b = self._new(0, 1, True)
                counted[i].append(b)
                row = z.copy()
                row[b] -= on - l  # z - t >= l + (on - l) b
                self._row(row, l - c)
                row = -z
                row[b] += u - off  # z - t <= off + (u - off) b
                self._row(row, c - off)
                out[i, b] += jumps[k] if abs(jumps[k]) > 0 else 0.0
                if rises[k]:
                    a = self._relu(z, c, l, u, b)
                    out[i, a] += rises[k]
        self.on.append((sure, counted))
        ends = [f.value(v, f.piece(v, 0.0)) for v in (lo, hi)]
        inner = [f.value(np.full(n, t), np.full(n, k + s)) for k, t in enumerate(f.breaks) for s in (0, 1)]
        inside = [(lo <= t) & (t <= hi) for t in f.breaks for _ in (0, 1)]
        bounds = ends + [np.where(there, v, ends[0]) for v, there in zip(inner, inside, strict=True)]
        return out, out_e, np.min(bounds, 0), np.max(bounds, 0)

    def _relu(self, z: Floats, c: float, l: float, u: float, b: int) -> int:
        """Write a = relu(z + c) and return where a stands."""
        a = self._new(0.0, max(u, 0.0), False)
        row = -z
        row[a] = 1.0  # a >= z + c
        self._row(row, c)
        row = z.copy()
        row[a], row[b] = -1.0, row[b] + l  # a <= z + c - l (1 - b)
        self._row(row, l - c)
        row = np.zeros(self.V)
        row[a], row[b] = -1.0, u  # a <= u b
        self._row(row, 0.0)
        return a

    def solve(self, limit: float, seconds: float) -> Any:
        """Return what HiGHS says of the least distance up to `limit`."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        D = len(self.x)
        cost = np.zeros(self.V)
        cost[D : D + self.n_distances] = 1.0
        rows, least = np.vstack([*self.rows, -cost]), np.array([*self.least, -limit])
        return milp(
            cost,
            integrality=self.whole.astype(int),
            bounds=Bounds(self.low, self.high),
            constraints=LinearConstraint(rows, least, np.inf),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )

    def pieces(self, solution: Floats) -> list[Whole]:
        """Return the pieces (n,) of each layer's units in a solution."""
        return [
            sure + np.array([round(sum(solution[b] for b in bs)) for bs in counted], np.int64)
            for sure, counted in self.on
        ]

    def cut_off(self, solution: Floats) -> None:
        """Forbid the pattern of binaries of a solution."""
        on: Flags = self.whole & (solution > 0.5)
        off: Flags = self.whole & ~on
        self._row(off.astype(float) - on.astype(float), 1.0 - on.sum())


def _thresholds(row: Floats, c: float, right: bool) -> tuple[float, float]:
    """Return (off, on) for z = row b + c of binaries b: z <= off or z >= on, as z < 0 or z >= 0 (z <= 0 or z > 0 if not `right`).

    If the values of z lie on a lattice, both stand clear of its points; else both are 0 and ties are allowed either way.
    """
    steps = np.abs(row[row != 0])
    if not len(steps):
        return 0.0, 0.0
    q = float(steps.min())
    ratio = steps / q
    if bool((np.abs(ratio - ratio.round()) > 1e-9 * ratio).any()):
        return 0.0, 0.0
    rest = c / q - np.floor(c / q)
    rest = 0.0 if min(rest, 1 - rest) < 1e-9 else rest
    above = rest if rest or right else 1.0  # the least value that counts as on, in units of q
    below = rest - 1.0 if rest or right else 0.0
    quarter = (above - below) / 4
    return q * (below + quarter), q * (above - quarter)
