"""From a deployed net to the steps of a packed one.

The net is traced (torch.fx) and walked once, node by node. A node's value is one of

    Float   a float tensor that a step has given
    Bits    packed signs that a step has given
    Counts  a binary layer whose integers are not written yet, with the per-channel functions that follow it
    Normed  a batch norm of a float that is not written yet

The last two wait for what comes next: a sign makes them one comparison (`fold`), an addition takes a batch norm along, anything
else writes them out. What cannot run on bits stays the operation of the original net, with the reason in its row of the
report; what is no operation of the format raises an error that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.binary.calls import lower_call
from qlab.binary.fold import Affine, fold_batch_norm, fold_sign
from qlab.binary.graph import Graph, Step
from qlab.binary.kernels import reference
from qlab.binary.weights import SignWeight, sign_weight
from qlab.errors import InputError
from qlab.quantizers import Quantizer, Uniform, hard_sign

__all__ = ["lower"]

Shape = tuple[int, ...]


@dataclass
class Float:
    """A float value of a step."""

    name: str
    shape: Shape


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
    write: Callable[[Lowering, Float], Float] | None = None


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
    write: Callable[[Lowering, Float], Float]


Value = Float | Bits | Counts | Normed | None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Quantizer) or super().is_leaf_module(m, module_qualified_name)


def lower(net: nn.Module, example: Tensor, product: str) -> Graph:
    """Return the packed graph of a deployed net.

    Args:
        net: in eval mode, with plain weights.
        example: one batch of inputs.
        product: how layers with sign weights and float inputs multiply; see `qlab.binary.compile`.

    Raises:
        InputError: the net cannot be traced, or has an operation that the format lacks; names it.
    """
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
    return Lowering(module, tuple(example.shape[1:]), product).run()


class _Shapes(fx.Interpreter):
    """Note every node's shape."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


