"""Levels of a few bits: exact powers of two, nearest levels, draws without bias, and what the logarithm is good for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.quantizers import hard_sign
from qlab.quantizers.kbit import KBit, ap2, floor2, linear_quantize, linear_scaled, log_quantize, q_k

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def heavy(n: int, seed: int = 0) -> Tensor:
    """Normal times log-normal with a deviation of 1.5 in the logarithm."""
    return normal(n, seed=seed) * (1.5 * normal(n, seed=seed + 1)).exp()


# ---- AP2 ------------------------------------------------------------------------------------------------------------


def test_ap2_is_the_rounded_logarithm_of_numpy() -> None:
    x = heavy(200_000).numpy()
    expected = np.sign(x) * 2.0 ** np.round(np.log2(np.abs(x)))
    assert np.array_equal(ap2(torch.from_numpy(x)).numpy(), expected)
    assert np.array_equal(floor2(torch.from_numpy(x)).numpy(), 2.0 ** np.floor(np.log2(np.abs(x))))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ap2_is_odd_idempotent_and_shifts_with_its_argument(dtype: torch.dtype) -> None:
    x = normal(100_000).to(dtype)
    y = ap2(x)
    assert torch.equal(ap2(-x), -y)
    assert torch.equal(ap2(y), y)
    for j in (-20, -1, 3, 30):
        assert torch.equal(ap2(x * 2.0**j), y * 2.0**j)
    ratio = (y / x).double()
    assert 1 / math.sqrt(2) <= float(ratio.min()) + 1e-6
    assert float(ratio.max()) <= math.sqrt(2) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ap2_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = info.tiny * info.eps  # the smallest subnormal number
    x = torch.tensor([0.0, -0.0, least, -info.tiny, math.inf, -math.inf, math.nan], dtype=dtype)
    y = ap2(x)
    assert torch.equal(y[:6], x[:6])  # powers of two stay; so do zero and infinity
    assert y[6].isnan()


# ---- levels ---------------------------------------------------------------------------------------------------------

GRIDS = [("odd", k) for k in (1, 2, 3, 5, 8)] + [("linear", k) for k in (2, 3, 5, 8)] + [("log", k) for k in (2, 3, 4)]


@pytest.mark.parametrize(("grid", "k"), GRIDS)
def test_hard_values_lie_on_the_declared_levels_and_are_reached(grid: Any, k: int) -> None:
    q = KBit(k, grid)
    levels = q.levels(F64)
    assert torch.equal(levels, levels.sort().values)
    assert len(levels) == 2**k - (grid == "log")
    x = torch.linspace(-1.3, 1.3, 100_001, dtype=F64)
    y = q.hard(x)
    assert torch.isin(y, levels).all()
    assert torch.equal(y.unique(), levels)
    assert torch.equal(q.hard(levels), levels)
    assert torch.isin(q.hard(x.float()), q.levels()).all()


@pytest.mark.parametrize(("grid", "k"), [g for g in GRIDS if g[0] != "log"])
def test_hard_is_the_nearest_level(grid: Any, k: int) -> None:
    q = KBit(k, grid)
    x = 1.2 * normal(2000)
    brute = (x[:, None] - q.levels(F64)).abs().min(1).values
    assert torch.allclose((q.hard(x) - x).abs(), brute, rtol=0, atol=1e-15)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_logarithmic_levels_are_the_nearest_in_the_exponent(k: int) -> None:
    q = KBit(k, "log")
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=F64)
    positive = q.levels(F64)[q.levels(F64) > 0]
    nearest = positive[(x.log2()[:, None] - positive.log2()).abs().argmin(1)]
    expected = torch.where(x < positive[0] / math.sqrt(2), torch.zeros_like(x), nearest)
    assert torch.equal(q.hard(x), expected)
    assert torch.equal(q.hard(-x), -expected)


def test_one_bit_is_the_sign_and_many_bits_are_the_value() -> None:
    x = torch.cat([normal(1000), torch.tensor([0.0, -0.0], dtype=F64)])
    assert torch.equal(q_k(x, 1), hard_sign(x))
    inside = x.clamp(-1, 1)
    for k in range(1, 17):
        assert float((q_k(x, k) - inside).abs().max()) <= 1 / (2**k - 1) + 1e-15
        assert torch.equal(q_k(-x[:1000], k), -q_k(x[:1000], k))


@pytest.mark.parametrize("bits", [1, 3])
def test_rows_are_levels_times_their_scale(bits: int) -> None:
    W = 0.3 * normal(5, 7, 3, 3)
    q = KBit(bits, rows=True)
    flat = W.abs().flatten(1)
    s = flat.mean(1) if bits == 1 else flat.amax(1)
    assert torch.equal(q.scale(W), s.view(5, 1, 1, 1))
    assert torch.equal(q.hard(W), q.scale(W) * q.level(W))
    assert torch.isin(q.level(W), q.levels(F64)).all()
    assert torch.equal(q(W), q.hard(W))
    assert (KBit(bits, rows=True).hard(torch.zeros(2, 3)).abs() < 1e-30).all()  # a row of zeros divides by nothing


# ---- gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("window", [1.0, 1.25])
@pytest.mark.parametrize("bits", [1, 2])
def test_gradient_passes_within_the_window_and_on_its_ends(stochastic: bool, window: float, bits: int) -> None:
    q = KBit(bits, stochastic=stochastic, window=window)
    x = torch.tensor(
        [-2.0, -1.26, -1.25, -1.1, -1.0, -0.3, 0.0, 0.3, 1.0, 1.2, 1.25, 1.26], dtype=F64, requires_grad=True
    )
    g = normal(12)
    (grad,) = torch.autograd.grad(q(x), x, g)
    assert torch.equal(grad, torch.where(x.abs() <= window, g, 0))
    primitive = q.primitive()
    assert primitive is not None
    (slope,) = torch.autograd.grad(primitive(x).sum(), x)
    assert torch.equal(slope, (x.abs() <= window).double())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode product
def test_gradients_go_through_the_transforms_of_torch() -> None:
    q, x = KBit(2), normal(4, 3)
    w = torch.arange(3.0, dtype=F64)
    each = torch.func.vmap(torch.func.grad(lambda row: (q(row) * w).sum()))(x)
    assert torch.equal(each, w * (x.abs() <= 1))
    _, tangent = torch.func.jvp(q, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, (x.abs() <= 1).double())


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_stochastic_sign_has_mean_and_variance_of_the_clipped_value() -> None:
    x = torch.tensor([-1.7, -1.0, -0.6, 0.0, 0.3, 0.95, 1.0, 1.2], dtype=F64)
    q = KBit(1, stochastic=True)
    n = 100_000
    y = q(x.expand(n, -1))
    assert torch.equal(y.abs(), torch.ones_like(y))
    mean, variance = x.clamp(-1, 1), 1 - x.clamp(-1, 1) ** 2
    assert ((y.mean(0) - mean).abs() <= 4 * (variance / n).sqrt()).all()  # 0 for |x| >= 1: it is deterministic there
    assert torch.allclose(y.var(0), variance, atol=0.01)


@pytest.mark.parametrize(("grid", "k"), GRIDS)
def test_draws_are_unbiased_within_the_range_and_take_one_of_two_levels(grid: Any, k: int) -> None:
    q = KBit(k, grid, stochastic=True)
    top = float(q.levels(F64)[-1])
    x = torch.linspace(-1, top, 41, dtype=F64)
    n = 20_000
    y = q(x.expand(n, -1))
    assert torch.isin(y, q.levels(F64)).all()
    below = torch.stack([q.levels(F64)[q.levels(F64) <= v + 1e-12].max() for v in x])
    above = torch.stack([q.levels(F64)[q.levels(F64) >= v - 1e-12].min() for v in x])
    assert ((y == below) | (y == above)).all()
    variance = (x - below) * (above - x)
    assert ((y.mean(0) - x).abs() <= 4 * (variance.clamp(min=0) / n).sqrt() + 1e-12).all()


def test_draws_stay_for_a_step_and_change_with_it_and_evaluation_has_none() -> None:
    q, x = KBit(1, stochastic=True), 0.5 * normal(1000)
    q.resample(torch.Generator().manual_seed(1))
    first = q(x)
    assert torch.equal(q(x), first)
    q.resample(torch.Generator().manual_seed(2))
    assert not torch.equal(q(x), first)
    q.resample(torch.Generator().manual_seed(1))
    assert torch.equal(q(x), first)
    assert torch.equal(q.eval()(x), hard_sign(x))
    assert torch.equal(q.train().hard(x), hard_sign(x))


# ---- gradients' quantizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 4, 6])
@pytest.mark.parametrize("quantize", [log_quantize, linear_scaled])
def test_random_rounding_of_gradients_is_unbiased(quantize: Any, k: int) -> None:
    g = torch.cat([heavy(30), torch.zeros(1, dtype=F64)])
    n = 100_000
    generator = torch.Generator().manual_seed(5)
    y = quantize(g.expand(n, -1), k, torch.rand(n, len(g), generator=generator, dtype=F64), most=g.abs().max())
    error = (y.mean(0) - g).abs()
    assert (error <= 4 * y.std(0) / math.sqrt(n) + 1e-12).all()
    assert y[:, -1].eq(0).all()


def test_variance_of_the_linear_draw_is_that_of_its_fraction() -> None:
    g, k, n = heavy(20), 4, 100_000
    D = g.abs().max() / 7
    f = g / D - (g / D).floor()
    y = linear_scaled(
        g.expand(n, -1), k, torch.rand(n, 20, generator=torch.Generator().manual_seed(0), dtype=F64), g.abs().max()
    )
    assert torch.allclose(y.var(0), D**2 * f * (1 - f), rtol=0.03, atol=1e-3 * float(D) ** 2)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_logarithmic_rounding_to_the_nearest_has_the_codes_of_k_bits(k: int) -> None:
    g = heavy(20_000)
    y = log_quantize(g, k)
    E = round(math.log2(float(g.abs().max())))
    sizes = [0.0] + [2.0 ** (E - j) for j in range(2 ** (k - 1) - 1)]
    assert torch.isin(y.abs(), torch.tensor(sizes, dtype=F64)).all()
    assert len(y.abs().unique()) <= 2 ** (k - 1)
    lost = g.abs() < sizes[-1] / math.sqrt(2)
    assert torch.equal(y == 0, lost)
    assert torch.equal(y[~lost], ap2(g[~lost]))
    assert torch.equal(log_quantize(y, k), y)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_linear_rounding_to_the_nearest_has_the_codes_of_k_bits(k: int) -> None:
    g = heavy(2000)
    codes = linear_scaled(g, k) / (g.abs().max() / (2 ** (k - 1) - 1))
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert float(codes.abs().max()) == pytest.approx(2 ** (k - 1) - 1)
    assert torch.allclose(linear_scaled(linear_scaled(g, k), k), linear_scaled(g, k), rtol=1e-14)


@pytest.mark.parametrize(
    ("start", "ratio"), [(-2.5, math.log(2) / (math.sqrt(2) - math.sqrt(0.5))), (-3.0, 1.5 * math.log(2))]
)
def test_bias_of_ap2_for_log_uniform_magnitudes_is_the_integral(start: float, ratio: float) -> None:
    # 0.980 for octaves between two roundings, 1.040 for those between two powers of two: the top half octave weighs most.
    x = 2.0 ** torch.linspace(start, start + 5, 600_001, dtype=F64)[:-1]
    assert float(ap2(x).mean() / x.mean()) == pytest.approx(ratio, abs=1e-4)


def test_cosine_of_ap2_with_its_argument_has_the_bound_of_kantorovich() -> None:
    least = 2 / (math.sqrt(2) + math.sqrt(0.5))  # for any values whose ratio lies between 1 / sqrt(2) and sqrt(2)
    for g in (normal(1000), heavy(1000), 2.0 ** normal(1000).round() * 1.41):
        assert float(torch.nn.functional.cosine_similarity(ap2(g), g, dim=0)) >= least


def test_logarithmic_codes_keep_heavy_tailed_gradients_that_linear_ones_zero() -> None:
    g = heavy(1_000_000)
    cosine = lambda q: float(torch.nn.functional.cosine_similarity(q, g, dim=0))  # noqa: E731
    zeroed = lambda q: float((q == 0).double().mean())  # noqa: E731
    linear, log = {k: linear_scaled(g, k) for k in (4, 6, 8)}, {k: log_quantize(g, k) for k in (4, 6, 8)}
    assert zeroed(linear[6]) > 0.9
    assert zeroed(log[6]) < 1e-4
    assert cosine(log[6]) > cosine(linear[6])
    assert cosine(log[4]) > cosine(linear[4]) + 0.1
    assert cosine(log[6]) == pytest.approx(cosine(ap2(g)), abs=0.005)  # six bits lose nothing but the roundings of AP2
    assert abs(cosine(linear[8]) - cosine(log[8])) < 0.02  # eight bits are enough for either


def test_zeros_and_empty_gradients_are_taken() -> None:
    u = torch.rand(3)
    for quantize in (log_quantize, linear_scaled):
        for draws in (None, u):
            assert torch.equal(quantize(torch.zeros(3), 6, draws), torch.zeros(3))
        assert quantize(torch.zeros(0), 6).shape == (0,)


def test_fixed_point_clips_to_its_own_ends() -> None:
    y = linear_quantize(torch.tensor([-5.0, -1.0, 0.3, 0.99, 7.0], dtype=F64), 3)
    assert y.tolist() == [-1.0, -1.0, 0.25, 0.75, 0.75]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 17},
        {"bits": True},
        {"bits": 1, "grid": "linear"},
        {"bits": 9, "grid": "log"},
        {"grid": "x"},
    ]
    + [{"window": w} for w in (0.5, math.nan, "1")],
)
def test_what_is_out_of_range_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"must be"):
        KBit(**options)
