"""Writing the steps of a packed graph: what values there are while a net is walked, and how those that wait are written.

    Float   a float tensor that a step has given
    Image   the raw image
    Bits    packed signs that a step has given
    Counts  a binary layer whose integers are not written yet, with the per-channel functions that follow it
    Normed  a batch norm of a float that is not written yet

The last two wait for what comes next: a sign makes them one comparison (`fold`), an addition takes a batch norm along, anything
else writes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from qlab.binary.fold import Affine, fold_sign
from qlab.binary.graph import Step
from qlab.binary.images import Normalise
from qlab.binary.kernels import reference
from qlab.errors import InputError

__all__ = ["Bits", "Counts", "Float", "Image", "Link", "Normed", "Shape", "Value", "Writer"]

Shape = tuple[int, ...]


@dataclass
class Float:
    """A float value of a step."""

    name: str
    shape: Shape


@dataclass
class Image:
    """The raw image, uint8; `grid` is (C, H, W) where it was flattened."""

    name: str
    shape: Shape
    grid: Shape | None = None


@dataclass
class Bits:
    """Packed signs; `grid` is (C, H, W) where they were flattened, pixel by pixel."""

    name: str
    shape: Shape
    grid: Shape | None = None
    source: Bits | None = None  # what was flattened


@dataclass
class Link:
    """A per-channel function after a binary layer: what it computes, and how it is written as an epilogue or as steps."""

    apply: Callable[[Tensor], Tensor]
    layer: str
    affine: Affine | None = None
    write: Callable[[Writer, Float], Float] | None = None


@dataclass
class Counts:
    """A binary layer that is not written yet."""

    layer: str
    step: dict[str, Any]  # op, inputs, tensors, options of the layer
    shape: Shape
    k: int
    pool: dict[str, Any] | None = None  # a max-pool directly after it
    chain: list[Link] = field(default_factory=list)


@dataclass
class Normed:
    """A batch norm of a float that is not written yet."""

    value: Float
    affine: Affine
    write: Callable[[Writer, Float], Float]


Value = Float | Image | Bits | Counts | Normed | None


class Writer:
    """Collects the steps, tensors and report rows of a packed graph.

    Args:
        product: how layers with sign weights and float inputs multiply; see `qlab.binary.compile`.
        image: what normalises a raw image, where the net takes one.
    """

    def __init__(self, product: str, image: Normalise | None = None) -> None:
        self.product = product
        self.image = image
        self.steps: list[Step] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def tensor(self, name: str, value: Tensor | np.ndarray) -> str:
        """Keep a tensor and return the name it is kept under."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self.tensors[name] = np.array(array, order="C")  # not ascontiguousarray: it makes a scalar a vector
        return name

    def emit(
        self, op: str, inputs: Sequence[str], layer: str, tensors: dict[str, Any] | None = None, **options: Any
    ) -> str:
        """Write a step and return the name of its value."""
        name = f"v{len(self.steps) + 1}"
        kept = {role: self.tensor(f"{layer}.{name}.{role}", t) for role, t in (tensors or {}).items() if t is not None}
        self.steps.append(Step(op, tuple(inputs), (name,), layer, kept, options))
        return name

    def plain(
        self, node_shape: Shape, op: str, inputs: Sequence[Value], layer: str, tensors: Any = None, **o: Any
    ) -> Float:
        """Write a float step."""
        return Float(self.emit(op, [self.floated(v).name for v in inputs], layer, tensors, **o), node_shape)

    def floated(self, value: Value) -> Float:
        """Return a value as a float, writing what waits."""
        if isinstance(value, Float):
            return value
        if isinstance(value, Image):
            assert self.image is not None
            tensors = {"mean": self.image.mean, "std": self.image.std}
            whole = Float(self.emit("normalise", [value.name], "", tensors), value.shape)
            if value.grid is None:
                return whole
            return Float(self.emit("flatten", [whole.name], "", start=1, end=-1), value.shape)
        if isinstance(value, Bits):
            if value.source is not None:
                source = self.floated(value.source)
                return Float(self.emit("flatten", [source.name], "", start=1, end=-1), value.shape)
            return Float(self.emit("unpack", [value.name], "", channels=value.shape[1]), value.shape)
        if isinstance(value, Normed):
            return value.write(self, value.value)
        if isinstance(value, Counts):
            return self.written(value)
        raise InputError("a shape is used as a tensor")

    def written(self, counts: Counts, residual: Float | None = None) -> Float:
        """Write a binary layer with a float result, and what follows it."""
        chain = list(counts.chain)
        epilogue, fused, inputs = {}, False, list(counts.step["inputs"])
        first = chain[0].affine if chain else None
        # The layer's own scale and bias never decrease: they may go before the maximum that stands between.
        if first is not None and (counts.pool is None or chain[0].write is None):
            del chain[0]
            epilogue, fused = {"alpha": first.alpha, "beta": first.beta}, first.fused
            if residual is not None:
                inputs.append(residual.name)
        name = self.emit(
            counts.step["op"],
            inputs,
            counts.layer,
            {**counts.step["tensors"], **epilogue},
            **counts.step["options"],
            fused=fused,
        )
        value = Float(name, counts.shape)
        if counts.pool is not None:
            value = Float(
                self.emit("max_pool2d", [value.name], counts.layer, dilation=[1, 1], ceil=False, **counts.pool),
                counts.shape,
            )
        for link in chain:
            assert link.write is not None  # only the layer's own scale has none, and it was first
            value = link.write(self, value)
        return value

    def threshold(self, counts: Counts) -> Bits | None:
        """Write a binary layer whose result is compared at once, or return None where that cannot be."""

        def f(z: Tensor) -> Tensor:
            for link in counts.chain:
                z = link.apply(z)
            return z

        found = fold_sign(f, counts.k, counts.shape[1], len(counts.shape) == 4)
        if found is None:
            return None
        flip = reference.pack(np.where(found.flip, -1, 1))
        # The maximum of integers before a threshold is the AND of their comparisons; the flip comes after it.
        own = {"threshold": found.threshold, "flip": np.zeros_like(flip) if counts.pool else flip}
        name = self.emit(
            counts.step["op"],
            counts.step["inputs"],
            counts.layer,
            {**counts.step["tensors"], **own},
            **counts.step["options"],
            fused=False,
        )
        if counts.pool:
            name = self.emit(
                "max_pool_bits", [name], counts.layer, {"flip": flip} if found.flip.any() else None, **counts.pool
            )
        self.note(counts.layer, ties=found.ties)
        return Bits(name, counts.shape)

    def added(self, shape: Shape, layer: str, one: Value, other: Value) -> Float:
        """Return a sum; a binary layer with batch norm that waits takes the other value along."""
        for mine, rest in ((one, other), (other, one)):
            waits = isinstance(mine, Counts) and mine is not rest and mine.pool is None and len(mine.chain) == 1
            if waits and mine.chain[0].affine and self.shape_of(rest) == shape == self.shape_of(mine):  # type: ignore[union-attr]
                return self.written(mine, residual=self.floated(rest))  # type: ignore[arg-type]
        return self.plain(shape, "add", [one, other], layer)

    def shape_of(self, value: Value) -> Shape:
        """Return the shape that a value has in the original net."""
        if isinstance(value, Normed):
            return value.value.shape
        if value is None:
            raise InputError("a shape is used as a tensor")
        return value.shape

    def note(self, layer: str, **entries: Any) -> None:
        """Add entries to a layer's row of the report."""
        self.rows[layer].update(entries)
