"""Measures tile sizes of the tensor-core kernels on the GPU at hand.

    python -m qlab.binary.kernels.cuda_tune

prints how long each candidate takes for an 8192 cube, and the table to paste into `qlab.binary.kernels.cuda.TILES`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from qlab.binary.kernels.cuda import Capability, Device, choose
from qlab.binary.kernels.cuda_plan import Plan
from qlab.errors import QlabError

__all__ = ["candidates", "table", "tune"]

MAX_THREADS = 512
MAX_RESULTS = 128 * 256  # a block's accumulators: half of the registers of a multiprocessor


def candidates(kernel: str, shared_limit: int) -> Iterator[dict[str, int]]:
    """Yield the tiles of a kernel that fit into a block's registers and shared memory.

    Args:
        kernel: "mma_gemm" or "wgmma_gemm".
        shared_limit: the most dynamic shared memory that a block may ask for, in bytes.
    """
    if kernel == "wgmma_gemm":
        sizes = product((64, 128, 256), (64, 128, 256), (4, 5, 6, 8))
        tiles = [{"BM": bm, "BN": bn, "STAGES": stages} for bm, bn, stages in sizes]
    else:
        sides = product((64, 128, 256), (64, 128, 256), (32, 64), (32, 64), (2, 3, 4, 5))
        tiles = [
            {"BM": bm, "BN": bn, "WM": wm, "WN": wn, "STAGES": stages}
            for bm, bn, wm, wn, stages in sides
            if bm >= 2 * wm and bn >= 2 * wn
        ]
    for tile in tiles:
        plan = Plan(kernel, tile)
        small = plan.rows * plan.columns <= MAX_RESULTS and plan.threads <= MAX_THREADS
        if small and plan.shared_bytes <= shared_limit:
            yield tile


def _seconds(device: Device, a: Any, b: Any, k: int, rounds: int) -> float:
    """Return the median seconds of a product."""
    cupy = device.xp
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(rounds + 2):  # the first two warm up
        start.record()
        device.binary_matmul(a, b, k)
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1000)
    return statistics.median(times[2:])


def tune(size: int = 8192, rounds: int = 10) -> dict[str, dict[str, int]]:
    """Return the fastest tile of each kernel that this device runs, and print every measurement.

    Args:
        size: M, N and K of the product.
        rounds: timed products of each candidate.

    Raises:
        QlabError: no device, or none with 1-bit tensor cores.
    """
    device = Device()
    capability = device.capability
    kernels = {"mma_gemm", choose(capability, size, size, size // 64)} - {"popcount_gemm"}
    if choose(capability, size, size, size // 64) == "popcount_gemm":
        raise QlabError(
            f"capability {capability} has no 1-bit tensor cores worth tuning; the popcount kernel is taken there"
        )
    limit = int(device.xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
    rng = np.random.default_rng(0)
    a, b = (device.xp.asarray(rng.integers(0, 2**64, (size, size // 64), dtype=np.uint64)) for _ in range(2))
    best: dict[str, dict[str, int]] = {}
    for kernel in sorted(kernels):
        times = []
        for tile in candidates(kernel, limit):
            seconds = _seconds(Device(kernel, tile), a, b, size, rounds)
            times.append((seconds, tile))
            print(f"{kernel} {tile}: {seconds * 1e3:.3f} ms, {2 * size**3 / seconds / 1e12:.0f} TOP/s", flush=True)
        best[kernel] = min(times, key=lambda pair: pair[0])[1]
    print(table(capability, best))
    return best


def table(capability: Capability, tiles: dict[str, dict[str, int]]) -> str:
    """Return the entry of `TILES` for a capability, as Python."""
    rows = "".join(f'        "{kernel}": {tile},\n'.replace("'", '"') for kernel, tile in tiles.items())
    return f"    {capability}: {{\n{rows}    }},"


if __name__ == "__main__":
    tune()
