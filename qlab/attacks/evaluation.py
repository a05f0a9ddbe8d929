"""What an evaluation found: robust accuracies with intervals, per-example records, and the verdict without which none is stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qlab.attacks.ball import Norm
from qlab.attacks.checks import wilson
from qlab.diagnose.base import Result
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.attacks.honesty import Honesty
    from qlab.plots.figure import Figure

__all__ = ["BROKEN", "LEFT", "NOT_ASKED", "Evaluation"]

NOT_ASKED, LEFT, BROKEN = -1, 0, 1


@dataclass(frozen=True)
class Evaluation(Result):
    """Robust accuracy by the worst case over attacks.

    Attributes:
        norm: of the balls.
        eps: (E,) radii, ascending.
        attacks: (K,) titles, in the order they ran.
        clean: (N,) classified correctly without an attack.
        outcome: (E, K, N) int8: `BROKEN`, `LEFT`, or `NOT_ASKED` (broken before, wrong from the start, or never run).
        done: (E, K) whether the attack has run at that radius.
        distance: (E, N) of the point that broke it within eps, 0 where it was wrong from the start, infinite where none did.
        worst: (E, N, ...) that point; where none was found, the one of largest margin.
        x, y: the examples.
        honesty: the panel; None where it was not run.
    """

    norm: Norm
    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    clean: NDArray[np.bool_]
    outcome: NDArray[np.int8]
    done: NDArray[np.bool_]
    distance: NDArray[np.float64]
    worst: Tensor
    x: Tensor
    y: Tensor
    honesty: Honesty | None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def complete(self) -> bool:
        """Whether all attacks have run and the whole panel stands beside them: else no robust accuracy is shown anywhere."""
        return bool(self.done.all()) and self.honesty is not None and self.honesty.complete

    def robust(self, eps: float) -> NDArray[np.bool_]:
        """Return whether each example is right and unbroken at a radius of the grid, (N,).

        Raises:
            InputError: a radius that was not evaluated.
        """
        return ~np.isfinite(self.distance[self._row(eps)])

    def accuracy(self, eps: float) -> tuple[float, float, float]:
        """Return the share of `robust` examples with its 95 % Wilson interval: an upper bound of the robust accuracy."""
        right = int(self.robust(eps).sum())
        return (right / len(self), *wilson(right, len(self)))

    def alone(self, attack: str, eps: float) -> int:
        """Return how many examples an attack broke that those before it had left.

        Raises:
            InputError: no such attack or radius.
        """
        if attack not in self.attacks:
            raise InputError(f"no attack {attack!r} was run; there are {', '.join(self.attacks)}")
        return int((self.outcome[self._row(eps), self.attacks.index(attack)] == BROKEN).sum())

    def _row(self, eps: float) -> int:
        hits = [i for i, value in enumerate(self.eps) if np.isclose(value, eps, rtol=1e-9)]
        if not hits:
            raise InputError(f"eps {eps!r} was not evaluated; there are {', '.join(f'{v:.4g}' for v in self.eps)}")
        return hits[0]

    def frame(self) -> pd.DataFrame:
        """Return one row per eps and attack: whether it has run, examples asked about, broken, and the accuracy left after it.

        That accuracy and its interval are NaN unless the evaluation is `complete`.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for e, eps in enumerate(self.eps):
            earlier = np.zeros(len(self), dtype=bool) if e == 0 else np.isfinite(self.distance[e - 1])
            left = int((self.clean & ~earlier).sum())
            for k, attack in enumerate(self.attacks):
                asked = int((self.outcome[e, k] != NOT_ASKED).sum())
                broke = int((self.outcome[e, k] == BROKEN).sum())
                left -= broke
                shares = (left / len(self), *wilson(left, len(self))) if self.complete else (np.nan,) * 3
                rows.append(
                    {"eps": eps, "attack": attack, "done": bool(self.done[e, k]), "asked": asked, "broken": broke}
                    | dict(zip(("accuracy", "low", "high"), shares, strict=True))
                )
        return pd.DataFrame(rows)

    def records(self) -> pd.DataFrame:
        """Return one row per eps and example: label, right without an attack, what broke it, and at which distance."""
        import pandas as pd

        frames = []
        for e, eps in enumerate(self.eps):
            by = np.full(len(self), "", dtype=object)
            by[np.isfinite(self.distance[e])] = "a smaller eps"
            for k, attack in enumerate(self.attacks):
                by[self.outcome[e, k] == BROKEN] = attack
            by[~self.clean] = "wrong from the start"
            frames.append(
                pd.DataFrame(
                    {
                        "eps": eps,
                        "example": np.arange(len(self)),
                        "label": self.y.cpu().numpy(),
                        "clean": self.clean,
                        "robust": ~np.isfinite(self.distance[e]),
                        "broken by": by,
                        "distance": self.distance[e],
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def figure(self) -> Figure:
        """Return accuracy against eps with intervals, and who broke how many."""
        from qlab.plots.robustness import evaluation_figure

        return evaluation_figure([self])

    def summary(self) -> str:
        """Return the figures in words; no robust accuracy without the panel, nor from an ensemble that has not run."""
        head = (
            f"{len(self)} examples, {self.clean.mean():.1%} classified correctly without an attack. Ensemble: "
            f"{', '.join(self.attacks)} ({self.norm})."
        )
        if self.honesty is None or not self.complete:
            missing = [
                f"{attack} at eps {eps:.4g}"
                for e, eps in enumerate(self.eps)
                for k, attack in enumerate(self.attacks)
                if not self.done[e, k]
            ]
            why = [
                f"{len(missing)} attacks have not run ({', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''})"
            ]
            panel = (
                "the honesty panel has not run" if self.honesty is None else "the honesty panel has not been finished"
            )
            why = why * bool(missing) + [panel] * (self.honesty is None or not self.honesty.complete)
            return f"{head} No robust accuracy is stated: {' and '.join(why)}."
        parts = []
        for eps in self.eps:
            share, low, high = self.accuracy(eps)
            parts.append(f"{share:.1%} at eps {eps:.4g} (95 % interval {low:.1%} to {high:.1%})")
        return (
            f"{head} Robust accuracy, worst case over attacks, at most: {'; '.join(parts)}. Honesty panel: "
            f"{self.honesty.summary()}"
        )
