r"""The parts of a repairable binary net: one convolution with everything that the topology repairs put around it.

    unit:   v = norm(x)                                      feature normalization, x and v real
            y = conv(Sgn(v))                                 or the ensemble  sum_m a_m conv_m(Sgn(v - theta_m))
            y = scale * y;   y = gate * y                    scaling factor, squeeze and excitation
            z = BN(y) + S(x)                                 S where the unit has a shortcut
            out = f(z)                                       activation

Order "conv_bn" is this; order "bn_conv" puts the batch norm before norm(x) and has none behind the convolution.

Sgn stands for a Hardtanh module, the nonlinearity that a binary method replaces. Everything else that is not to be replaced or
binarized (activations, gates, float shortcuts) is a module of its own kind here, which `qlab.quantize` leaves alone.

Source: de Putter, Corporaal, arXiv 2206.12322 (categories); Liu et al., ReActNet, ECCV 2020, arXiv 2003.03488 (RSign, RPReLU,
duplicated shortcut); Martinez et al., Real-to-Binary, ICLR 2020, arXiv 2003.11535 (gate); Bulat, Tzimiropoulos, XNOR-Net++, BMVC
2019, arXiv 1909.13863 (rank-one scale); Rastegari et al., XNOR-Net, arXiv 1603.05279 (map of input scales); Lin et al., ABC-Net,
arXiv 1711.11294, and Zhuang et al., Group-Net, arXiv 1811.10413 (ensembles); Lin et al. of ReCU, arXiv 2103.12369 (std_sample).

Shapes: x (N, C, H, W), v like x, y and z (N, O, H / stride, W / stride).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlab.errors import InputError
from qlab.models.base import batch_norm

__all__ = [
    "CHOICES",
    "Centre",
    "ChannelScale",
    "Clip",
    "Deviation",
    "Duplicate",
    "Ensemble",
    "FloatConv",
    "Gate",
    "InputScale",
    "PadChannels",
    "RPReLU",
    "RankOneScale",
    "Rectifier",
    "Repairs",
    "Threshold",
    "Unit",
]

CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("conv_bn", "bn_conv"),
    "activation": ("identity", "relu", "hardtanh", "prelu", "rprelu"),
    "downsample": ("pool", "subsample", "duplicate", "float", "binary"),
    "feature_norm": ("none", "bn", "bn_noaffine", "rsign", "center_sample", "std_sample"),
    "scaling": ("none", "learned", "xnorpp", "input_map"),
    "squeeze_excite": ("none", "gate", "output"),
}
"""The values of every switch that has names."""

MAX_BRANCHES = 16


@dataclass(frozen=True)
class Repairs:
    """The topology switches of a unit.

    Args:
        order: "conv_bn" or "bn_conv".
        double_residual: every convolution has a shortcut of its own, not every second one.
        activation: f behind the sum.
        downsample: S where the image halves.
        feature_norm: what happens to x before Sgn.
        scaling: of the convolution's output.
        squeeze_excite: "gate" from the input of Sgn, "output" from the convolution's output.
        reduction: of the gate's hidden channels.
        gate_bias: biases in the gate's two layers.
        ensemble: branches.
        affine: batch norm has scale and shift.

    Raises:
        InputError: for a value that a switch does not have.
    """

    order: str = "conv_bn"
    double_residual: bool = False
    activation: str = "identity"
    downsample: str = "pool"
    feature_norm: str = "none"
    scaling: str = "none"
    squeeze_excite: str = "none"
    reduction: int = 8
    gate_bias: bool = False
    ensemble: int = 1
    affine: bool = True

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.ensemble > MAX_BRANCHES:
            raise InputError(f"ensemble is {self.ensemble}; expected at most {MAX_BRANCHES} branches.")


# ------------------------------------------------------------------------------------------- feature normalization (norm)


class Threshold(nn.Module):
    """x - theta of each channel: with a sign behind it, RSign."""

    def __init__(self, channels: int, start: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """Return x - theta."""
        return x - self.theta[:, None, None]


class Centre(nn.Module):
    """x minus its mean over the positions of each sample and channel: a threshold that depends on the sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x - mean_{h,w}(x)."""
        return x - x.mean((2, 3), keepdim=True)


class Deviation(nn.Module):
    """x over the deviation of each sample: no sign changes, only where the slope of a surrogate lies."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x / std_{c,h,w}(x), of n values, not n - 1."""
        return x / x.std((1, 2, 3), correction=0, keepdim=True).clamp(min=1e-5)


