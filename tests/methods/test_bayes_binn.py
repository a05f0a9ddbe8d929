"""BayesBiNN: probabilities of its samples, the slope and its arithmetic, the decay to the prior, N."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.bayes_binn import Bernoulli, half_logit, sample_slope
from qlab.methods.momentum import BiasCorrectedMomentum
from qlab.quantizers import quantized_tensors
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("tau", [1e-10, 0.1, 1.0, 5.0])
def test_sample_is_positive_with_probability_sigmoid_of_twice_lambda(tau: float) -> None:
    draws = 20_000
    lambda_ = torch.linspace(-2, 2, 17, dtype=F64)
    latent = lambda_.repeat(draws, 1)
    quantizer = Bernoulli(tau, 1, None)
    quantizer.init(latent, torch.Generator().manual_seed(0))
    quantizer.resample(torch.Generator().manual_seed(1))
    share = (quantizer(latent) > 0).double().mean(0)
    p = torch.sigmoid(2 * lambda_)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()


def test_logistic_noise_is_half_the_logit() -> None:
    eps = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert torch.allclose(half_logit(eps), torch.atanh(2 * eps - 1), atol=1e-13)
    assert half_logit(torch.zeros(1)).isfinite().all()


def test_cold_sample_without_noise_is_the_sign() -> None:
    latent = normal(50)
    quantizer = Bernoulli(1e-10, 1, None)
    quantizer.init(latent, torch.Generator())
    assert torch.equal(quantizer(latent), latent.sign())


def test_slope_is_the_derivative_of_a_sample_with_respect_to_the_mean() -> None:
    lambda_, delta, tau = normal(40), normal(40, seed=1), 0.8
    mu = torch.tanh(lambda_).requires_grad_()
    w = torch.tanh((torch.atanh(mu) + delta) / tau)
    (expected,) = torch.autograd.grad(w.sum(), mu)
    assert torch.allclose(sample_slope(w.detach(), lambda_, tau), expected, rtol=1e-6)


def test_backward_pass_multiplies_by_the_slope_of_the_sample_shown() -> None:
    latent, g = normal(30).requires_grad_(), normal(30, seed=1)
    quantizer = Bernoulli(0.5, 3, None)
    quantizer.init(latent.detach(), torch.Generator())
    quantizer.resample(torch.Generator().manual_seed(2))
    for sample in range(3):
        quantizer.sample = sample
        w = quantizer(latent)
        assert torch.allclose(w, torch.tanh((latent + quantizer.delta[sample]) / 0.5))
        (found,) = torch.autograd.grad(w, latent, g)
        mu = torch.tanh(latent.detach())
        s = (1 - w.detach() ** 2 + 1e-10) / (0.5 * (1 - mu**2 + 1e-10))
        assert torch.allclose(found, g * s, rtol=1e-12)
    assert not torch.equal(quantizer.delta[0], quantizer.delta[1])


def test_saturated_weights_of_the_authors_have_a_slope_of_1e10_in_single_precision_only() -> None:
    for dtype, expected in ((torch.float32, 1e10), (F64, 1e-10 / 1e-10 / (1 / math.cosh(10) ** 2 + 1e-10))):
        lambda_ = torch.tensor([10.0, -10.0], dtype=dtype)
        w = torch.tanh(lambda_ / 1e-10)
        assert torch.allclose(sample_slope(w, lambda_, 1e-10), torch.full((2,), expected, dtype=dtype), rtol=1e-4)


def test_without_samples_the_mean_is_trained_with_slope_one() -> None:
    latent, g = normal(30).requires_grad_(), normal(30, seed=1)
    quantizer = Bernoulli(0.5, 0, None)
    quantizer.init(latent.detach(), torch.Generator())
    quantizer.resample(torch.Generator())
    w = quantizer(latent)
    assert torch.equal(w, torch.tanh(latent))
    assert torch.equal(torch.autograd.grad(w, latent, g)[0], g)


def test_evaluation_is_at_the_mean() -> None:
    latent = normal(30)
    quantizer = Bernoulli(0.5, 2, None)
    quantizer.init(latent, torch.Generator())
    quantizer.resample(torch.Generator().manual_seed(0))
    assert not torch.equal(quantizer(latent), torch.tanh(latent))
    assert torch.equal(quantizer.eval()(latent), torch.tanh(latent))


def test_without_a_gradient_lambda_falls_to_the_prior_geometrically() -> None:
    p = torch.nn.Parameter(normal(5))
    start, lr, r = p.detach().clone(), 0.03, 2.0
    optimizer = BiasCorrectedMomentum([p], lr=lr, momentum=0.0, scale=100.0, decay=r)
    for step in range(1, 50):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.allclose(p.detach(), start * (1 - lr * r) ** step, rtol=1e-12)


def test_objective_is_the_mean_loss_over_the_samples_and_so_is_its_gradient() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(), seed=0)  # no batch norm, whose statistics each pass would move
    method = create("bayes_binn", net, tau=1.0, samples=4, start=None).double()
    for t in quantized_tensors(method.net):
        t.quantizer.resample(torch.Generator().manual_seed(3))
    x, y = normal(8, 2), torch.arange(8) % 2
    latents = [t.latent for t in quantized_tensors(method.net)]
    found = torch.autograd.grad(method.objective(x, y), latents)
    parts = []
    for sample in range(4):
        for t in quantized_tensors(method.net):
            t.quantizer.sample = sample
        parts.append(torch.autograd.grad(method.loss(method.net(x), y), latents))
    for i, g in enumerate(found):
        assert torch.allclose(g, torch.stack([p[i] for p in parts]).mean(0), atol=1e-14)


class Scales(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.scales = [group["scale"] for group in trainer.optimizers[0].param_groups]


def test_gradients_are_multiplied_by_the_number_of_training_samples() -> None:
    data = moons()
    for options, factor in (
        ({}, data.num_samples("train")),
        ({"augmentation": 10.0}, 10 * data.num_samples("train")),
        ({"N": 7}, 7),
    ):
        scales = Scales()
        net = qlab.build("mlp", (2,), 2, hidden=(16,), seed=1)  # with float parameters
        qlab.fit(create("bayes_binn", net, **options), data, epochs=1, progress=False, test=False, callbacks=[scales])
        assert scales.scales == [factor, 1.0]


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_a_loader_without_a_length_asks_for_the_number_of_samples() -> None:
    batches = [(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.raises(InputError, match="N="):
        trainer.fit(create("bayes_binn", small_net()), batches)


def test_latents_start_at_both_signs_of_ten() -> None:
    method = create("bayes_binn", small_net(), seed=4)
    latents = torch.cat([t.latent.detach().flatten() for t in quantized_tensors(method.net)])
    assert latents.unique().tolist() == [-10.0, 10.0]
    assert 0.3 < (latents > 0).double().mean() < 0.7


def test_relaxation_of_the_two_moons_setting_learns() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32), affine=False, final_norm=True, seed=0)
    method = create("bayes_binn", net, tau=1.0, samples=5, start=15.0, lr=1e-3, momentum=0.99)
    run = qlab.fit(method, moons(n=1000), epochs=30, progress=False, validate_every=0)
    assert run.metrics["test/acc"] >= 0.9


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", 0.0), ("samples", -1), ("N", 0), ("augmentation", 0.0), ("start", -1.0), ("prior", -1.0)],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        create("bayes_binn", small_net(), **{name: value})
