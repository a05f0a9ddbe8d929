r"""One residual net whose every topology repair of binary networks is an option: ResNet-20 for small images, and ResNet-18.

    double_residual False:   h = f(BN(conv1(x))),          out = f(BN(conv2(h)) + S(x))
    double_residual True:    h = f(BN(conv1(x)) + S(x)),   out = f(BN(conv2(h)) + h)

with f the activation, and everything else that a unit of `qlab.models.repair_blocks` has. The defaults are a plain baseline: no
feature normalization, one shortcut for each block, identity as activation. The stem has no nonlinearity, for Sgn is the first
thing that a unit does to its input; global average pooling and a linear layer end the net, behind one more batch norm with
order "bn_conv".

In this float net Hardtanh stands where the binary net has Sgn. Training switches (surrogates, weight normalization, teachers,
stages, ...) are those of the method `bnn_repair`.

Reference: de Putter, Corporaal, How to train accurate BNNs for embedded systems?, 2022, arXiv 2206.12322; He et al., CVPR 2016, for
the nets. The chapter's own code is not public: its categories are kept, their variants come from the papers that
`repair_blocks` names.
Deviations: features are padded with zeros, a third value beside -1 and +1, as everywhere in the lab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qlab.errors import InputError
from qlab.models.base import MAX_LAYERS, MAX_SIZE, Net, batch_norm, logits
from qlab.models.repair_blocks import Repairs, Unit
from qlab.models.resnet import stem_layers

__all__ = ["Repair18", "Repair20", "RepairNet"]


class RepairBlock(nn.Module):
    """Two units, with a shortcut around both or around each."""

    def __init__(self, channels: int, planes: int, stride: int, size: tuple[int, int], repairs: Repairs) -> None:
        super().__init__()
        whole = (channels, stride)
        self.each = repairs.double_residual
        self.unit1 = Unit(channels, planes, stride, size, repairs, whole if self.each else None)
        self.unit2 = Unit(planes, planes, 1, size, repairs, (planes, 1) if self.each else whole)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H / stride, W / stride) for x (N, channels, H, W)."""
        h = self.unit1(x, x)
        return self.unit2(h, h if self.each else x)


class RepairNet(Net):
    """Stem, stages of equal blocks, global average pooling, linear layer; the constructor of the two nets below."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        blocks: Sequence[int],
        multiples: Sequence[int],
        width: int,
        stem: str,
        affine: bool,
        final_norm: bool,
        **repairs: Any,
    ) -> None:
        options = {"blocks": blocks, "multiples": multiples, "width": width, "stem": stem}
        super().__init__(input_shape, num_classes, **options, **repairs, affine=affine, final_norm=final_norm)
        switches = Repairs(**repairs, affine=affine)
        planes = _planes(self.spec["blocks"], self.spec["multiples"], width)
        stem_width = width
        self.stem = stem_layers(self.input_shape[0], stem_width, stem, affine, nonlinear=False)
        size = _after_stem(self.input_shape, stem)
        channels, stages = stem_width, []
        for stage, depth in enumerate(self.spec["blocks"]):
            layers = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                size = ((size[0] + stride - 1) // stride, (size[1] + stride - 1) // stride)
                layers.append(RepairBlock(channels, planes[stage], stride, size, switches))
                channels = planes[stage]
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm = batch_norm(channels, affine) if switches.order == "bn_conv" else nn.Identity()
        self.fc = logits(channels, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, C, H, W)."""
        return self.fc(self.norm(self.stages(self.stem(x))).mean((2, 3)))


def _planes(blocks: list[int], multiples: list[int], width: int) -> list[int]:
    """Return the channels of each stage."""
    if not blocks or sum(blocks) > MAX_LAYERS:
        raise InputError(f"blocks has {sum(blocks)} blocks in all; expected from 1 to {MAX_LAYERS}.")
    if multiples and len(multiples) != len(blocks):
        raise InputError(f"multiples has {len(multiples)} entries, blocks {len(blocks)}; expected one for each stage.")
    planes = [width * factor for factor in (multiples or [2**stage for stage in range(len(blocks))])]
    if max(planes) > MAX_SIZE:
        raise InputError(f"a stage would have {max(planes):,} channels; at most {MAX_SIZE:,} are allowed.")
    if any(after < before for before, after in zip([width, *planes], planes, strict=False)):
        raise InputError(
            f"stages of {planes} channels behind a stem of {width}; expected channels that never decrease."
        )
    return planes


