"""The packed operations as torch operators: `torch.ops.qlab.*`, seen by torch.compile and torch.export.

Words are int64 tensors of the bits that `qlab.binary.pack` gives. Tensors on the CPU run on the Numba kernels, tensors on a GPU on
the CUDA kernels. What each operator means is written in plain numpy under its name in `qlab.binary.kernels.reference`.

    binary_matmul(a (M, W), b (N, W), k) -> int32 (M, N)
    binary_conv2d(x (N, H, W, W(C)), w (O, kh, kw, W(C/groups)), channels, ...) -> int32 (N, OH, OW, O)
    bitplane_matmul, bitplane_conv2d: few-bit codes as weighted binary products -> float64
    digits_conv2d(planes, w, channels, ...) -> int32: bit planes of an 8-bit image against signs
    bitplane_input(x uint8 (..., C)) -> planes (8, ..., W(C))
    max_pool2d(x, kernel, stride, padding) -> words;  threshold_pack(z, threshold, flip) -> words
    signed_sum_matmul(x float32 (M, K), w (N, W)) -> float32 (M, N)
"""
# No `from __future__ import annotations`: torch reads the operators' schemas off the annotations.

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlab.binary.bits import array_to_words, words_for, words_to_array
from qlab.binary.kernels.reference import output_size
from qlab.errors import InputError

__all__ = [
    "binary_conv2d",
    "binary_matmul",
    "bitplane_conv2d",
    "bitplane_input",
    "bitplane_matmul",
    "digits_conv2d",
    "max_pool2d",
    "signed_sum_matmul",
    "threshold_pack",
]


# Lists have no default in a schema that torch reads off annotations, so operators with a window write theirs out.
WINDOW = "int[] stride=[1, 1], int[] padding=[0, 0], int[] dilation=[1, 1], int groups=1"


def _call(name: str, *arguments: Any, **options: Any) -> Tensor:
    """Run a kernel on the device of its tensors, words as words."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise InputError(f"{name}: its tensors are on {', '.join(sorted(map(str, devices)))}; expected one device")
    if devices.pop().type == "cuda":
        from qlab.binary.kernels import cuda

        return getattr(cuda, name)(*arguments, **options)
    from qlab.binary.kernels import cpu

    result = getattr(cpu, name)(*(_array(a) if isinstance(a, Tensor) else a for a in arguments), **options)
    return words_to_array(result) if result.dtype == np.uint64 else torch.from_numpy(result)


def _array(tensor: Tensor) -> np.ndarray:
    return array_to_words(tensor) if tensor.dtype == torch.int64 else tensor.detach().contiguous().numpy()


def _expect(name: str, tensor: Tensor, dims: int | None, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or (dims is not None and tensor.dim() != dims):
        raise InputError(
            f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)}; expected {what}"
            + (", packed by qlab.binary.pack" if dtype == torch.int64 else "")
        )


def _two(name: str, what: str, value: Sequence[int], least: int) -> tuple[int, int]:
    if len(value) != 2 or min(value) < least:
        raise InputError(f"{name}: {what} is {list(value)}; expected two integers of at least {least}")
    return int(value[0]), int(value[1])


def _window(
    name: str,
    x: Sequence[int],
    w: Sequence[int],
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int]:
    """Return (OH, OW) for x (N, H, W, W(C)) and w (O, kh, kw, W(C / groups)) after all was found to fit."""
    _two(name, "stride", stride, 1)
    _two(name, "padding", padding, 0)
    _two(name, "dilation", dilation, 1)
    if channels < 1 or groups < 1 or channels % groups or w[0] % groups:
        raise InputError(f"{name}: {channels} channels and {w[0]} outputs do not divide into {groups} groups")
    if x[3] != words_for(channels) or w[3] != words_for(channels // groups):
        raise InputError(
            f"{name}: {channels} channels take {words_for(channels)} words of x and {words_for(channels // groups)} of w; "
            f"got {x[3]} and {w[3]}"
        )
    size = [output_size(x[1 + i], w[1 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if min(size) < 1:
        raise InputError(
            f"{name}: a {w[1]}x{w[2]} kernel does not fit an image of {x[1]}x{x[2]}, padding {list(padding)}"
        )
    return size[0], size[1]


@torch.library.custom_op("qlab::binary_matmul", mutates_args=())
def binary_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Return k - 2 popcount(a xor b) for rows of a (M, W) and b (N, W), int32 (M, N).

    Raises:
        InputError: tensors that are no words, or whose rows do not hold k signs.
    """
    _matmul_shapes("binary_matmul", a, b, k)
    return _call("binary_matmul", a, b, k)


