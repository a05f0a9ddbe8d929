"""Max-pooling of floats, plane by plane: rows first, which the compiler makes vectors of, then columns.

    max_pool of a batch norm alpha x + beta equals alpha extreme(x) + beta,   extreme = max where alpha >= 0, min where alpha < 0

because rounding never changes an order: the batch norm then runs on what is left, a quarter of the numbers for a stride of two.
The minimum is the maximum of -x, negated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from qlab.binary.kernels.cpu_ir import arrive, fetch, take

__all__ = ["float_pool"]


@intrinsic
def _floats_at(_context: Any, address: Any) -> Any:
    """floats_at(address): a pointer to float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), emit


floats_at: Any = _floats_at  # what mypy sees of an intrinsic is its emitter


def float_pool(block: int) -> None:
    """Maximum over windows of planes. Words: 0 x, 1 planes, 2-3 H, W, 4-5 OH, OW, 6-7 kernel, 8-9 stride, 10-11 padding, 12 signs
    of the planes, 13 scratch (planes, 2, W + 2 padding), 14 out."""
    planes, height, width = fetch(block, 1), fetch(block, 2), fetch(block, 3)
    oh, ow = fetch(block, 4), fetch(block, 5)
    x = carray(floats_at(fetch(block, 0)), (planes, height, width))
    signs, out = carray(floats_at(fetch(block, 12)), planes), carray(floats_at(fetch(block, 14)), (planes, oh, ow))
    kh, kw, sh, sw = fetch(block, 6), fetch(block, 7), fetch(block, 8), fetch(block, 9)
    ph, pw = fetch(block, 10), fetch(block, 11)
    whole, last = width + 2 * pw, (ow - 1) * sw + 1
    lines = carray(floats_at(fetch(block, 13)), (planes, 2, whole))
    side = arrive(block)
    while True:
        plane = take(block, side)
        if plane < 0:
            break
        line, most, sign = lines[plane, 0], lines[plane, 1], signs[plane]
        inner = line[pw : pw + width]
        for c in range(pw):
            line[c] = line[whole - 1 - c] = -np.inf
        for i in range(oh):
            top = max(i * sh - ph, 0)
            row = x[plane, top]
            for c in range(width):
                inner[c] = sign * row[c]
            for r in range(top + 1, min(i * sh - ph + kh, height)):
                row = x[plane, r]
                for c in range(width):
                    v, m = sign * row[c], inner[c]
                    inner[c] = v if (v > m) | (v != v) else m  # NaN stays, as in torch
            for c in range(last):
                most[c] = line[c]
            for t in range(1, kw):
                moved = line[t:]
                for c in range(last):
                    v, m = moved[c], most[c]
                    most[c] = v if (v > m) | (v != v) else m
            target, picked = out[plane, i], most[::sw]
            for j in range(ow):
                target[j] = sign * picked[j]
