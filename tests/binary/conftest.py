"""Nets with random batch norms, and all the sizes at which packing goes wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qlab
from qlab.quantizers import Sign

LENGTHS = (1, 3, 63, 64, 65, 127, 577, 4608)
SIDES = (1, 3, 4, 5, 129)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics, scales of both signs and some zero scales."""
    g = generator(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.running_mean is not None and m.running_var is not None:
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 3)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) * 40 + 1)
            if m.affine:
                with torch.no_grad():
                    m.weight.copy_(torch.randn(m.weight.shape, generator=g))
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g))
                    m.weight[:: max(len(m.weight) // 3, 2)] = 0.0
    return net


def binary_net(
    name: str, shape: tuple[int, ...], *, keep: tuple[str, ...] = ("first", "last"), **options: Any
) -> nn.Module:
    """Return a net of the shelf with sign weights and activations and random batch norms, as it would be shipped."""
    plain = randomised(qlab.build(name, shape, 10, seed=0, **options))
    return qlab.harden(qlab.quantize(plain, Sign, Sign, keep))


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def signs(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator(seed)).float() * 2 - 1
