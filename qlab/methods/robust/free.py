r"""Free adversarial training: one backward pass gives the gradient of the weights and that of the perturbation.

    delta <- 0                                            kept from replay to replay, and from batch to batch
    for each batch (x, y), m times:
        x' = P_range(x + delta)
        g_w, g_delta  = gradients of  objective(x', y)    one forward, one backward
        delta <- clip(delta + eps sign(g_delta), -eps, eps)
        w     <- step of the optimizer with g_w

Every replay is a step of the method, with its schedule, noise and learning rate, so an epoch has m times as many steps: divide the
number of epochs by m to pay as much as for plain training, as the paper does. The gradient of delta is that of what the step
minimises, whatever a method adds to the loss, for it comes with it. Where x + delta is clipped to the range of inputs it is zero.

The batch's position counts: the n-th perturbation serves the n-th example of each batch, and a smaller last batch uses the first
ones, as in the authors' code. The perturbation is part of a checkpoint. Batch norm is in train mode; there are no inner passes.

Source: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein, Adversarial Training for Free!, NeurIPS 2019,
arXiv 1904.12843. CIFAR-10: eps 8/255, m = 8; ImageNet: m = 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qlab.methods.robust.base import RobustTraining

if TYPE_CHECKING:
    from qlab.methods.base import Method

__all__ = ["FreeTraining"]


@dataclass(frozen=True, kw_only=True)
class FreeTraining(RobustTraining):
    """Free adversarial training.

    Args:
        replays: m, steps for each batch.

    Raises:
        InputError: for a setting out of range.
    """

    replays: int = 8

    name: ClassVar[str] = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("replays")

    @property
    def repeats(self) -> int:
        """m."""
        return self.replays

    def objective(self, method: Method, x: Tensor, y: Tensor) -> Tensor:
        """Return the method's objective at x + delta."""
        units = method.units.to(x)
        delta = _grown(method.perturbation, x)
        method.perturbation = delta
        method.moving = delta[: len(x)].clone().requires_grad_()
        return method.objective(torch.clamp(x + method.moving / units.std, units.low, units.high), y)

    def after_backward(self, method: Method) -> None:
        """Move delta along the gradient that came with that of the weights."""
        moving, method.moving = method.moving, None
        if moving is None or moving.grad is None or method.perturbation is None:
            return
        moved = torch.clamp(moving.detach() + self.eps * moving.grad.sign(), -self.eps, self.eps)
        method.perturbation = torch.cat([moved, method.perturbation[len(moved) :]])


def _grown(delta: Tensor | None, x: Tensor) -> Tensor:
    """Return delta (M, ...) with M >= N for a batch x (N, ...): what is new is zero."""
    if delta is None or delta.shape[1:] != x.shape[1:]:
        return torch.zeros_like(x)
    delta = delta.to(x)
    return delta if len(delta) >= len(x) else torch.cat([delta, torch.zeros_like(x[len(delta) :])])
