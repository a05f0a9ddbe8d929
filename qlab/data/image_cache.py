"""Pictures decoded once: a file of uint8 pixels that later runs map into memory.

Layout: the 8 bytes `QLABIMG1`, the header's length as a little-endian uint32, the header as JSON (fingerprint, shape), zeros up
to a multiple of 64 bytes, then the pixels (N, C, H, W) in C order. The fingerprint covers path, size and modification time of
every picture and the way it is decoded; a cache with another one, or of another length than its shape says, is made anew.
A cache is written under another name and renamed when it is complete, so no process ever sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from qlab.errors import DataFileError, InputError

__all__ = ["Picture", "build_cache", "decode", "fingerprint", "open_cache"]

_MAGIC = b"QLABIMG1"
_ALIGN = 64
_BLOCK = 1024  # pictures that are decoded before they are written: bounds the memory in use
_MOST_PIXELS = 1 << 26  # of one picture, before it is resized
_VERSION = 1  # of the layout and of `decode`


class Picture(NamedTuple):
    """A picture file: its path, and what tells whether it has changed."""

    path: str
    size: int
    mtime_ns: int


def fingerprint(pictures: Sequence[Picture], size: int | None, colour: bool) -> str:
    """Return the SHA-256 of everything that the cache depends on."""
    digest = hashlib.sha256(json.dumps([_VERSION, size, colour]).encode())
    for picture in pictures:
        # A path may hold any character but NUL, so NUL separates.
        digest.update(f"{picture.path}\0{picture.size}\0{picture.mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def decode(path: str, size: int | None, colour: bool) -> np.ndarray:
    """Decode a picture.

    Args:
        path: the file.
        size: scale to cover a square of this side, pixels, and cut out its centre; None leaves the picture as it is.
        colour: three channels, red, green, blue; else one, grey.

    Returns:
        uint8 (C, H, W).

    Raises:
        DataFileError: the file is no picture with 8 bits per channel, is broken, or is larger than 64 megapixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataFileError(f"{path} has {image.width} x {image.height} pixels; the most is {_MOST_PIXELS}.")
            if image.mode[0] in "IF":
                raise DataFileError(
                    f"{path} has more than 8 bits per channel ({image.mode}): convert it to 8 bits first."
                )
            if size is not None:
                image.draft("RGB" if colour else "L", (size, size))  # lets a JPEG be decoded at a smaller scale
            decoded = image.convert("RGBA") if image.mode == "P" else image
            decoded = decoded.convert("RGB" if colour else "L")
            if size is not None:
                decoded = ImageOps.fit(decoded, (size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(decoded)
    except DataFileError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise DataFileError(
            f"{path} is no intact picture: {error or type(error).__name__}. Remove or replace it."
        ) from error
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if colour else pixels[None]


def open_cache(path: Path, expected: str, count: int) -> Tensor | None:
    """Map the pixels of a cache into memory, or return None if it must be made anew.

    Args:
        path: the cache file.
        expected: fingerprint it must have.
        count: number of pictures it must hold.

    Returns:
        uint8 (N, C, H, W), read from the disk as it is used.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC) + 4)
            length = int.from_bytes(start[len(_MAGIC) :], "little")
            if not start.startswith(_MAGIC) or length > 4096:
                return None
            header = json.loads(file.read(length))
            shape = header["shape"]
            if header["fingerprint"] != expected or len(shape) != 4 or shape[0] != count:
                return None
            if not all(type(side) is int and 0 < side < 1 << 31 for side in shape):
                return None
            offset = _offset(length)
            total = offset + math.prod(shape)
            if os.fstat(file.fileno()).st_size != total:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)[offset:].view(shape)


def build_cache(path: Path, pictures: Sequence[Picture], size: int | None, colour: bool) -> None:
    """Decode all pictures, in as many threads as there are cores, and write the cache.

    Raises:
        DataFileError: a picture is broken, or has another size than the first one while `size` is None.
        InputError: the cache cannot be written.
    """
    first = decode(pictures[0].path, size, colour)
    header = json.dumps(
        {"fingerprint": fingerprint(pictures, size, colour), "shape": [len(pictures), *first.shape]}
    ).encode()

    def pixels(picture: Picture) -> np.ndarray:
        image = decode(picture.path, size, colour)
        if image.shape != first.shape:
            raise DataFileError(
                f"{picture.path} has {image.shape[2]} x {image.shape[1]} pixels, but {pictures[0].path} has {first.shape[2]} x "
                f"{first.shape[1]}: give size=... to bring all to one size."
            )
        return image

    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
            partial = Path(file.name)
            file.write(_MAGIC + len(header).to_bytes(4, "little") + header)
            file.write(bytes(_offset(len(header)) - file.tell()))
            with (
                ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
                tqdm(total=len(pictures), desc="decoding pictures", unit="", mininterval=0.5) as bar,
            ):
                for begin in range(0, len(pictures), _BLOCK):
                    for image in pool.map(pixels, pictures[begin : begin + _BLOCK]):
                        file.write(image.data)
                        bar.update()
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"the picture cache {path} cannot be written: {error}. Set QLAB_CACHE to a folder with "
            f"{len(pictures) * first.size / 1e9:.2f} GB of room."
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _offset(length: int) -> int:
    """First byte of the pixels after a header of this length."""
    return -(-(len(_MAGIC) + 4 + length) // _ALIGN) * _ALIGN
