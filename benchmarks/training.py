"""Training: every method's step and memory, the input pipeline, a whole small run and the import, against plain torch.

    qlab bench training

The steps are timed inside a real `Trainer.fit`, between Lightning's hooks at the start and end of a batch: schedules,
`self.log`, the check for NaN and the projection are in them; fetching the batch and writing to a logger are not. The peer is
the loop one would write by hand for the same float net: forward, cross-entropy, backward, Adam. Memory is what stays between
steps: parameters, buffers and the optimizer's state.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.bench import Comparison
from qlab.methods import CATALOG
from qlab.runs import quiet

BATCH, SHAPE, CLASSES = 128, (3, 32, 32), 10
STEPS = 4  # per round; the first warms up and is not counted
DIGITS_EPOCHS = 20
IMPORT_ALLOWANCE_S = 0.3
GOALS = {"full_precision": None, "binary_connect": 1.15, "adaste": 1.25}  # the other methods: STEP_GOAL
STEP_GOAL = 1.5
SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}

Batch = tuple[Tensor, Tensor]


class StepTimer(pl.Callback):
    """Seconds from one batch's start to its end, for every batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


class Batches:
    """The same batch, STEPS times, of a set as large as CIFAR-10's: some methods' steps depend on its size."""

    dataset = range(50_000)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * STEPS)

    def __len__(self) -> int:
        return STEPS


def resnet20() -> nn.Module:
    return qlab.build("resnet20", SHAPE, CLASSES, seed=0)


def fake_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *SHAPE, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def method_step(name: str, batch: Batch) -> Callable[[], float]:
    """Return what gives the median seconds of a step of a method in the Trainer."""

    def seconds() -> float:
        timer = StepTimer()
        steps(name, batch, timer)
        return statistics.median(timer.seconds[1:])

    return seconds


def steps(name: str, batch: Batch, *callbacks: pl.Callback) -> pl.Trainer:
    """Train a method for STEPS steps and return the trainer."""
    method = qlab.methods.create(name, resnet20())
    trainer = pl.Trainer(max_epochs=1, callbacks=list(callbacks), **SILENT)
    with quiet():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        trainer.fit(method, Batches(batch))
    return trainer


def held(net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Return the megabytes that stay between steps."""
    tensors = [*net.parameters(), *net.buffers()]
    tensors += [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()) / 1e6


def method_memory(name: str, batch: Batch) -> Callable[[], float]:
    def megabytes() -> float:
        trainer = steps(name, batch)
        return held(trainer.lightning_module, trainer.optimizers)

    return megabytes


def plain_memory(batch: Batch) -> Callable[[], float]:
    def megabytes() -> float:
        net, (x, y) = resnet20(), batch
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        return held(net, [optimizer])

    return megabytes


def plain_step(batch: Batch) -> Callable[[], float]:
    """Return what gives the median seconds of a step of a hand-written loop with the same net."""

    def seconds() -> float:
        net = resnet20()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        times = []
        for x, y in Batches(batch):
            start = time.perf_counter()
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return seconds


def augmented_pipeline() -> Callable[[], float]:
    """Return what gives the seconds per batch of a CIFAR-sized loader: crop, flip, cutout, normalise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50_000, *SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(50_000) % CLASSES
    data = qlab.data.DataModule.from_arrays(images, labels, batch_size=BATCH, augment=True, cutout=16)
    data.setup()
    loader = data.train_dataloader()
    batches = 50

    def seconds() -> float:
        start = time.perf_counter()
        count = sum(1 for _ in islice(iter(loader), batches))
        return (time.perf_counter() - start) / count

    return seconds


def digits_by_hand() -> None:
    """Train the digits MLP as one would by hand: the same net, batches, optimizer and epochs, and a test at the end."""
    data = qlab.data.load("digits")
    net = qlab.build("mlp", data.input_shape, data.num_classes, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loader = data.train_dataloader()
    for epoch in range(DIGITS_EPOCHS):
        loader.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        for x, y in data.test_dataloader():
            (net(x).argmax(1) == y).sum()


def digits_by_qlab(method: str) -> Callable[[], None]:
    def run() -> None:
        qlab.fit(method, "digits", epochs=DIGITS_EPOCHS, progress=False)

    return run


def import_of(module: str) -> Callable[[], float]:
    """Return what gives the seconds that a fresh interpreter takes to import a module, without its own start."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    return seconds


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    batch = fake_batch()
    plain, by_hand = plain_step(batch), "the same float net, plain torch loop"
    for method in CATALOG:
        yield Comparison(
            f"{method} step, resnet20, batch {BATCH}",
            method_step(method, batch),
            plain,
            by_hand,
            GOALS.get(method, STEP_GOAL),
            rounds=7,
        )
    remembered = plain_memory(batch)
    for method in CATALOG:
        yield Comparison(
            f"{method}, what stays between steps, resnet20",
            method_memory(method, batch),
            remembered,
            by_hand,
            rounds=1,
            warmup=0,
            unit="MB",
        )
    yield Comparison(
        f"input batch of {BATCH}, crop + flip + cutout",
        augmented_pipeline(),
        plain,
        "one resnet20 training step, plain torch",
        0.03,
        rounds=7,
    )
    for method in ("full_precision", "binary_connect", "adaste"):
        yield Comparison(
            f"{method} on digits, mlp, {DIGITS_EPOCHS} epochs and test",
            digits_by_qlab(method),
            digits_by_hand,
            "float net, plain torch loop",
            10.0,
            "seconds",
            rounds=3,
            warmup=1,
        )
    ours, peer = import_of("qlab"), import_of("torch")
    yield Comparison("import qlab", ours, peer, "import torch", IMPORT_ALLOWANCE_S, "extra seconds", rounds=5)
