"""Digits: the 1,797 handwritten digits that come with scikit-learn, the set that is always there.

Pictures are 8 x 8, each pixel the number of inked dots (0 to 16) of a 4 x 4 cell. They are stored as uint8 by
`round(255 / 16 * dots)`, which keeps the 17 grey levels apart and maps 16 to white.

Reference: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import numpy as np
import torch

from qlab.data.base import DataModule
from qlab.data.splits import Source, Split

__all__ = ["Digits"]


class Digits(DataModule):
    """Digits: inputs (1, 8, 8), 10 classes; a fixed fifth is the test part."""

    name = "digits"
    crop_padding = 1  # 4 of 8 pixels would push the digit out of the picture

    def read(self) -> Source:
        """Read the file inside scikit-learn."""
        from sklearn.datasets import load_digits

        dots, labels = load_digits(return_X_y=True)
        pixels = np.rint(dots.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        train = Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))
        return Source(train, tuple("0123456789"))
