"""One shelf for everything that has a name: methods, models, data sets, experiments.

An entry is a frozen dataclass that says where its implementation lives (`target`), so that a shelf can be listed - by the
CLI, the README table, a widget - without importing torch or Lightning. The implementation is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from qlab.errors import UnknownNameError

__all__ = ["Entry", "Registry"]


@dataclass(frozen=True)
class Entry:
    """A named thing on a shelf.

    Args:
        name: the name users type.
        title: one line that says what it is.
        target: "module:attribute" of the implementation.
    """

    name: str
    title: str
    target: str


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """A read-only mapping name -> entry that imports an implementation on request.

    Raises:
        UnknownNameError: for a name that is not on the shelf; names the closest match.
    """

    def __init__(self, kind: str, entries: Iterable[E]) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"{kind} {entry.name!r} is registered twice")
            self._entries[entry.name] = entry

    def __getitem__(self, name: str) -> E:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """Import and return the implementation of `name`."""
        module, attribute = self[name].target.split(":")
        return getattr(importlib.import_module(module), attribute)
