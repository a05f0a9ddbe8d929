r"""Attacks of other packages: their points are booked as those of our own, and what had to be corrected is said.

captum 0.9         entries of the gradient below 1e-6 count as zero, which fakes robustness of a saturated net: threshold 0 here;
                   its default loss is -log of the output, meant for probabilities: cross-entropy of logits here
foolbox 3.3        a point may leave the ball by rounding: moved in here
torchattacks 3.5   adds 1e-10 to the norm of a gradient before an l2 step: 1e-38 here; takes inputs in [0, 1] alone: the range
                   is rescaled in front of the net here; its loss is a mean over the batch, which stays (see `batch`)

All: points are moved into ball and range to the last bit, and the net is asked about them again; an attack that returns its last
point keeps nothing better that it has passed. None of these packages is needed by the lab.

Source: captum, foolbox (Rauber et al. 2020), torchattacks (Kim 2020, arXiv 2010.01950); what is unsafe was found by running them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.victim import Victim
from qlab.errors import InputError

__all__ = ["Foreign", "from_captum", "from_foolbox", "from_torchattacks"]

Run = Callable[[nn.Module, Ball, Tensor], Tensor]
"""A net, the balls around inputs (n, ...) and labels (n,) to points (n, ...)."""


@dataclass(frozen=True)
class Foreign(Attack):
    """An attack of another package.

    Args:
        run: what makes its points.
        title: its name.
        corrections: what was changed about it, in words.
        nearest: whether it looks for the nearest point and takes no eps.
    """

    run: Run
    title: str
    corrections: tuple[str, ...] = ()
    nearest: bool = False

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        """Let the package attack the examples that are right, and book what it returns."""
        at = ledger.active
        if not len(at):
            return
        ball = ledger.ball.take(at)
        if not self.nearest and bool(ball.eps.isinf().any()):
            raise InputError(
                f"{self.title} looks in a ball, so it needs a radius: give eps, in the units of the inputs"
            )
        counted = _Counted(victim).eval()
        # Some packages draw from torch's global generator: give them a seed, and put the generator back as it was.
        with torch.random.fork_rng([ball.x.device] if ball.x.is_cuda else []), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Input Tensor 0 did not already require gradients"
            )  # captum, each step
            torch.manual_seed(int(torch.randint(2**31, (), generator=noise)))
            points = self.run(counted, ball, ledger.y[at]).detach()
        if points.shape != ball.x.shape or not bool(points.isfinite().all()):
            raise InputError(
                f"{self.title} returned points of shape {tuple(points.shape)}, or values that are not finite, for inputs of shape "
                f"{tuple(ball.x.shape)}"
            )
        points = points.to(ball.x.dtype)
        ledger.ask(at, ball.clip(points) if self.nearest else ball.project(points))
        yield 1.0

    @property
    def needs_eps(self) -> bool:  # type: ignore[override]
        """Whether it looks in a ball."""
        return not self.nearest

    @property
    def name(self) -> str:
        """Its title."""
        return self.title

    @property
    def described(self) -> str:
        """Title, and what was corrected."""
        return self.title + (f" ({'; '.join(self.corrections)})" if self.corrections else "")


class _Counted(nn.Module):
    """A victim's net that counts what it is asked."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.net = victim.net
        self.victim = [victim]  # in a list: it is no part of the net

    def forward(self, x: Tensor) -> Tensor:
        victim = self.victim[0]
        return victim.differentiable(x) if torch.is_grad_enabled() and x.requires_grad else victim.logits(x)


