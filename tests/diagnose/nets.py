"""Small trained nets on the digits that the tests of landscapes share."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qlab.quantizers import Sign, quantize


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all digits as (1797, 64) float64 in [0, 1], multiples of 1/16, and their labels."""
    data = load_digits()
    return torch.from_numpy(data.data).double() / 16, torch.from_numpy(data.target).long()


@cache
def trained(kind: str, norm: bool = True, epochs: int = 12) -> nn.Module:
    """Return an MLP trained on the first 1,200 digits: "float", "weights" (signs) or "both" (weights and activations); float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = (64, 24, 16, 10)
        layers: list[nn.Module] = []
        for i, (n, m) in enumerate(pairwise(sizes)):
            layers.append(nn.Linear(n, m, bias=i == 2 or not norm))
            if i < 2:
                layers += [nn.BatchNorm1d(m)] * norm + [nn.Hardtanh() if kind == "both" else nn.ReLU()]
        net = nn.Sequential(*layers)
    if kind != "float":
        net = quantize(net, Sign, Sign if kind == "both" else None)
    x, y = (t[:1200] for t in digits())
    x = x.float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            loss = F.cross_entropy(0.1 * net(x[rows]) if kind != "float" else net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.double().eval()


def batch(n: int = 200) -> tuple[Tensor, Tensor]:
    """Return n digits that no net was trained on."""
    x, y = digits()
    return x[1200 : 1200 + n], y[1200 : 1200 + n]
