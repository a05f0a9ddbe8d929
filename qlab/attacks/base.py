r"""What every attack promises.

    attack = PGD(steps=40, eta=0.01)
    found = attack(net, x, y, eps=0.1, norm="linf", low=0.0, high=1.0)      # Attacked

An attack is a frozen dataclass of its settings. It proposes points; a `Ledger` books them: what was asked for which example, the
best point of each, whether it is misclassified, where the attack stands now. Nothing that an attack proposes counts unless it lies
in ball and range, to the last bit, and examples that are broken are not asked about again unless the attack wants it so. All
numbers are per example: a mean over a batch hides them, and scales gradients down into underflow.

Shapes: x (N, ...), y (N,), n of the examples at a time, d classes, T steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, Norm
from qlab.attacks.losses import margin, misclassified
from qlab.attacks.victim import Victim, checked
from qlab.data.seeding import generator
from qlab.diagnose.base import Result
from qlab.errors import InputError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Attack", "Attacked", "Ledger", "Step", "Trace"]


@dataclass(frozen=True)
class Step:
    """One iterate of an attack.

    Args:
        points: (N, ...) where it stood.
        loss: (N,) what it maximises there; NaN for examples that it did not look at.
        gradient: (N, ...) what it followed; None for an attack without gradients.
    """

    points: Tensor
    loss: Tensor
    gradient: Tensor | None


Trace = tuple[Step, ...]


@dataclass(frozen=True)
class Attacked(Result):
    """What an attack found, for each of N examples.

    Attributes:
        attack: its name and settings in words.
        norm: of the ball.
        eps: its radius; infinite for attacks that look for the nearest point.
        x, y: what was attacked.
        adversarial: (N, ...) the best point found: misclassified where `success`, else the one of largest margin.
        clean: (N,) whether the example was classified correctly to begin with.
        success: (N,) whether the best point is misclassified within ball and range (True where it was so to begin with).
        distance: (N,) ||x' - x||_p of the best point, float64; infinite where there is no success.
        margin: (N,) max_{i != y} z_i - z_y there.
        at_end: (N,) whether the point where the attack stood at its end is misclassified.
        forward, backward: questions asked and backward passes made, in all.
        trace: the iterates, where they were asked for.
    """

    attack: str
    norm: Norm
    eps: float
    x: Tensor
    y: Tensor
    adversarial: Tensor
    clean: NDArray[np.bool_]
    success: NDArray[np.bool_]
    distance: NDArray[np.float64]
    margin: NDArray[np.float64]
    at_end: NDArray[np.bool_]
    forward: int
    backward: int
    trace: Trace | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def accuracy(self) -> float:
        """Share of examples that are still classified correctly: the adversarial accuracy A."""
        return int((~self.success).sum()) / len(self)

    def within(self, eps: float) -> NDArray[np.bool_]:
        """Return whether a point was found within a smaller radius, (N,); for attacks that look for the nearest point."""
        return self.distance <= eps

    def frame(self) -> pd.DataFrame:
        """Return one row per example: label, clean, success, distance, margin."""
        import pandas as pd

        return pd.DataFrame(
            {
                "label": self.y.cpu().numpy(),
                "clean": self.clean,
                "success": self.success,
                "distance": self.distance,
                "margin": self.margin,
                "at_end": self.at_end,
            }
        )

    def figure(self) -> Figure:
        """Return examples with what was found for them and the perturbation magnified; distances where inputs are no pictures."""
        from qlab.plots.attacks import attacked_figure

        return attacked_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        within = "" if math.isinf(self.eps) else f" within eps {self.eps:.4g}"
        text = (
            f"{self.attack} ({self.norm}{within}) on {len(self)} examples: {self.clean.mean():.1%} are classified correctly, "
            f"{self.accuracy:.1%} still are after the attack"
        )
        found = self.distance[self.success & self.clean]
        if len(found):
            text += f"; median distance of what it found {np.median(found):.4g}"
        return text + ". One attack proves no robustness: an example that it missed may be broken by another."

    @property
    def unmoved(self) -> Step:
        """The step that stands for a batch of which nothing was asked: all broken from the start."""
        return Step(self.x, torch.full((len(self),), torch.nan, dtype=torch.float64, device=self.y.device), None)

    @classmethod
    def joined(cls, parts: Sequence[Attacked]) -> Attacked:
        """Return the results of consecutive batches as one."""
        trace = None
        if all(part.trace is not None for part in parts):
            trace = tuple(_join_steps(steps) for steps in _aligned([part.trace or (part.unmoved,) for part in parts]))
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("clean", "success", "distance", "margin", "at_end")
        }
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "adversarial")
        }
        counts: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in ("forward", "backward")}
        return cls(parts[0].attack, parts[0].norm, parts[0].eps, **tensors, **arrays, **counts, trace=trace)


def _aligned(traces: Sequence[Trace]) -> list[list[Step]]:
    """Return traces of batches step by step; a batch that ended early stands still."""
    length = max(len(trace) for trace in traces)
    return [[trace[min(t, len(trace) - 1)] for trace in traces] for t in range(length)]


def _join_steps(steps: Sequence[Step]) -> Step:
    gradients = [torch.zeros_like(step.points) if step.gradient is None else step.gradient for step in steps]
    return Step(
        torch.cat([step.points for step in steps]),
        torch.cat([step.loss for step in steps]),
        None if all(step.gradient is None for step in steps) else torch.cat(gradients),
    )


class Ledger:
    """Books what an attack proposes for one batch.

    Args:
        victim: whom it asks.
        ball: where points must lie.
        y: (N,) labels.
        keep: "worst": the point of largest margin; "nearest": the misclassified point of smallest distance.
        early: whether broken examples are left alone ("worst" only).
        trace: whether the iterates are kept.

    Attributes:
        points: (N, ...) the best point of each example.
        broken: (N,) whether it is misclassified.
        distance: (N,) its distance, infinite while it is not.
        margin: (N,) its margin.
        at_end: (N,) whether the last point seen is misclassified.
    """

    def __init__(
        self, victim: Victim, ball: Ball, y: Tensor, keep: Literal["worst", "nearest"], early: bool, trace: bool
    ) -> None:
        self.victim, self.ball, self.y, self.keep, self.early = victim, ball, y, keep, early
        z = victim.logits(ball.x)
        self.z = z
        self.points = ball.x.clone()
        self.margin = margin(z, y).double()
        self.broken = misclassified(z, y)
        self.clean = ~self.broken
        self.at_end = self.broken.clone()
        self.distance = torch.where(self.broken, 0.0, torch.inf).double()
        self._steps: list[Step] | None = [] if trace else None

    @property
    def classes(self) -> int:
        """d."""
        return self.z.shape[1]

    @property
    def traced(self) -> bool:
        """Whether iterates are kept."""
        return self._steps is not None

    @property
    def active(self) -> Tensor:
        """Indices (n,) of the examples that are worth asking about: not misclassified to begin with, not broken already."""
        return (~self.broken if self.early else self.clean).nonzero()[:, 0]

    def see(self, index: Tensor, points: Tensor, z: Tensor) -> Tensor:
        """Book logits z (n, d) of points (n, ...) proposed for the examples of index (n,); return which are misclassified.

        A point outside ball or range is booked as the attack's position and never as a find.

        Args:
            index: of different examples: one point for each at a time.

        Raises:
            InputError: logits that are not finite; a NaN would be the largest of them, and so a find.
        """
        if not bool(z.isfinite().all()):
            raise InputError(
                "the net's logits hold NaN or infinite values at a point that the attack proposed, although they are finite on the "
                "inputs: a gradient was NaN, or an operation overflows. Attack in float64 (net.double(), x.double()) to tell"
            )
        y, ball = self.y[index], self.ball.take(index)
        wrong = misclassified(z, y)
        allowed = ball.contains(points)
        m = margin(z, y).double()
        found = wrong & allowed
        self.at_end[index] = found
        broken = self.broken[index]
        if self.keep == "nearest":
            better = found & (ball.distance(points) < self.distance[index])
            better |= ~found & allowed & ~broken & (m > self.margin[index])
        else:
            better = allowed & ((found & ~broken) | ((found == broken) & (m > self.margin[index])))
        at = index[better]
        self.points[at] = points[better].to(self.points.dtype)
        self.margin[at] = m[better]
        self.broken[at] |= found[better]
        hit = (better & found).nonzero()[:, 0]
        if len(hit):
            self.distance[index[hit]] = ball.take(hit).distance(points[hit])
        return wrong

    def ask(self, index: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Ask for logits (n, d) of points (n, ...), book them, and return them with which are misclassified (n,)."""
        z = self.victim.logits(points)
        return z, self.see(index, points, z)

    def step(self, index: Tensor, points: Tensor, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Keep an iterate, if the attack is traced: points (n, ...), losses (n,), what it followed (n, ...)."""
        if self._steps is None:
            return
        before = self._steps[-1] if self._steps else None
        all_points = before.points.clone() if before is not None else self.ball.x.clone()
        all_points[index] = points.detach().to(all_points.dtype)
        losses = torch.full((len(self.y),), torch.nan, dtype=torch.float64, device=self.y.device)
        losses[index] = loss.detach().double()
        g = None
        if gradient is not None:
            g = torch.zeros_like(self.ball.x)
            g[index] = gradient.detach().to(g.dtype)
        self._steps.append(Step(all_points, losses, g))

    def result(self, name: str, eps: float, count: dict[str, int]) -> Attacked:
        """Return what was found."""
        arrays: dict[str, Any] = {
            "clean": self.clean,
            "success": self.broken,
            "distance": torch.where(self.broken, self.distance, torch.inf),
            "margin": self.margin,
            "at_end": self.at_end,
        }
        return Attacked(
            name,
            self.ball.norm,
            eps,
            self.ball.x,
            self.y,
            self.points,
            **{k: v.cpu().numpy() for k, v in arrays.items()},
            forward=count["forward"],
            backward=count["backward"],
            trace=None if self._steps is None else tuple(self._steps),
        )


@dataclass(frozen=True)
class Attack(ABC):
    """Settings of an attack; call it on a net and a batch.

    Args:
        seed: of its random choices: the same seed and batch give the same result. Attacks of one seed start at the same points.
        early_stop: leave an example alone once it is broken. False to see whole paths and the worst point.
        batch: examples at a time.
    """

    seed: int = field(default=0, kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)
    batch: int = field(default=256, kw_only=True)

    norms: ClassVar[tuple[Norm, ...]] = NORMS
    keep: ClassVar[Literal["worst", "nearest"]] = "worst"
    needs_eps: ClassVar[bool] = True
    """Whether it looks in a ball; False for attacks that look for the nearest point, where eps may be left out."""

    def __call__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float | None = None,
        *,
        norm: Norm = "linf",
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
        fast: Any = None,
        trace: bool = False,
    ) -> Attacked:
        """Attack a batch.

        Args:
            net: a torch module in eval mode, inputs to logits; of a method of the lab, what it deploys is attacked.
            x: (N, ...) inputs within the range.
            y: (N,) int64 labels.
            eps: radius of the ball, in the units of x.
            norm: "linf", "l2" or "l1".
            low, high: the range of inputs.
            fast: answers questions without gradients in the net's place: a packed net of the same logits.
            trace: keep the iterates.

        Raises:
            InputError: a net in training mode or one that answers twice differently, inputs outside the range, labels out of
                range, eps of zero or below; a norm or a net the attack is not made for.
            UnknownNameError: no such norm.
        """
        return last(
            self.attacking(net, x, y, eps, norm=norm, low=low, high=high, fast=fast, trace=trace),
            Attacked,
        )

    @torch.enable_grad()
    def attacking(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float | None = None,
        *,
        norm: Norm = "linf",
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
        fast: Any = None,
        trace: bool = False,
    ) -> Generator[Update, None, None]:
        """Yield progress; the last value is the `Attacked` of all examples. Arguments as those of a call.

        A value that comes before the end is the result on the examples done so far: the first ones.
        """
        if eps is None and self.needs_eps:
            raise InputError(f"{self.name} looks in a ball, so it needs a radius: give eps, in the units of the inputs")
        radius = math.inf if eps is None else eps
        if isinstance(radius, bool) or not isinstance(radius, Real) or not radius > 0:
            raise InputError(f"eps is {eps!r:.40}; expected a positive number, in the units of the inputs")
        if self.batch < 1 or self.seed < 0:
            raise InputError(f"batch is {self.batch!r} and seed {self.seed!r}; expected at least 1, and at least 0")
        if norm in NORMS and norm not in self.norms:
            raise InputError(f"{self.name} is made for {', '.join(self.norms)}, not for {norm}")
        draws = getattr(getattr(self, "estimator", None), "draws", None)  # of a random net; see `estimators.EOT`
        net = checked(net, x, y, self.batch, random=draws is not None)
        whole = Ball.of(x.detach(), float(radius), norm, low, high)
        asked = Victim(net, fast, draws=draws)
        session = self.prepare(asked, whole, y)
        parts: list[Attacked] = []
        N = len(x)
        for start in range(0, N, self.batch):
            index = torch.arange(start, min(start + self.batch, N), device=x.device)
            victim = asked if start == 0 else Victim(net, fast, draws=draws)  # the first batch bears the preparation
            ledger = Ledger(
                victim, whole.take(index), y[index], self.keep, self.early_stop and self.keep == "worst", trace
            )
            noise = generator("attack", self.seed, start)
            for share in self.search(victim, ledger, noise, session):
                yield Update((start + share * len(index)) / N, f"{self.name}: {int(start + share * len(index))} of {N}")
            parts.append(ledger.result(self.described, float(radius), victim.count))
            yield Update((start + len(index)) / N, f"{self.name}: {start + len(index)} of {N}", Attacked.joined(parts))

    def prepare(self, victim: Victim, ball: Ball, y: Tensor) -> Any:
        """Return what is found once for the whole batch (a temperature of the net, say) and handed to every `search`."""
        return None

    @abstractmethod
    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Propose points for one batch through the ledger, yielding the share of the work done."""

    @property
    def name(self) -> str:
        """Its name."""
        return type(self).__name__

    @property
    def described(self) -> str:
        """Name and settings that differ from the defaults, in words."""
        changed = [
            f"{f.name}={_short(getattr(self, f.name))}"
            for f in fields(self)
            if f.name not in ("seed", "batch", "early_stop") and getattr(self, f.name) != f.default
        ]
        return self.name + (f" ({', '.join(changed)})" if changed else "")


def _short(value: object) -> str:
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return getattr(value, "__name__", None) or repr(value)
