"""BWN: the closest signs and scale by brute force, the four gradients, what scaling a latent weight changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.bwn import ScaledSign
from qlab.quantizers import quantized_tensors
from qlab.quantizers.filters import filter_scale
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("seed", range(5))
def test_no_signs_and_scale_are_closer_to_a_filter(seed: int) -> None:
    """Over all 2^8 sign vectors, each with its own best scale B.W / n, and over scales beside the best one."""
    W = draw(8, seed=seed)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=F64)
    best = (signs @ W / 8).clamp(min=0)
    residuals = (W - best[:, None] * signs).square().sum(1)
    mine = ScaledSign().hard(W[None])[0]
    found = (W - mine).square().sum()
    assert float(found) == pytest.approx(float(residuals.min()), rel=1e-12)
    a = float(filter_scale(W[None]))
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert (W - factor * a * W.sign()).square().sum() > found
    for i in range(8):
        flipped = mine.clone()
        flipped[i] *= -1
        assert (W - flipped).square().sum() > found


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3), (7,)])
def test_residual_is_the_squared_norm_minus_n_a_squared(shape: tuple[int, ...]) -> None:
    W = draw(*shape, seed=1)
    q = ScaledSign()
    filters = W.reshape(len(W), -1) if len(shape) > 1 else W[None]
    a = filters.abs().mean(1)
    expected = filters.square().sum(1) - filters.shape[1] * a**2
    residual = (W - q.hard(W)).reshape(filters.shape).square().sum(1)
    assert torch.allclose(residual, expected, rtol=1e-12)
    assert torch.equal(q.hard(W), q.scale(W) * q.level(W))
    assert torch.equal(q(W), q.hard(W))


def test_filter_of_zeros_has_a_positive_scale_and_finite_gradients() -> None:
    for gradient in ("larq", "detached", "paper", "full"):
        theta = torch.zeros(2, 3, requires_grad=True)
        q = ScaledSign(gradient)  # type: ignore[arg-type]
        assert (q.scale(theta) > 0).all()
        q(theta).sum().backward()
        assert theta.grad.isfinite().all()


def test_gradients_are_those_of_the_docstring() -> None:
    theta, g = draw(5, 4, 3, seed=2), draw(5, 4, 3, seed=3)
    d = (theta.abs() <= 1).to(F64)
    a = theta.abs().mean((1, 2), keepdim=True)
    s = theta.sign()
    expected = {
        "larq": a * d * g,
        "detached": d * g,
        "paper": (1 / 12 + a * d) * g,
        "full": a * d * g + s * (g * s).mean((1, 2), keepdim=True),
    }
    assert 0 < d.mean() < 1
    for gradient, wanted in expected.items():
        latent = theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(ScaledSign(gradient)(latent), latent, g)  # type: ignore[arg-type]
        assert torch.allclose(found, wanted, rtol=1e-13, atol=1e-15), gradient


def test_full_gradient_less_the_straight_through_part_is_the_true_derivative() -> None:
    """Away from zero a sign(theta) is differentiable: through a alone."""
    theta = draw(3, 4, seed=4) + 0.1
    theta = torch.where(theta.abs() < 0.05, theta.sign() * 0.05, theta)
    theta = theta * 3  # beyond the clip nothing passes straight through only where |theta| > 1
    latent, g = theta.clone().requires_grad_(), draw(3, 4, seed=5)
    (full,) = torch.autograd.grad(ScaledSign("full")(latent), latent, g)
    (straight,) = torch.autograd.grad(ScaledSign("larq")(latent), latent, g)
    h = 1e-6
    for index in itertools.product(range(3), range(4)):
        step = torch.zeros_like(theta)
        step[index] = h
        numerical = ((ScaledSign().hard(theta + step) - ScaledSign().hard(theta - step)) * g).sum() / (2 * h)
        assert float(full[index] - straight[index]) == pytest.approx(float(numerical), abs=1e-8)


@pytest.mark.parametrize("gradient", ["larq", "detached", "paper", "full"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_and_reverse_mode_and_vmap_agree(gradient: str) -> None:
    q = ScaledSign(gradient)  # type: ignore[arg-type]
    theta = draw(3, 4, seed=6)
    reverse = torch.func.jacrev(q)(theta)
    assert torch.allclose(torch.func.jacfwd(q)(theta), reverse, rtol=1e-12, atol=1e-14)
    batch = draw(5, 3, 4, seed=7)
    assert torch.equal(torch.vmap(q)(batch), torch.stack([q(t) for t in batch]))


def test_scaling_a_latent_weight_before_batch_norm_changes_the_flip_rate_only() -> None:
    """Multiplied by k, the forward pass is the same and one step of plain SGD moves a latent by 1/k of its size's share."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, affine=False).double()
    x, theta, k = draw(64, 6), draw(4, 6, seed=8, scale=0.3), 2.5
    target = draw(64, 4, seed=9)
    updates = []
    for factor in (1.0, k):
        latent = (factor * theta).requires_grad_()
        out = norm(x @ qlab.quantizers.Sign("identity")(latent).T)
        ((out - target) ** 2).mean().backward()
        updates.append((out.detach(), latent.grad / latent.detach()))
    assert torch.equal(updates[0][0], updates[1][0])
    assert torch.allclose(updates[1][1] * k, updates[0][1], rtol=1e-12)


@pytest.mark.parametrize("gradient", ["larq", "detached", "paper", "full"])
def test_every_gradient_learns(gradient: str) -> None:
    run = qlab.fit(create("bwn", small_net(), gradient=gradient), moons(n=1000), epochs=20, progress=False)
    assert run.metrics["test/acc"] > 0.9


def test_clamp_keeps_latents_within_one() -> None:
    for clamp, bound in ((True, True), (False, False)):
        method = create("bwn", small_net(), clamp=clamp, lr=0.3)
        qlab.fit(method, moons(), epochs=1, progress=False, test=False)
        assert all((t.latent.abs() <= 1).all() for t in quantized_tensors(method.net)) == bound


def test_unknown_gradient_is_refused() -> None:
    with pytest.raises(InputError, match="gradient must be one of larq, detached, paper, full"):
        create("bwn", small_net(), gradient="none")
