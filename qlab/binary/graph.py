"""A packed net as data: steps with names, options and tensors, nothing that could run by itself.

What `compile` writes, every backend reads, and the file format stores. A step takes named values and gives one (a packed
convolution may give two: its float result and the bits of its signs). Values are

    float   a float32 tensor of the net's own shape, (N, C, H, W) or (N, D)
    bits    packed signs, channels-last: (N, H, W, W(C)) or (N, W(D))
    uint8   the raw image, where the first layer runs on its bit planes

`OPS` says what each kind of step takes. A graph that comes from a file is checked against it by `Graph.check` before anything
runs or is allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qlab.errors import InputError

__all__ = ["OPS", "Graph", "Op", "Step"]

Kind = Literal["float", "bits"]


@dataclass(frozen=True)
class Op:
    """What a kind of step takes.

    Args:
        inputs: kinds of the values it takes; "float*" is any number of floats from two up.
        outputs: kinds of the values it gives; "|" separates what depends on the tensors.
        tensors: role -> dtype and number of dimensions, such as "uint64/4"; a role with "?" may be missing.
        options: name -> type: "int", "float", "bool", "str", "ints", "slices"; "?" marks one that may be None.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


_WINDOW = {"stride": "ints", "padding": "ints", "dilation": "ints", "groups": "int"}
_EPILOGUE = {
    "threshold?": "int32/1",  # with flip: batch norm and sign as a comparison; the step gives bits
    "flip?": "uint64/1",
    "alpha?": "float32/1",  # with beta: batch norm; the step gives floats, and a second input is added to them
    "beta?": "float32/1",
}

OPS: dict[str, Op] = {
    # ---- between floats and bits
    "pack": Op(("float",), ("bits",), {"alpha?": "float32/1", "beta?": "float32/1"}, {"fused": "bool"}),
    "normalise": Op(("uint8",), ("float",), {"mean": "float32/1", "std": "float32/1"}),
    "unpack": Op(("bits",), ("float",), {}, {"channels": "int"}),
    # ---- on bits
    "binary_conv2d": Op(
        ("bits", "float?"),
        ("bits|float", "bits?"),
        {"weight": "uint64/4", **_EPILOGUE},
        {"channels": "int", **_WINDOW, "pad": "str", "fused": "bool"},
    ),
    "binary_linear": Op(
        ("bits", "float?"),
        ("bits|float", "bits?"),
        {"weight": "uint64/2", **_EPILOGUE},
        {"features": "int", "fused": "bool"},
    ),
    "max_pool_bits": Op(
        ("bits",), ("bits",), {"flip?": "uint64/1"}, {"kernel": "ints", "stride": "ints", "padding": "ints"}
    ),
    "flatten_bits": Op(("bits",), ("bits",)),
    # ---- one-bit weights, float activations
    "sign_weight_conv2d": Op(
        ("float",),
        ("float",),
        {"weight": "uint64/4", "scale?": "float32/1", "bias?": "float32/1"},
        {"channels": "int", **_WINDOW},
    ),
    "sign_weight_linear": Op(
        ("float",),
        ("float",),
        {"weight": "uint64/2", "scale?": "float32/1", "bias?": "float32/1"},
        {"features": "int", "product": "str"},
    ),
    # ---- one-bit weights, the pixels of an image as bit planes; per channel, for each has its own mean and deviation
    "image_conv2d": Op(
        ("uint8",),
        ("float",),
        {"weight": "uint64/3", "mean": "float32/1", "std": "float32/1", "scale?": "float32/1", "bias?": "float32/1"},
        {"kernel": "ints", "stride": "ints", "padding": "ints", "dilation": "ints"},
    ),
    "image_linear": Op(
        ("uint8",),
        ("float",),
        {"weight": "uint64/3", "mean": "float32/1", "std": "float32/1", "scale?": "float32/1", "bias?": "float32/1"},
    ),
    # ---- floats
    "conv2d": Op(("float",), ("float",), {"weight": "float32/4", "bias?": "float32/1"}, _WINDOW),
    "linear": Op(("float",), ("float",), {"weight": "float32/2", "bias?": "float32/1"}),
    "batch_norm": Op(
        ("float",),
        ("float",),
        {"mean": "float32/1", "var": "float32/1", "weight?": "float32/1", "bias?": "float32/1"},
        {"eps": "float"},
    ),
    "prelu": Op(("float",), ("float",), {"weight": "float32/1"}),
    "relu": Op(("float",), ("float",)),
    "relu6": Op(("float",), ("float",)),
    "tanh": Op(("float",), ("float",)),
    "sigmoid": Op(("float",), ("float",)),
    "silu": Op(("float",), ("float",)),
    "gelu": Op(("float",), ("float",), {}, {"approximate": "str"}),
    "elu": Op(("float",), ("float",), {}, {"alpha": "float"}),
    "leaky_relu": Op(("float",), ("float",), {}, {"slope": "float"}),
    "hardtanh": Op(("float",), ("float",), {}, {"low": "float", "high": "float"}),
    "uniform": Op(("float",), ("float",), {"step": "float32/0"}, {"low": "int", "high": "int"}),
    "max_pool2d": Op(
        ("float",),
        ("float",),
        {},
        {"kernel": "ints", "stride": "ints", "padding": "ints", "dilation": "ints", "ceil": "bool"},
    ),
    "avg_pool2d": Op(
        ("float",),
        ("float",),
        {},
        {"kernel": "ints", "stride": "ints", "padding": "ints", "ceil": "bool", "count_padding": "bool"},
    ),
    "adaptive_avg_pool2d": Op(("float",), ("float",), {}, {"size": "ints"}),
    "mean": Op(("float",), ("float",), {}, {"dims": "ints", "keepdim": "bool"}),
    "flatten": Op(("float",), ("float",), {}, {"start": "int", "end": "int"}),
    "reshape": Op(("float",), ("float",), {}, {"shape": "ints"}),
    "pad": Op(("float",), ("float",), {}, {"pads": "ints", "value": "float"}),
    "slice": Op(("float",), ("float",), {}, {"slices": "slices"}),
    "add": Op(("float", "float"), ("float",)),
    "sub": Op(("float", "float"), ("float",)),
    "mul": Op(("float", "float"), ("float",)),
    "add_number": Op(("float",), ("float",), {}, {"number": "float"}),
    "mul_number": Op(("float",), ("float",), {}, {"number": "float"}),
    "cat": Op(("float*",), ("float",), {}, {"dim": "int"}),
}


