r"""Where an attack's gradients come from.

    Estimator.gradient(victim, x, f) -> z (n, d), v (n,), g (n, ...)          v = f(net(x)),  g ~ d v_n / d x_n

f maps logits (n, d) to one number for each example (n,): a loss, a difference of logits.

| estimator          | g                                                           | questions a point  |
|--------------------|-------------------------------------------------------------|--------------------|
| Backprop           | back-propagation as the net defines it                      | 1                  |
| BPDA(s)            | the same, every quantized activation answering backward     | 1                  |
|                    | as the derivative of a stand-in s; forward is exact         |                    |
| Smoothed(r, K)     | mean_k g(x + r u_k),  u normal, g of another estimator      | 1 + K              |
| NES(K, s)          | mean_k u_k (v(x + s u_k) - v(x - s u_k)) / (2 s), u normal  | 1 + 2 K            |
| SPSA(K, h)         | the same with u in {-1, +1}^D                               | 1 + 2 K            |
| FiniteDifference(h)| (v(x + h e_i) - v(x - h e_i)) / (2 h) for coordinates i     | 1 + 2 D            |
| EOT(g, K)          | mean over K draws of a random net's noise                   | K times those of g |

Back-propagation is exact for float nets and for nets whose weights alone are quantized. Through quantized activations it is the
gradient of no function: the deployed net is a staircase in x whose true gradient is zero. NES is without bias the gradient of
E f(net(x + s u)), SPSA and finite differences of similar means over a neighbourhood, whatever the net. Smoothed is that of the same
mean where back-propagation is exact, at a fraction of the questions; it cannot revive a backward rule that is dead.

The smooth mean of one sign neuron, E sign(w + s u), has the derivative 2 phi(w / s) / s, phi the normal density.

Differences are of v itself: where cross-entropy is rounded to 0 they are too, so take a margin loss or a temperature with them.

Source: Athalye, Carlini, Wagner 2018, arXiv 1802.00420 (BPDA), arXiv 1707.07397 (EOT); Ilyas et al. 2018, arXiv 1804.08598 (NES);
Spall 1992, Uesato et al. 2018, arXiv 1802.05666 (SPSA); Smilkov et al. 2017, arXiv 1706.03825 (mean of gradients).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlab.attacks.stand_in import StandIn, stand_in, with_stand_ins
from qlab.errors import InputError

if TYPE_CHECKING:
    from qlab.attacks.victim import Victim

__all__ = [
    "BACKPROP",
    "BPDA",
    "EOT",
    "NES",
    "SPSA",
    "Backprop",
    "Estimator",
    "FiniteDifference",
    "Smoothed",
    "Value",
]

Value = Callable[[Tensor], Tensor]
"""Logits (n, d) to one number for each example (n,), differentiable; it may be called several times with the same n, first with the
logits of x itself."""

_NUMBERS = 2**22  # in the neighbours that are asked about at once


class Estimator(ABC):
    """A way to a gradient; see the module docstring."""

    @property
    def draws(self) -> int | None:
        """Of a random net, how many draws it averages over; None for an estimator of nets that answer always the same."""
        return None

    def bind(self, victim: Victim) -> Victim:
        """Return the victim whose gradients are taken: the net itself, or a copy with other backward rules."""
        return victim

    @abstractmethod
    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, d), v = f(logits) (n,) and its gradient (n, ...), all detached.

        Args:
            victim: what `bind` returned.
            x: (n, ...) points.
            f: what is differentiated.
            generator: of this step's noise, if it needs any.
        """

    def each(
        self, victim: Victim, x: Tensor, values: Sequence[Value], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what `gradient` returns for several f at the same points; arguments as there."""
        for f in values:
            yield self.gradient(victim, x, f, generator)


@dataclass(frozen=True)
class Backprop(Estimator):
    """The gradient that back-propagation gives, summed over examples: no mean that would scale it down into underflow."""

    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, values and gradients of one forward and one backward pass."""
        return next(self.each(victim, x, [f], generator))

    def each(
        self, victim: Victim, x: Tensor, values: Sequence[Value], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the same for several f: one forward pass and a backward pass for each."""
        x = x.detach().requires_grad_()
        z = victim.differentiable(x)
        for k, f in enumerate(values, 1):
            v = f(z)
            # A graph may also come from weights alone, behind a step that cuts the inputs off.
            more = k < len(values)
            g = torch.autograd.grad(v.sum(), x, allow_unused=True, retain_graph=more)[0] if v.requires_grad else None
            if g is None:
                raise InputError(
                    "no gradient reaches the inputs: an operation in this net is not differentiable (a packed net has no gradient "
                    "at all). Attack the torch net it was made from, estimate the gradient by questions (NES, SPSA, "
                    "FiniteDifference), or take an attack without gradients: Square, Boundary, RandomSearch"
                )
            victim.count["backward"] += len(x) if k > 1 else 0  # the first was counted with the questions
            yield z.detach(), v.detach(), g


BACKPROP = Backprop()


@dataclass(frozen=True)
class BPDA(Backprop):
    """Backward pass differentiable approximation: every quantized activation passes gradients on as a stand-in's derivative.

    What the net answers is the same to the last bit. One copy is made for a net, which shares its weights.

    Args:
        stand_in: a name of `qlab.quantizers.SURROGATES` ("identity", "clipped", "polynomial", "tanh", "swish", "erf"), "relu", an
            elementwise derivative d(u), or a `Surrogate`; u is the pre-activation in units of the quantizer's half range from its
            centre (for sign: the pre-activation itself).
        sharpness: of tanh, swish and erf.
        layers: names of further modules to stand in for, in nets whose quantizers are not the lab's; taken as sign-like.

    Raises:
        UnknownNameError, InputError: from `qlab.quantizers.surrogate`, at once; at the attack, for a net without such modules.

    Source: Athalye, Carlini, Wagner 2018.
    """

    stand_in: StandIn = "clipped"
    sharpness: float | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stand_in(self.stand_in, self.sharpness)
        if isinstance(self.layers, str):
            raise InputError(f"layers is the string {self.layers!r}; expected a sequence of names such as ('act1',)")
        object.__setattr__(self, "layers", tuple(self.layers))

    def bind(self, victim: Victim) -> Victim:
        """Return the victim with stand-ins in a copy of its net; counts and shortcut are shared."""
        return replace(victim, net=with_stand_ins(victim.net, self.stand_in, self.sharpness, self.layers))


@dataclass(frozen=True)
class Smoothed(Estimator):
    """The mean of an estimator's gradients at normal neighbours: for gradients that point all over the place (shattered ones).

    Args:
        width: r, standard deviation of the neighbours, in the units of x.
        samples: K.
        estimator: of the gradients.
    """

    width: float = 0.05
    samples: int = 20
    estimator: Estimator = BACKPROP

    def __post_init__(self) -> None:
        _positive("width", self.width)
        _at_least_one("samples", self.samples)

    @property
    def draws(self) -> int | None:
        """Those of the estimator."""
        return self.estimator.draws

    def bind(self, victim: Victim) -> Victim:
        """Return what the estimator binds."""
        return self.estimator.bind(victim)

    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and values at x, and the mean gradient around it."""
        z, v, _ = self.estimator.gradient(victim, x, f, generator)
        total = torch.zeros_like(x)
        for _ in range(self.samples):
            around = (x + self.width * _normal(x.shape, x, generator)).to(x.dtype)
            total += self.estimator.gradient(victim, around, f, generator)[2]
        return z, v, total / self.samples


class _Asking(Estimator):
    """Estimators that only ask: v at neighbours x +- h u_k, and g = w sum_k u_k (v_k+ - v_k-) / (2 h)."""

    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and values at x, and the estimate from its neighbours."""
        with torch.no_grad():
            z = victim.logits(x)
            v = f(z)
            g = torch.zeros_like(x, dtype=_dtype(x))
            for u, h, weight in self._directions(x, generator):
                ahead = _values(victim, x + h * u, x, f)
                slope = (ahead - _values(victim, x - h * u, x, f)) / 2 if self._pairs else ahead - v
                g += weight / h * (_wide(slope, u) * u).sum(0)
        return z, v, g.to(x.dtype)

    @property
    def _pairs(self) -> bool:
        """Whether both sides are asked; else x itself is the other side."""
        return True

    @abstractmethod
    def _directions(self, x: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, float, float]]:
        """Yield directions u (k, n, ...), their length h and weight w, as many at once as fit the memory."""


@dataclass(frozen=True)
class NES(_Asking):
    """Natural evolution strategy: the gradient of the mean value over normal neighbours, without bias.

    Args:
        samples: K directions for each point.
        sigma: s, standard deviation of the neighbours, in the units of x; neighbours may leave the range of inputs.
        antithetic: ask at x + s u and x - s u; else at x + s u alone, half the questions, against the value at x.

    Source: Ilyas et al. 2018.
    """

    samples: int = 50
    sigma: float = 0.05
    antithetic: bool = True

    def __post_init__(self) -> None:
        _positive("sigma", self.sigma)
        _at_least_one("samples", self.samples)

    @property
    def _pairs(self) -> bool:
        return self.antithetic

    def _directions(self, x: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, float, float]]:
        for k in _parts(self.samples, x):
            yield _normal((k, *x.shape), x, generator), self.sigma, 1 / self.samples


@dataclass(frozen=True)
class SPSA(_Asking):
    """Simultaneous perturbation: values at random corners of a small cube.

    Args:
        samples: K directions for each point.
        delta: h, half the edge of the cube, in the units of x; neighbours may leave the range of inputs.

    Source: Spall 1992; Uesato et al. 2018.
    """

    samples: int = 128
    delta: float = 0.01

    def __post_init__(self) -> None:
        _positive("delta", self.delta)
        _at_least_one("samples", self.samples)

    def _directions(self, x: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, float, float]]:
        for k in _parts(self.samples, x):
            bits = torch.randint(2, (k, *x.shape), generator=generator, dtype=torch.int8).to(x.device)
            yield bits.to(_dtype(x)).mul(2).sub(1), self.delta, 1 / self.samples


@dataclass(frozen=True)
class FiniteDifference(_Asking):
    """Central differences along the coordinates.

    Of a staircase it is the derivative of the mean over [x_i - h, x_i + h], one coordinate at a time.

    Args:
        step: h, in the units of x; neighbours may leave the range of inputs.
        coordinates: how many to look at, drawn anew for each point and step; the others get 0. All by default.
    """

    step: float = 0.05
    coordinates: int | None = None

    def __post_init__(self) -> None:
        _positive("step", self.step)
        if self.coordinates is not None:
            _at_least_one("coordinates", self.coordinates)

    def _directions(self, x: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, float, float]]:
        n, D = len(x), x[0].numel()
        if self.coordinates is None or self.coordinates >= D:
            index = torch.arange(D).expand(n, D)
        else:
            index = torch.rand(n, D, generator=generator).topk(self.coordinates, dim=1).indices
        done = 0
        for k in _parts(index.shape[1], x):
            some = index[:, done : done + k].T.to(x.device)
            u = torch.zeros(k, n, D, dtype=_dtype(x), device=x.device).scatter_(2, some[..., None], 1.0)
            yield u.reshape(k, *x.shape), self.step, 1.0
            done += k


@dataclass(frozen=True)
class EOT(Estimator):
    """Expectation over transformation: the mean over draws of a net that answers at random.

    With it an attack takes such a net at all; it is then said to decide by the mean of its logits over as many draws, for finds
    as well as for gradients: a single lucky draw breaks nothing. The noise has to come from torch's own generators.

    Args:
        estimator: of one draw's gradient.
        samples: K draws.

    Source: Athalye et al. 2018.
    """

    estimator: Estimator = BACKPROP
    samples: int = 20

    def __post_init__(self) -> None:
        _at_least_one("samples", self.samples)

    @property
    def draws(self) -> int:
        """K."""
        return self.samples

    def bind(self, victim: Victim) -> Victim:
        """Return what the estimator binds, answering with one draw at a time."""
        return self.estimator.bind(replace(victim, draws=1))

    def gradient(
        self, victim: Victim, x: Tensor, f: Value, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean logits, values and gradients over the draws."""
        parts = [self.estimator.gradient(victim, x, f, generator) for _ in range(self.samples)]
        z, v, g = (torch.stack(column).mean(0) for column in zip(*parts, strict=True))
        return z, v, g


def _dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and directions: halves would round both."""
    return torch.promote_types(x.dtype, torch.float32)


def _normal(shape: tuple[int, ...] | torch.Size, x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=_dtype(x)).to(x.device)


def _parts(samples: int, x: Tensor) -> Iterator[int]:
    """Yield how many directions to take at once until all are taken."""
    most = max(1, _NUMBERS // x.numel())
    while samples > 0:
        yield min(samples, most)
        samples -= most


def _values(victim: Victim, points: Tensor, x: Tensor, f: Value) -> Tensor:
    """Return v (k, n) at points (k, n, ...), neighbours of x (n, ...)."""
    z = victim.logits(points.flatten(0, 1).to(x.dtype)).reshape(*points.shape[:2], -1)
    return torch.stack([f(part) for part in z]).to(_dtype(x))


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *(1,) * (like.dim() - values.dim()))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value!r}; expected a positive number, in the units of the inputs")


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
