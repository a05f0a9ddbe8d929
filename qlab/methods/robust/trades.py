r"""TRADES: accuracy on what is there, and an answer that cannot be moved.

    min_w  E [ loss(f(x), y) + beta max_{x' in B(x)} KL(p(x) || p(x')) ],      p = softmax(f)

    x'_0     = x + 0.001 n,  n ~ N(0, 1)                  at x itself the gradient of the divergence is zero
    x'_{t+1} = P(x'_t + eta sign(grad_x' KL(p(x) || p(x'_t))))
    step on    objective(x, y) + beta / N sum KL(p(x) || p(x'_T))

The gradient flows through both p(x) and p(x'). beta trades clean accuracy for robustness. The objective is the method's own;
the divergence is of the logits of its training-time net. It has no bound, and large logits make it large: nets with binary weights
whose logits are plain sums start with a deviation of 7 where the float net has 0.4 (digits, two hidden layers of 128), and with
beta 6 they end in one answer for all inputs. Give such a net `final_norm=True`, or a smaller beta.

Batch norm of the inner attack is in eval mode, as in the authors' code; both passes of the outer step are in train mode and move
the running statistics. Deviations: the authors pass x through the net a second time for the divergence, here the logits of the
objective serve; only batch norm and dropout are put in eval mode, not quantizers.

Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019,
arXiv 1901.08573, and its public code. CIFAR-10: eps 0.031, T = 10, eta 0.007, beta 6 (1 for more accuracy); MNIST: eps 0.3,
T = 40, eta 0.01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.errors import InputError
from qlab.methods.robust.base import RobustTraining, Statistics, ascend, aside
from qlab.methods.teacher import features

if TYPE_CHECKING:
    from qlab.methods.base import Method

__all__ = ["TRADES", "divergence"]


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """Return sum_n KL(softmax(clean_n) || softmax(moved_n)) of logits (N, d) each; differentiable in both."""
    return F.kl_div(F.log_softmax(moved, 1), F.log_softmax(clean, 1), reduction="sum", log_target=True)


@dataclass(frozen=True, kw_only=True)
class TRADES(RobustTraining):
    """TRADES.

    Args:
        beta: weight of the divergence.
        steps: T of the inner attack.
        eta: length of a step, in the units of the data set; None is eps / 4.
        start: deviation of the Gaussian start, in the units of the data set.
        batch_norm: by which statistics batch norm works in the inner attack: of the "batch", or the "running" ones.

    Raises:
        InputError: for a setting out of range.
    """

    beta: float = 6.0
    steps: int = 10
    eta: float | None = None
    start: float = 1e-3
    batch_norm: Statistics = "running"

    name: ClassVar[str] = "trades"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps")
        for setting in ("beta", "start") if self.eta is None else ("beta", "start", "eta"):
            self._check(setting, 0, math.inf)
        if self.batch_norm not in get_args(Statistics):
            raise InputError(f"batch_norm of {self.name} must be 'batch' or 'running', not {self.batch_norm!r}")

    def adversarial(self, method: Method, x: Tensor) -> Tensor:
        """Return x'_T, (N, ...)."""
        units = method.units.to(x)
        n = torch.randn(x.shape, generator=self.noise(method), dtype=x.dtype).to(x.device)
        eta = (self.eps / 4 if self.eta is None else self.eta) / units.std
        with aside(method.net, self.batch_norm):
            with torch.no_grad():
                clean = method.net(x)
            return ascend(
                x + self.start / units.std * n,
                lambda at: divergence(clean, method.net(at)),
                self.steps,
                eta,
                units.box(x, self.eps),
            )

    def objective(self, method: Method, x: Tensor, y: Tensor) -> Tensor:
        """Return the method's objective at x, plus beta times the mean divergence at x'_T."""
        moved = self.adversarial(method, x)
        with features(method.net, [""]) as found:  # the logits that the objective computes
            total = method.objective(x, y)
        return total + self.beta / len(x) * divergence(found[""], method.net(moved))
