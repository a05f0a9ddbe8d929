"""A packed net as ONNX, for other runtimes: its simulation, with signs as +-1 in float32.

    sign         x >= 0, chosen between 1 and -1 (ONNX's own Sign gives 0 at 0)
    threshold    (z < threshold) xor flip, chosen between -1 and 1
    batch norm   z alpha + beta, rounded after each of the two; where the packed net rounds once (FMA), which ONNX has not, both are
                 done in float64 and rounded to float32 at the end. The product is exact there; the sum is rounded twice, which
                 differs from once only where it falls on the middle of two float32 numbers in rounding to float64

Sums of signs are exact in float32, so every runtime gives the same hidden bits and logits, save where a net sums floats (a
float first layer, a mean): each runtime does that in an order of its own. `inexact` names those steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qlab import provenance
from qlab.binary.file import replace_file
from qlab.binary.fold import Affine, fold_batch_norm
from qlab.binary.graph import Graph, Step
from qlab.binary.kernels import reference
from qlab.binary.shapes import Shape, infer
from qlab.errors import InputError, QlabError

if TYPE_CHECKING:
    from os import PathLike

    from qlab.binary.packed import PackedNet

__all__ = ["build", "export", "inexact", "unsupported"]

OPSET = 20
IR_VERSION = 9  # the one that came with this opset: older runtimes read it
LAST = np.iinfo(np.int64).max

Window = tuple[list[int], list[int]]


def export(net: nn.Module | PackedNet, example: Tensor, path: str | PathLike[str]) -> Path:
    """Write a net as ONNX, with a batch of any size, and return the path.

    Args:
        net: a packed net, or a deployed one, which is compiled first.
        example: a batch of inputs (N, *input_shape), float32.
        path: of the .onnx file, which is replaced if it exists.

    Raises:
        InputError: the net does not compile; a part of it cannot be said in ONNX, all of which are named; the path cannot be
            written.
        QlabError: the package onnx is missing.
    """
    from qlab.binary.packed import PackedNet, check_batch, compile

    onnx = _onnx()
    packed = net if isinstance(net, PackedNet) else compile(net, example)
    check_batch(example, packed.graph.input_shape)
    model = build(packed.graph)
    onnx.checker.check_model(model)
    target = Path(path)
    replace_file(target, [model.SerializeToString()])
    return target


def unsupported(graph: Graph) -> list[str]:
    """Return what of a graph cannot be said in ONNX, one text for each step."""
    shapes = infer(graph)
    found = []
    for step in graph.steps:
        height, width = (shapes[step.inputs[0]][2:] + (1, 1))[:2]
        o = step.options
        if step.op == "adaptive_avg_pool2d" and (height % o["size"][0] or width % o["size"][1]):
            why = f"adaptive average pooling of {height} x {width} to {o['size']}, whose windows differ in size"
            found.append(f"{step.layer}: {why}")
        if step.op == "avg_pool2d" and any(o["padding"]) and o["count_padding"]:
            before, after = _pool_pads(step, shapes)
            if any(a > b for a, b in zip(after, before, strict=True)):
                found.append(f"{step.layer}: average pooling that rounds up its size and counts padding")
    return found


INEXACT = {
    "conv2d",
    "linear",
    "sign_weight_conv2d",
    "sign_weight_linear",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "mean",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "elu",
}


def inexact(graph: Graph) -> list[str]:
    """Return the layers whose results a runtime may round in its own way: sums of floats, and transcendental functions."""
    return [step.layer or step.op for step in graph.steps if step.op in INEXACT]


def build(graph: Graph, watched: Sequence[str] = ()) -> Any:
    """Return a graph as an `onnx.ModelProto`, from "input" (N, *input_shape) to "output".

    Args:
        graph: a checked graph.
        watched: names of values that become outputs too; bits are +-1, channels first.

    Raises:
        InputError: a part of it cannot be said in ONNX; all of them are named.
        QlabError: the package onnx is missing.
    """
    helper = _onnx().helper
    missing = unsupported(graph)
    if missing:
        raise InputError(f"this net cannot be said in ONNX: {'; '.join(missing)}. Replace them, or keep the packed net")
    builder = _Builder(graph)
    for step in graph.steps:
        builder.step(step)
    builder.nodes.append(helper.make_node("Identity", [graph.output], ["output"]))
    shapes = {name: ("N", *shape[1:]) for name, shape in builder.shapes.items()}
    outputs = [("output", shapes[graph.output]), *((name, shapes[name]) for name in watched)]
    model = helper.make_model(
        helper.make_graph(
            builder.nodes,
            "qlab",
            [helper.make_tensor_value_info("input", 1, shapes["input"])],
            [helper.make_tensor_value_info(name, 1, shape) for name, shape in outputs],
            list(builder.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="qlab",
        producer_version=provenance.versions()["qlab"],
    )
    return model


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
    except ImportError as error:
        raise QlabError("ONNX needs the package onnx, which is not installed: pip install 'qlab[onnx]'") from error
    return onnx


def _pool_pads(step: Step, shapes: dict[str, Shape]) -> Window:
    """Return a pooling's padding before and after, so that rounding down gives the size that the step has."""
    o, taken, given = step.options, shapes[step.inputs[0]][2:], shapes[step.outputs[0]][2:]
    dilation, after = o.get("dilation", [1, 1]), []
    for i in (0, 1):
        reach = (given[i] - 1) * o["stride"][i] + dilation[i] * (o["kernel"][i] - 1) + 1
        after.append(max(o["padding"][i], reach - taken[i] - o["padding"][i]))
    return list(o["padding"]), after


