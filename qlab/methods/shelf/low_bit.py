"""Weights or activations of a few bits."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES: tuple[MethodInfo, ...] = ()
