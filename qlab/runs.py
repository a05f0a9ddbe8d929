"""One training run: `fit(method, data) -> Run`. Seeded, recorded, resumable; quiet unless asked for a progress bar.

    run = qlab.fit("adaste", "digits", epochs=20)
    run.metrics["test/acc"], run.history, run.deployed
    run = qlab.fit(run.method, run.data, epochs=40, resume=run)

The same seed gives the same bits on the same machine; a run that was stopped and resumed gives the bits of one that
was not.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from qlab import data as data_room
from qlab import methods, models
from qlab.callbacks import FlipRatio
from qlab.errors import InputError
from qlab.methods import checkpoints
from qlab.methods.base import Method
from qlab.methods.robust import RobustTraining
from qlab.provenance import versions

__all__ = ["Run", "fit", "quiet", "versions"]

COLUMNS = ["step", "epoch", "metric", "value"]


class HistoryLogger(Logger):
    """Keep every logged value as a row (step, epoch, metric, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int, str, float]] = []

    name = "history"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore them: `Run.config` records them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per metric."""
        epoch = int(metrics.get("epoch", 0))
        self.rows += [(step or 0, epoch, name, float(v)) for name, v in metrics.items() if name != "epoch"]


@dataclass
class Run:
    """The record of a training run.

    Attributes:
        method: the trained method.
        data: what it was trained on.
        history: tidy DataFrame with columns step, epoch, metric, value, of the whole run, resumed parts included.
        metrics: the last value of every metric.
        config: method, data and their hyperparameters, epochs, seed.
        versions: of everything the result depends on.
        seconds: wall time of this call.
        completed: whether it reached its last epoch; False after a stop or an interrupt.
        checkpoint: where its state is stored: what `fit(..., resume=run)` continues from.
    """

    method: Method
    data: pl.LightningDataModule
    history: pd.DataFrame
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    completed: bool
    checkpoint: Path

    @property
    def deployed(self) -> nn.Module:
        """The net as it would be shipped."""
        return self.method.deployed()

    def __repr__(self) -> str:
        name, on = self.config["method"], self.config["data"]
        shown = ", ".join(f"{k} {v:.4f}" for k, v in self.metrics.items() if k in ("test/acc", "val/acc", "train/loss"))
        return f"Run({name} on {on}, {'completed' if self.completed else 'stopped'}, {self.seconds:.1f} s: {shown})"

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write checkpoint.ckpt, history.csv and run.json to a folder; return it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        destination = target / "checkpoint.ckpt"
        if self.checkpoint.resolve() != destination.resolve():
            destination.write_bytes(self.checkpoint.read_bytes())
        self.history.to_csv(target / "history.csv", index=False)
        record = {k: getattr(self, k) for k in ("config", "versions", "metrics", "seconds", "completed")}
        (target / "run.json").write_text(json.dumps(record, indent=1, default=str))
        return target


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notices (device found, tips, workers) for one run."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=pl.utilities.rank_zero.LightningDeprecationWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning 2.6 on torch 2.13
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _method(method: Method | str, data: pl.LightningDataModule, net: Any, seed: int) -> Method:
    if isinstance(method, Method):
        if net is not None:
            raise InputError("net= goes with the name of a method; a method that is built has its net already")
        return method
    if isinstance(net, nn.Module):
        return methods.create(method, net, seed=seed)
    shape, classes = data.input_shape, data.num_classes  # type: ignore[attr-defined]
    return methods.create(method, models.build(net or _default_net(data), shape, classes, seed=seed), seed=seed)


def _default_net(data: Any) -> str:
    entry = data_room.DATA.get(getattr(data, "name", ""))
    return getattr(entry, "net", "mlp") if entry is not None else "mlp"


def fit(
    method: Method | str,
    data: pl.LightningDataModule | str,
    *,
    epochs: int = 20,
    net: nn.Module | str | None = None,
    seed: int = 0,
    robust: RobustTraining | str | Mapping[str, Any] | None = None,
    root: str | PathLike[str] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    progress: bool = True,
    resume: Run | str | PathLike[str] | None = None,
    validate_every: int = 1,
    test: bool = True,
    accelerator: str = "auto",
    **trainer_options: Any,
) -> Run:
    """Train a method and evaluate its deployed net.

    Args:
        method: a method, or the name of one (its hyperparameters are then the defaults).
        data: a data module, or the name of one of `qlab.data.DATA`.
        epochs: passes over the training data, those before a resume included.
        net: with a method's name: a plain net or the name of a model; None is the data set's own.
        seed: of the net's start, the order of the data (where it is given by name) and the method's noise.
        robust: train for robustness: the name of one of `qlab.methods.robust.ROBUST`, or one with settings of its own, such as
            `qlab.methods.robust.TRADES(eps=0.1)`. None: as the method is set, or the checkpoint that is resumed.
        root: folder that gets checkpoint.ckpt (after every epoch), history.csv and run.json. None: nothing but a
            temporary checkpoint that lives as long as the Run.
        callbacks: further Lightning callbacks; `FlipRatio` is always there.
        progress: show Lightning's progress bar.
        resume: a Run, or the path of a checkpoint, to go on from.
        validate_every: epochs between validations; 0 for none before the end.
        test: evaluate on the test set at the end of a completed run.
        accelerator: of the Trainer.
        trainer_options: passed to `pl.Trainer`.

    Returns:
        The run; a partial one (`completed=False`) if a callback stopped it or it was interrupted from the keyboard.

    Raises:
        UnknownNameError, InputError: for names, shapes or hyperparameters that do not go together.
        CheckpointError: for a checkpoint of another method.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs must be a whole number of at least 1, not {epochs!r}")
    if isinstance(data, str):
        data = data_room.load(data, seed=seed)
    method = _method(method, data, net, seed)
    if robust is not None:
        method.robust = robust
    folder = Path(tempfile.mkdtemp(prefix="qlab-run-") if root is None else root)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.ckpt"

    history = HistoryLogger()
    saver = _Saver(checkpoint, every_epoch=root is not None)
    flips = [] if any(isinstance(c, FlipRatio) for c in callbacks) else [FlipRatio()]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    start = time.perf_counter()
    with quiet(), isolate_rng():
        torch.manual_seed(
            seed
        )  # for dropout and the like in a user's net; qlab's own parts draw from generators of their own
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            devices=trainer_options.pop("devices", 1),
            logger=history,
            callbacks=[*flips, *callbacks, saver],
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=validate_every or epochs,
            log_every_n_steps=trainer_options.pop("log_every_n_steps", 10),
            deterministic=trainer_options.pop("deterministic", True),
            default_root_dir=str(folder),
            **trainer_options,
        )
        path = resume.checkpoint if isinstance(resume, Run) else resume
        try:
            _train(trainer, method, data, path)
            completed = not trainer.should_stop
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
            if test and completed:
                metrics |= trainer.test(method, datamodule=data, verbose=False)[0]
        finally:
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    frame = pd.DataFrame(history.rows, columns=COLUMNS)
    if isinstance(resume, Run):
        metrics = resume.metrics | metrics
        frame = pd.concat([resume.history, frame], ignore_index=True)
    run = Run(
        method=method,
        data=data,
        history=frame,
        metrics=metrics,
        config=_config(method, data, epochs, seed),
        versions=versions(),
        seconds=time.perf_counter() - start,
        completed=completed,
        checkpoint=checkpoint,
    )
    if root is None:
        weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    else:
        run.save(folder)
    return run


