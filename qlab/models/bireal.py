"""Bi-Real Net 18: every 3x3 convolution has its own shortcut, so that real values run through the whole net.

    unit:  y = BN(conv(act(x))) + S(x)

S is the identity; where the image halves it is 2x2 average pooling, 1x1 convolution and batch norm, on the real values.
The nonlinearity stands at the input of each 3x3 convolution. In this float net it is Hardtanh, the clip whose sign the
binary net takes; a quantizer that replaces it makes the net of the paper.

Reference: Liu, Wu, Luo, Yang, Liu, Cheng, Bi-Real Net, ECCV 2018, arXiv 1808.00278, and liuzechun/Bi-Real-net.
The stem is the paper's for large images, stem="large": 7x7 of stride 2, batch norm, 3x3 max-pooling of stride 2.
Deviations: by default a 3x3 stem without pooling, for small images; odd sides are pooled with the border's windows cut short.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qlab.models.base import Net, batch_norm, logits
from qlab.models.resnet import stem_layers

__all__ = ["BiReal18"]


class BiRealUnit(nn.Module):
    """One 3x3 convolution with a shortcut of its own."""

    def __init__(self, channels: int, planes: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.act = nn.Hardtanh()
        self.conv = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn = batch_norm(planes, affine)
        if stride == 1:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(channels, planes, 1, bias=False),
                batch_norm(planes, affine),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H / stride, W / stride) for x (N, channels, H, W)."""
        return self.bn(self.conv(self.act(x))) + self.shortcut(x)


class BiReal18(Net):
    """Bi-Real Net 18: four stages of four units, 64-128-256-512 channels.

    Args:
        input_shape: (C, H, W), images of at least 8x8 pixels.
        num_classes: number of logits.
        width: channels of the first stage.
        stem: "small", one 3x3 convolution, or "large", the paper's for images of 224x224.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "bireal18"
    smallest_side = 8

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        stem: str = "small",
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(input_shape, num_classes, width=width, stem=stem, affine=affine, final_norm=final_norm)
        self.stem = stem_layers(self.input_shape[0], width, stem, affine, nonlinear=False)
        channels, stages = width, []
        for stage in range(4):
            planes, units = width * 2**stage, []
            for unit in range(4):
                units.append(BiRealUnit(channels, planes, 2 if stage > 0 and unit == 0 else 1, affine))
                channels = planes
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.fc = logits(channels, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))
