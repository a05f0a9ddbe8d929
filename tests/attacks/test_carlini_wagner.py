"""Carlini and Wagner's l2 attack: linear nets with known distances, both changes of variables, confidence, degenerate nets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball
from qlab.attacks.carlini_wagner import BOXES, CarliniWagner, Change
from qlab.attacks.deepfool import DeepFool
from qlab.attacks.losses import margin, misclassified
from qlab.errors import InputError, UnknownNameError
from tests.attacks.test_fab import Dead, data, exact, linear
from tests.attacks.test_hyperplane import by_enumeration

FAST = {"steps": 100, "searches": 5, "c": 0.3}


@pytest.mark.parametrize("box", BOXES)
def test_on_a_linear_net_the_distance_is_exact_within_two_percent(box: str) -> None:
    net = linear(2)
    x, y = data(net, 20, spread=0.4)
    truth = exact(net, x, y, "l2").numpy()
    attack = CarliniWagner(steps=200, searches=6, c=0.1, box=box)
    found = attack(net, x, y, norm="l2", low=-1.0, high=2.0)
    assert found.success.all()
    assert (found.distance >= truth * (1 - 1e-12)).all()
    far = truth > attack.lr * 3  # one step of Adam, in the units of the inputs
    assert far.sum() >= 15
    np.testing.assert_allclose(found.distance[far], truth[far], rtol=0.02)


def test_with_many_classes_nothing_is_found_below_the_true_distance() -> None:
    net = linear(5)
    x, y = data(net, 20, spread=0.4)
    found = CarliniWagner(**FAST)(net, x, y, norm="l2", low=-1.0, high=2.0)
    assert found.success.all()
    assert (found.distance >= exact(net, x, y, "l2").numpy() * (1 - 1e-12)).all()


@pytest.mark.parametrize("box", BOXES)
def test_where_the_range_cuts_it_comes_near_what_enumeration_finds(box: str) -> None:
    net = linear(2, D=5, seed=5)
    x, _ = data(net, 12, D=5, spread=0.4)
    x[:, ::2] = torch.where(x[:, ::2] < 0.5, 0.02, 0.98).double()
    y = net(x).argmax(1)
    W = net[1].weight
    truth, free = [], exact(net, x, y, "l2").numpy()
    for n in range(len(x)):
        z, k = net(x[n : n + 1])[0], int(y[n])
        w, f = (W[1 - k] - W[k]).numpy(), float(z[1 - k] - z[k])
        truth.append(by_enumeration(x[n].numpy(), w, f, 0.0, 1.0) or math.inf)
    assert (np.array(truth) > free * 1.01).sum() >= 3, "the range must cut some"
    found = CarliniWagner(steps=200, searches=6, c=0.3, box=box)(net, x, y, norm="l2")
    assert (found.distance >= np.array(truth) * (1 - 1e-9)).all()
    np.testing.assert_allclose(found.distance, truth, rtol=0.03)
    assert bool(Ball.of(x, 9.0, "l2").contains(found.adversarial).all())


@pytest.mark.parametrize("box", BOXES)
def test_change_of_variables_is_what_it_says(box: str) -> None:
    x = torch.tensor([[0.0, 0.5, 3.0], [-1.0, 1.0, 2.0]], dtype=torch.float64)
    change = Change(Ball.of(x, math.inf, "l2", -1.0, 3.0), box)
    v = change.start(x)
    torch.testing.assert_close(change.points(v), x, atol=1e-5, rtol=0)
    wild = change.clip(v + 100 * torch.tensor([[1.0], [-1.0]]))
    assert bool(Ball.of(x, math.inf, "l2", -1.0, 3.0).contains(change.points(wild)).all())
    inner = change.start(x.clamp(-0.9, 2.9)).requires_grad_()
    wide = inner * change.width if box == "clamp" else change.low + (change.high - change.low) * (1 + inner.tanh()) / 2
    (g,) = torch.autograd.grad(wide.sum(), inner)
    torch.testing.assert_close(g, torch.as_tensor(change.slope(inner.detach())).double().expand_as(g))


@pytest.mark.parametrize("box", BOXES)
def test_units_of_the_inputs_do_not_matter(box: str) -> None:
    net = linear(3)
    x, y = data(net, 5)

    class Bytes(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return net(u / 256)

    attack = CarliniWagner(steps=40, searches=5, c=0.1, box=box)
    unit = attack(net, x, y, norm="l2")
    byte = attack(Bytes().eval(), x * 256, y, norm="l2", high=256.0)
    assert unit.success.any()
    np.testing.assert_allclose(byte.distance, unit.distance * 256, rtol=1e-6)


@pytest.mark.parametrize("box", BOXES)
def test_pictures_of_black_and_white_do_not_look_robust(digits_net: tuple[nn.Module, Tensor, Tensor], box: str) -> None:
    net, x, _ = digits_net
    x = x[:10].round()
    y = net(x).argmax(1)
    found = CarliniWagner(steps=600, searches=1, c=10.0, box=box)(net, x, y, norm="l2")
    assert found.success.all()
    assert bool(misclassified(net(found.adversarial), y).all())
    assert bool(((found.adversarial >= 0) & (found.adversarial <= 1)).all())


def test_on_a_trained_net_it_comes_nearer_than_deepfool(digits_net: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits_net
    x, y = x[:20], y[:20]
    found = CarliniWagner(steps=150, searches=5, c=0.3)(net, x, y, norm="l2")
    other = DeepFool()(net, x, y, norm="l2")
    assert found.success.all()
    assert np.median(found.distance) < np.median(other.distance)
    np.testing.assert_array_equal(Ball.of(x, math.inf, "l2").distance(found.adversarial).numpy(), found.distance)


def test_confidence_is_kept_and_costs_its_distance() -> None:
    net = linear(2)
    x, y = data(net, 10)
    kappa = 0.5
    found = CarliniWagner(**FAST, kappa=kappa)(net, x, y, norm="l2", low=-1.0, high=2.0)
    assert found.success.all()
    assert float(margin(net(found.adversarial), y).min()) >= kappa
    w = net[1].weight[1] - net[1].weight[0]
    truth = (margin(net(x), y).abs() + kappa).numpy() / float(w.norm())
    assert (found.distance >= truth * (1 - 1e-12)).all()
    np.testing.assert_allclose(found.distance, truth, rtol=0.03)


def test_a_radius_decides_success_and_nothing_else() -> None:
    net = linear(3)
    x, y = data(net, 20)
    free = CarliniWagner(**FAST)(net, x, y, norm="l2")
    eps = float(np.median(free.distance))
    bound = CarliniWagner(**FAST)(net, x, y, eps, norm="l2")
    np.testing.assert_array_equal(bound.success, free.distance <= eps)
    np.testing.assert_array_equal(bound.distance[bound.success], free.distance[bound.success])
    assert 0 < bound.success.sum() < 20


def test_examples_do_not_disturb_each_other() -> None:
    net = linear(3)
    x, y = data(net, 4)
    wrong = y.clone()
    wrong[1] = (y[1] + 1) % 3
    attack = CarliniWagner(steps=40, searches=4, c=1.0)
    mixed = attack(net, x, wrong, norm="l2")
    assert (mixed.distance[1], mixed.clean[1], mixed.success[1]) == (0.0, False, True)
    for n in (0, 2, 3):
        alone = attack(net, x[n : n + 1].reshape(1, 1, 2, 3), y[n : n + 1], norm="l2")
        np.testing.assert_allclose(alone.distance, mixed.distance[n : n + 1], rtol=1e-6)
    none = attack(net, x[1:2], wrong[1:2], norm="l2")
    assert (none.distance[0], none.forward) == (0.0, 1)


def test_leaving_alone_what_does_not_get_better_saves_questions_and_loses_little() -> None:
    net = linear(2)
    x, y = data(net, 10, spread=0.4)
    all_of_it = CarliniWagner(**FAST, abort_early=False)(net, x, y, norm="l2")
    short = CarliniWagner(**FAST)(net, x, y, norm="l2")
    assert all_of_it.forward == 10 * (1 + FAST["searches"] * FAST["steps"])
    assert short.forward < 0.9 * all_of_it.forward
    far = exact(net, x, y, "l2").numpy() > 0.03
    np.testing.assert_allclose(short.distance[far], all_of_it.distance[far], rtol=0.02)


@pytest.mark.parametrize("box", BOXES)
def test_a_dead_gradient_is_no_success_and_no_nan(box: str) -> None:
    net = Dead().eval()
    x, _ = data(linear(), 5)
    found = CarliniWagner(steps=20, searches=9, c=1e9, box=box)(net, x, net(x).argmax(1), norm="l2")
    assert not found.success.any()
    assert np.isinf(found.distance).all()
    assert np.isfinite(found.margin).all()
    assert bool(found.adversarial.isfinite().all())


def test_an_unbounded_range_takes_clamping_only() -> None:
    net = linear(2)
    x, y = data(net, 3)
    with pytest.raises(InputError, match="clamp"):
        CarliniWagner(box="tanh")(net, x, y, norm="l2", low=-math.inf, high=math.inf)
    found = CarliniWagner(**FAST)(net, x[[0, 2]], y[[0, 2]], norm="l2", low=-math.inf, high=math.inf)
    truth = exact(net, x[[0, 2]], y[[0, 2]], "l2").numpy()
    assert truth.min() > 0.03
    np.testing.assert_allclose(found.distance, truth, rtol=0.02)


def test_settings_that_make_no_sense_are_said() -> None:
    for wrong in ({"steps": 0}, {"searches": 0}, {"c": 0.0}, {"lr": -1.0}, {"kappa": -1.0}):
        with pytest.raises(InputError, match="expected"):
            CarliniWagner(**wrong)
    with pytest.raises(UnknownNameError):
        CarliniWagner(box="sigmoid")  # type: ignore[arg-type]
    net = linear()
    x, y = data(net, 2)
    with pytest.raises(InputError, match="l2"):
        CarliniWagner()(net, x, y, norm="linf")