@dataclass(frozen=True)
class Step:
    """One operation of a packed net.

    Args:
        op: a name of `OPS`.
        inputs: names of the values it takes; "input" is the net's input.
        outputs: names of the values it gives.
        layer: the module of the original net it comes from.
        tensors: role -> name of a tensor of the graph.
        options: primitives and lists of integers.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A packed net: what it takes, its steps in order, their tensors.

    Args:
        input_shape: of one example, (C, H, W) or (D,).
        steps: in the order they run.
        tensors: name -> array; words are uint64, thresholds int32, the rest float32.
        output: name of the value that is the net's result.
        layers: one row per layer of the original net, for the report.
        image: the input is a raw image, uint8, and not float32.
    """

    input_shape: tuple[int, ...]
    steps: tuple[Step, ...]
    tensors: dict[str, np.ndarray]
    output: str
    layers: tuple[dict[str, Any], ...] = ()
    image: bool = False

    def check(self) -> Graph:
        """Return the graph itself after all of it was found to fit together.

        Raises:
            InputError: an unknown operation, a missing value or tensor, a wrong type; says which step.
        """
        if not self.input_shape or not all(_is_int(n) and 0 < n < 2**31 for n in self.input_shape):
            raise InputError(f"input_shape is {self.input_shape!r}; expected positive integers, (C, H, W) or (D,)")
        values: dict[str, str] = {"input": "uint8" if self.image else "float"}
        for i, step in enumerate(self.steps):
            try:
                _check_step(step, values, self.tensors)
            except (InputError, TypeError, AttributeError) as error:
                raise InputError(f"step {i} ({step.layer or step.op!r}): {error}") from error
        if values.get(self.output) != "float":
            raise InputError(f"the output {self.output!r} is no float value that a step gives")
        from qlab.binary.shapes import infer  # it reads graphs, so it imports this module

        infer(self)
        return self


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES = {
    "int": _is_int,
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "ints": lambda v: isinstance(v, list | tuple) and all(map(_is_int, v)),
    "slices": lambda v: (
        isinstance(v, list | tuple)
        and all(isinstance(s, list | tuple) and len(s) == 3 and all(e is None or _is_int(e) for e in s) for s in v)
    ),
}


def _check_step(step: Step, values: dict[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    if step.op not in OPS:
        raise InputError(f"unknown operation {step.op!r}; this version of qlab knows {', '.join(OPS)}")
    op = OPS[step.op]
    _check_inputs(op, [values.get(name) for name in step.inputs], step.inputs)
    roles = {role.rstrip("?"): (kind, role.endswith("?")) for role, kind in op.tensors.items()}
    for role, name in step.tensors.items():
        if role not in roles:
            raise InputError(f"takes no tensor {role!r}")
        if name not in tensors:
            raise InputError(f"tensor {name!r} is missing")
        dtype, dims = roles[role][0].split("/")
        found = tensors[name]
        if found.dtype != np.dtype(dtype) or found.ndim != int(dims):
            raise InputError(f"tensor {name!r} is {found.dtype} of {found.ndim} dimensions; expected {dtype} of {dims}")
    missing = [role for role, (_, optional) in roles.items() if not optional and role not in step.tensors]
    missing += [name for name in op.options if name not in step.options]
    if missing:
        raise InputError(f"lacks {', '.join(missing)}")
    for name, value in step.options.items():
        if name not in op.options or not _TYPES[op.options[name]](value):
            raise InputError(f"option {name!r} is {value!r}; expected {op.options.get(name, 'no such option')}")
    for one, other in (("threshold", "flip"), ("alpha", "beta")):
        if step.op != "max_pool_bits" and (one in step.tensors) != (other in step.tensors):
            raise InputError(f"has one of {one} and {other}; they come together")
    kinds = ["bits" if "threshold" in step.tensors else "float", "bits"] if "|" in op.outputs[0] else list(op.outputs)
    if not 1 <= len(step.outputs) <= len(op.outputs) or (len(step.outputs) == 2 and kinds[0] == "bits"):
        raise InputError(f"gives {len(step.outputs)} values; expected {len(kinds)}")
    if len(step.inputs) == 2 and step.op.startswith("binary") and "alpha" not in step.tensors:
        raise InputError("adds a second value only after batch norm (alpha and beta)")
    for name, kind in zip(step.outputs, kinds, strict=False):
        if name in values:
            raise InputError(f"value {name!r} is given twice")
        values[name] = kind


def _check_inputs(op: Op, found: list[str | None], names: tuple[str, ...]) -> None:
    if op.inputs == ("float*",):
        fits = len(found) >= 2 and all(kind == "float" for kind in found)
    else:
        least = sum(not kind.endswith("?") for kind in op.inputs)
        fits = least <= len(found) <= len(op.inputs) and all(
            kind == wanted.rstrip("?") for kind, wanted in zip(found, op.inputs, strict=False)
        )
    if not fits:
        raise InputError(f"takes {', '.join(op.inputs)}, but {', '.join(names)} are {', '.join(map(str, found))}")
