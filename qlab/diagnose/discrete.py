r"""Curvature without derivatives, of nets whose loss is a staircase: Gaussian-smoothed, and over flips of signs.

    stein   v' H_s v = E[((u . v)^2 - ||v||^2) L(w + s u)] / s^2,  u ~ N(0, I): the Hessian of L_s(w) = E L(w + s u)
    flips   c_ij = L(flip i, j) - L(flip i) - L(flip j) + L,  which is 4 b_i b_j A_ij for L = b'Ab/2 + c'b

Both look at the deployed function as it is; they need losses only.

Source: Stein 1981, applied twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.diagnose.base import Result
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.apply import quantized_tensors

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["FlipPairs", "Stein", "flip_pairs", "stein"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stein(Result):
    """v' H_s v of the Gaussian-smoothed loss of the net as it is, for some directions.

    Attributes:
        values: (K,) estimates.
        errors: (K,) standard errors.
        s: standard deviation of the Gaussian, the same for every weight.
        pairs: antithetic pairs drawn.
        loss: L(w) without smoothing.
    """

    values: Floats
    errors: Floats
    s: float
    pairs: int
    loss: float

    def frame(self) -> pd.DataFrame:
        """Return one row per direction: value and standard error."""
        import pandas as pd

        return pd.DataFrame({"direction": range(len(self.values)), "value": self.values, "error": self.errors})

    def figure(self) -> Figure:
        """Return the curvature along each direction, with two standard errors."""
        from qlab.plots.curvature import stein_figure

        return stein_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        each = ", ".join(f"{v:.3g} ± {e:.1g}" for v, e in zip(self.values[:6], self.errors[:6], strict=True))
        return (
            f"Curvature of the deployed function's loss, averaged over a Gaussian of width {self.s:g} around the weights "
            f"({self.pairs} antithetic pairs): {each} along {len(self.values)} directions (± standard error)."
        )


def stein(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    directions: Mapping[str, Tensor],
    s: float = 0.1,
    pairs: int = 256,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seed: int = 0,
) -> Stein:
    r"""Return v' H_s v, the curvature of the smoothed loss L_s(w) = E L(w + s u), u ~ N(0, I), along directions v.

    v' H_s v = E[((u . v)^2 - ||v||^2) (L(w + s u) + L(w - s u) - 2 L(w)) / 2] / s^2

    The middle term has mean zero and takes most of the variance away. Only the tensors named are smoothed over. It needs no
    derivative, so it answers for a deployed net; its error grows like 1/s^2.

    Args:
        net: a method or torch module, in eval mode; hard quantizers are evaluated as they are.
        x: (N, ...) inputs.
        y: (N,) labels.
        directions: name -> (K, *shape).
        s: width of the Gaussian.
        pairs: antithetic pairs of perturbations.
        loss: as in `curvature`.
        beta: factor on the logits.
        seed: of the perturbations.

    Raises:
        InputError: s or pairs that are not positive, directions of the wrong shape; see also `check`.
        UnknownNameError: no such parameter.

    Source: Stein 1981, applied twice.
    """
    if not (math.isfinite(s) and s > 0) or pairs < 2:
        raise InputError(f"s must be a positive number and pairs at least 2; got {s!r} and {pairs!r}")
    J = Objective(net, x, y, loss, beta)
    checked = J._checked(directions)
    theta = {name: J.theta[name] for name in checked}
    K = {len(v) for v in checked.values()}
    if len(K) != 1:
        raise InputError(f"every tensor needs as many directions as the others; got {sorted(K)}")
    flat = torch.cat([checked[name].flatten(1) for name in theta], 1).double()
    middle = float(J.at(theta))
    g = generator("stein", seed)
    total = torch.zeros(pairs, flat.shape[0], dtype=torch.float64, device=flat.device)
    batch = max(1, min(64, J.chunk))
    for low in range(0, pairs, batch):
        m = min(batch, pairs - low)
        u = {name: torch.randn(m, *w.shape, generator=g, dtype=torch.float64).to(w) for name, w in theta.items()}
        both = {name: torch.cat([w + s * u[name], w - s * u[name]]) for name, w in theta.items()}
        values = J.losses(both).double()
        along = torch.cat([u[name].flatten(1) for name in theta], 1).double() @ flat.T
        second = (values[:m] + values[m:] - 2 * middle) / 2
        total[low : low + m] = (along.square() - flat.square().sum(1)) * second[:, None] / s**2
    return Stein(_numpy(total.mean(0)), _numpy(total.std(0) / math.sqrt(pairs)), float(s), pairs, middle)


@dataclass(frozen=True)
class FlipPairs(Result):
    """Discrete first and second differences of the loss over signs of weights, of the net as it is.

    Attributes:
        name: the parameter.
        indices: (K,) flat indices of the weights.
        first: (K,) L(flip i) - L.
        second: (K, K) c_ij; on the diagonal, where two flips undo each other, -2 first_i.
        loss: L.
    """

    name: str
    indices: NDArray[np.int64]
    first: Floats
    second: Floats
    loss: float

    def frame(self) -> pd.DataFrame:
        """Return one row per pair i < j: i, j, first_i, first_j, c_ij."""
        import pandas as pd

        i, j = np.triu_indices(len(self.indices), 1)
        return pd.DataFrame(
            {
                "i": self.indices[i],
                "j": self.indices[j],
                "first_i": self.first[i],
                "first_j": self.first[j],
                "second": self.second[i, j],
            }
        )

    def figure(self) -> Figure:
        """Return the matrix of second differences."""
        from qlab.plots.curvature import flip_pairs_figure

        return flip_pairs_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        table = self.frame()
        inter = float(table["second"].abs().median()) if len(table) else math.nan
        return (
            f"Discrete curvature of the deployed function over {len(self.indices)} signs of {self.name}: one flip changes the loss "
            f"of {self.loss:.4g} by {np.median(np.abs(self.first)):.3g} (median magnitude), and two flips differ from the sum of "
            f"both by {inter:.3g}."
        )


def flip_pairs(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    indices: Sequence[int] | None = None,
    count: int = 16,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seed: int = 0,
) -> FlipPairs:
    """Return c_ij = L(flip i, j) - L(flip i) - L(flip j) + L over the signs of some weights of one tensor.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        name: a parameter, or the layer whose weight is quantized.
        indices: flat indices into it; by default `count` random ones.
        count: see `indices`.
        loss: as in `curvature`.
        beta: factor on the logits.
        seed: of the random indices.

    Raises:
        InputError: indices that are not distinct or not in range; see also `check`.
        UnknownNameError: no such parameter.
    """
    J = Objective(net, x, y, loss, beta)
    by_layer = {t.name: n for t in quantized_tensors(J.net) for n, p in J.net.named_parameters() if p is t.latent}
    name = by_layer.get(name, name)
    if name not in J.theta:
        raise UnknownNameError("parameter", name, [*J.theta, *by_layer])
    w = J.theta[name]
    if indices is None:
        chosen = torch.randperm(w.numel(), generator=generator("flips", seed))[: max(count, 0)].sort().values
    else:
        chosen = torch.tensor(list(indices), dtype=torch.int64)
    if (
        not len(chosen)
        or len(chosen.unique()) != len(chosen)
        or int(chosen.min()) < 0
        or int(chosen.max()) >= w.numel()
    ):
        raise InputError(f"indices must be distinct and from 0 to {w.numel() - 1}; got {chosen.tolist()[:8]}")
    flat = w.flatten()
    flipped = torch.where(flat == 0, -torch.ones_like(flat), -flat)  # a latent weight of 0 counts as +1
    K = len(chosen)
    i, j = torch.triu_indices(K, K)  # with i = j: one flip
    values = torch.empty(len(i), dtype=torch.float64)
    batch = max(1, min(256, J.chunk))
    for low in range(0, len(i), batch):
        a, b = chosen[i[low : low + batch]], chosen[j[low : low + batch]]
        stack = flat.repeat(len(a), 1)
        rows = torch.arange(len(a))
        stack[rows, a], stack[rows, b] = flipped[a], flipped[b]
        values[low : low + batch] = J.losses({name: stack.reshape(-1, *w.shape)}).double().cpu()
    here = float(J.at({name: w}))
    both = torch.zeros(K, K, dtype=torch.float64)
    both[i, j] = both[j, i] = values
    single = both.diagonal().clone()
    second = both - single[:, None] - single[None] + here
    second.fill_diagonal_(0)
    second += torch.diag(2 * (here - single))
    return FlipPairs(name, chosen.numpy(), _numpy(single - here), _numpy(second), here)


def _numpy(t: Tensor) -> Floats:
    return t.detach().double().cpu().numpy()
