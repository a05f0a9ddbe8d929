r"""Curvature of the loss over the weights, and why a quantized net's own loss has none.

    H v = d/dw (grad L(w) . v)           one pass through the gradient's graph, many v at once
    top eigenvalues                      block Lanczos, signed, by magnitude
    trace   tr H = tr Q'HQ + E[v' PHP v]  v of random signs (Hutchinson), P = I - QQ', with the standard error of the second term
    density                              Lanczos quadrature; see `qlab.diagnose.lanczos`
    SAM sharpness   L(w + rho g/||g||) - L(w)
    ball sharpness  max_{||e|| <= rho} L(w + e) - L(w), from below, by projected ascent

The deployed loss is piecewise constant in every weight that is quantized or has a quantized activation behind it: its Hessian is
zero almost everywhere. What automatic differentiation of a straight-through net returns is the derivative of a backward rule
evaluated along forward values that do not belong to it, the Hessian of no function. `curvature` refuses both (`hessian.py`). Three
questions that have an answer:

    function="smoothed", "surrogate"     the Hessian of a function that exists; see `qlab.diagnose.functions`
    `qlab.diagnose.discrete.stein`       curvature of the loss averaged over a Gaussian, from losses alone
    `qlab.diagnose.discrete.flip_pairs`  second differences over signs of weights

Source: Pearlmutter 1994 (H v); Hutchinson 1990, with Q from a sketch H S as in Hutch++, Meyer et al., arXiv 2010.09649; Yao et al.,
PyHessian, arXiv 1912.07145; Foret et al., SAM, arXiv 2010.01412; Keskar et al., arXiv 1609.04836 (the ball).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.data.seeding import generator
from qlab.diagnose.base import Result
from qlab.diagnose.functions import FUNCTIONS, FunctionName
from qlab.diagnose.hessian import Hessian, constant_weights, differentiable
from qlab.diagnose.lanczos import block_lanczos, density, lanczos, quadrature, width
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Curvature", "Hessian", "constant_weights", "curvature", "curving"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curvature(Result):
    """Curvature at one point; see the module docstring. What has not been computed yet is NaN or empty.

    Attributes:
        function: whose curvature it is: a name of `FUNCTIONS`, or "the net" where it has no quantizers.
        loss: L(w).
        parameters: n, the numbers that were varied.
        examples: N.
        eigenvalues: (k,) of largest magnitude, signed.
        residuals: (k,) ||H v - lambda v||.
        converged: whether the eigenvalues met the tolerance.
        gradient_norm: ||grad L||.
        trace: Hutchinson's estimate of tr H.
        trace_error: its standard error.
        nodes: (R, m) of the spectral density.
        weights: (R, m).
        sigma2: variance of the density's Gaussians.
        rho: radius of both sharpnesses.
        sam: L(w + rho g/||g||) - L(w).
        ball: the largest rise found within the ball.
        k: sharpness of the tanh steps; NaN unless smoothed.
        products: Hessian-vector products taken in all.
    """

    function: str
    loss: float
    parameters: int
    examples: int
    eigenvalues: Floats
    residuals: Floats
    converged: bool
    gradient_norm: float
    trace: float
    trace_error: float
    nodes: Floats
    weights: Floats
    sigma2: float
    rho: float
    sam: float
    ball: float
    k: float
    products: int

    def density(self, t: Floats) -> Floats:
        """Return the spectral density, which integrates to 1, at every t."""
        at = torch.as_tensor(t, dtype=torch.float64)
        return density(torch.from_numpy(self.nodes), torch.from_numpy(self.weights), at, self.sigma2).numpy()

    def moment(self, power: int) -> float:
        """Return the estimate of tr H^power / n from the density's nodes."""
        return float((self.weights * self.nodes**power).sum(1).mean())

    def frame(self) -> pd.DataFrame:
        """Return one row per number: quantity, index, value, error (the residual or the standard error; NaN where none)."""
        import pandas as pd

        rows: list[tuple[str, int, float, float]] = [
            ("eigenvalue", i, float(v), float(e))
            for i, (v, e) in enumerate(zip(self.eigenvalues, self.residuals, strict=True))
        ]
        for name, value, error in (
            ("trace", self.trace, self.trace_error),
            ("SAM sharpness", self.sam, math.nan),
            ("ball sharpness", self.ball, math.nan),
            ("gradient norm", self.gradient_norm, math.nan),
            ("loss", self.loss, math.nan),
        ):
            rows.append((name, 0, value, error))
        return pd.DataFrame(rows, columns=["quantity", "index", "value", "error"]).assign(function=self.function)

    def figure(self) -> Figure:
        """Return the spectral density on a log axis, with the top eigenvalues."""
        from qlab.plots.curvature import curvature_figure

        return curvature_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        which = f"the {self.function} function" if self.function in FUNCTIONS else "the net (no quantizers)"
        if self.function == "smoothed":
            which += f" (tanh steps of sharpness {self.k:g})"
        text = f"Curvature of {which}, {self.parameters:,} weights, {self.examples} examples, loss {self.loss:.4g}."
        if self.eigenvalues.size:
            values = ", ".join(f"{v:.4g}" for v in self.eigenvalues)
            text += f" Largest eigenvalues by magnitude: {values}{'' if self.converged else ' (not converged)'}."
        if math.isfinite(self.trace):
            text += f" Trace {self.trace:.4g} ± {self.trace_error:.2g} (standard error)."
        if self.nodes.size:
            negative = float(self.weights[self.nodes < 0].sum() / len(self.nodes))
            text += f" {negative:.0%} of the spectrum's mass is below zero."
        if math.isfinite(self.sam):
            text += (
                f" One step of length {self.rho:g} along the gradient raises the loss by {self.sam:.4g}; "
                f"the worst point found in the ball of that radius, by {self.ball:.4g}."
            )
        return text


