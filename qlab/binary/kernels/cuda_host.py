"""The host's half of the CUDA kernels: shapes, grids and arguments, written once for the GPU and for the CPU shim.

`Kernels` has the functions of `reference`, on the arrays of a module `xp` (CuPy or numpy) that a subclass names together with how a
kernel is launched. So the shim proves this code too, not only the kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qlab.binary.kernels.cuda_plan import Plan, popcount_plan
from qlab.binary.kernels.reference import WORD, Codes, Pair, output_size, words_for
from qlab.errors import InputError

__all__ = ["Array", "Kernels"]

Array = Any  # an array of xp
BLOCK = 256  # threads of the kernels that have no tiles
ELEMENTS = {  # numpy's letter of a type -> its name in C
    "f4": "float",
    "f8": "double",
    "i1": "signed char",
    "i2": "short",
    "i4": "int",
    "i8": "long long",
}


def i32(*values: int) -> tuple[np.int32, ...]:
    """Return C ints."""
    return tuple(np.int32(value) for value in values)


class Kernels(ABC):
    """The functions of `qlab.binary.kernels.reference`; see there for what each means.

    Words are uint64 arrays; every argument may be non-contiguous (it is copied then).
    """

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The array module."""

    @abstractmethod
    def plan(self, rows: int, columns: int, words: int) -> Plan:
        """Return how to multiply (rows, words) with (columns, words)."""

    @abstractmethod
    def launch(
        self,
        source: str,
        kernel: str,
        macros: Mapping[str, int | str],
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run a kernel of `csrc/<source>.cu`: arrays, numpy scalars of the exact C type, None for a null pointer."""

    # ---- bits ------------------------------------------------------------------------------------------------------

    def pack(self, x: Array, axis: int = -1) -> Array:
        """Return the words of the signs of x along `axis`."""
        x = self.xp.asarray(x)
        axis = _axis(x, axis)
        outer, length, inner = _split(x.shape, axis)
        words = self.xp.empty((*x.shape[:axis], *x.shape[axis + 1 :], words_for(length)), np.uint64)
        if words.size:
            x, macros = self._element(x)
            if inner == 1:
                self._warps("pack", "pack_rows", 2 * words.size, (x, words, np.int64(outer), np.int32(length)), macros)
            else:
                arguments = (x, words, np.int64(outer), *i32(length, inner))
                self._threads("pack", "pack_channels", words.size, arguments, macros)
        return self.xp.moveaxis(words, -1, axis)

    def unpack(self, words: Array, length: int, axis: int = -1) -> Array:
        """Return the signs +-1, `length` of them along `axis`, as int8."""
        axis = _axis(words, axis)
        moved = self._words(self.xp.moveaxis(words, axis, -1))
        _expect(moved.shape[-1] == words_for(length), f"{length} signs take {words_for(length)} words", moved)
        signs = self.xp.empty((*moved.shape[:-1], length), np.int8)
        rows = signs.size // length if length else 0
        self._threads("pack", "unpack_rows", signs.size, (moved, signs, np.int64(rows), np.int32(length)))
        return self.xp.moveaxis(signs, -1, axis)

    def threshold_pack(self, z: Array, threshold: Array, flip: Array) -> Array:
        """Return the words of (z_c < threshold_c) xor flip_c, z (..., C)."""
        z, channels = self._contiguous(z, np.int32), z.shape[-1]
        threshold, flip = self._thresholds(threshold, flip, channels)
        words = self.xp.empty((*z.shape[:-1], words_for(channels)), np.uint64)
        rows = z.size // channels if channels else 0
        arguments = (z, threshold, flip, words, np.int64(rows), np.int32(channels))
        self._warps("threshold_pack", "threshold_pack", 2 * words.size, arguments)
        return words

    def affine(self, z: Array, alpha: Array, beta: Array, fused: bool) -> Array:
        """Return z (..., C) times alpha plus beta in float32."""
        out = self.xp.empty(z.shape, np.float32)
        arguments, macros = self._affine(z, alpha, beta, out, fused)
        self._threads("affine", "affine", out.size, arguments, macros)
        return out

    def affine_pack(self, x: Array, alpha: Array, beta: Array, fused: bool) -> Array:
        """Return the words of the signs of `affine(x, alpha, beta)`."""
        words = self.xp.empty((*x.shape[:-1], words_for(x.shape[-1])), np.uint64)
        arguments, macros = self._affine(x, alpha, beta, words, fused)
        self._warps("affine", "affine_pack", 2 * words.size, arguments, macros)
        return words

    def max_pool2d(self, x: Array, kernel: Pair, stride: Pair, padding: Pair = (0, 0)) -> Array:
        """Return the packed maximum over windows."""
        x = self._words(x)
        _expect(x.ndim == 4, "max_pool2d takes words (N, H, W, W(C))", x)
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise InputError(f"padding {padding} is more than half of the window {kernel}: some windows would be empty")
        n, height, width, words = x.shape
        out_height, out_width = (output_size(x.shape[1 + i], kernel[i], stride[i], padding[i]) for i in range(2))
        y = self.xp.empty((n, max(out_height, 0), max(out_width, 0), words), np.uint64)
        sizes = i32(n, height, width, words, *kernel, *stride, *padding, out_height, out_width)
        self._threads("max_pool", "max_pool", y.size, (x, y, *sizes))
        return y

    def bitplane_input(self, x: Array) -> Array:
        """Return the bit planes (8, ..., W(C)) of bytes x (..., C)."""
        x, channels = self._contiguous(x, np.uint8), x.shape[-1]
        planes = self.xp.empty((8, *x.shape[:-1], words_for(channels)), np.uint64)
        rows = x.size // channels if channels else 0
        arguments = (x, planes, np.int64(rows), np.int32(channels))
        self._warps("bitplanes", "bitplanes", 2 * planes.size // 8, arguments)
        return planes

    # ---- products --------------------------------------------------------------------------------------------------

    def binary_matmul(self, a: Array, b: Array, k: int) -> Array:
        """Return the (M, N) products of K signs."""
        return self._matmul(a, b, k)

    def matmul_threshold(self, a: Array, b: Array, k: int, threshold: Array, flip: Array) -> Array:
        """Return `threshold_pack(binary_matmul(a, b, k), threshold, flip)`; the integers never leave the registers."""
        return self._matmul(a, b, k, self._thresholds(threshold, flip, b.shape[0]))

    def digits_matmul(self, a: Array, b: Array) -> Array:
        """Return the (M, N) products of digits {0, 1} with signs."""
        a, b = self._operands(a, b)
        out = self.xp.empty((a.shape[0], b.shape[0]), np.int32)
        plan = popcount_plan(*out.shape)
        self._popcount_gemm(plan, a, b, 0, out, {"DIGITS": 1, **plan.tile}, self._row_popcounts(a))
        return out

    def bitplane_matmul(
        self, a: Array, b: Array, k: int, a_basis: Array, b_basis: Array, codes: Codes = "digits"
    ) -> Array:
        """Return the (M, N) products of few-bit vectors, in float64."""
        total = self.xp.zeros((a.shape[1], b.shape[1]), np.float64)
        for v, plane in zip(self._float64(a_basis), a, strict=True):
            for u, weights in zip(self._float64(b_basis), b, strict=True):
                z = self.digits_matmul(plane, weights) if codes == "digits" else self.binary_matmul(plane, weights, k)
                total += v * u * z
        return total

    def signed_sum_matmul(self, x: Array, w: Array) -> Array:
        """Return x (M, K) times signs w (N, W(K)) in float64."""
        return self._float64(x) @ self._float64(self.unpack(w, x.shape[1])).T

    def _matmul(self, a: Array, b: Array, k: int, thresholds: tuple[Array, Array] | None = None) -> Array:
        a, b = self._operands(a, b)
        rows, columns, words = a.shape[0], b.shape[0], a.shape[1]
        out = self._output((rows, columns), thresholds)
        if out.size == 0:
            return out
        plan = self.plan(rows, columns, words)
        macros = {**plan.tile, "PACKED": int(thresholds is not None)}
        if plan.kernel == "popcount_gemm":
            self._popcount_gemm(plan, a, b, k, out, macros, None, thresholds)
            return out
        # Copies of 16 bytes need rows that begin at multiples of 16 bytes.
        macros["CHUNK"] = 16 if words % 2 == 0 and self._address(a) % 16 == 0 == self._address(b) % 16 else 8
        sizes = i32(rows, columns, words, k)
        counts = (self._row_popcounts(a), self._row_popcounts(b))
        arguments = (a, b, *sizes, *counts, out, *(thresholds or (None, None)))
        grid = (-(-rows // plan.rows), self._column_blocks(plan, columns, thresholds), 1)
        self.launch(plan.kernel, plan.kernel, macros, grid, plan.threads, arguments, plan.shared_bytes)
        return out

    def _popcount_gemm(
        self,
        plan: Plan,
        a: Array,
        b: Array,
        k: int,
        out: Array,
        macros: Mapping[str, int | str],
        row_base: Array | None,
        thresholds: tuple[Array, Array] | None = None,
    ) -> None:
        if out.size == 0:
            return
        rows, columns = a.shape[0], b.shape[0]
        sizes = i32(rows, columns, a.shape[1], k)
        arguments = (a, b, *sizes, row_base, out, *(thresholds or (None, None)))
        grid = (-(-rows // plan.rows), self._column_blocks(plan, columns, thresholds), 1)
        self.launch("popcount_gemm", "popcount_gemm", macros, grid, plan.threads, arguments)

    # ---- convolutions ----------------------------------------------------------------------------------------------

    def binary_conv2d(
        self,
        x: Array,
        w: Array,
        channels: int,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        pad: Literal["zero", "one"] = "zero",
    ) -> Array:
        """Return the convolution (N, OH, OW, O) of signs."""
        return self._conv(x, w, channels, stride, padding, dilation, groups, pad)

    def conv2d_threshold(
        self,
        x: Array,
        w: Array,
        channels: int,
        threshold: Array,
        flip: Array,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        pad: Literal["zero", "one"] = "zero",
    ) -> Array:
        """Return `threshold_pack(binary_conv2d(x, w, ...), threshold, flip)` (N, OH, OW, W(O)).

        In one kernel, but for groups > 1, whose output channels do not begin at words of their own.
        """
        thresholds = self._thresholds(threshold, flip, w.shape[0])
        if groups > 1:
            return self.threshold_pack(self._conv(x, w, channels, stride, padding, dilation, groups, pad), *thresholds)
        return self._conv(x, w, channels, stride, padding, dilation, groups, pad, thresholds)

    def digits_conv2d(
        self,
        planes: Array,
        w: Array,
        channels: int,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Array:
        """Return sum_n 2^n (plane_n * w), the convolution (N, OH, OW, O) of unsigned integers with signs."""
        flat = planes.reshape(-1, *planes.shape[2:])  # the planes as so many pictures more
        z = self._conv(flat, w, channels, stride, padding, dilation, groups, "one", digits=True)
        z = z.reshape(*planes.shape[:2], *z.shape[1:])
        total = z[0]
        for n in range(1, len(planes)):
            total = total + (z[n] << np.int32(n))
        return total

    def bitplane_conv2d(
        self,
        x: Array,
        w: Array,
        channels: int,
        x_basis: Array,
        w_basis: Array,
        codes: Codes = "digits",
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Array:
        """Return the convolution (N, OH, OW, O) of few-bit activations with few-bit weights, in float64."""
        window = (stride, padding, dilation, groups)
        total = self.xp.zeros((), np.float64)
        for v, plane in zip(self._float64(x_basis), x, strict=True):
            for u, weights in zip(self._float64(w_basis), w, strict=True):
                if codes == "digits":
                    z = self.digits_conv2d(plane[None], weights, channels, *window)
                else:
                    z = self.binary_conv2d(plane, weights, channels, *window)
                total = total + v * u * z
        return total

    def _conv(
        self,
        x: Array,
        w: Array,
        channels: int,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        pad: str,
        thresholds: tuple[Array, Array] | None = None,
        digits: bool = False,
    ) -> Array:
        x, w = self._words(x), self._words(w)
        _expect(x.ndim == 4 and x.shape[-1] == words_for(channels), f"x: (N, H, W, {words_for(channels)}) words", x)
        n, height, width, _ = x.shape
        outputs, kh, kw, group_words = w.shape
        each = channels // groups
        _expect(group_words == words_for(each), f"w: (O, kh, kw, {words_for(each)}) words for {each} channels", w)
        if channels % groups or outputs % groups:
            raise InputError(f"{channels} channels and {outputs} outputs do not split into {groups} groups")
        sizes = [output_size(x.shape[1 + i], w.shape[1 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
        oh, ow = (max(size, 0) for size in sizes)
        if (kh, kw, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1) and not digits:  # a product of matrices
            z = self._matmul(x.reshape(-1, group_words), w.reshape(outputs, -1), channels, thresholds)
            return z.reshape(n, oh, ow, -1)
        if groups > 1 and each % WORD:
            aligned = self.xp.empty((n, height, width, groups * group_words), np.uint64)
            arguments = (x, aligned, np.int64(n * height * width), *i32(groups, each))
            self._threads("pack", "align_groups", aligned.size, arguments)
            x = aligned
        out = self._output((n, oh, ow, outputs), thresholds)
        if out.size == 0:
            return out
        taps = self._row_popcounts(w.reshape(-1, group_words)) if pad == "zero" and any(padding) else None
        plan = popcount_plan(n * oh * ow, outputs // groups)
        macros = {**plan.tile, "PACKED": int(thresholds is not None), "DIGITS": int(digits)}
        shape = i32(n, height, width, groups, group_words, each, outputs // groups, kh, kw)
        window = i32(*stride, *padding, *dilation, oh, ow)
        arguments = (x, w, taps, *shape, *window, out, *(thresholds or (None, None)))
        grid = (-(-n * oh * ow // plan.rows), self._column_blocks(plan, outputs // groups, thresholds), groups)
        self.launch("popcount_conv", "popcount_conv", macros, grid, plan.threads, arguments)
        return out

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _threads(
        self, source: str, kernel: str, threads: int, arguments: Sequence[Any], macros: Mapping[str, int | str] = {}
    ) -> None:
        if threads:
            self.launch(source, kernel, macros, (-(-threads // BLOCK), 1, 1), BLOCK, arguments)

    def _warps(
        self, source: str, kernel: str, warps: int, arguments: Sequence[Any], macros: Mapping[str, int | str] = {}
    ) -> None:
        self._threads(source, kernel, 32 * warps, arguments, macros)

    def _row_popcounts(self, words: Array) -> Array:
        counts = self.xp.zeros(words.shape[0], np.int32)
        arguments = (words, counts, np.int64(words.shape[0]), np.int32(words.shape[1]))
        self._warps("pack", "row_popcounts", words.shape[0], arguments)
        return counts

    def _element(self, x: Array) -> tuple[Array, dict[str, int | str]]:
        """Return x as a contiguous array of a type that the kernels know, with the same signs, and that type."""
        if x.dtype.kind in "ub":  # never below zero
            x = self.xp.zeros(x.shape, np.int8)
        elif x.dtype.str[1:] not in ELEMENTS:
            x = x.astype(np.float32)  # float16, which float32 holds
        return self.xp.ascontiguousarray(x), {"ELEMENT": ELEMENTS[x.dtype.str[1:]]}

    def _affine(
        self, z: Array, alpha: Array, beta: Array, out: Array, fused: bool
    ) -> tuple[tuple[Any, ...], dict[str, int | str]]:
        channels = z.shape[-1]
        z = self._contiguous(z, np.int32 if z.dtype.kind == "i" else np.float32)
        alpha, beta = self._contiguous(alpha, np.float32), self._contiguous(beta, np.float32)
        for name, array in (("alpha", alpha), ("beta", beta)):
            _expect(array.shape == (channels,), f"{name}: ({channels},), one for each channel", array)
        rows = z.size // channels if channels else 0
        arguments = (z, alpha, beta, out, np.int64(rows), np.int32(channels))
        return arguments, {"FUSED": int(fused), "ELEMENT": ELEMENTS[z.dtype.str[1:]]}

    def _output(self, shape: tuple[int, ...], thresholds: tuple[Array, Array] | None) -> Array:
        if thresholds is None:
            return self.xp.empty(shape, np.int32)
        return self.xp.empty((*shape[:-1], words_for(shape[-1])), np.uint64)

    @staticmethod
    def _column_blocks(plan: Plan, columns: int, thresholds: object | None) -> int:
        """Return the blocks that cover all columns, and all the padding of packed ones."""
        return -(-(columns if thresholds is None else words_for(columns) * WORD) // plan.columns)

    def _operands(self, a: Array, b: Array) -> tuple[Array, Array]:
        a, b = self._words(a), self._words(b)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise InputError(f"expected words (M, W) and (N, W) of the same W, not {a.shape} and {b.shape}")
        return a, b

    def _thresholds(self, threshold: Array, flip: Array, channels: int) -> tuple[Array, Array]:
        threshold, flip = self._contiguous(threshold, np.int32), self._words(flip)
        _expect(threshold.shape == (channels,), f"threshold: ({channels},), one for each channel", threshold)
        _expect(flip.shape == (words_for(channels),), f"flip: ({words_for(channels)},) words", flip)
        return threshold, flip

    def _words(self, x: Array) -> Array:
        if x.dtype != np.uint64:
            raise InputError(f"these are no packed words: dtype {x.dtype}; expected uint64, as `pack` gives")
        return self.xp.ascontiguousarray(x)

    def _contiguous(self, x: Array, dtype: type) -> Array:
        return self.xp.ascontiguousarray(self.xp.asarray(x), dtype=dtype)

    def _float64(self, x: Array) -> Array:
        return self.xp.asarray(x).astype(np.float64)

    @abstractmethod
    def _address(self, x: Array) -> int:
        """Return where the array's data begin."""


def _axis(x: Array, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise InputError(f"axis is {axis}, but the array has shape {x.shape}; expected an axis that it has")
    return axis % x.ndim


def _split(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """Return how many elements lie before, along and behind an axis."""
    return int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))


def _expect(condition: bool, expected: str, given: Array) -> None:
    if not condition:
        raise InputError(f"expected {expected}, not an array of shape {given.shape}")
