"""Proximal maps against a search over a grid, projections against enumeration, mirror maps against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from qlab.errors import InputError
from qlab.proximal import (
    mean_abs,
    nearest_level,
    prox_distance,
    prox_squared_distance,
    scaled_signs,
    softmax_map,
    softmax_step,
    tanh_inverse,
    tanh_map,
    tanh_step,
    ternary,
)
from qlab.quantizers import hard_sign

F64 = torch.float64
GRID = torch.linspace(-4, 4, 320_001, dtype=F64)  # a step of 2.5e-5
LEVELS = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0), "two bits": (-2.0, -0.5, 0.25, 3.0)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(params=LEVELS)
def levels(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(LEVELS[request.param], dtype=F64)


# ---- projections ----------------------------------------------------------------------------------------------------


def test_nearest_level_is_the_nearest_of_all(levels: Tensor) -> None:
    x = 2 * normal(500)
    expected = levels[(x[:, None] - levels).abs().argmin(1)]
    assert torch.equal(nearest_level(x, levels), expected)


def test_nearest_of_two_equally_near_levels_is_the_larger_one_so_the_sign_of_zero_is_plus_one() -> None:
    x = torch.tensor([0.0, -0.0, 1e-300, -1e-300], dtype=F64)
    assert torch.equal(nearest_level(x, torch.tensor([-1.0, 1.0], dtype=F64)), hard_sign(x))


def test_levels_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(InputError, match="ascending"):
        nearest_level(torch.zeros(2), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_scaled_signs_are_the_nearest_of_every_pattern_with_its_best_scale(n: int) -> None:
    x = normal(n, seed=n)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=F64)
    scale = ((patterns @ x) / n).clamp(min=0)  # least squares for each pattern
    residual = (x - scale[:, None] * patterns).square().sum(1)
    q = scaled_signs(x)
    assert float((x - q).square().sum()) == pytest.approx(float(residual.min()), rel=1e-12)
    assert torch.allclose(q, (scale[:, None] * patterns)[residual.argmin()], rtol=1e-12)
    assert float((x - q).square().sum()) == pytest.approx(float(x.square().sum() - n * mean_abs(x) ** 2), rel=1e-12)


def test_scale_of_zeros_is_positive() -> None:
    assert mean_abs(torch.zeros(3)) > 0


def test_ternary_by_hand() -> None:
    x = torch.tensor([0.1, -0.1, 1.0, 2.0, -3.0, -0.69, 0.0], dtype=F64)
    cut = 0.7 * x.abs().mean()  # 0.689
    assert 0.1 < cut < 0.69
    m = (3.0 + 0.69) / 2
    assert torch.allclose(ternary(x), torch.tensor([0, 0, 1.5, 1.5, -m, -m, 0], dtype=F64))
    assert torch.equal(ternary(torch.zeros(4)), torch.zeros(4))
    assert torch.equal(ternary(torch.ones(4)), torch.ones(4))  # no negative value: its empty mean must not be NaN


# ---- proximal maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0, 2.5])
def test_prox_of_the_distance_minimises_its_objective(levels: Tensor, t: float) -> None:
    distance = (GRID[:, None] - levels).abs().amin(1)
    for x in 1.5 * normal(25, seed=1):
        objective = t * distance + 0.5 * (GRID - x) ** 2
        z = prox_distance(x, nearest_level(x, levels), t)
        own = t * (z - levels).abs().min() + 0.5 * (z - x) ** 2
        assert own <= objective.min() + 1e-12
        assert abs(z - GRID[objective.argmin()]) <= 3e-5


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0, 2.5])
def test_prox_of_the_squared_distance_minimises_its_objective(levels: Tensor, t: float) -> None:
    distance = 0.5 * (GRID[:, None] - levels).square().amin(1)
    for x in 1.5 * normal(25, seed=2):
        objective = t * distance + 0.5 * (GRID - x) ** 2
        z = prox_squared_distance(x, nearest_level(x, levels), t)
        own = 0.5 * t * (z - levels).square().min() + 0.5 * (z - x) ** 2
        assert own <= objective.min() + 1e-12
        assert abs(z - GRID[objective.argmin()]) <= 3e-5


@pytest.mark.parametrize("eta", [0.2, 1.0, 9.0])
def test_relaxation_minimises_over_the_plane_with_the_scale_free(eta: float) -> None:
    """BinaryRelax in two dimensions: eta/2 dist(w, Q)^2 + 1/2 |w - theta|^2, Q the two diagonals, s not fixed."""
    axis = torch.linspace(-2, 2, 1601, dtype=F64)
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    to_diagonals = torch.minimum((a - b).square(), (a + b).square()) / 2
    for theta in ((0.9, 0.3), (-1.1, 0.2), (-0.4, -1.3), (0.05, -0.7)):
        t = torch.tensor(theta, dtype=F64)
        objective = 0.5 * eta * to_diagonals + 0.5 * ((a - t[0]) ** 2 + (b - t[1]) ** 2)
        w = prox_squared_distance(t, scaled_signs(t), eta)
        own = 0.25 * eta * min((w[0] - w[1]) ** 2, (w[0] + w[1]) ** 2) + 0.5 * (w - t).square().sum()
        assert own <= objective.min() + 1e-12
        at = int(objective.argmin())
        assert abs(a.flatten()[at] - w[0]) <= 2.6e-3
        assert abs(b.flatten()[at] - w[1]) <= 2.6e-3


def test_binary_prox_is_the_soft_threshold_towards_one_of_the_paper() -> None:
    x = torch.linspace(-3, 3, 601, dtype=F64)
    for l in (0.0, 0.3, 1.0, 4.0):
        gap = x.abs() - 1
        paper = hard_sign(x) * (1 + gap.sign() * (gap.abs() - l).clamp(min=0))
        assert torch.allclose(prox_distance(x, hard_sign(x), l), paper, atol=1e-15)


def test_a_threshold_of_nothing_is_the_identity_and_one_of_one_gives_exact_signs_inside() -> None:
    for dtype in (torch.float32, F64):
        x = torch.cat(
            [
                torch.logspace(-30, 0, 400, dtype=dtype),
                -torch.logspace(-30, 0, 400, dtype=dtype),
                torch.zeros(1, dtype=dtype),
            ]
        )
        q = hard_sign(x)
        assert torch.equal(prox_distance(x, q, 0.0), x)
        assert torch.equal(prox_squared_distance(x, q, 0.0), x)
        assert torch.equal(prox_distance(x, q, 1.0), q)
        assert torch.equal(prox_squared_distance(x, q, math.inf), q)


def test_prox_maps_are_monotone_keep_signs_and_fix_the_levels() -> None:
    x = torch.linspace(-3, 3, 3001, dtype=F64)
    for prox in (prox_distance, prox_squared_distance):
        for l in (0.05, 0.7, 1.0, 3.0):
            z = prox(x, hard_sign(x), l)
            assert (z.diff() >= -1e-15).all()
            assert torch.equal(hard_sign(z), hard_sign(x))
            ends = torch.tensor([-1.0, 1.0], dtype=F64)
            assert torch.equal(prox(ends, ends, l), ends)


def test_repeated_prox_moves_by_its_threshold_each_time_until_it_is_at_one() -> None:
    x = torch.tensor(0.2, dtype=F64)
    for k in range(1, 30):
        x = prox_distance(x, hard_sign(x), 0.07)
        assert float(x) == pytest.approx(min(0.2 + 0.07 * k, 1.0), abs=1e-14)
    assert x == 1


# ---- mirror maps ----------------------------------------------------------------------------------------------------


def test_tanh_step_is_the_step_in_theta_and_the_quotient_of_the_paper() -> None:
    theta, g = normal(300), normal(300, seed=1)
    for beta, lr in ((1.0, 0.3), (2.5, 0.1)):
        w = tanh_map(theta, beta)
        new = tanh_step(w, beta * lr * g)
        assert torch.allclose(new, tanh_map(tanh_inverse(w, beta) - lr * g, beta), atol=1e-13)
        E = (1 + w) / (1 - w) * torch.exp(-2 * beta * lr * g)
        assert torch.allclose(new, (E - 1) / (E + 1), atol=1e-13)
        assert (new.abs() < 1).all()


def test_mirror_step_minimises_the_linearised_loss_plus_the_bregman_divergence() -> None:
    """argmin lr g w + D(w, w0), with the potential whose gradient is atanh: the binary entropy."""
    grid = torch.linspace(-1 + 1e-6, 1 - 1e-6, 400_001, dtype=F64)

    def potential(w: Tensor) -> Tensor:
        return 0.5 * ((1 + w) * torch.log1p(w) + (1 - w) * torch.log1p(-w))

    for w0, g in ((0.3, 0.8), (-0.9, -2.0), (0.0, 0.1), (0.95, 1.5)):
        w0_, lr = torch.tensor(w0, dtype=F64), 0.7
        divergence = potential(grid) - potential(w0_) - torch.atanh(w0_) * (grid - w0_)
        best = grid[(lr * g * grid + divergence).argmin()]
        assert float(tanh_step(w0_, torch.tensor(lr * g, dtype=F64))) == pytest.approx(float(best), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_weight_is_stuck_at_an_end(dtype: torch.dtype) -> None:
    w = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    step = torch.tensor([0.5, -0.5, 1e30, -1e30], dtype=dtype)
    moved = tanh_step(w, step)
    assert moved.isfinite().all()
    assert (moved.abs() < 1).all()
    assert (moved[:2].abs() < w[:2].abs() - torch.finfo(dtype).eps).all()
    assert torch.equal(moved[2:].sign(), -w[2:])
    for _ in range(60):
        w = tanh_step(w, step.clamp(-0.5, 0.5))
    assert (w[:2] * torch.tensor([1, -1]) < 0).all()


def test_exponentiated_gradient_is_the_softmax_step_in_theta() -> None:
    theta, g = normal(50, 4), normal(50, 4, seed=3)
    u = softmax_map(theta, 1.7)
    new = softmax_step(u, 1.7 * 0.2 * g)
    assert torch.allclose(new, u * torch.exp(-0.34 * g) / (u * torch.exp(-0.34 * g)).sum(-1, keepdim=True), atol=1e-14)
    assert torch.allclose(new, softmax_map(theta - 0.2 * g, 1.7), atol=1e-14)


Q = torch.tensor([-1.0, 1.0], dtype=F64)


def test_softmax_over_two_levels_is_tanh_of_half_the_difference() -> None:
    pair = normal(200, 2)
    for beta in (0.3, 1.0, 20.0):
        h = (pair[:, 1] - pair[:, 0]) / 2
        assert torch.allclose(softmax_map(pair, beta) @ Q, tanh_map(h, beta), atol=1e-14)


def test_exponentiated_gradient_over_two_levels_is_the_primal_tanh_step() -> None:
    u, g = softmax_map(normal(200, 2)), normal(200, seed=5)
    assert torch.allclose(softmax_step(u, 0.4 * g[:, None] * Q) @ Q, tanh_step(u @ Q, 0.4 * g), atol=1e-14)


def test_gradient_of_the_pair_moves_half_the_difference_by_half_the_gradient_of_the_scalar() -> None:
    """PMF against GD-tanh with SGD: the factor 1/2; mirror descent drops the Jacobian, and the factor with it."""
    pair, g, beta, lr = normal(100, 2), normal(100, seed=6), 1.4, 0.3
    theta = pair.clone().requires_grad_()
    w = softmax_map(theta, beta) @ Q
    (g_pair,) = torch.autograd.grad(w, theta, g)
    u = softmax_map(pair, beta)
    jacobian = beta * (torch.diag_embed(u) - u[:, :, None] * u[:, None, :])
    assert torch.allclose(g_pair, (jacobian @ (Q * g[:, None])[:, :, None])[:, :, 0], atol=1e-14)
    assert torch.allclose(jacrev(lambda t: softmax_map(t, beta))(pair[0]), jacobian[0], atol=1e-14)

    def h(p: Tensor) -> Tensor:
        return (p[:, 1] - p[:, 0]) / 2

    moved = h(pair - lr * g_pair)
    assert torch.allclose(moved, h(pair) - 0.5 * lr * beta * (1 - w.detach() ** 2) * g, atol=1e-14)
    assert torch.allclose(h(pair - lr * g[:, None] * Q), h(pair) - lr * g, atol=1e-14)


def test_prox_takes_a_threshold_for_each_weight() -> None:
    x, t = normal(40), torch.from_numpy(np.random.default_rng(0).uniform(0, 2, 40))
    for prox in (prox_distance, prox_squared_distance):
        each = torch.stack([prox(a, hard_sign(a), b) for a, b in zip(x, t, strict=True)])
        assert torch.allclose(prox(x, hard_sign(x), t), each, atol=1e-15)
