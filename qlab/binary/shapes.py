"""Shapes of a packed net: what every step gives, and whether its tensors and options fit what it takes.

Kernels index memory by the shapes of words, thresholds and weights. Whatever `infer` lets through cannot make one of them read or
write out of bounds, whoever wrote the graph. Shapes are those of the simulation: bits are (N, C, H, W) or (N, D) signs, and a
flattened picture is (N, H W 64 W(C)) slots, each pixel padded to whole words.

Float steps are run by torch itself on its meta device, which computes shapes alone; what torch would only find out with data
is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from qlab.binary.floats import FLOAT_OPS
from qlab.binary.graph import Graph, Step
from qlab.binary.kernels.reference import WORD, output_size, words_for
from qlab.errors import InputError

__all__ = ["MAX_ELEMENTS", "MAX_STEPS", "MAX_TERMS", "Shape", "infer"]

Shape = tuple[int, ...]

MAX_ELEMENTS = 2**28  # of one value of one example: 1 GiB in float32
MAX_STEPS = 2_000
MAX_TERMS = 2**24  # of a sum of signs: up to here float32 holds every partial sum, so all backends agree


@dataclass(frozen=True)
class _Value:
    shape: Shape
    pixel: int | None = None  # of a flattened picture: the channels of a pixel, which are padded to whole words


@dataclass(frozen=True)
class _Facts:
    """What a step takes: its values, its tensors by role, its options."""

    x: Sequence[_Value]
    t: Mapping[str, np.ndarray]
    o: Mapping[str, Any]

    @property
    def shape(self) -> Shape:
        return self.x[0].shape

    @property
    def channels(self) -> int:
        return self.x[0].shape[1]


def infer(graph: Graph, batch: int = 1) -> dict[str, Shape]:
    """Return the shape of every value of a graph, "input" included, by its name.

    Args:
        graph: its steps, types and names fit together, which `Graph.check` finds out before it calls this.
        batch: N.

    Raises:
        InputError: a tensor or an option does not fit the values of its step, which is named; a value of more than `MAX_ELEMENTS`
            per example; more than `MAX_STEPS` steps.
    """
    if len(graph.steps) > MAX_STEPS:
        raise InputError(f"the net has {len(graph.steps):,} steps; expected at most {MAX_STEPS:,}")
    known = {"input": _Value((batch, *graph.input_shape))}
    _check_value(known["input"].shape, batch)
    for i, step in enumerate(graph.steps):
        try:
            tensors = {role: graph.tensors[name] for role, name in step.tensors.items()}
            results = _results(step, _Facts([known[name] for name in step.inputs], tensors, step.options))
            for name, value in zip(step.outputs, results, strict=False):
                _check_value(value.shape, batch)
                known[name] = value
        # RuntimeError, IndexError and the others are torch's own, of a shape that its operation does not take.
        except (InputError, RuntimeError, IndexError, ValueError, TypeError, OverflowError) as error:
            raise InputError(f"step {i} ({step.layer or step.op!r}): {str(error).splitlines()[0]}") from error
    return {name: value.shape for name, value in known.items()}


def _results(step: Step, f: _Facts) -> list[_Value]:
    for name, option in f.o.items():
        numbers = _numbers(option)
        if any(abs(n) >= 2**31 for n in numbers if isinstance(n, int)):
            raise InputError(f"{name} is {option}; expected integers that fit into 32 bits")
    if any(value.pixel is not None for value in f.x) and step.op != "binary_linear":
        raise InputError("takes a flattened picture of bits, which only a binary_linear does")
    for role, tensor in f.t.items():
        if tensor.dtype == np.float32 and not np.isfinite(tensor).all():
            raise InputError(f"{role} holds NaN or infinity; find the layer that diverged")
    if len(step.outputs) == 2 and "alpha" not in f.t:
        raise InputError("gives bits beside floats only after batch norm (alpha and beta)")
    if step.op in BIT_RULES:
        return BIT_RULES[step.op](f)
    FLOAT_RULES.get(step.op, lambda f: None)(f)
    values = [torch.empty(value.shape, device="meta") for value in f.x]
    weights = {role: torch.empty(t.shape, device="meta") for role, t in f.t.items()}
    return [_Value(tuple(FLOAT_OPS[step.op](values, weights, f.o).shape))]


def _numbers(option: Any) -> list[Any]:
    if isinstance(option, list | tuple):
        return [n for element in option for n in _numbers(element)]
    return [option] if isinstance(option, int) else []


# ---- small checks ---------------------------------------------------------------------------------------------------


def _check_value(shape: Shape, batch: int) -> None:
    if len(shape) < 2 or shape[0] != batch or not all(n >= 1 for n in shape):
        raise InputError(f"gives a value of shape {shape}; expected (N, ...) with the N = {batch} that came in")
    if prod(shape[1:]) > MAX_ELEMENTS:
        raise InputError(f"gives {prod(shape[1:]):,} elements for an example; expected at most {MAX_ELEMENTS:,}")


def _expect(role: str, tensor: np.ndarray, shape: Shape) -> None:
    if tensor.shape != shape:
        raise InputError(f"{role} has shape {tensor.shape}; expected {shape}")


def _dims(f: _Facts, dims: int) -> None:
    if len(f.shape) != dims:
        raise InputError(f"takes a value of {dims} dimensions, but it has shape {f.shape}")


def _per_channel(f: _Facts, channels: int, *roles: str) -> None:
    for role in roles:
        if role in f.t:
            _expect(role, f.t[role], (channels,))


def _words(role: str, words: np.ndarray, length: int) -> None:
    """Check words along the last axis for `length` bits each, with none past the end."""
    _expect(role, words, (*words.shape[:-1], words_for(length)))
    if words.size and length % WORD:
        used = np.bitwise_or.reduce(words[..., -1], axis=None)
        if int(used) >> (length % WORD):
            raise InputError(f"{role} has bits set past its {length} values; expected zeros there")


def _window(f: _Facts, kernel: Sequence[int], pool: bool = False) -> tuple[int, int]:
    """Check a window over (N, C, H, W) and return its numbers of positions, rounded down."""
    _dims(f, 4)
    pairs = {"kernel": kernel, **{name: f.o[name] for name in ("stride", "padding", "dilation") if name in f.o}}
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise InputError(f"{name} is {list(pair)}; expected two integers of at least {least}")
    padding, dilation = pairs["padding"], pairs.get("dilation", (1, 1))
    if pool and any(2 * p > d * (k - 1) + 1 for p, k, d in zip(padding, kernel, dilation, strict=True)):
        raise InputError(f"padding is {list(padding)}; expected at most half of the kernel {list(kernel)}")
    sides = [n + 2 * p for n, p in zip(f.shape[2:], padding, strict=True)]
    if prod(sides) * f.channels > MAX_ELEMENTS:  # a stride makes the result small again, the padded picture is not
        raise InputError(f"pads to {prod(sides) * f.channels:,} elements; expected at most {MAX_ELEMENTS:,}")
    sizes = [
        output_size(f.shape[2 + i], kernel[i], pairs["stride"][i], padding[i], dilation[i])
        if dilation[i] * (kernel[i] - 1) < sides[i]
        else 0
        for i in (0, 1)
    ]
    if min(sizes) < 1:
        raise InputError(f"its window of {list(kernel)} is larger than the padded picture, {sides}")
    return sizes[0], sizes[1]


def _grouped(f: _Facts, outputs: int) -> int:
    """Return C / groups."""
    groups = f.o["groups"]
    if groups < 1 or f.channels % groups or outputs % groups:
        raise InputError(f"groups is {groups}; expected a divisor of {f.channels} inputs and {outputs} outputs")
    return f.channels // groups


def _counted(f: _Facts, option: str, expected: int) -> None:
    if f.o[option] != expected:
        raise InputError(f"{option} is {f.o[option]}; expected {expected}, as its input has")


# ---- steps on bits --------------------------------------------------------------------------------------------------


def _pack(f: _Facts) -> list[_Value]:
    if len(f.shape) not in (2, 4):
        raise InputError(f"takes a value of shape (N, D) or (N, C, H, W), but it has {f.shape}")
    _per_channel(f, f.channels, "alpha", "beta")
    return [_Value(f.shape)]


def _unpack(f: _Facts) -> list[_Value]:
    _counted(f, "channels", f.channels)
    return [_Value(f.shape)]


def _epilogue(f: _Facts, shape: Shape, terms: int) -> list[_Value]:
    outputs = shape[1]
    if terms >= MAX_TERMS:
        raise InputError(f"sums {terms:,} signs; expected fewer than {MAX_TERMS:,}")
    if "threshold" in f.t and "alpha" in f.t:
        raise InputError("has both a threshold and alpha; expected one of them")
    _per_channel(f, outputs, "threshold", "alpha", "beta")
    if "flip" in f.t:
        _words("flip", f.t["flip"], outputs)
    if len(f.x) == 2 and f.x[1].shape != shape:
        raise InputError(f"adds a value of shape {f.x[1].shape} to one of {shape}; expected equal shapes")
    return [_Value(shape), _Value(shape)]


def _binary_conv2d(f: _Facts) -> list[_Value]:
    shape, terms = _sign_conv2d(f)
    if f.o["pad"] not in ("zero", "one"):
        raise InputError(f"pad is {f.o['pad']!r}; expected 'zero' or 'one'")
    return _epilogue(f, shape, terms)


def _sign_conv2d(f: _Facts) -> tuple[Shape, int]:
    """Check a convolution with packed weights and return its shape and how many terms its sums have."""
    weight = f.t["weight"]
    outputs, kernel = weight.shape[0], weight.shape[1:3]
    size = _window(f, kernel)
    _counted(f, "channels", f.channels)
    each = _grouped(f, outputs)
    _words("weight", weight, each)
    return (f.shape[0], outputs, *size), each * prod(kernel)


def _binary_linear(f: _Facts) -> list[_Value]:
    _dims(f, 2)
    weight, pixel, slots = f.t["weight"], f.x[0].pixel, f.channels
    if pixel is None:
        _counted(f, "features", slots)
        _words("weight", weight, slots)
    else:
        pixels = slots // (WORD * words_for(pixel))
        _counted(f, "features", pixels * pixel)
        _expect("weight", weight, (len(weight), slots // WORD))
        _words("weight", weight.reshape(-1, words_for(pixel)), pixel)
    return _epilogue(f, (f.shape[0], len(weight)), f.o["features"])


def _max_pool_bits(f: _Facts) -> list[_Value]:
    size = _window(f, f.o["kernel"], pool=True)
    if "flip" in f.t:
        _words("flip", f.t["flip"], f.channels)
    return [_Value((*f.shape[:2], *size))]


def _flatten_bits(f: _Facts) -> list[_Value]:
    _dims(f, 4)
    slots = f.shape[2] * f.shape[3] * WORD * words_for(f.channels)
    return [_Value((f.shape[0], slots), pixel=f.channels)]


def _sign_weight_conv2d(f: _Facts) -> list[_Value]:
    shape, _ = _sign_conv2d(f)
    _per_channel(f, shape[1], "scale", "bias")
    return [_Value(shape)]


def _sign_weight_linear(f: _Facts) -> list[_Value]:
    weight = f.t["weight"]
    if f.o["product"] not in ("unpack", "sums"):
        raise InputError(f"product is {f.o['product']!r}; expected 'unpack' or 'sums'")
    if f.o["product"] == "sums":
        _dims(f, 2)
    _counted(f, "features", f.shape[-1])
    _words("weight", weight, f.shape[-1])
    _per_channel(f, len(weight), "scale", "bias")
    return [_Value((*f.shape[:-1], len(weight)))]


# ---- steps on raw images --------------------------------------------------------------------------------------------


def _normalise(f: _Facts) -> list[_Value]:
    _per_channel(f, f.channels, "mean", "std")
    return [_Value(f.shape)]


def _image_layer(f: _Facts, taps: int) -> int:
    """Check the weight and what is per channel or output; return the number of outputs."""
    weight = f.t["weight"]
    if 255 * taps >= 2**31:
        raise InputError(f"sums {taps:,} pixels of 8 bits a channel; expected sums that fit into 32 bits")
    _expect("weight", weight, (len(weight), f.channels, words_for(taps)))
    _words("weight", weight, taps)
    _per_channel(f, f.channels, "mean", "std")
    _per_channel(f, len(weight), "scale", "bias")
    return len(weight)


def _image_conv2d(f: _Facts) -> list[_Value]:
    _dims(f, 4)
    kernel = tuple(f.o["kernel"])
    if len(kernel) != 2 or min(kernel) < 1:
        raise InputError(f"kernel is {f.o['kernel']}; expected two integers of at least 1")
    size = _window(f, kernel)
    return [_Value((f.shape[0], _image_layer(f, kernel[0] * kernel[1]), *size))]


def _image_linear(f: _Facts) -> list[_Value]:
    _dims(f, 4)
    return [_Value((f.shape[0], _image_layer(f, f.shape[2] * f.shape[3])))]


BIT_RULES: dict[str, Callable[[_Facts], list[_Value]]] = {
    "pack": _pack,
    "unpack": _unpack,
    "binary_conv2d": _binary_conv2d,
    "binary_linear": _binary_linear,
    "max_pool_bits": _max_pool_bits,
    "flatten_bits": _flatten_bits,
    "sign_weight_conv2d": _sign_weight_conv2d,
    "sign_weight_linear": _sign_weight_linear,
    "normalise": _normalise,
    "image_conv2d": _image_conv2d,
    "image_linear": _image_linear,
}


# ---- float steps: what torch finds out too late, and what would mix the examples of a batch --------------------------


def _conv2d(f: _Facts) -> None:
    weight = f.t["weight"]
    _window(f, weight.shape[2:])
    _expect("weight", weight, (len(weight), _grouped(f, len(weight)), *weight.shape[2:]))
    _per_channel(f, len(weight), "bias")


def _linear(f: _Facts) -> None:
    _expect("weight", f.t["weight"], (len(f.t["weight"]), f.shape[-1]))
    _per_channel(f, len(f.t["weight"]), "bias")


def _batch_norm(f: _Facts) -> None:
    _per_channel(f, f.channels, "mean", "var", "weight", "bias")


def _prelu(f: _Facts) -> None:
    _expect("weight", f.t["weight"], (f.channels,) if f.t["weight"].size != 1 else (1,))


def _uniform(f: _Facts) -> None:
    if f.o["low"] > f.o["high"]:
        raise InputError(f"low is {f.o['low']} and high is {f.o['high']}; expected low <= high")


def _pool(f: _Facts) -> None:
    _window(f, f.o["kernel"], pool=True)


def _adaptive(f: _Facts) -> None:
    _dims(f, 4)
    if len(f.o["size"]) != 2 or min(f.o["size"]) < 1:
        raise InputError(f"size is {list(f.o['size'])}; expected two integers of at least 1")


def _apart(f: _Facts, name: str, dims: Sequence[int]) -> None:
    """Check that dimensions are some of the value's, and none is the batch."""
    count = len(f.shape)
    if not dims or not all(-count < d < count and d % count for d in dims):
        raise InputError(f"{name} is {list(dims)}; expected dimensions of {f.shape} other than the first")


