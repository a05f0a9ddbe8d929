"""The reference kernels, against torch's float convolutions and plain integer arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlab.binary.kernels import reference
from tests.binary.conftest import LENGTHS, SIDES, signs


@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (4, 129), (129, 3)])
def test_product_of_packed_signs_is_their_matrix_product(m: int, n: int, k: int) -> None:
    a, b = signs(m, k), signs(n, k, seed=3)
    z = reference.binary_matmul(reference.pack(a.numpy()), reference.pack(b.numpy()), k)
    assert np.array_equal(z, (a @ b.T).int().numpy())


CONVOLUTIONS = [
    # channels, outputs, side, kernel, stride, padding, dilation, groups
    (1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, 5, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (64, 4, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (65, 3, (4, 7), (1, 1), (2, 1), (0, 0), (1, 1), 1),
    (6, 4, (9, 8), (3, 2), (1, 2), (2, 1), (2, 3), 2),
    (128, 128, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 128),
    (130, 4, (5, 5), (5, 5), (1, 1), (4, 4), (1, 1), 2),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("pad", ["zero", "one"])
def test_packed_convolution_is_torchs_convolution_of_the_signs(case: tuple, pad: str) -> None:
    channels, outputs, side, kernel, stride, padding, dilation, groups = case
    x, w = signs(2, channels, *side), signs(outputs, channels // groups, *kernel, seed=3)
    z = reference.binary_conv2d(
        reference.pack(x.permute(0, 2, 3, 1).numpy()),
        reference.pack(w.permute(0, 2, 3, 1).numpy()),
        channels,
        stride,
        padding,
        dilation,
        groups,
        pad=pad,  # type: ignore[arg-type]
    )
    if pad == "one":
        x, padding = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=1.0), (0, 0)
    expected = F.conv2d(x, w, None, stride, padding, dilation, groups)
    assert np.array_equal(z, expected.permute(0, 2, 3, 1).int().numpy())


@pytest.mark.parametrize("side", SIDES)
def test_bit_planes_of_an_image_weigh_up_to_its_integers(side: int) -> None:
    g = torch.Generator().manual_seed(side)
    x = torch.randint(0, 256, (2, 3, side, side), generator=g, dtype=torch.uint8)
    w = signs(4, 3, 3, 3)
    planes = reference.bitplane_input(x.permute(0, 2, 3, 1).numpy())
    z = reference.digits_conv2d(planes, reference.pack(w.permute(0, 2, 3, 1).numpy()), 3, padding=(1, 1))
    expected = F.conv2d(x.double(), w.double(), padding=1)
    assert np.array_equal(z, expected.permute(0, 2, 3, 1).int().numpy())


def test_the_two_readings_of_bit_planes_agree() -> None:
    # u = 2 x / 255 - 1 in [-1, 1]: its product is the weighted sum of plain sign products, without any correction.
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (7, 77), generator=g).numpy().astype(np.uint8)
    w = reference.pack(signs(5, 77).numpy())
    planes = reference.bitplane_input(x)
    as_signs = sum((reference.binary_matmul(~p & _mask(77), w, 77).astype(np.int64) << n) for n, p in enumerate(planes))
    digits = sum((reference.digits_matmul(p, w).astype(np.int64) << n) for n, p in enumerate(planes))
    total = reference.unpack(w, 77).sum(1)
    assert np.array_equal(as_signs, 2 * digits - 255 * total)


def _mask(k: int) -> np.ndarray:
    return ~reference.pack(-np.ones(64 * reference.words_for(k))) | reference.pack(-np.ones(k))


@pytest.mark.parametrize("codes", ["digits", "signs"])
@pytest.mark.parametrize("k", [1, 64, 77])
def test_few_bit_products_are_sums_of_binary_ones(codes: str, k: int) -> None:
    rng = np.random.default_rng(k)
    v, u = rng.random(3), rng.random((2, 6))
    a = rng.integers(0, 2, (3, 4, k)) if codes == "digits" else rng.integers(0, 2, (3, 4, k)) * 2 - 1
    b = rng.integers(0, 2, (2, 6, k)) * 2 - 1
    z = reference.bitplane_matmul(
        reference.pack(-a if codes == "digits" else a),
        reference.pack(b),
        k,
        v,
        u,
        codes,  # type: ignore[arg-type]
    )
    x, w = np.einsum("j,jmk->mk", v, a), np.einsum("in,ink->nk", u, b)
    np.testing.assert_allclose(z, x @ w.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("codes", ["digits", "signs"])
def test_few_bit_convolution_pads_with_nothing(codes: str) -> None:
    rng = np.random.default_rng(0)
    v, u = rng.random(2), rng.random((2, 4))
    a = rng.integers(0, 2, (2, 1, 5, 5, 6)) if codes == "digits" else rng.integers(0, 2, (2, 1, 5, 5, 6)) * 2 - 1
    b = rng.integers(0, 2, (2, 4, 3, 3, 3)) * 2 - 1
    z = reference.bitplane_conv2d(
        reference.pack(-a if codes == "digits" else a),
        reference.pack(b),
        6,
        v,
        u,
        codes,
        (2, 1),
        (1, 1),
        (1, 1),
        2,  # type: ignore[arg-type]
    )
    x = torch.from_numpy(np.einsum("j,jnhwc->nchw", v, a))
    w = torch.from_numpy(np.einsum("io,iohwc->ochw", u, b))
    expected = F.conv2d(x, w, None, (2, 1), (1, 1), (1, 1), 2).permute(0, 2, 3, 1)
    np.testing.assert_allclose(z, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_packed_max_pool_is_torchs_max_pool_of_the_signs() -> None:
    for channels, side, kernel, stride, padding in [
        (3, 7, 2, 2, 0),
        (65, 6, 3, 2, 1),
        (64, 5, 3, 1, 1),
        (1, 1, 1, 1, 0),
    ]:
        x = signs(2, channels, side, side + 1)
        y = reference.max_pool2d(
            reference.pack(x.permute(0, 2, 3, 1).numpy()), (kernel,) * 2, (stride,) * 2, (padding,) * 2
        )
        expected = F.max_pool2d(x, kernel, stride, padding).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(reference.unpack(y, channels), expected)


def test_threshold_compares_flips_and_leaves_padding_bits_alone() -> None:
    z = np.array([[-2, 0, 2], [0, 0, 0]], np.int32)
    threshold = np.array([0, 1, np.iinfo(np.int32).min], np.int32)
    flip = reference.pack(np.array([1, -1, -1]))
    assert reference.threshold_pack(z, threshold, flip).tolist() == [[0b101], [0b100]]


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 400)).astype(np.float32)
    z = (-x * y * (1 + rng.choice([0.0, 1e-7, 1.0], 400))).astype(
        np.float32
    )  # cancellation, where rounding twice shows
    result = reference.fma(x, y, z)
    for i in range(400):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        error = abs(Fraction(float(result[i])) - exact)
        for direction in (-np.inf, np.inf):
            other = np.nextafter(result[i], np.float32(direction))
            assert error <= abs(Fraction(float(other)) - exact)
    assert (result != x * y + z).any()


def test_fma_passes_infinities_and_signed_zeros() -> None:
    x = np.array([np.inf, 0.0, -0.0, 1.0], np.float32)
    y = np.array([2.0, 3.0, 3.0, -0.0], np.float32)
    z = np.array([1.0, 0.0, -0.0, 0.0], np.float32)
    assert reference.fma(x, y, z).tolist() == [np.inf, 0.0, 0.0, 0.0]
