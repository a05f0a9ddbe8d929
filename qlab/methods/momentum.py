"""Momentum of the scaled gradient, bias-corrected: the optimizer of the codes of BayesBiNN and, after it, of AdaSTE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlab.errors import InputError

__all__ = ["BiasCorrectedMomentum"]


class BiasCorrectedMomentum(torch.optim.Optimizer):
    """The authors' optimizer: momentum of the scaled gradient with decay, bias-corrected.

        m <- rho m + (1 - rho) (S g + r theta);   theta <- theta - lr m / (1 - rho^step)

    Args:
        params: parameters or groups; `scale` (S) and `decay` (r) may differ by group.
        lr: learning rate.
        momentum: rho.
        scale: S.
        decay: r.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, scale: float = 1.0, decay: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), not {momentum!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "scale": scale, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rho = group["momentum"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state["step"], state["m"] = 0, torch.zeros_like(theta)
                state["step"] += 1
                m = state["m"].mul_(rho).add_(theta.grad, alpha=(1 - rho) * group["scale"])
                if group["decay"]:
                    m.add_(theta, alpha=(1 - rho) * group["decay"])
                theta.add_(m, alpha=-group["lr"] / (1 - rho ** state["step"]))
        return loss
