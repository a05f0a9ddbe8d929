"""What the Studio shows before anything is trained: examples of the data, and the untrained weights.

Importing PyTorch and Lightning takes seconds. So that something real is on the screen at once, one picture per class of the
digits set - the default - stands here as text; everything else comes from `qlab.data` once that is imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["digits_at_once", "examples"]

EXAMPLES = 10  # pictures
SIDE = 64  # pixels of a thumbnail; larger pictures are thinned
POINTS = 300  # of a planar set

# scikit-learn's first example of each digit, 8x8, row by row, one character per pixel: 0 ... 9, a ... g for 0 ... 16.
# tests/widgets/test_preview.py compares it with the set itself.
DIGITS = (
    "005d910000dfaf5003f20b8004c008800580098004b01c7002e5ac00006da000"
    "000cd500000bg900003fg60007fgg200001gg300001gg600001gg600000bga00"
    "0004fc00003gfe00008d8g000016fb00018df10009gg500003dggb500003bg90"
    "007fd10008d6f400021dd000002fb1000001cc1000001a8000845e90007dd900"
    "0001b00000078000001d6220007f098005ga0g6004fgdg100003fa000002g400"
    "00ca000000egge0000dgfa1000bgg70000047g7000004g900054cg40009gga00"
    "000cd000005g800000dg300000ed000000fc720000dgdg30007gbf800019fb30"
    "0078dgf100774bc000008d100488ff6002bff400000g5000009f100000d50000"
    "009e810000ceec00009a0f40003gce20004gg20003g8ad2001f13g8000bgfb10"
    "00bc000002gggd0003gcae0001g1cf0000dg9f20000309b000009f40009cd300"
)


def digits_at_once() -> dict[str, Any]:
    """Return the preview of the digits set without loading anything."""
    pixels = np.array([int(c, 17) for c in DIGITS], dtype=np.uint8)
    return {
        "data": "digits",
        "kind": "images",
        "shape": [1, 8, 8],
        "classes": [str(i) for i in range(10)],
        "labels": list(range(10)),
        "pixels": (pixels * 15).tobytes(),
        "points": None,
        "chance": 0.1,
        "nets": None,
        "histogram": None,
    }


def examples(data: Any, name: str) -> dict[str, Any]:
    """Return the preview of a data module: one picture per class (the first ten), or points of a planar set."""
    split = data.split("train")
    y = np.asarray(split.y)
    shape = list(data.input_shape)
    preview = digits_at_once() | {
        "data": name,
        "shape": shape,
        "classes": [str(c) for c in data.class_names],
        "chance": float(np.bincount(y).max() / len(y)),
        "pixels": None,
    }
    if len(shape) == 3:
        first = [int(np.flatnonzero(y == c)[0]) for c in range(min(data.num_classes, EXAMPLES)) if (y == c).any()]
        stride = -(-max(shape[1:]) // SIDE)
        pictures = np.stack([np.asarray(split.x[i])[:, ::stride, ::stride] for i in first]).astype(np.uint8)
        return preview | {"shape": list(pictures.shape[1:]), "labels": y[first].tolist(), "pixels": pictures.tobytes()}
    points = np.asarray(split.x[:POINTS], dtype="<f4")[:, :2]
    return preview | {"kind": "points", "labels": y[:POINTS].tolist(), "points": np.ascontiguousarray(points).tobytes()}
