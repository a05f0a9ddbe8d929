"""One forward pass with everything written down, and gradients of every layer's output from it.

Shapes: L layers ("input" first), N examples, K temperatures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.diagnose.base import check
from qlab.diagnose.foreign import undeclared
from qlab.diagnose.functions import Hard, Primitive, Smooth, variant
from qlab.diagnose.objective import Loss, loss_of
from qlab.errors import InputError
from qlab.quantizers.base import Quantizer

__all__ = [
    "INPUT",
    "Recorded",
    "layer_gradients",
    "norms_and_zeros",
    "ready",
    "record",
    "smooth_activations",
    "surrogate_steps",
]

Floats = NDArray[np.float64]
INPUT = "input"
QUANTIZERS = (Quantizer, Hard, Primitive, Smooth)


class Recorded(NamedTuple):
    """One forward pass with its graph: logits z (N, d), and outputs and inputs of the modules in the order they ran."""

    z: Tensor
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


def record(net: nn.Module, x: Tensor) -> Recorded:
    """Run a net and keep what every leaf module took and gave; the first entry is the input itself.

    A quantizer counts as a leaf; one under a weight does not run on activations and is left out. A module that runs again is
    named again, with #2.

    Args:
        net: a torch module.
        x: (N, ...) inputs.
    """
    x = x.detach().clone().requires_grad_()
    names, outputs, inputs, handles = [INPUT], [x], [x], []
    modules: list[nn.Module] = [nn.Identity()]
    counts: dict[str, int] = {}
    before: dict[str, Tensor] = {}
    wholes = tuple(f"{name}." for name, m in net.named_modules() if name and isinstance(m, QUANTIZERS))

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[object, ...], out: object) -> Tensor | None:
            if not (isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and len(out) == len(x)):
                return None
            counts[name] = counts.get(name, 0) + 1
            names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
            modules.append(module)
            inputs.append(before.pop(name, args[0]))
            outputs.append(out)
            return out.clone()  # what comes after may write into its input

        def keep(module: nn.Module, args: tuple[object, ...]) -> None:
            if getattr(module, "inplace", False) and args and isinstance(args[0], Tensor):
                before[name] = args[0].clone()  # the module is about to write over it

        handles.append(module.register_forward_pre_hook(keep))
        handles.append(module.register_forward_hook(hook))

    try:
        for name, module in net.named_modules():
            if ".parametrizations." in f".{name}.":
                continue
            if not name.startswith(wholes) and (isinstance(module, QUANTIZERS) or not _children(module)):
                watch(name or type(net).__name__, module)
        with torch.enable_grad():
            z = net(x)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded(z, tuple(names), tuple(modules), tuple(outputs), tuple(inputs))


def _children(module: nn.Module) -> bool:
    """Return whether a module has parts other than the quantizers of its weights."""
    return any(name != "parametrizations" for name, _ in module.named_children())


def surrogate_steps(net: nn.Module, x: Tensor, run: Recorded) -> list[bool]:
    """Return (L + 1,): whether a backward rule that is no derivative stands on the way to layer l; the last is after all layers.

    Quantizers of activations are such places: those of the lab, and any code that is found to be straight-through. The
    gradient at layer l is exact where none of the entries from l + 1 on is true.
    """
    steps = [*(isinstance(m, Quantizer) for m in run.modules), False]
    names = [name.split("#")[0] for name in run.names]
    for flat in undeclared(net, x):
        module = flat.module or (INPUT if flat.kind == "between" else type(net).__name__)
        for l in [l for l, name in enumerate(names) if name == module]:
            steps[l + (flat.kind == "between")] = True
    return steps


def ready(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str | Loss,
    betas: Sequence[float],
    dtype: torch.dtype | None,
    batch: int,
) -> tuple[nn.Module, Tensor, Loss]:
    """Return net, inputs and loss function to work with, in the dtype asked for; raise for arguments that make no sense."""
    which = loss_of(loss)
    if not betas or not all(math.isfinite(b) and b > 0 for b in betas):
        raise InputError(f"beta must be positive numbers, not {list(betas)[:5]}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch!r}")
    net, z = check(net, x, y)
    if z.shape[1] < 2:
        raise InputError("the net has one logit; its gap, and cross-entropy, compare classes: expected at least two")
    if dtype is not None and dtype != x.dtype:
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating one, not {dtype}")
        net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
        with torch.no_grad():
            if not bool(net(x).isfinite().all()):
                name = str(dtype).removeprefix("torch.")
                raise InputError(f"the net's logits are not finite in {name}: its numbers are too large for it")
        check(net, x, y)
    return net, x, which


def smooth_activations(net: nn.Module, k: float) -> nn.Module | None:
    """Return the net with its activations as tanh steps; no gradient is taken over the weights, so they stay as deployed."""
    try:
        smooth, deployed = variant(net, "smoothed", k), variant(net, "deployed")
    except InputError:
        return None  # a quantizer without a grid has no jumps to smooth
    for name, layer in deployed.named_modules():
        if name and parametrize.is_parametrized(layer):
            smooth.set_submodule(name, layer)
    return smooth


def layer_gradients(run: Recorded, y: Tensor, loss: Loss, betas: Tensor, batch: int) -> list[Tensor]:
    """Return g_l for every layer and beta: tensors (K, N, ...)."""
    cotangents = []
    for beta in betas.tolist():
        z = run.z.detach().requires_grad_()
        total = (loss(beta * z, y) / batch).sum()
        cotangents.append(torch.autograd.grad(total, z, allow_unused=True)[0] if total.requires_grad else None)
    ds = torch.stack([torch.zeros_like(run.z) if c is None else c for c in cotangents])
    if not run.z.requires_grad:
        return [h.new_zeros(len(betas), *h.shape) for h in run.outputs]
    grads = torch.autograd.grad(run.z, run.outputs, ds, is_grads_batched=True, allow_unused=True, retain_graph=True)
    return [
        torch.zeros(len(betas), *h.shape, dtype=h.dtype, device=h.device) if g is None else g
        for g, h in zip(grads, run.outputs, strict=True)
    ]


def norms_and_zeros(grads: list[Tensor]) -> tuple[Floats, Floats]:
    """Return norms and shares of exact zeros (L, K, N) of gradients (K, N, ...)."""
    # In float64: the square of a small half is 0.
    norms = np.stack([g.double().flatten(2).norm(dim=2).cpu().numpy() for g in grads])
    zeros = np.stack([(g == 0).flatten(2).double().mean(2).cpu().numpy() for g in grads])
    return norms, zeros
