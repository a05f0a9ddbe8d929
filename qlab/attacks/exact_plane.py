r"""A net of two inputs, cell by cell: the range is cut along the breaks of every unit until the class is one on each piece.

The first layer's units cut the range along lines. Behind signs nothing varies any more; behind ReLU each polygon goes on with its
own affine map and is cut along its own lines. What is left are polygons with one class each, and edges and vertices between them,
which have a class of their own: at a break sign gives +1, so one side owns the line, and where several lines meet a class may show
that no polygon has. All three kinds of faces count:

    d(x) = min over faces of another class than y of  inf { ||x' - x||_p : x' in the closure of the face }

and it is attained exactly if a face of another class (open edge or vertex) holds such a point. The distance to a segment is convex
and made of few pieces along it, so the least of its candidates is the least of all. A polygon thinner than rounding (TIE of the
range) is not seen.

Shapes: P polygons, T vertices of all of them, as many edges; N points.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlab.attacks.ball import Norm
from qlab.attacks.exact_cells import Box, length
from qlab.attacks.exact_layers import TIE, Floats, Pieces, Stages, Whole, first_largest, require_constant, smooth
from qlab.errors import InputError

__all__ = ["Plane", "PlaneDistance", "decompose", "distances"]

MAX_CELLS = 50_000
_CHUNK = 2**21  # pairs of a point and an edge at a time
_CLOSE = 1e-11  # distances that close are the same, in units of the range


@dataclass(frozen=True)
class Plane:
    """The range as polygons of one class each.

    Args:
        vertices: (T, 2), polygon after polygon, counter-clockwise; edge e runs from vertex e to the next of its polygon.
        starts: (P + 1,) where each polygon begins.
        classes: (P,) class of each open polygon.
        edges: (T,) class of each edge without its ends.
        corners: (T,) class of each vertex.
    """

    vertices: Floats
    starts: Whole
    classes: Whole
    edges: Whole
    corners: Whole

    @property
    def polygons(self) -> list[Floats]:
        """The polygons, (V, 2) each."""
        return np.split(self.vertices, self.starts[1:-1])

    @property
    def ends(self) -> Floats:
        """(T, 2) where each edge ends."""
        following = np.arange(1, len(self.vertices) + 1)
        following[self.starts[1:] - 1] = self.starts[:-1]
        return self.vertices[following]

    @property
    def owner(self) -> Whole:
        """(T,) polygon of each vertex and edge."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.starts))


@dataclass(frozen=True)
class PlaneDistance:
    """What the plane says of N points: distance (N,), nearest point (N, 2), a point inside the face (N, 2), attained (N,)."""

    distance: Floats
    point: Floats
    inner: Floats
    attained: NDArray[np.bool_]


def decompose(stages: Stages, box: Box, most: int = MAX_CELLS) -> Generator[float, None, Plane]:
    """Cut the range into polygons of one class, yielding the share done.

    Args:
        stages: of two inputs.
        box: the range.
        most: cells that it may come to.

    Raises:
        InputError: more cells than that; a smooth function of what varies.
    """
    cut = _Cut(box, most)
    A, c = np.eye(2)[None], np.zeros((1, 2))  # one map for all polygons, to begin with
    work = sum(len(stage.b) for stage in stages)
    done = 0
    for stage in stages:
        c, tol = stage.affine(c)
        A = np.einsum("oi,mid->mod", stage.W, A, optimize=True) if A.any() else np.zeros((1, len(stage.b), 2))
        if isinstance(stage.f, Pieces):
            for i in range(len(stage.b)):
                for t in stage.f.breaks if A[:, i].any() else ():
                    cut.along(A[cut.map, i], c[cut.map, i] - t)
                yield (done + i) / work
            if A.any():  # from here on every polygon has its own map
                A, c, tol = A[cut.map], c[cut.map], tol[cut.map]
                cut.map = np.arange(len(A))
            tol = tol + TIE * np.abs(A).sum(2) * cut.reach
            k = stage.f.piece((A * cut.middles[cut.first][:, None]).sum(2) + c, tol)
            c = stage.f.value(c, k)
            A = stage.f.slopes[k][..., None] * A if not stage.f.constant else np.zeros((1, len(stage.b), 2))
        elif stage.f is not None:
            require_constant(stage.f, np.abs(A).sum((0, 2)) > 0)
            c = smooth(stage.f, c)
        done += len(stage.b)
    classes = _decided(cut, A, c, tol)
    starts = np.concatenate([[0], np.cumsum([len(p) for p in cut.polygons])])
    plane = Plane(np.concatenate(cut.polygons), starts, classes, classes[:0], classes[:0])
    middles = (plane.vertices + plane.ends) / 2
    edges, corners = stages.classify(middles), stages.classify(plane.vertices)
    return Plane(plane.vertices, starts, classes, edges, corners)


