"""What the lab knows of a method without importing it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlab.registry import Entry

__all__ = ["MethodInfo"]


@dataclass(frozen=True)
class MethodInfo(Entry):
    """What the lab knows of a method without importing it.

    Args:
        paper: authors, title, venue.
        arxiv: identifier, empty where there is none.
        family: the folder of `qlab.methods` it stands in.
        weight_bits: bits of a deployed weight; 32 is float.
        activation_bits: bits of a deployed activation with the method's defaults; 32 is float.
        differentiable: whether the training-time forward map is differentiable almost everywhere with a derivative that is
            not identically zero, so that gradient tools see the function that is trained.
        claims: what `qlab reproduce NAME` judges.
        properties: exact properties that the tests assert.
        schedule: quantities of `Method.schedule` that never decrease with progress.
        reconstruction: true where the paper's own equations could not be had and the method is a reconstruction.
    """

    paper: str = ""
    arxiv: str = ""
    family: str = ""
    weight_bits: int = 32
    activation_bits: int = 32
    differentiable: bool = False
    claims: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    reconstruction: bool = False

    def row(self) -> dict[str, Any]:
        """Return the columns that `qlab methods --json` promises."""
        keys = ("name", "title", "paper", "arxiv", "family", "weight_bits", "activation_bits")
        values = asdict(self)
        return {key: values[key] for key in keys}
