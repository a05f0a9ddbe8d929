"""The kernels of `reference` on the CPU, compiled by Numba; and fused forms that a packed net is made of.

Weights may be raw words or the panels of `prepack` and `prepack_conv`: rearranging them takes longer than a small product,
and panels also keep the plan (tables, sizes) of every input shape that they have seen. `out` reuses a result's memory; it must
be contiguous and of the result's shape and type. Arrays are numpy's; what is not contiguous is copied. Results do not depend on the
number of threads, which is torch's (`torch.set_num_threads`).

Nothing is compiled at import; the first call does it, a second or two on a machine's first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlab.binary.kernels.cpu_block import COLUMNS
from qlab.binary.kernels.cpu_floats import affine_pack, bitplane_input, max_pool2d, pack, signed_sum_matmul, threshold_pack, unpack
from qlab.binary.kernels.cpu_panels import Panels, as_words, prepack, prepack_conv
from qlab.binary.kernels.cpu_plan import Pad, Plan, conv_plan, matmul_plan
from qlab.binary.kernels.reference import Codes, Floats, Ints, Pair, Words, affine, words_for
from qlab.errors import InputError

__all__ = [
    "Panels",
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
    "matmul_affine",
    "matmul_threshold",
    "max_pool2d",
    "pack",
    "prepack",
    "prepack_conv",
    "signed_sum_matmul",
    "threshold_pack",
    "unpack",
    "warm_up",
]

Doubles = np.ndarray[Any, np.dtype[np.float64]]
Weights = Words | Panels
