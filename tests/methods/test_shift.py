"""Shift-based batch norm and AdaMax: without their roundings the ordinary ones, with them off by known factors."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods.binary_networks.shift import (
    ShiftAdaMax,
    ShiftBatchNorm,
    plain_norms,
    shift_normalize,
    with_shift_norm,
)
from qlab.quantizers import reestimate_batch_norm
from qlab.quantizers.kbit import ap2

F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(x: Tensor) -> Tensor:
    return x


# ---- batch norm: forward and backward --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3, 2), (4, 5, 6)])
def test_without_its_roundings_it_is_torchs_batch_norm_forward_and_backward(shape: tuple[int, ...]) -> None:
    x, g = normal(*shape).mul(3).add(1).requires_grad_(), normal(*shape, seed=1)
    gamma, beta = normal(5, seed=2).requires_grad_(), normal(5, seed=3).requires_grad_()
    y, mu, inverse = shift_normalize(x, gamma, beta, eps=1e-3, r=same)
    expected = nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)
    assert torch.allclose(y, expected, atol=1e-12)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    assert torch.allclose(mu, x.mean(dims))
    assert torch.allclose(inverse, 1 / (x.var(dims, unbiased=False) + 1e-3).sqrt())
    for ours, torchs in zip(
        torch.autograd.grad(y, (x, gamma, beta), g), torch.autograd.grad(expected, (x, gamma, beta), g), strict=True
    ):
        assert torch.allclose(ours, torchs, atol=1e-10)


def test_the_backward_pass_is_the_formula_feature_by_feature() -> None:
    x, g = normal(7, 3).mul(2).requires_grad_(), normal(7, 3, seed=1)
    gamma, beta = torch.tensor([1.3, -0.4, 0.0], dtype=F64).requires_grad_(), torch.zeros(3, dtype=F64).requires_grad_()
    y = shift_normalize(x, gamma, beta)[0]
    gx, ggamma, gbeta = torch.autograd.grad(y, (x, gamma, beta), g)
    power = lambda v: math.copysign(2.0 ** round(math.log2(abs(v))), v) if v else 0.0  # noqa: E731
    for f in range(3):
        xs, gs, ga = x.detach()[:, f].tolist(), g[:, f].tolist(), power(float(gamma.detach()[f]))
        mu = sum(xs) / 7
        c = [v - mu for v in xs]
        p = power(1 / math.sqrt(sum(v * power(v) for v in c) / 7 + 1e-5))
        mean, along = sum(gs) / 7, sum(power(v) * w for v, w in zip(c, gs, strict=True)) / 7
        for i in range(7):
            assert float(y.detach()[i, f]) == pytest.approx(ga * c[i] * p, abs=1e-12)
            assert float(gx[i, f]) == pytest.approx(ga * p * (gs[i] - mean - power(c[i]) * p**2 * along), abs=1e-12)
        assert float(ggamma[f]) == pytest.approx(sum(power(v * p) * w for v, w in zip(c, gs, strict=True)), abs=1e-12)
        assert float(gbeta[f]) == pytest.approx(sum(gs), abs=1e-12)


def test_the_scale_of_the_output_is_a_saw_tooth_between_two_roundings() -> None:
    z = normal(4000, 1)
    z = (z - z.mean()) / z.std(unbiased=False)
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)

    def spread(sigma: float) -> float:
        return float(shift_normalize(sigma * z, one, zero, eps=0.0)[0].std(unbiased=False))

    for sigma in torch.linspace(0.3, 5, 60).tolist():
        nearest = sigma * 2.0 ** round(-math.log2(sigma))
        if abs(abs(math.log2(sigma) % 1) - 0.5) > 0.05:  # beside the jump: the variance has an error of its own
            assert spread(sigma) == pytest.approx(nearest, rel=1e-12)
        error = float((sigma * z * ap2(sigma * z)).mean()) / sigma**2  # of the variance
        assert 1 / math.sqrt(2) <= spread(sigma) * math.sqrt(error) + 1e-9
        assert spread(sigma) * math.sqrt(error) <= math.sqrt(2) + 1e-9
    assert spread(1.38) == pytest.approx(1.38)  # and not of 1.4: its variance comes out 2 % too large
    assert spread(1.5) == pytest.approx(0.75)


def test_a_batch_times_a_power_of_two_gives_the_same_bits() -> None:
    x = normal(32, 6, dtype=torch.float32)
    one, zero = torch.ones(6), torch.zeros(6)
    y = shift_normalize(x, one, zero, eps=0.0)[0]
    for factor in (2.0, 0.25, -1.0):
        assert torch.equal(shift_normalize(factor * x, one, zero, eps=0.0)[0], math.copysign(1, factor) * y)


def test_the_error_of_its_variance_is_the_integral() -> None:
    ratio = lambda c: float((c * ap2(c)).mean() / (c * c).mean())  # noqa: E731
    octave = 2.0 ** torch.linspace(-2.5, 2.5, 500_001, dtype=F64)[:-1]  # log-uniform between two roundings
    assert ratio(octave) == pytest.approx(2 * (math.sqrt(2) - math.sqrt(0.5)) / 1.5, abs=1e-4)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.0, 1.0, 1_000_003, dtype=F64)[1:-1])
    ends = 2.0 ** (np.arange(-30, 10) - 0.5)  # E[|c|; a < |c| < b] = 2 sigma (phi(a / sigma) - phi(b / sigma))
    for sigma in np.linspace(1, 2, 9):
        phi = stats.norm.pdf(ends / sigma)
        expected = float((np.sqrt(ends[:-1] * ends[1:]) * 2 * (phi[:-1] - phi[1:])).sum() / sigma)
        assert ratio(sigma * quantiles) == pytest.approx(expected, abs=1e-4)
        assert 1.017 < expected < 1.023
    assert ratio(quantiles) == pytest.approx(1.018, abs=1e-3)


# ---- batch norm: the module ------------------------------------------------------------------------------------------


def trained_norm(kind: type[nn.Module] = nn.BatchNorm1d, affine: bool = True) -> ShiftBatchNorm:
    norm = ShiftBatchNorm(kind(6, affine=affine))
    with torch.no_grad():
        if affine:
            norm.weight.copy_(torch.tensor([1.3, -0.7, 0.0, 2.0, -3.0, 0.1]))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
    for seed in range(20):
        norm(normal(16, 6, seed=seed, dtype=torch.float32) * torch.linspace(0.1, 9, 6) + 2)
    return norm


def test_running_averages_are_of_the_mean_and_of_the_inverse_deviation() -> None:
    norm, mean, inverse = (
        ShiftBatchNorm(nn.BatchNorm1d(3)).double(),
        torch.zeros(3, dtype=F64),
        torch.ones(3, dtype=F64),
    )
    inverse /= math.sqrt(1 + 1e-5)
    for seed in range(5):
        x = normal(10, 3, seed=seed) * torch.tensor([0.2, 1.0, 7.0], dtype=F64)
        norm(x)
        c = x - x.mean(0)
        mean += (x.mean(0) - mean) / 8
        inverse += (1 / ((c * ap2(c)).mean(0) + 1e-5).sqrt() - inverse) / 8
    assert torch.allclose(norm.running_mean, mean, atol=1e-12)
    assert torch.allclose(1 / (norm.running_var + 1e-5).sqrt(), inverse, rtol=1e-9)
    assert torch.equal(norm.power(), ap2(inverse))


@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_and_the_deployed_form_compute_the_same(affine: bool) -> None:
    norm = trained_norm(affine=affine).eval()
    plain = norm.plain()
    assert type(plain) is nn.BatchNorm1d
    x = normal(50, 6, seed=99, dtype=torch.float32) * 5
    gamma = ap2(norm.weight) if affine else torch.ones(6)
    beta = norm.bias if affine else torch.zeros(6)
    expected = gamma * ((x - norm.running_mean) * norm.power()) + beta
    assert torch.equal(norm(x), expected)
    assert torch.allclose(plain(x), expected, rtol=0, atol=1e-5)
    alpha = (plain(torch.ones(1, 6)) - plain(torch.zeros(1, 6))).double()
    assert torch.allclose(alpha, (gamma * norm.power()).double(), rtol=1e-5)
    assert plain.eps == 0
    assert torch.equal(plain.running_var, norm.power() ** -2)


def test_evaluation_has_gradients() -> None:
    norm = trained_norm().double().eval()
    x = normal(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    g_gamma, g_beta = torch.autograd.grad(norm(x).sum(), (norm.weight, norm.bias))
    assert torch.allclose(g_gamma, ((x - norm.running_mean) * norm.power()).sum(0))
    assert torch.allclose(g_beta, torch.full((6,), 4.0, dtype=F64))


def test_it_survives_copies_state_dicts_and_the_reestimation_of_statistics() -> None:
    norm = trained_norm()
    twin = copy.deepcopy(norm)
    x = normal(8, 6, dtype=torch.float32)
    assert torch.equal(twin.eval()(x), norm.eval()(x))
    other = ShiftBatchNorm(nn.BatchNorm1d(6))
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.eval()(x), norm(x))
    batches = [3 * normal(64, 6, seed=s, dtype=torch.float32) + 1 for s in range(4)]
    reestimate_batch_norm(norm, batches)
    assert torch.allclose(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-5)
    c = [b - b.mean(0) for b in batches]
    inverse = torch.stack([1 / ((v * ap2(v)).mean(0) + 1e-5).sqrt() for v in c]).mean(0)
    assert torch.allclose(1 / (norm.running_var + 1e-5).sqrt(), inverse, rtol=1e-5)
    assert norm.momentum == 0.125


def test_every_norm_but_that_of_the_logits_is_replaced_and_back() -> None:
    net = qlab.build("lenet", (1, 28, 28), 10, final_norm=True, seed=0)
    shifted = with_shift_norm(net)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    now = [m for m in shifted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [isinstance(m, ShiftBatchNorm) for m in now] == [True] * (len(now) - 1) + [False]
    assert not any(isinstance(m, ShiftBatchNorm) for m in norms)  # the net that was given is left alone
    assert shifted.state_dict().keys() == net.state_dict().keys()
    back = plain_norms(shifted.eval())
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="no batch norm"):
        with_shift_norm(qlab.build("mlp", (3,), 2, norm=False))
    norm = ShiftBatchNorm(nn.BatchNorm1d(6))
    with pytest.raises(InputError, match="several values"):
        norm(torch.ones(1, 6))
    with pytest.raises(InputError, match="betas"):
        ShiftAdaMax([torch.zeros(1, requires_grad=True)], betas=(1.0, 0.5))


# ---- AdaMax ----------------------------------------------------------------------------------------------------------


def test_the_first_step_of_a_constant_gradient_is_the_formula_exactly() -> None:
    g = normal(200)
    theta = torch.zeros(200, dtype=F64, requires_grad=True)
    theta.grad = g.clone()
    ShiftAdaMax([{"params": [theta], "scale": 4.0}], eps=0.0).step()
    alpha = 2.0 ** round(math.log2(2.0**-10 / 2.0**-3))
    assert torch.allclose(theta.detach(), -4.0 * alpha * 2.0**-3 * g / ap2(g.abs()), rtol=1e-14)


@pytest.mark.parametrize("rounded", [False, True])
def test_many_steps_are_the_recursion(rounded: bool) -> None:
    theta = normal(5).requires_grad_()
    optimizer = ShiftAdaMax([theta], lr=0.01, betas=(0.9, 0.99), rounded=rounded)
    value, m, v = theta.detach().clone(), torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64)
    for t in range(1, 30):
        theta.grad = normal(5, seed=t)
        optimizer.step()
        m = 0.9 * m + 0.1 * theta.grad
        v = torch.maximum(0.99 * v, theta.grad.abs())
        norm = 2.0 ** v.log2().round() + 2.0**-27
        value -= 2.0 ** round(math.log2(0.01 / (1 - 0.9**t))) * m / norm
        v = norm if rounded else v
    assert torch.allclose(theta.detach(), value, rtol=1e-12)


def test_a_step_is_within_a_factor_of_two_of_torchs_adamax() -> None:
    ours, torchs = normal(400).requires_grad_(), normal(400).requires_grad_()
    shift = ShiftAdaMax([ours], lr=0.003, betas=(0.875, 0.999))
    exact = torch.optim.Adamax([torchs], lr=0.003, betas=(0.875, 0.999), eps=0.0)
    for t in range(40):
        before = ours.detach().clone(), torchs.detach().clone()
        ours.grad = torchs.grad = normal(400, seed=t)
        shift.step()
        exact.step()
        ratio = (ours.detach() - before[0]) / (torchs.detach() - before[1])
        assert float(ratio.min()) > 0.5 - 1e-6
        assert float(ratio.max()) < 2 + 1e-6


def test_no_gradient_no_step_and_no_nan() -> None:
    theta = torch.ones(3, requires_grad=True)
    optimizer: Any = ShiftAdaMax([theta])
    theta.grad = torch.tensor([0.0, 0.0, 1.0])
    optimizer.step()
    assert torch.equal(theta[:2], torch.ones(2))
    assert theta.isfinite().all()
