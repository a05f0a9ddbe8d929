"""Data sets as Lightning data modules that feed a training step faster than it can ask.

    >>> data = qlab.data.load("fashion_mnist", batch_size=128)
    >>> data.input_shape, data.num_classes
    ((1, 28, 28), 10)
    >>> for x, y in data.train_dataloader():  # x float32 (128, 1, 28, 28), normalised and augmented; y int64 (128,)
    ...     ...

The whole set lies in memory as uint8, on the training device where it fits; a batch is one slice of it, and augmentation is
one tensor operation on the whole batch. There are no worker processes.

**Where files come from**, in this order: the option `root`; the folder in the environment variable `QLAB_DATA`; the Debian
package `dataset-fashion-mnist`; a download with a SHA-256 check. An explicit `root` is final: where it lacks the file, that is
an error and nothing else is tried. In `QLAB_DATA` each set has a folder of its own name:

    $QLAB_DATA/mnist/train-images-idx3-ubyte.gz            (also MNIST/raw/..., as torchvision lays it; gzip or not)
    $QLAB_DATA/fashion_mnist/train-images-idx3-ubyte.gz    (also fashion-mnist/..., FashionMNIST/raw/...)
    $QLAB_DATA/kmnist/train-images-idx3-ubyte.gz           (also KMNIST/raw/...)
    $QLAB_DATA/cifar10/cifar-10-binary.tar.gz              (also directly in $QLAB_DATA)
    $QLAB_DATA/cifar100/cifar-100-binary.tar.gz            (also directly in $QLAB_DATA)

Downloads and the decoded pictures of `image_folder` are kept in `QLAB_CACHE`, by default the user's cache folder.

**What is fixed by what.** The test part is the same for every seed, so that runs over seeds can be compared; where a set has
no test part of its own, a fifth of it is set aside once and for all. `seed` decides which part of the rest validates, the
order of the batches and their augmentation: batch b of epoch e is a function of (seed, e, b) alone, so a resumed run sees what
an uninterrupted one sees. Validation and `subset` are stratified: each class has its share.
"""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from qlab.data.catalog import DATA, DataInfo
from qlab.errors import InputError
from qlab.lazy import lazy_names

if TYPE_CHECKING:
    from qlab.data.augment import Augmentation
    from qlab.data.base import DataModule
    from qlab.data.loader import BatchLoader
    from qlab.data.splits import Split

__all__ = ["DATA", "Augmentation", "BatchLoader", "DataInfo", "DataModule", "Split", "load"]

_LAZY = {
    "Augmentation": "qlab.data.augment",
    "BatchLoader": "qlab.data.loader",
    "DataModule": "qlab.data.base",
    "Split": "qlab.data.splits",
}


__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)


def load(name: str, **options: Any) -> DataModule:
    """Return the data set `name`; nothing is read before it is asked for.

    Args:
        name: a key of `DATA`.
        **options: options of the set. Every one takes `batch_size=128, val_fraction=0.1, seed=0, augment=None, subset=None,
            root=None`; see `DataModule`.

    Raises:
        UnknownNameError: for a name that is not on the shelf.
        InputError: for an option that the set does not have, or a value out of range.
    """
    implementation = DATA.load(name)
    accepted = [p for p in inspect.signature(implementation).parameters if p != "self"]
    for option in options:
        if option not in accepted:
            close = difflib.get_close_matches(option, accepted, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"data set {name!r} has no option {option!r}.{hint} It takes: {', '.join(accepted)}.")
    return implementation(**options)
