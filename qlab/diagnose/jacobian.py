r"""Singular values of the Jacobian of one layer with respect to another, per example.

    J = d h_target / d h_source in R^{d x D},    singular values mu_1 >= ... >= mu_r, r = min(d, D)
    beta1 = 1 / mean(mu)         network Jacobian scaling: after it the mean singular value is 1

A gradient that is sent back is multiplied by J'; it keeps its length in every direction where all mu are 1 (dynamical isometry).
A +-1 matrix of d rows and n >> d columns has them all near sqrt(n): within sqrt(n) (1 +- sqrt(d / n)) for large n, so the logits
of a net whose last layer is binary grow by that factor, and its softmax saturates.

Through sign activations J is the product of the declared backward rules, not the derivative of the deployed function, which is 0.

Shapes: values (N, r), one row per example. Exactly: d backward passes at once and svdvals; where J is too big, Golub-Kahan
bidiagonalisation from products J v and J' u, where J v is the derivative of u -> (J' u) . v.

Source: Saxe et al. 2014, arXiv 1312.6120; Pennington et al. 2017, arXiv 1711.04735; Gupta, Ajanthan, arXiv 2003.13511 (beta1);
Golub, Kahan 1965; Marchenko, Pastur 1967.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.diagnose.base import Result, check
from qlab.diagnose.lanczos import golub_kahan
from qlab.diagnose.recording import INPUT, Recorded, record, surrogate_steps
from qlab.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Jacobian", "jacobian", "sign_matrix_bounds"]

Floats = NDArray[np.float64]
LOGITS = "logits"


def sign_matrix_bounds(n: int, d: int) -> tuple[float, float]:
    """Return the edges sqrt(n) (1 -+ sqrt(d / n)) between which all singular values of a random +-1 matrix (d x n) fall.

    For n and d large at d / n fixed; fluctuations beyond them are of order n^{-1/6}.
    """
    if n < 1 or d < 1:
        raise InputError(f"a matrix needs at least one row and column, not {d} x {n}")
    return math.sqrt(n) * abs(1 - math.sqrt(d / n)), math.sqrt(n) * (1 + math.sqrt(d / n))


@dataclass(frozen=True)
class Jacobian(Result):
    """Singular values of the Jacobian of one layer with respect to some others; see the module docstring.

    Attributes:
        sources: (S,) layers that are differentiated by; "input" is the input.
        target: the layer that is differentiated; "logits" is the output.
        values: S arrays (N, r) of singular values, descending; the largest only where not `complete`.
        sizes: (d, D) for every source.
        complete: (S,) whether all singular values are there.
        exact: (S,) whether no backward rule of a quantized activation lies between.
    """

    sources: tuple[str, ...]
    target: str
    values: tuple[Floats, ...]
    sizes: tuple[tuple[int, int], ...]
    complete: tuple[bool, ...]
    exact: tuple[bool, ...]

    @property
    def mean(self) -> Floats:
        """Mean singular value over examples, (S,); of the largest ones only where not `complete`."""
        return np.array([v.mean() for v in self.values])

    @property
    def std(self) -> Floats:
        """Standard deviation of singular values over examples and directions, (S,); of those that are there."""
        return np.array([v.std() for v in self.values])

    @property
    def condition(self) -> tuple[Floats, ...]:
        """Largest over smallest singular value of each example, (N,) for every source; infinite for a singular Jacobian."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return tuple(np.where(v[:, 0] > 0, v[:, 0] / v[:, -1], np.inf) for v in self.values)

    @property
    def beta1(self) -> float:
        """Factor on the logits at which the mean value of the first source's Jacobian is 1; NaN where not all are known."""
        if not self.complete[0]:
            return math.nan
        mean = float(self.mean[0])
        return 1 / mean if mean > 0 else math.inf

    @property
    def isometry(self) -> Floats:
        """Root mean square of log(mu / mean mu), (S,): 0 where J keeps all directions' lengths up to one factor."""
        out = []
        for v in self.values:
            with np.errstate(divide="ignore"):
                logs = np.log(v)
            out.append(float(np.sqrt(np.mean((logs - np.log(v.mean())) ** 2))) if v.mean() > 0 else math.inf)
        return np.array(out)

    def frame(self) -> pd.DataFrame:
        """Return one row per source: sizes, mean, std, extremes, median condition number, distance from isometry."""
        import pandas as pd

        return pd.DataFrame(
            {
                "source": self.sources,
                "target": self.target,
                "rows": [d for d, _ in self.sizes],
                "columns": [D for _, D in self.sizes],
                "mean": self.mean,
                "std": self.std,
                "largest": [v.max() for v in self.values],
                "smallest": [v.min() if all_ else math.nan for v, all_ in zip(self.values, self.complete, strict=True)],
                "condition": [
                    float(np.median(c)) if all_ else math.nan
                    for c, all_ in zip(self.condition, self.complete, strict=True)
                ],
                "isometry": self.isometry,
                "exact": self.exact,
            }
        )

    def figure(self) -> Figure:
        """Return the singular values per source on a log axis."""
        from qlab.plots.signal import jacobian_figure

        return jacobian_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        which = (
            "exact derivatives"
            if self.exact[0]
            else "surrogate derivatives: the backward rules of quantized activations"
        )
        d, D = self.sizes[0]
        values = self.values[0]
        which_ones = "singular value" if self.complete[0] else f"of the {values.shape[1]} largest singular values"
        text = (
            f"Jacobian of {self.target} by {self.sources[0]} ({d} x {D}, {len(values)} examples; {which}): mean {which_ones} "
            f"{values.mean():.3g}, standard deviation {values.std():.3g}, largest {values.max():.3g}"
        )
        if self.complete[0]:
            condition = float(np.median(self.condition[0]))
            text += f", smallest {values.min():.3g}, median condition number {condition:.3g}"
            text += f". A factor of {self.beta1:.3g} on {self.target} makes the mean 1"
        text += "."
        if len(self.sources) > 1:
            text += (
                " Means by layer: "
                + ", ".join(f"{s} {m:.3g}" for s, m in zip(self.sources, self.mean, strict=True))
                + "."
            )
        return text


