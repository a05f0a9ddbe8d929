"""What bits cost and save on this machine: bytes, latencies, and the size from which xor and popcount beat float.

cost(packed, x)          # KB by layer; seconds per backend, and per step of the CPU kernels
crossover()              # products n x n x n and vector x matrix: packed against torch in float32

`costing` and `crossing` are the same as generators of `qlab.jobs.Update` with what there is so far, for a Job.
What is compared runs in turns, so that a machine that slows down slows all of it; times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlab import provenance
from qlab.binary.packed import PackedNet, check_batch, present
from qlab.errors import InputError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["KINDS", "Cost", "Crossover", "Point", "cost", "costing", "crossing", "crossover"]

SLOW = frozenset({"numpy", "shim"})  # backends that are there to be right, not fast
ORIGINAL = "original"
SHORTEST = 200e-6  # seconds: shorter calls are timed several at a time
LEAST_ROUNDS = 3
Timed = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of a packed net.

    Args:
        layers: rows of `PackedNet.report`, with the weights' bytes as they are stored.
        nbytes: of all tensors of the packed net.
        batch: N, examples in a run.
        rounds: name of a backend, or "original" for the net it was compiled from -> seconds of each run.
        steps: (layer, operation, seconds) of every step of the CPU kernels, medians; empty where they were not asked for.
        threads: of torch, which the CPU kernels use too.
        device: the machine.
    """

    layers: tuple[dict[str, Any], ...]
    nbytes: int
    batch: int
    rounds: dict[str, tuple[float, ...]]
    steps: tuple[tuple[str, str, float], ...]
    threads: int
    device: str

    @property
    def float_nbytes(self) -> int:
        """Bytes of the same tensors with every weight in float32."""
        return self.nbytes + sum(row["float_bytes"] - row["packed_bytes"] for row in self.layers)

    @property
    def seconds(self) -> dict[str, float]:
        """Name -> median seconds of a run."""
        return {name: statistics.median(times) for name, times in self.rounds.items() if times}

    def frame(self) -> pd.DataFrame:
        """Return one row per layer: bytes packed and as float32, how often smaller, seconds of its steps on the CPU kernels.

        The last row is everything else: thresholds, batch norms, packing, pooling.
        """
        import pandas as pd

        names = [row["layer"] for row in self.layers]
        spent = {name: sum(s for layer, _, s in self.steps if layer == name) for name in names}
        rest = {
            "layer": "everything else",
            "packed_bytes": self.nbytes - sum(row["packed_bytes"] for row in self.layers),
            "float_bytes": self.float_nbytes - sum(row["float_bytes"] for row in self.layers),
        }
        kept = [
            {key: row[key] for key in ("layer", "kind", "runs", "packed_bytes", "float_bytes")} for row in self.layers
        ]
        table = pd.DataFrame([*kept, rest]).fillna({"kind": "", "runs": ""})
        table["smaller"] = table["float_bytes"] / table["packed_bytes"].where(table["packed_bytes"] > 0)
        if self.steps:
            spent["everything else"] = sum(s for layer, _, s in self.steps if layer not in names)
            table["seconds"] = table["layer"].map(spent)
        return table

    def latencies(self) -> pd.DataFrame:
        """Return one row per backend: median seconds of a run, milliseconds an example, and how often faster than the original."""
        import pandas as pd

        table = pd.DataFrame({"backend": list(self.seconds), "seconds": list(self.seconds.values())})
        table["ms per example"] = 1e3 * table["seconds"] / self.batch
        if ORIGINAL in self.seconds:
            table["times faster"] = self.seconds[ORIGINAL] / table["seconds"]
        return table

    def figure(self) -> Figure:
        """Return bytes per layer and seconds per backend as bars."""
        from qlab.plots.bits import cost_figure

        return cost_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        text = (
            f"Packed {self.nbytes / 1024:,.1f} KB, with float32 weights {self.float_nbytes / 1024:,.1f} KB "
            f"({self.float_nbytes / self.nbytes:.1f} times as much)."
        )
        if self.seconds:
            each = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in self.seconds.items())
            text += f" A batch of {self.batch}: {each} ({_where(self.device, self.threads)})."
        return text


def cost(
    packed: PackedNet, x: Tensor, backends: Sequence[str] | None = None, rounds: int = 15, seconds: float = 10.0
) -> Cost:
    """Measure a packed net on this machine.

    Args:
        packed: a compiled or loaded net.
        x: (N, *input_shape), float32, on the CPU.
        backends: names of `qlab.binary.BACKENDS`; by default those here that are meant to be fast. The net it was compiled from
            is timed too, where it is at hand and on the CPU.
        rounds: runs of each, after one that is not timed.
        seconds: after so many no further round begins, once there are three.

    Raises:
        InputError: a wrong batch or number of rounds.
        QlabError: a backend that there is not, or not here.
    """
    return last(costing(packed, x, backends, rounds, seconds), Cost)


