r"""The loss landscape of a quantized net: several of its functions on one line or plane of latent weights.

    land = landscape(net, x, y, random_direction(net, 0), random_direction(net, 1))
    L_f(a, b) = mean_n loss(f(x_n; w + a d1 + b d2), y_n),        f one of deployed, latent, surrogate, smoothed

Beside loss and accuracy stands the share of quantized weights whose deployed value differs from that at (0, 0): lines of equal
share tell how far the deployed net has moved, where a and b only tell of the latent weights. If w_i and d_i are normal with equal
scale, the share on a line is arctan(a) / pi.

Batch norm is "frozen" (running statistics of the net, or on their way to the other net's where a direction moves them) or
"reestimated" on the batch at every point, which hides every change of scale. The two tell different stories; say which.

Source: Li, Xu, Taylor, Studer, Goldstein 2018, arXiv 1712.09913.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.base import Result, check, plain
from qlab.diagnose.functions import FUNCTIONS, FunctionName, variant
from qlab.diagnose.objective import Loss
from qlab.diagnose.plane_eval import Affine, BatchNormMode, Many
from qlab.errors import DataFileError, InputError, UnknownNameError
from qlab.quantizers import quantized_tensors, quantizers

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["DEFAULT_FUNCTIONS", "Landscape", "Views", "landscape", "load_landscape"]

Array = NDArray[np.float64]
Span = float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]
DEFAULT_FUNCTIONS: tuple[FunctionName, ...] = ("deployed", "latent", "smoothed")
_MOST = 1_000_000  # points


@dataclass(frozen=True)
class Landscape(Result):
    """Loss and accuracy of several functions of one net on one line or plane.

    Args:
        a: (A,) coordinates along the first direction.
        b: (B,) along the second; (1,), a zero, for a line.
        loss: function -> (A, B).
        accuracy: function -> (A, B).
        noise: function -> (A, B) standard deviation of the loss over mini-batches; NaN where that was not asked for.
        flipped: (A, B) share of the quantized weights that differ from those at (0, 0); NaN for a net without any.
        evaluated: (A, B), False where a value is interpolated between the corners of its cell.
        sharpness: k of "smoothed".
        batch_norm: "frozen" or "reestimated".
        examples: N.
        batches: mini-batches that `noise` is over.
        loss_name: of the loss.
        directions: what a and b are, in words.
        digest: of the net, the data, the directions and the settings.
    """

    a: Array
    b: Array
    loss: dict[str, Array]
    accuracy: dict[str, Array]
    noise: dict[str, Array]
    flipped: Array
    evaluated: NDArray[np.bool_]
    sharpness: float = 5.0
    batch_norm: str = "frozen"
    examples: int = 0
    batches: int = 0
    loss_name: str = "cross_entropy"
    directions: tuple[str, ...] = ("first direction", "second direction")
    digest: str = field(default="", repr=False)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions looked at."""
        return tuple(self.loss)

    @property
    def line(self) -> bool:
        """Whether this is a line and no plane."""
        return len(self.b) == 1

    def scale(self) -> tuple[float, float, bool]:
        """Return the range of loss that all functions are drawn in, and whether it is logarithmic.

        The top is the 95th percentile, so that a steep corner does not flatten everything else.
        """
        values = np.concatenate([v[np.isfinite(v)] for v in self.loss.values()])
        if not values.size:
            return 0.0, 1.0, False
        low, high = float(values.min()), float(np.quantile(values, 0.95))
        high = high if high > low else low + 1.0
        log = low > 0 and high / low > 20
        return low, high, log

    def frame(self) -> pd.DataFrame:
        """Return one row per point and function: a, b, function, loss, accuracy, noise, flipped, evaluated."""
        import pandas as pd

        a, b = np.meshgrid(self.a, self.b, indexing="ij")
        parts = [
            pd.DataFrame(
                {
                    "a": a.ravel(),
                    "b": b.ravel(),
                    "function": name,
                    "loss": self.loss[name].ravel(),
                    "accuracy": self.accuracy[name].ravel(),
                    "noise": self.noise[name].ravel(),
                    "flipped": self.flipped.ravel(),
                    "evaluated": self.evaluated.ravel(),
                }
            )
            for name in self.functions
        ]
        return pd.concat(parts, ignore_index=True)

    def figure(self) -> Figure:
        """Return the functions side by side on one colour scale with lines of equal flips, or as curves for a line."""
        from qlab.plots.landscape import landscape_figure

        return landscape_figure(self)

    def centre(self) -> tuple[int, int]:
        """Return the indices of the point nearest to (0, 0)."""
        return int(np.abs(self.a).argmin()), int(np.abs(self.b).argmin())

    def summary(self) -> str:
        """Return what each function does around the net, in words."""
        where = "line" if self.line else "plane"
        size = f"{len(self.a)}" if self.line else f"{len(self.a)} x {len(self.b)}"
        done = int(self.evaluated.sum())
        part = "" if done == self.evaluated.size else f", {done} of them evaluated and the rest interpolated"
        text = (
            f"Loss ({self.loss_name}) on {self.examples} examples at {size} points of a {where}{part}; "
            f"batch norm {'frozen' if self.batch_norm == 'frozen' else 're-estimated at every point'}."
        )
        at = self.centre()
        for name in self.functions:
            loss = np.where(self.evaluated, self.loss[name], np.nan)
            low, high = (
                np.unravel_index(np.nanargmin(loss), loss.shape),
                np.unravel_index(np.nanargmax(loss), loss.shape),
            )
            sharp = f" (k = {self.sharpness:g})" if name == "smoothed" else ""
            text += (
                f" {name.capitalize()}{sharp}: loss {self.loss[name][at]:.3g} and accuracy {self.accuracy[name][at]:.1%} at the "
                f"centre, from {loss[low]:.3g} at {self._place(low)} to {loss[high]:.3g} at {self._place(high)}."
            )
        if np.isfinite(self.flipped).all():
            text += f" Up to {self.flipped.max():.1%} of the quantized weights are flipped."
        else:
            text += " No weights are quantized."
        noise = self.noise[self.functions[0]][at]
        if np.isfinite(noise):
            text += (
                f" Over {self.batches} mini-batches the {self.functions[0]} loss at the centre has standard deviation "
                f"{noise:.2g}."
            )
        return text

    def _place(self, at: Any) -> str:
        i, j = at
        return f"a = {self.a[i]:.3g}" if self.line else f"({self.a[i]:.3g}, {self.b[j]:.3g})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all arrays and settings to one file (npz, no pickle), whole or not at all."""
        path = pathlib.Path(path)
        keys = ("sharpness", "batch_norm", "examples", "batches", "loss_name", "directions", "functions", "digest")
        arrays: dict[str, Any] = {
            "said": np.array(json.dumps({key: getattr(self, key) for key in keys})),
            "a": self.a,
            "b": self.b,
        }
        for key in ("loss", "accuracy", "noise"):
            arrays[key] = np.stack([getattr(self, key)[f] for f in self.functions])
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez(file, flipped=self.flipped, evaluated=self.evaluated, **arrays)
        part.replace(path)