def from_captum(attack: str = "PGD", steps: int = 20, eta: float | None = None, zero_thresh: float = 0.0) -> Foreign:
    """Return captum's FGSM or PGD with cross-entropy and without its threshold on gradients.

    Args:
        attack: "FGSM" or "PGD".
        steps: of PGD.
        eta: of PGD, in the units of the inputs; eps / 4 by default.
        zero_thresh: entries of the gradient up to this size count as zero; captum's own is 1e-6.

    Raises:
        InputError: another attack.
    """
    if attack not in ("FGSM", "PGD"):
        raise InputError(f"captum has the attacks FGSM and PGD, not {attack!r}")

    def run(net: nn.Module, ball: Ball, y: Tensor) -> Tensor:
        from captum.robust import FGSM, PGD

        loss = nn.CrossEntropyLoss(reduction="none")
        eps = _one_radius(ball, "captum")
        if ball.norm == "l1" or (attack == "FGSM" and ball.norm != "linf"):
            raise InputError(f"captum's {attack} is not made for {ball.norm}")
        low, high = _scalars(ball, "captum")
        if attack == "FGSM":
            one = FGSM(net, loss_func=loss, lower_bound=low, upper_bound=high)
            one.zero_thresh = zero_thresh
            return _tensor(one.perturb(ball.x, epsilon=eps, target=y))
        many = PGD(net, loss_func=loss, lower_bound=low, upper_bound=high)
        many.fgsm.zero_thresh = zero_thresh
        norm = {"linf": "Linf", "l2": "L2"}[ball.norm]
        step = eps / 4 if eta is None else eta
        return _tensor(many.perturb(ball.x, radius=eps, step_size=step, step_num=steps, target=y, norm=norm))

    corrected = ("loss: cross-entropy of logits", f"gradient threshold {zero_thresh:g} instead of 1e-06")
    return Foreign(run, f"captum {attack}", corrected)


def from_foolbox(attack: Any, nearest: bool = False) -> Foreign:
    """Return an attack object of foolbox, `foolbox.attacks.LinfPGD(steps=20)` for example.

    Args:
        attack: the object; its norm must be that of the ball it is run in.
        nearest: whether it minimises the distance and is to be run without eps.
    """

    def run(net: nn.Module, ball: Ball, y: Tensor) -> Tensor:
        import foolbox

        model = foolbox.PyTorchModel(net, bounds=_scalars(ball, "foolbox"), device=ball.x.device)
        _, points, _ = attack(model, ball.x, y, epsilons=None if nearest else _one_radius(ball, "foolbox"))
        return points

    return Foreign(run, f"foolbox {type(attack).__name__}", ("points are moved into ball and range",), nearest)


def from_torchattacks(attack: Callable[..., Any], nearest: bool = False, **settings: Any) -> Foreign:
    """Return an attack class of torchattacks, `torchattacks.PGDL2` for example.

    Args:
        attack: the class.
        nearest: whether it takes no eps.
        settings: what it takes besides the net and eps. Where its steps divide by a norm, 1e-38 is added to it, not 1e-10.
    """

    def run(net: nn.Module, ball: Ball, y: Tensor) -> Tensor:
        low, high = _scalars(ball, "torchattacks")
        width = high - low
        unit = _Rescaled(net, low, width).eval()
        radius = {} if nearest else {"eps": _one_radius(ball, "torchattacks") / width}
        made = attack(unit, **radius, **settings)
        if hasattr(made, "eps_for_division"):
            made.eps_for_division = 1e-38
        return made(((ball.x - low) / width).clamp(0, 1), y) * width + low

    corrected = ("1e-38 is added to norms instead of 1e-10", "the range is rescaled to [0, 1]")
    return Foreign(run, f"torchattacks {getattr(attack, '__name__', 'attack')}", corrected, nearest)


class _Rescaled(nn.Module):
    """A net that takes inputs on the [0, 1] scale."""

    def __init__(self, net: nn.Module, low: float, width: float) -> None:
        super().__init__()
        self.net, self.low, self.width = net, low, width

    def forward(self, u: Tensor) -> Tensor:
        return self.net(u * self.width + self.low)


def _one_radius(ball: Ball, package: str) -> float:
    radius = float(ball.eps[0])
    if not bool((ball.eps == radius).all()):
        raise InputError(f"{package} takes one eps for all inputs")
    return radius


def _scalars(ball: Ball, package: str) -> tuple[float, float]:
    low, high = float(ball.low.min()), float(ball.high.max())
    if not bool((ball.low == low).all() and (ball.high == high).all()):
        raise InputError(
            f"{package} takes one range for all inputs; put the normalisation into the net (qlab.attacks.pixels)"
        )
    return low, high


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
