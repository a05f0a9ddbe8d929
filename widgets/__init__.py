"""Views: state, controls and drawing; what they show is computed in `qlab`.

Importing this package needs the extra `lab` (ipywidgets, anywidget) and imports neither torch nor Lightning, so that a
widget is on screen before those are loaded.
"""

from __future__ import annotations

from qlab.widgets.bitlab import BitLab
from qlab.widgets.studio import Studio

__all__ = ["BitLab", "Studio"]
