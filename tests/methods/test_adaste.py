"""The exact properties of AdaSTE: its energy, its closed forms, its rule against brute force, its schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.adaste import (
    BiasCorrectedMomentum,
    DoubleWell,
    energy,
    minimizer,
    slope,
    slope_exact,
    slope_reference,
)
from qlab.models import build

F64 = torch.float64


def cases(n: int, seed: int = 0) -> list[tuple[float, float, Tensor, Tensor]]:
    """Random (mu, alpha, theta, l') that reach every region: A below, at and above 1, |theta| from 1e-3 to 30."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        alpha = float(10 ** rng.uniform(-2, 0.3))
        mu = float(rng.choice([0.0, 10 ** rng.uniform(-2, 2), 1 / alpha]))
        theta = torch.tensor(10 ** rng.uniform(-3, 1.5) * rng.choice([-1, 1]), dtype=F64)
        dl = torch.tensor(10 ** rng.uniform(-3, 1) * rng.choice([-1, 1]), dtype=F64)
        found.append((mu, alpha, theta, dl))
    return found


def difference(theta: Tensor, dl: Tensor, beta: Tensor, mu: float, alpha: float) -> Tensor:
    """The finite difference that the rule maximises."""
    return (minimizer(theta, mu, alpha) - minimizer(theta - beta * dl, mu, alpha)) / beta


# ---- the inner problem ----------------------------------------------------------------------------------------------


def test_minimizer_is_the_argmin_of_the_energy_on_a_fine_grid() -> None:
    grid = torch.linspace(-1, 1, 400_001, dtype=F64)
    for mu, alpha, theta, _ in cases(60):
        found = grid[energy(grid, theta, mu, alpha).argmin()]
        assert abs(found - minimizer(theta, mu, alpha)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.07, 1 / 3, 0.9])
def test_weights_are_exact_signs_once_mu_alpha_reaches_one(alpha: float, dtype: torch.dtype) -> None:
    theta = torch.cat([torch.logspace(-30, 4, 500, dtype=dtype), -torch.logspace(-30, 4, 500, dtype=dtype)])
    assert torch.equal(minimizer(theta, 1 / alpha, alpha), theta.sign())
    assert torch.equal(minimizer(theta, 5 / alpha, alpha), theta.sign())


def test_weights_are_not_all_signs_below_mu_alpha_one() -> None:
    theta = torch.tensor([0.01, -0.01], dtype=F64)
    assert (minimizer(theta, 0.9 / 0.1, 0.1).abs() < 1).all()


def test_without_a_double_well_the_weights_are_hardtanh() -> None:
    theta = torch.linspace(-3, 3, 601, dtype=F64)
    assert torch.equal(minimizer(theta, 0.0, 0.2), torch.nn.functional.hardtanh(theta))


def test_minimizer_is_odd_nondecreasing_and_jumps_at_zero() -> None:
    theta = torch.linspace(1e-9, 4, 4001, dtype=F64)
    for mu, alpha, *_ in cases(40):
        w = minimizer(theta, mu, alpha)
        assert torch.equal(minimizer(-theta, mu, alpha), -w)
        assert (w.diff() >= 0).all()
        w0 = min(1.0, mu * (1 + alpha) / (1 + mu))
        assert w.min() >= w0 - 1e-12
        assert minimizer(torch.tensor(0.0, dtype=F64), mu, alpha) == pytest.approx(w0, abs=1e-12)


