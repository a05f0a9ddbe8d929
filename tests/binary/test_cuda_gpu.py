"""The CUDA kernels on a GPU: the reference's integers from every kernel that the device has, and torch tensors in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlab.binary.bits import words_to_array
from qlab.binary.kernels import cuda, reference
from qlab.errors import InputError
from tests.binary import cuda_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason="CuPy sees no CUDA device"),
]


def device_with(kernel: str) -> cuda.Device:
    """Return the device, made to multiply with a kernel, if it has it."""
    capability = cuda.Device().capability
    if kernel == "wgmma_gemm" and capability != (9, 0):
        pytest.skip("wgmma needs capability 9.0")
    if kernel == "mma_gemm" and not (8, 0) <= capability <= (9, 0):
        pytest.skip("1-bit tensor cores need capability 8.0 to 9.0")
    return cuda.Device(kernel)


@pytest.mark.parametrize("kernel", ["popcount_gemm", "mma_gemm", "wgmma_gemm"])
@pytest.mark.parametrize(("rows", "columns", "k"), [*cases.PRODUCTS, (130, 258, 6209), (300, 515, 9000), (0, 3, 65)])
def test_products_are_exact(kernel: str, rows: int, columns: int, k: int) -> None:
    cases.check_product(device_with(kernel), rows, columns, k)


@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(1, 1000, 512), (64, 64, 512), (128, 128, 1024), (1000, 1000, 1000)]
)
def test_the_chosen_kernel_is_exact(rows: int, columns: int, k: int) -> None:
    cases.check_product(cuda.Device(), rows, columns, k)


@pytest.mark.parametrize("kernel", ["popcount_gemm", "mma_gemm", "wgmma_gemm"])
def test_a_large_product_is_that_of_torch(kernel: str) -> None:
    device = device_with(kernel)
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(n, 4096, generator=generator, device="cuda") for n in (2048, 3072))
    got = device.binary_matmul(device.pack(device.xp.from_dlpack(a)), device.pack(device.xp.from_dlpack(b)), 4096)
    signs_a, signs_b = (torch.where(x < 0, -1.0, 1.0) for x in (a, b))
    assert torch.equal(torch.from_dlpack(got).float(), signs_a @ signs_b.T)


@pytest.mark.parametrize(("rows", "columns", "k"), cases.PRODUCTS)
def test_products_of_digits_are_exact(rows: int, columns: int, k: int) -> None:
    cases.check_digits_product(cuda.Device(), rows, columns, k)


@pytest.mark.parametrize("pad", ["zero", "one"])
@pytest.mark.parametrize("case", cases.CONVOLUTIONS)
def test_convolutions_are_exact(case: tuple[Any, ...], pad: str) -> None:
    cases.check_convolution(cuda.Device(), case, pad)


@pytest.mark.parametrize("case", cases.CONVOLUTIONS)
def test_convolutions_of_bytes_are_exact(case: tuple[Any, ...]) -> None:
    cases.check_digits_convolution(cuda.Device(), case)


@pytest.mark.parametrize("length", cases.LENGTHS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_packing_is_exact(length: int, axis: int) -> None:
    shape = [3, 2, 5]
    shape[axis] = length
    cases.check_packing(cuda.Device(), tuple(shape), axis, "float32")


@pytest.mark.parametrize("channels", [1, 31, 33, 64, 65, 130])
def test_thresholds_are_exact(channels: int) -> None:
    cases.check_thresholds(cuda.Device(), channels)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0))],
)
def test_pooling_is_exact(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    cases.check_pooling(cuda.Device(), kernel, stride, padding)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_batch_norm_rounds_as_the_reference(fused: bool, dtype: str) -> None:
    cases.check_affine(cuda.Device(), fused, dtype)


@pytest.mark.parametrize("codes", ["digits", "signs"])
def test_few_bit_products_are_exact(codes: str) -> None:
    cases.check_few_bits(cuda.Device(), codes)


def test_torch_tensors_go_in_and_out_on_the_current_stream() -> None:
    rng = cases.generator(9)
    a, b = cases.words(rng, 70, 577), cases.words(rng, 65, 577)
    expected = reference.binary_matmul(a, b, 577)
    with torch.cuda.stream(torch.cuda.Stream()):
        tensors = [words_to_array(x).cuda(non_blocking=True) for x in (a, b)]
        got = cuda.binary_matmul(*tensors, 577)
        assert got.is_cuda
        assert got.dtype == torch.int32
        assert np.array_equal(got.cpu().numpy(), expected)  # the copy waits for this stream only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_torch_tensors_are_packed_as_int64_words(dtype: torch.dtype) -> None:
    x = torch.arange(-35, 35).to(dtype)[None].repeat(2, 1)
    got = cuda.pack(x.cuda())
    assert got.dtype == torch.int64
    assert torch.equal(got.cpu(), words_to_array(reference.pack(x.float().numpy())))


def test_a_tensor_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"not on cpu: use tensor\.to\('cuda'\)"):
        cuda.pack(torch.zeros(3))