def _after_stem(shape: tuple[int, ...], stem: str) -> tuple[int, int]:
    """Return (H, W) behind the stem: a quarter, rounded up, behind the large one."""
    height, width = shape[1], shape[2]
    if stem == "large":
        height, width = ((side + 1) // 2 for side in (height, width))
        height, width = ((side + 1) // 2 for side in (height, width))
    return height, width


class Repair20(RepairNet):
    """Repairable ResNet-20: three stages of three blocks, 16-32-64 channels, 18 binary convolutions.

    Args:
        input_shape: (C, H, W), images of at least 4x4 pixels.
        num_classes: number of logits.
        blocks: blocks of each stage.
        multiples: channels of each stage, in units of `width`; () for doubling.
        width: channels of the first stage.
        stem: "small", one 3x3 convolution, or "large", 7x7 of stride 2 and max-pooling.
        order: "conv_bn", or "bn_conv" (batch norm before Sgn and none behind the convolution).
        double_residual: every convolution has a shortcut of its own.
        activation: behind the sum: "identity", "relu", "hardtanh", "prelu" or "rprelu".
        downsample: shortcut where the image halves: "pool" (2x2 average, zero channels), "subsample" (every second pixel, zero
            channels), "duplicate" (2x2 average, channels side by side), "float" or "binary" (2x2 average, 1x1 convolution).
        feature_norm: before Sgn: "none", "bn", "bn_noaffine", "rsign", "center_sample" or "std_sample".
        scaling: of a convolution's output: "none", "learned" (channel), "xnorpp" (channel, row, column) or "input_map" (K of
            XNOR-Net).
        squeeze_excite: "none", "gate" (from the real input of the convolution) or "output" (from its output).
        reduction: of the channels inside the gate.
        gate_bias: the gate's layers have biases.
        ensemble: binary convolutions in the place of one.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "repair20"
    smallest_side = 4

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        blocks: Sequence[int] = (3, 3, 3),
        multiples: Sequence[int] = (),
        width: int = 16,
        stem: str = "small",
        order: str = "conv_bn",
        double_residual: bool = False,
        activation: str = "identity",
        downsample: str = "pool",
        feature_norm: str = "none",
        scaling: str = "none",
        squeeze_excite: str = "none",
        reduction: int = 8,
        gate_bias: bool = False,
        ensemble: int = 1,
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(
            input_shape,
            num_classes,
            blocks=blocks,
            multiples=multiples,
            width=width,
            stem=stem,
            order=order,
            double_residual=double_residual,
            activation=activation,
            downsample=downsample,
            feature_norm=feature_norm,
            scaling=scaling,
            squeeze_excite=squeeze_excite,
            reduction=reduction,
            gate_bias=gate_bias,
            ensemble=ensemble,
            affine=affine,
            final_norm=final_norm,
        )


class Repair18(RepairNet):
    """Repairable ResNet-18: four stages of two blocks, 64-128-256-512 channels, 16 binary 3x3 convolutions.

    Args:
        input_shape: (C, H, W), images of at least 8x8 pixels.
        num_classes: number of logits.
        blocks: blocks of each stage.
        multiples: channels of each stage, in units of `width`; () for doubling.
        width: channels of the first stage.
        stem: "small", one 3x3 convolution, or "large", the paper's for images of 224x224.
        order: as of `Repair20`.
        double_residual: as of `Repair20`.
        activation: as of `Repair20`.
        downsample: as of `Repair20`; the float 1x1 convolution of the ImageNet nets.
        feature_norm: as of `Repair20`.
        scaling: as of `Repair20`.
        squeeze_excite: as of `Repair20`.
        reduction: as of `Repair20`.
        gate_bias: as of `Repair20`.
        ensemble: as of `Repair20`.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "repair18"
    smallest_side = 8

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        multiples: Sequence[int] = (),
        width: int = 64,
        stem: str = "small",
        order: str = "conv_bn",
        double_residual: bool = False,
        activation: str = "identity",
        downsample: str = "float",
        feature_norm: str = "none",
        scaling: str = "none",
        squeeze_excite: str = "none",
        reduction: int = 8,
        gate_bias: bool = False,
        ensemble: int = 1,
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(
            input_shape,
            num_classes,
            blocks=blocks,
            multiples=multiples,
            width=width,
            stem=stem,
            order=order,
            double_residual=double_residual,
            activation=activation,
            downsample=downsample,
            feature_norm=feature_norm,
            scaling=scaling,
            squeeze_excite=squeeze_excite,
            reduction=reduction,
            gate_bias=gate_bias,
            ensemble=ensemble,
            affine=affine,
            final_norm=final_norm,
        )
