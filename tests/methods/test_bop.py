"""Bop: when a weight flips, what the threshold does, its state, gamma by stages, Adam beside it."""

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
from qlab.methods.binary_weights.bop import BopOptimizer, flipped
from qlab.quantizers import hard_sign, quantized_tensors
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bop(w: Tensor, gamma: float, tau: float) -> tuple[torch.nn.Parameter, BopOptimizer]:
    p = torch.nn.Parameter(w.clone())
    return p, BopOptimizer([{"params": [p], "lr": gamma, "tau": tau}], lr=0.01)


def step(p: torch.nn.Parameter, optimizer: BopOptimizer, g: Tensor) -> Tensor:
    p.grad = g.clone()
    optimizer.step()
    return p.detach().clone()


def test_rule_by_hand_with_the_tie_at_plus_one() -> None:
    w = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    m = torch.tensor([0.3, 0.1, 0.2, -0.3, 0.3, -0.2])
    assert torch.equal(flipped(w, m, 0.2), torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]))


def test_average_is_exponential_and_is_not_reset_by_a_flip() -> None:
    gamma = 0.2
    p, optimizer = bop(hard_sign(normal(40)), gamma, 0.05)
    w, m, flips = p.detach().clone(), torch.zeros(40, dtype=F64), 0
    for k in range(50):
        g = normal(40, seed=k)
        m = (1 - gamma) * m + gamma * g
        expected = torch.where(m * w > 0.05, -w, w)
        flips += int((expected != w).sum())
        w = expected
        assert torch.equal(step(p, optimizer, g), w)
    assert flips > 100
    assert set(optimizer.state[p]) == {"m", "step"}  # no latent weight; the step is for torch's Adam, which restores it
    assert optimizer.state[p]["step"] == 0


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.01])
def test_a_constant_gradient_flips_at_the_first_step_where_the_average_passes_the_threshold(gamma: float) -> None:
    g, tau = torch.tensor([0.5, 0.11, 0.0999, 0.1], dtype=F64), 0.1
    p, optimizer = bop(torch.ones(4, dtype=F64), gamma, tau)
    first: dict[int, int] = {}
    for k in range(1, 500):
        for i in (step(p, optimizer, g) < 0).nonzero().flatten().tolist():
            first.setdefault(i, k)
    expected = {}
    for i in (0, 1):
        k = 1 if gamma == 1 else math.ceil(math.log(1 - tau / float(g[i])) / math.log(1 - gamma))
        expected[i] = k
    assert first == expected  # |g| <= tau never flips, the tie included


def test_infinite_threshold_never_flips() -> None:
    p, optimizer = bop(hard_sign(normal(100)), 1.0, math.inf)
    before = p.detach().clone()
    for k in range(20):
        assert torch.equal(step(p, optimizer, 1e6 * normal(100, seed=k)), before)


def test_without_memory_and_threshold_exactly_the_weights_that_the_gradient_opposes_flip() -> None:
    p, optimizer = bop(hard_sign(normal(100)), 1.0, 0.0)
    before, g = p.detach().clone(), normal(100, seed=1)
    assert torch.equal(step(p, optimizer, g), torch.where(g * before > 0, -before, before))


@pytest.mark.parametrize("a", [2.0**-20, 2.0**11])
def test_one_factor_on_loss_and_threshold_changes_nothing(a: float) -> None:
    w = hard_sign(normal(60))
    (p, first), (q, second) = bop(w, 0.1, 0.02), bop(w, 0.1, 0.02 * a)
    for k in range(60):
        g = normal(60, seed=k)
        assert torch.equal(step(p, first, g), step(q, second, a * g))
    assert not torch.equal(p.detach(), w)


def test_float_parameters_are_trained_by_adam_bit_for_bit() -> None:
    w, b = torch.nn.Parameter(hard_sign(normal(5))), torch.nn.Parameter(normal(7))
    c = torch.nn.Parameter(b.detach().clone())
    optimizer = BopOptimizer([{"params": [w], "lr": 0.1, "tau": 0.0}, {"params": [b], "tau": None}], lr=0.01)
    adam = torch.optim.Adam([c], lr=0.01)
    for k in range(20):
        w.grad, b.grad, c.grad = normal(5, seed=k), normal(7, seed=k), normal(7, seed=k)
        optimizer.step()
        adam.step()
        assert torch.equal(b.detach(), c.detach())
        assert torch.equal(w.grad, normal(5, seed=k))  # gradients are left for those who look at them


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_gamma_falls_by_stages_and_the_learning_rate_by_its_own_schedule() -> None:
    rates = Rates()
    net = qlab.build("mlp", (2,), 2, hidden=(16,), affine=True, seed=1)
    method = create("bop", net, gamma=1e-2, gamma_rate=0.1, gamma_stages=3)
    qlab.fit(method, moons(), epochs=2, progress=False, test=False, callbacks=[rates])
    assert len(rates.rates) == 18
    gammas, lrs = zip(*rates.rates, strict=True)
    assert gammas == pytest.approx([1e-2] * 6 + [1e-3] * 6 + [1e-4] * 6)
    assert lrs == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * k / 18)) for k in range(18)])


def test_authors_stages_are_a_tenth_every_100_of_500_epochs() -> None:
    method = create("bop", small_net(), gamma=1e-4, gamma_rate=0.1, gamma_stages=5)
    found = [1e-4 * method.gamma_factor(epoch / 500) for epoch in (0, 99, 100, 250, 499)]
    assert found == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6, 1e-8])
    assert method.gamma_factor(1.0) == pytest.approx(1e-4)


def test_weights_are_signs_at_every_step_from_the_start() -> None:
    net = small_net()
    method = create("bop", net)
    plain = create("full_precision", net).latent_weights()
    for t in quantized_tensors(method.net):
        assert torch.equal(t.latent.detach(), hard_sign(plain[t.name]))
    qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    for t in quantized_tensors(method.net):
        assert t.latent.detach().abs().unique().tolist() == [1.0]
        assert torch.equal(t.quantizer(t.latent), t.latent)


def test_gradient_is_the_one_at_the_binary_weight() -> None:
    """Against the plain net with the same weights as ordinary parameters."""
    method = create("bop", small_net())
    plain = qlab.harden(method.net).train()
    x, y = moons().calibration(1)[0], torch.arange(32) % 2
    ours = torch.autograd.grad(method.loss(method.net(x), y), [t.latent for t in quantized_tensors(method.net)])
    theirs = torch.autograd.grad(method.loss(plain(x), y), list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", 0.0), ("gamma", 1.5), ("tau", -1.0), ("gamma_rate", 0.0), ("gamma_stages", 0)]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        create("bop", small_net(), **{name: value})
