"""Image folders: layouts, decoding, the cache, and broken pictures."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import qlab.data
from qlab.data import image_cache
from qlab.data.image_cache import Picture, decode, fingerprint, open_cache
from qlab.errors import DataFileError, DataNotFoundError, InputError
from tests.data.writers import picture, write_pictures

CLASSES = ("bird", "cat", "dog")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "image_folder"


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "pictures", CLASSES, 10)
    return tmp_path / "pictures"


def load(root, **options):
    return qlab.data.load("image_folder", root=str(root), **options)


def as_rows(split):
    return {x.numpy().tobytes(): int(y) for x, y in zip(split.x, split.y, strict=True)}


def expected(count=10, seed=0):
    return {
        np.moveaxis(picture(seed + 1000 * label + i), -1, 0).tobytes(): label
        for label in range(len(CLASSES))
        for i in range(count)
    }


def test_class_folders_become_classes_and_a_fifth_is_the_test_part(root):
    data = load(root, val_fraction=0)
    assert data.class_names == CLASSES
    assert data.input_shape == (3, 5, 6)
    assert data.num_samples("test") == 6
    assert as_rows(data.split("train")) | as_rows(data.split("test")) == expected()
    assert torch.equal(load(root, seed=3).split("test").x, data.split("test").x)


def test_parts_of_their_own_are_kept(tmp_path):
    for part, (count, seed) in {"train": (8, 0), "val": (2, 100), "test": (4, 200)}.items():
        write_pictures(tmp_path / "tree" / part, CLASSES, count, seed)
    data = load(tmp_path / "tree")
    assert as_rows(data.split("train")) == expected(8, 0)
    assert as_rows(data.split("val")) == expected(2, 100)
    assert as_rows(data.split("test")) == expected(4, 200)
    batch, labels = next(iter(data.test_dataloader()))
    torch.testing.assert_close(batch, data.transform(data.split("test").x))
    assert torch.equal(labels, data.split("test").y)


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path / "vehicles", ("bus", "train"), 10)
    assert load(tmp_path / "vehicles").class_names == ("bus", "train")


def test_pictures_below_a_class_folder_count_and_other_files_do_not(root):
    (root / "cat" / "more").mkdir()
    shutil.move(root / "cat" / "000.png", root / "cat" / "more" / "cat.PNG")
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / "cat" / ".hidden.png").write_text("no picture")
    (root / ".git").mkdir()
    data = load(root, val_fraction=0)
    assert as_rows(data.split("train")) | as_rows(data.split("test")) == expected()


def test_size_scales_to_cover_a_square_and_cuts_its_centre(tmp_path):
    root = tmp_path / "tree"
    for name, level in {"dark": 10, "light": 200}.items():
        (root / name).mkdir(parents=True)
        for i in range(8):
            # A grey square in the middle of a wide picture with red wings: the wings must be cut off.
            pixels = np.full((20, 40, 3), (255, 0, 0), np.uint8)
            pixels[:, 10:30] = level
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    split = load(root, size=10, val_fraction=0).split("train")
    assert split.x.shape[1:] == (3, 10, 10)
    inner = split.x[..., 1:-1].double()
    assert (inner == torch.where(split.y == 0, 10.0, 200.0).view(-1, 1, 1, 1)).all()


def test_grey_pictures_have_one_channel_by_the_weights_of_rec_601(root):
    split = load(root, colour=False, val_fraction=0).split("train")
    assert split.x.shape[1:] == (1, 5, 6)
    colour = load(root, val_fraction=0).split("train").x.double()
    grey = 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    assert (split.x[:, 0] - grey).abs().max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("colour", [True, False])
def test_pictures_of_every_8_bit_mode_are_decoded(tmp_path, mode, colour):
    path = tmp_path / "picture.tif"
    Image.new("RGB", (6, 5), (90, 90, 90)).convert(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(str(path), None, colour)
    assert pixels.shape == (3 if colour else 1, 5, 6)
    assert pixels.dtype == np.uint8


def test_a_transparent_palette_is_decoded_without_a_warning(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture(0)).convert("P").save(path, transparency=bytes(range(256)))
    assert decode(str(path), None, True).shape == (3, 5, 6)


# ---- cache


def test_the_second_run_decodes_nothing(root, monkeypatch):
    first = load(root).split("train")

    def refuse(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "decode", refuse)
    second = load(root).split("train")
    assert torch.equal(first.x, second.x)


def test_a_changed_added_or_removed_picture_is_noticed(root):
    load(root).setup()
    path = root / "cat" / "003.png"
    before = path.stat()
    Image.fromarray(picture(77)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    new = np.moveaxis(picture(77), -1, 0).tobytes()
    assert new in as_rows(load(root, val_fraction=0)._source.train)
    path.unlink()
    assert len(load(root)._source.train) == 29
    Image.fromarray(picture(78)).save(path)
    assert len(load(root)._source.train) == 30


def test_options_of_decoding_have_caches_of_their_own(root, cache):
    for options in ({}, {"size": 4}, {"colour": False}, {}):
        load(root, **options).setup()
    assert len(list(cache.glob("*.u8"))) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"X" + content[1:],
        lambda content: content[:8] + b"\xff\xff\xff\xff" + content[12:],
        lambda content: content.replace(b"[30, 3, 5, 6]", b"[30, 3, 6, 5]").replace(b'"shape"', b'"shope"'),
        lambda content: content.replace(b"[30, 3, 5, 6]", b"[30, 3, 5, -]"),
        lambda content: content.replace(b"[30, 3, 5, 6]", b"[30, 3, 5, 9]"),
    ],
)
def test_a_damaged_cache_is_made_anew(root, cache, damage):
    load(root).setup()
    (path,) = cache.glob("*.u8")
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    assert as_rows(load(root)._source.train) == expected()
    assert path.read_bytes() == content


def test_a_failed_or_interrupted_run_leaves_no_cache_behind(root, cache, monkeypatch):
    (root / "dog" / "009.png").write_bytes(b"broken")
    with pytest.raises(DataFileError, match=r"009\.png"):
        load(root).setup()
    assert list(cache.iterdir()) == []

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache.os, "replace", interrupt)
    (root / "dog" / "009.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        load(root).setup()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_to_do(root, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Set QLAB_CACHE to a folder"):
        load(root).setup()


def test_writing_into_the_mapped_pixels_does_not_reach_the_cache(root, cache):
    data = load(root)
    data._source.train.x.zero_()
    assert as_rows(load(root)._source.train) == expected()


def test_fingerprints_tell_apart_whatever_matters():
    base = (Picture("a", 1, 2), Picture("b", 3, 4))
    variants = [
        (base, None, True),
        (base, 4, True),
        (base, None, False),
        (base[::-1], None, True),
        ((Picture("a", 1, 3), base[1]), None, True),
        ((Picture("a", 12, 2), base[1]), None, True),
        ((Picture("c", 1, 2), base[1]), None, True),
        (base[:1], None, True),
    ]
    assert len({fingerprint(*variant) for variant in variants}) == len(variants)


def test_a_missing_cache_is_no_error(tmp_path):
    assert open_cache(tmp_path / "nothing", "", 1) is None


# ---- what is refused


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(40)]
)
def test_a_broken_picture_is_named(root, content):
    (root / "cat" / "004.png").write_bytes(content)
    with pytest.raises(DataFileError, match=r"cat.004\.png is no intact picture"):
        load(root).setup()


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp", "ppm"])
def test_a_truncated_picture_is_named(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    Image.fromarray(picture(0, 64, 64)).save(path)
    content = path.read_bytes()
    decode(str(path), None, True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataFileError, match="picture"):
        decode(str(path), None, True)


def test_a_picture_of_gigapixels_is_refused_before_it_is_decoded(tmp_path):
    # A bitmap header that promises 30,000 x 30,000 pixels, and nothing behind it.
    path = tmp_path / "huge.bmp"
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    header += (30_000).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    path.write_bytes(header)
    with pytest.raises(DataFileError, match=r"huge\.bmp"):
        decode(str(path), None, True)
    path.write_bytes(header.replace((30_000).to_bytes(4, "little") * 2, (9_000).to_bytes(4, "little") * 2))
    with pytest.raises(DataFileError, match="9000 x 9000 pixels; the most is"):
        decode(str(path), None, True)


def test_16_bit_pictures_are_refused_rather_than_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(path)
    with pytest.raises(DataFileError, match="more than 8 bits per channel"):
        decode(str(path), None, False)


def test_pictures_of_different_sizes_need_the_option_size(root):
    Image.fromarray(picture(0, width=9)).save(root / "dog" / "005.png")
    with pytest.raises(DataFileError, match=r"005\.png has 9 x 5 pixels, but .*000\.png has 6 x 5: give size="):
        load(root).setup()
    assert load(root, size=4).input_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root / "cat") or (root / "cat").mkdir(), "cat holds no pictures"),
        (lambda root: [shutil.rmtree(root / name) for name in ("cat", "dog")], "holds 1 class folders, at least 2"),
        (lambda root: [shutil.rmtree(root / name) for name in CLASSES], "holds 0 class folders"),
    ],
)
def test_a_tree_without_classes_or_pictures_is_refused(root, spoil, message):
    spoil(root)
    with pytest.raises(DataFileError, match=message):
        load(root).setup()


def test_a_test_class_that_is_not_trained_is_refused(tmp_path):
    write_pictures(tmp_path / "tree" / "train", CLASSES, 3)
    write_pictures(tmp_path / "tree" / "test", (*CLASSES, "fish"), 3)
    with pytest.raises(DataFileError, match="fish is a class that the training part does not have"):
        load(tmp_path / "tree").setup()


def test_a_root_that_is_missing_or_not_given_is_refused(tmp_path):
    with pytest.raises(DataNotFoundError, match="is no folder"):
        load(tmp_path / "nothing").setup()
    with pytest.raises(InputError, match="needs root="):
        qlab.data.load("image_folder")
    with pytest.raises(InputError, match="size"):
        load(tmp_path, size=0)
    with pytest.raises(InputError, match="colour"):
        load(tmp_path, colour="yes")
