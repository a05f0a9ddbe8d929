"""Nets whose layers run one after the other: found by watching one run, so that nothing between the layers goes unseen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.diagnose.functions import Hard, Primitive, Smooth
from qlab.quantizers import Quantizer, Sign, Uniform

__all__ = ["CONTINUOUS", "SAME_SHAPE", "chain", "latent_of", "mapped", "plain_map"]

CONTINUOUS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    Primitive,
    Smooth,
)
_NOTHING = (nn.Identity, nn.Dropout)  # in eval mode
SAME_SHAPE = (*CONTINUOUS, *_NOTHING, Hard, Sign, Uniform)


def chain(net: nn.Module, x: Tensor) -> list[tuple[str, nn.Module]] | None:
    """Return the layers of a net in the order they run, where each takes exactly what the one before gave; else None.

    The net runs once under hooks: a layer's input must be the very tensor that the last layer returned, unchanged, or a
    flattened view of it. A layer with a forward pass or hooks of its own is no link, and every parameter of the net must be
    one that a link reads: else one that is shared under two names, or stands behind a reparametrization, would be held still.
    """
    ran: list[tuple[str, nn.Module, Tensor, Tensor, int, int]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            ran.append((name, module, inputs[0], output, inputs[0]._version, output._version))

        return hook

    handles = [
        m.register_forward_hook(note(name))
        for name, m in net.named_modules()
        if _as_known(m) and ".parametrizations." not in f".{name}."
    ]
    try:
        with torch.no_grad():
            before = x._version
            out = net(x)
    finally:
        for handle in handles:
            handle.remove()
    if not ran or any(isinstance(m, nn.Flatten) and m.start_dim != 1 for _, m, *_ in ran):
        return None
    if not all(plain_map(m) for _, m, *_ in ran) or any(
        isinstance(m, nn.BatchNorm1d) and m.running_var is None for _, m, *_ in ran
    ):
        return None
    # The inputs' versions are read when a layer has run; a layer that works in place has raised its own.
    links = [(x, before, ran[0][2], ran[0][4])] + [(a[3], a[5], b[2], b[4]) for a, b in pairwise(ran)]
    for (given, version, taken, seen), (_, module, _, output, _, _) in zip(links, ran, strict=True):
        in_place = output is taken
        if not _same(given, taken) or (seen != version and not (in_place and seen == version + 1)):
            return None
        if isinstance(module, nn.Linear | nn.BatchNorm1d) and taken.dim() != 2:
            return None
    if out is not ran[-1][3] or out._version != ran[-1][5]:
        return None
    steps = [(name, module) for name, module, *_ in ran if not isinstance(module, (nn.Flatten, *_NOTHING))]
    return steps if _read(steps) == {name for name, _ in net.named_parameters()} else None


def _as_known(module: nn.Module) -> bool:
    """Whether a module computes what its class is known for: a subclass may have another forward pass, a hook may change it."""
    base = next(
        (kind for kind in (nn.Linear, nn.BatchNorm1d, nn.Flatten, *SAME_SHAPE) if isinstance(module, kind)), None
    )
    hooked = module._forward_hooks or module._forward_pre_hooks
    return base is not None and type(module).forward is base.forward and not hooked


def _read(steps: list[tuple[str, nn.Module]]) -> set[str]:
    """Return the names of the parameters that the links read."""
    found = set()
    for name, module in steps:
        if isinstance(module, nn.Linear | nn.BatchNorm1d):
            found |= {
                latent_of(name, module, which)[0] for which in ("weight", "bias") if getattr(module, which) is not None
            }
    return found


def _same(given: Tensor, taken: Tensor) -> bool:
    return taken is given or (
        taken.data_ptr() == given.data_ptr()
        and taken.numel() == given.numel()
        and given.is_contiguous()
        and taken.is_contiguous()
        and len(taken) == len(given)
    )


def plain_map(module: nn.Module) -> bool:
    """Whether a quantizer, if it is one, is known to work element by element, and how; a subclass may have rules of its own."""
    q = module.quantizer if isinstance(module, Hard) else module
    known = (Sign, Uniform)
    return not isinstance(q, Quantizer) or any(type(q).forward is k.forward and type(q).hard is k.hard for k in known)


def mapped(module: nn.Module, h: Tensor, own: bool = False) -> Tensor:
    """Return what an elementwise layer makes of finite numbers; where they may be written over (`own`), in place."""
    quantizer = module.quantizer if isinstance(module, Hard) else module
    if isinstance(quantizer, Sign):
        h = h.add_(0.0) if own else h + 0.0  # +0 of -0, whose sign is +1
        return torch.copysign(h.new_ones(()), h, out=h)
    if isinstance(module, nn.ReLU):
        return h.relu_() if own else h.relu()
    return module(h)


def latent_of(name: str, module: nn.Module, which: str) -> tuple[str, list[nn.Module]]:
    """Return the name of the parameter behind a layer's tensor, and the maps between the two."""
    prefix = f"{name}." if name else ""
    if parametrize.is_parametrized(module, which):
        return f"{prefix}parametrizations.{which}.original", list(module.parametrizations[which])  # type: ignore[index]
    return f"{prefix}{which}", []
