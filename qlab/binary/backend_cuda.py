"""Running a packed graph with the CUDA kernels: words and floats stay on the GPU, on torch's current stream.

Values are torch tensors, words as int64. A binary layer writes its thresholded bits at once; where floats follow, the integers go
through one affine kernel. Steps that are float are torch's on the GPU, whose sums may round otherwise than the CPU's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from qlab.binary.backends import Backend
from qlab.binary.bits import WORD
from qlab.binary.floats import inexact
from qlab.binary.graph import Graph, Step

__all__ = ["Cuda"]


class Cuda(Backend):
    """The packed graph on a GPU.

    Args:
        graph: a checked graph.
        kernels: what takes and gives torch tensors as `kernels.cuda` does; that module by default.
        device: where tensors and float steps are.
    """

    name: ClassVar[str] = "cuda"

    def __init__(self, graph: Graph, kernels: ModuleType | Any = None, device: str = "cuda") -> None:
        super().__init__(graph, device)
        self.promised = self.device.type == "cpu" or not inexact(graph)
        if kernels is None:
            from qlab.binary.kernels import cuda as kernels
        self.kernels = kernels

    def affine(self, step: Step, z: Tensor) -> Tensor:
        """Return alpha z + beta per channel of z (N, C, ...), rounded as the step says; z itself where it has none."""
        if "alpha" not in step.tensors:
            return z
        own = self.tensor(step, "alpha"), self.tensor(step, "beta"), step.options["fused"]
        return self.kernels.affine(_last(z), *own).movedim(-1, 1)

    def pack(self, step: Step, x: Tensor) -> Tensor:
        """Return the words of the signs of x, or of its batch norm, channels last."""
        if "alpha" not in step.tensors:
            return self.kernels.pack(_last(x))
        own = self.tensor(step, "alpha"), self.tensor(step, "beta"), step.options["fused"]
        return self.kernels.affine_pack(_last(x), *own)

    def digit_sums(self, step: Step, pixels: Tensor) -> Tensor:
        """Return the sums as a convolution of bit planes with a group per channel."""
        words = self.tensor(step, "weight")
        o, channels, w = words.shape
        planes = self.kernels.bitplane_input(pixels.flatten(0, -3).contiguous())  # (8, M, C, W)
        planes = planes.reshape(*planes.shape[:2], 1, 1, -1)
        weight = words.transpose(0, 1).contiguous().view(channels * o, 1, 1, w)
        one = ((1, 1), (0, 0), (1, 1))
        z = self.kernels.digits_conv2d(planes, weight, channels * w * WORD, *one, channels)
        return z.view(*pixels.shape[:-1], -1)

    def unpack(self, step: Step, x: Tensor) -> Tensor:
        """Return the signs as floats (N, C, ...)."""
        return self.kernels.unpack(x, step.options["channels"]).movedim(-1, 1).float()

    def binary_conv2d(self, step: Step, x: Tensor, *residual: Tensor) -> Any:
        """Return a convolution of packed signs, with what follows it."""
        o, weight = step.options, self.tensor(step, "weight")
        window = (tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"], o["pad"])
        if "threshold" in step.tensors:
            own = self.tensor(step, "threshold"), self.tensor(step, "flip")
            return self.kernels.conv2d_threshold(x, weight, o["channels"], *own, *window)
        return self._finish(step, self.kernels.binary_conv2d(x, weight, o["channels"], *window), *residual)

    def binary_linear(self, step: Step, x: Tensor, *residual: Tensor) -> Any:
        """Return a product of packed signs, with what follows it."""
        weight, k = self.tensor(step, "weight"), step.options["features"]
        if "threshold" in step.tensors:
            return self.kernels.matmul_threshold(
                x, weight, k, self.tensor(step, "threshold"), self.tensor(step, "flip")
            )
        return self._finish(step, self.kernels.binary_matmul(x, weight, k), *residual)

    def _finish(self, step: Step, z: Tensor, *residual: Tensor) -> Any:
        y = z.movedim(-1, 1)
        y = self.affine(step, y) if "alpha" in step.tensors else y.float()
        y = y + residual[0] if residual else y
        return y if len(step.outputs) == 1 else (y, self.kernels.pack(_last(y)))

    def max_pool_bits(self, step: Step, x: Tensor) -> Tensor:
        """Return the packed maximum, negated in flipped channels."""
        o = step.options
        y = self.kernels.max_pool2d(x, tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]))
        return y ^ self.tensor(step, "flip") if "flip" in step.tensors else y

    def flatten_bits(self, step: Step, x: Tensor) -> Tensor:
        """Return the same words, one row per example."""
        return x.reshape(len(x), -1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()
