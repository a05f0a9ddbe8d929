"""Products with a Hessian, and whether a loss has one worth the name.

The deployed loss is piecewise constant in every weight that is quantized or has a quantized activation behind it: its Hessian is
zero almost everywhere. Where such a weight has a smooth way to the loss too, as past a shortcut, automatic differentiation adds
the two up: the derivative of the smooth way and that of a straight-through rule. So a loss is asked two things before its Hessian
is taken: whether small changes of a weight change anything, and whether back-propagation gives the slope that the loss has.

Source: Pearlmutter 1994 (H v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.diagnose.base import check
from qlab.diagnose.functions import FunctionName, variant
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.apply import quantized_tensors, quantizers

__all__ = ["Hessian", "constant_weights", "differentiable"]

FEW = 8  # examples on which a step function shows too


class Hessian:
    """Products of the Hessian of a scalar function of named tensors, through one graph of its gradient that is kept.

    Args:
        f: a dictionary like `theta` to a scalar, any closure that torch.func can differentiate twice.
        theta: where.
        chunk: vectors that go through the graph at once.

    Attributes:
        n: how many numbers theta holds.
        gradient: (n,) the gradient at theta.
        products_done: vectors multiplied so far.
    """

    def __init__(self, f: Callable[[dict[str, Tensor]], Tensor], theta: Mapping[str, Tensor], chunk: int = 8) -> None:
        self.f, self.theta, self.chunk = f, {name: w.detach() for name, w in theta.items()}, chunk
        if not self.theta:
            raise InputError("there are no parameters to take the curvature over")
        self.n = sum(w.numel() for w in self.theta.values())
        self.products_done = 0
        # H is symmetric, so the vjp of the gradient is H v. The jvp, forward over reverse, computes the gradient anew for
        # every call and took 2.4 times as long on a digits net.
        pulled: tuple[Any, ...] = torch.func.vjp(torch.func.grad(f), self.theta)
        gradient, self._vjp = pulled[0], pulled[1]
        self.gradient = self.flat(gradient, 0)

    def products(self, V: Tensor) -> Tensor:
        """Return H v for every row: (B, n) to (B, n)."""
        self.products_done += len(V)

        def one(v: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._vjp(v)[0]

        with torch.no_grad():
            if len(V) == 1:
                return self.flat(one(self.tree(V[0])), 0)[None]
            return self.flat(torch.func.vmap(one, chunk_size=self.chunk)(self.tree(V)), 1)

    def tree(self, V: Tensor) -> dict[str, Tensor]:
        """Return rows (..., n) as tensors (..., *shape) by name."""
        parts = V.split([w.numel() for w in self.theta.values()], -1)
        return {
            name: part.reshape(*V.shape[:-1], *w.shape)
            for (name, w), part in zip(self.theta.items(), parts, strict=True)
        }

    def flat(self, tree: Mapping[str, Tensor], leading: int) -> Tensor:
        """Return tensors with some leading axes as rows (..., n)."""
        return torch.cat([tree[name].flatten(leading) for name in self.theta], -1)


def constant_weights(net: nn.Module, x: Tensor, names: Sequence[str] | None = None, seed: int = 0) -> dict[str, str]:
    """Return the parameters in which the logits are piecewise constant, each with the reason.

    A parameter under a quantizer with a grid is, whatever lies behind. Of the others it is found numerically, in float64: no
    logit changes when the parameter moves by 1e-10 of its scale along a random direction, and some do when it moves by its scale.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        names: parameters to look at; all by default.
        seed: of the directions.

    Raises:
        InputError: a net that does not run in float64; see also `check`.
    """
    net, _ = check(net, x, None, labels=False)
    return _constant(net, x, names, seed)


def _constant(net: nn.Module, x: Tensor, names: Sequence[str] | None, seed: int = 0) -> dict[str, str]:
    under = {
        id(t.latent): type(t.quantizer).__name__ for t in quantized_tensors(net) if t.quantizer.levels() is not None
    }
    reasons: dict[str, str] = {}
    tensors = _double(net)

    def logits(x: Tensor, **moved: Tensor) -> Tensor:
        with torch.no_grad():
            return _logits(net, tensors | moved, x)

    few = logits(x[:FEW])
    g = generator("constant weights", seed)
    for name, p in net.named_parameters():
        if names is not None and name not in names:
            continue
        if id(p) in under:
            reasons[name] = f"it is quantized by {under[id(p)]}"
            continue
        w = tensors[name]
        scale = float(w.square().mean().sqrt()) or 1.0
        d = scale * _noise(w, g)
        if not torch.equal(logits(x[:FEW], **{name: w + 1e-10 * d}), few):
            continue
        here = logits(x)
        if torch.equal(logits(x, **{name: w + 1e-10 * d}), here) and not torch.equal(logits(x, **{name: w + d}), here):
            reasons[name] = "small changes of it change no logit, large ones do: a step function lies behind it"
    return reasons


def _noise(w: Tensor, g: torch.Generator) -> Tensor:
    """Return standard normal numbers like `w`; drawn in float32, which takes a sixth of the time."""
    return torch.randn(w.shape, generator=g, dtype=torch.float32).to(w)


def _double(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, detached, floats in float64."""
    found = (*net.named_parameters(), *net.named_buffers())
    return {name: t.detach().double() if t.is_floating_point() else t for name, t in found}