class Lowering:
    """One walk over a traced net; see the module docstring."""

    def __init__(self, module: fx.GraphModule, input_shape: Shape, product: str) -> None:
        self.module = module
        self.input_shape = input_shape
        self.product = product
        self.steps: list[Step] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.env: dict[fx.Node, Value] = {}
        self.count = 0

    def run(self) -> Graph:
        """Walk the net and return its graph."""
        output = None
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                if self.env:
                    raise InputError(
                        f"the net takes a second input, {node.target!r}; expected one that takes one tensor"
                    )
                self.env[node] = Float("input", node.meta["shape"])
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise InputError("the net gives several values; expected one that gives one tensor of logits")
                output = self.floated(self.env[node.args[0]])
            else:
                value = self.lowered(node)
                if isinstance(value, Counts | Normed) and len(node.users) != 1:
                    value = self.floated(value)
                self.env[node] = value
        if output is None:
            raise InputError("the net gives nothing")
        steps = _merged_packs(self.steps)
        return Graph(self.input_shape, tuple(steps), self.tensors, output.name, tuple(self.rows.values())).check()

    # ---- steps ------------------------------------------------------------------------------------------------------

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
        self.count += 1
        name = f"v{self.count}"
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
        if counts.pool is None and chain and chain[0].affine is not None:
            affine = chain.pop(0).affine
            assert affine is not None
            epilogue, fused = {"alpha": affine.alpha, "beta": affine.beta}, affine.fused
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
            if link.write is None:
                raise InputError(
                    f"{link.layer} cannot be written on its own"
                )  # only the layer's own scale, always first
            value = link.write(self, value)
        return value

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def lowered(self, node: fx.Node) -> Value:
        """Return the value of a node."""
        if node.op == "get_attr":
            raise InputError(f"{node.target} is a parameter outside any layer; put it into a module of torch.nn")
        if node.op == "call_module":
            layer = str(node.target)
            module = self.module.get_submodule(layer)
            value = self.env[node.args[0]]  # type: ignore[index]
            return self.layer(node, layer, module, value)
        return lower_call(self, node)

    def layer(self, node: fx.Node, layer: str, module: nn.Module, value: Value) -> Value:
        """Return the value of a module."""
        shape = node.meta["shape"]
        if isinstance(module, Quantizer):
            return self.quantizer(layer, module, value)
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self.weighted(shape, layer, module, value)
        if isinstance(module, _BatchNorm):
            return self.batch_norm(node, layer, module, value)
        if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.AlphaDropout):
            return value
        if isinstance(module, nn.MaxPool2d):
            return self.max_pool(node, layer, module, value)
        if isinstance(module, nn.Flatten):
            return self.flattened(shape, layer, value, module.start_dim, module.end_dim)
        if type(module) in _MONOTONE:
            return self.nonlinearity(layer, module, value)
        if isinstance(module, nn.AvgPool2d):
            if module.divisor_override is not None:
                raise InputError(
                    f"{layer}: average pooling with a divisor of its own is no operation of the packed format"
                )
            return self.plain(
                shape,
                "avg_pool2d",
                [value],
                layer,
                kernel=_pair(module.kernel_size),
                stride=_pair(module.stride),
                padding=_pair(module.padding),
                ceil=module.ceil_mode,
                count_padding=module.count_include_pad,
            )
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return self.plain(shape, "adaptive_avg_pool2d", [value], layer, size=list(shape[2:]))
        raise InputError(
            f"{layer} is a {type(module).__name__}, which the packed format does not know; it knows Linear, Conv2d, batch "
            "norm, pooling, elementwise nonlinearities, quantizers, addition and reshaping"
        )

    def quantizer(self, layer: str, module: Quantizer, value: Value) -> Value:
        """Return the value of an activation quantizer: bits for a sign."""
        if not _is_sign(module):
            if type(module) is Uniform:
                step = module._step(torch.float32)
                return self.plain(
                    self.shape_of(value), "uniform", [value], layer, {"step": step}, low=module.low, high=module.high
                )
            raise InputError(
                f"{layer} is a {type(module).__name__} quantizer; the packed format knows sign and uniform"
            )
        if isinstance(value, Bits):
            return value
        if isinstance(value, Counts):
            bits = self.threshold(value)
            if bits is not None:
                return bits
            self.note(
                value.layer, reason=f"what stands between it and {layer} is not monotone: its sum is written as float"
            )
        if isinstance(value, Normed):
            affine = value.affine
            tensors = {"alpha": affine.alpha, "beta": affine.beta}
            return Bits(self.emit("pack", [value.value.name], layer, tensors, fused=affine.fused), value.value.shape)
        value = self.floated(value)
        return Bits(self.emit("pack", [value.name], layer, fused=False), value.shape)

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

    def weighted(self, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value) -> Value:
        """Return the value of a linear layer or convolution."""
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros" and any(_padding(module)):
            raise InputError(f"{layer}: padding mode {module.padding_mode!r} is no operation of the packed format")
        found = sign_weight(module.weight)
        self.report(shape, layer, module, value, found)
        if not isinstance(found, SignWeight):
            return self.float_layer(shape, layer, module, value)
        if isinstance(value, Bits):
            return self.binary_layer(shape, layer, module, value, found)
        options: dict[str, Any]
        if isinstance(module, nn.Conv2d):
            words = reference.pack(found.signs, 1).transpose(0, 2, 3, 1)
            options = {"channels": module.in_channels, **_window(module)}
        else:
            words = reference.pack(found.signs)
            options = {"features": module.in_features, "product": self.product}
        op = "sign_weight_conv2d" if isinstance(module, nn.Conv2d) else "sign_weight_linear"
        return self.plain(
            shape, op, [value], layer, {"weight": words, "scale": found.scale, "bias": module.bias}, **options
        )

    def float_layer(self, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value) -> Float:
        """Write a layer in float."""
        tensors = {"weight": module.weight, "bias": module.bias}
        if isinstance(module, nn.Linear):
            return self.plain(shape, "linear", [value], layer, tensors)
        return self.plain(shape, "conv2d", [value], layer, tensors, **_window(module))

    def binary_layer(
        self, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Bits, weight: SignWeight
    ) -> Counts:
        """Return a layer that runs on bits, waiting for what follows it."""
        options: dict[str, Any]
        if isinstance(module, nn.Conv2d):
            words = reference.pack(weight.signs, 1).transpose(0, 2, 3, 1)
            options = {"channels": module.in_channels, **_window(module), "pad": "zero"}
        else:
            signs = weight.signs
            if value.grid is not None:  # flattened pixel by pixel: the weights follow
                signs = signs.reshape(len(signs), *value.grid).transpose(0, 2, 3, 1)
            words = reference.pack(signs).reshape(len(signs), -1)
            options = {"features": module.in_features}
        step = {
            "op": "binary_conv2d" if isinstance(module, nn.Conv2d) else "binary_linear",
            "inputs": [value.name],
            "tensors": {"weight": words},
            "options": options,
        }
        counts = Counts(layer, step, shape, prod(module.weight.shape[1:]))
        if weight.scale is not None or module.bias is not None:
            counts.chain.append(_own_scale(layer, weight.scale, module.bias, len(shape) == 4))
        return counts

    def batch_norm(self, node: fx.Node, layer: str, module: _BatchNorm, value: Value) -> Value:
        """Return the value of a batch norm."""
        if not module.track_running_stats or module.running_mean is None:
            raise InputError(f"{layer} has no running statistics: a net that is shipped needs them")
        affine = fold_batch_norm(module)
        shape = node.meta["shape"]

        def write(lowering: Lowering, v: Float) -> Float:
            tensors = {
                "mean": module.running_mean,
                "var": module.running_var,
                "weight": module.weight,
                "bias": module.bias,
            }
            return lowering.plain(shape, "batch_norm", [v], layer, tensors, eps=float(module.eps))

        if isinstance(value, Counts):
            value.chain.append(Link(_on_cpu(module), layer, affine, write))
            return value
        value = self.floated(value)
        return write(self, value) if affine is None else Normed(value, affine, write)

    def nonlinearity(self, layer: str, module: nn.Module, value: Value) -> Value:
        """Return the value of an elementwise nonlinearity."""
        op, options, tensors = _MONOTONE[type(module)](module)

        def write(lowering: Lowering, v: Float) -> Float:
            return lowering.plain(v.shape, op, [v], layer, tensors, **options)

        if isinstance(value, Counts):
            value.chain.append(Link(_on_cpu(module), layer, None, write))
            return value
        return write(self, self.floated(value))

    def max_pool(self, node: fx.Node, layer: str, module: nn.MaxPool2d, value: Value) -> Value:
        """Return the value of a max-pool: on bits, before a threshold, or in float."""
        shape = node.meta["shape"]
        pool = {
            "kernel": _pair(module.kernel_size),
            "stride": _pair(module.stride),
            "padding": _pair(module.padding),
        }
        dilation, ceil = _pair(module.dilation), bool(module.ceil_mode)
        before = self.shape_of(value)
        floor = [
            reference.output_size(before[2 + i], pool["kernel"][i], pool["stride"][i], pool["padding"][i])
            for i in (0, 1)
        ]
        packed = dilation == [1, 1] and list(shape[2:]) == floor
        if packed and isinstance(value, Bits) and value.grid is None:
            return Bits(self.emit("max_pool_bits", [value.name], layer, None, **pool), shape)
        # The layer's own scale and bias never decrease, so they commute with the maximum.
        if (
            packed
            and isinstance(value, Counts)
            and value.pool is None
            and all(link.write is None for link in value.chain)
        ):
            return Counts(value.layer, value.step, shape, value.k, pool, value.chain)
        if packed and isinstance(value, Counts) and self.feeds_sign(node):
            bits = self.threshold(value)
            if bits is not None:  # sign never decreases either: sign then maximum is maximum then sign
                return Bits(self.emit("max_pool_bits", [bits.name], layer, None, **pool), shape)
        return self.plain(shape, "max_pool2d", [value], layer, dilation=dilation, ceil=ceil, **pool)

    def feeds_sign(self, node: fx.Node) -> bool:
        """Return whether every user of a node is a sign."""
        return all(
            user.op == "call_module" and _is_sign(self.module.get_submodule(str(user.target))) for user in node.users
        )

    def flattened(self, shape: Shape, layer: str, value: Value, start: int, end: int) -> Value:
        """Return a value of one dimension per example."""
        before = self.shape_of(value)
        whole = start == 1 and end % len(before) == len(before) - 1
        if whole and len(before) == 2:
            return value
        if whole and isinstance(value, Bits) and len(before) == 4:
            return Bits(self.emit("flatten_bits", [value.name], layer), shape, before[1:], value)
        return self.plain(shape, "flatten", [value], layer, start=start, end=end)

    def added(self, shape: Shape, layer: str, one: Value, other: Value) -> Float:
        """Return a sum; a binary layer with batch norm that waits takes the other value along."""
        for mine, rest in ((one, other), (other, one)):
            waits = isinstance(mine, Counts) and mine is not rest and mine.pool is None and len(mine.chain) == 1
            if waits and mine.chain[0].affine and self.shape_of(rest) == shape == self.shape_of(mine):  # type: ignore[union-attr]
                return self.written(mine, residual=self.floated(rest))  # type: ignore[arg-type]
        return self.plain(shape, "add", [one, other], layer)

    # ---- the report -------------------------------------------------------------------------------------------------

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

    def report(
        self, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value, found: SignWeight | str
    ) -> None:
        """Write a layer's row of the report."""
        macs = prod(shape[1:]) * prod(module.weight.shape[1:])
        binary = isinstance(found, SignWeight) and isinstance(value, Bits)
        words = reference.words_for(module.weight.shape[1])
        packed = 8 * module.weight.shape[0] * prod(module.weight.shape[2:]) * words
        if isinstance(found, SignWeight):
            runs = "bits" if binary else "sign weights"
            reason = "" if binary else "its input is float, so its signs weigh floats"
        else:
            runs, reason, packed = "float", found, 4 * module.weight.numel()
        self.rows[layer] = {
            "layer": layer,
            "kind": type(module).__name__,
            "runs": runs,
            "weight_bits": 1 if isinstance(found, SignWeight) else 32,
            "input_bits": 1 if isinstance(value, Bits) else 32,
            "output": list(shape[1:]),
            "packed_bytes": packed,
            "float_bytes": 4 * module.weight.numel(),
            "binary_macs": macs if binary else 0,
            "float_macs": 0 if binary else macs,
            "ties": 0,
            "reason": reason,
        }


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


