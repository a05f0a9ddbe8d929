"""The net under attack: what it is asked, how often, and what it must promise first."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlab.diagnose.base import check, plain
from qlab.errors import InputError

__all__ = ["Victim", "deployed", "pixels"]


@dataclass(frozen=True)
class Victim:
    """A net as an attack sees it: logits, gradients of logits, and a count of both.

    Args:
        net: a torch module in eval mode, inputs (n, ...) to logits (n, d).
        fast: answers for questions without gradients, logits equal to the net's: a packed net, say. The net itself by default.
        draws: of a random net, how many answers its logits are the mean of; None for a net that answers always the same.
            Torch's generators are seeded by the number of questions asked so far: every answer is a new draw, every run the same.
    """

    net: nn.Module
    fast: Callable[[Tensor], Tensor] | None = None
    count: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    draws: int | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (n, d) without a graph; n questions for each draw."""
        with torch.no_grad():
            z = self._draw(self.fast or self.net, x)
            for _ in range(1, self.draws or 1):
                z = z + self._draw(self.fast or self.net, x)
        return z if self.draws is None else z / self.draws

    def differentiable(self, x: Tensor) -> Tensor:
        """Return logits (n, d) with a graph, of one draw; n questions and n backward passes."""
        self.count["backward"] += len(x)
        return self._draw(self.net, x)

    def _draw(self, answer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.count["forward"] += len(x)
        if self.draws is None:
            return answer(x)
        with _seeded(x, self.count["forward"]):
            return answer(x)


@contextmanager
def _seeded(x: Tensor, seed: int) -> Iterator[None]:
    """Seed torch's generators for a random net on the device of x, and put them back."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        yield


class _OneDraw(nn.Module):
    """A random net whose noise is always the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of one draw."""
        with _seeded(x, 0):
            return self.net(x)


def deployed(net: nn.Module) -> nn.Module:
    """Return the net that is shipped: `deployed()` of a method of the lab, any other module as it is.

    Raises:
        InputError: for something that is no module.
    """
    methods = sys.modules.get("qlab.methods.base")
    if methods is not None and isinstance(net, methods.Method):
        return net.deployed()
    return plain(net)


TRIED = 32  # examples on which a net is tried before it is attacked


def checked(net: nn.Module, x: Tensor, y: Tensor, batch: int, random: bool = False) -> nn.Module:
    """Return the deployed net; raise where an attack would say nothing true.

    Args:
        net, x, y: as of an attack.
        batch: examples at a time.
        random: whether the attack averages over the noise of a net that answers twice differently.

    Raises:
        InputError: what `qlab.diagnose.base.check` says of net and inputs; labels out of range.
    """
    net = deployed(net)
    few = min(batch, TRIED)
    _, z = check(_OneDraw(net) if random else net, x[:few], y[:few], varied=False)
    if z.shape[1] < 2:
        raise InputError("the net gives one logit; an attack needs one for each of at least two classes")
    if len(y) != len(x):
        raise InputError(f"there are {len(x)} inputs and {len(y)} labels; expected as many")
    if y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
        raise InputError(
            f"the labels are {y.dtype} from {int(y.min())} to {int(y.max())}; expected int64 from 0 to {z.shape[1] - 1}"
        )
    if not bool(x.isfinite().all()):
        raise InputError("the inputs hold NaN or infinite values; clean the data first")
    return net


class _Normalised(nn.Module):
    """A net behind the normalisation of its data set."""

    def __init__(self, net: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.transform = transform
        self.training = net.training

    def __deepcopy__(self, memo: dict[int, Any]) -> _Normalised:
        """Return a copy of the net before the same data set, which is shared: a copy of it would hold the trainer too."""
        return _Normalised(copy.deepcopy(self.net, memo), self.transform)

    def forward(self, x: Tensor) -> Tensor:
        """Return the net's logits of inputs in the units of the data set, (N, ...)."""
        return self.net(self.transform(x))


def pixels(net: nn.Module, data: object) -> nn.Module:
    """Return a net that takes inputs in the units of a data set of the lab ([0, 1] for pictures): it normalises them itself.

    An attack's eps then counts in these units, whatever mean and deviation the net was trained with.

    Args:
        net: a method of the lab, or a net that takes what `data.transform` gives.
        data: a data set of the lab, or anything with such a `transform`.
    """
    transform = getattr(data, "transform", None)
    if not callable(transform):
        raise InputError(f"data is a {type(data).__name__}; expected a data set of the lab, which knows `transform`")
    return _Normalised(deployed(net), transform)
