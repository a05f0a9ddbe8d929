r"""What reaches which layer: activations forward, gradients backward, and where they die.

    h_l             output of module l, in the order in which modules run
    g_l = dl/dh_l   of one example's loss l = loss(beta z, y), by back-propagation: through straight-through rules it is the
                    gradient of no function; from the last quantized activation on it is exact
    gain_l          ||g_l|| / ||g_{l+1}||
    saturation_l    share of pre-activations with |u| > 1 before a sign or hardtanh, where the clipped rule passes nothing
    degenerate_l    share of units with |mean| > standard deviation of u over the examples: they say nearly always the same
    dead_l          share of units whose output is the same for every example

The softmax kills a gradient too. With the gap Delta = z_y - max_{j != y} z_j of the scaled logits, cross-entropy sends back
p - e_y, whose entry y is rounded to 0 for Delta above t_1, which leaves the *wrong direction*, and which is 0 as a whole
above t_2:

    t_1 = -log(half a unit in the last place of 1) + log(d - 1),      t_2 = -log(half the smallest number above 0) - log B

for d - 1 equal competitors and a mean over B examples. Where competitors are added up in the dtype itself, one after the other,
each vanishes alone and t_1 stays that of one competitor: torch does so in float32 on CPUs, but adds halves up in float32.

| dtype    | t_1, d = 2 | t_2 |
|----------|------------|-----|
| float64  | 36.7       | 745 |
| float32  | 16.6       | 104 |
| bfloat16 | 5.5        | 93  |
| float16  | 7.6        | 17.3 |

A small beta shrinks Delta and wakes the gradient up; its direction stays that of the loss at that temperature. It does not repair
what is dead in the net itself.

Shapes: (L, N) for L layers ("input" first) and N examples.

Source: Gupta, Ajanthan, arXiv 2003.13511 (temperature, regimes); Ding et al. 2019, arXiv 1904.02823 (saturation, degeneration);
the thresholds are derived from IEEE 754.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result
from qlab.diagnose.objective import Loss, margin
from qlab.diagnose.recording import layer_gradients, norms_and_zeros, ready, record, smooth_activations, surrogate_steps
from qlab.errors import InputError
from qlab.quantizers.base import Quantizer
from qlab.quantizers.sign import Sign

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Signal", "Thresholds", "signal", "thresholds"]

Floats = NDArray[np.float64]


class Thresholds(NamedTuple):
    """Gaps of the logits from which on cross-entropy's gradient loses entry y, and all of it."""

    wrong: float
    zero: float


def thresholds(dtype: torch.dtype, classes: int = 2, batch: int = 1) -> Thresholds:
    """Return t_1 and t_2 of the module docstring.

    Args:
        dtype: of the logits.
        classes: d; the d - 1 competitors are taken as equal. With one competitor far above the others, d = 2.
        batch: B, of a mean over examples.

    Raises:
        InputError: no floating dtype, fewer than two classes, an empty batch.
    """
    if not dtype.is_floating_point or classes < 2 or batch < 1:
        raise InputError(f"expected a floating dtype, classes >= 2 and batch >= 1; got {dtype}, {classes}, {batch}")
    info = torch.finfo(dtype)
    half = math.log(info.eps / 2)
    smallest = math.log(info.tiny) + half  # half the smallest subnormal, tiny eps / 2, which float64 itself cannot hold
    return Thresholds(-half + math.log(classes - 1), -smallest - math.log(batch))


