"""What every way of running the CUDA kernels must do: shapes, and comparisons with the reference that allow no difference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlab.binary.kernels import reference
from qlab.binary.kernels.cuda_host import Kernels

LENGTHS = (1, 3, 63, 64, 65, 127, 577, 4608)
# (M, N, K): every size of the list 1, 3, 4, 5, 129 on either side, every length of K.
PRODUCTS = [
    (1, 1, 1),
    (3, 5, 3),
    (4, 129, 63),
    (5, 4, 64),
    (129, 3, 65),
    (129, 129, 127),
    (33, 64, 577),
    (5, 129, 4608),
    (129, 33, 4608),
]
# (N, H, W, C, O, kernel, stride, padding, dilation, groups)
CONVOLUTIONS: list[tuple[Any, ...]] = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 6, 5, 64, 33, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 6, 5, 65, 7, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (2, 7, 6, 3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 8, 7, 130, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 9, 8, 64, 129, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (1, 9, 9, 20, 4, (3, 2), (2, 1), (3, 2), (2, 3), 1),
    (1, 5, 5, 128, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (2, 4, 5, 12, 9, (3, 3), (1, 2), (2, 1), (1, 1), 3),
    (1, 4, 4, 240, 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    (1, 5, 6, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (1, 2, 2, 64, 2, (5, 5), (1, 1), (2, 2), (1, 1), 1),
]
EXTREMES = np.array([np.iinfo(np.int32).min, -3, 0, 1, np.iinfo(np.int32).max], np.int32)


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def words(rng: np.random.Generator, *shape: int) -> NDArray[np.uint64]:
    """Return random signs, packed along the last axis."""
    return reference.pack(rng.integers(0, 2, shape, dtype=np.int8) - 1)


def thresholds(rng: np.random.Generator, channels: int, scale: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """Return thresholds near the middle of the sums, some of them extreme, and flips."""
    threshold = rng.integers(-scale, scale + 1, channels).astype(np.int32)
    threshold[::7] = rng.choice(EXTREMES, len(threshold[::7]))
    return threshold, words(rng, channels)


def same(got: Any, expected: NDArray) -> None:
    """Assert that a result, on whatever device, is the reference's: shape, type and every bit."""
    got = got.get() if hasattr(got, "get") else got
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def check_product(kernels: Kernels, rows: int, columns: int, k: int) -> None:
    rng = generator(rows, columns, k)
    a, b = words(rng, rows, k), words(rng, columns, k)
    on = kernels.xp.asarray
    expected = reference.binary_matmul(a, b, k)
    same(kernels.binary_matmul(on(a), on(b), k), expected)
    threshold, flip = thresholds(rng, columns, int(k**0.5) + 1)
    fused = kernels.matmul_threshold(on(a), on(b), k, on(threshold), on(flip))
    same(fused, reference.threshold_pack(expected, threshold, flip))


def check_digits_product(kernels: Kernels, rows: int, columns: int, k: int) -> None:
    rng = generator(rows, columns, k)
    a, b = words(rng, rows, k), words(rng, columns, k)
    on = kernels.xp.asarray
    same(kernels.digits_matmul(on(a), on(b)), reference.digits_matmul(a, b))


