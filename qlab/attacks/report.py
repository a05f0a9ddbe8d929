"""An evaluation as one HTML file: verdict, tables, pictures; and as JSON. Nothing in it is fetched, and no script runs."""

from __future__ import annotations

import base64
import io
import json
import math
from html import escape
from typing import TYPE_CHECKING, Any

from qlab.attacks.base import Attacked
from qlab.provenance import device_name, versions

if TYPE_CHECKING:
    from qlab.attacks.evaluation import Evaluation
    from qlab.plots.figure import Figure

__all__ = ["document", "html", "shown"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1c1c1c; background: #fff; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; height: auto; }
.verdict { border-left: 4px solid #0072b2; padding: 0.3rem 1rem; background: #f2f6fa; }
"""


def document(found: Evaluation, title: str) -> dict[str, Any]:
    """Return an evaluation as plain values for JSON; NaN and infinity become null."""
    frame = found.frame()
    panel = None if found.honesty is None else _rows(found.honesty.frame())
    return {
        "title": title,
        "summary": found.summary(),
        "complete": found.complete,
        "norm": found.norm,
        "examples": len(found),
        "clean_accuracy": float(found.clean.mean()),
        "robust_accuracy": _accuracies(found) if found.complete else None,
        "attacks": _rows(frame),
        "records": _rows(found.records()),
        "honesty": panel,
        "device": device_name(),
        "versions": versions(),
    }


def _accuracies(found: Evaluation) -> list[dict[str, float]]:
    return [dict(zip(("eps", "accuracy", "low", "high"), (e, *found.accuracy(e)), strict=True)) for e in found.eps]


def _rows(frame: Any) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def shown(found: Evaluation) -> Attacked:
    """Return the examples of the largest eps as an attack's result, for pictures."""
    import numpy as np

    distance = found.distance[-1]
    return Attacked(
        "worst of all attacks",
        found.norm,
        found.eps[-1],
        found.x,
        found.y,
        found.worst[-1],
        clean=found.clean,
        success=np.isfinite(distance),
        distance=distance,
        margin=np.full(len(found), np.nan),
        at_end=np.isfinite(distance),
        forward=0,
        backward=0,
    )


def html(found: Evaluation, title: str) -> str:
    """Return the report as one HTML page."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(found.summary())}</p>',
        _image(found.figure()) if found.complete else "",
        "<h2>Attacks</h2>",
        _table(found.frame()),
    ]
    if found.honesty is not None:
        parts += ["<h2>Honesty panel</h2>", _image(found.honesty.figure()), _table(found.honesty.frame())]
    parts += [
        "<h2>Examples at the largest eps</h2>",
        _image(shown(found).figure()),
        f"<p>{escape(device_name())}; {escape(', '.join(f'{k} {v}' for k, v in versions().items()))}</p>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(frame: Any) -> str:
    return str(frame.to_html(index=False, escape=True, border=0, na_rep="", float_format=lambda v: f"{v:.4g}"))


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    words = escape(str(figure.get_label()), quote=True)
    return f'<p><img alt="{words}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'


def text(found: Evaluation, title: str) -> str:
    """Return `document` as JSON."""
    return json.dumps(document(found, title), indent=1) + "\n"
