"""The CUDA kernels through CuPy: the functions of `reference` on a GPU.

Arguments are CuPy arrays (words: uint64), torch CUDA tensors (words: int64 of the same bits, taken and given by DLPack, on torch's
current stream) or numpy arrays, which are copied to the GPU at every call. The result is a torch tensor where an argument was one,
else a CuPy array.

The sources in `csrc/` are compiled when first needed, for the device at hand, and kept in the user's cache folder. Three kernels
multiply matrices; `choose` says which is taken:

    popcount_gemm   any GPU: xor, carry-save adders, popcount
    mma_gemm        capability 8.0 to 9.0: 1-bit tensor cores
    wgmma_gemm      capability 9.0: the same, fed from shared memory by warpgroups
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from qlab.binary.kernels.cuda_build import cached, compile_cubin, compiler_version, definitions, publish, source
from qlab.binary.kernels.cuda_host import Array, Kernels
from qlab.binary.kernels.cuda_plan import Plan, popcount_plan
from qlab.errors import InputError, QlabError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TILES",
    "Device",
    "affine",
    "affine_pack",
    "available",
    "binary_conv2d",
    "binary_matmul",
    "bitplane_conv2d",
    "bitplane_input",
    "bitplane_matmul",
    "choose",
    "conv2d_threshold",
    "digits_conv2d",
    "digits_matmul",
    "matmul_threshold",
    "max_pool2d",
    "pack",
    "signed_sum_matmul",
    "threshold_pack",
    "tile_for",
    "unpack",
]

Capability = tuple[int, int]

# Tiles by capability; the entry of the same major version serves where a capability has none of its own. Chosen by arithmetic:
# untuned until a GPU has run `qlab.binary.kernels.cuda_tune.tune()`, which prints this table. Measured on: none yet.
TILES: dict[Capability, dict[str, dict[str, int]]] = {
    (8, 0): {"mma_gemm": {"BM": 128, "BN": 128, "WM": 64, "WN": 32, "STAGES": 4}},
    (8, 6): {"mma_gemm": {"BM": 128, "BN": 128, "WM": 64, "WN": 32, "STAGES": 3}},  # a block has 99 KB at most
    (8, 9): {"mma_gemm": {"BM": 128, "BN": 128, "WM": 64, "WN": 32, "STAGES": 3}},
    (9, 0): {
        "mma_gemm": {"BM": 128, "BN": 128, "WM": 64, "WN": 32, "STAGES": 4},
        "wgmma_gemm": {"BM": 128, "BN": 256, "STAGES": 4},
    },
}


def choose(capability: Capability, rows: int, columns: int, words: int) -> str:
    """Return which kernel multiplies (rows, words) with (columns, words) on a device of this compute capability.

    Tensor cores work on whole tiles, of which a small product leaves most empty; the popcount kernel has smaller ones. From
    capability 10.0 on the 1-bit instruction is emulated, so the popcount kernel is taken.
    """
    if not (8, 0) <= capability <= (9, 0) or min(rows, columns) < 64 or words < 8:
        return "popcount_gemm"
    return "wgmma_gemm" if capability == (9, 0) and min(rows, columns) >= 128 and words >= 16 else "mma_gemm"


def tile_for(capability: Capability, kernel: str) -> dict[str, int]:
    """Return the tile of a tensor-core kernel for a capability."""
    near = max(known for known in TILES if known <= capability and known[0] == capability[0])
    return TILES[near][kernel]


class Device(Kernels):
    """The CUDA kernels on CuPy arrays, on the current device.

    Args:
        gemm: the kernel that multiplies matrices; None for what `choose` says.
        tile: its tile, other than that of `TILES`.

    Raises:
        QlabError: CuPy is not installed, or sees no device.
    """

    def __init__(self, gemm: str | None = None, tile: Mapping[str, int] | None = None) -> None:
        self.gemm = gemm
        self.tile = tile
        self._cupy = _cupy()

    @property
    def xp(self) -> Any:
        """CuPy."""
        return self._cupy

    @property
    def capability(self) -> Capability:
        """Compute capability of the current device."""
        text = str(self._cupy.cuda.Device().compute_capability)  # "90", "120"
        return int(text[:-1]), int(text[-1])

    def plan(self, rows: int, columns: int, words: int) -> Plan:
        """Return the kernel and its tile."""
        kernel = self.gemm or choose(self.capability, rows, columns, words)
        if self.tile:
            return Plan(kernel, self.tile)
        if kernel == "popcount_gemm":
            return popcount_plan(rows, columns)
        return Plan(kernel, tile_for(self.capability, kernel))

    def _address(self, x: Array) -> int:
        return int(x.data.ptr)

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
        """Start a kernel on CuPy's current stream."""
        function = _function(self._cupy.cuda.Device().id, self.capability, source, kernel, definitions(macros), shared)
        null = np.uint64(0)
        values = tuple(null if argument is None else argument for argument in arguments)
        function(tuple(grid), (block, 1, 1), values, shared_mem=shared)


