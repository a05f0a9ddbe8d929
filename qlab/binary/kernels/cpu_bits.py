"""Kernels at the edges of a packed net: floats to bits, thresholds, pooling, bit planes, and sums of floats by signs.

Each takes the address of a block of arguments; its words are listed where they are read.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from qlab.binary.kernels.cpu_ir import (
    F32,
    I1,
    I16,
    I32,
    I64,
    Columns,
    affine,
    arrive,
    clear,
    constant,
    copy,
    fetch,
    intrinsic,
    load,
    poke,
    read,
    read_byte,
    signature,
    splat,
    store,
    take,
    vector,
)

LANES = 16


def _normalised(
    builder: ir.IRBuilder, x: ir.Value, alpha: ir.Value, beta: ir.Value, mode: ir.Value, numbers: Any
) -> ir.Value:
    """Return x, or x alpha + beta rounded twice (mode 1) or once (mode 2); `numbers(address)` reads alpha and beta."""
    before = builder.block
    with builder.if_then(builder.icmp_signed("!=", mode, constant(0))):
        fused = builder.icmp_signed("==", mode, constant(2))
        y = affine(builder, x, numbers(alpha), numbers(beta), fused)
        after = builder.block
    result = builder.phi(x.type)
    result.add_incoming(x, before)
    result.add_incoming(y, after)
    return result


@intrinsic
def signs_of_channels(_context: Any, x: Any, alpha: Any, beta: Any, mode: Any, valid: Any) -> Any:
    """Bits 0 to 15: which of 16 channels are below zero; bits 16 to 31: which are NaN."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        x, alpha, beta, mode, valid = arguments
        kind = vector(F32, LANES)
        columns = Columns(builder, valid)
        y = _normalised(builder, columns.load(x, kind), alpha, beta, mode, lambda place: columns.load(place, kind))
        negative = builder.bitcast(builder.fcmp_ordered("<", y, ir.Constant(kind, [0.0] * LANES)), I16)
        missing = builder.bitcast(builder.fcmp_unordered("uno", y, y), I16)
        return builder.or_(builder.zext(negative, I64), builder.shl(builder.zext(missing, I64), constant(16)))

    return signature(5, types.int64), emit


@intrinsic
def signs_of_pixels(
    _context: Any, x: Any, step: Any, channels: Any, alpha: Any, beta: Any, mode: Any, out: Any, out_step: Any
) -> Any:
    """Store one word of up to 64 channels for each of 16 pixels side by side in planes; return nonzero if any is NaN."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        x, step, channels, alpha, beta, mode, out, out_step = arguments
        kind, wide = vector(F32, LANES), vector(I64, LANES)
        words = cgutils.alloca_once(builder, wide)
        missing = cgutils.alloca_once(builder, vector(I1, LANES))
        builder.store(constant(0, wide), words)
        builder.store(constant(0, vector(I1, LANES)), missing)
        with cgutils.for_range(builder, channels) as loop:
            at = builder.mul(loop.index, constant(4))
            pixels = load(builder, builder.add(x, builder.mul(loop.index, step)), kind, align=4)

            def number(table: ir.Value) -> ir.Value:
                return splat(builder, load(builder, builder.add(table, at), F32, align=4), LANES)

            y = _normalised(builder, pixels, alpha, beta, mode, number)
            negative = builder.fcmp_ordered("<", y, ir.Constant(kind, [0.0] * LANES))
            bit = splat(builder, builder.shl(constant(1), loop.index), LANES)
            chosen = builder.select(negative, bit, constant(0, wide))
            builder.store(builder.or_(builder.load(words), chosen), words)
            builder.store(builder.or_(builder.load(missing), builder.fcmp_unordered("uno", y, y)), missing)
        total = builder.load(words)
        for lane in range(LANES):
            word = builder.extract_element(total, constant(lane, I32))
            store(builder, word, builder.add(out, builder.mul(out_step, constant(lane))), align=8)
        return builder.zext(builder.bitcast(builder.load(missing), I16), I64)

    return signature(8, types.int64), emit


@intrinsic
def below(_context: Any, z: Any, threshold: Any, valid: Any) -> Any:
    """Which of 16 int32 are below their thresholds; where there are none, no."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        columns = Columns(builder, arguments[2])
        left, right = (columns.load(place, vector(I32, LANES)) for place in arguments[:2])
        return builder.zext(builder.bitcast(builder.icmp_signed("<", left, right), I16), I64)

    return signature(3, types.int64), emit


