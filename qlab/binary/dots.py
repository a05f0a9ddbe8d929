"""The records of `qlab.binary.inspect`: a layer's bits, one dot product word by word, one example's way through a layer.

A neuron of signs is K - 2 popcount(a xor w). Word t holds n_t signs that count, p_t of which differ, so that

    z = sum_t (n_t - 2 p_t)

n_t is 0 where the tap of a convolution lies outside a picture that is padded with zeros: that is the whole border correction.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlab.binary.graph import Step
from qlab.binary.kernels import reference
from qlab.binary.kernels.reference import WORD
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["DotProduct", "LayerBits", "LayerRun", "checked_index", "compared"]

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

NEVER = int(np.iinfo(np.int32).min)  # a threshold that no sum is below


@dataclass(frozen=True)
class LayerBits:
    """The weights of a packed layer.

    Args:
        layer: its name in the original net.
        op: its step, a name of `qlab.binary.graph.OPS`.
        words: uint64 (O, *taps, W(C)); taps are (kh, kw) of a convolution, (H, W) of a layer on a flattened picture, else none.
        axes: names of the axes of `words`.
        channels: C, signs at each tap.
        threshold: int32 (O,), None where the layer's sums are not compared at once.
        flip: bool (O,), with `threshold`: bit = (z < threshold) xor flip.
    """

    layer: str
    op: str
    words: Words
    axes: tuple[str, ...]
    channels: int
    threshold: NDArray[np.int32] | None = None
    flip: NDArray[np.bool_] | None = None

    @property
    def units(self) -> int:
        """O, the number of output channels or neurons."""
        return len(self.words)

    @property
    def taps(self) -> tuple[int, ...]:
        """The sizes of the axes between units and words."""
        return self.words.shape[1:-1]

    @property
    def k(self) -> int:
        """K, the number of signs of a unit."""
        return prod(self.taps) * self.channels

    @property
    def used(self) -> Words:
        """(W(C),) words whose ones are the bits that hold a sign; the others are padding, and 0."""
        return reference.pack(np.full(self.channels, -1))

    @property
    def padding(self) -> float:
        """The share of bits that are padding."""
        return 1 - self.k / (WORD * prod(self.words.shape[1:]))

    @property
    def signs(self) -> NDArray[np.int8]:
        """(O, *taps, C) of -1 and +1."""
        return reference.unpack(self.words, self.channels)

    def frame(self) -> pd.DataFrame:
        """Return one row per unit: how many of its weights are -1, its threshold and flip."""
        import pandas as pd

        minus = np.bitwise_count(self.words).reshape(self.units, -1).sum(1, dtype=np.int64)
        table = pd.DataFrame({"unit": np.arange(self.units), "minus": minus, "plus": self.k - minus})
        return table if self.threshold is None else table.assign(threshold=self.threshold, flip=self.flip)

    def figure(self) -> Figure:
        """Return the weights as a picture, a pixel per bit."""
        from qlab.plots.bits import bits_figure

        return bits_figure(self)

    def summary(self) -> str:
        """Return one sentence with the numbers."""
        minus = int(np.bitwise_count(self.words).sum())
        words = prod(self.words.shape[1:])
        return (
            f"Layer {self.layer}: {self.units} units of {self.k:,} signs in {words:,} words each, "
            f"{self.words.nbytes / 1024:,.1f} KB; {minus / (self.units * self.k):.0%} of the signs are -1, "
            f"{self.padding:.0%} of the bits are padding."
        )


@dataclass(frozen=True)
class DotProduct:
    """One unit on one example at one position, in T words.

    Args:
        layer, example, unit: which.
        position: (row, column) of the layer's result, None for a linear layer.
        activation, weight, xor: uint64 (T,); bits that do not count are 0 in xor.
        counted: uint64 (T,), ones where a bit counts.
        taps: int (T, 2) row and column of the tap in the kernel or the picture; (T, 0) where there are none.
        first: int (T,), the channel that bit 0 holds.
        inside: bool (T,), whether the tap lies in the picture.
        signs, popcount: int (T,), n and p of each word.
        sums: int (T,), the sum up to and with each word; the last one is z.
        simulated: the same number from the float simulation.
        threshold, flip: of the unit, None where its sum is not compared at once.
        value: the float that the packed net gave (batch norm, shortcut), None where it gave a bit only.
        bit: the bit that the packed net gave, None where it gave a float only.
    """

    layer: str
    example: int
    unit: int
    position: tuple[int, int] | None
    activation: Words
    weight: Words
    xor: Words
    counted: Words
    taps: Ints
    first: Ints
    inside: NDArray[np.bool_]
    signs: Ints
    popcount: Ints
    sums: Ints
    simulated: float
    threshold: int | None = None
    flip: bool = False
    value: float | None = None
    bit: int | None = None

    @property
    def k(self) -> int:
        """The number of signs that count."""
        return int(self.signs.sum())

    @property
    def z(self) -> int:
        """K - 2 popcount."""
        return int(self.sums[-1])

    @property
    def decision(self) -> int | None:
        """The bit (z < threshold) xor flip, None where there is no threshold."""
        return None if self.threshold is None else int((self.z < self.threshold) ^ self.flip)

    def frame(self) -> pd.DataFrame:
        """Return one row per word; words are written as 16 hexadecimal digits, the highest bit first."""
        import pandas as pd

        table: dict[str, Any] = {"tap": [tuple(map(int, tap)) for tap in self.taps]} if self.taps.size else {}
        table |= {"first": self.first, "inside": self.inside}
        for name in ("activation", "weight", "xor"):
            table[name] = [f"{int(word):016x}" for word in getattr(self, name)]
        return pd.DataFrame(table | {"signs": self.signs, "popcount": self.popcount, "sum": self.sums})

    def figure(self) -> Figure:
        """Return the first words bit by bit, and the running sum with the threshold."""
        from qlab.plots.bits import dot_figure

        return dot_figure(self)

    def summary(self) -> str:
        """Return the whole product in words."""
        where = "" if self.position is None else f" at row {self.position[0]}, column {self.position[1]}"
        outside = int((~self.inside).sum())
        border = f" {outside} of {len(self.signs)} words lie outside the picture." if outside else ""
        text = (
            f"Layer {self.layer}, unit {self.unit}{where}, example {self.example}: {int(self.popcount.sum())} of "
            f"{self.k} signs differ, so z = {self.k} - 2 x {int(self.popcount.sum())} = {self.z}.{border} "
            f"The float simulation gives {self.simulated:g}."
        )
        if self.threshold is not None:
            return f"{text} {compared(self.z, self.threshold, self.flip)}"
        after = "" if self.value is None else f" Batch norm and what is added make it {self.value:.4g}."
        return text + after + ("" if self.bit is None else f" Its sign is {1 - 2 * self.bit:+d}.")


def compared(z: int, threshold: int, flip: bool) -> str:
    """Return in words what a threshold makes of a sum."""
    bit = int((z < threshold) ^ flip)
    if threshold == NEVER:
        return f"Whatever the sum, the unit gives {1 - 2 * bit:+d}."
    relation = "below" if z < threshold else "not below"
    flipped = ", and the unit's batch norm has a negative scale, which flips it" if flip else ""
    return f"z is {relation} the threshold {threshold}{flipped}: the bit is {bit}, the sign {1 - 2 * bit:+d}."


@dataclass(frozen=True)
class LayerRun:
    """One example's way through a layer on bits.

    Args:
        bits: the layer.
        step: the layer's step.
        example: which.
        inputs: the words that came in, (H, W, W(C)), or (*taps, W(C)) for a linear layer.
        totals: float32 (O, *grid), the layer's sums in the float simulation.
        values: float32 (O, *grid), what the packed net gave as floats; None where it gave bits only.
        outputs: uint8 (O, *grid), what it gave as bits; None where it gave floats only.
    """

    bits: LayerBits
    step: Step
    example: int
    inputs: Words
    totals: NDArray[np.float32]
    values: NDArray[np.float32] | None
    outputs: NDArray[np.uint8] | None

    @property
    def grid(self) -> tuple[int, ...]:
        """(OH, OW), or () for a linear layer."""
        return self.totals.shape[1:]

    def dot(self, unit: int, position: tuple[int, int] | None = None) -> DotProduct:
        """Return a unit's dot product at a position, by default in the middle.

        Raises:
            InputError: no such unit or position.
        """
        unit = checked_index("unit", unit, self.bits.units)
        at = self._position(position)
        activation, inside = self._window(unit, at)
        weight = self.bits.words[unit]
        zero_padded = self.step.options.get("pad", "zero") == "zero"
        counted = np.where(inside[..., None] if zero_padded else True, self.bits.used, np.uint64(0))
        counted = np.broadcast_to(counted, weight.shape).reshape(-1)
        activation, weight = activation.reshape(-1), weight.reshape(-1)
        xor = (activation ^ weight) & counted
        signs, popcount = (np.bitwise_count(word).astype(np.int64) for word in (counted, xor))
        taps = (
            np.stack(np.unravel_index(np.arange(prod(self.bits.taps)), self.bits.taps), 1) if self.bits.taps else None
        )
        each = len(self.bits.used)
        threshold, flip = self.bits.threshold, self.bits.flip
        place = (unit, *at)
        return DotProduct(
            self.bits.layer,
            self.example,
            unit,
            (at[0], at[1]) if at else None,
            activation,
            weight,
            xor,
            counted,
            np.zeros((len(xor), 0), np.int64) if taps is None else taps.repeat(each, 0),
            np.tile(WORD * np.arange(each), len(xor) // each),
            inside.reshape(-1).repeat(each),
            signs,
            popcount,
            (signs - 2 * popcount).cumsum(),
            float(self.totals[place]),
            None if threshold is None else int(threshold[unit]),
            False if flip is None else bool(flip[unit]),
            None if self.values is None else float(self.values[place]),
            None if self.outputs is None else int(self.outputs[place]),
        )

    def _position(self, position: tuple[int, int] | None) -> tuple[int, ...]:
        if not self.grid:
            if position is not None:
                raise InputError(f"position is {position!r}, but {self.bits.layer} is a linear layer; leave it out")
            return ()
        if position is None:
            return tuple(n // 2 for n in self.grid)
        if not isinstance(position, tuple | list) or len(position) != 2:
            raise InputError(f"position is {position!r}; expected (row, column)")
        names = ("row", "column")
        return tuple(checked_index(name, p, n) for name, p, n in zip(names, position, self.grid, strict=True))

    def _window(self, unit: int, at: tuple[int, ...]) -> tuple[Words, NDArray[np.bool_]]:
        """Return the activation words under a unit's weights (*taps, W), and which taps lie inside (*taps,)."""
        if not at:
            return self.inputs, np.ones(self.bits.taps, bool)
        o, taps = self.step.options, self.bits.taps
        rows, columns = (
            at[i] * o["stride"][i] - o["padding"][i] + np.arange(taps[i]) * o["dilation"][i] for i in (0, 1)
        )
        height, width = self.inputs.shape[:2]
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        words = self.inputs[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
        if o["groups"] > 1:
            begin = unit // (self.bits.units // o["groups"]) * self.bits.channels
            signs = reference.unpack(words, o["channels"])
            words = reference.pack(signs[..., begin : begin + self.bits.channels])
        return np.where(inside[..., None], words, np.uint64(0)), inside


def checked_index(name: str, value: object, count: int) -> int:
    """Return a whole number from 0 to count - 1.

    Raises:
        InputError: it is none.
    """
    try:
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    if isinstance(value, bool) or not 0 <= index < count:
        raise InputError(f"{name} is {value!r}; expected a whole number from 0 to {count - 1}")
    return index
