"""Stratified orders and channel statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.data import splits
from qlab.data.splits import channel_statistics, stratified_order


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_every_beginning_of_a_stratified_order_holds_each_class_in_proportion(labels, seed):
    y = torch.tensor(labels)
    order = stratified_order(y, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    classes = y.unique()
    for end in range(1, len(labels) + 1):
        counts = np.array([int((y[order[:end]] == c).sum()) for c in classes])
        shares = np.array([int((y == c).sum()) for c in classes]) * end / len(labels)
        assert np.abs(counts - shares).max() <= len(classes)


def test_balanced_classes_appear_once_in_every_round():
    y = torch.arange(40) % 4
    order = stratified_order(y, torch.Generator().manual_seed(0))
    for start in range(0, 40, 4):
        assert y[order[start : start + 4]].unique().numel() == 4


def test_stratified_orders_differ_between_seeds():
    y = torch.arange(40) % 4
    orders = {tuple(stratified_order(y, torch.Generator().manual_seed(s)).tolist()) for s in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [((50, 3, 4, 5), torch.uint8, 255), ((50, 2, 3, 3), torch.float32, 1), ((50, 7), torch.float32, 1)],
)
def test_statistics_equal_those_of_the_whole_float_copy(monkeypatch, chunk, shape, dtype, scale):
    monkeypatch.setattr(splits, "_CHUNK", chunk)
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.arange(5, 50, 2)
    values = x.numpy()[rows.numpy()].astype(np.float64) / scale
    axes = tuple(d for d in range(values.ndim) if d != 1)
    mean, std = channel_statistics(x, rows)
    np.testing.assert_allclose(mean.numpy(), values.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std(axes), rtol=1e-6)


def test_statistics_far_from_zero_do_not_cancel():
    x = torch.tensor([[1e4], [1e4 + 0.125]])
    _, std = channel_statistics(x)
    np.testing.assert_allclose(std.numpy(), [0.0625], rtol=1e-6)


@pytest.mark.parametrize("x", [torch.full((9, 1), 0.1), torch.full((9, 1, 2, 2), 77, dtype=torch.uint8)])
def test_a_constant_channel_gets_deviation_one(x):
    assert channel_statistics(x)[1].tolist() == [1.0]
