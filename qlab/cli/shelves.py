"""`qlab methods` and `qlab describe`: what stands on the shelves."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlab.data import DATA
from qlab.errors import UnknownNameError
from qlab.experiments import EXPERIMENTS
from qlab.methods.catalog import CATALOG, MethodInfo
from qlab.models import MODELS
from qlab.registry import Entry, Registry

if TYPE_CHECKING:
    from qlab.methods import Hyperparameter

__all__ = ["describe", "lines", "methods"]

SHELVES: Mapping[str, Registry[Any]] = {
    "method": CATALOG,
    "data": DATA,
    "net": MODELS,
    "experiment": EXPERIMENTS,
}
NOT_OPTIONS = ("self", "net", "input_shape", "num_classes")


def lines(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows of words as aligned columns; the last column is free."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows)


def _bits(bits: int) -> str:
    return "float" if bits == 32 else f"{bits} bit"


def methods(as_json: bool) -> int:
    """Print the catalog of methods."""
    if as_json:
        print(json.dumps([info.row() for info in CATALOG.values()], indent=1, ensure_ascii=False))
    else:
        header = ("method", "weights", "activations", "arXiv", "what it does")
        rows = [
            (info.name, _bits(info.weight_bits), _bits(info.activation_bits), info.arxiv, info.title)
            for info in CATALOG.values()
        ]
        print(lines([header, *rows]))
        print("\nqlab describe NAME says more; qlab fit --method NAME trains with it.")
    return 0


def _options(group: str, parameters: Iterable[Hyperparameter]) -> str:
    rows = []
    for p in parameters:
        kind = " | ".join(map(repr, p.choices)) if p.choices else p.kind
        kind += " or None" if p.optional else ""
        default = "required" if p.default is inspect.Parameter.empty else f"default {p.default!r}"
        rows.append((f"  --{group}.{p.name}", kind, default, p.help))
    return lines(rows)


def _method_facts(info: MethodInfo) -> list[tuple[str, str]]:
    arxiv = f", arXiv {info.arxiv}" if info.arxiv else ""
    facts = [
        ("paper", f"{info.paper}{arxiv}" if info.paper else ""),
        ("family", info.family.replace("_", " ")),
        ("bits", f"weights {_bits(info.weight_bits)}, activations {_bits(info.activation_bits)}"),
        ("gradient", "of the trained function" if info.differentiable else "a surrogate of the trained function's"),
        ("scheduled", ", ".join(info.schedule)),
        ("reconstruction", "yes: the paper's own equations could not be had" if info.reconstruction else ""),
        *(("claim", claim) for claim in info.claims),
        *(("tested", promise) for promise in info.properties),
    ]
    return [(name, text) for name, text in facts if text]


def _sections(kind: str, entry: Entry, implementation: Any) -> list[str]:
    """Return the paragraphs that describe one entry."""
    from qlab.methods import hyperparameters

    if kind == "experiment":
        facts = [("claim", implementation.claim), ("rule", implementation.rule.words)]
        facts += [("data", ", ".join(implementation.data))]
        return [
            lines(facts),
            f"qlab reproduce {entry.name} judges it.",
            inspect.getdoc(inspect.getmodule(implementation.function)) or "",
        ]
    sections = [lines(_method_facts(entry))] if isinstance(entry, MethodInfo) else []
    options = _options(kind, hyperparameters(implementation, skip=NOT_OPTIONS))
    sections += [f"options of qlab fit --{kind} {entry.name}:\n{options}"] if options else []
    return [*sections, inspect.getdoc(inspect.getmodule(implementation)) or ""]


def describe(name: str) -> int:
    """Print everything that stands under a name; a method and its experiment may share one.

    Raises:
        UnknownNameError: it stands on no shelf.
    """
    found = [(kind, shelf) for kind, shelf in SHELVES.items() if name in shelf]
    if not found:
        known = {entry for shelf in SHELVES.values() for entry in shelf}
        raise UnknownNameError("method, data set, net or experiment", name, known)
    pages = []
    for kind, shelf in found:
        sections = _sections(kind, shelf[name], shelf.load(name))
        body = "\n\n".join(section for section in sections if section)
        pages.append(f"{kind} {name}: {shelf[name].title}\n\n{textwrap.indent(body, '  ')}")
    print("\n\n".join(pages))
    return 0
