"""The edges of a packed net on the CPU: floats to bits and back, thresholds, pooling, bit planes, sums by signs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from qlab.binary.kernels import reference
from qlab.binary.kernels.cpu_launch import address, launch, new_block
from qlab.binary.kernels.cpu_panels import Panels, as_words
from qlab.binary.kernels.reference import Floats, Ints, Pair, Words, output_size, words_for
from qlab.errors import InputError

__all__ = [
    "SignMasks",
    "affine_pack",
    "as_array",
    "bitplane_input",
    "float_max_pool2d",
    "max_pool2d",
    "pack",
    "prepack_signs",
    "result",
    "signed_sum_matmul",
    "threshold_pack",
    "unpack",
    "with_border",
]

RUN = 64  # rows or pixels of a chunk
NUMBER, WORD = 2e-10, 1e-9  # seconds that a thread takes for a number, a word; roughly


def as_array(x: Any, dtype: Any, shape: tuple[int | None, ...], what: str) -> Any:
    """Return x as a contiguous array, copied only where it is not.

    Raises:
        InputError: not a numpy array of that type and shape (None stands for any length).
    """
    fits = isinstance(x, np.ndarray) and x.dtype == dtype and x.ndim == len(shape)
    if fits and x.shape == shape and x.flags.c_contiguous:
        return x
    if not fits or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        found = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{what} is {found}; expected a numpy array of {np.dtype(dtype)} of shape ({wanted})")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def result(out: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return `out`, or a new array where it is None.

    Raises:
        InputError: `out` is not contiguous or of another shape or type.
    """
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise InputError(f"out is {out.dtype} of shape {out.shape}; expected contiguous {np.dtype(dtype)} of {shape}")
    return out


def pack(x: np.ndarray, axis: int = -1) -> Words:
    """Return the words of the signs of x along `axis`: bit 1 where x < 0; float32 is the fast case.

    Raises:
        InputError: NaN, which has no sign; an axis out of range.
    """
    if not -x.ndim <= axis < x.ndim:
        raise InputError(f"axis is {axis}; expected one of the {x.ndim} dimensions of x")
    if x.dtype != np.float32:
        if np.issubdtype(x.dtype, np.floating) and np.isnan(x).any():
            raise InputError("x holds NaN, which has no sign")
        return reference.pack(x, axis)
    axis %= x.ndim
    if axis == 1 and x.ndim == 4:
        return np.moveaxis(_pack(x, None, None, 0, "NCHW"), -1, 1)
    return np.moveaxis(_pack(np.moveaxis(x, axis, -1), None, None, 0, "NHWC"), -1, axis)


def unpack(words: Words, length: int, axis: int = -1) -> np.ndarray:
    """Return the signs +-1 (int8) that `pack` took, `length` of them along `axis`."""
    return reference.unpack(words, length, axis)


def affine_pack(
    x: Floats,
    alpha: Floats | None = None,
    beta: Floats | None = None,
    fused: bool = False,
    layout: Literal["NHWC", "NCHW"] = "NHWC",
    out: Words | None = None,
) -> Words:
    """Return the words (N, ..., W(C)), channels last, of the signs of x alpha + beta: batch norm and sign of floats.

    Args:
        x: float32, channels last, (..., C); or (N, C, H, W) with `layout` "NCHW".
        alpha, beta: float32 (C,); without them, the signs of x itself.
        fused: rounded once (FMA) or after each operation, as in `reference.affine`.
        layout: of x.
        out: takes the result.

    Raises:
        InputError: wrong shapes or types; the result holds NaN.
    """
    if alpha is None or beta is None:
        return _pack(x, None, None, 0, layout, out)
    channels = x.shape[1 if layout == "NCHW" else -1]
    alpha, beta = (as_array(v, np.float32, (channels,), name) for v, name in ((alpha, "alpha"), (beta, "beta")))
    return _pack(x, alpha, beta, 2 if fused else 1, layout, out)


