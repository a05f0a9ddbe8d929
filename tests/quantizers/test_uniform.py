"""The uniform quantizer: its grid, its rounding, its straight-through gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import InputError
from qlab.quantizers import Uniform, quantize

limits = st.floats(1e-3, 1e3)
grids = st.tuples(st.integers(2, 8), st.booleans(), limits)
float32s = st.lists(st.floats(-2e3, 2e3, width=32), min_size=1, max_size=30)


def grid(quantizer: Uniform) -> torch.Tensor:
    return quantizer.levels(torch.float32)


@given(grids, float32s)
@settings(deadline=None)
def test_output_lies_exactly_on_the_levels(parameters, values):
    quantizer = Uniform(*parameters[:2], limit=parameters[2])
    out = quantizer(torch.tensor(values))
    assert torch.isin(out, grid(quantizer)).all()
    assert torch.equal(out, quantizer.hard(torch.tensor(values)))


@given(grids)
@settings(deadline=None)
def test_at_most_two_to_the_bits_levels_ascending_up_to_the_limit(parameters):
    bits, signed, limit = parameters
    levels = Uniform(bits, signed, limit).levels(torch.float64)
    assert len(levels) <= 2**bits
    assert (levels.diff() > 0).all()
    assert levels[-1].item() == pytest.approx(limit, rel=1e-12)
    assert (levels == 0).any()
    assert torch.equal(levels, -levels.flip(0)) if signed else levels[0] == 0
    np.testing.assert_allclose(levels.diff(), limit / (2 ** (bits - 1) - 1 if signed else 2**bits - 1), rtol=1e-9)


@given(grids, float32s)
@settings(deadline=None)
def test_idempotent(parameters, values):
    quantizer = Uniform(*parameters[:2], limit=parameters[2])
    once = quantizer(torch.tensor(values))
    assert torch.equal(quantizer(once), once)
    assert torch.equal(quantizer(grid(quantizer)), grid(quantizer))


@given(grids, float32s)
@settings(deadline=None)
def test_monotone(parameters, values):
    quantizer = Uniform(*parameters[:2], limit=parameters[2])
    assert (quantizer(torch.tensor(values).sort().values).diff() >= 0).all()


@given(grids, float32s)
@settings(deadline=None)
def test_no_level_is_nearer(parameters, values):
    """In float64, where the quotient's own rounding is far below the tolerance."""
    quantizer = Uniform(*parameters[:2], limit=parameters[2])
    x = torch.tensor(values, dtype=torch.float64)
    levels = quantizer.levels(torch.float64)
    best = (x[:, None] - levels).abs().min(dim=1).values
    torch.testing.assert_close((x - quantizer(x)).abs(), best, rtol=1e-9, atol=1e-9 * parameters[2])


@given(st.integers(2, 8), limits, float32s)
@settings(deadline=None)
def test_signed_grid_is_odd(bits, limit, values):
    quantizer, x = Uniform(bits, signed=True, limit=limit), torch.tensor(values)
    assert torch.equal(quantizer(-x), -quantizer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_gradient_is_straight_through_inside_the_range_and_zero_outside(signed, dtype):
    quantizer = Uniform(4, signed, limit=1.0)
    x = torch.tensor([-1.5, -1.001, -0.999, -0.3, 0.3, 0.999, 1.001, 1.5], dtype=dtype, requires_grad=True)
    g = torch.arange(1, 9, dtype=dtype)
    (grad,) = torch.autograd.grad(quantizer(x), x, g)
    inside = torch.tensor([0, 0, signed, signed, 1, 1, 0, 0], dtype=dtype)
    assert torch.equal(grad, g * inside)


@given(st.integers(2, 8), st.booleans(), st.floats(2**-10, 2**10, width=32))
@settings(deadline=None, max_examples=300)
def test_gradient_passes_at_the_ends_of_the_range(bits, signed, limit):
    """The largest weight sets the range of its tensor: it must not be frozen by a rounding error of the step."""
    x = torch.tensor([limit, -limit if signed else 0.0], requires_grad=True)
    Uniform(bits, signed, limit)(x).sum().backward()
    assert x.grad.tolist() == [1, 1]


def test_init_takes_the_range_from_the_tensor():
    x = torch.tensor([0.3, -1.7, 0.9])
    quantizer = Uniform(3)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(quantizer.init(x, generator), x)
    assert quantizer.levels(torch.float32)[-1].item() == pytest.approx(1.7, rel=1e-6)
    assert quantizer(x)[1] == quantizer.levels(torch.float32)[0]


def test_init_keeps_a_range_that_was_given():
    quantizer = Uniform(3, limit=0.5)
    quantizer.init(torch.tensor([3.0]), torch.Generator())
    assert quantizer(torch.tensor([3.0])).item() == pytest.approx(0.5)


def test_init_on_a_tensor_of_zeros_leaves_a_grid():
    quantizer = Uniform(3)
    quantizer.init(torch.zeros(4), torch.Generator())
    assert (quantizer.levels().diff() > 0).all()
    assert quantizer(torch.zeros(4)).tolist() == [0] * 4


def test_range_travels_with_the_state_dict():
    one, two = Uniform(4), Uniform(4)
    one.init(torch.tensor([2.5]), torch.Generator())
    two.load_state_dict(one.state_dict())
    x = torch.linspace(-3, 3, 100)
    assert torch.equal(one(x), two(x))


def test_matches_torchs_fake_quantize_away_from_ties():
    """torch.fake_quantize_per_tensor_affine is an implementation we did not write."""
    x = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    step = 2.0 / 127
    expected = torch.fake_quantize_per_tensor_affine(x, step, 0, -127, 127)
    torch.testing.assert_close(Uniform(8, limit=2.0)(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 1}, {"bits": 17}, {"bits": 2.5}, {"bits": "8"}, {"bits": 0, "signed": False}],
)
def test_bits_out_of_range_are_an_error(options):
    with pytest.raises(InputError, match="whole number from"):
        Uniform(**options)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_limit_must_be_a_positive_number(limit):
    with pytest.raises(InputError, match="limit must be a positive number"):
        Uniform(4, limit=limit)


def test_one_unsigned_bit_gives_zero_and_the_limit():
    quantizer = Uniform(1, signed=False, limit=2.0)
    assert quantizer.levels().tolist() == [0, 2]
    assert quantizer(torch.tensor([-1.0, 0.9, 1.1, 7.0])).tolist() == [0, 0, 2, 2]


@given(st.integers(2, 8), st.booleans(), limits)
@settings(deadline=None)
def test_gradient_passes_at_every_level(bits, signed, limit):
    quantizer = Uniform(bits, signed, limit)
    x = grid(quantizer).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.all()


def test_double_backward_of_a_straight_through_gradient():
    """L = sum c q^3 / 3:  dL/dx = c q^2 inside, and of that sum the gradient is 2 c q inside."""
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    quantizer = Uniform(4, limit=1.0)
    (first,) = torch.autograd.grad((c * quantizer(x) ** 3 / 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    q, inside = quantizer(x).detach(), (x.detach().abs() <= 1).double()
    torch.testing.assert_close(first, c * q**2 * inside)
    torch.testing.assert_close(second, 2 * c * q * inside)


def test_ties_round_to_even():
    quantizer = Uniform(4, limit=7.0)  # step 1
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantizer(x).tolist() == [-2, -2, 0, 0, 2, 2]


def test_activation_without_a_range_is_said() -> None:
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"give Uniform\(limit"):
        quantize(net, activations=lambda: Uniform(bits=4, signed=False))
