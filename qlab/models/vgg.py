"""VGG-small, the plain convolutional net of the binary-network papers.

    128C3 - 128C3 - MP2 - 256C3 - 256C3 - MP2 - 512C3 - 512C3 - MP2 - FC

with batch norm and a nonlinearity after every convolution; pooling comes before batch norm, as in XNOR-Net, so that the
nonlinearity feeds the next convolution directly.

References: Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net, ECCV 2016, arXiv 1603.05279 (order of the layers); Zhang,
Yang, Ye, Hua, LQ-Nets, ECCV 2018, arXiv 1807.10029 (VGG-small). It is the net of Courbariaux et al. 2015 without its
two wide linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlab.models.base import Net, batch_norm, logits

__all__ = ["VGGSmall"]


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
