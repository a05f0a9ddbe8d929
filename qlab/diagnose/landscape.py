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

import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result
from qlab.diagnose.functions import FUNCTIONS, FunctionName
from qlab.diagnose.objective import Loss
from qlab.diagnose.plane_eval import BatchNormMode
from qlab.diagnose.views import DEFAULT_FUNCTIONS, Span, Views
from qlab.errors import DataFileError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["DEFAULT_FUNCTIONS", "Landscape", "landscape", "load_landscape"]

Array = NDArray[np.float64]


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
        itself = max(abs(self.a[at[0]]), abs(self.b[at[1]])) <= 1e-9 * max(np.abs(self.a).max(), np.abs(self.b).max())
        here = "at the net itself" if itself else f"at {self._place(at)}, the point nearest to the net"
        for name in self.functions:
            finite = self.evaluated & np.isfinite(self.loss[name])
            low = np.unravel_index(np.where(finite, self.loss[name], np.inf).argmin(), finite.shape)
            high = np.unravel_index(np.where(finite, self.loss[name], -np.inf).argmax(), finite.shape)
            sharp = f" (k = {self.sharpness:g})" if name == "smoothed" else ""
            text += (
                f" {name.capitalize()}{sharp}: loss {self.loss[name][at]:.3g} and accuracy {self.accuracy[name][at]:.1%} "
                f"{here}, from {self.loss[name][low]:.3g} at {self._place(low)} to {self.loss[name][high]:.3g} at "
                f"{self._place(high)}."
            )
            if lost := done - int(finite.sum()):
                text += f" At {lost} of the {done} points evaluated it is infinite or NaN."
        if np.isfinite(self.flipped).all():
            text += f" Up to {self.flipped.max():.1%} of the quantized weights are flipped."
        else:
            text += " No weights are quantized."
        noise = self.noise[self.functions[0]][at]
        if np.isfinite(noise):
            text += f" Over {self.batches} mini-batches the {self.functions[0]} loss there has standard deviation {noise:.2g}."
        return text

    def _place(self, at: Any) -> str:
        # An axis through 0 may meet it at 1e-16.
        a, b = (0.0 if abs(v[i]) < 1e-9 * np.abs(v).max() else v[i] for v, i in zip((self.a, self.b), at, strict=True))
        return f"a = {a:.3g}" if self.line else f"({a:.3g}, {b:.3g})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all arrays and settings to one file (npz, no pickle), whole or not at all.

        Raises:
            InputError: the path cannot be written.
        """
        from qlab.binary.file import replace_file

        keys = ("sharpness", "batch_norm", "examples", "batches", "loss_name", "directions", "functions", "digest")
        arrays: dict[str, Any] = {
            "said": np.array(json.dumps({key: getattr(self, key) for key in keys})),
            "a": self.a,
            "b": self.b,
        }
        for key in ("loss", "accuracy", "noise"):
            arrays[key] = np.stack([getattr(self, key)[f] for f in self.functions])
        buffer = io.BytesIO()
        np.savez(buffer, flipped=self.flipped, evaluated=self.evaluated, **arrays)
        replace_file(pathlib.Path(path), [buffer.getbuffer()])


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
    return Landscape(
        **views.fields({key: v.reshape(*v.shape[:-1], *i.shape) for key, v in found.items()}, np.ones(i.shape, bool))
    )
