"""PMF: one latent number against the softmax over two levels, the true gradient, annealing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.mirror_descent import MirrorWeight
from qlab.methods.binary_weights.pmf import MeanField, sharpness
from qlab.proximal import softmax_map
from qlab.quantizers import hard_sign
from tests.methods.conftest import small_net

F64 = torch.float64
Q = torch.tensor([-1.0, 1.0], dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field(beta: float) -> MeanField:
    quantizer = MeanField()
    quantizer.anneal(beta=beta)
    return quantizer


def test_weight_is_the_mean_of_the_softmax_and_its_sign_the_likelier_level() -> None:
    pair = normal(300, 2)
    h = (pair[:, 1] - pair[:, 0]) / 2
    for beta in (0.5, 1.0, 8.0):
        u = softmax_map(pair, beta)
        assert torch.allclose(field(beta)(h), u @ Q, atol=1e-14)
        assert torch.equal(field(beta).hard(h), Q[u.argmax(-1)])


def test_gradient_is_the_true_one() -> None:
    h = normal(12).requires_grad_()
    assert torch.autograd.gradcheck(field(1.7), h)


def loss_gradient(w: Tensor) -> Tensor:
    """Of a loss that couples the weights."""
    target = torch.linspace(-0.8, 0.8, len(w), dtype=F64)
    return (w - target) + 0.2 * w.sum()


def test_sgd_on_the_pair_is_gd_tanh_with_half_the_learning_rate() -> None:
    pair = normal(30, 2)
    h = (pair[:, 1] - pair[:, 0]) / 2
    for step in range(100):
        beta, lr = 1.01**step, 0.1
        pair_, h_ = pair.clone().requires_grad_(), h.clone().requires_grad_()
        w_pair, w = softmax_map(pair_, beta) @ Q, field(beta)(h_)
        assert torch.allclose(w_pair, w, atol=1e-12)
        pair = pair - lr * torch.autograd.grad(w_pair, pair_, loss_gradient(w_pair.detach()))[0]
        h = h - lr / 2 * torch.autograd.grad(w, h_, loss_gradient(w.detach()))[0]
    assert torch.allclose((pair[:, 1] - pair[:, 0]) / 2, h, atol=1e-12)


def test_adam_on_the_pair_is_adam_on_the_number() -> None:
    pair = torch.nn.Parameter(normal(30, 2))
    h = torch.nn.Parameter(((pair[:, 1] - pair[:, 0]) / 2).detach().clone())
    # eps = 0: it is what Adam adds to a gradient's size, and the pair's gradients are half as large.
    optimizers = [torch.optim.Adam([p], lr=0.01, eps=0.0) for p in (pair, h)]
    for _ in range(100):
        for p, w, optimizer in ((pair, softmax_map(pair) @ Q, optimizers[0]), (h, torch.tanh(h), optimizers[1])):
            (p.grad,) = torch.autograd.grad(w, p, loss_gradient(w.detach()))
            optimizer.step()
    assert torch.allclose((pair[:, 1] - pair[:, 0]) / 2, h, atol=1e-10)


def test_gradient_is_that_of_mirror_descent_times_beta_and_one_minus_the_square() -> None:
    h, g = normal(50).requires_grad_(), normal(50, seed=1)
    for beta in (0.7, 3.0):
        mirror = MirrorWeight()
        mirror.anneal(beta=beta)
        w = field(beta)(h)
        assert torch.equal(w, mirror(h))
        (gd,) = torch.autograd.grad(w, h, g)
        (md,) = torch.autograd.grad(mirror(h), h, g)
        assert torch.allclose(gd, beta * (1 - w.detach() ** 2) * md, atol=1e-14)


def test_annealing_ends_in_signs_whose_gradient_has_vanished() -> None:
    h = normal(100).requires_grad_()
    w = field(1e6)(h)
    assert torch.equal(w, hard_sign(h.detach()))
    (g,) = torch.autograd.grad(w.sum(), h)
    assert (g == 0).all()


def test_schedule_multiplies_beta_at_equal_steps_up_to_its_cap() -> None:
    method = create("pmf", small_net(), beta_rate=1.1, beta_updates=60)
    for epoch in (0, 1, 30, 59):
        assert method.schedule(epoch / 60)["beta"] == pytest.approx(1.1**epoch)
    assert sharpness(1.0, 10.0, 1000) == pytest.approx(1e35)
    assert math.isfinite(float(torch.tensor(sharpness(1.0, 10.0, 1000), dtype=torch.float32)))


@pytest.mark.parametrize(("name", "value"), [("beta_rate", 0.9), ("beta_updates", -1), ("beta_updates", math.inf)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        create("pmf", small_net(), **{name: value})
