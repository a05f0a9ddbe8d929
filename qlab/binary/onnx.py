"""A packed net as ONNX, for other runtimes: its simulation, with signs as +-1 in float32.

    sign         x >= 0, chosen between 1 and -1 (ONNX's own Sign gives 0 at 0)
    threshold    (z < threshold) xor flip, chosen between -1 and 1
    batch norm   z alpha + beta, rounded after each of the two; where the packed net rounds once (FMA), which ONNX has not, both are
                 done in float64 and rounded to float32 at the end. The product is exact there; the sum is rounded twice, which
                 differs from once only where it falls on the middle of two float32 numbers in rounding to float64

Sums of signs are exact in float32, so every runtime gives the same hidden bits and logits, save where a net sums floats (a
float first layer, a mean): each runtime does that in an order of its own. A runtime that optimises the graph may also multiply
batch norm into the weights, and then rounds elsewhere; the backend "onnxruntime" has that switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qlab import provenance
from qlab.binary.file import replace_file
from qlab.binary.graph import Graph
from qlab.binary.onnx_steps import FLOAT, Builder, onnx_package, pool_pads
from qlab.binary.shapes import infer
from qlab.errors import InputError

if TYPE_CHECKING:
    from os import PathLike

    from qlab.binary.packed import PackedNet

__all__ = ["build", "export_onnx", "unsupported"]

OPSET = 20
IR_VERSION = 9  # the one that came with this opset: older runtimes read it


def export_onnx(net: nn.Module | PackedNet, example: Tensor, path: str | PathLike[str]) -> Path:
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

    onnx = onnx_package()
    packed = net if isinstance(net, PackedNet) else compile(net, example)
    check_batch(example, packed.graph.input_shape, packed.graph.image)
    model = build(packed.graph)
    onnx.checker.check_model(model)
    target = Path(path)
    replace_file(target, [model.SerializeToString()])
    return target


RAW = frozenset({"normalise", "image_conv2d", "image_linear"})
"""Steps on raw images, which have no ONNX form here."""


def unsupported(graph: Graph) -> list[str]:
    """Return what of a graph cannot be said in ONNX, one text for each step."""
    shapes = infer(graph)
    found = []
    for step in graph.steps:
        o, taken = step.options, shapes[step.inputs[0]]
        if step.op in RAW:
            found.append(f"{step.layer or step.op}: the raw image; compile the net without `image`")
        if step.op == "adaptive_avg_pool2d" and any(n % m for n, m in zip(taken[2:], o["size"], strict=True)):
            why = f"adaptive average pooling of {list(taken[2:])} to {list(o['size'])}, whose windows differ in size"
            found.append(f"{step.layer}: {why}")
        if step.op == "avg_pool2d" and any(o["padding"]) and o["count_padding"]:
            before, after = pool_pads(step, shapes)
            if before != after:
                found.append(f"{step.layer}: average pooling that rounds up its size and counts padding")
    return found


def build(graph: Graph, watched: Sequence[str] = ()) -> Any:
    """Return a graph as an `onnx.ModelProto`, from "input" (N, *input_shape) to "output".

    Args:
        graph: a checked graph.
        watched: names of values that become outputs too; bits are +-1, channels first, a flattened picture without padding.

    Raises:
        InputError: a part of it cannot be said in ONNX; all of them are named.
        QlabError: the package onnx is missing.
    """
    helper = onnx_package().helper
    missing = unsupported(graph)
    if missing:
        raise InputError(f"this net cannot be said in ONNX: {'; '.join(missing)}. Replace them, or keep the packed net")
    builder = Builder(graph)
    for step in graph.steps:
        builder.write(step)
    results = {"output": graph.output, **{name: name for name in watched}}
    for name, value in results.items():
        builder.node("Identity", builder.names[value], result=name)
    infos = [
        helper.make_tensor_value_info(name, FLOAT, ("N", *builder.shapes[value][1:]))
        for name, value in {"input": "input", **results}.items()
    ]
    return helper.make_model(
        helper.make_graph(builder.nodes, "qlab", infos[:1], infos[1:], builder.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="qlab",
        producer_version=provenance.versions()["qlab"],
    )
