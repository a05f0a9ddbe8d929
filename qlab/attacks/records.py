"""Finished attacks on disk: one file each, read only if it is whole, belongs to what is asked, and still true.

A file is a numpy archive of arrays, without pickle, under the digest of its key: net, examples, ball, seed, the settings of the
attack, and the code of this package. It is written beside its place and moved there, so there are no half files. What is stored is
not believed: points must lie in ball and range, and the net is asked about them again. That an attack found nothing cannot be asked
again, which is why the code belongs to the key, and why an attack whose settings do not tell what it does is not kept: one of
another package, or one with a function or an object that is not of the lab among its settings.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball, Norm
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.losses import margin, misclassified
from qlab.errors import InputError

__all__ = ["answers", "identity", "key_of", "read_record", "write_record"]

ARRAYS = ("clean", "success", "distance", "margin", "at_end")
BATCH = 256


def answers(net: nn.Module, x: Tensor) -> Tensor:
    """Return the net's logits (N, d) of inputs (N, ...), a batch at a time."""
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(BATCH)])


# ---- keys ----------------------------------------------------------------------------------------------------------------


def identity(net: nn.Module, x: Tensor, y: Tensor, norm: Norm, low: Any, high: Any, seed: int) -> str:
    """Return a digest of all that a finished attack depends on, but the attack itself."""
    from qlab.experiments.cells import source_digest

    code = source_digest(("qlab.attacks", "qlab.diagnose.objective", "qlab.data.seeding"))
    digest = hashlib.sha256(repr((norm, seed, torch.__version__, code, x.dtype)).encode())
    _add_net(digest, net)
    _add_tensor(digest, answers(net, x[:64]))  # what no state tells (a constant in the net's code) the logits do
    for value in (x, y, *(torch.as_tensor(end, dtype=torch.float64) for end in (low, high))):
        _add_tensor(digest, value)
    return digest.hexdigest()


def key_of(whole: str, title: str, attack: Attack, eps: float, left: Any) -> str | None:
    """Return the key of an attack on the examples `left`; None where its settings do not tell what it does.

    Args:
        whole: what `identity` returned.
        title, attack: as in the suite.
        eps: radius.
        left: indices (n,).
    """
    digest = hashlib.sha256()
    if not _add(digest, attack):
        return None
    digest.update(np.asarray(left, dtype=np.int64).tobytes())
    return f"{whole} {title} {eps!r} {digest.hexdigest()}"


def _add(digest: Any, value: Any) -> bool:
    """Add a setting to a digest; return whether it is told from every other one by that."""
    kind = type(value)
    digest.update(f"{kind.__module__}.{kind.__qualname__}(".encode())
    if isinstance(value, nn.Module):
        _add_net(digest, value)
    elif isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, FunctionType):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
        return _ours(value.__module__) and "<" not in value.__qualname__
    elif is_dataclass(value) and _ours(kind.__module__):
        return all(_add(digest, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, tuple | list):
        return all(_add(digest, part) for part in value)
    else:
        digest.update(repr(value).encode())
        return value is None or isinstance(value, bool | int | float | str | np.generic)
    return True


def _ours(module: str) -> bool:
    return module.split(".")[0] == __name__.split(".")[0]


def _add_net(digest: Any, net: nn.Module) -> None:
    digest.update(repr(net).encode())
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            _add_tensor(digest, value)


def _add_tensor(digest: Any, value: Tensor) -> None:
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# ---- files ---------------------------------------------------------------------------------------------------------------


def _path(root: Path, key: str) -> Path:
    return root / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def write_record(root: Path, key: str, found: Attacked) -> None:
    """Keep a result under its key.

    Raises:
        InputError: a root that is no folder or cannot be written.
    """
    points = found.adversarial.detach().cpu().contiguous()
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
                    counts=np.array([found.forward, found.backward]),
                    points=points.reshape(len(points), -1).view(torch.uint8).numpy(),  # numpy does not know every dtype
                    allow_pickle=False,
                    **arrays,
                )
            os.replace(name, _path(root, key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"finished attacks cannot be kept in {root}: {error}; give another root, or none") from error


def read_record(root: Path, key: str, net: nn.Module, ball: Ball, y: Tensor) -> Attacked | None:
    """Return the result that is kept under a key; None where there is none, or none that is whole and true.

    Args:
        root, key: as given to `write_record`.
        net: asked about the points; a file that counts others as misclassified is not read.
        ball: where the points must lie, N of them.
        y: (N,) labels.
    """
    path = _path(root, key)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            arrays = {name: stored[name] for name in ARRAYS}
            points = torch.from_numpy(stored["points"]).view(ball.x.dtype).reshape(ball.x.shape).to(ball.x.device)
            attack, (forward, backward) = str(stored["attack"]), (int(v) for v in stored["counts"])
    except Exception:  # a damaged archive raises what it likes: the attack runs again
        return None
    kinds = {name: np.float64 if name in ("distance", "margin") else np.bool_ for name in ARRAYS}
    if any(a.shape != (len(y),) or a.dtype != kinds[name] for name, a in arrays.items()):
        return None
    if not bool(ball.contains(points).all()):
        return None
    z = answers(net, points)
    if not np.array_equal(misclassified(z, y).cpu().numpy(), arrays["success"]):
        return None
    distance = np.where(arrays["success"], ball.distance(points).cpu().numpy(), np.inf)
    arrays |= {"distance": distance, "margin": margin(z, y).double().cpu().numpy()}
    radius = float(ball.eps[0])
    return Attacked(attack, ball.norm, radius, ball.x, y, points, **arrays, forward=forward, backward=backward)
