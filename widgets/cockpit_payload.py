"""What AnnealingCockpit sends to the browser: a row per scheduled quantity, and the curves of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qlab.cockpit import Schedules, Telemetry

__all__ = ["instruments", "packed"]

_POINTS = 600  # of a curve


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def instruments(found: Schedules) -> dict[str, Any]:
    """Return a row per scheduled quantity, and one per kind of learning rate."""
    from qlab.cockpit import LR

    rows = [([c.method], c) for c in found.curves if c.quantity != LR]
    rows += [(list(names), c) for names, c in found.rates().items()]
    return {
        "progress": _bytes(found.progress),
        "rows": [
            {
                "methods": names,
                "quantity": c.quantity,
                "rate": c.quantity == LR,
                "heights": _bytes(c.normalised),
                "values": _bytes(c.values),
                "log": c.log,
                "said": c.summary(),
            }
            for names, c in rows
        ],
        "left_out": [{"method": name, "why": why} for name, why in found.left_out.items()],
    }


def packed(t: Telemetry, frozen: bool, progress: float) -> dict[str, Any]:
    """Return what is drawn of a run: at most 600 points, flips and loss as running means."""
    from qlab.cockpit import measure, smoothed

    chosen = np.unique(np.linspace(0, len(t.values["step"]) - 1, _POINTS).round().astype(int))
    columns = {name: t.values[name] for name in ("step", "progress", "residual", "distance")}
    columns |= {name: smoothed(t.values[name]) for name in ("flips", "loss")}
    return {
        **{name: _bytes(values[chosen]) for name, values in columns.items()},
        "total": t.total,
        "now": int(t.values["step"][-1]),
        "at": progress,
        "frozen": frozen,
        "kept": list(t.kept),
        "branched": t.branched,
        "measure": measure(t),
        "accuracy": None if np.isnan(t.accuracy) else t.accuracy,
    }
