"""ASkewSGD: the velocity against brute force, the iterates against problems with a known solution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.askewsgd import ASkewSGD, direction, neighbours, phi, psi_slope, widest
from tests.methods.conftest import moons, small_net

BINARY = torch.tensor([-1.0, 1.0], dtype=torch.float64)
FIVE = torch.arange(-2.0, 3.0, dtype=torch.float64)
FAST = 1e12  # a clip that clips nothing here


def draws(n: int, seed: int = 0, reach: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = reach * (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1)
    return torch.randn(n, generator=g, dtype=torch.float64), w


# ---- the constraint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [BINARY, FIVE])
def test_slope_is_the_derivative_of_the_constraint(levels: Tensor) -> None:
    w = draws(500)[1].requires_grad_()
    (slope,) = torch.autograd.grad(-phi(w, levels).sum(), w)
    assert torch.allclose(psi_slope(w.detach(), levels), slope, atol=1e-12)


def test_neighbours_are_the_levels_on_both_sides() -> None:
    a, b = neighbours(torch.tensor([-5.0, -2.0, -0.5, 0.0, 1.9, 2.0, 7.0], dtype=torch.float64), FIVE)
    assert a.tolist() == [-2, -2, -1, 0, 1, 2, 2]
    assert b.tolist() == [-2, -1, 0, 1, 2, 2, 2]


def test_binary_weight_is_feasible_where_w2_is_within_sqrt_eps_of_one() -> None:
    w = draws(2000, reach=1.0)[1]
    for eps in (0.9, 0.3, 0.01):
        assert torch.equal(eps - phi(w, BINARY) >= 0, (w**2 - 1).abs() <= math.sqrt(eps))


def test_intervals_meet_at_the_widest_eps() -> None:
    assert widest(BINARY) == 1
    assert widest(FIVE) == 1 / 16
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert phi(middle, FIVE).item() == widest(FIVE)


# ---- the velocity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [BINARY, FIVE])
def test_velocity_is_the_nearest_one_that_the_constraint_allows(levels: Tensor) -> None:
    u, w = draws(300, seed=1)
    for eps, alpha in ((0.3, 0.5), (0.05, 4.0), (0.01, 0.1)):
        psi, slope = eps - phi(w, levels), psi_slope(w, levels)
        v = direction(u, w, eps, alpha, FAST, levels)
        for i in range(len(w)):
            if psi[i] > 0:
                best = -float(u[i])
            else:  # v slope >= -alpha psi is a half line
                edge = float(-alpha * psi[i] / slope[i])
                side = (edge, edge + 1e3) if slope[i] > 0 else (edge - 1e3, edge)
                found = minimize_scalar(
                    lambda z, i=i: 0.5 * (z + float(u[i])) ** 2, bounds=side, method="bounded", options={"xatol": 1e-10}
                )
                best = min([found.x, *side], key=lambda z, i=i: (z + float(u[i])) ** 2)
            assert float(v[i]) == pytest.approx(best, abs=1e-6 + 1e-6 * abs(best))


def test_velocity_is_that_of_the_authors_code() -> None:
    u, w = draws(2000, seed=2, reach=0.99)
    eps, alpha = 0.3, 0.5
    psi = eps - phi(w, BINARY)
    K = -alpha * psi / psi_slope(w, BINARY)
    free = (psi >= 0) | (-u * K > K**2)
    assert torch.allclose(direction(u, w, eps, alpha, FAST, BINARY), torch.where(free, -u, K), rtol=1e-12)


def test_violated_weights_repair_at_least_at_the_rate_alpha_and_feasible_ones_follow_the_gradient() -> None:
    u, w = draws(3000, seed=3)
    eps, alpha, M = 0.2, 0.7, 50.0
    psi, slope, v = eps - phi(w, FIVE), psi_slope(w, FIVE), direction(u, w, eps, alpha, M, FIVE)
    violated = (psi <= 0) & (v.abs() < M)
    assert violated.sum() > 500
    assert (v * slope >= -alpha * psi - 1e-9)[violated].all()
    constrained = violated & (v != -u)
    assert torch.allclose((v * slope)[constrained], (-alpha * psi)[constrained])
    assert torch.equal(v[psi > 0], -u[psi > 0])


def test_constrained_velocity_points_to_the_level_on_its_own_side() -> None:
    u, w = draws(3000, seed=4, reach=0.999)
    v = direction(u, w, 0.1, 0.5, FAST, BINARY)
    constrained = v != -u
    assert constrained.sum() > 500
    assert torch.equal(v.sign()[constrained], w.sign()[constrained])


def test_without_alpha_a_violated_weight_is_frozen_unless_the_gradient_moves_it_inward() -> None:
    u, w = draws(2000, seed=5, reach=0.9)
    psi, slope = 0.01 - phi(w, BINARY), psi_slope(w, BINARY)
    v = direction(u, w, 0.01, 0.0, 1.0, BINARY)
    inward = -u * slope >= 0
    assert (psi < 0).all() or (psi < 0).sum() > 1500
    assert torch.equal(v[(psi < 0) & inward], -u[(psi < 0) & inward])
    assert (v[(psi < 0) & ~inward] == 0).all()


def test_with_a_large_alpha_a_violated_weight_moves_inward_at_the_largest_speed() -> None:
    _, w = draws(2000, seed=6, reach=0.9)
    psi, slope = 0.01 - phi(w, BINARY), psi_slope(w, BINARY)
    v = direction(torch.zeros_like(w), w, 0.01, 1e9, 3.0, BINARY)
    assert torch.equal(v[psi < 0], 3.0 * slope.sign()[psi < 0])


def test_a_midpoint_goes_right() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert direction(zero, zero, 0.5, 0.5, 2.0, BINARY).item() == 2.0


# ---- problems with a known solution ----------------------------------------------------------------------------------


def descend(w: Tensor, gradient: object, eps: float, alpha: float, levels: Tensor, steps: int = 8000) -> Tensor:
    for k in range(steps):
        gamma = 0.02 / (1 + k / 4000) ** 0.6
        w = w + gamma * direction(gradient(w), w, eps, alpha, 10.0, levels)  # type: ignore[operator]
    return w


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_toy_problem_converges_to_the_border_of_its_own_side(alpha: float) -> None:
    starts = torch.tensor([[0.3, 0.9], [-0.4, 0.2], [0.2, 1.8], [-0.9, -1.1]], dtype=torch.float64)
    w = descend(starts, lambda w: 2 * (w - 0.5) / 3, 0.3, alpha, BINARY)
    solution = math.sqrt(1 - math.sqrt(0.3))
    assert solution == pytest.approx(0.6725158, abs=1e-7)
    assert torch.allclose(w, solution * starts.sign(), atol=1e-4)
    # KKT: where the constraint binds the gradient points as its slope does
    gradient = 2 * (w - 0.5) / 3
    assert torch.equal(gradient.sign(), psi_slope(w, BINARY).sign())


def test_toy_problem_with_five_levels_converges() -> None:
    start = torch.tensor([0.4, 0.05], dtype=torch.float64)
    w = descend(start, lambda w: w - 0.3, 0.01, 1.0, FIVE)
    assert torch.allclose(w, torch.full_like(w, (1 - math.sqrt(1 - 4 * math.sqrt(0.01))) / 2), atol=1e-4)


def test_without_a_gradient_the_violation_decays_exponentially() -> None:
    w = torch.tensor([0.4], dtype=torch.float64)
    eps, alpha, gamma, steps = 0.1, 0.5, 5e-4, 4000
    first = eps - phi(w, BINARY)
    for _ in range(steps):
        w = w + gamma * direction(torch.zeros_like(w), w, eps, alpha, FAST, BINARY)
    t = gamma * steps
    assert (eps - phi(w, BINARY)).item() == pytest.approx(first.item() * math.exp(-alpha * t), rel=1e-3)


# ---- the method -----------------------------------------------------------------------------------------------------


def test_schedule_is_that_of_the_paper() -> None:
    method = create("askewsgd", small_net())
    assert [method.schedule(e / 100)["eps"] for e in (0, 49, 50)] == [1, 1, 1]
    assert method.schedule(0.65)["eps"] == pytest.approx(0.147, abs=1e-3)
    assert method.schedule(0.90)["eps"] == pytest.approx(0.0060, abs=1e-4)


def test_learning_rate_is_halved_where_the_paper_halves_it() -> None:
    method = create("askewsgd", small_net(), lr_schedule="constant", halvings=(0.2, 0.4))
    assert [method.lr_factor(e / 100) for e in (0, 19, 20, 39, 40, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_while_eps_is_one_it_is_clipped_training_in_float() -> None:
    """With psi > 0 inside of (-1, 1) every step is the optimizer's own."""
    method = create("askewsgd", small_net(), eps_constant=1.0, lr=0.05, seed=1)
    twin = create("prox_quant", small_net(), reg_rate=0.0, freeze=1.0, lr=0.05, lr_schedule="cosine", seed=1)
    for one in (method, twin):
        qlab.fit(one, moons(), epochs=2, progress=False, test=False)
    ours, theirs = method.latent_weights(), twin.latent_weights()
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_weights_end_within_the_interval_whatever_the_loss_wants() -> None:
    u, w = draws(400, seed=7)
    for eps in (0.3, 0.006):
        end = descend(w, lambda w: u, eps, 1.0, BINARY, steps=5000)
        inner, outer = 1 - math.sqrt(1 - math.sqrt(eps)), math.sqrt(eps)  # beyond +-1 phi = (|w| - 1)^2
        assert float((end.abs() - 1).abs().max()) <= max(inner, outer) + 5e-3


def test_at_the_end_of_a_run_weights_are_nearly_signs() -> None:
    method = create("askewsgd", small_net())
    run = qlab.fit(method, moons(n=1000), epochs=20, progress=False, validate_every=0)
    off = max(float((w.abs() - 1).abs().max()) for w in method.latent_weights().values())
    assert off < 0.1
    before = create("askewsgd", small_net()).latent_weights()
    assert max(float((w.abs() - 1).abs().max()) for w in before.values()) > 0.9
    assert abs(run.metrics["test/acc"] - run.metrics["test/acc_latent"]) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -1.0},
        {"M": 0.0},
        {"eps_rate": 1.5},
        {"eps_rate": 0.0},
        {"eps_constant": 2.0},
        {"schedule_epochs": 0},
        {"schedule_epochs": math.inf},
        {"halvings": 0.5},
        {"halvings": (1.5,)},
    ],
)
def test_impossible_values_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ASkewSGD(small_net(), **options)
