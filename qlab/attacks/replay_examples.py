r"""Binary nets for the replay, trained in a second, on which plain PGD is stuck for a known reason.

One classifier in three dresses, the same decision everywhere:

| fault      | median gap of the logits | pre-activations | what plain PGD sees                                           |
|------------|--------------------------|-----------------|---------------------------------------------------------------|
| none       | 4                        | as they are     | a gradient                                                    |
| saturated  | 400                      | as they are     | a softmax that is one-hot in float32: the gradient of         |
|            |                          |                 | cross-entropy underflows to 0                                 |
| dead       | 4                        | times 1,000     | a clipped surrogate that is 0 almost everywhere: no gradient  |
|            |                          |                 | passes it                                                     |

The nets are 64 - 64 - 64 - 10 on scikit-learn's digits and 2 - 64 - 64 - 2 on two moons: signs as activations and as weights, float
weights in the first layer of the moons net, batch norm without scale before each sign, logits that are sums of 64 signs times a
factor, which the table sets.

A temperature repairs the second; another backward rule repairs the third; search without gradients does not notice either.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.errors import UnknownNameError
from qlab.jobs import Update, last
from qlab.quantizers import Sign, quantize

__all__ = ["DATA", "FAULTS", "Example", "example", "preparing"]

DATA = ("digits", "moons")
FAULTS = ("saturated", "dead", "none")
WIDTH = 64
STEPS = 150
BATCH = 128
GAPS = {"none": 4.0, "saturated": 400.0, "dead": 4.0}
GAIN = 1000.0
INDEX = {"digits": 6, "moons": 4}


@dataclass(frozen=True)
class Example:
    """A net with inputs to attack.

    Args:
        net: in eval mode.
        x, y: (N, ...), (N,) unseen inputs that it has right.
        index: of an example that takes several steps to break.
        eps: a radius at which it takes them, l_inf.
        low, high: the range of inputs.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    index: int
    eps: float
    low: float
    high: float


class _Times(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return factor x."""
        return self.factor * x


def example(data: str = "digits", fault: str = "saturated", seed: int = 0) -> Example:
    """Return a trained net with inputs; see the module docstring.

    Args:
        data: "digits" or "moons".
        fault: "saturated", "dead" or "none".
        seed: of the net.

    Raises:
        UnknownNameError: no such data or fault.
    """
    return last(preparing(data, fault, seed), Example)


def preparing(data: str = "digits", fault: str = "saturated", seed: int = 0) -> Generator[Update, None, None]:
    """Yield progress; the last value is the `Example`. Arguments as those of `example`."""
    if data not in DATA:
        raise UnknownNameError("data", data, DATA)
    if fault not in FAULTS:
        raise UnknownNameError("fault", fault, FAULTS)
    x, y, unseen, labels, (low, high), eps = _digits() if data == "digits" else _moons()
    net = _net(x[0].numel(), int(y.max()) + 1, data == "moons", seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    order = generator("batches of a replay's net", seed)
    with torch.enable_grad():
        for step in range(STEPS):
            at = torch.randint(0, len(x), (BATCH,), generator=order)
            optimizer.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
            with torch.no_grad():
                for p in net.parameters():
                    p.clamp_(-1, 1)
            if step % 10 == 0:
                yield Update(step / STEPS, f"training a binary net on {data}")
    net.eval().requires_grad_(False)
    with torch.no_grad():
        z = net(unseen)
        top = z.topk(2).values
        right = z.argmax(1) == labels
        _times(net, "out").factor = GAPS[fault] / float((top[:, 0] - top[:, 1]).median())
        if fault == "dead":
            for name in ("gain1", "gain2"):
                _times(net, name).factor = GAIN
    yield Update(
        1.0, f"trained a binary net on {data}", Example(net, unseen[right], labels[right], INDEX[data], eps, low, high)
    )


def _times(net: nn.Module, name: str) -> _Times:
    module = net.get_submodule(name)
    assert isinstance(module, _Times)
    return module


def _net(inputs: int, classes: int, float_first: bool, seed: int) -> nn.Module:
    net = nn.Sequential()
    for k, (fan_in, fan_out) in enumerate([(inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, classes)], start=1):
        if k == 1:
            net.add_module("flatten", nn.Flatten())
        net.add_module(f"linear{k}", nn.Linear(fan_in, fan_out, bias=k == 1 and float_first))
        if k < 3:
            net.add_module(f"norm{k}", nn.BatchNorm1d(fan_out, affine=False))
            net.add_module(f"gain{k}", _Times())
            net.add_module(f"sign{k}", nn.ReLU())
    net.add_module("out", _Times())
    draw = generator("weights of a replay's net", seed)
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-1, 1, generator=draw)
    return quantize(net, weights=Sign, activations=Sign, keep=("linear1",) if float_first else ())


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, float], float]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.data / 16).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=generator("digits of a replay", 0))
    train, test = order[:1500], order[1500:]
    return x[train], y[train], x[test], y[test], (0.0, 1.0), 0.1


def _moons() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, float], float]:
    from sklearn.datasets import make_moons

    raw, labels = make_moons(1000, noise=0.12, random_state=0)
    x, y = torch.from_numpy(raw).float(), torch.from_numpy(labels).long()
    x = x - x.mean(0)
    return x[:800], y[:800], x[800:], y[800:], (-3.0, 3.0), 0.5
