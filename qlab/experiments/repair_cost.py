r"""What a repair of a binary net costs at inference: operations, features kept, energy and area, counted from the net itself.

One forward pass of one image counts, unit by unit of a `repair20` or `repair18`:

    binary MACs      of the layers that a binary method takes: all but the first and the last
    float MACs       of the first and the last layer, of float 1x1 shortcuts and of the two layers in a gate
    adds             residual sums, means over positions (one for each value), box filters (8 for each), the shifts of RPReLU and
                     of batch norms that are computed, M - 1 sums of an ensemble
    multiplies       batch norms that are computed, slopes, and scales that do not fold (row and column factors, input maps, gates,
                     ensemble weights)
    comparisons      one for each sign; one for each value of a ReLU, two of a clip
    sigmoids         of gates
    real features    outputs of units that something else than a sign reads: they are kept and moved with b bits, not with 1

What folds, and is not counted: a batch norm, a factor of each channel, a threshold and a monotone activation whose output only a
sign reads. All of it is one integer threshold for each channel, of the integer y of a binary convolution:

    Sgn(g (y - mu) / sd + b) = [y >= t] for g > 0, [y <= t] for g < 0,   t = mu - b sd / g

So the first unit of a block without double residual costs comparisons alone; with double residual its batch norm is computed.
Training techniques cost nothing.

Energy: every MAC counts as two operations. Two sets of constants, both RECALLED, neither checked against its source:

    "accelerator"  22 nm, BrainTTA: 35 fJ for a binary operation, 405 fJ for one of 8 bits, adds and multiplies as those of 8 bits.
                   No energy is given for memory, no area.
    "textbook"     45 nm (Horowitz, ISSCC 2014): 8-bit add 0.03, multiply 0.2, 32-bit add 0.1 pJ; 32-bit read of a 32 KB SRAM 10 pJ;
                   areas 36, 282, 137 um^2. A binary MAC is taken as 2/8 of an 8-bit add, an assumption of the lab.

Memory of "textbook": each weight is read and each feature written and read once.

Source: de Putter, Corporaal, arXiv 2206.12322, for the question (its own figures could not be had); Molendijk et al., BrainTTA,
arXiv 2211.11331; Horowitz, Computing's energy problem, ISSCC 2014. The counts are derived.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.errors import InputError
from qlab.models.base import Net
from qlab.models.repair_blocks import (
    Centre,
    ChannelScale,
    Clip,
    Ensemble,
    FloatConv,
    Gate,
    InputScale,
    RankOneScale,
    Rectifier,
    RPReLU,
    Unit,
)
from qlab.models.repairable import RepairBlock, RepairNet
from qlab.quantizers import layers

__all__ = ["ACCELERATOR", "CONSTANTS", "TEXTBOOK", "Constants", "Cost", "count", "energy", "fold", "unit_area"]


@dataclass(frozen=True)
class Cost:
    """Operations of one inference, and what is stored.

    Args:
        binary_macs: multiply-accumulates of binary layers.
        float_macs: of layers that stay float (or 8 bits).
        adds: besides those in MACs.
        multiplies: besides those in MACs.
        comparisons: of signs and clips.
        sigmoids: of gates.
        binary_weights: bits.
        float_weights: numbers.
        binary_outputs: values that binary 3x3 convolutions put out, of all branches of an ensemble.
        channels: of binary 3x3 units: thresholds, where everything folds.
        real_features: unit outputs kept with many bits.
        binary_features: unit outputs of which only the sign is kept.
    """

    binary_macs: int = 0
    float_macs: int = 0
    adds: int = 0
    multiplies: int = 0
    comparisons: int = 0
    sigmoids: int = 0
    binary_weights: int = 0
    float_weights: int = 0
    binary_outputs: int = 0
    channels: int = 0
    real_features: int = 0
    binary_features: int = 0

    def feature_bits(self, bits: int = 8) -> int:
        """Return the bits that the outputs of all units take, real ones at `bits` each."""
        return bits * self.real_features + self.binary_features


# ---------------------------------------------------------------------------------------------------------------- counts


def count(net: Net, first_last_binary: bool = False) -> Cost:
    """Return the cost of one inference.

    Args:
        net: a plain `repair20` or `repair18`; it is copied, and the copy run.
        first_last_binary: the first and the last layer are binary too.

    Raises:
        InputError: for another net, whose foldings are not known.
    """
    if not isinstance(net, RepairNet):
        raise InputError(
            f"the cost model knows what folds in repair20 and repair18, not in a {type(net).__name__}; build one of these"
        )
    net = copy.deepcopy(net).eval()  # the hooks go with it
    found = list(layers(net).values())
    binary = set(found if first_last_binary else found[1:-1])
    total: dict[str, int] = {}

    def counted(module: nn.Module, rule: Callable[..., dict[str, int]], *arguments: Any) -> None:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            for name, amount in rule(module, inputs[0], y, *arguments).items():
                total[name] = total.get(name, 0) + amount

        module.register_forward_hook(add)

    for layer in found:
        counted(layer, _layer, layer in binary)
    for block in net.modules():
        if isinstance(block, RepairBlock):
            for unit, kept in ((block.unit1, block.each or _reads_values(block.unit2)), (block.unit2, True)):
                counted(unit, _unit, kept)
                for part in unit.modules():
                    counted(part, _part, unit, kept)
    counted(net.stages, lambda m, x, y: {"adds": y.numel()})  # global average pooling
    first = next(net.parameters())
    with torch.no_grad():
        net(torch.zeros(1, *net.input_shape, device=first.device, dtype=first.dtype))
    return Cost(**total)


def _reads_values(unit: Unit) -> bool:
    """Return whether a unit reads more of its input than the signs."""
    centred = any(isinstance(m, Centre) for m in unit.norm.modules())
    return centred or unit.gate is not None or unit.input_scale is not None


def _layer(m: nn.Module, x: Tensor, y: Tensor, is_binary: bool) -> dict[str, int]:
    return _macs(m.weight, y, is_binary)  # type: ignore[arg-type]


def _macs(weight: Tensor, y: Tensor, is_binary: bool) -> dict[str, int]:
    """Return the MACs and weights of a convolution or linear layer."""
    macs = weight.numel() * (y[0, 0].numel() if y.dim() > 2 else 1)
    if not is_binary:
        return {"float_macs": macs, "float_weights": weight.numel()}
    outputs = y.numel() if weight.shape[-1] == 3 else 0
    return {"binary_macs": macs, "binary_weights": weight.numel(), "binary_outputs": outputs}


def _unit(unit: Unit, x: Tensor, y: Tensor, kept: bool) -> dict[str, int]:
    """Return what a unit costs as a whole: its residual sum, and how its output is kept."""
    return {
        "adds": y.numel() if unit.shortcut is not None else 0,
        "channels": y.shape[1],
        "real_features" if kept else "binary_features": y.numel(),
    }


def _part(m: nn.Module, x: Tensor, y: Tensor, unit: Unit, kept: bool) -> dict[str, int]:
    """Return what a module inside a unit costs beside MACs; `kept` says whether something else than a sign reads the unit."""
    n = y.numel()
    if isinstance(m, nn.Hardtanh):
        return {"comparisons": n}
    if isinstance(m, Gate):
        macs = m.squeeze.numel() + m.excite.numel()
        work = {"float_macs": macs, "float_weights": macs, "sigmoids": m.excite.shape[0]}
        return work | {"adds": x.numel(), "multiplies": _outputs(unit, x, m)}
    if isinstance(m, InputScale):
        return {"adds": x.numel() + 8 * n, "multiplies": _outputs(unit, x, m)}
    if isinstance(m, RankOneScale):
        return {"multiplies": n}
    if isinstance(m, Ensemble):
        return {"adds": (len(m.branches) - 1) * n, "multiplies": len(m.branches) * n}
    if isinstance(m, FloatConv):
        return _macs(m.weight, y, False)
    if isinstance(m, Centre):
        return {"adds": x.numel()}
    if isinstance(m, _BatchNorm):
        return {"adds": n, "multiplies": n} if _computed(m, unit, kept) else {}
    if isinstance(m, nn.AvgPool2d):
        return {"adds": x.numel()}
    if not kept:
        return {}
    if isinstance(m, nn.PReLU):
        return {"multiplies": n}
    if isinstance(m, ChannelScale):
        return {"multiplies": n} if _alone(unit) else {}
    if isinstance(m, RPReLU):
        return {"multiplies": n, "adds": 2 * n}
    if isinstance(m, Rectifier | Clip):
        return {"comparisons": n if isinstance(m, Rectifier) else 2 * n}
    return {}


def _alone(unit: Unit) -> bool:
    """Return whether a factor of each channel has no batch norm and no gate behind it, which would take it up."""
    return not isinstance(unit.bn, _BatchNorm) and unit.gate is None and unit.output_gate is None


def _outputs(unit: Unit, x: Tensor, m: nn.Module) -> int:
    """Return the number of outputs of the unit's convolution, which a gate or an input map multiplies."""
    if m is unit.output_gate:
        return x.numel()
    conv = next(c for c in unit.conv.modules() if isinstance(c, nn.Conv2d))
    stride = conv.stride[0]
    return conv.out_channels * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)


