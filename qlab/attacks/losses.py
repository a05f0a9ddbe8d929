r"""What an attack maximises: functions of logits z (n, d) and labels y (n,), one number for each example (n,).

    ce             -log softmax(z)_y                                         saturates where z_y is far ahead
    margin         max_{i != y} z_i - z_y                                    > 0 misclassified, < 0 not, 0 a tie
    dlr            -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12)       d >= 3; invariant to shift and scale
    targeted_dlr   -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)      d >= 4

z_(1) >= z_(2) >= ... are the sorted logits. DLR is in [-1, 0] where the example is classified correctly. Where y ranks third it is
1 with a zero gradient: harmless, the example is misclassified already. The integer logits of binary nets tie often: where
z_(1) = z_(3) the quotient explodes, and DLR is an unfit loss.

With fewer classes than DLR needs, the margin takes its place (`fitting`).

Source: Carlini, Wagner 2017, arXiv 1608.04644 (margin); Croce, Hein 2020, arXiv 2003.01690 (DLR).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.diagnose.objective import margin
from qlab.errors import UnknownNameError

__all__ = ["LOSSES", "Loss", "ce", "dlr", "fitting", "margin", "targeted_dlr", "targeted_margin"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, d) and labels (n,) to one loss for each example (n,)."""

TINY = 1e-12


def _tiny(z: Tensor) -> float:
    """Return what keeps a denominator from zero in the dtype of logits: 1e-12 is zero in float16."""
    return max(TINY, torch.finfo(z.dtype).tiny)


def ce(z: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(z)_y, (n,); the row maximum is taken off first, so a shift of the logits changes nothing."""
    return F.cross_entropy(z - z.detach().amax(-1, keepdim=True), y, reduction="none")


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio, (n,)."""
    top = z.sort(-1, descending=True).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + _tiny(z))


def targeted_dlr(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio towards classes t (n,), (n,)."""
    top = z.sort(-1, descending=True).values
    return targeted_margin(z, y, t) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _tiny(z))


def targeted_margin(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Return z_t - z_y, (n,)."""
    return (z.gather(1, t[:, None]) - z.gather(1, y[:, None]))[:, 0]


LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr}


def fitting(loss: str | Loss, classes: int) -> Loss:
    """Return a loss by name, the margin in place of DLR where there are fewer than three classes; a function as it is.

    Raises:
        UnknownNameError: no such loss.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    return margin if loss == "dlr" and classes < 3 else LOSSES[loss]


def misclassified(z: Tensor, y: Tensor) -> Tensor:
    """Return whether the label is not the class that the net decides for, (n,): `argmax`, so the first of equal logits wins."""
    return z.argmax(-1) != y


def nearest_classes(z: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the `count` classes of largest logits that are not y, (n, count), in falling order."""
    own = F.one_hot(y, z.shape[-1]).bool()
    return z.masked_fill(own, -torch.inf).topk(min(count, z.shape[-1] - 1), dim=-1).indices
