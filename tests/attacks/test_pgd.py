"""Projected gradient descent: closed forms on linear nets, constraints, dtypes, shapes and ranges, what masks it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, Norm, dual, norms
from qlab.attacks.estimators import BACKPROP, Backprop
from qlab.attacks.losses import ce, margin, targeted_margin
from qlab.attacks.pgd import PGD, _sparse, direction
from qlab.attacks.scaling import Fixed
from qlab.attacks.victim import Victim
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError

Digits = tuple[nn.Module, Tensor, Tensor]
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 0.6, "l1": 2.0}


def two_planes(
    gap: float, dtype: torch.dtype = torch.float64, dim: int = 12
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Return a linear net of two classes, inputs that it classifies right, all with the given gap z_y - z_other, their labels, and
    the weight w of that gap (N, dim)."""
    draw = generator("two planes", 0)
    net = nn.Linear(dim, 2, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(net.weight, generator=draw)
    nn.init.zeros_(net.bias)
    x = torch.rand(20, dim, generator=draw, dtype=torch.float64)
    y = torch.arange(20) % 2
    w = (net.weight[0] - net.weight[1]) * torch.where(y == 0, 1.0, -1.0)[:, None]
    x = x + w * (gap - (x * w).sum(1, keepdim=True)) / w.square().sum(1, keepdim=True)
    return net.to(dtype).eval(), x.to(dtype), y, w


def wide(x: Tensor) -> tuple[float, float]:
    """Return a range in which no input of a test is in the way."""
    return float(x.min()) - 100, float(x.max()) + 100


# ---- linear nets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("beta", [1.0, 0.01])
def test_on_a_linear_net_the_gap_falls_by_eps_times_the_dual_norm(norm: Norm, beta: float) -> None:
    net, x, y, w = two_planes(gap=5.0)
    low, high = wide(x)
    eps = 0.5 * 5.0 / float(norms(w[:1], dual(norm)))  # half of the way to the boundary
    found = PGD(steps=60, random_start=False, scaling=Fixed(beta))(net, x, y, eps, norm=norm, low=low, high=high)
    assert not found.success.any()
    best = 5.0 - eps * norms(w, dual(norm)).numpy()
    np.testing.assert_allclose(-found.margin, best, rtol=1e-9)
    if norm == "linf":
        torch.testing.assert_close(found.adversarial, x - eps * w.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_net_it_succeeds_above_the_distance_to_the_boundary_and_not_below(norm: Norm) -> None:
    net, x, y, w = two_planes(gap=5.0)
    low, high = wide(x)
    distance = 5.0 / float(norms(w[:1], dual(norm)))
    for factor, success in ((1 + 1e-6, True), (1 - 1e-6, False)):
        found = PGD(steps=60, eta=distance)(net, x, y, factor * distance, norm=norm, low=low, high=high)
        assert (found.success == success).all()


def test_in_float32_a_gap_of_104_returns_the_random_start_and_a_temperature_wakes_it_up() -> None:
    net, x, y, w = two_planes(gap=125.0, dtype=torch.float32)
    low, high = wide(x)
    eps = 20.0 / float(norms(w[:1], "l1"))  # gaps of 105 and more in the whole ball
    plain = PGD(steps=10, early_stop=False)(net, x, y, eps, low=low, high=high, trace=True)
    start = Ball.of(x, eps, "linf", low, high).random(generator("attack", 0, 0))
    assert plain.trace is not None
    for step in plain.trace:
        assert torch.equal(step.points, start)
    scaled = PGD(steps=10, scaling=Fixed(0.01), early_stop=False)(net, x, y, eps, low=low, high=high)
    np.testing.assert_allclose(-scaled.margin, 105.0, rtol=1e-5)
    # float64 has a gradient, but 1 - p_y is rounded to 0 there: it is that of the other class alone, and its corner not the best.
    net, x = copy.deepcopy(net).double(), x.double()
    double = PGD(steps=10, early_stop=False)(net, x, y, eps, low=low, high=high, trace=True)
    assert double.trace is not None
    torch.testing.assert_close(double.trace[-1].points, x + eps * net.weight[1 - y].sign(), rtol=0, atol=1e-9)
    assert (-double.margin > 105.0 + 1e-3).all()


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-3, 0.3, 1.0, 5.0])
def test_the_gradient_of_the_scaled_loss_is_beta_times_jacobian_times_error(beta: float) -> None:
    """On W x + b the Jacobian is W: d CE(beta z) / dx = beta W^T (softmax(beta z) - e_y)."""
    draw = generator("gradient", 0)
    net = nn.Linear(7, 5, dtype=torch.float64).eval()
    nn.init.normal_(net.weight, generator=draw)
    x = torch.rand(30, 7, generator=draw, dtype=torch.float64)
    y = torch.randint(5, (30,), generator=draw)
    z, value, g = BACKPROP.gradient(Victim(net), x, lambda z: ce(beta * z, y), generator("noise", 0))
    a = beta * (x @ net.weight.detach().T + net.bias.detach())
    p = a.exp() / a.exp().sum(1, keepdim=True)
    torch.testing.assert_close(g, beta * (p - F.one_hot(y, 5)) @ net.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(value, -p.gather(1, y[:, None])[:, 0].log())
    torch.testing.assert_close(beta * z, a)


def test_the_limits_of_small_and_large_temperatures() -> None:
    draw = generator("limits", 0)
    W = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    net = nn.Linear(7, 5, bias=False, dtype=torch.float64).eval()
    net.weight.data = W
    x = torch.rand(40, 7, generator=draw, dtype=torch.float64)
    z = x @ W.T
    order = z.argsort(1, descending=True)
    right, wrong = order[:, 0], order[:, 3]

    def gradient(y: Tensor, beta: float) -> Tensor:
        return BACKPROP.gradient(Victim(net), x, lambda z: ce(beta * z, y), generator("noise", 0))[2] / beta

    uniform = torch.full((40, 5), 0.2, dtype=torch.float64)
    torch.testing.assert_close(gradient(right, 1e-9), (uniform - F.one_hot(right, 5)) @ W, rtol=1e-6, atol=1e-7)
    sharp = 60 / (z.gather(1, order[:, :1]) - z.gather(1, order[:, 1:2]))[:, 0].min()
    torch.testing.assert_close(gradient(wrong, float(sharp)), W[order[:, 0]] - W[wrong], rtol=1e-6, atol=1e-7)
    # On examples that are right it dies like exp(-beta gap) and points at the second class.
    z_sure = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    y = torch.tensor([0])
    a = (20 * z_sure).requires_grad_()
    (g,) = torch.autograd.grad(ce(a, y).sum(), a)
    torch.testing.assert_close(
        g[0] / g[0].norm(), torch.tensor([-1.0, 1, 0, 0, 0], dtype=torch.float64) / 2**0.5, rtol=1e-6, atol=1e-8
    )
    assert abs(float(g[0, 1].log()) + 20) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20])
