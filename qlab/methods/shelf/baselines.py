"""Baselines without quantization."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
    MethodInfo(
        name="full_precision",
        title="Full precision: the float net that every quantized one is compared with",
        target="qlab.methods.baselines.full_precision:FullPrecision",
        family="baselines",
        differentiable=True,
        properties=("one step equals plain torch, bit for bit",),
    ),
)
