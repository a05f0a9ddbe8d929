"""Random packed signs and thresholds for the tests of kernels."""

from __future__ import annotations

import numpy as np

from qlab.binary.kernels import reference

INT32 = np.iinfo(np.int32)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def signs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Packed random signs, `shape` counts the signs."""
    return reference.pack(rng.standard_normal(shape).astype(np.float32))


def thresholds(rng: np.random.Generator, channels: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds around K / 4, with extremes, and random flips."""
    threshold = rng.integers(-k // 4 - 1, k // 4 + 2, channels).astype(np.int32)
    for i, value in enumerate((INT32.min, INT32.max, INT32.min + 1, -k, k, k + 1, 0)[: channels - 1]):
        threshold[i] = value
    return threshold, reference.pack(rng.standard_normal(channels))
