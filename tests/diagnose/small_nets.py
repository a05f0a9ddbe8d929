"""Small nets for the tests of gradients and flips, and the slow independent way to know what a flip does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.quantizers import Sign, harden, quantize


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int, *shape: int, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    x = torch.randn(n, *shape, generator=draw, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=draw)


def settled(net: nn.Module, seed: int = 2) -> nn.Module:
    """Give batch norms statistics other than 0 and 1, and go to eval mode."""
    draw = generator(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for p in (m.running_mean, m.weight, m.bias):
                with torch.no_grad():
                    p.normal_(0, 1, generator=draw)
            m.running_var.uniform_(0.5, 4, generator=draw)
    return net.eval()


def mlp(activations=Sign, hidden: tuple[int, ...] = (9, 7, 5), inputs: int = 8, classes: int = 3) -> nn.Module:
    net = qlab.build("mlp", (inputs,), classes, hidden=hidden, seed=0).double()
    return settled(quantize(net, Sign, activations))


def conv(activations=Sign) -> nn.Module:
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    for i, p in enumerate(plain.parameters()):
        with torch.no_grad():
            p.normal_(0, 1, generator=generator(10 + i))
    return settled(quantize(plain.double(), Sign, activations))


class _HandSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # the old style, which torch.func does not take
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


def detached_sign(x: Tensor) -> Tensor:
    return (torch.where(x >= 0, 1.0, -1.0).to(x) - x).detach() + x


class HandLinear(nn.Module):
    """A binary layer as found in the wild: signs written by hand, scaled by the mean magnitude of each row."""

    def __init__(self, inputs: int, outputs: int, sign: Callable[[Tensor], Tensor], seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator(seed), dtype=torch.float64))
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.sign(self.weight) * self.weight.abs().mean(1, keepdim=True))


class HandSign(nn.Module):
    def __init__(self, sign: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return self.sign(x)


def foreign(old_style: bool = False) -> nn.Module:
    """Return a net of hand-written layers; odd widths, so that no sum of signs is 0 but for the rounding of (q - x) + x."""
    sign = _HandSign.apply if old_style else detached_sign
    return nn.Sequential(
        HandLinear(8, 7, sign, 3), HandSign(sign), HandLinear(7, 5, sign, 4), HandSign(sign), HandLinear(5, 3, sign, 5)
    ).eval()


def flipped(net: nn.Module, x: Tensor, y: Tensor, name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the loss changes of flipping every weight of parameter `name` of the hard net, one forward pass each."""
    hard = harden(net)
    w = hard.get_parameter(name)
    changes = []
    with torch.no_grad():
        before = loss(hard(x), y)
        for i in range(w.numel()):
            at = torch.unravel_index(torch.tensor(i), w.shape)
            w[at] = -w[at]
            changes.append((loss(hard(x), y) - before).mean())
            w[at] = -w[at]
    return torch.stack(changes)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")
