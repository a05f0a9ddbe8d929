"""The matrix product of packed signs: a micro-kernel in LLVM vector code, and the loop over its tiles.

A tile is a few rows (output pixels) by 16 columns (output channels). Weights stand in panels (panel, word k, 16 columns), so
that a vector holds word k of eight channels and the row's word k is broadcast: the lanes are output channels, nothing is summed
across lanes, and 9 words (a 3x3 convolution of 64 channels) run as fast as 64. For every pair of vectors

    u += popcount(row word ^ panel words)            three instructions for eight words

What stands at word k of a row is found by two tables, where a row starts and where tap k lies from there, so a
convolution is the same loop as a product. Carry-save adders (one popcount for two words, by ternary logic) were tried: on Zen 5,
which counts as fast as it adds, they lost a quarter.

The sum of a row over P bit planes, sum_n 2^n u_n, comes by Horner's rule: plane P - 1 first, doubled before the next. The
result of a channel is

    z = bias - ((u ^ complement) << shift)      signs: shift 1, complement 0, bias K:  K - 2 u
                                                digits {0, 1}: shift 0, complement -1: bias + 1 + u
    bit = (z < threshold) = u > limit, limit = (bias - threshold) >> 1           signs only

where bias and limit are tables by class of the pixel (which taps lie outside the image) and channel, so that borders cost nothing.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qlab.binary.kernels import cpu_block as B
from qlab.binary.kernels.cpu_block import COLUMNS, INTEGERS, SIGNS
from qlab.binary.kernels.cpu_ir import (
    F32,
    I16,
    I32,
    I64,
    Columns,
    affine,
    arrive,
    call,
    constant,
    fetch,
    intrinsic,
    join,
    load,
    signature,
    splat,
    store,
    take,
    vector,
    wide_registers,
)

LANES = 8
VECTORS = COLUMNS // LANES
ROWS = 8 if wide_registers() else 2  # accumulators ROWS x 2 x 512 bits: 16 of 32 registers, or 8 of 16 (AVX2)


def _field(builder: ir.IRBuilder, block: ir.Value, index: int) -> ir.Value:
    return load(builder, block, I64, 8 * index)


def _popcounts(builder: ir.IRBuilder, block: ir.Value, starts: list[ir.Value], panel: ir.Value) -> list[list[ir.Value]]:
    """Emit the loops over planes and words; return u per row and vector."""
    lanes = vector(I64, LANES)
    taps, words = _field(builder, block, B.TAPS), _field(builder, block, B.WORDS)
    planes, stride = _field(builder, block, B.PLANES), _field(builder, block, B.PLANE_STRIDE)
    grid = [(r, v) for r in range(len(starts)) for v in range(VECTORS)]
    before = builder.block
    plane_loop, word_loop, next_plane, done = (
        builder.append_basic_block(name) for name in ("plane", "word", "next", "done")
    )
    last = builder.sub(planes, constant(1))
    top = builder.mul(last, stride)
    builder.branch(plane_loop)

    builder.position_at_end(plane_loop)
    left, plane = builder.phi(I64), builder.phi(I64)
    doubled = [builder.phi(lanes) for _ in grid]
    builder.branch(word_loop)

    builder.position_at_end(word_loop)
    k, tap, column = builder.phi(I64), builder.phi(I64), builder.phi(I64)
    sums = [builder.phi(lanes) for _ in grid]
    offset = builder.add(load(builder, tap, I64), plane)
    weights = [load(builder, column, lanes, 8 * LANES * v) for v in range(VECTORS)]
    row = [splat(builder, load(builder, builder.add(start, offset), I64), LANES) for start in starts]
    differing = [call(builder, "llvm.ctpop.v8i64", builder.xor(row[r], weights[v])) for r, v in grid]
    new = [builder.add(total, count) for total, count in zip(sums, differing, strict=True)]
    after = builder.add(k, constant(1))
    for phi, first, then in (
        (k, constant(0), after),
        (tap, taps, builder.add(tap, constant(8))),
        (column, panel, builder.add(column, constant(8 * COLUMNS))),
        *zip(sums, doubled, new, strict=True),
    ):
        phi.add_incoming(first, plane_loop)
        phi.add_incoming(then, word_loop)
    more = builder.icmp_signed("<", after, words)
    finished = builder.append_basic_block("finished")
    builder.cbranch(more, word_loop, finished)

    builder.position_at_end(finished)
    builder.cbranch(builder.icmp_signed(">", left, constant(0)), next_plane, done)

    builder.position_at_end(next_plane)
    twice = [builder.shl(total, constant(1, lanes)) for total in new]
    for phi, first, then in (
        (left, last, builder.sub(left, constant(1))),
        (plane, top, builder.sub(plane, stride)),
        *((phi, constant(0, lanes), total) for phi, total in zip(doubled, twice, strict=True)),
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(then, next_plane)
    builder.branch(plane_loop)

    builder.position_at_end(done)
    return [[new[r * VECTORS + v] for v in range(VECTORS)] for r in range(len(starts))]


def _tile(rows: int) -> Any:
    """Return the intrinsic tile(block, x, row, first, panel, channel, valid, place of bias) for that many rows."""

    @intrinsic
    def tile(
        _context: Any, block: Any, x: Any, row: Any, first: Any, panel: Any, channel: Any, valid: Any, bias: Any
    ) -> Any:
        def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
            block, x, row, first, panel, channel, valid, bias = arguments
            places = builder.add(_field(builder, block, B.PLACES), builder.mul(row, constant(8)))
            starts = [builder.add(x, load(builder, places, I64, 8 * r)) for r in range(rows)]
            u = _popcounts(builder, block, starts, panel)
            wide = vector(I64, LANES)
            classes = builder.add(_field(builder, block, B.CLASSES), builder.mul(row, constant(8)))
            tables = [builder.add(bias, load(builder, classes, I64, 8 * r)) for r in range(rows)]
            kind, stride = _field(builder, block, B.KIND), _field(builder, block, B.OUT_STRIDE)
            lines = [builder.add(_field(builder, block, B.OUT), builder.mul(first, stride))]
            for _ in range(rows - 1):
                lines.append(builder.add(lines[-1], stride))
            is_signs = builder.icmp_signed("==", kind, constant(SIGNS))
            at_bit = builder.lshr(channel, constant(3))
            at_column = builder.mul(channel, constant(4))
            with builder.if_else(is_signs) as (signs, numbers):
                with signs:
                    flip = load(builder, builder.add(_field(builder, block, B.FLIP), at_bit), I16, align=2)
                    for r in range(rows):
                        bits = [
                            builder.icmp_signed(">", u[r][v], load(builder, tables[r], wide, 8 * LANES * v))
                            for v in range(VECTORS)
                        ]
                        mask = builder.bitcast(join(builder, *bits), I16)
                        store(builder, builder.xor(mask, flip), builder.add(lines[r], at_bit), align=2)
                with numbers:
                    columns = Columns(builder, valid)
                    shift, complement = (
                        splat(builder, _field(builder, block, name), LANES) for name in (B.SHIFT, B.COMPLEMENT)
                    )
                    z = []
                    for r in range(rows):
                        parts = []
                        for v in range(VECTORS):
                            counted = builder.shl(builder.xor(u[r][v], complement), shift)
                            whole = builder.sub(load(builder, tables[r], wide, 8 * LANES * v), counted)
                            parts.append(builder.trunc(whole, vector(I32, LANES)))
                        z.append(join(builder, *parts))
                    with builder.if_else(builder.icmp_signed("==", kind, constant(INTEGERS))) as (integers, floats):
                        with integers:
                            for r in range(rows):
                                columns.store(z[r], builder.add(lines[r], at_column))
                        with floats:
                            _floats(builder, block, columns, z, lines, first, at_column, at_bit)
            return context.get_dummy_value()

        return signature(8), emit

    return tile


def _floats(
    builder: ir.IRBuilder,
    block: ir.Value,
    columns: Columns,
    z: list[ir.Value],
    lines: list[ir.Value],
    first: ir.Value,
    at_column: ir.Value,
    at_bit: ir.Value,
) -> None:
    """Emit y = z alpha + beta (+ residual) for each row, stored as float32, and the bits of its signs where wanted."""
    kind = vector(F32, COLUMNS)
    alpha, beta = (
        load(builder, builder.add(_field(builder, block, name), at_column), kind, align=4) for name in (B.ALPHA, B.BETA)
    )
    fused = builder.icmp_signed("!=", _field(builder, block, B.FUSED), constant(0))
    residual, signs = _field(builder, block, B.RESIDUAL), _field(builder, block, B.SIGN_BITS)
    stride, sign_stride = _field(builder, block, B.OUT_STRIDE), _field(builder, block, B.SIGN_STRIDE)
    for r, line in enumerate(lines):
        row = builder.add(first, constant(r))
        y = affine(builder, builder.sitofp(z[r], kind), alpha, beta, fused)
        without = builder.block
        with builder.if_then(builder.icmp_signed("!=", residual, constant(0))):
            place = builder.add(builder.add(residual, builder.mul(row, stride)), at_column)
            added = builder.fadd(y, columns.load(place, kind))
            with_residual = builder.block
        total = builder.phi(kind)
        total.add_incoming(y, without)
        total.add_incoming(added, with_residual)
        columns.store(total, builder.add(line, at_column))
        with builder.if_then(builder.icmp_signed("!=", signs, constant(0))):
            negative = builder.bitcast(builder.fcmp_ordered("<", total, ir.Constant(kind, [0.0] * COLUMNS)), I16)
            place = builder.add(builder.add(signs, builder.mul(row, sign_stride)), at_bit)
            store(builder, negative, place, align=2)


_tile_most, _tile_4, _tile_2, _tile_1 = _tile(ROWS), _tile(min(4, ROWS)), _tile(2), _tile(1)


def gemm(block: int) -> None:
    """Take chunks (a run of rows of one image, a run of panels) and compute their tiles.

    A run of rows that is no multiple of the tile's ends with a tile that overlaps the one before it and computes the same
    values again.
    """
    rows_each, rows_all = fetch(block, B.ROWS_EACH), fetch(block, B.ROWS)
    run, panels_run = fetch(block, B.ROW_RUN), fetch(block, B.PANEL_RUN)
    panels, per_group = fetch(block, B.PANELS), fetch(block, B.PANELS_PER_GROUP)
    panel_bytes = fetch(block, B.WORDS) * (8 * COLUMNS)
    runs = (rows_each + run - 1) // run
    panel_runs = (panels + panels_run - 1) // panels_run
    side = arrive(block)
    while True:
        chunk = take(block, side)
        if chunk < 0:
            break
        image, rest = divmod(chunk, runs * panel_runs)
        begin = rest // panel_runs * run
        first_panel = rest % panel_runs * panels_run
        first = image * rows_each
        end = min(begin + run, rows_each, rows_all - first)
        for q in range(first_panel, min(first_panel + panels_run, panels)):
            group = q // per_group
            within = (q - group * per_group) * COLUMNS
            channel = group * fetch(block, B.GROUP_CHANNELS) + within
            valid = min(COLUMNS, fetch(block, B.GROUP_CHANNELS) - within)
            x = fetch(block, B.X) + image * fetch(block, B.IMAGE_STRIDE) + group * fetch(block, B.GROUP_STRIDE)
            panel = fetch(block, B.PANEL) + q * panel_bytes
            bias = fetch(block, B.BIAS) + q * (8 * COLUMNS)
            m = begin
            while m < end:
                left = end - m
                if left >= ROWS or (left > ROWS // 2 and end >= ROWS):
                    m = min(m, end - ROWS)
                    _tile_most(block, x, m, first + m, panel, channel, valid, bias)
                    m += ROWS
                elif left >= 4 or (left > 2 and end >= 4):
                    m = min(m, end - 4)
                    _tile_4(block, x, m, first + m, panel, channel, valid, bias)
                    m += 4
                elif left >= 2:
                    _tile_2(block, x, m, first + m, panel, channel, valid, bias)
                    m += 2
                else:
                    _tile_1(block, x, m, first + m, panel, channel, valid, bias)
                    m += 1
