r"""What every training for robustness promises.

    min_w  E  max_{x' in B(x)} ...        B(x) = { x' : |x' - x| <= eps for each value,  low <= x' <= high }

It is a frozen dataclass of settings, and says what a step of a method minimises on a batch (`objective`). Weights, quantizers,
schedules and the optimizer stay the method's.

**Units.** eps is in the units of the data set ([0, 1] for pictures), while nets see (x - mean) / std: here eps / std for each
channel. The range is that of the data set, normalised likewise.

**The inner attack leaves no trace.** Gradients are taken of the inputs alone. Buffers (batch-norm statistics) are put back. The
noise of quantizers is that of the step, drawn before and used by all passes of it, so the attack meets the weights that are
trained. Dropout is off. What an attack draws comes from (seed, step). It follows the loss of the task alone, without the
regularizer, teacher or rounding of gradients that a method adds: those are not the adversary's.

Shapes: x, x' (N, ...) normalised inputs, y (N,), logits (N, d); std, low, high (C, 1, 1) or (D,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from qlab.data.base import DataModule
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError
from qlab.methods.robust import ROBUST

if TYPE_CHECKING:
    from qlab.methods.base import Method

__all__ = ["RobustTraining", "Statistics", "Units", "ascend", "aside", "robust_training"]

Statistics = Literal["batch", "running"]
"""By which statistics batch norm works in the inner attack: its train mode, or its eval mode."""


class Units(NamedTuple):
    """The units of a data set, as a net sees them.

    Args:
        std: what one unit is divided by, for each channel.
        low, high: the range of inputs, normalised.
    """

    std: Tensor
    low: Tensor
    high: Tensor

    def to(self, x: Tensor) -> Units:
        """Return them with the dtype and on the device of x."""
        return Units(*(value.to(x) for value in self))

    def box(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the least and the largest point of B(x), (N, ...) each."""
        r = eps / self.std
        return torch.maximum(x - r, self.low), torch.minimum(x + r, self.high)


@dataclass(frozen=True, kw_only=True)
class RobustTraining(ABC):
    """Settings of a training for robustness.

    Args:
        eps: how far the adversary may move each input value, in the units of the data set; the papers' for CIFAR-10.
        low: least value of an input, in the same units. None is 0 for pictures stored as bytes, no bound for floats.
        high: largest value. None is 1 for pictures stored as bytes, no bound for floats.

    Raises:
        InputError: for a setting out of range.
    """

    eps: float = 8 / 255
    low: float | None = None
    high: float | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        self._check("eps", 0, math.inf)
        for end in ("low", "high"):
            value = getattr(self, end)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)
            ):
                raise InputError(f"{end} of {self.name} must be a number, or None, not {value!r}")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise InputError(f"the range of {self.name} runs from {self.low!r} to {self.high!r}; expected low < high")

    def _check(self, setting: str, above: float, most: float) -> None:
        value = getattr(self, setting)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not above < value <= most
            or math.isinf(value)
        ):
            upto = "" if math.isinf(most) else f" and at most {most:g}"
            raise InputError(f"{setting} of {self.name} must be a number above {above:g}{upto}, not {value!r}")

    def _check_count(self, setting: str) -> None:
        value = getattr(self, setting)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{setting} of {self.name} must be a whole number of at least 1, not {value!r}")

    def record(self) -> dict[str, Any]:
        """Return name and settings as primitives, from which `robust_training` makes it again."""
        return {"name": self.name} | asdict(self)

    @property
    def repeats(self) -> int:
        """Optimizer steps for each batch."""
        return 1

    @abstractmethod
    def objective(self, method: Method, x: Tensor, y: Tensor) -> Tensor:
        """Return what a step of the method minimises on a batch."""

    def after_backward(self, method: Method) -> None:  # noqa: B027
        """Act on the gradients of the pass that has just ended."""

    # ---- what they share --------------------------------------------------------------------------------------------

    def noise(self, method: Method) -> torch.Generator:
        """Return the generator of the method's present step."""
        return generator("robust", method.h.seed, method.steps)

    def units(self, data: Any) -> Units:
        """Return the units of a data set.

        Raises:
            InputError: for something that does not know its units, tokens, or data outside the range.
        """
        if not isinstance(data, DataModule):
            raise InputError(
                f"{self.name} has its eps in the units of the data set, and there is none here that knows them: train on a "
                "data set of the lab, such as qlab.data.DataModule.from_arrays(x, y)"
            )
        x = data.split("train").x
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise InputError(
                f"{self.name} moves inputs by small amounts, but these are tokens; expected pictures or floats"
            )
        size = 255.0 if x.dtype == torch.uint8 else 1.0
        ends = (0.0, 1.0) if x.dtype == torch.uint8 else (-math.inf, math.inf)
        low, high = (end if given is None else given for given, end in zip((self.low, self.high), ends, strict=True))
        least, most = (float(v) / size for v in torch.aminmax(x))
        if least < low or most > high:
            raise InputError(
                f"the training data run from {least:.4g} to {most:.4g}, outside the range {low:.4g} to {high:.4g} that "
                f"{self.name} keeps to: give low and high in the units of the data"
            )
        mean, std = (value.view(-1, *(1,) * (x.ndim - 2)) for value in (data.mean, data.std))
        return Units(std, (low - mean) / std, (high - mean) / std)


def robust_training(value: RobustTraining | str | Mapping[str, Any]) -> RobustTraining:
    """Return a training for robustness by its name, with the paper's settings, or from what `record` returned.

    Raises:
        UnknownNameError: for a name or a setting that there is not.
        InputError: for a setting out of range, or what is none of these.
    """
    if isinstance(value, RobustTraining):
        return value
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise InputError(
            f"robust must be one of {', '.join(ROBUST)}, its settings such as qlab.methods.robust.TRADES(eps=0.1), or a "
            f"dictionary of name and settings; not {value!r:.60}"
        )
    options = {k: v for k, v in settings.items() if k != "name"}
    cls = ROBUST.load(settings["name"])
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"setting of {cls.name}", option, known)
    made: RobustTraining = cls(**options)
    return made


@contextmanager
def aside(net: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Within it, questions to a net leave its buffers as they are; dropout is off.

    Args:
        net: in training mode; quantizers stay in it, for the weights of the step are attacked.
        statistics: by which batch norm works.
    """
    off = (_DropoutNd, _BatchNorm) if statistics == "running" else (_DropoutNd,)
    changed = [m for m in net.modules() if m.training and isinstance(m, off)]
    kept = [(m, k, b, b.clone()) for m in net.modules() for k, b in m._buffers.items() if b is not None]
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True
        with torch.no_grad():
            for module, name, buffer, values in kept:
                buffer.copy_(values)
                module._buffers[name] = buffer


def ascend(
    points: Tensor, f: Callable[[Tensor], Tensor], steps: int, eta: Tensor, box: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the points (N, ...) after so many steps of x' <- P(x' + eta sign(grad f)); nothing but them gets a gradient.

    Args:
        points: (N, ...) where it starts.
        f: points to a scalar, a sum over examples: a mean would scale gradients down, into underflow.
        steps: how many.
        eta: length of a step, broadcast against the points.
        box: least and largest points.
    """
    for _ in range(steps):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(f(points), points)
        points = torch.clamp(points.detach() + eta * g.sign(), *box)
    return points.detach()
