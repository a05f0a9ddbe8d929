"""Attacks on packed bits: Square and the boundary attack with a packed net in the net's place, against torch in float32.

    qlab bench attacks_packed --json benchmarks/results/attacks_packed.json

Attacks without gradients only ask for logits, so a packed net can answer (`fast=`). Timed is the whole attack - proposing points,
asking, booking - after its first step, in milliseconds a question; the check of the net before and the packing of its weights are
not. The peer is the same attack asking the same binary net in torch, which holds signs as float32. Both sides use as many threads
as torch and make the same choices, which is checked before anything is timed: the points found are equal bit for bit.

Nets: VGG-small and LeNet, sign weights and activations but for the first and last layer, untrained; batch norm has seen the
pictures, digits enlarged to the size of each net. Time does not depend on what the weights are. No example is left alone
(`early_stop=False`), so every question has the size named; an attack that stops early asks in smaller and smaller ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.attacks.ball import Norm
from qlab.attacks.base import Attack
from qlab.attacks.boundary import Boundary
from qlab.attacks.square import Square
from qlab.bench import Comparison
from qlab.binary.kernels import cpu
from qlab.quantizers import Sign

EPS = 0.05
MOST = 1024
# Name, shape, (batch, questions, goal): batches of VGG-small are small because the peer takes seconds for larger ones.
SQUARE = (
    ("vgg_small", (3, 32, 32), ((1, 60, None), (8, 12, None), (32, 6, 4.0), (64, 4, 4.0))),
    ("lenet", (1, 28, 28), ((16, 200, None), (64, 100, None), (256, 50, None), (1024, 20, None))),
)


def digits(count: int, shape: tuple[int, ...]) -> Tensor:
    """Return digits (count, *shape) in [0, 1], enlarged and repeated over channels."""
    x = qlab.data.load("digits").split("train").x[:count].float()
    x = F.interpolate(x / x.max(), shape[1:], mode="bilinear").clamp(0, 1)
    return x.expand(-1, shape[0], -1, -1).contiguous()


def binary(name: str, shape: tuple[int, ...]) -> nn.Module:
    """Return a net of the shelf with sign weights and activations, as it would be shipped."""
    net = qlab.quantize(qlab.build(name, shape, 10, seed=0), Sign, Sign, ("first", "last"))
    with torch.no_grad():
        for part in digits(256, shape).split(64):
            net.train()(part)
    return qlab.harden(net.eval())


def milliseconds(attack: Attack, net: nn.Module, x: Tensor, y: Tensor, norm: Norm, fast: Any) -> Callable[[], float]:
    """Return what runs an attack and says how many milliseconds a question took, for each example, after the first step."""

    def run() -> float:
        asked = 0

        def counting(points: Tensor) -> Tensor:
            nonlocal asked
            asked += len(points)
            return (fast or net)(points)

        work = attack.attacking(net, x, y, EPS if attack.needs_eps else None, norm=norm, fast=counting)
        next(work)
        asked = 0
        start = time.perf_counter()
        for _ in work:
            pass
        return 1e3 * (time.perf_counter() - start) / asked

    return run


def compared(
    title: str, attack: Attack, net: nn.Module, packed: Any, x: Tensor, norm: Norm, goal: float | None
) -> Comparison:
    """Return a comparison of both ways to ask, after checking that they find the same."""
    with torch.no_grad():
        y = net(x).argmax(1)
    found, same = (
        attack(net, x, y, EPS if attack.needs_eps else None, norm=norm, fast=fast) for fast in (packed, None)
    )
    if not torch.equal(found.adversarial, same.adversarial):
        raise RuntimeError(f"{title}: the packed net and torch lead to different points")
    ours, peer = (milliseconds(attack, net, x, y, norm, fast) for fast in (packed, None))
    return Comparison(title, ours, peer, "torch float32", goal, "times", rounds=3, warmup=0, unit="ms a question")


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    cpu.warm_up()
    for name, shape, sizes in SQUARE:
        net, x = binary(name, shape), digits(MOST, shape)
        packed = qlab.binary.compile(net, x[:2])
        for batch, questions, goal in sizes:
            attack = Square(queries=questions, early_stop=False, batch=batch)
            yield compared(f"Square, {name}, batch {batch}", attack, net, packed, x[:batch], "linf", goal)
        if name == "vgg_small":
            boundary = Boundary(steps=4, bisections=1, batch=16)
            yield compared(f"Boundary, {name}, batch 16", boundary, net, packed, x[:16], "l2", 4.0)
