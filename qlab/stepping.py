"""A training taken apart: one step at a time, with the bits of `qlab.fit`, and moments that can be kept and gone back to.

    step:   schedule and noise (`begin_step`) -> `training_loss`, backward -> optimizer (`optimizer_step`) -> learning-rate schedule

Lightning owns the loop of `qlab.fit` and gives it back only at the end. A duel in lockstep, or a run that is frozen, rewound and
branched, needs the loop itself. The steps here are those of the method; what Lightning does between them is written out once, and
tests compare every method of the catalog with `qlab.fit` bit for bit.

**The clock.** A run of T steps has a clock of ticks 0, 1, ..., T: quantities of tick k are `schedule(k / T)`, the learning rate is
that of tick k. Trained as planned every step is a tick. A clock that stands still, or goes faster or slower, passes through values
that the plan has too, never others.

Training is on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pytorch_lightning.plugins import Precision
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import qlab.data
from qlab import methods, models
from qlab.data.base import DataModule
from qlab.data.loader import BatchLoader
from qlab.errors import InputError
from qlab.methods.base import Method

__all__ = ["SMALL_DATA", "SMALL_NET", "Moment", "Stepper", "load", "prepared", "start"]

SMALL_DATA: Mapping[str, Any] = {"n": 400, "batch_size": 32}
SMALL_NET: Mapping[str, Any] = {"hidden": (16, 16), "affine": False, "final_norm": True}
"""Of a planar set given by name, and its net: every method of the catalog learns it in a second or two."""


@dataclass(frozen=True)
class Moment:
    """Everything that the rest of a training depends on, by value.

    Args:
        step: steps done.
        tick: of the clock.
        epoch: of the batch that comes next.
        method, optimizer, loader: their states.
        scheduler: of the learning rate; None where the method has none.
    """

    step: int
    tick: int
    epoch: int
    method: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    loader: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None


class Stepper:
    """A training of a method on a data set, step by step.

    Args:
        method: a method of the lab, untrained.
        data: a data set of the lab.
        epochs: over which the schedules are stretched; training may go on beyond them.

    Attributes:
        total: steps of the plan.
        tick: what the clock shows.

    Raises:
        InputError: a net with dropout, whose training cannot be gone back to; batches that are replayed; optimizers that are
            not one with one learning-rate schedule; no whole number of epochs.
    """

    def __init__(self, method: Method, data: DataModule, epochs: int) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise InputError(f"epochs must be a whole number of at least 1, not {epochs!r}")
        if method.repeats > 1:
            raise InputError(
                "free adversarial training takes several steps for each batch, so it cannot be taken apart into steps; take "
                "another training for robustness, or qlab.fit"
            )
        dropout = [n for n, m in method.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if dropout:
            raise InputError(
                f"{dropout[0]!r} draws from torch's global generator, so no step of this training can be gone back to; "
                "take a net without dropout, or qlab.fit"
            )
        self.method, self.data, self.epochs = method.cpu(), data, epochs
        self.loader: BatchLoader = data.train_dataloader()
        self.total = epochs * len(self.loader)
        self.tick = 0
        self.epoch = 0
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        # What a method may ask of its trainer: samples, the optimizer's present learning rate, how far the run is.
        self._trainer = SimpleNamespace(
            datamodule=data,
            train_dataloader=self.loader,
            num_training_batches=len(self.loader),
            estimated_stepping_batches=self.total,
            max_epochs=epochs,
            accumulate_grad_batches=1,
            gradient_clip_val=None,
            gradient_clip_algorithm=None,
            precision_plugin=Precision(),
            global_step=method.steps,
            current_epoch=0,
        )
        method.trainer = self._trainer  # type: ignore[assignment]
        self.optimizer, self.scheduler = _optimizers(method.configure_optimizers())
        self._trainer.optimizers = [self.optimizer]
        self._trainer.strategy = SimpleNamespace(_lightning_optimizers=[self.optimizer])
        method.on_train_start()

    @property
    def progress(self) -> float:
        """What the clock shows as a share of the plan, in [0, 1]."""
        return min(self.tick / self.total, 1.0)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group that the next step takes."""
        return float(self.optimizer.param_groups[0]["lr"])

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the next batch (x, y), of the next epoch where one has ended."""
        while True:
            if self._batches is None:
                self.loader.set_epoch(self.epoch)
                self._trainer.current_epoch = self.epoch
                self._batches = iter(self.loader)
            batch = next(self._batches, None)
            if batch is not None:
                return batch[0].cpu(), batch[1].cpu()
            self.epoch += 1
            self._batches = None

    def step(self, ticks: int = 1) -> float:
        """Train one step and move the clock; return the loss of the batch, before the step.

        Args:
            ticks: by which the clock moves.

        Raises:
            InputError: the loss is NaN or infinite.
        """
        method = self.method
        x, y = self.next_batch()
        losses: list[Tensor] = []

        def closure() -> Tensor:
            loss = method.training_loss(x, y)
            losses.append(loss.detach())
            if not bool(torch.isfinite(losses[-1])):
                method._explain_nonfinite(x)
            self.optimizer.zero_grad()
            loss.backward()
            method.on_after_backward()
            method.on_before_optimizer_step(self.optimizer)
            method.configure_gradient_clipping(self.optimizer)
            return loss

        with _shadowed(method, log=_silent, log_dict=_silent), torch.enable_grad():
            self._begin()
            method.optimizer_step(self.epoch, 0, self.optimizer, closure)
        self._trainer.global_step = method.steps
        for _ in range(ticks):
            self.tick += 1
            if self.scheduler is not None:
                self.scheduler.step()
        return float(losses[0])

    def _begin(self) -> None:
        """Begin the method's step at the clock's progress; where every step was a tick, just as Lightning does."""
        method, progress = self.method, self.progress
        if self.tick == method.steps:
            method.begin_step(self.total)
        else:  # the noise of a step comes from its number, which goes on while the clock stands still
            with _shadowed(method, anneal=lambda _: type(method).anneal(method, progress)):
                method.begin_step(self.total)

    def scale_lr(self, factor: float) -> None:
        """Multiply every learning rate, now and for the rest of the plan."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
        if self.scheduler is not None:
            self.scheduler.base_lrs = [lr * factor for lr in self.scheduler.base_lrs]

    def keep(self) -> Moment:
        """Return the present moment."""
        return Moment(
            self.method.steps,
            self.tick,
            self.epoch,
            copy.deepcopy(dict(self.method.state_dict())),
            copy.deepcopy(self.optimizer.state_dict()),
            self.loader.state_dict(),
            None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        )

    def restore(self, moment: Moment) -> None:
        """Go to a moment of this training, or of one that began like it; every bit is as it was then."""
        self.method.load_state_dict(copy.deepcopy(dict(moment.method)))  # a method may keep what it is given
        self.optimizer.load_state_dict(copy.deepcopy(dict(moment.optimizer)))
        if self.scheduler is not None and moment.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(dict(moment.scheduler)))
        self.loader.load_state_dict(dict(moment.loader))
        self.tick, self.epoch = moment.tick, moment.epoch
        self._batches = iter(self.loader)
        self._trainer.global_step, self._trainer.current_epoch = moment.step, moment.epoch
        self.method.zero_grad()

    def twin(self) -> Stepper:
        """Return another training of a copy of the method, at the same moment; they share nothing but the data."""
        trainer, self.method.trainer = self.method._trainer, None
        try:
            other = Stepper(copy.deepcopy(self.method), self.data, self.epochs)
        finally:
            self.method.trainer = trainer
        other.restore(self.keep())
        return other

    def deployed(self, batches: int = 8) -> nn.Module:
        """Return the net as it would be shipped now, batch norm re-estimated on `batches` of training data."""
        statistics = self.method._statistics
        try:
            return self.method.hardened(self.data.calibration(batches))
        finally:
            self.method._statistics = statistics


