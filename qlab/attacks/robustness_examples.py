r"""Two nets for digits, trained in a second or two each: one is what it looks like, the other only looks robust.

float    64 - 64 - 64 - 10 with ReLU, trained by Adam
binary   the "saturated" net of `qlab.attacks.replay_examples`: signs as activations and as weights, logits scaled so that the
         median gap between the two largest is 400, as sums of thousands of signs have it

The softmax of the second is one-hot in float32, so plain PGD on cross-entropy sees next to no gradient and leaves most examples
right. Attacks that scale the logits, or ask without gradients, break them. The honesty panel must tell the two apart.

Shapes: x (N, 1, 8, 8) in [0, 1], y (N,).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.attacks import replay_examples
from qlab.attacks.replay_examples import _digits
from qlab.data.seeding import generator
from qlab.jobs import Update, last

__all__ = ["EPS", "NETS", "Pair", "pair", "preparing"]

NETS = ("float", "binary")
EPS = (0.02, 0.05, 0.1, 0.15, 0.2)
WIDTH = 64
STEPS = 150
BATCH = 128


@dataclass(frozen=True)
class Pair:
    """Nets by name, those trained so far, with unseen examples.

    Args:
        nets: in eval mode.
        x, y: (N, 1, 8, 8), (N,) unseen digits, pixels in [0, 1].
    """

    nets: dict[str, nn.Module]
    x: Tensor
    y: Tensor


def pair(samples: int = 100, seed: int = 0) -> Pair:
    """Return both nets; see the module docstring.

    Args:
        samples: how many of the 297 unseen digits.
        seed: of the nets.
    """
    return last(preparing(samples, seed), Pair)


def preparing(samples: int = 100, seed: int = 0) -> Generator[Update, None, None]:
    """Yield progress and the `Pair` as its nets get ready; arguments as those of `pair`."""
    x, y, unseen, labels, *_ = _digits()
    unseen, labels = unseen[:samples], labels[:samples]
    nets: dict[str, nn.Module] = {}
    yield Update(0.0, "training a float net on digits", Pair({}, unseen, labels))
    for done in _training(net := _float_net(seed), x, y, seed):
        yield Update(done / 2, "training a float net on digits")
    nets = {"float": net}
    yield Update(0.5, "trained a float net on digits", Pair(dict(nets), unseen, labels))
    for update in replay_examples.preparing("digits", "saturated", seed):
        if update.value is not None:
            nets["binary"] = update.value.net
        yield Update(0.5 + update.fraction / 2, update.text)
    yield Update(1.0, "trained two nets on digits", Pair(nets, unseen, labels))


def _float_net(seed: int) -> nn.Module:
    sizes = (64, WIDTH, WIDTH, 10)
    net = nn.Sequential(nn.Flatten())
    draw = generator("weights of a robustness example", seed)
    for k, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        if k:
            net.append(nn.ReLU())
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():  # He et al. 2015, arXiv 1502.01852
            layer.weight.normal_(0, (2 / fan_in) ** 0.5, generator=draw)
            layer.bias.zero_()
        net.append(layer)
    return net


@torch.enable_grad()
def _training(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Generator[float, None, None]:
    """Yield the share done."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    order = generator("batches of a robustness example", seed)
    for step in range(STEPS):
        at = torch.randint(0, len(x), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
        if step % 10 == 0:
            yield step / STEPS
    net.eval().requires_grad_(False)
