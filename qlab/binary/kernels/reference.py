"""What every kernel means, in plain numpy: slow, exact, and short enough to be believed.

Notation: a word is a uint64; W(K) = ceil(K / 64); bit 1 means -1, bit 0 means +1, bit i of word j is element 64 j + i, and
the bits past K are 0. A dot product of K signs is

    a . b = K - 2 popcount(a xor b)

Activations are channels-last: (N, H, W, W(C)). Weights of a convolution: (O, kh, kw, W(C / groups)), of a linear layer:
(O, W(K)). Every backend has these functions with these arguments and returns these integers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "affine",
    "affine_pack",
    "binary_conv2d",
    "binary_matmul",
    "bitplane_conv2d",
    "bitplane_input",
    "bitplane_matmul",
    "digits_conv2d",
    "digits_matmul",
    "max_pool2d",
    "output_size",
    "pack",
    "signed_sum_matmul",
    "threshold_pack",
    "unpack",
    "words_for",
]

Words = NDArray[np.uint64]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Pair = tuple[int, int]
Codes = Literal["signs", "digits"]

WORD = 64


def words_for(length: int) -> int:
    """Return W(K) = ceil(K / 64)."""
    return -(-length // WORD)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Return the number of positions of a window along one side."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pack(x: NDArray, axis: int = -1) -> Words:
    """Return the words of the signs of x along `axis`: bit 1 where x < 0."""
    bits = np.moveaxis(np.asarray(x) < 0, axis, -1)
    return np.moveaxis(_from_bits(bits), -1, axis)


def _from_bits(bits: NDArray[np.bool_]) -> Words:
    """Return words (..., W(K)) of bits (..., K)."""
    length = bits.shape[-1]
    padded = np.zeros((*bits.shape[:-1], words_for(length) * WORD), bool)
    padded[..., :length] = bits
    data = np.packbits(padded, axis=-1, bitorder="little")
    return np.ascontiguousarray(data).view("<u8").astype(np.uint64)


def _to_bits(words: Words, length: int) -> NDArray[np.bool_]:
    data = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    return np.unpackbits(data, axis=-1, count=length, bitorder="little").astype(bool)


def unpack(words: Words, length: int, axis: int = -1) -> NDArray[np.int8]:
    """Return the signs +-1 that `pack` took, `length` of them along `axis`."""
    bits = _to_bits(np.moveaxis(np.asarray(words), axis, -1), length)
    return np.moveaxis((1 - 2 * bits.astype(np.int8)).astype(np.int8), -1, axis)


def binary_matmul(a: Words, b: Words, k: int) -> Ints:
    """Return the (M, N) products of K signs: rows of a (M, W) with rows of b (N, W)."""
    differing = np.bitwise_count(a[:, None, :] ^ b[None, :, :]).sum(-1, dtype=np.int64)
    return (k - 2 * differing).astype(np.int32)


def _windows(
    shape: tuple[int, int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[int, int, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield, per tap (i, j): i, j, the input rows (OH,), the input columns (OW,) and which of (OH, OW) lie inside."""
    rows = np.arange(output_size(shape[0], kernel[0], stride[0], padding[0], dilation[0])) * stride[0] - padding[0]
    columns = np.arange(output_size(shape[1], kernel[1], stride[1], padding[1], dilation[1])) * stride[1] - padding[1]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            r, c = rows + i * dilation[0], columns + j * dilation[1]
            inside = ((r >= 0) & (r < shape[0]))[:, None] & ((c >= 0) & (c < shape[1]))[None, :]
            yield i, j, r.clip(0, shape[0] - 1), c.clip(0, shape[1] - 1), inside


