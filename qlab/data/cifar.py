"""CIFAR-10 and CIFAR-100, from the archives of their "binary version" (no pickle is opened).

A record is one label byte (CIFAR-100: a coarse and a fine one; we use the fine), then 3072 pixels: red, green, blue, each
32 x 32 by rows. Records are read straight out of the .tar.gz. The archive is untrusted: only the members of known names are
read, their sizes are checked first, and decompression stops at a limit slightly above the size of the real archive.

The SHA-256 sums are those recorded by TensorFlow Datasets for the published archives.

Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from qlab.data.base import DataModule
from qlab.data.sources import RemoteFile, find
from qlab.data.splits import Source, Split
from qlab.errors import DataFileError

__all__ = ["CIFAR10", "CIFAR100", "CIFARData", "read_archive"]

_PIXELS = 3 * 32 * 32
_LIMIT = 200 << 20  # bytes; the real archives unpack to about 184 MB
_PIECE = 1 << 16
_FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


class _Bounded:
    """A stream of at most `limit` bytes. tarfile asks for 10 KiB at a time, whatever size a header promises."""

    def __init__(self, path: Path, stream: gzip.GzipFile, limit: int) -> None:
        self.path, self.stream, self.limit, self.count = path, stream, limit, 0

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        self.count += len(piece)
        if self.count > self.limit:
            raise DataFileError(
                f"{self.path} unpacks to more than {self.limit >> 20} MiB: it is not the published archive."
            )
        return piece


def read_archive(
    path: Path, members: dict[str, int], label_bytes: int, limit: int = _LIMIT
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the members of a CIFAR archive.

    Args:
        path: the .tar.gz.
        members: base name of each member to read and the largest number of records it may hold.
        label_bytes: label bytes per record; the last one is the label.
        limit: largest number of bytes to unpack.

    Returns:
        Of each member the pixels, uint8 (N, 3, 32, 32), and the labels, uint8 (N,).

    Raises:
        DataFileError: for anything but a complete archive with these members.
    """
    record = label_bytes + _PIXELS
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with (
            open(path, "rb") as raw,
            gzip.GzipFile(fileobj=raw) as unpacked,
            # "r|": a plain forward stream. Nothing is written to disk, so names and links in the archive can do no harm.
            tarfile.open(fileobj=_Bounded(path, unpacked, limit), mode="r|") as archive,  # type: ignore[call-overload]
        ):
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name not in members or name in found or not member.isreg():
                    continue
                if not 0 < member.size <= record * members[name] or member.size % record:
                    raise DataFileError(
                        f"{path}: {name} has {member.size} bytes; expected 1 to {members[name]} records of {record} bytes."
                    )
                found[name] = _records(path, archive, member, label_bytes)
            # The checksum stands at the end of the gzip stream: read on to have it compared.
            while unpacked.read(_PIECE):
                pass
    except DataFileError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError) as error:
        raise DataFileError(f"{path} is no intact .tar.gz archive: {error}. Fetch it anew.") from error
    missing = [name for name in members if name not in found]
    if missing:
        raise DataFileError(f"{path} lacks {', '.join(missing)}: it must be the archive of the binary version.")
    return found


def _records(
    path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular member
    body = bytearray()
    while piece := stream.read(_PIECE):
        body += piece
    if len(body) != member.size:
        raise DataFileError(f"{path}: {member.name} is truncated, {len(body)} of {member.size} bytes.")
    records = np.frombuffer(body, np.uint8).reshape(-1, label_bytes + _PIXELS)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].copy()


class CIFARData(DataModule):
    """Colour photographs of 32 x 32 pixels, 50,000 to train on and 10,000 to test."""

    takes_root = True
    default_augment = True
    mirrors = True
    class_labels: ClassVar[tuple[str, ...]]
    archive: ClassVar[RemoteFile]
    train_members: ClassVar[dict[str, int]]
    test_members: ClassVar[dict[str, int]]
    label_bytes: ClassVar[int]

    def _path(self) -> Path:
        advice = "take the archive of the binary version, not the Python version, whose pickles qlab never opens"
        return find(self.name, self.archive, self.root, (self.name, "."), advice=advice)

    def fetch(self) -> None:
        """Download the archive if it is not on this machine."""
        self._path()

    def read(self) -> Source:
        """Read the archive."""
        path = self._path()
        members = read_archive(path, self.train_members | self.test_members, self.label_bytes)
        return Source(
            self._split(path, members, self.train_members),
            self.class_labels,
            self._split(path, members, self.test_members),
        )

    def _split(self, path: Path, members: dict[str, tuple[np.ndarray, np.ndarray]], names: dict[str, int]) -> Split:
        x = np.concatenate([members[name][0] for name in names])
        y = np.concatenate([members[name][1] for name in names])
        if y.max() >= len(self.class_labels):
            raise DataFileError(f"{path} holds the label {y.max()}; labels are 0 to {len(self.class_labels) - 1}.")
        return Split(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))


class CIFAR10(CIFARData):
    """CIFAR-10: photographs in 10 classes."""

    name = "cifar10"
    class_labels = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    archive = RemoteFile(
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    )
    train_members = {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}
    test_members = {"test_batch.bin": 10_000}
    label_bytes = 1


class CIFAR100(CIFARData):
    """CIFAR-100: photographs in 100 classes (the fine labels)."""

    name = "cifar100"
    class_labels = tuple(_FINE_LABELS.split())
    archive = RemoteFile(
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    )
    train_members = {"train.bin": 50_000}
    test_members = {"test.bin": 10_000}
    label_bytes = 2
