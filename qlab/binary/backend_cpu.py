"""Running a packed graph with the Numba kernels, into buffers that are planned once.

Weights are rearranged into the kernels' panels when the backend is made. Results of packed steps go into buffers that are
planned at the first batch of each size: a buffer is used again when no later step needs what it holds (views keep it).
One batch runs at a time; calls from other threads wait.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qlab.binary.backends import Observe, Words, standard
from qlab.binary.graph import Graph, Step
from qlab.binary.images import grouped_weight
from qlab.binary.kernels import cpu
from qlab.binary.shapes import Shape, infer

__all__ = ["Buffers", "Numba"]

VIEWS = frozenset({"flatten_bits", "flatten", "reshape", "slice"})
"""Steps whose result may share the memory of what they take."""

PLANS = 4  # batch sizes whose buffers are kept


class Buffers:
    """Memory for the packed steps of one batch size.

    Args:
        graph: a checked graph.
        batch: number of examples N.

    Attributes:
        arrays: value name -> the array that its step writes.
        nbytes: of all buffers; what separate arrays would take is `separate`.
    """

    def __init__(self, graph: Graph, batch: int) -> None:
        shapes = infer(graph, batch)
        self.arrays: dict[str, np.ndarray] = {}
        self.separate = 0
        raw: list[np.ndarray] = []
        free: list[int] = []
        root: dict[str, str] = {}  # value -> the value whose memory it shares
        held: dict[str, int] = {}  # root -> index of its buffer
        last: dict[str, int] = {}
        for i, step in enumerate(graph.steps):
            for name in step.outputs:
                root[name] = root.get(step.inputs[0], step.inputs[0]) if step.op in VIEWS else name
            for name in step.inputs:
                last[root.get(name, name)] = i
        last[root.get(graph.output, graph.output)] = len(graph.steps)
        for i, step in enumerate(graph.steps):
            for name, (kind, shape) in _written(step, shapes).items():
                size = prod(shape) * np.dtype(kind).itemsize
                self.separate += size
                fitting = [j for j in free if raw[j].nbytes >= size]
                if fitting:
                    j = min(fitting, key=lambda j: raw[j].nbytes)
                    free.remove(j)
                else:
                    j = len(raw)
                    raw.append(_aligned(size))
                held[name] = j
                self.arrays[name] = raw[j][:size].view(kind).reshape(shape)
            for name in [name for name in held if last.get(name, i) <= i]:
                free.append(held.pop(name))
        self.nbytes = sum(b.nbytes for b in raw)


def _aligned(size: int) -> np.ndarray:
    """Return bytes that start at a cache line."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + size]


