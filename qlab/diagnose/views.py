"""What a landscape is evaluated with: several functions of a net over one lattice, and the share of flipped weights.

`landscape` asks for all points at once, `landscaping` round after round.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.base import check, plain
from qlab.diagnose.directions import normalised
from qlab.diagnose.functions import FUNCTIONS, FunctionName, variant
from qlab.diagnose.objective import Loss
from qlab.diagnose.plane_eval import Affine, BatchNormMode, Many, by_rows
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import quantized_tensors, quantizers

__all__ = ["DEFAULT_FUNCTIONS", "Flips", "Span", "Views", "axes", "has_batch_norm", "usual_functions"]

Array = NDArray[np.float64]
Span = float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]
DEFAULT_FUNCTIONS: tuple[FunctionName, ...] = ("deployed", "latent", "smoothed")
_MOST = 1_000_000  # points


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
        net = plain(net)
        _, z = check(net, x, y)
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
        # Nets of equal weights may differ in their maps, and losses of one's own may share a name: their values may not.
        ramp = torch.linspace(-3, 3, z.numel(), dtype=torch.float64).reshape(z.shape).to(z)
        probe = many[0].loss(ramp, y).detach().cpu().numpy()
        said = {**self.said, "functions": self.functions, "net": repr(net)}
        self.digest = _digest(net, x, y, pair, said, self.a, self.b, probe)

    def at(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> dict[str, Array]:
        """Return loss, accuracy and noise (F, K), and flipped (K,), of lattice points (a_i, b_j)."""
        c = np.stack([self.a[i], self.b[j]], 1)[:, : 1 if len(self.b) == 1 else 2]
        rows = torch.from_numpy(np.ascontiguousarray(c))
        values = [evaluate(rows) for evaluate in self.evaluators]
        found = {
            key: np.stack([getattr(v, key).cpu().numpy() for v in values]) for key in ("loss", "accuracy", "noise")
        }
        return found | {"flipped": self.flips(rows).cpu().numpy()}

    def fields(self, arrays: Mapping[str, Array], evaluated: NDArray[np.bool_]) -> dict[str, Any]:
        """Return the fields of a `Landscape` of arrays (F, A, B), and flipped (A, B)."""
        by = {key: dict(zip(self.functions, arrays[key], strict=True)) for key in ("loss", "accuracy", "noise")}
        rest = {"flipped": arrays["flipped"], "evaluated": evaluated, "digest": self.digest}
        return {"a": self.a, "b": self.b} | by | rest | self.said

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
    return by_rows(quantizer.hard, w) if batched else quantizer.hard(w)


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
    *more: NDArray[Any],
) -> str:
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    tensors = [x, y, *net.state_dict().values(), *(d[n] for d in directions for n in sorted(d))]
    for data in [t.detach().cpu().contiguous().numpy() for t in tensors if isinstance(t, Tensor)] + list(more):
        found.update(str((data.dtype, data.shape)).encode())
        found.update(np.ascontiguousarray(data).tobytes())
    return found.hexdigest()
