"""Function and method calls of a traced net: additions, reshapes, functional nonlinearities."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qlab.binary.layers import average_pool, flattened, max_pool, nonlinearity
from qlab.binary.writer import Value, Writer
from qlab.errors import InputError

__all__ = ["lower_call", "nodes_in"]

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SUB = {operator.sub, operator.isub, torch.sub, "sub"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul"}
_SHAPES = {"size", "dim", getattr}
_FLATTEN = {torch.flatten, "flatten"}
_RESHAPE = {"view", "reshape", torch.reshape}
_SAME = {"contiguous", "clone", "detach", "float", F.dropout}
_NONLINEARITIES: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: lambda: nn.ReLU(),
    "relu": lambda: nn.ReLU(),
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    torch.tanh: lambda: nn.Tanh(),
    F.tanh: lambda: nn.Tanh(),
    "tanh": lambda: nn.Tanh(),
    torch.sigmoid: lambda: nn.Sigmoid(),
    "sigmoid": lambda: nn.Sigmoid(),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
}


def lower_call(writer: Writer, node: fx.Node, values: list[Value]) -> Value:
    """Return the value of a `call_function` or `call_method` node, given those of its arguments.

    Raises:
        InputError: for a call that the packed format does not know.
    """
    target, shape = node.target, node.meta["shape"]
    name = node.name
    if target in _SHAPES or (shape is None and (target is operator.getitem or target is operator.mul)):
        return None  # a shape; what uses it is recognised by the shape it gives
    if target in _ADD or target in _SUB or target in _MUL:
        return _arithmetic(writer, node, target, values)
    if target in _SAME:
        return values[0]
    if target in _NONLINEARITIES:
        options = dict(node.kwargs)
        module = _NONLINEARITIES[target](*(a for a in node.args[1:]), **options)
        return nonlinearity(writer, name, module, values[0])
    if target in _FLATTEN:
        start = int(_argument(node, 1, "start_dim", 0))
        return flattened(writer, shape, name, values[0], start, int(_argument(node, 2, "end_dim", -1)))
    if target in _RESHAPE:
        return _reshape(writer, node, values[0])
    if target in (torch.mean, "mean"):
        dims = _argument(node, 1, "dim", list(range(len(writer.shape_of(values[0])))))
        keepdim = bool(_argument(node, 2, "keepdim", False))
        return writer.plain(shape, "mean", values[:1], name, dims=_list(dims), keepdim=keepdim)
    if target in (F.adaptive_avg_pool2d,):
        return writer.plain(shape, "adaptive_avg_pool2d", values[:1], name, size=list(shape[2:]))
    if target in (F.max_pool2d, torch.max_pool2d):
        module = nn.MaxPool2d(*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "return_indices"})  # type: ignore[arg-type]
        return max_pool(writer, node, name, module, values[0])
    if target is F.avg_pool2d:
        return average_pool(writer, node, name, nn.AvgPool2d(*node.args[1:], **node.kwargs), values[0])  # type: ignore[arg-type]
    if target is F.pad:
        if _argument(node, 2, "mode", "constant") != "constant":
            raise InputError(f"{name}: only padding with a constant is an operation of the packed format")
        value = _argument(node, 3, "value", None)
        pads = _list(_argument(node, 1, "pad", []))
        return writer.plain(shape, "pad", values[:1], name, pads=pads, value=float(value or 0))
    if target is operator.getitem:
        return writer.plain(shape, "slice", values[:1], name, slices=_slices(name, node.args[1]))
    if target in (torch.cat, torch.concat):
        return writer.plain(shape, "cat", values, name, dim=int(_argument(node, 1, "dim", 0)))
    inside = next(reversed(node.meta.get("nn_module_stack") or {}), "")
    where = f"{name} in {inside}" if inside else name
    raise InputError(
        f"{where} calls {getattr(target, '__name__', target)!r}, which the packed format does not know; use a module of "
        "torch.nn, addition, reshaping, padding, slicing or a mean"
    )


def _arithmetic(writer: Writer, node: fx.Node, target: Any, values: list[Value]) -> Value:
    shape, name = node.meta["shape"], node.name
    op = "add" if target in _ADD else "sub" if target in _SUB else "mul"
    if node.kwargs.get("alpha", 1) != 1:
        raise InputError(f"{name}: addition with alpha is no operation of the packed format")
    if len(values) == 1:
        number = next(float(a) for a in node.args if isinstance(a, int | float))
        if op == "sub" and isinstance(node.args[0], fx.Node):
            number = -number
        elif op == "sub":
            raise InputError(f"{name}: a number minus a tensor is no operation of the packed format; write -x + number")
        return writer.plain(shape, "mul_number" if op == "mul" else "add_number", values, name, number=number)
    if op == "add":
        return writer.added(shape, name, values[0], values[1])
    return writer.plain(shape, op, values, name)


def _reshape(writer: Writer, node: fx.Node, value: Value) -> Value:
    """Return a reshape: of whole examples to vectors, which is a flattening, or to sizes that are all given but one."""
    before, shape = writer.shape_of(value), node.meta["shape"]
    if len(shape) == 2 and shape[0] == before[0]:
        return flattened(writer, shape, node.name, value, 1, -1)
    if shape[0] != before[0]:
        raise InputError(f"{node.name} mixes the examples of a batch, which a packed net does not")
    return writer.plain(shape, "reshape", [value], node.name, shape=[-1, *shape[1:]])


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Return the nodes among a call's arguments, in order and as often as they stand there."""
    if isinstance(arguments, tuple | list):
        return [node for argument in arguments for node in nodes_in(argument)]
    return [arguments] if isinstance(arguments, fx.Node) else []


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _list(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)]


def _slices(name: str, index: Any) -> list[list[int | None]]:
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(s, slice) for s in index):
        raise InputError(f"{name}: only slices index a value in the packed format, not {index!r}")
    return [[s.start, s.stop, s.step] for s in index]
