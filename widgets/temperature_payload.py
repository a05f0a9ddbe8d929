"""What the Temperature view sends to the browser: curves as little-endian float32, norms by log10, regimes as bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from qlab.attacks.temperature import Temperature, Woken
    from qlab.attacks.temperature_sweep import Sweep

__all__ = ["chosen_of", "curves_of", "net_of", "regimes_of", "rows_of"]

_PIXELS = 4096  # of a picture, at most: it is drawn small


def net_of(sweep: Sweep) -> dict[str, Any]:
    """Return what does not depend on a dtype."""
    found = sweep.found
    right = found.logits.argmax(1) == found.labels
    counted = found.dtypes[found.own].counted
    return {
        "spread": _logs(found.spread),
        "h": _logs(found.h[:, counted].mean(1)),
        "njs": float(np.median(found.njs)),
        "hns": float(np.median(found.hns)),
        "clean": found.clean,
        "right": right.astype("u1").tobytes(),
        "counted": int(counted.sum()),
        "examples": len(found.labels),
        "attack": found.attack,
        "c": sweep.c,
    }


def curves_of(sweep: Sweep) -> dict[str, Any]:
    """Return means over examples and shares of each dtype, (K,); those of the regimes (3, K)."""
    return {name: _means(w) | {"finished": sweep.finished(name)} for name, w in sweep.found.dtypes.items()}


def _means(w: Woken) -> dict[str, Any]:
    return _own(w.mean(w.psi), w.mean(w.gradient), w.mean(w.signs**2), w.mean(w.underflow)) | {
        "lost": _floats(w.lost),
        "shares": _floats(w.shares),
        "accuracy": _floats(w.accuracy),
        "rules": {name: value if math.isfinite(value) else None for name, value in w.rules.items()},
        "changed": (~w.same).sum(1).tolist(),
    }


def regimes_of(found: Temperature) -> dict[str, bytes]:
    """Return the regime of every example at every beta, (K, N), by dtype."""
    return {name: np.ascontiguousarray(w.regime, dtype="u1").tobytes() for name, w in found.dtypes.items()}


def chosen_of(found: Temperature, x: Tensor, example: int) -> dict[str, Any]:
    """Return one example: probabilities (K, d), curves (K,), picture; nothing where it was not looked at yet."""
    if example >= len(found.labels):
        return {}
    n = example
    return {
        "example": n,
        "label": int(found.labels[n]),
        "decision": int(found.logits[n].argmax()),
        "p": _floats(found.probabilities(n)),
        "classes": found.logits.shape[1],
        "gap": float(found.gap[n]),
        "njs": float(found.njs[n]),
        "hns": float(found.hns[n]),
        "spread": _logs(found.betas * found.singular[n].mean()),
        "h": _logs(found.h[:, n]),
        "curves": {
            name: _own(w.psi[:, n], w.gradient[:, n], w.signs[:, n] ** 2, w.underflow[:, n])
            for name, w in found.dtypes.items()
        },
        "picture": _picture(x[n]),
    }


def rows_of(sweeps: Mapping[float, Sweep]) -> list[dict[str, Any]]:
    """Return what is known at beta 1 for every factor c and dtype, and what the rules reach."""
    rows = []
    for c in sorted(sweeps):
        found = sweeps[c].found
        at = found.nearest(1.0)
        for name, w in found.dtypes.items():
            if math.isfinite(w.accuracy[at]):
                rules = {key: value if math.isfinite(value) else None for key, value in w.rules.items()}
                rows.append(
                    {"c": c, "dtype": name, "plain": float(w.accuracy[at]), "lost": float(w.lost[at]), "rules": rules}
                )
    return rows


def _picture(x: Tensor) -> dict[str, Any]:
    """Return a picture in 8 bits, from its least to its greatest number; nothing where the input is none."""
    values = x.detach().double().cpu().numpy()
    if values.ndim != 3 or values.shape[0] not in (1, 3) or values[0].size > _PIXELS:
        return {}
    low, high = float(values.min()), float(values.max())
    levels = np.rint(255 * (values - low) / (high - low if high > low else 1.0))
    return {"shape": list(values.shape), "levels": levels.astype("u1").tobytes()}


def _own(psi: np.ndarray, gradient: np.ndarray, alive: np.ndarray, underflow: np.ndarray) -> dict[str, bytes]:
    """`alive` is the share of entries of sign(d l / dx) that are not 0: the square of what `Woken.signs` has."""
    return {
        "psi": _logs(psi),
        "gradient": _logs(gradient),
        "alive": _floats(alive),
        "underflow": _floats(underflow),
    }


def _logs(values: np.ndarray) -> bytes:
    with np.errstate(divide="ignore"):
        return _floats(np.log10(values))  # float32 cannot hold what float64 has


def _floats(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()