def test_conjugate_of_the_energy_is_convex_with_the_minimizer_as_its_gradient() -> None:
    theta = torch.linspace(-3, 3, 3001, dtype=F64)
    h = 1e-5

    def conjugate(t: Tensor, mu: float, alpha: float) -> Tensor:
        w = minimizer(t, mu, alpha)
        return t * w - (energy(w, t, mu, alpha) - 0.5 * t**2 + t * w)  # G(w) = E + theta w - theta^2 / 2

    for mu, alpha in ((0.0, 0.1), (0.5, 0.2), (3.0, 0.1), (20.0, 0.1)):
        values = conjugate(theta, mu, alpha)
        assert (values.diff().diff() >= -1e-10).all()
        away = theta[theta.abs() > 2 * h]  # G* has a kink at the jump
        central = (conjugate(away + h, mu, alpha) - conjugate(away - h, mu, alpha)) / (2 * h)
        kinks = ((away.abs() - (1 - min(mu * alpha, 1))).abs() < 2 * h) | (away.abs() < 2 * h)
        assert torch.allclose(central[~kinks], minimizer(away, mu, alpha)[~kinks], atol=1e-6)


# ---- the contrastive gradient ---------------------------------------------------------------------------------------


def test_relaxed_objective_has_the_contrastive_gradient() -> None:
    """R_beta = (1/beta) (min_w [E + beta l' w] - min_u E): its numerical derivative is (w* - w^) / beta."""
    grid = torch.linspace(-1, 1, 2_000_001, dtype=F64)
    for mu, alpha, theta, dl, beta in (
        (0.5, 0.2, 0.7, 0.4, 0.3),
        (0.5, 0.2, -0.4, 0.3, 0.5),
        (2.0, 0.1, 0.3, 1.0, 0.9),
    ):

        def relaxed(t: float, mu: float = mu, alpha: float = alpha, dl: float = dl, beta: float = beta) -> float:
            e = energy(grid, torch.tensor(t, dtype=F64), mu, alpha)
            return float(((e + beta * dl * grid).min() - e.min()) / beta)

        h = 1e-3
        numerical = (relaxed(theta + h) - relaxed(theta - h)) / (2 * h)
        t, g, b = (torch.tensor(v, dtype=F64) for v in (theta, dl, beta))
        assert numerical == pytest.approx(float(difference(t, g, b, mu, alpha)), abs=1e-6)


def test_relaxed_objective_falls_with_beta_and_stays_below_the_loss() -> None:
    betas = torch.logspace(-3, 2, 200, dtype=F64)
    for mu, alpha, theta, dl in cases(60, seed=2):
        w = minimizer(theta, mu, alpha)
        shifted = minimizer(theta - betas * dl, mu, alpha)  # the tilted minimiser is the same map at a shifted argument
        tilted = energy(shifted, theta, mu, alpha) + betas * dl * shifted
        relaxed = (tilted - energy(w, theta, mu, alpha)) / betas
        assert (relaxed.diff() <= 1e-9 * (1 + relaxed.abs()[1:])).all()
        assert (relaxed <= dl * w + 1e-9).all()


def test_small_beta_gives_the_exact_derivative() -> None:
    mu, alpha = 0.5, 0.4
    for theta, expected in ((0.3, 1 / 1.5), (-0.6, 1 / 1.5), (0.9, 0.0), (-2.0, 0.0)):
        for dl in (1.0, -1.0):
            t, g = torch.tensor(theta, dtype=F64), torch.tensor(dl, dtype=F64)
            assert float(difference(t, g, torch.tensor(1e-7, dtype=F64), mu, alpha)) == pytest.approx(
                expected * dl, abs=1e-6
            )
            assert float(slope_exact(t, g, mu, alpha)) == pytest.approx(expected)


def test_derived_slope_is_the_largest_finite_difference_over_beta() -> None:
    for mu, alpha, theta, dl in cases(400, seed=1):
        ratio = theta.abs() / dl.abs()
        beta = torch.cat([torch.logspace(-6, 4, 4001, dtype=F64) / dl.abs(), (ratio * (1 + 1e-9)).reshape(1)])
        t = theta.abs()
        A = min(mu * alpha, 1.0)
        beta = torch.cat([beta, ((t + 1 - A) / dl.abs()).reshape(1)])
        best = difference(theta, dl, beta, mu, alpha).abs().max()
        mine = (slope(theta, dl, mu, alpha) * dl).abs()
        assert float(mine) == pytest.approx(float(best), rel=2e-6, abs=1e-12), (mu, alpha, theta, dl)