def _matmul_shapes(name: str, a: Tensor, b: Tensor, k: int) -> None:
    _expect(name, a, 2, torch.int64, "words (M, W)")
    _expect(name, b, 2, torch.int64, "words (N, W)")
    if k < 0 or a.shape[1] != words_for(k) or b.shape[1] != words_for(k):
        raise InputError(f"{name}: rows of {a.shape[1]} and {b.shape[1]} words; {k} signs take {words_for(max(k, 0))}")


@binary_matmul.register_fake
def _(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@torch.library.custom_op(
    "qlab::binary_conv2d",
    mutates_args=(),
    schema=f'(Tensor x, Tensor w, int channels, {WINDOW}, str pad="zero") -> Tensor',
)
def binary_conv2d(
    x: Tensor,
    w: Tensor,
    channels: int,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    pad: str = "zero",
) -> Tensor:
    """Return the convolution int32 (N, OH, OW, O) of packed signs.

    Args:
        x: words (N, H, W, W(C)); w: words (O, kh, kw, W(C / groups)).
        channels: C.
        stride, padding, dilation, groups: as in torch, pairs.
        pad: "zero" (a tap outside counts nothing) or "one" (it counts as +1).

    Raises:
        InputError: what does not fit, and what would.
    """
    name = "binary_conv2d"
    _expect(name, x, 4, torch.int64, "words (N, H, W, W(C))")
    _expect(name, w, 4, torch.int64, "words (O, kh, kw, W(C / groups))")
    if pad not in ("zero", "one"):
        raise InputError(f"{name}: pad is {pad!r}; expected 'zero' or 'one'")
    _window(name, x.shape, w.shape, channels, stride, padding, dilation, groups)
    return _call(name, x, w, channels, tuple(stride), tuple(padding), tuple(dilation), groups, pad=pad)


@binary_conv2d.register_fake
def _(
    x: Tensor,
    w: Tensor,
    channels: int,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    pad: str = "zero",
) -> Tensor:
    size = _window("binary_conv2d", x.shape, w.shape, channels, stride, padding, dilation, groups)
    return x.new_empty((x.shape[0], *size, w.shape[0]), dtype=torch.int32)


@torch.library.custom_op(
    "qlab::digits_conv2d",
    mutates_args=(),
    schema=f"(Tensor planes, Tensor w, int channels, {WINDOW}) -> Tensor",
)
def digits_conv2d(
    planes: Tensor,
    w: Tensor,
    channels: int,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return sum_n 2^n (plane_n * w), int32 (N, OH, OW, O), for bit planes (P, N, H, W, W(C)) and signs w.

    Raises:
        InputError: what does not fit, and what would.
    """
    name = "digits_conv2d"
    _expect(name, planes, 5, torch.int64, "planes (P, N, H, W, W(C))")
    _expect(name, w, 4, torch.int64, "words (O, kh, kw, W(C / groups))")
    _window(name, planes.shape[1:], w.shape, channels, stride, padding, dilation, groups)
    return _call(name, planes, w, channels, tuple(stride), tuple(padding), tuple(dilation), groups)


@digits_conv2d.register_fake
def _(
    planes: Tensor,
    w: Tensor,
    channels: int,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    size = _window("digits_conv2d", planes.shape[1:], w.shape, channels, stride, padding, dilation, groups)
    return planes.new_empty((planes.shape[1], *size, w.shape[0]), dtype=torch.int32)


@torch.library.custom_op("qlab::bitplane_matmul", mutates_args=())
def bitplane_matmul(a: Tensor, b: Tensor, k: int, a_basis: Tensor, b_basis: Tensor, codes: str = "digits") -> Tensor:
    """Return sum_ij a_basis_j b_basis_ni <a_j, b_ni>, float64 (M, N); see the reference.

    Args:
        a: planes (Ka, M, W), digits or signs by `codes`; b: planes (Kb, N, W), signs.
        k: K.
        a_basis: (Ka,); b_basis: (Kb,) or (Kb, N).
        codes: "digits" or "signs".

    Raises:
        InputError: what does not fit, and what would.
    """
    name = "bitplane_matmul"
    _expect(name, a, 3, torch.int64, "planes (Ka, M, W)")
    _expect(name, b, 3, torch.int64, "planes (Kb, N, W)")
    _matmul_shapes(name, a[0], b[0], k)
    _bases(name, a.shape[0], b.shape[:2], a_basis, b_basis, codes)
    return _call(name, a, b, k, a_basis.double(), b_basis.double(), codes)


def _bases(name: str, ka: int, b: Sequence[int], a_basis: Tensor, b_basis: Tensor, codes: str) -> None:
    if codes not in ("digits", "signs"):
        raise InputError(f"{name}: codes is {codes!r}; expected 'digits' or 'signs'")
    if tuple(a_basis.shape) != (ka,) or tuple(b_basis.shape) not in ((b[0],), (b[0], b[1])):
        raise InputError(
            f"{name}: bases of shape {tuple(a_basis.shape)} and {tuple(b_basis.shape)}; expected ({ka},) and ({b[0]},) or "
            f"({b[0]}, {b[1]})"
        )


@bitplane_matmul.register_fake
def _(a: Tensor, b: Tensor, k: int, a_basis: Tensor, b_basis: Tensor, codes: str = "digits") -> Tensor:
    return a.new_empty((a.shape[1], b.shape[1]), dtype=torch.float64)


@torch.library.custom_op(
    "qlab::bitplane_conv2d",
    mutates_args=(),
    schema=f'(Tensor x, Tensor w, int channels, Tensor x_basis, Tensor w_basis, str codes="digits", {WINDOW}) -> Tensor',
)
def bitplane_conv2d(
    x: Tensor,
    w: Tensor,
    channels: int,
    x_basis: Tensor,
    w_basis: Tensor,
    codes: str = "digits",
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the convolution float64 (N, OH, OW, O) of few-bit codes; see the reference.

    Args:
        x: planes (Ka, N, H, W, W(C)); w: planes (Kb, O, kh, kw, W(C / groups)), signs.
        channels: C.
        x_basis: (Ka,); w_basis: (Kb,) or (Kb, O).
        codes: "digits" or "signs".
        stride, padding, dilation, groups: as in torch, pairs.

    Raises:
        InputError: what does not fit, and what would.
    """
    name = "bitplane_conv2d"
    _expect(name, x, 5, torch.int64, "planes (Ka, N, H, W, W(C))")
    _expect(name, w, 5, torch.int64, "planes (Kb, O, kh, kw, W(C / groups))")
    _window(name, x.shape[1:], w.shape[1:], channels, stride, padding, dilation, groups)
    _bases(name, x.shape[0], w.shape[:2], x_basis, w_basis, codes)
    window = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return _call(name, x, w, channels, x_basis.double(), w_basis.double(), codes, *window)


@bitplane_conv2d.register_fake
def _(
    x: Tensor,
    w: Tensor,
    channels: int,
    x_basis: Tensor,
    w_basis: Tensor,
    codes: str = "digits",
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    size = _window("bitplane_conv2d", x.shape[1:], w.shape[1:], channels, stride, padding, dilation, groups)
    return x.new_empty((x.shape[1], *size, w.shape[1]), dtype=torch.float64)


@torch.library.custom_op("qlab::bitplane_input", mutates_args=())
def bitplane_input(x: Tensor) -> Tensor:
    """Return the bit planes (8, ..., W(C)) of uint8 x (..., C).

    Raises:
        InputError: x is not uint8, or a scalar.
    """
    _expect("bitplane_input", x, max(x.dim(), 1), torch.uint8, "uint8 (..., C)")
    return _call("bitplane_input", x)


@bitplane_input.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((8, *x.shape[:-1], words_for(x.shape[-1])), dtype=torch.int64)


@torch.library.custom_op(
    "qlab::max_pool2d",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding=[0, 0]) -> Tensor",
)
def max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)) -> Tensor:
    """Return the packed maximum (N, OH, OW, W) of packed signs x (N, H, W, W); padding is ignored.

    Raises:
        InputError: what does not fit, and what would.
    """
    _expect("max_pool2d", x, 4, torch.int64, "words (N, H, W, W(C))")
    size = _pooled("max_pool2d", x.shape, kernel, stride, padding)
    if min(size) < 1:
        raise InputError(f"max_pool2d: a {list(kernel)} window does not fit an image of {list(x.shape[1:3])}")
    return _call("max_pool2d", x, tuple(kernel), tuple(stride), tuple(padding))


