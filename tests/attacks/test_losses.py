"""Losses of an attack: values against the formulas written out, facts of ties, shifts, scales and small dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.attacks.losses import (
    LOSSES,
    ce,
    dlr,
    fitting,
    margin,
    misclassified,
    nearest_classes,
    targeted_dlr,
    targeted_margin,
)
from qlab.data.seeding import generator
from qlab.errors import UnknownNameError


def logits(n: int = 200, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = generator("test_losses", seed, d)
    z = 5 * torch.randn(n, d, generator=draw, dtype=torch.float64)
    y = torch.randint(d, (n,), generator=draw)
    return z, y, (y + 1 + torch.randint(d - 1, (n,), generator=draw)) % d


def test_every_loss_is_its_formula_written_out() -> None:
    z, y, t = logits()
    for i in range(len(z)):
        a, own, target = z[i].numpy(), int(y[i]), int(t[i])
        top = np.sort(a)[::-1]
        other = max(v for k, v in enumerate(a) if k != own)
        one = slice(i, i + 1)
        np.testing.assert_allclose(ce(z[one], y[one]), np.log(np.exp(a).sum()) - a[own], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(margin(z[one], y[one]), other - a[own], rtol=1e-14)
        np.testing.assert_allclose(dlr(z[one], y[one]), -(a[own] - other) / (top[0] - top[2] + 1e-12), rtol=1e-14)
        np.testing.assert_allclose(targeted_margin(z[one], y[one], t[one]), a[target] - a[own], rtol=1e-14)
        np.testing.assert_allclose(
            targeted_dlr(z[one], y[one], t[one]),
            -(a[own] - a[target]) / (top[0] - (top[2] + top[3]) / 2 + 1e-12),
            rtol=1e-14,
        )


def test_dlr_is_invariant_to_shift_and_scale() -> None:
    z, y, t = logits()
    torch.testing.assert_close(dlr(7 * z + 3, y), dlr(z, y), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(targeted_dlr(7 * z + 3, y, t), targeted_dlr(z, y, t), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", [*LOSSES.values()])
def test_a_shift_of_the_logits_changes_no_loss_and_no_gradient(loss: object) -> None:
    z, y, _ = logits()
    got = []
    for shift in (0.0, 1000.0):
        a = (z + shift).requires_grad_()
        value = loss(a, y)  # type: ignore[operator]
        (g,) = torch.autograd.grad(value.sum(), a)
        got.append((value.detach(), g))
    torch.testing.assert_close(got[0], got[1], rtol=1e-9, atol=1e-9)


def test_dlr_lies_between_minus_one_and_zero_where_the_example_is_right_and_above_where_it_is_wrong() -> None:
    z, y, _ = logits(2000)
    wrong = misclassified(z, y)
    value = dlr(z, y)
    assert bool((value[~wrong] >= -1).all())
    assert bool((value[~wrong] <= 0).all())
    assert bool((value[wrong] > 0).all())


def test_dlr_of_a_label_that_ranks_third_is_one_and_has_no_gradient() -> None:
    z, _, _ = logits()
    y = z.argsort(1, descending=True)[:, 2]
    a = z.clone().requires_grad_()
    value = dlr(a, y)
    (g,) = torch.autograd.grad(value.sum(), a)
    torch.testing.assert_close(value.detach(), torch.ones(len(z), dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(g.abs().max()) < 1e-9  # 0 but for the 1e-12 in the denominator
    assert bool(misclassified(z, y).all())


def test_dlr_explodes_where_the_first_and_the_third_logit_tie() -> None:
    z, y = torch.tensor([[3.0, 3.0, 3.0, 1.0]], dtype=torch.float64), torch.tensor([3])
    assert float(dlr(z, y)) > 1e11


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_the_margin_knows_no_scale_that_the_cross_entropy_drowns_in(loss: str) -> None:
    """Logits times 100: cross-entropy has no gradient left in float32, the others have the one they had, up to its length."""
    z, y, _ = logits(50)
    y = z.argmax(1)
    z = z.float() + 3 * torch.nn.functional.one_hot(y, z.shape[1])
    directions = []
    for scale in (1.0, 100.0):
        a = (scale * z).requires_grad_()
        (g,) = torch.autograd.grad(LOSSES[loss](a, y).sum(), a)
        directions.append(g / g.norm(dim=1, keepdim=True))
    torch.testing.assert_close(directions[0], directions[1], rtol=1e-4, atol=1e-4)
    a = (100 * z).requires_grad_()
    (g,) = torch.autograd.grad(ce(a, y).sum(), a)
    assert float((g == 0).all(1).float().mean()) > 0.9


def test_cross_entropy_takes_the_row_maximum_off_first() -> None:
    """In float32, log-sum-exp of logits near 1e8 has a unit of 8; differences of logits that float32 can hold survive."""
    z = torch.tensor([[1e8, 1e8 + 8]])
    torch.testing.assert_close(ce(z, torch.tensor([0])), torch.log1p(torch.exp(torch.tensor([8.0]))))


@pytest.mark.parametrize(("delta", "zero"), [(16.0, False), (17.0, True)])
def test_where_float32_rounds_the_pull_of_the_label_away(delta: float, zero: bool) -> None:
    """d = 10, one rival: entry y of p - e_y is exactly 0 from a gap of 17 on."""
    z = torch.full((1, 10), -1000.0)
    z[0, 0], z[0, 1] = delta, 0.0
    z.requires_grad_()
    (g,) = torch.autograd.grad(ce(z, torch.tensor([0])).sum(), z)
    assert bool(g[0, 0] == 0) == zero
    assert float(g[0, 1]) > 0


@pytest.mark.parametrize(("delta", "zero"), [(103.0, False), (104.0, True)])
def test_where_float32_has_no_gradient_at_all(delta: float, zero: bool) -> None:
    z = torch.full((1, 10), -1000.0)
    z[0, 0], z[0, 1] = delta, 0.0
    z.requires_grad_()
    (g,) = torch.autograd.grad(ce(z, torch.tensor([0])).sum(), z)
    assert bool((g == 0).all()) == zero


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [*LOSSES])
def test_losses_of_half_floats_are_finite_and_have_finite_gradients(loss: str, dtype: torch.dtype) -> None:
    z = (
        torch.tensor([[3.0, 2.0, 1.0, 0.0], [5.0, 5.0, 5.0, 0.0], [60000.0, 0.0, -60000.0, 1.0]])
        .to(dtype)
        .requires_grad_()
    )
    value = LOSSES[loss](z, torch.tensor([0, 1, 0]))
    (g,) = torch.autograd.grad(value.sum(), z)
    assert bool(value.isfinite().all())
    assert bool(g.isfinite().all())


def test_equal_logits_are_decided_as_argmax_decides() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert misclassified(z, torch.tensor([0, 1, 1])).tolist() == [False, True, False]
    assert margin(z, torch.tensor([0, 1, 1])).tolist() == [0.0, 0.0, -1.0]


def test_the_nearest_classes_are_the_largest_logits_that_are_not_the_label() -> None:
    z, y, _ = logits(50, 6)
    for i in range(50):
        order = [k for k in np.argsort(-z[i].numpy()) if k != int(y[i])]
        assert nearest_classes(z, y, 3)[i].tolist() == order[:3]
        assert nearest_classes(z, y, 9)[i].tolist() == order


def test_a_loss_by_name_fits_the_number_of_classes() -> None:
    assert fitting("dlr", 2) is margin
    assert fitting("dlr", 3) is dlr
    assert fitting("ce", 2) is ce
    assert fitting(targeted_margin, 2) is targeted_margin  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="margin"):
        fitting("margn", 10)
