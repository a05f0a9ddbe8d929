"""How the CPU kernels may be called: any arrays, any threads, any process; wrong arguments are named."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from qlab.binary.kernels import cpu, cpu_launch, reference
from qlab.errors import InputError
from tests.binary.words import random, signs, thresholds


def test_arrays_that_are_not_contiguous_give_the_same() -> None:
    rng = random()
    a, b = signs(rng, 12, 130), signs(rng, 10, 130)
    np.testing.assert_array_equal(
        cpu.binary_matmul(a[::2], b[::-1], 130), reference.binary_matmul(a[::2], b[::-1], 130)
    )
    x, w = signs(rng, 2, 6, 7, 64).transpose(0, 2, 1, 3), signs(rng, 8, 3, 3, 64).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(cpu.binary_conv2d(x, w, 64), reference.binary_conv2d(x, w, 64))


def test_arrays_that_may_not_be_written_are_read() -> None:
    rng = random()
    a, b = signs(rng, 5, 70), signs(rng, 20, 70)
    expected = reference.binary_matmul(a, b, 70)
    a.flags.writeable = b.flags.writeable = False
    np.testing.assert_array_equal(cpu.binary_matmul(a, b, 70), expected)


def test_panels_serve_inputs_of_several_shapes_and_several_thresholds() -> None:
    rng = random()
    w = signs(rng, 24, 3, 3, 70)
    panels = cpu.prepack_conv(w)
    for image in ((5, 6), (3, 9), (5, 6)):
        x = signs(rng, 1, *image, 70)
        for _ in range(2):
            threshold, flip = thresholds(rng, 24, 630)
            expected = reference.threshold_pack(reference.binary_conv2d(x, w, 70), threshold, flip)
            np.testing.assert_array_equal(cpu.conv2d_threshold(x, panels, 70, threshold, flip), expected)


def test_empty_batches_give_empty_results() -> None:
    w = signs(random(), 24, 3, 3, 70)
    assert cpu.binary_conv2d(np.empty((0, 5, 5, 2), np.uint64), w, 70, padding=(1, 1)).shape == (0, 5, 5, 24)
    assert cpu.binary_matmul(np.empty((0, 2), np.uint64), signs(random(), 3, 70), 70).shape == (0, 3)
    assert cpu.pack(np.empty((0, 70), np.float32)).shape == (0, 2)


def test_a_given_result_is_written_and_returned() -> None:
    rng = random()
    a, b = signs(rng, 5, 70), signs(rng, 20, 70)
    out = np.empty((5, 20), np.int32)
    assert cpu.binary_matmul(a, b, 70, out=out) is out
    np.testing.assert_array_equal(out, reference.binary_matmul(a, b, 70))
    with pytest.raises(InputError, match="out"):
        cpu.binary_matmul(a, b, 70, out=np.empty((20, 5), np.int32).T)


def test_wrong_arguments_say_what_was_expected() -> None:
    rng = random()
    a, w = signs(rng, 4, 70), signs(rng, 4, 3, 3, 70)
    x = signs(rng, 1, 5, 5, 70)
    with pytest.raises(InputError, match="uint64"):
        cpu.binary_matmul(a.astype(np.int64), a, 70)
    with pytest.raises(InputError, match="k = 200 takes 4"):
        cpu.binary_matmul(a, a, 200)
    with pytest.raises(InputError, match="groups 2, as in the call"):
        cpu.binary_conv2d(x, cpu.prepack_conv(w), 70, groups=2)
    with pytest.raises(InputError, match="does not fit"):
        cpu.binary_conv2d(x, w, 70, dilation=(9, 9))
    y, ones = np.zeros((1, 3, 3, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(InputError, match="share memory"):
        cpu.conv2d_affine(x, w, 70, ones, ones, True, residual=y, out=y)
    with pytest.raises(InputError, match="prepack_conv"):
        cpu.binary_conv2d(x, cpu.prepack(a), 70)
    with pytest.raises(InputError, match="panels of 16 channels"):
        cpu.binary_conv2d(signs(rng, 1, 5, 5, 20), cpu.prepack_conv(signs(rng, 4, 3, 3, 16), channels=16), 20)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("how", ["openmp", "python", "alone"])
def test_results_do_not_depend_on_the_threads(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "python":
        monkeypatch.setattr(cpu_launch, "_openmp", lambda: None)
    monkeypatch.setattr(cpu_launch, "_alone_until", float("inf") if how == "alone" else 0.0)
    rng = random()
    a, b = signs(rng, 3000, 577), signs(rng, 520, 577)
    x, w = rng.standard_normal((3, 577)).astype(np.float32), signs(rng, 300, 577)
    images, kernels = signs(rng, 20, 20, 21, 64), signs(rng, 64, 3, 3, 64)
    floats = rng.standard_normal((20, 70, 20, 21)).astype(np.float32)
    pixels = rng.integers(0, 256, (20, 20, 21, 70), dtype=np.uint8)

    def results() -> list[np.ndarray]:
        z = cpu.binary_conv2d(images, kernels, 64, padding=(1, 1))
        return [
            cpu.binary_matmul(a, b, 577),
            cpu.signed_sum_matmul(x, w),
            z,
            cpu.threshold_pack(z, np.zeros(64, np.int32), np.zeros(1, np.uint64)),
            cpu.max_pool2d(images, (3, 3), (1, 1), (1, 1)),
            cpu.pack(floats, 1),
            cpu.pack(floats),
            cpu.bitplane_input(pixels),
        ]

    two = results()
    torch.set_num_threads(1)
    for one, other in zip(results(), two, strict=True):
        np.testing.assert_array_equal(one, other)


def test_after_a_late_thread_short_kernels_run_alone_and_longer_if_it_is_late_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine a sleeping thread wakes a time slice late; the clock here says so."""
    alone = cpu_launch.ALONE
    ends = [1.0, 1.0 + alone / 2, 1.0 + 2 * alone, 1.0 + 3 * alone, 1.0 + 5 * alone, 1.0 + 7 * alone]
    late = 2 * cpu_launch.LATE
    calls = [  # what a call's clock shows, and whether it forks
        (ends[0] - late, ends[0], True),  # late: alone for a while
        (ends[1], None, False),
        (ends[2] - late, ends[2], True),  # late again: alone for twice as long
        (ends[3], None, False),
        (ends[4], ends[4], True),  # in time
        (ends[5] - late, ends[5], True),  # late: alone for the short while again
        (ends[5] + 1.5 * alone, ends[5] + 1.5 * alone, True),
    ]
    forks: list[int] = []
    clock = iter([moment for start, end, _ in calls for moment in (start, end) if moment is not None])
    monkeypatch.setattr(cpu_launch, "_openmp", lambda: lambda *_: forks.append(1))
    monkeypatch.setattr(cpu_launch.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cpu_launch.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_launch, "_alone", alone)
    monkeypatch.setattr(cpu_launch, "_alone_until", 0.0)
    monkeypatch.setitem(cpu_launch._kernels, "gemm", cpu_launch._Kernel(0, lambda _: None, None))
    for _, _, forked in calls:
        before = len(forks)
        cpu_launch.launch("gemm", cpu_launch.new_block((0,)), chunks=4, seconds=1e-4)
        assert len(forks) - before == forked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_works_alone() -> None:
    """An OpenMP pool does not survive a fork: a child that asked it for threads would wait for ever."""
    code = """
import os, numpy as np, torch
from qlab.binary.kernels import cpu
torch.set_num_threads(2)
a = np.arange(300 * 10, dtype=np.uint64).reshape(300, 10)
before = cpu.binary_matmul(a, a, 640)
child = os.fork()
if child == 0:
    os._exit(int((cpu.binary_matmul(a, a, 640) != before).any()))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120, check=False)
    assert done.returncode == 0


@pytest.mark.usefixtures("two_threads")
def test_calls_from_several_python_threads_are_safe() -> None:
    rng = random()
    a, panels = signs(rng, 200, 577), cpu.prepack(signs(rng, 130, 577))
    expected = cpu.binary_matmul(a, panels, 577)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(50) if (cpu.binary_matmul(a, panels, 577) != expected).any())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_importing_the_kernels_does_not_import_numba() -> None:
    code = "import sys, qlab.binary.kernels.cpu; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
