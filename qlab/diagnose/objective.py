"""The loss of a net on one batch as a function of its tensors, for many weights at once.

    J = Objective(net, x, y)
    J.losses({"0.weight": stack})     # (K, O, I) weights in, (K,) losses out
    J.gradient()                      # what backward() gives: the surrogate's where quantizers are straight-through

Weights are stacked along a leading axis and run through torch.func.vmap in chunks that fit the memory named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.base import check
from qlab.errors import InputError, UnknownNameError

__all__ = ["LOSSES", "Loss", "Objective", "loss_of", "margin"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, d) and labels (N,) to one loss per example (N,)."""


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each example."""
    return F.cross_entropy(z, y, reduction="none")


def margin(z: Tensor, y: Tensor) -> Tensor:
    """Return max_{i != y} z_i - z_y: positive where the example is misclassified; no softmax that could saturate."""
    y = y[..., None]
    return z.scatter(-1, y, float("-inf")).amax(-1) - z.gather(-1, y)[..., 0]


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin}


def loss_of(which: str | Loss) -> Loss:
    """Return a loss by its name in `LOSSES`; a function as it is.

    Raises:
        UnknownNameError: no such loss.
    """
    if not isinstance(which, str):
        return which
    if which not in LOSSES:
        raise UnknownNameError("loss", which, LOSSES)
    return LOSSES[which]


class Objective:
    """L(theta) = mean_n loss(beta net(x_n; theta), y_n).

    Args:
        net: in eval mode; see `check`.
        x: (N, ...) inputs.
        y: (N,) labels.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        beta: what the logits are multiplied by; a small one keeps the softmax from saturating.
        memory: bytes that one chunk's inputs and logits may take, roughly.

    Attributes:
        theta: the net's parameters by name, detached.

    Raises:
        UnknownNameError: no such loss.
        InputError: a beta that is not positive, one logit where the named losses compare classes; and what `check` says.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: str | Loss = "cross_entropy",
        beta: float = 1.0,
        memory: int = 64 * 2**20,
    ) -> None:
        self.loss = loss_of(loss)
        if not beta > 0:
            raise InputError(f"beta must be positive, not {beta!r}")
        self.net, self.base_logits = check(net, x, y)
        if isinstance(loss, str) and self.base_logits.shape[1] < 2:
            raise InputError(
                f"the net gives one logit, and {loss!r} compares classes: expected at least two; give a loss of your own, "
                "a function of logits (N, 1) and labels (N,) that returns one number per example"
            )
        self.x, self.y, self.beta = x, y, beta
        self.theta = {name: p.detach() for name, p in self.net.named_parameters()}
        self.chunk = max(1, memory // max(1, x.element_size() * max(x.numel(), self.base_logits.numel()) * 8))

    def logits(self, stack: Mapping[str, Tensor], chunk: int | None = None) -> Tensor:
        """Return the logits (K, N, d) for K values of some tensors, each (K, *shape); the others stay as they are."""
        stack = self._checked(stack)

        def one(some: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.net, self.theta | some, (self.x,))

        with torch.no_grad():
            return torch.func.vmap(one, chunk_size=chunk or self.chunk)(stack)

    def losses(self, stack: Mapping[str, Tensor], chunk: int | None = None) -> Tensor:
        """Return the losses (K,) for K values of some tensors, each (K, *shape)."""
        stack = self._checked(stack)
        with torch.no_grad():
            return torch.func.vmap(self.at, chunk_size=chunk or self.chunk)(stack)

    def at(self, some: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, a scalar, with some tensors replaced; differentiable, and fit for torch.func transforms."""
        z = torch.func.functional_call(self.net, self.theta | dict(some), (self.x,))
        return self.loss(self.beta * z, self.y).mean()

    def gradient(self, names: list[str] | None = None) -> dict[str, Tensor]:
        """Return what back-propagation gives for the named parameters: the coarse gradient where quantizers are
        straight-through, zeros where the graph does not reach a parameter."""
        some = {name: self.theta[name].clone().requires_grad_() for name in (names or list(self.theta))}
        value = self.at(some)
        if not value.requires_grad:
            return {name: torch.zeros_like(w) for name, w in some.items()}
        grads = torch.autograd.grad(value, list(some.values()), allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(some.items(), grads, strict=True)}

    def _checked(self, stack: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not stack:
            raise InputError("no weights were given; expected a dictionary of name -> (K, *shape)")
        for name, w in stack.items():
            if name not in self.theta:
                raise UnknownNameError("parameter", name, self.theta)
            if w.dim() == 0 or w.shape[1:] != self.theta[name].shape or not len(w):
                raise InputError(
                    f"weights of {name!r} have shape {tuple(w.shape)}; expected (K, *{tuple(self.theta[name].shape)})"
                )
        return dict(stack)
