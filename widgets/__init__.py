"""Views: state, controls and drawing; what they show is computed in `qlab`.

Importing this package needs the extra `lab` (ipywidgets, anywidget) and imports neither torch nor Lightning, so that a
widget is on screen before those are loaded.
"""

from __future__ import annotations

from qlab.widgets.attribution import AttributionGuard
from qlab.widgets.bitlab import BitLab
from qlab.widgets.cockpit import AnnealingCockpit
from qlab.widgets.duel import MethodDuel
from qlab.widgets.landscape import LandscapeExplorer
from qlab.widgets.mismatch import GradientMismatch
from qlab.widgets.replay import AttackReplay
from qlab.widgets.robustness import RobustnessLab
from qlab.widgets.studio import Studio
from qlab.widgets.temperature import Temperature
from qlab.widgets.time_travel import TimeTravel
from qlab.widgets.vanishing import VanishingMicroscope

__all__ = [
    "AnnealingCockpit",
    "AttackReplay",
    "AttributionGuard",
    "BitLab",
    "GradientMismatch",
    "LandscapeExplorer",
    "MethodDuel",
    "RobustnessLab",
    "Studio",
    "Temperature",
    "TimeTravel",
    "VanishingMicroscope",
]
