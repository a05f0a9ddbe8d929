r"""Directions in the space of a net's latent tensors: dictionaries name -> tensor, for lines and planes w + a d1 + b d2.

| function            | direction                                                                              |
|---------------------|----------------------------------------------------------------------------------------|
| `random_direction`  | d ~ N(0, I), then d_f <- d_f ||w_f|| / (||d_f|| + 1e-10) for every filter f             |
| `between`           | theta' - theta of two nets, running statistics of batch norm included                  |
| `gradient_direction`| minus what back-propagation gives: the coarse gradient where quantizers are in the way |
| `given`             | tensors of one's own, by the name of a parameter or a quantized layer                  |
| `principal_axes`    | the first principal components of a trajectory w_1, ..., w_T                           |

A filter is one output channel or neuron: a row of `w.flatten(1)`. Biases and the vectors of batch norm stay where they are (d = 0).

The null of the principal axes: the path of a random walk in high dimension has explained variances 6 / (pi^2 k^2), k = 1, 2, ...:
0.608, 0.152, 0.068. "76 % in two dimensions" is what a walk without any structure shows.

Source: Li, Xu, Taylor, Studer, Goldstein 2018, arXiv 1712.09913, sections 4 and 7; Antognini and Sohl-Dickstein 2018, arXiv
1806.08805 (random walks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.base import plain
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import quantized_tensors

__all__ = [
    "Axes",
    "Direction",
    "Normalise",
    "between",
    "given",
    "gradient_direction",
    "normalised",
    "orthogonal",
    "principal_axes",
    "random_direction",
    "random_walk_variance",
]

Direction = dict[str, Tensor]
Normalise = Literal["filter", "layer"]
_TINY = 1e-10


def random_direction(net: nn.Module, seed: int = 0, normalise: Normalise | None = "filter") -> Direction:
    """Return d ~ N(0, I) for every weight of two or more dimensions, scaled to the net's own weights.

    Args:
        net: a method of the lab or any torch module; of quantized tensors the latent ones count.
        seed: of the draw; the global generator is not touched.
        normalise: "filter" d_f ||w_f|| / (||d_f|| + 1e-10), "layer" the same with whole tensors, None the plain draw.

    Raises:
        InputError: no module, one without weights, or another normalisation.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = _weights(net)
    # drawn in float64, so that a net in either precision gets the same direction
    drawn = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for n, w in weights.items()}
    return normalised(net, drawn, normalise)


def normalised(net: nn.Module, direction: Mapping[str, Tensor], normalise: Normalise | None = "filter") -> Direction:
    """Return a direction whose filters, or whole tensors, are as long as the net's; vectors become 0 under a normalisation.

    Args:
        net: whose weights give the lengths.
        direction: name of a parameter or buffer -> tensor.
        normalise: "filter", "layer" or None, which changes nothing.

    Raises:
        InputError, UnknownNameError: tensors that do not fit the net; another normalisation.
    """
    net = plain(net)
    tensors = _checked(net, direction)
    if normalise is None:
        return tensors
    if normalise not in ("filter", "layer"):
        raise InputError(f"normalise is {normalise!r}; expected 'filter', 'layer' or None")
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return {
        name: _scaled(d, weights[name], normalise) if name in weights and d.dim() > 1 else torch.zeros_like(d)
        for name, d in tensors.items()
    }


def _scaled(d: Tensor, w: Tensor, normalise: Normalise) -> Tensor:
    if normalise == "layer":
        return d * (w.norm() / (d.norm() + _TINY))
    ratio = w.flatten(1).norm(dim=1) / (d.flatten(1).norm(dim=1) + _TINY)
    return d * ratio.reshape(-1, *[1] * (d.dim() - 1))


