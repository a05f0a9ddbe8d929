"""Looking into a packed net: the bits of a layer, one of its dot products word by word, what it costs.

bits(packed, "hidden.0")                     # the weight words, as words and as signs
dot(packed, x, "hidden.0", unit=3)           # one neuron on one example: xor, popcount, running sum, threshold
run = follow(packed, x, "features.4")        # the same for every unit and position of a layer, after one run
cost(packed, x);  crossover()                # bytes and seconds

What they return has `frame()`, `figure()` and `summary()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlab.binary.cost import Cost, Crossover, cost, crossover
from qlab.binary.dots import DotProduct, LayerBits, LayerRun, checked_index
from qlab.binary.graph import Graph, Step
from qlab.binary.kernels import reference
from qlab.binary.packed import PackedNet, check_batch
from qlab.binary.shapes import infer
from qlab.errors import InputError, UnknownNameError

__all__ = [
    "Cost",
    "Crossover",
    "DotProduct",
    "LayerBits",
    "LayerRun",
    "bits",
    "cost",
    "crossover",
    "dot",
    "follow",
    "layers",
]

ON_BITS = ("binary_conv2d", "binary_linear")
PACKED = (*ON_BITS, "sign_weight_conv2d", "sign_weight_linear")
KEEP_WORDS = ("numba", "numpy", "shim")  # backends whose values are numpy words


def layers(packed: PackedNet) -> list[str]:
    """Return the names of the layers that run on bits, in their order.

    Raises:
        InputError: this is no packed net, or it has none.
    """
    if not isinstance(packed, PackedNet):
        raise InputError(
            f"packed is a {type(packed).__name__}; expected a packed net, as qlab.binary.compile(net, example) returns"
        )
    names = list(dict.fromkeys(step.layer for step in packed.graph.steps if step.op in ON_BITS))
    if not names:
        raise InputError(
            "no layer of this net runs on bits: that takes sign weights and sign activations, as the method 'ste' gives with "
            "binary activations; packed.report() says of each layer why it does not"
        )
    return names


def bits(packed: PackedNet, layer: str) -> LayerBits:
    """Return the weights of a layer whose weights are bits.

    Args:
        packed: a compiled or loaded net.
        layer: its name in the original net, as in `packed.report()`.

    Raises:
        InputError: this is no packed net, or the layer's weights are floats.
        UnknownNameError: there is no such layer.
    """
    if not isinstance(packed, PackedNet):
        layers(packed)
    return _bits(packed.graph, _find(packed, layer, PACKED))


def _find(packed: PackedNet, layer: str, ops: tuple[str, ...]) -> Step:
    found = [step for step in packed.graph.steps if step.layer == layer]
    for step in found:
        if step.op in ops:
            return step
    names = list(dict.fromkeys(step.layer for step in packed.graph.steps if step.op in ops))
    if not found:
        raise UnknownNameError("packed layer", layer, names)
    kind = "has bits as weights" if len(ops) > len(ON_BITS) else "runs on bits"
    raise InputError(
        f"layer {layer!r} is a {found[0].op} step; expected one that {kind}: {', '.join(names) or 'there is none'}"
    )


def _bits(graph: Graph, step: Step) -> LayerBits:
    words = graph.tensors[step.tensors["weight"]]
    axes: tuple[str, ...]
    if step.op.endswith("conv2d"):
        axes, channels = ("unit", "row", "column", "word"), step.options["channels"] // step.options["groups"]
    else:
        axes, channels = ("unit", "word"), step.options["features"]
        maker = next((s for s in graph.steps if step.inputs[0] in s.outputs), None)
        if maker is not None and maker.op == "flatten_bits":
            _, channels, height, width = infer(graph)[maker.inputs[0]]
            words = words.reshape(len(words), height, width, -1)
            axes = ("unit", "row", "column", "word")
    threshold = flip = None
    if "threshold" in step.tensors:
        threshold = graph.tensors[step.tensors["threshold"]]
        flip = reference.unpack(graph.tensors[step.tensors["flip"]], len(words)) < 0
    return LayerBits(step.layer, step.op, words, axes, channels, threshold, flip)


def follow(packed: PackedNet, x: Tensor, layer: str, example: int = 0, backend: str | None = None) -> LayerRun:
    """Run one example, and keep what a layer took and gave.

    Args:
        packed: a compiled or loaded net.
        x: (N, *input_shape), float32.
        layer: one that runs on bits; see `layers`.
        example: which of the batch.
        backend: whose bits; `packed.backend` by default. The sums beside them are the float simulation's.

    Raises:
        InputError: a wrong batch, example or layer, or a backend that keeps no words.
        UnknownNameError: there is no such layer or backend.
    """
    layers(packed)
    step = _find(packed, layer, ON_BITS)
    check_batch(x, packed.graph.input_shape, packed.graph.image)
    one = x[checked_index("example", example, len(x)) :][:1]
    name = backend or packed.backend
    if name not in KEEP_WORDS:
        raise InputError(f"backend {name!r} keeps no words to look at; choose one of {', '.join(KEEP_WORDS)}")
    simulation = packed.on("torch")
    simulated: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    simulation.run(one, _keeper(simulated, [step.inputs[0]]))
    packed.on(name).run(one, _keeper(seen, [step.inputs[0], *step.outputs]))
    layer_bits = _bits(packed.graph, step)
    # The layer alone, without what is fused into it: its step without an epilogue gives the sums.
    alone = replace(step, inputs=step.inputs[:1], outputs=step.outputs[:1], tensors={"weight": step.tensors["weight"]})
    (totals,) = simulation.step(alone, [torch.from_numpy(simulated[step.inputs[0]])])
    values = outputs = None
    for name in step.outputs:
        if seen[name].dtype == np.uint64:
            bit = reference.unpack(seen[name][0], layer_bits.units) < 0
            outputs = np.moveaxis(bit, -1, 0).astype(np.uint8)
        else:
            values = seen[name][0].astype(np.float32)
    inputs = seen[step.inputs[0]]
    shape = inputs.shape[1:] if layer_bits.op == "binary_conv2d" else layer_bits.words.shape[1:]
    return LayerRun(layer_bits, step, int(example), inputs[0].reshape(shape), totals[0].numpy(), values, outputs)


def _keeper(kept: dict[str, np.ndarray], names: list[str]) -> Callable[[Step, tuple[Any, ...]], None]:
    """Return an observer that copies the values of some names."""
    return lambda step, values: kept.update(
        {
            name: v.numpy().copy() if isinstance(v, Tensor) else v.copy()
            for name, v in zip(step.outputs, values, strict=True)
            if name in names
        }
    )


def dot(
    packed: PackedNet, x: Tensor, layer: str, unit: int, position: tuple[int, int] | None = None, example: int = 0
) -> DotProduct:
    """Return one dot product of a layer on bits, word by word.

    Args:
        packed: a compiled or loaded net.
        x: (N, *input_shape), float32.
        layer: one that runs on bits; see `layers`.
        unit: output channel or neuron.
        position: (row, column) of a convolution's result; the middle by default.
        example: which of the batch.

    Raises:
        InputError: a wrong batch, example, layer, unit or position.
        UnknownNameError: there is no such layer.
    """
    return follow(packed, x, layer, example).dot(unit, position)
