"""What a method has for training for robustness: which one, the units of its data, and a step that asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
from torch import Tensor

from qlab.errors import InputError
from qlab.methods.robust.base import RobustTraining, Units, robust_training

if TYPE_CHECKING:
    from qlab.methods.base import Method

__all__ = ["Robustness"]


class Robustness(pl.LightningModule):
    """Base of `Method`: holds a `RobustTraining`, or none."""

    _robust: RobustTraining | None = None
    _units: Units | None = None
    perturbation: Tensor | None = None
    """What a training for robustness keeps from step to step, (N, ...) in the units of the data; it travels in checkpoints."""
    moving: Tensor | None = None
    """The part of it that the pass at hand takes the gradient of."""

    @property
    def robust(self) -> RobustTraining | None:
        """The training for robustness, or None; set to a `RobustTraining`, the name of one, or a dictionary of its settings."""
        return self._robust

    @robust.setter
    def robust(self, value: RobustTraining | str | Mapping[str, Any] | None) -> None:
        self._robust = None if value is None else robust_training(value)
        self._units = self.perturbation = None
        if self._robust is None:
            self.hparams.pop("robust", None)
        else:
            self.hparams["robust"] = self._robust.record()

    @property
    def repeats(self) -> int:
        """Optimizer steps for each batch: more than one where batches are replayed."""
        return 1 if self._robust is None else self._robust.repeats

    @property
    def units(self) -> Units:
        """The units of the data that it trains on; known once training has started."""
        if self._units is None:
            raise InputError("the units of the data are known once training has started")
        return self._units

    def training_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what a step minimises on a batch: the method's objective, or what its training for robustness makes of it."""
        method = cast("Method", self)
        return method.objective(x, y) if self._robust is None else self._robust.objective(method, x, y)

    def on_train_start(self) -> None:
        """Learn the units of the data.

        Raises:
            InputError: for data without units; batches that are both gathered and replayed.
        """
        if self._robust is None:
            return
        if self.repeats > 1 and self.trainer.accumulate_grad_batches > 1:
            raise InputError(
                f"{self._robust.name} takes several steps for each batch, so accumulate_grad_batches must be 1"
            )
        self._units = self._robust.units(getattr(self.trainer, "datamodule", None))

    def on_after_backward(self) -> None:
        """Hand the gradients on."""
        if self._robust is not None:
            self._robust.after_backward(cast("Method", self))

    def adopt_robust(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the training for robustness of a checkpoint, unless there is one already."""
        saved = checkpoint.get("hyper_parameters", {}).get("robust")
        if self._robust is None and saved is not None:
            self.robust = saved
