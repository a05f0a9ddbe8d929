"""Where the files of a set are sought: `root`, `QLAB_DATA`, system packages, download (in this order; see `qlab.data`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch

from qlab.errors import DataNotFoundError

__all__ = ["RemoteFile", "cache_folder", "find"]

_TIMEOUT = 30  # seconds without an answer before the next address is tried


@dataclass(frozen=True)
class RemoteFile:
    """A published file.

    Args:
        name: file name as published; a file without its ending `.gz` is accepted where files are sought.
        sha256: of the published file.
        urls: addresses, tried in order.
    """

    name: str
    sha256: str
    urls: tuple[str, ...]


def cache_folder() -> Path:
    """Return the folder for downloads and decoded pictures: `QLAB_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("QLAB_CACHE") or pooch.os_cache("qlab"))


def find(
    dataset: str,
    file: RemoteFile,
    root: str | None,
    folders: Sequence[str],
    packages: Sequence[Path] = (),
    advice: str = "",
) -> Path:
    """Return the path of a file of a data set, downloading it if it is nowhere on this machine.

    Args:
        dataset: name of the set.
        file: the file that is needed.
        root: folder given by the user; nothing else is tried then.
        folders: folders below `root` or `QLAB_DATA` that are looked into, relative.
        packages: folders where system packages put the file.
        advice: what else the user can do if the file cannot be had.

    Raises:
        DataNotFoundError: names the file, every place where it was sought, and the ways to get it.
    """
    data = os.environ.get("QLAB_DATA")
    if root is not None:
        places = [Path(root), *(Path(root, folder) for folder in folders)]
    else:
        places = [Path(data, folder) for folder in folders] if data else []
        places += packages
    for place in places:
        for name in (file.name, file.name.removesuffix(".gz")):
            if (place / name).is_file():
                return place / name

    sought = [str(place) for place in places]
    if root is None:
        if not data:
            sought.insert(0, "$QLAB_DATA (not set)")
        for url in file.urls:
            try:
                return _download(dataset, file, url)
            except (OSError, ValueError) as error:  # no network, no such address; or another hash
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                sought.append(f"{url} ({reason[:160]})")
    ways = [f"put it into a folder F/{folders[0]} and set QLAB_DATA=F", *([advice] if advice else [])]
    if root is not None:
        ways.insert(0, f"correct root={root!r}, or leave it out to have the file sought elsewhere")
    raise DataNotFoundError(
        f"data set {dataset!r}: {file.name} was not found. Sought in:\n"
        + "\n".join(f"  - {place}" for place in sought)
        + "\nTo get it:\n"
        + "\n".join(f"  - {way}" for way in ways)
        + f"\nPublished at {file.urls[0]}"
    )


def _download(dataset: str, file: RemoteFile, url: str) -> Path:
    path = pooch.retrieve(
        url,
        known_hash=f"sha256:{file.sha256}",
        fname=file.name,
        path=cache_folder() / dataset,
        downloader=pooch.HTTPDownloader(progressbar=True, timeout=_TIMEOUT),
    )
    return Path(path)
