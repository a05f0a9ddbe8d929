"""Probes: training with the diagnosis callbacks at their defaults, against training without.

    qlab bench probes

Two views, for a callback costs nearly the same on every net, and the less of a step the longer that is. A whole fit on digits
is the worst case: a small net whose steps take one or two milliseconds, evaluation and set-up included on both sides, long
enough for several probes of the gradient. A step of ResNet-20 is a case from practice: four steps of which one carries a
gradient probe, whose cost is shared over the steps from one probe to the next.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

import qlab
from qlab.bench import Comparison
from qlab.callbacks import AnnealLog, BitHistory, FlipRatio, MismatchProbe
from qlab.runs import quiet

GOAL = 1.05
EPOCHS = 40  # of digits: 440 steps
BATCH, SHAPE, CLASSES, STEPS = 128, (3, 32, 32), 10, 5
SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}

Batch = tuple[Tensor, Tensor]
Probes = Callable[[], list[pl.Callback]]
EACH: dict[str, Probes] = {
    "bit history": lambda: [BitHistory()],
    "mismatch probe": lambda: [MismatchProbe()],
    "anneal log": lambda: [AnnealLog()],
    "all of them": lambda: [BitHistory(), MismatchProbe(), AnnealLog()],
}


class StepTimer(pl.Callback):
    """Seconds of every batch, what the callbacks before it do at its end included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


class Batches:
    """The same batch, STEPS times; a list would be taken for several loaders."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * STEPS)

    def __len__(self) -> int:
        return STEPS


def digits(probes: Probes) -> Callable[[], None]:
    """Return a fit on digits with some callbacks."""

    def run() -> None:
        qlab.fit("adaste", "digits", epochs=EPOCHS, callbacks=probes(), progress=False)

    return run


def resnet20_step(probes: Probes) -> Callable[[], float]:
    """Return what gives the mean seconds of a step of ResNet-20, a probe of the gradient shared over the steps between two."""
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(BATCH, *SHAPE, generator=g), torch.randint(CLASSES, (BATCH,), generator=g)

    def seconds() -> float:
        timer, callbacks = StepTimer(), probes()
        apart = 1
        for callback in callbacks:
            if isinstance(callback, MismatchProbe):
                apart, callback.every = callback.every, STEPS  # once, at the last step
        method = qlab.methods.create("ste", qlab.build("resnet20", SHAPE, CLASSES, seed=0))
        with quiet():
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            pl.Trainer(max_epochs=1, callbacks=[FlipRatio(), *callbacks, timer], **SILENT).fit(method, Batches(batch))
        usual = statistics.median(timer.seconds[1:-1])  # the first warms up
        return usual if apart == 1 else usual + (timer.seconds[-1] - usual) / apart

    return seconds


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    nothing: Probes = list
    for name, probes in EACH.items():
        yield Comparison(
            f"{name}, adaste on digits, {EPOCHS} epochs and test",
            digits(probes),
            digits(nothing),
            "without",
            GOAL,
            rounds=15,
            warmup=1,
        )
    yield Comparison(
        f"all of them, ste step, resnet20, batch {BATCH}",
        resnet20_step(EACH["all of them"]),
        resnet20_step(nothing),
        "without",
        GOAL,
        rounds=5,
        warmup=1,
    )
