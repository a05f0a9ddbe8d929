"""Landscapes: 51 x 51 points of the digits MLP over the whole test set, against the package loss-landscapes.

    qlab bench landscape

Both evaluate the same points at the same directions in one process on two threads: those that
`loss_landscapes.planar_interpolation` visits on its way. It gives the loss alone, so accuracy is not asked
of qlab. The exact line, for which there is no peer, is set against the package evaluating as many points.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.bench import Comparison
from qlab.diagnose.directions import Direction, random_direction
from qlab.diagnose.exact_line import exact_line
from qlab.diagnose.functions import variant
from qlab.diagnose.plane_eval import Affine, Many
from qlab.quantizers import Sign, quantize

SIDE = 51
THREADS = 2
GOAL = 5.0
PEER = "loss-landscapes 3.0.6, planar_interpolation"
NETS = {
    "float": lambda net: net,
    "binary weights": lambda net: quantize(net, Sign),
    "binary weights and activations": lambda net: quantize(net, Sign, Sign),
}


def test_set() -> tuple[Tensor, Tensor]:
    data = qlab.data.load("digits")
    split = data.split("test")
    return data.transform(split.x), split.y.long()


def mlp(kind: str) -> nn.Module:
    x, _ = test_set()
    return NETS[kind](qlab.build("mlp", tuple(x.shape[1:]), 10, seed=0)).eval()


def visited(steps: int) -> Tensor:
    """Return the points (steps^2, 2) that the package visits: to and fro, even rows at j = 1, 2, ..., odd ones at 0, 1, ..."""
    return torch.tensor(
        [[i / steps, (j + 1 - i % 2) / steps] for i in range(steps) for j in range(steps)], dtype=torch.float64
    )


def by_package(
    net: nn.Module, directions: list[Direction], x: Tensor, y: Tensor, steps: int = SIDE
) -> Callable[[], object]:
    from loss_landscapes import planar_interpolation
    from loss_landscapes.metrics import Loss

    ends = [copy.deepcopy(net) for _ in directions]
    with torch.no_grad():
        for end, d in zip(ends, directions, strict=True):
            for name, p in end.named_parameters():
                if name in d:
                    p.add_(d[name])
    return lambda: planar_interpolation(net, *ends, Loss(F.cross_entropy, x, y), steps=steps, deepcopy_model=True)


def by_qlab(net: nn.Module, directions: list[Direction], x: Tensor, y: Tensor) -> Callable[[], object]:
    points = visited(SIDE)
    return lambda: Affine(Many(variant(net, "deployed"), x, y, accuracy=False), directions)(points)


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    torch.set_num_threads(THREADS)
    x, y = test_set()
    for kind in NETS:
        net = mlp(kind)
        directions = [random_direction(net, seed) for seed in (0, 1)]
        yield Comparison(
            f"{SIDE} x {SIDE} landscape of the digits MLP, {kind}, {len(x)} examples",
            by_qlab(net, directions, x, y),
            by_package(net, directions, x, y),
            PEER,
            GOAL,
            "times",
            rounds=9,
        )
    net = mlp("binary weights")
    d = random_direction(net, 0)
    plateaus = len(exact_line(net, x, y, d).loss)
    side = int(plateaus**0.5)
    yield Comparison(
        f"exact line of {plateaus:,} plateaus, digits MLP, binary weights",
        lambda: exact_line(net, x, y, d),
        by_package(net, [d, random_direction(net, 1)], x, y, side),
        f"{PEER}, {side} x {side} points",
        None,
        "times",
        rounds=5,
    )
