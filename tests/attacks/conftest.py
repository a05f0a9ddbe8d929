"""What tests of attacks share: one small net, trained once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.data.seeding import generator


@pytest.fixture(scope="session")
def digits_net() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small float net trained on scikit-learn's digits, in eval mode, with 300 test pictures x (300, 1, 8, 8) in [0, 1]
    and labels y (300,). Copy the net (`copy.deepcopy`) before changing it."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.data / 16).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=generator("digits of tests/attacks", 0))
    train, test = order[:1200], order[1200:1500]
    draw = generator("weights of tests/attacks", 0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_uniform_(m.weight, generator=draw)
            nn.init.zeros_(m.bias)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(30):
        for at in torch.randperm(len(train), generator=draw).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[train[at]]), y[train[at]]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False), x[test], y[test]
