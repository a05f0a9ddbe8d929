"""Small valid files of every format, as the published ones are laid out."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def idx_bytes(values: np.ndarray) -> bytes:
    """Return the IDX file of a uint8 array."""
    return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def packed(content: bytes) -> bytes:
    """Return content gzip-compressed, the same bytes at every call."""
    return gzip.compress(content, mtime=0)


def mnist_arrays(train: int = 30, test: int = 20) -> dict[str, np.ndarray]:
    """Return the arrays of the four IDX files, by the names of the files."""
    draws = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": draws.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(train) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": draws.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(test) % 10).astype(np.uint8),
    }


def write_mnist(folder: Path, arrays: dict[str, np.ndarray], compress: bool = True) -> None:
    """Write the four IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        content = idx_bytes(values)
        if compress:
            (folder / f"{name}.gz").write_bytes(packed(content))
        else:
            (folder / name).write_bytes(content)


def tar_bytes(members: dict[str, bytes]) -> bytes:
    """Return a tar archive of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_records(pixels: np.ndarray, *labels: np.ndarray) -> bytes:
    """Return records of label bytes and pixels (N, 3, 32, 32)."""
    return np.concatenate(
        [*(y[:, None].astype(np.uint8) for y in labels), pixels.reshape(len(pixels), -1)], 1
    ).tobytes()


def cifar10_members(per_file: int = 10) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """Return the members of a CIFAR-10 archive, and pixels and labels in the order of the files."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (6 * per_file, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6 * per_file) % 10
    members = {"cifar-10-batches-bin/readme.html": b"<html>"}
    for i, name in enumerate(names):
        part = slice(i * per_file, (i + 1) * per_file)
        members[f"cifar-10-batches-bin/{name}"] = cifar_records(pixels[part], labels[part])
    return members, pixels, labels


def picture(seed: int, width: int = 6, height: int = 5) -> np.ndarray:
    """Return random pixels (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_pictures(folder: Path, classes: tuple[str, ...], count: int, seed: int = 0, **size: int) -> None:
    """Write `count` PNG files into a folder for each class; PNG, because it loses nothing."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = picture(seed + 1000 * label + i, **size)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
