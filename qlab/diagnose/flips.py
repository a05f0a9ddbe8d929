r"""Flips: which weights changed level during a training, which swing to and fro, and the net of any step.

A weight flips when its level differs between two records of a `History`. From the times t_1 < t_2 < ... at which one flips:

    period = 2 median(t_{j+1} - t_j)                       a swing is two flips
    oscillating: at least three flips

All of it is of the deployed weights. Shapes: T records, L tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlab.diagnose.base import Result, plain
from qlab.diagnose.history import History, Tracked
from qlab.errors import InputError
from qlab.quantizers import harden

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Flips", "flips", "interval", "places", "scrub"]

CHUNK_ROWS = 512  # of a history unpacked at once


# ---- how many, and which swing --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Flips(Result):
    """Flips of a history.

    Args:
        names: (L,) tensors.
        sizes: (L,) weights in each.
        steps: (T - 1,) step at the end of each interval between two records.
        counts: (T - 1, L) weights that differ from the record before.
        per_weight: name -> how often each weight flipped, of the tensor's shape.
        oscillating: how many weights flipped at least three times.
        swings: the weights that flipped most, one row each: layer, index, flips, period, longest_run, last_flip.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    steps: NDArray[np.int64]
    counts: NDArray[np.int64]
    per_weight: dict[str, NDArray[np.int64]]
    oscillating: int
    swings: pd.DataFrame

    @property
    def total(self) -> int:
        """Flips of all weights together."""
        return int(self.counts.sum())

    @property
    def rate(self) -> NDArray[np.float64]:
        """(T - 1,) share of all weights that flipped in each interval."""
        return self.counts.sum(1) / max(1, sum(self.sizes))

    def frame(self) -> pd.DataFrame:
        """Return one row per interval and tensor: step, layer, flips, share."""
        import pandas as pd

        return pd.DataFrame(
            {
                "step": np.repeat(self.steps, len(self.names)),
                "layer": np.tile(np.array(self.names, object), len(self.steps)),
                "flips": self.counts.ravel(),
                "share": (self.counts / np.array(self.sizes)).ravel(),
            }
        )

    def figure(self) -> Figure:
        """Draw the flip rate per tensor and how often weights flipped."""
        from qlab.plots.flips import flips_figure

        return flips_figure(self)

    def summary(self) -> str:
        """Say how many flips there were, where, and how many weights swing."""
        weights = sum(self.sizes)
        if not len(self.steps):
            return f"Deployed weights at one step only ({weights:,} weights): no interval, so no flips to count."
        still = sum(int((n == 0).sum()) for n in self.per_weight.values())
        most = self.names[int(np.argmax(self.counts.sum(0) / np.array(self.sizes)))]
        text = (
            f"Deployed weights: {self.total:,} flips of {weights:,} weights until step {self.steps[-1]}; "
            f"{still / weights:.1%} never flipped, {self.oscillating:,} flipped at least three times. "
            f"Most flips per weight: {most}."
        )
        if len(self.swings):
            top = self.swings.iloc[0]
            text += (
                f" The weight that flipped most is {top['layer']}[{', '.join(map(str, top['index']))}]: {top['flips']} times"
                + (f", about every {top['period'] / 2:.0f} steps." if np.isfinite(top["period"]) else ".")
            )
        return text


def flips(history: History, since: int | None = None, until: int | None = None, top: int = 20) -> Flips:
    """Count the flips of a history, per step and tensor and per weight.

    Args:
        history: as recorded.
        since, until: steps; the whole history by default.
        top: how many of the weights that flipped most are listed.

    Raises:
        InputError: for steps that were not recorded.
    """
    first, last = interval(history, since, until)
    counts = np.zeros((last - first, len(history.tensors)), np.int64)
    per_weight = {}
    for j, t in enumerate(history.tensors):
        total = np.zeros(t.size, np.int64)
        for low in range(first, last, CHUNK_ROWS):
            high = min(low + CHUNK_ROWS, last)
            words = history.rows(t.name)[low : high + 1]
            planes = (words[1:] ^ words[:-1]).reshape(high - low, t.planes, -1)
            changed = np.bitwise_or.reduce(planes, axis=1).astype("<u8").view(np.uint8)
            bits = np.unpackbits(changed, axis=-1, count=t.size, bitorder="little")
            counts[low - first : high - first, j] = bits.sum(1, dtype=np.int64)
            total += bits.sum(0, dtype=np.int64)
        per_weight[t.name] = total.reshape(t.shape)
    return Flips(
        names=tuple(t.name for t in history.tensors),
        sizes=tuple(t.size for t in history.tensors),
        steps=history.steps[first + 1 : last + 1],
        counts=counts,
        per_weight=per_weight,
        oscillating=sum(int((n >= 3).sum()) for n in per_weight.values()),
        swings=_swings(history, per_weight, first, last, top),
    )


