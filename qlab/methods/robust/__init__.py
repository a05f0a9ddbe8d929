"""Training for robustness: what takes the place of a batch in a step of any method of the catalog, one file for each paper.

    run = qlab.fit("ste", "digits", robust="trades")                     # the paper's settings
    run = qlab.fit("ste", "digits", robust=robust.TRADES(eps=0.1))       # your own
    run.method.robust                                                    # travels in the checkpoint

The method keeps its quantizers, objective, optimizer and schedules; float and binary nets are trained alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.lazy import lazy_names
from qlab.registry import Entry, Registry

if TYPE_CHECKING:
    from qlab.methods.robust.base import RobustTraining
    from qlab.methods.robust.fast import FastTraining
    from qlab.methods.robust.free import FreeTraining
    from qlab.methods.robust.pgd import PGDTraining
    from qlab.methods.robust.trades import TRADES

__all__ = ["ROBUST", "TRADES", "FastTraining", "FreeTraining", "PGDTraining", "RobustTraining"]

ROBUST: Registry[Entry] = Registry(
    "training for robustness",
    (
        Entry(name, title, f"qlab.methods.robust.{name}:{cls}")
        for name, title, cls in (
            ("pgd", "Adversarial training: the loss at the end of projected gradient ascent", "PGDTraining"),
            ("trades", "TRADES: the loss, plus how far the answer can be moved", "TRADES"),
            ("fast", "Fast adversarial training: one large step from a random start", "FastTraining"),
            (
                "free",
                "Free adversarial training: batches replayed, one backward pass for weights and inputs",
                "FreeTraining",
            ),
        )
    ),
)

_HOME = {
    "FastTraining": "qlab.methods.robust.fast",
    "FreeTraining": "qlab.methods.robust.free",
    "PGDTraining": "qlab.methods.robust.pgd",
    "RobustTraining": "qlab.methods.robust.base",
    "TRADES": "qlab.methods.robust.trades",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
