"""What TimeTravel sends to the browser: a layer's bits at many steps, flip rates, and the answer to "which flip?"."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qlab.diagnose.course import Course
    from qlab.diagnose.flips import Flips
    from qlab.diagnose.history import History
    from qlab.diagnose.which_flip import WhichFlip

__all__ = ["answer", "film", "prediction", "rate", "swings", "titles"]

_BYTES = 512 * 1024  # of a film: half a message
_CELLS = 64 * 1024  # weights that are drawn
_POINTS = 200  # of a curve
_ROWS = 12  # of the table of flips


def titles(history: History) -> list[dict[str, Any]]:
    """Return name and title of every tensor."""
    return [{"name": t.name, "title": f"{t.name}: {t.size:,} weights"} for t in history.tensors]


def film(history: History, found: Flips, layer: str) -> dict[str, Any]:
    """Return the bit planes of a layer at as many records as fit, first and last included, and how often each weight flipped."""
    t = history.tensor(layer)
    columns = max(1, math.prod(t.shape[1:]))
    rows = max(1, min(t.size // columns, _CELLS // columns))
    size = min(rows * columns, t.size)
    plane = -(-size // 8)
    frames = max(2, _BYTES // (plane * t.planes))
    chosen = np.unique(np.linspace(0, len(history.steps) - 1, frames).round().astype(int))
    words = history.rows(layer)[chosen].reshape(len(chosen), t.planes, -1).astype("<u8")
    counts = np.minimum(found.per_weight[layer].ravel()[:size], 2**16 - 1)
    return {
        "layer": layer,
        "shape": list(t.shape),
        "rows": rows,
        "columns": size // rows,
        "planes": t.planes,
        "plane": plane,
        "levels": list(t.levels),
        "steps": history.steps[chosen].astype("<i4").tobytes(),
        "bits": np.ascontiguousarray(words.view(np.uint8)[..., :plane]).tobytes(),
        "counts": counts.astype("<u2").tobytes(),
        "left_out": [t.size - size, len(history.steps) - len(chosen)],
    }


def rate(found: Flips, layer: str) -> dict[str, Any]:
    """Return the share of weights that flip per record, of the net and of a layer, averaged over at most 200 stretches."""
    pieces = [p for p in np.array_split(np.arange(len(found.steps)), min(_POINTS, max(1, len(found.steps)))) if len(p)]
    j = found.names.index(layer)
    of_layer = found.counts[:, j] / found.sizes[j]

    def packed(values: list[float]) -> bytes:
        return np.array(values, "<f4").tobytes()

    return {
        "layer": layer,
        "steps": packed([float(found.steps[p[-1]]) for p in pieces]),
        "all": packed([float(found.rate[p].mean()) for p in pieces]),
        "own": packed([float(of_layer[p].mean()) for p in pieces]),
    }


def swings(found: Flips) -> list[dict[str, Any]]:
    """Return the weights that flipped most, as plain rows."""
    rows = found.swings.head(8).to_dict("records")
    return [
        {
            "layer": str(row["layer"]),
            "index": list(row["index"]),
            "flips": int(row["flips"]),
            "period": None if math.isnan(row["period"]) else float(row["period"]),
            "longest_run": int(row["longest_run"]),
            "last_flip": int(row["last_flip"]),
        }
        for row in rows
    ]


def prediction(course: Course) -> dict[str, Any]:
    """Return the predicted class and its margin over the steps."""
    return {
        "steps": course.steps.astype("<f4").tobytes(),
        "classes": course.classes.astype("<i4").tobytes(),
        "margins": course.margins.astype("<f4").tobytes(),
        "turns": [list(turn) for turn in course.turns[-20:]],
        "last": int(course.classes[-1]),
    }


def answer(found: WhichFlip) -> dict[str, Any]:
    """Return the margin flip by flip, and the flips that matter most: a minimal set, then the largest changes."""
    first = [] if found.first is None else [found.first]
    largest = np.argsort(-np.abs(np.nan_to_num(found.changes)), kind="stable").tolist()
    shown = sorted(dict.fromkeys([*found.minimal[:_ROWS], *first, *largest]), key=lambda k: k not in found.minimal)
    rows = [
        {
            "number": k + 1,
            "step": int(found.steps[k]),
            "weight": f"{found.layers[k]}[{', '.join(map(str, found.indices[k]))}]",
            "before": float(found.values[k, 0]),
            "after": float(found.values[k, 1]),
            "margin": _number(found.margins[k]),
            "change": _number(found.changes[k]),
            "alone": _number(found.alone[k]),
            "undone": _number(found.undone[k]),
            "minimal": k in found.minimal,
            "first": k == found.first,
        }
        for k in shown[:_ROWS]
    ]
    at = np.unique(np.linspace(0, len(found.steps), min(len(found.steps), 400) + 1).round().astype(int))
    margins = np.concatenate([[found.margin_a], found.margins])[at]
    return {
        "flips": len(found.steps),
        "rows": sorted(rows, key=lambda row: row["number"]),
        "at": at.astype("<f4").tobytes(),
        "margins": margins.astype("<f4").tobytes(),
        "first": None if found.first is None else found.first + 1,
        "minimal": len(found.minimal),
        "class_a": found.class_a,
        "class_b": found.class_b,
        "done": found.todo == 0,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