def costing(
    packed: PackedNet, x: Tensor, backends: Sequence[str] | None = None, rounds: int = 15, seconds: float = 10.0
) -> Generator[Update, None, None]:
    """Yield the `Cost` after every round; see `cost`."""
    if not isinstance(packed, PackedNet):
        raise InputError(f"packed is a {type(packed).__name__}; expected a packed net, as qlab.binary.compile returns")
    check_batch(x, packed.graph.input_shape, packed.graph.image)
    if rounds < 1 or seconds <= 0:
        raise InputError(f"rounds is {rounds} and seconds {seconds}; expected at least 1, and more than 0")
    left_out = SLOW | ({"onnxruntime"} if packed.graph.image else frozenset())  # raw images have no ONNX form
    names = [name for name in present() if name not in left_out] if backends is None else list(backends)
    runs: dict[str, Timed] = {name: _run_of(packed, name, x) for name in names}
    original = packed.source
    if original is not None and all(p.device.type == "cpu" for p in original.parameters()):
        runs = {ORIGINAL: lambda: original(x), **runs}
    steps = [(step.layer, step.op) for step in packed.graph.steps]
    spent: list[list[float]] = [[] for _ in steps]
    times: dict[str, list[float]] = {name: [] for name in runs}

    rows = tuple(row | {"packed_bytes": _stored(packed, row["layer"])} for row in packed.graph.layers)

    def so_far() -> Cost:
        profile = tuple((*step, statistics.median(s)) for step, s in zip(steps, spent, strict=True) if s)
        given = {name: tuple(t) for name, t in times.items()}
        return Cost(
            rows,
            packed.nbytes,
            len(x),
            given,
            profile,
            torch.get_num_threads(),
            provenance.device_name(),
        )

    yield Update(0.0, "Counting bytes, compiling kernels ...", so_far())
    with torch.no_grad():
        for run in runs.values():
            run()
            yield Update(0.0, "Warming up ...")
        begun = time.perf_counter()
        for i in range(rounds):
            for name, run in _in_turn(list(runs.items()), i):
                times[name].append(_seconds(run))
            if "numba" in runs:
                for entry, own in zip(spent, _profile(packed, x), strict=True):
                    entry.append(own)
            taken = time.perf_counter() - begun
            yield Update((i + 1) / rounds, f"Timing the net, round {i + 1} of {rounds}", so_far())
            if taken > seconds and i + 1 >= LEAST_ROUNDS:
                break


def _stored(packed: PackedNet, layer: str) -> int:
    """Return the bytes of a layer's weight as it is stored; behind a flattened picture each pixel is padded to whole words."""
    named = [s.tensors["weight"] for s in packed.graph.steps if s.layer == layer and "weight" in s.tensors]
    return sum(packed.graph.tensors[name].nbytes for name in named)


def _run_of(packed: PackedNet, name: str, x: Tensor) -> Timed:
    backend = packed.on(name)
    return lambda: backend.run(x).cpu()  # a copy to the CPU waits for the GPU


def _profile(packed: PackedNet, x: Tensor) -> list[float]:
    """Return the seconds of every step of one run on the CPU kernels, each on its own: none is put together with the next."""
    marks = [time.perf_counter()]
    packed.on("numba").run(x, lambda step, values: marks.append(time.perf_counter()))
    return [after - before for before, after in pairwise(marks)]


KINDS = {"matrix": "n x n times n x n", "vector": "one vector times n x n"}
WAYS = ("float", "packed", "packing")


@dataclass(frozen=True)
class Point:
    """One size of a crossover; median seconds of one product.

    Args:
        kind: of `KINDS`.
        n: size.
        float_s: torch in float32.
        packed_s: the CPU kernels, both operands packed already.
        packing_s: the same with the activations packed first.
        gain: float / packed, the median over the rounds.
        packing_gain: float / packing, the median over the rounds.
    """

    kind: str
    n: int
    float_s: float
    packed_s: float
    packing_s: float
    gain: float
    packing_gain: float


@dataclass(frozen=True)
class Crossover:
    """Products of signs by xor and popcount against float, by size.

    Args:
        points: what was measured.
        left_out: (kind, n) that would have taken longer than the time that was given.
        threads: of torch, which the CPU kernels use too.
        device: the processor.
    """

    points: tuple[Point, ...]
    left_out: tuple[tuple[str, int], ...]
    threads: int
    device: str

    def smallest(self, kind: str = "matrix", packing: bool = False) -> int | None:
        """Return the smallest n measured from which on packed products are faster, at every larger one too; None if there is none.

        Args:
            kind: of `KINDS`.
            packing: count the packing of the activations.
        """
        found = None
        for point in sorted((p for p in self.points if p.kind == kind), key=lambda p: p.n, reverse=True):
            if (point.packing_gain if packing else point.gain) <= 1:
                break
            found = point.n
        return found

    def frame(self) -> pd.DataFrame:
        """Return one row per point."""
        import pandas as pd

        return pd.DataFrame([vars(point) for point in self.points], columns=list(Point.__dataclass_fields__))

    def figure(self) -> Figure:
        """Return seconds by size on log axes."""
        from qlab.plots.bits import crossover_figure

        return crossover_figure(self)

    def summary(self) -> str:
        """Return the crossover sizes in words."""
        said = []
        for kind, text in KINDS.items():
            points = [p for p in self.points if p.kind == kind]
            if not points:
                continue
            last = max(points, key=lambda p: p.n)
            sizes = [self.smallest(kind, packing) for packing in (False, True)]
            words, packed = ("at no size measured" if n is None else f"from n = {n} on" for n in sizes)
            said.append(
                f"{text}: packed words win {words}, with packing of the activations {packed}; at n = {last.n} they are "
                f"{last.gain:.1f} and {last.packing_gain:.1f} times as fast"
            )
        where = f" ({_where(self.device, self.threads)})"
        return "; ".join(said) + where + "." if said else "Nothing was measured yet."