def curvature(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    function: FunctionName | None = None,
    top: int = 3,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    names: Sequence[str] | None = None,
    k: float = 5.0,
    probes: int = 64,
    runs: int = 4,
    steps: int = 60,
    sigma2: float | None = None,
    rho: float = 0.05,
    tolerance: float = 1e-3,
    iterations: int = 100,
    seed: int = 0,
) -> Curvature:
    """Return eigenvalues, trace, spectral density and sharpness of the mean loss over the weights.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        function: a name of `FUNCTIONS`; by default the net as it is.
        top: eigenvalues wanted; 0 for none.
        loss: a name of `qlab.diagnose.objective.LOSSES`, or logits and labels to one loss per example.
        beta: factor on the logits.
        names: parameters to vary; all by default.
        k: sharpness of "smoothed".
        probes: products for the trace, a third each for sketch, its trace and the rest; 0 for none.
        runs: starts of the spectral density; 0 for none.
        steps: of Lanczos in each.
        sigma2: variance of the density's Gaussians; 1e-5 max(1, range) by default.
        rho: radius of the sharpness; 0 for none.
        tolerance: relative change at which the eigenvalues count as found.
        iterations: of block Lanczos, at most.
        seed: of all starts.

    Raises:
        InputError: a function that is piecewise constant in the weights; a loss or Hessian that is not finite; see also `check`.
        UnknownNameError: no such function, loss or parameter.
    """
    return last(curving(
        net, x, y, function, top, loss=loss, beta=beta, names=names, k=k, probes=probes, runs=runs, steps=steps,
        sigma2=sigma2, rho=rho, tolerance=tolerance, iterations=iterations, seed=seed,
    ), Curvature)  # fmt: skip