@functools.cache
def _function(
    device: int, capability: Capability, name: str, kernel: str, options: tuple[str, ...], shared: int
) -> Any:
    """Return a kernel, compiled if it is new. CuPy's own compilation knows no `sm_90a`, hence not RawModule(code=...)."""
    architecture = f"sm_{capability[0]}{capability[1]}" + ("a" if name == "wgmma_gemm" else "")
    path = cached("cubin", "\0".join([compiler_version(), architecture, source(name), *options]), ".cubin")
    if not path.exists():
        code, _ = compile_cubin(name, architecture, options)
        publish(code, path)
    function = _cupy().RawModule(path=str(path)).get_function(kernel)
    if shared:
        function.max_dynamic_shared_size_bytes = shared  # over 48 KB must be asked for
    return function


@functools.cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise QlabError(
            "the CUDA kernels need CuPy: pip install 'qlab[cuda13]' (driver 580 or newer) or 'qlab[cuda12]'"
        ) from error
    if not cupy.cuda.is_available():
        raise QlabError(
            "CuPy sees no CUDA device: the CUDA kernels need an NVIDIA GPU and its driver (check `nvidia-smi`); on the CPU use "
            "the backend 'numba', or 'shim', which runs the same CUDA sources slowly"
        )
    return cupy


def available() -> bool:
    """Return whether the kernels can run here: CuPy is installed and sees a device."""
    try:
        _cupy()
    except QlabError:
        return False
    return True


# ---- arrays of three kinds -----------------------------------------------------------------------------------------------


def _on_device(method: Callable[..., Array], words: bool = True) -> Callable[..., Any]:
    """Return a method of `Kernels` as a function of CuPy, torch or numpy arrays; torch's int64 are `words`, or numbers."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        cupy = _cupy()
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        with _torch_stream(cupy, tensors):
            values = [_to_cupy(cupy, x, words) for x in args]
            named = {name: _to_cupy(cupy, x, words) for name, x in kwargs.items()}
            result = method(Device(), *values, **named)
            return _to_torch(cupy, result) if tensors else result

    return run


def _torch_stream(cupy: Any, tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which CuPy works on the device and the current stream of torch."""
    stack = ExitStack()
    if tensors:
        import torch

        for tensor in tensors:
            if not tensor.is_cuda:
                raise InputError(
                    f"the CUDA kernels take tensors on a GPU, not on {tensor.device}: use tensor.to('cuda')"
                )
        index = tensors[0].device.index
        stack.enter_context(cupy.cuda.Device(index))
        pointer = torch.cuda.current_stream(index).cuda_stream
        from_external = getattr(cupy.cuda.Stream, "from_external", None)  # from CuPy 14 on
        stack.enter_context(
            from_external(_Stream(pointer)) if from_external else cupy.cuda.ExternalStream(pointer, index)
        )
    return stack


class _Stream:
    """A stream by its address, in the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _to_cupy(cupy: Any, x: Any, words: bool) -> Any:
    import torch

    if isinstance(x, np.ndarray):
        return cupy.asarray(x)
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    array = cupy.from_dlpack(x.float() if x.dtype == torch.bfloat16 else x)  # a type that CuPy lacks
    return array.view(np.uint64) if words and array.dtype == np.int64 else array


def _to_torch(cupy: Any, x: Array) -> Tensor:
    import torch

    return torch.from_dlpack(x.view(np.int64) if x.dtype == np.uint64 else x)


affine = _on_device(Kernels.affine)
affine_pack = _on_device(Kernels.affine_pack)
binary_conv2d = _on_device(Kernels.binary_conv2d)
binary_matmul = _on_device(Kernels.binary_matmul)
bitplane_conv2d = _on_device(Kernels.bitplane_conv2d)
bitplane_input = _on_device(Kernels.bitplane_input)
bitplane_matmul = _on_device(Kernels.bitplane_matmul)
conv2d_threshold = _on_device(Kernels.conv2d_threshold)
digits_conv2d = _on_device(Kernels.digits_conv2d)
digits_matmul = _on_device(Kernels.digits_matmul)
matmul_threshold = _on_device(Kernels.matmul_threshold)
max_pool2d = _on_device(Kernels.max_pool2d)
pack = _on_device(Kernels.pack, words=False)
signed_sum_matmul = _on_device(Kernels.signed_sum_matmul)
threshold_pack = _on_device(Kernels.threshold_pack)
unpack = _on_device(Kernels.unpack)
