"""LUQ: levels, fixed points, bias and variance of the gradient quantizer, and that it is what the backward pass uses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.low_bit.luq import log_quantize, log_variance
from qlab.quantizers import layers, quantized_tensors
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def gradients(n: int = 300, seed: int = 0) -> Tensor:
    """Values over many octaves, as gradients have, zero among them."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=draws, dtype=F64) * torch.exp2(-12 * torch.rand(n, generator=draws, dtype=F64))
    x[0] = 0.0
    return x


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(scope="module")
def many() -> tuple[Tensor, Tensor]:
    """(x, draws of Q(x)): 20000 of them."""
    x = gradients()
    u = uniform(20_000, len(x))
    return x, log_quantize(x.expand(20_000, -1), u)


def test_expectation_is_the_gradient(many: tuple[Tensor, Tensor]) -> None:
    x, q = many
    sigma = log_variance(x).sqrt() / math.sqrt(len(q))
    assert ((q.mean(0) - x).abs() <= 4 * sigma + 1e-14).all()  # the mean of 20000 equal numbers rounds
    assert (sigma > 0).sum() > 250


def test_variance_is_the_declared_one(many: tuple[Tensor, Tensor]) -> None:
    """Of a two-point law with values l, u and mean x: (x - l)(u - x), whose sample variance has a known spread."""
    x, q = many
    v = log_variance(x)
    a = float(x.abs().max()) / 128
    for i in (1, 17, 120, 299):
        t = abs(float(x[i]))
        low = 0.0 if t < a else a * 2.0 ** math.floor(math.log2(t / a))
        assert float(v[i]) == pytest.approx((t - low) * ((a if low == 0 else 2 * low) - t), rel=1e-9)
    fourth = (q - x).pow(4).mean(0)
    spread = ((fourth - v**2).clamp(min=0) / len(q)).sqrt()
    assert (((q - x).square().mean(0) - v).abs() <= 4.5 * spread + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("octaves", [6, 7])
def test_values_lie_on_the_levels_and_keep_their_sign(dtype: torch.dtype, octaves: int) -> None:
    x = gradients(4000).to(dtype)
    q = log_quantize(x, uniform(4000).to(dtype), octaves)
    a = x.abs().max() / 2**octaves
    levels = torch.cat([torch.zeros(1, dtype=dtype), a * 2.0 ** torch.arange(octaves + 1, dtype=dtype)])
    assert torch.isin(q.abs(), levels).all()
    assert len(q.abs().unique()) == octaves + 2
    assert (q * x >= 0).all()
    assert len(torch.cat([levels, -levels]).unique()) == {6: 15, 7: 17}[octaves]  # four bits code 16


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_maximum_zero_and_powers_of_two_stay(u: float) -> None:
    for largest in (1.0, 0.3, 7.77e-5):
        a = torch.tensor(largest) / 128
        fixed = torch.cat([torch.zeros(1), a * 2.0 ** torch.arange(8), -a * 2.0 ** torch.arange(8)])
        assert torch.equal(log_quantize(fixed, torch.full_like(fixed, u)), fixed)


def test_neighbouring_levels_are_the_only_results() -> None:
    x = gradients()
    a = float(x.abs().max()) / 128
    grid = torch.tensor([0.0, *(a * 2.0**k for k in range(8))], dtype=F64)
    below = grid[(torch.searchsorted(grid, x.abs(), right=True) - 1)]
    above = grid[torch.searchsorted(grid, x.abs()).clamp(max=8)]
    low, high = log_quantize(x, torch.full_like(x, 1 - 1e-12)), log_quantize(x, torch.zeros_like(x))
    assert torch.allclose(low.abs(), below, rtol=1e-14)
    assert torch.allclose(high.abs(), above, rtol=1e-14)


def test_rounding_of_the_authors_code_is_the_same_map_of_its_noise() -> None:
    """y + (1/2 - u) 2^k rounded by 2^floor(log2(4/3 y)), not below 2^k: the same decision for the same u."""
    x = gradients(3000, seed=3)
    u = uniform(3000, seed=4)
    a = x.abs().max() / 128
    y = x.abs() / a
    k = torch.floor(torch.log2(y.clamp(min=1)))
    noisy = y + (0.5 - u) * 2**k
    authors = 2 ** torch.maximum(torch.floor(torch.log2(4 / 3 * noisy.clamp(min=1e-9))), k)
    above = y >= 1
    assert torch.allclose(log_quantize(x, u)[above], (x.sign() * a * authors)[above], rtol=1e-12)
    assert above.sum() > 500


def test_averaging_draws_divides_the_variance(many: tuple[Tensor, Tensor]) -> None:
    x, q = many
    for samples in (2, 4):
        mean = q.reshape(-1, samples, len(x)).mean(1)
        total = float((mean - x).square().sum(1).mean())
        assert total == pytest.approx(float(log_variance(x).sum()) / samples, rel=0.03)


def test_deterministic_rounding_is_biased_where_this_is_not() -> None:
    """The contrast: everything below a/2 would vanish."""
    x = gradients(4000)
    a = float(x.abs().max()) / 128
    grid = torch.tensor([0.0, *(a * 2.0**k for k in range(8))], dtype=F64)
    nearest = x.sign() * grid[(x.abs()[:, None] - grid).abs().argmin(1)]
    small = (x.abs() < a / 2) & (x != 0)
    assert small.sum() > 500
    assert (nearest[small] == 0).all()
    kept = log_quantize(x, uniform(4000))[small].abs().sum()
    assert float(kept) == pytest.approx(float(x[small].abs().sum()), rel=0.1)


def test_gradients_of_zero_and_tiny_ones_are_finite() -> None:
    for x in (torch.zeros(5), torch.full((5,), 1e-44), torch.tensor([1e38, 1.0, 0.0])):
        assert log_quantize(x, torch.full_like(x, 0.3)).isfinite().all()
    assert torch.equal(log_quantize(torch.zeros(5), torch.zeros(5)), torch.zeros(5))


# ---- the method -----------------------------------------------------------------------------------------------------


def one_layer(**options: object) -> qlab.methods.Method:
    torch.manual_seed(0)
    return create("luq", nn.Sequential(nn.Linear(3, 4)), keep=(), activation_bits=None, **options).double()


def test_weights_and_biases_get_products_with_the_quantized_gradient() -> None:
    method = one_layer()
    x, y = uniform(1, 3), torch.tensor([2])
    plain = torch.autograd.grad(method.loss(z := method.net(x), y), z)[0]
    method.begin_step(1)
    method.objective(x, y).backward()
    quantized = method.net[0].bias.grad  # of one sample: Q(g) itself
    a = plain.abs().max() / 128
    ratio = quantized.abs() / a
    assert torch.allclose(ratio.log2(), ratio.log2().round(), atol=1e-9)
    assert not torch.equal(quantized, plain[0])
    latent = next(quantized_tensors(method.net)).latent
    assert torch.allclose(latent.grad, quantized[:, None] * x, rtol=1e-12)


@pytest.mark.parametrize("samples", [1, 8])
def test_gradients_of_the_method_are_unbiased_and_less_noisy_with_more_samples(samples: int) -> None:
    method = one_layer(samples=samples)
    x, y = uniform(6, 3), torch.arange(6) % 4
    plain = torch.autograd.grad(method.loss(z := method.net(x), y), z)[0]
    found = []
    for step in range(400):
        method.steps = step
        method.begin_step(400)
        found.append(torch.autograd.grad(method.objective(x, y), method.net[0].bias)[0])
    draws = torch.stack(found)
    variance = log_variance(plain).sum(0) / samples
    assert ((draws.mean(0) - plain.sum(0)).abs() <= 4 * (variance / 400).sqrt()).all()
    assert float(draws.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.2)


def test_the_net_itself_carries_nothing_of_it() -> None:
    method = create("luq", small_net())
    x = moons().calibration(1)[0]
    y = torch.zeros(len(x), dtype=torch.long)
    before = [len(m._forward_hooks) for m in method.net.modules()]
    method.objective(x, y).backward()
    assert [len(m._forward_hooks) for m in method.net.modules()] == before
    assert not any(m._forward_hooks for m in method.deployed([x]).modules())
    assert torch.equal(method.objective(x, y), method.objective(x, y))  # the forward pass has no noise


def test_several_passes_of_a_step_draw_differently_and_a_step_repeats() -> None:
    method = one_layer()
    x, y = uniform(6, 3), torch.arange(6) % 4

    def gradient() -> Tensor:
        return torch.autograd.grad(method.objective(x, y), method.net[0].bias)[0]

    method.begin_step(10)
    first, second = gradient(), gradient()
    method.begin_step(10)
    assert torch.equal(gradient(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 2}, {"octaves": 6}, {"octaves": None}, {"grid": "wide", "reach": 2.0}, {"weight_bits": 2, "grid": "half"}],
)  # fmt: skip
def test_learns_two_moons_with_many_settings(options: dict[str, object]) -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32), seed=0)
    run = qlab.fit(create("luq", net, **options), moons(n=1000), epochs=20, progress=False, validate_every=0)
    assert run.metrics["test/acc"] > 0.95


