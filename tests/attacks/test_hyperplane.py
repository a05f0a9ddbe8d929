"""The nearest point of a hyperplane within the range: against linear programs, enumeration and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, dual, norms
from qlab.attacks.estimators import BACKPROP
from qlab.attacks.hyperplane import nearest_plane, to_plane
from qlab.attacks.victim import Victim
from qlab.data.seeding import generator


def problems(
    count: int = 60, D: int = 5, low: float = -1.0, high: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, normals and values at them: some in a corner, some with zero weights, some out of reach."""
    draw = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(count, D, generator=draw, dtype=torch.float64)
    x = torch.where(torch.rand(count, D, generator=draw) < 0.25, torch.full_like(x, low), x)
    x = torch.where(torch.rand(count, D, generator=draw) < 0.25, torch.full_like(x, high), x)
    w = torch.randn(count, D, generator=draw, dtype=torch.float64)
    w = torch.where(torch.rand(count, D, generator=draw) < 0.15, torch.zeros_like(w), w)
    f = 2 * torch.randn(count, generator=draw, dtype=torch.float64)
    return x, w, f


def by_program(x: np.ndarray, w: np.ndarray, f: float, low: float, high: float, norm: str) -> float | None:
    """Return the least distance by linear programming over (u, t); None where the plane is out of reach."""
    D = len(x)
    if norm == "linf":
        ones, size = np.ones((D, 1)), 1
    else:
        ones, size = np.eye(D), D
    A = np.block([[np.eye(D), -ones], [-np.eye(D), -ones]])
    found = linprog(
        np.concatenate([np.zeros(D), np.ones(size)]),
        A_ub=A,
        b_ub=np.concatenate([x, -x]),
        A_eq=np.concatenate([w, np.zeros(size)])[None],
        b_eq=[w @ x - f],
        bounds=[(low, high)] * D + [(0, None)] * size,
    )
    return None if found.status == 2 else float(found.fun)


def by_enumeration(x: np.ndarray, w: np.ndarray, f: float, low: float, high: float) -> float | None:
    """Return the least l2 distance by trying which coordinates end at low, at high, or move freely along w."""
    least = math.inf
    for pattern in itertools.product((0, 1, 2), repeat=len(x)):
        kind = np.array(pattern)
        free = kind == 0
        u = np.where(kind == 1, low, np.where(kind == 2, high, x))
        value = f + w @ (u - x)
        if free.any() and (w[free] ** 2).sum() > 0:
            u[free] -= value / (w[free] ** 2).sum() * w[free]
        if abs(f + w @ (u - x)) < 1e-9 and (u >= low - 1e-12).all() and (u <= high + 1e-12).all():
            least = min(least, float(np.linalg.norm(u - x)))
    return None if math.isinf(least) else least


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_that_of_a_program_or_of_enumeration_and_the_point_lies_on_the_plane_and_in_the_range(
    norm: str,
) -> None:
    low, high = -1.0, 2.0
    x, w, f = problems(low=low, high=high)
    delta = to_plane(x, w, f, norm, low, high)
    u = x + delta
    assert u.min() >= low - 1e-12
    assert u.max() <= high + 1e-12
    reached = 0
    for n in range(len(x)):
        args = (x[n].numpy(), w[n].numpy(), float(f[n]), low, high)
        truth = by_enumeration(*args) if norm == "l2" else by_program(*args, norm)
        value = float(f[n] + w[n] @ delta[n])
        if truth is None:
            corner = torch.where(w[n] * f[n] > 0, low - x[n], high - x[n])
            torch.testing.assert_close(delta[n], torch.where(w[n] == 0, torch.zeros_like(corner), corner))
        else:
            reached += 1
            assert abs(value) < 1e-12
            assert float(norms(delta[n : n + 1], norm)) == pytest.approx(truth, abs=1e-9)
    assert 20 < reached < len(x), "the problems must hold both kinds"


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_range_the_distance_is_value_over_dual_norm(norm: str) -> None:
    x, w, f = problems()
    w[(w == 0).all(1)] = 1.0
    delta = to_plane(x, w, f, norm, -math.inf, math.inf)
    torch.testing.assert_close(norms(delta, norm), f.abs() / norms(w, dual(norm)))
    torch.testing.assert_close((w * delta).sum(1), -f)