def interval(history: History, since: int | None, until: int | None) -> tuple[int, int]:
    """Return the first and the last row of an interval of steps.

    Raises:
        InputError: for steps that were not recorded, or an empty interval.
    """
    first = 0 if since is None else history.row(since)
    last = len(history.steps) - 1 if until is None else history.row(until)
    if last < first:
        raise InputError(f"the interval from step {since} to step {until} is empty; give the earlier step first")
    return first, last


def _swings(
    history: History, per_weight: dict[str, NDArray[np.int64]], first: int, last: int, top: int
) -> pd.DataFrame:
    """Return the weights that flipped most, at least once, with the rhythm of each."""
    import pandas as pd

    rows = []
    for t in history.tensors:
        counted = per_weight[t.name].ravel()
        for i in np.argsort(-counted, kind="stable")[:top]:
            if counted[i]:
                rows.append((t, int(i), int(counted[i])))
    rows.sort(key=lambda row: -row[2])
    table = []
    for t, i, n in rows[:top]:
        times = history.steps[first + 1 : last + 1][np.diff(_course(history, t, i)[first : last + 1]) != 0]
        ends = np.concatenate([history.steps[first : first + 1], times, history.steps[last : last + 1]])
        table.append(
            {
                "layer": t.name,
                "index": tuple(map(int, np.unravel_index(i, t.shape))),
                "flips": n,
                "period": 2 * float(np.median(np.diff(times))) if n > 1 else float("nan"),
                "longest_run": int(np.diff(ends).max()),
                "last_flip": int(times[-1]),
            }
        )
    return pd.DataFrame(table, columns=["layer", "index", "flips", "period", "longest_run", "last_flip"])


def _course(history: History, t: Tracked, i: int) -> NDArray[np.int64]:
    """Return the codes (T,) of one weight."""
    words = history.rows(t.name).reshape(len(history.steps), t.planes, -1)[:, :, i // 64]
    bits = (words >> np.uint64(i % 64)) & np.uint64(1)
    return (bits.astype(np.int64) << np.arange(t.planes)).sum(1)


# ---- the net of a step ----------------------------------------------------------------------------------------------


def scrub(history: History, net: nn.Module, step: int) -> nn.Module:
    """Return the deployed net with the hard weights of a step; everything else is as in the net that is given.

    Args:
        history: as recorded during the training of this net.
        net: a method of the lab or its net, with latent or with hard weights.
        step: optimizer steps done.

    Raises:
        InputError: for a step that was not recorded, or a net that does not have these tensors.
    """
    hard = harden(plain(net))
    names = places(history, hard)
    with torch.no_grad():
        parameters = dict(hard.named_parameters())
        for name, value in history.at(step).items():
            parameters[names[name]].copy_(value)
    return hard


def places(history: History, hard: nn.Module) -> dict[str, str]:
    """Return recorded name -> name of the parameter of the hard net.

    Raises:
        InputError: for a net that does not have these tensors.
    """
    parameters = {name: tuple(p.shape) for name, p in hard.named_parameters()}
    found = {}
    for t in history.tensors:
        name = f"{t.name}.weight" if f"{t.name}.weight" in parameters else t.name
        if parameters.get(name) != t.shape:
            has = parameters.get(name, "no such tensor")
            raise InputError(
                f"this history is of another net: it holds {t.name!r} of shape {t.shape}, the net has {has}"
            )
        found[t.name] = name
    return found
