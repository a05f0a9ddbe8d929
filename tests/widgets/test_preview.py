"""What stands on the screen before PyTorch is imported."""

from __future__ import annotations

import numpy as np
import pytest

import qlab

pytest.importorskip("anywidget")

from qlab.widgets.preview import digits_at_once, examples


def test_the_digits_at_once_are_scikit_learns_first_of_each_class() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = [int(np.flatnonzero(digits.target == c)[0]) for c in range(10)]
    shown = np.frombuffer(digits_at_once()["pixels"], np.uint8).reshape(10, 64)
    np.testing.assert_array_equal(shown, digits.data[first] * 15)


def test_an_image_set_shows_one_picture_per_class() -> None:
    data = qlab.data.load("digits")
    preview = examples(data, "digits")
    split = data.split("train")
    pictures = np.frombuffer(preview["pixels"], np.uint8).reshape(10, *preview["shape"])
    for picture, label in zip(pictures, preview["labels"], strict=True):
        of_class = split.x[split.y == label].numpy()
        assert (of_class == picture).all(axis=(1, 2, 3)).any()
    counts = np.bincount(split.y.numpy())
    assert preview["chance"] == counts.max() / counts.sum()


def test_a_planar_set_shows_its_points() -> None:
    data = qlab.data.load("two_moons")
    preview = examples(data, "two_moons")
    points = np.frombuffer(preview["points"], "<f4").reshape(-1, 2)
    np.testing.assert_array_equal(points, data.split("train").x[: len(points)].numpy())
    assert len(points) == len(preview["labels"])
    assert preview["pixels"] is None