# ---- the closed form ------------------------------------------------------------------------------------------------


def test_slope_is_continuous_at_the_ends_of_its_pieces() -> None:
    dl = torch.tensor(1.0, dtype=F64)
    for mu, alpha in ((0.1, 0.5), (0.7, 0.9), (5.0, 0.1)):
        A, K = mu * alpha, 1 + 2 * mu + mu * alpha
        for edge in (1 - A, K):
            left = slope(torch.tensor(edge - 1e-9, dtype=F64), dl, mu, alpha)
            right = slope(torch.tensor(edge + 1e-9, dtype=F64), dl, mu, alpha)
            assert float(left) == pytest.approx(float(right), abs=1e-6)
        assert float(slope(torch.tensor(K, dtype=F64), dl, mu, alpha)) == pytest.approx(1 / (1 + mu))


def test_slope_tends_to_two_over_t_as_mu_alpha_tends_to_one() -> None:
    t = torch.logspace(-2, 3, 200, dtype=F64)
    near = slope(t, torch.ones_like(t), (1 - 1e-10) / 0.2, 0.2)
    assert torch.allclose(near, 2 / t, rtol=1e-6)
    assert torch.allclose(slope(t, torch.ones_like(t), 5.0, 0.2), 2 / t)


def test_gradient_never_points_against_the_loss_and_saturation_is_never_deepened() -> None:
    rng = np.random.default_rng(3)
    theta = torch.from_numpy(rng.normal(0, 4, 5000))
    dl = torch.from_numpy(rng.normal(0, 1, 5000))
    for mu, alpha in ((0.0, 0.1), (0.3, 0.4), (9.0, 0.1), (100.0, 0.01)):
        c = slope(theta, dl, mu, alpha)
        assert (c >= 0).all()
        deeper = (theta.abs() >= 1 - min(mu * alpha, 1.0)) & (theta * dl < 0)
        assert (c[deeper] == 0).all()
        assert deeper.any()
        assert (c[theta * dl > 0] > 0).all()  # never stuck


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6, 1e30])
def test_never_stuck_at_any_distance(scale: float) -> None:
    theta = torch.tensor([scale, -scale])
    c = slope(theta, theta.sign(), 100.0, 0.01, c_max=0.5)
    assert (c > 0).all()
    assert c.isfinite().all()


def test_without_double_well_the_rule_is_straight_through_inside_and_leaky_outside() -> None:
    inside = torch.linspace(-0.999, 0.999, 400, dtype=F64)  # the open interval: at 1 the further push is 0 already
    for dl in (torch.ones_like(inside), -torch.ones_like(inside)):
        assert torch.allclose(slope(inside, dl, 0.0, 0.1, c_max=1.0), torch.ones_like(inside))
    outside = torch.linspace(1.01, 9, 400, dtype=F64)
    assert torch.allclose(slope(outside, torch.ones_like(outside), 0.0, 0.1), 2 / (outside + 1))
    assert torch.allclose(slope(-outside, -torch.ones_like(outside), 0.0, 0.1), 2 / (outside + 1))
    assert (slope(outside, -torch.ones_like(outside), 0.0, 0.1) == 0).all()


def test_zero_latent_is_positive_and_can_leave() -> None:
    zero = torch.zeros(1)
    assert minimizer(zero, 100.0, 0.01) == 1
    assert slope(zero, torch.ones(1), 100.0, 0.01, c_max=0.5) == 0.5
    assert slope(zero, torch.ones(1), 0.0, 0.01) == 1


