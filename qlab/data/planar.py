"""Points in the plane: small enough to draw the decision boundary of every step.

    two_moons   x = (cos t, sin t) and (1 - cos t, 1/2 - sin t), t in [0, pi]
    circles     x = (cos t, sin t) and 1/2 (cos t, sin t), t in [0, 2 pi)
    spirals     x = r (cos(4 pi r + c pi), sin(4 pi r + c pi)), r = sqrt(u), u uniform in [0, 1], class c in {0, 1}

plus Gaussian noise. The points depend on `n` and `noise` only; `seed` decides the validation part and the order, as for
every set, so that runs over seeds are tested on the same points.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qlab.data.base import DataModule, whole_number
from qlab.data.splits import Source, Split
from qlab.errors import InputError

__all__ = ["Circles", "Planar", "Spirals", "TwoMoons"]

_POINTS_SEED = 0


class Planar(DataModule):
    """A set of points (2,) in two classes; a fixed fifth is the test part.

    Args:
        n: number of points, both classes and all parts together.
        noise: standard deviation of the Gaussian noise, in the units of the figure, whose size is about 1.
        batch_size: see `DataModule`, as are the others.
    """

    def __init__(
        self,
        n: int = 2000,
        noise: float = 0.1,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, augment, subset, root)
        self.n = whole_number("n", n, 10)
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise InputError(f"noise must be a finite number of at least 0, got {noise!r}.")
        self.noise = float(noise)
        if augment:
            raise InputError(f"{self.name!r} holds points, not images: there is no augmentation for it.")
        del self.hparams["cutout"]
        self.hparams.update({"n": self.n, "noise": self.noise})

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points (n, 2) and labels (n,)."""
        raise NotImplementedError

    def read(self) -> Source:
        """Generate the points."""
        x, y = self.points()
        train = Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64)))
        return Source(train, ("0", "1"))


class TwoMoons(Planar):
    """Two interleaved half circles."""

    name = "two_moons"

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points (n, 2) and labels (n,)."""
        from sklearn.datasets import make_moons

        return make_moons(self.n, noise=self.noise, random_state=_POINTS_SEED)


class Circles(Planar):
    """A circle of radius 1 around one of radius 1/2."""

    name = "circles"

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points (n, 2) and labels (n,)."""
        from sklearn.datasets import make_circles

        return make_circles(self.n, noise=self.noise, factor=0.5, random_state=_POINTS_SEED)


class Spirals(Planar):
    """Two spirals of two turns, half a turn apart."""

    name = "spirals"

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points (n, 2) and labels (n,)."""
        draws = np.random.default_rng(_POINTS_SEED)
        labels = np.arange(self.n) % 2
        radius = np.sqrt(draws.random(self.n))  # the root spreads points evenly along the arm
        angle = 4 * np.pi * radius + np.pi * labels
        x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        return x + self.noise * draws.standard_normal(x.shape), labels
