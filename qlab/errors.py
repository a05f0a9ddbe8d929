"""Errors a user can act on: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataFileError",
    "DataNotFoundError",
    "InputError",
    "PackedFileError",
    "QlabError",
    "UnknownNameError",
]


class QlabError(Exception):
    """Base of every error that qlab raises on purpose; the CLI prints it without a traceback."""


class InputError(QlabError, ValueError):
    """An argument has the wrong shape, type, range or holds NaN."""


class UnknownNameError(QlabError, KeyError):
    """A name that no shelf of the lab knows."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class DataFileError(QlabError):
    """A data file is truncated, corrupt or not of the format it should have."""


class DataNotFoundError(QlabError):
    """A data set could not be had from any of its sources."""


class CheckpointError(QlabError):
    """A checkpoint is corrupt, unsafe, or belongs to something else."""


class PackedFileError(QlabError):
    """A packed net's file is truncated, corrupt, hostile, or of a version that this qlab does not read."""
