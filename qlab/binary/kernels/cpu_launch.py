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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qlab.binary.kernels.cpu_block import CHUNKS, SIZE

__all__ = ["KERNELS", "address", "compile_kernel", "launch", "new_block"]

log = logging.getLogger("qlab")

SLOW = 2.0  # seconds of compilation that are worth a line
WAKING, WAKING_PYTHON = 4e-6, 2e-4  # seconds until another thread of OpenMP, of Python has begun
# On a busy machine a thread that slept may be woken a time slice late, and all wait for it. After a short kernel was that late,
# short kernels run on the calling thread alone for a while, twice as long each time that the next one is late again.
LATE = 1e-3
ALONE, ALONE_LONGEST = 5e-3, 0.5

KERNELS = {
    "gemm": "cpu_gemm",
    "border": "cpu_bits",
    "digits": "cpu_bits",
    "float_pool": "cpu_pool",
    "pack_planes": "cpu_bits",
    "pack_rows": "cpu_bits",
    "pool": "cpu_bits",
    "signed_sums": "cpu_bits",
    "threshold_rows": "cpu_bits",
}


_Block = ctypes.c_int64 * SIZE


@dataclass(frozen=True)
class _Kernel:
    """A compiled kernel: its address, a ctypes function of a block's address, and what owns the code."""

    address: int
    run: Any
    owner: Any


_lock = threading.RLock()
_kernels: dict[str, _Kernel] = {}
_seconds = 0.0
_forked = False
_alone, _alone_until = ALONE, 0.0


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


def compile_kernel(name: str) -> _Kernel:
    """Return a kernel, compiled by Numba on first use and cached on disk where that can be written."""
    global _seconds
    with _lock:
        if name in _kernels:
            return _kernels[name]
        from numba import cfunc, types

        start = time.perf_counter()
        function = getattr(importlib.import_module(f"qlab.binary.kernels.{KERNELS[name]}"), name)
        one_word = types.void(types.int64)
        try:
            made = cfunc(one_word, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no folder to keep it in
            made = cfunc(one_word, error_model="numpy")(function)
        before, _seconds = _seconds, _seconds + time.perf_counter() - start
        if before < SLOW <= _seconds:
            log.info("compiling the CPU kernels of packed nets; this happens once per machine and version")
        _kernels[name] = _Kernel(int(made.address or 0), made.ctypes, made)
        return _kernels[name]


def new_block(words: Iterable[int]) -> Any:
    """Return a block of int64 words: a kernel's arguments, and its counters, which are 0."""
    return _Block(*words)


def launch(name: str, block: Any, chunks: int, seconds: float) -> None:
    """Run a kernel on a block, on at most `chunks` threads.

    Args:
        name: the kernel.
        block: of `new_block`, for one call. The arrays that it points to have to outlive the call.
        chunks: how many there are of work.
        seconds: that one thread takes, roughly.
    """
    global _alone, _alone_until
    kernel = _kernels.get(name) or compile_kernel(name)
    block[CHUNKS] = chunks
    fork = _openmp()
    threads = 1 if _forked else min(torch.get_num_threads(), chunks)
    start = time.perf_counter()
    if threads <= 1 or seconds < (WAKING if fork else WAKING_PYTHON) or (seconds < LATE and start < _alone_until):
        kernel.run(ctypes.addressof(block))
        return
    if fork is not None:
        fork(kernel.address, ctypes.addressof(block), threads, 0)
    else:
        others = [_python_threads().submit(kernel.run, ctypes.addressof(block)) for _ in range(threads - 1)]
        kernel.run(ctypes.addressof(block))
        for other in others:
            other.result()
    end = time.perf_counter()
    if seconds < LATE < end - start:
        _alone, _alone_until = min(2 * _alone, ALONE_LONGEST), end + _alone
    else:
        _alone = ALONE


def address(array: Any) -> int:
    """Return where the data of a contiguous numpy array starts."""
    try:  # several times quicker than asking numpy
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # an array that may not be written, or is empty
        return array.__array_interface__["data"][0]
