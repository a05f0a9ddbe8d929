"""Running a packed graph: once as a simulation in float, and once for each kind of packed kernels.

    torch      the simulation: signs as +-1 in float32, sums of which are exact; what the net was trained as
    numpy      the reference kernels
    numba      the CPU kernels (`backend_cpu`)
    shim       the CUDA sources on the CPU
    cuda       the CUDA kernels

Steps that are float in the graph are torch's own operations in every backend, in the memory layout of the original net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.binary.bits import array_to_words, unpack, words_to_array
from qlab.binary.floats import FLOAT_OPS, ORDER_SENSITIVE, POOLS
from qlab.binary.graph import Graph, Step
from qlab.binary.images import combine, grouped_weight, taps
from qlab.binary.kernels import reference
from qlab.binary.ops import signed_sum_matmul
from qlab.errors import InputError
from qlab.quantizers import hard_sign

__all__ = ["Backend", "Observe", "Simulation", "WordKernels", "Words"]

Observe = Callable[[Step, tuple[Any, ...]], None]
"""Called with a step and its values as they are given."""


class Backend:
    """One way to run a graph; `run` takes a batch (N, ...) in float32 and returns the net's output.

    Args:
        graph: a checked graph.
        device: where its float steps run.
    """

    name: ClassVar[str]
    # Whether it gives the simulation's bits; a runtime that sums floats in an order of its own cannot promise them.
    promised: bool = True

    def __init__(self, graph: Graph, device: str = "cpu") -> None:
        self.graph = graph
        self.device = torch.device(device)
        self.masks: dict[str, Any] = {}  # of layers that weigh floats with their bits
        self.tensors = {name: self._constant(array) for name, array in graph.tensors.items()}
        last: dict[str, int] = {name: i for i, step in enumerate(graph.steps) for name in step.inputs}
        self.released: list[list[str]] = [[] for _ in graph.steps]  # values that no later step needs
        for name, i in last.items():
            if name != graph.output:
                self.released[i].append(name)

    def _constant(self, array: np.ndarray) -> Tensor:
        tensor = words_to_array(array) if array.dtype == np.uint64 else torch.from_numpy(array)
        return tensor.to(self.device)

    @torch.no_grad()
    def run(self, x: Tensor, observe: Observe | None = None) -> Tensor:
        """Return the output for a batch of inputs.

        Args:
            x: (N, *input_shape), float32.
            observe: called with every step and the values it gave, right after it ran. They may be buffers that later
                steps write into: copy what is to be kept.
        """
        values: dict[str, Any] = {"input": x.to(self.device)}
        for i, step in enumerate(self.graph.steps):
            results = self.step(step, [values[name] for name in step.inputs])
            if observe is not None:
                observe(step, results)
            values.update(zip(step.outputs, results, strict=True))
            for name in self.released[i]:
                values.pop(name, None)
        return values[self.graph.output]

    def step(self, step: Step, inputs: list[Any]) -> tuple[Any, ...]:
        """Return the values of one step."""
        if step.op in FLOAT_OPS:
            if step.op in ORDER_SENSITIVE:
                inputs = [standard(x) for x in inputs]
            elif step.op in POOLS:
                inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
            tensors = {role: self.tensors[name] for role, name in step.tensors.items()}
            return (FLOAT_OPS[step.op](inputs, tensors, step.options),)
        method: Callable[..., Any] = getattr(self, step.op)
        result = method(step, *inputs)
        return result if isinstance(result, tuple) else (result,)

    def tensor(self, step: Step, role: str) -> Tensor:
        """Return a step's tensor."""
        return self.tensors[step.tensors[role]]

    def optional(self, step: Step, role: str) -> Tensor | None:
        """Return a step's tensor, or None where it has none of that role."""
        return self.tensor(step, role) if role in step.tensors else None

    def affine(self, step: Step, z: Tensor) -> Tensor:
        """Return alpha z + beta per channel of z (N, C, ...), rounded as the step says; z itself where it has none."""
        if "alpha" not in step.tensors:
            return z
        shape = (1, -1, *(1 for _ in z.shape[2:]))
        alpha, beta = self.tensor(step, "alpha").view(shape), self.tensor(step, "beta").view(shape)
        if not step.options["fused"]:
            return z * alpha + beta
        return torch.from_numpy(reference.fma(z.cpu().numpy(), alpha.cpu().numpy(), beta.cpu().numpy())).to(z.device)

    # ---- one-bit weights with float activations: the same in every backend -----------------------------------------

    def sign_weight_conv2d(self, step: Step, x: Tensor) -> Tensor:
        """Unpack the weights for this one product and let torch multiply: the sums of the original net."""
        o = step.options
        weight = self._unpacked(step, o["channels"] // o["groups"]).permute(0, 3, 1, 2)
        window = (tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"])
        return F.conv2d(standard(x), self._scaled(step, weight), self.optional(step, "bias"), *window)

    def sign_weight_linear(self, step: Step, x: Tensor) -> Tensor:
        """Unpack the weights for this one product, or weigh with the bits themselves, as the step says."""
        features = step.options["features"]
        if step.options["product"] == "unpack":
            weight = self._scaled(step, self._unpacked(step, features))
            return F.linear(standard(x), weight, self.optional(step, "bias"))
        y = self._signed_sums(step, standard(x))
        scale, bias = self.optional(step, "scale"), self.optional(step, "bias")
        y = y if scale is None else y * scale
        return y if bias is None else y + bias

    # ---- raw images -------------------------------------------------------------------------------------------------

    def normalise(self, step: Step, u: Tensor) -> Tensor:
        """Return the image as the net was trained on it."""
        shape = (-1, *(1 for _ in u.shape[2:]))
        mean, std = self.tensor(step, "mean"), self.tensor(step, "std")
        return u.to(torch.float32).div_(255).sub_(mean.view(shape)).div_(std.view(shape))

    def image_conv2d(self, step: Step, u: Tensor) -> Tensor:
        """Return a convolution of the normalised image, from the bit planes of the pixels; see `images`."""
        o = step.options
        window = (o["kernel"], o["stride"], o["padding"], o["dilation"])
        inside = taps(torch.ones_like(u[:1]), *window)
        return self._image(step, taps(u, *window), inside).movedim(-1, 1)

    def image_linear(self, step: Step, u: Tensor) -> Tensor:
        """Return a product with the normalised image, from the bit planes of the pixels; see `images`."""
        return self._image(step, u.flatten(2), torch.ones_like(u[:1]).flatten(2))

    def _image(self, step: Step, pixels: Tensor, inside: Tensor) -> Tensor:
        # The digits of what lies inside are ones: the same product counts the weights there.
        sums = self.digit_sums(step, torch.cat([pixels, inside]))
        y = combine(sums[:-1], sums[-1:], self.tensor(step, "mean"), self.tensor(step, "std"))
        scale, bias = self.optional(step, "scale"), self.optional(step, "bias")
        y = y if scale is None else y * scale
        return y if bias is None else y + bias

    def digit_sums(self, step: Step, pixels: Tensor) -> Tensor:
        """Return sum_t u_t w_ot per channel, (N, ..., C, O) in integers, for pixels u (N, ..., C, T) and the step's signs w."""
        weight = unpack(self.tensor(step, "weight"), pixels.shape[-1]).double()
        return torch.einsum("mct,oct->mco", pixels.double().flatten(0, -3), weight).view(*pixels.shape[:-1], -1)

    def _unpacked(self, step: Step, length: int) -> Tensor:
        """Return sign weights as floats."""
        words = self.tensor(step, "weight")
        if words.is_cuda:
            return unpack(words, length).float()
        eights = _SIGNS[words.numpy().view(np.uint8)]  # a table of bytes: eight signs at a time
        return torch.from_numpy(eights.reshape(*words.shape[:-1], -1)[..., :length])

    def _signed_sums(self, step: Step, x: Tensor) -> Tensor:
        words = self.tensor(step, "weight")
        if x.is_cuda:
            return signed_sum_matmul(x, words)
        from qlab.binary.kernels import cpu

        name = step.outputs[0]
        if name not in self.masks:  # rearranging takes far longer than a product
            self.masks[name] = cpu.prepack_signs(array_to_words(words), x.shape[1])
        return torch.from_numpy(cpu.signed_sum_matmul(x.numpy(), self.masks[name]))

    def _scaled(self, step: Step, signs: Tensor) -> Tensor:
        weight, scale = standard(signs), self.optional(step, "scale")
        return weight if scale is None else weight * scale.view(-1, *(1 for _ in weight.shape[1:]))


_SIGNS = (
    1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int8)
).astype(np.float32)


def standard(x: Tensor) -> Tensor:
    """Return x with the strides of a fresh tensor: those of a size of one are free, and torch chooses its kernels by them."""
    return x.contiguous().view(-1).view(x.shape)


class Simulation(Backend):
    """The packed graph in float32: signs are +-1 and a binary layer is torch's convolution or product of them."""

    name = "torch"

    def pack(self, step: Step, x: Tensor) -> Tensor:
        """Return the signs of x, or of its batch norm."""
        return hard_sign(self.affine(step, x))

    def unpack(self, step: Step, x: Tensor) -> Tensor:
        """Return the signs themselves."""
        return x

    def binary_conv2d(self, step: Step, x: Tensor, *residual: Tensor) -> Any:
        """Return a convolution of signs."""
        o = step.options
        weight = unpack(self.tensor(step, "weight"), o["channels"] // o["groups"]).permute(0, 3, 1, 2).float()
        padding = tuple(o["padding"])
        if o["pad"] == "one":
            x, padding = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=1.0), (0, 0)
        z = F.conv2d(x, weight, None, tuple(o["stride"]), padding, tuple(o["dilation"]), o["groups"])
        return self._finish(step, z, *residual)

    def binary_linear(self, step: Step, x: Tensor, *residual: Tensor) -> Any:
        """Return a product of signs; the weights of a flattened picture are padded pixel by pixel, as its words are."""
        words = self.tensor(step, "weight")
        signs = unpack(words, words.shape[1] * reference.WORD)[:, : x.shape[1]].float()
        return self._finish(step, x @ signs.T, *residual)

    def _finish(self, step: Step, z: Tensor, *residual: Tensor) -> Any:
        if "threshold" in step.tensors:
            shape = (1, -1, *(1 for _ in z.shape[2:]))
            below = z < self.tensor(step, "threshold").view(shape)
            return 1.0 - 2.0 * (below ^ self._flips(step, z.shape[1]).view(shape)).float()
        z = self.affine(step, z)
        y = z + residual[0] if residual else z
        return y if len(step.outputs) == 1 else (y, hard_sign(y))

    def _flips(self, step: Step, channels: int) -> Tensor:
        return unpack(self.tensor(step, "flip"), channels) < 0

    def max_pool_bits(self, step: Step, x: Tensor) -> Tensor:
        """Return the maximum, negated in flipped channels."""
        o = step.options
        y = F.max_pool2d(x, tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]))
        if "flip" not in step.tensors:
            return y
        return torch.where(self._flips(step, y.shape[1]).view(1, -1, 1, 1), -y, y)

    def flatten_bits(self, step: Step, x: Tensor) -> Tensor:
        """Return the pixels one after the other, each padded with zeros to whole words, as the words are laid out."""
        x = F.pad(x.permute(0, 2, 3, 1), (0, -x.shape[1] % reference.WORD))
        return x.flatten(1)


