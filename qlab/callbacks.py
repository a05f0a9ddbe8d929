"""Lightning callbacks that any run can carry: cheap enough to leave on.

    qlab.fit("ste", "digits", callbacks=[BitHistory(), MismatchProbe(), AnnealLog()])

| callback      | logs or keeps                                                              | how often                      |
|---------------|----------------------------------------------------------------------------|--------------------------------|
| FlipRatio     | quant/flip_ratio, quant/flip_ratio/<layer>                                 | every epoch                    |
| MismatchProbe | quant/mismatch/<layer>: cosine of back-propagation with exact differences | every n steps, layers in turn  |
| AnnealLog     | quant/anneal/<quantity>, quant/anneal/lr                                   | every n steps                  |
| BitHistory    | one bit per binary weight: `callback.history`                              | every step                     |

With several processes the first one measures and logs: weights are the same everywhere, so nothing is synchronised. State is
tensors and primitives: checkpoints load with `weights_only=True`, and a resumed run goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.data.seeding import generator
from qlab.diagnose.base import plain
from qlab.diagnose.coordinates import coordinate_cosine, temperature
from qlab.diagnose.history import MEGABYTE, History, Recorder, Signs, Tracked
from qlab.errors import InputError
from qlab.quantizers import QuantizedTensor, harden, quantized_tensors, quantizers

__all__ = ["AnnealLog", "BitHistory", "FlipRatio", "MismatchProbe"]


class FlipRatio(pl.Callback):
    """Log the share of quantized weights whose hard level changed since the last epoch.

    Logs `quant/flip_ratio` over all quantized weights and `quant/flip_ratio/<layer>` for each tensor. Silent for
    float nets.

    Args:
        per_layer: log each layer too.
    """

    def __init__(self, per_layer: bool = True) -> None:
        self.per_layer = per_layer
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the weights stand; after a resume the checkpoint's own memory stays."""
        if not self._before:
            self._before = _copy(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the flips of this epoch."""
        now = _copy(pl_module)
        if not now:
            return
        flips = {name: (w != self._before[name].to(w.device)).sum() for name, w in now.items()}
        total = sum(w.numel() for w in now.values())
        pl_module.log("quant/flip_ratio", torch.stack(list(flips.values())).sum() / total)
        if self.per_layer:
            for name, n in flips.items():
                pl_module.log(f"quant/flip_ratio/{name}", n / now[name].numel())
        self._before = now

    def state_dict(self) -> dict[str, Any]:
        """Return the levels at the end of the last epoch."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._before = dict(state_dict["before"])


def _copy(method: Any) -> dict[str, Tensor]:
    with torch.no_grad():  # levels, not values: a scale that moves is no flip
        return {t.name: t.quantizer.level(t.latent.detach()).clone() for t in quantized_tensors(method.net)}


class BitHistory(pl.Callback):
    """Keep the level of every quantized weight at every step: one bit where it is binary.

    After the run `callback.history` is a `qlab.diagnose.history.History`. Weights without a grid are not kept; where there are
    none at all, nothing is. When the record would outgrow its limit, every second row is dropped and half as many are kept from
    then on.

    Args:
        every: steps between two records.
        limit_mb: size that the record may reach; it travels in every checkpoint.
        path: file to write at the end of the fit, also of one that was stopped.

    Raises:
        InputError: for a distance or a limit that is not positive.
    """

    def __init__(self, every: int = 1, limit_mb: float = 64.0, path: str | PathLike[str] | None = None) -> None:
        _positive("every", every)
        if not limit_mb > 0:
            raise InputError(f"limit_mb must be positive, not {limit_mb!r}")
        self.every, self.limit_mb, self.path = every, limit_mb, path
        self._recorder: Recorder | None = None
        self._words: Callable[[], NDArray[np.uint64]] | None = None

    @property
    def history(self) -> History:
        """What was recorded so far.

        Raises:
            InputError: nothing was.
        """
        if self._recorder is None:
            raise InputError("nothing is recorded yet: pass this callback to a fit of a net with quantized weights")
        return self._recorder.history()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the tensors and record where they start; after a resume the record goes on."""
        if not trainer.is_global_zero:
            return
        found = [(t, t.quantizer.levels(torch.float64)) for t in quantized_tensors(plain(pl_module))]
        tensors = [t for t, levels in found if levels is not None]
        tracked = [
            Tracked(t.name, tuple(t.latent.shape), tuple(levels.tolist())) for t, levels in found if levels is not None
        ]
        if not tracked:
            return
        if self._recorder is None or self._recorder.tensors != tuple(tracked):
            self._recorder = Recorder(tracked, self.every, int(self.limit_mb * MEGABYTE))
        self._words = _encoder(tracked, tensors)
        self._record(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the weights after this step."""
        if trainer.is_global_zero:
            self._record(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, if one was asked for."""
        if trainer.is_global_zero and self.path is not None and self._recorder is not None:
            self._recorder.history().save(self.path)

    def _record(self, step: int) -> None:
        if self._recorder is not None and self._words is not None and self._recorder.due(step):
            self._recorder.append_words(step, self._words())

    def state_dict(self) -> dict[str, Any]:
        """Return the record: a tensor of words and primitives."""
        return {"record": None if self._recorder is None else self._recorder.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        record = state_dict["record"]
        self._recorder = None if record is None else Recorder.of(record, int(self.limit_mb * MEGABYTE))


def _encoder(tracked: list[Tracked], tensors: list[QuantizedTensor]) -> Callable[[], NDArray[np.uint64]]:
    """Return what gives the words of all tensors now; without calling quantizers that are seen to be plain signs."""
    if all(_is_sign(tensor, t) for tensor, t in zip(tracked, tensors, strict=True)):
        return Signs(tracked, [t.latent for t in tensors])

    @torch.no_grad()
    def words() -> NDArray[np.uint64]:
        pairs = zip(tracked, tensors, strict=True)
        return np.concatenate([tensor.encode(t.quantizer.level(t.latent.detach())) for tensor, t in pairs])

    return words


@torch.no_grad()
def _is_sign(tensor: Tracked, t: QuantizedTensor) -> bool:
    """Return whether the deployed value is high where the latent one is at least 0 and low elsewhere, as far as one sees."""
    w = t.latent.detach()
    if len(tensor.levels) != 2 or w.device.type != "cpu" or w.dtype not in Signs.DTYPES:
        return False
    low, high = tensor.levels
    shift = w.abs().mean()
    probes = (w, w + shift, 2 * w - shift, torch.zeros_like(w))  # a sign of w - mean(w) is none of w
    return all(torch.equal(t.quantizer.level(u), torch.where(u >= 0, high, low).to(u.dtype)) for u in probes)


class _Periodic(pl.Callback):
    """A callback that has something to do every so many optimizer steps, in the first process."""

    def __init__(self, every: int) -> None:
        _positive("every", every)
        self.every = every
        self._last = 0  # before the first step there is nothing to see; batches that are accumulated end at step 0 too

    def _due(self, trainer: pl.Trainer) -> bool:
        """Return whether it is time; once for each such step, though a step may take several batches."""
        step = trainer.global_step
        if step % self.every or step == self._last or not trainer.is_global_zero:
            return False
        self._last = step
        return True


class MismatchProbe(_Periodic):
    """Log how well the back-propagated gradient agrees with exact differences of the deployed net.

    Every `every` steps one layer, the next in turn, is looked at: `quant/mismatch/<layer>` is the cosine of
    `qlab.diagnose.coordinates` over sampled weights, on a part of the training batch, of the net with hard weights in eval mode.
    1 is a gradient that can be trusted. Silent for float nets.

    Args:
        every: steps between two probes.
        weights: how many weights are sampled; the cosine is known to about 1 / sqrt(weights).
        examples: of the training batch.
        seed: of the sample, which depends on it and on the step alone.

    Raises:
        InputError: for a number that is not positive.
    """

    def __init__(self, every: int = 300, weights: int = 48, examples: int = 16, seed: int = 0) -> None:
        super().__init__(every)
        for name, value in (("weights", weights), ("examples", examples)):
            _positive(name, value)
        self.weights, self.examples, self.seed = weights, examples, seed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe one layer, if it is time."""
        if not self._due(trainer):
            return
        step, net = trainer.global_step, plain(pl_module)
        if next(quantizers(net), None) is None:
            return
        hard = harden(net)
        binary = {t.name: t.quantizer.bits == 1 for t in quantized_tensors(net)}
        names = [n for n, p in hard.named_parameters() if p.dim() >= 2]
        turn = step // self.every - 1
        name = names[turn % len(names)]
        layer = name.removesuffix(".weight")
        x, y = batch[0][: self.examples], batch[1][: self.examples]
        with torch.no_grad():
            beta = temperature(hard(x))
        cosine = coordinate_cosine(
            hard,
            x,
            y,
            name,
            signs=binary.get(layer, False),
            count=self.weights,
            generator=generator("mismatch", self.seed, step),
            beta=beta,
        )
        if math.isfinite(cosine):
            _log(trainer, {f"quant/mismatch/{layer}": cosine})


class AnnealLog(_Periodic):
    """Log the scheduled quantities that were in force, and the learning rate.

    `quant/anneal/<quantity>` is what the first quantizer that has it computed with in the last step; `quant/anneal/lr` the
    learning rate that the first parameter group has now, which the next step takes.

    Args:
        every: steps between two rows.

    Raises:
        InputError: for a distance that is not positive.
    """

    def __init__(self, every: int = 25) -> None:
        super().__init__(every)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a row, if it is time."""
        if not self._due(trainer):
            return
        values = dict(_scheduled(pl_module))
        for optimizer in trainer.optimizers[:1]:
            values["lr"] = float(optimizer.param_groups[0]["lr"])
        _log(trainer, {f"quant/anneal/{name}": value for name, value in values.items()})


def _scheduled(module: Any) -> Mapping[str, float]:
    """Return the scheduled quantities as they stand in the quantizers."""
    schedule = getattr(module, "schedule", None)
    names: Mapping[str, float] = {} if schedule is None else schedule(0.0)
    found: dict[str, float] = {}
    if names:
        for quantizer in quantizers(plain(module)):
            for name, buffer in quantizer.named_buffers(recurse=False):
                if name in names:
                    found.setdefault(name, float(buffer))
    return found


def _log(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Write one row to every logger, with the step that Lightning gives a batch's own metrics.

    Not `self.log`: it costs more than what is logged here, and repeats a value at every step until the epoch ends.
    """
    row = {**values, "epoch": float(trainer.current_epoch)}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=max(trainer.global_step - 1, 0))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
