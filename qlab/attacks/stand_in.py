r"""Copies of a net whose quantized activations go backward as a stand-in of the attacker's choice.

    forward:   q(x), bit for bit what the net computes
    backward:  dL/dx = dL/dq s(x) d((x - c) / h)

d is a surrogate derivative of `qlab.quantizers`, c the threshold in the middle of the quantizer's levels, h half the distance from
its lowest level to its highest, s the scale that the quantizer gives the sample (1 for most). For a sign c = 0 and h = 1, so that
"clipped" is its usual straight-through rule; for k bits on [0, L] "clipped" passes the gradient inside [0, L] and "identity"
everywhere. "relu" passes it where x > 0, whatever the levels.

Source: Athalye, Carlini, Wagner 2018, arXiv 1802.00420.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qlab.diagnose.functions import Hard
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Quantizer, Rule
from qlab.quantizers.declared import Declared
from qlab.quantizers.surrogates import SURROGATES, Surrogate, surrogate

__all__ = ["STAND_INS", "StandIn", "stand_in", "with_stand_ins"]

StandIn = str | Rule | Surrogate
"""A name of `STAND_INS`, an elementwise derivative, or a `Surrogate`."""

STAND_INS: tuple[str, ...] = (*SURROGATES, "relu")

_FAR = 1e6  # beyond the outermost threshold of any activation's quantizer


def stand_in(which: StandIn, sharpness: float | None = None) -> Surrogate:
    """Return a stand-in by name, or make one of a user's own derivative.

    Args:
        which: see `StandIn`.
        sharpness: of tanh, swish and erf.

    Raises:
        UnknownNameError, InputError: as `qlab.quantizers.surrogate`.
    """
    if which == "relu":
        if sharpness is not None:
            raise InputError(f"the relu stand-in has no sharpness; it was given {sharpness}")
        return Surrogate("relu", lambda x: (x > 0).to(x.dtype), torch.relu)
    if isinstance(which, str) and which not in STAND_INS:
        raise UnknownNameError("stand-in", which, STAND_INS)
    return surrogate(which, sharpness)


class _Other(nn.Module):
    """A quantizer whose backward pass is that of another."""

    def __init__(self, module: nn.Module, other: Surrogate) -> None:
        super().__init__()
        self.module, self.other = module, other
        self.centre, self.reach = 0.0, 1.0
        self.training = module.training

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of the lab that is stood in for; None for a hand-written module."""
        module = self.module.quantizer if isinstance(self.module, Hard) else self.module
        return module if isinstance(module, Quantizer) else None

    def measure(self) -> None:
        """Find c and h from the quantizer as it is now."""
        if self.quantizer is not None and self.other.name != "relu":
            self.centre, self.reach = _middle(self.quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return q(x); backward passes on the stand-in's derivative."""
        with torch.no_grad():
            latent = x.detach()
            value = self.module(latent)
            if value.shape != x.shape:
                raise InputError(
                    f"{type(self.module).__name__} changes the shape of its input; no stand-in can take its place"
                )
            slope = self.other.derivative((latent - self.centre) / self.reach)
            scale = None if self.quantizer is None else self.quantizer.scale(latent)
            if scale is not None:
                slope = slope * scale
        return Declared.apply(x, value, slope)


def _middle(quantizer: Quantizer) -> tuple[float, float]:
    """Return the threshold in the middle of the levels and half their range.

    Where a level stands in the middle it is the middle between the thresholds around it.
    """
    levels = quantizer.levels(torch.float64)
    device = next((b.device for b in quantizer.buffers()), torch.device("cpu"))
    if quantizer.scale(torch.ones(1, 1, dtype=torch.float64, device=device)) is not None:
        if levels is None:
            raise InputError(
                f"{type(quantizer).__name__} has a scale but no grid of levels; no stand-in is known for it"
            )
        low, high = float(levels[0]), float(levels[-1])  # its thresholds move with the sample: take them as centred
        return (low + high) / 2, (high - low) / 2
    ends = torch.tensor([-_FAR, _FAR], dtype=torch.float64, device=device)
    low, high = quantizer(ends).tolist()
    if not -_FAR <= low < high <= _FAR:
        raise InputError(
            f"{type(quantizer).__name__} runs from {low:g} to {high:g}; expected a map that rises to a limit"
        )
    middle, a, b = (low + high) / 2, ends[[0, 0]], ends[[1, 1]]
    for _ in range(80):
        m = (a + b) / 2
        q = quantizer(m)
        above = torch.stack([q[0] >= middle, q[1] > middle])
        a, b = torch.where(above, a, m), torch.where(above, m, b)
    return float(b.mean()), (high - low) / 2


_copies: WeakKeyDictionary[nn.Module, dict[tuple[StandIn, float | None, tuple[str, ...]], nn.Module]] = (
    WeakKeyDictionary()
)


@torch.no_grad()
def with_stand_ins(
    net: nn.Module, which: StandIn, sharpness: float | None = None, layers: Sequence[str] = ()
) -> nn.Module:
    """Return the net with other backward rules of its quantized activations: one copy, which shares all tensors with the net.

    Asked again it returns the same copy, unless the net got other tensors or modules since.

    Args:
        net: a deployed net.
        which, sharpness: see `stand_in`.
        layers: names of modules that are no quantizers of the lab, to be replaced too.

    Raises:
        InputError: a net in which nothing is to be replaced; a quantizer whose range is not known.
        UnknownNameError: no such module.
    """
    known = _copies.setdefault(net, {})
    key = (which, sharpness, tuple(layers))
    found = known.get(key)
    if found is None or not _shared(net, found):
        found = known[key] = _copied(net, stand_in(which, sharpness), key[2])
    for module in found.modules():
        if isinstance(module, _Other):
            module.measure()
    return found


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def _shared(net: nn.Module, other: nn.Module) -> bool:
    a, b = _tensors(net), _tensors(other)
    return len(a) == len(b) and all(s is t for s, t in zip(a, b, strict=True))


def _copied(net: nn.Module, other: Surrogate, layers: tuple[str, ...]) -> nn.Module:
    memo = {id(t): t for t in chain(net.parameters(), net.buffers())}
    net = copy.deepcopy(net, memo)
    modules = dict(net.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in modules:
            raise UnknownNameError("module", name, modules)
    replaced: dict[nn.Module, _Other] = {}  # one quantizer may stand in several places
    done: list[str] = []
    for name, module in modules.items():
        if ".parametrizations." in f".{name}." or name.startswith(tuple(f"{d}." for d in done)):
            continue
        if name in layers or isinstance(module, Quantizer | Hard):
            if module not in replaced:
                replaced[module] = _Other(module, other)
            if not name:
                return replaced[module]
            net.set_submodule(name, replaced[module])
            done.append(name)
    if not done:
        raise InputError(
            "BPDA found no quantized activation in this net: its gradient is its own already, so take Backprop; or name the "
            "modules that a stand-in shall take the place of, BPDA(layers=('act1', ...)), where they are not quantizers of the lab"
        )
    return net