def test_a_step_is_whole_however_small_the_gradient_and_none_where_it_is_zero(norm: Norm, scale: float) -> None:
    g = torch.randn(8, 3, 10, 10, generator=generator("direction", 0))
    g[0] = 0
    step = direction(g * scale, norm)
    expected = torch.ones(8, dtype=torch.float64)
    expected[0] = 0
    torch.testing.assert_close(norms(step, norm), expected, rtol=1e-5, atol=0)
    if scale > 1e-30:  # below, float32 keeps few bits of the numbers themselves
        torch.testing.assert_close(direction(g, norm), step, rtol=1e-5, atol=1e-6)


def test_an_l1_step_moves_the_largest_coordinates_that_can_move() -> None:
    g = torch.zeros(1, 200)
    g[0, 5], g[0, 9], g[0, 70] = 3.0, -2.0, 1.0
    assert direction(g, "l1").nonzero()[:, 1].tolist() == [5, 9]
    x = torch.full((1, 200), 0.5)
    x[0, 5] = 1.0  # at the end of the range already
    ball = Ball.of(x, 1.0, "l1")
    step = _sparse(x, g, ball)
    assert step.nonzero()[:, 1].tolist() == [5, 9, 70]  # 5 is held where it is, 9 and 70 move
    assert step[0, [5, 9, 70]].tolist() == [1.0, -0.5, 0.5]
    g[0, 5] = 0.1  # held with less force than those that move: left to the projection
    assert _sparse(x, g, ball).nonzero()[:, 1].tolist() == [9, 70]
    x[0, 5], x[0, 9], g[0, 5] = 0.0, 1.0, 3.0  # at ends that the gradient leads away from
    assert torch.equal(_sparse(x, g, ball), direction(g, "l1"))


