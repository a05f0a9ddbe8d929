r"""Which bits, flipped in memory, hurt a binary net most: every one of them, exactly.

    delta_i = L(w with w_i -> -w_i) - L(w)            of the deployed net, on one batch

`weakest_bits` gives the change of the loss and of the number of errors for all bits, by the flip oracle, without approximation.
`flip_packed` flips the same bit in the words of a packed net. Progressive search is in `qlab.attacks.weights`.

A weight of a float net as w_i = +-alpha flips to -w_i: its sign bit, which is the only bit that a packed net stores of it.

Shapes: F bits, N examples.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.losses import misclassified
from qlab.attacks.victim import checked, deployed
from qlab.diagnose.base import Result
from qlab.diagnose.flip_oracle import FlipOracle, binary_layers, flip_oracle, flipping, hard_net
from qlab.diagnose.objective import Loss
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.binary.packed import PackedNet
    from qlab.plots.figure import Figure

__all__ = ["WeakestBits", "bit_layers", "flip_packed", "packed_place", "scanning_bits", "source_of", "weakest_bits"]

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class WeakestBits(Result):
    """What every single flip does to loss and accuracy.

    Attributes:
        layer: (F,) names.
        index: (F,) positions in the flat weight of that layer.
        delta: (F,) exact changes of the loss.
        more_errors: (F,) exact changes of the number of misclassified examples.
        predicted: (F,) changes of the loss as back-propagation predicts them.
        loss, errors, examples: of the net before; errors are examples misclassified.
    """

    layer: NDArray[np.str_]
    index: Whole
    delta: Floats
    more_errors: Whole
    predicted: Floats
    loss: float
    errors: int
    examples: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def accuracy(self) -> float:
        """Share of examples that are classified correctly before any flip."""
        return 1 - self.errors / self.examples

    @property
    def order(self) -> Whole:
        """Bits by harm: the most errors first, among equals the largest change of the loss."""
        return np.lexsort((-self.delta, -self.more_errors))

    def frame(self) -> pd.DataFrame:
        """Return a row per bit, the most harmful first: layer, index, delta, predicted, accuracy_change, accuracy."""
        import pandas as pd

        at = self.order
        change = -self.more_errors[at] / self.examples
        return pd.DataFrame(
            {
                "layer": self.layer[at],
                "index": self.index[at],
                "delta": self.delta[at],
                "predicted": self.predicted[at],
                "accuracy_change": change,
                "accuracy": self.accuracy + change,
            }
        )

    def figure(self) -> Figure:
        """Return the harm of all bits in falling order, by layer."""
        from qlab.plots.bit_flips import weakest_figure

        return weakest_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        worst = int(self.order[0])
        names = list(dict.fromkeys(self.layer.tolist()))
        hurt, gain = int((self.more_errors > 0).sum()), int((self.more_errors < 0).sum())
        return (
            f"Deployed net on {self.examples} examples, {self.accuracy:.1%} right: {len(self):,} bits of {len(names)} layer"
            f"{'s' if len(names) != 1 else ''} flipped one at a time. {hurt:,} cost accuracy, {gain:,} "
            f"gain some, {int((self.delta == 0).sum()):,} do not even change the loss. The most harmful, {self.layer[worst]} "
            f"[{self.index[worst]}], leaves {self.accuracy - self.more_errors[worst] / self.examples:.1%} right."
        )


def weakest_bits(
    net: nn.Module | PackedNet,
    x: Tensor,
    y: Tensor,
    *,
    layers: Sequence[str] | None = None,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
) -> WeakestBits:
    """Return the exact change of loss and accuracy for each single flip of a binary weight.

    Args:
        net: in eval mode; of a method of the lab, what it deploys; of a packed net, the net that it was compiled from.
        x: (N, ...) inputs.
        y: (N,) labels.
        layers: names of `qlab.diagnose.binary_layers`; all of them by default.
        loss: a name of `qlab.diagnose.objective.LOSSES`, or logits and labels to one loss per example.
        beta: what the logits are multiplied by in the loss.

    Raises:
        InputError: a net without bits; a packed net without its source; and what `checked` says.
        UnknownNameError: no such layer.
    """
    return last(scanning_bits(net, x, y, layers=layers, loss=loss, beta=beta), WeakestBits)


def scanning_bits(
    net: nn.Module | PackedNet,
    x: Tensor,
    y: Tensor,
    *,
    layers: Sequence[str] | None = None,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
) -> Generator[Update, None, None]:
    """Yield progress of `weakest_bits`; a value holds the layers done so far."""
    net = checked(source_of(net), x, y, len(x))
    names = bit_layers(net, x, layers)
    done: list[tuple[FlipOracle, Whole]] = []
    with torch.no_grad():
        errors = int(misclassified(hard_net(net)(x), y).sum())
    for i, name in enumerate(names):
        scan: FlipOracle | None = None
        for update in flipping(net, x, y, name, loss=loss, beta=beta):
            scan = scan if update.value is None else update.value
            yield Update((i + 0.5 * update.fraction) / len(names), update.text)
        assert scan is not None
        wrong = flip_oracle(net, x, y, name, loss=_wrong)
        done.append((scan, np.rint(wrong.delta * len(x)).astype(np.int64)))
        yield Update(
            (i + 1) / len(names),
            f"{name}: {len(scan.index):,} bits",
            WeakestBits(
                np.concatenate([np.full(len(s.index), s.layer) for s, _ in done]),
                np.concatenate([s.index for s, _ in done]),
                np.concatenate([s.delta for s, _ in done]),
                np.concatenate([more for _, more in done]),
                np.concatenate([s.predicted for s, _ in done]),
                scan.loss,
                errors,
                len(x),
            ),
        )


def _wrong(z: Tensor, y: Tensor) -> Tensor:
    """1 where an example is misclassified: the loss whose mean is the error rate."""
    return misclassified(z, y).to(z.dtype)


def bit_layers(net: nn.Module, x: Tensor, layers: Sequence[str] | None) -> list[str]:
    """Return the layers of bits that are attacked."""
    found = binary_layers(net, x)
    if not found:
        raise InputError("this net has no layer of bits; quantize it first, with qlab.quantize(net, weights=Sign)")
    for name in layers or ():
        if name not in found:
            raise UnknownNameError("layer of bits", name, found)
    return found if layers is None else list(layers)


def source_of(net: Any) -> nn.Module:
    """Return the net behind a packed net; a net as it is."""
    if isinstance(net, nn.Module):
        return deployed(net)
    source = getattr(net, "source", None)
    if source is None and hasattr(net, "graph"):
        raise InputError(
            "this packed net was read from a file, and the search needs the net that it was compiled from: compile it again, or "
            "flip single bits of the file's net with flip_packed"
        )
    return deployed(net if source is None else source)


def packed_place(packed: PackedNet, layer: str, index: int) -> tuple[tuple[int, ...], int]:
    """Return where a weight lies in a packed net: the position of its word in `bits(packed, layer).words`, and its bit there.

    Args:
        packed: a packed net.
        layer: one whose weights are bits.
        index: in the flat weight of the original layer.

    Raises:
        InputError, UnknownNameError: as `qlab.binary.inspect.bits`; an index out of range.
    """
    from qlab.binary.bits import WORD
    from qlab.binary.inspect import bits

    found = bits(packed, layer)
    shape = (found.units, found.channels, *found.taps)  # channels first, as the original weight
    if not 0 <= index < int(np.prod(shape)):
        raise InputError(f"index is {index}; {layer!r} has {int(np.prod(shape)):,} weights, counted from 0")
    unit, channel, *taps = (int(v) for v in np.unravel_index(index, shape))
    return (unit, *taps, channel // WORD), channel % WORD


def flip_packed(packed: PackedNet, layer: str, index: int) -> PackedNet:
    """Return a packed net with one bit of its weights flipped in memory; the one given stays as it is.

    Args:
        packed, layer, index: as for `packed_place`.
    """
    from qlab.binary.inspect import PACKED
    from qlab.binary.packed import PackedNet

    place, bit = packed_place(packed, layer, index)
    step = next(s for s in packed.graph.steps if s.layer == layer and s.op in PACKED)
    name = step.tensors["weight"]
    words = packed.graph.tensors[name].copy()
    shape = (len(words), *_taps(packed, layer), -1)
    words.reshape(shape)[place] ^= np.uint64(1) << np.uint64(bit)
    flipped = PackedNet(replace(packed.graph, tensors={**packed.graph.tensors, name: words}))
    flipped.backend = packed.backend
    return flipped


def _taps(packed: PackedNet, layer: str) -> tuple[int, ...]:
    from qlab.binary.inspect import bits

    return bits(packed, layer).taps