class _Cut:
    """Polygons that are cut again and again; each goes on with the map of the one it was part of.

    Attributes:
        polygons: (V, 2) each.
        map: (P,) which map each has.
        reach: the largest coordinate.
    """

    def __init__(self, box: Box, most: int) -> None:
        (x0, y0), (x1, y1) = box.low, box.high
        self.polygons = [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])]
        self.map = np.zeros(1, np.int64)
        self.reach, self.most = float(np.abs([x0, y0, x1, y1]).max()), most

    @property
    def first(self) -> Whole:
        """The first polygon of each map."""
        return np.unique(self.map, return_index=True)[1]

    @property
    def middles(self) -> Floats:
        """(P, 2) a point inside each."""
        sizes = np.array([len(p) for p in self.polygons])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        return np.add.reduceat(np.concatenate(self.polygons), starts) / sizes[:, None]

    def along(self, a: Floats, b: Floats) -> Whole:
        """Cut each polygon along its line a x + b = 0, (P, 2) and (P,): it keeps the side >= 0.

        Returns:
            The polygons that were cut: the other sides follow at the end in this order.
        """
        sizes = np.array([len(p) for p in self.polygons])
        owner = np.repeat(np.arange(len(sizes)), sizes)
        values = (np.concatenate(self.polygons) * a[owner]).sum(1) + b[owner]
        tol = TIE * (np.abs(a).sum(1) * self.reach + np.abs(b))
        values[np.abs(values) <= tol[owner]] = 0
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        parents = np.flatnonzero((np.minimum.reduceat(values, starts) < 0) & (np.maximum.reduceat(values, starts) > 0))
        if len(sizes) + len(parents) > self.most:
            raise InputError(
                f"this net cuts the range into more than {self.most:,} cells; expected a smaller net, or a narrower range"
            )
        for p in parents:
            self.polygons[p], new = _halves(self.polygons[p], values[starts[p] : starts[p] + sizes[p]])
            self.polygons.append(new)
        self.map = np.concatenate([self.map, self.map[parents]])
        return parents


def _halves(polygon: Floats, v: Floats) -> tuple[Floats, Floats]:
    """Return the parts of a convex polygon where v >= 0 and v <= 0, v (V,) being affine and given at its vertices."""
    w = np.roll(v, -1)
    crossing = v * w < 0
    t = np.where(crossing, v / np.where(crossing, v - w, 1.0), 0.0)
    met = polygon + t[:, None] * (np.roll(polygon, -1, 0) - polygon)
    both = np.stack([polygon, met], 1).reshape(-1, 2)
    sides = [both[np.stack([side, crossing], 1).reshape(-1)] for side in (v >= 0, v <= 0)]
    return sides[0], sides[1]


