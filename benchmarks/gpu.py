"""CUDA kernels: the 1-bit tensor cores against torch bfloat16, the popcount kernel against float32, and where they cross.

    qlab bench gpu

Every run is one call on data that lie on the GPU, ended by `torch.cuda.synchronize()`, so launch and host are in it. Operands are
packed beforehand, as a packed net's are; the peers' operands are +-1 in their own type. The result is int32 (or packed bits,
where it says so), the peer's is of its type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qlab
from qlab.bench import Comparison
from qlab.binary.kernels import cuda
from qlab.errors import QlabError
from qlab.quantizers import Sign

CUBE = 8192
CROSSOVER = (256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 15


def signs(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    bits = torch.randint(2, (rows, columns), generator=generator, device="cuda")
    return (2 * bits - 1).to(dtype)


def finished(work: Callable[[], object]) -> Callable[[], None]:
    """Return the work together with the wait for the GPU."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return run


def product(rows: int, columns: int, k: int, dtype: torch.dtype, kernel: str | None) -> tuple[Callable[[], None], ...]:
    """Return ours and torch's product of signs; the same numbers, or there is no comparison."""
    a, b = signs(rows, k, dtype, seed=0), signs(columns, k, dtype, seed=1)
    device = cuda.Device(kernel)
    packed_a, packed_b = (device.pack(device.xp.from_dlpack(x.float())) for x in (a, b))
    ours = torch.from_dlpack(device.binary_matmul(packed_a, packed_b, k))
    # float32 holds the sums exactly; bfloat16 rounds its result, so that the check is made in float32.
    exact = a.float() @ b.float().T
    if not torch.equal(ours.float(), exact):
        raise QlabError(f"the {kernel or 'chosen'} kernel is wrong at ({rows}, {columns}, {k}) on this device")
    del exact, ours
    return finished(lambda: device.binary_matmul(packed_a, packed_b, k)), finished(lambda: a @ b.T)


def fused_product(size: int) -> Callable[[], None]:
    """Return the product of a cube whose result leaves as bits, thresholds applied."""
    device = cuda.Device()
    a, b = (device.pack(device.xp.from_dlpack(signs(size, size, torch.float32, seed))) for seed in (0, 1))
    threshold = device.xp.zeros(size, "int32")
    flip = device.xp.zeros(size // 64, "uint64")
    return finished(lambda: device.matmul_threshold(a, b, size, threshold, flip))


def packed_mlp(batch: int) -> tuple[Callable[[], None], ...]:
    """Return a 784-3x4096-10 MLP on packed bits, float first and last layers, and the float net it has the shape of."""
    plain = qlab.build("mlp", (1, 28, 28), 10, hidden=(4096,) * 3, seed=0).cuda().eval()
    x = torch.randn(batch, 1, 28, 28, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    binary = qlab.harden(qlab.quantize(plain, Sign, Sign, keep=("first", "last")))
    packed = qlab.binary.compile(binary, x)

    @torch.no_grad()
    def peer() -> None:
        plain(x)
        torch.cuda.synchronize()

    return finished(lambda: packed(x)), peer


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark.

    Raises:
        QlabError: there is no GPU that both torch and CuPy see.
    """
    if not torch.cuda.is_available():
        raise QlabError(
            "no GPU is at hand: torch sees no CUDA device. Run this on a machine with an NVIDIA GPU and its driver."
        )
    if not cuda.available():
        raise QlabError("torch sees a GPU, but CuPy does not: pip install 'qlab[cuda13]' (or 'qlab[cuda12]')")
    torch.backends.cuda.matmul.allow_tf32 = False  # "float32" here is float32
    capability = torch.cuda.get_device_capability()
    kernel = cuda.choose(capability, CUBE, CUBE, CUBE // 64)
    name = torch.cuda.get_device_name()
    ours, peer = product(CUBE, CUBE, CUBE, torch.bfloat16, None)
    goal = None if kernel == "popcount_gemm" else 0.5
    yield Comparison(f"{CUBE} cube, {kernel}, {name}", ours, peer, "torch bfloat16", goal, rounds=ROUNDS)
    yield Comparison(
        f"{CUBE} cube, {kernel}, thresholds and packed bits",
        fused_product(CUBE),
        peer,
        "torch bfloat16",
        goal,
        rounds=ROUNDS,
    )
    if kernel != "popcount_gemm":
        ours, peer = product(CUBE, CUBE, CUBE, torch.bfloat16, "mma_gemm")
        yield Comparison(f"{CUBE} cube, mma_gemm", ours, peer, "torch bfloat16", rounds=ROUNDS)
    ours, peer = product(CUBE, CUBE, CUBE, torch.float32, "popcount_gemm")
    yield Comparison(f"{CUBE} cube, popcount_gemm", ours, peer, "torch float32", 1.0, rounds=ROUNDS)
    for size in CROSSOVER:
        chosen = cuda.choose(capability, size, size, size // 64)
        ours, peer = product(size, size, size, torch.bfloat16, None)
        yield Comparison(f"crossover: {size} cube, {chosen}", ours, peer, "torch bfloat16", rounds=ROUNDS)
        ours, peer = product(size, size, size, torch.bfloat16, "popcount_gemm")
        yield Comparison(f"crossover: {size} cube, popcount_gemm", ours, peer, "torch bfloat16", rounds=ROUNDS)
    for batch in (1, 32, 1024):
        ours, peer = product(batch, 4096, 4096, torch.float32, None)
        yield Comparison(f"4096 x 4096 layer, batch {batch}", ours, peer, "torch float32", rounds=ROUNDS)
        ours, peer = packed_mlp(batch)
        yield Comparison(f"MLP 784-3x4096-10, batch {batch}", ours, peer, "the float32 net in torch", rounds=ROUNDS)
