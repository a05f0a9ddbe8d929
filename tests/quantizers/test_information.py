"""Information retention: invariances, entropy, scales, slopes and caps against closed forms, autograd and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers import Sign
from qlab.quantizers.information import (
    IMB,
    TanhSign,
    balanced,
    entropy,
    live_share,
    power_of_two,
    slope,
    updatable_cap,
)

F64 = torch.float64

# torch 2.13 warns about its own use of torch.jit.script on the first forward-mode derivative, even of torch.tanh.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def clusters(n: int, spread: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    side = 2.0 * torch.randint(0, 2, (n,), generator=g).double() - 1
    return side + spread * torch.randn(n, dtype=F64, generator=g)


def gaussian(n: int) -> Tensor:
    """The quantiles of N(0, 1): a sample without noise."""
    return torch.from_numpy(norm.ppf((torch.arange(n).double().numpy() + 0.5) / n))


# ---- forward: IMB ---------------------------------------------------------------------------------------------------


def test_binary_weights_and_scales_are_unchanged_by_scale_and_shift_of_a_filter() -> None:
    w = draw(7, 5, 3, 3)
    c, d = draw(7, 1, 1, 1, seed=1).exp(), draw(7, 1, 1, 1, seed=2)
    q = IMB(TanhSign(2.0))
    assert torch.equal(q(c * w + d), q(w))
    assert torch.equal(q.scale(c * w + d), q.scale(w))


def test_every_filter_has_zero_mean_and_unit_deviation() -> None:
    z = balanced(3 * draw(7, 5, 3, 3) + 2)
    assert torch.allclose(z.mean((1, 2, 3)), torch.zeros(7, dtype=F64), atol=1e-14)
    assert torch.allclose(z.flatten(1).std(1), torch.ones(7, dtype=F64))
    z = balanced(draw(9) + 1)  # a bias is one filter
    assert z.mean().abs() < 1e-14


@pytest.mark.parametrize("estimator", [TanhSign(0.3), TanhSign(4.0), Sign("clipped")])
def test_gradient_sums_to_zero_and_is_orthogonal_to_the_weight(estimator: torch.nn.Module) -> None:
    w = draw(7, 5, 3, 3).requires_grad_()
    (g,) = torch.autograd.grad(IMB(estimator)(w), w, draw(7, 5, 3, 3, seed=1))
    assert g.flatten(1).sum(1).abs().max() < 1e-12
    assert (g * w).flatten(1).sum(1).abs().max() < 1e-12
    assert g.abs().max() > 0.1


def test_gradient_is_that_of_the_soft_function_with_the_scale_held() -> None:
    w = draw(4, 6).requires_grad_()
    v = draw(4, 6, seed=1)
    (g,) = torch.autograd.grad(IMB(TanhSign(2.5))(w), w, v)
    z = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
    s = 2.0 ** torch.round(torch.log2(z.abs().mean(1, keepdim=True))).detach()
    (expected,) = torch.autograd.grad(s * torch.tanh(2.5 * z), w, v)
    assert torch.allclose(g, expected, rtol=1e-10, atol=1e-13)


def test_length_of_the_weight_never_decreases_under_plain_gradient_descent() -> None:
    """||w'||^2 = ||w||^2 + lr^2 ||g||^2, for the gradient is orthogonal."""
    w, lr, target = draw(3, 20), 0.3, draw(3, 20, seed=1)
    q = IMB(TanhSign(1.0))
    for _ in range(20):
        latent = w.clone().requires_grad_()
        (g,) = torch.autograd.grad((q(latent) - target).square().sum(), latent)
        after = w - lr * g
        assert torch.allclose(after.square().sum(1), w.square().sum(1) + lr**2 * g.square().sum(1), rtol=1e-12)
        w = after


def test_entropy_is_one_bit_at_a_half_and_less_elsewhere() -> None:
    p = torch.linspace(0, 1, 101, dtype=F64)
    H = entropy(p)
    assert float(H[50]) == pytest.approx(1)
    assert int((H >= 1 - 1e-12).sum()) == 1
    assert float(H[0]) == float(H[100]) == 0
    inside = p[1:-1]
    assert torch.allclose(H[1:-1], -(inside * inside.log2() + (1 - inside) * (1 - inside).log2()))


