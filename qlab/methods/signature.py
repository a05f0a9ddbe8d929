"""A method's hyperparameters as data: from its typed signature and docstring, for the CLI's pages and the Studio's controls."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

__all__ = ["Hyperparameter", "hyperparameters"]


@dataclass(frozen=True)
class Hyperparameter:
    """One argument of a constructor.

    Args:
        name: of the argument.
        kind: "bool", "int", "float", "str", "choice", "list" or "other" (what only Python code can give, such as a
            function).
        default: its default.
        choices: of a choice.
        optional: whether None is allowed.
        help: its line in the docstring.
    """

    name: str
    kind: str
    default: Any
    choices: tuple[Any, ...] = ()
    optional: bool = False
    help: str = ""


def _kind(hint: Any) -> tuple[str, tuple[Any, ...], bool]:
    """Return (kind, choices, optional) of a type hint; of a union, the first member that a text field can give."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        members = [m for m in get_args(hint) if m is not type(None)]
        kinds = [_kind(m) for m in members]
        kind, choices, _ = next((k for k in kinds if k[0] != "other"), kinds[0])
        return kind, choices, len(members) < len(get_args(hint))
    if origin is Literal:
        return "choice", get_args(hint), False
    if hint in (bool, int, float, str):
        return hint.__name__, (), False
    if origin is not None and inspect.isclass(origin) and issubclass(origin, typing.Sequence):
        return "list", (), False
    return "other", (), False


def hyperparameters(cls: type, skip: tuple[str, ...] = ("self", "net")) -> list[Hyperparameter]:
    """Return the arguments of `cls(...)`, its own first, then those it passes on to its base classes through **kwargs.

    Args:
        cls: a class whose constructors are typed and documented in the class docstrings.
        skip: arguments left out.
    """
    found: dict[str, Hyperparameter] = {}
    passes_on = True
    for base in cls.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        doc = {
            p.arg_name: " ".join((p.description or "").split())
            for p in docstring_parser.parse(base.__doc__ or "").params
        }
        # An argument that a subclass takes over with another default keeps the text of the base class.
        found = {name: h if h.help else replace(h, help=doc.get(name, "")) for name, h in found.items()}
        if not passes_on:
            continue
        parameters = inspect.signature(constructor).parameters
        hints = get_type_hints(constructor)
        for p in parameters.values():
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in skip and p.name not in found:
                kind, choices, optional = _kind(hints.get(p.name, Any))
                found[p.name] = Hyperparameter(p.name, kind, p.default, choices, optional, doc.get(p.name, ""))
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return list(found.values())