def test_deployed_weights_take_fifteen_levels_and_activations_sixteen() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32, 32), seed=0)
    run = qlab.fit(create("luq", net), moons(n=1000), epochs=5, progress=False, validate_every=0)
    for t in quantized_tensors(run.method.net):
        assert set((t.quantizer.level(t.latent)).tolist()[0]) <= set(range(-7, 8))
        assert t.quantizer.hard(t.latent).unique().numel() <= 15
    seen = {}
    shipped = run.deployed
    for name, m in shipped.named_modules():
        if type(m).__name__ == "SAWBActivation":
            m.register_forward_hook(lambda m, i, y, name=name: seen.update({name: y}))
    shipped(moons(n=1000).calibration(4)[0])
    assert len(seen) == 2
    assert all(len(y.unique()) <= 16 for y in seen.values())


def test_first_and_last_layer_stay_in_float() -> None:
    method = create("luq", small_net())
    assert [t.name for t in quantized_tensors(method.net)] == list(layers(method.net))[1:-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_bits", 8), ("weight_bits", [4]), ("weight_bits", 4.0), ("activation_bits", 1), ("octaves", 0), ("samples", 0),
     ("samples", 1.5), ("grid", "g")],
)  # fmt: skip
def test_hyperparameters_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        create("luq", small_net(), **{name: value})
