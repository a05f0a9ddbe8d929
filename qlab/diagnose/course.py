r"""The course of a prediction: what the net of every recorded step says of one example.

m(t) = z_c - max_{i != c} z_i with the hard weights of step t, c the class that is predicted last. It tells between which steps
`which_flip` has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result, check
from qlab.diagnose.flips import places, scrub
from qlab.diagnose.history import History
from qlab.diagnose.which_flip import MEMORY, margin_of, one_example
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Course", "course"]


@dataclass(frozen=True, eq=False)
class Course(Result):
    """The prediction for one example over a training: recorded weights, everything else as in the net that was given.

    Args:
        steps: (K,) of the history.
        classes: (K,) predictions.
        margins: (K,) of the class predicted last.
    """

    steps: NDArray[np.int64]
    classes: NDArray[np.int64]
    margins: NDArray[np.float64]

    @property
    def turns(self) -> list[tuple[int, int]]:
        """The intervals (step before, step after) between which the prediction changed, in the order of time."""
        at = np.flatnonzero(np.diff(self.classes))
        return [(int(self.steps[i]), int(self.steps[i + 1])) for i in at]

    def frame(self) -> pd.DataFrame:
        """Return one row per step: step, class, margin."""
        import pandas as pd

        return pd.DataFrame({"step": self.steps, "class": self.classes, "margin": self.margins})

    def figure(self) -> Figure:
        """Draw margin and changes of the prediction over the steps."""
        from qlab.plots.flips import course_figure

        return course_figure(self)

    def summary(self) -> str:
        """Say how often the prediction changed, and when last."""
        last = int(self.classes[-1])
        head = f"Deployed function at {len(self.steps)} steps from {self.steps[0]} to {self.steps[-1]}: "
        if not self.turns:
            return (
                f"{head}class {last} is predicted at every one of them, at the end with margin {self.margins[-1]:.3g}."
            )
        a, b = self.turns[-1]
        return (
            f"{head}the prediction changed {len(self.turns)} times, the last time between steps {a} and {b} to class {last}, whose "
            f"margin is {self.margins[-1]:.3g} at the end."
        )


def course(history: History, net: nn.Module, x: Tensor, points: int = 100) -> Course:
    """Return how the prediction for one example went over the training, at about `points` recorded steps.

    Args:
        history: recorded during the training of this net.
        net: a method of the lab or its net; of it come float layers, biases and batch norm.
        x: (1, ...) one example as the net takes it.
        points: at how many steps, evenly spread, first and last included.

    Raises:
        InputError: for more than one example, another net, less than one point, or what `check` refuses.
    """
    if points < 1:
        raise InputError(f"points must be at least 1, not {points!r}")
    x = one_example(x)
    chosen = np.unique(np.linspace(0, len(history.steps) - 1, points).round().astype(int))
    hard = scrub(history, net, int(history.steps[-1])).double()
    check(hard, x, None, labels=False)
    names = places(history, hard)
    theta = {name: p.detach() for name, p in hard.named_parameters()}

    def one(some: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(hard, theta | some, (x,))[0]

    chunk = max(1, MEMORY // (8 * max(history.weights, x.numel())))
    parts = []
    for low in range(0, len(chosen), chunk):
        weights = [history.at(int(history.steps[r]), torch.float64) for r in chosen[low : low + chunk]]
        stack = {names[n]: torch.stack([w[n] for w in weights]).to(x.device) for n in weights[0]}
        with torch.no_grad():
            parts.append(torch.func.vmap(one)(stack))
    z = torch.cat(parts)
    last = int(z[-1].argmax())
    return Course(
        steps=history.steps[chosen],
        classes=z.argmax(1).cpu().numpy(),
        margins=np.array([margin_of(row, last) for row in z]),
    )