def _pack(
    x: Floats, alpha: Floats | None, beta: Floats | None, mode: int, layout: str, out: Words | None = None
) -> Words:
    dimensions = (None,) * (4 if layout == "NCHW" else x.ndim)
    if layout == "NCHW" and x.ndim == 4:
        channels_last = x.transpose(0, 2, 3, 1)
        if channels_last.flags.c_contiguous or x.shape[2] * x.shape[3] < 16:
            return _pack(np.ascontiguousarray(channels_last), alpha, beta, mode, "NHWC", out)
    x = as_array(x, np.float32, dimensions, "x")
    channels = x.shape[1 if layout == "NCHW" else -1]
    outer = (x.shape[0], *x.shape[2:]) if layout == "NCHW" else x.shape[:-1]
    out = result(out, (*outer, words_for(channels)), np.uint64)
    if not out.size:
        return out
    numbers = [0 if v is None else address(v) for v in (alpha, beta)]
    if layout == "NCHW":
        size, name = x.shape[2] * x.shape[3], "pack_planes"
        count, chunks = x.shape[0], x.shape[0] * -(-size // RUN)
    else:
        size, name = RUN, "pack_rows"
        count = x.size // channels
        chunks = -(-count // RUN)
    block = new_block((address(x), count, channels, *numbers, mode, address(out), size, 0))
    launch(name, block, chunks, x.size * NUMBER)
    if block[8]:
        raise InputError("there is NaN, which has no sign, among the numbers to be packed")
    return out


def threshold_pack(z: Ints, threshold: Ints, flip: Words, out: Words | None = None) -> Words:
    """Return the words (..., W(C)) of z (..., C): bit c is (z_c < threshold_c) xor flip_c.

    Args:
        z: int32; threshold: int32 (C,); flip: words (W(C),); out: takes the result.
    """
    channels = z.shape[-1]
    z = as_array(z, np.int32, (None,) * z.ndim, "z")
    threshold = as_array(threshold, np.int32, (channels,), "threshold")
    flip = as_array(flip, np.uint64, (words_for(channels),), "flip")
    out = result(out, (*z.shape[:-1], len(flip)), np.uint64)
    if out.size:
        rows = z.size // channels
        block = new_block((address(z), rows, channels, address(threshold), address(flip), address(out), RUN))
        launch("threshold_rows", block, -(-rows // RUN), z.size * NUMBER)
    return out


def max_pool2d(x: Words, kernel: Pair, stride: Pair, padding: Pair = (0, 0), out: Words | None = None) -> Words:
    """Return the packed maximum (N, OH, OW, W) of x (N, H, W, W) over windows: AND of the bits; padding is ignored.

    Raises:
        InputError: the padding is more than half of the window, so that a window could be empty; no window fits.
    """
    x = as_words(x, 4, "x")
    n, height, width, words = x.shape
    size = tuple(output_size(x.shape[i + 1], kernel[i], stride[i], padding[i]) for i in (0, 1))
    if min(size) < 1 or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise InputError(
            f"pooling windows {kernel}, padding {padding} on {height} x {width}: none fits, or one is empty"
        )
    out = result(out, (n, *size, words), np.uint64)
    if out.size:
        block = (address(x), n, height, width, words, *size, *kernel, *stride, *padding, address(out))
        launch("pool", new_block(block), n * size[0], out.size * kernel[0] * kernel[1] * WORD)
    return out


def float_max_pool2d(
    x: Floats, kernel: Pair, stride: Pair, padding: Pair = (0, 0), signs: Floats | None = None
) -> Floats:
    """Return the maximum (N, C, OH, OW) of float32 x (N, C, H, W) over windows, bit for bit as torch; padding is ignored.

    Args:
        x: float32.
        kernel, stride, padding: of the window; sizes are rounded down.
        signs: float32 (C,), +1 or -1; where it is -1, the minimum is taken.

    Raises:
        InputError: wrong types; no window fits, or one could be empty.
    """
    x = as_array(x, np.float32, (None,) * 4, "x")
    n, channels, height, width = x.shape
    size = tuple(output_size(x.shape[i + 2], kernel[i], stride[i], padding[i]) for i in (0, 1))
    if min(size) < 1 or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise InputError(f"windows {kernel}, padding {padding} on {height} x {width}: none fits, or one is empty")
    out = np.empty((n, channels, *size), np.float32)
    own = np.ones(channels, np.float32) if signs is None else as_array(signs, np.float32, (channels,), "signs")
    each, lines = np.tile(own, n), np.empty((n * channels, 2, width + 2 * padding[1]), np.float32)
    block = (address(x), n * channels, height, width, *size, *kernel, *stride, *padding)
    launch(
        "float_pool", new_block((*block, address(each), address(lines), address(out))), n * channels, x.size * NUMBER
    )
    return out


def with_border(x: Words, padding: Pair, panels: Panels, step: int) -> Words:
    """Return the memory of x (..., H, W, words) with a border of zero words, its rows as `panels.line` says.

    Args:
        x: words.
        padding: pixels above and below, left and right.
        panels: `joined` pixels, `step` apart, share a word, and `second` pixels another one.
        step: dilation of the kernel's columns.
    """
    key = ("border", x.shape, padding, step)
    plan = panels.plans.get(key)
    if plan is None:
        plan = panels.plans[key] = _border_plan(x.shape, padding, panels, step)
    template, size, chunks, seconds = plan
    out = np.empty(size, np.uint64)
    if chunks:
        block = type(template).from_buffer_copy(template)
        block[0], block[6] = address(x), address(out)
        launch("border", block, chunks, seconds)
    return out


def _border_plan(shape: tuple[int, ...], padding: Pair, panels: Panels, step: int) -> tuple[Any, int, int, float]:
    """Return the block without its addresses, the words of the result, the chunks, and the seconds one thread takes."""
    *outer, height, width, words = shape
    images, rows, columns = prod(outer), height + 2 * padding[0], width + 2 * padding[1]
    line = panels.line(columns, words)
    slack = panels.joined * step + 8 if panels.joined > 1 else 0  # the last pixels' neighbours are read, never used
    size = images * rows * line.size // 8 + slack
    before = (images, height, width * words, padding[0], padding[1] * words)
    join = (panels.joined, panels.second, step, panels.channels, line.word)
    run = max(1, 1024 // columns)
    block = new_block((0, *before, 0, rows, columns * words, line.size, *join, run))
    return block, size, -(-images * rows // run), size * panels.joined * NUMBER


def bitplane_input(x: np.ndarray, out: Words | None = None) -> Words:
    """Return the bit planes (8, ..., W(C)) of uint8 x (..., C): plane n, bit c is the n-th binary digit of x_c."""
    x = as_array(x, np.uint8, (None,) * x.ndim, "x")
    channels = x.shape[-1]
    out = result(out, (8, *x.shape[:-1], words_for(channels)), np.uint64)
    if out.size:
        rows = x.size // channels
        block = new_block((address(x), rows, channels, address(out), RUN))
        launch("digits", block, -(-rows // RUN), x.size * WORD)
    return out


@dataclass(frozen=True, eq=False)
class SignMasks:
    """Weights of `signed_sum_matmul`: masks (W(N), K), bit c of word (p, k) is the sign of weight k of output 64 p + c."""

    array: Words
    n: int


def prepack_signs(w: Words, k: int) -> SignMasks:
    """Return the masks of a weight-only binary layer, w words (N, W(K))."""
    w = as_words(w, 2, "w")
    masks = reference._from_bits(reference._to_bits(w, k).T)  # (K, W(N))
    return SignMasks(np.ascontiguousarray(masks.T), len(w))


def signed_sum_matmul(x: Floats, w: Words | SignMasks, out: Floats | None = None) -> Floats:
    """Return x (M, K) times signs as (M, N) in float32: a weight-only binary layer, whose weights are read as bits.

    The order of summation is fixed: the 64 terms +-x_k of a word one after the other, then the sums of the words one after the
    other. A product with one row reads 1/32 of the bytes that a float32 one reads.

    Args:
        x: float32 (M, K).
        w: words (N, W(K)), or masks of `prepack_signs`.
        out: takes the result.
    """
    x = as_array(x, np.float32, (None, None), "x")
    rows, k = x.shape
    masks = w if isinstance(w, SignMasks) else prepack_signs(w, k)
    if masks.array.shape[1] != k:
        raise InputError(f"x has {k} columns and the weights {masks.array.shape[1]}; expected the same")
    out = result(out, (rows, masks.n), np.float32)
    if out.size:
        block = new_block((address(x), rows, k, address(masks.array), masks.n, address(out)))
        launch("signed_sums", block, len(masks.array), rows * k * masks.n * NUMBER / 10)
    return out
