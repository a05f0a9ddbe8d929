"""FAB and targeted FAB: linear nets with known distances, logit scale, ranges, degenerate nets."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, dual, norms
from qlab.attacks.fab import FAB, FABT
from qlab.attacks.losses import misclassified
from qlab.attacks.pgd import PGD
from qlab.errors import InputError


def linear(classes: int = 2, D: int = 6, seed: int = 0, offset: float = 0.0) -> nn.Module:
    """Return a linear net in float64, its decision boundaries near the middle of the range."""
    draw = torch.Generator().manual_seed(seed)
    net = nn.Linear(D, classes).double().requires_grad_(False)
    net.weight.copy_(torch.randn(classes, D, generator=draw, dtype=torch.float64))
    net.bias.copy_(-net.weight.sum(1) * 0.5 + offset)
    return nn.Sequential(nn.Flatten(), net).eval()


def data(net: nn.Module, count: int = 20, D: int = 6, seed: int = 1, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return inputs near the middle of the range and the classes that the net decides for."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.5 + spread * (2 * torch.rand(count, D, generator=draw, dtype=torch.float64) - 1)
    return x, net(x).argmax(1)


def exact(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Return min_s |f_s| / ||w_s||_q, the distance to the nearest boundary of a linear net without a range, (N,)."""
    z, W = net(x), net[1].weight
    least = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for s in range(len(W)):
        f = z[:, s] - z.gather(1, y[:, None])[:, 0]
        quotient = f.abs() / norms(W[s] - W[y], dual(norm))
        least = torch.where(y == s, least, torch.minimum(least, quotient))
    return least


def by_program(net: nn.Module, x: np.ndarray, y: int, norm: str, low: float, high: float) -> float:
    """Return the distance to the nearest point that a linear net misclassifies within a range, by linear programs."""
    W, b = net[1].weight.numpy(), net[1].bias.numpy()
    D, size = len(x), 1 if norm == "linf" else len(x)
    t = np.ones((D, 1)) if norm == "linf" else np.eye(D)
    least = math.inf
    for s in range(len(W)):
        if s == y:
            continue
        w, value = W[s] - W[y], b[s] - b[y]
        found = linprog(
            np.concatenate([np.zeros(D), np.ones(size)]),
            A_ub=np.block([[np.eye(D), -t], [-np.eye(D), -t], [-w[None], np.zeros((1, size))]]),
            b_ub=np.concatenate([x, -x, [value]]),
            bounds=[(low, high)] * D + [(0, None)] * size,
        )
        least = min(least, math.inf if found.status == 2 else found.fun)
    return least


def on_a_line(steps: int, eta: float = 1.05, beta: float = 0.9, alpha_max: float = 0.1) -> float:
    """Return the least distance that FAB's recursion reaches before a plane at distance 1: all happens on the normal."""
    at, least = 0.0, math.inf
    for _ in range(steps):
        to_go = abs(1 - at)
        alpha = min(to_go / (to_go + 1), alpha_max)
        at = (1 - alpha) * (at + eta * (1 - at)) + alpha * eta
        if at > 1:
            least, at = min(least, at), beta * at
            least = min(least, at) if at > 1 else least
    return least


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FAB, FABT])
def test_on_a_linear_net_of_two_classes_the_distance_is_exact_up_to_the_overshoot(kind: type[FAB], norm: str) -> None:
    net = linear()
    x, y = data(net)
    truth = exact(net, x, y, norm).numpy()
    for steps, factor in ((1, 1.05), (2, on_a_line(2)), (100, on_a_line(100))):
        found = kind(steps=steps)(net, x, y, norm=norm, low=-2.0, high=3.0)
        assert found.success.all()
        assert 1 < factor <= 1.05
        np.testing.assert_allclose(found.distance, factor * truth, rtol=1e-9)
    # Settings under which alpha is cut off, and under which the point after the step back is the better find.
    for steps, eta, beta, alpha_max in ((40, 1.2, 0.5, 0.1), (40, 1.2, 0.7, 0.4), (2, 1.3, 0.9, 0.1)):
        attack = kind(steps=steps, eta=eta, beta=beta, alpha_max=alpha_max)
        found = attack(net, x, y, norm=norm, low=-2.0, high=3.0)
        np.testing.assert_allclose(found.distance, on_a_line(steps, eta, beta, alpha_max) * truth, rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_just_above_the_distance_succeeds_and_just_below_fails(norm: str) -> None:
    net = linear()
    x, y = data(net, 8)
    found = FAB()(net, x, y, norm=norm, low=-2.0, high=3.0)
    pgd = PGD(steps=20, loss="margin", random_start=False)
    for n in range(len(x)):
        d = float(found.distance[n])
        at = (x[n : n + 1], y[n : n + 1])
        assert pgd(net, *at, d * 1.001, norm=norm, low=-2.0, high=3.0).success.all()
        assert not pgd(net, *at, d / 1.01, norm=norm, low=-2.0, high=3.0).success.any()


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_net_of_many_classes_it_finds_the_nearest_boundary(norm: str) -> None:
    net = linear(5)
    x, y = data(net, 30)
    truth = exact(net, x, y, norm).numpy()
    for attack in (FAB(steps=20), FABT(steps=20)):
        found = attack(net, x, y, norm=norm, low=-9.0, high=9.0)
        assert (found.distance >= truth * (1 - 1e-12)).all()
        np.testing.assert_allclose(found.distance, truth, rtol=6e-3)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_where_the_range_cuts_it_finds_what_linear_programs_find(norm: str) -> None:
    net = linear(4, seed=5)
    x, _ = data(net, 40, spread=0.5)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.8, x.round(), x)
    y = net(x).argmax(1)
    truth = np.array([by_program(net, x[n].numpy(), int(y[n]), norm, 0.0, 1.0) for n in range(len(x))])
    free = exact(net, x, y, norm).numpy()
    assert (truth > free * 1.01).sum() >= 5, "the range must cut some"
    found = FABT()(net, x, y, norm=norm)
    np.testing.assert_array_equal(found.success, np.isfinite(truth))
    assert (found.distance >= truth * (1 - 1e-9)).all()
    # The first step alone comes as near as the overshoot; later ones nearer, less so where few coordinates are free to overshoot.
    assert (found.distance <= 1.05 * truth * (1 + 1e-9)).all()
    assert np.median(found.distance / truth) < 1.006


