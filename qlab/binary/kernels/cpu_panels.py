"""Weights as the CPU kernels want them: panels of 16 output channels, word by word."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlab.binary.kernels.cpu_block import COLUMNS
from qlab.binary.kernels.reference import Pair, Words
from qlab.errors import InputError

__all__ = ["Line", "Panels", "as_words", "prepack", "prepack_conv"]


class Line(NamedTuple):
    """How the words of an image's row lie: bytes from pixel to pixel, from a pixel's word to its next, from row to row."""

    pixel: int
    word: int
    size: int


@dataclass(frozen=True, eq=False)
class Panels:
    """Packed weights, rearranged once so that a vector holds word k of eight output channels.

    Args:
        array: uint64 (groups, panels per group, words, 16); columns past the last channel are 0.
        n: output channels O.
        words: words of a row, kh kw W(C / groups) in a convolution.
        groups: of a grouped convolution.
        kernel: (kh, kw) of a convolution, None for a matrix.
        counts: bits that are set, int64 (taps, O).
        tap_words: words of a tap as it was given, W(C / groups).
        joined: taps side by side in one word, where a pixel's few channels would leave it nearly empty; the input's
            neighbours are joined likewise (`cpu_bits.border`).
        second: taps in another word of each kernel row: what is left over when `joined` does not divide kw.
        channels: C, where taps are joined.
    """

    array: Words
    n: int
    words: int
    groups: int
    kernel: Pair | None
    counts: NDArray[np.int64] = field(repr=False)
    tap_words: int
    joined: int = 1
    second: int = 0
    channels: int = 0
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def per_group(self) -> int:
        """Panels of one group."""
        return self.array.shape[1]

    def line(self, width: int, words: int) -> Line:
        """Return the layout of rows of `width` pixels of `words` words; joined pixels stand in lanes of whole vectors."""
        if self.joined == 1:
            return Line(8 * words, 8, 8 * words * width)
        lane = -(-width // 8) * 64
        return Line(8, lane, lane * (1 + (self.second > 0)))


def as_words(x: Any, dimensions: int, what: str) -> Words:
    """Return x as contiguous uint64 words, copied only where it is not.

    Raises:
        InputError: another type or number of dimensions.
    """
    if not isinstance(x, np.ndarray) or x.dtype != np.uint64 or x.ndim != dimensions:
        found = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"{what} is {found}; expected a numpy array of uint64 words with {dimensions} dimensions")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte


def _popcount(words: Words) -> NDArray[np.int64]:
    """Return the number of bits that are set along the last axis."""
    return _BITS[words.view(np.uint8)].sum(-1, dtype=np.int64)


def _aligned(shape: tuple[int, ...]) -> Words:
    """Return an empty array that starts at a cache line: a vector of 64 bytes then never straddles two."""
    size = int(np.prod(shape))
    raw = np.empty(size + 7, np.uint64)
    start = -raw.__array_interface__["data"][0] % 64 // 8
    return raw[start : start + size].reshape(shape)


def prepack(w: Words) -> Panels:
    """Return the panels of a matrix of signs or digits.

    Args:
        w: words (N, W).
    """
    return _panels(as_words(w, 2, "w"), groups=1, kernel=None)


def prepack_conv(w: Words, groups: int = 1, channels: int | None = None) -> Panels:
    """Return the panels of a convolution's weights.

    Args:
        w: words (O, kh, kw, W(C / groups)).
        groups: divides O.
        channels: C. If it is given and small, taps share words, which is up to kw times faster.

    Raises:
        InputError: `groups` does not divide O.
    """
    w = as_words(w, 4, "w")
    if groups < 1 or len(w) % groups:
        raise InputError(f"groups is {groups}; expected a divisor of the {len(w)} output channels")
    kernel = (w.shape[1], w.shape[2])
    joined = min(kernel[1], 64 // channels) if channels and groups == 1 and channels <= 32 else 1
    if joined == 1:
        return _panels(w, groups, kernel)
    assert channels is not None
    whole, second = divmod(kernel[1], joined)
    ends = [joined * (i + 1) for i in range(whole)] + [kernel[1]] * (second > 0)
    shared = np.zeros((*w.shape[:2], len(ends), 1), np.uint64)
    for i, end in enumerate(ends):
        for j, tap in enumerate(range(joined * i, end)):
            shared[:, :, i] |= w[:, :, tap] << np.uint64(j * channels)
    return replace(_panels(shared, groups, kernel), counts=_counts(w), joined=joined, second=second, channels=channels)


def _counts(w: Words) -> NDArray[np.int64]:
    return np.ascontiguousarray(_popcount(w.reshape(len(w), -1, w.shape[-1])).T)


def _panels(w: Words, groups: int, kernel: Pair | None) -> Panels:
    n = len(w)
    each = n // groups
    words = int(np.prod(w.shape[1:]))
    padded = np.zeros((groups, -(-each // COLUMNS) * COLUMNS, words), np.uint64)
    padded[:, :each] = w.reshape(groups, each, words)
    rows = padded.reshape(groups, -1, COLUMNS, words)
    array = _aligned((groups, rows.shape[1], words, COLUMNS))
    array[:] = rows.transpose(0, 1, 3, 2)
    return Panels(array, n, words, groups, kernel, _counts(w), w.shape[-1])