def test_balancing_restores_the_bit_of_shifted_symmetric_weights_and_not_of_skewed_ones() -> None:
    d = 0.8
    shifted = gaussian(100_001) + d
    assert float((shifted > 0).double().mean()) == pytest.approx(norm.cdf(d), abs=1e-4)
    assert float((balanced(shifted) >= 0).double().mean()) == pytest.approx(0.5, abs=1e-4)
    u = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    exponential = -torch.log(u)
    p = (balanced(exponential) >= 0).double().mean()
    assert float(p) == pytest.approx(1 / math.e, abs=1e-3)
    assert float(entropy(p)) == pytest.approx(0.949, abs=1e-3)
    assert float(entropy((exponential > exponential.median()).double().mean())) == pytest.approx(1, abs=1e-6)
    assert float(entropy((exponential > 0).double().mean())) == 0


def test_scale_is_a_power_of_two_of_at_most_one() -> None:
    for seed, n in enumerate((2, 3, 9, 144)):
        w = draw(500, n, seed=seed) ** 3
        z = balanced(w)
        assert (z.abs().mean(1) <= math.sqrt((n - 1) / n) + 1e-12).all()
        mantissa, _ = torch.frexp(power_of_two(z))
        assert (mantissa == 0.5).all()
        assert (power_of_two(z) <= 1).all()


def test_scale_of_gaussian_and_uniform_filters_is_one_and_of_laplace_on_the_border() -> None:
    g = torch.Generator().manual_seed(0)
    assert (power_of_two(balanced(torch.randn(20_000, 144, generator=g))) == 1).all()
    assert (power_of_two(balanced(torch.rand(2000, 144, generator=g))) == 1).all()
    u = torch.rand(4000, 144, generator=g, dtype=F64) - 0.5
    laplace = -u.sign() * torch.log1p(-2 * u.abs())
    ones = float((power_of_two(balanced(laplace)) == 1).double().mean())
    assert ones == pytest.approx(0.58, abs=0.04)


@pytest.mark.parametrize(
    ("a", "chosen", "best"), [(0.70, 0.5, 0.5), (0.72, 1.0, 0.5), (0.76, 1.0, 1.0), (0.4, 0.5, 0.5)]
)
def test_rounding_the_logarithm_is_not_the_closest_power_between_its_border_and_three_halves(
    a: float, chosen: float, best: float
) -> None:
    z = (a * torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=F64)) + torch.tensor([[0.1, 0.1, -0.1, -0.1]], dtype=F64)
    assert float(z.abs().mean()) == pytest.approx(a)
    assert float(power_of_two(z)) == chosen
    error = {s: float((z - s * z.sign()).square().sum()) for s in (0.25, 0.5, 1.0, 2.0)}
    assert min(error, key=error.__getitem__) == best


def test_deployed_weight_is_scale_times_level_and_what_training_computes_with() -> None:
    w = draw(6, 4, 3, 3).float()
    w[2] = 0.25  # a constant filter
    q = IMB(TanhSign(1.0))
    assert torch.equal(q.hard(w), q.scale(w) * q.level(w))
    assert torch.equal(q.hard(w), q(w))
    assert torch.isin(q.level(w), q.levels()).all()
    assert (q.scale(w) > 0).all()


def test_constant_filter_gives_finite_values_and_gradients() -> None:
    w = torch.full((2, 9), 0.3, dtype=F64, requires_grad=True)
    out = IMB(TanhSign(1.0))(w)
    (g,) = torch.autograd.grad(out.sum(), w)
    assert torch.isfinite(out).all()
    assert torch.isfinite(g).all()


def test_filters_of_one_weight_are_refused() -> None:
    for shape in ((5, 1), (5, 1, 1, 1), (1,)):
        with pytest.raises(InputError, match="filters of one value"):
            IMB(TanhSign()).init(torch.zeros(shape), torch.Generator())
    IMB(TanhSign()).init(torch.zeros(1, 2), torch.Generator())


