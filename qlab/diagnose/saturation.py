r"""Indirect measures of a layer on a batch: saturation, blocked and dead units, zero gradients, the angle of binarization.

    saturation  share of pre-activations with |z| > 1             of the activation that follows the layer
    blocked     share of pre-activations at which d(z) = 0         d the derivative that the net declares
    dead        share of units whose z has one sign on all of the batch
    zero        share of the layer's weight gradients that are exactly 0
    angle       cos(w, sign w) = |w|_1 / (sqrt(n) |w|_2)           of the latent weight; sqrt(2 / pi) for Gaussian w

A layer's activation is the module that runs after it and before the next layer: a quantizer, a nonlinearity of torch, or a
hand-written module without weights. Where there is none, its three measures are NaN.

Source: Anderson, Berg, arXiv 1705.07199 (the angle).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qlab.diagnose.base import run_hooked
from qlab.diagnose.functions import Hard, Primitive, Smooth
from qlab.quantizers import Quantizer
from qlab.quantizers.apply import NONLINEARITIES

__all__ = ["LayerState", "angle", "layer_states"]

_ACTIVATIONS = (Quantizer, Hard, Primitive, Smooth, *NONLINEARITIES)


@dataclass(frozen=True)
class LayerState:
    """Indirect measures of one layer; see the module.

    Args:
        layer: its name.
        weights: how many it has.
        saturation, blocked, dead: of the pre-activations after it.
        zero: of its weight gradients.
        angle: of its latent weight.
        norm: of its weight gradient.
    """

    layer: str
    weights: int
    saturation: float
    blocked: float
    dead: float
    zero: float
    angle: float
    norm: float


def angle(w: Tensor) -> float:
    """Return cos(w, sign w) = |w|_1 / (sqrt(n) |w|_2), NaN for a tensor of zeros."""
    w = w.detach().double()
    size = math.sqrt(w.numel()) * float(w.norm())
    return float(w.abs().sum()) / size if size > 0 else math.nan


def layer_states(
    net: nn.Module, x: Tensor, names: Mapping[str, str], g: Mapping[str, Tensor]
) -> tuple[LayerState, ...]:
    """Return the measures of the layers in `names`, layer -> parameter, with gradients g by parameter."""
    seen = _activations(net, x, names)
    states = []
    for layer, name in names.items():
        saturation = blocked = dead = math.nan
        if layer in seen:
            module, z, axis = seen[layer]
            saturation = float((z.abs() > 1).double().mean())
            blocked = _blocked(module, z)
            signs = (z >= 0).movedim(axis, 0).flatten(1)
            dead = float((signs.all(1) | ~signs.any(1)).double().mean())
        w = net.get_parameter(name)
        zero = float((g[name] == 0).double().mean())
        states.append(
            LayerState(layer, w.numel(), saturation, blocked, dead, zero, angle(w), float(g[name].double().norm()))
        )
    return tuple(states)


def _activations(net: nn.Module, x: Tensor, names: Mapping[str, str]) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Return layer -> the module that follows, its input and the axis of units."""
    seen: dict[str, tuple[nn.Module, Tensor, int]] = {}
    current: list[tuple[str, int]] = []
    modules = dict(net.named_modules())
    handles = []

    def layer_ran(layer: str, axis: int) -> Any:
        return lambda *_: current.append((layer, axis))

    def activation_ran(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        layer, axis = current[-1] if current else ("", 0)
        if layer in names and layer not in seen and inputs and isinstance(inputs[0], Tensor):
            seen[layer] = (module, inputs[0].detach().clone(), axis)

    for name, module in modules.items():
        inside = ".parametrizations." in f".{name}."
        if isinstance(module, nn.Linear | _ConvNd) or name in names:
            handles.append(module.register_forward_hook(layer_ran(name, 1 if isinstance(module, _ConvNd) else -1)))
        elif not inside and (isinstance(module, _ACTIVATIONS) or _handwritten(module)):
            handles.append(module.register_forward_hook(activation_ran))
    run_hooked(net, x, handles)
    return seen


def _handwritten(module: nn.Module) -> bool:
    plain = type(module).__module__.startswith("torch.")
    return not plain and not any(module.children()) and not any(True for _ in module.parameters())


def _blocked(module: nn.Module, z: Tensor) -> float:
    with torch.enable_grad():
        z = z.requires_grad_()
        value = module(z * 1)  # a module that works in place must not write over a leaf
        if not value.requires_grad:
            return 1.0
        (d,) = torch.autograd.grad(value.sum(), z)
    return float((d == 0).double().mean())
