"""A checkpoint and its data set, as `qlab pack` and `qlab diagnose` take them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlab.cli.choice import beside
from qlab.data import DATA
from qlab.errors import InputError

if TYPE_CHECKING:
    from qlab.data import DataModule
    from qlab.methods import Method

__all__ = ["named_data", "opened"]


def named_data(options: argparse.Namespace) -> Mapping[str, Any]:
    """Return name and options of the data set that --data or the config.yaml beside the checkpoint says; empty where none does.

    Raises:
        UnknownNameError: no such data set; said before torch is imported.
    """
    saved: Mapping[str, Any] = beside(options.checkpoint).get("data") or {}
    name = options.data or saved.get("name")
    if name is None:
        return {}
    _ = DATA[name]
    return saved if saved.get("name") == name else {"name": name}


def opened(checkpoint: str, given: Mapping[str, Any]) -> tuple[Method, DataModule | None]:
    """Return a checkpoint's method and the data set of `named_data`; None for the latter where nothing says which.

    Raises:
        CheckpointError: a checkpoint that cannot be read.
        InputError: data of another shape.
    """
    from qlab import data
    from qlab.methods import checkpoints

    method = checkpoints.load(checkpoint)
    if not given:
        return method, None
    found = data.load(**given)
    shape = method.hparams["net"]["input_shape"]
    if list(found.input_shape) != list(shape):
        raise InputError(
            f"the net takes inputs of {shape}, but {given['name']} has {list(found.input_shape)}: choose the data set it was "
            "trained on with --data"
        )
    return method, found
