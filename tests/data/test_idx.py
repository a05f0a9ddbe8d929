"""IDX files: read exactly, or refused with one clear error."""

import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab.data
from qlab.data.idx import read_idx
from qlab.errors import DataFileError
from tests.data.writers import idx_bytes, mnist_arrays, packed, write_mnist

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
VALID = idx_bytes(IMAGES)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def read(path, content, item_shape=(28, 28), most=60_000):
    path.write_bytes(content)
    return read_idx(path, item_shape, most)


@pytest.mark.parametrize("wrap", [bytes, packed])
def test_a_valid_file_is_read_exactly_and_may_be_written_to(tmp_path, wrap):
    images = read(tmp_path / "file", wrap(VALID))
    np.testing.assert_array_equal(images, IMAGES)
    assert images.dtype == np.uint8
    assert images.flags.writeable


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("compress", [True, False])
def test_the_four_files_become_train_and_test_part(tmp_path, name, compress):
    arrays = mnist_arrays()
    write_mnist(tmp_path, arrays, compress)
    data = qlab.data.load(name, root=str(tmp_path), val_fraction=0)
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == len(set(data.class_names)) == 10
    np.testing.assert_array_equal(data.split("train").x[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.split("train").y.numpy(), arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(data.split("test").x[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.split("test").y.numpy(), arrays["t10k-labels-idx1-ubyte"])


def header(magic=(0, 0, 8, 3), dimensions=(5, 28, 28)):
    return bytes(magic) + b"".join(n.to_bytes(4, "big") for n in dimensions)


BODY = VALID[16:]
BROKEN = {
    "empty": (b"", "starts with"),
    "truncated in the magic": (VALID[:3], "starts with"),
    "truncated in the header": (VALID[:10], "ends within its header"),
    "truncated in the body": (VALID[:-1], "only 3919 bytes follow"),
    "trailing byte": (VALID + b"\0", "more bytes follow"),
    "signed bytes": (header((0, 0, 9, 3)) + BODY, "starts with 00000903, not 00000803"),
    "labels instead of images": (idx_bytes(np.zeros(5, np.uint8)), "starts with 00000801"),
    "other picture size": (header(dimensions=(5, 14, 56)) + BODY, r"5 items of shape \(14, 56\)"),
    "more items than there are": (header(dimensions=(6, 28, 28)) + BODY, "promises 4704 bytes, but only 3920"),
    "fewer items than there are": (header(dimensions=(4, 28, 28)) + BODY, "more bytes follow"),
    "no items": (header(dimensions=(0, 28, 28)), "promises 0 items"),
    "four billion items": (header(dimensions=(2**32 - 1, 28, 28)) + BODY, "promises 4294967295 items"),
    "huge picture": (header(dimensions=(5, 2**31, 2**31)) + BODY, "items of shape"),
}


@pytest.mark.parametrize("wrap", [bytes, packed])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_raises_one_clear_error(tmp_path, case, wrap):
    content, message = BROKEN[case]
    path = tmp_path / "broken-file"
    with pytest.raises(DataFileError, match=message) as caught:
        read(path, wrap(content))
    assert "broken-file" in str(caught.value)


def flip_last_crc_byte(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "content",
    [
        packed(VALID)[:-1],
        packed(VALID)[:200],
        packed(VALID)[:5],
        packed(VALID) + b"garbage",
        flip_last_crc_byte(packed(VALID)),
        packed(VALID)[:60] + b"\xff\xff\xff\xff" + packed(VALID)[64:],
    ],
)
def test_a_damaged_gzip_stream_raises_one_clear_error(tmp_path, content):
    with pytest.raises(DataFileError, match="file"):
        read(tmp_path / "file", content)


def test_a_missing_file_or_a_folder_is_one_clear_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataFileError, match="cannot be read"):
            read_idx(path, (), 5)


def test_a_gzip_bomb_is_refused_without_unpacking_it(tmp_path):
    path = tmp_path / "bomb"
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        file.write(header(dimensions=(10, 28, 28)))
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match="more bytes follow"):
            read_idx(path, (28, 28), 60_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_that_lies_within_the_limit_allocates_no_more_than_the_file_holds(tmp_path):
    for wrap in (bytes, packed):
        path = tmp_path / "lie"
        path.write_bytes(wrap(header(dimensions=(60_000, 28, 28)) + BODY))
        tracemalloc.start()
        try:
            with pytest.raises(DataFileError, match="promises 47040000 bytes"):
                read_idx(path, (28, 28), 60_000)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train-labels-idx1-ubyte": np.arange(29, dtype=np.uint8) % 10}, "holds 30 images, but .* 29 labels"),
        ({"t10k-labels-idx1-ubyte": np.full(20, 10, np.uint8)}, "holds the label 10; labels are 0 to 9"),
        ({"t10k-images-idx3-ubyte": np.zeros((20, 28, 27), np.uint8)}, r"20 items of shape \(28, 27\)"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, change, message):
    write_mnist(tmp_path, mnist_arrays() | change)
    with pytest.raises(DataFileError, match=message):
        qlab.data.load("mnist", root=str(tmp_path)).setup()


# ---- fuzzing: whatever the bytes are, a valid array or a DataFileError comes out

SMALL = idx_bytes(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))


def mutations(content):
    """Strategies of files near a valid one: overwritten, cut, extended, spliced."""
    overwrite = st.tuples(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=4)).map(
        lambda change: content[: change[0]] + change[1] + content[change[0] + len(change[1]) :]
    )
    cut = st.integers(0, len(content)).map(lambda end: content[:end])
    splice = st.tuples(st.integers(0, len(content)), st.integers(0, len(content)), st.binary(max_size=6)).map(
        lambda change: content[: change[0]] + change[2] + content[change[1] :]
    )
    return st.one_of(overwrite, cut, splice, st.binary(max_size=60))


def outcome(path, content):
    """Read the file; return the array or None, after checking what was allocated."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        return read_idx(path, (2, 2), 1000)
    except DataFileError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@settings(deadline=None, max_examples=300, derandomize=True)
@given(content=mutations(SMALL))
def test_mutated_files_are_read_as_they_are_or_refused(tmp_path_factory, content):
    array = outcome(tmp_path_factory.getbasetemp() / "mutated", content)
    assert array is None or idx_bytes(array) == content


@settings(deadline=None, max_examples=300, derandomize=True)
@given(content=mutations(packed(SMALL)))
def test_mutated_gzip_files_are_read_as_they_are_or_refused(tmp_path_factory, content):
    array = outcome(tmp_path_factory.getbasetemp() / "mutated", content)
    assert array is None or array.shape[1:] == (2, 2)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(content=mutations(SMALL))
def test_valid_gzip_files_of_mutated_content_are_read_as_they_are_or_refused(tmp_path_factory, content):
    array = outcome(tmp_path_factory.getbasetemp() / "mutated", packed(content))
    assert array is None or idx_bytes(array) == content


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
@pytest.mark.skipif("QLAB_DATA" in os.environ, reason="QLAB_DATA may hold another Fashion-MNIST")
def test_the_real_fashion_mnist_has_its_published_size_and_mean():
    data = qlab.data.load("fashion_mnist", val_fraction=0)
    assert data.split("train").x.shape == (60_000, 1, 28, 28)
    assert data.split("test").x.shape == (10_000, 1, 28, 28)
    assert data.split("train").y.bincount().tolist() == [6000] * 10
    # 0.2860 and 0.3530 are the constants that tutorials normalise Fashion-MNIST with.
    assert float(data.mean) == pytest.approx(0.2860, abs=5e-5)
    assert float(data.std) == pytest.approx(0.3530, abs=5e-5)
