"""Boundary attack: the exact distance on linear nets, decisions as the only thing it looks at, and where it starts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball, Norm, dual, norms
from qlab.attacks.boundary import Boundary, _Cube, _Sphere
from qlab.attacks.pgd import PGD
from qlab.errors import InputError, UnknownNameError
from tests.attacks.test_random_search import linear
from tests.attacks.test_square import After, Counting, draw, labelled, mlp, pictures

F64 = torch.float64


def dividing(x: Tensor) -> nn.Module:
    """Return a linear net of two classes whose plane has half of an even number of inputs on either side."""
    net = linear(x[0].numel(), seed=3)
    with torch.no_grad():
        z = net(x)
        f = (z[:, 1] - z[:, 0]).sort().values
        net[1].bias[0] += f[len(f) // 2 - 1 : len(f) // 2 + 1].mean()  # type: ignore[index]
    return net


def exact(net: nn.Module, x: Tensor, norm: Norm) -> np.ndarray:
    """Return the distance of x to the plane of a linear net of two classes: |f(x)| / ||w||_q."""
    w = (net[1].weight[1] - net[1].weight[0]).detach()  # type: ignore[index]
    z = net(x).detach()
    return ((z[:, 1] - z[:, 0]).abs() / norms(w[None], dual(norm))).numpy()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("shape", [(6,), (2, 2, 3)])
def test_it_approaches_the_exact_distance_on_a_linear_net(norm: Norm, shape: tuple[int, ...]) -> None:
    x = pictures(20, *shape)
    net = dividing(x)
    found = Boundary(steps=600)(net, x, labelled(net, x), norm=norm, low=-10.0, high=10.0)
    least = exact(net, x, norm)
    assert found.success.all()
    assert (found.distance >= least * (1 - 1e-9)).all()
    assert (found.distance <= least * 1.001).all()


def test_on_a_linear_net_in_a_box_it_stays_above_the_least_distance_in_the_box() -> None:
    from scipy.optimize import minimize

    x = pictures(6, 5)
    net = dividing(x)
    y = labelled(net, x)
    found = Boundary(steps=600)(net, x, y, norm="l2")
    w = (net[1].weight[1] - net[1].weight[0]).detach().numpy()  # type: ignore[index]
    b = float((net[1].bias[1] - net[1].bias[0]).detach())  # type: ignore[index]
    for i in range(6):
        best = minimize(
            lambda p, i=i: ((p - x[i].numpy()) ** 2).sum(), x[i].numpy(), method="SLSQP", bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda p: p @ w + b}, options={"ftol": 1e-14, "maxiter": 200},
        )  # fmt: skip
        least = best.fun**0.5
        assert least * (1 - 1e-5) <= found.distance[i] <= least * 1.02


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "f", [torch.atan, lambda z: z**3, lambda z: 1e6 * z + 3, lambda z: (z - z.amax(1, keepdim=True) >= 0).double()]
)
def test_only_decisions_count(norm: Norm, f: Callable[[Tensor], Tensor]) -> None:
    net, x = mlp(12), pictures(15, 12)
    y = labelled(net, x)
    attack = Boundary(steps=40)
    plain, changed = attack(net, x, y, norm=norm), attack(After(net, f), x, y, norm=norm)
    assert plain.success.any()
    assert torch.equal(plain.adversarial, changed.adversarial)
    np.testing.assert_array_equal(plain.distance, changed.distance)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_walk_stays_misclassified_and_only_comes_nearer(norm: Norm) -> None:
    net, x = mlp(27), pictures(15, 3, 3, 3)
    y = labelled(net, x)
    found = Boundary(steps=60)(net, x, y, norm=norm, trace=True)
    assert found.trace is not None
    ball = Ball.of(x, 1.0, norm)
    distances = torch.stack([ball.distance(step.points) for step in found.trace])
    assert bool((distances.diff(dim=0) <= 1e-15).all())
    at = torch.as_tensor(found.success)
    for step in found.trace:
        assert bool((labelled(net, step.points)[at] != y[at]).all())
        assert bool(((step.points >= 0) & (step.points <= 1)).all())
    np.testing.assert_array_equal(distances[-1].numpy()[found.success], found.distance[found.success])


def test_steps_on_the_sphere_keep_the_distance_and_are_orthogonal() -> None:
    x = pictures(40, 30)
    ball = Ball.of(x, 1.0, "l2", -9.0, 9.0)
    walk = _Sphere(ball, Boundary(orthogonal=0.2, source=0.1))
    points = x + torch.randn(40, 30, generator=draw(3), dtype=F64)
    o, s = walk.propose(torch.arange(40), points, draw(4))
    D = ball.distance(points)
    torch.testing.assert_close(ball.distance(o), D, rtol=1e-12, atol=0)
    torch.testing.assert_close(ball.distance(s), 0.9 * D, rtol=1e-12, atol=0)
    # Before the projection the step had length 0.2 D, at a right angle: the angle between both radii is atan 0.2.
    cosine = ((o - x) * (points - x)).sum(1) / D.square()
    torch.testing.assert_close(cosine, torch.full_like(cosine, 1 / 1.04**0.5), rtol=1e-12, atol=0)
    cosine = ((s - x) * (o - x)).sum(1) / (ball.distance(s) * D)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=0)


def test_steps_on_the_cube_change_a_run_and_never_leave_it() -> None:
    x = pictures(60, 4, 5)
    ball = Ball.of(x, 1.0, "linf", -9.0, 9.0)
    walk = _Cube(ball, Boundary(orthogonal=0.25, source=0.1))
    points = x + torch.rand(60, 4, 5, generator=draw(3), dtype=F64) - 0.5
    D = ball.distance(points)
    o, s = walk.propose(torch.arange(60), points, draw(4))
    torch.testing.assert_close(ball.distance(o), (1 - 1e-3) * D, rtol=1e-12, atol=0)
    torch.testing.assert_close(ball.distance(s), 0.9 * D, rtol=1e-12, atol=0)
    moved = ((o - points).abs().flatten(1) > 1.1e-3 * D[:, None]).sum(1)
    assert int(moved.max()) <= 5
    assert int(moved.min()) >= 4  # one of five may have been at this end before
    assert bool(((s - x).abs() <= (points - x).abs() + 1e-12).all())


def test_sizes_follow_success() -> None:
    ball = Ball.of(pictures(4, 9), 1.0, "l2", -9.0, 9.0)
    walk = _Sphere(ball, Boundary(orthogonal=0.2, source=0.1, adapt=0.3))
    wrong = torch.tensor([[True, True, False, False], [True, False, True, False]])
    walk.learn(torch.arange(4), wrong)
    up, down = np.exp(0.15), np.exp(-0.15)
    np.testing.assert_allclose(walk.delta.numpy(), 0.2 * np.array([up, up, down, down]))
    np.testing.assert_allclose(walk.e.numpy(), 0.1 * np.exp([0.225, -0.075, 0.225, -0.075]))


def test_half_of_the_orthogonal_steps_succeed_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pictures(30, 40)
    net = dividing(x)
    rates: list[Tensor] = []

    class Watched(_Sphere):
        def learn(self, at: Tensor, wrong: Tensor) -> None:
            super().learn(at, wrong)
            rates.append(wrong.double().mean(1))

    monkeypatch.setattr("qlab.attacks.boundary._Sphere", Watched)
    Boundary(steps=300)(net, x, labelled(net, x), norm="l2", low=-10.0, high=10.0)
    orthogonal, source = torch.stack(rates[50:]).mean(0).tolist()
    assert orthogonal == pytest.approx(0.5, abs=0.08)
    assert source == pytest.approx(0.25, abs=0.08)


def test_it_starts_from_the_nearest_input_of_another_class() -> None:
    x = torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.7, 0.5], [0.9, 0.5]], dtype=F64)
    net = nn.Linear(2, 2).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        net.bias.copy_(torch.tensor([0.5, -0.5]))
    y = torch.tensor([0, 0, 1, 1])
    attack = Boundary(steps=1, bisections=0, source=1e-5)
    found = attack(net, x, y, norm="linf")
    np.testing.assert_allclose(found.distance, [0.6, 0.5, 0.5, 0.7], rtol=0.01)
    found = Boundary(steps=1, bisections=12, source=1e-5)(net, x, y, norm="linf")
    np.testing.assert_allclose(found.distance, [0.4, 0.3, 0.2, 0.4], rtol=0.01)


@pytest.mark.parametrize("start", ["class", "noise"])
def test_one_example_alone_starts_from_noise(start: str) -> None:
    net, x = mlp(27), pictures(30, 3, 3, 3)
    y = labelled(net, x)
    for i in range(5):
        found = Boundary(steps=50, start=start)(net, x[i : i + 1], y[i : i + 1], norm="l2")  # type: ignore[arg-type]
        assert found.success.all()
        assert np.isfinite(found.distance).all()


def test_where_there_is_no_other_decision_nothing_is_found() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum(1) * 0 + 1, x.sum(1) * 0], 1)

    x = pictures(4, 6)
    found = Boundary(steps=10)(Always().eval(), x, torch.zeros(4, dtype=torch.int64), norm="l2")
    assert not found.success.any()
    assert np.isinf(found.distance).all()
    assert torch.equal(found.adversarial, x)


def test_a_radius_bounds_what_is_found_and_not_the_walk() -> None:
    net, x = mlp(12), pictures(40, 12)
    y = labelled(net, x)
    free = Boundary(steps=150)(net, x, y, norm="l2")
    eps = float(np.median(free.distance))
    bounded = Boundary(steps=150)(net, x, y, eps, norm="l2")
    np.testing.assert_array_equal(bounded.success, free.within(eps))
    assert bool(Ball.of(x, eps, "l2").contains(bounded.adversarial).all())


def test_two_questions_a_step_and_bisections_are_all_that_is_asked() -> None:
    net, x = mlp(12), pictures(20, 12)
    y = labelled(net, x)
    counting = Counting(net)
    found = Boundary(steps=30, bisections=8)(counting, x, y, norm="l2")
    assert found.forward == sum(map(len, counting.asked)) - 2 * 20
    assert found.forward <= 20 * (1 + 64 + 8 + 60)
    assert found.backward == 0
    if (y.unique().numel()) > 1:  # others of the batch give the start without a question
        assert found.forward == 20 * (1 + 8 + 60)


def test_misclassified_examples_are_not_walked() -> None:
    net, x = mlp(12), pictures(20, 12)
    y = labelled(net, x).clone()
    y[:5] = (y[:5] + 1) % 4
    found = Boundary(steps=20)(net, x, y, norm="l2")
    assert (found.distance[:5] == 0).all()
    assert not found.clean[:5].any()
    assert torch.equal(found.adversarial[:5], x[:5])


def test_a_converged_walk_ends_early() -> None:
    x = pictures(8, 2)
    net = dividing(x)
    y = labelled(net, x)
    early = Boundary(steps=2000)(net, x, y, norm="l2", low=-5.0, high=5.0)
    assert early.forward < 8 * 2000
    assert (early.distance <= exact(net, x, "l2") * (1 + 1e-4)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_seeds_and_a_single_input(norm: Norm) -> None:
    net, x = mlp(1), pictures(6, 1)  # one coordinate: nothing is orthogonal to it
    y = labelled(net, x)
    one, again = (Boundary(steps=30, seed=2)(net, x, y, norm=norm, low=-3.0, high=3.0) for _ in range(2))
    assert torch.equal(one.adversarial, again.adversarial)
    assert bool(one.adversarial.isfinite().all())


def test_it_comes_near_what_gradients_find(digits_net: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits_net
    x, y = x[:60], y[:60]
    found = Boundary(steps=500)(net, x, y, norm="linf")
    gradients = PGD(steps=30, loss="margin")
    median = float(np.median(found.distance[found.clean]))
    # At the median of its distances half of the examples are broken; gradients must not break far more.
    assert gradients(net, x, y, median).success.mean() < 0.65
    assert found.success.all()


def test_a_range_of_its_own_and_single_precision() -> None:
    net, x = mlp(27).float(), (6 * pictures(10, 3, 3, 3) - 3).float()
    counting = Counting(net)
    for norm in ("l2", "linf"):
        found = Boundary(steps=40, start="noise")(counting, x, labelled(net, x), norm=norm, low=-3.0, high=3.0)  # type: ignore[arg-type]
        assert found.adversarial.dtype == torch.float32
        assert found.success.all()
    assert all(bool(((q >= -3) & (q <= 3)).all()) for q in counting.asked)


def test_wrong_settings_are_named() -> None:
    for settings in ({"steps": 0}, {"orthogonal": 0.0}, {"source": 1.0}, {"adapt": -1.0}, {"converged": -1.0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            Boundary(**settings)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="middle"):
        Boundary(start="middle")  # type: ignore[arg-type]
    net, x = mlp(6), pictures(3, 6)
    with pytest.raises(InputError, match="l1"):
        Boundary()(net, x, labelled(net, x), norm="l1")
