"""Nets on the digits for the honesty panel: honest ones, and ones whose gradients are masked on purpose."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qlab.quantizers import Sign, quantize


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all digits in random order as (1797, 64) float32 in [0, 1], and their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(data.data / 16).float()[order], torch.from_numpy(data.target).long()[order]


def batch(n: int = 100) -> tuple[Tensor, Tensor]:
    """Return n digits that no net was trained on."""
    x, y = digits()
    return x[1200 : 1200 + n], y[1200 : 1200 + n]


class Steep(nn.Module):
    """sigmoid(k a)."""

    k = 1.0

    def forward(self, a: Tensor) -> Tensor:
        return torch.sigmoid(self.k * a)


def _mlp(activation: type[nn.Module], norm: bool = False) -> nn.Sequential:
    sizes = (64, 64, 32, 10)
    layers: list[nn.Module] = []
    for i in range(3):
        layers.append(nn.Linear(sizes[i], sizes[i + 1], bias=not norm))
        if i < 2:
            layers += [nn.BatchNorm1d(sizes[i + 1], affine=False)] * norm + [activation()]
    return nn.Sequential(*layers)


def _adversarial(net: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Return points of a short gradient attack."""
    moved = (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(4):
        moved.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(moved), y, reduction="sum"), moved)
        moved = (moved.detach() + eps / 2 * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return moved


@cache
def trained(kind: str = "relu", seed: int = 0, eps: float = 0.0, epochs: int = 15) -> nn.Module:
    """Return a net trained on 1,200 digits, with adversarial examples of radius eps if that is not 0.

    Args:
        kind: "relu", "tanh", "steep" (sigmoids that grow steep in training), "conv", "weights" (+-1) or "both" (activations too).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "conv":
            net = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
            )  # fmt: skip
        elif kind in ("weights", "both"):
            net = _mlp(nn.Hardtanh if kind == "both" else nn.ReLU, norm=True)
            net = quantize(net, Sign, Sign if kind == "both" else None)
        else:
            net = _mlp({"relu": nn.ReLU, "tanh": nn.Tanh, "steep": Steep}[kind])
    x, y = (t[:1200] for t in digits())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2 if kind in ("weights", "both") else 3e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for epoch in range(epochs):
        for module in net.modules():
            if isinstance(module, Steep):
                module.k = 100 ** (epoch / (epochs - 1))
        for rows in torch.randperm(len(x), generator=generator).split(64):
            points = _adversarial(net, x[rows], y[rows], eps, generator) if eps else x[rows]
            loss = F.cross_entropy(net(points), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


class Scaled(nn.Module):
    """Logits times c."""

    def __init__(self, net: nn.Module, c: float) -> None:
        super().__init__()
        self.net, self.c = net, c

    def forward(self, x: Tensor) -> Tensor:
        return self.c * self.net(x)


class SigmoidOut(Scaled):
    """Sigmoids of the logits, of c times their distance from the mean."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.sigmoid(self.c * (z - z.mean(1, keepdim=True)))


class Rounded(Scaled):
    """Inputs rounded to c steps: a gradient of zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.round(x * self.c) / self.c)


class Rippled(Scaled):
    """Inputs with fine ripples: a right value to 0.02, and a gradient that points anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.c * torch.sin(1000 * x))


class Blocked(Scaled):
    """Logits that no gradient goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach())


class Noisy(Scaled):
    """Noise on the inputs, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.c * torch.randn(x.shape, dtype=x.dtype))
