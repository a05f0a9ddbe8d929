"""A training run as it happens: `training` turns a Lightning fit, which blocks, into a generator of snapshots.

The fit runs in a thread of its own and posts metrics, progress and the histogram of the latent weights to a queue, a
few times a second; the generator hands them on as `Update`s, which is what `qlab.jobs.Job` runs and a widget or a
progress bar shows. Asked to stop, it raises the trainer's `should_stop`, waits until the checkpoint is written, and
hands over the partial `Run`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from qlab.jobs import Cancelled, Update

if TYPE_CHECKING:
    import numpy as np
    import pytorch_lightning as pl

    from qlab.runs import Run

__all__ = ["Histogram", "Snapshot", "training", "weight_histogram"]

MAX_LEVELS = 32  # more distinct deployed values than that are a float net, not a grid
WIDE = 10.0  # reach of the latent weights from which on a histogram has logarithmic bins
LOSSES_PER_POST = 5  # the loss is read more often than the picture is sent
SAMPLED_WEIGHTS = 100_000  # per layer and picture: enough for a histogram, cheap on a net of ten million


@dataclass(frozen=True)
class Histogram:
    """Latent weights of all quantized layers together, and where the deployed ones lie.

    Args:
        edges: (B + 1,) bin edges, ascending and symmetric about 0.
        counts: (B,) weights per bin.
        levels: (L,) distinct deployed values, ascending; empty where there are more than `MAX_LEVELS` (a float net).
    """

    edges: np.ndarray
    counts: np.ndarray
    levels: np.ndarray


def weight_histogram(method: Any, bins: int = 60) -> Histogram:
    """Return the histogram of the latent weights that are quantized, pooled over layers; of all weights of a float net.

    Large layers are thinned by a fixed stride. Bins are of equal width; where latent weights reach beyond `WIDE` (some
    methods let them grow to thousands, and the levels lie at 1) they are of equal width in sign(w) log(1 + |w|).

    Args:
        method: anything with `latent_weights()` and `hard_weights()`, dictionaries of tensors by layer name.
        bins: number of bins B.
    """
    import numpy as np

    def pooled(tensors: Any) -> np.ndarray:
        thinned = [_thin(t.detach().reshape(-1)).float().cpu().numpy() for t in tensors.values()]
        return np.concatenate(thinned) if thinned else np.zeros(0, np.float32)

    latents, hards = method.latent_weights(), method.hard_weights()
    quantized = {name: tensor for name, tensor in latents.items() if name in hards}
    latent, levels = pooled(quantized or latents), np.unique(pooled(hards))
    if len(levels) > MAX_LEVELS:
        levels = levels[:0]
    finite = latent[np.isfinite(latent)]
    reach = _round_up(1.02 * max((float(np.abs(a).max()) for a in (finite, levels) if a.size), default=1.0))
    edges = np.linspace(-reach, reach, bins + 1)
    if reach > WIDE:
        u = np.linspace(-np.log1p(reach), np.log1p(reach), bins + 1)
        edges = np.sign(u) * np.expm1(np.abs(u))
    counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), bins=edges)  # rounding must not lose the ends
    return Histogram(edges, counts, levels)


def _thin(flat: Any) -> Any:
    return flat[:: max(1, -(-flat.numel() // SAMPLED_WEIGHTS))]


def _round_up(value: float) -> float:
    """Return the next of 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten, so that an axis does not creep."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in (1, 1.25, 1.5, 2, 3, 4, 5, 6, 8) if m * power >= value), 10 * power)


@dataclass(frozen=True)
class Snapshot:
    """What a training run looks like at one moment.

    Args:
        step: optimizer steps done.
        epoch: epochs done, a fraction inside an epoch.
        history: metric -> (steps, values), two float arrays of equal length.
        histogram: of the latent weights now; None before the first step.
        run: the record of the run once it has ended or was stopped, with its checkpoint; None while it trains.
    """

    step: int
    epoch: float
    history: dict[str, tuple[np.ndarray, np.ndarray]]
    histogram: Histogram | None = None
    run: Run | None = None


def training(
    method: Any,
    data: Any,
    *,
    epochs: int,
    seed: int = 0,
    root: Any = None,
    resume: Any = None,
    before: Snapshot | None = None,
    every: float = 0.25,
    heartbeat: float = 0.05,
    **options: Any,
) -> Iterator[Update]:
    """Train with `qlab.fit` as a generator of updates whose values are `Snapshot`s.

    The fit runs in an inner thread. Cancelling the job (or closing the generator) asks the trainer to stop, which it
    does within a batch, waits for its checkpoint and yields the partial run;
    `training(..., resume=run, before=snapshot)` goes on from there, bit for bit.

    Args:
        method, data, epochs, seed, root, resume, options: as in `qlab.fit`.
        before: the snapshot of the run that is resumed: its curves are continued.
        every: seconds between two snapshots.
        heartbeat: seconds between two yields, hence the longest time until a cancel is noticed.

    Raises:
        Exception: whatever `qlab.fit` raises.
    """
    from qlab.runs import fit

    inbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    stop = threading.Event()
    callbacks = [*options.pop("callbacks", ()), _reporter(inbox, stop, every)]

    def blocking() -> None:
        arguments = {
            "epochs": epochs,
            "seed": seed,
            "root": root,
            "resume": resume,
            "callbacks": callbacks,
            "progress": False,
        }
        try:
            inbox.put(("run", fit(method, data, **arguments, **options)))
        except BaseException as error:  # handed to the generator, which raises it
            inbox.put(("error", error))

    curves = _Curves(before)
    thread = threading.Thread(target=blocking, name="qlab-training", daemon=True)
    thread.start()
    try:
        while not curves.ended:
            try:
                kind, payload = inbox.get(timeout=heartbeat)
            except Empty:
                yield Update(curves.fraction, curves.text)
                continue
            curves.take(kind, payload)
            if kind in ("progress", "run"):
                yield curves.update()
    except Cancelled:
        stop.set()
        while not curves.ended:
            curves.take(*inbox.get())
        yield curves.update()
    finally:
        stop.set()
        thread.join()


