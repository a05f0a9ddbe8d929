"""Attacks of other packages: corrected, booked as our own, and no stronger on a float net."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.adapters import Foreign, from_captum, from_foolbox, from_torchattacks
from qlab.attacks.fgsm import FGSM
from qlab.attacks.pgd import PGD
from qlab.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports from an old place in scipy
    import foolbox

Net = tuple[nn.Module, Tensor, Tensor]
EPS = 0.05


class Scaled(nn.Module):
    """A net with its logits multiplied: the same decisions, a saturated softmax."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)


def test_captums_pgd_with_its_threshold_calls_a_saturated_net_robust_and_without_it_equals_ours(
    digits_net: Net,
) -> None:
    net, x, y = digits_net
    loud = Scaled(net, 5.0).eval()
    theirs = from_captum("PGD", 10)(loud, x, y, EPS)
    blind = from_captum("PGD", 10, zero_thresh=1e-6)(loud, x, y, EPS)
    ours = PGD(10, random_start=False)(loud, x, y, EPS)
    assert blind.accuracy > theirs.accuracy + 0.02
    assert ours.accuracy <= theirs.accuracy  # theirs keeps the last point, ours the best
    assert theirs.accuracy - ours.accuracy < 0.02
    assert "gradient threshold 0 instead of 1e-06" in theirs.summary()
    assert theirs.backward == 10 * int(theirs.clean.sum())


def test_captums_fgsm_equals_ours(digits_net: Net) -> None:
    net, x, y = digits_net
    theirs, ours = from_captum("FGSM")(net, x, y, EPS), FGSM()(net, x, y, EPS)
    assert theirs.accuracy == ours.accuracy


def test_foolbox_pgd_is_no_stronger_than_ours_and_its_points_lie_in_the_ball(digits_net: Net) -> None:
    net, x, y = digits_net
    peer = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=EPS / 4, steps=10, random_start=False)
    theirs = from_foolbox(peer)(net, x, y, EPS)
    ours = PGD(10, random_start=False)(net, x, y, EPS)
    assert ours.accuracy <= theirs.accuracy < theirs.clean.mean()
    delta = (theirs.adversarial.double() - x.double()).abs().flatten(1).amax(1)
    assert bool((delta <= EPS).all())


def test_foolbox_deepfool_is_booked_without_an_eps(digits_net: Net) -> None:
    net, x, y = digits_net
    found = from_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=30), nearest=True)(net, x[:40], y[:40], norm="l2")
    assert found.accuracy == 0
    norm = (found.adversarial.double() - x[:40].double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(norm, torch.from_numpy(found.distance))


class Stand:
    """What an attack class of torchattacks looks like: made of a net and settings, called with inputs in [0, 1] and labels."""

    made: list[Stand] = []

    def __init__(self, net: nn.Module, eps: float, up: bool = True) -> None:
        self.net, self.eps, self.up, self.eps_for_division = net, eps, up, 1e-10
        Stand.made.append(self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        self.net(x)
        return x + (self.eps if self.up else -self.eps)


def test_a_torchattacks_class_gets_the_range_it_expects_and_a_smaller_number_in_its_norms(digits_net: Net) -> None:
    net, x, y = digits_net

    class Wide(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return net((v + 1) / 2)

    Stand.made.clear()
    found = from_torchattacks(Stand, up=False)(Wide().eval(), 2 * x - 1, y, 0.1, low=-1.0, high=1.0)
    made = Stand.made[0]
    assert made.eps == pytest.approx(0.05)
    assert made.eps_for_division == 1e-38
    left = torch.from_numpy(found.clean & ~found.success)
    moved = (found.adversarial.double() - (2 * x - 1).double())[left]
    assert float(moved.min()) >= -0.1
    assert float(moved.min()) < -0.0999
    assert found.forward > len(x)


def test_a_package_that_uses_the_global_generator_leaves_it_as_it_was(digits_net: Net) -> None:
    net, x, y = digits_net

    def run(net: nn.Module, ball: Any, y: Tensor) -> Tensor:
        return ball.x + 0.01 * torch.rand(ball.x.shape)

    attack = Foreign(run, "noise")
    before = torch.get_rng_state()
    first = attack(net, x, y, EPS)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(attack(net, x, y, EPS).adversarial, first.adversarial)


def test_what_a_package_cannot_do_is_said(digits_net: Net) -> None:
    net, x, y = digits_net
    with pytest.raises(InputError, match="FGSM and PGD, not 'CW'"):
        from_captum("CW")
    with pytest.raises(InputError, match="not made for l1"):
        from_captum("PGD")(net, x, y, EPS, norm="l1")
    with pytest.raises(InputError, match="one range for all inputs"):
        from_captum("PGD")(net, x, y, EPS, low=torch.tensor([0.0] * 8), high=torch.linspace(1, 2, 8))
    with pytest.raises(InputError, match="returned points of shape"):
        Foreign(lambda net, ball, y: ball.x[:1], "short")(net, x, y, EPS)
