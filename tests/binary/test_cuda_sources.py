"""The CUDA sources without a GPU: they compile to the instructions they promise, and give the reference's integers on the CPU.

The compiler is NVRTC, which CuPy loads too; the CPU runs the same text through the shim (`qlab.binary.kernels.cuda_shim`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.binary.kernels import cuda, cuda_build, cuda_shim, cuda_tune, reference
from qlab.binary.kernels.cuda_build import ARCHITECTURES, CSRC, compile_cubin, definitions, kernel_names, source
from qlab.binary.kernels.cuda_plan import Plan, popcount_plan
from qlab.binary.kernels.cuda_shim import Shim
from qlab.cli import main
from qlab.errors import InputError, QlabError
from tests.binary import cuda_cases as cases

CI = bool(os.environ.get("CI"))  # there nothing may be missing: what is skipped elsewhere fails
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy_backends") is None and not CI,
    reason="needs CuPy and nvidia-cuda-nvrtc: pip install qlab[cuda13]",
)
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None and not CI, reason="needs g++")

EVERY_SOURCE = [(name, architecture) for name, known in ARCHITECTURES.items() for architecture in known]
POPCOUNT_TILES = [{"TM": 4, "TN": 4}, {"TM": 2, "TN": 2}, {"TM": 1, "TN": 1}]
SHARED_LIMITS = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}  # KB a block may have, by capability


def disassembler() -> str:
    """Return nvdisasm, from its wheel or a CUDA toolkit."""
    wheels = sorted(Path(entry) / "nvdisasm" for path in sys.path for entry in Path(path).glob("nvidia/*/bin"))
    found = next((str(path) for path in wheels if path.is_file()), None) or shutil.which("nvdisasm")
    if found is None:
        (pytest.fail if CI else pytest.skip)("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


def instructions(code: bytes, folder: Path) -> set[str]:
    """Return the mnemonics of machine code."""
    path = folder / "code.cubin"
    path.write_bytes(code)
    listing = subprocess.run([disassembler(), str(path)], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE))
    assert "EXIT" in found
    return found


# ---- compiled for a GPU ------------------------------------------------------------------------------------------------


def test_every_source_has_its_list_of_architectures() -> None:
    assert {path.stem for path in CSRC.glob("*.cu")} == set(ARCHITECTURES)
    assert all(kernel_names(source(name)) for name in ARCHITECTURES)


@needs_nvrtc
@pytest.mark.parametrize(("name", "architecture"), EVERY_SOURCE)
def test_a_source_compiles_without_a_word_of_the_compiler(name: str, architecture: str) -> None:
    code, said = compile_cubin(name, architecture)
    assert code.startswith(b"\x7fELF")
    assert said == ""  # for wgmma: the assembler says here when it serialises the products


@needs_nvrtc
@pytest.mark.parametrize("name", ["popcount_gemm", "popcount_conv", "mma_gemm", "wgmma_gemm"])
def test_the_fused_epilogue_compiles_too(name: str) -> None:
    assert compile_cubin(name, ARCHITECTURES[name][-1], ["-DPACKED=1"])[1] == ""


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_mma_is_the_one_bit_instruction_of_the_tensor_cores(architecture: str, tmp_path: Path) -> None:
    found = instructions(compile_cubin("mma_gemm", architecture)[0], tmp_path)
    assert "BMMA.168256.AND.POPC" in found
    assert any(name.startswith("LDGSTS") for name in found)  # asynchronous copies
    assert any(name.startswith("LDSM") for name in found)  # ldmatrix


@needs_nvrtc
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_wgmma_is_the_one_bit_instruction_of_warpgroups(columns: int, tmp_path: Path) -> None:
    code, said = compile_cubin("wgmma_gemm", "sm_90a", [f"-DBN={columns}"])
    assert f"BGMMA.64x{columns}x256.AND.POPC" in instructions(code, tmp_path)
    assert "serialized" not in said


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "architecture", "macros"),
    [("popcount_gemm", arch, tile) for arch in ("sm_75", "sm_80", "sm_90") for tile in POPCOUNT_TILES]
    + [("popcount_conv", "sm_90", {**tile, "PACKED": 1}) for tile in POPCOUNT_TILES]
    + [
        (kernel, f"sm_{major}{minor}" + "a" * (kernel == "wgmma_gemm"), {**tile, "PACKED": packed})
        for (major, minor), kernels in cuda.TILES.items()
        for kernel, tile in kernels.items()
        for packed in (0, 1)
    ],
)
def test_no_register_is_spilled(name: str, architecture: str, macros: dict[str, int], tmp_path: Path) -> None:
    found = instructions(compile_cubin(name, architecture, definitions(macros))[0], tmp_path)
    assert not {name for name in found if name.startswith(("STL", "LDL"))}  # local memory


def test_a_source_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy_backends")
    monkeypatch.setattr(cuda_build, "source", lambda name: "__global__ void broken() { nonsense; }")
    with pytest.raises(QlabError, match=r"pack\.cu does not compile with -arch=sm_80[\s\S]*nonsense"):
        compile_cubin("pack", "sm_80")


# ---- which kernel, and its tile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "shape", "kernel"),
    [
        ((7, 5), (8192, 8192, 128), "popcount_gemm"),  # tensor cores without this instruction
        ((8, 0), (8192, 8192, 128), "mma_gemm"),
        ((8, 6), (64, 64, 8), "mma_gemm"),
        ((8, 9), (63, 8192, 128), "popcount_gemm"),
        ((9, 0), (8192, 8192, 128), "wgmma_gemm"),
        ((9, 0), (127, 8192, 128), "mma_gemm"),
        ((9, 0), (8192, 8192, 7), "popcount_gemm"),
        ((10, 0), (8192, 8192, 128), "popcount_gemm"),  # emulated
        ((12, 0), (8192, 8192, 128), "popcount_gemm"),
    ],
)
def test_the_kernel_follows_from_capability_and_shape(
    capability: tuple[int, int], shape: tuple[int, int, int], kernel: str
) -> None:
    assert cuda.choose(capability, *shape) == kernel


@pytest.mark.parametrize("minor", [0, 6, 7, 9])
def test_a_capability_without_a_tile_of_its_own_takes_the_one_below(minor: int) -> None:
    tile = cuda.tile_for((8, minor), "mma_gemm")
    assert tile == cuda.TILES[(8, {0: 0, 6: 6, 7: 6, 9: 9}[minor])]["mma_gemm"]


@pytest.mark.parametrize("capability", cuda.TILES)
def test_a_tile_fits_into_the_shared_memory_of_its_devices(capability: tuple[int, int]) -> None:
    for kernel, tile in cuda.TILES[capability].items():
        plan = Plan(kernel, tile)
        assert plan.shared_bytes <= SHARED_LIMITS[capability] * 1024
        assert plan.threads <= 1024


def test_few_rows_take_a_small_tile() -> None:
    assert [popcount_plan(rows, 100).rows for rows in (1, 33, 256)] == [8, 16, 32]
    assert popcount_plan(256, 32).columns == 32


def test_without_a_device_the_error_says_what_to_do() -> None:
    if cuda.available():
        pytest.skip("there is a device here")
    with pytest.raises(QlabError, match=r"pip install|nvidia-smi"):
        cuda.binary_matmul(np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.uint64), 1)


# ---- run on the CPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shim() -> Shim:
    if shutil.which("g++") is None:
        (pytest.fail if CI else pytest.skip)("needs g++")
    return Shim()


@needs_gxx
@pytest.mark.parametrize("gemm", ["popcount_gemm", "mma_gemm", "wgmma_gemm"])
@pytest.mark.parametrize(("rows", "columns", "k"), cases.PRODUCTS)
def test_products_are_exact(gemm: str, rows: int, columns: int, k: int) -> None:
    cases.check_product(Shim(gemm), rows, columns, k)


@needs_gxx
@pytest.mark.parametrize(
    ("gemm", "tile"),
    [
        ("mma_gemm", cuda.TILES[8, 6]["mma_gemm"]),
        ("wgmma_gemm", {"BM": 128, "BN": 128, "STAGES": 5}),
        ("wgmma_gemm", cuda.TILES[9, 0]["wgmma_gemm"]),
        ("popcount_gemm", {"TM": 4, "TN": 4}),
    ],
)
def test_the_tiles_of_real_devices_are_exact(gemm: str, tile: dict[str, int]) -> None:
    cases.check_product(Shim(gemm, tile), 130, 258, 6 * 1024 + 65)  # more tiles of K than stages


@needs_gxx
@pytest.mark.parametrize("gemm", ["mma_gemm", "wgmma_gemm"])
def test_early_copies_are_as_exact_as_late_ones(gemm: str) -> None:
    cases.check_product(Shim(gemm, eager=True), 65, 66, 8 * 1024)


@pytest.mark.parametrize(("rows", "columns", "k"), cases.PRODUCTS)
def test_products_of_digits_are_exact(shim: Shim, rows: int, columns: int, k: int) -> None:
    cases.check_digits_product(shim, rows, columns, k)


@pytest.mark.parametrize("pad", ["zero", "one"])
@pytest.mark.parametrize("case", cases.CONVOLUTIONS)
def test_convolutions_are_exact(shim: Shim, case: tuple[Any, ...], pad: str) -> None:
    cases.check_convolution(shim, case, pad)


@needs_gxx
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_convolution_is_exact(data: st.DataObject) -> None:
    def some(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    groups, kernel, dilation = some(1, 3), (some(1, 3), some(1, 3)), (some(1, 2), some(1, 2))
    padding = (some(0, 2), some(0, 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = (some(least[0], least[0] + 3), some(least[1], least[1] + 3))
    channels, outputs = groups * some(1, 70), groups * some(1, 20)
    case = (some(1, 2), *size, channels, outputs, kernel, (some(1, 2), some(1, 2)), padding, dilation, groups)
    cases.check_convolution(Shim(), case, data.draw(st.sampled_from(["zero", "one"])))


@pytest.mark.parametrize("case", cases.CONVOLUTIONS)
def test_convolutions_of_bytes_are_exact(shim: Shim, case: tuple[Any, ...]) -> None:
    cases.check_digits_convolution(shim, case)


@pytest.mark.parametrize("length", cases.LENGTHS)
def test_packing_rows_is_exact(shim: Shim, length: int) -> None:
    cases.check_packing(shim, (5, length), -1, "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "int64", "uint8", "bool"])
def test_packing_takes_every_real_type(shim: Shim, dtype: str) -> None:
    cases.check_packing(shim, (3, 70), 1, dtype)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 65, 3, 5), 1), ((70, 3), 0), ((2, 3, 1), 1), ((0, 3), 1), ((3, 0), 0)]
)
def test_packing_along_an_inner_axis_is_exact(shim: Shim, shape: tuple[int, ...], axis: int) -> None:
    cases.check_packing(shim, shape, axis, "float32")


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 65, 130])
def test_thresholds_are_exact(shim: Shim, channels: int) -> None:
    cases.check_thresholds(shim, channels)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0)), ((7, 6), (1, 1), (0, 0))],
)
def test_pooling_is_exact(
    shim: Shim, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    cases.check_pooling(shim, kernel, stride, padding)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_batch_norm_rounds_as_the_reference(shim: Shim, fused: bool, dtype: str) -> None:
    cases.check_affine(shim, fused, dtype)


@pytest.mark.parametrize("codes", ["digits", "signs"])
def test_few_bit_products_are_exact(shim: Shim, codes: str) -> None:
    cases.check_few_bits(shim, codes)


def test_sums_of_signed_floats_are_exact_for_integers(shim: Shim) -> None:
    cases.check_signed_sums(shim)


def test_non_contiguous_arrays_are_taken_as_they_are(shim: Shim) -> None:
    rng = cases.generator(1)
    a, b = cases.words(rng, 6, 70 * 64)[::2, 1::2], cases.words(rng, 70 * 64, 5).T[:, ::2][:, :35]
    b = np.broadcast_to(b, (1, 35))
    cases.same(shim.binary_matmul(a, b, 35 * 64), reference.binary_matmul(a, b, 35 * 64))
    x = rng.standard_normal((4, 6, 130))[:, ::2, ::-1]
    cases.same(shim.pack(x, 1), reference.pack(x, 1))


def test_a_row_that_is_not_aligned_to_16_bytes_is_copied_in_halves(shim: Shim) -> None:
    rng = cases.generator(2)
    buffer = np.empty(4 * 8 + 2, np.uint64)
    offset = 1 if buffer.ctypes.data % 16 == 0 else 2  # rows of an even number of words, begun at an odd one
    a, b = cases.words(rng, 4, 512), cases.words(rng, 70, 512)
    shifted = buffer[offset : offset + a.size].reshape(a.shape)
    shifted[:] = a
    assert shifted.ctypes.data % 16 == 8
    cases.same(Shim("mma_gemm").binary_matmul(shifted, b, 512), reference.binary_matmul(a, b, 512))


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0)])
def test_an_empty_product_is_empty(shim: Shim, rows: int, columns: int) -> None:
    cases.check_product(shim, rows, columns, 65)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.binary_matmul(np.zeros((2, 1), np.uint64), np.zeros((2, 2), np.uint64), 64), "same W"),
        (
            lambda s: s.binary_matmul(np.zeros((2, 1)), np.zeros((2, 1), np.uint64), 64),
            "no packed words: dtype float64",
        ),
        (lambda s: s.unpack(np.zeros((2, 1), np.uint64), 65), "65 signs take 2 words"),
        (lambda s: s.pack(np.zeros(3), 1), "axis is 1"),
        (
            lambda s: s.binary_conv2d(np.zeros((1, 3, 3, 2), np.uint64), np.zeros((4, 3, 3, 1), np.uint64), 64),
            r"x: \(N, H, W, 1\) words",
        ),
        (
            lambda s: s.binary_conv2d(
                np.zeros((1, 3, 3, 1), np.uint64), np.zeros((4, 3, 3, 1), np.uint64), 9, groups=2
            ),
            "9 channels and 4 outputs do not split into 2 groups",
        ),
        (lambda s: s.max_pool2d(np.zeros((1, 4, 4, 1), np.uint64), (2, 2), (2, 2), (2, 2)), "more than half"),
        (
            lambda s: s.threshold_pack(np.zeros((1, 3), np.int32), np.zeros(2, np.int32), np.zeros(1, np.uint64)),
            r"threshold: \(3,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shim: Shim, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(shim)


# ---- the shim sees mistakes --------------------------------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize(
    ("gemm", "right", "wrong", "eager"),
    [
        ("mma_gemm", "copy_wait<STAGES - 2>();", "", False),
        ("mma_gemm", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", False),
        ("mma_gemm", "__syncthreads();", "", False),
        ("mma_gemm", "__syncthreads();", "", True),
        ("mma_gemm", "lane / 8 % 2", "lane / 16", False),
        ("wgmma_gemm", "wgmma_wait<1>();", "wgmma_wait<2>();", True),
        ("wgmma_gemm", "wgmma_wait<0>();", "", False),
        ("wgmma_gemm", "(chunk ^ (row & 7))", "chunk", False),
        ("popcount_gemm", "warp, lane);\n        __syncthreads();", "warp, lane);", False),
    ],
)
def test_a_mistake_in_a_kernel_shows(
    gemm: str, right: str, wrong: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = source(gemm)
    assert right in text
    monkeypatch.setattr(cuda_shim, "source", lambda name: text.replace(right, wrong) if name == gemm else source(name))
    monkeypatch.setattr(cuda_shim, "_library", functools.cache(cuda_shim._library.__wrapped__))
    rng = cases.generator(4)
    a, b = cases.words(rng, 65, 8 * 1024), cases.words(rng, 66, 8 * 1024)
    got = Shim(gemm, eager=eager).binary_matmul(a, b, 8 * 1024)
    assert not np.array_equal(got, reference.binary_matmul(a, b, 8 * 1024))


@needs_gxx
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 7) __syncthreads();", "a __syncthreads that only some threads"),
        ("if (threadIdx.x < 7) __ballot_sync(ALL_LANES, true);", "a warp instruction that only some lanes"),
        ("__ballot_sync(1u, true);", "all 32 lanes only"),
    ],
)
def test_a_rule_that_is_broken_is_an_error_and_no_hang(
    body: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'{source("max_pool")}extern "C" __global__ void rule(int x) {{ {body} }}\n'
    monkeypatch.setattr(cuda_shim, "source", lambda name: text)
    monkeypatch.setattr(cuda_shim, "_library", functools.cache(cuda_shim._library.__wrapped__))
    with pytest.raises(QlabError, match=f"kernel rule: .*{message}"):
        Shim().launch("rules", "rule", {}, (1, 1, 1), 64, (np.int32(0),))


def test_an_argument_of_another_type_than_the_kernel_has_is_refused(shim: Shim) -> None:
    x = np.zeros((1, 1), np.uint64)
    counts = np.zeros(1, np.int32)
    with pytest.raises(QlabError, match="row_popcounts: argument 2 is not of the kernel's type"):
        shim.launch("pack", "row_popcounts", {}, (1, 1, 1), 32, (x, counts, np.int32(1), np.int32(1)))


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shim.shutil, "which", lambda name: None)
    with pytest.raises(QlabError, match=r"needs g\+\+ .*apt-get install"):
        cuda_shim._compile("", (), Path("out.so"))


# ---- the device's host code, with the shim in the GPU's place ------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("75", "popcount_gemm"), ("86", "mma_gemm"), ("90", "wgmma_gemm"), ("120", "popcount_gemm")],
)
def test_the_device_launches_the_chosen_kernel_with_arguments_it_takes(
    capability: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def function(_: int, __: Any, name: str, kernel: str, options: tuple[str, ...], shared: int) -> Any:
        def call(grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
            assert shared_mem == shared
            launched.append(kernel)
            macros = dict(option[2:].split("=") for option in options)
            Shim().launch(name, kernel, macros, grid, block[0], arguments, shared)

        return call

    here = SimpleNamespace(id=0, compute_capability=capability)
    monkeypatch.setattr(cuda, "_cupy", lambda: FakeCupy(here))
    monkeypatch.setattr(cuda, "_function", function)
    monkeypatch.setattr(cuda.Device, "_address", lambda self, x: x.ctypes.data)
    rng = cases.generator(6)
    a, b = cases.words(rng, 128, 1024), cases.words(rng, 130, 1024)
    cases.same(cuda.binary_matmul(a, b, 1024), reference.binary_matmul(a, b, 1024))
    assert launched[-1] == kernel
    cases.check_convolution(cuda.Device(), cases.CONVOLUTIONS[3], "zero")


class FakeCupy:
    """Numpy under CuPy's name, with a device."""

    def __init__(self, device: SimpleNamespace) -> None:
        self.cuda = SimpleNamespace(Device=lambda: device)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


# ---- tuning --------------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize(
    ("kernel", "architecture", "limit"), [("mma_gemm", "sm_86", 99 * 1024), ("wgmma_gemm", "sm_90a", 227 * 1024)]
)
def test_the_candidates_of_the_tuner_fit_and_compile(kernel: str, architecture: str, limit: int) -> None:
    tiles = list(cuda_tune.candidates(kernel, limit))
    assert all(Plan(kernel, tile).shared_bytes <= limit for tile in tiles)
    assert len(tiles) > 8
    for tile in (tiles[0], tiles[len(tiles) // 2], tiles[-1]):
        compile_cubin(kernel, architecture, definitions(tile))


def test_the_tuner_prints_an_entry_of_the_table() -> None:
    entry = cuda_tune.table((9, 0), cuda.TILES[9, 0])
    assert eval(f"{{{entry}}}") == {(9, 0): cuda.TILES[9, 0]}


def test_the_benchmark_fails_and_says_why_where_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if cuda.available():
        pytest.skip("there is a GPU here")
    assert main(["bench", "gpu"]) == 2
    assert "no GPU is at hand" in capsys.readouterr().err
