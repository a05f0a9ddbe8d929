"""Packing: the convention, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qlab.binary
from qlab.binary.bits import _torch_pack
from qlab.errors import InputError

FLOATS = st.floats(allow_nan=False, width=32)


def test_bit_i_of_word_j_is_element_64_j_plus_i_and_one_means_minus() -> None:
    for k in (1, 63, 64, 65, 130):
        for place in range(k):
            x = np.ones(k)
            x[place] = -1
            words = qlab.binary.pack(x)
            expected = [0] * -(-k // 64)
            expected[place // 64] = 1 << (place % 64)
            assert words.dtype == np.uint64
            assert words.tolist() == expected


def test_zero_negative_zero_and_infinities_have_their_signs() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
    assert qlab.binary.pack(x).tolist() == [0b101000]


def test_words_are_little_endian_on_disk() -> None:
    x = np.ones(64)
    x[0] = -1
    x[15] = -1
    assert qlab.binary.pack(x).astype("<u8").tobytes() == bytes([1, 128, 0, 0, 0, 0, 0, 0])


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=70), elements=FLOATS), st.data())
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_the_signs_back_along_any_axis_in_numpy_and_torch(x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    length = x.shape[axis]
    words = qlab.binary.pack(x, axis)
    tensor = qlab.binary.pack(torch.from_numpy(x), axis)
    assert np.array_equal(qlab.binary.unpack(words, length, axis), np.where(x < 0, -1, 1))
    assert np.array_equal(tensor.numpy().view(np.uint64), words)
    assert np.array_equal(qlab.binary.unpack(tensor, length, axis).numpy(), np.where(x < 0, -1, 1))
    assert torch.equal(_torch_pack(torch.from_numpy(x), axis % x.ndim), tensor)  # what a GPU tensor takes
    ones = qlab.binary.unpack(words, words.shape[axis] * 64, axis)
    assert (np.take(ones, range(length, ones.shape[axis]), axis) == 1).all()  # padding bits are 0


def test_packing_takes_any_memory_layout() -> None:
    x = torch.randn(6, 130, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(qlab.binary.pack(x.transpose(0, 1), 0), qlab.binary.pack(x.transpose(0, 1).contiguous(), 0))
    assert torch.equal(qlab.binary.pack(x[::2], 1), qlab.binary.pack(x[::2].contiguous(), 1))


def test_integers_and_booleans_pack() -> None:
    assert qlab.binary.pack(np.array([-3, 0, 5], np.int8)).tolist() == [1]
    assert qlab.binary.pack(torch.tensor([1, -1, -7])).tolist() == [6]
    assert qlab.binary.pack(np.array([True, False])).tolist() == [0]


@pytest.mark.parametrize("empty", [np.zeros((0, 5)), torch.zeros(0, 5)])
def test_empty_batches_pack_to_empty_words(empty: np.ndarray | torch.Tensor) -> None:
    assert tuple(qlab.binary.pack(empty).shape) == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qlab.binary.pack(np.array([1.0, np.nan])), "NaN"),
        (lambda: qlab.binary.pack(torch.tensor([float("nan")])), "NaN"),
        (lambda: qlab.binary.pack(np.array(1.0)), "dim is -1"),
        (lambda: qlab.binary.pack(np.ones(3), 1), "dim is 1"),
        (lambda: qlab.binary.pack([1.0, 2.0]), "not list"),
        (lambda: qlab.binary.pack(np.array([1j])), "complex"),
        (lambda: qlab.binary.unpack(np.zeros(2, np.uint64), 64), "take 1 words"),
        (lambda: qlab.binary.unpack(np.zeros(2, np.uint64), -1), "-1 signs"),
        (lambda: qlab.binary.unpack(np.zeros(2, np.int32), 100), "no packed words"),
        (lambda: qlab.binary.unpack(torch.zeros(2), 100), "no packed words"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
