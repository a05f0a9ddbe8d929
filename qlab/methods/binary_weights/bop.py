r"""Bop: an optimizer for binary weights without latent weights; it only ever flips them.

    m <- (1 - gamma) m + gamma g,   g = dl/dw at the binary w
    w <- -w   where   m w > tau

A weight flips when the average gradient has long and strongly enough pointed against it: gamma says how long, tau how
strongly. There is no state but (w, m); m is not reset by a flip. A tie m w = tau keeps w = +1 and turns w = -1 (the authors'
sign(0) = +1). Scaling loss and tau by one factor changes nothing: tau has the unit of a gradient. Constant g against w from
m = 0 flips it at the first step k with |g| (1 - (1 - gamma)^k) > tau; |g| <= tau never does (where w = +1).

Parameters left in float are trained by Adam.

Schedule: gamma is multiplied by `gamma_rate` at the start of each of `gamma_stages` equal parts of the run but the first.

Source: Helwegen, Widdicombe, Geiger, Liu, Cheng, Nusselder, Latent Weights Do Not Exist: Rethinking Binarized Neural Network
Optimization, NeurIPS 2019, arXiv 1906.02107; rule and constants from the authors' code
(plumerai/rethinking-bnn-optimization). CIFAR-10: gamma 1e-4, times 0.1 every 100 of 500 epochs (`gamma_stages=5`), tau 1e-8,
batch 50, Adam at 0.01, batch norm without scale, binary activations; analysis runs: gamma 1e-3, tau 1e-6, batch 100; defaults
of their class: gamma 1e-2, tau 1e-7.
Deviations: the defaults, gamma 1e-2 in three stages and tau 1e-4, are for runs of some hundred steps on small nets.

Shapes: w, m, g are those of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.base import PseudoDerivative, Rule

__all__ = ["Binary", "Bop", "BopOptimizer", "flipped"]


def flipped(w: Tensor, m: Tensor, tau: float) -> Tensor:
    """Return the weights after the rule, -sign(w m - tau) w with sign(0) = +1 of the product, as the authors' code has it."""
    return hard_sign(-torch.sign(w * m - tau) * w)


class BopOptimizer(torch.optim.Adam):
    """Bop on the groups with a `tau`, whose `lr` is gamma; Adam on the others.

    Args:
        groups: parameter groups; a group with `tau` holds weights in {-1, +1}.
        lr: of the groups without their own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden = []
        for group in self.param_groups:
            if group.get("tau") is None:
                continue
            gamma = group["lr"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["m"] = torch.zeros_like(w)
                    state["step"] = torch.zeros(())  # torch's Adam looks for it in every state that it restores
                m = state["m"].mul_(1 - gamma).add_(w.grad, alpha=gamma)
                w.copy_(flipped(w, m, group["tau"]))
                hidden.append((w, w.grad))
                w.grad = None  # Adam passes by parameters without a gradient
        super().step()
        for w, g in hidden:
            w.grad = g
        return loss


class Binary(Quantizer):
    """The binary weight itself; its sign guards against values that are none."""

    bits = 1

    def forward(self, latent: Tensor) -> Tensor:
        """Return w; the gradient is the one at w."""
        return PseudoDerivative.apply(latent, hard_sign, torch.ones_like)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def primitive(self) -> Rule:
        """Return the identity."""
        return lambda x: x

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the signs of the net's own weights."""
        return hard_sign(latent)


class Bop(Method):
    """Bop, with Adam for what is left in float.

    Args:
        net: a plain net or the spec of one.
        gamma: share of a new gradient in the average m; the authors' 1e-4.
        tau: threshold of a flip, in units of the gradient; the authors' 1e-8.
        gamma_rate: factor of gamma from one stage to the next.
        gamma_stages: equal parts of the run with a gamma of their own; 1 keeps it constant, the authors' CIFAR-10 run has 5.
        lr: learning rate of float parameters.
        lr_schedule: of float parameters: "cosine" to zero over the run, "exponential" to `lr_end` times the start, or
            "constant".
        lr_end: share of the learning rate left at the end of an exponential schedule.
        loss: "cross_entropy" or "squared_hinge".
        keep: layers left in float: "first", "last", or module names.
        biases: binarize biases too.
        reestimate_bn: re-estimate batch-norm statistics with the hard weights before evaluation.
        seed: unused by the rule, which draws nothing.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["bop"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        gamma: float = 1e-2,
        tau: float = 1e-4,
        gamma_rate: float = 0.1,
        gamma_stages: int = 3,
        lr: float = 0.01,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        lr_end: float = 1e-3,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
        keep: Sequence[str] = (),
        biases: bool = False,
        reestimate_bn: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value, good, expected in (
            ("gamma", gamma, 0 < gamma <= 1, "in (0, 1]"),
            ("tau", tau, tau >= 0, "at least 0"),
            ("gamma_rate", gamma_rate, 0 < gamma_rate <= 1, "in (0, 1]"),
            ("gamma_stages", gamma_stages, gamma_stages >= 1, "at least 1"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(
            net,
            lr=lr,
            lr_schedule=lr_schedule,
            lr_end=lr_end,
            loss=loss,
            keep=keep,
            biases=biases,
            reestimate_bn=reestimate_bn,
            seed=seed,
        )

    def weight_quantizer(self) -> Quantizer:
        """Return the binary weight."""
        return Binary()

    def gamma_factor(self, progress: float) -> float:
        """Return the share of `gamma` in force at `progress` in [0, 1]."""
        stages = self.h.gamma_stages
        return self.h.gamma_rate ** min(math.floor(progress * stages + 1e-9), stages - 1)

    def make_optimizer(self) -> BopOptimizer:
        """Return Bop on the binary weights and Adam on the rest."""
        h = self.h
        binary = [t.latent for t in quantized_tensors(self.net)]
        known = {id(p) for p in binary}
        groups: list[dict[str, Any]] = [{"params": binary, "lr": h.gamma, "tau": h.tau}]
        rest = [p for p in self.parameters() if id(p) not in known]
        if rest:
            groups.append({"params": rest, "tau": None})
        return BopOptimizer(groups, lr=h.lr)

    def with_schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return what Lightning wants: gamma moves by its stages, the float parameters' learning rate by its schedule."""

        def factor(rule: Callable[[float], float]) -> Callable[[int], float]:
            return lambda step: rule(step / max(self._run_length, 1))

        rules = [factor(self.lr_factor if g["tau"] is None else self.gamma_factor) for g in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
