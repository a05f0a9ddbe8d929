r"""Back-propagation against exact differences, a few weights at a time: the cheapest honest look at a gradient mismatch.

With hard weights w_q and an outer loss L (cross-entropy of beta z, beta small enough that the softmax does not saturate):

    sign weight i:    d_i = (L(w_i = +a) - L(w_i = -a)) / (2 a),  a = |w_i|      the flip gradient, exact
    float weight i:   d_i = (L(w_i + s) - L(w_i - s)) / (2 s),  s = rms(w)     the derivative of L averaged over [w_i - s, w_i + s]

    cosine = <g, d> / (||g|| ||d||)        over sampled weights of one tensor, g the back-propagated gradient with respect to w_q

Of m sampled weights of unrelated gradients the cosine has a standard deviation of about 1 / sqrt(m).

Source: Kim et al., BinaryDuo, ICLR 2020, arXiv 2002.06517 (coordinate discrete gradients).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["coordinate_cosine", "temperature"]

MEMORY = 2**25  # bytes of inputs and first activations in one batch of nets


def temperature(logits: Tensor) -> float:
    """Return beta = 1 / max(1, std of the logits)."""
    return 1 / max(1.0, float(logits.detach().std()))


def coordinate_cosine(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    *,
    signs: bool,
    count: int,
    generator: torch.Generator,
    beta: float = 1.0,
) -> float:
    """Return the cosine of the back-propagated gradient with exact differences for some weights of one tensor, NaN where one is 0.

    Args:
        net: in eval mode with hard weights as plain parameters, as from `harden`.
        x, y: (N, ...) inputs and (N,) labels.
        name: of the parameter.
        signs: whether its values are signs, each times a magnitude of its own or its row's.
        count: how many weights are sampled.
        generator: from which they are drawn.
        beta: what the logits are multiplied by.
    """
    theta = {n: p.detach() for n, p in net.named_parameters()}
    w = theta[name]

    def loss(value: Tensor) -> Tensor:
        return F.cross_entropy(beta * torch.func.functional_call(net, theta | {name: value}, (x,)), y)

    leaf = w.clone().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
        g = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    if g is None or not bool(w.any()):
        return float("nan")
    chosen = torch.randperm(w.numel(), generator=generator)[:count].to(w.device)
    moved = w.flatten().repeat(2 * len(chosen), 1)
    rows = torch.arange(len(chosen), device=w.device)
    here = w.flatten()[chosen]
    centre, step = (0 * here, here.abs()) if signs else (here, w.square().mean().sqrt().expand(len(here)))
    moved[rows, chosen], moved[len(chosen) + rows, chosen] = centre + step, centre - step
    stack = moved.reshape(-1, *w.shape)
    chunk = max(1, MEMORY // (16 * x.element_size() * x.numel()))
    with torch.no_grad():
        try:
            losses = torch.func.vmap(loss, chunk_size=chunk)(stack)
        except RuntimeError:  # hand-written functions that torch.func does not take
            losses = torch.stack([loss(each) for each in stack])
    exact = (losses[: len(chosen)] - losses[len(chosen) :]) / (2 * step)
    coarse = g.flatten()[chosen]
    if not bool(coarse.any()) or not bool(exact.any()):
        return float("nan")
    return float(F.cosine_similarity(coarse.double(), exact.double(), dim=0))
