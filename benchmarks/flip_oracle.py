"""Flip oracle: the exact loss change of each of 10,000 binary weights, against one forward pass per flip.

    qlab bench flip_oracle

The net is an MLP of two hidden layers of 100 on digits; the layer is the 100 x 100 one. The peer flips a weight in place, runs the
hard net under no_grad, takes the loss and flips the weight back: 10,000 times. Both give the same 10,000 numbers, which is checked
before anything is timed. With float activations the changed pre-activations take as many values as there are flips, so less can be
shared: a row without a goal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.bench import Comparison
from qlab.diagnose.flip_oracle import flip_oracle, hard_net
from qlab.quantizers import Sign, quantize

BATCH = 256
LAYER = "hidden.3"
EPOCHS = 5


def digits() -> tuple[Tensor, Tensor]:
    """Return a batch of digits."""
    data = qlab.data.load("digits")
    split = data.split("train")
    return data.transform(split.x[:BATCH]), split.y[:BATCH]


def net(activations: Callable[[], Sign] | None, x: Tensor, y: Tensor) -> nn.Module:
    """Return a binary MLP, trained for a few steps so that batch norm knows its statistics."""
    data = qlab.data.load("digits")
    binary = quantize(
        qlab.build("mlp", data.input_shape, data.num_classes, hidden=(100, 100), seed=0), Sign, activations
    )
    optimizer = torch.optim.Adam(binary.parameters(), lr=1e-2)
    for _ in range(EPOCHS * 10):
        loss = F.cross_entropy(binary(x) / 10, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return binary.eval()


def oracle(binary: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return what computes all flips at once."""
    return lambda: torch.from_numpy(flip_oracle(binary, x, y, LAYER).delta)


def one_by_one(binary: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return what runs the net once per flip."""
    hard = hard_net(binary)
    weight = hard.get_parameter(f"{LAYER}.weight").detach().view(-1)  # the parameter's own memory

    @torch.no_grad()
    def run() -> Tensor:
        before = F.cross_entropy(hard(x), y)
        changes = torch.empty(len(weight))
        for i in range(len(weight)):
            weight[i].neg_()
            changes[i] = F.cross_entropy(hard(x), y) - before
            weight[i].neg_()
        return changes

    return run


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    x, y = digits()
    for name, activations, goal in (("binary activations", Sign, 20.0), ("float activations", None, None)):
        binary = net(activations, x, y)
        ours, peer = oracle(binary, x, y), one_by_one(binary, x, y)
        torch.testing.assert_close(ours().float(), peer(), rtol=1e-3, atol=1e-5)  # float32: a mean of 256 losses
        yield Comparison(
            f"10,000 flips of a 100 x 100 layer, {name}, batch {BATCH}",
            ours,
            peer,
            "one forward pass per flip",
            goal,
            "times",
            rounds=3,
            warmup=0,
        )