def test_an_infinite_dead_zone_is_plain_straight_through() -> None:
    theta, dl = torch.randn(100, dtype=F64), torch.randn(100, dtype=F64)
    assert (slope(theta, dl, 100.0, 0.01, 0.5, math.inf) == 1).all()
    assert torch.allclose(slope(theta, dl, 1.0, 0.01, 0.5, math.inf), torch.full_like(theta, 0.5))


def by_hand(theta: float, dl: float, mu: float, alpha: float, cap: float = 0.5, tol: float = 1e-3) -> float:
    """The authors' rule, written case by case."""
    A, K = mu * alpha, 1 + 2 * mu + mu * alpha
    pos, neg = dl > tol, dl < -tol
    if A >= 1:
        if abs(theta) <= 1e-3 or not (pos or neg):
            return 1.0
        return min(1 / abs(theta), cap) if theta * dl > 0 else 0.0
    c = 1 / (1 + mu)
    if (theta > 1 - A and neg) or (theta < -(1 - A) and pos):
        c = 0.0
    elif (theta > 1 - A and pos) or (theta < -(1 - A) and neg):
        c = min(max(K / ((1 + mu) * abs(theta)), 0), cap)
    elif (1e-6 < theta < 1 - A and pos) or (-(1 - A) < theta < -1e-6 and neg):
        c = min(max((2 * mu * (1 + alpha) - theta) / ((1 + mu) * abs(theta)), 0), cap)
    return c


def test_reference_slope_is_the_authors_rule_case_by_case() -> None:
    rng = np.random.default_rng(4)
    seen = set()
    for mu, alpha in ((0.01, 0.01), (0.5, 0.3), (3.0, 0.2), (100.0, 0.01)):
        for _ in range(400):
            theta = float(rng.choice([-1, 1]) * 10 ** rng.uniform(-7.5, 1.5))
            dl = float(rng.choice([-1, 1]) * 10 ** rng.uniform(-5, 0))
            expected = by_hand(theta, dl, mu, alpha)
            found = slope_reference(torch.tensor(theta, dtype=F64), torch.tensor(dl, dtype=F64), mu, alpha)
            assert float(found) == pytest.approx(expected, rel=1e-12), (theta, dl, mu, alpha)
            seen.add((mu, round(expected, 3)))
    assert len(seen) > 20  # the draws reach many branches


def test_reference_slope_at_saturation_takes_only_its_three_values() -> None:
    theta, dl = 5 * torch.randn(3000, dtype=F64), 0.01 * torch.randn(3000, dtype=F64)
    c = slope_reference(theta, dl, 100.0, 0.01)
    allowed = (c == 0) | (c == 1) | ((c - (1 / theta.abs()).clamp(max=0.5)).abs() < 1e-12)
    assert allowed.all()
    assert (c[dl.abs() <= 1e-3] == 1).all()


# ---- the quantizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["derived", "reference", "exact"])
def test_backward_pass_is_slope_times_incoming_gradient(mode: str) -> None:
    torch.manual_seed(0)
    theta = (2 * torch.randn(500, dtype=F64)).requires_grad_()
    dl = torch.randn(500, dtype=F64)
    for mu, alpha in ((0.0, 0.1), (0.5, 0.3), (100.0, 0.01)):
        q = DoubleWell(mode, mu, alpha, c_max=0.5, tol=1e-3)  # type: ignore[arg-type]
        (g,) = torch.autograd.grad(q(theta), theta, dl)
        t = theta.detach()
        expected = {
            "derived": slope(t, dl, mu, alpha, 0.5, 1e-3),
            "reference": slope_reference(t, dl, mu, alpha, 0.5, 1e-3),
            "exact": (t.abs() < 1 - min(mu * alpha, 1)).to(F64) / (1 + mu),
        }[mode]
        assert torch.equal(g, expected * dl)
        assert torch.equal(q(t), minimizer(t, mu, alpha))


