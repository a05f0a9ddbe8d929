r"""The nearest point of one cell, exactly: linear programs for l_inf and l1, a least distance program for l2.

    d = inf { ||x' - x||_p :  G x' + h >= 0, > 0 in open rows,  low <= x' <= high }

A cell is real if it holds a point at all, open rows taken seriously; then the infimum is that of its closure, for the segment from
an inner point to any point of the closure lies in the cell. Whether the infimum is attained is one more linear program: whether
open rows can be positive at that distance. Rows are scaled to length 1; slacks below SLACK count as none.

Source: Lawson, Hanson 1974, chapter 23 (least distance programming by non-negative least squares). Linear programs: HiGHS in scipy.

Shapes: x (D,), rows R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qlab.attacks.ball import Norm
from qlab.attacks.exact_layers import Cell, Flags, Floats

__all__ = ["Box", "Nearest", "inside", "length", "nearest"]

SLACK = 1e-9
_TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@dataclass(frozen=True)
class Box:
    """The range of inputs: low and high, (D,) each."""

    low: Floats
    high: Floats

    def clip(self, x: Floats) -> Floats:
        """Return points moved into the range."""
        return np.clip(x, self.low, self.high)


@dataclass(frozen=True)
class Nearest:
    """The infimum over a cell.

    Args:
        distance: d.
        point: (D,) where it is taken, in the closure of the cell.
        inner: (D,) a point of the cell: what lies between is of the cell, too.
        attained: whether the cell has a point at that distance.
    """

    distance: float
    point: Floats
    inner: Floats
    attained: bool


def length(delta: Floats, norm: Norm) -> Floats:
    """Return ||delta||_p over the last axis."""
    return np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=-1)


def inside(cell: Cell, box: Box) -> Floats | None:
    """Return a point (D,) of a cell within the range, well inside where there is room; None where it holds none."""
    rows = _rows(cell)
    if rows is None:
        return None
    G, h, strict = rows
    inner = _inner(G, h, np.ones(len(h), bool), box)
    if inner is None and not strict.all():  # a thin piece: a face of closed rows
        inner = _inner(G, h, strict, box)
    return inner


def nearest(
    cell: Cell, x: Floats, norm: Norm, box: Box, below: float = np.inf, inner: Floats | None = None
) -> Nearest | None:
    """Return the infimum of the distance from x (D,) over a cell within the range.

    Args:
        cell: its rows; a row of zeros holds or does not.
        below: distances that matter; a cell farther away counts as none.
        inner: what `inside` gives, where that is known.

    Returns:
        None where the cell holds no point, or none nearer than `below`.
    """
    rows = _rows(cell)
    if rows is None:
        return None
    G, h, strict = rows
    point = _closest(G, h, x, norm, box)
    if point is None:
        return None
    d = float(length(point - x, norm))
    if d > below:
        return None
    inner = inside(cell, box) if inner is None else inner
    return None if inner is None else Nearest(d, point, inner, _attained(G, h, strict, x, norm, box, point, d))


def _rows(cell: Cell) -> tuple[Floats, Floats, Flags] | None:
    """Return rows of length 1, offsets and which are open; None where a row without x does not hold."""
    size = np.linalg.norm(cell.G, axis=1)
    flat = size == 0
    if bool((np.where(cell.open, cell.h <= 0, cell.h < 0) & flat).any()):
        return None
    return cell.G[~flat] / size[~flat, None], cell.h[~flat] / size[~flat], cell.open[~flat]


def _linprog(cost: Floats, A: Floats, b: Floats, bounds: Floats) -> Any:
    """Minimise cost v over A v <= b within bounds."""
    from scipy.optimize import linprog

    return linprog(cost, A, b, bounds=bounds, options=_TIGHT)


def _closest(G: Floats, h: Floats, x: Floats, norm: Norm, box: Box) -> Floats | None:
    """Return the point of the closed cell in the box nearest to x, or None if there is none."""
    if bool((G @ x + h >= 0).all()):
        return x
    if norm == "linf":
        return _closest_linf(G, h, x, box)
    return _closest_l1(G, h, x, box) if norm == "l1" else _closest_l2(G, h, x, box)


def _closest_linf(G: Floats, h: Floats, x: Floats, box: Box) -> Floats | None:
    """min e over (x', e):  |x' - x| <= e."""
    D = len(x)
    one, eye = np.ones((D, 1)), np.eye(D)
    A = np.vstack([np.hstack([-G, np.zeros((len(G), 1))]), np.hstack([eye, -one]), np.hstack([-eye, -one])])
    bounds = np.vstack([np.stack([box.low, box.high], 1), [0, np.inf]])
    found = _linprog(np.append(np.zeros(D), 1.0), A, np.concatenate([h, x, -x]), bounds)
    return box.clip(found.x[:D]) if found.status == 0 else None


def _closest_l1(G: Floats, h: Floats, x: Floats, box: Box) -> Floats | None:
    """min sum(u + v) over x' = x + u - v, u, v >= 0."""
    A, b, bounds = _both_ways(G, h, x, box)
    found = _linprog(np.ones(2 * len(x)), A, b, bounds)
    if found.status != 0:
        return None
    u, v = np.split(found.x, 2)
    return box.clip(x + u - v)


def _both_ways(G: Floats, h: Floats, x: Floats, box: Box) -> tuple[Floats, Floats, Floats]:
    bounds = np.stack([np.zeros(2 * len(x)), np.concatenate([box.high - x, x - box.low])], 1)
    return np.hstack([-G, G]), G @ x + h, bounds


def _closest_l2(G: Floats, h: Floats, x: Floats, box: Box) -> Floats | None:
    """min ||s||_2 over s = x' - x:  E s >= f, by non-negative least squares in the rows."""
    from scipy.optimize import nnls

    eye = np.eye(len(x))
    E = np.vstack([G, eye, -eye])
    f = np.concatenate([-(G @ x + h), box.low - x, x - box.high])
    system = np.vstack([E.T, f])
    goal = np.append(np.zeros(len(x)), 1.0)
    weights, rest = nnls(system, goal)
    r = system @ weights - goal
    if rest < 1e-9:
        return None
    return box.clip(x - r[:-1] / r[-1])


def _inner(G: Floats, h: Floats, rows: Flags, box: Box, reach: Floats | None = None) -> Floats | None:
    """Return a point of the box that leaves as much room as can be in the rows named, or None if there is none.

    Args:
        rows: (R,) rows that need room; the others need to hold.
        reach: (D, 2) bounds in the place of the box.
    """
    D = G.shape[1]
    bounds = np.stack([box.low, box.high], 1) if reach is None else reach
    if not rows.any():
        found = _linprog(np.zeros(D), -G, h, bounds)
        return box.clip(found.x) if found.status == 0 else None
    A = np.hstack([-G, rows[:, None].astype(float)])
    found = _linprog(np.append(np.zeros(D), -1.0), A, h, np.vstack([bounds, [0, 1]]))
    if found.status != 0 or found.x[-1] <= SLACK:
        return None
    return box.clip(found.x[:D])


def _attained(G: Floats, h: Floats, strict: Flags, x: Floats, norm: Norm, box: Box, point: Floats, d: float) -> bool:
    """Return whether a point of the cell lies at distance d, not only in its closure."""
    if not strict.any():
        return True
    if norm == "l2" or d == 0:  # one nearest point only
        return bool((G @ point + h > SLACK)[strict].all())
    # Moving by `slack` in the ball changes a row of length 1 by at most sqrt(D) slack: more room than that is real.
    slack = SLACK * (1 + d)
    room = 2 * slack * np.sqrt(len(x)) + SLACK
    if norm == "linf":
        reach = np.stack([np.maximum(box.low, x - d - slack), np.minimum(box.high, x + d + slack)], 1)
        inner = _inner(G, h, strict, box, reach)
        return inner is not None and bool((G @ inner + h > room)[strict].all())
    A, b, bounds = _both_ways(G, h, x, box)
    A = np.vstack([np.hstack([A, strict[:, None].astype(float)]), np.append(np.ones(2 * len(x)), 0.0)])
    found = _linprog(
        np.append(np.zeros(2 * len(x)), -1.0),
        A,
        np.append(b, d + slack),
        np.vstack([bounds, [0, 1]]),
    )
    return found.status == 0 and found.x[-1] > room
