"""Packed bits on the CPU: products, convolutions and whole nets, against torch and onnxruntime.

    qlab bench binary --json benchmarks/results/binary.json

Both sides use as many threads as torch: 2 on two cores. Weights are packed and rearranged before; what a net has to do at run
time (packing of activations, thresholds, shortcuts, float first and last layers) is timed. Nets have random weights
and batch norms: time does not depend on them. An operation is a multiplication or an addition of a dot product.

The limit is what the vector unit can do: xor, popcount and add on registers alone, without memory. Convolutions are compared with
the faster of torch's two memory layouts, nets with torch and with onnxruntime, float32 and int8. onnxruntime has all its graph
optimisations and is asked to sleep between calls, for threads that spin would take the cores from the other side. A net's latency
is that of a call in a row of calls, for both sides; one row says what a single call costs whose weights the other has driven out
of the caches.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qlab
from qlab.bench import Comparison
from qlab.binary.cost import cost
from qlab.binary.kernels import cpu
from qlab.quantizers import Sign

LIMIT_STEPS = 2_000_000
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


def words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, shape, dtype=np.uint64)


# ---- the limit ------------------------------------------------------------------------------------------------------


@cache
def limit_kernel() -> Callable[[int], int]:
    """Return a function that does 16 vector popcounts a step on registers; it holds no GIL."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from qlab.binary.kernels.cpu_ir import I64, call, constant, splat, vector

    lanes = vector(I64, 8)

    @intrinsic
    def popcounts(_context: Any, steps: Any) -> Any:
        def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
            before, loop = builder.block, builder.append_basic_block("loop")
            done = builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(I64)
            sums = [builder.phi(lanes) for _ in range(16)]
            word = splat(builder, k, 8)
            counts = [
                call(
                    builder,
                    "llvm.ctpop.v8i64",
                    builder.xor(word, constant(0x9E3779B97F4A7C15 * (i + 1) % 2**62, lanes)),
                )
                for i in range(16)
            ]
            new = [builder.add(total, count) for total, count in zip(sums, counts, strict=True)]
            after = builder.add(k, constant(1))
            for phi, first, then in (
                (k, constant(0), after),
                *((s, constant(0, lanes), n) for s, n in zip(sums, new, strict=True)),
            ):
                phi.add_incoming(first, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", after, arguments[0]), loop, done)
            builder.position_at_end(done)
            total = new[0]
            for value in new[1:]:
                total = builder.add(total, value)
            return builder.extract_element(total, constant(0))

        return types.int64(types.int64), emit

    @numba.njit(types.int64(types.int64), nogil=True)
    def run(steps: int) -> int:
        return popcounts(steps)  # type: ignore[call-arg]

    return run


def limit(threads: int) -> float:
    """Return the most operations a second: 16 vectors of 512 signs a step, a multiplication and an addition each."""
    run = limit_kernel()
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(run, [LIMIT_STEPS] * threads))
            rates.append(threads * LIMIT_STEPS * 16 * 512 * 2 / (time.perf_counter() - start))
    return statistics.median(rates)


# ---- products and convolutions --------------------------------------------------------------------------------------