def jacobian(
    net: nn.Module,
    x: Tensor,
    sources: Sequence[str] | Literal["all"] = (INPUT,),
    target: str = LOGITS,
    *,
    method: Literal["auto", "exact", "lanczos"] = "auto",
    top: int = 10,
    memory: int = 256 * 2**20,
    seed: int = 0,
) -> Jacobian:
    """Return singular values of d target / d source for every example.

    Args:
        net: a method or torch module, in eval mode; examples must not see each other.
        x: (N, ...) inputs.
        sources: names of modules, or "input"; "all" for all that run before the target.
        target: name of a module, or "logits".
        method: "exact" for whole Jacobians and svdvals, "lanczos" for the largest `top` values from products; "auto" takes
            exact where the Jacobians fit the memory.
        top: singular values that "lanczos" gives; it takes twice as many steps, and finds all where these reach min(d, D).
        memory: bytes for the Jacobians.
        seed: of the start vectors.

    Raises:
        InputError: a source that does not run before the target; see also `check`.
        UnknownNameError: no such module.
    """
    net, _ = check(net, x, None, labels=False)
    if method not in ("auto", "exact", "lanczos"):
        raise UnknownNameError("method", method, ("auto", "exact", "lanczos"))
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    run = record(net, x)
    out, end = (run.z, len(run.names)) if target == LOGITS else (None, 0)
    if out is None:
        end = _index(run, target)
        out = run.outputs[end]
    wanted = list(run.names[:end] if target != LOGITS else run.names) if sources == "all" else list(sources)
    at = [_index(run, name) for name in wanted]
    for name, i in zip(wanted, at, strict=True):
        if i >= end:
            raise InputError(f"{name!r} does not run before {target!r}; its Jacobian would be the identity or nothing")
    if not at:
        raise InputError("name at least one source")
    N, d = len(x), out[0].numel()
    sizes = tuple((d, run.outputs[i][0].numel()) for i in at)
    hs = [run.outputs[i] for i in at]
    need = N * d * sum(D for _, D in sizes) * x.element_size()
    if method == "exact" or (method == "auto" and need <= memory):
        values = _exact(out, hs)
        complete = [True] * len(at)
    else:
        values, complete = [], []
        for h, (_, D) in zip(hs, sizes, strict=True):
            steps = min(2 * top, d, D)
            start = torch.randn(N, d, generator=generator("jacobian", seed), dtype=torch.float64).to(h)
            found = _lanczos(out, h, start, steps)
            complete.append(steps == min(d, D))
            values.append(found if complete[-1] else found[:, :top])
    rules = surrogate_steps(net, x, run)
    stop = len(rules) if target == LOGITS else end + 1
    return Jacobian(
        sources=tuple(wanted),
        target=target,
        values=tuple(v.double().cpu().numpy() for v in values),
        sizes=sizes,
        complete=tuple(complete),
        exact=tuple(not any(rules[i + 1 : stop]) for i in at),
    )


def _index(run: Recorded, name: str) -> int:
    if name not in run.names:
        raise UnknownNameError("module that runs in this net", name, run.names)
    return run.names.index(name)


def _exact(out: Tensor, hs: list[Tensor]) -> list[Tensor]:
    """Return singular values (N, r) of d out / d h for every h: d backward passes at once."""
    N, d = len(out), out[0].numel()
    if not out.requires_grad:
        return [h.new_zeros(N, min(d, h[0].numel())) for h in hs]
    eye = torch.eye(d, dtype=out.dtype, device=out.device).reshape(d, 1, *out.shape[1:]).expand(d, *out.shape)
    rows = torch.autograd.grad(out, hs, eye, is_grads_batched=True, allow_unused=True, retain_graph=True)
    values = []
    for h, J in zip(hs, rows, strict=True):
        if J is None:
            values.append(h.new_zeros(N, min(d, h[0].numel())))
            continue
        J = J.flatten(2).transpose(0, 1)
        values.append(torch.linalg.svdvals(J if J.dtype == torch.float64 else J.float()))
    return values


def _lanczos(out: Tensor, h: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return singular values (N, steps) of d out / d h from products."""
    u = torch.zeros_like(out, requires_grad=True)
    back = None
    if out.requires_grad:
        (back,) = torch.autograd.grad(out, h, u, create_graph=True, allow_unused=True)
    if back is None or not back.requires_grad:
        return start.new_zeros(len(start), steps)

    def backward(rows: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(out, h, rows.reshape(out.shape), retain_graph=True)
        return g.flatten(1)

    def forward(rows: Tensor) -> Tensor:
        # J' u is linear in u, so its derivative by u, against v, is J v.
        (g,) = torch.autograd.grad(back, u, rows.reshape(h.shape), retain_graph=True)
        return g.flatten(1)

    return golub_kahan(forward, backward, start, steps)
