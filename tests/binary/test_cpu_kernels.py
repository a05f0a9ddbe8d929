"""The CPU kernels give the reference's integers, bit for bit, over odd sizes; the reference itself agrees with torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.binary.kernels import cpu, reference
from qlab.errors import InputError
from tests.binary.words import INT32, random, signs, thresholds

LENGTHS = (1, 3, 63, 64, 65, 127, 577, 4608)
ROWS = (1, 3, 4, 5, 129)


class Case(NamedTuple):
    """A convolution."""

    channels: int
    out: int
    kernel: tuple[int, int]
    image: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def window(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def each(self) -> int:
        return self.channels // self.groups


CASES = {
    "plain": Case(64, 64, (3, 3), (7, 9)),
    "odd-channels-and-stride": Case(70, 21, (3, 3), (8, 5), stride=(2, 1), padding=(1, 2)),
    "1x1": Case(3, 17, (1, 1), (5, 4), padding=(0, 0)),
    "dilation": Case(130, 5, (3, 2), (9, 8), stride=(2, 3), padding=(2, 1), dilation=(2, 3)),
    "groups-of-words": Case(128, 32, (3, 3), (6, 6), groups=2),
    "groups-with-odd-outputs": Case(192, 15, (3, 3), (5, 5), stride=(2, 2), groups=3),
    "groups-that-straddle-words": Case(12, 24, (3, 3), (6, 5), groups=3),
    "joined-taps": Case(16, 20, (3, 3), (8, 7), stride=(2, 1), dilation=(1, 2)),
    "joined-taps-in-two-words": Case(32, 33, (3, 3), (6, 5), padding=(2, 1)),
    "joined-taps-of-an-image": Case(3, 16, (7, 7), (17, 18), stride=(2, 2), padding=(3, 3)),
    "depthwise": Case(66, 66, (3, 3), (4, 4), groups=66),
    "kernel-larger-than-image": Case(65, 130, (5, 5), (3, 3), padding=(2, 2)),
}
convolutions = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def operands(case: Case) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """A generator, and the words of two images and of the weights."""
    rng = random()
    return rng, signs(rng, 2, *case.image, case.channels), signs(rng, case.out, *case.kernel, case.each)


# ---- products


@pytest.mark.parametrize("k", LENGTHS)
def test_products_are_exact_for_every_length_and_odd_sizes(k: int) -> None:
    rng = random(k)
    for m in ROWS:
        for n in ROWS:
            a, b = signs(rng, m, k), signs(rng, n, k)
            expected = reference.binary_matmul(a, b, k)
            np.testing.assert_array_equal(cpu.binary_matmul(a, b, k), expected)
            threshold, flip = thresholds(rng, n, k)
            np.testing.assert_array_equal(
                cpu.matmul_threshold(a, cpu.prepack(b), k, threshold, flip),
                reference.threshold_pack(expected, threshold, flip),
            )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_products_are_exact_for_any_shape(m: int, n: int, k: int, seed: int) -> None:
    rng = random(seed)
    a, b = signs(rng, m, k), signs(rng, n, k)
    np.testing.assert_array_equal(cpu.binary_matmul(a, b, k), reference.binary_matmul(a, b, k))
    np.testing.assert_array_equal(cpu.digits_matmul(a, b), reference.digits_matmul(a, b))


def test_a_product_larger_than_its_tables_is_exact() -> None:
    rng = random()
    a, b = signs(rng, 2500, 65), signs(rng, 20, 65)
    np.testing.assert_array_equal(cpu.binary_matmul(a, b, 65), reference.binary_matmul(a, b, 65))


@pytest.mark.parametrize("fused", [False, True])
def test_affine_products_round_as_the_reference_does(fused: bool) -> None:
    rng = random()
    for m, n, k in ((5, 37, 577), (1, 16, 64), (129, 130, 65)):
        a, b = signs(rng, m, k), signs(rng, n, k)
        alpha, beta = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
        residual = rng.standard_normal((m, n)).astype(np.float32)
        y = reference.affine(reference.binary_matmul(a, b, k), alpha, beta, fused)
        np.testing.assert_array_equal(cpu.matmul_affine(a, b, k, alpha, beta, fused), y)
        total, words = cpu.matmul_affine(a, b, k, alpha, beta, fused, residual, also_pack=True)
        np.testing.assert_array_equal(total, y + residual)
        np.testing.assert_array_equal(words, reference.pack(y + residual))


def test_rounding_once_differs_from_rounding_twice() -> None:
    """So that the two cases above are two."""
    rng = random()
    a, b = signs(rng, 20, 577), signs(rng, 40, 577)
    alpha, beta = (rng.standard_normal(40).astype(np.float32) for _ in range(2))
    once, twice = (cpu.matmul_affine(a, b, 577, alpha, beta, fused) for fused in (True, False))
    assert (once != twice).any()
    np.testing.assert_allclose(once, twice, rtol=0, atol=1e-4)


# ---- convolutions


@pytest.mark.parametrize("pad", ["zero", "one"])
@convolutions
def test_convolutions_are_exact(pad: Any, case: Case) -> None:
    rng, x, w = operands(case)
    window, channels, out = case.window, case.channels, case.out
    expected = reference.binary_conv2d(x, w, channels, **window, pad=pad)
    np.testing.assert_array_equal(cpu.binary_conv2d(x, w, channels, **window, pad=pad), expected)
    threshold, flip = thresholds(rng, out, w.shape[1] * w.shape[2] * case.each)
    panels = cpu.prepack_conv(w, case.groups, channels)
    dirty = np.full((*expected.shape[:3], reference.words_for(out)), 2**64 - 1, np.uint64)
    np.testing.assert_array_equal(
        cpu.conv2d_threshold(x, panels, channels, threshold, flip, **window, pad=pad, out=dirty),
        reference.threshold_pack(expected, threshold, flip),
    )
    alpha, beta = (rng.standard_normal(out).astype(np.float32) for _ in range(2))
    residual = rng.standard_normal(expected.shape).astype(np.float32)
    for fused in (False, True):
        y = reference.affine(expected, alpha, beta, fused) + residual
        got, words = cpu.conv2d_affine(
            x, panels, channels, alpha, beta, fused, **window, pad=pad, residual=residual, also_pack=True
        )
        np.testing.assert_array_equal(got, y)
        np.testing.assert_array_equal(words, reference.pack(y))


@convolutions
def test_convolutions_of_digits_are_exact(case: Case) -> None:
    rng, _, w = operands(case)
    window = case.window
    image = rng.integers(0, 256, (2, *case.image, case.channels), dtype=np.uint8)
    planes = cpu.bitplane_input(image)
    np.testing.assert_array_equal(planes, reference.bitplane_input(image))
    z = cpu.digits_conv2d(planes, w, case.channels, **window)
    np.testing.assert_array_equal(z, reference.digits_conv2d(planes, w, case.channels, **window))
    weights = torch.from_numpy(reference.unpack(w, case.each)).double().permute(0, 3, 1, 2)
    pixels = torch.from_numpy(image).double().permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(pixels, weights, **window).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(z, expected.numpy())


@convolutions
def test_the_reference_is_torchs_convolution(case: Case) -> None:
    _, x, w = operands(case)
    window = case.window
    image = torch.from_numpy(reference.unpack(x, case.channels)).double().permute(0, 3, 1, 2)
    weights = torch.from_numpy(reference.unpack(w, case.each)).double().permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(image, weights, **window).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(reference.binary_conv2d(x, w, case.channels, **window), expected)
    top, side = case.padding
    bordered = torch.nn.functional.pad(image, (side, side, top, top), value=1.0)
    expected = torch.nn.functional.conv2d(bordered, weights, **window | {"padding": 0}).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(reference.binary_conv2d(x, w, case.channels, **window, pad="one"), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions_are_exact_for_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    each = draw(st.sampled_from((1, 5, 16, 20, 32, 64, 65, 128)))
    kernel, stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 3), (1, 3), (0, 3), (1, 2))
    )
    image = tuple(draw(st.integers(max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]), 9)) for i in (0, 1))
    rng = random(draw(st.integers(0, 2**32 - 1)))
    x = signs(rng, draw(st.integers(1, 2)), *image, each * groups)
    w = signs(rng, groups * draw(st.integers(1, 20)), *kernel, each)
    pad: Any = draw(st.sampled_from(("zero", "one")))
    arguments = (each * groups, stride, padding, dilation, groups, pad)
    expected = reference.binary_conv2d(x, w, *arguments)
    np.testing.assert_array_equal(cpu.binary_conv2d(x, w, *arguments), expected)
    np.testing.assert_array_equal(cpu.binary_conv2d(x, cpu.prepack_conv(w, groups), *arguments), expected)


@pytest.mark.parametrize("codes", ["digits", "signs"])
def test_few_bit_products_and_convolutions_equal_the_reference(codes: Any) -> None:
    rng = random()
    a, b = np.stack([signs(rng, 5, 70) for _ in range(2)]), np.stack([signs(rng, 9, 70) for _ in range(3)])
    for basis in (rng.standard_normal(3), rng.standard_normal((3, 9))):
        arguments = (70, rng.standard_normal(2).astype(np.float32), basis.astype(np.float32), codes)
        np.testing.assert_array_equal(
            cpu.bitplane_matmul(a, b, *arguments), reference.bitplane_matmul(a, b, *arguments)
        )
    x, w = np.stack([signs(rng, 1, 5, 6, 70)] * 2), np.stack([signs(rng, 9, 3, 3, 70) for _ in range(3)])
    bases = (rng.standard_normal(2).astype(np.float32), rng.standard_normal((3, 9)).astype(np.float32))
    geometry = (70, *bases, codes, (2, 1), (1, 1))
    np.testing.assert_array_equal(cpu.bitplane_conv2d(x, w, *geometry), reference.bitplane_conv2d(x, w, *geometry))


# ---- the edges


@pytest.mark.parametrize("channels", [1, 15, 16, 64, 65, 130])
@pytest.mark.parametrize("fused", [False, True])
def test_packing_floats_equals_the_reference_in_both_layouts(channels: int, fused: bool) -> None:
    rng = random(channels)
    alpha, beta = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    for image in ((3, 5), (4, 4), (9, 11), (1, 1)):
        x = rng.standard_normal((2, channels, *image)).astype(np.float32)
        x[rng.random(x.shape) < 0.2] = 0.0
        x[rng.random(x.shape) < 0.2] = -0.0
        last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        expected = reference.affine_pack(last, alpha, beta, fused)
        np.testing.assert_array_equal(cpu.affine_pack(x, alpha, beta, fused, layout="NCHW"), expected)
        np.testing.assert_array_equal(cpu.affine_pack(last, alpha, beta, fused), expected)
        for axis in (-1, 0, 1, 2):
            np.testing.assert_array_equal(cpu.pack(x, axis), reference.pack(x, axis))
        np.testing.assert_array_equal(cpu.unpack(cpu.pack(x, 1), channels, 1), np.where(x < 0, -1, 1))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_is_reported_when_packed(layout: Any) -> None:
    x = np.ones((1, 20, 5, 20), np.float32)
    x[0, 19, 4, 19] = np.nan
    ones = np.ones(20, np.float32)
    with pytest.raises(InputError, match="NaN"):
        cpu.affine_pack(x, ones, ones, True, layout=layout)
    with pytest.raises(InputError, match="NaN"):
        cpu.pack(x.astype(np.float64))
    with pytest.raises(InputError, match="NaN"):
        cpu.pack(x, axis=1)


@pytest.mark.parametrize("channels", [1, 16, 37, 64, 200])
def test_thresholds_of_extreme_values_equal_the_reference(channels: int) -> None:
    rng = random(channels)
    z = rng.integers(-60, 60, (3, 50, channels)).astype(np.int32)
    z[0, 0], z[0, 1] = INT32.min, INT32.max
    threshold, flip = thresholds(rng, channels, 60)
    np.testing.assert_array_equal(cpu.threshold_pack(z, threshold, flip), reference.threshold_pack(z, threshold, flip))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0))]
)
def test_pooling_equals_the_reference(kernel: Any, stride: Any, padding: Any) -> None:
    x = signs(random(), 3, 9, 10, 130)
    got = cpu.max_pool2d(x, kernel, stride, padding)
    np.testing.assert_array_equal(got, reference.max_pool2d(x, kernel, stride, padding))
    image = torch.from_numpy(reference.unpack(x, 130)).float().permute(0, 3, 1, 2)
    expected = torch.nn.functional.max_pool2d(image, kernel, stride, padding).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(reference.unpack(got, 130), expected.numpy())


def in_order(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The documented order of `signed_sum_matmul`, one float32 addition at a time."""
    total = np.zeros((len(x), len(w)), np.float32)
    weights = reference.unpack(w, x.shape[1]).astype(np.float32)
    for begin in range(0, x.shape[1], 64):
        part = np.zeros_like(total)
        for k in range(begin, min(begin + 64, x.shape[1])):
            part += x[:, k, None] * weights[None, :, k]
        total += part
    return total


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 200, 577), (5, 63, 64), (4, 65, 130), (9, 16, 100)])
def test_sums_by_signs_keep_their_order_and_come_close_to_the_exact_ones(m: int, n: int, k: int) -> None:
    rng = random(k)
    x, w = rng.standard_normal((m, k)).astype(np.float32), signs(rng, n, k)
    got = cpu.signed_sum_matmul(x, cpu.prepack_signs(w, k))
    np.testing.assert_array_equal(got, in_order(x, w))
    np.testing.assert_array_equal(cpu.signed_sum_matmul(x, w), got)
    steps = 64 + k / 64
    bound = steps * np.finfo(np.float32).eps * np.abs(x).sum(1, dtype=np.float64)
    assert (np.abs(got - reference.signed_sum_matmul(x, w)) <= bound[:, None]).all()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (1, 1, 0)])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 65, 12, 4), (1, 1, 3, 3)])
def test_max_pool_of_floats_is_torchs_and_its_minimum_where_asked(
    shape: tuple[int, ...], kernel: int, stride: int, padding: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1, 1] = float("nan")
    x[0, 0, 2, 2] = -float("inf")
    signs = torch.where(torch.arange(shape[1]) % 2 == 1, -1.0, 1.0)
    window = ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    y = cpu.float_max_pool2d(x.numpy(), *window)
    z = cpu.float_max_pool2d(x.numpy(), *window, signs.numpy())
    flipped = signs.view(1, -1, 1, 1)
    assert np.array_equal(y, F.max_pool2d(x, kernel, stride, padding).numpy(), equal_nan=True)
    assert np.array_equal(z, (flipped * F.max_pool2d(flipped * x, kernel, stride, padding)).numpy(), equal_nan=True)
