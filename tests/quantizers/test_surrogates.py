"""Surrogate derivatives of sign, against formulas written independently in float64.

The references are scalar functions of `math`, written from the papers (Liu et al. 2018; Darabi et al. 2018; Hubara et al.
2016), not from the implementation.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import SURROGATES, Sign, Surrogate, surrogate


def swish(x, b=5.0):
    """BNN+: b (2 - b x tanh(b x / 2)) / (1 + cosh(b x))."""
    y = b * x
    return b * (2 - y * math.tanh(y / 2)) / (1 + math.cosh(y)) if abs(y) < 700 else 0.0


REFERENCES = {
    ("identity", None): lambda x: 1.0,
    ("clipped", None): lambda x: 1.0 if -1 <= x <= 1 else 0.0,
    ("polynomial", None): lambda x: 2 - 2 * abs(x) if abs(x) < 1 else 0.0,
    ("tanh", None): lambda x: 1 / math.cosh(x) ** 2 if abs(x) < 300 else 0.0,
    ("tanh", 3.0): lambda x: 3 / math.cosh(3 * x) ** 2 if abs(x) < 100 else 0.0,
    ("swish", None): swish,
    ("swish", 2.0): lambda x: swish(x, 2.0),
    ("erf", None): lambda x: 2 / math.sqrt(math.pi) * math.exp(-x * x),
    ("erf", 2.5): lambda x: 5 / math.sqrt(math.pi) * math.exp(-((2.5 * x) ** 2)),
}
CASES = list(REFERENCES)
JUMP = [case for case in CASES if case[0] != "identity"]


def evaluate(rule, x: float) -> float:
    return rule(torch.tensor([x], dtype=torch.float64)).item()


def test_every_surrogate_has_a_reference():
    assert {name for name, _ in CASES} == set(SURROGATES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivative_is_the_papers_formula(case):
    x = np.concatenate([np.linspace(-4, 4, 1001), [-1.0, -0.0, 0.0, 1.0, -60.0, 60.0]])
    d = surrogate(*case).derivative(torch.from_numpy(x)).numpy()
    expected = np.array([REFERENCES[case](float(v)) for v in x])
    np.testing.assert_allclose(d, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", JUMP, ids=str)
def test_derivative_integrates_to_the_jump_of_sign(case):
    d = surrogate(*case).derivative
    value, error = quad(lambda x: evaluate(d, x), -30, 30, points=[-1, 0, 1], epsabs=1e-10, limit=400)
    assert error < 1e-7
    assert value == pytest.approx(2, abs=1e-7)


def test_identity_does_not_integrate():
    """It needs the clamp of BinaryConnect: over [-a, a] the integral is 2a."""
    d = surrogate("identity").derivative
    assert quad(lambda x: evaluate(d, x), -7, 7)[0] == pytest.approx(14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_primitive_is_the_integral_of_the_derivative_from_zero(case):
    primitive = surrogate(*case).primitive
    assert evaluate(primitive, 0.0) == 0
    for x in (-3.0, -1.0, -0.4, 0.2, 0.9, 1.7):
        breaks = [b for b in (-1.0, 1.0) if min(0, x) < b < max(0, x)] or None
        value, _ = quad(REFERENCES[case], 0, x, points=breaks, epsabs=1e-12)
        assert evaluate(primitive, x) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("case", JUMP, ids=str)
def test_primitive_runs_from_minus_one_to_one(case):
    primitive = surrogate(*case).primitive
    assert evaluate(primitive, 30.0) == pytest.approx(1, abs=1e-12)
    assert evaluate(primitive, -30.0) == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "sharpness", "area"),
    [
        ("clipped", None, 1.0),
        ("polynomial", None, 2 / 3),
        # tanh(k x): 2 int_0^1 (1 - tanh k x) dx = 2 - 2 ln(cosh k) / k
        ("tanh", 2.0, 2 - 2 * math.log(math.cosh(2)) / 2),
    ],
)
def test_area_between_the_primitive_and_sign(name, sharpness, area):
    primitive = surrogate(name, sharpness).primitive
    value, _ = quad(lambda x: abs(evaluate(primitive, x) - (1 if x >= 0 else -1)), -1, 1, points=[0])
    assert value == pytest.approx(area, abs=1e-9)


@given(st.floats(-40, 40, allow_nan=False), st.sampled_from([0.5, 1.0, 5.0]))
@settings(deadline=None)
def test_swish_is_negative_exactly_beyond_its_root(x, b):
    root = brentq(lambda y: 2 - y * math.tanh(y / 2), 2, 3)
    assert root == pytest.approx(2.3994, abs=5e-5)
    d = evaluate(surrogate("swish", b).derivative, x)
    if abs(abs(b * x) - root) > 1e-9:
        assert (d < 0) == (abs(b * x) > root)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivative_is_even(case):
    d = surrogate(*case).derivative
    x = torch.linspace(0, 5, 501, dtype=torch.float64)
    torch.testing.assert_close(d(x), d(-x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivative_is_finite_for_every_finite_number(case, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, -50.0, 0.0, 50.0, 1e4, largest]).to(dtype)
    d = surrogate(*case).derivative(x)
    assert d.dtype == dtype
    assert d.isfinite().all()


@pytest.mark.parametrize("case", [c for c in JUMP if c[1] is not None], ids=str)
def test_sharpness_rescales_the_derivative(case):
    """d_k(x) = k d_1(k x): the same area on a narrower window."""
    name, k = case
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    narrow, wide = surrogate(name, k).derivative, surrogate(name, 1.0).derivative
    torch.testing.assert_close(narrow(x), k * wide(k * x), rtol=1e-12, atol=1e-14)


def test_unknown_name_names_the_closest():
    with pytest.raises(UnknownNameError, match="Did you mean 'polynomial'"):
        surrogate("polinomial")


@pytest.mark.parametrize("sharpness", [0, -1.0, math.inf, math.nan])
def test_sharpness_must_be_a_positive_number(sharpness):
    with pytest.raises(InputError, match="positive"):
        surrogate("tanh", sharpness)


@pytest.mark.parametrize("name", ["identity", "clipped", "polynomial"])
def test_sharpness_for_a_surrogate_that_has_none_is_an_error(name):
    with pytest.raises(InputError, match="no sharpness"):
        surrogate(name, 2.0)


@pytest.mark.parametrize("function", [torch.sum, lambda x: x.float(), lambda x: 1.0, lambda x: x[0]])
def test_own_function_must_keep_shape_and_dtype(function):
    with pytest.raises(InputError, match="same shape and dtype"):
        Sign(function)


def test_own_surrogate_object_is_used_as_it_is():
    own = Surrogate("triangle", lambda x: (1 - x.abs()).clamp(min=0))
    assert Sign(own).surrogate is own
