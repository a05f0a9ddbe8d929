"""How a CPU kernel is compiled and run: lazily, once, on as many threads as torch uses.

The threads are torch's own: its OpenMP runtime is asked to run the kernel (`GOMP_parallel`), so there is one pool, no
oversubscription when torch and packed layers take turns, `torch.set_num_threads` counts, and calls from several Python
threads are safe. Numba's layers would start a second pool beside torch's, and one of them aborts the process when two
threads call it. Where torch brings no such runtime (macOS, Windows), Python threads run the same kernel: it holds no GIL.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

__all__ = ["address", "compile_kernel", "launch"]

log = logging.getLogger("qlab")

SLOW = 2.0  # seconds of compilation that are worth a line

KERNELS = {
    "gemm": "cpu_gemm",
    "digits": "cpu_bits",
    "pack_planes": "cpu_bits",
    "pack_rows": "cpu_bits",
    "pool": "cpu_bits",
    "signed_sums": "cpu_bits",
    "threshold_rows": "cpu_bits",
}

_lock = threading.RLock()
_kernels: dict[str, Any] = {}
_seconds = 0.0
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # an OpenMP pool does not survive a fork: a child process works alone


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Any:
    """Return GOMP_parallel(function, data, threads, flags) of the runtime that torch is linked with, or None."""
    try:
        fork = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    fork.restype = None
    return fork


@cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="qlab-kernel")


def compile_kernel(name: str) -> Any:
    """Return the kernel as a Numba cfunc, compiled on first use and cached on disk where that can be written."""
    global _seconds
    with _lock:
        if name in _kernels:
            return _kernels[name]
        from numba import cfunc, types

        start = time.perf_counter()
        function = getattr(importlib.import_module(f"qlab.binary.kernels.{KERNELS[name]}"), name)
        one_word = types.void(types.int64)
        try:
            kernel = cfunc(one_word, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no folder to keep it in
            kernel = cfunc(one_word, error_model="numpy")(function)
        before, _seconds = _seconds, _seconds + time.perf_counter() - start
        if before < SLOW <= _seconds:
            log.info("compiling the CPU kernels of packed nets; this happens once per machine and version")
        _kernels[name] = kernel
        return kernel


def launch(name: str, words: Sequence[int], chunks: int, serial: bool = False) -> Any:
    """Run a kernel on a block of int64 words, on at most `chunks` threads; return the block.

    Args:
        name: the kernel.
        words: its arguments; word 0 has to be 0. The arrays they point to have to outlive the call.
        chunks: of work; more threads than that would idle.
        serial: whether waking another thread would take longer than the work.
    """
    kernel = _kernels.get(name) or compile_kernel(name)
    block = (ctypes.c_int64 * len(words))(*words)
    threads = 1 if serial or _forked else min(torch.get_num_threads(), chunks)
    if threads <= 1:
        kernel.ctypes(ctypes.addressof(block))
    elif (fork := _openmp()) is not None:
        fork(kernel.address, ctypes.addressof(block), threads, 0)
    else:
        others = [_python_threads().submit(kernel.ctypes, ctypes.addressof(block)) for _ in range(threads - 1)]
        kernel.ctypes(ctypes.addressof(block))
        for other in others:
            other.result()
    return block


def address(array: Any) -> int:
    """Return where an array's data starts; quicker than `array.ctypes.data`."""
    return array.__array_interface__["data"][0]
