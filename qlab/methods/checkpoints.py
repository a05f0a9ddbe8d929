"""Reading checkpoints that a user was handed: no code from the file runs, and what does not fit is said in one error.

A checkpoint is Lightning's, with the method's name and versions under the key "qlab". It is always read with
`torch.load(weights_only=True)`; the class is found by name on the catalog, never by a path in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qlab.errors import CheckpointError, QlabError
from qlab.methods.catalog import CATALOG

__all__ = ["KEY", "expect", "load", "read", "restore", "signature"]

KEY = "qlab"

M = TypeVar("M")


def signature(method: str) -> dict[str, str]:
    """Return what a checkpoint of `method` is signed with."""
    return {"method": method} | {name: version(name) for name in ("qlab", "torch", "pytorch-lightning")}


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the checkpoint's content.

    Raises:
        CheckpointError: for a file that is missing, corrupt, holds code, or is no checkpoint of qlab.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises six kinds of errors on corrupt files; each means the same to the user
        raise CheckpointError(
            f"{path}: not a readable checkpoint, or one that holds more than tensors and plain values, which qlab never "
            f"executes ({type(error).__name__}). Get it again from its source, or train anew."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), Mapping) or "method" not in content[KEY]:
        raise CheckpointError(f"{path}: a torch file, but no checkpoint of qlab: it names no method")
    return content


def expect(checkpoint: Mapping[str, Any], method: str) -> None:
    """Raise a CheckpointError unless the checkpoint is one of `method`."""
    found = checkpoint.get(KEY, {}).get("method")
    if found != method:
        raise CheckpointError(
            f"this checkpoint was written by {found or 'no method of qlab'}, not by {method}: load it with qlab.load(path), "
            f"or train with --method {found or method}"
        )


def restore(
    cls: type[M], content: dict[str, Any], path: object, net: nn.Module | None, overrides: Mapping[str, Any]
) -> M:
    """Build a method of class `cls` from a checkpoint's content and load its state."""
    expect(content, cls.info.name)  # type: ignore[attr-defined]
    hyperparameters = content.get("hyper_parameters")
    if not isinstance(hyperparameters, Mapping):
        raise CheckpointError(f"{path}: the checkpoint has no hyperparameters")
    arguments = dict(hyperparameters) | dict(overrides)
    if net is not None:
        arguments["net"] = net
    elif arguments.get("net") is None:
        raise CheckpointError(f"{path}: its net is not one of qlab.models, so pass the plain net: load(path, net=...)")
    robust = arguments.pop("robust", None)
    try:
        method = cls(**arguments)
        method.robust = robust  # type: ignore[attr-defined]
        method.load_state_dict(content["state_dict"])  # type: ignore[attr-defined]
    except (QlabError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit {cls.__name__}: {error}") from error
    return method


def load(path: str | PathLike[str], net: nn.Module | None = None, **overrides: Any) -> Any:
    """Restore whichever method wrote the checkpoint; see `Method.load`.

    Raises:
        CheckpointError: for a file that is corrupt, unsafe or does not fit.
        UnknownNameError: for a method that is not in the catalog.
    """
    content = read(path)
    return restore(CATALOG.load(str(content[KEY]["method"])), content, path, net, overrides)