def _written(step: Step, shapes: dict[str, Shape]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return dtype and shape of the arrays that a packed step writes, channels last."""
    if step.op not in ("pack", "binary_conv2d", "binary_linear", "max_pool_bits"):
        return {}
    name = step.outputs[0]  # the bits beside a float result are the kernel's own array
    n, c, *grid = shapes[name]
    if not step.op.startswith("binary") or "threshold" in step.tensors:
        return {name: (np.uint64, (n, *grid, cpu.words_for(c)))}
    return {name: (np.float32, (n, *grid, c))} if "alpha" in step.tensors else {}


class Numba(Words):
    """The packed graph on the Numba kernels, fused: batch norm, shortcut, threshold and packing in one pass.

    Args:
        graph: a checked graph.
    """

    name: ClassVar[str] = "numba"

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, cpu, "numba")
        self.lock = threading.Lock()
        self.plans: dict[int, Buffers] = {}
        self.out: dict[str, np.ndarray] = {}
        # Pool's value -> the batch norm right before it, whose value nothing else reads.
        self.late: dict[str, Step] = {}
        self.before_pools = {
            pool.outputs[0]: norm
            for norm, pool in pairwise(graph.steps)
            if norm.op == "batch_norm"
            and pool.op == "max_pool2d"
            and norm.outputs == pool.inputs
            and sum(norm.outputs[0] in step.inputs for step in graph.steps) == 1
            and norm.outputs[0] != graph.output
            and _plain(pool)
        }
        self.fixed = {step.outputs[0]: self._arguments(step) for step in graph.steps if step.op.startswith("binary")}
        self.panels = {step.outputs[0]: _panels(step, graph) for step in graph.steps if "weight" in step.tensors}

    def run(self, x: Tensor, observe: Observe | None = None) -> Tensor:
        """Return the output for a batch of inputs; see `Backend.run`."""
        with self.lock:
            if len(x) not in self.plans:
                while len(self.plans) >= PLANS:
                    self.plans.pop(next(iter(self.plans)))
                self.plans[len(x)] = Buffers(self.graph, len(x))
            self.out = self.plans[len(x)].arrays
            self.late = {} if observe else self.before_pools  # an observer sees every value
            y = super().run(x, observe)
            return y.clone()  # the next batch writes into the same buffers

    def step(self, step: Step, inputs: list[Any]) -> tuple[Any, ...]:
        """Return the values of one step; a batch norm before a max-pool runs on what the pool has left."""
        if any(step is norm for norm in self.late.values()):
            return (inputs[0],)
        norm = self.late.get(step.outputs[0])
        if step.op != "max_pool2d" or not (norm or _on_planes(step, inputs[0])):
            return super().step(step, inputs)
        o, x = step.options, standard(inputs[0])
        weight = None if norm is None else self.optional(norm, "weight")
        # Rounding never changes an order: the maximum of alpha x + beta is that of x, or where alpha < 0 its minimum.
        signs = None if weight is None else torch.where(weight < 0, -1.0, 1.0).numpy()
        window = (tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]))
        y = torch.from_numpy(cpu.float_max_pool2d(x.numpy(), *window, signs))
        (y,) = (y,) if norm is None else super().step(norm, [y])
        return (y.contiguous(memory_format=torch.channels_last),)  # as packing and shortcuts want it

    def image_weight(self, step: Step) -> Any:
        """Return the weights of a layer on bit planes as panels."""
        return self.panels[step.outputs[0]]

    def pack(self, step: Step, x: Tensor) -> np.ndarray:
        """Return the words of the signs of x, or of its batch norm, channels last."""
        out = self.out[step.outputs[0]]
        values, layout = _floats(x)
        if "alpha" not in step.tensors:
            return cpu.affine_pack(
                values, np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32), False, layout, out
            )
        alpha, beta = self.words(step, "alpha"), self.words(step, "beta")
        return cpu.affine_pack(values, alpha, beta, step.options["fused"], layout, out)

    def binary_conv2d(self, step: Step, x: np.ndarray, *residual: Tensor) -> Any:
        """Return a convolution of packed signs, with what follows it."""
        name, fixed = step.outputs[0], self.fixed[step.outputs[0]]
        if "threshold" in step.tensors:
            return cpu.conv2d_threshold(x, self.panels[name], **fixed, out=self.out[name])
        if "alpha" not in step.tensors:
            return torch.from_numpy(cpu.binary_conv2d(x, self.panels[name], **fixed)).float().movedim(-1, 1)
        shortcut = _channels_last(residual[0]) if residual else None
        return _given(cpu.conv2d_affine(x, self.panels[name], **fixed, residual=shortcut, out=self.out[name]))

    def binary_linear(self, step: Step, x: np.ndarray, *residual: Tensor) -> Any:
        """Return a product of packed signs, with what follows it."""
        name, fixed = step.outputs[0], self.fixed[step.outputs[0]]
        if "threshold" in step.tensors:
            return cpu.matmul_threshold(x, self.panels[name], **fixed, out=self.out[name])
        if "alpha" not in step.tensors:
            return torch.from_numpy(cpu.binary_matmul(x, self.panels[name], **fixed)).float()
        shortcut = _channels_last(residual[0]) if residual else None
        return _given(cpu.matmul_affine(x, self.panels[name], **fixed, residual=shortcut, out=self.out[name]))

    def _arguments(self, step: Step) -> dict[str, Any]:
        """Return what a binary layer's kernel takes besides values and weights."""
        o = step.options
        fixed: dict[str, Any] = {"k": o["features"]} if step.op == "binary_linear" else {"channels": o["channels"]}
        if step.op == "binary_conv2d":
            fixed |= {name: tuple(o[name]) for name in ("stride", "padding", "dilation")}
            fixed |= {"groups": o["groups"], "pad": o["pad"]}
        fixed |= {
            role: self.words(step, role) for role in ("threshold", "flip", "alpha", "beta") if role in step.tensors
        }
        if "alpha" in step.tensors:
            fixed |= {"fused": o["fused"], "also_pack": len(step.outputs) == 2}
        return fixed

    def max_pool_bits(self, step: Step, x: np.ndarray) -> np.ndarray:
        """Return the packed maximum, negated in flipped channels."""
        o = step.options
        out = self.out[step.outputs[0]]
        y = cpu.max_pool2d(x, tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]), out=out)
        return np.bitwise_xor(y, self.words(step, "flip"), out=y) if "flip" in step.tensors else y


def _plain(pool: Step) -> bool:
    return list(pool.options["dilation"]) == [1, 1] and not pool.options["ceil"]


def _on_planes(pool: Step, x: Tensor) -> bool:
    """Return whether a max-pool runs on our kernel: it does where whole planes lie together."""
    return _plain(pool) and x.dim() == 4 and x.is_contiguous()


def _panels(step: Step, graph: Graph) -> Any:
    """Return a step's weights as its kernel wants them."""
    words = graph.tensors[step.tensors["weight"]]
    if step.op in ("image_conv2d", "image_linear"):
        return cpu.prepack_conv(grouped_weight(words), words.shape[1])
    if step.op == "binary_conv2d":
        return cpu.prepack_conv(words, step.options["groups"], step.options["channels"])
    if step.op == "binary_linear":
        return cpu.prepack(words)
    return None


def _given(result: Any) -> Any:
    """Return float results channels first, as views."""
    if isinstance(result, tuple):
        return torch.from_numpy(result[0]).movedim(-1, 1), result[1]
    return torch.from_numpy(result).movedim(-1, 1)


def _channels_last(x: Tensor) -> np.ndarray:
    return x.movedim(1, -1).contiguous().numpy()


def _floats(x: Tensor) -> tuple[np.ndarray, Any]:
    """Return a float value in the layout it has, and that layout's name."""
    last = x.movedim(1, -1)
    if x.dim() == 2 or (last.is_contiguous() and not x.is_contiguous()):
        return last.contiguous().numpy(), "NHWC"
    return x.contiguous().numpy(), "NCHW"
