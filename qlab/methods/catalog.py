"""The shelf of training methods, and the list of papers they come from.

Reading this module imports neither torch nor Lightning. It drives `qlab methods`, the Studio's menus, the tables in README.md
and docs/methods.md, and the contract tests, which run over every entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlab.methods.info import MethodInfo
from qlab.methods.papers import PAPERS, Paper
from qlab.methods.shelf import baselines, binary_networks, binary_weights, low_bit
from qlab.registry import Registry

__all__ = ["CATALOG", "PAPERS", "MethodInfo", "Paper", "methods_table", "papers_table"]

CATALOG: Registry[MethodInfo] = Registry(
    "method",
    [*baselines.ENTRIES, *binary_weights.ENTRIES, *binary_networks.ENTRIES, *low_bit.ENTRIES],
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _bits(bits: int) -> str:
    return "float" if bits == 32 else str(bits)


def methods_table() -> str:
    """Return the markdown table of every method on the shelf, as in README.md."""
    header = ("method", "what it does", "family", "weights", "activations", "arXiv")
    rows = [
        (
            f"`{m.name}`",
            m.title.split(": ", 1)[-1] + (" *(reconstruction)*" if m.reconstruction else ""),
            m.family.replace("_", " "),
            _bits(m.weight_bits),
            _bits(m.activation_bits),
            _arxiv(m.arxiv),
        )
        for m in CATALOG.values()
    ]
    return _table(header, rows)


def papers_table() -> str:
    """Return the markdown table of the 20 papers with their status, as in README.md."""
    header = ("#", "paper", "arXiv", "status", "methods")
    rows = [
        (
            str(p.number),
            f"{p.title} ({p.authors}, {p.venue})",
            _arxiv(p.arxiv),
            p.status,
            ", ".join(f"`{m}`" for m in (*p.methods, *p.parts)),
        )
        for p in PAPERS
    ]
    return _table(header, rows)
