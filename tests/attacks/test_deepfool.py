"""DeepFool: exact on linear nets, an upper bound elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball, Norm
from qlab.attacks.deepfool import DeepFool
from qlab.attacks.fab import FAB
from qlab.attacks.losses import misclassified
from qlab.errors import InputError
from tests.attacks.test_fab import Dead, Ties, by_program, data, exact, linear

BOTH: tuple[Norm, ...] = ("linf", "l2")


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_on_a_linear_net_one_step_is_exact_up_to_the_overshoot(norm: Norm, overshoot: float) -> None:
    net = linear(5)
    x, y = data(net, 30)
    found = DeepFool(overshoot=overshoot, push=0)(net, x, y, norm=norm, low=-9.0, high=9.0)
    assert found.success.all()
    np.testing.assert_allclose(found.distance, (1 + overshoot) * exact(net, x, y, norm).numpy(), rtol=1e-9)
    # The logits at x; x again, with the gradients of four classes; where the step led, with gradients that are not needed.
    assert (found.forward, found.backward) == (30 * 3, 30 * 2 * 4)


@pytest.mark.parametrize("norm", BOTH)
def test_step_is_that_of_the_paper(norm: Norm) -> None:
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval().requires_grad_(False)
    for m in net:
        if isinstance(m, nn.Linear):
            m.weight.normal_(generator=draw)
    x = torch.rand(4, 4, generator=draw, dtype=torch.float64)
    y = net(x).argmax(1)
    found = DeepFool(steps=2, overshoot=0.0, push=0)(net, x, y, norm=norm, low=-99.0, high=99.0, trace=True)
    assert found.trace is not None
    for n in range(4):
        J, z, k = torch.autograd.functional.jacobian(net, x[n]), net(x[n]), int(y[n])
        steps = []
        for s in set(range(3)) - {k}:
            w, f = J[s] - J[k], (z[s] - z[k]).abs()
            r = f / w.norm() ** 2 * w if norm == "l2" else f / w.abs().sum() * w.sign()
            steps.append((float(r.norm() if norm == "l2" else r.abs().max()), r))
        torch.testing.assert_close(found.trace[1].points[n], x[n] + min(steps, key=lambda pair: pair[0])[1])


def test_where_the_range_cuts_a_linear_net_of_two_classes_it_ends_within_the_overshoot_or_not_at_all() -> None:
    net = linear(2, seed=5)
    x, _ = data(net, 20, spread=0.5)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5, x.round(), x)
    y = net(x).argmax(1)
    truth = np.array([by_program(net, x[n].numpy(), int(y[n]), "linf", 0.0, 1.0) for n in range(len(x))])
    free = exact(net, x, y, "linf").numpy()
    assert (truth > free * 1.01).sum() >= 5, "the range must cut some"
    found = DeepFool(push=0)(net, x, y, norm="linf")
    assert (found.distance >= truth * (1 - 1e-9)).all()
    arrived = np.isfinite(found.distance)
    assert arrived.mean() >= 0.95  # a step that the range cuts short gains little, and the steps may be used up
    tie = 1e-3  # a point that lies on the plane is taken to be this far from it
    assert (found.distance[arrived] <= 1.02 * (truth[arrived] + tie)).all()
    assert bool(Ball.of(x, 1.0, "linf").contains(found.adversarial).all())


@pytest.mark.parametrize("norm", BOTH)
def test_on_a_trained_net_it_breaks_all_and_comes_about_as_near_as_fab(
    digits_net: tuple[nn.Module, Tensor, Tensor], norm: Norm
) -> None:
    net, x, y = digits_net
    x, y = x[:60], y[:60]
    found = DeepFool()(net, x, y, norm=norm)
    assert found.success.all()
    assert bool(misclassified(net(found.adversarial), y).all())
    assert bool(((found.adversarial >= 0) & (found.adversarial <= 1)).all())
    nearer = FAB()(net, x, y, norm=norm)
    assert np.median(found.distance) == pytest.approx(np.median(nearer.distance), rel=0.02)


def test_only_the_leading_classes_are_looked_at() -> None:
    net = linear(5)
    x, y = data(net, 4)
    all_of_them = DeepFool(classes=None)(net, x, y, low=-9.0, high=9.0)
    two = DeepFool(classes=2)(net, x, y, low=-9.0, high=9.0)
    assert (all_of_them.backward, two.backward) == (4 * 2 * 4, 4 * 2)
    assert (all_of_them.distance <= two.distance + 1e-12).all()
    second = net(x).argsort(1, descending=True)[:, 1]
    assert torch.equal(net(two.adversarial).argsort(1, descending=True)[:, 0], second)


def test_a_radius_decides_success_and_nothing_else() -> None:
    net = linear(3)
    x, y = data(net, 20)
    free = DeepFool()(net, x, y, norm="l2", low=-9.0, high=9.0)
    eps = float(np.median(free.distance))
    bound = DeepFool()(net, x, y, eps, norm="l2", low=-9.0, high=9.0)
    np.testing.assert_array_equal(bound.success, free.distance <= eps)
    assert 0 < bound.success.sum() < 20


def test_one_example_pictures_and_one_that_is_misclassified_already() -> None:
    net = linear(3)
    x, y = data(net, 4)
    flat = DeepFool()(net, x, y, norm="l2", low=-9.0, high=9.0)
    pictures = DeepFool()(net, x.reshape(4, 1, 3, 2), y, norm="l2", low=-9.0, high=9.0)
    np.testing.assert_allclose(pictures.distance, flat.distance, rtol=1e-9)
    one = DeepFool()(net, x[:1], y[:1], norm="l2", low=-9.0, high=9.0)
    np.testing.assert_allclose(one.distance, flat.distance[:1], rtol=1e-9)
    wrong = DeepFool()(net, x[:1], (y[:1] + 1) % 3, norm="l2", low=-9.0, high=9.0)
    assert (wrong.distance[0], wrong.clean[0], wrong.forward) == (0.0, False, 1)


@pytest.mark.parametrize("norm", BOTH)
def test_a_dead_gradient_is_no_success_and_no_nan(norm: Norm) -> None:
    net = Dead().eval()
    x, _ = data(linear(), 5)
    found = DeepFool(steps=5)(net, x, net(x).argmax(1), norm=norm)
    assert not found.success.any()
    assert np.isinf(found.distance).all()
    assert torch.equal(found.adversarial, x)


def test_equal_logits_of_a_net_with_integer_logits_do_not_hold_it_up() -> None:
    x = torch.tensor([[0.9, 0.5, 0.5]], dtype=torch.float64)
    net = Ties(torch.tensor([1.0, -0.5, 0.5], dtype=torch.float64)).eval()
    found = DeepFool(steps=100)(net, x, torch.tensor([0]), norm="linf")
    assert 0.05 <= found.distance[0] <= 0.055


def test_settings_that_make_no_sense_are_said() -> None:
    for wrong in ({"steps": 0}, {"overshoot": -1.0}, {"classes": 1}):
        with pytest.raises(InputError, match="expected"):
            DeepFool(**wrong)
    net = linear()
    x, y = data(net, 2)
    with pytest.raises(InputError, match="linf, l2"):
        DeepFool()(net, x, y, norm="l1")