def load_landscape(path: str | os.PathLike[str]) -> Landscape:
    """Return a landscape that `Landscape.save` wrote; nothing from the file is run.

    Raises:
        DataFileError: no such file, or one that is truncated, corrupt or something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataFileError(f"there is no file {path.name!r}; save a landscape first")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        said = json.loads(str(arrays["said"]))
        names = tuple(str(name) for name in said["functions"])
        shape = (len(arrays["a"]), len(arrays["b"]))
        for key in ("loss", "accuracy", "noise"):
            if arrays[key].shape != (len(names), *shape) or arrays[key].dtype != np.float64:
                raise ValueError(f"{key} has shape {arrays[key].shape}")
        if arrays["flipped"].shape != shape or arrays["evaluated"].shape != shape or arrays["evaluated"].dtype != bool:
            raise ValueError("arrays of different shapes")
        done = arrays["evaluated"]
        if any(name not in FUNCTIONS for name in names) or not bool(done.any()):
            raise ValueError("unknown functions or nothing evaluated")
        return Landscape(
            a=arrays["a"].astype(np.float64),
            b=arrays["b"].astype(np.float64),
            **{key: dict(zip(names, arrays[key], strict=True)) for key in ("loss", "accuracy", "noise")},
            flipped=arrays["flipped"].astype(np.float64),
            evaluated=done,
            sharpness=float(said["sharpness"]),
            batch_norm=str(said["batch_norm"]),
            examples=int(said["examples"]),
            batches=int(said["batches"]),
            loss_name=str(said["loss_name"]),
            directions=tuple(str(d) for d in said["directions"]),
            digest=str(said["digest"]),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise DataFileError(f"{path.name!r} is no landscape that this qlab wrote, or it is corrupt: {error}") from error


def landscape(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    d1: Mapping[str, Tensor],
    d2: Mapping[str, Tensor] | None = None,
    span: Span = 1.0,
    points: int | tuple[int, int] = 51,
    functions: Sequence[FunctionName] | None = None,
    loss: str | Loss = "cross_entropy",
    sharpness: float = 5.0,
    batch_norm: BatchNormMode = "frozen",
    batches: int = 0,
    names: Sequence[str] = (),
) -> Landscape:
    """Evaluate functions of a net on a line w + a d1, or a plane w + a d1 + b d2.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        d1: a direction, as from `qlab.diagnose.directions`: name of a parameter or running statistic -> tensor.
        d2: another for a plane.
        span: s for [-s, s]; (low, high); or a pair of those for a and b.
        points: in each direction, or a pair. An odd number has the net itself in the middle.
        functions: names of `FUNCTIONS`; by default deployed, latent and smoothed. A net without quantizers has only one.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        sharpness: k of "smoothed".
        batch_norm: "frozen" or "reestimated" on the batch at every point.
        batches: mini-batches to give the noise of the loss over; 0 for none.
        names: what a and b are, in words.

    Raises:
        InputError, UnknownNameError: see `qlab.diagnose.base.check`, `variant`; directions that do not fit, are zero or would
            make a variance negative; a span or number of points that makes no lattice.
    """
    views = Views(net, x, y, d1, d2, span, points, functions, loss, sharpness, batch_norm, batches, names)
    i, j = np.meshgrid(np.arange(len(views.a)), np.arange(len(views.b)), indexing="ij")
    found = views.at(i.ravel(), j.ravel())
    return views.landscape(
        {key: v.reshape(*v.shape[:-1], *i.shape) for key, v in found.items()}, np.ones(i.shape, bool)
    )


class Views:
    """Several functions of a net over one lattice: what `landscape` and `landscaping` evaluate. Arguments as of `landscape`."""

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        d1: Mapping[str, Tensor],
        d2: Mapping[str, Tensor] | None = None,
        span: Span = 1.0,
        points: int | tuple[int, int] = 51,
        functions: Sequence[FunctionName] | None = None,
        loss: str | Loss = "cross_entropy",
        sharpness: float = 5.0,
        batch_norm: BatchNormMode = "frozen",
        batches: int = 0,
        names: Sequence[str] = (),
    ) -> None:
        from qlab.diagnose.directions import normalised

        net = plain(net)
        check(net, x, y)
        pair = [normalised(net, d, None) for d in (d1, d2) if d is not None]  # checks names and shapes
        for which, d in zip(("first", "second"), pair, strict=False):
            if not any(bool(t.any()) for t in d.values()):
                raise InputError(f"the {which} direction is zero everywhere; a line needs somewhere to go")
        self.a, self.b = axes(span, points, len(pair))
        self.functions = _functions(net, functions)
        many = [Many(variant(net, f, sharpness), x, y, loss, batch_norm, batches) for f in self.functions]
        self.evaluators = [Affine(one, pair) for one in many]
        self.flips = Flips(net, pair)
        self._sanity(net, pair)
        self.said: dict[str, Any] = {
            "sharpness": float(sharpness),
            "batch_norm": batch_norm,
            "examples": len(x),
            "batches": batches,
            "loss_name": loss if isinstance(loss, str) else getattr(loss, "__name__", "own loss"),
            "directions": tuple(names) or ("first direction", "second direction")[: len(pair)],
        }
        self.digest = _digest(net, x, y, pair, {**self.said, "functions": self.functions}, self.a, self.b)

    def at(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> dict[str, Array]:
        """Return loss, accuracy and noise (F, K), and flipped (K,), of lattice points (a_i, b_j)."""
        c = np.stack([self.a[i], self.b[j]], 1)[:, : 1 if len(self.b) == 1 else 2]
        rows = torch.from_numpy(np.ascontiguousarray(c))
        values = [evaluate(rows) for evaluate in self.evaluators]
        found = {
            key: np.stack([getattr(v, key).cpu().numpy() for v in values]) for key in ("loss", "accuracy", "noise")
        }
        return found | {"flipped": self.flips(rows).cpu().numpy()}

    def landscape(self, arrays: Mapping[str, Array], evaluated: NDArray[np.bool_]) -> Landscape:
        """Return the result of arrays (F, A, B), and flipped (A, B)."""
        by: dict[str, Any] = {
            key: dict(zip(self.functions, arrays[key], strict=True)) for key in ("loss", "accuracy", "noise")
        }
        return Landscape(
            self.a, self.b, **by, flipped=arrays["flipped"], evaluated=evaluated, **self.said, digest=self.digest
        )

    def _sanity(self, net: nn.Module, pair: Sequence[Mapping[str, Tensor]]) -> None:
        """Refuse a span on which a running variance would become negative: the loss there would be NaN."""
        ends = [(float(v[0]), float(v[-1])) for v in (self.a, self.b)]
        for name, t in net.named_buffers():
            if name.endswith("running_var"):
                lowest = t.double().clone()
                for d, (low, high) in zip(pair, ends, strict=False):
                    if name in d:
                        lowest += torch.minimum(low * d[name].double(), high * d[name].double())
                if bool((lowest < 0).any()):
                    raise InputError(
                        f"{name!r} would become negative within the span; take a narrower one, such as (0, 1)"
                    )


class Flips:
    """The share of quantized weights whose deployed value is not that at the origin, at w + sum_m c_m d_m."""

    def __init__(self, net: nn.Module, directions: Sequence[Mapping[str, Tensor]]) -> None:
        names = {id(p): name for name, p in net.named_parameters()}
        self.tensors = [(names[id(q.latent)], q.latent.detach(), q.quantizer) for q in quantized_tensors(net)]
        self.n = sum(w.numel() for _, w, _ in self.tensors)
        self.directions = directions

    @torch.no_grad()
    def __call__(self, coefficients: Tensor) -> Tensor:
        """Return the shares (K,), float64, at coefficients (K, M); NaN for a net without quantized weights."""
        if not self.n:
            return torch.full((len(coefficients),), float("nan"), dtype=torch.float64)
        count = torch.zeros(len(coefficients), dtype=torch.float64)
        for name, w, quantizer in self.tensors:
            moving = [d[name] if name in d else torch.zeros_like(w) for d in self.directions]
            if not any(bool(d.any()) for d in moving):
                continue
            basis = torch.stack([w, *moving]).flatten(1)
            here = _side(quantizer, w).flatten()
            chunk = max(1, (1 << 20) // w.numel())
            for i in range(0, len(coefficients), chunk):
                rows = coefficients[i : i + chunk].to(w)
                there = (torch.cat([torch.ones_like(rows[:, :1]), rows], 1) @ basis).view(-1, *w.shape)
                count[i : i + chunk] += (_side(quantizer, there, batched=True).flatten(1) != here).sum(1)
        return count / self.n


def _side(quantizer: Any, w: Tensor, batched: bool = False) -> Tensor:
    if quantizer.bits == 1:
        return w >= 0
    return torch.func.vmap(quantizer.hard)(w) if batched else quantizer.hard(w)


def axes(span: Span, points: int | tuple[int, int], dimensions: int) -> tuple[Array, Array]:
    """Return the coordinates (A,) and (B,) of a lattice.

    Raises:
        InputError: a span or number of points that makes none.
    """
    sizes = points if isinstance(points, tuple) else (points, points)
    if len(sizes) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 2 for n in sizes):
        raise InputError(f"points is {points!r}; expected a whole number of at least 2, or a pair of them")
    if sizes[0] * (sizes[1] if dimensions == 2 else 1) > _MOST:
        raise InputError(f"{points} points a side are more than {_MOST:,}; take fewer")
    try:
        given: Any = (-float(span), float(span)) if isinstance(span, int | float) else span
        both = (given, given) if isinstance(given[0], int | float) else given
        (low, high), (bottom, top) = ((float(v), float(w)) for v, w in both)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"span is {span!r}; expected s, (low, high), or a pair of those") from error
    if not (all(math.isfinite(v) for v in (low, high, bottom, top)) and low < high and bottom < top):
        raise InputError(f"span is {span!r}; expected a positive number, or low < high")
    a = np.linspace(low, high, sizes[0])
    return a, np.linspace(bottom, top, sizes[1]) if dimensions == 2 else np.zeros(1)


def usual_functions(net: nn.Module) -> tuple[FunctionName, ...]:
    """Return the functions that a landscape of a net shows by default: one for a net without quantizers."""
    return _functions(plain(net), None)


def has_batch_norm(net: nn.Module) -> bool:
    """Return whether a net has batch norms with running statistics, which can be frozen or re-estimated."""
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in plain(net).modules())


def _functions(net: nn.Module, functions: Sequence[FunctionName] | None) -> tuple[FunctionName, ...]:
    if isinstance(functions, str) or (functions is not None and not len(functions)):
        raise InputError(f"functions is {functions!r}; expected some of {', '.join(FUNCTIONS)} in a list")
    for name in functions or ():
        if name not in FUNCTIONS:
            raise UnknownNameError("function of a quantized net", name, FUNCTIONS)
    if not any(True for _ in quantizers(net)):
        return ("deployed",)  # all four are one
    return tuple(dict.fromkeys(functions or DEFAULT_FUNCTIONS))


def _digest(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    directions: Sequence[Mapping[str, Tensor]],
    said: Mapping[str, Any],
    *more: Array,
) -> str:
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    tensors = [x, y, *net.state_dict().values(), *(d[n] for d in directions for n in sorted(d))]
    for data in [t.detach().cpu().contiguous().numpy() for t in tensors if isinstance(t, Tensor)] + list(more):
        found.update(str((data.dtype, data.shape)).encode())
        found.update(np.ascontiguousarray(data).tobytes())
    return found.hexdigest()
