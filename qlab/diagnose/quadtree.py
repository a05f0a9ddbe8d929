r"""A landscape that is complete from the first second and grows finer where it varies.

    for update in landscaping(net, x, y, d1, d2, seconds=10): update.value      # a Landscape each time
    job = Job(lambda: landscaping(...)); job.cancel(); job.value                # what there is so far

The lattice of `landscape` is evaluated coarse to fine: 5 x 5 points first, then the cells whose corners differ most are halved in
both directions, round after round, until every point is evaluated or the time is up. Points in between are interpolated between
the corners of their cell, so every partial result is a whole picture; when all is done it is that of `landscape`.

The order of the rounds depends on the values alone and never on time. A saved landscape is resumed by going through the same
rounds again with its values instead of the net's, so that a run that was cut off ends exactly as one that was not.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.functions import FunctionName
from qlab.diagnose.landscape import Landscape, load_landscape
from qlab.diagnose.objective import Loss
from qlab.diagnose.plane_eval import BatchNormMode
from qlab.diagnose.views import Span, Views
from qlab.errors import InputError
from qlab.jobs import Update

__all__ = ["COARSE", "landscaping"]

COARSE = 5  # points a side of the first picture
_LEAST = 12  # cells a round, at least
_SHARE = 3  # or every third of the cells that can be halved
_SIZE = 0.05  # how much a cell's size counts beside its variation: flat cells come last, but they come
_SAVE_EVERY = 1.0  # seconds

Cells = NDArray[np.int64]  # (C, 4): i0, i1, j0, j1


def landscaping(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    d1: Mapping[str, Tensor],
    d2: Mapping[str, Tensor] | None = None,
    span: Span = 1.0,
    points: int | tuple[int, int] = 51,
    functions: Sequence[FunctionName] | None = None,
    loss: str | Loss = "cross_entropy",
    sharpness: float = 5.0,
    batch_norm: BatchNormMode = "frozen",
    batches: int = 0,
    names: Sequence[str] = (),
    seconds: float | None = None,
    file: str | os.PathLike[str] | None = None,
    resume: Landscape | None = None,
) -> Generator[Update, None, None]:
    """Yield the `Landscape` after every round; see `landscape` for the arguments.

    Args:
        seconds: after so many no further round begins; None goes on to the last point.
        file: where to save what there is, every second and at the end, and to resume from if it is there.
        resume: an earlier, partial result to go on from.

    Raises:
        InputError: as `landscape` does; a file or earlier result of another landscape; a time that is not positive.
        DataFileError: a corrupt file.
    """
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds is {seconds!r}; expected a positive number, or None")
    if file is not None and not pathlib.Path(file).parent.is_dir():
        raise InputError(f"cannot save to {os.fspath(file)!r}: its folder does not exist; make it first")
    begun = saved = time.monotonic()
    views = Views(net, x, y, d1, d2, span, points, functions, loss, sharpness, batch_norm, batches, names)
    grid = _Grid(views, _earlier(file, resume, views))
    land: Landscape | None = None
    try:
        for cells in grid.rounds():
            land = grid.picture(cells)
            now = time.monotonic()
            if file is not None and now - saved > _SAVE_EVERY:
                land.save(file)
                saved = now
            done = int(grid.known.sum())
            yield Update(done / grid.known.size, f"{done:,} of {grid.known.size:,} points", land)
            if seconds is not None and time.monotonic() - begun > seconds:
                break
    finally:
        if file is not None and land is not None:
            land.save(file)


def _earlier(file: str | os.PathLike[str] | None, resume: Landscape | None, views: Views) -> Landscape | None:
    what = "resume"
    if file is not None and pathlib.Path(file).exists():
        resume, what = load_landscape(file), f"file {pathlib.Path(file).name!r}"
    if resume is not None and resume.digest != views.digest:
        raise InputError(
            f"{what} holds another landscape: its net, data, directions or settings differ. Give another, or none"
        )
    return resume


class _Grid:
    """The lattice with what is known of it."""

    def __init__(self, views: Views, earlier: Landscape | None) -> None:
        self.views, self.earlier = views, earlier
        shape = (len(views.a), len(views.b))
        self.known = np.zeros(shape, bool)
        f = len(views.functions)
        self.arrays = {key: np.full((f, *shape), np.nan) for key in ("loss", "accuracy", "noise")}
        self.arrays["flipped"] = np.full(shape, np.nan)

    def rounds(self) -> Generator[Cells, None, None]:
        """Evaluate round after round; yield the cells that tile the lattice after each."""
        sides = [np.unique(np.rint(np.linspace(0, n - 1, min(COARSE, n))).astype(int)) for n in self.known.shape]
        cells = _boxes(*sides)
        self.learn(cells)
        yield cells
        while True:
            splittable = ((cells[:, 1] - cells[:, 0] > 1) | (cells[:, 3] - cells[:, 2] > 1)).nonzero()[0]
            if not len(splittable):
                return
            order = np.argsort(-self.priority(cells[splittable]), kind="stable")
            chosen = splittable[order[: max(_LEAST, len(splittable) // _SHARE)]]
            children = np.concatenate([_halved(cell) for cell in cells[chosen]])
            cells = np.concatenate([np.delete(cells, chosen, 0), children])
            self.learn(children)
            yield cells

    def learn(self, cells: Cells) -> None:
        """Evaluate the corners of cells that are not known, all at once."""
        corners = np.concatenate([cells[:, [i, j]] for i in (0, 1) for j in (2, 3)])
        new = np.unique(corners[~self.known[corners[:, 0], corners[:, 1]]], axis=0)
        if not len(new):
            return
        i, j = new.T
        if self.earlier is not None and bool(self.earlier.evaluated[i, j].all()):
            land = self.earlier
            found: dict[str, Any] = {
                key: np.stack([getattr(land, key)[f][i, j] for f in land.functions])
                for key in ("loss", "accuracy", "noise")
            }
            found["flipped"] = land.flipped[i, j]
        else:
            found = self.views.at(i, j)
        for key, values in found.items():
            self.arrays[key][..., i, j] = values
        self.known[i, j] = True

    def priority(self, cells: Cells) -> NDArray[np.float64]:
        """Return (spread of the corners' loss over that of all points, the most of any function) + size, times the size."""
        loss = self.arrays["loss"]
        corners = np.stack([loss[:, cells[:, i], cells[:, j]] for i in (0, 1) for j in (2, 3)])  # (4, F, C)
        with np.errstate(invalid="ignore"):
            spread = np.nan_to_num(corners.max(0) - corners.min(0), nan=1.0, posinf=1.0)
            known = loss[:, self.known]
            whole = np.nan_to_num(np.fmax.reduce(known, 1) - np.fmin.reduce(known, 1), nan=1.0, posinf=1.0)
        size = np.maximum(
            (cells[:, 1] - cells[:, 0]) / max(1, self.known.shape[0] - 1),
            (cells[:, 3] - cells[:, 2]) / max(1, self.known.shape[1] - 1),
        )
        varied = np.asarray((spread / np.maximum(whole, 1e-300)[:, None]).max(0), dtype=np.float64)
        return np.asarray((varied + _SIZE) * size, dtype=np.float64)

    def picture(self, cells: Cells) -> Landscape:
        """Return the landscape with every unknown point interpolated between the corners of its cell."""
        arrays = {key: values.copy() for key, values in self.arrays.items()}
        for i0, i1, j0, j1 in cells[(cells[:, 1] - cells[:, 0] > 1) | (cells[:, 3] - cells[:, 2] > 1)]:
            u = np.linspace(0, 1, i1 - i0 + 1)[:, None]
            v = np.linspace(0, 1, j1 - j0 + 1)[None, :]
            hidden = ~self.known[i0 : i1 + 1, j0 : j1 + 1]
            for key, values in self.arrays.items():
                c = [values[..., i, j, None, None] for i in (i0, i1) for j in (j0, j1)]
                between = (1 - u) * (1 - v) * c[0] + (1 - u) * v * c[1] + u * (1 - v) * c[2] + u * v * c[3]
                box = arrays[key][..., i0 : i1 + 1, j0 : j1 + 1]
                box[..., hidden] = between[..., hidden]
        return Landscape(**self.views.fields(arrays, self.known.copy()))


def _boxes(i: NDArray[np.int64], j: NDArray[np.int64]) -> Cells:
    """Return the cells between lattice lines; a side of one point is a cell of no width."""
    sides = [[(n, m) for n, m in pairwise(k)] or [(k[0], k[0])] for k in (i, j)]
    return np.array([(*p, *q) for p in sides[0] for q in sides[1]], dtype=np.int64)


def _halved(cell: NDArray[np.int64]) -> Cells:
    i0, i1, j0, j1 = (int(n) for n in cell)
    return _boxes(
        *(np.unique(np.array([low, (low + high) // 2, high])) for low, high in ((i0, i1), (j0, j1))),
    )
