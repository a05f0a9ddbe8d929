r"""Transfer: attack a twin whose gradients are good, and show what was found to the net itself.

    x'  = argmax over the path of a gradient attack on the twin of its margin
    a hit where the victim misclassifies x'

The victim gives no gradient and is asked once for each example. A quantized net that a float twin's examples break more often than
its own gradients do hides its gradients. The twin has the same architecture and data, and another initialisation.

Examples that the twin itself misclassifies are attacked all the same, towards larger margins.

Source: Papernot et al. 2017, arXiv 1602.02697; Athalye et al. 2018, arXiv 1802.00420.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlab.attacks.ball import Ball
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.pgd import PGD
from qlab.attacks.victim import Victim, checked
from qlab.errors import InputError

__all__ = ["Transfer"]


@dataclass(frozen=True)
class Transfer(Attack):
    """Attack the twin, test on the victim.

    Args:
        source: the twin, a torch module in eval mode or a method of the lab.
        attack: what the twin is attacked with, within the same ball. Points that go on past the twin's boundary transfer better:
            leave its early stop off.
    """

    source: nn.Module
    attack: Attack = field(default_factory=lambda: PGD(early_stop=False))

    def __post_init__(self) -> None:
        if not isinstance(self.source, nn.Module):
            raise InputError(f"source is a {type(self.source).__name__}; expected the twin, a torch module")
        if not isinstance(self.attack, Attack):
            raise InputError(f"attack is a {type(self.attack).__name__}; expected an attack, PGD() for one")

    def prepare(self, victim: Victim, ball: Ball, y: torch.Tensor) -> Any:
        """Return the twin, checked, and what the attack finds out about it once."""
        source = checked(self.source, ball.x, y, self.batch)
        return source, self.attack.prepare(Victim(source), ball, y)

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Attack the twin on the examples that the victim has right, and ask the victim once."""
        source, found = session
        at = ledger.active
        if not len(at):
            return
        twin = Victim(source)
        # The attack's own bookkeeping, of the twin: no early stop, for a larger margin there transfers better.
        book = Ledger(twin, ledger.ball.take(at), ledger.y[at], "worst", False, False)
        book.clean = torch.ones_like(book.clean)
        yield from self.attack.search(twin, book, noise, found)
        ledger.ask(at, book.points)
        yield 1.0

    @property
    def described(self) -> str:
        """Twin and attack in words; a module's own description would fill pages."""
        return f"{self.name} ({self.attack.described} on a {type(self.source).__name__})"