class _Curves:
    """Gathers what the training thread posts into snapshots."""

    def __init__(self, before: Snapshot | None) -> None:
        self.rows: dict[str, list[tuple[float, float]]] = {}
        if before is not None:
            for metric, (steps, values) in before.history.items():
                self.rows[metric] = list(zip(steps.tolist(), values.tolist(), strict=True))
        self.step = 0 if before is None else before.step
        self.epoch = 0.0 if before is None else before.epoch
        self.fraction = 0.0
        self.text = "preparing the data and the net"
        self.histogram: Histogram | None = None if before is None else before.histogram
        self.broken: int | None = None
        self.run: Run | None = None
        self.ended = False

    def take(self, kind: str, payload: Any) -> None:
        if kind == "metrics":
            step, metrics = payload
            for name, value in metrics.items():
                self.rows.setdefault(name, []).append((float(step), float(value)))
        elif kind == "progress":
            self.step, self.epoch, self.fraction, self.text, self.histogram = payload
        elif kind == "broken":
            self.broken = payload
        elif kind == "run":
            self.run, self.ended = payload, True
            if self.broken is not None:
                _forget_validation(self.run, self.broken)
            self.text = f"step {self.step}, epoch {self.epoch:.1f}"
        else:
            self.ended = True
            raise payload

    def update(self) -> Update:
        import numpy as np

        history = {name: tuple(np.asarray(rows, dtype=np.float64).T) for name, rows in self.rows.items()}
        return Update(self.fraction, self.text, Snapshot(self.step, self.epoch, history, self.histogram, self.run))


def _forget_validation(run: Run, step: int) -> None:
    """Take the values of a validation that was broken off after `step` optimizer steps out of the record."""
    history = run.history
    partial = history["metric"].str.startswith("val/") & (history["step"] >= step - 1)  # Lightning counts steps from 0
    run.history = history[~partial].reset_index(drop=True)
    for name in history["metric"][partial].unique():
        values = run.history["value"][run.history["metric"] == name]
        if len(values):
            run.metrics[name] = float(values.iloc[-1])
        else:
            run.metrics.pop(name, None)


def _reporter(inbox: SimpleQueue[tuple[str, Any]], stop: threading.Event, every: float) -> pl.Callback:
    """Return the callback that posts metrics and progress to `inbox` and passes the stop flag on to the trainer."""
    import pytorch_lightning as pl

    class Reporter(pl.Callback):
        def __init__(self) -> None:
            self.recorded = self.posted = float("-inf")
            self.broken: int | None = None

        def record(self, trainer: pl.Trainer, prefix: str) -> None:
            """Post the metrics that are new now; older ones still stand among the trainer's."""
            self.recorded = time.monotonic()
            fresh = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(prefix)}
            inbox.put(("metrics", (trainer.global_step, fresh)))

        def post(self, trainer: pl.Trainer, module: pl.LightningModule, *, now: bool = False) -> None:
            """Post how far the run is and where its weights lie, if the last time is long enough ago."""
            if not now and time.monotonic() - self.posted < every:
                return
            self.posted = time.monotonic()
            batches = trainer.num_training_batches
            epoch = trainer.global_step / batches if batches else 0.0
            total = max(trainer.max_epochs or 0, 1)
            text = f"epoch {min(int(epoch) + 1, total)} of {total}, step {trainer.global_step}"
            inbox.put(("progress", (trainer.global_step, epoch, epoch / total, text, weight_histogram(module))))

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.post(trainer, pl_module, now=True)

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if stop.is_set():
                trainer.should_stop = True
                trainer.limit_val_batches = 0  # else Lightning would validate once more before it stops
            if time.monotonic() - self.recorded >= every / LOSSES_PER_POST or trainer.is_last_batch or stop.is_set():
                self.record(trainer, "train/")
            self.post(trainer, pl_module)

        def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            last = trainer.current_epoch + 1 == trainer.max_epochs  # of a run that is as good as done
            if stop.is_set() and not last:
                if self.broken is None:
                    self.broken = trainer.global_step
                    inbox.put(("broken", trainer.global_step))
                raise StopIteration  # which Lightning's evaluation loop takes for the end of the data

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if self.broken is None:  # a validation broken off has nothing to say
                self.record(trainer, "val/")

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.should_stop:  # nor has an epoch broken off
                self.record(trainer, "quant/")
                self.post(trainer, pl_module)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.post(trainer, pl_module, now=True)

    return Reporter()