def _computed(bn: nn.Module, unit: Unit, kept: bool) -> bool:
    """Return whether a batch norm is computed: behind a convolution whose unit is kept, in a shortcut, before a gate or a map."""
    if bn is unit.bn:
        return kept
    if any(bn is m for m in unit.norm.modules()):
        return unit.gate is not None or unit.input_scale is not None
    return True


def fold(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (threshold t, direction) of each channel: Sgn(BN(y)) = +1 where direction (y - t) >= 0.

    Direction is the sign of the scale; 0 where the scale is 0: then the sign is that of the bias, whatever y is.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise InputError("only a batch norm with running statistics folds into thresholds")
    sd = (bn.running_var + bn.eps).sqrt()
    g = bn.weight.detach() if bn.affine else torch.ones_like(sd)
    b = bn.bias.detach() if bn.affine else torch.zeros_like(sd)
    safe = torch.where(g == 0, torch.ones_like(g), g)
    return bn.running_mean - b * sd / safe, torch.sign(g)


# ------------------------------------------------------------------------------------------------------- energy and area


@dataclass(frozen=True)
class Constants:
    """Energy in pJ, area in um^2; recalled figures, for comparisons of designs and not for data sheets.

    Args:
        name: of the set.
        binary_op: energy of one binary operation; a MAC is two.
        multiply: of 8 bits.
        add: of 8 bits.
        accumulate: the add in a MAC of 8 bits.
        read: of one bit from on-chip memory; None where the set has none.
        add_area: of an 8-bit adder; None where the set has none.
        multiply_area: of an 8-bit multiplier.
        accumulate_area: of a 32-bit adder.
    """

    name: str
    binary_op: float
    multiply: float
    add: float
    accumulate: float
    read: float | None = None
    add_area: float | None = None
    multiply_area: float | None = None
    accumulate_area: float | None = None


ACCELERATOR = Constants("accelerator", binary_op=0.035, multiply=0.405, add=0.405, accumulate=0.405)
TEXTBOOK = Constants(
    "textbook",
    binary_op=0.03 / 8,
    multiply=0.2,
    add=0.03,
    accumulate=0.1,
    read=10 / 32,
    add_area=36,
    multiply_area=282,
    accumulate_area=137,
)
CONSTANTS: dict[str, Constants] = {c.name: c for c in (ACCELERATOR, TEXTBOOK)}


def energy(cost: Cost, constants: Constants = ACCELERATOR, bits: int = 8) -> dict[str, float]:
    """Return the energy of one inference in microjoule, by part and in "total".

    Args:
        cost: what `count` returned.
        constants: one of `CONSTANTS`.
        bits: of real features and of the weights of float layers; operations on them are taken as those of 8 bits.
    """
    c = constants
    parts = {
        "binary": 2 * cost.binary_macs * c.binary_op,
        "float": cost.float_macs * (c.multiply + c.accumulate),
        "other": cost.multiplies * c.multiply + (cost.adds + cost.comparisons + cost.sigmoids) * c.add,
        "memory": 0.0,
    }
    if c.read is not None:
        moved = cost.binary_weights + bits * cost.float_weights + 2 * cost.feature_bits(bits)
        parts["memory"] = moved * c.read
    parts = {name: 1e-6 * value for name, value in parts.items()}
    return parts | {"total": sum(parts.values())}


def unit_area(cost: Cost, constants: Constants = TEXTBOOK) -> float | None:
    """Return the area in um^2 of one arithmetic unit of each kind that the net needs beside binary MACs; None without figures.

    A net whose first and last layer are the only ones of 8 bits needs a multiplier and an accumulator; adds and comparisons an
    adder; multiplies outside of layers one more multiplier, for they run while the binary layers do.
    """
    c = constants
    if c.add_area is None or c.multiply_area is None or c.accumulate_area is None:
        return None
    area = (c.multiply_area + c.accumulate_area) * (cost.float_macs > 0)
    return float(area + c.add_area * (cost.adds + cost.comparisons > 0) + c.multiply_area * (cost.multiplies > 0))
