"""The plain convolutional nets of the binary-network papers: VGG-small and VGG-16 for small images.

    VGG-small    2x128C3 - MP2 - 2x256C3 - MP2 - 2x512C3 - MP2 - FC
    VGG-16       2x64C3 - MP2 - 2x128C3 - MP2 - 3x256C3 - MP2 - 3x512C3 - MP2 - 3x512C3 - MP2 - FC512 - FC512 - FC

with batch norm and a nonlinearity after every convolution; pooling comes before batch norm, as in XNOR-Net, so that the
nonlinearity feeds the next convolution directly.

References: Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net, ECCV 2016, arXiv 1603.05279 (order of the layers); Zhang,
Yang, Ye, Hua, LQ-Nets, ECCV 2018, arXiv 1807.10029 (VGG-small). It is the net of Courbariaux et al. 2015 without its
two wide linear layers. Simonyan, Zisserman, ICLR 2015, arXiv 1409.1556, configuration D (VGG-16), with batch norm and linear
layers of 512 for images of 32x32 pixels, as in the experiments of AdaSTE, BayesBiNN and mirror descent.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlab.models.base import Net, batch_norm, logits

__all__ = ["VGG16", "VGGSmall"]


class VGGSmall(Net):
    """VGG-small for images of at least 8x8 pixels.

    Args:
        input_shape: (C, H, W).
        num_classes: number of logits.
        width: channels of the first pair of convolutions; the next pairs have 2 and 4 times as many.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "vgg_small"
    smallest_side = 8

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 128,
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(input_shape, num_classes, width=width, affine=affine, final_norm=final_norm)
        channels, height, breadth = self.input_shape
        layers: list[nn.Module] = []
        for planes in (width, 2 * width, 4 * width):
            for pool in (False, True):
                layers.append(nn.Conv2d(channels, planes, 3, padding=1, bias=False))
                if pool:
                    layers.append(nn.MaxPool2d(2))
                layers += [batch_norm(planes, affine), nn.ReLU()]
                channels = planes
        self.features = nn.Sequential(*layers)
        self.fc = logits(channels * (height // 8) * (breadth // 8), num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.features(x).flatten(1))


class VGG16(Net):
    """VGG-16 with batch norm, for images of 32x32 pixels.

    Pools round up, so that smaller images pass too: a side of 8 is 1 after three pools and stays so.

    Args:
        input_shape: (C, H, W).
        num_classes: number of logits.
        width: channels of the first pair of convolutions; the later groups have 2, 4, 8 and 8 times as many.
        hidden: units of the linear layers before the last one.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "vgg16"
    smallest_side = 8

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        hidden: Sequence[int] = (512, 512),
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(input_shape, num_classes, width=width, hidden=hidden, affine=affine, final_norm=final_norm)
        channels, height, breadth = self.input_shape
        layers: list[nn.Module] = []
        for factor, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for i in range(depth):
                layers.append(nn.Conv2d(channels, factor * width, 3, padding=1, bias=False))
                if i == depth - 1:
                    layers.append(nn.MaxPool2d(2, ceil_mode=True))
                layers += [batch_norm(factor * width, affine), nn.ReLU()]
                channels = factor * width
        self.features = nn.Sequential(*layers)
        features = channels * -(-height // 32) * -(-breadth // 32)
        head: list[nn.Module] = []
        for units in hidden:
            head += [nn.Linear(features, units, bias=False), batch_norm(units, affine, dimensions=1), nn.ReLU()]
            features = units
        self.hidden = nn.Sequential(*head)
        self.fc = logits(features, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.hidden(self.features(x).flatten(1)))