def pack_rows(block: int) -> None:
    """Signs of rows of floats. Words: 0 x, 1 rows, 2 C, 3 alpha, 4 beta, 5 mode, 6 out, 7 rows of a chunk, 8 set if NaN."""
    x, rows, channels = fetch(block, 0), fetch(block, 1), fetch(block, 2)
    alpha, beta, mode, out, run = fetch(block, 3), fetch(block, 4), fetch(block, 5), fetch(block, 6), fetch(block, 7)
    words = (channels + 63) // 64
    side = arrive(block)
    while True:
        first = take(block, side) * run
        if first < 0:
            break
        missing = 0
        for row in range(first, min(first + run, rows)):
            for word in range(words):
                value = 0
                for part in range(word * 64, min(word * 64 + 64, channels), 16):
                    at = 4 * part
                    place = x + 4 * row * channels + at
                    found = signs_of_channels(place, alpha + at, beta + at, mode, min(16, channels - part))
                    value |= (found & 0xFFFF) << (part - word * 64)
                    missing |= found >> 16
                poke(out + 8 * (row * words + word), value)
        if missing:
            poke(block + 64, 1)


def pack_planes(block: int) -> None:
    """Signs of images in planes. Words: 0 x, 1 images, 2 C, 3 alpha, 4 beta, 5 mode, 6 out, 7 pixels (16 or more), 8 set if NaN."""
    x, channels = fetch(block, 0), fetch(block, 2)
    alpha, beta, mode, out, pixels = fetch(block, 3), fetch(block, 4), fetch(block, 5), fetch(block, 6), fetch(block, 7)
    words, runs = (channels + 63) // 64, (pixels + 63) // 64
    side = arrive(block)
    while True:
        chunk = take(block, side)
        if chunk < 0:
            break
        image, begin = chunk // runs, chunk % runs * 64
        missing = 0
        for start in range(begin, min(begin + 64, pixels), 16):
            first = min(start, pixels - 16)  # the last ones overlap
            for word in range(words):
                part = word * 64
                place = x + 4 * ((image * channels + part) * pixels + first)
                target = out + 8 * ((image * pixels + first) * words + word)
                count = min(64, channels - part)
                missing |= signs_of_pixels(
                    place, 4 * pixels, count, alpha + 4 * part, beta + 4 * part, mode, target, 8 * words
                )
        if missing:
            poke(block + 64, 1)


def threshold_rows(block: int) -> None:
    """Integers to bits. Words: 0 z, 1 rows, 2 C, 3 threshold, 4 flip, 5 out, 6 rows of a chunk."""
    z, rows, channels, threshold = fetch(block, 0), fetch(block, 1), fetch(block, 2), fetch(block, 3)
    flip, out, run = fetch(block, 4), fetch(block, 5), fetch(block, 6)
    words = (channels + 63) // 64
    side = arrive(block)
    while True:
        first = take(block, side) * run
        if first < 0:
            break
        for row in range(first, min(first + run, rows)):
            for word in range(words):
                value = read(flip + 8 * word)
                for part in range(word * 64, min(word * 64 + 64, channels), 16):
                    found = below(z + 4 * (row * channels + part), threshold + 4 * part, min(16, channels - part))
                    value ^= found << (part - word * 64)
                poke(out + 8 * (row * words + word), value)


