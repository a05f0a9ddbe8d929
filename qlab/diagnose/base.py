"""What every diagnosis promises, and the checks that come before one.

A diagnosis is a pure function of a net and data. Its result is a frozen dataclass of arrays that knows `.frame()` (the numbers as
a tidy DataFrame), `.figure()` (a static picture) and `.summary()` (one paragraph with the numbers in it).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Result", "check", "plain", "run_hooked"]


class Result(ABC):
    """A result of a diagnosis: a frozen dataclass of arrays."""

    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """Return the numbers, tidy."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return a static picture; its label (`figure.get_label()`) says what it shows, in words."""

    @abstractmethod
    def summary(self) -> str:
        """Return one paragraph with the numbers in it, and which function they are of."""

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary(), quote=False)}</p>{self.frame().to_html(max_rows=12)}"


def plain(net: nn.Module) -> nn.Module:
    """Return the torch net inside a method of the lab; any other module is returned as it is.

    Raises:
        InputError: for something that is no module.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"net is a {type(net).__name__}; expected a torch module, or a method of the lab")
    # A method exists only where its module was imported; a foreign net needs not wait for Lightning.
    methods = sys.modules.get("qlab.methods.base")
    return net.net if methods is not None and isinstance(net, methods.Method) else net


def check(
    net: nn.Module, x: Tensor, y: Tensor | None, labels: bool = True, varied: bool = True
) -> tuple[nn.Module, Tensor]:
    """Return the torch net to diagnose and its logits (N, d) on the batch; raise where a diagnosis would say nothing true.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) floating point inputs.
        y: (N,) int64 labels; may be None where `labels` is False.
        labels: whether the diagnosis needs labels.
        varied: whether inputs that are all the same say nothing; an attack can start at a black picture.

    Raises:
        InputError: no module, a net in training mode or one that answers twice differently; inputs that are empty, no floats,
            hold NaN or are all the same; labels that are missing, of another length or out of range; logits that are no matrix or
            not finite.
    """
    net = plain(net)
    _check_inputs(x, varied)
    training = [name or "the net" for name, m in net.named_modules() if m.training]
    if training:
        raise InputError(
            f"this net is in training mode ({training[0]}), where batch norm looks at the whole batch and dropout at random units; "
            "call net.eval() first, or diagnose method.deployed()"
        )
    with torch.no_grad():
        try:
            z, again = net(x), net(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"the net does not take inputs of shape {tuple(x.shape)} and {x.dtype}: {error}"
            ) from error
    if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(x):
        given = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"the net returns {given} for {len(x)} inputs; expected logits of shape (N, classes)")
    if not bool(z.isfinite().all()):
        raise InputError("the net's logits hold NaN or infinite values; find the layer that diverged before diagnosing")
    if not torch.equal(z, again):
        raise InputError(
            "the net answers twice differently: it has random layers (dropout or stochastic quantizers that stay on in eval mode). "
            "Switch them off or fix their noise; a difference of two such answers would be noise"
        )
    if labels or y is not None:
        _check_labels(y, len(x), z.shape[1])
    return net, z


def run_hooked(net: nn.Module, x: Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run the net once, without gradients, for what its hooks see, and take the hooks off whatever happens."""
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()


def _check_inputs(x: object, varied: bool = True) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"the inputs are {kind}; expected floats of shape (N, ...), as data.transform(x) makes of raw data"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise InputError(f"the inputs have shape {tuple(x.shape)}; expected (N, ...) with at least one example")
    if not bool(x.isfinite().all()):
        raise InputError("the inputs hold NaN or infinite values; clean the data first")
    if varied and bool((x == x.reshape(-1)[0]).all()):
        raise InputError(
            "the inputs are constant: every number is the same, so nothing can be learned about the net from them"
        )


def _check_labels(y: object, n: int, classes: int) -> None:
    if y is None:
        raise InputError("this diagnosis looks at the loss, which needs labels: give y of shape (N,), int64")
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (n,):
        given = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"the labels are {given}; expected int64 of shape ({n},)")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise InputError(
            f"the labels run from {int(y.min())} to {int(y.max())}; the net has classes 0 to {classes - 1}"
        )
