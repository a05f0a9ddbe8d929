r"""The path of a training run, seen in the plane it moves in most.

    path = trajectory([net_0, net_1, ..., net_T])
    land = landscape(net_T, x, y, *path.directions, span=path.span())

Axes are the first two principal components of { w_t - w_T }, centred on their mean; coordinates are measured from the last point.
A path always looks like a curve in its own plane: a random walk without any structure shows 60.8 % and 15.2 % of its
variance on two axes (6 / (pi^2 k^2)). That null stands beside every number.

Source: Li et al. 2018, arXiv 1712.09913, section 7; Antognini and Sohl-Dickstein 2018, arXiv 1806.08805.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result, plain
from qlab.diagnose.directions import Direction, principal_axes, random_walk_variance
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Trajectory", "trajectory"]

_SHOWN = 10  # components in frame and figure


@dataclass(frozen=True)
class Trajectory(Result):
    """A path projected on its two principal axes.

    Args:
        a: (T,) coordinates along the first axis, measured from the last point.
        b: (T,) along the second.
        explained: (R,) share of the variance of every component, descending.
        null: (R,) 6 / (pi^2 k^2), those of a random walk.
        inside: (T,) share of ||w_t - w_T||^2 that lies in the plane.
        steps: (T,) what the points are numbered with.
        directions: the two axes, of unit length: name -> tensor.
        weights: numbers in a point.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    explained: NDArray[np.float64]
    null: NDArray[np.float64]
    inside: NDArray[np.float64]
    steps: NDArray[np.int64]
    directions: tuple[Direction, ...] = field(repr=False)
    weights: int = 0

    def span(self, margin: float = 0.2, points: int = 51) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return ranges of a and b that hold the path, with a share of their length on each side; for `landscape`.

        Args:
            margin: the share.
            points: a side of the lattice, of which one will be the last net itself, (0, 0).
        """
        ranges = []
        for v in (self.a, self.b):
            length = float(v.max() - v.min()) or 1.0
            low, high = float(v.min()) - margin * length, float(v.max()) + margin * length
            step = (high - low) / max(1, points - 2)
            low = -math.ceil(-low / step) * step
            ranges.append((low, low + (points - 1) * step))
        return ranges[0], ranges[1]

    def frame(self) -> pd.DataFrame:
        """Return one row per point: step, a, b, inside. The components are in `components()`."""
        import pandas as pd

        return pd.DataFrame({"step": self.steps, "a": self.a, "b": self.b, "inside": self.inside})

    def components(self) -> pd.DataFrame:
        """Return one row per component: k, explained, null."""
        import pandas as pd

        k = np.arange(1, len(self.explained) + 1)
        return pd.DataFrame({"k": k, "explained": self.explained, "null": self.null}).head(_SHOWN)

    def figure(self) -> Figure:
        """Return the path in its plane, and the shares of variance beside those of a random walk."""
        from qlab.plots.landscape import trajectory_figure

        return trajectory_figure(self)

    def summary(self) -> str:
        """Return the shares of variance with their null, in words."""
        two, null = float(self.explained[:2].sum()), float(self.null[:2].sum())
        return (
            f"The path of {len(self.a)} points of {self.weights:,} latent weights in the plane of its first two principal "
            f"components: they hold {self.explained[0]:.1%} and {self.explained[1]:.1%} of the variance, {two:.1%} together. "
            f"A random walk without any structure would show {self.null[0]:.1%} and {self.null[1]:.1%}, {null:.1%} together. "
            f"Of the first point's squared distance to the last, {self.inside[0]:.1%} lies in the plane."
        )


def trajectory(
    points: Sequence[nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]],
    steps: Sequence[int] | None = None,
    vectors: bool = False,
) -> Trajectory:
    """Project a training run on its two principal axes.

    Args:
        points: T >= 3 nets, dictionaries of parameters (`dict(net.named_parameters())`), or checkpoint files of `qlab.fit`, in the
            order of training; of quantized tensors the latent ones count.
        steps: (T,) whole numbers that say when; 0, 1, ... by default.
        vectors: whether biases and batch-norm vectors take part.

    Raises:
        InputError: fewer than three points, points of different nets, or a path that does not move in two dimensions.
        CheckpointError: a checkpoint that cannot be read.
    """
    if isinstance(points, str | nn.Module | Mapping) or not isinstance(points, Sequence):
        raise InputError(
            f"points is a {type(points).__name__}; expected a list of nets, dictionaries or checkpoint files"
        )
    when = np.arange(len(points)) if steps is None else np.asarray(steps)
    if when.shape != (len(points),) or when.dtype.kind not in "iu":
        raise InputError(f"steps has shape {when.shape} and type {when.dtype}; expected {len(points)} whole numbers")
    tensors = [_tensors(point) for point in points]
    axes = principal_axes(tensors, 2, vectors)
    a, b = axes.coordinates.T.numpy()
    explained = axes.explained.numpy()
    return Trajectory(
        a=a,
        b=b,
        explained=explained,
        null=np.array([random_walk_variance(k) for k in range(1, len(explained) + 1)]),
        inside=axes.inside.numpy(),
        steps=when.astype(np.int64),
        directions=axes.directions,
        weights=sum(d.numel() for d in axes.directions[0].values()),
    )


def _tensors(point: Any) -> Mapping[str, Tensor]:
    if isinstance(point, Mapping):
        return point
    if isinstance(point, str | os.PathLike):
        from qlab.methods.checkpoints import load

        point = load(point)
    return {name: p.detach().clone() for name, p in plain(point).named_parameters()}
