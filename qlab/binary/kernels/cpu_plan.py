"""What a packed product or convolution needs besides its data: tables, sizes, chunks; worked out once, kept with the panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlab.binary.kernels import cpu_block
from qlab.binary.kernels.cpu_block import COLUMNS, FLOATS, INTEGERS, SIGNS
from qlab.binary.kernels.cpu_launch import address, launch, new_block
from qlab.binary.kernels.cpu_panels import Line, Panels
from qlab.binary.kernels.reference import Floats, Ints, Pair, Words, output_size, words_for
from qlab.errors import InputError

__all__ = ["Pad", "Plan", "Product", "conv_plan", "matmul_plan"]

Pad = Literal["zero", "one"]

RUN = 128  # rows of a chunk: their words stay in the second-level cache while the panels pass by
MATMUL_ROWS = 1024  # rows that the tables of a matrix product describe; a larger one is cut into such "images"
KEPT = 64  # thresholds or scales of one plan, so that a caller whose numbers always change does not fill the memory
CHUNKS = 32  # wanted, so that threads finish together
WORD = 2.5e-11  # seconds that a thread takes for 64 products, roughly


@dataclass(frozen=True)
class _Geometry:
    """Where the words of each output pixel stand.

    Args:
        places: int64 (pixels,), bytes from an image to a pixel's first tap.
        taps: int64 (words,), bytes from there to word k.
        classes: int64 (pixels,), which of `outside` a pixel has.
        outside: bool (classes, taps): which taps lie outside the image.
        size: (OH, OW).
    """

    places: NDArray[np.int64]
    taps: NDArray[np.int64]
    classes: NDArray[np.int64]
    outside: NDArray[np.bool_]
    size: Pair


@lru_cache(maxsize=256)
def _geometry(
    image: Pair, line: Line, reads: tuple[Pair, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> _Geometry:
    """Return the tables of a convolution over images whose rows, border included, lie as `line` says.

    A row of the kernel reads `reads`: pairs of a column of the kernel and a word of the pixel there.
    """
    size = tuple(output_size(image[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    if min(size) < 1:
        raise InputError(
            f"a window of {kernel} with dilation {dilation} does not fit an image of {image}, padded by {padding}"
        )
    starts = [np.arange(size[i]) * stride[i] for i in (0, 1)]
    steps = [np.arange(kernel[i]) * dilation[i] for i in (0, 1)]
    places = starts[0][:, None] * line.size + starts[1] * line.pixel
    columns_read, words_read = np.array(reads).T
    taps = steps[0][:, None] * line.size + columns_read * dilation[1] * line.pixel + words_read * line.word
    missing = []
    for i in (0, 1):
        at = starts[i][:, None] + steps[i] - padding[i]
        missing.append((at < 0) | (at >= image[i]))
    (rows, row_class), (columns, column_class) = (np.unique(m, axis=0, return_inverse=True) for m in missing)
    outside = rows[:, None, :, None] | columns[None, :, None, :]
    classes = row_class.reshape(-1, 1) * len(columns) + column_class.reshape(1, -1)
    return _Geometry(
        places.astype(np.int64).ravel(),
        taps.astype(np.int64).ravel(),
        classes.astype(np.int64).ravel(),
        outside.reshape(len(rows) * len(columns), -1),
        (size[0], size[1]),
    )


class Product:
    """A plan together with what becomes of its integers; call it with the data. `Plan` makes these and keeps them."""

    def __init__(self, plan: Plan, kind: int, table: NDArray[np.int64], row_bytes: int, values: dict[int, Any]) -> None:
        self._plan, self._keep = plan, (table, *values.values())
        block = plan.block()
        block[cpu_block.KIND] = kind
        block[cpu_block.BIAS] = address(table)
        block[cpu_block.OUT_STRIDE] = row_bytes
        for index, value in values.items():
            block[index] = value if isinstance(value, int) else address(value)
        self._block = block

    def __call__(self, x: Words, out: Any, residual: Floats | None = None, bits: Words | None = None) -> None:
        """Read contiguous words (with their border) and write `out`, rows of the plan's size, and `bits`."""
        if not out.size:
            return
        block = type(self._block).from_buffer_copy(self._block)
        block[cpu_block.X] = address(x)
        block[cpu_block.OUT] = address(out)
        if residual is not None:
            block[cpu_block.RESIDUAL] = address(residual)
        if bits is not None:
            block[cpu_block.SIGN_BITS] = address(bits)
        launch("gemm", block, self._plan.chunks, self._plan.seconds)