def test_exact_mode_is_the_derivative_of_the_forward_map() -> None:
    theta = torch.tensor([0.3, -0.2, 0.55, -1.4, 2.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(DoubleWell("exact", 0.5, 0.2), theta)


def test_vmap_over_latents_equals_a_loop() -> None:
    q = DoubleWell("derived", 0.5, 0.3)
    theta, dl = torch.randn(4, 7), torch.randn(4, 7)

    def backward(t: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(q, t)[1](g)[0]

    assert torch.equal(
        torch.vmap(backward)(theta, dl), torch.stack([backward(t, g) for t, g in zip(theta, dl, strict=True)])
    )


def test_annealing_the_well_moves_the_forward_map_to_signs() -> None:
    q = DoubleWell(mu=0.01, alpha=0.01)
    theta = torch.tensor([0.2, -0.2])
    assert q(theta).abs().max() < 1
    q.anneal(mu=100.0, unknown=3.0)
    assert torch.equal(q(theta), theta.sign())


# ---- escape, schedule, optimizer ------------------------------------------------------------------------------------


def test_one_dimensional_escape_takes_the_steps_that_the_card_predicts() -> None:
    """l(w) = w from theta = 5: theta^2 falls by about 4 lr a step, so the sign flips after about 25 / (4 lr) = 125 steps."""
    lr = 0.05
    theta = torch.tensor(5.0, dtype=F64)
    steps = 0
    while theta > 0:
        dl = torch.tensor(1.0, dtype=F64)
        theta = theta - lr * slope(theta, dl, 100.0, 0.01) * dl
        steps += 1
        assert steps < 1000
    assert steps == 127
    assert slope_exact(torch.tensor(5.0), torch.tensor(1.0), 100.0, 0.01) == 0  # the true derivative never moves


def test_schedule_reaches_its_cap_at_epoch_189() -> None:
    method = create("adaste", build("mlp", (2,), 2), mu_rate=1.05, schedule_epochs=700)
    mu = [method.schedule(epoch / 700)["mu"] for epoch in range(700)]
    assert mu[0] == pytest.approx(0.01 * 1.05)
    assert mu[187] < 100 - 1e-9
    assert mu[188] == 100  # the 189th epoch
    assert mu == sorted(mu)
    assert math.ceil(math.log(1e4) / math.log(1.05)) == 189


def test_slow_schedule_of_tinyimagenet_never_reaches_signs() -> None:
    method = create("adaste", build("mlp", (2,), 2), mu_rate=1.009, schedule_epochs=700)
    assert method.schedule(1.0)["mu"] == pytest.approx(0.01 * 1.009**700)
    assert method.schedule(1.0)["mu"] * 0.01 < 1


def test_optimizer_is_bias_corrected_momentum_of_the_scaled_gradient() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = BiasCorrectedMomentum([p], lr=0.1, momentum=0.9, scale=7.0, decay=1.0)
    theta, m = p.detach().clone(), torch.zeros(2, dtype=F64)
    for step in range(1, 6):
        g = torch.tensor([0.3, 0.1], dtype=F64) * step
        p.grad = g.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * (7.0 * g + theta)
        theta = theta - 0.1 * m / (1 - 0.9**step)
        assert torch.allclose(p.detach(), theta, rtol=1e-13)


@pytest.mark.parametrize("start", ["signs", "uniform"])
def test_latents_start_where_the_paper_starts_them(start: str) -> None:
    method = create("adaste", build("mlp", (8,), 4), theta_init=start, theta_scale=10.0, seed=5)
    for latent in (t for t in method.latent_weights().values()):
        assert latent.abs().max() <= 10
        if start == "signs":
            assert (latent.abs() == 10).all()
        else:
            assert latent.abs().min() < 9
    assert method.net.fc.parametrizations.bias is not None  # every parameter is binary, biases too


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0), ("mu", -1), ("mode", "best"), ("tol", -1.0), ("c_max", 0), ("momentum", 1.0)]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        create("adaste", build("mlp", (2,), 2), **{name: value})
