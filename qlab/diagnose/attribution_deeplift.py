r"""DeepLift on nets whose activations captum does not know.

    m = delta_out / delta_in at every elementwise nonlinearity (the rescale rule), where delta_in != 0
    scores = (x - x0) * product of multipliers,    sum of scores = F(x) - F(x0)

captum applies the rule to module types in one table, compared exactly; any other module is silently treated by its backward rule,
and with a sign the scores then miss the difference of the outputs. Here every elementwise module of a net is put on the table under
the existing rule, during the call only. Two conditions are checked on the running net:

- a nonlinear module that runs more than once has one place for the inputs of two calls: refused;
- of two nonlinear modules on top of each other the lower one sees a stale gradient: a copy of the tensor goes in between.

A nonlinearity that is no module (torch.sign in a forward) cannot be repaired. It shows in the residual; see `qlab.diagnose.guard`.

Source: Shrikumar et al. 2017, arXiv 1704.02685.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from qlab.errors import InputError

__all__ = ["deeplift", "nonlinearities", "rescaled"]

# Captum's table is of types: a layer of 1 x 1 is elementwise, and would take all layers of its type with it.
_LINEAR = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, _ConvNd, _DropoutNd, _BatchNorm)
_TABLE = threading.RLock()  # captum's table is global: one call at a time


@contextmanager
def rescaled(types: Iterable[type[nn.Module]]) -> Iterator[None]:
    """Put module types on captum's table of the rescale rule for the time of a `with`; the table is then as it was."""
    from captum.attr._core import deep_lift

    with _TABLE:
        table: Any = deep_lift.SUPPORTED_NON_LINEAR
        added = [t for t in dict.fromkeys(types) if t not in table]
        table.update(dict.fromkeys(added, deep_lift.nonlinear))
        try:
            yield
        finally:
            for t in added:
                table.pop(t, None)


@torch.no_grad()
def nonlinearities(net: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Return the modules that get the rescale rule: those on captum's table, and every other elementwise leaf.

    Elementwise is measured: where a random half of a module's input is replaced, the other half of its output stays.

    Args:
        net: any net.
        x: (N, ...) inputs.

    Raises:
        InputError: one of them runs more than once in a forward pass.
    """
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    names = {m: name for name, m in net.named_modules() if not any(True for _ in m.children())}
    inputs: dict[nn.Module, Tensor] = {}
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if len(args) == 1 and isinstance(args[0], Tensor):
            inputs[module] = args[0].clone()  # a clone: the module may work in place

    handles = [m.register_forward_pre_hook(note) for m in names]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    found = {
        names[m]: m
        for m, value in inputs.items()
        if type(m) in SUPPORTED_NON_LINEAR or (not isinstance(m, _LINEAR) and _elementwise(m, value))
    }
    for name, module in found.items():
        if calls[module] > 1:
            raise InputError(
                f"DeepLift cannot look at this net: the module {name!r} ({type(module).__name__}) runs {calls[module]} times in a "
                "forward pass and keeps the input of one only. Give each place a module of its own, or leave deeplift out"
            )
    return found


def _elementwise(module: nn.Module, value: Tensor) -> bool:
    g = torch.Generator().manual_seed(0)  # not every other one: a channel shuffle moves even places to even places
    keep = (torch.rand(value.shape, generator=g) < 0.5).to(value.device)
    try:
        y, z = module(value.clone()), module(torch.where(keep, value, value.flip(0, -1) + 1))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(y, Tensor) and y.shape == value.shape and torch.equal(y[keep], z[keep])


def deeplift(net: nn.Module, x: Tensor, x0: Tensor, target: Tensor) -> Tensor:
    """Return DeepLift's scores of the shape of x.

    Args:
        net: inputs (N, ...) to logits (N, d), not to probabilities.
        x, x0: inputs and baselines.
        target: (N,) classes.

    Raises:
        InputError: a nonlinear module runs more than once.
    """
    from captum.attr import DeepLift

    steps = nonlinearities(net, x)
    apart = [m.register_forward_pre_hook(lambda _, args: (args[0].clone(),)) for m in steps.values()]
    try:
        with rescaled(type(m) for m in steps.values()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Setting forward, backward hooks ..."
            return DeepLift(net).attribute(x, x0, target=target)
    finally:
        for handle in apart:
            handle.remove()
        for m in steps.values():  # captum leaves its marks on modules where it was interrupted
            for mark in ("input", "output"):
                m.__dict__.pop(mark, None)
