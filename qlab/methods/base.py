"""What every training method promises.

A method is a LightningModule around a plain net. It says which tensors are quantized and by what (`weight_quantizer`,
`activation_quantizer`), how scheduled quantities move (`schedule`), what follows an optimizer step (`post_step`),
and, where its paper has an optimizer of its own, `configure_optimizers`. The mathematics stands in quantizers and
plain functions of the method's file.

Everything else is here, once: the loss, learning-rate schedule, step counter, stateless noise, evaluation,
deployment, checkpoints.

One step, in order:  schedule -> noise -> forward, backward -> optimizer -> post_step.

A training for robustness (`robust`, see `qlab.methods.robust`) changes what a step minimises, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab import models
from qlab.data.seeding import generator
from qlab.errors import InputError
from qlab.methods import checkpoints
from qlab.methods.catalog import MethodInfo
from qlab.methods.losses import LOSSES
from qlab.methods.robust.hook import Robustness
from qlab.methods.signature import hyperparameters
from qlab.quantizers import Quantizer, harden, layers, quantize, quantized_tensors, quantizers, reestimate_batch_norm

__all__ = ["Method"]

Batch = tuple[Tensor, Tensor]


class Method(Robustness):
    """Base class of the training methods; see the module docstring.

    Args:
        net: a plain net (it is copied), or the spec of one of `qlab.models`.
        optimizer: "adam" or "sgd" with momentum.
        lr: learning rate at the start.
        momentum: of sgd.
        weight_decay: L2 on every parameter.
        lr_schedule: "cosine" to zero over the run, "exponential" to `lr_end` times the start, or "constant".
        lr_end: share of the learning rate left at the end of an exponential schedule.
        loss: "cross_entropy" or "squared_hinge".
        keep: layers left in float: "first", "last", or module names.
        biases: quantize biases as weights are.
        reestimate_bn: re-estimate batch-norm statistics with the hard weights before evaluation.
        seed: of the noise inside the method and of latents it draws.

    Raises:
        InputError: for a hyperparameter out of range; for a net of which nothing is quantized, though the method quantizes.
    """

    info: ClassVar[MethodInfo]
    _evaluated: nn.Module
    optimizers_known: ClassVar[tuple[str, ...]] = ("adam", "sgd")
    calibration_batches: ClassVar[int] = 32
    """Training batches over which batch-norm statistics are re-estimated."""

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        optimizer: Literal["adam", "sgd"] = "adam",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        lr_end: float = 1e-3,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
        keep: Sequence[str] = (),
        biases: bool = False,
        reestimate_bn: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        plain = net if isinstance(net, nn.Module) else models.build(net)
        self.save_hyperparameters(ignore=["net"])
        taken = {h.name for h in hyperparameters(type(self))}
        for name in (
            set(self.hparams) - taken
        ):  # a subclass with an optimizer of its own does not take the base's arguments
            del self.hparams[name]
        self.hparams["keep"] = list(keep)
        self.save_hyperparameters({"net": getattr(plain, "spec", None)})
        self._check_hyperparameters()
        weights, activations = self._factory("weight"), self._factory("activation")
        self.net = quantize(plain, weights, activations, keep, biases, seed)
        if (weights or activations) and next(quantizers(self.net), None) is None:
            raise InputError(
                f"{self.info.name} has nothing to quantize: keep={list(keep)!r} leaves every layer of {type(plain).__name__} "
                "in float. Keep fewer layers, use a net with more of them, or train 'full_precision'"
            )
        self.steps = 0
        self._run_length = 1
        self._statistics: dict[str, Any] = {}
        self.anneal(0.0)

    @property
    def h(self) -> Any:
        """The hyperparameters, as attributes."""
        return self.hparams

    def _check_hyperparameters(self) -> None:
        h = self.h
        if not (isinstance(h.lr, int | float) and math.isfinite(h.lr) and h.lr >= 0):
            raise InputError(f"lr must be a number of at least 0, not {h.lr!r}")
        for name, known in (
            ("loss", LOSSES),
            ("optimizer", self.optimizers_known),
            ("lr_schedule", ("cosine", "exponential", "constant")),
        ):
            if name in h and h[name] not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {h[name]!r}")

    def _factory(self, kind: Literal["weight", "activation"]) -> Callable[[], Quantizer] | None:
        make = getattr(self, f"{kind}_quantizer")
        return make if make() is not None else None

    # ---- what a method says -----------------------------------------------------------------------------------------

    def weight_quantizer(self) -> Quantizer | None:
        """Return a fresh quantizer for one weight tensor, or None for float weights."""
        return None

    def activation_quantizer(self) -> Quantizer | None:
        """Return a fresh quantizer for one nonlinearity, or None to leave them."""
        return None

    def schedule(self, progress: float) -> dict[str, float]:
        """Return the scheduled quantities at `progress` in [0, 1] of the run; a pure function of the hyperparameters."""
        return {}

    def post_step(self) -> None:
        """Act on the latent weights after an optimizer step; runs without gradients."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        return [{"params": list(self.parameters())}]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer named by the hyperparameters."""
        h = self.h
        if h.optimizer == "sgd":
            return torch.optim.SGD(self.parameter_groups(), lr=h.lr, momentum=h.momentum, weight_decay=h.weight_decay)
        return torch.optim.Adam(self.parameter_groups(), lr=h.lr, weight_decay=h.weight_decay)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of the training-time net."""
        return self.net(x)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the scalar loss of logits (N, classes) against labels (N,)."""
        return LOSSES[self.h.loss](logits, y)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what a step minimises on a batch: the loss, and what a method adds to it (a regularizer, a teacher)."""
        return self.loss(self.net(x), y)

    def anneal(self, progress: float) -> None:
        """Set the quantizers' scheduled quantities to their values at `progress` in [0, 1]."""
        quantities = self.schedule(progress)
        if quantities:
            for quantizer in quantizers(self.net):
                quantizer.anneal(**quantities)

    def begin_step(self, total: int) -> None:
        """Prepare step `self.steps` of `total`: schedules, then noise drawn from (seed, step) alone.

        A resumed run thus draws what an uninterrupted one draws, and the global generator is not touched.
        """
        self.anneal(min(self.steps / max(total, 1), 1.0))
        noise = generator("noise", self.h.seed, self.steps)
        for quantizer in quantizers(self.net):
            quantizer.resample(noise)

    @torch.no_grad()
    def end_step(self) -> None:
        """Finish a step after the optimizer moved: projection, step counter."""
        self.post_step()
        self.steps += 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run.

        Raises:
            InputError: for a run without an end, over which no schedule can be stretched.
        """
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise InputError("schedules are stretched over the run, so it needs an end: set max_epochs or max_steps")
        return int(total) * self.repeats

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch (x, y)."""
        x, y = batch
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.begin_step(self._run_length)
        loss = self.training_loss(x, y)
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):  # on a GPU the check would stall every step
            self._explain_nonfinite(x)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(y))
        return loss

    def _explain_nonfinite(self, x: Tensor) -> None:
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise InputError(
                f"the batch of step {self.steps} holds {bad} values that are NaN or infinite; clean the data"
            )
        raise InputError(
            f"the loss became NaN or infinite at step {self.steps} with finite data: lower lr ({self.h.lr})"
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let Lightning step the optimizer, then `post_step`; as often as a training for robustness replays a batch."""
        for replay in range(self.repeats):
            if replay:  # Lightning moves the learning rate once for each batch
                schedulers = self.lr_schedulers()
                for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                    if scheduler is not None:
                        scheduler.step()
            super().optimizer_step(*args, **kwargs)
            self.end_step()

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its learning-rate schedule, moved every step."""
        return self.with_schedule(self.make_optimizer())

    def with_schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return what Lightning wants: the optimizer and the learning-rate schedule of the hyperparameters."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_factor(step / max(self._run_length, 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, progress: float) -> float:
        """Return the share of `lr` in force at `progress` in [0, 1]."""
        p = min(max(progress, 0.0), 1.0)
        if self.h.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * p))
        return self.h.lr_end**p if self.h.lr_schedule == "exponential" else 1.0

    def training_samples(self) -> int | None:
        """Return the number of training samples, for methods whose steps depend on it; None where it is not known."""
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        if data is not None and hasattr(data, "num_samples"):
            return int(data.num_samples("train"))
        loader = getattr(trainer, "train_dataloader", None)
        if loader is None:  # not yet set up, as when optimizers are made; Lightning has no public way to it
            source = getattr(getattr(trainer, "fit_loop", None), "_data_source", None)
            loader = getattr(source, "instance", None)
        dataset = getattr(loader, "dataset", None)
        return None if dataset is None else len(dataset)

    def on_train_start(self) -> None:
        """Fix the length of the run, over which schedules are stretched.

        Not earlier: the length needs the loader, and a loader that Lightning sets up before it restores a checkpoint does
        not get its position back.
        """
        super().on_train_start()
        self._run_length = self.total_steps

    # ---- what is deployed -------------------------------------------------------------------------------------------

    def latent_weights(self) -> dict[str, Tensor]:
        """Return the latent weight of every Linear and Conv layer by name, detached, not copied.

        The latent weight of a layer left in float is its weight. Quantized biases come last, as "<layer>.bias".
        """
        weights = {name: layer.weight.detach() for name, layer in layers(self.net).items()}
        return weights | {t.name: t.latent.detach() for t in quantized_tensors(self.net)}

    @torch.no_grad()
    def hard_weights(self) -> dict[str, Tensor]:
        """Return the deployed value of every quantized tensor by name; empty for a float net."""
        return {t.name: t.quantizer.hard(t.latent.detach()) for t in quantized_tensors(self.net)}

    def deployed(self, calibration: Sequence[Tensor] | None = None) -> nn.Module:
        """Return the net exactly as it would be shipped: hard weights, eval mode, batch norm re-estimated for them.

        Args:
            calibration: training inputs, each (N, ...), for the statistics. None: the statistics already found for
                these very weights (they travel in the checkpoint), else the trainer's training data, else those of
                training, with a warning.

        Returns:
            A plain net on the same device; it shares nothing with this one.

        Raises:
            InputError: for a method that draws weights or activations at random and took no step yet.
        """
        if self.steps == 0 and self.stochastic:
            raise InputError(
                f"{self.info.name} draws at random in training, and no step was taken yet: it has no deployed net but the "
                "draws it started from. Train it first, with qlab.fit, or load a trained checkpoint"
            )
        return self.hardened(calibration)

    @property
    def stochastic(self) -> bool:
        """Whether weights or activations are drawn at random in training."""
        return any(quantizer.stochastic for quantizer in quantizers(self.net))

    def hardened(self, calibration: Sequence[Tensor] | None = None) -> nn.Module:
        """Return what `deployed` returns, also before the first step: for evaluation and pictures of a run from its start."""
        net = harden(self.net)
        if not self.h.reestimate_bn or not any(
            isinstance(m, _BatchNorm) and m.track_running_stats for m in net.modules()
        ):
            return net
        key = _fingerprint(net)
        if calibration is None and self._statistics.get("key") == key:
            net.load_state_dict(self._statistics["values"], strict=False)
            return net
        if calibration is None:
            calibration = self._training_inputs()
        if calibration is None:
            self._warn_uncalibrated()
            return net
        reestimate_batch_norm(net, [x.to(self.device) for x in calibration])
        values = {k: v.clone() for k, v in net.state_dict().items() if k.endswith(("running_mean", "running_var"))}
        self._statistics = {"key": key, "values": values}
        return net

    def _warn_uncalibrated(self) -> None:
        pl.utilities.rank_zero_warn(
            f"{self.info.name}: batch-norm statistics of the deployed net are those of training, for there is no training "
            "data here; pass deployed(calibration=data.calibration(32))"
        )

    def _training_inputs(self) -> list[Tensor] | None:
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        if data is not None and hasattr(data, "calibration"):
            return data.calibration(self.calibration_batches)
        loader = getattr(trainer, "train_dataloader", None)
        if loader is None:
            return None
        with torch.random.fork_rng():  # a foreign loader may shuffle with the global generator
            return [batch[0] for batch in islice(loader, self.calibration_batches)]

    # ---- evaluation: always of the deployed net, with the latent one beside it ----------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Take the deployed net of this moment."""
        self.__dict__["_evaluated"] = self.hardened()  # past nn.Module's registration: it is no part of the state

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log val/loss, val/acc (deployed) and val/acc_latent."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log test/loss, test/acc (deployed) and test/acc_latent."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        x, y = batch
        logits = self._evaluated(x)
        values = {
            "loss": self.loss(logits, y),
            "acc": (logits.argmax(1) == y).float().mean(),
            "acc_latent": (self.net(x).argmax(1) == y).float().mean(),
        }
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, on_epoch=True, prog_bar=name == "acc", batch_size=len(y), sync_dist=True)

    # ---- state ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step counter, the deployed net's batch-norm statistics, and where there is one the kept perturbation."""
        kept = {} if self.perturbation is None else {"perturbation": self.perturbation}
        return {"steps": self.steps, "statistics": self._statistics} | kept

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.steps = int(state["steps"])
        self._statistics = dict(state["statistics"])
        self.perturbation = state.get("perturbation")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sign the checkpoint with the method's name and the versions it was written by."""
        checkpoint[checkpoints.KEY] = checkpoints.signature(self.info.name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method; go on with its training for robustness, unless there is one already."""
        checkpoints.expect(checkpoint, self.info.name)
        self.adopt_robust(checkpoint)

    @classmethod
    def load(cls, path: str | PathLike[str], net: nn.Module | None = None, **overrides: Any) -> Method:
        """Restore a method from a checkpoint; no code from the file is run.

        Args:
            path: of a checkpoint written by a Trainer.
            net: the plain net, where it was not one of `qlab.models`.
            overrides: hyperparameters to set anew.

        Raises:
            CheckpointError: for a file that is corrupt, unsafe, of another method, or does not fit.
        """
        return checkpoints.restore(cls, checkpoints.read(path), path, net, overrides)


@torch.no_grad()
def _fingerprint(net: nn.Module) -> str:
    """Return a digest of the parameters: batch-norm statistics are good for these weights only."""
    digest = hashlib.blake2b(digest_size=16)
    for p in net.parameters():
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
