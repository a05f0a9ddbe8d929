"""What every data module promises: parts, normalisation, calibration, errors."""

import numpy as np
import pytest
import torch

import qlab.data
from qlab.data import DATA, Augmentation, DataModule
from qlab.errors import InputError, UnknownNameError

OFFLINE = ["digits", "two_moons", "circles", "spirals"]


def images(n=60, classes=3, shape=(3, 6, 6), seed=0):
    draws = np.random.default_rng(seed)
    return draws.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % classes


def rows_of(part):
    """Samples as hashable bytes: the random images are all different."""
    return {x.numpy().tobytes() for x in part.x}


@pytest.mark.parametrize("name", OFFLINE)
def test_sets_without_files_have_their_known_shapes(name):
    data = qlab.data.load(name)
    image = DATA[name].kind == "image"
    assert data.input_shape == ((1, 8, 8) if image else (2,))
    assert data.num_classes == len(data.class_names) == (10 if image else 2)
    for part in ("train", "val", "test"):
        split = data.split(part)
        assert split.x.shape == (len(split), *data.input_shape)
        assert split.x.dtype == (torch.uint8 if image else torch.float32)
        assert split.y.dtype == torch.int64
        assert split.y.shape == (data.num_samples(part),)
        assert split.y.unique().numel() == data.num_classes
    assert sum(data.num_samples(part) for part in ("train", "val", "test")) == (1797 if image else 2000)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_few_samples_of_a_set_sorted_by_class_hold_every_class_in_proportion(part):
    y = np.repeat(np.arange(4), [400, 300, 200, 100])
    x = np.arange(1000, dtype=np.float32)[:, None] + np.zeros((1, 2), np.float32)
    data = DataModule.from_arrays(x, y, x_test=x, y_test=y, val_fraction=0)
    few = data.split(part, 100)
    assert few.y.bincount().tolist() == [40, 30, 20, 10]
    assert torch.equal(few.y, torch.as_tensor(y)[few.x[:, 0].long()])
    assert few.x[:, 0].unique().numel() == 100
    assert torch.equal(data.split(part, 10).x, few.x[:10])
    assert few.y[:10].bincount().tolist() == [4, 3, 2, 1]
    everything = data.split(part, 5000)
    assert sorted(everything.x[:, 0].tolist()) == x[:, 0].tolist()
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(InputError, match="samples must be a whole number"):
            data.split(part, wrong)


def test_digits_are_the_pixels_of_scikit_learn_on_another_scale():
    from sklearn.datasets import load_digits

    data = qlab.data.load("digits", val_fraction=0)
    x = torch.cat([data.split(p).x for p in ("train", "test")])
    y = torch.cat([data.split(p).y for p in ("train", "test")])
    assert x.unique().numel() == 17
    dots = torch.round(x.double() * 16 / 255).to(torch.uint8).flatten(1)
    ours = sorted((d.numpy().tobytes(), int(c)) for d, c in zip(dots, y, strict=True))
    dots, labels = load_digits(return_X_y=True)
    assert ours == sorted((d.astype(np.uint8).tobytes(), int(c)) for d, c in zip(dots, labels, strict=True))


def test_points_without_noise_lie_on_their_curves():
    moons = qlab.data.load("two_moons", noise=0.0).split("train")
    upper, lower = moons.x[moons.y == 0], moons.x[moons.y == 1]
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(len(upper)))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(len(lower)))
    circles = qlab.data.load("circles", noise=0.0).split("train")
    torch.testing.assert_close(circles.x.norm(dim=1), torch.where(circles.y == 0, 1.0, 0.5))
    spirals = qlab.data.load("spirals", noise=0.0).split("train")
    radius = spirals.x.norm(dim=1)
    angle = torch.atan2(spirals.x[:, 1], spirals.x[:, 0])
    turns = angle - 4 * torch.pi * radius - torch.pi * spirals.y
    torch.testing.assert_close(torch.cos(turns), torch.ones(len(turns)), atol=1e-4, rtol=0)


def test_noise_changes_points_as_much_as_it_says():
    clean = qlab.data.load("circles", noise=0.0, n=20_000)._source.train
    noisy = qlab.data.load("circles", noise=0.3, n=20_000)._source.train
    assert abs(float((noisy.x.norm(dim=1) ** 2 - clean.x.norm(dim=1) ** 2).mean()) - 2 * 0.3**2) < 0.02


def test_parts_are_disjoint_and_together_the_whole():
    x, y = images()
    data = DataModule.from_arrays(x, y, val_fraction=0.25, seed=4)
    parts = [rows_of(data.split(p)) for p in ("train", "val", "test")]
    assert [len(p) for p in parts] == [36, 12, 12]
    assert set.union(*parts) == {row.tobytes() for row in x}


def test_parts_keep_each_picture_with_its_label():
    x, y = images()
    label = {row.tobytes(): int(c) for row, c in zip(x, y, strict=True)}
    data = DataModule.from_arrays(x, y, seed=1)
    for part in ("train", "val", "test"):
        split = data.split(part)
        assert [label[row.numpy().tobytes()] for row in split.x] == split.y.tolist()


