"""BinaryConnect: unbiased draws, the clamp, the authors' update scales, its relation to the clipped estimator."""

from __future__ import annotations

import math

import pytest
import torch

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.binary_connect import Binarize, glorot
from qlab.methods.losses import squared_hinge
from qlab.quantizers import quantized_tensors
from tests.methods.conftest import moons, small_net


def drawn(latent: torch.Tensor, scale: float, draws: int) -> torch.Tensor:
    quantizer = Binarize(scale, stochastic=True)
    quantizer.init(latent, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros_like(latent)
    for _ in range(draws):
        quantizer.resample(generator)
        total += quantizer(latent)
    return total / draws


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_stochastic_weight_has_the_clipped_latent_as_its_mean(scale: float) -> None:
    latent = scale * torch.linspace(-1.5, 1.5, 301)
    draws = 4000
    mean = drawn(latent, scale, draws)
    expected = latent.clamp(-scale, scale)
    sigma = (scale**2 - expected**2).clamp(min=0).sqrt() / math.sqrt(draws)
    assert ((mean - expected).abs() <= 4.5 * sigma + 1e-6).all()
    assert torch.equal(
        mean[latent.abs() >= scale].abs().round(decimals=5), torch.full_like(mean[latent.abs() >= scale], scale)
    )


def test_a_draw_stays_for_the_whole_step() -> None:
    quantizer = Binarize(1.0, stochastic=True)
    latent = torch.zeros(1000)
    quantizer.init(latent, torch.Generator().manual_seed(0))
    quantizer.resample(torch.Generator().manual_seed(1))
    first = quantizer(latent)
    assert torch.equal(first, quantizer(latent))
    quantizer.resample(torch.Generator().manual_seed(2))
    assert not torch.equal(first, quantizer(latent))


def test_gradient_passes_unchanged() -> None:
    latent = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    g = torch.randn(41, dtype=torch.float64)
    for stochastic in (False, True):
        quantizer = Binarize(1.0, stochastic)
        quantizer.init(latent.detach(), torch.Generator().manual_seed(0))
        (found,) = torch.autograd.grad(quantizer(latent), latent, g)
        assert torch.equal(found, g)


def test_trajectory_equals_the_clipped_estimator_while_latents_stay_within_one() -> None:
    """Card 21, section 2: with |w| <= 1 always, the two are the same, bit for bit."""
    net = small_net()
    common = {"optimizer": "adam", "lr": 0.01, "lr_schedule": "constant"}
    connect = create("binary_connect", net, scale_lr=False, **common)
    clipped = create("ste", net, surrogate="clipped", clamp=True, **common)
    for a, b in zip(quantized_tensors(connect.net), quantized_tensors(clipped.net), strict=True):
        b.latent.data.copy_(a.latent.data)
    for method in (connect, clipped):
        qlab.fit(method, moons(), epochs=3, progress=False, test=False)
    for a, b in zip(quantized_tensors(connect.net), quantized_tensors(clipped.net), strict=True):
        assert torch.equal(a.latent, b.latent)
        assert a.latent.abs().max() <= 1


@pytest.mark.parametrize("scale", ["one", "glorot"])
def test_latents_start_in_and_stay_in_their_interval(scale: str) -> None:
    method = create("binary_connect", small_net(), scale=scale, lr=1.0)
    qlab.fit(method, moons(), epochs=1, progress=False, test=False)
    for t in quantized_tensors(method.net):
        H = 1.0 if scale == "one" else glorot(t.latent.shape)
        assert float(t.quantizer.get_buffer("H")) == pytest.approx(H)
        largest = float(t.latent.detach().abs().max())
        assert largest == pytest.approx(H)  # a learning rate of 1 reaches the walls


def test_updates_are_scaled_by_the_authors_factor() -> None:
    shape = torch.Size([20, 5, 3, 3])
    assert glorot(shape) == pytest.approx(math.sqrt(1.5 / (9 * 20 + 9 * 5)))
    for optimizer, power in (("adam", 1), ("sgd", 2)):
        method = create("binary_connect", small_net(), optimizer=optimizer, lr=0.1)
        groups = {id(g["params"][0]): g["lr"] for g in method.make_optimizer().param_groups}
        for t in quantized_tensors(method.net):
            assert groups[id(t.latent)] == pytest.approx(0.1 / glorot(t.latent.shape) ** power)


def test_stochastic_version_evaluates_real_weights_beside_hard_ones() -> None:
    method = create("binary_connect", small_net(), stochastic=True).eval()
    for t in quantized_tensors(method.net):
        assert torch.equal(t.quantizer(t.latent), t.latent.clamp(-1, 1))
        assert torch.equal(t.quantizer.hard(t.latent).abs(), torch.ones_like(t.latent))


def test_stochastic_training_learns_and_repeats() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(64, 64), affine=False, final_norm=True, seed=1)
    runs = [
        qlab.fit(
            create("binary_connect", net, stochastic=True, seed=2, lr=0.03),
            moons(n=1000),
            epochs=30,
            progress=False,
            validate_every=0,
        )
        for _ in range(2)
    ]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].metrics["test/acc"] > 0.9


def test_squared_hinge_is_zero_beyond_the_margin_and_counts_every_class() -> None:
    y = torch.tensor([0, 2])
    assert squared_hinge(torch.tensor([[1.0, -1.0, -1.0], [-2.0, -3.0, 5.0]]), y) == 0
    assert squared_hinge(torch.zeros(2, 3), y) == 1
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: squared_hinge(z, torch.tensor([0, 1, 2, 3])), logits)


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(InputError, match="scale"):
        create("binary_connect", small_net(), scale="two")


def test_time_average_of_an_oscillating_weight_is_the_optimum() -> None:
    """Card 21, section 13.5: on (w - 0.3)^2 zero mean drift of the latent requires mean(w) = 0.3."""
    quantizer = Binarize()
    latent = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    values = []
    for _ in range(20_000):
        w = quantizer(latent)
        (g,) = torch.autograd.grad((w - 0.3) ** 2, latent)
        with torch.no_grad():
            latent -= 0.003 * g
            latent.clamp_(-1, 1)
        values.append(w.item())
    settled = torch.tensor(values[2000:])
    assert set(settled.tolist()) == {-1.0, 1.0}
    assert float(settled.mean()) == pytest.approx(0.3, abs=0.01)
