"""The closed forms against Monte Carlo and against autograd; then the estimators of the lab against the closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.population import Population
from qlab.diagnose.smoothing import smoothed_gradient
from qlab.errors import InputError, UnknownNameError
from tests.diagnose.small_nets import generator

SAMPLES = 400_000


def case(seed: int, m: int = 4, n: int = 3) -> Population:
    draw = generator(seed)
    v, w, v_star, w_star = (torch.randn(k, generator=draw, dtype=torch.float64) for k in (m, n, m, n))
    return Population(v, w, v_star, w_star)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_the_mean_loss(seed: int) -> None:
    p = case(seed)
    losses = p.losses(p.draw(SAMPLES))
    assert float(p.loss()) == pytest.approx(float(losses.mean()), abs=4 * float(losses.std()) / math.sqrt(SAMPLES))
    assert float(p.loss()) == pytest.approx(float(losses.mean()), rel=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_is_that_of_the_loss(seed: int) -> None:
    p = case(seed)
    w = p.w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(Population(p.v, w, p.v_star, p.w_star).loss(), w)
    torch.testing.assert_close(p.gradient(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("which", ["identity", "relu"])
def test_the_mean_coarse_gradient_is_the_closed_form(which, seed: int) -> None:
    p = case(seed)
    samples = p.coarse_samples(p.draw(SAMPLES), which)
    error = samples.std(0) / math.sqrt(SAMPLES)
    assert bool(((samples.mean(0) - p.coarse(which)).abs() < 4.5 * error).all())
    assert float((samples.mean(0) - p.coarse(which)).norm()) < 0.01 * float(p.coarse(which).norm()) + 0.005


@pytest.mark.parametrize("which", ["identity", "relu", "clipped"])
def test_coarse_samples_are_what_back_propagation_gives(which) -> None:
    p = case(3)
    Z = p.draw(50)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return (z > 0).to(z)

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            d = {"identity": torch.ones_like(z), "relu": (z > 0).to(z), "clipped": ((z > 0) & (z < 1)).to(z)}
            return g * d[which]

    w = p.w.clone().requires_grad_()
    target = (p.draw(50) @ p.w_star > 0).double() @ p.v_star
    loss = ((Step.apply(Z @ w) @ p.v - target) ** 2 / 2).sum()
    (expected,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(p.coarse_samples(Z, which).sum(0), expected)


@pytest.mark.parametrize("seed", range(6))
def test_coarse_gradients_point_downhill_by_the_closed_forms(seed: int) -> None:
    p = case(seed)
    by_relu, by_identity = (float(p.coarse(which) @ p.gradient()) for which in ("relu", "identity"))
    expected = math.sin(float(p.theta)) * float(p.v @ p.v_star) ** 2 / (2 * (2 * math.pi) ** 1.5 * float(p.w.norm()))
    assert by_relu == pytest.approx(expected, rel=1e-9)
    assert by_identity == pytest.approx(2 * expected, rel=1e-9)
    assert by_relu >= 0


@pytest.mark.parametrize("which", ["identity", "relu"])
def test_the_mean_coarse_gradient_is_the_gradient_of_another_function(which) -> None:
    p = case(4)
    v, t, w = p.v, p.v_star, p.w.clone().requires_grad_()
    if which == "identity":
        other = ((v @ v) * w.norm() - (v @ t) * (p.w_star @ w)) / math.sqrt(2 * math.pi)
    else:
        h = v @ v + v.sum() ** 2 - v.sum() * t.sum() + v @ t
        other = (h * w.norm() - (v @ t) * (w.norm() + p.w_star @ w)) / (2 * math.sqrt(2 * math.pi))
    (expected,) = torch.autograd.grad(other, w)
    torch.testing.assert_close(p.coarse(which), expected)
    assert float(torch.cosine_similarity(p.coarse(which), p.gradient(), dim=0)) < 0.99


def test_the_form_of_the_paper_for_relu_is_the_shorter_one() -> None:
    p = case(5)
    wh = p.w / p.w.norm()
    middle = wh + p.w_star
    h = p.v @ p.v + p.v.sum() ** 2 - p.v.sum() * p.v_star.sum() + p.v @ p.v_star
    expected = h * wh / (2 * math.sqrt(2 * math.pi)) - torch.cos(p.theta / 2) * (p.v @ p.v_star) / math.sqrt(
        2 * math.pi
    ) * (middle / middle.norm())
    torch.testing.assert_close(p.coarse("relu"), expected)


class Student(nn.Module):
    """The student as a net with two logits, of which the loss reads the first."""

    def __init__(self, p: Population) -> None:
        super().__init__()
        self.w = nn.Parameter(p.w[None].clone())
        self.v = p.v

    def forward(self, Z: Tensor) -> Tensor:
        out = (Z @ self.w[0] > 0).to(Z) @ self.v
        return torch.stack([out, 0 * out], 1)


def test_the_smoothed_gradient_of_the_lab_is_the_smoothed_closed_form() -> None:
    p = Population(case(1).v, case(1).w, case(1).v, case(1).w_star)
    Z = p.draw(10_000, seed=5)
    target = (Z @ p.w_star > 0).double() @ p.v_star
    s = 0.3 * float(p.w.norm())
    found = smoothed_gradient(
        Student(p).eval(),
        Z,
        torch.zeros(len(Z), dtype=torch.int64),
        "w",
        s=s,
        pairs=1000,
        loss=lambda z, y: (z[..., 0] - target) ** 2 / 2,
    )
    u = torch.randn(6_000, 3, generator=generator(9), dtype=torch.float64)
    around = [Population(p.v, p.w + s * row, p.v_star, p.w_star).gradient() for row in u]
    truth = torch.stack(around).mean(0)
    assert float(torch.cosine_similarity(found.gradient, truth, dim=0)) > 0.98
    assert float((found.gradient - truth).norm()) < 0.15 * float(truth.norm())


def test_at_the_teacher_the_loss_is_zero_and_its_gradient_a_kink() -> None:
    draw = generator(0)
    v, w = torch.randn(4, generator=draw, dtype=torch.float64), torch.randn(3, generator=draw, dtype=torch.float64)
    p = Population(v, 2 * w, v, w)
    assert float(p.loss()) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(p.coarse("identity"), 0, atol=1e-12)
    np.testing.assert_allclose(p.coarse("relu"), 0, atol=1e-12)
    with pytest.raises(InputError, match="kink"):
        p.gradient()
    single = Population(v.float(), 2 * w.float(), v.float(), w.float())  # parallel but for rounding
    with pytest.raises(InputError, match="kink"):
        single.gradient()


def test_what_is_no_student_is_said() -> None:
    one = torch.ones(3)
    with pytest.raises(InputError, match="expected \\(m,\\)"):
        Population(one, one, torch.ones(2), one)
    with pytest.raises(InputError, match="must not be zero"):
        Population(one, 0 * one, one, one)
    with pytest.raises(UnknownNameError, match="clipped"):
        case(0).coarse("clipped")
    with pytest.raises(UnknownNameError, match="'none'"):
        case(0).coarse_samples(case(0).draw(2), "none")  # type: ignore[arg-type]