def _logits(net: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the net's logits in float64."""
    try:
        z: Tensor = torch.func.functional_call(net, tensors, (x.double(),))
    except RuntimeError as error:
        raise InputError(
            "before a Hessian is taken, the net is asked in float64 whether it is a step function of its weights, and this one "
            f"does not run in float64: {error}. Let its forward pass keep the precision it is given"
        ) from error
    return z


def _slopes(J: Objective, names: Sequence[str]) -> tuple[float, float, float]:
    """Return the loss's slope along a random direction, the one that back-propagation claims, and what rounding may make of it.

    In float64, beside the weights: a net of zeros may stand on a kink, where a loss has no slope.
    """
    tensors, g = _double(J.net), generator("slopes", 0)
    x, y = J.x[:FEW], J.y[:FEW]

    def loss(some: dict[str, Tensor]) -> Tensor:
        return J.loss(J.beta * _logits(J.net, tensors | some, x), y).mean()

    def noise(w: Tensor) -> Tensor:
        scale = float(w.square().mean().sqrt()) or 1.0
        return scale * _noise(w, g)

    w = {name: tensors[name] + 1e-3 * noise(tensors[name]) for name in names}
    d = {name: noise(t) for name, t in w.items()}
    leaves = {name: t.requires_grad_() for name, t in w.items()}
    value = loss(leaves)
    claimed = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if value.requires_grad else ()
    parts = [p * d[name] for name, p in zip(leaves, claimed, strict=False) if p is not None]
    step = 1e-6
    with torch.no_grad():
        up, down = (float(loss({name: t + s * d[name] for name, t in w.items()})) for s in (step, -step))
    size = sum(float(p.square().sum()) for p in parts) ** 0.5
    return (
        (up - down) / (2 * step),
        sum(float(p.sum()) for p in parts),
        0.01 * size + 1e-8 * max(1.0, abs(float(value.detach()))),
    )


def differentiable(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    function: FunctionName | None,
    loss: str | Loss,
    beta: float,
    names: Sequence[str] | None,
    k: float,
) -> tuple[Objective, str]:
    """Return the loss of a function that has a Hessian, and the function's name; arguments as of `qlab.diagnose.curvature`.

    Raises:
        UnknownNameError: no such function, loss or parameter.
        InputError: a loss that is piecewise constant in a weight, or whose slope is another than back-propagation gives.
    """
    J = Objective(net, x, y, loss, beta)
    plain_net = J.net
    quantized = any(True for _ in quantizers(plain_net))
    if function is not None:
        J = Objective(variant(plain_net, function, k), x, y, loss, beta)
    for name in names or ():
        if name not in J.theta:
            raise UnknownNameError("parameter", name, J.theta)
    if function in (None, "deployed", "latent"):
        constant = _constant(J.net, x, names)
        if function == "deployed":
            constant |= {n: r for n, r in _constant(plain_net, x, names).items() if n in J.theta}
        if constant:
            name, reason = next(iter(constant.items()))
            more = f" (and {len(constant) - 1} more)" if len(constant) > 1 else ""
            raise InputError(
                f"the {function or 'deployed'} loss is piecewise constant in {name!r}{more}: {reason}. Its Hessian is zero almost "
                "everywhere, and what back-propagation through straight-through rules gives is the Hessian of no function. Ask for "
                "function='smoothed' (jumps become tanh steps, sharpness k) or 'surrogate' (the backward rule's own function), or "
                "use stein() or flip_pairs(), which differentiate nothing"
            )
        slope, claimed, rounding = _slopes(J, names or list(J.theta))
        if abs(slope - claimed) > rounding:
            raise InputError(
                f"along a random direction the {function or 'net'} loss has slope {slope:.3g}, and back-propagation claims "
                f"{claimed:.3g}: a straight-through rule stands beside a smooth way to the loss, and what would come out is the "
                "Hessian of no function. Ask for function='smoothed' or 'surrogate' where the quantizers are the lab's, for the "
                "names of weights behind them, or use stein() or flip_pairs(), which differentiate nothing"
            )
    return J, (function or "deployed") if quantized else "the net"