def binary_conv2d(
    x: Words,
    w: Words,
    channels: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    pad: Literal["zero", "one"] = "zero",
) -> Ints:
    """Return the convolution (N, OH, OW, O) of signs x (N, H, W, W(C)) with signs w (O, kh, kw, W(C / groups)).

    Args:
        x: packed over all C channels, whatever `groups`.
        w: packed over the C / groups channels that an output channel sees.
        channels: C.
        stride, padding, dilation, groups: as in torch.
        pad: what stands outside the image: "zero" (a tap there counts nothing, as in a float net) or "one" (+1).
    """
    signs = unpack(x, channels).astype(np.int32)
    weights = unpack(w, channels // groups).astype(np.int32)
    return _convolve(signs, weights, stride, padding, dilation, groups, outside=0 if pad == "zero" else 1)


def _convolve(
    x: NDArray[np.int32],
    w: NDArray[np.int32],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    outside: int,
) -> Ints:
    """Return the integer convolution (N, OH, OW, O) of x (N, H, W, C) with w (O, kh, kw, C / groups)."""
    n, height, width, _ = x.shape
    out, kh, kw, each = w.shape
    x = x.reshape(n, height, width, groups, each)
    w = w.reshape(groups, out // groups, kh, kw, each)
    oh = output_size(height, kh, stride[0], padding[0], dilation[0])
    ow = output_size(width, kw, stride[1], padding[1], dilation[1])
    z = np.zeros((n, oh, ow, groups, out // groups), np.int64)
    for i, j, rows, columns, inside in _windows((height, width), (kh, kw), stride, padding, dilation):
        tap = x[:, rows[:, None], columns[None, :]]
        tap = np.where(inside[None, :, :, None, None], tap, outside)
        z += np.einsum("nhwgc,goc->nhwgo", tap, w[:, :, i, j], optimize=True)
    return z.reshape(n, oh, ow, out).astype(np.int32)


def threshold_pack(z: Ints, threshold: Ints, flip: Words) -> Words:
    """Return the words (..., W(C)) of z (..., C): bit c is (z_c < threshold_c) xor flip_c.

    Batch norm and sign, as one comparison of integers: `flip` (W(C),) is set where the scale is negative; the smallest
    int32 as a threshold makes a channel constant.
    """
    return _from_bits(np.asarray(z) < threshold) ^ flip


def max_pool2d(x: Words, kernel: Pair, stride: Pair, padding: Pair = (0, 0)) -> Words:
    """Return the packed maximum (N, OH, OW, W) over windows: -1 only where all are -1, so AND; padding is ignored."""
    n, height, width, w = x.shape
    oh = output_size(height, kernel[0], stride[0], padding[0])
    ow = output_size(width, kernel[1], stride[1], padding[1])
    y = np.full((n, oh, ow, w), np.iinfo(np.uint64).max, np.uint64)
    for _, _, rows, columns, inside in _windows((height, width), kernel, stride, padding, (1, 1)):
        tap = x[:, rows[:, None], columns[None, :]]
        y &= np.where(inside[None, :, :, None], tap, np.iinfo(np.uint64).max)
    return y


def affine(z: NDArray, alpha: Floats, beta: Floats, fused: bool) -> Floats:
    """Return z (..., C) times alpha (C,) plus beta (C,) in float32: rounded once if `fused` (FMA), else after each step.

    What batch norm in eval mode computes. z are integers below 2^24 or float32.
    """
    z = np.asarray(z, np.float32)
    if not fused:
        return z * alpha + beta
    return fma(z, alpha, beta)


def fma(x: Floats, y: Floats, z: Floats) -> Floats:
    """Return x y + z rounded once to float32.

    The product is exact in float64; the sum there is rounded to odd (Boldo and Melquiond 2008), so that rounding it to
    float32 afterwards is the same as rounding once.
    """
    with np.errstate(invalid="ignore"):  # infinities: inf - inf
        product = x.astype(np.float64) * y.astype(np.float64)
        addend = np.asarray(z, np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)  # TwoSum: total + error is the exact sum
    bits = np.array(total, ndmin=1).view(np.int64)
    error = np.broadcast_to(np.atleast_1d(error), bits.shape)
    inexact = (error != 0) & np.isfinite(error) & ((bits & 1) == 0)
    toward_zero = (error > 0) != (np.atleast_1d(total) > 0)
    odd = np.where(inexact, np.where(toward_zero, bits - 1, bits + 1), bits)
    with np.errstate(over="ignore"):
        return odd.view(np.float64).reshape(np.shape(total)).astype(np.float32)


def affine_pack(x: Floats, alpha: Floats, beta: Floats, fused: bool) -> Words:
    """Return the words (..., W(C)) of the signs of `affine(x, alpha, beta)`, x (..., C): batch norm and sign of floats."""
    return pack(affine(x, alpha, beta, fused))


def bitplane_input(x: NDArray[np.uint8]) -> Words:
    """Return the bit planes (8, ..., W(C)) of x (..., C): plane n, bit c is the n-th binary digit of x_c."""
    return np.stack([_from_bits(((x >> n) & 1).astype(bool)) for n in range(8)])


def digits_matmul(a: Words, b: Words) -> Ints:
    """Return the (M, N) products of binary digits a (M, W) in {0, 1} with signs b (N, W): popcount(a) - 2 popcount(a & b)."""
    own = np.bitwise_count(a).sum(-1, dtype=np.int64)
    common = np.bitwise_count(a[:, None, :] & b[None, :, :]).sum(-1, dtype=np.int64)
    return (own[:, None] - 2 * common).astype(np.int32)


def digits_conv2d(
    planes: Words,
    w: Words,
    channels: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Ints:
    """Return sum_n 2^n (plane_n * w), the convolution (N, OH, OW, O) of unsigned integers with signs.

    Args:
        planes: (P, N, H, W, W(C)), plane n the n-th binary digit; 8 planes for an 8-bit image.
        w: signs (O, kh, kw, W(C / groups)).
        channels, stride, padding, dilation, groups: as in `binary_conv2d`; the digit 0 pads exactly.
    """
    weights = unpack(w, channels // groups).astype(np.int32)
    total: NDArray = np.zeros((), np.int64)
    for n, plane in enumerate(planes):
        digits = _to_bits(plane, channels).astype(np.int32)
        total = total + (_convolve(digits, weights, stride, padding, dilation, groups, outside=0).astype(np.int64) << n)
    return total.astype(np.int32)


def bitplane_matmul(
    a: Words, b: Words, k: int, a_basis: Floats, b_basis: Floats, codes: Codes = "digits"
) -> NDArray[np.float64]:
    """Return the (M, N) products of few-bit vectors as sums of binary ones, exactly combined in float64.

        x = sum_j a_basis_j a_j,  w_n = sum_i b_basis_ni b_ni:   x . w_n = sum_ij a_basis_j b_basis_ni <a_j, b_ni>

    Args:
        a: planes (Ka, M, W): digits {0, 1}, or signs, by `codes`.
        b: planes (Kb, N, W), signs.
        k: K.
        a_basis: (Ka,).
        b_basis: (Kb,) or per row (Kb, N).
        codes: what the planes of `a` hold: "digits" (after a ReLU, zero padding exact) or "signs".

    Reference: Zhang, Yang, Ye, Hua, LQ-Nets, ECCV 2018, arXiv 1807.10029.
    """
    total = np.zeros((a.shape[1], b.shape[1]))
    for v, plane in zip(np.asarray(a_basis, np.float64), a, strict=True):
        for u, weights in zip(np.asarray(b_basis, np.float64), b, strict=True):
            z = digits_matmul(plane, weights) if codes == "digits" else binary_matmul(plane, weights, k)
            total += v * u * z
    return total


def bitplane_conv2d(
    x: Words,
    w: Words,
    channels: int,
    x_basis: Floats,
    w_basis: Floats,
    codes: Codes = "digits",
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> NDArray[np.float64]:
    """Return the convolution (N, OH, OW, O) of few-bit activations with few-bit weights; see `bitplane_matmul`.

    Args:
        x: planes (Ka, N, H, W, W(C)); w: planes (Kb, O, kh, kw, W(C / groups)), signs.
        x_basis: (Ka,); w_basis: (Kb,) or (Kb, O).
        channels, codes, stride, padding, dilation, groups: as above; positions outside the image count nothing.
    """
    window = (stride, padding, dilation, groups)
    total: NDArray[np.float64] = np.zeros((), np.float64)
    for v, plane in zip(np.asarray(x_basis, np.float64), x, strict=True):
        for u, weights in zip(np.asarray(w_basis, np.float64), w, strict=True):
            if codes == "digits":
                z = digits_conv2d(plane[None], weights, channels, *window)
            else:
                z = binary_conv2d(plane, weights, channels, *window)
            total = total + v * u * z
    return total


def signed_sum_matmul(x: Floats, w: Words) -> NDArray[np.float64]:
    """Return x (M, K) times signs w (N, W(K)) as (M, N) in float64: a weight-only binary layer, sums of +-x_k."""
    return np.asarray(x, np.float64) @ unpack(w, x.shape[1]).astype(np.float64).T


def as_words(x: ArrayLike) -> Words:
    """Return x as an array of uint64 words."""
    return np.ascontiguousarray(x, dtype=np.uint64)
