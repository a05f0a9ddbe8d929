"""Probes: training with the diagnosis callbacks at their defaults, against training without.

    qlab bench probes

Three views, for a callback costs nearly the same on every net, and the less of a step the longer that is: a step of the small
net for digits, which takes one or two milliseconds and is the worst case; a step of ResNet-20, from practice; and a whole fit on
digits, evaluation and set-up included.
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
from qlab.runs import HistoryLogger, quiet

GOAL = 1.05
EPOCHS = 40  # of digits: 440 steps
BATCH, SMALL, LARGE, CLASSES = 128, (1, 8, 8), (3, 32, 32), 10
SILENT: dict[str, Any] = {
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
    """The same batch several times; a list would be taken for several loaders."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.steps)

    def __len__(self) -> int:
        return self.steps


def step(net: str, shape: tuple[int, ...], batch: Batch, steps: int, block: int, probes: Probes) -> Callable[[], float]:
    """Return what gives the mean seconds of a step, such that work of other programs on the machine counts little.

    The median over blocks of steps, each with a row of the anneal log; a probe of the gradient happens once, in the last step, and
    is shared over the steps between two probes.
    """

    def seconds() -> float:
        timer, callbacks = StepTimer(), probes()
        apart = 0
        for callback in callbacks:
            if isinstance(callback, MismatchProbe):
                apart, callback.every = callback.every, steps
        method = qlab.methods.create("ste", qlab.build(net, shape, CLASSES, seed=0))
        with quiet():
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            trainer = pl.Trainer(
                max_epochs=1, callbacks=[FlipRatio(), *callbacks, timer], logger=HistoryLogger(), **SILENT
            )
            trainer.fit(method, Batches(batch, steps))
        usual = timer.seconds[block:-1]  # the first warm up
        blocks = [statistics.fmean(usual[i : i + block]) for i in range(0, len(usual) - block + 1, block)]
        mean = statistics.median(blocks)
        return mean + (max(timer.seconds[-1] - mean, 0.0) / apart if apart else 0.0)

    return seconds


def fit_on_digits(probes: Probes) -> Callable[[], None]:
    """Return a whole fit on digits with some callbacks."""

    def run() -> None:
        qlab.fit("adaste", "digits", epochs=EPOCHS, callbacks=probes(), progress=False)

    return run


def batch_of(shape: tuple[int, ...]) -> Batch:
    """Return inputs and labels drawn at random."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, *shape, generator=g), torch.randint(CLASSES, (BATCH,), generator=g)


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    nothing: Probes = list
    small, large = batch_of(SMALL), batch_of(LARGE)
    for name, probes in EACH.items():
        yield Comparison(
            f"{name}, step of an mlp for digits, batch {BATCH}",
            step("mlp", SMALL, small, 300, 25, probes),
            step("mlp", SMALL, small, 300, 25, nothing),
            "without",
            GOAL,
            rounds=9,
            warmup=1,
        )
    everything = EACH["all of them"]
    yield Comparison(
        f"all of them, step of resnet20, batch {BATCH}",
        step("resnet20", LARGE, large, 5, 1, everything),
        step("resnet20", LARGE, large, 5, 1, nothing),
        "without",
        GOAL,
        rounds=5,
        warmup=1,
    )
    yield Comparison(
        f"all of them, adaste on digits, {EPOCHS} epochs and test",
        fit_on_digits(everything),
        fit_on_digits(nothing),
        "without",
        GOAL,
        rounds=15,
        warmup=1,
    )
