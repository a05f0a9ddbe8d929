"""Folding batch norm and sign into a comparison of integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlab.binary.fold import fold_batch_norm, fold_sign
from qlab.binary.kernels import reference
from qlab.errors import InputError
from tests.binary.conftest import randomised


def as_folded(z: torch.Tensor, found: object) -> np.ndarray:
    flip = reference.pack(np.where(found.flip, -1, 1))  # type: ignore[attr-defined]
    words = reference.threshold_pack(z.int().numpy(), found.threshold, flip)  # type: ignore[attr-defined]
    return reference.unpack(words, z.shape[1])


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 64, 577]))
@settings(max_examples=25, deadline=None)
def test_threshold_equals_sign_of_torchs_batch_norm_at_every_integer(seed: int, k: int) -> None:
    norm = randomised(nn.BatchNorm1d(7), seed).eval()
    found = fold_sign(norm, k, 7, spatial=False)
    z = torch.arange(-k, k + 1).float()[:, None].expand(-1, 7).contiguous()
    expected = np.where(norm(z).detach().numpy() >= 0, 1, -1)
    assert found is not None
    assert np.array_equal(as_folded(z, found), expected)


def test_ties_negative_and_zero_scales() -> None:
    norm = nn.BatchNorm1d(5, eps=0.0).eval()
    norm.running_var.fill_(1.0)  # type: ignore[union-attr]
    norm.running_mean.copy_(torch.tensor([2.0, 2.0, 0.0, 0.0, 2.5]))  # type: ignore[union-attr, operator]
    norm.weight.data = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0])
    norm.bias.data = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0])
    found = fold_sign(norm, 4, 5, spatial=False)
    z = torch.arange(-4.0, 5.0)[:, None].expand(-1, 5).contiguous()
    expected = np.stack(
        [
            np.where(np.arange(-4, 5) >= 2, 1, -1),  # the tie at 2 counts as +1
            np.where(np.arange(-4, 5) <= 2, 1, -1),  # also where the scale is negative
            np.ones(9),
            -np.ones(9),
            np.where(np.arange(-4, 5) >= 3, 1, -1),
        ],
        1,
    )
    assert found is not None
    assert np.array_equal(as_folded(z, found), expected)
    assert found.ties == 2


def test_zero_scale_with_zero_bias_is_plus_one_everywhere() -> None:
    norm = nn.BatchNorm1d(2).eval()
    nn.init.zeros_(norm.weight)
    found = fold_sign(norm, 3, 2, spatial=False)
    assert found is not None
    assert np.array_equal(
        as_folded(torch.arange(-3.0, 4.0)[:, None].expand(-1, 2).contiguous(), found), np.ones((7, 2))
    )


def test_threshold_far_out_and_many_channels_go_through_in_chunks() -> None:
    norm = randomised(nn.BatchNorm1d(2000), 3).eval()
    found = fold_sign(norm, 600, 2000, spatial=False)  # 2.4 million values: three chunks
    z = torch.arange(-600.0, 601.0)[:, None].expand(-1, 2000).contiguous()
    assert found is not None
    assert np.array_equal(as_folded(z, found), np.where(norm(z).detach().numpy() >= 0, 1, -1))


def test_function_that_switches_twice_has_no_threshold() -> None:
    assert fold_sign(lambda z: z.abs() - 2, 5, 3, spatial=True) is None


def test_batch_norm_is_folded_to_the_bits_that_torch_gives() -> None:
    for seed in range(5):
        norm = randomised(nn.BatchNorm2d(33), seed).eval()
        found = fold_batch_norm(norm)
        assert found is not None
        z = torch.randint(-4608, 4609, (3, 33, 5, 7), generator=torch.Generator().manual_seed(seed)).float()
        expected = norm(z).detach().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(
            reference.affine(z.permute(0, 2, 3, 1).numpy(), found.alpha, found.beta, found.fused), expected
        )


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_floats_too(affine: bool) -> None:
    norm = randomised(nn.BatchNorm1d(9, affine=affine), 1).eval()
    found = fold_batch_norm(norm)
    x = torch.randn(500, 9, generator=torch.Generator().manual_seed(0))
    assert found is not None
    assert np.array_equal(reference.affine(x.numpy(), found.alpha, found.beta, found.fused), norm(x).detach().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoiled_statistics_are_refused(value: float) -> None:
    norm = nn.BatchNorm1d(3).eval()
    norm.running_mean[1] = value  # type: ignore[index]
    with pytest.raises(InputError, match="NaN"):
        fold_batch_norm(norm)
