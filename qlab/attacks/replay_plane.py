r"""A plane through an input, on which paths of attacks are drawn.

    u     = (x* - x) / ||x* - x||                          x* the iterate of largest margin among all paths
    v     = leading right singular vector of (I - u u') Delta,      Delta the rows x_t - x of all paths, not centred
    (a, b) = ((x' - o) u, (x' - o) v)                      coordinates of a point x', o = x

Two inputs are a plane already: u and v are the coordinate axes then, o = 0, and (a, b) is the input itself. Where nothing moves, or
everything along one line, what is missing is a random direction, drawn from the seed.

A path has a part off the plane, which the drawing loses; `in_plane` is the share of its length that is kept:

    sum_t ||P (x_{t+1} - x_t)|| / sum_t ||x_{t+1} - x_t||,      P = u u' + v v'

The landscape is the margin of the net at the very points of the plane, o + a u + b v. They are not clipped to the range of inputs,
for a clipped point lies off the plane. Where the range ends is drawn instead: `outline` gives the cut of ball and plane, and
`allowed` the part of it that lies in the range. Projected points of a path may lie outside both.

Shapes: D numbers in an input, T steps, G x G grid, V corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.attacks.losses import margin
from qlab.data.seeding import generator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qlab.attacks.ball import Norm

__all__ = ["Landscape", "Plane", "allowed", "in_plane", "landscape", "outline", "plane_of"]

Floats = NDArray[np.float64]
ROOM = 1.15  # half the side of the drawing, in units of what it must hold
CORNERS = 240  # of the polygon that stands for a circle
SAME = 1e-9  # a part of a direction shorter than this, relatively, is rounding
CHUNK = 2**20  # numbers of inputs that are asked about at once


@dataclass(frozen=True)
class Plane:
    """A plane in the space of inputs.

    Args:
        origin: (D,) o.
        axes: (2, D) u and v, orthonormal.
        centre: (2,) coordinates of the example.
        half: half the side of the square that is drawn around it.
    """

    origin: Floats
    axes: Floats
    centre: Floats
    half: float

    def coordinates(self, points: Floats) -> Floats:
        """Return (a, b) of points (..., D), (..., 2)."""
        return (points - self.origin) @ self.axes.T

    def points(self, coordinates: Floats) -> Floats:
        """Return the points (..., D) at coordinates (..., 2)."""
        return self.origin + coordinates @ self.axes

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the square that is drawn."""
        a, b = self.centre
        return float(a - self.half), float(a + self.half), float(b - self.half), float(b + self.half)


@dataclass(frozen=True)
class Landscape:
    """Margins of a net on a plane.

    Args:
        a, b: (G,) coordinates, rising.
        margin: (G, G) max_{i != y} z_i - z_y, rows along b; above 0 the label is lost.
    """

    a: Floats
    b: Floats
    margin: Floats

    @property
    def lost(self) -> float:
        """Share of the square where the label is lost."""
        return float((self.margin > 0).mean())


def plane_of(x: Floats, deltas: Sequence[Floats], best: Floats, eps: float, norm: Norm, seed: int = 0) -> Plane:
    """Return the plane for paths around an example.

    Args:
        x: (D,) the example, D >= 2.
        deltas: x_t - x of each path, (T, D) each.
        best: (D,) x* - x.
        eps, norm: of the ball, of which the square shows at least what reaches as far in all directions.
        seed: of directions that the paths do not give.
    """
    D = len(x)
    rows = np.concatenate([*deltas, np.zeros((1, D))])
    if D == 2:
        origin, axes = np.zeros(2), np.eye(2)
    else:
        scale = max(float(np.abs(rows).max()), math.ulp(0.0))
        spare = torch.randn(2, D, generator=generator("plane of a replay", seed), dtype=torch.float64).numpy()
        u = best if np.abs(best).max() > SAME * scale else _leading(rows, scale)
        u = _unit(spare[0] if u is None else u)
        v = _leading(rows - np.outer(rows @ u, u), scale)
        v = _unit(_off(spare[1] if v is None else v, u))
        origin, axes = x, np.stack([u, _unit(_off(v, u))])  # twice, for once leaves rounding
    centre = (x - origin) @ axes.T
    reach = float(np.abs(rows @ axes.T).max())
    return Plane(origin, axes, centre, ROOM * max(reach, eps * (1.0 if D == 2 else _inner(axes, norm))))


def _inner(axes: Floats, norm: Norm) -> float:
    """Return how far the cut of a ball of radius 1 reaches in every direction."""
    if norm == "linf":
        return 1 / float(np.linalg.norm(axes, axis=0).max())
    return 1 / math.sqrt(axes.shape[1]) if norm == "l1" else 1.0


