"""CIFAR archives: read exactly, or refused with one clear error."""

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qlab.data
from qlab.data.cifar import CIFAR10, CIFAR100, read_archive
from qlab.errors import DataFileError
from tests.data.writers import cifar10_members, cifar_records, packed, tar_bytes

MEMBERS, PIXELS, LABELS = cifar10_members()
NAMES = CIFAR10.train_members | CIFAR10.test_members


def read(path, members=None, content=None, limit=200 << 20):
    path.write_bytes(packed(tar_bytes(MEMBERS if members is None else members)) if content is None else content)
    return read_archive(path, NAMES, 1, limit)


def test_a_valid_cifar10_archive_is_read_exactly(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed(tar_bytes(MEMBERS)))
    data = qlab.data.load("cifar10", root=str(tmp_path), val_fraction=0)
    assert data.input_shape == (3, 32, 32)
    np.testing.assert_array_equal(data.split("train").x.numpy(), PIXELS[:50])
    np.testing.assert_array_equal(data.split("train").y.numpy(), LABELS[:50])
    np.testing.assert_array_equal(data.split("test").x.numpy(), PIXELS[50:])
    np.testing.assert_array_equal(data.split("test").y.numpy(), LABELS[50:])


def test_the_order_of_members_does_not_matter(tmp_path):
    members = dict(reversed(MEMBERS.items()))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed(tar_bytes(members)))
    data = qlab.data.load("cifar10", root=str(tmp_path), val_fraction=0)
    np.testing.assert_array_equal(data.split("train").x.numpy(), PIXELS[:50])


def test_a_valid_cifar100_archive_gives_the_fine_labels(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (240, 3, 32, 32), dtype=np.uint8)
    fine, coarse = np.arange(240) % 100, np.full(240, 19)
    members = {
        "cifar-100-binary/train.bin": cifar_records(pixels[:200], coarse[:200], fine[:200]),
        "cifar-100-binary/test.bin": cifar_records(pixels[200:], coarse[200:], fine[200:]),
    }
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(packed(tar_bytes(members)))
    data = qlab.data.load("cifar100", root=str(tmp_path), val_fraction=0)
    np.testing.assert_array_equal(data.split("train").y.numpy(), fine[:200])
    np.testing.assert_array_equal(data.split("test").x.numpy(), pixels[200:])
    assert data.num_classes == 100


def test_class_names_are_all_different_and_in_alphabetical_order():
    assert list(CIFAR10.class_labels) == sorted(set(CIFAR10.class_labels))
    assert list(CIFAR100.class_labels) == sorted(set(CIFAR100.class_labels))
    assert len(CIFAR100.class_labels) == 100


def changed(name, content):
    return MEMBERS | {f"cifar-10-batches-bin/{name}": content}


WHOLE = MEMBERS["cifar-10-batches-bin/data_batch_2.bin"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            changed("data_batch_2.bin", WHOLE[:-1]),
            "data_batch_2.bin has 30729 bytes; expected 1 to 10000 records of 3073 bytes",
        ),
        (changed("data_batch_2.bin", b""), "data_batch_2.bin has 0 bytes"),
        (changed("data_batch_2.bin", bytes(3073 * 10_001)), "data_batch_2.bin has 30733073 bytes"),
        ({k: v for k, v in MEMBERS.items() if "test" not in k}, "lacks test_batch.bin"),
        ({}, "lacks data_batch_1.bin"),
    ],
)
def test_an_archive_with_wrong_members_raises_one_clear_error(tmp_path, members, message):
    with pytest.raises(DataFileError, match=message):
        read(tmp_path / "archive", members)


def test_a_label_out_of_range_is_refused(tmp_path):
    records = cifar_records(PIXELS[:10], np.full(10, 10))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed(tar_bytes(changed("data_batch_5.bin", records))))
    with pytest.raises(DataFileError, match="holds the label 10; labels are 0 to 9"):
        qlab.data.load("cifar10", root=str(tmp_path)).setup()


TAR = tar_bytes(MEMBERS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        packed(b"no tar"),
        packed(TAR)[:-9],
        packed(TAR)[: len(TAR) // 2],
        packed(TAR[:40_000]),
        packed(TAR)[:-5] + b"\0" + packed(TAR)[-4:],
    ],
)
def test_a_damaged_archive_raises_one_clear_error(tmp_path, content):
    with pytest.raises(DataFileError, match="archive"):
        read(tmp_path / "archive", content=content)


def test_links_in_an_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(WHOLE)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in NAMES:
            link = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(link)
    with pytest.raises(DataFileError, match=r"lacks data_batch_1\.bin"):
        read(tmp_path / "archive", content=packed(buffer.getvalue()))


def test_an_archive_that_unpacks_to_too_much_is_refused_on_the_way(tmp_path):
    members = {"filler": bytes(8 << 20)} | MEMBERS
    with pytest.raises(DataFileError, match="unpacks to more than 4 MiB"):
        read(tmp_path / "archive", members, limit=4 << 20)
    with pytest.raises(DataFileError, match="unpacks to more than 4 MiB"):
        read(tmp_path / "archive", MEMBERS | {"filler": bytes(8 << 20)}, limit=4 << 20)


def tar_header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [1 << 33, 1 << 50])
def test_a_member_that_lies_about_its_size_allocates_nothing(tmp_path, kind, size):
    path = tmp_path / "archive"
    path.write_bytes(packed(tar_header("data_batch_1.bin", size, kind) + bytes(2048)))
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match="archive"):
            read_archive(path, NAMES, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


ONE = tar_bytes({"one.bin": cifar_records(np.zeros((1, 3, 32, 32), np.uint8), np.array([7]))})[:5120]


@settings(deadline=None, max_examples=250, derandomize=True)
@given(
    at=st.integers(0, 511),
    change=st.binary(min_size=1, max_size=12),
    end=st.integers(0, 5120) | st.just(5120),
    zip_at=st.none() | st.integers(0, 60),
)
def test_mutated_archives_are_read_or_refused_without_a_large_allocation(tmp_path_factory, at, change, end, zip_at):
    path = tmp_path_factory.getbasetemp() / "mutated"
    content = (ONE[:at] + change + ONE[at + len(change) :])[:end]
    # A correct checksum of the header lets the mutation through to what lies behind it.
    if len(content) >= 512:
        block = content[:148] + b" " * 8 + content[156:512]
        content = content[:148] + b"%06o\0 " % sum(block) + content[156:]
    content = packed(content)
    if zip_at is not None:
        content = content[:zip_at] + change + content[zip_at + len(change) :]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        found = read_archive(path, {"one.bin": 10}, 1, limit=1 << 20)
    except DataFileError:
        found = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    assert found is None or found["one.bin"][0].shape[1:] == (3, 32, 32)