@pytest.mark.parametrize("norm", NORMS)
def test_scale_of_the_function_changes_nothing(norm: str) -> None:
    x, w, f = problems()
    delta = to_plane(x, w, f, norm, -1.0, 2.0)
    for c in (2.0**-400, 2.0**400):
        assert torch.equal(to_plane(x, w * c, f * c, norm, -1.0, 2.0), delta)
    small = to_plane(x, (w * 1e-30).float(), (f * 1e-30).float(), norm, -1.0, 2.0)
    torch.testing.assert_close(small, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_pictures_and_a_range_of_their_shape(norm: str) -> None:
    x, w, f = problems(D=6)
    low, high = -1.5 + 0.1 * torch.arange(6.0), 2.0 + 0.2 * torch.arange(6.0)
    low = torch.minimum(low, torch.tensor(-1.0))
    flat = to_plane(x, w, f, norm, low, high)
    picture = to_plane(
        x.reshape(-1, 1, 2, 3), w.reshape(-1, 1, 2, 3), f, norm, low.reshape(1, 2, 3), high.reshape(1, 2, 3)
    )
    assert torch.equal(picture.flatten(1), flat)
    assert bool(((x + flat >= low - 1e-12) & (x + flat <= high + 1e-12)).all())
    alone = torch.cat([to_plane(x[n : n + 1], w[n : n + 1], f[n : n + 1], norm, low, high) for n in range(len(x))])
    assert torch.equal(alone, flat)


@pytest.mark.parametrize("norm", NORMS)
def test_no_normal_and_no_value_give_no_step(norm: str) -> None:
    x, w, f = problems()
    assert torch.equal(to_plane(x, torch.zeros_like(w), f, norm, -1.0, 2.0), torch.zeros_like(x))
    assert torch.equal(to_plane(x, w, torch.zeros_like(f), norm, -1.0, 2.0).abs(), torch.zeros_like(x))


def plane(
    net: nn.Module, x: Tensor, y: Tensor, targets: Tensor, norm: str = "l2"
) -> tuple[Victim, Tensor, Tensor, Tensor]:
    victim = Victim(net)
    ball = Ball.of(x, math.inf, norm, -3.0, 3.0)
    return victim, *nearest_plane(BACKPROP, victim, ball, x, y, targets, generator("test", 0))


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_plane_is_the_smallest_quotient_over_all_targets(norm: str) -> None:
    draw = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double().requires_grad_(False)
    for m in net:
        if isinstance(m, nn.Linear):
            m.weight.normal_(generator=draw)
    x = torch.rand(6, 4, generator=draw, dtype=torch.float64)
    y = torch.arange(6) % 5
    targets = torch.stack([torch.tensor([s for s in range(5) if s != k]) for k in y])
    victim, z, f, w = plane(net, x, y, targets, norm)
    torch.testing.assert_close(z, net(x))
    assert victim.count == {"forward": 6, "backward": 24}
    for n in range(6):
        J = torch.autograd.functional.jacobian(net, x[n])
        best = min(
            (float((net(x[n])[s] - net(x[n])[y[n]]).abs() / norms((J[s] - J[y[n]])[None], dual(norm))), int(s))
            for s in targets[n]
        )
        s = best[1]
        torch.testing.assert_close(w[n], J[s] - J[y[n]])
        torch.testing.assert_close(f[n], net(x[n])[s] - net(x[n])[y[n]])


def test_a_class_without_gradient_is_never_the_nearest_and_equal_logits_still_give_a_step() -> None:
    net = nn.Linear(2, 3).double().requires_grad_(False)
    net.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]))
    net.bias.copy_(torch.tensor([0.0, -0.001, -2.0]))
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    _, _, f, w = plane(net, x, y, torch.tensor([[1, 2]]))
    assert (float(f), w.tolist()) == (-2.0, [[3.0, 4.0]])
    net.bias.zero_()
    _, _, f, w = plane(net, x, y, torch.tensor([[2]]))
    delta = to_plane(x, w, f, "l2", -3.0, 3.0)
    torch.testing.assert_close(delta, torch.tensor([[0.6, 0.8]], dtype=torch.float64) * 6e-3)
