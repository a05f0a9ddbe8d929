"""A run that can be steered: train in pieces, hold the schedule, go back to an earlier moment, branch off another run.

    run = steer("adaste", "two_moons", epochs=30)
    run.advance(120)                        # 120 steps; run.advance() goes to the end of the plan
    run.freeze(); run.advance(60)           # quantities and learning rate stay where they are, training goes on
    run.release(); run.rewind(90)           # back to a kept moment, bit for bit
    frozen = run.branch(90, frozen=True)    # a second run from there; also speed=2.0, lr=0.3
    frozen.advance(60)
    frozen.telemetry().figure()

What each call promises, and tests check:

    advance   the bits of `qlab.fit`, however the steps are cut into pieces
    freeze    every step sees the same quantities and the same learning rate
    rewind    training on from there gives the same bits as before
    branch    everything until then is that of the parent, and without changes everything after it too

Recorded for every step, over all quantized weights, after the step and with the quantities that were in force in it:

    residual   mean |q(w) - hard(w)|         what training computes with, less what is deployed
    distance   mean |w - nearest deployed value|      of the latent weights
    flips      share of weights whose level changed in the step
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlab.cockpit import COLUMNS, Telemetry, distance, mean, residual
from qlab.data.base import DataModule
from qlab.errors import InputError
from qlab.jobs import Cancelled, Update
from qlab.methods.base import Method
from qlab.quantizers import quantized_tensors
from qlab.stepping import Moment, Stepper, prepared

__all__ = ["SteeredRun", "steer"]

_SLOWEST = 64  # a clock may go one tick in that many steps


@dataclass(frozen=True)
class _Kept:
    """A moment with what this module adds to it: how many rows there were, the levels, and how the run was set."""

    moment: Moment
    rows: int
    levels: Mapping[str, Tensor]
    frozen: bool
    speed: Fraction
    owed: Fraction


class SteeredRun:
    """A training in pieces; see the module docstring. Made by `steer`, and by `branch` of another.

    Args:
        stepper: at its beginning.
        keep_every: steps between two moments that can be gone back to.

    Attributes:
        frozen: whether the clock stands still.
        speed: ticks of the clock per step while it does not.
    """

    def __init__(self, stepper: Stepper, keep_every: int) -> None:
        if isinstance(keep_every, bool) or not isinstance(keep_every, int) or keep_every < 1:
            raise InputError(f"keep_every must be a whole number of at least 1, not {keep_every!r}")
        self.keep_every = keep_every
        self.frozen = False
        self.speed = Fraction(1)
        self.branched: int | None = None
        self._stepper = stepper
        self._owed = Fraction(0)  # of a tick
        self._busy = threading.Lock()
        self._names = tuple(stepper.method.schedule(0.0))
        self._rows: list[tuple[float, ...]] = []
        self._kept: dict[int, _Kept] = {}
        self._levels: dict[str, Tensor] = {}
        with torch.no_grad():
            self._record(math.nan, 0.0, 0)
        self._keep()

    # ---- where the run is -----------------------------------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """The method in its present state."""
        return self._stepper.method

    @property
    def step(self) -> int:
        """Steps done."""
        return self.method.steps

    @property
    def progress(self) -> float:
        """Where the schedule stands, in [0, 1]; it moves only while the run is not frozen."""
        return self._stepper.progress

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps that can be gone back to."""
        return tuple(sorted(self._kept))

    @property
    def deployed(self) -> nn.Module:
        """The net as it would be shipped now."""
        return self._stepper.deployed()

    def telemetry(self) -> Telemetry:
        """Return what was recorded so far."""
        rows = np.asarray(self._rows, dtype=np.float64)
        columns = (*COLUMNS, *self._names)
        values = {name: rows[:, i] for i, name in enumerate(columns)}
        data = str(getattr(self._stepper.data, "name", type(self._stepper.data).__name__))
        return Telemetry(
            self.method.info.name, data, self._stepper.total, values, self._names, self.kept, self.branched
        )

    # ---- steering ---------------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Hold the schedule: quantities and learning rate stay as they are while training goes on."""
        with self._alone():
            self._keep()
            self.frozen = True

    def release(self) -> None:
        """Let the schedule go on from where it was held."""
        with self._alone():
            self._keep()
            self.frozen = False

    def rewind(self, step: int) -> None:
        """Go back to a kept moment; what was recorded since is dropped, and the run is set as it was then.

        Raises:
            InputError: that step was not kept.
        """
        with self._alone():
            self._go_to(self._moment(step))

    def branch(
        self, step: int | None = None, *, frozen: bool | None = None, speed: float | None = None, lr: float = 1.0
    ) -> SteeredRun:
        """Return a second run that begins as this one did until `step`; this one stays as it is.

        Args:
            step: a kept one; None is now.
            frozen: whether its schedule is held; None is as here at that moment.
            speed: ticks of its clock per step, up to 64; 2 anneals twice as fast. None is as here.
            lr: factor on all its learning rates.

        Raises:
            InputError: that step was not kept, or a factor out of range.
        """
        pace = None if speed is None else _pace(speed)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
            raise InputError(f"lr={lr!r}; expected a positive factor on the learning rate, such as 0.3")
        with self._alone():
            if step is None:
                self._keep()
                step = self.step
            kept = self._moment(step)
            other = SteeredRun(self._stepper.twin(), self.keep_every)
            other._rows = list(self._rows)
            other._kept = dict(self._kept)
        other._go_to(kept)
        other.branched = step
        other.frozen = other.frozen if frozen is None else bool(frozen)
        other.speed = other.speed if pace is None else pace
        if lr != 1:
            other._stepper.scale_lr(lr)
        del other._kept[step]
        other._keep()  # going back to its beginning leaves a branch as it was set
        return other

    # ---- training ---------------------------------------------------------------------------------------------------------

    def advance(self, steps: int | None = None) -> Telemetry:
        """Train `steps` steps, or to the end of the plan, and return what was recorded.

        Raises:
            InputError: no whole number of steps; none given while the schedule is held, for then there is no end.
        """
        for _ in self.advancing(steps, every=math.inf):
            pass
        return self.telemetry()

    def advancing(self, steps: int | None = None, *, every: float = 0.1) -> Iterator[Update]:
        """Do `advance` as a piece of work: an update each step, with a `Telemetry` every so many seconds and at the end.

        Cancelled, it stops after the step at hand: the run can be advanced again.
        """
        todo = self._todo(steps)
        done, told = 0, time.monotonic()
        with self._alone():
            try:
                for done in range(1, todo + 1):
                    self._train()
                    now = time.monotonic()
                    value = None
                    if now - told >= every:
                        told, value = now, self.telemetry()
                    yield Update(done / todo, f"step {self.step}, schedule at {100 * self.progress:.0f} %", value)
            except Cancelled:
                pass
            text = f"step {self.step}, schedule at {100 * self.progress:.0f} %"
            yield Update(done / max(todo, 1), text, self.telemetry())

    def _todo(self, steps: int | None) -> int:
        if steps is None:
            if self.frozen:
                raise InputError("the schedule is held, so the plan has no end: say how many steps, as in advance(100)")
            left = max(0, self._stepper.total - self._stepper.tick)
            return math.ceil((left - self._owed) / self.speed) if left else 0
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise InputError(f"steps must be a whole number of at least 0, not {steps!r}")
        return steps

    def _train(self) -> None:
        stepper = self._stepper
        progress, lr = stepper.progress, stepper.lr
        ticks = 0
        if not self.frozen:
            self._owed += self.speed
            ticks = int(self._owed)
            self._owed -= ticks
        tick = stepper.tick
        loss = stepper.step(ticks)
        with torch.no_grad():
            self._record(loss, progress, tick, lr)
        if self.step % self.keep_every == 0 or stepper.tick >= stepper.total > tick:
            self._keep()

    # ---- records and moments ------------------------------------------------------------------------------------------------

    def _record(self, loss: float, progress: float, tick: int, lr: float | None = None) -> None:
        tensors = list(quantized_tensors(self.method.net))
        levels = {t.name: t.quantizer.level(t.latent.detach()).clone() for t in tensors}
        flips = mean([(levels[name] != before).double() for name, before in self._levels.items()])
        self._levels = levels
        due = self.step % self.keep_every == 0
        quantities = self.method.schedule(progress)
        self._rows.append((
            self.step, tick, progress, self._stepper.epoch, loss, self._stepper.lr if lr is None else lr, residual(tensors),
            distance(tensors), flips, self._accuracy() if due else math.nan, *(quantities[n] for n in self._names),
        ))  # fmt: skip

    def _accuracy(self) -> float:
        if not self._rows:  # an untrained net's is not worth the first second
            return math.nan
        data = self._stepper.data
        test = data.split("test")
        return float((self._stepper.deployed()(data.transform(test.x)).argmax(1) == test.y).double().mean())

    def _keep(self) -> None:
        """Keep this moment, as the run arrived at it."""
        if self.step not in self._kept:
            self._kept[self.step] = _Kept(
                self._stepper.keep(), len(self._rows), dict(self._levels), self.frozen, self.speed, self._owed
            )

    def _moment(self, step: int) -> _Kept:
        if isinstance(step, bool) or step not in self._kept:
            kept = self.kept
            near = min(kept, key=lambda k: abs(k - step)) if isinstance(step, int) else kept[-1]
            raise InputError(
                f"step {step!r} was not kept, so it cannot be gone back to; {len(kept)} steps from {kept[0]} to {kept[-1]} were, "
                f"the nearest is {near}"
            )
        return self._kept[step]

    def _go_to(self, kept: _Kept) -> None:
        self._stepper.restore(kept.moment)
        self._rows = self._rows[: kept.rows]
        self._kept = {step: k for step, k in self._kept.items() if step <= kept.moment.step}
        self._levels = dict(kept.levels)
        self.frozen, self.speed, self._owed = kept.frozen, kept.speed, kept.owed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise InputError("this run is being trained just now; let that end, or stop it, before it is steered")
        try:
            yield
        finally:
            self._busy.release()