def _leading(rows: Floats, scale: float) -> Floats | None:
    """Return the leading right singular vector (D,) of rows (n, D), with the sign that its largest entry is positive."""
    _, s, vt = np.linalg.svd(rows / scale, full_matrices=False)
    if not s[0] > SAME:
        return None
    v: Floats = vt[0]
    return v * np.sign(v[np.abs(v).argmax()])


def _off(v: Floats, u: Floats) -> Floats:
    return v - (v @ u) * u


def _unit(v: Floats) -> Floats:
    v = v / np.abs(v).max()  # squares of tiny numbers would underflow
    return v / np.linalg.norm(v)


def in_plane(plane: Plane, points: Floats) -> float:
    """Return the share of the length of a path (T, D) that lies in the plane; NaN for one that does not move."""
    moves = np.diff(points, axis=0)
    largest = float(np.abs(moves).max(initial=0))
    if largest == 0:
        return math.nan
    moves = moves / largest  # squares of tiny numbers would underflow
    return float(np.linalg.norm(moves @ plane.axes.T, axis=1).sum() / np.linalg.norm(moves, axis=1).sum())


def outline(plane: Plane, eps: float, norm: Norm) -> Floats:
    """Return the cut of ball and plane as a polygon (V, 2), counter-clockwise, in coordinates of the plane; a circle for l2."""
    u, v = plane.axes
    if norm == "linf":
        # No point of the cut is further from x than eps sqrt(D).
        reach = 2 * eps * math.sqrt(len(u))
        box = reach * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
        w = np.concatenate([plane.axes.T, -plane.axes.T])
        return plane.centre + _cut(box, w, np.full(len(w), eps))
    if norm == "l2":
        angles = np.linspace(0, 2 * math.pi, CORNERS, endpoint=False)
    else:  # the corners are where a coordinate changes its sign
        half = np.arctan2(-u, v)[(u != 0) | (v != 0)]
        angles = np.unique(np.concatenate([half, half + math.pi]) % (2 * math.pi))
    ways = np.stack([np.cos(angles), np.sin(angles)], 1)
    size = np.linalg.norm(ways @ plane.axes, ord=1 if norm == "l1" else 2, axis=1)
    return plane.centre + eps * ways / size[:, None]


def allowed(plane: Plane, ball: Floats, x: Floats, low: Floats, high: Floats) -> Floats:
    """Return the part of a cut (V, 2) that lies in the range of inputs: (V', 2), perhaps no more than a segment or a point.

    Args:
        plane: it lies in.
        ball: as of `outline`.
        x: (D,) the example.
        low, high: (D,) the range.
    """
    w = np.concatenate([plane.axes.T, -plane.axes.T])
    return plane.centre + _cut(ball - plane.centre, w, np.concatenate([high - x, x - low]))


def _cut(polygon: Floats, w: Floats, c: Floats) -> Floats:
    """Return the part of a convex polygon (V, 2) where w p <= c for all of w (n, 2), c (n,); what cuts most goes first."""
    scale = max(float(np.abs(polygon).max()), math.ulp(0.0))
    free = np.ones(len(c), dtype=bool)
    while len(polygon):
        beyond = np.where(free, (polygon @ w.T - c).max(0), -np.inf)
        k = int(beyond.argmax())
        if not beyond[k] > 1e-12 * scale:
            return polygon
        free[k] = False
        polygon = _half(polygon, polygon @ w[k] - c[k])
    return polygon


def _half(polygon: Floats, height: Floats) -> Floats:
    """Return the part of a convex polygon (V, 2) where heights at its corners (V,) are not positive."""
    kept: list[Floats] = []
    for i, (p, at) in enumerate(zip(polygon, height, strict=True)):
        j = (i + 1) % len(polygon)
        q, to = polygon[j], height[j]
        if at <= 0:
            kept.append(p)
        if (at < 0 < to) or (to < 0 < at):
            kept.append(p + (q - p) * (at / (at - to)))
    return np.array(kept).reshape(-1, 2)


def landscape(net: nn.Module, plane: Plane, x: Tensor, y: Tensor, side: int) -> Landscape:
    """Return the margins of a net on a grid over the square that is drawn.

    Args:
        net: in eval mode, inputs to logits.
        plane: where.
        x: (1, ...) the example: shape, dtype and device of inputs.
        y: (1,) its label.
        side: G.
    """
    left, right, bottom, top = plane.extent
    a, b = np.linspace(left, right, side), np.linspace(bottom, top, side)
    grid = np.stack(np.meshgrid(a, b, indexing="xy"), -1).reshape(-1, 2)
    values: list[Any] = []
    for part in np.array_split(grid, max(1, math.ceil(grid.shape[0] * x.numel() / CHUNK))):
        points = torch.from_numpy(plane.points(part)).to(x).reshape(-1, *x.shape[1:])
        with torch.no_grad():
            values.append(margin(net(points), y.expand(len(points))).double().cpu().numpy())
    return Landscape(a, b, np.concatenate(values).reshape(side, side))