def _train(trainer: pl.Trainer, method: Method, data: pl.LightningDataModule, checkpoint: Any) -> None:
    if checkpoint is not None:
        checkpoints.read(checkpoint)  # one clear error for a bad file, before Lightning opens it
    try:
        with _stop_on_interrupt(trainer):
            trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if (
            trainer.interrupted
        ):  # Lightning's way to end on a KeyboardInterrupt, which would end a notebook's kernel too
            raise KeyboardInterrupt from None
        raise


def _config(method: Method, data: Any, epochs: int, seed: int) -> dict[str, Any]:
    return {
        "method": method.info.name,
        "hyperparameters": dict(method.hparams),
        "data": getattr(data, "name", type(data).__name__),
        "data_options": dict(data.hparams),
        "epochs": epochs,
        "seed": seed,
    }


class _Saver(pl.Callback):
    """Write the checkpoint where Lightning can go on from it exactly: at the end of an epoch, and at a stop within one.

    It is written beside the old one, then put in its place, so that there always is a whole one.
    """

    def __init__(self, path: Path, every_epoch: bool) -> None:
        self.path = path
        self.every_epoch = every_epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.should_stop:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if last and isinstance(pl_module, Method):
            pl_module.deployed()  # so that its batch-norm statistics stand in the last checkpoint, also without a validation
        if (self.every_epoch or last) and not trainer.should_stop:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        partial.replace(self.path)


@contextmanager
def _stop_on_interrupt(trainer: pl.Trainer) -> Iterator[None]:
    """Let the first Ctrl-C (or a notebook's interrupt) stop after the batch at hand, with everything kept; a second one aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: Any) -> None:
        trainer.should_stop = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