def between(net: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> Direction:
    """Return theta' - theta, from one net to another of the same build: a = 0 is `net`, a = 1 is `other`.

    The running statistics of batch norm move too: with those of one end, everything between would be another net's.

    Args:
        net: a method of the lab or any torch module.
        other: another net, or a dictionary of parameters (and buffers) as in its `state_dict()`.

    Raises:
        InputError, UnknownNameError: the two do not have the same tensors.
    """
    net = plain(net)
    there = dict(other) if isinstance(other, Mapping) else _moving(plain(other))
    here = _moving(net)
    if not isinstance(other, Mapping) and set(there) != set(here):
        odd = sorted(set(there) ^ set(here))
        raise InputError(
            f"the two nets are of different builds: only one of them has {odd[0]!r}; take both after the same training method"
        )
    found = {name: there[name] for name in here if name in there}
    if not found:
        raise UnknownNameError("parameter", next(iter(there), ""), here)
    return {name: t - here[name] for name, t in _checked(net, found).items()}


def gradient_direction(
    net: nn.Module, x: Tensor, y: Tensor, normalise: Normalise | None = "layer", loss: str | Loss = "cross_entropy"
) -> Direction:
    """Return -g, the way the optimizer would go: g is what back-propagation gives on the batch, the surrogate's gradient where
    quantizers are straight-through.

    Args:
        net: in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        normalise: "layer" keeps the direction of the gradient within every tensor, "filter" only within every filter; None.
        loss: as of `Objective`.

    Raises:
        InputError: see `qlab.diagnose.base.check`; a gradient that is zero everywhere.
    """
    g = Objective(net, x, y, loss).gradient()
    if not any(bool(t.any()) for t in g.values()):
        raise InputError(
            "the gradient is exactly zero everywhere, so it points nowhere; look at a random direction instead"
        )
    return normalised(net, {name: -t for name, t in g.items()}, normalise)


def given(net: nn.Module, tensors: Mapping[str, Tensor], normalise: Normalise | None = None) -> Direction:
    """Return tensors of one's own as a direction, such as 2 hard(w) over the weights that a flip oracle would flip, or -g of any
    estimator.

    Args:
        net: a method of the lab or any torch module.
        tensors: name of a parameter, a buffer or a quantized layer (its latent weight) -> tensor of that shape.
        normalise: see `normalised`.

    Raises:
        InputError, UnknownNameError: no tensors, or ones that do not fit the net.
    """
    net = plain(net)
    names = {id(p): name for name, p in net.named_parameters()}
    latent = {found.name: names[id(found.latent)] for found in quantized_tensors(net)}
    if not tensors:
        raise InputError("no tensors were given; expected a dictionary of name -> tensor")
    return normalised(net, {latent.get(name, name): t for name, t in tensors.items()}, normalise)


def orthogonal(direction: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> Direction:
    """Return d - to <d, to> / <to, to>, so that a plane of two directions has square corners.

    Raises:
        InputError: `to` is zero, or the direction lies along it.
    """
    inner = sum(float((direction[n] * to[n]).sum()) for n in to if n in direction)
    length = sum(float(t.square().sum()) for t in to.values())
    if not length > 0:
        raise InputError("the direction to be orthogonal to is zero")
    zero = {n: torch.zeros_like(t) for n, t in (*to.items(), *direction.items())}
    out = {n: direction.get(n, z) - to.get(n, z) * (inner / length) for n, z in zero.items()}
    before = sum(float(t.square().sum()) for t in direction.values())
    if sum(float(t.square().sum()) for t in out.values()) <= 1e-20 * before:
        raise InputError("the two directions are one line; a plane needs two")
    return out


class Axes(NamedTuple):
    """Principal axes of a trajectory.

    Args:
        directions: M directions of unit length, as dictionaries.
        coordinates: (T, M) of w_t - w_T along them, float64.
        explained: (R,) shares of the variance, all of them, descending, float64.
        inside: (T,) share of ||w_t - w_T||^2 that lies in the span of the M directions; 1 for the last point.
    """

    directions: tuple[Direction, ...]
    coordinates: Tensor
    explained: Tensor
    inside: Tensor


def principal_axes(steps: Sequence[Mapping[str, Tensor]], components: int = 2, vectors: bool = False) -> Axes:
    r"""Return the principal components of the rows w_t - w_T, centred on their mean: the eigenvectors of A' A, from the small A A'.

    Centred on w_T instead, the first share of a random walk would be near 0.8 and not the 6 / pi^2 of the null.

    Args:
        steps: T >= 3 dictionaries name -> tensor of the same names and shapes, in order of time.
        components: M, how many axes.
        vectors: whether tensors of fewer than two dimensions (biases, batch norm) take part.

    Raises:
        InputError: too few steps, tensors that differ in name or shape, or a path that does not move in M dimensions.
    """
    if len(steps) < 3:
        raise InputError(f"a trajectory of {len(steps)} points has no principal axes; give at least three checkpoints")
    last = steps[-1]
    names = [n for n, t in last.items() if t.is_floating_point() and (vectors or t.dim() > 1)]
    if not names:
        raise InputError("no weights of two or more dimensions take part; pass vectors=True")
    for i, step in enumerate(steps):
        for n in names:
            if n not in step or step[n].shape != last[n].shape:
                raise InputError(
                    f"point {i} of the trajectory has no {n!r} of shape {tuple(last[n].shape)}, as the last one has"
                )
    rows = torch.stack(
        [torch.cat([(step[n].detach() - last[n].detach()).double().flatten() for n in names]) for step in steps]
    )
    if not bool(rows.isfinite().all()):
        raise InputError("the trajectory holds NaN or infinite weights; end it before the training diverged")
    centred = rows - rows.mean(0)
    values, vectors_ = torch.linalg.eigh(centred @ centred.T)
    values, vectors_ = values.flip(0).clamp(min=0), vectors_.flip(1)
    if not (
        components >= 1 and components < len(steps) and float(values[components - 1]) > 1e-14 * float(values.sum())
    ):
        raise InputError(
            f"the trajectory does not move in {components} dimensions; give more checkpoints or fewer components"
        )
    axes = torch.linalg.qr(
        centred.T @ vectors_[:, :components] / values[:components].sqrt()
    ).Q  # QR: orthonormal to rounding
    axes = axes * torch.where(rows[0] @ axes < 0, -1.0, 1.0)  # the path begins at positive coordinates
    coordinates = rows @ axes
    length = rows.square().sum(1)
    inside = torch.where(length > 0, coordinates.square().sum(1) / length.clamp(min=1e-300), 1.0)
    directions = []
    for axis in axes.T:
        parts = axis.split([last[n].numel() for n in names])
        directions.append({n: part.reshape(last[n].shape).to(last[n]) for n, part in zip(names, parts, strict=True)})
    return Axes(tuple(directions), coordinates, values / values.sum(), inside)


def random_walk_variance(k: int) -> float:
    """Return 6 / (pi^2 k^2), the share of variance of principal component k = 1, 2, ... of a random walk."""
    return 6 / (math.pi * k) ** 2


def _weights(net: nn.Module) -> dict[str, Tensor]:
    found = {n: p.detach() for n, p in plain(net).named_parameters() if p.dim() > 1}
    if not found:
        raise InputError("this net has no weights of two or more dimensions, so there is no direction to go")
    return found


def _moving(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and running statistics by name, detached."""
    found = {n: p.detach() for n, p in net.named_parameters()}
    for name, m in net.named_modules():
        if isinstance(m, _BatchNorm) and m.track_running_stats:
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{key}": m.get_buffer(key).detach() for key in ("running_mean", "running_var")}
    return found


def _checked(net: nn.Module, direction: Mapping[str, Tensor]) -> Direction:
    here = _moving(net)
    for name, d in direction.items():
        if name not in here:
            raise UnknownNameError("parameter", name, here)
        if not isinstance(d, Tensor) or d.shape != here[name].shape:
            raise InputError(
                f"the direction of {name!r} is {tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__}; "
                f"expected a tensor of shape {tuple(here[name].shape)}"
            )
        if not bool(d.isfinite().all()):
            raise InputError(f"the direction of {name!r} holds NaN or infinite values")
    return {name: d.detach().to(here[name]) for name, d in direction.items()}
