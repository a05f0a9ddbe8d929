r"""Every step of a training on file: the level of each quantized weight, one bit each where it is binary.

A weight on a grid of L levels takes p = ceil(log2 L) bits. Codes count down from the highest level, so that a sign is stored as
everywhere in the lab: bit 1 means -1. Each of the p bit planes of a tensor is packed by `qlab.binary.bits` and starts on a word
of its own; a record is one row of words:

    row(t) = [tensor 1: plane 0 | ... | plane p - 1] [tensor 2: ...] ...        uint64 words

10,000 binary weights over 5,000 steps are 6.3 MB. What is not on a grid (float layers, biases, batch norm) is not recorded.

Shapes: T records, W words a row.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.binary.bits import pack, words_for
from qlab.errors import DataFileError, InputError, UnknownNameError

__all__ = ["History", "Recorder", "Signs", "Tracked"]

FORMAT = "qlab bit history 1"
MEGABYTE = 2**20
MAX_BYTES = 2**32  # of an unpacked file: more is a mistake or an attack


@dataclass(frozen=True)
class Tracked:
    """A tensor whose levels are recorded.

    Args:
        name: as in `Method.hard_weights`.
        shape: of the tensor.
        levels: (L,) the values it can take, ascending.
    """

    name: str
    shape: tuple[int, ...]
    levels: tuple[float, ...]

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @cached_property
    def planes(self) -> int:
        """Bits of one weight: ceil(log2 L)."""
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def words(self) -> int:
        """Words of all planes."""
        return self.planes * words_for(self.size)

    def encode(self, hard: Tensor) -> NDArray[np.uint64]:
        """Return the words of a tensor of levels."""
        flat = hard.detach().reshape(-1)
        top = len(self.levels) - 1
        if top == 1:
            signs: Any = (flat.float() - (self.levels[0] + self.levels[1]) / 2).cpu().numpy()
            return pack(signs)
        middles = torch.tensor(self.levels, dtype=torch.float64, device=flat.device)
        codes = top - torch.bucketize(flat.double(), (middles[1:] + middles[:-1]) / 2)
        planes = (codes >> torch.arange(self.planes, device=flat.device)[:, None]) & 1
        minus: Any = -planes.cpu().numpy()
        return pack(minus).reshape(-1)

    def codes(self, rows: NDArray[np.uint64]) -> NDArray[Any]:
        """Return the codes (T, size) of this tensor's words (T, W), as small unsigned integers."""
        bits = np.ascontiguousarray(rows, dtype="<u8").view(np.uint8).reshape(len(rows), self.planes, -1)
        planes = np.unpackbits(bits, axis=-1, count=self.size, bitorder="little")
        if self.planes == 1:
            return planes[:, 0]
        return (planes.astype(np.uint32) << np.arange(self.planes, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32)

    def values(self, codes: NDArray[Any]) -> NDArray[np.float64]:
        """Return the levels that codes stand for."""
        return np.array(self.levels)[::-1][codes]


@dataclass(frozen=True, eq=False)
class History:
    """The levels of all quantized weights at many steps.

    Args:
        tensors: what is recorded, in the order of the words.
        steps: (T,) optimizer steps done when each row was recorded, ascending.
        words: (T, W).

    Raises:
        InputError: for parts that do not belong together.
    """

    tensors: tuple[Tracked, ...]
    steps: NDArray[np.int64]
    words: NDArray[np.uint64]

    def __post_init__(self) -> None:
        width = sum(t.words for t in self.tensors)
        if not self.tensors or self.words.ndim != 2 or self.words.shape != (len(self.steps), width):
            raise InputError(
                f"words of shape {self.words.shape} are no record of {len(self.steps)} steps with {width} words each"
            )
        if not len(self.steps) or int(self.steps[0]) < 0 or bool((np.diff(self.steps) <= 0).any()):
            raise InputError("the steps of a history must be whole numbers from 0 up, ascending, at least one")
        names = [t.name for t in self.tensors]
        if len(set(names)) < len(names):
            raise InputError("two tensors of a history have the same name")
        for t in self.tensors:
            if len(t.levels) < 2 or not np.isfinite(t.levels).all() or bool((np.diff(t.levels) <= 0).any()):
                raise InputError(f"the levels of {t.name!r} must be at least two, finite and ascending, not {t.levels}")
            if t.size < 1 or min(t.shape) < 0:
                raise InputError(f"{t.name!r} has no weights: its shape is {t.shape}")

    @property
    def weights(self) -> int:
        """Number of weights recorded."""
        return sum(t.size for t in self.tensors)

    @property
    def bytes(self) -> int:
        """Size of the words in memory."""
        return self.words.nbytes

    def __repr__(self) -> str:
        return (
            f"History({self.weights:,} weights at {len(self.steps):,} steps from {self.steps[0]} to {self.steps[-1]}, "
            f"{self.bytes / MEGABYTE:.1f} MB)"
        )

    def tensor(self, name: str) -> Tracked:
        """Return what is known of a tensor by name.

        Raises:
            UnknownNameError: nothing of that name is recorded.
        """
        for t in self.tensors:
            if t.name == name:
                return t
        raise UnknownNameError("recorded tensor", name, [t.name for t in self.tensors])

    def rows(self, name: str) -> NDArray[np.uint64]:
        """Return the words (T, w) of one tensor."""
        start = 0
        for t in self.tensors:
            if t.name == name:
                return self.words[:, start : start + t.words]
            start += t.words
        return self.words[:, : self.tensor(name).words]  # raises

    def codes(self, name: str, first: int = 0, last: int | None = None) -> NDArray[Any]:
        """Return the codes (records, size) of one tensor, of the rows first to last (exclusive)."""
        return self.tensor(name).codes(self.rows(name)[first:last])

    def row(self, step: int) -> int:
        """Return the row that holds at a step: the last one recorded until then.

        Raises:
            InputError: for a step before the first one or after the last one.
        """
        if not self.steps[0] <= step <= self.steps[-1]:
            raise InputError(f"step {step} was not recorded; the history runs from {self.steps[0]} to {self.steps[-1]}")
        return int(np.searchsorted(self.steps, step, side="right")) - 1

    def at(self, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the hard weights at a step by name, as `Method.hard_weights` gave them then.

        Raises:
            InputError: for a step that was not recorded.
        """
        r = self.row(step)
        found = {}
        for t in self.tensors:
            values = t.values(self.codes(t.name, r, r + 1)[0])
            found[t.name] = torch.from_numpy(values).to(dtype).reshape(t.shape)
        return found

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a numpy archive without pickle, with a digest; return its path.

        Raises:
            InputError: for a folder that does not exist.
        """
        target = Path(path)
        if not target.parent.is_dir() or target.is_dir():
            raise InputError(f"{target} cannot be written; name a file in a folder that exists")
        meta = json.dumps(
            {"format": FORMAT, "tensors": [[t.name, list(t.shape), list(t.levels)] for t in self.tensors]}
        ).encode()
        steps, words = self.steps.astype("<i8"), self.words.astype("<u8")
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            meta=np.frombuffer(meta, np.uint8),
            steps=steps,
            words=words,
            digest=np.frombuffer(_digest(meta, steps, words), np.uint8),
        )
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read what `save` wrote; nothing in the file is executed, and its digest is checked.

        Raises:
            DataFileError: for a file that is missing, corrupt, or no bit history.
        """
        if not Path(path).is_file():
            raise DataFileError(f"{path}: there is no such file")
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                    raise ValueError("too large")
            with np.load(path, allow_pickle=False) as parts:
                meta, steps, words, digest = (parts[key] for key in ("meta", "steps", "words", "digest"))
            if (meta.dtype, steps.dtype, words.dtype) != (np.uint8, np.dtype("<i8"), np.dtype("<u8")):
                raise ValueError("wrong types")
            if digest.tobytes() != _digest(meta.tobytes(), steps, words):
                raise ValueError("the digest does not match")
            content = json.loads(meta.tobytes())
            if content["format"] != FORMAT:
                raise ValueError("another format")
            tensors = tuple(_tracked(t) for t in content["tensors"])
            return cls(tensors, steps.astype(np.int64), words.astype(np.uint64))
        except Exception as error:  # zip, numpy and json raise a dozen kinds of errors; each means the same to the user
            raise DataFileError(
                f"{path}: not a readable bit history ({error}). Record it again, or get the file again from its source."
            ) from error


def _digest(meta: bytes, steps: NDArray[Any], words: NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for part in (meta, str((steps.shape, words.shape)).encode(), steps.tobytes(), words.tobytes()):
        digest.update(part)
    return digest.digest()


def _tracked(entry: Sequence[Any]) -> Tracked:
    name, shape, levels = entry
    return Tracked(str(name), tuple(int(k) for k in shape), tuple(float(v) for v in levels))


class Signs:
    """The words of latent tensors whose signs are deployed, sign(0) = +1, without making the signs.

    Training leaves a millisecond or two for a step of a small net, so this is numpy on the tensors' own memory: one comparison
    per tensor and one call of packbits. It is looked up again where an optimizer gave a parameter other memory.

    Args:
        tensors: what is recorded: two levels each.
        latents: the latent tensors, on the CPU, float16, float32 or float64.
    """

    DTYPES = (torch.float16, torch.float32, torch.float64)

    def __init__(self, tensors: Sequence[Tracked], latents: Sequence[Tensor]) -> None:
        self.latents = latents
        self._bits = np.zeros(64 * sum(t.words for t in tensors), bool)
        starts = np.cumsum([0, *(64 * t.words for t in tensors)])
        self._out = [self._bits[i : i + t.size].reshape(t.shape) for i, t in zip(starts, tensors, strict=False)]
        self._look_up()

    def _look_up(self) -> None:
        self._addresses = [w.data_ptr() for w in self.latents]
        self._views = [w.detach().numpy() for w in self.latents]  # views, contiguous or not

    def __call__(self) -> NDArray[np.uint64]:
        """Return the words of all tensors, in their order."""
        for w, address in zip(self.latents, self._addresses, strict=True):
            if w.data_ptr() != address:
                self._look_up()
        for view, out in zip(self._views, self._out, strict=True):
            np.less(view, 0, out=out)
        return np.packbits(self._bits, bitorder="little").view("<u8")


class Recorder:
    """Gathers a `History` row by row.

    Args:
        tensors: what is recorded.
        every: steps between two records.
        limit: bytes that the words may take. Beyond, every second row is dropped, and from then on half as many are recorded.
    """

    def __init__(self, tensors: Iterable[Tracked], every: int = 1, limit: int = 64 * MEGABYTE) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 step, not {every!r}")
        self.tensors, self.every, self.limit = tuple(tensors), every, limit
        self.width = sum(t.words for t in self.tensors)
        self.steps: list[int] = []
        self._words = np.empty((64, self.width), np.uint64)

    def due(self, step: int) -> bool:
        """Whether this step is one to record, and not recorded yet."""
        return step % self.every == 0 and (not self.steps or step > self.steps[-1])

    def append(self, step: int, hard: Mapping[str, Tensor]) -> None:
        """Record the hard weights after `step` optimizer steps."""
        self.append_words(step, np.concatenate([t.encode(hard[t.name]) for t in self.tensors]))

    def append_words(self, step: int, words: NDArray[np.uint64]) -> None:
        """Record the words (W,) of all tensors, in their order."""
        n = len(self.steps)
        if n == len(self._words):
            self._words = np.concatenate([self._words, np.empty_like(self._words)])
        self._words[n] = words
        self.steps.append(step)
        if 8 * (n + 1) * self.width > self.limit and n > 1:
            self._thin()

    def _thin(self) -> None:
        """Keep the rows that a recording with twice the distance would have."""
        self.every *= 2
        kept = [i for i, step in enumerate(self.steps) if step % self.every == 0]
        self._words[: len(kept)] = self._words[kept]
        self.steps = [self.steps[i] for i in kept]

    def history(self) -> History:
        """Return what is recorded so far.

        Raises:
            InputError: nothing is.
        """
        if not self.tensors or not self.steps:
            raise InputError("nothing is recorded yet: the net has no weights on a grid, or no step was taken")
        return History(self.tensors, np.array(self.steps, np.int64), self._words[: len(self.steps)].copy())

    def state(self) -> dict[str, Any]:
        """Return primitives and one tensor: what a checkpoint may hold."""
        return {
            "tensors": [[t.name, list(t.shape), list(t.levels)] for t in self.tensors],
            "every": self.every,
            "steps": list(self.steps),
            "words": torch.from_numpy(self._words[: len(self.steps)].view(np.int64).copy()),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], limit: int = 64 * MEGABYTE) -> Recorder:
        """Return the recorder that `state` was taken of."""
        recorder = cls([_tracked(t) for t in state["tensors"]], int(state["every"]), limit)
        recorder.steps = [int(step) for step in state["steps"]]
        words = state["words"].cpu().numpy().view(np.uint64)
        recorder._words = np.concatenate([words, np.empty((64, recorder.width), np.uint64)])
        return recorder
