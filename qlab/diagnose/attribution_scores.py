r"""Two scores of a map that look at values of the net only, through captum.metrics.

    infidelity      = E_S ( beta sum_{m in S} a_m - [F(x) - F(x with the features S at their baselines)] )^2,
                      S holds each feature with probability 1/2, beta the best scale
    sensitivity_max = max over x' with |x' - x| <= r in every number of || a(x') - a(x) || / || a(x) ||

Low is good for both. beta makes scores of different units comparable.

Source: Yeh et al. 2019, arXiv 1901.09392.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.diagnose.attribution_methods import Problem, values

__all__ = ["infidelity", "sensitivity"]

RADIUS = 0.02  # of the range of the data
NEIGHBOURS = 5


def infidelity(p: Problem, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return captum's normalized infidelity (N,) in the space of features present or absent.

    Args:
        p: the problem.
        scores: (N, M), a score per feature.
    """
    from captum.metrics import infidelity as score

    g = torch.Generator().manual_seed(p.seed)

    def G(present: Tensor, x: Tensor, x0: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            out = p.F(torch.where(present[:, p.groups] > 0.5, x, x0))
        return out[torch.arange(len(out), device=out.device), target]

    def without(present: Tensor) -> tuple[Tensor, Tensor]:
        absent = torch.randint(0, 2, present.shape, generator=g).to(present)
        return absent, present - absent

    present = torch.ones(scores.shape, dtype=p.x.dtype, device=p.x.device)
    found = score(
        G,
        without,
        present,
        torch.as_tensor(scores).to(present),
        additional_forward_args=(p.x, p.x0, p.target),
        n_perturb_samples=4 * p.samples,
        max_examples_per_batch=len(p.x) * min(4 * p.samples, 1 + 512 // len(p.x)),
        normalize=True,
    )
    return found.detach().double().cpu().numpy()


def sensitivity(name: str, p: Problem) -> NDArray[np.float64]:
    """Return captum's sensitivity_max (N,) of a method: how far its map moves within a small box around the input.

    Args:
        name: of the method.
        p: the problem.
    """
    from captum.metrics import sensitivity_max

    g = torch.Generator().manual_seed(p.seed)
    radius = RADIUS * float(p.x.max() - p.x.min())

    def nearby(x: Tensor, radius: float) -> Tensor:
        return x + radius * (2 * torch.rand(x.shape, dtype=x.dtype, generator=g).to(x.device) - 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sensitivity_max(
            lambda x: (values(name, p.at(x if isinstance(x, Tensor) else x[0])),),  # captum gives a tuple at first
            p.x,
            perturb_func=nearby,
            perturb_radius=radius,
            n_perturb_samples=NEIGHBOURS,
            max_examples_per_batch=len(p.x) * min(NEIGHBOURS, 1 + 512 // len(p.x)),
        )
    return found.detach().double().cpu().numpy()