# -------------------------------------------------------------------------------------------------------- activations (f)


class Rectifier(nn.Module):
    """max(0, x); no nn.ReLU, which a binary method would replace."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(0, x)."""
        return F.relu(x)


class Clip(nn.Module):
    """clip(x, -1, 1); no nn.Hardtanh, which a binary method would replace."""

    def forward(self, x: Tensor) -> Tensor:
        """Return clip(x, -1, 1)."""
        return F.hardtanh(x)


class RPReLU(nn.Module):
    """ReActNet's: f(x) = (x - gamma if x > gamma, else b (x - gamma)) + zeta of each channel; at the start 0, 1/4, 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.zeta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        return F.prelu(x - self.gamma[:, None, None], self.slope) + self.zeta[:, None, None]


# ------------------------------------------------------------------------------------- scaling factors, gates, ensembles


class ChannelScale(nn.Module):
    """y times a trained factor of each channel, 1 at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor) -> Tensor:
        """Return alpha_c y."""
        return y * self.alpha[:, None, None]


class RankOneScale(nn.Module):
    """XNOR-Net++: y times alpha_c beta_h gamma_w, trained, 1 at the start. Bound to one image size."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.ones(height))
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor) -> Tensor:
        """Return alpha_c beta_h gamma_w y."""
        return y * (self.alpha[:, None, None] * self.beta[:, None] * self.gamma)


class InputScale(nn.Module):
    """XNOR-Net's K: the mean of |v| over channels, averaged over the convolution's 3x3 window; the border counts as zeros."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, v: Tensor) -> Tensor:
        """Return K (N, 1, H / stride, W / stride) for v (N, C, H, W)."""
        return F.avg_pool2d(v.abs().mean(1, keepdim=True), 3, stride=self.stride, padding=1)


class Gate(nn.Module):
    """Squeeze and excitation: sigmoid(U2 relu(U1 mean_{h,w}(v))), a factor in (0, 1) for each output channel.

    The two matrices are parameters of this module and no Linear layers: they stay float in a binary net.
    """

    def __init__(self, channels: int, planes: int, reduction: int, bias: bool) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Parameter(torch.empty(hidden, channels))
        self.excite = nn.Parameter(torch.empty(planes, hidden))
        for matrix in (self.squeeze, self.excite):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as nn.Linear starts
        self.squeeze_bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.excite_bias = nn.Parameter(torch.zeros(planes)) if bias else None

    def forward(self, v: Tensor) -> Tensor:
        """Return the factors (N, O, 1, 1) for v (N, C, H, W)."""
        hidden = F.relu(F.linear(v.mean((2, 3)), self.squeeze, self.squeeze_bias))
        return torch.sigmoid(F.linear(hidden, self.excite, self.excite_bias))[:, :, None, None]


class Ensemble(nn.Module):
    """sum_m a_m conv_m(Sgn(v - theta_m)): M binary convolutions at thresholds spread over [-1/2, 1/2], a_m = 1/M at the start."""

    def __init__(self, branches: int, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        starts = torch.linspace(-0.5, 0.5, branches, device="cpu").tolist()
        self.branches = nn.ModuleList(
            nn.Sequential(Threshold(1, start), nn.Hardtanh(), _conv3(channels, planes, stride)) for start in starts
        )
        self.weights = nn.Parameter(torch.full((branches,), 1 / branches))

    def forward(self, v: Tensor) -> Tensor:
        """Return the weighted sum of the branches."""
        return sum(self.weights[m] * branch(v) for m, branch in enumerate(self.branches))


# -------------------------------------------------------------------------------------------------------- shortcuts (S)


class PadChannels(nn.Module):
    """Zero channels on both sides, so that there are `planes`; every second pixel only, where `subsample` is set."""

    def __init__(self, channels: int, planes: int, subsample: bool) -> None:
        super().__init__()
        self.before = (planes - channels) // 2
        self.after = planes - channels - self.before
        self.step = 2 if subsample else 1

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H, W), or half the sides."""
        return F.pad(x[:, :, :: self.step, :: self.step], (0, 0, 0, 0, self.before, self.after))


class Duplicate(nn.Module):
    """The channels side by side, as often as they fit into `planes`."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        if planes % channels:
            raise InputError(
                f"downsample 'duplicate' takes {channels} channels a whole number of times; {planes} are no multiple. "
                "Choose other multiples, or downsample='pool'."
            )
        self.times = planes // channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H, W)."""
        return torch.cat([x] * self.times, 1)