class _Builder:
    """The nodes of a graph, step by step."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.shapes = infer(graph)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.pixels: dict[str, int] = {}  # flattened pictures: the channels of a pixel
        self.helper = _onnx().helper
        self.numpy_helper = _onnx().numpy_helper

    def constant(self, value: Any, name: str | None = None, dtype: Any = np.float32) -> str:
        """Return the name of a constant."""
        name = name or f"constant{len(self.constants)}"
        self.constants[name] = self.numpy_helper.from_array(np.ascontiguousarray(np.asarray(value, dtype)), name)
        return name

    def node(self, op: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its value."""
        name = to or f"node{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def tensor(self, step: Step, role: str) -> np.ndarray:
        """Return a step's tensor."""
        return self.graph.tensors[step.tensors[role]]

    def step(self, step: Step) -> None:
        """Add the nodes of a step."""
        result = getattr(self, step.op)(step, *step.inputs) if hasattr(self, step.op) else _FLOATS[step.op](self, step)
        for name, value in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=True):
            self.node("Identity", value, to=name)
            if value in self.pixels:
                self.pixels[name] = self.pixels[value]
                self.shapes[name] = (1, self.shapes[name][1] // reference.WORD)

    def per_channel(self, value: Any, step: Step, dtype: Any = np.float32) -> str:
        """Return a constant (C,) that broadcasts against the step's first result."""
        dims = len(self.shapes[step.outputs[0]]) - 2
        return self.constant(np.reshape(value, (-1, *(1 for _ in range(dims)))), dtype=dtype)

    def affine(self, step: Step, z: str, affine: Affine | None = None) -> str:
        """Return z alpha + beta, z itself where the step has none."""
        if affine is None and "alpha" not in step.tensors:
            return z
        if affine is None:
            affine = Affine(self.tensor(step, "alpha"), self.tensor(step, "beta"), step.options["fused"])
        dtype = np.float64 if affine.fused else np.float32
        z = self.node("Cast", z, to_type=11) if affine.fused else z
        z = self.node("Mul", z, self.per_channel(affine.alpha, step, dtype))
        z = self.node("Add", z, self.per_channel(affine.beta, step, dtype))
        return self.node("Cast", z, to_type=1) if affine.fused else z

    def sign(self, x: str) -> str:
        """Return +1 where x >= 0, else -1."""
        return self.node(
            "Where", self.node("GreaterOrEqual", x, self.constant(0.0)), self.constant(1.0), self.constant(-1.0)
        )

    def signs(self, step: Step, length: int) -> np.ndarray:
        """Return sign weights (O, ..., length) in float32."""
        return reference.unpack(self.tensor(step, "weight"), length).astype(np.float32)