def _decided(cut: _Cut, A: Floats, c: Floats, tol: Floats) -> Whole:
    """Return the class (P,) of each polygon, having cut them along the lines where the largest logit changes."""
    if not A.any():
        return first_largest(c, tol)[cut.map]
    best = np.zeros(len(cut.polygons), np.int64)
    for i in range(1, c.shape[1]):
        m = cut.map
        best = np.concatenate([best, best[cut.along(A[m, i] - A[m, best], c[m, i] - c[m, best])]])
        m, x = cut.map, cut.middles
        ahead = ((A[m, i] - A[m, best]) * x).sum(1) + c[m, i] - c[m, best]
        close = TIE * (np.abs(A[m, i]) + np.abs(A[m, best])).sum(1) * cut.reach + tol[m, i] + tol[m, best]
        best = np.where(ahead > close, i, best)
    return best


def distances(plane: Plane, x: Floats, y: Whole, norm: Norm, width: float) -> PlaneDistance:
    """Return the distance of each point to the nearest face of another class than its label.

    Args:
        x, y: (N, 2) points and (N,) labels.
        width: of the range, the unit of rounding.
    """
    N = len(x)
    out = PlaneDistance(np.full(N, np.inf), np.full((N, 2), np.nan), np.full((N, 2), np.nan), np.zeros(N, bool))
    close = _CLOSE * width
    ends, owner = plane.ends, plane.owner
    sizes = np.diff(plane.starts)
    middles = np.add.reduceat(plane.vertices, plane.starts[:-1]) / sizes[:, None]
    for label in np.unique(y):
        cell = plane.classes[owner] != label
        edge, corner = plane.edges != label, plane.corners != label
        wanted = np.flatnonzero(cell | edge | corner)
        if not len(wanted):
            continue
        a, b = plane.vertices[wanted], ends[wanted]
        # where only the corner is of another class, its edge shrinks to it
        only = ~(cell | edge)[wanted]
        b = np.where(only[:, None], a, b)
        inner = np.where(cell[wanted, None], middles[owner[wanted]], np.where(edge[wanted, None], (a + b) / 2, a))
        own_edge, own_corner = edge[wanted], corner[wanted]
        points = np.flatnonzero(y == label)
        for some in np.array_split(points, max(1, -(-len(points) * len(wanted) // _CHUNK))):
            d, t = _to_segments(x[some], a, b, norm)
            least = d.min(1)
            near = d <= least[:, None] + close
            # an edge is there twice: better as one of a polygon of another class, which has room for a witness
            best = (near * (1 + 2 * cell[wanted] + edge[wanted])).argmax(1)
            at = a[best] + t[np.arange(len(some)), best, None] * (b - a)[best]
            within = near & own_edge & (t * length(b - a, "l2") > close) & ((1 - t) * length(b - a, "l2") > close)
            corners = (length(a[None] - x[some, None], norm) <= least[:, None] + close) & own_corner
            out.distance[some], out.point[some], out.inner[some] = least, at, inner[best]
            out.attained[some] = (within | corners).any(1)
    return out


def _to_segments(x: Floats, a: Floats, b: Floats, norm: Norm) -> tuple[Floats, Floats]:
    """Return distances (N, E) of points to segments from a to b (E, 2), and where along them, in the middle of all nearest."""
    e, d = b - a, a[None] - x[:, None]  # (E, 2), (N, E, 2)
    zero = np.zeros(d.shape[:2])
    with np.errstate(divide="ignore", invalid="ignore"):
        if norm == "l2":
            candidates = [-(d * e).sum(2) / (e * e).sum(1)]
        else:
            candidates = [zero, zero + 1, -d[..., 0] / e[:, 0], -d[..., 1] / e[:, 1]]
            if norm == "linf":
                candidates += [
                    (d[..., 0] - d[..., 1]) / (e[:, 1] - e[:, 0]),
                    -(d[..., 0] + d[..., 1]) / (e[:, 0] + e[:, 1]),
                ]
    t = np.nan_to_num(np.clip(np.stack(candidates, 2), 0, 1))
    value = length(d[:, :, None] + t[..., None] * e[:, None], norm)
    least = value.min(2)
    near = value <= least[..., None] * (1 + 1e-12)
    first, last = np.where(near, t, 2.0).min(2), np.where(near, t, -1.0).max(2)
    return least, (first + last) / 2
