"""Your own pictures: a tree of class folders.

    root/cat/1.jpg, root/cat/more/2.png, root/dog/...          a fifth is set aside for testing, the same for every seed
    root/train/cat/..., root/test/cat/..., root/val/...        parts of their own; test and val are optional

Every folder is a class, every picture below it a sample, hidden files and other files are passed over. Pictures are decoded
once, into a cache (see `qlab.data.image_cache`) that later runs map into memory: the set may be larger than memory.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from qlab.data.base import DataModule, whole_number
from qlab.data.image_cache import Picture, build_cache, fingerprint, open_cache
from qlab.data.sources import cache_folder
from qlab.data.splits import Source, Split
from qlab.errors import DataFileError, DataNotFoundError, InputError

__all__ = ["ImageFolder"]

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


class ImageFolder(DataModule):
    """Pictures in class folders; inputs (C, H, W) uint8.

    Args:
        root: the tree (see the module's docstring); must be given.
        size: side of the square that pictures are scaled to cover, pixels; what reaches beyond it is cut off on both sides.
            None takes them as they are; they must then be of one size.
        colour: three channels, else one (grey).
        batch_size: see `DataModule`, as are the others.

    Raises:
        DataNotFoundError: root is no folder.
        DataFileError: root holds no class folders, a class no pictures, or a picture is broken; names the file.
    """

    name = "image_folder"
    takes_root = True
    default_augment = True
    mirrors = True

    def __init__(
        self,
        root: str | None = None,
        size: int | None = None,
        colour: bool = True,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        cutout: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, augment, subset, root, cutout)
        if self.root is None:
            raise InputError(
                "data set 'image_folder' needs root=..., a folder that holds one folder of pictures per class."
            )
        self.size = None if size is None else whole_number("size", size, 1)
        if not isinstance(colour, bool):
            raise InputError(f"colour must be True or False, got {colour!r}.")
        self.colour = colour
        self.hparams.update({"size": self.size, "colour": colour})

    def fetch(self) -> None:
        """Decode the pictures into the cache."""
        self._pixels([picture for _, pictures in self._scan()[1].values() for picture in pictures])

    def read(self) -> Source:
        """Map the cache into memory, after decoding what has changed."""
        class_names, parts = self._scan()
        pixels = self._pixels([picture for _, pictures in parts.values() for picture in pictures])
        splits: dict[str, Split] = {}
        start = 0
        for part, (labels, _) in parts.items():
            splits[part] = Split(pixels[start : start + len(labels)], torch.tensor(labels))
            start += len(labels)
        return Source(splits["train"], class_names, splits.get("test"), splits.get("val"))

    def _scan(self) -> tuple[tuple[str, ...], dict[str, tuple[list[int], list[Picture]]]]:
        """Return the class names, and labels and pictures of every part, in an order that depends on names alone."""
        assert self.root is not None
        root = Path(self.root)
        if not root.is_dir():
            raise DataNotFoundError(f"data set 'image_folder': root={self.root!r} is no folder here ({Path.cwd()}).")
        # "train" alone could be a class of vehicles: parts are meant only if it holds folders itself.
        if (root / "train").is_dir() and _folders(root / "train"):
            places = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
        else:
            places = {"train": root}
        classes = _folders(places["train"])
        if len(classes) < 2:
            raise DataFileError(
                f"{places['train']} holds {len(classes)} class folders, at least 2 are needed: one folder per class, or "
                "train/ and test/ with one folder per class."
            )
        parts = {part: _pictures(place, classes) for part, place in places.items()}
        return tuple(classes), parts

    def _pixels(self, pictures: list[Picture]) -> Tensor:
        assert self.root is not None
        options = f"{os.path.realpath(self.root)}\0{self.size}\0{self.colour}"
        key = hashlib.sha256(options.encode(errors="surrogateescape")).hexdigest()[:16]
        path = cache_folder() / "image_folder" / f"{Path(self.root).name or 'root'}-{key}.u8"
        expected = fingerprint(pictures, self.size, self.colour)
        pixels = open_cache(path, expected, len(pictures))
        if pixels is None:
            build_cache(path, pictures, self.size, self.colour)
            pixels = open_cache(path, expected, len(pictures))
        if pixels is None:
            raise DataFileError(f"pictures below {self.root} were changed while they were read: try again.")
        return pixels


def _folders(place: Path) -> list[str]:
    with os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(place: Path, classes: list[str]) -> tuple[list[int], list[Picture]]:
    unknown = sorted(set(_folders(place)) - set(classes))
    if unknown:
        raise DataFileError(
            f"{place / unknown[0]} is a class that the training part does not have: {', '.join(classes)}."
        )
    labels: list[int] = []
    pictures: list[Picture] = []
    for label, name in enumerate(classes):
        found = _walk(str(place / name)) if (place / name).is_dir() else []
        if not found:
            raise DataFileError(f"{place / name} holds no pictures ({', '.join(_ENDINGS)}).")
        labels += [label] * len(found)
        pictures += found
    return labels, pictures


def _walk(folder: str) -> list[Picture]:
    """Return the pictures below a folder, in the order of their names."""
    found: list[Picture] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(_ENDINGS) and entry.is_file():
                status = entry.stat()
                found.append(Picture(entry.path, status.st_size, status.st_mtime_ns))
            elif entry.is_dir(follow_symlinks=False):
                found += _walk(entry.path)
    return found