def test_the_test_part_is_the_same_for_every_seed_and_the_validation_part_is_not():
    sets = [qlab.data.load("digits", seed=seed) for seed in range(3)]
    tests = [data.split("test").x for data in sets]
    assert all(torch.equal(tests[0], other) for other in tests)
    assert len({data.split("val").x.numpy().tobytes() for data in sets}) == 3


def test_the_same_seed_gives_the_same_parts():
    first, second = (qlab.data.load("digits", seed=5, subset=100) for _ in range(2))
    for part in ("train", "val", "test"):
        assert torch.equal(first.split(part).x, second.split(part).x)
        assert torch.equal(first.split(part).y, second.split(part).y)


def test_subset_is_a_balanced_part_of_train_and_leaves_the_others_alone():
    whole, some = qlab.data.load("digits"), qlab.data.load("digits", subset=50)
    assert rows_of(some.split("train")) < rows_of(whole.split("train"))
    assert torch.equal(some.split("val").x, whole.split("val").x)
    assert torch.equal(some.split("test").x, whole.split("test").x)
    counts = torch.bincount(some.split("train").y)
    assert counts.sum() == 50
    assert (counts - 5).abs().max() <= 1


def test_val_fraction_zero_has_no_validation():
    data = qlab.data.load("digits", val_fraction=0)
    assert data.num_samples("val") == 0
    assert len(data.val_dataloader()) == len(list(data.val_dataloader())) == 0
    assert len(data.split("val")) == 0


@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_normalised_training_inputs_have_mean_zero_and_deviation_one(name):
    data = qlab.data.load(name)
    x = data.transform(data.split("train").x)
    assert x.dtype == torch.float32
    axes = [d for d in range(x.ndim) if d != 1]
    torch.testing.assert_close(x.mean(axes), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(axes, correction=0), torch.ones(x.shape[1]))


def test_statistics_come_from_the_training_part_alone():
    x = np.zeros((40, 1, 2, 2), np.uint8)
    x[::2] = 51
    x_test = np.full((20, 1, 2, 2), 255, np.uint8)
    data = DataModule.from_arrays(x, np.arange(40) % 2, x_test, np.arange(20) % 2)
    # 18 of each class train: half of the pixels are 51 / 255 = 0.2
    torch.testing.assert_close(data.mean, torch.tensor([0.1]))
    torch.testing.assert_close(data.std, torch.tensor([0.1]))
    torch.testing.assert_close(data.transform(torch.from_numpy(x_test[:1])), torch.full((1, 1, 2, 2), 9.0))


def test_transform_of_floats_on_the_unit_scale_equals_that_of_bytes_and_is_differentiable():
    data = qlab.data.load("digits")
    x = data.split("val").x[:4]
    floats = (x.double() / 255).requires_grad_()
    out = data.transform(floats)
    torch.testing.assert_close(out.detach().float(), data.transform(x))
    out.sum().backward()
    torch.testing.assert_close(floats.grad, torch.full_like(floats, 1 / float(data.std[0])))


def test_transform_refuses_another_shape_and_leaves_its_input_alone():
    data = qlab.data.load("digits")
    with pytest.raises(InputError, match=r"has inputs \(N, 1, 8, 8\), got \(2, 1, 28, 28\)"):
        data.transform(torch.zeros(2, 1, 28, 28))
    x = data.split("val").x
    before = x.clone()
    data.transform(x)
    assert torch.equal(x, before)


def test_calibration_is_a_fixed_sequence_of_plain_training_inputs():
    x, y = images()
    data = DataModule.from_arrays(x, y, batch_size=10)
    first, second = data.calibration(3), data.calibration(3)
    assert [tuple(b.shape) for b in first] == [(10, 3, 6, 6)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = {row.numpy().tobytes() for row in data.transform(data.split("train").x)}
    drawn = [row.numpy().tobytes() for batch in first for row in batch]
    assert len(set(drawn)) == 30
    assert set(drawn) <= plain
    assert sum(len(b) for b in data.calibration(1000)) == data.num_samples("train")
    with pytest.raises(InputError, match="batches"):
        data.calibration(0)


def test_calibration_inputs_are_augmented_like_those_of_training():
    # Bright pictures: the black edges of random crops move the mean, so statistics of plain pictures are not those of training.
    rng = np.random.default_rng(0)
    x, y = rng.integers(200, 256, (400, 1, 8, 8), dtype=np.uint8), rng.integers(0, 2, 400)
    data = DataModule.from_arrays(x, y, augment=True, batch_size=50)
    first, second = data.calibration(6), data.calibration(6)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = data.transform(data.split("train").x)
    trained = torch.cat([batch for batch, _ in data.train_dataloader()])
    spread = float(trained.mean((1, 2, 3)).std()) / 300**0.5
    assert abs(float(torch.cat(first).mean() - trained.mean())) < 4 * spread
    assert abs(float(plain.mean() - trained.mean())) > 20 * spread


def test_unknown_part_is_named():
    with pytest.raises(UnknownNameError, match=r"part 'vall'\. Did you mean 'val'"):
        qlab.data.load("digits").split("vall")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"augment": False}, None),
        ({"augment": True}, Augmentation(padding=1, mirror=False, cutout=0)),
        ({"augment": True, "cutout": 3}, Augmentation(padding=1, mirror=False, cutout=3)),
        ({"cutout": 3}, Augmentation(padding=0, mirror=False, cutout=3)),
    ],
)
def test_augment_option_decides_what_is_done_to_digits(options, expected):
    assert qlab.data.load("digits", **options).augmentation == expected