def products(most: float) -> Iterator[Comparison]:
    m = n = 2048
    k = 4096
    a, panels, out = words(m, k // 64), cpu.prepack(words(n, k // 64)), np.empty((m, n), np.int32)
    x, w = torch.randn(m, k), torch.randn(k, n)
    x8, w8 = torch.randint(-2, 2, (m, k), dtype=torch.int8), torch.randint(-2, 2, (k, n), dtype=torch.int8)
    x16, w16 = x.bfloat16(), w.bfloat16()

    def ours() -> None:
        cpu.binary_matmul(a, panels, k, out=out)

    name = f"product {m} x {n}, K = {k}"
    common: dict[str, Any] = {"operations": 2.0 * m * n * k, "limit": most, "rounds": 9}
    yield Comparison(name, ours, lambda: x @ w, "torch float32", 20, "times", **common)
    yield Comparison(name, ours, lambda: torch._int_mm(x8, w8), "torch._int_mm", 2.5, "times", **common)
    yield Comparison(name, ours, lambda: x16 @ w16, "torch bfloat16", None, "times", **common)
    floats = torch.randn(m, k).numpy()
    yield Comparison(
        f"{name}, packing of the activations included",
        lambda: cpu.binary_matmul(cpu.pack(floats), panels, k, out=out),
        lambda: x @ w,
        "torch float32",
        None,
        "times",
        **common,
    )
    v, square, one = words(1, 64), cpu.prepack(words(4096, 64)), np.empty((1, 4096), np.int32)
    wide, y = torch.randn(4096, 4096), torch.randn(4096)

    def vector() -> float:
        return repeated(lambda: cpu.binary_matmul(v, square, 4096, out=one), 20)

    yield Comparison(
        "matrix-vector 4096 x 4096",
        vector,
        lambda: wide @ y,
        "torch float32",
        20,
        "times",
        operations=2.0 * 4096 * 4096,
        limit=most,
    )
    signs, z = cpu.prepack_signs(words(4096, 64), 4096), torch.randn(1, 4096).numpy()
    yield Comparison(
        "matrix-vector 4096 x 4096, signs against floats",
        lambda: repeated(lambda: cpu.signed_sum_matmul(z, signs), 5),
        lambda: wide @ y,
        "torch float32",
        None,
        "times",
    )


def repeated(work: Callable[[], object], times: int) -> float:
    """Return the seconds of one of several calls: a clock reading would weigh on a few microseconds."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def steady(work: Callable[[], object], calls: int = 5) -> Callable[[], float]:
    """Return what gives the seconds of a call in a row of calls, after a first one that is not counted."""

    def seconds() -> float:
        work()
        return repeated(work, calls)

    return seconds


def convolutions(most: float) -> Iterator[Comparison]:
    for channels, side in STAGES:
        x, panels = words(1, side, side, channels // 64), cpu.prepack_conv(words(channels, 3, 3, channels // 64))
        threshold, flip = np.zeros(channels, np.int32), words(channels // 64)
        out = np.empty((1, side, side, channels // 64), np.uint64)

        def ours(
            x: np.ndarray = x,
            panels: Any = panels,
            channels: int = channels,
            own: tuple[Any, Any] = (threshold, flip),
            out: np.ndarray = out,
        ) -> float:
            return repeated(lambda: cpu.conv2d_threshold(x, panels, channels, *own, padding=(1, 1), out=out), 20)

        peer, layout = faster_layout(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), torch.randn(1, channels, side, side)
        )
        yield Comparison(
            f"3x3 convolution, {channels} channels at {side}x{side}, threshold and packing included",
            ours,
            lambda peer=peer: repeated(peer, 3),  # type: ignore[misc]
            f"torch float32 convolution alone, {layout}",
            10,
            "times",
            operations=2.0 * 9 * channels**2 * side**2,
            limit=most,
        )


def faster_layout(net: nn.Module, x: Tensor) -> tuple[Callable[[], object], str]:
    """Return torch's way to run a net in the faster of its two memory layouts, and that layout's name."""
    last = copy.deepcopy(net).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ways = {"NCHW": (net.eval(), x), "channels last": (last, x.to(memory_format=torch.channels_last))}

    def runner(model: nn.Module, batch: Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(batch)

        return run

    runs = {name: runner(*way) for name, way in ways.items()}
    best: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(7):
        for name, run in runs.items():
            seconds = repeated(run, 1)
            if i > 1:
                best[name].append(seconds)
    chosen = min(runs, key=lambda name: statistics.median(best[name]))
    return runs[chosen], chosen


# ---- nets -----------------------------------------------------------------------------------------------------------


def binary(name: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    net = qlab.build(name, shape, classes, seed=0, **options)
    keep = ["first", "last", *(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" in n)]
    return qlab.harden(qlab.quantize(net, Sign, Sign, keep))


class Session:
    """A net in onnxruntime, float32 or int8."""

    def __init__(self, net: nn.Module, x: Tensor, folder: Path, int8: bool) -> None:
        import onnxruntime as ort

        plain, path = folder / "float.onnx", folder / ("int8.onnx" if int8 else "float.onnx")
        qlab.binary.export_onnx(net, x, plain)
        if int8:
            self._quantize(plain, path, x)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.bytes = path.stat().st_size
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.feed = {self.session.get_inputs()[0].name: x.numpy()}

    @staticmethod
    def _quantize(plain: Path, path: Path, x: Tensor) -> None:
        import logging

        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self, name: str) -> None:
                self.batches = iter([{name: x.numpy()}])

            def get_next(self) -> Any:
                return next(self.batches, None)

        import onnx

        prepared = path.with_name("prepared.onnx")
        logging.getLogger().setLevel(logging.ERROR)
        quant_pre_process(str(plain), str(prepared))
        name = onnx.load(str(prepared)).graph.input[0].name
        quantize_static(str(prepared), str(path), Reader(name), quant_format=QuantFormat.QDQ, per_channel=True)

    def __call__(self) -> object:
        """Run the net on its batch."""
        return self.session.run(None, self.feed)


PARTS = {
    "binary convolutions": ("binary_conv2d",),
    "float convolutions (stem, shortcuts)": ("conv2d",),
    "max pool and what comes with it": ("max_pool2d", "batch_norm"),
}


def profile(name: str, packed: Any, x: Tensor) -> Iterator[Comparison]:
    """Yield what the parts of a call take, step by step: why a net is as fast as it is."""
    steps = cost(packed, x, ["numba"]).steps
    total = 1e3 * sum(seconds for *_, seconds in steps)
    for part, ops in PARTS.items():
        spent = 1e3 * sum(seconds for _, op, seconds in steps if op in ops)
        yield Comparison(
            f"{name}, {part}", partial(float, spent), partial(float, total), "all steps", rounds=1, warmup=0, unit="ms"
        )


def resnets(folder: Path) -> Iterator[Comparison]:
    x = torch.randn(1, 3, 224, 224)
    packed = qlab.binary.compile(binary("bireal18", (3, 224, 224), 1000, stem="large"), x)
    float_net = qlab.build("resnet18", (3, 224, 224), 1000, stem="large", seed=0).eval()
    name = "Bi-Real Net 18, 224x224, batch 1"
    peer = Session(float_net, x, folder, int8=False)
    ours = steady(lambda: packed(x))
    yield Comparison(name, ours, steady(peer), "ResNet-18, onnxruntime float32", 5.4, "times")
    small = Session(float_net, x, folder, int8=True)
    yield Comparison(name, ours, steady(small), "ResNet-18, onnxruntime int8", None, "times")
    run, layout = faster_layout(float_net, x)
    yield Comparison(name, ours, steady(run), f"ResNet-18, torch float32, {layout}", None, "times")
    yield Comparison(
        f"{name}, one call after one of the other", lambda: packed(x), peer, "ResNet-18, onnxruntime float32"
    )
    yield from profile(name, packed, x)
    path = folder / "net.safetensors"
    packed.save(path)
    yield Comparison(
        "Bi-Real Net 18, size of the file",
        lambda: path.stat().st_size / 1024,
        lambda: peer.bytes / 1024,
        "ResNet-18 float32, ONNX",
        11,
        "times",
        rounds=1,
        warmup=0,
        unit="KB",
    )


def vggs(folder: Path) -> Iterator[Comparison]:
    for batch, rounds in ((1, 15), (64, 7)):
        x = torch.randn(batch, 3, 32, 32)
        packed = qlab.binary.compile(binary("vgg_small", (3, 32, 32), 10), x)
        net = qlab.build("vgg_small", (3, 32, 32), 10, seed=0).eval()
        name = f"VGG-small, 32x32, batch {batch}"
        run, layout = faster_layout(net, x)
        calls = 10 if batch == 1 else 1
        ours = steady(lambda packed=packed, x=x: packed(x), calls)  # type: ignore[misc]
        yield Comparison(name, ours, steady(run, calls), f"torch float32, {layout}", 6, "times", rounds=rounds)
        for int8 in (False, True):
            peer = Session(net, x, folder, int8)
            kind = "int8" if int8 else "float32"
            yield Comparison(name, ours, steady(peer, calls), f"onnxruntime {kind}", None, "times", rounds=rounds)


def sign_weights() -> Iterator[Comparison]:
    """Sign weights on float activations (BinaryConnect, AdaSTE), both ways to multiply."""
    for batch in (1, 64):
        x = torch.randn(batch, 784)
        net = qlab.harden(qlab.quantize(qlab.build("mlp", (784,), 10, hidden=(4096, 4096, 4096), seed=0), Sign))
        for product in ("unpack", "sums"):
            packed = qlab.binary.compile(net, x, product=product)

            def floats() -> object:
                with torch.inference_mode():
                    return net(x)  # noqa: B023

            yield Comparison(
                f"784-3x4096-10, sign weights on floats, {product}, batch {batch}",
                lambda packed=packed: packed(x),  # type: ignore[misc]  # noqa: B023
                floats,
                "torch, the same weights in float32",
                None,
                "times",
                rounds=7,
            )


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    cpu.warm_up()
    most = limit(torch.get_num_threads())
    yield from products(most)
    yield from convolutions(most)
    with tempfile.TemporaryDirectory() as folder:
        yield from resnets(Path(folder))
        yield from vggs(Path(folder))
    yield from sign_weights()
