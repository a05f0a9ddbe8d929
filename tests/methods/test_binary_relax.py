"""BinaryRelax: the relaxed map, its two ends, its gradient, the schedule of the authors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.binary_relax import RelaxedSigns
from qlab.quantizers import hard_sign, quantized_tensors
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def relaxed(eta: float, phase: float = 1.0) -> RelaxedSigns:
    quantizer = RelaxedSigns()
    quantizer.anneal(eta=eta, phase=phase)
    return quantizer


def test_weight_is_the_mean_of_latent_and_scaled_sign_weighted_by_eta() -> None:
    theta = normal(30, 4)
    s = theta.abs().mean()
    for eta in (0.1, 1.0, 359.0):
        assert torch.allclose(relaxed(eta)(theta), (theta + eta * s * theta.sign()) / (1 + eta), atol=1e-15)


def test_weight_minimises_the_penalty_with_the_scale_fixed() -> None:
    theta = normal(20)
    s, grid = theta.abs().mean(), torch.linspace(-4, 4, 320_001, dtype=F64)
    for eta in (0.3, 4.0):
        w = relaxed(eta)(theta)
        for t, found in zip(theta, w, strict=True):
            objective = 0.5 * eta * (grid.abs() - s) ** 2 + 0.5 * (grid - t) ** 2
            assert abs(grid[objective.argmin()] - found) <= 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_penalty_gives_the_latent_and_phase_two_the_scaled_sign_exactly(dtype: torch.dtype) -> None:
    theta = normal(50).to(dtype)
    assert torch.equal(relaxed(0.0)(theta), theta)
    for quantizer in (relaxed(3.0, phase=2.0), relaxed(math.inf)):
        assert torch.equal(quantizer(theta), theta.abs().mean() * theta.sign())
        assert torch.equal(quantizer(theta), quantizer.hard(theta))


def test_weight_keeps_the_sign_of_the_latent() -> None:
    theta = torch.cat([normal(200), torch.zeros(1, dtype=F64)])
    for eta in (0.0, 0.5, 100.0):
        assert torch.equal(hard_sign(relaxed(eta)(theta)), hard_sign(theta))


def test_gradient_passes_unchanged_in_both_phases() -> None:
    theta, g = normal(40).requires_grad_(), normal(40, seed=1)
    for quantizer in (relaxed(0.0), relaxed(2.0), relaxed(2.0, phase=2.0)):
        (found,) = torch.autograd.grad(quantizer(theta), theta, g)
        assert torch.equal(found, g)


def test_without_a_penalty_training_is_that_of_the_float_net_bit_for_bit() -> None:
    net = small_net()
    relax = create("binary_relax", net, eta=0.0, phase2=1.0)
    plain = create("full_precision", net)
    for method in (relax, plain):
        qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    for t, w in zip(quantized_tensors(relax.net), plain.latent_weights().values(), strict=True):
        assert torch.equal(t.latent.detach(), w)


def test_schedule_is_that_of_the_authors() -> None:
    method = create("binary_relax", small_net())
    eta = [method.schedule(epoch / 200)["eta"] for epoch in range(200)]
    assert eta[0] == 1
    assert eta[1] == pytest.approx(1.04)
    assert eta[150] == pytest.approx(1.04**150)
    assert round(eta[150]) == 359
    phases = [method.schedule(epoch / 200)["phase"] for epoch in range(200)]
    assert phases == [1.0] * 150 + [2.0] * 50


def test_deployed_weights_have_one_scale_for_each_layer() -> None:
    method = create("binary_relax", small_net())
    for t in quantized_tensors(method.net):
        values = t.quantizer.hard(t.latent.detach()).unique()
        s = t.latent.detach().abs().mean()
        assert torch.equal(values, torch.stack([-s, s]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eta", -1.0),
        ("rate", 0.9),
        ("schedule_epochs", 0),
        ("phase2", 1.5),
        ("eta", math.nan),
        ("eta", 1e308),
        ("rate", 1e6),
        ("schedule_epochs", 10**6),
        ("schedule_epochs", math.inf),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        create("binary_relax", small_net(), **{name: value})
