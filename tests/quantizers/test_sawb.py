"""SAWB: its clip beside the one of least squared error found by brute force, its grids, its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.func import jacfwd, jacrev, vmap

from qlab.errors import InputError
from qlab.quantizers.sawb import COEFFICIENTS, LUQ, NARROW_4, SAWB, SAWBActivation, sawb_clip

# torch 2.13 warns about its own use of torch.jit.script on the first forward-mode derivative, even of torch.tanh.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

F64 = torch.float64
QUANTILES = (np.arange(20_000) + 0.5) / 20_000  # a distribution as its quantiles: no sampling error


def values(name: str) -> np.ndarray:
    """Values of unit rms."""
    from scipy import stats

    x = {"normal": stats.norm, "laplace": stats.laplace, "uniform": stats.uniform(-1, 2)}[name].ppf(QUANTILES)
    return x / np.sqrt((x**2).mean())


def error(x: np.ndarray, levels: np.ndarray) -> float:
    """Squared error of rounding to the nearest of `levels`, ascending, by search."""
    edges = (levels[1:] + levels[:-1]) / 2
    return float(((x - levels[np.searchsorted(edges, x)]) ** 2).mean())


def best(x: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """The clip of least squared error, and that error."""
    found = minimize_scalar(
        lambda clip: error(x, clip * codes / codes[-1]), bounds=(0.5, 8), method="bounded", options={"xatol": 1e-3}
    )
    return float(found.x), float(found.fun)


FITTED = [
    (2, "half", COEFFICIENTS[2]),
    (3, "half", COEFFICIENTS[3]),
    (4, "half", COEFFICIENTS[4]),
    (4, "narrow", NARROW_4),
]


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize(("bits", "grid", "coefficients"), FITTED)
def test_clip_is_close_to_the_one_of_least_squared_error(
    distribution: str, bits: int, grid: str, coefficients: tuple[float, float]
) -> None:
    x = values(distribution)
    codes = SAWB(bits, grid).levels(F64).numpy()  # type: ignore[arg-type]
    clip, least = best(x, codes)
    mine = float(sawb_clip(torch.from_numpy(x), bits, coefficients))
    assert mine == pytest.approx(clip, rel=0.05)
    assert error(x, mine * codes / codes[-1]) <= 1.03 * least


def test_clips_of_the_luq_code_are_those_of_known_distributions() -> None:
    """In units of the rms: normal 2.365, Laplace 3.473, uniform 1.534; closed forms of rms and mean."""
    for name, mean in (
        ("normal", math.sqrt(2 / math.pi)),
        ("laplace", 1 / math.sqrt(2)),
        ("uniform", math.sqrt(3) / 2),
    ):
        found = float(sawb_clip(torch.from_numpy(values(name)), coefficients=LUQ))
        assert found == pytest.approx(12.1 - 12.2 * mean, abs=0.01), name


def test_clip_is_the_formula_and_scales_with_the_tensor() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    for bits, (c1, c2) in COEFFICIENTS.items():
        rms, mean = math.sqrt(float((x**2).mean())), float(x.abs().mean())
        assert float(sawb_clip(x, bits)) == pytest.approx(c1 * rms - c2 * mean, rel=1e-13)
        assert float(sawb_clip(-3 * x, bits)) == pytest.approx(3 * float(sawb_clip(x, bits)), rel=1e-13)


def test_clip_of_values_of_one_magnitude_is_that_magnitude_and_of_zeros_one() -> None:
    """The formula itself gives -0.12 there."""
    assert float(sawb_clip(torch.tensor([0.5, -0.5, 0.5], dtype=F64))) == pytest.approx(0.5)
    assert float(sawb_clip(torch.zeros(4))) == 1
    for grid in ("half", "narrow", "wide"):
        assert SAWB(4, grid)(torch.zeros(4)).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize(("grid", "count"), [("half", 0), ("narrow", -1), ("wide", 1)])
def test_grid_has_its_levels_and_weights_go_to_the_nearest(bits: int, grid: str, count: int) -> None:
    q = SAWB(bits, grid)  # type: ignore[arg-type]
    levels = q.levels(F64)
    assert len(levels) == 2**bits + count
    assert (0 in levels) == (grid != "half")
    w = torch.randn(400, generator=torch.Generator().manual_seed(bits), dtype=F64)
    step = q.scale(w)
    assert float(step * levels[-1]) == pytest.approx(float(sawb_clip(w, coefficients=q.coefficients)))
    nearest = levels[(w[:, None] - step * levels).abs().argmin(1)]
    assert torch.equal(q.level(w), nearest)
    assert torch.equal(q.hard(w), step * nearest)
    assert torch.equal(q(w), q.hard(w))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradient_passes_unchanged_through_every_transform(dtype: torch.dtype) -> None:
    q = SAWB(4)
    w = 3 * torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert torch.equal(jacrev(q)(w), torch.eye(9, dtype=dtype))
    assert torch.equal(jacfwd(q)(w), torch.eye(9, dtype=dtype))
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.testing.assert_close(vmap(q)(rows), torch.stack([q(r) for r in rows]), rtol=1e-6, atol=1e-7)


def test_activation_is_a_rectifier_on_sixteen_levels_with_its_derivative() -> None:
    q = SAWBActivation(4)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=F64).pow(3).requires_grad_()
    step = sawb_clip(x.detach().clamp(min=0), coefficients=LUQ) / 15
    y = q(x)
    codes = (y.detach() / step).round()
    torch.testing.assert_close(codes * step, y.detach(), rtol=1e-13, atol=0)
    assert codes.unique().tolist() == list(range(16))
    grid = step * torch.arange(16, dtype=F64)
    assert torch.allclose((x.detach().clamp(min=0)[:, None] - grid).abs().min(1).values, (x.clamp(min=0) - y).abs())
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, (x > 0).to(F64))


def test_activation_answers_one_sample_in_eval_mode_as_it_does_in_a_batch() -> None:
    q = SAWBActivation(4, momentum=1.0)
    x = 5 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    whole = q(x)
    assert torch.equal(q.eval()(x), whole)  # with momentum 1 the running moments are those of the batch
    assert torch.equal(q(x[:1]), whole[:1])
    before = q.running_mean.clone()
    q(100 * x)
    assert torch.equal(q.running_mean, before)


def test_running_moments_are_an_exponential_average() -> None:
    q = SAWBActivation(4, momentum=0.25)
    first, second = float(q.running_mean), float(q.running_var)
    assert second - first**2 == pytest.approx(0.5 - 1 / (2 * math.pi))  # the variance of max(z, 0), z standard normal
    for k in range(1, 4):
        q(torch.full((10,), float(k)))
        first, second = 0.75 * first + 0.25 * k, 0.75 * second + 0.25 * k**2
    assert float(q.running_mean) == pytest.approx(first)
    assert float(q.running_var) == pytest.approx(second)


def test_reach_two_costs_rectified_normal_values_four_times_the_error() -> None:
    z = torch.from_numpy(values("normal"))
    errors = [float((SAWBActivation(4, reach=r)(z) - z.clamp(min=0)).square().mean()) for r in (1.0, 2.0)]
    assert 3.5 < errors[1] / errors[0] < 4.5


@pytest.mark.parametrize(
    "make", [lambda: SAWB(8), lambda: SAWB(True), lambda: SAWBActivation(1), lambda: sawb_clip(torch.ones(2), 7)]
)
def test_bits_without_coefficients_are_refused(make: object) -> None:
    with pytest.raises(InputError, match="coefficients for"):
        make()  # type: ignore[operator]


def test_what_makes_no_grid_is_refused() -> None:
    with pytest.raises(InputError, match="grid"):
        SAWB(4, "odd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reach"):
        SAWBActivation(4, reach=0)
    with pytest.raises(InputError, match="momentum"):
        SAWBActivation(4, momentum=2)
