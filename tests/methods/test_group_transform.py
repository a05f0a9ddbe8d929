"""Group weight transformation: what the map promises, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import gamma
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.group_transform import GroupTransform, gap, grouped, poly, power, soft
from qlab.quantizers import quantized_tensors
from tests.methods.conftest import moons, small_net

FAMILIES = ("power", "poly", "soft", "tanh_group", "tanh_el")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(p: float, **options: object) -> GroupTransform:
    T = GroupTransform(**options)  # type: ignore[arg-type]
    T.anneal(p=p)
    return T


def test_scale_of_a_group_changes_nothing_and_the_map_is_odd() -> None:
    theta = weights(4, 30)
    k = torch.tensor([[0.01], [1.0], [7.0], [1e4]], dtype=torch.float64)
    for center in (False, True):
        T = at(0.3, center=center)
        assert torch.allclose(T(k * theta), T(theta), rtol=1e-12)
        assert torch.equal(T(-theta), -T(theta))
    assert torch.allclose(T(theta + 3.0), T(theta), rtol=1e-9)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.02, 0.0])
@pytest.mark.parametrize("scale", ["one", "he", "initial"])
def test_mean_magnitude_of_a_group_is_a(p: float, scale: str) -> None:
    theta = weights(5, 3, 3, 3)
    T = at(p, scale=scale)
    T.init(theta, torch.Generator())
    a = {"one": torch.ones(5), "he": torch.full((5,), math.sqrt(2 / 27)), "initial": theta.flatten(1).abs().mean(1)}
    assert torch.allclose(T(theta).flatten(1).abs().mean(1), a[scale].double(), rtol=1e-6)


def test_at_p_one_it_is_a_normalised_float_net() -> None:
    theta = weights(3, 50)
    assert torch.allclose(at(1.0)(theta), theta / theta.abs().mean(1, keepdim=True), rtol=1e-12)


def test_annealing_alone_changes_no_sign() -> None:
    theta = weights(6, 40)
    for center in (False, True):
        T = at(1.0, center=center)
        before = T.hard(theta)
        for p in (0.9, 0.4, 0.1, 0.02, 0.0):
            T.anneal(p=p)
            assert torch.equal(T(theta).sign(), before)
            assert torch.equal(T.hard(theta), before)


@pytest.mark.parametrize("groups", ["channel", "layer", "kernel"])
@pytest.mark.parametrize("center", [False, True])
def test_gradient_is_that_of_the_forward_map(groups: str, center: bool) -> None:
    T = at(0.2, groups=groups, center=center, delta=1e-2)
    assert torch.autograd.gradcheck(T, weights(2, 2, 3, 3).requires_grad_())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_family_is_that_of_its_forward_map(family: str) -> None:
    T = GroupTransform(family, delta=1e-2)  # type: ignore[arg-type]
    T.anneal(p=0.3, depth=2.5, beta=3.0)
    assert torch.autograd.gradcheck(T, weights(2, 20).requires_grad_())


def test_gradient_is_orthogonal_to_the_group() -> None:
    theta = weights(5, 60).requires_grad_()
    for p in (1.0, 0.3, 0.02):
        (g,) = torch.autograd.grad((at(p)(theta) * weights(5, 60, seed=1)).sum(), theta)
        assert ((theta * g).sum(1).abs() <= 1e-12 * (theta.norm(dim=1) * g.norm(dim=1))).all()


def test_gap_never_falls_with_p() -> None:
    theta = weights(8, 200)
    gaps = torch.stack([gap(power(theta, p, 0.0)) for p in (0.0, 0.02, 0.1, 0.2, 0.5, 0.8, 1.0)])
    assert (gaps.diff(dim=0) >= 0).all()
    assert (gaps[0] < 1e-20).all()


@pytest.mark.parametrize(
    ("p", "value"), [(1.0, 0.5708), (0.5, 0.1803), (0.2, 0.03745), (0.1, 0.01059), (0.05, 0.00285), (0.02, 0.000477)]
)
def test_gap_of_a_gaussian_group_is_the_closed_form(p: float, value: float) -> None:
    def m(q: float) -> float:
        return float(2 ** (q / 2) * gamma((q + 1) / 2) / math.sqrt(math.pi))

    exact = m(2 * p) / m(p) ** 2 - 1
    assert exact == pytest.approx(value, rel=2e-3)
    n = 400_000  # the mean over groups of this size is off by about 1 % of the gap at p = 1
    assert gap(power(weights(1, n), p, 0.0)).item() == pytest.approx(exact, rel=0.02)


def test_at_p_zero_magnitudes_are_a_up_to_the_square_of_delta() -> None:
    theta, delta = weights(4, 500), 1e-3
    r = theta.square().mean(1, keepdim=True).sqrt()
    T = at(0.0, delta=delta)(theta).abs()
    far = theta.abs() > 0.05 * r
    assert far.double().mean() > 0.9
    below = 1 - T / T.amax(1, keepdim=True)
    assert (below[far] >= 0).all()
    assert (below[far] <= 0.5 * (delta / 0.05) ** 2).all()
    assert (T.amax(1) - 1 < 0.01).all()  # the few weights near zero lack little, which the others share


def test_equal_magnitudes_are_a_fixed_point() -> None:
    theta = 0.37 * weights(3, 30).sign()
    for p in (1.0, 0.4, 0.0):
        assert torch.allclose(at(p)(theta), theta.sign(), atol=1e-12)


def test_poly_contracts_to_signs_and_its_slope_is_known() -> None:
    z = torch.tensor([[-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0]], dtype=torch.float64)
    assert torch.allclose(poly(z, 8.0), z.sign(), atol=1e-4)

    def raw(x: Tensor, K: int) -> Tensor:
        for _ in range(K):
            x = (3 * x - x**3) / 2
        return x

    points = torch.tensor([0.0, 1.0], dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(raw(points, 8).sum(), points)
    assert slope[0].item() == pytest.approx(1.5**8)
    assert slope[1].item() == pytest.approx(0, abs=1e-12)
    normalised = raw(z, 3) / raw(z, 3).abs().mean()
    assert torch.allclose(poly(z, 3.0), normalised)
    half = raw(z, 3) + 0.5 * (raw(z, 4) - raw(z, 3))
    assert torch.allclose(poly(z, 3.5), half / half.abs().mean())


def test_soft_becomes_signs_as_beta_grows() -> None:
    theta = weights(2, 100)
    away = theta.abs() > 0.1
    assert torch.allclose(soft(theta, 1e6)[away], theta.sign()[away], atol=1e-6)


def test_training_and_evaluation_compute_with_the_same_weights() -> None:
    method = create("group_transform", small_net())
    qlab.fit(method, moons(), epochs=1, progress=False, test=False)
    for t in quantized_tensors(method.net):
        assert torch.equal(t.quantizer.train()(t.latent), t.quantizer.eval()(t.latent))


def test_back_propagation_is_the_slope_of_the_training_loss() -> None:
    method = create("group_transform", small_net(), delta=1e-2).double()
    method.anneal(0.4)
    x, y = (t for t in next(iter(moons().train_dataloader())))
    x = x.double()
    method.net.train()
    latent = next(quantized_tensors(method.net)).latent
    (g,) = torch.autograd.grad(method.objective(x, y), latent)
    d, h = weights(*latent.shape, seed=3), 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            latent += sign * h * d
            values.append(float(method.objective(x, y)))
            latent -= sign * h * d
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float((g * d).sum()), rel=1e-5)


def test_groups_are_channels_kernels_or_the_layer() -> None:
    theta = weights(4, 3, 5, 5)
    assert grouped(theta, "channel").shape == (4, 75)
    assert grouped(theta, "kernel").shape == (12, 25)
    assert grouped(theta, "layer").shape == (1, 300)
    assert torch.equal(grouped(theta, "kernel")[4], theta[1, 1].flatten())
    assert grouped(weights(7), "channel").shape == (1, 7)
    assert grouped(weights(4, 6), "kernel").shape == (4, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_of_zeros_stays_finite(family: str) -> None:
    theta = torch.zeros(2, 9).requires_grad_()
    T = GroupTransform(family)  # type: ignore[arg-type]
    T.anneal(p=0.02, depth=4.5, beta=50.0)
    w = T(theta)
    (g,) = torch.autograd.grad(w.sum(), theta)
    assert (w == 0).all()
    assert g.isfinite().all()


def test_weight_decay_and_learning_rate_set_the_norm() -> None:
    """Equilibrium of SGD with decay under a gradient orthogonal to theta, |g| |theta| = s: |theta|^4 = lr s^2 / (2 decay)."""
    lr, decay, s = 0.1, 5e-3, 1.0
    draw = torch.Generator().manual_seed(0)
    theta = torch.randn(500, generator=draw, dtype=torch.float64)
    theta = theta / theta.norm()
    squares = []
    for step in range(8000):
        g = torch.randn(500, generator=draw, dtype=torch.float64)
        g = g - theta * (g @ theta) / theta.square().sum()
        theta = theta - lr * (g * (s / (g.norm() * theta.norm())) + decay * theta)
        if step >= 6000:
            squares.append(float(theta.square().sum()))
    assert sum(squares) / len(squares) == pytest.approx(math.sqrt(lr / (2 * decay)) * s, rel=5e-3)


@pytest.mark.parametrize(
    "options",
    [{"family": "cube"}, {"groups": "pairs"}, {"delta": 0.0}, {"p_end": 1.0}, {"depth": 0.0}, {"sharpness": 1.0},
     {"sharpness": 1e308}, {"anneal_share": 0.0}, {"scale": "two"}],
)  # fmt: skip
def test_impossible_values_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        create("group_transform", small_net(), **options)