class WordKernels(Protocol):
    """The functions of `kernels.reference` that a backend needs."""

    pack: Callable[..., Any]
    unpack: Callable[..., Any]
    binary_matmul: Callable[..., Any]
    binary_conv2d: Callable[..., Any]
    threshold_pack: Callable[..., Any]
    max_pool2d: Callable[..., Any]
    bitplane_input: Callable[..., Any]
    digits_conv2d: Callable[..., Any]


class Words(Backend):
    """The packed graph on words, with the kernels of a module that has the functions of `kernels.reference`.

    Args:
        graph: a checked graph.
        kernels: the module.
        name: of the backend.
    """

    def __init__(self, graph: Graph, kernels: WordKernels, name: str = "numpy") -> None:
        super().__init__(graph)
        self.kernels = kernels
        self.name = name  # type: ignore[misc]

    def words(self, step: Step, role: str) -> np.ndarray:
        """Return a step's tensor as the graph holds it."""
        return self.graph.tensors[step.tensors[role]]

    def pack(self, step: Step, x: Tensor) -> np.ndarray:
        """Return the words of the signs of x, or of its batch norm, channels last."""
        return self._signs(self.affine(step, x))

    def _signs(self, x: Tensor) -> np.ndarray:
        if bool(x.isnan().any()):  # the simulation carries NaN on; bits cannot
            raise InputError("there is NaN, which has no sign, among the numbers to be packed")
        return self.kernels.pack(np.ascontiguousarray(x.movedim(1, -1).numpy()))

    def digit_sums(self, step: Step, pixels: Tensor) -> Tensor:
        """Return the sums as a convolution of bit planes with a group per channel."""
        channels = pixels.shape[-2]
        planes = self.kernels.bitplane_input(pixels.flatten(0, -3).numpy())  # (8, M, C, W)
        planes = planes.reshape(*planes.shape[:2], 1, 1, -1)
        slots = planes.shape[-1] * reference.WORD
        z = self.kernels.digits_conv2d(planes, self.image_weight(step), slots, groups=channels)
        return torch.from_numpy(np.ascontiguousarray(z)).view(*pixels.shape[:-1], -1)

    def image_weight(self, step: Step) -> Any:
        """Return the weights of a layer on bit planes as `digits_conv2d` takes them."""
        return grouped_weight(self.words(step, "weight"))

    def unpack(self, step: Step, x: np.ndarray) -> Tensor:
        """Return the signs as floats (N, C, ...)."""
        signs = self.kernels.unpack(x, step.options["channels"])
        return torch.from_numpy(np.ascontiguousarray(signs)).movedim(-1, 1).float()

    def binary_conv2d(self, step: Step, x: np.ndarray, *residual: Tensor) -> Any:
        """Return a convolution of packed signs."""
        o = step.options
        window = (tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"])
        z = self.kernels.binary_conv2d(x, self.words(step, "weight"), o["channels"], *window, pad=o["pad"])
        return self._finish(step, z, *residual)

    def binary_linear(self, step: Step, x: np.ndarray, *residual: Tensor) -> Any:
        """Return a product of packed signs."""
        return self._finish(
            step, self.kernels.binary_matmul(x, self.words(step, "weight"), step.options["features"]), *residual
        )

    def _finish(self, step: Step, z: np.ndarray, *residual: Tensor) -> Any:
        if "threshold" in step.tensors:
            return self.kernels.threshold_pack(z, self.words(step, "threshold"), self.words(step, "flip"))
        y = self.affine(step, torch.from_numpy(np.ascontiguousarray(z)).float().movedim(-1, 1))
        y = y + residual[0] if residual else y
        return y if len(step.outputs) == 1 else (y, self._signs(y))

    def max_pool_bits(self, step: Step, x: np.ndarray) -> np.ndarray:
        """Return the packed maximum, negated in flipped channels."""
        o = step.options
        y = self.kernels.max_pool2d(x, tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]))
        return y ^ self.words(step, "flip") if "flip" in step.tensors else y

    def flatten_bits(self, step: Step, x: np.ndarray) -> np.ndarray:
        """Return the same words, one row per example."""
        return x.reshape(len(x), -1)
