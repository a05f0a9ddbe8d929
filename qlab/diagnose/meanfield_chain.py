"""Mean field of a given net: what gradients it would have if its weights were random but of the size that they are.

The rules by layer are those of `qlab.diagnose.meanfield`, with each layer's own fan-in, weights and batch norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlab.diagnose.base import check
from qlab.diagnose.moments import ActivationName, cross_moment, second_moment, slope_moment
from qlab.diagnose.recording import record
from qlab.errors import InputError
from qlab.quantizers.sign import Sign
from qlab.quantizers.surrogates import Surrogate

__all__ = ["predicted_gradients"]


def predicted_gradients(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Return ||g_l|| relative to ||g|| at the logits that mean field predicts for each layer of a chain of modules.

    Every weight is taken as random with the mean square that it has, every batch norm as measuring the variance over examples that
    mean field predicts. So it is what the net would do if training had left nothing but the size of its weights; the distance
    to `qlab.diagnose.signal` is what training did.

        linear, conv   ||g||^2 gains  fan-in * mean(W^2)        batch norm  gains  mean(gamma^2) / variance
        activation     gains  E[d(sqrt(q) z)^2]

    Args:
        net: a method or torch module in eval mode: Linear, Conv, BatchNorm, Flatten, Identity, Dropout, and activations of
            `ACTIVATIONS`, one after the other.
        x: (N, ...) inputs.

    Raises:
        InputError: a module that is none of these, or a net that is no chain.
    """
    net, z = check(net, x, None, labels=False)
    N = len(x)
    if N < 2:
        raise InputError("mean field compares examples; give at least two")
    run = record(net, x)
    with torch.no_grad():
        h = x
        for module in run.modules[1:]:
            h = module(h.flatten(1) if isinstance(module, nn.Linear) else h)
        if h.shape != z.shape or not torch.allclose(h, z, atol=1e-4 * float(z.abs().max())):
            raise InputError("mean field here is for chains of modules; this net adds, joins or reuses some")
    # Second moments per unit: of one example, and between two different ones.
    rows = x.detach().double().flatten(1)
    same = float(rows.square().mean())
    between = (N * float(rows.mean(0).square().mean()) - same) / (N - 1)  # over pairs of different ones: unbiased
    gains: list[float] = []
    for name, module in zip(run.names[1:], run.modules[1:], strict=True):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            w = module.weight.detach().double()
            gain = float(w.square().mean()) * w[0].numel()
            b = 0.0 if module.bias is None else float(module.bias.detach().double().square().mean())
            same, between = gain * same + b, gain * between + b
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            gamma2 = 1.0 if module.weight is None else float(module.weight.detach().double().square().mean())
            beta2 = 0.0 if module.bias is None else float(module.bias.detach().double().square().mean())
            gain = gamma2 / max(same - between + module.eps, 1e-300)
            same, between = gamma2 + beta2, beta2
        elif isinstance(module, nn.Flatten | nn.Identity | nn.Dropout):
            gain = 1.0
        else:
            activation, which = _named(name, module)
            gain = slope_moment(same, activation, which)
            c = max(-1.0, min(1.0, between / same)) if same > 0 else 0.0
            same, between = second_moment(same, activation), cross_moment(c, same, activation)
        gains.append(gain)
    names = run.names
    return {names[l]: math.sqrt(math.prod(gains[l:])) for l in range(len(names))}


def _named(name: str, module: nn.Module) -> tuple[ActivationName, Surrogate | None]:
    if isinstance(module, Sign):
        return "sign", module.surrogate
    kinds: dict[type[nn.Module], ActivationName] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Hardtanh: "hardtanh"}
    for kind, activation in kinds.items():
        if type(module) is kind and (kind is not nn.Hardtanh or (module.min_val, module.max_val) == (-1, 1)):
            return activation, None
    raise InputError(
        f"mean field knows no {type(module).__name__} ({name}); it knows Linear, Conv, BatchNorm, Flatten, Sign, Hardtanh, ReLU "
        "and Tanh"
    )