def test_usual_augmentation_of_photographs_is_crop_and_mirror(tmp_path):
    assert DATA.load("cifar10").default_augment
    x, y = images()
    assert DataModule.from_arrays(x, y).augmentation is None
    assert DataModule.from_arrays(x, y, augment=True).augmentation == Augmentation(padding=4, mirror=True)


def test_repr_reads_nothing():
    data = qlab.data.load("mnist", root="nowhere at all")
    assert "MNIST(batch_size=128" in repr(data)
    assert str(data) == repr(data)


# ---- arrays


def test_arrays_of_every_accepted_kind_arrive_unchanged():
    x, y = images(30, 3, (1, 4, 4))
    for given, expected in [
        (x, x),
        (x[:, 0], x),
        (torch.from_numpy(x), x),
        (x.astype(np.float64), x.astype(np.float32)),
        (x[:, 0, 0].tolist(), None),
        (x[:, 0, 0].astype(np.float16), x[:, 0, 0].astype(np.float32)),
    ]:
        if expected is None:
            with pytest.raises(InputError, match=r"torch\.int64"):
                DataModule.from_arrays(given, y, given, y, val_fraction=0)
            continue
        data = DataModule.from_arrays(given, y, given, y, val_fraction=0)
        np.testing.assert_array_equal(data.split("train").x.numpy(), expected)
        np.testing.assert_array_equal(data.split("test").y.numpy(), y)


def test_changing_the_callers_array_later_changes_nothing():
    x, y = images()
    data = DataModule.from_arrays(x, y, x, y)
    before = data.split("test").x.clone()
    x[:] = 0
    assert torch.equal(data.split("test").x, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_with_its_count_and_first_place(value):
    x = np.zeros((20, 3), np.float32)
    x[4, 2] = x[7, 0] = value
    with pytest.raises(InputError, match=r"2 of 60 input values are NaN or infinite, the first at index \(4, 2\)"):
        DataModule.from_arrays(x, np.arange(20) % 2)


def test_nan_in_the_test_part_is_refused_too():
    x = np.zeros((20, 3), np.float32)
    bad = np.full((4, 3), np.nan, np.float32)
    with pytest.raises(InputError, match=r"arrays \(test\): 12 of 12"):
        DataModule.from_arrays(x, np.arange(20) % 2, bad, np.arange(4) % 2)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((0, 3), np.float32), np.zeros(0, int), "empty"),
        (np.zeros((4, 0), np.float32), np.arange(4) % 2, "empty"),
        (np.zeros((4, 3), np.float32), np.arange(5) % 2, "4 inputs need 4 int64 labels"),
        (np.zeros((4, 3), np.float32), np.array([0, 1, -1, 0]), "labels must be 0 to 1, found -1 to 1"),
        (np.zeros((4, 3), np.float32), np.array([0, 1, 3, 0]), "no sample of class 2"),
        (np.zeros((4, 3), np.float32), np.array([0.0, 1.0, 0.0, 1.0]), "whole numbers"),
        (np.zeros((4, 3), np.float32), np.array([[0, 1, 0, 1]]), r"\(1, 4\)"),
        (np.zeros((4, 3), np.float32), np.array(["a", "b", "a", "b"]), "no array of numbers"),
        (np.zeros(4, np.float32), np.arange(4) % 2, r"got \(4,\)"),
        (np.zeros((4, 5, 5), np.float32), np.arange(4) % 2, r"got \(4, 5, 5\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, "channels last"),
        (np.zeros((4, 3), np.int32), np.arange(4) % 2, "torch.int32"),
        (np.zeros((2, 3), np.float32), np.arange(2), "left with 0 training samples for 2 classes"),
    ],
)
def test_arrays_that_make_no_set_are_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        DataModule.from_arrays(x, y).setup()


def test_a_test_part_of_another_shape_or_without_labels_is_refused():
    x, y = images()
    with pytest.raises(InputError, match="go together"):
        DataModule.from_arrays(x, y, x)
    with pytest.raises(InputError, match=r"inputs are \(3, 5, 6\), those to train on \(3, 6, 6\)"):
        DataModule.from_arrays(x, y, x[:, :, 1:], y)


def test_a_subset_that_is_too_large_or_smaller_than_the_classes_is_refused():
    with pytest.raises(InputError, match="subset=5000 of 'digits', which has 1294 training samples"):
        qlab.data.load("digits", subset=5000).setup()
    with pytest.raises(InputError, match="left with 9 training samples for 10 classes"):
        qlab.data.load("digits", subset=9).setup()