# ---- constraints, settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    "settings", [{}, {"scaling": Fixed(0.1)}, {"loss": "dlr", "eta": 1.0}, {"random_start": False}]
)
def test_every_iterate_lies_in_ball_and_range(
    digits_net: Digits, norm: Norm, steps: int, settings: dict[str, Any]
) -> None:
    net, x, y = digits_net
    found = PGD(steps=steps, early_stop=False, **settings)(net, x, y, EPS[norm], norm=norm, trace=True)
    ball = Ball.of(x, EPS[norm], norm)
    assert found.trace is not None
    assert len(found.trace) == steps + 1
    for step in found.trace:
        assert bool(ball.contains(step.points).all())
    assert bool(ball.contains(found.adversarial).all())


def test_a_scaling_of_one_is_plain_pgd_bit_for_bit(digits_net: Digits) -> None:
    net, x, y = digits_net
    plain, one = (PGD(steps=5, scaling=s)(net, x, y, 0.1) for s in (PGD().scaling, Fixed(1.0)))
    assert torch.equal(plain.adversarial, one.adversarial)
    assert (plain.margin == one.margin).all()


def test_the_steps_are_those_of_the_formula(digits_net: Digits) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).double(), digits_net[1][:40].double(), digits_net[2][:40]
    found = PGD(steps=4, eta=0.03, random_start=False, early_stop=False)(net, x, y, 0.07, trace=True)
    assert found.trace is not None
    points, at = x, torch.from_numpy(found.clean)
    for step in found.trace:
        torch.testing.assert_close(step.points[at], points[at], rtol=0, atol=1e-12)
        points = points.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(points), y, reduction="sum"), points)
        points = torch.clamp(torch.clamp(points + 0.03 * g.sign(), x - 0.07, x + 0.07), 0, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_only_add(digits_net: Digits, norm: Norm) -> None:
    net, x, y = digits_net
    one, five = (PGD(steps=4, restarts=r)(net, x, y, EPS[norm], norm=norm) for r in (1, 5))
    assert (five.success >= one.success).all()
    assert five.success.sum() > one.success.sum()


def test_without_a_random_start_the_first_run_starts_at_x_and_the_others_do_not(digits_net: Digits) -> None:
    net, x, y = digits_net
    found = PGD(steps=2, restarts=2, random_start=False, early_stop=False)(net, x, y, 0.05, trace=True)
    assert found.trace is not None
    assert torch.equal(found.trace[0].points, x)
    right = torch.from_numpy(found.clean)
    assert bool((found.trace[3].points != x)[right].flatten(1).any(1).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_leaving_broken_examples_alone_changes_no_success(digits_net: Digits, norm: Norm, loss: str) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).double(), digits_net[1].double(), digits_net[2]
    early, late = (
        PGD(steps=8, restarts=2, loss=loss, early_stop=stop)(net, x, y, EPS[norm], norm=norm) for stop in (True, False)
    )
    assert (early.success == late.success).all()
    assert early.forward < late.forward
    assert (late.margin >= early.margin - 1e-12).all()


def test_a_tiny_radius_reproduces_the_clean_accuracy_and_an_unbounded_one_breaks_all(digits_net: Digits) -> None:
    net, x, y = digits_net
    for norm in NORMS:
        tiny = PGD(steps=5)(net, x, y, 1e-30, norm=norm)
        assert (tiny.success == ~tiny.clean).all()
        assert tiny.accuracy == float((net(x).argmax(1) == y).double().mean())
    assert PGD(steps=20)(net, x, y, 1.0).accuracy == 0
    assert PGD(steps=20)(net, x, y, float("inf")).accuracy == 0
    assert PGD(steps=40)(net, x, y, float("inf"), norm="l2").accuracy == 0


def test_a_larger_ball_breaks_more(digits_net: Digits) -> None:
    net, x, y = digits_net
    accuracies = [PGD()(net, x, y, eps).accuracy for eps in (0.02, 0.05, 0.1, 0.2, 0.3)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.9
    assert accuracies[-1] == 0


# ---- any dtype, shape and range -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_every_dtype_is_attacked_in_itself(digits_net: Digits, dtype: torch.dtype, norm: Norm) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).to(dtype), digits_net[1][:100].to(dtype), digits_net[2][:100]
    found = PGD(steps=10)(net, x, y, EPS[norm], norm=norm)
    reference = PGD(steps=10)(digits_net[0], digits_net[1][:100], y, EPS[norm], norm=norm)
    assert found.adversarial.dtype == dtype
    assert bool(Ball.of(x, EPS[norm], norm).contains(found.adversarial).all())
    # The same random start, rounded: what changes is rounding. Half floats have 8 to 11 bits; in l1 a step may move another pixel.
    assert (found.success == reference.success).mean() >= (0.99 if dtype.itemsize >= 4 and norm != "l1" else 0.9)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (4, 16), (2, 8, 4), (1, 1, 64, 1), (64, 1, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_shapes_mean_nothing(digits_net: Digits, shape: tuple[int, ...], norm: Norm) -> None:
    net, x, y = digits_net
    square, other = (
        PGD(steps=4)(net, x[:50].reshape(50, *s), y[:50], EPS[norm], norm=norm) for s in ((1, 8, 8), shape)
    )
    assert other.adversarial.shape == (50, *shape)
    assert torch.equal(other.adversarial.flatten(), square.adversarial.flatten())


@pytest.mark.parametrize("norm", NORMS)
def test_ranges_mean_nothing(digits_net: Digits, norm: Norm) -> None:
    """Inputs in [-1, 3] and a net that maps them to [0, 1] itself: eps counts in their units."""
    net, x, y = copy.deepcopy(digits_net[0]).double(), digits_net[1][:100].double(), digits_net[2][:100]

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net((x + 1) / 4)

    one = PGD(steps=8, random_start=False)(net, x, y, EPS[norm], norm=norm)
    other = PGD(steps=8, random_start=False)(Shifted().eval(), 4 * x - 1, y, 4 * EPS[norm], norm=norm, low=-1, high=3)
    torch.testing.assert_close((other.adversarial + 1) / 4, one.adversarial, rtol=0, atol=1e-9)
    assert (one.success == other.success).all()


def test_every_channel_may_have_its_own_range() -> None:
    draw = generator("channels", 0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 3)).eval()
    nn.init.normal_(net[1].weight, generator=draw)
    low, high = torch.tensor([-2.0, 0.0, 5.0])[:, None, None], torch.tensor([-1.0, 1.0, 7.0])[:, None, None]
    x = low + (high - low) * torch.rand(30, 3, 4, 5, generator=draw)
    found = PGD(steps=6)(net, x, net(x).argmax(1), 0.3, low=low, high=high)
    assert bool((found.adversarial >= low).all())
    assert bool((found.adversarial <= high).all())
    assert found.success.any()


# ---- losses, estimators, complaints ---------------------------------------------------------------------------------


def test_a_loss_may_be_any_function_of_logits_and_labels(digits_net: Digits) -> None:
    net, x, y = digits_net

    def towards_three(z: Tensor, y: Tensor) -> Tensor:
        return targeted_margin(z, y, torch.full_like(y, 3))

    found = PGD(steps=20, loss=towards_three, early_stop=False)(net, x, y, 0.3, trace=True)
    assert found.trace is not None
    at = torch.from_numpy(found.clean) & (y != 3)
    z = net(found.trace[-1].points)
    assert bool((towards_three(z, y) > towards_three(net(x), y))[at].all())
    assert (z.argmax(1) == 3)[at].double().mean() > 0.5  # of 10 classes
    assert "loss=towards_three" in found.attack


def test_logit_scale_drowns_cross_entropy_and_not_the_margin(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Times(nn.Module):
        def __init__(self, c: float) -> None:
            super().__init__()
            self.c = c

        def forward(self, x: Tensor) -> Tensor:
            return self.c * net(x)

    accuracy = {
        (loss, c): PGD(loss=loss, random_start=False)(Times(c).eval(), x, y, 0.1).accuracy
        for loss in ("ce", "margin", "dlr")
        for c in (1.0, 128.0)
    }
    assert accuracy["margin", 1.0] == accuracy["margin", 128.0]
    assert accuracy["dlr", 1.0] == accuracy["dlr", 128.0]
    assert accuracy["ce", 128.0] > accuracy["ce", 1.0] + 0.3


def test_gradients_come_from_the_estimator(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Backwards(Backprop):
        def gradient(
            self, victim: Victim, x: Tensor, f: Any, generator: torch.Generator
        ) -> tuple[Tensor, Tensor, Tensor]:
            z, v, g = super().gradient(victim, x, f, generator)
            return z, v, -g

    found = PGD(steps=5, estimator=Backwards(), random_start=False, early_stop=False)(net, x, y, 0.1, trace=True)
    assert found.trace is not None
    at = torch.from_numpy(found.clean)
    assert bool((margin(net(found.trace[-1].points), y) < margin(net(x), y))[at].all())


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"restarts": 0}, {"eta": 0.0}, {"eta": -1.0}, {"eta": float("nan")}]
)  # fmt: skip
def test_settings_that_are_none_are_said(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        PGD(**settings)


def test_a_loss_that_is_none_is_said(digits_net: Digits) -> None:
    with pytest.raises(UnknownNameError, match="margin"):
        PGD(loss="marginn")(*digits_net, 0.1)
