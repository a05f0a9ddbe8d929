r"""Proximal maps, projections and mirror maps of quantized weights, in closed form.

Projections q(x) onto a set Q of quantized weights, sign(0) = +1, ties to the larger level:

    signs           Q = {-1, +1}^n             q = sign(x)
    levels          Q = {l_1 < .. < l_K}^n     q = nearest level
    scaled signs    Q = {s b : s >= 0, b in {-1, +1}^n}      q = s sign(x),  s = mean|x|
    ternary         q = (m_-, 0, m_+): zero where |x| < 0.7 mean|x|, else the mean of the values of the same sign that are not
                    zeroed (the rule of ProxQuant's code; no exact projection)

Proximal maps, prox_t R(x) = argmin_z t R(z) + 1/2 |z - x|^2. For every closed set Q the minimum over Q may be taken last, so
only the projection q = q(x) enters:

    R = sum_i |z - q|_i, distance in l1 (Q a product of levels):     z = q where |q - x| <= t,  else x + t sign(q - x)
    R = 1/2 dist(z, Q)^2 (any closed Q):                             z = (x + t q) / (1 + t)

The first with signs is the soft threshold towards +-1 of ProxQuant, the regularizer shaped like a W; the second with scaled
signs is the map of BinaryRelax (the Moreau envelope of the constraint).

Mirror maps P: R -> (-1, 1) or R^K -> simplex, and mirror descent  P^-1(w_new) = P^-1(w) - eta g,  written in w alone:

    tanh       w = tanh(beta theta),       w_new = (w - t) / (1 - w t),  t = tanh(beta eta g)
                                                 = (E - 1) / (E + 1),    E = (1 + w) / (1 - w) exp(-2 beta eta g)
    softmax    u = softmax(beta theta),    u_new = u exp(-beta eta g_u) / sum

For levels (-1, +1), w = u_+ - u_-, g_u = (-g, +g) and h = (theta_+ - theta_-) / 2 the softmax is the tanh:
w = tanh(beta h), and both updates are the same map. One scalar for each weight is enough.

Sources: Bai, Wang, Liberty, ProxQuant, ICLR 2019, arXiv 1810.00861; Yin et al., BinaryRelax, SIAM J. Imaging Sci. 2018,
arXiv 1801.06313; Ajanthan et al., AISTATS 2021, arXiv 1910.08237. The reduction to projections and the tanh form with t are
derived; tests check every map against a search.

Shapes: elementwise on tensors of any shape, unless said otherwise; t, beta and step are numbers or tensors that broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers import hard_sign

__all__ = [
    "mean_abs",
    "nearest_level",
    "prox_distance",
    "prox_squared_distance",
    "scaled_signs",
    "softmax_map",
    "softmax_step",
    "tanh_inverse",
    "tanh_map",
    "tanh_step",
    "ternary",
]

# ---- projections ------------------------------------------------------------------------------------------------------


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest level of each value, the larger one of two that are as near.

    Args:
        x: of any shape.
        levels: (K,), strictly ascending.

    Raises:
        InputError: for levels that do not ascend.
    """
    if levels.dim() != 1 or len(levels) == 0 or not bool((levels.diff() > 0).all()):
        raise InputError(f"levels must be a vector of ascending numbers, not {levels.tolist()}")
    middle = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(x, middle, right=True)]


def mean_abs(x: Tensor) -> Tensor:
    """Return s = mean|x| of the whole tensor, a positive scalar even for x = 0."""
    return x.abs().mean().clamp(min=torch.finfo(x.dtype).tiny)


def scaled_signs(x: Tensor) -> Tensor:
    """Return s sign(x), s = mean|x|: the projection of the whole tensor onto {s b : s >= 0, b in {-1, +1}^n}."""
    return mean_abs(x) * hard_sign(x)


def ternary(x: Tensor, ratio: float = 0.7) -> Tensor:
    """Return x with small values zeroed, |x| < ratio mean|x|, and the others replaced by the mean of their sign.

    Source: the code of ProxQuant (allenbai01/ProxQuant), after Li, Zhang, Liu 2016 and Zhu et al. 2017.
    """
    large = x.abs() >= ratio * x.abs().mean()
    out = torch.zeros_like(x)
    for part in (large & (x > 0), large & (x < 0)):
        out = torch.where(part, (x * part).sum() / part.sum().clamp(min=1), out)
    return out


# ---- proximal maps ----------------------------------------------------------------------------------------------------


def prox_distance(x: Tensor, q: Tensor, t: float | Tensor) -> Tensor:
    """Return the prox of t sum_i |z_i - q_i|, q the nearest level: a step of t towards it that stops there, exactly.

    Args:
        x: where.
        q: nearest levels of x, of its shape; `hard_sign(x)` for binary weights.
        t: at least 0.
    """
    gap = q - x
    return torch.where(gap.abs() <= t, q, x + t * gap.sign())


def prox_squared_distance(x: Tensor, q: Tensor, t: float | Tensor) -> Tensor:
    """Return the prox of t/2 dist(z, Q)^2, (x + t q) / (1 + t), q the projection of x onto any closed set Q.

    Args:
        x: where.
        q: projection of x, of its shape; `scaled_signs(x)` for BinaryRelax.
        t: at least 0; infinity gives q.
    """
    share = 1 / (1 + torch.as_tensor(t, dtype=torch.float64, device=x.device)).to(x.dtype)  # 1 / (1 + inf) = 0
    return share * x + (1 - share) * q


# ---- mirror maps ------------------------------------------------------------------------------------------------------


def tanh_map(theta: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Return w = tanh(beta theta)."""
    return torch.tanh(beta * theta)


def tanh_inverse(w: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Return theta = atanh(w) / beta, the gradient of the mirror potential at w in (-1, 1)."""
    return torch.atanh(w) / beta


def tanh_step(w: Tensor, step: Tensor) -> Tensor:
    """Return tanh(atanh(w) - step): mirror descent in w, step = beta eta g.

    Rounding puts no weight on +-1, from which no step would lead back: |w| <= 1 - eps of the dtype. (The authors' code adds
    1e-20 to denominators for that.)
    """
    inside = 1 - torch.finfo(w.dtype).eps
    w, t = w.clamp(-inside, inside), torch.tanh(step)
    return ((w - t) / (1 - w * t)).clamp(-inside, inside)


def softmax_map(theta: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Return u = softmax(beta theta) over the last axis, the levels; w = u @ levels."""
    return torch.softmax(beta * theta, dim=-1)


def softmax_step(u: Tensor, step: Tensor) -> Tensor:
    """Return u exp(-step) / sum over the last axis: exponentiated gradient, step = beta eta g_u."""
    return torch.softmax(u.clamp(min=torch.finfo(u.dtype).tiny).log() - step, dim=-1)
