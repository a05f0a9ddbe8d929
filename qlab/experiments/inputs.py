"""The data sets of experiments: loaded by name alone, and recognised by their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab import data as data_room
from qlab.errors import DataNotFoundError

if TYPE_CHECKING:
    from qlab.data import DataModule

__all__ = ["data_digest", "load_data"]


def load_data(name: str, **options: Any) -> DataModule:
    """Return a data set by name; your own pictures, `image_folder`, are those in `$QLAB_DATA/image_folder`.

    Raises:
        DataNotFoundError: for `image_folder` without `QLAB_DATA`.
        UnknownNameError, InputError: see `qlab.data.load`.
    """
    if name == "image_folder":
        folder = os.environ.get("QLAB_DATA")
        if not folder:
            raise DataNotFoundError(
                "experiments read your own pictures from the folder image_folder in QLAB_DATA, and QLAB_DATA is not set: "
                "set it to a folder that holds image_folder/<class>/*.jpg"
            )
        options["root"] = str(Path(folder) / "image_folder")
    return data_room.load(name, **options)


def data_digest(name: str) -> str:
    """Bring a data set to this machine and return a digest of its content.

    The training part enters through its size, mean and standard deviation (one changed picture changes them), that of a text
    symbol by symbol, the test part byte by byte. Empty for a name that is no data set of `qlab.data`.
    """
    if name not in data_room.DATA:
        return ""
    data = load_data(name, **({"size": 32} if name == "image_folder" else {}))
    data.prepare_data()
    data.setup()
    digest = hashlib.sha256(repr((data.class_names, data.input_shape, data.num_samples("train"))).encode())
    text = data_room.DATA[name].kind == "text"
    for statistic in (data.split("train").x,) if text else (data.mean, data.std):
        digest.update(statistic.numpy().tobytes())
    for x, y in data.test_dataloader():
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()[:16]