def crossover(
    sizes: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    kinds: Sequence[str] = ("matrix", "vector"),
    rounds: int = 15,
    seconds: float = 15.0,
) -> Crossover:
    """Measure from which size on products of signs are faster packed than in float32.

    Args:
        sizes: n, from small to large.
        kinds: of `KINDS`.
        rounds: of each size, after one that is not timed.
        seconds: for everything; sizes that would take longer are left out.

    Raises:
        InputError: sizes, kinds, rounds or seconds out of range.
    """
    return last(crossing(sizes, kinds, rounds, seconds), Crossover)


def crossing(
    sizes: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    kinds: Sequence[str] = ("matrix", "vector"),
    rounds: int = 15,
    seconds: float = 15.0,
) -> Generator[Update, None, None]:
    """Yield the `Crossover` after every size; see `crossover`."""
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 2**14 for n in sizes):
        raise InputError(f"sizes are {list(sizes)}; expected whole numbers from 1 to {2**14}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds are {list(kinds)}; expected some of {', '.join(KINDS)}")
    if rounds < 1 or seconds <= 0:
        raise InputError(f"rounds is {rounds} and seconds {seconds}; expected at least 1, and more than 0")
    points: list[Point] = []
    left_out: list[tuple[str, int]] = []
    todo = [(kind, n) for n in sorted(set(sizes)) for kind in kinds]
    begun = time.perf_counter()
    yield Update(0.0, "Compiling kernels ...", _crossover(points, left_out))
    for i, (kind, n) in enumerate(todo):
        left = seconds - (time.perf_counter() - begun)
        before = [p for p in points if p.kind == kind]
        grows = (n / before[-1].n) ** (3 if kind == "matrix" else 2) if before else 0.0
        expected = grows * (before[-1].float_s + before[-1].packed_s + before[-1].packing_s) if before else 0.0
        if left <= 0 or (LEAST_ROUNDS + 1) * expected > left:
            left_out.append((kind, n))
        else:
            points.append(_point(kind, n, rounds, left / (len(todo) - i)))
        yield Update((i + 1) / len(todo), f"Timing {KINDS[kind]}, n = {n}", _crossover(points, left_out))


def _crossover(points: list[Point], left_out: list[tuple[str, int]]) -> Crossover:
    name = f"{provenance.cpu_name()}, {provenance.available_cores()} cores"
    return Crossover(tuple(points), tuple(left_out), torch.get_num_threads(), name)


def _point(kind: str, n: int, rounds: int, seconds: float) -> Point:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    runs = _products(kind, n)
    number = {}
    for way, run in runs.items():  # the first run is a warm-up, the second says how many make one time
        run()
        number[way] = max(1, round(SHORTEST / max(_seconds(run), 1e-9)))
    begun = time.perf_counter()
    for i in range(rounds):
        for way, run in _in_turn(list(runs.items()), i):
            times[way].append(_seconds(run, number[way]))
        if i + 1 >= LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
    medians = [statistics.median(times[way]) for way in WAYS]
    gains = [statistics.median(map(float.__truediv__, times["float"], times[way])) for way in WAYS[1:]]
    return Point(kind, n, *medians, *gains)


def _products(kind: str, n: int) -> dict[str, Timed]:
    """Return the three ways to multiply the same signs."""
    from qlab.binary.kernels import cpu

    draw = torch.Generator().manual_seed(n)
    rows = 1 if kind == "vector" else n
    a, w = (1 - 2 * torch.randint(0, 2, (m, n), generator=draw).float() for m in (rows, n))
    transposed = w.T  # as torch's own linear layer has it
    signs = a.numpy()
    panels, words = cpu.prepack(cpu.pack(w.numpy())), cpu.pack(signs)
    in_float, in_bits = a @ transposed, cpu.binary_matmul(words, panels, n)
    return {
        "float": lambda: torch.mm(a, transposed, out=in_float),
        "packed": lambda: cpu.binary_matmul(words, panels, n, out=in_bits),
        "packing": lambda: cpu.binary_matmul(cpu.pack(signs), panels, n, out=in_bits),
    }


def _where(device: str, threads: int) -> str:
    return f"{device}, {threads} thread{'' if threads == 1 else 's'}"


def _in_turn(runs: list[tuple[str, Timed]], i: int) -> Iterator[tuple[str, Timed]]:
    """Yield all of them, beginning with another one in every round."""
    start = i % len(runs)
    yield from runs[start:] + runs[:start]


def _seconds(run: Timed, number: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - start) / number