class FloatConv(nn.Module):
    """A 1x1 convolution that stays float in a binary net: no nn.Conv2d, whose weights a binary method would take."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(planes, channels, 1, 1))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, planes, H, W)."""
        return F.conv2d(x, self.weight)


def shortcut(channels: int, planes: int, stride: int, repairs: Repairs) -> nn.Module:
    """Return S: the identity where nothing changes, else what `repairs.downsample` names."""
    if stride == 1 and channels == planes:
        return nn.Identity()
    if repairs.downsample == "subsample":
        return PadChannels(channels, planes, stride == 2)
    pool: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
    if repairs.downsample == "pool":
        return nn.Sequential(*pool, PadChannels(channels, planes, False))
    if repairs.downsample == "duplicate":
        return nn.Sequential(*pool, Duplicate(channels, planes))
    if repairs.downsample == "float":
        return nn.Sequential(*pool, FloatConv(channels, planes), batch_norm(planes, repairs.affine))
    conv = nn.Conv2d(channels, planes, 1, bias=False)
    return nn.Sequential(*pool, nn.Hardtanh(), conv, batch_norm(planes, repairs.affine))


# ------------------------------------------------------------------------------------------------------------- the unit


def _conv3(channels: int, planes: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)


def _activation(name: str, channels: int) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "identity": nn.Identity,
        "relu": Rectifier,
        "hardtanh": Clip,
        "prelu": lambda: nn.PReLU(channels),
        "rprelu": lambda: RPReLU(channels),
    }
    return makers[name]()


def _norm(channels: int, repairs: Repairs) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "bn": lambda: batch_norm(channels, repairs.affine),
        "bn_noaffine": lambda: batch_norm(channels, False),
        "rsign": lambda: Threshold(channels),
        "center_sample": Centre,
        "std_sample": Deviation,
    }
    norm = makers[repairs.feature_norm]()
    return nn.Sequential(batch_norm(channels, repairs.affine), norm) if repairs.order == "bn_conv" else norm


class Unit(nn.Module):
    """One 3x3 convolution with its repairs.

    Args:
        channels: of the input.
        planes: of the output.
        stride: 1 or 2.
        size: (H, W) of the output.
        repairs: the switches.
        source: channels and stride of the shortcut, counted from where it starts; None for no shortcut.
    """

    def __init__(
        self,
        channels: int,
        planes: int,
        stride: int,
        size: tuple[int, int],
        repairs: Repairs,
        source: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        r = repairs
        self.norm = _norm(channels, r)
        # In the order in which they run; each is there only where its switch is on.
        self.gate = Gate(channels, planes, r.reduction, r.gate_bias) if r.squeeze_excite == "gate" else None
        self.input_scale = InputScale(stride) if r.scaling == "input_map" else None
        if r.ensemble > 1:
            self.conv: nn.Module = Ensemble(r.ensemble, channels, planes, stride)
        else:
            self.conv = nn.Sequential(nn.Hardtanh(), _conv3(channels, planes, stride))
        scales: dict[str, Callable[[], nn.Module]] = {
            "learned": lambda: ChannelScale(planes),
            "xnorpp": lambda: RankOneScale(planes, *size),
        }
        self.scale = scales.get(r.scaling, nn.Identity)()
        self.output_gate = Gate(planes, planes, r.reduction, r.gate_bias) if r.squeeze_excite == "output" else None
        self.bn = batch_norm(planes, r.affine) if r.order == "conv_bn" else nn.Identity()
        self.shortcut = None if source is None else shortcut(source[0], planes, source[1], r)
        self.activation = _activation(r.activation, planes)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Return (N, planes, H / stride, W / stride) for x (N, channels, H, W).

        Args:
            x: what the convolution reads.
            source: what the shortcut, where there is one, starts from.
        """
        v = self.norm(x)
        s = None if self.gate is None else self.gate(v)
        K = None if self.input_scale is None else self.input_scale(v)
        y = self.conv(v)
        y = self.scale(y if K is None else y * K)
        if self.output_gate is not None:
            s = self.output_gate(y)
        z = self.bn(y if s is None else y * s)
        return self.activation(z if self.shortcut is None else z + self.shortcut(source))
