r"""One example at a time: what an evaluation knows of it, and what the net says of the point that was found.

For example n and radius eps_e: did it hold, which attack broke it first and at which distance ||x' - x||_p, what does the net say
of the worst point, and by which margin max_{i != y} z_i - z_y (above 0: misclassified, 0: a tie).

A smaller eps that broke an example breaks it at every larger one, so the row of a larger eps shows the point of the smaller one.

Shapes: n of the examples of an `Evaluation`, E radii, d classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.evaluation import BROKEN, Evaluation
from qlab.attacks.losses import margin
from qlab.attacks.victim import deployed
from qlab.diagnose.base import Result
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Samples", "samples"]


@dataclass(frozen=True)
class Samples(Result):
    """What is known of some examples of an evaluation.

    Attributes:
        evaluation: which one.
        index: (n,) which examples.
        said: (n,) class that the net gives the example itself.
        margin: (n,) max_{i != y} z_i - z_y there.
        worst_said, worst_margin: (E, n) the same of the worst point at each radius; the example itself where nothing was tried yet.
    """

    evaluation: Evaluation
    index: NDArray[np.int64]
    said: NDArray[np.int64]
    margin: NDArray[np.float64]
    worst_said: NDArray[np.int64]
    worst_margin: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def broken_by(self) -> NDArray[np.object_]:
        """Return the attack that broke each example at each radius, (E, n): at the smallest radius that it was broken at.

        Empty where it holds so far; "wrong from the start" where there was nothing to break.
        """
        e = self.evaluation
        by = np.full((len(e.eps), len(self)), "", dtype=object)
        for row in range(len(e.eps)):
            if row:
                by[row] = by[row - 1]
            for k, attack in enumerate(e.attacks):
                by[row, e.outcome[row, k, self.index] == BROKEN] = attack
        by[:, ~e.clean[self.index]] = "wrong from the start"
        return by

    def first_broken(self) -> NDArray[np.int64]:
        """Return which radius of the grid broke each example, (n,); -1 where it holds, or was wrong from the start."""
        broken = np.isfinite(self.evaluation.distance[:, self.index])
        found = np.where(broken.any(0), broken.argmax(0), -1)
        return np.where(self.evaluation.clean[self.index], found, -1)

    def frame(self) -> pd.DataFrame:
        """Return one row per example and radius."""
        import pandas as pd

        e, by = self.evaluation, self.broken_by
        labels = e.y.cpu().numpy()[self.index]
        return pd.DataFrame(
            [
                {
                    "example": int(self.index[i]),
                    "label": int(labels[i]),
                    "eps": eps,
                    "robust": not np.isfinite(e.distance[row, self.index[i]]),
                    "broken by": by[row, i],
                    "distance": e.distance[row, self.index[i]],
                    "said": int(self.worst_said[row, i]),
                    "margin": self.worst_margin[row, i],
                }
                for i in range(len(self))
                for row, eps in enumerate(e.eps)
            ]
        )

    def figure(self) -> Figure:
        """Draw the examples with the worst points at the largest eps, and the difference magnified."""
        from dataclasses import replace

        from qlab.attacks.report import shown

        whole, i = shown(self.evaluation), self.index
        picked = {name: getattr(whole, name)[i] for name in ("clean", "success", "distance", "at_end")}
        tensors = {name: getattr(whole, name)[i.tolist()] for name in ("x", "y", "adversarial")}
        return replace(whole, **picked, **tensors, margin=self.worst_margin[-1]).figure()

    def story(self, i: int) -> str:
        """Return the i-th of these examples in words: what broke it, at which eps and distance, and its margins."""
        e, n = self.evaluation, int(self.index[i])
        head = f"Example {n}, label {int(e.y[n])}: without an attack the net says {self.said[i]}, margin {self.margin[i]:.4g}"
        if not e.clean[n]:
            return f"{head}. It is wrong from the start."
        first = int(self.first_broken()[i])
        if first < 0:
            tried = [eps for row, eps in enumerate(e.eps) if e.done[row].any()]
            if not tried:
                return f"{head}. No attack has run yet."
            last = len(tried) - 1
            return f"{head}. Nothing broke it up to eps {tried[-1]:.4g}: largest margin found {self.worst_margin[last, i]:.4g}."
        return (
            f"{head}. {self.broken_by[first, i]} broke it first, at eps {e.eps[first]:.4g} and {e.norm} distance "
            f"{e.distance[first, n]:.4g}: there the net says {self.worst_said[first, i]}, margin {self.worst_margin[first, i]:.4g}."
        )

    def summary(self) -> str:
        """Return the figures in words; of these examples alone, so that no robust accuracy is stated."""
        first = self.first_broken()
        parts = [f"{int((first == row).sum())} at eps {eps:.4g}" for row, eps in enumerate(self.evaluation.eps)]
        wrong = int((~self.evaluation.clean[self.index]).sum())
        return f"{len(self)} examples, {wrong} wrong from the start; first broken: {', '.join(parts)}."


def samples(net: nn.Module, evaluation: Evaluation, index: Sequence[int] | None = None) -> Samples:
    """Ask a net about examples of its evaluation and the worst points found for them.

    Args:
        net: the one that was evaluated, in eval mode; of a net that was evaluated on a data set of the lab, `pixels(net, data)`.
        evaluation: of it.
        index: which examples; all by default.

    Raises:
        InputError: no such example.
    """
    total = len(evaluation)
    chosen = list(range(total)) if index is None else list(index)
    if not chosen or any(isinstance(i, bool) or not 0 <= i < total for i in chosen):
        raise InputError(f"index is {index!r:.60}; expected at least one of the examples 0 to {total - 1}")
    net, at = deployed(net), torch.as_tensor(chosen)
    x, y = evaluation.x[at], evaluation.y[at]
    said, margins = _asked(net, x, y)
    rows = [_asked(net, worst[at].to(x.device), y) for worst in evaluation.worst]
    return Samples(
        evaluation,
        np.asarray(chosen, dtype=np.int64),
        said,
        margins,
        np.stack([row[0] for row in rows]),
        np.stack([row[1] for row in rows]),
    )


def _asked(net: nn.Module, x: Tensor, y: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    with torch.no_grad():
        z = torch.cat([net(part) for part in x.split(256)])
        return z.argmax(-1).cpu().numpy(), margin(z, y).double().cpu().numpy()
