"""What GradientMismatch sends to the browser: float32 arrays as bytes, numbers, and words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from qlab.diagnose.gradients import Compared, Mismatch
    from qlab.diagnose.honesty import Circulation
    from qlab.diagnose.moons import MoonsRun
    from qlab.quantizers import Surrogate

__all__ = ["curves", "honesty", "layers", "moons", "told"]

_DRAWN = 600  # points of a scatter
_SHOWN = 240  # points of the plane
_NAMES = {
    "flip": "exact change of the loss when the weight flips",
    "coordinate": "difference of the loss over a step",
}


def curves(drawn: Surrogate, knots: tuple[float, ...]) -> dict[str, Any]:
    """Return the primitive on a grid around the knots."""
    import torch

    span = knots[-1] - knots[0]
    x = torch.linspace(knots[0] - span / 8, knots[-1] + span / 8, 241, dtype=torch.float64)
    assert drawn.primitive is not None
    return {"x": _bytes(x.numpy()), "F": _bytes(drawn.primitive(x).numpy())}


def _best(result: Mismatch) -> dict[str, Compared]:
    """Return the reference shown for each layer: flips where it has bits."""
    rows: dict[str, Compared] = {}
    for row in result.rows:
        if row.reference == "flip" or row.layer not in rows:
            rows[row.layer] = row
    return rows


def layers(result: Mismatch) -> list[dict[str, Any]]:
    """Return a scatter and its numbers per layer, both axes scaled to their largest magnitude."""
    states = {state.layer: state for state in result.states}
    out = []
    for layer, row in _best(result).items():
        g, t = (_scaled(v[:_DRAWN]) for v in result.points[layer, row.reference])
        state = states.get(layer)
        out.append(
            {
                "layer": layer,
                "reference": row.reference,
                "axis": _NAMES[row.reference],
                "surrogate": _bytes(g),
                "truth": _bytes(t),
                "cosine": _number(row.cosine),
                "spearman": _number(row.spearman),
                "signs": _number(row.sign_agreement),
                "n": row.n,
                "blocked": None if state is None else _number(state.blocked),
            }
        )
    return out


def honesty(found: Circulation) -> dict[str, Any]:
    """Return mean circulation, its quadrature error and the mean residual."""
    spaces: list[dict[str, Any]] = [
        {"space": s.space, "circulation": _mean(s.circulation), "error": _mean(s.error), "residual": _mean(s.residual)}
        for s in found.spaces
    ]
    residuals = [s["residual"] for s in spaces if s["residual"] is not None]
    return {
        "circulation": _number(found.mean),
        "residual": float(np.mean(residuals)) if residuals else None,
        "spaces": spaces,
        "summary": found.summary(),
    }


def moons(run: MoonsRun, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the plane with its scores, some points, and the curves so far."""
    return {
        "decisions": _bytes(run.decisions),
        "grid": len(run.decisions),
        "extent": list(run.extent),
        "points": _bytes(x[:_SHOWN].numpy()),
        "labels": _bytes(y[:_SHOWN].numpy()),
        "steps": run.steps.tolist(),
        "losses": run.losses.tolist(),
        "accuracies": run.accuracies.tolist(),
        "summary": run.summary(),
    }


def told(result: Mismatch) -> str:
    """Return the cosines in one sentence."""
    parts = [f"{layer} {_read(row.cosine)}" for layer, row in _best(result).items()]
    return (
        f"Cosine of the surrogate's gradient with the truth of the deployed net, {result.examples} examples: "
        f"{', '.join(parts)}."
    )


def _read(value: float) -> str:
    return "none, for the gradient is zero" if math.isnan(value) else f"{value:.2f}"


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _scaled(values: Any) -> Any:
    return values / (np.abs(values).max(initial=0.0) or 1.0)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Any) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