@dataclass(frozen=True)
class Signal(Result):
    """How the signal goes through a net; see the module docstring.

    Attributes:
        names: (L,) layers, "input" first.
        kinds: (L,) their classes.
        exact: (L,) whether the back-propagated gradient is a true one: no quantizer of activations lies at or behind the layer.
        activation: (L, N) ||h_l||.
        gradient: (L, N) ||g_l|| by back-propagation.
        smoothed: (L, N) the same with tanh steps for activations, the true gradient of a function near the net, whose weights are
            the deployed ones; None where all is exact, or nothing can be smoothed.
        zeros: (L, N) share of entries of g_l that are exactly 0.
        saturation: (L,) share of |pre-activation| > 1; NaN where it means nothing.
        degenerate: (L,) share of units with |mean| > std of their pre-activation; NaN where it means nothing.
        dead: (L,) share of units with the same output for every example; NaN for the input.
        gap: (N,) Delta of the logits, times beta.
        certain: (N,) whether p_y == 1 in the dtype.
        beta: factor on the logits.
        batch: B: gradients are divided by it, as a mean over B examples does.
        classes: d.
        dtype: in which all was computed.
        k: sharpness of the tanh steps.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    exact: tuple[bool, ...]
    activation: Floats
    gradient: Floats
    smoothed: Floats | None
    zeros: Floats
    saturation: Floats
    degenerate: Floats
    dead: Floats
    gap: Floats
    certain: NDArray[np.bool_]
    beta: float
    batch: int
    classes: int
    dtype: torch.dtype
    k: float

    @property
    def gain(self) -> Floats:
        """Median over examples of ||g_l|| / ||g_{l+1}||, (L,); NaN where a gradient is 0, and for the last layer."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.gradient[:-1] / self.gradient[1:]
        ratio[~np.isfinite(ratio) | (ratio == 0)] = np.nan
        return np.array([*(_median(row) for row in ratio), np.nan])

    @property
    def lost(self) -> float:
        """Share of examples whose input gradient is exactly zero."""
        return float((self.zeros[0] == 1).mean())

    @property
    def thresholds(self) -> Thresholds:
        """The gaps from which on the softmax's gradient is wrong, and zero, for one competitor."""
        return thresholds(self.dtype, 2, self.batch)

    @property
    def regimes(self) -> dict[str, float]:
        """Shares of examples by the gap: healthy, wrong direction, zero."""
        wrong, zero = self.thresholds
        return {
            "healthy": float((self.gap < wrong).mean()),
            "wrong direction": float(((self.gap >= wrong) & (self.gap < zero)).mean()),
            "zero": float((self.gap >= zero).mean()),
        }

    def frame(self) -> pd.DataFrame:
        """Return one row per layer with medians over examples."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.names,
                "kind": self.kinds,
                "exact": self.exact,
                "activation": np.median(self.activation, 1),
                "gradient": np.median(self.gradient, 1),
                "smoothed": np.nan if self.smoothed is None else np.median(self.smoothed, 1),
                "gain": self.gain,
                "saturation": self.saturation,
                "degenerate": self.degenerate,
                "dead": self.dead,
                "zero entries": self.zeros.mean(1),
                "zero examples": (self.zeros == 1).mean(1),
            }
        )

    def figure(self) -> Figure:
        """Return gradient norms per layer on a log axis, saturation and dead units, and the gaps with the dtype's thresholds."""
        from qlab.plots.signal import signal_figure

        return signal_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        wrong, zero = self.thresholds
        which = "exact" if all(self.exact) else "deployed forward, surrogate backward"
        text = (
            f"Signal of the net ({which}) in {str(self.dtype).removeprefix('torch.')} at beta {self.beta:g}, "
            f"{self.gap.size} examples: median gap of the logits {np.median(self.gap):.3g}; above {wrong:.1f} the gradient has the "
            f"wrong direction ({self.regimes['wrong direction']:.0%} of examples), above {zero:.0f} it is zero "
            f"({self.regimes['zero']:.0%}). p_y is exactly 1 for {self.certain.mean():.0%}, the input gradient exactly 0 for "
            f"{self.lost:.0%}; its median norm is {np.median(self.gradient[0]):.3g}, at the logits "
            f"{np.median(self.gradient[-1]):.3g}."
        )
        if self.smoothed is not None:
            text += f" Of the smoothed function (sharpness {self.k:g}) it is {np.median(self.smoothed[0]):.3g} at the input."
        if np.isfinite(self.saturation).any():
            i = int(np.nanargmax(self.saturation))
            text += f" Most saturated: {self.names[i]}, {self.saturation[i]:.0%} of pre-activations beyond 1."
        dead = np.nan_to_num(self.dead)
        if dead.max() > 0:
            text += f" Dead units: up to {dead.max():.0%} ({self.names[int(dead.argmax())]})."
        return text