@pytest.mark.parametrize("norm", NORMS)
def test_points_found_lie_in_the_range_and_are_misclassified_at_the_distance_stated(
    digits_net: tuple[nn.Module, Tensor, Tensor], norm: str
) -> None:
    net, x, y = digits_net
    x, y = x[:40], y[:40]
    found = FAB(steps=20)(net, x, y, norm=norm)
    assert found.success.all()
    assert found.adversarial.shape == x.shape
    assert found.adversarial.dtype == x.dtype
    ball = Ball.of(x, torch.from_numpy(found.distance).clamp(min=1e-300), norm)
    assert bool(ball.contains(found.adversarial).all())
    np.testing.assert_array_equal(ball.distance(found.adversarial).numpy(), found.distance)
    assert bool(misclassified(net(found.adversarial), y).all())


@pytest.mark.parametrize("exponent", [20, -60])
def test_scale_of_logits_changes_nothing_though_the_softmax_saturates_or_gradients_are_tiny(
    digits_net: tuple[nn.Module, Tensor, Tensor], exponent: int
) -> None:
    net, x, y = digits_net
    x, y = x[:30], y[:30]
    other = copy.deepcopy(net)
    other[-1].weight.mul_(2.0**exponent)
    other[-1].bias.mul_(2.0**exponent)
    top = other(x).softmax(-1).amax(-1)
    assert bool((top == 1.0).all() if exponent > 0 else (top < 0.11).all())
    for attack in (FAB(steps=15, restarts=2), FABT(steps=5)):
        plain, scaled = attack(net, x, y, norm="linf"), attack(other, x, y, norm="linf")
        np.testing.assert_array_equal(plain.distance, scaled.distance)
        assert torch.equal(plain.adversarial, scaled.adversarial)