def pool(block: int) -> None:
    """AND over windows. Words: 0 x, 1-4 N, H, W, words of a pixel, 5-6 OH, OW, 7-8 kernel, 9-10 stride, 11-12 padding, 13 out."""
    x, height, width, words = fetch(block, 0), fetch(block, 2), fetch(block, 3), fetch(block, 4)
    oh, ow, out = fetch(block, 5), fetch(block, 6), fetch(block, 13)
    side = arrive(block)
    while True:
        chunk = take(block, side)
        if chunk < 0:
            break
        image, i = chunk // oh, chunk % oh
        top = i * fetch(block, 9) - fetch(block, 11)
        rows = max(top, 0), min(top + fetch(block, 7), height)
        for j in range(ow):
            left = j * fetch(block, 10) - fetch(block, 12)
            columns = max(left, 0), min(left + fetch(block, 8), width)
            for word in range(words):
                value = -1
                for r in range(rows[0], rows[1]):
                    for c in range(columns[0], columns[1]):
                        value &= read(x + 8 * (((image * height + r) * width + c) * words + word))
                poke(out + 8 * ((chunk * ow + j) * words + word), value)


def digits(block: int) -> None:
    """Bytes to bit planes. Words: 0 x, 1 rows, 2 C, 3 out, 4 rows of a chunk."""
    x, rows, channels, out, run = fetch(block, 0), fetch(block, 1), fetch(block, 2), fetch(block, 3), fetch(block, 4)
    words = (channels + 63) // 64
    side = arrive(block)
    while True:
        first = take(block, side) * run
        if first < 0:
            break
        for row in range(first, min(first + run, rows)):
            for word in range(words):
                a, b, c, d, e, f, g, h = 0, 0, 0, 0, 0, 0, 0, 0
                part = word * 64
                for i in range(min(64, channels - part)):
                    value = read_byte(x + row * channels + part + i)
                    a |= (value & 1) << i
                    b |= ((value >> 1) & 1) << i
                    c |= ((value >> 2) & 1) << i
                    d |= ((value >> 3) & 1) << i
                    e |= ((value >> 4) & 1) << i
                    f |= ((value >> 5) & 1) << i
                    g |= ((value >> 6) & 1) << i
                    h |= (value >> 7) << i
                place = out + 8 * (row * words + word)
                for plane in (a, b, c, d, e, f, g, h):
                    poke(place, plane)
                    place += 8 * rows * words


@intrinsic
def join_pixels(_context: Any, target: Any, source: Any, count: Any, taps: Any, step: Any, channels: Any) -> Any:
    """Word x of the target: the channels of pixels x, x + step, ..., `taps` of them; eight words at a time, from the left.

    That order allows source and target to be the same: what a word reads stands at or after it.
    """

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        target, source, count, taps, step, channels = arguments
        kind = vector(I64, 8)
        joined = cgutils.alloca_once(builder, kind)
        with cgutils.for_range_slice(builder, constant(0), count, constant(8), I64) as (first, _):
            builder.store(constant(0, kind), joined)
            with cgutils.for_range(builder, taps) as loop:
                pixel = builder.add(first, builder.mul(loop.index, step))
                words = load(builder, builder.add(source, builder.mul(pixel, constant(8))), kind)
                shift = splat(builder, builder.mul(loop.index, channels), 8)
                builder.store(builder.or_(builder.load(joined), builder.shl(words, shift)), joined)
            place = builder.add(target, builder.mul(first, constant(8)))
            store(builder, builder.load(joined), place, align=8)
        return context.get_dummy_value()

    return signature(6), emit


