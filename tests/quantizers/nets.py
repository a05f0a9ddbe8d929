"""Plain nets and helpers that the tests of quantize and harden share."""

import torch
from torch import nn

import qlab.models
from qlab.quantizers import Quantizer, Sign, Uniform

NETS = {
    "mlp": ("mlp", (5,), {"hidden": (8, 6)}),
    "mlp without norm": ("mlp", (5,), {"hidden": (8, 6), "norm": False}),
    "lenet": ("lenet", (1, 12, 12), {}),
    "resnet20": ("resnet20", (3, 8, 8), {"width": 4, "shortcut": "B"}),
    "bireal18": ("bireal18", (3, 8, 8), {"width": 4}),
}
WEIGHTS = {"sign": Sign, "uniform 2 bits": lambda: Uniform(2), "uniform 8 bits": lambda: Uniform(8)}


def make(name="mlp"):
    kind, shape, options = NETS[name]
    return qlab.models.build(kind, shape, 3, seed=0, **options)


def inputs(net, n=6, dtype=torch.float32):
    return torch.randn(n, *net.input_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def on_levels(tensor, quantizer):
    levels = quantizer.levels(tensor.dtype) if isinstance(quantizer, Uniform) else quantizer.levels().to(tensor.dtype)
    return bool(torch.isin(tensor, levels).all())


def nonlinearities(net):
    return [name for name, m in net.named_modules() if isinstance(m, nn.ReLU | nn.Hardtanh)]


class Soft(Quantizer):
    """tanh(beta w) while training, sign when deployed; starts from latents of its own."""

    bits = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("beta", torch.tensor(1.0))

    def forward(self, latent):
        return torch.tanh(self.beta * latent)

    def hard(self, latent):
        return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)

    def levels(self):
        return torch.tensor([-1.0, 1.0])

    def init(self, latent, generator):
        return torch.randn(latent.shape, generator=generator)
