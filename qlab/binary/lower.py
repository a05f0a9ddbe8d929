"""From a deployed net to the steps of a packed one.

The net is traced (torch.fx) and walked once, node by node; `writer` says what values are, `layers` what modules become, `calls`
what function calls become. What cannot run on bits stays the operation of the original net, with the reason in its row of the
report; what is no operation of the format raises an error that names it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qlab.binary.calls import lower_call, nodes_in
from qlab.binary.graph import Graph, Step
from qlab.binary.images import Normalise
from qlab.binary.layers import layer
from qlab.binary.writer import Counts, Float, Image, Normed, Shape, Value, Writer
from qlab.errors import InputError
from qlab.quantizers import Quantizer

__all__ = ["lower"]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Quantizer) or super().is_leaf_module(m, module_qualified_name)


def lower(net: nn.Module, example: Tensor, product: str, image: Normalise | None = None) -> Graph:
    """Return the packed graph of a deployed net.

    Args:
        net: in eval mode, with plain weights.
        example: one batch of inputs.
        product: how layers with sign weights and float inputs multiply; see `qlab.binary.compile`.
        image: what normalises the raw images that the packed net shall take, instead of the net's own floats.

    Raises:
        InputError: the net cannot be traced, or has an operation that the format lacks; names it.
    """
    if _Tracer().is_leaf_module(net, ""):
        net = nn.Sequential(net)  # a layer of torch.nn by itself would be traced into
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # fx raises whatever the net's own code raises on symbolic values
        raise InputError(
            f"{type(net).__name__} cannot be traced by torch.fx: {error}. Its forward must not branch on the values or the "
            "shape of its input."
        ) from error
    module = fx.GraphModule(net, graph)
    with torch.no_grad():
        _Shapes(module).run(example)
    return _walk(module, tuple(example.shape[1:]), Writer(product, image))


class _Shapes(fx.Interpreter):
    """Note every node's shape."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


def _walk(module: fx.GraphModule, input_shape: Shape, writer: Writer) -> Graph:
    env: dict[fx.Node, Value] = {}
    output = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if env:
                raise InputError(f"the net takes a second input, {node.target!r}; expected one that takes one tensor")
            kind = Float if writer.image is None else Image
            env[node] = kind("input", node.meta["shape"])
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise InputError("the net gives several values; expected one that gives one tensor of logits")
            output = writer.floated(env[node.args[0]])
        elif node.op == "get_attr":
            raise InputError(f"{node.target} is a parameter outside any layer; put it into a module of torch.nn")
        else:
            if node.op == "call_module":
                value = layer(writer, node, str(node.target), module.get_submodule(str(node.target)), env[node.args[0]])
            else:
                value = lower_call(writer, node, [env[a] for a in nodes_in(node.args)])
            if isinstance(value, Counts | Normed) and len(node.users) != 1:
                value = writer.floated(value)
            env[node] = value
    if output is None:
        raise InputError("the net gives nothing")
    steps = _merged_packs(writer.steps)
    rows = tuple(_sized(row, steps, writer.tensors) for row in writer.rows.values())
    return Graph(input_shape, tuple(steps), writer.tensors, output.name, rows, writer.image is not None).check()


def _sized(row: dict[str, Any], steps: list[Step], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return a row of the report with the bytes that the layer's weights take."""
    weights = {step.tensors["weight"] for step in steps if step.layer == row["layer"] and "weight" in step.tensors}
    return row | {"packed_bytes": sum(tensors[name].nbytes for name in weights)}


def _merged_packs(steps: list[Step]) -> list[Step]:
    """Return the steps with every plain pack of a binary layer's float result made that layer's second result."""
    makers = {
        step.outputs[0]: i for i, step in enumerate(steps) if step.op.startswith("binary") and "alpha" in step.tensors
    }
    merged = list(steps)
    for step in steps:
        i = makers.get(step.inputs[0], -1) if step.op == "pack" and "alpha" not in step.tensors else -1
        if i >= 0 and len(merged[i].outputs) == 1:
            merged[i] = replace(merged[i], outputs=(*merged[i].outputs, step.outputs[0]))
            merged[merged.index(step)] = replace(step, op="")
    return [step for step in merged if step.op]
