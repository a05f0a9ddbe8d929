"""Repairs of the training side: surrogates against autograd of their functions, weights against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import hard_sign
from qlab.quantizers.filters import filter_scale
from qlab.quantizers.information import slope, updatable_cap
from qlab.quantizers.repair import FeatureSign, RepairWeight, laplace_clamp, normalized
from qlab.quantizers.repair_surrogates import ESTIMATORS, SCHEDULED, RepairSign, clipped_at

# torch 2.13 warns about its own use of torch.jit.script on the first forward-mode derivative, even of torch.tanh.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

POINTS = [0.0, 0.3, 0.7, 1.0]


def draws(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes(sign: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sign(x).sum(), x)[0]


def at(name: str, progress: float, **options: float) -> RepairSign:
    sign = RepairSign(name, **options)
    if sign.scheduled is not None:
        sign.anneal(**{sign.scheduled.quantity: sign.scheduled.path(progress)})
    return sign


# ---- surrogates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("progress", POINTS)
def test_the_slope_is_the_derivative_of_the_surrogates_function(name: str, progress: float) -> None:
    sign = at(name, progress, eps=0.0)
    x = torch.linspace(-2.987, 3.013, 801, dtype=torch.float64)
    g = sign.primitive()
    assert g is not None
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(g(leaf).sum(), leaf)[0]
    torch.testing.assert_close(slopes(sign, x), expected, atol=1e-11, rtol=1e-11)
    assert torch.equal(g(torch.zeros(1, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_forward_map_is_the_sign_whatever_the_surrogate(name: str) -> None:
    x = torch.tensor([-3.0, -0.1, -0.0, 0.0, 1e-300, 2.0], dtype=torch.float64)
    for progress in POINTS:
        assert at(name, progress)(x).tolist() == [-1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("progress", POINTS)
def test_slopes_integrate_to_what_is_written(progress: float) -> None:
    x = torch.linspace(-200, 200, 2_000_001, dtype=torch.float64)

    def integral(name: str) -> float:
        sign = at(name, progress)
        return float(torch.trapezoid(sign.derivative(x, sign.quantity(x)), x))

    t, t_rbnn, o = (SCHEDULED[name].path(progress) for name in ("ede", "rbnn", "reste"))
    assert integral("ede") == pytest.approx(2 * max(1 / t, 1), rel=1e-6)
    if math.sqrt(2) / t_rbnn < 200:
        assert integral("rbnn") == pytest.approx(2 * max(1 / t_rbnn, 1), rel=1e-4)
    assert integral("reste") == pytest.approx(2 * 1.5 ** (1 / o), abs=1e-3)
    assert integral("swish") == pytest.approx(2, abs=1e-6)


def test_fourier_slope_is_the_truncated_sum_and_jumps_by_204_and_228() -> None:
    x = draws(500)
    w = 0.1
    for progress, q, jump in ((0.0, 9, 2.04), (1.0, 18, 2.28)):
        terms = sum(torch.cos((2 * i + 1) * w * x) for i in range(q + 1))
        expected = 4 * w / math.pi * terms * (x.abs() <= 1)
        torch.testing.assert_close(slopes(at("fourier", progress), x), expected, atol=1e-12, rtol=1e-10)
        g = at("fourier", progress).primitive()
        assert g is not None
        ends = g(torch.tensor([-1.0, 1.0], dtype=torch.float64))
        assert float(ends[1] - ends[0]) == pytest.approx(jump, abs=0.01)
    assert slopes(at("fourier", 0.0), torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(4 * w / math.pi * 10)


def test_reste_of_order_one_is_the_clip_at_one_and_a_half() -> None:
    x = draws(500, scale=2)
    assert torch.equal(slopes(at("reste", 0.0), x), slopes(RepairSign("clipped", clip=1.5), x))


def test_rbnn_is_zero_beyond_its_support_and_sqrt2_times_k_t_at_zero() -> None:
    for progress in POINTS:
        t = SCHEDULED["rbnn"].path(progress)
        edge = math.sqrt(2) / t
        d = slopes(at("rbnn", progress), torch.tensor([0.0, 0.999 * edge, 1.001 * edge], dtype=torch.float64))
        assert d[0].item() == pytest.approx(math.sqrt(2) * t * max(1 / t, 1))
        assert d[1] > 0
        assert d[2] == 0


def test_ede_goes_from_the_identity_to_a_step() -> None:
    x = torch.tensor([0.0, 0.5], dtype=torch.float64)
    early, late = slopes(at("ede", 0.0), x), slopes(at("ede", 1.0), x)
    assert early[0] == pytest.approx(1)
    assert early[1] == pytest.approx(1, abs=0.01)
    assert late[0] == pytest.approx(10)
    assert late[1] < 0.01


def test_dte_keeps_its_share_live_and_is_ede_without_one() -> None:
    centres = hard_sign(draws(4000))
    x = centres + draws(4000, seed=1, scale=0.3)  # two clusters: at t = 10 hardly a slope is left
    d = slopes(at("dte", 1.0, eps=0.2), x)
    cap = updatable_cap(x, 0.2)
    assert cap < 10
    assert torch.equal(d, slope(x, cap))
    peak = slope(torch.zeros(1, dtype=torch.float64), cap)
    assert (d >= 0.1 * peak * (1 - 1e-12)).double().mean() >= 0.2
    assert torch.equal(slopes(at("dte", 1.0, eps=0.0), x), slopes(at("ede", 1.0), x))


@pytest.mark.parametrize("area", [("clipped", 1.0), ("polynomial", 2 / 3)])
def test_area_between_the_function_and_the_sign(area: tuple[str, float]) -> None:
    x = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    g = RepairSign(area[0]).primitive()
    assert g is not None
    assert float(torch.trapezoid((g(x) - hard_sign(x)).abs(), x)) == pytest.approx(area[1], abs=1e-4)


def test_area_of_ede_in_its_second_stage_is_2_ln2_over_t() -> None:
    sign, x = at("ede", 1.0), torch.linspace(-5, 5, 1_000_001, dtype=torch.float64)
    g = sign.primitive()
    assert g is not None
    assert float(torch.trapezoid((g(x) - hard_sign(x)).abs(), x)) == pytest.approx(2 * math.log(2) / 10, abs=1e-4)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "dte"])
def test_torch_func_transforms_see_the_same_slope(name: str) -> None:
    sign, x = at(name, 0.6), draws(3, 5)
    by_backward = slopes(sign, x)
    assert torch.equal(torch.func.grad(lambda v: sign(v).sum())(x), by_backward)
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda v: sign(v).sum()))(x), by_backward)
    _, tangent = torch.func.jvp(sign, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, by_backward)


def test_wrong_constants_are_refused() -> None:
    for options in ({"clip": 0.0}, {"clip": math.nan}, {"eps": 1.5}):
        with pytest.raises(InputError):
            RepairSign("dte" if "eps" in options else "clipped", **options)
    with pytest.raises(UnknownNameError, match="Did you mean 'fourier'"):
        RepairSign("fourir")
    with pytest.raises(InputError):
        clipped_at(-1.0)


# ---- weights --------------------------------------------------------------------------------------------------------

NORMS = ["none", "center", "standardize", "l2", "scaled_ws"]
SCALINGS = ["none", "alpha", "alpha_chain", "pow2"]
BINARIZERS = [*ESTIMATORS, "recu", "magnitude_aware"]


@pytest.mark.parametrize("binarizer", BINARIZERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_deployed_weight_is_scale_times_level_and_the_level_a_sign(binarizer: str, norm: str, scaling: str) -> None:
    q = RepairWeight(binarizer, norm=norm, scaling=scaling)  # type: ignore[arg-type]
    theta = draws(4, 3, 3, 3, scale=0.3)
    level, a = q.level(theta), q.scale(theta)
    assert set(level.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(q.hard(theta), level if a is None else a * level)
    assert a is None or (a.shape == (4, 1, 1, 1) and bool((a > 0).all()))
    if binarizer != "magnitude_aware":
        assert torch.equal(q(theta), q.hard(theta))


def test_norms_are_what_their_formulas_say() -> None:
    theta = draws(5, 2, 3, 3)
    flat = theta.flatten(1)
    mean, std, n = flat.mean(1, keepdim=True), flat.std(1, keepdim=True), 18
    expected = {
        "none": flat,
        "center": flat - mean,
        "standardize": (flat - mean) / std,
        "l2": 3 * flat / flat.square().sum(1, keepdim=True).sqrt(),
        "scaled_ws": 3 * (flat - mean) / (std * math.sqrt(n)),
    }
    for norm, value in expected.items():
        torch.testing.assert_close(normalized(theta, norm, 3.0).flatten(1), value, atol=1e-14, rtol=1e-13)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["standardize", "scaled_ws"])
def test_standardised_weights_have_gradients_without_mean_and_orthogonal_to_the_weight(norm: str) -> None:
    theta = draws(5, 18).requires_grad_()
    weights = draws(5, 18, seed=1)
    g = torch.autograd.grad((RepairWeight("identity", norm=norm)(theta) * weights).sum(), theta)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(g.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    centred = theta.detach() - theta.detach().mean(1, keepdim=True)
    torch.testing.assert_close((centred * g).sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert g.abs().max() > 1e-3


def test_centred_symmetric_weights_have_equal_shares_of_both_signs() -> None:
    half = draws(6, 50).abs() + 1e-3
    theta = torch.cat([half, -half], 1) + 7.0
    assert torch.equal(RepairWeight(norm="center").level(theta).sum(1), torch.zeros(6, dtype=torch.float64))


def test_alpha_is_the_best_scale_of_the_signs() -> None:
    theta = draws(7, 40)
    a = RepairWeight(scaling="alpha").scale(theta)
    assert a is not None
    s = hard_sign(theta)
    error = (theta - a * s).square().sum(1)
    torch.testing.assert_close(error, theta.square().sum(1) - 40 * a[:, 0] ** 2, atol=1e-12, rtol=1e-12)
    best = (theta * s).sum(1, keepdim=True) / 40  # least squares
    torch.testing.assert_close(a, best, atol=1e-15, rtol=1e-14)
    for change in (-0.01, 0.01):
        assert bool(((theta - (a + change) * s).square().sum(1) > error).all())


def test_alpha_is_a_constant_in_the_gradient_and_alpha_chain_is_not() -> None:
    theta, g = draws(3, 8, scale=0.3), draws(3, 8, seed=1)
    a = filter_scale(theta)

    def gradient(scaling: str) -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad((RepairWeight(scaling=scaling)(leaf) * g).sum(), leaf)[0]  # type: ignore[arg-type]

    inside = (theta.abs() <= 1).double()
    torch.testing.assert_close(gradient("alpha"), a * inside * g)
    s = hard_sign(theta)
    torch.testing.assert_close(gradient("alpha_chain"), a * inside * g + s * (g * s).mean(1, keepdim=True))


def test_pow2_scales_are_the_nearest_powers_of_two_of_the_filter_scale() -> None:
    theta = draws(9, 30, scale=0.2)
    a = RepairWeight(scaling="pow2").scale(theta)
    assert a is not None
    exponents = torch.log2(a)
    assert torch.equal(exponents, exponents.round())
    assert bool(((exponents - torch.log2(filter_scale(theta))).abs() <= 0.5).all())


def test_magnitude_aware_trains_with_the_magnitude_and_deploys_signs() -> None:
    q, theta, g = RepairWeight("magnitude_aware"), draws(3, 8), draws(3, 8, seed=1)
    a = filter_scale(theta)
    assert torch.equal(q(theta), a * hard_sign(theta))
    assert torch.equal(q.hard(theta), hard_sign(theta))
    leaf = theta.clone().requires_grad_()
    got = torch.autograd.grad((q(leaf) * g).sum(), leaf)[0]
    torch.testing.assert_close(got, a * (theta.abs() <= 1) * g)


def test_magnitude_aware_under_adam_is_the_clip_and_under_sgd_a_step_scaled_by_alpha() -> None:
    """A constant factor of a filter's gradient cancels in Adam, as its eps goes to zero, and not in SGD."""
    start, data = draws(3, 8, scale=0.3), draws(5, 8, seed=1)

    def step(binarizer: str, kind: str) -> Tensor:
        theta = start.clone().requires_grad_()
        q = RepairWeight(binarizer)
        w = q(theta)
        upstream = draws(5, 3, seed=2)
        ((data @ w.T) * upstream).sum().backward()
        optimizer = torch.optim.Adam([theta], lr=0.01, eps=1e-300) if kind == "adam" else torch.optim.SGD([theta], 0.01)
        optimizer.step()
        return theta.detach() - start

    torch.testing.assert_close(step("magnitude_aware", "adam"), step("clipped", "adam"), atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(step("magnitude_aware", "sgd"), filter_scale(start) * step("clipped", "sgd"))


def test_recu_clamps_at_the_laplace_quantile() -> None:
    theta = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(1, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    for tau in (0.85, 0.95):
        u = laplace_clamp(theta, tau)
        assert (u == u.max()).double().mean().item() == pytest.approx(1 - tau, abs=0.003)
    z = laplace_clamp(draws(4, 50), 1 - 1e-12)
    torch.testing.assert_close(z.std(1), torch.full((4,), 2 * math.sqrt(2), dtype=torch.float64))


def test_recu_gives_no_gradient_through_clamped_values() -> None:
    q = RepairWeight("recu")
    theta = draws(1, 200)
    leaf = theta.clone().requires_grad_()
    u = q.prepared(leaf)
    far, near = (theta[0] - theta.mean()).abs().argmax(), (theta[0] - theta.mean()).abs().argmin()
    assert (torch.autograd.grad(u[0, far], leaf, retain_graph=True)[0] == 0).all()
    assert torch.autograd.grad(u[0, near], leaf)[0][0, near] > 1


def test_stage_mix_is_exactly_the_float_weight_and_exactly_the_binary_one_at_its_ends() -> None:
    q, theta = RepairWeight(scaling="alpha", norm="standardize", stage="mix"), draws(3, 8)
    q.anneal(lam=0.0)
    assert torch.equal(q(theta), q.prepared(theta))
    q.anneal(lam=1.0)
    assert torch.equal(q(theta), q.hard(theta))
    q.anneal(lam=0.25)
    torch.testing.assert_close(q(theta), 0.75 * q.prepared(theta) + 0.25 * q.hard(theta))


def test_hand_over_of_stages_keeps_every_sign() -> None:
    q, theta = RepairWeight(norm="center", stage="mix"), draws(4, 30)
    q.anneal(lam=0.0)
    before = hard_sign(q(theta))
    q.anneal(lam=1.0)
    assert torch.equal(q(theta), before)


def test_soft_signs_are_tanh_until_they_are_hardened() -> None:
    for q in (RepairWeight(stage="soft"), FeatureSign(soft=True)):
        theta = draws(3, 8)
        q.anneal(beta=4.0, hardened=0.0)
        leaf = theta.clone().requires_grad_()
        torch.testing.assert_close(q(leaf), torch.tanh(4 * theta))
        expected = 4 * (1 - torch.tanh(4 * theta) ** 2)
        torch.testing.assert_close(torch.autograd.grad(q(leaf).sum(), leaf)[0], expected)
        q.anneal(beta=4.0, hardened=1.0)
        assert torch.equal(q(theta), hard_sign(theta))


def test_features_in_eval_mode_are_signs_even_while_they_are_soft_in_training() -> None:
    q = FeatureSign(soft=True).eval()
    x = draws(50)
    assert torch.equal(q(x), hard_sign(x))


def test_half_wave_features_are_whether_x_is_not_negative_with_half_the_slope() -> None:
    q, x = FeatureSign("polynomial", halfwave=True), draws(100)
    assert torch.equal(q(x), (x >= 0).double())
    assert q.levels().tolist() == [0, 1]
    torch.testing.assert_close(slopes(q, x), (1 - x.abs()).clamp(min=0))


def test_filters_of_one_value_are_refused_where_their_mean_is_taken_away() -> None:
    generator = torch.Generator()
    one = torch.randn(4, 1)
    for q in (RepairWeight(norm="standardize"), RepairWeight("recu")):
        with pytest.raises(InputError, match="filters of one value"):
            q.init(one, generator)
    assert torch.equal(RepairWeight().init(one, generator), one)


def test_constant_filters_give_finite_weights_and_gradients() -> None:
    theta = torch.ones(2, 9, dtype=torch.float64, requires_grad=True)
    for norm in NORMS:
        for scaling in SCALINGS:
            w = RepairWeight(norm=norm, scaling=scaling)(theta)  # type: ignore[arg-type]
            assert w.isfinite().all()
            assert torch.autograd.grad(w.sum(), theta)[0].isfinite().all()
