"""The kernels of `reference` on the CPU, compiled by Numba; and fused forms that a packed net is made of.

Weights may be raw words or the panels of `prepack` and `prepack_conv`: rearranging them takes longer than a small product,
and panels also keep the plan (tables, sizes) of every input shape that they have seen. `out` reuses a result's memory; it must
be contiguous and of the result's shape and type. Arrays are numpy's; what is not contiguous is copied. Results do not depend on the
number of threads, which is torch's (`torch.set_num_threads`).

Nothing is compiled at import; the first call does it, a second or two on a machine's first use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlab.binary.kernels.cpu_edges import (
    SignMasks,
    affine_pack,
    as_array,
    bitplane_input,
    float_max_pool2d,
    max_pool2d,
    pack,
    prepack_signs,
    result,
    signed_sum_matmul,
    threshold_pack,
    unpack,
    with_border,
)
from qlab.binary.kernels.cpu_launch import KERNELS, compile_kernel
from qlab.binary.kernels.cpu_panels import Panels, as_words, prepack, prepack_conv
from qlab.binary.kernels.cpu_plan import Pad, Plan, conv_plan, matmul_plan
from qlab.binary.kernels.reference import Codes, Floats, Ints, Pair, Words, affine, words_for
from qlab.errors import InputError

__all__ = [
    "Panels",
    "SignMasks",
    "affine",
    "affine_pack",
    "binary_conv2d",
    "binary_matmul",
    "bitplane_conv2d",
    "bitplane_input",
    "bitplane_matmul",
    "conv2d_affine",
    "conv2d_threshold",
    "digits_conv2d",
    "digits_matmul",
    "float_max_pool2d",
    "matmul_affine",
    "matmul_threshold",
    "max_pool2d",
    "pack",
    "prepack",
    "prepack_conv",
    "prepack_signs",
    "signed_sum_matmul",
    "threshold_pack",
    "unpack",
    "warm_up",
]

Doubles = np.ndarray[Any, np.dtype[np.float64]]
Weights = Words | Panels


def binary_matmul(a: Words, b: Weights, k: int, out: Ints | None = None) -> Ints:
    """Return the int32 (M, N) products of K signs: K - 2 popcount(a xor b).

    Args:
        a: words (M, W(K)).
        b: words (N, W(K)), or panels.
        k: K.
        out: takes the result.

    Raises:
        InputError: shapes or types do not fit.
    """
    a, plan = _matmul(a, b, k)
    out = result(out, (len(a), plan.panels.n), np.int32)
    plan.integers()(a, out)
    return out


def matmul_threshold(a: Words, b: Weights, k: int, threshold: Ints, flip: Words, out: Words | None = None) -> Words:
    """Return the words (M, W(N)) of `threshold_pack(binary_matmul(a, b, k), threshold, flip)`, in one pass."""
    a, plan = _matmul(a, b, k)
    return _signs(plan, a, threshold, flip, result(out, (len(a), words_for(plan.panels.n)), np.uint64))


def matmul_affine(
    a: Words,
    b: Weights,
    k: int,
    alpha: Floats,
    beta: Floats,
    fused: bool,
    residual: Floats | None = None,
    also_pack: bool = False,
    out: Floats | None = None,
) -> Any:
    """Return float32 (M, N): `affine(binary_matmul(a, b, k), alpha, beta, fused)`, plus `residual`; see `conv2d_affine`."""
    a, plan = _matmul(a, b, k)
    return _floats(plan, a, alpha, beta, fused, residual, also_pack, result(out, (len(a), plan.panels.n), np.float32))


def binary_conv2d(
    x: Words,
    w: Weights,
    channels: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    pad: Pad = "zero",
    out: Ints | None = None,
) -> Ints:
    """Return the int32 convolution (N, OH, OW, O) of signs with signs.

    Args:
        x: words (N, H, W, W(C)), packed over all C channels, whatever `groups`.
        w: words (O, kh, kw, W(C / groups)), or panels.
        channels: C.
        stride, padding, dilation, groups: as in torch. Where a group's channels do not fill whole words, x is packed
            anew per group, which is slow.
        pad: what stands outside the image: "zero" (a tap there counts nothing) or "one" (+1).
        out: takes the result.

    Raises:
        InputError: shapes or types do not fit.
    """
    x, plan, shape = _conv(x, w, channels, stride, padding, dilation, groups, pad)
    out = result(out, shape, np.int32)
    plan.integers()(x, out)
    return out


def conv2d_threshold(
    x: Words,
    w: Weights,
    channels: int,
    threshold: Ints,
    flip: Words,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    pad: Pad = "zero",
    out: Words | None = None,
) -> Words:
    """Return the words (N, OH, OW, W(O)) of `threshold_pack(binary_conv2d(...), threshold, flip)`, in one pass.

    The integers are compared in registers and never written: z < T is popcount > limit, with limits per channel and per
    kind of border. Arguments as in `binary_conv2d`; threshold int32 (O,), flip words (W(O),).
    """
    x, plan, shape = _conv(x, w, channels, stride, padding, dilation, groups, pad)
    return _signs(plan, x, threshold, flip, result(out, (*shape[:3], words_for(shape[3])), np.uint64))


def conv2d_affine(
    x: Words,
    w: Weights,
    channels: int,
    alpha: Floats,
    beta: Floats,
    fused: bool,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    pad: Pad = "zero",
    residual: Floats | None = None,
    also_pack: bool = False,
    out: Floats | None = None,
) -> Any:
    """Return float32 (N, OH, OW, O): y = z alpha + beta of the convolution z, then + residual; bit for bit as numpy.

    Args:
        alpha, beta: float32 (O,).
        fused: whether z alpha + beta is rounded once (FMA) or after each operation.
        residual: float32 like the result, not the same memory as `out`; its sum is rounded once more.
        also_pack: return (y, words (N, OH, OW, W(O)) of the signs of y).
        The rest as in `binary_conv2d`.
    """
    x, plan, shape = _conv(x, w, channels, stride, padding, dilation, groups, pad)
    return _floats(plan, x, alpha, beta, fused, residual, also_pack, result(out, shape, np.float32))


def digits_matmul(a: Words, b: Weights, out: Ints | None = None) -> Ints:
    """Return the int32 (M, N) products of binary digits a (M, W) in {0, 1} with signs b (N, W), words or panels."""
    a, plan = _matmul(a, b, None)
    out = result(out, (len(a), plan.panels.n), np.int32)
    plan.integers()(a, out)
    return out


def digits_conv2d(
    planes: Words,
    w: Weights,
    channels: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    out: Ints | None = None,
) -> Ints:
    """Return sum_n 2^n (plane_n * w), int32 (N, OH, OW, O): unsigned integers, as planes of digits, with signs.

    Args:
        planes: words (P, N, H, W, W(C)), plane n the n-th binary digit; see `bitplane_input`.
        The rest as in `binary_conv2d`; the digit 0 pads exactly.
    """
    x, plan, shape = _conv(planes, w, channels, stride, padding, dilation, groups, None)
    out = result(out, shape, np.int32)
    plan.integers()(x, out)
    return out


def bitplane_matmul(
    a: Words, b: Words | Sequence[Panels], k: int, a_basis: Floats, b_basis: Floats, codes: Codes = "digits"
) -> Doubles:
    """Return the float64 (M, N) products of few-bit vectors as sums of binary ones; see `reference.bitplane_matmul`."""
    a = as_words(a, 3, "a")
    total = np.zeros((a.shape[1], _outputs(b)))
    for v, plane in zip(np.asarray(a_basis, np.float64), a, strict=True):
        for u, weights in zip(np.asarray(b_basis, np.float64), b, strict=True):
            total += v * u * (digits_matmul(plane, weights) if codes == "digits" else binary_matmul(plane, weights, k))
    return total


def bitplane_conv2d(
    x: Words,
    w: Words | Sequence[Panels],
    channels: int,
    x_basis: Floats,
    w_basis: Floats,
    codes: Codes = "digits",
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Doubles:
    """Return the float64 convolution (N, OH, OW, O) of few-bit activations with few-bit weights; see `reference`."""
    x = as_words(x, 5, "x")
    window = (stride, padding, dilation, groups)
    total: Doubles = np.zeros((), np.float64)
    for v, plane in zip(np.asarray(x_basis, np.float64), x, strict=True):
        for u, weights in zip(np.asarray(w_basis, np.float64), w, strict=True):
            if codes == "digits":
                z = digits_conv2d(plane[None], weights, channels, *window)
            else:
                z = binary_conv2d(plane, weights, channels, *window)
            total = total + v * u * z
    return total


def warm_up() -> float:
    """Compile every kernel, or load it from the cache; return the seconds that took."""
    start = time.perf_counter()
    for name in KERNELS:
        compile_kernel(name)
    return time.perf_counter() - start


# ---- shapes, types, and layouts that the kernels do not know


def _outputs(weights: Any) -> int:
    first = weights[0]
    return first.n if isinstance(first, Panels) else len(first)


def _matmul(a: Words, b: Weights, k: int | None) -> tuple[Words, Plan]:
    a = as_words(a, 2, "a")
    panels = b if isinstance(b, Panels) else prepack(b)
    if panels.kernel is not None:
        raise InputError("b are the panels of a convolution; rearrange a matrix with prepack")
    # More words than k signs need are no error: the pixels of a flattened picture are padded one by one.
    if a.shape[1] != panels.words or (k is not None and not 0 <= words_for(k) <= panels.words):
        signs = "" if k is None else f", k = {k} takes {words_for(k)}"
        raise InputError(f"a has {a.shape[1]} words a row, b has {panels.words}{signs}; expected the same")
    return a, matmul_plan(panels, len(a), k)


def _conv(
    x: Words,
    w: Weights,
    channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    pad: Pad | None,
) -> tuple[Words, Plan, tuple[int, int, int, int]]:
    """Return the input with its border, the plan and the result's shape; `pad` None means planes of digits."""
    x = as_words(x, 5 if pad is None else 4, "x" if pad is not None else "planes")
    panels = w if isinstance(w, Panels) else prepack_conv(w, groups, channels)
    if panels.kernel is None:
        raise InputError("w are the panels of a matrix; rearrange a convolution's weights with prepack_conv")
    if panels.groups != groups:
        raise InputError(f"w are panels of {panels.groups} groups; expected groups {groups}, as in the call")
    if pad not in ("zero", "one", None):
        raise InputError(f"pad is {pad!r}; expected 'zero' or 'one'")
    each = channels // groups
    if channels % groups or x.shape[-1] != words_for(channels) or panels.tap_words != words_for(each):
        raise InputError(
            f"{channels} channels in {groups} groups take {words_for(channels)} words a pixel and {words_for(each)} a tap; "
            f"x has {x.shape[-1]}, w {panels.tap_words}"
        )
    if panels.joined > 1 and panels.channels != channels:
        raise InputError(f"w are panels of {panels.channels} channels; expected {channels}, as in the call")
    if groups > 1 and each % 64:
        x = _per_group(x, channels, groups)
    planes = x.shape[0] if pad is None else 1
    n, height, width, words = x.shape[-4:]
    plan = conv_plan(
        panels,
        (n, height, width, words),
        None if pad is None else each,
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        pad or "zero",
        planes,
    )
    if padding[0] or padding[1] or panels.joined > 1:
        x = with_border(x, (padding[0], padding[1]), panels, dilation[1])
    return x, plan, (n, *plan.geometry.size, panels.n)


