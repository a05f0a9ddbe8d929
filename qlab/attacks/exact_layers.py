r"""A small net as affine maps and scalar functions of pieces, in float64: what every exact search reads.

    z_1 = W_1 x + b_1,   v_1 = f_1(z_1),   z_2 = W_2 v_1 + b_2,   ...,   logits = z_L

Each f is applied unit by unit and is one line on each of its pieces, with breaks t_1 < ... < t_m between them:

    f(z) = slope_k z + intercept_k       on piece k, which lies between t_k and t_{k+1}

At a break f takes the value of the right piece where `right` says so (sign: f(0) = +1), else of the left one. Batch norm in eval
mode is folded into W and b. The net is taken as a function of real numbers: its parameters exactly as they are stored, its sums
not rounded. A number closer to a break than TIE times what was summed counts as lying on it, and logits that close as equal, of
which the first wins.

A cell is the polyhedron of inputs on which every unit keeps to one piece:  G x + h >= 0, open rows > 0.  On it logits are affine.

Shapes: x (N, D), units n, breaks m, rows R, classes d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.chain import chain
from qlab.diagnose.functions import Hard
from qlab.errors import InputError
from qlab.quantizers import Sign, Uniform

__all__ = ["TIE", "Cell", "Pieces", "Stage", "Stages", "read"]

TIE = 1e-12
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """A scalar function of lines.

    Args:
        breaks: (m,) where pieces meet, rising.
        slopes, intercepts: (m + 1,) of each piece.
        right: (m,) whether the break itself belongs to the piece on its right.
    """

    breaks: Floats
    slopes: Floats
    intercepts: Floats
    right: Flags

    @property
    def constant(self) -> bool:
        """Whether it takes a few levels only."""
        return not self.slopes.any()

    @property
    def jumps(self) -> Floats:
        """(m,) by how much it rises at each break."""
        right = self.slopes[1:] * self.breaks + self.intercepts[1:]
        return right - (self.slopes[:-1] * self.breaks + self.intercepts[:-1])

    def piece(self, z: Floats, tol: Floats | float) -> Whole:
        """Return the piece of each number (...); what is within tol of a break lies on it."""
        tol = np.asarray(tol)[..., None]
        z = np.asarray(z)[..., None]
        beyond = np.where(self.right, z >= self.breaks - tol, z > self.breaks + tol)
        return beyond.sum(-1)

    def value(self, z: Floats, piece: Whole) -> Floats:
        """Return f(z) of numbers on the pieces given."""
        return self.slopes[piece] * z + self.intercepts[piece]


@dataclass(frozen=True)
class Stage:
    """One affine map and what follows it.

    Args:
        W, b: (n, n_in) and (n,).
        f: pieces; any other elementwise module; None behind the last map.
    """

    W: Floats
    b: Floats
    f: Pieces | nn.Module | None

    def affine(self, v: Floats) -> tuple[Floats, Floats]:
        """Return z = W v + b of inputs (P, n_in), and the tolerance of each, (P, n) both."""
        return v @ self.W.T + self.b, TIE * (np.abs(v) @ np.abs(self.W.T) + np.abs(self.b))


@dataclass(frozen=True)
class Cell:
    """A polyhedron of inputs on which every unit keeps to one piece, and the logits there.

    Args:
        G, h: rows (R, D) and (R,); G x + h >= 0.
        open: (R,) rows that must be > 0.
        A, c: logits A x + c, (d, D) and (d,).
        tol: (d,) what is nothing beside the terms of c.
    """

    G: Floats
    h: Floats
    open: Flags
    A: Floats
    c: Floats
    tol: Floats

    def decides(self, t: int, y: int) -> Cell | None:
        """Return the part of the cell where class t beats label y; None where it does nowhere.

        Of equal logits the first class wins, so t > y must be strictly ahead.
        """
        a, c = self.A[t] - self.A[y], self.c[t] - self.c[y]
        if not a.any():
            tol = self.tol[t] + self.tol[y]
            return self if (c >= -tol if t < y else c > tol) else None
        rows = np.vstack([self.G, a]), np.append(self.h, c), np.append(self.open, t > y)
        return Cell(*rows, self.A, self.c, self.tol)


@dataclass(frozen=True)
class Stages:
    """The whole net; see the module.

    Args:
        stages: in order; only the last has no f.
    """

    stages: tuple[Stage, ...]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.stages)

    @property
    def inputs(self) -> int:
        """D."""
        return self.stages[0].W.shape[1]

    @property
    def classes(self) -> int:
        """d."""
        return len(self.stages[-1].b)

    def logits(self, x: Floats, begin: int = 0) -> tuple[Floats, Floats]:
        """Return the logits of values (P, n_in) before stage `begin`, and their tolerance, (P, d) both."""
        v = x
        for stage in self.stages[begin:]:
            v, tol = stage.affine(v)
            if isinstance(stage.f, Pieces):
                v = stage.f.value(v, stage.f.piece(v, tol))
            elif stage.f is not None:
                v = smooth(stage.f, v)
        return v, tol

    def classify(self, x: Floats, begin: int = 0) -> Whole:
        """Return the class (P,) of values (P, n_in) before stage `begin`: the first of the largest logits."""
        return first_largest(*self.logits(x, begin))

    def pieces(self, x: Floats) -> list[Whole]:
        """Return on which piece each unit of each stage is at inputs (P, D): (P, n) for each stage with pieces."""
        out, v = [], x
        for stage in self.stages:
            v, tol = stage.affine(v)
            if isinstance(stage.f, Pieces):
                out.append(stage.f.piece(v, tol))
                v = stage.f.value(v, out[-1])
            elif stage.f is not None:
                v = smooth(stage.f, v)
        return out

    def cell(self, pieces: Sequence[Whole]) -> Cell:
        """Return the cell with the pieces (n,) given for each stage that has some.

        Where a unit's input is constant on the cell, its value decides, whatever is given.

        Raises:
            InputError: a smooth function of something that is not constant.
        """
        D = self.inputs
        A, c = np.eye(D), np.zeros(D)
        G: list[Floats] = [np.zeros((0, D))]
        h: list[Floats] = [np.zeros(0)]
        strict: list[Flags] = [np.zeros(0, bool)]
        given = iter(pieces)
        for stage in self.stages:
            tol = TIE * (np.abs(stage.W) @ np.abs(c) + np.abs(stage.b))
            A, c = stage.W @ A, stage.W @ c + stage.b
            varies = np.abs(A).sum(1) > 0
            if isinstance(stage.f, Pieces):
                f = stage.f
                k = np.where(varies, next(given), f.piece(c, tol))
                for side, below in ((1.0, k - 1), (-1.0, k)):  # z >= the break on its left, z <= the one on its right
                    unit = np.flatnonzero(varies & (below >= 0) & (below < len(f.breaks)))
                    at = below[unit]
                    G.append(side * A[unit])
                    h.append(side * (c[unit] - f.breaks[at]))
                    jump = np.abs(f.jumps[at]) > 0  # without a jump both pieces agree on the break
                    strict.append(jump & (f.right[at] if side < 0 else ~f.right[at]))
                c = f.slopes[k] * c + f.intercepts[k]
                A = f.slopes[k][:, None] * A
            elif stage.f is not None:
                require_constant(stage.f, varies)
                c = smooth(stage.f, c[None])[0]
                A = np.zeros_like(A)
        return Cell(np.vstack(G), np.concatenate(h), np.concatenate(strict), A, c, tol)


def first_largest(z: Floats, tol: Floats) -> Whole:
    """Return the first of the largest logits (P, d), equal ones being those within their tolerance, (P,)."""
    top = z.argmax(1)[:, None]
    near = z >= np.take_along_axis(z, top, 1) - tol - np.take_along_axis(tol, top, 1)
    return near.argmax(1)


@torch.no_grad()
def smooth(module: nn.Module, v: Floats) -> Floats:
    """Return what an elementwise module makes of numbers."""
    return module(torch.from_numpy(np.ascontiguousarray(v))).numpy()


def require_constant(module: nn.Module, varies: Flags) -> None:
    """Raise an InputError where a smooth function meets a unit that varies with the input within a cell."""
    if bool(varies.any()):
        raise InputError(
            f"{type(module).__name__} is no function of a few lines, and in this net it sees values that vary with the input; the "
            "exact adversary needs sign, uniform quantizers, ReLU, LeakyReLU or Hardtanh there (behind signs anything goes)"
        )


def read(net: nn.Module, x: Tensor) -> Stages:
    """Return a net of layers one after the other as stages.

    Args:
        net: in eval mode: Linear, BatchNorm1d, quantizers, elementwise nonlinearities, Flatten.
        x: (N, ...) inputs, to watch it run.

    Raises:
        InputError: a net that is no such chain.
    """
    links = chain(net, x)
    if links is None:
        raise InputError(
            "the exact adversary reads nets of Linear, BatchNorm1d, Flatten, sign and uniform quantizers and elementwise "
            "nonlinearities that run one after the other, as modules; this net has other layers, branches, or something between "
            "its layers. Attack it with `qlab.attacks.evaluate` instead"
        )
    D = x[0].numel()
    W: Floats = np.eye(D)
    b: Floats = np.zeros(D)
    stages: list[Stage] = []
    for _, module in links:
        if isinstance(module, nn.Linear):
            w = _array(module.weight)
            W, b = w @ W, w @ b + (0.0 if module.bias is None else _array(module.bias))
        elif isinstance(module, nn.BatchNorm1d):
            mean, var = _array(module.running_mean), _array(module.running_var)
            scale = 1 / np.sqrt(var + module.eps)
            scale = scale if module.weight is None else scale * _array(module.weight)
            W, b = scale[:, None] * W, scale * (b - mean) + (0.0 if module.bias is None else _array(module.bias))
        else:
            stages.append(Stage(W, b, _pieces(module, x.dtype)))
            W, b = np.eye(len(b)), np.zeros(len(b))
    return Stages((*stages, Stage(W, b, None)))


def _array(t: Tensor | None) -> Floats:
    assert t is not None
    return t.detach().double().cpu().numpy()


def _pieces(module: nn.Module, dtype: torch.dtype) -> Pieces | nn.Module:
    """Return an elementwise module as pieces, or as it is where it has none."""
    module = module.quantizer if isinstance(module, Hard) else module
    if isinstance(module, Sign):
        return Pieces(np.zeros(1), np.zeros(2), np.array([-1.0, 1.0]), np.ones(1, bool))
    if isinstance(module, Uniform):
        step = float(module._step(dtype))
        codes = np.arange(module.low, module.high)  # ties to even: the break above an odd code goes up
        levels = _array(module.levels(dtype))
        return Pieces((codes + 0.5) * step, np.zeros(len(levels)), levels, codes % 2 == 1)
    if isinstance(module, nn.ReLU):
        return _lines([0.0], [0.0, 1.0])
    if isinstance(module, nn.LeakyReLU):
        return _lines([0.0], [float(module.negative_slope), 1.0])
    if isinstance(module, nn.Hardtanh):  # ReLU6 too
        low, high = float(module.min_val), float(module.max_val)
        return _lines([low, high], [0.0, 1.0, 0.0], start=low)
    return module


def _lines(breaks: list[float], slopes: list[float], start: float = 0.0) -> Pieces:
    """Return a continuous function that is `start` at its first break."""
    t, s = np.array(breaks), np.array(slopes)
    intercepts = [start - s[0] * t[0]]
    for k, at in enumerate(t):
        intercepts.append(intercepts[-1] + (s[k] - s[k + 1]) * at)
    return Pieces(t, s, np.array(intercepts), np.ones(len(t), bool))