def _reshape(f: _Facts) -> None:
    shape = f.o["shape"]
    if len(shape) < 2 or shape[0] != -1 or min(shape[1:]) < 1 or prod(shape[1:]) != prod(f.shape[1:]):
        raise InputError(f"shape is {list(shape)}; expected -1 and then sizes of product {prod(f.shape[1:])}")


def _pad(f: _Facts) -> None:
    pads = f.o["pads"]
    if len(pads) % 2 or len(pads) > 2 * (len(f.shape) - 1):
        raise InputError(
            f"pads is {list(pads)}; expected two integers for each dimension but the first, last one first"
        )


def _slice(f: _Facts) -> None:
    slices = f.o["slices"]
    if len(slices) > len(f.shape) or not slices or list(slices[0]) != [None, None, None]:
        raise InputError(f"slices is {slices}; expected the whole batch and then slices of {f.shape[1:]}")


def _pairwise(f: _Facts) -> None:
    one, other = f.x[0].shape, f.x[1].shape
    if len(one) != len(other) or not all(m == n or 1 in (m, n) for m, n in zip(one, other, strict=True)):
        raise InputError(f"takes values of shapes {one} and {other}; expected shapes that broadcast")


FLOAT_RULES: dict[str, Callable[[_Facts], None]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "uniform": _uniform,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive,
    "mean": lambda f: _apart(f, "dims", f.o["dims"]),
    "flatten": lambda f: _apart(f, "start and end", [f.o["start"], f.o["end"]]),
    "reshape": _reshape,
    "pad": _pad,
    "slice": _slice,
    "add": _pairwise,
    "sub": _pairwise,
    "mul": _pairwise,
    "cat": lambda f: _apart(f, "dim", [f.o["dim"]]),
}