def curving(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    function: FunctionName | None = None,
    top: int = 3,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    names: Sequence[str] | None = None,
    k: float = 5.0,
    probes: int = 64,
    runs: int = 4,
    steps: int = 60,
    sigma2: float | None = None,
    rho: float = 0.05,
    tolerance: float = 1e-3,
    iterations: int = 100,
    seed: int = 0,
) -> Generator[Update, None, None]:
    """Yield what `curvature` returns, one part after the other; the arguments are the same."""
    if min(top, probes, runs, steps, iterations) < 0 or not (math.isfinite(rho) and rho >= 0):
        raise InputError("top, probes, runs, steps, iterations and rho must not be negative")
    J, label = differentiable(net, x, y, function, loss, beta, names, k)
    chosen = J.theta if names is None else {name: J.theta[name] for name in names}
    H = Hessian(J.at, chosen, chunk=min(J.chunk, 8))
    value = float(J.at(chosen))
    if not (math.isfinite(value) and bool(H.gradient.isfinite().all())):
        raise InputError(f"the loss ({value}) or its gradient is not finite; lower beta, or look for diverged weights")
    nothing = np.zeros((0, 0))
    nan = math.nan
    part = Curvature(
        label, value, H.n, len(x), nothing[0:0].reshape(-1), nothing[0:0].reshape(-1), True, float(H.gradient.norm()), nan, nan,
        nothing, nothing, nan, rho, nan, nan, k if label == "smoothed" else nan, 0,
    )  # fmt: skip
    yield Update(0.05, "gradient", part)
    w = H.gradient
    directions = w.new_zeros(0, H.n)
    if top:
        start = torch.randn(min(top, H.n), H.n, generator=generator("eigenvalues", seed), dtype=torch.float32).to(w)
        found = block_lanczos(H.products, start, tolerance, max(iterations, 1))
        _finite(found.values)
        directions = found.vectors
        part = replace(
            part,
            eigenvalues=_numpy(found.values),
            residuals=_numpy(found.residuals),
            converged=found.converged,
            products=H.products_done,
        )
        yield Update(0.35, "largest eigenvalues", part)
    if probes:
        trace, error = _trace(H, probes, seed)
        part = replace(part, trace=trace, trace_error=error, products=H.products_done)
        yield Update(0.55, "trace", part)
    if runs and steps:
        V = _signs(runs, H.n, generator("density", seed)).to(w)
        nodes, weights = quadrature(*lanczos(H.products, V, steps))
        _finite(nodes)
        part = replace(
            part,
            nodes=_numpy(nodes),
            weights=_numpy(weights),
            sigma2=width(nodes, sigma2),
            products=H.products_done,
        )
        yield Update(0.85, "spectral density", part)
    if rho:
        sam, ball = _sharpness(J, H, value, rho, directions, seed)
        part = replace(part, sam=sam, ball=ball)
    yield Update(1.0, "done", part)


def _trace(H: Hessian, probes: int, seed: int) -> tuple[float, float]:
    """Return tr H and its standard error from `probes` products; below six, plain Hutchinson."""
    S = _signs(probes, H.n, generator("trace", seed)).to(H.gradient)
    s = min(probes // 3, H.n) if probes >= 6 else 0
    known, Q = 0.0, S[:0]
    if s:
        HS = H.products(S[:s])
        _finite(HS)
        Q = torch.linalg.qr(HS.T).Q.T
        known = float((H.products(Q) * Q).sum(1).double().sum())
    V = S[s : probes - s]
    V = V - (V @ Q.T) @ Q
    rest = torch.cat([(H.products(v) * v).sum(1) for v in V.split(H.chunk)]).double()
    _finite(rest)
    return known + float(rest.mean()), float(rest.std() / math.sqrt(len(rest))) if len(rest) > 1 else math.nan


def _sharpness(
    J: Objective, H: Hessian, value: float, rho: float, directions: Tensor, seed: int, steps: int = 30, starts: int = 2
) -> tuple[float, float]:
    """Return the rise of the loss after SAM's step and the largest one found in the ball by projected ascent."""
    g = H.gradient
    norm = float(g.norm())
    theta = H.flat(H.theta, 0)
    random = torch.randn(starts, H.n, generator=generator("ball", seed), dtype=torch.float64).to(g)
    E = torch.cat([g[None], directions, -directions, random])
    E = rho * E / E.norm(dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    both = torch.func.grad_and_value(H.f)

    def at(E: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            grads, values = torch.func.vmap(both, chunk_size=H.chunk)(H.tree(theta + E))
        return H.flat(grads, 1), values

    grads, values = at(E)
    sam = float(values[0]) - value if norm > 0 else 0.0
    best = max(value, float(values.nan_to_num(-math.inf, math.inf, -math.inf).max()))
    for t in range(steps):
        length = rho * (1 - t / steps)
        E = E + length * grads / grads.norm(dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        size = E.norm(dim=1, keepdim=True)
        E = torch.where(size > rho, E * (rho / size.clamp(min=torch.finfo(g.dtype).tiny)), E)
        grads, values = at(E)
        best = max(best, float(values.nan_to_num(-math.inf, math.inf, -math.inf).max()))
    return sam, best - value


def _signs(count: int, n: int, g: torch.Generator) -> Tensor:
    eights = torch.randint(0, 256, (count, -(-n // 8), 1), generator=g, dtype=torch.uint8)  # eight signs a draw
    bits = (eights >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :n].to(torch.int8) * 2 - 1


def _numpy(t: Tensor) -> Floats:
    return t.detach().double().cpu().numpy()


def _finite(t: Tensor) -> None:
    if not bool(t.isfinite().all()):
        raise InputError("the Hessian is not finite at these weights; lower beta, or look for diverged weights")
