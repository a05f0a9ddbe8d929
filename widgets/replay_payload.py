"""What AttackReplay sends to the browser: numbers as little-endian float32, flags as bytes, pictures in 8 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qlab.attacks.replay import Path, Replay

__all__ = ["ground_of", "path_of", "pictures_of"]

_ROOM = 800_000  # bytes of pictures in a message


def ground_of(found: Replay) -> dict[str, Any]:
    """Return landscape, outlines and extent of the plane."""
    land = found.landscape
    return {
        "extent": list(found.plane.extent),
        "centre": [float(v) for v in found.plane.centre],
        "side": len(land.a),
        "margin": _floats(land.margin),
        "ball": _floats(found.ball),
        "allowed": _floats(found.allowed),
        "two": found.x[0].numel() == 2,
        "label": found.label,
        "eps": found.eps,
        "norm": found.norm,
        "lost": land.lost,
    }


def path_of(found: Replay, path: Path) -> dict[str, Any]:
    """Return one path, on the plane and by step."""
    share = found.in_plane(path.name)
    with np.errstate(divide="ignore"):
        log = np.log10(path.steepness)  # float32 cannot hold what float64 has
    return {
        "name": path.name,
        "title": path.title,
        "at": _floats(found.coordinates(path.name)),
        "arrows": _floats(found.arrows(path.name)),
        "zero": path.zero.astype("u1").tobytes(),
        "wrong": path.wrong.astype("u1").tobytes(),
        "margin": _floats(path.margin),
        "loss": _floats(path.loss),
        "log_steepness": _floats(log),
        "broke": path.broke,
        "moved": path.moved,
        "zeros": int(path.zero.sum()),
        "followed": int(path.follows.sum()),
        "in_plane": None if math.isnan(share) else share,
        "forward": path.forward,
        "backward": path.backward,
        "first": path.name in found.first(),
    }


def pictures_of(found: Replay) -> dict[str, Any]:
    """Return the example and what each attacker added to it, 8 bits a number; nothing where inputs are no pictures.

    Where all steps of all paths would be too much for a message, every so many are sent.
    """
    shape = tuple(found.x.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        return {}
    x = found.x.double().cpu().numpy()
    low, high = (v.double().cpu().numpy() for v in (found.low, found.high))
    deltas = {path.name: path.points.double().cpu().numpy() - x for path in found.paths}
    scale = max(float(np.abs(d).max()) for d in deltas.values()) or found.eps
    if found.norm == "linf":
        scale = found.eps
    room = max(1, _ROOM // (x.size * len(deltas)))
    every = math.ceil(max(len(d) for d in deltas.values()) / room)
    if x.size * len(deltas) > _ROOM:
        return {}
    return {
        "shape": list(shape),
        "clean": np.clip(np.rint(255 * (x - low) / (high - low)), 0, 255).astype("u1").tobytes(),
        "scale": scale,
        "step": float(np.max(255 * scale / (high - low))),
        "every": every,
        "deltas": {
            n: np.clip(np.rint(127 * d[::every] / scale), -127, 127).astype("i1").tobytes() for n, d in deltas.items()
        },
    }


def _floats(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()
