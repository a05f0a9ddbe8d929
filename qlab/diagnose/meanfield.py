r"""Mean field: what a wide net with random weights does to lengths, to angles and to gradients, in closed form.

    u^l = W^l phi(u^{l-1}) + b^l,     W_ij of mean 0 and variance sigma_w^2 / n, b_i of variance sigma_b^2

For n -> infinity the pre-activations of two inputs are jointly Gaussian, whatever the distribution of the weights: Gaussian and
+-1 weights of equal variance have the same limit. +-1 weights without a scale factor have sigma_w^2 = n.

    length        q_l = sigma_w^2 E[phi(sqrt(q_{l-1}) z)^2] + sigma_b^2,                   z ~ N(0, 1)
    correlation   q c_l = sigma_w^2 E[phi(u_1) phi(u_2)] + sigma_b^2,                      u of variance q, correlation c_{l-1}
    gradient      E||g_{l-1}||^2 = chi_l E||g_l||^2,   chi_l = sigma_w^2 E[d(sqrt(q_{l-1}) z)^2],   d = phi', or the backward rule

for square layers; between layers of other widths sigma_w^2 belongs to the fan-in and the gradient gains n_{l-1} / n_l.
chi_1 is chi at the fixed point q*, the slope of the correlation map at c = 1: below 1 inputs become alike and gradients vanish,
above 1 they part and gradients explode; at 1 both are kept. For sign the slope at 1 is infinite and no gradient comes back by
itself; with a surrogate d the backward chi is finite and has nothing to do with it.

The limit needs d to be wide against the grid of u. Sums of n bare signs lie 2 apart, on even numbers for even n and odd ones for
odd n; the clipped rule lets |u| <= 1 pass, one value (0) or two (-1, 1), so an odd fan-in doubles chi.

The moments stand in `qlab.diagnose.moments`.

Source: Poole et al. 2016, arXiv 1606.05340; Schoenholz et al. 2017, arXiv 1611.01232; Cho, Saul 2009 (relu); Yang et al. 2019,
arXiv 1902.08129 (batch norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.data.seeding import generator
from qlab.diagnose.base import Result
from qlab.diagnose.moments import (
    ACTIVATIONS,
    PHI,
    SLOPE,
    ActivationName,
    checked,
    cross_moment,
    rule_of,
    second_moment,
    slope_moment,
)
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Rule
from qlab.quantizers.surrogates import Surrogate

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = [
    "ACTIVATIONS",
    "ActivationName",
    "MeanField",
    "Measured",
    "chi",
    "correlation_map",
    "length_map",
    "meanfield",
    "simulate",
]

Floats = NDArray[np.float64]
WeightName = Literal["gaussian", "sign"]


def length_map(q: float, activation: ActivationName, sigma_w2: float = 1.0, sigma_b2: float = 0.0) -> float:
    """Return sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2: the variance of the next layer's pre-activations.

    Args:
        q: variance of this layer's.
        activation: a name of `ACTIVATIONS`.
        sigma_w2: fan-in times the weights' variance.
        sigma_b2: variance of the biases.
    """
    checked(activation, q, sigma_w2, sigma_b2)
    return sigma_w2 * second_moment(q, activation) + sigma_b2


def correlation_map(
    c: float, q: float, activation: ActivationName, sigma_w2: float = 1.0, sigma_b2: float = 0.0
) -> float:
    """Return the correlation of the next layer's pre-activations for two inputs of equal variance q and correlation c.

    Args:
        c: correlation, in [-1, 1].
        q: variance of both.
        activation: a name of `ACTIVATIONS`.
        sigma_w2: fan-in times the weights' variance.
        sigma_b2: variance of the biases.
    """
    checked(activation, q, sigma_w2, sigma_b2)
    if not -1 <= c <= 1:
        raise InputError(f"a correlation lies between -1 and 1, not {c!r}")
    next_q = length_map(q, activation, sigma_w2, sigma_b2)
    return (sigma_w2 * cross_moment(c, q, activation) + sigma_b2) / next_q if next_q > 0 else math.nan


def chi(
    q: float, activation: ActivationName, sigma_w2: float = 1.0, which: str | Rule | Surrogate | None = None
) -> float:
    """Return sigma_w^2 E[d(sqrt(q) z)^2]: by how much a squared gradient grows per layer backwards.

    Args:
        q: variance of the pre-activations.
        activation: a name of `ACTIVATIONS`.
        sigma_w2: fan-in times the weights' variance.
        which: a surrogate for sign; by default the clipped one. The other activations have a derivative of their own.
    """
    checked(activation, q, sigma_w2, 0.0)
    return sigma_w2 * slope_moment(q, activation, which)


@dataclass(frozen=True)
class Measured:
    """What random nets did: means over nets.

    Attributes:
        q: (L + 1,) mean square of pre-activations.
        c: (L + 1,) correlation of two inputs' pre-activations.
        gradient: (L + 1,) squared gradient norm at layer l relative to the last one.
        width: n.
        nets: how many were drawn.
        weights: "gaussian" or "sign".
    """

    q: Floats
    c: Floats
    gradient: Floats
    width: int
    nets: int
    weights: str


@dataclass(frozen=True)
class MeanField(Result):
    """Predictions for a wide random net of equal layers, and what such nets did, where measured.

    Attributes:
        activation: name.
        surrogate: name of sign's backward rule; empty for the others.
        sigma_w2: fan-in times the weights' variance.
        sigma_b2: variance of the biases.
        q: (L + 1,) variance of pre-activations, layer 0 to L.
        c: (L + 1,) correlation of two inputs.
        gradient: (L + 1,) squared gradient norm at layer l relative to the last one.
        q_star: fixed point of the length map; 0 or infinite where lengths vanish or explode.
        c_star: where correlations go from c_0.
        chi_forward: slope of the correlation map at c = 1 and q*: infinite for sign.
        chi_backward: growth of squared gradients per layer at q*.
        measured: of `simulate`, or None.
    """

    activation: str
    surrogate: str
    sigma_w2: float
    sigma_b2: float
    q: Floats
    c: Floats
    gradient: Floats
    q_star: float
    c_star: float
    chi_forward: float
    chi_backward: float
    measured: Measured | None = None

    @property
    def depth_scale(self) -> float:
        """Layers over which a squared gradient changes by a factor e: 1 / |log chi|; infinite at chi = 1."""
        if self.chi_backward <= 0:
            return 0.0
        rate = abs(math.log(self.chi_backward))
        return 1 / rate if rate > 1e-12 else math.inf

    def frame(self) -> pd.DataFrame:
        """Return one row per layer: predicted and measured length, correlation and gradient."""
        import pandas as pd

        table = pd.DataFrame({"layer": range(len(self.q)), "q": self.q, "c": self.c, "gradient": self.gradient})
        if self.measured is not None:
            for name in ("q", "c", "gradient"):
                table[f"{name} measured"] = getattr(self.measured, name)
        return table

    def figure(self) -> Figure:
        """Return lengths, correlations and gradients by layer, with the measured ones."""
        from qlab.plots.signal import meanfield_figure

        return meanfield_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        kind = "vanish" if self.chi_backward < 0.999 else "explode" if self.chi_backward > 1.001 else "are kept"
        rule = f" with the {self.surrogate} backward rule" if self.surrogate else ""
        text = (
            f"Mean field of a wide random {self.activation} net{rule}, sigma_w^2 {self.sigma_w2:.4g}, sigma_b^2 "
            f"{self.sigma_b2:.4g} (deployed forward{', surrogate backward' if self.surrogate else ''}): q* {self.q_star:.4g}, "
            f"c* {self.c_star:.4g}, chi {self.chi_backward:.4g} backward and {self.chi_forward:.4g} forward: gradients {kind}"
        )
        if math.isfinite(self.depth_scale) and self.depth_scale > 0:
            text += f", by a factor e every {self.depth_scale:.3g} layers"
        text += "."
        if self.measured is not None and self.gradient[0] > 0:
            ratio = float(self.measured.gradient[0] / self.gradient[0])
            text += (
                f" {self.measured.nets} nets of width {self.measured.width} with {self.measured.weights} weights: the squared "
                f"gradient at layer 0 was {ratio:.3g} times the prediction."
            )
        return text


def meanfield(
    activation: ActivationName,
    depth: int = 20,
    sigma_w2: float = 1.0,
    sigma_b2: float = 0.0,
    *,
    q0: float = 1.0,
    c0: float = 0.5,
    which: str | Rule | Surrogate | None = None,
) -> MeanField:
    """Return the mean-field prediction for a random net of equal, wide layers.

    Args:
        activation: a name of `ACTIVATIONS`.
        depth: L, layers after layer 0.
        sigma_w2: fan-in times the weights' variance.
        sigma_b2: variance of the biases.
        q0: variance of layer 0's pre-activations.
        c0: correlation of two inputs there.
        which: surrogate of sign, clipped by default.

    Raises:
        UnknownNameError: no such activation or surrogate.
        InputError: variances that are negative, a depth below 1, a surrogate for an activation that has a derivative.
    """
    checked(activation, q0, sigma_w2, sigma_b2)
    if depth < 1:
        raise InputError(f"depth must be at least 1, not {depth!r}")
    if not (-1 <= c0 <= 1):
        raise InputError(f"a correlation lies between -1 and 1, not {c0!r}")
    rule = rule_of(activation, which)
    q, c = [float(q0)], [float(c0)]
    for _ in range(depth):
        c.append(correlation_map(max(-1.0, min(1.0, c[-1])), q[-1], activation, sigma_w2, sigma_b2))
        q.append(length_map(q[-1], activation, sigma_w2, sigma_b2))
    growth = [chi(value, activation, sigma_w2, which) for value in q[:-1]]
    gradient = np.array([math.prod(growth[l:]) for l in range(depth)] + [1.0])
    q_star = _fixed(q[-1], activation, sigma_w2, sigma_b2)
    c_star = c[-1]
    if math.isfinite(q_star) and q_star > 0:
        for _ in range(200):
            last, c_star = c_star, correlation_map(max(-1.0, min(1.0, c_star)), q_star, activation, sigma_w2, sigma_b2)
            if abs(c_star - last) < 1e-9:
                break
    at = q_star if math.isfinite(q_star) else 1e12
    backward = chi(at, activation, sigma_w2, which)
    forward = math.inf if activation == "sign" else chi(at, activation, sigma_w2)
    return MeanField(
        activation, rule.name if rule else "", float(sigma_w2), float(sigma_b2), np.array(q), np.array(c), gradient, q_star, c_star,
        forward, backward,
    )  # fmt: skip


def simulate(
    prediction: MeanField,
    width: int = 500,
    nets: int = 10,
    *,
    weights: WeightName = "gaussian",
    which: str | Rule | Surrogate | None = None,
    seed: int = 0,
) -> MeanField:
    """Return the prediction with what wide random nets do, all nets at once.

    Two inputs are drawn with the prediction's q_0 and c_0 at layer 0; a random gradient is sent back from the last layer.

    Args:
        prediction: of `meanfield`.
        width: n of every layer.
        nets: random nets to draw.
        weights: "gaussian", or "sign" for +-sqrt(sigma_w^2 / n).
        which: the surrogate that the prediction was made with; needed only where it is none of the lab's.
        seed: of all draws.
    """
    if weights not in ("gaussian", "sign"):
        raise UnknownNameError("distribution of weights", weights, ("gaussian", "sign"))
    if width < 2 or nets < 1:
        raise InputError(f"width must be at least 2 and nets at least 1, not {width!r} and {nets!r}")
    activation: ActivationName = prediction.activation  # type: ignore[assignment]
    phi, rule = PHI[activation], rule_of(activation, which or prediction.surrogate or None)
    slope = rule.derivative if rule else SLOPE[activation]
    g = generator("mean field", seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    depth = len(prediction.q) - 1
    q0, c0 = float(prediction.q[0]), float(prediction.c[0])
    first, other = normal(nets, 1, width), normal(nets, 1, width)
    u = math.sqrt(q0) * torch.cat([first, c0 * first + math.sqrt(1 - c0**2) * other], 1)
    W: list[Tensor] = []
    all_u = [u]
    for _ in range(depth):
        w = normal(nets, width, width)
        if weights == "sign":
            w = torch.where(w >= 0, 1.0, -1.0).double()
        w = w * math.sqrt(prediction.sigma_w2 / width)
        W.append(w)
        u = phi(u) @ w.transpose(1, 2) + math.sqrt(prediction.sigma_b2) * normal(nets, 1, width)
        all_u.append(u)
    back = normal(nets, 1, width).expand(nets, 2, width)
    norms = [back.square().sum(2).mean()]
    for u, w in zip(reversed(all_u[:-1]), reversed(W), strict=True):
        back = (back @ w) * slope(u)
        norms.append(back.square().sum(2).mean())
    q = torch.stack([u.square().mean() for u in all_u])
    c = torch.stack([(u[:, 0] * u[:, 1]).mean() / u.square().mean() for u in all_u])
    gradient = torch.stack(norms[::-1]) / norms[0]
    return replace(prediction, measured=Measured(q.numpy(), c.numpy(), gradient.numpy(), width, nets, weights))


def _fixed(q: float, activation: ActivationName, sigma_w2: float, sigma_b2: float) -> float:
    """Return the fixed point of the length map that q goes to."""
    if activation in ("relu", "identity"):  # a line
        slope = sigma_w2 * (0.5 if activation == "relu" else 1.0)
        if slope < 1:
            return sigma_b2 / (1 - slope)
        if sigma_b2 == 0 and (slope == 1 or q == 0):
            return q
        return math.inf
    # A concave map with a bound: one positive fixed point, or none.
    high, low = sigma_w2 + sigma_b2, 1e-12

    def excess(q: float) -> float:
        return length_map(q, activation, sigma_w2, sigma_b2) - q

    if high <= low or (activation != "sign" and excess(low) <= 0):
        return 0.0
    if excess(high) >= 0:
        return high
    from scipy.optimize import brentq

    return float(brentq(excess, low, high, xtol=1e-15, rtol=1e-14))
