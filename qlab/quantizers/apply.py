"""Putting quantizers on a net, and taking them off.

`quantize` needs no change to the net: weights are quantized through `torch.nn.utils.parametrize`, so that
`layer.weight` is the quantized tensor and `layer.parametrizations.weight.original` the latent one; activations by
replacing nonlinearity modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Quantizer

__all__ = [
    "NONLINEARITIES",
    "QuantizedTensor",
    "harden",
    "layers",
    "quantize",
    "quantized_tensors",
    "quantizers",
    "reestimate_batch_norm",
]

NONLINEARITIES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
)
"""What an activation quantizer takes the place of. Not PReLU: it is a layer with weights of its own, and stays."""

Factory = Callable[[], Quantizer]


Layer = nn.Linear | _ConvNd


def layers(net: nn.Module) -> dict[str, Layer]:
    """Return the layers that can be quantized, Linear and Conv of any dimension, by name, in registration order."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Layer)}


class QuantizedTensor(NamedTuple):
    """A tensor under a quantizer: its name (the layer's, or layer.bias), latent parameter and quantizer."""

    name: str
    latent: nn.Parameter
    quantizer: Quantizer


def quantized_tensors(net: nn.Module) -> Iterator[QuantizedTensor]:
    """Yield every quantized weight and bias, in registration order."""
    for name, layer in layers(net).items():
        for tensor, chain in _parametrizations(layer).items():
            for quantizer in chain:
                if isinstance(quantizer, Quantizer):
                    yield QuantizedTensor(name if tensor == "weight" else f"{name}.{tensor}", chain.original, quantizer)


def _parametrizations(layer: nn.Module) -> dict[str, Any]:
    return dict(layer.parametrizations.items()) if parametrize.is_parametrized(layer) else {}  # type: ignore[operator, union-attr]


def quantizers(net: nn.Module) -> Iterator[Quantizer]:
    """Yield every quantizer in the net, of weights and of activations."""
    return (m for m in net.modules() if isinstance(m, Quantizer))


def _kept(names: list[str], keep: Sequence[str]) -> set[str]:
    if isinstance(keep, str):
        raise InputError(f"keep must be a sequence of names such as ('first', 'last'), not the string {keep!r}")
    places = {"first": names[0], "last": names[-1]}
    for name in keep:
        if name not in places and name not in names:
            raise UnknownNameError("layer to keep in float", name, ["first", "last", *names])
    return {places.get(name, name) for name in keep}


def quantize(
    net: nn.Module,
    weights: Factory | None = None,
    activations: Factory | None = None,
    keep: Sequence[str] = (),
    biases: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Return a quantized deep copy of a plain net.

    Args:
        net: any torch net with Linear or Conv layers.
        weights: makes a fresh quantizer for each quantized weight; None leaves weights in float.
        activations: makes a fresh quantizer for each place; it replaces the nonlinearity modules (`NONLINEARITIES`)
            that stand, in registration order, between a quantized layer and the layer before it. A sign *after* a
            ReLU would be constant.
        keep: layers left in float, with the activations before them: "first", "last", or module names.
        biases: quantize the biases of quantized layers as their weights are (AdaSTE, mirror descent, BayesBiNN).
        seed: of the generator from which quantizers that start from latents of their own draw them. It is torch's, as for the
            net's own start: latents drawn with the seed that the net was built from have the signs of its first weights.

    Raises:
        InputError: for a net without such layers, one that is quantized already, or a factory that makes no quantizers.
        UnknownNameError: for a name in `keep` that the net does not have.
    """
    names = list(layers(net))
    if not names:
        raise InputError(f"{type(net).__name__} has no Linear or Conv layer, so there is nothing to quantize")
    if next(quantized_tensors(net), None) is not None or next(quantizers(net), None) is not None:
        raise InputError("this net is quantized already; quantize the plain net it came from")
    kept = _kept(names, keep)
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    if weights is not None:
        for name, layer in layers(net).items():
            if name not in kept:
                for tensor in ("weight", "bias") if biases and layer.bias is not None else ("weight",):
                    _register(layer, tensor, _made(weights, "weights"), generator)
    if activations is not None:
        for name in _places(net, kept):
            quantizer = _made(activations, "activations")
            quantizer.init(torch.empty(0), generator)
            net.set_submodule(name, quantizer.train(net.get_submodule(name).training))
    return net


def _made(factory: Factory, role: str) -> Quantizer:
    quantizer = factory() if callable(factory) and not isinstance(factory, nn.Module) else None
    if not isinstance(quantizer, Quantizer):
        raise InputError(
            f"{role} must be a function that makes a fresh Quantizer at each call, such as Sign or lambda: Uniform(4), "
            f"not {factory!r}"
        )
    return quantizer


def _register(layer: nn.Module, tensor: str, quantizer: Quantizer, generator: torch.Generator) -> None:
    latent = getattr(layer, tensor)
    quantizer.to(latent.device)
    start = quantizer.init(latent.detach().cpu(), generator).to(latent)
    parametrize.register_parametrization(layer, tensor, quantizer)
    layer.train(layer.training)  # its new children too
    with torch.no_grad():
        _parametrizations(layer)[tensor].original.copy_(start)


def _places(net: nn.Module, kept: set[str]) -> list[str]:
    """Return the names of the nonlinearities whose output a quantized layer reads."""
    found: list[str] = []
    waiting: list[str] = []
    kept_layers = {net.get_submodule(name) for name in kept}
    # With duplicates: one ReLU object may stand in several places, each of which feeds a layer of its own.
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, NONLINEARITIES):
            waiting.append(name)
        elif isinstance(module, Layer):
            found += waiting if module not in kept_layers else []
            waiting = []
    return found


def harden(net: nn.Module) -> nn.Module:
    """Return the net as it would be shipped: a plain copy in eval mode whose weights are the hard ones, as ordinary
    parameters.

    Activation quantizers stay in their places, for they are part of the function.
    """
    net = copy.deepcopy(net)
    for layer in list(layers(net).values()):
        if parametrize.is_parametrized(layer):
            _harden_layer(layer)
    return net.eval()


def _harden_layer(layer: nn.Module) -> None:
    values: dict[str, Tensor] = {}
    for tensor, chain in _parametrizations(layer).items():
        value: Tensor = chain.original.detach()
        for step in chain:
            value = step.hard(value) if isinstance(step, Quantizer) else step(value)
        values[tensor] = value.detach().clone()
    # Not parametrize.remove_parametrizations: it takes the property off the layer's class, which a deep copy shares with its
    # original, and so would break the net that was copied.
    plain = {tensor: values.get(tensor, getattr(layer, tensor)) for tensor in ("weight", "bias")}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for tensor, value in plain.items():
        layer._parameters.pop(tensor, None)
        layer.register_parameter(tensor, None if value is None else nn.Parameter(value))


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Set every batch norm's running statistics to their averages over `batches`, in place; return the net.

    Training-time statistics belong to the weights of many past steps, and to soft weights where a method anneals:
    with binary weights the mismatch costs accuracy. Layers other than batch norm stay in their mode, so dropout is
    off for a net in eval mode.

    Args:
        net: any net.
        batches: inputs, each (N, ...) with N >= 2.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return net
    if not batches:
        raise InputError("re-estimating batch norm needs at least one batch of training inputs; it was given none")
    before = [(m, m.momentum, m.training) for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average over the batches
        m.train()
    try:
        for x in batches:
            net(x)
    finally:
        for m, momentum, training in before:
            m.momentum = momentum
            m.train(training)
    return net