# ---- backward: EDE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0, 3.0, 10.0])
def test_slope_is_the_derivative_of_k_tanh(t: float) -> None:
    k = max(1 / t, 1)
    x = torch.linspace(-3, 3, 61, dtype=F64, requires_grad=True)
    v = draw(61)
    (expected,) = torch.autograd.grad(k * torch.tanh(t * x), x, v)
    q = TanhSign(t)
    (found,) = torch.autograd.grad(q(x), x, v)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    _, tangent = torch.func.jvp(q, (x.detach(),), (v,))
    assert torch.allclose(tangent, expected, rtol=1e-12, atol=1e-14)
    assert float(q.k) == k
    F = q.primitive()
    assert F is not None
    (of_primitive,) = torch.autograd.grad(F(x), x, v)
    assert torch.allclose(of_primitive, expected)
    assert float(slope(torch.zeros(1, dtype=F64), t)) == pytest.approx(max(1.0, t))
    area = quad(lambda y: float(slope(torch.tensor(y, dtype=F64), t)), -60 / t, 60 / t, points=[0.0], limit=200)[0]
    assert area == pytest.approx(2 * k, rel=1e-8)
    half = math.acosh(math.sqrt(2)) / t
    assert float(slope(torch.tensor(half, dtype=F64), t)) == pytest.approx(max(1.0, t) / 2)
    assert half == pytest.approx(0.8814 / t, rel=1e-4)
    if t >= 1:
        gap = 2 * quad(lambda y: 1 - math.tanh(t * y), 0, 40 / t)[0]
        assert gap == pytest.approx(2 * math.log(2) / t)


def test_slope_is_one_everywhere_as_t_goes_to_zero() -> None:
    assert torch.allclose(slope(torch.linspace(-5, 5, 11, dtype=F64), 1e-6), torch.ones(11, dtype=F64))


def test_forward_is_the_sign_with_sign_of_zero_plus_one() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0])
    assert TanhSign(1.0)(x).tolist() == [-1, 1, 1, 1]


def test_mean_slope_tends_to_twice_the_density_at_zero() -> None:
    z = gaussian(200_001)
    exact = quad(lambda y: float(slope(torch.tensor(y, dtype=F64), 10.0)) * norm.pdf(y), -3, 3, points=[0.0])[0]
    assert float(slope(z, 10.0).mean()) == pytest.approx(exact, abs=1e-4)
    assert exact == pytest.approx(2 * norm.pdf(0) * (1 - math.pi**2 / 24 / 10**2), abs=1e-4)  # to second order in 1 / t
    assert float(slope(z, 200.0).mean()) == pytest.approx(2 * norm.pdf(0), abs=1e-3)
    two = clusters(200_000, 0.3)
    assert float(slope(two, 10.0).mean()) < 0.02


@pytest.mark.parametrize("q", [TanhSign(0.7, 0.2, batch=True), TanhSign(2.0), IMB(TanhSign(2.0))])
def test_transforms_of_torch_go_through(q: torch.nn.Module) -> None:
    x, v = draw(3, 4, 5), draw(4, 5, seed=2)
    assert torch.equal(torch.vmap(q)(x), torch.stack([q(w) for w in x]))

    def energy(w: Tensor) -> Tensor:
        return (q(w) * v).sum()

    found = torch.vmap(torch.func.grad(energy))(x)
    for w, g in zip(x, found, strict=True):
        latent = w.clone().requires_grad_()
        assert torch.allclose(torch.autograd.grad(energy(latent), latent)[0], g, rtol=1e-12)


# ---- backward: DTE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["relative", "absolute"])
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("eps", [0.001, 0.1, 0.3, 1.0])
def test_cap_leaves_the_share_it_promises_and_no_larger_t_does(eps: float, tau: float, form: str) -> None:
    for z in (clusters(2003, 0.3), draw(997), 20 * draw(501), 1e-3 * draw(300)):
        cap = float(updatable_cap(z, eps, tau, form))  # type: ignore[arg-type]
        share = float(live_share(z, cap, tau * (1 - 1e-9), form))  # type: ignore[arg-type]
        assert share >= eps - 1e-12
        assert share <= eps + 1 / len(z)  # no ties here: exactly the ceil
        beyond = torch.logspace(1e-5, 2, 200, dtype=F64) * cap
        assert all(float(live_share(z, t, tau, form)) < eps for t in beyond)  # type: ignore[arg-type]