def _pace(speed: float) -> Fraction:
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not 1 / _SLOWEST <= speed <= _SLOWEST:
        raise InputError(f"speed={speed!r}; expected ticks of the clock per step, from 1/{_SLOWEST} to {_SLOWEST}")
    return Fraction(speed).limit_denominator(_SLOWEST)


def steer(
    method: Method | str,
    data: DataModule | str = "two_moons",
    *,
    net: nn.Module | str | None = None,
    epochs: int = 20,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    keep_every: int | None = None,
) -> SteeredRun:
    """Return a run that can be steered, before its first step.

    Args:
        method: a method, untrained, or the name of one.
        data: a data set, or the name of one; a planar one is then small enough for a second of training.
        net: with a method's name: a plain net or the name of a model; None is one that suits the set.
        epochs: over which the schedules are stretched.
        seed: of the net's start, the order of the data and the method's noise.
        options: hyperparameters, with a method's name.
        keep_every: steps between two moments that can be gone back to; None is an epoch.

    Raises:
        UnknownNameError, InputError: for names, shapes or numbers that do not go together.
    """
    made, loaded = prepared(method, data, net=net, seed=seed, options=options)
    stepper = Stepper(made, loaded, epochs)
    return SteeredRun(stepper, len(stepper.loader) if keep_every is None else keep_every)
