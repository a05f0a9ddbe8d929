r"""The nearest point of a hyperplane within the range of inputs, and the hyperplanes that a net's logits give.

    nearest     min_u ||u - x||_p   subject to   w.u + b = 0,  low <= u <= high
    planes      f_s = z_s - z_y,  g_s = grad_x f_s:   w = g_s,  b = f_s(x) - w.x

Let f = w.x + b and r_i the room that coordinate i has, in the direction that brings |f| down, -sgn(f) sgn(w_i). The nearest point
moves coordinate i in this direction by m_i, and |f| falls by sum_i |w_i| m_i:

    l_inf   m_i = min(lam, r_i)                        everything moves as far as lam
    l2      m_i = min(lam |w_i|, r_i)                  along w, until the range ends
    l1      m_i = r_i, largest |w_i| first             all of the room where a unit of distance brings most

For l_inf and l2 the fall is sum_i a_i min(lam, t_i) with (a, t) = (|w|, r) and (w^2, r / |w|): it grows with lam, so one could
bisect. It is linear between the sorted t_i, so one sort gives lam exactly. Where all of the room does not suffice, the corner of
the range nearest to the hyperplane is returned.

All in float64. Both w and f may be multiplied by any c > 0: the answer is the same, whatever the temperature of the net.

Source: Croce, Hein 2020, arXiv 1907.02044 (section 3); Moosavi-Dezfooli et al. 2016, arXiv 1511.04599 (nearest class).

Shapes: x, w (n, ...), f, y (n,), targets (n, K).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from qlab.attacks.ball import Ball, Norm, dual, norms
from qlab.attacks.estimators import Estimator
from qlab.attacks.losses import targeted_margin
from qlab.attacks.victim import Victim

__all__ = ["nearest_plane", "span", "to_plane"]

TIE = 1e-3  # where two logits are equal, the plane is put this share of the range away
FAR = 1e300  # in place of infinity, which times 0 would be NaN


def to_plane(
    x: Tensor, w: Tensor, f: Tensor, norm: Norm, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    """Return u - x for the nearest point u of a hyperplane within the range, (n, ...) in float64.

        u = argmin ||u - x||_p   subject to   f + w.(u - x) = 0,  low <= u <= high

    Args:
        x: (n, ...) points within the range.
        w: (n, ...) normals; a zero one gives no step.
        f: (n,) the value of the linear function at x.
        norm: p.
        low, high: the range, broadcast against x.

    Source: Croce, Hein 2020, arXiv 1907.02044.
    """
    shape, x = x.shape, x.double()
    side = f.double().sign().reshape(-1, *(1,) * (x.dim() - 1))
    down = -side * w.double().sign()
    high, low = (torch.as_tensor(v, device=x.device).double() for v in (high, low))
    room = torch.where(down > 0, high - x, x - low).expand(shape).flatten(1).clamp(min=0, max=FAR)
    size = w.double().flatten(1).abs()
    largest = size.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    size, need = size / largest, (f.double().abs() / largest[:, 0]).clamp(max=FAR)[:, None]
    if norm == "l1":
        order = size.argsort(1, descending=True)
        w_i, r_i = size.gather(1, order), room.gather(1, order)
        before = (w_i * r_i).cumsum(1) - w_i * r_i
        moved = torch.where(w_i > 0, (need - before) / w_i, 0.0).clamp(min=0)
        moved = torch.zeros_like(room).scatter(1, order, torch.minimum(moved, r_i))
    elif norm == "l2":
        t = torch.where(size > 0, room / size, 0.0).clamp(max=FAR)
        moved = torch.minimum(_level(size**2, t, need) * size, room)
    else:
        moved = torch.minimum(_level(size, torch.where(size > 0, room, 0.0), need), room)
    return down * moved.reshape(shape)


def _level(a: Tensor, t: Tensor, need: Tensor) -> Tensor:
    """Return the least lam with sum_i a_i min(lam, t_i) >= need, (n, 1); max t where there is none."""
    t, order = t.sort(1)
    a = a.gather(1, order)
    full = (a * t).cumsum(1)  # of coordinates whose room is used up
    rest = a.flip(1).cumsum(1).flip(1)  # of the others, this one among them: a sum of positive numbers, no cancellation
    reach = full + t * (rest - a).clamp(min=0)
    k = (reach < need).sum(1, keepdim=True)
    last = k.clamp(max=a.shape[1] - 1)
    used = torch.where(last > 0, full.gather(1, (last - 1).clamp(min=0)), 0.0)
    weight = rest.gather(1, last)
    top = t.gather(1, last)
    lam = torch.where(weight > 0, (need - used).clamp(min=0) / weight, top)
    return torch.minimum(lam, top)


def span(ball: Ball) -> float:
    """Return the width of the range of inputs; 1 where it has no end."""
    width = float((ball.high - ball.low).double().max())
    return width if math.isfinite(width) else 1.0


def nearest_plane(
    estimator: Estimator,
    taught: Victim,
    ball: Ball,
    points: Tensor,
    y: Tensor,
    targets: Tensor,
    noise: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (n, d) and, of the planes f_s = z_s - z_y = 0 linearised at some points, the nearest: f (n,) and w (n, ...).

        s = argmin_s |f_s| / ||g_s||_q        q dual to p

    Equal logits, common in binary nets, put the plane through the point itself, and no attack would move. There f is as if the
    plane were a thousandth of the range away.

    Args:
        estimator, taught, noise: where gradients come from.
        ball: for the norm and the range.
        points: (n, ...).
        y: (n,) labels.
        targets: (n, K) classes s to choose from.
    """
    width = span(ball)
    least = torch.full((len(targets),), torch.inf, dtype=torch.float64, device=points.device)
    f, w = torch.zeros_like(least), torch.zeros_like(points)
    logits: Tensor | None = None
    differences = [partial(targeted_margin, y=y, t=t) for t in targets.T]
    for z, v, g in estimator.each(taught, points, differences, noise):
        logits = z if logits is None else logits
        g = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        size = norms(g, dual(ball.norm))
        v = torch.where(v == 0, -TIE * width * size, v.double())
        length = torch.where(size > 0, v.abs() / size, torch.inf)
        closer = length < least
        least = torch.where(closer, length, least)
        f = torch.where(closer, v, f)
        w[closer] = g[closer].to(w.dtype)
    assert logits is not None
    return logits, f, w
