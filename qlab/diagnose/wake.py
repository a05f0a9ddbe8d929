r"""At which temperature a gradient wakes up: norms per layer over a grid of factors beta on the logits, from one forward pass.

    l_beta = loss(beta z, y),      ||d l_beta / d h_l|| for all beta and layers l at once

A small beta shrinks the gap of the logits, and cross-entropy's gradient is no longer rounded to 0; see `qlab.diagnose.signal`.

Source: Gupta, Ajanthan, arXiv 2003.13511.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result
from qlab.diagnose.objective import Loss, margin
from qlab.diagnose.recording import layer_gradients, norms_and_zeros, ready, record

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Wake", "wake"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Wake(Result):
    """Gradient norms per layer over temperatures, from one forward pass.

    Attributes:
        betas: (K,) factors on the logits.
        names: (L,) layers, "input" first.
        gradient: (K, L, N) norms by back-propagation.
        lost: (K, L) share of examples whose gradient there is exactly zero.
        certain: (K,) share of examples with p_y == 1.
        gap: (N,) Delta at beta 1.
        dtype: in which all was computed.
        batch: B: gradients are divided by it.
    """

    betas: Floats
    names: tuple[str, ...]
    gradient: Floats
    lost: Floats
    certain: Floats
    gap: Floats
    dtype: torch.dtype
    batch: int

    @property
    def best(self) -> int:
        """Index of the beta with the largest median gradient norm at the input."""
        return int(np.median(self.gradient[:, 0], 1).argmax())

    def log_quartiles(self) -> Floats:
        """Return log10 of the quartiles over examples of the gradient norms, (3, K, L); -inf for 0."""
        with np.errstate(divide="ignore"):
            return np.log10(np.quantile(self.gradient, [0.25, 0.5, 0.75], axis=2))

    def frame(self) -> pd.DataFrame:
        """Return one row per beta and layer: median norm, share of examples with no gradient."""
        import pandas as pd

        K, L = self.lost.shape
        return pd.DataFrame(
            {
                "beta": np.repeat(self.betas, L),
                "layer": list(self.names) * K,
                "gradient": np.median(self.gradient, 2).reshape(-1),
                "zero examples": self.lost.reshape(-1),
            }
        )

    def figure(self) -> Figure:
        """Return input gradients and shares of lost examples against beta."""
        from qlab.plots.signal import wake_figure

        return wake_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        at = int(np.abs(np.log(self.betas)).argmin())
        return (
            f"Back-propagated gradient of the net in {str(self.dtype).removeprefix('torch.')}: at beta {self.betas[at]:.3g} the "
            f"input gradient is exactly zero for {self.lost[at, 0]:.0%} of {self.gap.size} examples and its median norm is "
            f"{np.median(self.gradient[at, 0]):.3g}; it is largest at beta {self.betas[self.best]:.3g}, "
            f"{np.median(self.gradient[self.best, 0]):.3g}, with {self.lost[self.best, 0]:.0%} zero."
        )


def wake(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    betas: Sequence[float] | Floats,
    *,
    loss: str | Loss = "cross_entropy",
    dtype: torch.dtype | None = None,
    batch: int = 1,
) -> Wake:
    """Return gradient norms per layer for a grid of beta: one forward pass, all backward passes at once.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        betas: (K,) positive factors on the logits.
        loss: as in `signal`.
        dtype: as in `signal`.
        batch: as in `signal`.

    Raises:
        InputError: betas that are not positive; see also `check`.
        UnknownNameError: no such loss.
    """
    b = torch.as_tensor(np.asarray(betas, dtype=np.float64).reshape(-1))
    net, x, loss = ready(net, x, y, loss, b.tolist(), dtype, batch)
    run = record(net, x)
    z = run.z.detach()
    with torch.no_grad():
        p = torch.stack([torch.softmax(float(beta) * z, -1).gather(-1, y[:, None])[:, 0] for beta in b])
    # A backward pass keeps a gradient per layer and beta: as many at once as 64 MiB hold.
    size = sum(h.numel() for h in run.outputs) * z.element_size()
    norms, zeros = [], []
    for part in b.split(max(1, 64 * 2**20 // max(1, size))):
        some = norms_and_zeros(layer_gradients(run, y, loss, part, batch))
        norms.append(some[0])
        zeros.append(some[1])
    gradient, lost = np.concatenate(norms, 1), np.concatenate(zeros, 1) == 1
    return Wake(
        betas=b.numpy(),
        names=run.names,
        gradient=gradient.transpose(1, 0, 2),
        lost=lost.mean(2).T,
        certain=(p == 1).double().mean(1).cpu().numpy(),
        gap=-margin(z.double(), y).cpu().numpy(),
        dtype=z.dtype,
        batch=batch,
    )
