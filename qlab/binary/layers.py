"""Modules of a net as steps: what each kind of layer becomes, given what its input is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.binary.fold import Affine, fold_batch_norm
from qlab.binary.images import image_weight
from qlab.binary.kernels import reference
from qlab.binary.weights import SignWeight, sign_weight
from qlab.binary.writer import Bits, Counts, Float, Image, Link, Normed, Shape, Value, Writer
from qlab.errors import InputError
from qlab.quantizers import Quantizer, Uniform, hard_sign

__all__ = ["average_pool", "flattened", "layer", "max_pool", "nonlinearity"]


def layer(writer: Writer, node: fx.Node, layer: str, module: nn.Module, value: Value) -> Value:
    """Return the value of a module."""
    shape = node.meta["shape"]
    if isinstance(module, Quantizer):
        return quantizer(writer, layer, module, value)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return weighted(writer, shape, layer, module, value)
    if isinstance(module, _BatchNorm):
        return batch_norm(writer, node, layer, module, value)
    if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.AlphaDropout):
        return value
    if isinstance(module, nn.MaxPool2d):
        return max_pool(writer, node, layer, module, value)
    if isinstance(module, nn.Flatten):
        return flattened(writer, shape, layer, value, module.start_dim, module.end_dim)
    if type(module) in _MONOTONE:
        return nonlinearity(writer, layer, module, value)
    if isinstance(module, nn.AvgPool2d):
        return average_pool(writer, node, layer, module, value)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return writer.plain(shape, "adaptive_avg_pool2d", [value], layer, size=list(shape[2:]))
    raise InputError(
        f"{layer} is a {type(module).__name__}, which the packed format does not know; it knows Linear, Conv2d, batch "
        "norm, pooling, elementwise nonlinearities, quantizers, addition and reshaping"
    )


def quantizer(writer: Writer, layer: str, module: Quantizer, value: Value) -> Value:
    """Return the value of an activation quantizer: bits for a sign."""
    if not _is_sign(module):
        if type(module) is Uniform:
            step = module._step(torch.float32)
            return writer.plain(
                writer.shape_of(value), "uniform", [value], layer, {"step": step}, low=module.low, high=module.high
            )
        raise InputError(f"{layer} is a {type(module).__name__} quantizer; the packed format knows sign and uniform")
    if len(writer.shape_of(value)) not in (2, 4):
        raise InputError(
            f"{layer}: the sign of a value of shape {writer.shape_of(value)} has no packed form; expected (N, D) or (N, C, H, W)"
        )
    if isinstance(value, Bits):
        return value
    if isinstance(value, Counts):
        bits = writer.threshold(value)
        if bits is not None:
            return bits
        writer.note(
            value.layer, reason=f"what stands between it and {layer} is not monotone: its sum is written as float"
        )
    if isinstance(value, Normed):
        affine = value.affine
        tensors = {"alpha": affine.alpha, "beta": affine.beta}
        return Bits(writer.emit("pack", [value.value.name], layer, tensors, fused=affine.fused), value.value.shape)
    value = writer.floated(value)
    return Bits(writer.emit("pack", [value.name], layer, fused=False), value.shape)


def weighted(writer: Writer, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value) -> Value:
    """Return the value of a linear layer or convolution."""
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros" and any(_padding(module)):
        raise InputError(f"{layer}: padding mode {module.padding_mode!r} is no operation of the packed format")
    found = sign_weight(module.weight)
    report(writer, shape, layer, module, value, found)
    if not isinstance(found, SignWeight):
        return float_layer(writer, shape, layer, module, value)
    if isinstance(value, Image) and _on_planes(module, value):
        return image_layer(writer, shape, layer, module, value, found)
    if isinstance(value, Bits) and _on_bits(module, value):
        return binary_layer(writer, shape, layer, module, value, found)
    options: dict[str, Any]
    if isinstance(module, nn.Conv2d):
        words = reference.pack(found.signs, 1).transpose(0, 2, 3, 1)
        options = {"channels": module.in_channels, **_window(module)}
    else:
        words = reference.pack(found.signs)
        options = {"features": module.in_features, "product": writer.product}
    op = "sign_weight_conv2d" if isinstance(module, nn.Conv2d) else "sign_weight_linear"
    return writer.plain(
        shape, op, [value], layer, {"weight": words, "scale": found.scale, "bias": module.bias}, **options
    )


def image_layer(
    writer: Writer, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Image, weight: SignWeight
) -> Float:
    """Write a layer with sign weights on the bit planes of the raw image."""
    assert writer.image is not None
    channels = value.grid[0] if value.grid else value.shape[1]
    tensors = {
        "weight": image_weight(weight.signs, channels),
        "mean": writer.image.mean,
        "std": writer.image.std,
        "scale": weight.scale,
        "bias": module.bias,
    }
    if isinstance(module, nn.Linear):
        return Float(writer.emit("image_linear", [value.name], layer, tensors), shape)
    window = {key: entry for key, entry in _window(module).items() if key != "groups"}
    return Float(
        writer.emit("image_conv2d", [value.name], layer, tensors, kernel=list(module.kernel_size), **window), shape
    )


def float_layer(writer: Writer, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value) -> Float:
    """Write a layer in float."""
    tensors = {"weight": module.weight, "bias": module.bias}
    if isinstance(module, nn.Linear):
        return writer.plain(shape, "linear", [value], layer, tensors)
    return writer.plain(shape, "conv2d", [value], layer, tensors, **_window(module))


def binary_layer(
    writer: Writer, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Bits, weight: SignWeight
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


def batch_norm(writer: Writer, node: fx.Node, layer: str, module: _BatchNorm, value: Value) -> Value:
    """Return the value of a batch norm."""
    if not module.track_running_stats or module.running_mean is None:
        raise InputError(f"{layer} has no running statistics: a net that is shipped needs them")
    affine = fold_batch_norm(module)
    shape = node.meta["shape"]

    def write(writer: Writer, v: Float) -> Float:
        tensors = {
            "mean": module.running_mean,
            "var": module.running_var,
            "weight": module.weight,
            "bias": module.bias,
        }
        return writer.plain(shape, "batch_norm", [v], layer, tensors, eps=float(module.eps))

    if isinstance(value, Counts):
        value.chain.append(Link(_on_cpu(module), layer, affine, write))
        return value
    value = writer.floated(value)
    return write(writer, value) if affine is None else Normed(value, affine, write)


def nonlinearity(writer: Writer, layer: str, module: nn.Module, value: Value) -> Value:
    """Return the value of an elementwise nonlinearity."""
    op, options, tensors = _MONOTONE[type(module)](module)

    def write(writer: Writer, v: Float) -> Float:
        return writer.plain(v.shape, op, [v], layer, tensors, **options)

    if isinstance(value, Counts):
        value.chain.append(Link(_on_cpu(module), layer, None, write))
        return value
    return write(writer, writer.floated(value))


def max_pool(writer: Writer, node: fx.Node, layer: str, module: nn.MaxPool2d, value: Value) -> Value:
    """Return the value of a max-pool: on bits, before a threshold, or in float."""
    shape = node.meta["shape"]
    pool = {
        "kernel": _pair(module.kernel_size),
        "stride": _pair(module.stride),
        "padding": _pair(module.padding),
    }
    dilation, ceil = _pair(module.dilation), bool(module.ceil_mode)
    before = writer.shape_of(value)
    floor = [
        reference.output_size(before[2 + i], pool["kernel"][i], pool["stride"][i], pool["padding"][i]) for i in (0, 1)
    ]
    packed = dilation == [1, 1] and list(shape[2:]) == floor
    if packed and isinstance(value, Bits) and value.grid is None:
        return Bits(writer.emit("max_pool_bits", [value.name], layer, None, **pool), shape)
    # The layer's own scale and bias never decrease, so they commute with the maximum.
    if packed and isinstance(value, Counts) and value.pool is None and all(link.write is None for link in value.chain):
        return Counts(value.layer, value.step, shape, value.k, pool, value.chain)
    if packed and isinstance(value, Counts) and feeds_sign(node):
        bits = writer.threshold(value)
        if bits is not None:  # sign never decreases either: sign then maximum is maximum then sign
            return Bits(writer.emit("max_pool_bits", [bits.name], layer, None, **pool), shape)
    return writer.plain(shape, "max_pool2d", [value], layer, dilation=dilation, ceil=ceil, **pool)


def feeds_sign(node: fx.Node) -> bool:
    """Return whether every user of a node is a sign."""
    net = node.graph.owning_module
    assert net is not None
    return all(user.op == "call_module" and _is_sign(net.get_submodule(str(user.target))) for user in node.users)


def average_pool(writer: Writer, node: fx.Node, layer: str, module: nn.AvgPool2d, value: Value) -> Float:
    """Return the value of an average pool."""
    if module.divisor_override is not None:
        raise InputError(f"{layer}: average pooling with a divisor of its own is no operation of the packed format")
    window = {"kernel": _pair(module.kernel_size), "stride": _pair(module.stride), "padding": _pair(module.padding)}
    rest = {"ceil": module.ceil_mode, "count_padding": module.count_include_pad}
    return writer.plain(node.meta["shape"], "avg_pool2d", [value], layer, **window, **rest)


def flattened(writer: Writer, shape: Shape, layer: str, value: Value, start: int, end: int) -> Value:
    """Return a value of one dimension per example."""
    before = writer.shape_of(value)
    whole = start == 1 and end % len(before) == len(before) - 1
    if whole and len(before) == 2:
        return value
    if whole and isinstance(value, Image) and len(before) == 4:
        return Image(value.name, shape, before[1:])
    if whole and isinstance(value, Bits) and len(before) == 4:
        return Bits(writer.emit("flatten_bits", [value.name], layer), shape, before[1:], value)
    return writer.plain(shape, "flatten", [value], layer, start=start, end=end)


def report(
    writer: Writer, shape: Shape, layer: str, module: nn.Conv2d | nn.Linear, value: Value, found: SignWeight | str
) -> None:
    """Write a layer's row of the report."""
    macs = prod(shape[1:]) * prod(module.weight.shape[1:])
    binary = isinstance(found, SignWeight) and _on_bits(module, value)
    planes = isinstance(found, SignWeight) and _on_planes(module, value)
    if isinstance(found, SignWeight):
        runs = "bits" if binary else "bit planes" if planes else "sign weights"
        why = "its input has more dimensions than (N, D)" if isinstance(value, Bits) else "its input is float"
        reason = "" if binary or planes else f"{why}, so its signs weigh floats"
    else:
        runs, reason = "float", found
    writer.rows[layer] = {
        "layer": layer,
        "kind": type(module).__name__,
        "runs": runs,
        "weight_bits": 1 if isinstance(found, SignWeight) else 32,
        "input_bits": 1 if isinstance(value, Bits) else 8 if planes else 32,
        "output": list(shape[1:]),
        "float_bytes": 4 * module.weight.numel(),
        "binary_macs": macs if binary else 8 * macs if planes else 0,  # a plane is a binary product
        "float_macs": 0 if binary or planes else macs,
        "ties": 0,
        "reason": reason,
    }


def _on_bits(module: nn.Module, value: Value) -> bool:
    """Return whether a layer that reads a value runs on bits: pictures are packed along channels, which no Linear sums over."""
    return isinstance(value, Bits) and (isinstance(module, nn.Conv2d) or len(value.shape) == 2)


def _on_planes(module: nn.Module, value: Value) -> bool:
    """Return whether a layer that reads a value runs on the bit planes of the raw image."""
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1
    return isinstance(value, Image) and not grouped and (isinstance(module, nn.Conv2d) or value.grid is not None)


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
    x = torch.tensor([[-2.0, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 2.0]])  # a sample: some take its mean
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
