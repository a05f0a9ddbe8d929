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

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.diagnose.base import Result, check
from qlab.diagnose.functions import Hard, Primitive, Smooth, variant
from qlab.diagnose.objective import LOSSES, Loss, margin
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers.base import Quantizer
from qlab.quantizers.sign import Sign

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["Recorded", "Signal", "Thresholds", "Wake", "record", "signal", "smooth_activations", "thresholds", "wake"]

Floats = NDArray[np.float64]
INPUT = "input"


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


class Recorded(NamedTuple):
    """One forward pass with its graph: logits z (N, d), and outputs and inputs of the modules in the order they ran."""

    z: Tensor
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


def record(net: nn.Module, x: Tensor) -> Recorded:
    """Run a net and keep what every leaf module took and gave; the first entry is the input itself.

    A quantizer counts as a leaf; one under a weight does not run on activations and is left out. A module that runs again is
    named again, with #2.

    Args:
        net: a torch module.
        x: (N, ...) inputs.
    """
    x = x.detach().clone().requires_grad_()
    names, outputs, inputs, handles = [INPUT], [x], [x], []
    modules: list[nn.Module] = [nn.Identity()]
    counts: dict[str, int] = {}
    wholes = tuple(f"{name}." for name, m in net.named_modules() if name and isinstance(m, _QUANTIZERS))

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[object, ...], out: object) -> Tensor | None:
            if not (isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and len(out) == len(x)):
                return None
            counts[name] = counts.get(name, 0) + 1
            names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
            modules.append(module)
            inputs.append(args[0])
            outputs.append(out)
            return out.clone()  # what comes after may write into its input

        handles.append(module.register_forward_hook(hook))

    try:
        for name, module in net.named_modules():
            if ".parametrizations." in f".{name}.":
                continue
            if not name.startswith(wholes) and (isinstance(module, _QUANTIZERS) or not _children(module)):
                watch(name or type(net).__name__, module)
        with torch.enable_grad():
            z = net(x)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded(z, tuple(names), tuple(modules), tuple(outputs), tuple(inputs))


_QUANTIZERS = (Quantizer, Hard, Primitive, Smooth)


def _children(module: nn.Module) -> bool:
    """Return whether a module has parts other than the quantizers of its weights."""
    return any(name != "parametrizations" for name, _ in module.named_children())


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


