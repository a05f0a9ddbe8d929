"""Balls: what a projection must be, for every norm, dtype, shape, radius and range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlab.attacks.ball import NORMS, Ball, Norm, _inward, dual, norms
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(3,), (7,), (1, 4, 4), (2, 3, 5), (3, 1, 2, 2)]


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=generator("test_ball", seed), dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn, norm: Norm | None = None) -> tuple[Ball, Tensor]:
    """Return balls and points of any kind: far and near, on corners of the range, at x itself."""
    norm = norm or draw(st.sampled_from(NORMS))
    dtype, shape = draw(st.sampled_from(DTYPES)), (4, *draw(st.sampled_from(SHAPES)))
    low, width = draw(st.sampled_from([(0.0, 1.0), (-1.0, 2.0), (-2.5, 0.75), (3.0, 252.0)]))
    seed = draw(st.integers(0, 10**6))
    x = (low + width * uniform(shape, seed)).to(dtype)
    x = torch.where(uniform(shape, seed + 1) < draw(st.sampled_from([0.0, 0.3])), low, x).clamp(low, low + width)
    eps = draw(st.sampled_from([1e-30, 1e-9, 1e-4, 8 / 255, 0.1, 1.0, 300.0, math.inf]))
    size = draw(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 20.0])) * min(eps, 300.0)
    points = (x.double() + size * (2 * uniform(shape, seed + 2) - 1)).to(dtype)
    if draw(st.booleans()):
        points = points.clamp(low, low + width)
    return Ball.of(x, eps, norm, low, low + width), points


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_projection_lies_in_ball_and_range_to_the_last_bit(case: tuple[Ball, Tensor]) -> None:
    ball, points = case
    p = ball.project(points)
    assert p.dtype == ball.x.dtype
    assert p.shape == ball.x.shape
    assert bool(ball.contains(p).all())
    # The same said without the ball: numpy, one example at a time, in float64.
    for one, x, eps in zip(p.double().numpy(), ball.x.double().numpy(), ball.eps.numpy(), strict=True):
        order = {"linf": np.inf, "l2": 2, "l1": 1}[ball.norm]
        assert np.linalg.norm((one - x).ravel(), order) <= eps
        assert (one >= float(ball.low)).all()
        assert (one <= float(ball.high)).all()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_point_of_the_ball_stays_bit_for_bit(case: tuple[Ball, Tensor]) -> None:
    ball, points = case
    p = ball.project(points)
    assert torch.equal(ball.project(p), p)
    inside = ball.contains(points)
    assert torch.equal(p[inside], points[inside])
    assert torch.equal(ball.project(ball.x), ball.x)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_random_points_lie_in_the_ball_and_taking_some_balls_changes_nothing(case: tuple[Ball, Tensor]) -> None:
    ball, points = case
    assert bool(ball.contains(ball.random(generator("random", 0))).all())
    index = torch.tensor([2, 0])
    assert torch.equal(ball.take(index).project(points[index]), ball.project(points)[index])
    assert torch.equal(ball.take(index).contains(points[index]), ball.contains(points)[index])


@settings(max_examples=60, deadline=None)
@given(cases("linf"))
def test_linf_is_the_clip_and_off_it_by_less_than_rounding(case: tuple[Ball, Tensor]) -> None:
    ball, points = case
    x, eps = ball.x.double().numpy(), float(ball.eps[0])
    brute = np.clip(
        points.double().numpy(), np.maximum(x - eps, float(ball.low)), np.minimum(x + eps, float(ball.high))
    )
    unit = torch.finfo(ball.x.dtype).eps * np.abs(brute) + torch.finfo(ball.x.dtype).smallest_normal
    assert (np.abs(ball.project(points).double().numpy() - brute) <= unit).all()


@settings(max_examples=60, deadline=None)
@given(cases("linf"))
def test_linf_edges_are_the_last_numbers_inside(case: tuple[Ball, Tensor]) -> None:
    ball, _ = case
    if bool(ball.eps.isinf().any()):
        return
    for end, side in zip(ball.edges, (-1.0, 1.0), strict=True):
        beyond = torch.nextafter(end, torch.full_like(end, side * math.inf))
        # A float64 difference of two float64 is itself rounded: there the next number may still measure eps.
        allowed = ball.x.dtype == torch.float64
        assert bool(((end.double() - ball.x.double()).abs() <= ball.eps[0]).all())
        assert allowed or bool(((beyond.double() - ball.x.double()).abs() > ball.eps[0] * (1 - 1e-15)).all())


# ---- the nearest point, against a solver -----------------------------------------------------------------------------


def nearest(x: np.ndarray, point: np.ndarray, eps: float, norm: Norm, low: float, high: float) -> np.ndarray:
    """Return the nearest point of ball and range by a solver that knows nothing of thresholds: x + u - v with u, v >= 0."""
    from scipy.optimize import minimize

    n, d = len(x), point - x

    def distance(w: np.ndarray) -> tuple[float, np.ndarray]:
        rest = w[:n] - w[n:] - d
        return 0.5 * rest @ rest, np.concatenate([rest, -rest])

    if norm == "l1":
        bound = {"type": "ineq", "fun": lambda w: eps - w.sum(), "jac": lambda w: -np.ones(2 * n)}
    else:
        bound = {
            "type": "ineq",
            "fun": lambda w: eps**2 - ((w[:n] - w[n:]) ** 2).sum(),
            "jac": lambda w: -2 * np.concatenate([w[:n] - w[n:], w[n:] - w[:n]]),
        }
    sides = [(0, high - a) for a in x] + [(0, a - low) for a in x]
    options = {"ftol": 1e-15, "maxiter": 500}
    start = np.zeros(2 * n)
    found = minimize(distance, start, jac=True, bounds=sides, constraints=[bound], method="SLSQP", options=options)
    return x + found.x[:n] - found.x[n:]


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("eps", [0.05, 0.4, 1.5])
def test_the_projection_is_the_nearest_point(norm: Norm, eps: float) -> None:
    for seed in range(6):
        x, point = uniform((1, 6), seed), 4 * uniform((1, 6), seed + 50) - 1.5
        x[0, :2] = 0.0
        p = Ball.of(x, eps, norm).project(point)[0].numpy()
        solved = nearest(x[0].numpy(), point[0].numpy(), eps, norm, 0.0, 1.0)
        np.testing.assert_allclose(p, solved, atol=2e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_no_point_of_the_ball_is_nearer(norm: Norm) -> None:
    """The projection p of a is the only point of B with <a - p, q - p> <= 0 for all q of B."""
    ball = Ball.of(uniform((50, 9), 1), 0.7, norm)
    a = ball.x + 3 * (2 * uniform((50, 9), 2) - 1)
    p = ball.project(a)
    for seed in range(30):
        far = ball.x + 10 * (2 * uniform((50, 9), seed + 3) - 1)
        q = ball.project(torch.where(uniform((50, 9), seed + 99) < 0.5, far, p))
        assert bool((((a - p) * (q - p)).sum(1) <= 1e-12).all())


def test_l1_without_a_range_in_the_way_is_the_threshold_of_duchi() -> None:
    """Found by bisection on the threshold."""
    delta = 6 * uniform((20, 11), 0) - 3
    ball = Ball.of(torch.zeros(20, 11, dtype=torch.float64), 2.0, "l1", -100.0, 100.0)
    low, high = torch.zeros(20, 1, dtype=torch.float64), delta.abs().amax(1, keepdim=True)
    for _ in range(80):
        mid = (low + high) / 2
        above = (delta.abs() - mid).clamp(min=0).sum(1, keepdim=True) > 2
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    torch.testing.assert_close(ball.project(delta), delta.sign() * (delta.abs() - low).clamp(min=0), rtol=0, atol=1e-12)


def test_l2_without_a_range_in_the_way_scales_the_perturbation() -> None:
    delta = 6 * uniform((20, 11), 0) - 3
    ball = Ball.of(torch.zeros(20, 11, dtype=torch.float64), 2.0, "l2", -100.0, 100.0)
    scaled = delta * (2 / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(ball.project(delta), scaled, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_whole_radius_is_used_where_the_range_leaves_room(norm: Norm) -> None:
    x = torch.zeros(5, 8, dtype=torch.float64)
    x[:, 4:] = 0.5  # the first half of the coordinates cannot fall
    p = Ball.of(x, 0.3, norm).project(x - 10 * uniform((5, 8), 3) - 1)
    assert bool((p[:, :4] == 0).all())
    torch.testing.assert_close(norms(p - x, norm), torch.full((5,), 0.3, dtype=torch.float64), rtol=1e-12, atol=0)


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "order"), [("linf", np.inf), ("l2", 2), ("l1", 1)])
def test_norms_and_duals_are_those_of_numpy(norm: Norm, order: float) -> None:
    delta = uniform((5, 2, 3), 0).float() - 0.5
    expected = [np.linalg.norm(d.double().numpy().ravel(), order) for d in delta]
    np.testing.assert_allclose(norms(delta, norm).numpy(), expected, rtol=1e-14)
    assert norms(delta, norm).dtype == torch.float64
    # Hoelder's inequality is tight at the steepest direction: max <w, u> over ||u||_p <= 1 is ||w||_q.
    w = delta.double().flatten(1)
    steepest = {
        "linf": w.sign(),
        "l2": w / w.norm(dim=1, keepdim=True),
        "l1": w.sign() * (w.abs() == w.abs().amax(1, True)),
    }
    torch.testing.assert_close((w * steepest[norm]).sum(1), norms(w, dual(norm)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_neighbour_towards_x_is_the_next_number(dtype: torch.dtype) -> None:
    numbers = torch.tensor([1.0, -1.0, 0.0, 0.0, -0.0, 0.5, 6e-8, -6e-8, 2.0, 1.0], dtype=dtype)
    x = torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, 2.0, -1.0, -1.0, 9.0, 1.0], dtype=dtype)
    assert torch.equal(_inward(numbers, x), torch.nextafter(numbers, x))


# ---- one radius for each, ranges, complaints ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_every_example_may_have_its_own_radius_and_every_pixel_its_own_range(norm: Norm) -> None:
    x, eps = uniform((4, 3, 5, 2), 0), torch.tensor([1e-3, 0.1, 1.0, math.inf])
    low, high = torch.tensor([-0.1, -1.0, 0.0])[:, None, None], torch.tensor([1.0, 1.5, 2.0])[:, None, None]
    ball = Ball.of(x, eps, norm, low, high)
    p = ball.project(x + 50 * (uniform((4, 3, 5, 2), 1) - 0.5))
    assert bool(ball.contains(p).all())
    for i, e in enumerate(eps.tolist()):
        alone = Ball.of(x[i : i + 1], e, norm, low, high)
        assert torch.equal(alone.project(x[i : i + 1] + 50 * (uniform((4, 3, 5, 2), 1) - 0.5)[i : i + 1]), p[i : i + 1])


def test_random_points_fill_the_ball() -> None:
    x = torch.full((4000, 2), 0.5, dtype=torch.float64)
    linf = Ball.of(x, 0.25, "linf").random(generator("fill", 0)) - x
    assert float(linf.mean().abs()) < 0.01  # uniform on [-eps, eps]: mean 0, variance eps^2 / 3
    torch.testing.assert_close(linf.var(), torch.tensor(0.25**2 / 3, dtype=torch.float64), rtol=0.05, atol=0)
    radius = norms(Ball.of(x, 0.25, "l2").random(generator("fill", 1)) - x, "l2")
    torch.testing.assert_close(radius.mean(), torch.tensor(0.125, dtype=torch.float64), rtol=0.05, atol=0)


def test_what_makes_no_ball_is_said() -> None:
    x = uniform((4, 3), 0)
    with pytest.raises(UnknownNameError, match="linf"):
        Ball.of(x, 0.1, "Linf")  # type: ignore[arg-type]
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="positive"):
            Ball.of(x, eps, "linf")
    with pytest.raises(InputError, match="4 inputs"):
        Ball.of(x, torch.ones(3), "linf")
    with pytest.raises(InputError, match="low < high"):
        Ball.of(x, 0.1, "linf", 1.0, 1.0)
    with pytest.raises(InputError, match="outside the stated range"):
        Ball.of(x, 0.1, "linf", 0.5, 1.0)
    for low in (torch.zeros(2), torch.zeros(4, 3), torch.zeros(2, 1, 3)):
        with pytest.raises(InputError, match="fit inputs"):
            Ball.of(x, 0.1, "linf", low)