def _silent(*_: Any, **__: Any) -> None:
    """Log nothing: there is no trainer that would take it."""


@contextmanager
def _shadowed(method: Method, **names: Any) -> Iterator[None]:
    """Let a method's functions be others for the moment."""
    vars(method).update(names)
    try:
        yield
    finally:
        for name in names:
            del vars(method)[name]


def _optimizers(configured: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Return the optimizer and the scheduler, or None, in what `configure_optimizers` returned."""
    if isinstance(configured, torch.optim.Optimizer):
        return configured, None
    if isinstance(configured, dict) and isinstance(configured.get("optimizer"), torch.optim.Optimizer):
        found = configured.get("lr_scheduler")
        if found is None:
            return configured["optimizer"], None
        if isinstance(found, dict) and found.get("interval") == "step" and found.get("frequency", 1) == 1:
            return configured["optimizer"], found["scheduler"]
    raise InputError(
        "a training can be taken apart where the method has one optimizer, with a learning rate that moves every step or not "
        f"at all; this one's configure_optimizers returned {type(configured).__name__}. Train it with qlab.fit"
    )


def load(data: DataModule | str, seed: int = 0) -> DataModule:
    """Return a data set that was given by name, small where it can be; any other as it is."""
    if not isinstance(data, str):
        return data
    planar = data in qlab.data.DATA and qlab.data.DATA[data].kind == "planar"
    return qlab.data.load(data, seed=seed, **(SMALL_DATA if planar else {}))


def start(data: DataModule, net: nn.Module | str | None, seed: int = 0) -> nn.Module:
    """Return a plain net for a data set, at its start; a net that is given as it is."""
    if isinstance(net, nn.Module):
        return net
    entry = qlab.data.DATA.get(getattr(data, "name", ""))
    small = net is None and entry is not None and entry.kind == "planar"
    name = net or (entry.net if entry is not None else "mlp")
    return models.build(name, data.input_shape, data.num_classes, seed=seed, **(SMALL_NET if small else {}))


def prepared(
    method: Method | str,
    data: DataModule | str,
    *,
    net: nn.Module | str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> tuple[Method, DataModule]:
    """Return a method around a net at its start, and its data.

    Raises:
        InputError: a net or options with a method that is built already, or for one that has begun to train.
        UnknownNameError: for names that no shelf knows.
    """
    loaded = load(data, seed)
    if isinstance(method, str):
        return methods.create(method, start(loaded, net, seed), **({"seed": seed} | dict(options or {}))), loaded
    if net is not None or options:
        raise InputError("net= and options= go with the name of a method; one that is built has its own already")
    if method.steps:
        raise InputError(f"this method has {method.steps} steps behind it; a steered run begins with an untrained one")
    return method, loaded