def test_share_is_promised_at_every_smaller_t_too() -> None:
    z = clusters(2003, 0.3)
    for form in ("relative", "absolute"):
        cap = float(updatable_cap(z, 0.2, 0.1, form))  # type: ignore[arg-type]
        for t in torch.logspace(-3, 0, 50, dtype=F64) * cap:
            assert float(live_share(z, t, 0.1 * (1 - 1e-9), form)) >= 0.2  # type: ignore[arg-type]


def test_absolute_cap_against_brute_force() -> None:
    z = draw(400)
    t = torch.linspace(0.05, 60, 200_000, dtype=F64)
    for eps, tau in ((0.1, 0.1), (0.3, 0.4), (0.2, 0.7)):
        q = z.abs().sort().values[math.ceil(eps * 400) - 1]
        alive = t.clamp(min=1) * (1 - torch.tanh(t * q) ** 2) >= tau
        assert float(updatable_cap(z, eps, tau, "absolute")) == pytest.approx(float(t[alive].max()), abs=1e-3)


def test_caps_of_gaussian_and_of_clustered_weights() -> None:
    z = gaussian(100_000)
    for eps, cap in ((0.1, 14.4), (0.2, 7.18), (0.3, 4.7), (0.5, 2.70)):
        exact = math.acosh(1 / math.sqrt(0.1)) / norm.ppf((1 + eps) / 2)
        assert float(updatable_cap(z, eps)) == pytest.approx(exact, rel=1e-3)
        assert exact == pytest.approx(cap, rel=0.01)
    two = clusters(200_000, 0.3)
    for eps, cap in ((0.1, 3.1), (0.2, 2.54), (0.3, 2.25)):
        assert float(updatable_cap(two, eps)) == pytest.approx(cap, rel=0.05)
    # At t = 10 the cap of 0.1 does not bind on the first and does on the second, of which few weights are alive.
    assert float(live_share(z, 10.0)) == pytest.approx(0.23, abs=0.01)
    assert float(live_share(two, 10.0)) == pytest.approx(0.011, abs=0.005)


def test_no_share_is_no_cap_bit_for_bit() -> None:
    w, v = draw(4, 50).requires_grad_(), draw(4, 50, seed=1)
    ede, dte = TanhSign(7.0), TanhSign(7.0, eps=0.0, tau=0.3)
    dte.refresh(w)
    assert math.isinf(float(dte.cap))
    assert torch.equal(torch.autograd.grad(ede(w), w, v)[0], torch.autograd.grad(dte(w), w, v)[0])
    assert math.isinf(float(updatable_cap(torch.zeros(10), 0.5)))  # all stand at zero: alive whatever t


def test_capped_sharpness_is_at_most_the_schedules_and_follows_the_weights() -> None:
    q = TanhSign(1.0, eps=0.1)
    q.refresh(clusters(2000, 0.3))
    for t in (0.1, 1.0, 3.0, 10.0):
        q.anneal(t=t)
        assert float(q.sharpness) == min(t, float(q.cap))
        assert float(q.k) == max(1 / float(q.sharpness), 1)
    assert float(q.sharpness) == pytest.approx(3.1, rel=0.1)
    q.refresh(gaussian(2000))
    assert float(q.sharpness) == 10.0


def test_batch_of_activations_sets_its_own_cap() -> None:
    a = clusters(1001, 0.3).requires_grad_()
    q = TanhSign(10.0, eps=0.2, batch=True)
    (g,) = torch.autograd.grad(q(a).sum(), a)
    t = min(10.0, float(updatable_cap(a, 0.2)))
    assert torch.allclose(g, slope(a.detach(), t))
    assert float(q.cap) == math.inf
    assert q.primitive() is None


def test_a_constant_filter_is_zero_and_has_no_gradient() -> None:
    w = torch.stack([torch.zeros(9), torch.full((9,), 0.7), torch.linspace(-1, 1, 9)]).double().requires_grad_()
    z = balanced(w)
    (g,) = torch.autograd.grad((z * torch.linspace(0, 1, 9).double() ** 2).sum(), w)
    assert (z[:2] == 0).all()
    assert (g[:2] == 0).all()
    assert g[2].abs().max() > 0
