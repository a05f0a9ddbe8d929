"""A drawn surrogate: the primitive is the exact integral, and the class to take home is the one that was drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.quantizers import Sign, quantize, surrogate
from qlab.quantizers.drawn import KNOTS, Drawn, area, code, drawn, redrawn, sampled

VALUES = (0.0, 0.3, 1.0, 1.2, 2.0, 0.7, 1.0, -0.4, 0.0)


def grid() -> Tensor:
    return torch.linspace(-3, 3, 601, dtype=torch.float64)


def test_the_derivative_goes_through_the_points_straight_from_one_to_the_next() -> None:
    d = drawn(KNOTS, VALUES).derivative
    knots = torch.tensor(KNOTS, dtype=torch.float64)
    torch.testing.assert_close(d(knots), torch.tensor(VALUES, dtype=torch.float64))
    middles = (knots[1:] + knots[:-1]) / 2
    expected = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(VALUES)], dtype=torch.float64)
    torch.testing.assert_close(d(middles), expected)
    assert d(torch.tensor([-2.1, 2.1])).tolist() == [0, 0]


@given(st.lists(st.floats(-3, 3), min_size=9, max_size=9), st.floats(-3, 3))
@settings(deadline=None, max_examples=40)
def test_the_primitive_is_the_integral(values: list[float], x: float) -> None:
    s = drawn(KNOTS, values)
    assert s.primitive is not None
    at = lambda t: float(s.derivative(torch.tensor(t, dtype=torch.float64)))  # noqa: E731
    expected = quad(at, 0, x, points=[k for k in KNOTS if min(0, x) < k < max(0, x)] or None, limit=200)[0]
    assert float(s.primitive(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, abs=1e-9)


def test_the_derivative_of_the_primitive_is_the_derivative() -> None:
    s = drawn(KNOTS, VALUES)
    x = (grid() + 0.003).requires_grad_()
    assert s.primitive is not None
    (g,) = torch.autograd.grad(s.primitive(x).sum(), x)
    torch.testing.assert_close(g, s.derivative(x.detach()))
    assert float(s.primitive(torch.zeros((), dtype=torch.float64))) == 0


def test_the_area_is_the_height_of_the_primitive() -> None:
    s = drawn(KNOTS, VALUES)
    assert s.primitive is not None
    ends = s.primitive(torch.tensor([-5.0, 5.0], dtype=torch.float64))
    assert area(KNOTS, VALUES) == pytest.approx(float(ends[1] - ends[0]))
    assert area((-1, 0, 1), (0, 2, 0)) == 2


def test_the_areas_between_sign_and_the_functions_of_its_surrogates() -> None:
    """int_{-1}^{1} |sign(x) - F(x)| dx: 1 for the clip, 2/3 for the polynomial."""
    for which, expected in (("clipped", 1), ("polynomial", 2 / 3), (drawn((-1, 0, 1), (0, 2, 0)), 2 / 3)):
        q = Sign(which)
        F = q.primitive()
        assert F is not None

        def apart(t: float, q: Sign = q, F=F) -> float:
            x = torch.tensor(t, dtype=torch.float64)
            return float((q(x) - F(x)).abs())

        assert quad(apart, -1, 1, points=[0])[0] == pytest.approx(expected, abs=1e-9)


def test_the_polynomial_surrogate_can_be_drawn_exactly() -> None:
    values = sampled("polynomial")
    s, expected = drawn(KNOTS, values), surrogate("polynomial")
    assert s.primitive is not None
    assert expected.primitive is not None
    torch.testing.assert_close(s.derivative(grid()), expected.derivative(grid()))
    torch.testing.assert_close(s.primitive(grid()), expected.primitive(grid()))


def test_a_drawn_sign_is_a_sign_with_that_backward_rule_under_every_transform() -> None:
    q = Drawn(KNOTS, VALUES)
    x = grid()
    assert torch.equal(q(x), Sign()(x))
    latent = x.clone().requires_grad_()
    q(latent).sum().backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, drawn(KNOTS, VALUES).derivative(x))
    stack = torch.func.vmap(torch.func.grad(lambda w: q(w).sum()))(x.reshape(-1, 1))
    torch.testing.assert_close(stack[:, 0], latent.grad)


def test_the_code_to_take_home_is_the_same_quantizer() -> None:
    text = code(KNOTS, VALUES, "Own")
    names: dict[str, type[Sign]] = {}
    exec(compile(text, "own.py", "exec"), names)
    own = names["Own"]()
    torch.testing.assert_close(own.surrogate.derivative(grid()), drawn(KNOTS, VALUES).derivative(grid()))
    compile(code(KNOTS, VALUES), "own.py", "exec")
    for name in ("x = 1; y", "class"):
        with pytest.raises(InputError, match="name of a class"):
            code(KNOTS, VALUES, name)
    knots, values = (-1.0, 0.123456789, 1.0, 1.000002), (0.0, 1 / 3, 2.0, 0.0)  # more digits than six
    exec(compile(code(knots, values, "Fine"), "own.py", "exec"), names)
    at = torch.tensor([*knots, 0.5], dtype=torch.float64)
    torch.testing.assert_close(names["Fine"]().surrogate.derivative(at), drawn(knots, values).derivative(at))


def test_another_surrogate_changes_the_gradient_and_not_the_answer() -> None:
    net = quantize(qlab.build("mlp", (4,), 3, seed=0), Sign, Sign).eval()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    other = redrawn(net, drawn(KNOTS, VALUES))
    assert torch.equal(net(x), other(x))
    grads = []
    for each in (net, other):
        loss = each(x).square().mean()
        grads.append(torch.autograd.grad(loss, next(p for n, p in each.named_parameters() if "original" in n))[0])
    assert not torch.equal(*grads)
    with pytest.raises(InputError, match="no Sign"):
        redrawn(torch.nn.Linear(2, 2), drawn(KNOTS, VALUES))


@pytest.mark.parametrize(
    ("knots", "values", "message"),
    [
        ((0, 1), (1,), "2 knots and 1 values"),
        ((0,), (1,), "expected equally many, from 2"),
        ((0, 0), (1, 1), "must ascend"),
        ((1, 0), (1, 1), "must ascend"),
        ((0, 1), (1, float("nan")), "finite"),
        ((0, 1), (1, "a"), "must be numbers"),
        ((0, 1), None, "must be numbers"),
    ],
)
def test_what_is_no_drawing_is_said(knots, values, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drawn(knots, values)
