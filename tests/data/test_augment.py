"""Augmentation against a reference that handles one pixel of one picture at a time."""

import numpy as np
import pytest
import torch

from qlab.data.augment import Augmentation, crop, cutout, mirror
from qlab.data.seeding import generator

SHAPES = [(1, 1, 5, 7), (6, 3, 8, 8), (4, 2, 1, 3)]


def pictures(shape, dtype=torch.uint8):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_takes_the_window_that_the_reference_takes(shape, padding, dtype):
    x = pictures(shape, dtype)
    n, channels, height, width = shape
    draws = torch.Generator().manual_seed(1)
    top, left = torch.randint(2 * padding + 1, (2, n), generator=draws)
    expected = np.zeros(shape)
    for s in range(n):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    row, column = int(top[s]) + i - padding, int(left[s]) + j - padding
                    if 0 <= row < height and 0 <= column < width:
                        expected[s, c, i, j] = x[s, c, row, column]
    out = crop(x, top, left, padding)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_mirror_reverses_the_rows_of_chosen_pictures_only(shape):
    x = pictures(shape)
    coins = torch.arange(shape[0]) % 2 == 0
    out = mirror(x, coins)
    for s in range(shape[0]):
        expected = x[s].numpy()[:, :, ::-1] if coins[s] else x[s].numpy()
        np.testing.assert_array_equal(out[s].numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_erases_the_square_that_the_reference_erases(shape, size):
    x = pictures(shape, torch.float32)
    n, _, height, width = shape
    draws = torch.Generator().manual_seed(2)
    row, column = torch.randint(height, (n,), generator=draws), torch.randint(width, (n,), generator=draws)
    expected = x.numpy().copy()
    for s in range(n):
        for i in range(int(row[s]) - size // 2, int(row[s]) - size // 2 + size):
            for j in range(int(column[s]) - size // 2, int(column[s]) - size // 2 + size):
                if 0 <= i < height and 0 <= j < width:
                    expected[s, :, i, j] = 0
    out = cutout(x, row, column, size)
    np.testing.assert_array_equal(out.numpy(), expected)
    assert (out == 0).any(dim=(1, 2, 3)).all(), "the centre of the square lies in the picture"


def test_moves_reach_every_offset_and_mirror_half_of_the_pictures():
    # One bright pixel in the middle shows where a picture was moved to, a bright left half whether it was mirrored.
    dot = torch.zeros(4000, 1, 7, 7, dtype=torch.uint8)
    dot[:, :, 3, 3] = 255
    moved = Augmentation(padding=2, mirror=False).move(dot, generator("test", 0))
    places = moved[:, 0].nonzero()[:, 1:] - 3
    counts = torch.bincount((places[:, 0] + 2) * 5 + places[:, 1] + 2, minlength=25)
    assert counts.shape == (25,)
    # 25 equally likely places, 160 expected in each: 5 standard deviations are 62.
    assert (counts - 160).abs().max() < 62

    half = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    half[..., 0] = 1
    mirrored = Augmentation(padding=0, mirror=True).move(half, generator("test", 1))[:, 0, 0, 1].sum()
    assert abs(int(mirrored) - 2000) < 158  # 5 standard deviations


def test_the_same_generator_state_gives_the_same_pictures():
    x = pictures((6, 3, 8, 8))
    augment = Augmentation(padding=4, mirror=True, cutout=3)
    first = augment.move(x, generator("test", 3))
    assert torch.equal(first, augment.move(x, generator("test", 3)))
    assert not torch.equal(first, augment.move(x, generator("test", 4)))


def test_augmentation_leaves_the_input_and_the_global_generator_alone():
    x = pictures((6, 3, 8, 8))
    before, state = x.clone(), torch.get_rng_state()
    augment = Augmentation(padding=4, mirror=True, cutout=3)
    augment.erase(augment.move(x, generator("test", 3)).float(), generator("test", 3))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_of_different_purpose_or_length_of_key_differ():
    draws = {
        tuple(torch.randint(1 << 40, (2,), generator=generator(purpose, *key)).tolist())
        for purpose in ("order", "augment")
        for key in ((1, 2), (1, 2, 0), (2, 1), (1, 2, 0, 0), (0,), ())
    }
    assert len(draws) == 12
