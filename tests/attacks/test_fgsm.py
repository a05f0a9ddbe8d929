"""FGSM and BIM: the formulas written out, and what they have in common with PGD, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, Norm
from qlab.attacks.fgsm import BIM, FGSM
from qlab.attacks.pgd import PGD
from qlab.attacks.scaling import UNSCALED, Fixed, Scaling

Digits = tuple[nn.Module, Tensor, Tensor]
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 0.6, "l1": 2.0}


def gradient(net: nn.Module, x: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(beta * net(x), y, reduction="sum"), x)[0]


def double(digits: Digits, n: int = 60) -> Digits:
    return copy.deepcopy(digits[0]).double(), digits[1][:n].double(), digits[2][:n]


def test_fgsm_is_one_signed_step_of_length_eps_clipped(digits_net: Digits) -> None:
    net, x, y = double(digits_net)
    found = FGSM(early_stop=False)(net, x, y, 0.1, trace=True)
    assert found.trace is not None
    at = torch.from_numpy(found.clean)
    expected = (x + 0.1 * gradient(net, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(found.trace[-1].points[at], expected[at], rtol=0, atol=1e-12)
    wrong = net(expected).argmax(1) != y
    assert (torch.from_numpy(found.success) == (wrong | ~at)).all()


def test_fgsm_in_l2_steps_along_the_gradient_to_the_edge_of_the_ball(digits_net: Digits) -> None:
    net, x, y = double(digits_net)
    x = 0.25 + x / 2  # away from the ends of the range
    found = FGSM(early_stop=False)(net, x, y, 0.2, norm="l2", trace=True)
    assert found.trace is not None
    at = torch.from_numpy(found.clean)
    g = gradient(net, x, y)
    expected = x + 0.2 * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found.trace[-1].points[at], expected[at], rtol=0, atol=1e-9)


def test_fgsm_with_a_random_start_steps_from_there_and_is_projected(digits_net: Digits) -> None:
    net, x, y = double(digits_net)
    found = FGSM(random_start=True, early_stop=False)(net, x, y, 0.1, trace=True)
    assert found.trace is not None
    start = found.trace[0].points
    at = torch.from_numpy(found.clean)
    assert bool((start != x)[at].flatten(1).any(1).all())
    step = start + 0.1 * gradient(net, start, y).sign()
    expected = torch.minimum(torch.maximum(step, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found.trace[-1].points[at], expected[at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scaling", [UNSCALED, Fixed(0.1)])
@pytest.mark.parametrize("random_start", [False, True])
def test_fgsm_is_pgd_of_one_step_of_length_eps_bit_for_bit(
    digits_net: Digits, norm: Norm, scaling: Scaling, random_start: bool
) -> None:
    net, x, y = digits_net
    fgsm = FGSM(random_start=random_start, scaling=scaling)(net, x, y, EPS[norm], norm=norm)
    pgd = PGD(steps=1, eta=EPS[norm], random_start=random_start, scaling=scaling)(net, x, y, EPS[norm], norm=norm)
    assert torch.equal(fgsm.adversarial, pgd.adversarial)
    assert (fgsm.success == pgd.success).all()
    assert bool(Ball.of(x, EPS[norm], norm).contains(fgsm.adversarial).all())


def test_bim_is_the_loop_over_signed_steps(digits_net: Digits) -> None:
    net, x, y = double(digits_net)
    found = BIM(steps=5, early_stop=False)(net, x, y, 0.1, trace=True)
    assert found.trace is not None
    points, at = x, torch.from_numpy(found.clean)
    for step in found.trace:
        torch.testing.assert_close(step.points[at], points[at], rtol=0, atol=1e-12)
        points = (points + 0.02 * gradient(net, points, y).sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_bim_is_pgd_without_a_random_start_bit_for_bit(digits_net: Digits, norm: Norm) -> None:
    net, x, y = digits_net
    bim = BIM(steps=4)(net, x, y, EPS[norm], norm=norm)
    pgd = PGD(steps=4, eta=EPS[norm] / 4, random_start=False)(net, x, y, EPS[norm], norm=norm)
    assert torch.equal(bim.adversarial, pgd.adversarial)
    longer = BIM(steps=4, eta=EPS[norm])(net, x, y, EPS[norm], norm=norm)
    assert not torch.equal(longer.adversarial, bim.adversarial)


def test_many_steps_break_more_than_one(digits_net: Digits) -> None:
    one, many = (attack(*digits_net, 0.1) for attack in (FGSM(), BIM(steps=20)))
    assert many.accuracy < one.accuracy - 0.02


def test_their_names_say_what_is_set() -> None:
    assert FGSM().described == "FGSM"
    assert FGSM(random_start=True, loss="margin").described == "FGSM (random_start=True, loss=margin)"
    assert BIM().described == "BIM"
    with pytest.raises(TypeError):
        FGSM(steps=2)  # type: ignore[call-arg]


def test_an_unbounded_ball_is_as_wide_as_the_range(digits_net: Digits) -> None:
    net, x, y = double(digits_net, 20)
    found = FGSM(early_stop=False)(net, x, y, float("inf"), trace=True)
    assert found.trace is not None
    at = torch.from_numpy(found.clean)
    expected = (x + gradient(net, x, y).sign()).clamp(0, 1)
    assert torch.equal(found.trace[-1].points[at], expected[at])
