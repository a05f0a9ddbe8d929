"""Each step of a packed graph as nodes of ONNX; `qlab.binary.onnx` says how signs and roundings are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlab.binary.fold import Affine, fold_batch_norm
from qlab.binary.graph import Graph, Step
from qlab.binary.kernels import reference
from qlab.binary.shapes import Shape, infer
from qlab.errors import QlabError

__all__ = ["FLOAT", "WRITERS", "Builder", "onnx_package", "pool_pads"]

FLOAT, DOUBLE = 1, 11  # ONNX's numbers of the types
LAST = np.iinfo(np.int64).max


def onnx_package() -> Any:
    """Return the package onnx.

    Raises:
        QlabError: it is not installed.
    """
    try:
        import onnx
        import onnx.checker
    except ImportError as error:
        raise QlabError("ONNX needs the package onnx, which is not installed: pip install 'qlab[onnx]'") from error
    return onnx


class Builder:
    """The nodes of a graph, step by step."""

    def __init__(self, graph: Graph) -> None:
        onnx = onnx_package()
        self.make_node, self.from_array = onnx.helper.make_node, onnx.numpy_helper.from_array
        self.graph = graph
        self.shapes = infer(graph)
        self.names = {"input": "input"}  # of the graph's values in the model
        self.pixels: dict[str, int] = {}  # of flattened pictures: the channels of a pixel
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.layer = ""

    def write(self, step: Step) -> None:
        """Add the nodes of a step."""
        self.layer = step.layer or step.op
        results = WRITERS[step.op](self, step, *(self.names[name] for name in step.inputs))
        self.names.update(zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=True))

    def node(self, op: str, *inputs: str, result: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its value."""
        result = result or f"{self.layer}.{len(self.nodes)}"
        self.nodes.append(self.make_node(op, list(inputs), [result], **attributes))
        return result

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return the name of a constant."""
        name = f"{self.layer}.constant{len(self.constants)}"
        self.constants.append(self.from_array(np.array(value, dtype, order="C"), name))
        return name

    def tensor(self, step: Step, role: str) -> str:
        """Return the name of one of the step's own float tensors, "" where it has none of that role."""
        return self.constant(self.graph.tensors[step.tensors[role]]) if role in step.tensors else ""

    def per_channel(self, value: Any, step: Step, dtype: Any = np.float32) -> str:
        """Return a constant (C,) that broadcasts against the step's first result."""
        dims = len(self.shapes[step.outputs[0]]) - 2
        return self.constant(np.reshape(value, (-1, *(1 for _ in range(dims)))), dtype)

    def signs(self, step: Step, role: str, length: int) -> NDArray[np.float32]:
        """Return the step's words as +-1 (..., length)."""
        return reference.unpack(self.graph.tensors[step.tensors[role]], length).astype(np.float32)

    def affine(self, step: Step, z: str, affine: Affine) -> str:
        """Return z alpha + beta; see the module docstring."""
        dtype = np.float64 if affine.fused else np.float32
        z = self.node("Cast", z, to=DOUBLE) if affine.fused else z
        z = self.node("Mul", z, self.per_channel(affine.alpha, step, dtype))
        z = self.node("Add", z, self.per_channel(affine.beta, step, dtype))
        return self.node("Cast", z, to=FLOAT) if affine.fused else z

    def own_affine(self, step: Step, z: str) -> str:
        """Return the step's alpha z + beta, z itself where it has none."""
        if "alpha" not in step.tensors:
            return z
        alpha, beta = (self.graph.tensors[step.tensors[role]] for role in ("alpha", "beta"))
        return self.affine(step, z, Affine(alpha, beta, step.options["fused"]))

    def choose(self, condition: str, yes: float, no: float) -> str:
        """Return one number where a condition holds, else the other."""
        return self.node("Where", condition, self.constant(yes), self.constant(no))

    def sign(self, x: str) -> str:
        """Return +1 where x >= 0, else -1."""
        return self.choose(self.node("GreaterOrEqual", x, self.constant(0)), 1, -1)


# ---- steps on bits --------------------------------------------------------------------------------------------------


def _pack(b: Builder, step: Step, x: str) -> str:
    return b.sign(b.own_affine(step, x))


def _epilogue(b: Builder, step: Step, z: str, *residual: str) -> Any:
    if "threshold" in step.tensors:
        threshold = b.graph.tensors[step.tensors["threshold"]]
        below = b.node("Less", z, b.per_channel(threshold, step))
        flipped = b.signs(step, "flip", len(threshold)) < 0
        return b.choose(b.node("Xor", below, b.per_channel(flipped, step, np.bool_)), -1, 1)
    y = b.own_affine(step, z)
    y = b.node("Add", y, *residual) if residual else y
    return y if len(step.outputs) == 1 else (y, b.sign(y))