@dataclass(frozen=True)
class Wake(Result):
    """Gradient norms per layer over temperatures, from one forward pass.

    Attributes:
        betas: (K,) factors on the logits.
        names: (L,) layers, "input" first.
        gradient: (K, L, N) norms by back-propagation.
        lost: (K, L) share of examples whose gradient there is exactly zero.
        certain: (K,) share of examples with p_y == 1.
        gap: (N,) Delta at beta 1.
        dtype: in which all was computed.
        batch: B: gradients are divided by it.
    """

    betas: Floats
    names: tuple[str, ...]
    gradient: Floats
    lost: Floats
    certain: Floats
    gap: Floats
    dtype: torch.dtype
    batch: int

    @property
    def best(self) -> int:
        """Index of the beta with the largest median gradient norm at the input."""
        return int(np.median(self.gradient[:, 0], 1).argmax())

    def frame(self) -> pd.DataFrame:
        """Return one row per beta and layer: median norm, share of examples with no gradient."""
        import pandas as pd

        K, L = self.lost.shape
        return pd.DataFrame(
            {
                "beta": np.repeat(self.betas, L),
                "layer": list(self.names) * K,
                "gradient": np.median(self.gradient, 2).reshape(-1),
                "zero examples": self.lost.reshape(-1),
            }
        )

    def figure(self) -> Figure:
        """Return input gradients and shares of lost examples against beta."""
        from qlab.plots.signal import wake_figure

        return wake_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        at = int(np.abs(np.log(self.betas)).argmin())
        return (
            f"Back-propagated gradient of the net in {str(self.dtype).removeprefix('torch.')}: at beta {self.betas[at]:.3g} the "
            f"input gradient is exactly zero for {self.lost[at, 0]:.0%} of {self.gap.size} examples and its median norm is "
            f"{np.median(self.gradient[at, 0]):.3g}; it is largest at beta {self.betas[self.best]:.3g}, "
            f"{np.median(self.gradient[self.best, 0]):.3g}, with {self.lost[self.best, 0]:.0%} zero."
        )


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
    net, x, loss = _ready(net, x, y, loss, [beta], dtype, batch)
    run = record(net, x)
    grads = _gradients(run, y, loss, torch.tensor([beta], dtype=torch.float64), batch)
    quantized = [isinstance(m, Quantizer) for m in run.modules]
    # The gradient at l passes the backward rules of what runs after l.
    exact = tuple(not any(quantized[l + 1 :]) for l in range(len(quantized)))
    norms, zeros = _norms(grads)
    smoothed = None
    if any(quantized):
        smooth = smooth_activations(net, k)
        if smooth is not None:
            other = record(smooth, x)
            by_name = dict(
                zip(other.names, _norms(_gradients(other, y, loss, torch.tensor([beta]), batch))[0], strict=True)
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


def wake(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    betas: Sequence[float] | Floats,
    *,
    loss: str | Loss = "cross_entropy",
    dtype: torch.dtype | None = None,
    batch: int = 1,
) -> Wake:
    """Return gradient norms per layer for a grid of beta: one forward pass, all backward passes at once.

    Args:
        net: a method or torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        betas: (K,) positive factors on the logits.
        loss: as in `signal`.
        dtype: as in `signal`.
        batch: as in `signal`.

    Raises:
        InputError: betas that are not positive; see also `check`.
        UnknownNameError: no such loss.
    """
    b = torch.as_tensor(np.asarray(betas, dtype=np.float64).reshape(-1))
    net, x, loss = _ready(net, x, y, loss, b.tolist(), dtype, batch)
    run = record(net, x)
    z = run.z.detach()
    with torch.no_grad():
        p = torch.stack([torch.softmax(float(beta) * z, -1).gather(-1, y[:, None])[:, 0] for beta in b])
    # A backward pass keeps a gradient per layer and beta: as many at once as 64 MiB hold.
    size = sum(h.numel() for h in run.outputs) * z.element_size()
    norms, zeros = [], []
    for part in b.split(max(1, 64 * 2**20 // max(1, size))):
        some = _norms(_gradients(run, y, loss, part, batch))
        norms.append(some[0])
        zeros.append(some[1])
    gradient, lost = np.concatenate(norms, 1), np.concatenate(zeros, 1) == 1
    return Wake(
        betas=b.numpy(),
        names=run.names,
        gradient=gradient.transpose(1, 0, 2),
        lost=lost.mean(2).T,
        certain=(p == 1).double().mean(1).cpu().numpy(),
        gap=-margin(z.double(), y).cpu().numpy(),
        dtype=z.dtype,
        batch=batch,
    )


def _ready(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str | Loss,
    betas: Sequence[float],
    dtype: torch.dtype | None,
    batch: int,
) -> tuple[nn.Module, Tensor, Loss]:
    if isinstance(loss, str) and loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    if not betas or not all(math.isfinite(b) and b > 0 for b in betas):
        raise InputError(f"beta must be positive numbers, not {list(betas)[:5]}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch!r}")
    net, _ = check(net, x, y)
    if dtype is not None and dtype != x.dtype:
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating one, not {dtype}")
        net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
        check(net, x, y)
    return net, x, LOSSES[loss] if isinstance(loss, str) else loss


def smooth_activations(net: nn.Module, k: float) -> nn.Module | None:
    """Return the net with its activations as tanh steps; no gradient is taken over the weights, so they stay as deployed."""
    try:
        smooth, deployed = variant(net, "smoothed", k), variant(net, "deployed")
    except InputError:
        return None  # a quantizer without a grid has no jumps to smooth
    for name, layer in deployed.named_modules():
        if name and parametrize.is_parametrized(layer):
            smooth.set_submodule(name, layer)
    return smooth


def _gradients(run: Recorded, y: Tensor, loss: Loss, betas: Tensor, batch: int) -> list[Tensor]:
    """Return g_l for every layer and beta: tensors (K, N, ...)."""
    cotangents = []
    for beta in betas.tolist():
        z = run.z.detach().requires_grad_()
        total = (loss(beta * z, y) / batch).sum()
        cotangents.append(torch.autograd.grad(total, z, allow_unused=True)[0] if total.requires_grad else None)
    ds = torch.stack([torch.zeros_like(run.z) if c is None else c for c in cotangents])
    if not run.z.requires_grad:
        return [h.new_zeros(len(betas), *h.shape) for h in run.outputs]
    grads = torch.autograd.grad(run.z, run.outputs, ds, is_grads_batched=True, allow_unused=True, retain_graph=True)
    return [
        torch.zeros(len(betas), *h.shape, dtype=h.dtype, device=h.device) if g is None else g
        for g, h in zip(grads, run.outputs, strict=True)
    ]


def _norms(grads: list[Tensor]) -> tuple[Floats, Floats]:
    """Return norms and shares of exact zeros (L, K, N) of gradients (K, N, ...)."""
    # In float64: the square of a small half is 0.
    norms = np.stack([g.double().flatten(2).norm(dim=2).cpu().numpy() for g in grads])
    zeros = np.stack([(g == 0).flatten(2).double().mean(2).cpu().numpy() for g in grads])
    return norms, zeros


def _norm(h: Tensor) -> Floats:
    return h.detach().double().flatten(1).norm(dim=1).cpu().numpy()


def _binarizes(module: nn.Module) -> bool:
    return isinstance(module, Sign | nn.Hardtanh) or (isinstance(module, Quantizer) and module.bits == 1)


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
