"""The net under attack: what it is asked, how often, and what it must promise first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

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
    """

    net: nn.Module
    fast: Callable[[Tensor], Tensor] | None = None
    count: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (n, d) without a graph; n questions."""
        self.count["forward"] += len(x)
        with torch.no_grad():
            return (self.fast or self.net)(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """Return logits (n, d) with a graph; n questions and n backward passes."""
        self.count["forward"] += len(x)
        self.count["backward"] += len(x)
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


def checked(net: nn.Module, x: Tensor, y: Tensor, batch: int) -> nn.Module:
    """Return the deployed net; raise where an attack would say nothing true.

    Raises:
        InputError: what `qlab.diagnose.base.check` says of net and inputs; labels out of range.
    """
    net = deployed(net)
    _, z = check(net, x[:batch], y[:batch])
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
    return _Normalised(deployed(net), transform).eval()
