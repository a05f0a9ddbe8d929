"""The CUDA kernels on the CPU: the very sources of `cuda`, compiled by g++ with the small device of `csrc/shim/`, run bit for bit.

Not meant to be fast: it proves the sources where there is no GPU. The functions are those of `reference`, on numpy arrays.

    >>> from qlab.binary.kernels import cuda_shim
    >>> z = cuda_shim.binary_matmul(a, b, k)                     # whatever kernel a small GPU would take
    >>> cuda_shim.Shim("mma_gemm").binary_matmul(a, b, k)        # the tensor-core kernel

A compiled kernel is kept in the user's cache folder under the hash of its source; g++ is needed where it is not there yet.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qlab.binary.kernels.cuda_build import CSRC, cached, definitions, kernel_names, publish, source
from qlab.binary.kernels.cuda_host import Kernels
from qlab.binary.kernels.cuda_plan import Plan, popcount_plan
from qlab.errors import QlabError

__all__ = [
    "Shim",
    "affine",
    "affine_pack",
    "binary_conv2d",
    "binary_matmul",
    "bitplane_conv2d",
    "bitplane_input",
    "bitplane_matmul",
    "conv2d_threshold",
    "digits_conv2d",
    "digits_matmul",
    "matmul_threshold",
    "max_pool2d",
    "pack",
    "signed_sum_matmul",
    "threshold_pack",
    "unpack",
]

# No contraction: a * b + c rounds twice, as the source says where it matters. Warnings of CUDA's pragmas are not g++'s to give.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
)
# Tiles small enough for a CPU, of every kernel that multiplies matrices.
TILES: dict[str, dict[str, int]] = {
    "mma_gemm": {"BM": 32, "BN": 64, "WM": 16, "WN": 32, "STAGES": 3},
    "wgmma_gemm": {"BM": 64, "BN": 64, "STAGES": 4},
}


_ONE_LAUNCH = threading.Lock()  # the device of a library runs one kernel at a time


class Shim(Kernels):
    """The CUDA kernels on numpy arrays.

    Args:
        gemm: the kernel that multiplies matrices: "popcount_gemm", "mma_gemm" or "wgmma_gemm".
        tile: its tile, other than `TILES` or the popcount kernel's own choice.
        eager: whether asynchronous copies happen as early as they may, instead of as late. A right kernel does not notice.
    """

    def __init__(self, gemm: str = "popcount_gemm", tile: Mapping[str, int] | None = None, eager: bool = False) -> None:
        self.gemm = gemm
        self.tile = tile
        self.eager = eager

    @property
    def xp(self) -> Any:
        """Numpy."""
        return np

    def plan(self, rows: int, columns: int, words: int) -> Plan:
        """Return the tile of the kernel that was asked for."""
        tile = self.tile or TILES.get(self.gemm)
        return Plan(self.gemm, tile) if tile else popcount_plan(rows, columns)

    def _address(self, x: np.ndarray) -> int:
        return x.ctypes.data

    def launch(
        self,
        source: str,
        kernel: str,
        macros: Mapping[str, int | str],
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run a kernel on this thread.

        Raises:
            QlabError: the kernel breaks a rule of CUDA that the shim checks, or an argument is not of the kernel's type.
        """
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint * len(values))(*(ctypes.sizeof(value) for value in values))
        options = {**macros, "EAGER_COPIES": 1} if self.eager else macros
        launcher = getattr(_library(source, definitions(options)), f"launch_{kernel}")
        launcher.restype = ctypes.c_char_p
        with _ONE_LAUNCH:
            error = launcher((ctypes.c_uint * 3)(*grid), block, shared, len(values), sizes, pointers)
        if error:
            raise QlabError(f"{source}.cu, kernel {kernel}: {error.decode()}")


def _value(argument: Any) -> Any:
    """Return an argument as the C value that a kernel is given."""
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return np.ctypeslib.as_ctypes_type(argument.dtype)(int(argument))


@cache
def _library(name: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """Return a compiled source, with a function `launch_<kernel>` for each of its kernels."""
    shim = {path.name: path.read_text(encoding="utf-8") for path in sorted((CSRC / "shim").glob("*.hpp"))}
    text = source(name)
    launchers = "".join(f"SHIM_LAUNCHER({kernel})\n" for kernel in kernel_names(text))
    program = f'#include "shim.hpp"\n#line 1 "{name}.cu"\n{text}{launchers}'
    path = cached("shim", "\0".join([program, *shim.values(), *FLAGS, *options]), ".so")
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "kernel.so"
            _compile(program, options, built)
            publish(built.read_bytes(), path)
    return ctypes.CDLL(str(path))


def _compile(program: str, options: tuple[str, ...], out: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise QlabError(
            "running the CUDA sources on the CPU needs g++ (8 or newer), and none was found: apt-get install g++"
        )
    command = [compiler, *FLAGS, *options, f"-I{CSRC / 'shim'}", "-x", "c++", "-", "-o", str(out)]
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QlabError(f"g++ cannot compile a CUDA source for the CPU ({' '.join(options)}):\n{done.stderr[-4000:]}")


_KERNELS = Shim()
affine = _KERNELS.affine
affine_pack = _KERNELS.affine_pack
binary_conv2d = _KERNELS.binary_conv2d
binary_matmul = _KERNELS.binary_matmul
bitplane_conv2d = _KERNELS.bitplane_conv2d
bitplane_input = _KERNELS.bitplane_input
bitplane_matmul = _KERNELS.bitplane_matmul
conv2d_threshold = _KERNELS.conv2d_threshold
digits_conv2d = _KERNELS.digits_conv2d
digits_matmul = _KERNELS.digits_matmul
matmul_threshold = _KERNELS.matmul_threshold
max_pool2d = _KERNELS.max_pool2d
pack = _KERNELS.pack
signed_sum_matmul = _KERNELS.signed_sum_matmul
threshold_pack = _KERNELS.threshold_pack
unpack = _KERNELS.unpack
