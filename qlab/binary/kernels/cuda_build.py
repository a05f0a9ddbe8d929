"""The CUDA sources in `csrc/`: their text, the architectures each is for, and their machine code, made without a GPU.

A source is handed to the compiler as one text, its own headers pasted in: what is compiled for a GPU, for the CPU (`cuda_shim`)
and in the tests is then the same text, and the key of every cache is a hash of it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qlab.errors import QlabError

__all__ = [
    "ARCHITECTURES",
    "SOURCES",
    "cached",
    "compile_cubin",
    "compiler_version",
    "definitions",
    "kernel_names",
    "publish",
    "source",
]

CSRC = Path(__file__).parent / "csrc"

ANY = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "affine": ANY,
    "bitplanes": ANY,
    "max_pool": ANY,
    "pack": ANY,
    "popcount_conv": ANY,
    "popcount_gemm": ANY,
    "threshold_pack": ANY,
    # From 10.0 on the assembler replaces the 1-bit instruction by integer ones: right, but slower than the popcount kernel.
    "mma_gemm": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
    "wgmma_gemm": ("sm_90a",),  # `a`: instructions of this architecture only
}
SOURCES = tuple(ARCHITECTURES)
Macros = Mapping[str, int | str]


@cache
def source(name: str) -> str:
    """Return the text of `csrc/<name>.cu` with its headers pasted in where they are first included."""
    pasted: set[str] = set()

    def expand(file: str) -> str:
        lines = []
        for line in (CSRC / file).read_text(encoding="utf-8").splitlines():
            included = re.fullmatch(r'#include "(.+)"', line)
            if included and included[1] not in pasted:
                pasted.add(included[1])
                lines.append(expand(included[1]))
            elif not included and line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return expand(f"{name}.cu") + "\n"


def kernel_names(text: str) -> list[str]:
    """Return the names of the kernels that a source defines."""
    return re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(', text)


def definitions(macros: Macros) -> tuple[str, ...]:
    """Return macros as compiler options, in a fixed order."""
    return tuple(f"-D{name}={value}" for name, value in sorted(macros.items()))


def compile_cubin(name: str, architecture: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Return the machine code of a source for an architecture, and what the compiler had to say (empty if nothing).

    Uses NVRTC, the compiler that CuPy loads; needs no GPU.

    Args:
        name: one of `SOURCES`.
        architecture: such as "sm_80".
        options: more of them; tile sizes and flags from `definitions`.

    Raises:
        QlabError: CuPy or NVRTC is missing, or the source does not compile.
    """
    nvrtc = _nvrtc()
    options = (f"-arch={architecture}", "-std=c++17", "-diag-suppress=177", *options)
    program = nvrtc.createProgram(source(name), f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes the code for a C string and cuts its last byte, a zero, off.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program).strip()
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise QlabError(f"{name}.cu does not compile with {' '.join(options)}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    except ImportError as error:
        raise QlabError(
            "compiling CUDA sources needs CuPy: pip install 'qlab[cuda13]' (or 'qlab[cuda12]' for a CUDA 12 driver)"
        ) from error
    try:
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise QlabError(
            f"CuPy finds no CUDA compiler ({error}): pip install nvidia-cuda-nvrtc, or install the CUDA toolkit"
        ) from error
    return nvrtc


def compiler_version() -> str:
    """Return the version of NVRTC, such as "13.5"."""
    return ".".join(map(str, _nvrtc().getVersion()))


def cached(kind: str, key: str, suffix: str) -> Path:
    """Return where a built file with this key lies in the user's cache folder, whether it exists or not.

    Args:
        kind: a folder, "cubin" or "shim".
        key: everything that decides the file's content.
        suffix: such as ".so".
    """
    from qlab.data.sources import cache_folder

    folder = cache_folder() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (hashlib.sha256(key.encode()).hexdigest() + suffix)


def publish(data: bytes, path: Path) -> None:
    """Write a file so that other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
