"""Your own arrays as a data set: `DataModule.from_arrays`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qlab.data.base import DataModule
from qlab.data.splits import Source, Split
from qlab.errors import InputError

__all__ = ["ArrayData", "Arrays"]

Arrays = np.ndarray | Tensor | Sequence


def _inputs(what: str, x: Arrays) -> Tensor:
    """Return x as uint8 (N, C, H, W) or float32 (N, C, H, W) or (N, D)."""
    x = _tensor(what, x)
    if x.dtype == torch.uint8:
        if x.ndim == 3:
            x = x.unsqueeze(1)
        elif x.ndim == 2:
            x = x.to(torch.float32)
    elif x.is_floating_point():
        x = x.to(torch.float32)
    else:
        raise InputError(f"{what} is {x.dtype}: give images as uint8 from 0 to 255, everything else as floats.")
    if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        raise InputError(f"{what} {tuple(x.shape)} has its channels last; images are (N, C, H, W): moveaxis(x, -1, 1).")
    if x.ndim not in (2, 4):
        raise InputError(f"{what} must be (N, C, H, W), uint8 (N, H, W) or (N, D), got {tuple(x.shape)}.")
    return x.contiguous()


def _labels(what: str, y: Arrays) -> Tensor:
    y = _tensor(what, y)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim != 1:
        raise InputError(f"{what} must be whole numbers of shape (N,), got {y.dtype} {tuple(y.shape)}.")
    return y.to(torch.int64)


def _tensor(what: str, values: Arrays) -> Tensor:
    """Return an own copy on the CPU: later changes of the caller's array do not reach the set."""
    if isinstance(values, Tensor):
        return values.detach().cpu().clone()
    try:
        return torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is no array of numbers: {error}.") from None


class ArrayData(DataModule):
    """Arrays in memory as a data set; see `DataModule.from_arrays`."""

    name = "arrays"
    mirrors = True

    def __init__(
        self,
        x: Arrays,
        y: Arrays,
        x_test: Arrays | None = None,
        y_test: Arrays | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        cutout: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, augment, subset, None, cutout)
        train = Split(_inputs("x", x), _labels("y", y))
        if (x_test is None) != (y_test is None):
            raise InputError("x_test and y_test go together: give both or neither.")
        test = None
        if x_test is not None and y_test is not None:
            test = Split(_inputs("x_test", x_test), _labels("y_test", y_test))
        if len(train) == 0:
            raise InputError("arrays (train) is empty: give at least one sample per class.")
        if class_names is None:
            class_names = [str(c) for c in range(max(1, int(train.y.max()) + 1))]
        self._arrays = Source(train, tuple(class_names), test)
        _ = self._source  # arrays are at hand, so what is wrong with them is said at once
        missing = sorted(set(range(len(class_names))) - set(train.y.tolist()))
        if missing:
            raise InputError(
                f"y has no sample of class {missing[0]} ({len(missing)} of {len(class_names)} classes are missing): "
                "labels are 0 to number of classes - 1."
            )

    def read(self) -> Source:
        """Return the arrays."""
        return self._arrays
