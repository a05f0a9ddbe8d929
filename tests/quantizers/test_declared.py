"""A declared value and slope through autograd and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from qlab.quantizers.declared import Declared

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def rule(x: Tensor) -> Tensor:
    y = x.detach()
    return Declared.apply(x, y.round(), 1 / (1 + y * y))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_is_exact_and_the_slope_multiplies_the_gradient() -> None:
    x, g = draw(9).requires_grad_(), draw(9, seed=1)
    y = rule(x)
    assert torch.equal(y.detach(), x.detach().round())
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(found, g * (1 / (1 + x.detach() ** 2)))


def test_a_scalar_slope_is_broadcast() -> None:
    x = draw(4, 3).requires_grad_()
    (found,) = torch.autograd.grad(Declared.apply(x, x.detach(), torch.tensor(2.0)).sum(), x)
    assert torch.equal(found, torch.full_like(x, 2.0))


def test_transforms_see_the_same_rule() -> None:
    x, c = draw(7), draw(7, seed=1)
    slope = 1 / (1 + x * x)
    assert torch.equal(jacrev(rule)(x), torch.diag(slope))
    assert torch.equal(jacfwd(rule)(x), torch.diag(slope))
    assert torch.equal(grad(lambda x: (c * rule(x)).sum())(x), c * slope)
    assert torch.equal(vjp(rule, x)[1](c)[0], c * slope)
    assert torch.equal(jvp(rule, (x,), (c,))[1], c * slope)
    rows = draw(4, 3)
    assert torch.equal(vmap(rule)(rows), rows.round())
    assert torch.equal(vmap(jacrev(rule))(rows), torch.diag_embed(1 / (1 + rows * rows)))