def test_a_radius_decides_success_and_nothing_else(digits_net: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits_net
    x, y = x[:60], y[:60]
    free = FAB(steps=30)(net, x, y, norm="l2")
    eps = float(np.median(free.distance))
    bound = FAB(steps=30)(net, x, y, eps, norm="l2")
    np.testing.assert_array_equal(bound.success, free.distance <= eps)
    np.testing.assert_array_equal(bound.distance[bound.success], free.distance[bound.success])
    np.testing.assert_array_equal(free.within(eps), bound.success)
    assert 0 < bound.success.sum() < len(x)
    assert bool(Ball.of(x, eps, "l2").contains(bound.adversarial).all())


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_never_lose_and_the_seed_decides(digits_net: tuple[nn.Module, Tensor, Tensor], norm: str) -> None:
    net, x, y = digits_net
    x, y = x[:30], y[:30]
    once, twice = (FAB(steps=10, restarts=r)(net, x, y, norm=norm) for r in (1, 2))
    assert (twice.distance <= once.distance).all()
    assert (twice.distance < once.distance).any()
    again = FAB(steps=10, restarts=2)(net, x, y, norm=norm)
    assert torch.equal(twice.adversarial, again.adversarial)
    other = FAB(steps=10, restarts=2, seed=1)(net, x, y, norm=norm)
    assert not torch.equal(twice.adversarial, other.adversarial)


def test_an_example_that_is_misclassified_already_has_distance_zero_and_disturbs_no_other() -> None:
    net = linear(3)
    x, y = data(net, 6)
    wrong = y.clone()
    wrong[2] = (y[2] + 1) % 3
    mixed, right = (FAB(steps=5)(net, x, t, norm="l2", low=-2.0, high=3.0) for t in (wrong, y))
    assert (mixed.distance[2], mixed.success[2], mixed.clean[2]) == (0.0, True, False)
    assert torch.equal(mixed.adversarial[2], x[2])
    rest = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(mixed.distance[rest], right.distance[rest], rtol=1e-9)
    alone = FAB(steps=5)(net, x[2:3], wrong[2:3], norm="l2", low=-2.0, high=3.0)
    assert (alone.distance[0], alone.forward) == (0.0, 1)


def test_pictures_flat_inputs_and_one_at_a_time_give_the_same() -> None:
    net = linear(4, D=6)
    x, y = data(net, 5)
    flat = FABT(steps=10)(net, x, y, norm="l2", low=-2.0, high=3.0)
    pictures = FABT(steps=10)(net, x.reshape(5, 1, 2, 3), y, norm="l2", low=-2.0, high=3.0)
    np.testing.assert_allclose(pictures.distance, flat.distance, rtol=1e-9)
    assert pictures.adversarial.shape == (5, 1, 2, 3)
    one = FABT(steps=10)(net, x[3:4], y[3:4], norm="l2", low=-2.0, high=3.0)
    np.testing.assert_allclose(one.distance, flat.distance[3:4], rtol=1e-9)


class Dead(nn.Module):
    """A net of signs, whose gradient is exactly zero everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4).double()
        self.second = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of signs."""
        return self.second(self.first(x).sign())


@pytest.mark.parametrize("norm", NORMS)
def test_a_dead_gradient_is_no_success_and_no_nan(norm: str) -> None:
    net = Dead().eval()
    x, _ = data(linear(), 5)
    y = net(x).argmax(1)
    for attack in (FAB(steps=5), FABT(steps=5)):
        found = attack(net, x, y, norm=norm)
        assert not found.success.any()
        assert np.isinf(found.distance).all()
        assert np.isfinite(found.margin).all()
        assert torch.equal(found.adversarial, x)


class Ties(nn.Module):
    """Two classes, integer logits 0 and floor(w.x), straight-through backward."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 2)."""
        a = x @ self.w
        return torch.stack([torch.zeros_like(a), a + (a.floor() - a).detach()], 1)


def test_equal_logits_of_a_net_with_integer_logits_do_not_hold_it_up() -> None:
    w = torch.tensor([1.0, -0.5, 0.5], dtype=torch.float64)
    x = torch.tensor([[0.9, 0.5, 0.5]], dtype=torch.float64)
    net = Ties(w).eval()
    assert net(x).tolist() == [[0.0, 0.0]]
    found = FAB()(net, x, torch.tensor([0]), norm="linf")
    truth = (1 - 0.9) / 2
    assert truth <= found.distance[0] <= 1.1 * truth


def test_a_range_without_end_is_no_obstacle_to_restarts() -> None:
    net = linear(3)
    x, y = data(net, 5)
    found = FAB(steps=5, restarts=3)(net, x, y, norm="l2", low=-math.inf, high=math.inf)
    np.testing.assert_allclose(found.distance, exact(net, x, y, "l2").numpy(), rtol=6e-3)
    dead = Dead().eval()
    still = FAB(steps=2, restarts=2)(dead, x, dead(x).argmax(1), norm="l2", low=-math.inf, high=math.inf, trace=True)
    assert still.trace is not None
    assert all(bool(step.points.isfinite().all()) for step in still.trace)


def test_within_a_radius_runs_leave_alone_what_others_have_broken_and_lose_nothing() -> None:
    net = linear(5)
    x, y = data(net, 20)
    free = FABT(steps=5)(net, x, y, norm="l2", low=-9.0, high=9.0)
    eps = float(np.median(free.distance)) * 1.5
    quick, thorough = (
        FABT(steps=5, early_stop=early)(net, x, y, eps, norm="l2", low=-9.0, high=9.0) for early in (True, False)
    )
    np.testing.assert_array_equal(quick.success, thorough.success)
    assert 0 < quick.success.sum() < 20
    assert quick.forward < thorough.forward
    assert (thorough.distance[thorough.success] <= quick.distance[quick.success]).all()
    assert FABT(steps=5)(net, x, y, norm="l2", low=-9.0, high=9.0).forward == thorough.forward  # without one, all runs


def test_targets_are_as_many_as_there_are_other_classes() -> None:
    net = linear(4)
    x, y = data(net, 3)
    assert FABT(steps=1)(net, x, y).forward == 3 * (1 + 3 * 2)
    assert FABT(steps=1, targets=2)(net, x, y).forward == 3 * (1 + 2 * 2)
    assert (FAB(steps=1)(net, x, y).forward, FAB(steps=1)(net, x, y).backward) == (3 * (1 + 1 + 1), 3 * 3)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"eta": 0.9}, {"beta": 1.0}, {"alpha_max": 2.0}, {"targets": 0}]
)
def test_settings_that_make_no_sense_are_said(wrong: dict) -> None:
    with pytest.raises(InputError, match="expected"):
        FABT(**wrong)