def _pooled(
    name: str, x: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    sizes, steps, pads = (
        _two(name, "kernel", kernel, 1),
        _two(name, "stride", stride, 1),
        _two(name, "padding", padding, 0),
    )
    if any(2 * p > k for p, k in zip(pads, sizes, strict=True)):
        raise InputError(f"{name}: padding {list(pads)} is more than half of the kernel {list(sizes)}")
    return [output_size(x[1 + i], sizes[i], steps[i], pads[i]) for i in (0, 1)]


@max_pool2d.register_fake
def _(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)) -> Tensor:
    return x.new_empty((x.shape[0], *_pooled("max_pool2d", x.shape, kernel, stride, padding), x.shape[3]))


@torch.library.custom_op("qlab::threshold_pack", mutates_args=())
def threshold_pack(z: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    """Return words (..., W(C)) of int32 z (..., C): bit c is (z_c < threshold_c) xor flip_c.

    Args:
        z: int32; threshold: int32 (C,); flip: words (W(C),).

    Raises:
        InputError: what does not fit, and what would.
    """
    name = "threshold_pack"
    _expect(name, z, max(z.dim(), 1), torch.int32, "int32 (..., C)")
    _expect(name, threshold, 1, torch.int32, "int32 (C,)")
    _expect(name, flip, 1, torch.int64, "words (W(C),)")
    if threshold.shape[0] != z.shape[-1] or flip.shape[0] != words_for(z.shape[-1]):
        raise InputError(
            f"{name}: {z.shape[-1]} channels, {threshold.shape[0]} thresholds, {flip.shape[0]} words of flips; expected "
            f"{z.shape[-1]} and {words_for(z.shape[-1])}"
        )
    return _call(name, z, threshold, flip)


@threshold_pack.register_fake
def _(z: Tensor, threshold: Tensor, flip: Tensor) -> Tensor:
    return z.new_empty((*z.shape[:-1], words_for(z.shape[-1])), dtype=torch.int64)


@torch.library.custom_op("qlab::signed_sum_matmul", mutates_args=())
def signed_sum_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Return x (M, K) times packed signs w (N, W(K)), float32 (M, N); a weight-only binary layer.

    Raises:
        InputError: what does not fit, and what would.
    """
    _expect("signed_sum_matmul", x, 2, torch.float32, "float32 (M, K)")
    _expect("signed_sum_matmul", w, 2, torch.int64, "words (N, W(K))")
    if w.shape[1] != words_for(x.shape[1]):
        raise InputError(
            f"signed_sum_matmul: {x.shape[1]} features take {words_for(x.shape[1])} words; got {w.shape[1]}"
        )
    return _call("signed_sum_matmul", x, w)


@signed_sum_matmul.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))
