"""Residual networks: ResNet-20 for small images, and ResNet-18 with a 3x3 stem or, for large images, the paper's.

    block:  y = relu( BN(conv(relu(BN(conv(x))))) + S(x) )

S is the identity, or where the number of channels doubles and the image halves: type A, every second pixel with zero
channels on both sides (no parameters), or type B, 1x1 convolution of stride 2 and batch norm.
The shortcut is registered and run after the convolutions: the nonlinearity that ended the block before stands directly
before the first of them.

References: He, Zhang, Ren, Sun, Deep residual learning for image recognition, CVPR 2016, arXiv 1512.03385, section 4.2
(ResNet-20) and 3.3 (stem="large": 7x7 of stride 2 and 3x3 max-pooling of stride 2); the stem without max-pooling is the one of
kuangliu/pytorch-cifar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from qlab.errors import InputError
from qlab.models.base import Net, batch_norm, logits

__all__ = ["ResNet18", "ResNet20"]


def stem_layers(channels: int, width: int, stem: str, affine: bool, nonlinear: bool) -> nn.Sequential:
    """Return the first layers of a residual net: "small", 3x3, or "large", 7x7 of stride 2 with max-pooling.

    Raises:
        InputError: no such stem.
    """
    if stem not in ("small", "large"):
        raise InputError(f"stem is {stem!r}; expected 'small' (3x3) or 'large' (7x7 of stride 2 and max-pooling).")
    large = stem == "large"
    conv = nn.Conv2d(
        channels, width, 7 if large else 3, stride=2 if large else 1, padding=3 if large else 1, bias=False
    )
    layers: list[nn.Module] = [conv, batch_norm(width, affine)]
    layers += [nn.ReLU()] if nonlinear else []
    layers += [nn.MaxPool2d(3, 2, 1)] if large else []
    return nn.Sequential(*layers)


class ZeroPadShortcut(nn.Module):
    """Type A: every second pixel, and `channels` zero channels shared between both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = channels // 2, channels - channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C + channels, ceil(H / 2), ceil(W / 2)) for x (N, C, H, W)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around both."""

    def __init__(self, channels: int, planes: int, stride: int, shortcut: str, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = batch_norm(planes, affine)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = batch_norm(planes, affine)
        if stride == 1 and channels == planes:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "A":
            self.shortcut = ZeroPadShortcut(planes - channels)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, planes, 1, stride=stride, bias=False), batch_norm(planes, affine)
            )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H / stride, W / stride) for x (N, channels, H, W)."""
        z = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(self.act1(z)))
        return self.act2(z + self.shortcut(x))


class ResNet(Net):
    """Stem, stages of equal blocks with doubling width, global average pooling, linear layer."""

    blocks: ClassVar[tuple[int, ...]]  # per stage

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int,
        shortcut: str,
        affine: bool,
        final_norm: bool,
        **options: str,
    ) -> None:
        super().__init__(
            input_shape, num_classes, width=width, shortcut=shortcut, affine=affine, final_norm=final_norm, **options
        )
        if shortcut not in ("A", "B"):
            raise InputError(f"shortcut is {shortcut!r}; expected 'A' (zero padding) or 'B' (1x1 convolution).")
        self.stem = stem_layers(self.input_shape[0], width, options.get("stem", "small"), affine, nonlinear=True)
        channels, stages = width, []
        for stage, depth in enumerate(self.blocks):
            planes, layers = width * 2**stage, []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, planes, stride, shortcut, affine))
                channels = planes
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = logits(channels, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


class ResNet20(ResNet):
    """ResNet-20 of the CIFAR experiments: three stages of three blocks, 16-32-64 channels.

    Args:
        input_shape: (C, H, W), images of at least 4x4 pixels.
        num_classes: number of logits.
        width: channels of the first stage.
        shortcut: "A", as in the paper's CIFAR nets (269,722 parameters at the defaults), or "B" (272,474).
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "resnet20"
    smallest_side = 4
    blocks = (3, 3, 3)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 16,
        shortcut: str = "A",
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(input_shape, num_classes, width=width, shortcut=shortcut, affine=affine, final_norm=final_norm)


class ResNet18(ResNet):
    """ResNet-18: four stages of two blocks, 64-128-256-512 channels.

    Args:
        input_shape: (C, H, W), images of at least 8x8 pixels.
        num_classes: number of logits.
        width: channels of the first stage.
        stem: "small", one 3x3 convolution, or "large", the paper's for images of 224x224.
        shortcut: "B", as in the paper's ImageNet nets, or "A".
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "resnet18"
    smallest_side = 8
    blocks = (2, 2, 2, 2)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        stem: str = "small",
        shortcut: str = "B",
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(
            input_shape, num_classes, width=width, shortcut=shortcut, affine=affine, final_norm=final_norm, stem=stem
        )
