"""LeNet-5 with batch norm, ReLU and max-pooling.

6 and 16 feature maps of 5x5 convolutions, then 120 - 84 - num_classes. Images smaller than 32x32 are padded by 2 in the
first convolution, so that 28x28 and 32x32 both reach the classical 16 maps of 5x5. Pooling comes before batch norm.

Reference: LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 1998.
Deviations: batch norm, ReLU for the scaled tanh, max-pooling for the trained subsampling, all maps connected, a linear
output layer for the radial basis functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlab.models.base import Net, batch_norm, logits

__all__ = ["LeNet"]


class LeNet(Net):
    """LeNet-5 for images of at least 12x12 pixels.

    Args:
        input_shape: (C, H, W).
        num_classes: number of logits.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "lenet"
    smallest_side = 12  # 12 -> 6 by pooling -> 2 by the second convolution -> 1 by pooling

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, affine: bool = True, final_norm: bool = False
    ) -> None:
        super().__init__(input_shape, num_classes, affine=affine, final_norm=final_norm)
        channels, *sides = self.input_shape
        padding = 2 if min(sides) < 32 else 0
        height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in sides)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=padding, bias=False),
            nn.MaxPool2d(2),
            batch_norm(6, affine),
            nn.ReLU(),
            nn.Conv2d(6, 16, 5, bias=False),
            nn.MaxPool2d(2),
            batch_norm(16, affine),
            nn.ReLU(),
        )
        self.hidden = nn.Sequential(
            nn.Linear(16 * height * width, 120, bias=False),
            batch_norm(120, affine, dimensions=1),
            nn.ReLU(),
            nn.Linear(120, 84, bias=False),
            batch_norm(84, affine, dimensions=1),
            nn.ReLU(),
        )
        self.fc = logits(84, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.hidden(self.features(x).flatten(1)))
