"""The steps of a packed net that stay in float, as torch runs them; each is the very operation of the original net.

`run(step, values, tensors)` works on any device, the meta device included, which is how shapes are inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from qlab.binary.graph import Graph

__all__ = ["FLOAT_OPS", "INEXACT", "ORDER_SENSITIVE", "POOLS", "inexact"]

Run = Callable[[Sequence[Tensor], Mapping[str, Tensor], Mapping[str, Any]], Tensor]


def _conv2d(x: Sequence[Tensor], t: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
    return F.conv2d(
        x[0], t["weight"], t.get("bias"), tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"]
    )


def _batch_norm(x: Sequence[Tensor], t: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
    return F.batch_norm(x[0], t["mean"], t["var"], t.get("weight"), t.get("bias"), eps=o["eps"])


def _max_pool2d(x: Sequence[Tensor], t: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
    return F.max_pool2d(
        x[0], tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["ceil"]
    )


def _avg_pool2d(x: Sequence[Tensor], t: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
    return F.avg_pool2d(
        x[0], tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]), o["ceil"], o["count_padding"]
    )


def _uniform(x: Sequence[Tensor], t: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
    return (x[0] / t["step"]).clamp(o["low"], o["high"]).round() * t["step"]


FLOAT_OPS: dict[str, Run] = {
    "conv2d": _conv2d,
    "linear": lambda x, t, o: F.linear(x[0], t["weight"], t.get("bias")),
    "batch_norm": _batch_norm,
    "prelu": lambda x, t, o: F.prelu(x[0], t["weight"]),
    "relu": lambda x, t, o: F.relu(x[0]),
    "relu6": lambda x, t, o: F.relu6(x[0]),
    "tanh": lambda x, t, o: torch.tanh(x[0]),
    "sigmoid": lambda x, t, o: torch.sigmoid(x[0]),
    "silu": lambda x, t, o: F.silu(x[0]),
    "gelu": lambda x, t, o: F.gelu(x[0], approximate=o["approximate"]),
    "elu": lambda x, t, o: F.elu(x[0], o["alpha"]),
    "leaky_relu": lambda x, t, o: F.leaky_relu(x[0], o["slope"]),
    "hardtanh": lambda x, t, o: F.hardtanh(x[0], o["low"], o["high"]),
    "uniform": _uniform,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": lambda x, t, o: F.adaptive_avg_pool2d(x[0], tuple(o["size"])),
    "mean": lambda x, t, o: x[0].mean(tuple(o["dims"]), keepdim=o["keepdim"]),
    "flatten": lambda x, t, o: x[0].flatten(o["start"], o["end"]),
    "reshape": lambda x, t, o: x[0].reshape(tuple(o["shape"])),
    "pad": lambda x, t, o: F.pad(x[0], tuple(o["pads"]), value=o["value"]),
    "slice": lambda x, t, o: x[0][tuple(slice(*s) for s in o["slices"])],
    "add": lambda x, t, o: x[0] + x[1],
    "sub": lambda x, t, o: x[0] - x[1],
    "mul": lambda x, t, o: x[0] * x[1],
    "add_number": lambda x, t, o: x[0] + o["number"],
    "mul_number": lambda x, t, o: x[0] * o["number"],
    "cat": lambda x, t, o: torch.cat(list(x), o["dim"]),
}

ORDER_SENSITIVE = frozenset({"conv2d", "linear", "adaptive_avg_pool2d", "mean"})
"""Operations that sum. Torch sums in another order for another memory layout, so they get the layout of the original net."""

POOLS = frozenset({"max_pool2d", "avg_pool2d"})
"""Operations that give the same bits in every layout, and are much faster where channels come last."""

INEXACT = (
    ORDER_SENSITIVE
    | {"avg_pool2d", "sign_weight_conv2d", "sign_weight_linear"}
    | {"batch_norm", "tanh", "sigmoid", "silu", "gelu", "elu"}
)
"""Operations that another device or runtime may round in its own way: sums of floats, transcendental functions."""


def inexact(graph: Graph) -> list[str]:
    """Return the layers whose results another device or runtime may round in its own way; empty where all sums are of signs."""
    return [step.layer or step.op for step in graph.steps if step.op in INEXACT]
