"""The Studio's runs as the front end sees them: rows of a table, curves and histograms as packed float32 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from qlab.widgets.settings import Settings

from qlab.jobs import Job
from qlab.live import Histogram, Snapshot
from qlab.methods.catalog import CATALOG

__all__ = ["MAX_POINTS", "MAX_SHOWN", "Record", "decimate", "label", "pack", "pack_histogram", "table"]

MAX_POINTS = 1000  # of one curve on the screen: more than a plot has pixels
MAX_SHOWN = 6  # runs side by side: as many as there are colours that can be told apart
SHOWN_METRICS = ("train/loss", "val/loss", "val/acc", "val/acc_latent", "quant/flip_ratio")


@dataclass
class Record:
    """One run of the Studio.

    Args:
        label: A, B, C ...
        settings: what was asked for.
        slot: index of its colour while it is shown, else None.
        phase: "training", "stopping", "stopped", "done" or "failed".
        snapshot: the latest of the training; None before the first.
        kept: the latest snapshot with a run, to send on or to resume from; None before the first stop or end.
        chance: accuracy of always naming the most frequent class of its data.
    """

    label: str
    settings: Settings
    slot: int | None = None
    phase: str = "training"
    job: Job | None = None
    snapshot: Snapshot | None = None
    kept: Snapshot | None = None
    chance: float | None = None

    def last(self, metric: str) -> float | None:
        """Return the latest finite value of a metric, or None."""
        if self.snapshot is None or metric not in self.snapshot.history:
            return None
        values = self.snapshot.history[metric][1]
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    def summary(self) -> str | None:
        """Return the run in words, with its latest numbers; None before the first validation."""
        acc, latent, flips = self.last("val/acc"), self.last("val/acc_latent"), self.last("quant/flip_ratio")
        if self.snapshot is None or acc is None:
            return None
        info = CATALOG[self.settings.method]
        bits = "float" if info.weight_bits == 32 else f"{info.weight_bits}-bit"
        parts = [
            f"Run {self.label}, step {self.snapshot.step} (epoch {self.snapshot.epoch:.1f} of {self.settings.epochs}): "
            f"{info.name} with {bits} weights is right on {acc:.1%} of the validation data when deployed"
        ]
        if latent is not None:
            parts.append(f", {latent:.1%} with its latent training-time net")
        parts.append(f"; the most frequent class alone gives {self.chance or 0:.0%}.")
        if flips is not None:
            parts.append(f" In its last full epoch {flips:.2%} of the weights changed sign.")
        if self.phase == "done":
            parts.append(f" You predicted {self.settings.guess:.0f} %.")
        return "".join(parts)


def label(index: int) -> str:
    """Return A ... Z, AA, AB ... for 0, 1, 2 ..."""
    name = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        name = chr(ord("A") + letter) + name
    return name


def decimate(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Thin a curve for the screen to at most `points` of its own points, keeping first, last and every extreme.

    The curve is cut into points / 2 pieces of equal length, and of each the lowest and the highest point stay.
    """
    if len(x) <= points:
        return x, y
    kept = {0, len(x) - 1}
    for piece in np.array_split(np.arange(1, len(x) - 1), points // 2 - 1):
        values = np.where(np.isfinite(y[piece]), y[piece], 0.0)
        kept |= {int(piece[values.argmin()]), int(piece[values.argmax()])}
    index = np.array(sorted(kept))
    return x[index], y[index]


def pack(record: Record) -> dict[str, Any]:
    """Return a record's curves and histogram for the front end, arrays as little-endian float32 bytes."""
    series = []
    if record.snapshot is not None:
        for metric in SHOWN_METRICS:
            if metric in record.snapshot.history:
                x, y = decimate(*record.snapshot.history[metric])
                series.append({"metric": metric, "x": _bytes(x), "y": _bytes(y)})
    histogram = record.snapshot.histogram if record.snapshot is not None else None
    return {
        "label": record.label,
        "slot": record.slot,
        "phase": record.phase,
        "method": record.settings.method,
        "bits": CATALOG[record.settings.method].weight_bits,
        "series": series,
        "histogram": pack_histogram(histogram),
    }


def pack_histogram(histogram: Histogram | None) -> dict[str, Any] | None:
    """Return a histogram for the front end; counts as shares of all weights."""
    if histogram is None:
        return None
    share = histogram.counts / max(int(histogram.counts.sum()), 1)
    return {
        "edges": _bytes(histogram.edges),
        "share": _bytes(share),
        "levels": _bytes(histogram.levels),
        "weights": int(histogram.counts.sum()),
    }


def _bytes(array: np.ndarray) -> bytes:
    return np.asarray(array, dtype="<f4").tobytes()


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return one row per run: how its settings differ from the other runs', and its final metrics."""
    settings = [_flat(r.settings) for r in records]
    keys = list(dict.fromkeys(key for s in settings for key in s))
    differing = [k for k in keys if len({repr(s.get(k)) for s in settings}) > 1]
    return [
        {
            "label": r.label,
            "slot": r.slot,
            "phase": r.phase,
            "method": r.settings.method,
            "title": CATALOG[r.settings.method].title,
            "differs": ", ".join(f"{k}={s[k]}" for k in differing if k in s and k != "method"),
            "step": 0 if r.snapshot is None else r.snapshot.step,
            "acc": r.last("val/acc"),
            "latent": r.last("val/acc_latent"),
            "loss": r.last("train/loss"),
            "flips": r.last("quant/flip_ratio"),
            "ready": r.kept is not None,
        }
        for r, s in zip(records, settings, strict=True)
    ]


def _flat(settings: Settings) -> dict[str, Any]:
    """Return what tells two runs apart; the variable's name and the prediction do not."""
    values = settings.json()
    hyper = values.pop("hyper")
    for key in ("name", "guess"):
        values.pop(key)
    if not values["folder"]:
        values.pop("folder")
    return values | hyper