# ---- small things ---------------------------------------------------------------------------------------------------


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)] * 2


def _padding(module: nn.Conv2d) -> list[int]:
    if module.padding == "valid":
        return [0, 0]
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise InputError(
                "padding='same' of an even kernel pads one side more than the other, which has no packed form"
            )
        return [t // 2 for t in total]
    return _pair(module.padding)


def _window(module: nn.Conv2d) -> dict[str, Any]:
    return {
        "stride": _pair(module.stride),
        "padding": _padding(module),
        "dilation": _pair(module.dilation),
        "groups": module.groups,
    }


def _is_sign(module: nn.Module) -> bool:
    """Return whether a quantizer is the sign: its own hard map is asked at values around zero."""
    if not isinstance(module, Quantizer) or module.bits != 1:
        return False
    x = torch.tensor([-2.0, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 2.0])
    with torch.no_grad():
        return bool(torch.equal(module.hard(x), hard_sign(x)))


def _own_scale(layer: str, scale: np.ndarray | None, bias: Tensor | None, spatial: bool) -> Link:
    channels = len(scale) if scale is not None else len(bias)  # type: ignore[arg-type]
    alpha = np.ones(channels, np.float32) if scale is None else scale.astype(np.float32)
    beta = np.zeros(channels, np.float32) if bias is None else bias.detach().cpu().float().numpy()
    shape = (-1, 1, 1) if spatial else (-1,)
    a, b = (torch.from_numpy(t).view(shape) for t in (alpha, beta))
    return Link(lambda z: z * a + b, layer, Affine(alpha, beta, fused=False))


def _on_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu()


_MONOTONE: dict[type[nn.Module], Callable[[Any], tuple[str, dict[str, Any], dict[str, Any] | None]]] = {
    nn.ReLU: lambda m: ("relu", {}, None),
    nn.ReLU6: lambda m: ("relu6", {}, None),
    nn.Hardtanh: lambda m: ("hardtanh", {"low": float(m.min_val), "high": float(m.max_val)}, None),
    nn.Tanh: lambda m: ("tanh", {}, None),
    nn.Sigmoid: lambda m: ("sigmoid", {}, None),
    nn.SiLU: lambda m: ("silu", {}, None),
    nn.GELU: lambda m: ("gelu", {"approximate": m.approximate}, None),
    nn.ELU: lambda m: ("elu", {"alpha": float(m.alpha)}, None),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"slope": float(m.negative_slope)}, None),
    nn.PReLU: lambda m: ("prelu", {}, {"weight": m.weight}),
}
"""Elementwise nonlinearities; whether sign(f(z)) is one comparison is asked of f itself, so SiLU and GELU may stand here."""