def _sign_weights(b: Builder, step: Step) -> NDArray[np.float32]:
    """Return the weights (O, C / groups, kh, kw) of a convolution."""
    return b.signs(step, "weight", step.options["channels"] // step.options["groups"]).transpose(0, 3, 1, 2)


def _window(step: Step, padding: Sequence[int]) -> dict[str, Any]:
    o = step.options
    return {"strides": o["stride"], "pads": [*padding, *padding], "dilations": o["dilation"], "group": o["groups"]}


def _binary_conv2d(b: Builder, step: Step, x: str, *residual: str) -> Any:
    padding = step.options["padding"]
    if step.options["pad"] == "one":
        x = b.node("Pad", x, b.constant([0, 0, *padding, 0, 0, *padding], np.int64), b.constant(1))
        padding = [0, 0]
    z = b.node("Conv", x, b.constant(_sign_weights(b, step)), **_window(step, padding))
    return _epilogue(b, step, z, *residual)


def _binary_linear(b: Builder, step: Step, x: str, *residual: str) -> Any:
    words = b.graph.tensors[step.tensors["weight"]]
    pixel = b.pixels.get(step.inputs[0], step.options["features"])
    each = reference.unpack(words.reshape(len(words), -1, reference.words_for(pixel)), pixel)
    z = b.node("MatMul", x, b.constant(each.reshape(len(words), -1).T))
    return _epilogue(b, step, z, *residual)


def _max_pool_bits(b: Builder, step: Step, x: str) -> str:
    y = _max_pool2d(b, step, x)
    if "flip" not in step.tensors:
        return y
    return b.node("Mul", y, b.per_channel(b.signs(step, "flip", b.shapes[step.inputs[0]][1]), step))


def _flatten_bits(b: Builder, step: Step, x: str) -> str:
    _, channels, height, width = b.shapes[step.inputs[0]]
    b.pixels[step.outputs[0]] = channels
    b.shapes[step.outputs[0]] = (1, height * width * channels)
    return b.node("Flatten", b.node("Transpose", x, perm=[0, 2, 3, 1]), axis=1)


def _sign_weight_conv2d(b: Builder, step: Step, x: str) -> str:
    weight = _sign_weights(b, step)
    if "scale" in step.tensors:
        weight = weight * b.graph.tensors[step.tensors["scale"]].reshape(-1, 1, 1, 1)
    return b.node("Conv", x, b.constant(weight), b.tensor(step, "bias"), **_window(step, step.options["padding"]))


def _sign_weight_linear(b: Builder, step: Step, x: str) -> str:
    weight = b.signs(step, "weight", step.options["features"]).T
    scaled, early = "scale" in step.tensors, step.options["product"] == "unpack"
    if scaled and early:
        weight = weight * b.graph.tensors[step.tensors["scale"]]
    y = b.node("MatMul", x, b.constant(weight))
    y = b.node("Mul", y, b.tensor(step, "scale")) if scaled and not early else y
    return b.node("Add", y, b.tensor(step, "bias")) if "bias" in step.tensors else y


# ---- float steps ----------------------------------------------------------------------------------------------------


def _linear(b: Builder, step: Step, x: str) -> str:
    y = b.node("MatMul", x, b.constant(b.graph.tensors[step.tensors["weight"]].T))
    return b.node("Add", y, b.tensor(step, "bias")) if "bias" in step.tensors else y


def _conv2d(b: Builder, step: Step, x: str) -> str:
    return b.node("Conv", x, b.tensor(step, "weight"), b.tensor(step, "bias"), **_window(step, step.options["padding"]))


def _batch_norm(b: Builder, step: Step, x: str) -> str:
    """Return batch norm as this machine's torch rounds it, if that is known."""
    tensors = {role: torch.from_numpy(b.graph.tensors[name]) for role, name in step.tensors.items()}
    norm = nn.BatchNorm1d(len(tensors["mean"]), eps=step.options["eps"]).eval()
    norm.running_mean, norm.running_var = tensors["mean"], tensors["var"]
    with torch.no_grad():
        for own, role in ((norm.weight, "weight"), (norm.bias, "bias")):
            own.copy_(tensors.get(role, own))
    affine = fold_batch_norm(norm)
    if affine is not None:
        return b.affine(step, x, affine)
    values = [b.constant(t.detach().numpy()) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    return b.node("BatchNormalization", x, *values, epsilon=step.options["eps"])


def _clip(b: Builder, x: str, low: float, high: float) -> str:
    return b.node("Clip", x, b.constant(low), b.constant(high))


def _uniform(b: Builder, step: Step, x: str) -> str:
    size = b.tensor(step, "step")
    codes = _clip(b, b.node("Div", x, size), step.options["low"], step.options["high"])
    return b.node("Mul", b.node("Round", codes), size)


def pool_pads(step: Step, shapes: Mapping[str, Shape]) -> tuple[list[int], list[int]]:
    """Return a pooling's padding before and after, so that rounding down gives the size that the step has."""
    o, taken, given = step.options, shapes[step.inputs[0]][2:], shapes[step.outputs[0]][2:]
    dilation, after = o.get("dilation", [1, 1]), []
    for i in (0, 1):
        reach = (given[i] - 1) * o["stride"][i] + dilation[i] * (o["kernel"][i] - 1) + 1
        after.append(max(o["padding"][i], reach - taken[i] - o["padding"][i]))
    return list(o["padding"]), after


def _pool(b: Builder, step: Step) -> dict[str, Any]:
    before, after = pool_pads(step, b.shapes)
    return {"kernel_shape": step.options["kernel"], "strides": step.options["stride"], "pads": [*before, *after]}


def _max_pool2d(b: Builder, step: Step, x: str) -> str:
    return b.node("MaxPool", x, dilations=step.options.get("dilation", [1, 1]), **_pool(b, step))


def _avg_pool2d(b: Builder, step: Step, x: str) -> str:
    counted = step.options["count_padding"] and any(step.options["padding"])
    return b.node("AveragePool", x, count_include_pad=int(counted), **_pool(b, step))


def _adaptive_avg_pool2d(b: Builder, step: Step, x: str) -> str:
    size = [n // m for n, m in zip(b.shapes[step.inputs[0]][2:], step.options["size"], strict=True)]
    return b.node("AveragePool", x, kernel_shape=size, strides=size)


def _reshape(b: Builder, step: Step, x: str) -> str:
    return b.node("Reshape", x, b.constant([-1, *b.shapes[step.outputs[0]][1:]], np.int64))


def _mean(b: Builder, step: Step, x: str) -> str:
    return b.node("ReduceMean", x, b.constant(step.options["dims"], np.int64), keepdims=int(step.options["keepdim"]))


def _pad(b: Builder, step: Step, x: str) -> str:
    pads, dims = step.options["pads"], len(b.shapes[step.inputs[0]])
    pads = [*pads, *(0 for _ in range(2 * dims - len(pads)))]  # torch: pairs, last dimension first
    both = [*pads[-2::-2], *pads[::-2]]
    return b.node("Pad", x, b.constant(both, np.int64), b.constant(step.options["value"]))


def _slice(b: Builder, step: Step, x: str) -> str:
    slices = step.options["slices"]
    starts, ends, steps = ([s[i] for s in slices] for i in range(3))
    bounds = [
        [0 if n is None else n for n in starts],
        [LAST if n is None else n for n in ends],
        list(range(len(slices))),
        [1 if n is None else n for n in steps],
    ]
    return b.node("Slice", x, *(b.constant(n, np.int64) for n in bounds))


def _prelu(b: Builder, step: Step, x: str) -> str:
    return b.node("PRelu", x, b.per_channel(b.graph.tensors[step.tensors["weight"]], step))


Writer = Callable[..., "str | tuple[str, ...]"]


def _plain(op: str, **options: str) -> Writer:
    """Return the writer of an operation that ONNX has under a name of its own; options by their names there and here."""

    def write(b: Builder, step: Step, *x: str) -> str:
        return b.node(op, *x, **{there: step.options[here] for there, here in options.items()})

    return write


WRITERS: dict[str, Writer] = {
    "pack": _pack,
    "unpack": lambda b, step, x: x,
    "binary_conv2d": _binary_conv2d,
    "binary_linear": _binary_linear,
    "max_pool_bits": _max_pool_bits,
    "flatten_bits": _flatten_bits,
    "sign_weight_conv2d": _sign_weight_conv2d,
    "sign_weight_linear": _sign_weight_linear,
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "relu": _plain("Relu"),
    "relu6": lambda b, step, x: _clip(b, x, 0, 6),
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "silu": lambda b, step, x: b.node("Mul", x, b.node("Sigmoid", x)),
    "gelu": _plain("Gelu", approximate="approximate"),
    "elu": _plain("Elu", alpha="alpha"),
    "leaky_relu": _plain("LeakyRelu", alpha="slope"),
    "hardtanh": lambda b, step, x: _clip(b, x, step.options["low"], step.options["high"]),
    "uniform": _uniform,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean,
    "flatten": _reshape,
    "reshape": _reshape,
    "pad": _pad,
    "slice": _slice,
    "add": _plain("Add"),
    "sub": _plain("Sub"),
    "mul": _plain("Mul"),
    "add_number": lambda b, step, x: b.node("Add", x, b.constant(step.options["number"])),
    "mul_number": lambda b, step, x: b.node("Mul", x, b.constant(step.options["number"])),
    "cat": _plain("Concat", axis="dim"),
}
