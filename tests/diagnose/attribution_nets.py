"""Small nets, batches and differences for the tests of attribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def fresh(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def mlp(activation: Callable[[], nn.Module], inputs: int = 6, seed: int = 0) -> nn.Module:
    return fresh(
        lambda: nn.Sequential(nn.Linear(inputs, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, 3)),
        seed,
    )


def cnn(activation: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return fresh(
        lambda: nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1),
            activation(),
            nn.Conv2d(5, 4, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        seed,
    )


def batch(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def difference(net: nn.Module, x: Tensor, target: int) -> np.ndarray:
    with torch.no_grad():
        return (net(x) - net(torch.zeros_like(x)))[:, target].numpy()


class Functional(nn.Module):
    """A sign written as a function, straight-through: no module that a rule could be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.b(z + (z.sign() - z).detach())
