"""MNIST, Fashion-MNIST and Kuzushiji-MNIST, from their IDX files (gzip or not).

IDX: the bytes 0, 0, 8 (unsigned byte), number of dimensions; each dimension as a big-endian uint32; then the values, last
dimension fastest. Files are untrusted: sizes are compared with the file before anything is allocated, and decompression
stops as soon as there is more than the header promised.

The SHA-256 sums are those of the published files, as recorded by TensorFlow Datasets and others. The Debian package holds the
same bytes compressed anew, so its .gz files have other sums.

References: LeCun, Cortes, Burges, The MNIST database; Xiao, Rasul, Vollgraf 2017 (arXiv:1708.07747); Clanuwat et al. 2018
(arXiv:1812.01718).
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch

from qlab.data.base import DataModule
from qlab.data.sources import RemoteFile, find
from qlab.data.splits import Source, Split
from qlab.errors import DataFileError

__all__ = ["KMNIST", "MNIST", "FashionMNIST", "IDXData", "read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 16  # bytes read at once; memory grows with what a file holds, not with what it promises
_MOST = {"train": 60_000, "test": 10_000}


def read_idx(path: Path, item_shape: tuple[int, ...], most: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file, gzip-compressed or not.
        item_shape: shape that every item must have, () for labels.
        most: largest number of items that the header may promise.

    Returns:
        uint8 array (N, *item_shape), 1 <= N <= most, writable.

    Raises:
        DataFileError: for anything but one complete, well-formed file.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not packed:
                return _parse(path, raw, item_shape, most)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _parse(path, unpacked, item_shape, most)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataFileError(f"{path} cannot be read: {error}. Fetch the file anew.") from error


def _parse(path: Path, stream: BinaryIO | gzip.GzipFile, item_shape: tuple[int, ...], most: int) -> np.ndarray:
    dimensions = 1 + len(item_shape)
    header = stream.read(4 + 4 * dimensions)
    magic = bytes((0, 0, 8, dimensions))
    if header[:4] != magic:
        raise DataFileError(
            f"{path} is no IDX file of {dimensions}-dimensional unsigned bytes: it starts with {header[:4].hex()}, "
            f"not {magic.hex()}."
        )
    if len(header) < 4 + 4 * dimensions:
        raise DataFileError(f"{path} is truncated: it ends within its header, after {len(header)} bytes.")
    n, *item = (int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
    if tuple(item) != item_shape or not 1 <= n <= most:
        raise DataFileError(
            f"{path}: the header promises {n} items of shape {tuple(item)}; expected 1 to {most} of shape {item_shape}."
        )
    promised = n * math.prod(item_shape)
    body = bytearray()
    while len(body) <= promised and (piece := stream.read(min(_PIECE, promised + 1 - len(body)))):
        body += piece
    if len(body) != promised:
        found = f"only {len(body)} bytes follow" if len(body) < promised else "more bytes follow"
        raise DataFileError(f"{path}: the header promises {promised} bytes, but {found}. Fetch the file anew.")
    return np.frombuffer(body, np.uint8).reshape(n, *item_shape)


class IDXData(DataModule):
    """Grey pictures of 28 x 28 pixels in 10 classes, from four IDX files."""

    takes_root = True
    class_labels: ClassVar[tuple[str, ...]]
    files: ClassVar[dict[str, RemoteFile]]
    folders: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[Path, ...]] = ()
    advice: ClassVar[str] = ""

    def _paths(self) -> dict[str, Path]:
        return {
            key: find(self.name, file, self.root, self.folders, self.packages, self.advice)
            for key, file in self.files.items()
        }

    def fetch(self) -> None:
        """Download what is not on this machine."""
        self._paths()

    def read(self) -> Source:
        """Read the four files."""
        paths = self._paths()
        return Source(self._split(paths, "train"), self.class_labels, self._split(paths, "test"))

    def _split(self, paths: dict[str, Path], part: str) -> Split:
        images = read_idx(paths[f"{part}-images"], (28, 28), _MOST[part])
        labels = read_idx(paths[f"{part}-labels"], (), _MOST[part])
        if len(images) != len(labels):
            raise DataFileError(
                f"{paths[f'{part}-images']} holds {len(images)} images, but {paths[f'{part}-labels']} {len(labels)} labels."
            )
        if labels.max() >= len(self.class_labels):
            raise DataFileError(
                f"{paths[f'{part}-labels']} holds the label {labels.max()}; labels are 0 to {len(self.class_labels) - 1}."
            )
        return Split(torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)))


def _files(addresses: tuple[str, ...], sums: tuple[str, str, str, str]) -> dict[str, RemoteFile]:
    names = {
        "train-images": "train-images-idx3-ubyte.gz",
        "train-labels": "train-labels-idx1-ubyte.gz",
        "test-images": "t10k-images-idx3-ubyte.gz",
        "test-labels": "t10k-labels-idx1-ubyte.gz",
    }
    return {
        key: RemoteFile(name, sha256, tuple(address + name for address in addresses))
        for (key, name), sha256 in zip(names.items(), sums, strict=True)
    }


class MNIST(IDXData):
    """MNIST: handwritten digits, 60,000 to train on and 10,000 to test."""

    name = "mnist"
    class_labels = tuple("0123456789")
    folders = ("mnist", "MNIST/raw", "MNIST")
    files = _files(
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )


class FashionMNIST(IDXData):
    """Fashion-MNIST: pictures of clothes, 60,000 to train on and 10,000 to test."""

    name = "fashion_mnist"
    mirrors = True
    class_labels = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    folders = ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
    packages = (Path("/usr/share/datasets/fashion-mnist"),)
    advice = "on Debian and Ubuntu: apt install dataset-fashion-mnist"
    files = _files(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    )


class KMNIST(IDXData):
    """Kuzushiji-MNIST: cursive Japanese characters, 60,000 to train on and 10,000 to test."""

    name = "kmnist"
    class_labels = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    folders = ("kmnist", "KMNIST/raw", "KMNIST")
    files = _files(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
    )