def check_convolution(kernels: Kernels, case: tuple[Any, ...], pad: str) -> None:
    n, height, width, channels, outputs, kernel, *window, groups = case
    rng = generator(n, height, width, channels, outputs)
    x, w = words(rng, n, height, width, channels), words(rng, outputs, *kernel, channels // groups)
    on = kernels.xp.asarray
    expected = reference.binary_conv2d(x, w, channels, *window, groups, pad)
    same(kernels.binary_conv2d(on(x), on(w), channels, *window, groups, pad), expected)
    threshold, flip = thresholds(rng, outputs, channels // groups)
    fused = kernels.conv2d_threshold(on(x), on(w), channels, on(threshold), on(flip), *window, groups, pad)
    same(fused, reference.threshold_pack(expected, threshold, flip))


def check_digits_convolution(kernels: Kernels, case: tuple[Any, ...]) -> None:
    n, height, width, channels, outputs, kernel, *window, groups = case
    rng = generator(n, height, width, channels, outputs)
    image = rng.integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    w = words(rng, outputs, *kernel, channels // groups)
    on = kernels.xp.asarray
    planes = kernels.bitplane_input(on(image))
    same(planes, reference.bitplane_input(image))
    expected = reference.digits_conv2d(reference.bitplane_input(image), w, channels, *window, groups)
    same(kernels.digits_conv2d(planes, on(w), channels, *window, groups), expected)


def check_packing(kernels: Kernels, shape: tuple[int, ...], axis: int, dtype: str) -> None:
    rng = generator(*shape)
    x = rng.integers(-1, 2, shape).astype(dtype)  # with zeros
    if x.dtype.kind == "f":
        x.flat[:: max(1, x.size // 3)] = -0.0
    on = kernels.xp.asarray
    packed = kernels.pack(on(x), axis)
    same(packed, reference.pack(x, axis))
    same(kernels.unpack(packed, shape[axis], axis), reference.unpack(reference.pack(x, axis), shape[axis], axis))


def check_thresholds(kernels: Kernels, channels: int) -> None:
    rng = generator(channels)
    z = rng.integers(-3, 4, (3, 5, channels)).astype(np.int32)
    z.flat[: len(EXTREMES)] = EXTREMES[: z.size]
    threshold, flip = thresholds(rng, channels, 3)
    on = kernels.xp.asarray
    same(kernels.threshold_pack(on(z), on(threshold), on(flip)), reference.threshold_pack(z, threshold, flip))


def check_pooling(kernels: Kernels, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    rng = generator(*kernel, *stride)
    x = (
        words(rng, 2, 7, 6, 70) | words(rng, 2, 7, 6, 70) | words(rng, 2, 7, 6, 70)
    )  # mostly -1: some windows are all -1
    same(
        kernels.max_pool2d(kernels.xp.asarray(x), kernel, stride, padding),
        reference.max_pool2d(x, kernel, stride, padding),
    )


def check_affine(kernels: Kernels, fused: bool, dtype: str) -> None:
    rng = generator(7)
    z = (rng.standard_normal((65, 70)) * 1000).astype(dtype)
    alpha, beta = rng.standard_normal((2, 70)).astype(np.float32)
    on = kernels.xp.asarray
    same(kernels.affine(on(z), on(alpha), on(beta), fused), reference.affine(z, alpha, beta, fused))
    same(kernels.affine_pack(on(z), on(alpha), on(beta), fused), reference.affine_pack(z, alpha, beta, fused))


def check_few_bits(kernels: Kernels, codes: str) -> None:
    rng = generator(3)
    on = kernels.xp.asarray
    a, b = words(rng, 2, 5, 70), words(rng, 3, 4, 70)
    a_basis, b_basis = rng.standard_normal(2).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    got = kernels.bitplane_matmul(on(a), on(b), 70, on(a_basis), on(b_basis), codes)
    same(got, reference.bitplane_matmul(a, b, 70, a_basis, b_basis, codes))
    x, w = words(rng, 2, 1, 4, 5, 20), words(rng, 3, 4, 3, 3, 20)
    window = ((1, 1), (1, 1), (1, 1), 1)
    got = kernels.bitplane_conv2d(on(x), on(w), 20, on(a_basis), on(b_basis), codes, *window)
    same(got, reference.bitplane_conv2d(x, w, 20, a_basis, b_basis, codes, *window))


def check_signed_sums(kernels: Kernels) -> None:
    rng = generator(5)
    x = rng.integers(-100, 100, (3, 70)).astype(np.float32)  # integers: sums are exact in any order
    w = words(rng, 5, 70)
    on = kernels.xp.asarray
    same(kernels.signed_sum_matmul(on(x), on(w)), reference.signed_sum_matmul(x, w))
