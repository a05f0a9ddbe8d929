"""DoReFa-Net: level counts and ends of its maps, its gradients, and gradients that are rounded without bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.low_bit.dorefa import DoReFaWeight, LayerSign, quantize_gradient, quantize_k
from qlab.quantizers import layers, quantized_tensors
from tests.methods.conftest import moons, small_net
from tests.methods.test_contract import StopAt

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_weights_take_the_levels_of_k_bits_and_none_is_zero(k: int, dtype: torch.dtype) -> None:
    theta = (2 * draw(5000)).to(dtype)
    q = DoReFaWeight(k)
    w = q(theta)
    levels = q.levels(dtype)
    assert len(levels) == 2**k
    assert torch.isin(w, levels).all()
    assert len(w.unique()) == 2**k  # of so many weights every level is taken
    assert float(w.abs().min()) == pytest.approx(1 / (2**k - 1))
    assert torch.equal(w[theta.abs().argmax()], theta[theta.abs().argmax()].sign())
    assert float(q(torch.tensor([0.0, 1.0], dtype=dtype))[0]) == pytest.approx(1 / (2**k - 1))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_weight_is_the_papers_formula_value_by_value(k: int) -> None:
    theta = draw(300, seed=1)
    most = max(abs(math.tanh(t)) for t in theta.tolist())
    n = 2**k - 1
    expected = [2 * round(n * (math.tanh(t) / (2 * most) + 0.5)) / n - 1 for t in theta.tolist()]
    assert DoReFaWeight(k)(theta).tolist() == pytest.approx(expected, abs=1e-14)


def test_many_bits_give_the_hyperbolic_tangent_over_its_maximum() -> None:
    theta = draw(400, seed=2)
    limit = torch.tanh(theta) / torch.tanh(theta).abs().max()
    assert torch.allclose(2 * quantize_k(limit / 2 + 0.5, 32) - 1, limit, atol=1 / (2**32 - 1))
    assert torch.allclose(DoReFaWeight(16)(theta), limit, atol=1 / (2**16 - 1))


def test_gradient_is_that_of_the_unrounded_map_with_the_maximum_held() -> None:
    theta, g = draw(50, seed=3), draw(50, seed=4)
    most = torch.tanh(theta).abs().max()
    smooth = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.tanh(smooth) / most, smooth, g)
    latent = theta.clone().requires_grad_()
    (found,) = torch.autograd.grad(DoReFaWeight(3)(latent), latent, g)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda t: torch.tanh(t) / most, smooth)  # the map whose derivative it is


def test_a_tensor_of_zeros_gets_the_gradient_as_it_comes() -> None:
    theta = torch.zeros(3, 4, requires_grad=True)
    g = draw(3, 4).float()
    w = DoReFaWeight(2)(theta)
    (w * g).sum().backward()
    assert torch.equal(w.detach(), torch.full((3, 4), 1 / 3))
    assert theta.grad is not None
    assert torch.equal(theta.grad, g)


def test_one_bit_weights_are_signs_times_the_layers_mean_magnitude() -> None:
    theta, g = draw(6, 5, seed=5).requires_grad_(), draw(6, 5, seed=6)
    q = LayerSign()
    assert torch.equal(q(theta), theta.detach().abs().mean() * theta.detach().sign())
    assert torch.equal(q.hard(theta), q.scale(theta) * q.level(theta))
    (found,) = torch.autograd.grad(q(theta), theta, g)
    assert torch.equal(found, g)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_activations_are_the_clip_rounded_with_gradient_one_inside(k: int) -> None:
    method = create("dorefa", small_net(), activation_bits=k, keep=())
    q = next(m for m in method.net.modules() if type(m).__name__ == "Uniform")
    x = torch.linspace(-0.5, 1.5, 401, dtype=F64, requires_grad=True)
    y = q(x)
    assert torch.allclose(y, quantize_k(x.detach().clamp(0, 1), k), atol=1e-15)
    assert len(y.unique()) == 2**k
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, ((x >= 0) & (x <= 1)).to(F64))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_rounded_gradients_are_unbiased_and_on_their_levels(k: int) -> None:
    g, draws = draw(3, 40, seed=7), 20_000
    u = torch.rand(draws, 3, 40, generator=torch.Generator().manual_seed(0), dtype=F64)
    q = torch.stack([quantize_gradient(g, k, v) for v in u])
    n, m = 2**k - 1, g.abs().amax(1, keepdim=True)
    codes = (q / (2 * m) + 0.5) * n
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert codes.min() > -0.5
    assert codes.max() < n + 0.5
    fraction = (g / (2 * m) + 0.5) * n % 1
    sigma = 2 * m / n * (fraction * (1 - fraction)).clamp(min=0).sqrt() / math.sqrt(draws)
    assert ((q.mean(0) - g).abs() <= 4 * sigma + 1e-9).all()
    largest = g.abs() == m
    assert torch.allclose(q[:, largest], g[largest].expand(draws, -1), rtol=1e-12)  # the maximum is a level


def test_noise_of_the_paper_and_the_floor_round_alike() -> None:
    """round(n r + v), v = u - 1/2, is floor(n r + u) except at ties, which have probability zero."""
    g, k = draw(4, 100, seed=8), 3
    u = torch.rand(4, 100, generator=torch.Generator().manual_seed(1), dtype=F64)
    n, m = 2**k - 1, g.abs().amax(1, keepdim=True)
    paper = 2 * m * (quantize_k(g / (2 * m) + 0.5 + (u - 0.5) / n, k) - 0.5)
    assert torch.allclose(quantize_gradient(g, k, u), paper, atol=1e-14)


def test_a_sample_without_gradient_stays_without() -> None:
    g = torch.zeros(2, 3)
    g[1, 0] = 1.0
    q = quantize_gradient(g, 2, torch.full((2, 3), 0.99))
    assert torch.equal(q[0], torch.zeros(3))
    assert q.isfinite().all()


def test_weights_get_the_product_with_the_rounded_gradient() -> None:
    """A net of one quantized layer: its bias gradient is the sum of Q(g) over samples."""
    net = nn.Sequential(nn.Linear(3, 3))
    method = create("dorefa", net, keep=(), gradient_bits=1, activation_bits=None).double()
    x, y = draw(8, 3), torch.arange(8) % 3
    plain = torch.autograd.grad(method.loss(z := method.net(x), y), z)[0]
    method.begin_step(1)
    method.objective(x, y).backward()
    found = method.net[0].bias.grad
    m = plain.abs().amax(1)
    # With one bit each entry is +-m, so a sum over samples is one of the 2^8 sums of signed m's.
    signs = torch.tensor([[1.0 if i >> j & 1 else -1.0 for j in range(8)] for i in range(256)], dtype=F64)
    for value in found:
        assert (signs @ m - value).abs().min() < 1e-12
    assert not torch.allclose(found, plain.sum(0))


def test_rounding_leaves_the_net_and_its_copies_as_they_are() -> None:
    method = create("dorefa", small_net(), gradient_bits=4)
    x = moons().calibration(1)[0]
    before = [len(m._forward_hooks) for m in method.net.modules()]
    with pytest.raises(InputError):
        method.objective(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))  # not even after an error
    method.objective(x, torch.zeros(len(x), dtype=torch.long)).backward()
    assert [len(m._forward_hooks) for m in method.net.modules()] == before
    assert not any(m._forward_hooks for m in method.deployed([x]).modules())


def test_float_gradients_are_the_objective_of_every_method() -> None:
    a, b = create("dorefa", small_net()), create("dorefa", small_net(), gradient_bits=8)
    x, y = moons().calibration(1)[0], torch.arange(32) % 2
    assert torch.equal(a.objective(x, y), b.objective(x, y))  # forward values are the same
    a.zero_grad()
    a.objective(x, y).backward()
    expected = torch.autograd.grad(a.loss(a.net(x), y), list(a.parameters()))
    assert all(torch.equal(p.grad, e) for p, e in zip(a.parameters(), expected, strict=True))


@pytest.mark.parametrize("bits", [(1, 2, 6), (2, 2, 4), (4, 4, None), (8, None, None), (None, 4, None)])
def test_learns_two_moons_with_many_settings(bits: tuple[int | None, int | None, int | None]) -> None:
    options = dict(zip(("weight_bits", "activation_bits", "gradient_bits"), bits, strict=True))
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32), seed=0)
    run = qlab.fit(create("dorefa", net, **options), moons(n=1000), epochs=20, progress=False, validate_every=0)
    assert run.metrics["test/acc"] > 0.95


def test_run_with_rounded_gradients_repeats_and_resumes_bit_for_bit() -> None:
    def method(seed: int = 0) -> qlab.methods.Method:
        return create("dorefa", small_net(), gradient_bits=2, seed=seed)

    whole = qlab.fit(method(), moons(), epochs=2, progress=False, test=False)
    part = qlab.fit(method(), moons(), epochs=2, progress=False, test=False, callbacks=[StopAt(5)])
    assert part.method.steps == 5
    rest = qlab.fit(method(), moons(), epochs=2, progress=False, test=False, resume=part)
    assert whole.method.steps == rest.method.steps
    for a, b in zip(whole.method.parameters(), rest.method.parameters(), strict=True):
        assert torch.equal(a, b)
    other = qlab.fit(method(seed=1), moons(), epochs=2, progress=False, test=False)
    assert not all(torch.equal(a, b) for a, b in zip(whole.method.parameters(), other.method.parameters(), strict=True))


def test_first_and_last_layer_stay_in_float() -> None:
    method = create("dorefa", small_net())
    assert [t.name for t in quantized_tensors(method.net)] == list(layers(method.net))[1:-1]


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "gradient_bits"])
@pytest.mark.parametrize("value", [0, 17, 2.0, True])
def test_bits_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} must be a whole number from 1 to 16"):
        create("dorefa", small_net(), **{name: value})


def test_quantized_gradients_without_quantized_weights_are_refused() -> None:
    with pytest.raises(InputError, match="give weight_bits too"):
        create("dorefa", small_net(), weight_bits=None, gradient_bits=4)