class Plan:
    """A product or convolution of given shapes and weights, and the `Product`s that were made of it.

    Args:
        panels: the weights.
        geometry: where a row's words stand.
        rows: rows (output pixels) in all.
        image_stride: bytes from one image to the next.
        bias: int64 (classes, O).
        group_stride: bytes from one group's words to the next's, within a pixel.
        shift, complement, planes, plane_stride: see `cpu_gemm`.
    """

    def __init__(
        self,
        panels: Panels,
        geometry: _Geometry,
        rows: int,
        image_stride: int,
        bias: NDArray[np.int64],
        group_stride: int = 0,
        shift: int = 1,
        complement: int = 0,
        planes: int = 1,
        plane_stride: int = 0,
    ) -> None:
        self.panels, self.geometry, self._bias = panels, geometry, bias
        each, count = len(geometry.places), panels.groups * panels.per_group
        run = min(RUN, -(-each // 8) * 8)
        row_chunks = -(-rows // each) * -(-each // run)
        panel_runs = -(-count // max(1, count * row_chunks // CHUNKS))
        panel_run = -(-count // panel_runs)
        self.chunks = row_chunks * -(-count // panel_run)
        self.seconds = rows * count * COLUMNS * panels.words * planes * WORD
        self._classes = geometry.classes * (8 * COLUMNS * count)
        self._products: dict[Any, Product] = {}
        self._values = {
            cpu_block.ROWS: rows,
            cpu_block.ROWS_EACH: each,
            cpu_block.IMAGE_STRIDE: image_stride,
            cpu_block.PLACES: address(geometry.places),
            cpu_block.TAPS: address(geometry.taps),
            cpu_block.WORDS: panels.words,
            cpu_block.PLANES: planes,
            cpu_block.PLANE_STRIDE: plane_stride,
            cpu_block.CLASSES: address(self._classes),
            cpu_block.PANEL: address(panels.array),
            cpu_block.PANELS: count,
            cpu_block.PANELS_PER_GROUP: panels.per_group,
            cpu_block.GROUP_CHANNELS: panels.n // panels.groups,
            cpu_block.GROUP_STRIDE: group_stride,
            cpu_block.SHIFT: shift,
            cpu_block.COMPLEMENT: complement,
            cpu_block.ROW_RUN: run,
            cpu_block.PANEL_RUN: panel_run,
        }

    def block(self) -> Any:
        """Return a block with what does not depend on the data or the epilogue."""
        return new_block(self._values.get(index, 0) for index in range(cpu_block.LENGTH))

    def _columns(self, table: NDArray[np.int64], fill: int = 0) -> NDArray[np.int64]:
        """Return (classes, O) as the kernel's table (classes, groups, panels per group, 16)."""
        groups, width = self.panels.groups, self.panels.per_group * COLUMNS
        each = self.panels.n // groups
        padded = np.full((len(table), groups, width), fill, np.int64)
        padded[..., :each] = table.reshape(len(table), groups, each)
        return padded

    @property
    def whole_bytes(self) -> bool:
        """Whether the signs of a panel start at a byte of their own, so that the kernel can write bits."""
        return self.panels.groups == 1 or self.panels.n // self.panels.groups % COLUMNS == 0

    def _product(self, key: Any, make: Callable[[], Product]) -> Product:
        product = self._products.get(key)
        if product is None:
            if len(self._products) >= KEPT:
                self._products.clear()
            product = self._products[key] = make()
        return product

    def integers(self) -> Product:
        """Return the product that writes z as int32."""
        return self._product(
            INTEGERS, lambda: Product(self, INTEGERS, self._columns(self._bias), 4 * self.panels.n, {})
        )

    def signs(self, threshold: Ints, flip: Words) -> Product:
        """Return the product of signs that writes words: the bits (z < threshold) xor flip."""

        def make() -> Product:
            limits = (self._bias - threshold.astype(np.int64)) >> 1
            table = self._columns(limits, fill=np.iinfo(np.int64).max)  # columns past the last are never above it
            return Product(self, SIGNS, table, 8 * words_for(self.panels.n), {cpu_block.FLIP: flip.copy()})

        return self._product((threshold.tobytes(), flip.tobytes()), make)

    def floats(self, alpha: Floats, beta: Floats, fused: bool) -> Product:
        """Return the product that writes z alpha + beta (+ residual) as float32, and the bits of its signs if asked."""

        def make() -> Product:
            spare = np.zeros(COLUMNS, np.float32)  # the kernel reads whole panels
            values = {
                cpu_block.ALPHA: np.concatenate([alpha, spare]),
                cpu_block.BETA: np.concatenate([beta, spare]),
                cpu_block.FUSED: int(fused),
                cpu_block.SIGN_STRIDE: 8 * words_for(self.panels.n),
            }
            return Product(self, FLOATS, self._columns(self._bias), 4 * self.panels.n, values)

        return self._product((alpha.tobytes(), beta.tobytes(), fused), make)


@lru_cache(maxsize=256)
def _rows(count: int, words: int) -> _Geometry:
    """Return the tables of a matrix: rows one after the other."""
    zeros = np.zeros(count, np.int64)
    starts, taps = np.arange(count, dtype=np.int64) * (8 * words), np.arange(words, dtype=np.int64) * 8
    return _Geometry(starts, taps, zeros, np.zeros((1, 1), bool), (1, count))


def matmul_plan(panels: Panels, rows: int, k: int | None, planes: int = 1) -> Plan:
    """Return the plan of (M, W) words times the rows of `panels`.

    Args:
        panels: of `prepack`.
        rows: M.
        k: K for signs; None for binary digits {0, 1}, of which there may be several planes (P, M, W).
        planes: P.
    """
    key = ("matmul", rows, k, planes)
    if key not in panels.plans:
        each = max(1, min(rows, MATMUL_ROWS))
        panels.plans[key] = Plan(
            panels,
            _rows(each, panels.words),
            rows,
            image_stride=each * panels.words * 8,
            plane_stride=rows * panels.words * 8,
            **_meaning(panels, np.zeros((1, 1), bool), k, planes),
        )
    return panels.plans[key]


def _reads(panels: Panels, each: int) -> tuple[Pair, ...]:
    """Return what a row of the kernel reads of a group's `each` words a pixel: pairs (column of the kernel, word)."""
    assert panels.kernel is not None
    if panels.joined == 1:
        return tuple((column, word) for column in range(panels.kernel[1]) for word in range(each))
    whole = panels.kernel[1] // panels.joined
    return tuple((panels.joined * i, int(i == whole)) for i in range(whole + (panels.second > 0)))


def conv_plan(
    panels: Panels,
    shape: tuple[int, int, int, int],
    channels: int | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pad: Pad,
    planes: int = 1,
) -> Plan:
    """Return the plan of a convolution over words of `shape` (N, H, W, words), of which a group reads its own share.

    Args:
        panels: of `prepack_conv`.
        shape: of the input before its border of `padding` is added.
        channels: C / groups for signs; None for binary digits, of which there may be several planes.
        stride, padding, dilation: as in torch.
        pad: what the border counts: "zero" nothing, "one" +1.
        planes: P.
    """
    key = (shape, channels, stride, padding, dilation, pad, planes)
    if key not in panels.plans:
        assert panels.kernel is not None
        n, height, width, words = shape
        each = words // panels.groups
        line = panels.line(width + 2 * padding[1], words)
        geometry = _geometry((height, width), line, _reads(panels, each), panels.kernel, stride, padding, dilation)
        outside = geometry.outside if pad == "zero" else np.zeros_like(geometry.outside)
        image = (height + 2 * padding[0]) * line.size
        panels.plans[key] = Plan(
            panels,
            geometry,
            n * geometry.size[0] * geometry.size[1],
            image_stride=image,
            group_stride=8 * each,
            plane_stride=n * image,
            **_meaning(panels, outside, channels, planes),
        )
    return panels.plans[key]


def _meaning(panels: Panels, outside: NDArray[np.bool_], k: int | None, planes: int) -> dict[str, Any]:
    """Return bias, shift and complement: what the counted bits mean.

    Signs: z = k (taps inside) - 2 (u - u of the taps outside), where the border's words are 0.
    Digits: a tap's product is u - popcount(w), in each plane; z = sum_n 2^n u_n - (2^P - 1) popcount(w).
    """
    if k is None:
        total = panels.counts.sum(0)
        bias = np.broadcast_to(-((1 << planes) - 1) * total - 1, (len(outside), panels.n))
        return {"bias": bias, "shift": 0, "complement": -1, "planes": planes}
    taps = (~outside).sum(1)[:, None] * k
    return {"bias": taps + 2 * (outside.astype(np.int64) @ panels.counts)}