def signal(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    k: float = 5.0,
    dtype: torch.dtype | None = None,
    batch: int = 1,
) -> Signal:
    """Return norms of activations and gradients per layer, saturation, dead units and the state of the softmax.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        loss: a name of `qlab.diagnose.objective.LOSSES`, or logits and labels to one loss per example.
        beta: factor on the logits.
        k: sharpness of the smoothed function's tanh steps.
        dtype: compute in it, on a copy of the net; its own by default.
        batch: B of a mean over B examples.

    Raises:
        InputError: beta or batch that are not positive; see also `check`.
        UnknownNameError: no such loss.
    """
    net, x, loss = ready(net, x, y, loss, [beta], dtype, batch)
    run = record(net, x)
    grads = layer_gradients(run, y, loss, torch.tensor([beta], dtype=torch.float64), batch)
    steps = surrogate_steps(net, x, run)
    # The gradient at l passes the backward rules of what runs after l.
    exact = tuple(not any(steps[l + 1 :]) for l in range(len(run.names)))
    norms, zeros = norms_and_zeros(grads)
    smoothed = None
    declared = [isinstance(m, Quantizer) for m in run.modules]
    if any(declared) and steps == [*declared, False]:  # code that is not declared has no known jumps to smooth
        smooth = smooth_activations(net, k)
        if smooth is not None:
            other = record(smooth, x)
            by_name = dict(
                zip(
                    other.names,
                    norms_and_zeros(layer_gradients(other, y, loss, torch.tensor([beta]), batch))[0],
                    strict=True,
                )
            )
            smoothed = np.stack([by_name[name][0] for name in run.names]) if set(run.names) <= set(by_name) else None
    z = run.z.detach()
    p = torch.softmax(beta * z, -1).gather(-1, y[:, None])[:, 0]
    return Signal(
        names=run.names,
        kinds=("", *(type(m).__name__ for m in run.modules[1:])),
        exact=exact,
        activation=np.stack([_norm(h) for h in run.outputs]),
        gradient=norms[:, 0],
        smoothed=smoothed,
        zeros=zeros[:, 0],
        saturation=np.array([_saturation(m, u) for m, u in zip(run.modules, run.inputs, strict=True)]),
        degenerate=np.array([_degenerate(m, u) for m, u in zip(run.modules, run.inputs, strict=True)]),
        dead=np.array([math.nan, *(_dead(h) for h in run.outputs[1:])]),
        gap=-beta * margin(z.double(), y).cpu().numpy(),
        certain=(p == 1).cpu().numpy(),
        beta=float(beta),
        batch=batch,
        classes=z.shape[1],
        dtype=z.dtype,
        k=k,
    )


def _norm(h: Tensor) -> Floats:
    return h.detach().double().flatten(1).norm(dim=1).cpu().numpy()


def _binarizes(module: nn.Module) -> bool:
    if type(module) is nn.Hardtanh:  # of its subclasses, ReLU6 is one that binarizes nothing
        return (module.min_val, module.max_val) == (-1, 1)
    return isinstance(module, Sign) or (isinstance(module, Quantizer) and module.bits == 1)


def _saturation(module: nn.Module, u: Tensor) -> float:
    return float((u.detach().abs() > 1).double().mean()) if _binarizes(module) else math.nan


def _degenerate(module: nn.Module, u: Tensor) -> float:
    if not _binarizes(module) or len(u) < 2:
        return math.nan
    units = _units(u).double()
    return float((units.mean(1).abs() > units.std(1, correction=0)).double().mean())


def _dead(h: Tensor) -> float:
    if len(h) < 2:
        return math.nan
    units = _units(h)
    return float((units.amax(1) == units.amin(1)).double().mean())


def _units(h: Tensor) -> Tensor:
    """Return what every unit, or channel of a picture, gives for every example and place: (units, ...)."""
    h = h.detach()
    return h.flatten(2).transpose(0, 1).flatten(1) if h.dim() > 2 else h.T


def _median(row: Floats) -> float:
    finite = row[np.isfinite(row)]
    return float(np.median(finite)) if finite.size else math.nan
