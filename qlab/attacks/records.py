"""Finished attacks on disk: one file each, read only if it is whole and belongs to what is asked.

A file is a numpy archive of arrays, without pickle, under the digest of its key. It is written beside its place and moved there, so
there are no half files. What is stored is checked against the examples again: a point must lie where the examples are.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlab.attacks.base import Attacked
from qlab.errors import InputError

__all__ = ["read_record", "write_record"]

ARRAYS = ("clean", "success", "distance", "margin", "at_end")


def _path(root: Path, key: str) -> Path:
    return root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def write_record(root: Path, key: str, found: Attacked) -> None:
    """Keep a result under its key.

    Raises:
        InputError: a root that is no folder or cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=root, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                arrays = {name: getattr(found, name) for name in ARRAYS}
                np.savez_compressed(
                    file,
                    key=np.array(key),
                    attack=np.array(found.attack),
                    norm=np.array(found.norm),
                    eps=np.array(found.eps),
                    counts=np.array([found.forward, found.backward]),
                    adversarial=found.adversarial.detach().cpu().numpy(),
                    allow_pickle=False,
                    **arrays,
                )
            os.replace(name, _path(root, key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"finished attacks cannot be kept in {root}: {error}; give another root, or none") from error


def read_record(root: Path, key: str, x: Tensor, y: Tensor) -> Attacked | None:
    """Return the result that is kept under a key; None where there is none, or none that is whole."""
    path = _path(root, key)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            arrays = {name: stored[name] for name in ARRAYS}
            points = torch.from_numpy(stored["adversarial"]).to(x.device)
            if points.shape != x.shape or points.dtype != x.dtype or any(a.shape != (len(y),) for a in arrays.values()):
                return None
            forward, backward = (int(v) for v in stored["counts"])
            return Attacked(
                str(stored["attack"]),
                str(stored["norm"]),  # type: ignore[arg-type]
                float(stored["eps"]),
                x,
                y,
                points,
                **arrays,
                forward=forward,
                backward=backward,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError):
        return None  # not whole: the attack runs again