def border(block: int) -> None:
    """Images with a border of zeros, and neighbours joined.

    Words: 0 x, 1 images, 2 rows of one, 3 words of its row; 4 rows above, 5 words at the left; 6 out, 7-8 rows and words with the
    border, 9 bytes of a line; 10 taps joined (1: none), 11 taps joined in a second word, 12 their distance, 13 channels,
    14 bytes to the second words; 15 rows of a chunk.
    """
    x, images, height, width = fetch(block, 0), fetch(block, 1), fetch(block, 2), fetch(block, 3)
    top, left, out, rows, words = fetch(block, 4), fetch(block, 5), fetch(block, 6), fetch(block, 7), fetch(block, 8)
    size, joined, second, step = fetch(block, 9), fetch(block, 10), fetch(block, 11), fetch(block, 12)
    channels, lane, run = fetch(block, 13), fetch(block, 14), fetch(block, 15)
    side = arrive(block)
    while True:
        first = take(block, side) * run
        if first < 0:
            break
        for row in range(first, min(first + run, images * rows)):
            line, inside = out + row * size, row % rows - top
            if inside < 0 or inside >= height:
                clear(line, size // 8)
                continue
            clear(line, left)
            copy(line + 8 * left, x + 8 * width * (row // rows * height + inside), width)
            clear(line + 8 * (left + width), words - left - width)
            if second > 0:
                join_pixels(line + lane, line, lane // 8, second, step, channels)
            if joined > 1:
                join_pixels(line, line, lane // 8, joined, step, channels)


def _signed_sums(rows: int) -> Any:
    """Return the intrinsic that writes 64 sums of +-x_k, for that many rows of x, through the masks of 64 outputs."""

    @intrinsic
    def sums(_context: Any, x: Any, x_stride: Any, k: Any, masks: Any, out: Any, out_stride: Any, valid: Any) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
            x, x_stride, k, masks, out, out_stride, valid = arguments
            kind = vector(F32, LANES)
            zero = ir.Constant(kind, [0.0] * LANES)
            grid = [(r, v) for r in range(rows) for v in range(4)]
            lines = [builder.add(x, builder.mul(x_stride, constant(r))) for r in range(rows)]
            totals = [cgutils.alloca_once(builder, kind) for _ in grid]
            parts = [cgutils.alloca_once(builder, kind) for _ in grid]
            for slot in totals:
                builder.store(zero, slot)
            with cgutils.for_range_slice(builder, constant(0), k, constant(64), I64) as (begin, _):
                for slot in parts:
                    builder.store(zero, slot)
                end = builder.add(begin, constant(64))
                end = builder.select(builder.icmp_signed("<", end, k), end, k)
                with cgutils.for_range_slice(builder, begin, end, constant(1), I64) as (i, _):
                    place = builder.add(masks, builder.mul(i, constant(8)))
                    minus = [
                        builder.bitcast(load(builder, place, I16, 2 * v, align=2), vector(I1, LANES)) for v in range(4)
                    ]
                    at = builder.mul(i, constant(4))
                    for r, v in grid:
                        value = splat(builder, load(builder, builder.add(lines[r], at), F32, align=4), LANES)
                        term = builder.select(minus[v], builder.fneg(value), value)
                        slot = parts[r * 4 + v]
                        builder.store(builder.fadd(builder.load(slot), term), slot)
                for total, part in zip(totals, parts, strict=True):
                    builder.store(builder.fadd(builder.load(total), builder.load(part)), total)
            for r, v in grid:
                left = builder.sub(valid, constant(LANES * v))
                with builder.if_then(builder.icmp_signed(">", left, constant(0))):
                    line = builder.add(out, builder.mul(out_stride, constant(r)))
                    place = builder.add(line, constant(4 * LANES * v))
                    Columns(builder, left).store(builder.load(totals[r * 4 + v]), place)
            return context.get_dummy_value()

        return signature(7), emit

    return sums


_sums_4, _sums_1 = _signed_sums(4), _signed_sums(1)


def signed_sums(block: int) -> None:
    """x times signs. Words: 0 x, 1 M, 2 K, 3 masks, 4 N, 5 out."""
    x, rows, k = fetch(block, 0), fetch(block, 1), fetch(block, 2)
    masks, n, out = fetch(block, 3), fetch(block, 4), fetch(block, 5)
    side = arrive(block)
    while True:
        panel = take(block, side)
        if panel < 0:
            break
        place, column, valid = masks + 8 * panel * k, out + 256 * panel, min(64, n - 64 * panel)
        m = 0
        while m + 4 <= rows:
            _sums_4(x + 4 * m * k, 4 * k, k, place, column + 4 * m * n, 4 * n, valid)
            m += 4
        while m < rows:
            _sums_1(x + 4 * m * k, 4 * k, k, place, column + 4 * m * n, 4 * n, valid)
            m += 1
