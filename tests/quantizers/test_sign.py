"""The sign quantizer: its forward map, and the gradient that autograd gives through it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.quantizers import SURROGATES, Sign


def bump(x):
    """A user's own derivative."""
    return 1 / (1 + x.square())


KINDS = [*SURROGATES, pytest.param(bump, id="own function")]


def draw(*shape, dtype=torch.float64, seed=0):
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("which", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sign_of_zero_is_plus_one(which, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    x = torch.tensor([0.0, -0.0, smallest, -smallest, 3.0, -3.0], dtype=dtype)
    out = Sign(which)(x)
    assert out.dtype == dtype
    assert out.tolist() == [1, 1, 1, -1, 1, -1]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@settings(deadline=None)
def test_output_lies_on_the_levels_and_equals_hard(values):
    quantizer, x = Sign(), torch.tensor(values)
    out = quantizer(x)
    assert torch.isin(out, quantizer.levels()).all()
    assert torch.equal(out, quantizer.hard(x))
    assert torch.equal(out, torch.tensor([1.0 if v >= 0 else -1.0 for v in values]))


def test_levels_and_bits():
    assert Sign().levels().tolist() == [-1, 1]
    assert Sign().bits == 1


@pytest.mark.parametrize("which", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_declared_derivative_times_the_incoming_gradient_exactly(which, dtype):
    quantizer = Sign(which)
    x = draw(5, 7, dtype=dtype).requires_grad_()
    g = draw(5, 7, dtype=dtype, seed=1)
    (grad,) = torch.autograd.grad(quantizer(x), x, g)
    assert torch.equal(grad, g * quantizer.surrogate.derivative(x.detach()))
    assert grad.any()


@pytest.mark.parametrize("which", KINDS, ids=str)
def test_forward_does_not_depend_on_the_surrogate(which):
    x = draw(100)
    assert torch.equal(Sign(which)(x), Sign("identity")(x))


def test_sharpness_reaches_the_gradient():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    Sign("tanh", sharpness=4.0)(x).backward()
    assert x.grad.item() == 4


def test_clipped_gradient_passes_up_to_one_inclusive():
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    x = torch.tensor([1.0, -1.0, above, -above], requires_grad=True)
    Sign("clipped")(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


# d' written by hand; 0 almost everywhere for clipped
SECOND = {
    "clipped": torch.zeros_like,
    "polynomial": lambda x: torch.where(x.abs() < 1, -2 * torch.sign(x), 0.0),
    "tanh": lambda x: -2 * torch.sinh(x) / torch.cosh(x) ** 3,
    "erf": lambda x: -4 * x / torch.pi**0.5 * torch.exp(-(x**2)),
    bump: lambda x: -2 * x / (1 + x**2) ** 2,
    "swish": lambda x: (swish(x + 1e-6) - swish(x - 1e-6)) / 2e-6,
    "identity": torch.zeros_like,
}


def swish(x):
    return 5 * (2 - 5 * x * torch.tanh(2.5 * x)) / (1 + torch.cosh(5 * x))


@pytest.mark.parametrize("which", KINDS, ids=str)
def test_double_backward_differentiates_the_declared_derivative(which):
    """L = sum c q^3 / 3:  dL/dx = c q^2 d,  and of that sum the gradient is 2 c q d^2 + c q^2 d'."""
    quantizer = Sign(which)
    x, c = draw(50).requires_grad_(), draw(50, seed=1)
    (first,) = torch.autograd.grad((c * quantizer(x) ** 3 / 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    d, at = quantizer.surrogate.derivative(x.detach()), x.detach()
    q = torch.where(at >= 0, 1.0, -1.0).double()
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if which == "swish" else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(first, c * d, rtol=1e-14, atol=0)
    torch.testing.assert_close(second, 2 * c * q * d**2 + c * SECOND[which](at), **tolerance)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
def test_any_shape_is_kept(shape):
    assert Sign()(torch.zeros(shape)).shape == shape


def test_non_contiguous_latents_give_the_same():
    x = draw(6, 4)
    assert torch.equal(Sign()(x.t()), Sign()(x.t().contiguous()))


def test_latents_are_not_changed():
    x = draw(10)
    before = x.clone()
    Sign()(x)
    assert torch.equal(x, before)


def test_anneal_passes_over_quantities_that_sign_has_no_use_for():
    quantizer = Sign()
    quantizer.anneal(beta=3.0)
    assert torch.equal(quantizer(draw(10)), Sign()(draw(10)))


def test_nan_is_not_hidden_behind_a_sign() -> None:
    x = torch.tensor([float("nan"), -2.0, 0.0])
    assert Sign()(x)[0].isnan()
    assert Sign()(x)[1:].tolist() == [-1, 1]
