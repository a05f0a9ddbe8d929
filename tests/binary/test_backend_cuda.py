"""The CUDA backend's own steps, driven on the CPU: its kernels are the CUDA sources compiled for the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.binary.backend_cuda import Cuda
from qlab.binary.bits import array_to_words, words_to_array
from qlab.binary.kernels import cuda_shim
from tests.binary.conftest import binary_net, images, randomised
from tests.binary.test_compile import KINDS


class OnTensors:
    """The shim's kernels with torch tensors in and out, as `kernels.cuda` has them."""

    def __getattr__(self, name: str) -> Any:
        def plain(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            return array_to_words(a) if a.dtype == torch.int64 else a.contiguous().numpy()

        def run(*arguments: Any) -> Tensor:
            y = getattr(cuda_shim, name)(*map(plain, arguments))
            return words_to_array(y) if y.dtype == np.uint64 else torch.from_numpy(y)

        return run


def gives_the_simulations_bits(net: nn.Module, x: Tensor) -> None:
    packed = qlab.binary.compile(net.eval(), x)
    backend = Cuda(packed.graph, OnTensors(), "cpu")
    assert torch.equal(backend.run(x), packed(x, backend="torch"))
    assert torch.equal(packed(x, backend="shim"), packed(x, backend="torch"))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("mlp", (1, 9, 9), {"hidden": (65, 130)}),
        ("vgg_small", (3, 9, 11), {"width": 10}),
        ("bireal18", (3, 9, 8), {"width": 4}),
    ],
)
def test_nets_of_the_shelf(name: str, shape: tuple[int, ...], options: dict) -> None:
    gives_the_simulations_bits(binary_net(name, shape, **options), images(1, *shape))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str) -> None:
    gives_the_simulations_bits(randomised(KINDS[kind](), seed=4), images(1, 6, 9, 9))