def _per_group(x: Words, channels: int, groups: int) -> Words:
    """Return x with every group's channels in words of their own."""
    bits = np.unpackbits(x.astype("<u8", copy=False).view(np.uint8), axis=-1, count=channels, bitorder="little")
    each = channels // groups
    padded = np.zeros((*x.shape[:-1], groups, words_for(each) * 64), np.uint8)
    padded[..., :each] = bits.reshape(*x.shape[:-1], groups, each)
    words = np.packbits(padded, axis=-1, bitorder="little").view("<u8").astype(np.uint64, copy=False)
    return words.reshape(*x.shape[:-1], -1)


def _signs(plan: Plan, x: Words, threshold: Ints, flip: Words, out: Words) -> Words:
    n = plan.panels.n
    threshold = as_array(threshold, np.int32, (n,), "threshold")
    flip = as_array(flip, np.uint64, (words_for(n),), "flip")
    if not plan.whole_bytes:
        z = np.empty((*out.shape[:-1], n), np.int32)
        plan.integers()(x, z)
        return threshold_pack(z, threshold, flip, out)
    if n % 64:
        out[..., -1] = 0  # the kernel writes whole panels; the words' padding past them stays 0
    plan.signs(threshold, flip)(x, out)
    return out


def _floats(
    plan: Plan,
    x: Words,
    alpha: Floats,
    beta: Floats,
    fused: bool,
    residual: Floats | None,
    also_pack: bool,
    out: Floats,
) -> Any:
    n = plan.panels.n
    alpha, beta = (as_array(v, np.float32, (n,), name) for v, name in ((alpha, "alpha"), (beta, "beta")))
    if residual is not None:
        residual = as_array(residual, np.float32, out.shape, "residual")
        if np.may_share_memory(residual, out):
            raise InputError("residual and out share memory; expected a buffer of its own for the result")
    inside = also_pack and plan.whole_bytes
    bits = np.zeros((*out.shape[:-1], words_for(n)), np.uint64) if inside else None
    plan.floats(alpha, beta, fused)(x, out, residual, bits)
    if not also_pack:
        return out
    return out, bits if bits is not None else pack(out)
