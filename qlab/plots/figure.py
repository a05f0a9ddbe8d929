"""A matplotlib figure that a notebook shows as it is, without pyplot.

A plain `matplotlib.figure.Figure` is shown by Jupyter only after pyplot has been set up, and pyplot's global state does not
bear widgets whose callbacks run in other threads. This one brings its own picture. Its label, the message in words, goes
along as plain text and as the picture's `alt` metadata; nbconvert's HTML (7.17) does not read the latter.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib.figure

__all__ = ["Figure"]


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows itself as PNG; `set_label` sets what a reader who cannot see it is told."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        """Return picture and words for Jupyter's display."""
        words = str(self.get_label()) or repr(self)
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        picture = base64.b64encode(buffer.getvalue()).decode()
        return {"image/png": picture, "text/plain": words}, {"image/png": {"alt": words}}
