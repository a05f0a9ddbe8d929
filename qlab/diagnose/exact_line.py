r"""The deployed loss on a line, exactly: where the net is piecewise constant, every piece is evaluated once.

With weights hard(w + t d) the deployed loss changes only where a weight crosses a threshold. For signs these events are

    t_i = -w_i / d_i,        d_i != 0,

so the loss on [low, high] is a staircase of at most (#events + 1) plateaus. Between consecutive events it is evaluated
with the very weights of that piece, put together from the flips and not from a sampled t: there is no sampling error and no
rounding of w + t d.

If w_i and d_i are normal with equal scale, the share of flipped weights is arctan(|t|) / pi, whatever the net.

Not constant between the events: what a float part contributes (biases, batch norm, layers kept in float), and a scale alpha(w) of
the weights. There the loss is smooth between the same events; `exact_line` refuses, or holds the float parts still on request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result, check, plain
from qlab.diagnose.directions import normalised
from qlab.diagnose.functions import steps, variant
from qlab.diagnose.objective import Loss
from qlab.diagnose.plane_eval import Many, joined
from qlab.errors import InputError
from qlab.quantizers import Quantizer, quantized_tensors

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["ExactLine", "exact_line", "flip_share"]

Array = NDArray[np.float64]
_MOST = 2_000_000  # plateaus


def flip_share(t: Array | float) -> Array:
    """Return arctan(|t|) / pi: the share of signs that differ between w and w + t d for normal w, d of equal scale."""
    return np.arctan(np.abs(np.asarray(t, dtype=np.float64))) / math.pi


@dataclass(frozen=True)
class ExactLine(Result):
    """The deployed loss on a line, plateau by plateau.

    Args:
        edges: (P + 1,) where plateaus begin and end, ascending; the inner ones are events.
        loss: (P,) mean loss of each plateau.
        accuracy: (P,) share of the examples that are classified right.
        flips: (P,) quantized weights that differ from those at t = 0.
        weights: quantized weights in all.
        moving: those with d_i != 0.
        held: float tensors that the direction would move and that were held still.
        examples: N.
        loss_name: of the loss.
    """

    edges: Array
    loss: Array
    accuracy: Array
    flips: NDArray[np.int64]
    weights: int
    moving: int
    held: tuple[str, ...]
    examples: int
    loss_name: str = "cross_entropy"

    @property
    def widths(self) -> Array:
        """(P,) widths of the plateaus."""
        return np.diff(self.edges)

    @property
    def flipped(self) -> Array:
        """(P,) share of the quantized weights that differ from those at t = 0."""
        return self.flips / self.weights

    def at(self, t: Array | float) -> NDArray[np.int64]:
        """Return the plateau of each t.

        Raises:
            InputError: outside the line.
        """
        t = np.asarray(t, dtype=np.float64)
        if not bool(((t >= self.edges[0]) & (t <= self.edges[-1])).all()):
            raise InputError(f"t must lie in [{self.edges[0]:g}, {self.edges[-1]:g}]")
        return np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, len(self.loss) - 1)

    def frame(self) -> pd.DataFrame:
        """Return one row per plateau: begin, end, width, loss, accuracy, flips, flipped, law (arctan at its middle)."""
        import pandas as pd

        return pd.DataFrame(
            {
                "begin": self.edges[:-1],
                "end": self.edges[1:],
                "width": self.widths,
                "loss": self.loss,
                "accuracy": self.accuracy,
                "flips": self.flips,
                "flipped": self.flipped,
                "law": flip_share((self.edges[1:] + self.edges[:-1]) / 2),
            }
        )

    def figure(self) -> Figure:
        """Return the staircase, with the share of flipped weights and its law below."""
        from qlab.plots.landscape import exact_line_figure

        return exact_line_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        low, high = self.edges[0], self.edges[-1]
        text = (
            f"The deployed loss ({self.loss_name}, {self.examples} examples) on [{low:.3g}, {high:.3g}] is a staircase of "
            f"{len(self.loss):,} plateaus, median width {np.median(self.widths):.2g}, from {self.loss.min():.3g} to "
            f"{self.loss.max():.3g}; between them nothing is left out."
        )
        if len(self.loss) > 1:
            jump = int(np.abs(np.diff(self.loss)).argmax())
            size = self.loss[jump + 1] - self.loss[jump]
            text += f" The largest jump, {size:+.3g}, is at t = {self.edges[jump + 1]:.3g}."
        if low <= 0 <= high and len(self.loss) > 1:
            end, last = (high, -1) if high >= -low else (low, 0)
            text += (
                f" At t = {end:.3g}, {self.flipped[last]:.1%} of the {self.weights:,} quantized weights have "
                f"flipped; for normal weights and directions of equal scale it would be {float(flip_share(end)):.1%}."
            )
        if self.held:
            text += f" Held still: {', '.join(self.held)}."
        return text


def exact_line(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    d: Mapping[str, Tensor],
    low: float = -1.0,
    high: float = 1.0,
    loss: str | Loss = "cross_entropy",
    float_parts: Literal["refuse", "hold"] = "refuse",
) -> ExactLine:
    """Evaluate the deployed net on every plateau of the line w + t d, t in [low, high].

    Args:
        net: a method of the lab or a torch module with quantized weights, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        d: a direction, as from `qlab.diagnose.directions`.
        low: where the line begins.
        high: where it ends.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        float_parts: what to do where d moves float tensors, so that the loss is smooth between events: "refuse", or "hold"
            them still.

    Raises:
        InputError: see `qlab.diagnose.base.check`; no quantized weights move; a quantizer whose deployed values are no
            fixed grid (a scale alpha(w)); float parts that move; an empty or endless range.
    """
    net = plain(net)
    check(net, x, y)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"the line runs from {low!r} to {high!r}; expected low < high")
    if float_parts not in ("refuse", "hold"):
        raise InputError(f"float_parts is {float_parts!r}; expected 'refuse' or 'hold'")
    d = normalised(net, d, None)
    names = {id(p): name for name, p in net.named_parameters()}
    tensors = {names[id(q.latent)]: (q.latent.detach(), q.quantizer) for q in quantized_tensors(net)}
    held = tuple(name for name, t in d.items() if name not in tensors and bool(t.any()))
    if held and float_parts == "refuse":
        raise InputError(
            f"the direction moves {held[0]!r}, which is not quantized: between the events the loss would be smooth, not constant. "
            "Take a direction with zeros there, or pass float_parts='hold'"
        )
    parts = {name: _Part(w, d[name], q, name) for name, (w, q) in tensors.items() if name in d and bool(d[name].any())}
    if not parts:
        raise InputError("the direction moves no quantized weight, so the deployed net never changes along it")
    edges, turn = _pieces(parts, low, high)
    many = Many(variant(net, "latent"), x, y, loss)  # activations as deployed; weights are given as they are deployed
    values = []
    with torch.no_grad():
        for i in range(0, len(edges) - 1, many.chunk):
            piece = np.arange(i, min(i + many.chunk, len(edges) - 1))
            stack = {name: part.at(piece, turn[name]) for name, part in parts.items()}
            still = {n: q.hard(w) for n, (w, q) in tensors.items() if n not in parts}
            values.append(many.values(stack | {n: w.expand(len(piece), *w.shape) for n, w in still.items()}))
    found = joined(values)
    flips = sum(part.flips(edges) for part in parts.values())
    return ExactLine(
        edges=edges,
        loss=found.loss.cpu().numpy(),
        accuracy=found.accuracy.cpu().numpy(),
        flips=np.asarray(flips, dtype=np.int64),
        weights=sum(w.numel() for w, _ in tensors.values()),
        moving=sum(part.moving for part in parts.values()),
        held=held,
        examples=len(x),
        loss_name=loss if isinstance(loss, str) else getattr(loss, "__name__", "own loss"),
    )


class _Part:
    """One quantized tensor on the line: its deployed values before and after every event.

    Thresholds theta_1 < ... < theta_m and levels l_0 < ... < l_m: weight i has the level l_j, j the number of thresholds it
    is at or above, and passes threshold j at t = (theta_j - w_i) / d_i.
    """

    def __init__(self, w: Tensor, d: Tensor, quantizer: Quantizer, name: str) -> None:
        try:
            self.levels, theta = steps(quantizer)
        except InputError as error:
            raise InputError(f"the weights of {name!r} cannot be followed: {error}") from error
        grid = self.levels.to(w)
        hard = quantizer.hard(w).detach()
        exact = quantizer.levels(w.dtype)
        assert exact is not None
        if not bool(torch.isin(hard, exact.to(w)).all()):
            raise InputError(
                f"the deployed values of {name!r} are no fixed grid (a scale that depends on the weights moves with them), so "
                "the loss is smooth between the flips and has no plateaus"
            )
        self.w, self.d, self.grid = w, d, grid
        self.moving = int((d != 0).sum())
        w64, d64 = w.double().flatten().numpy(force=True), d.double().flatten().numpy(force=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (theta.numpy()[:, None] - w64) / d64  # (m, n)
        self.t = np.where(d64 != 0, t, np.inf)
        self.up = d64 > 0
        self.moves = np.isfinite(self.t)
        self.always = theta.numpy()[:, None] <= w64  # for weights that stay

    def at(self, piece: NDArray[np.int64], turn: NDArray[np.int64]) -> Tensor:
        """Return the deployed values (K, *shape) on consecutive pieces (K,); `turn` (m, n) is the first piece after each event."""
        value = self._level(piece[:1], turn, slice(None)).expand(len(piece), -1).clone()
        changing = ((turn > piece[0]) & (turn <= piece[-1])).any(0).nonzero()[0]
        if len(changing):
            value[:, torch.from_numpy(changing).to(value.device)] = self._level(piece, turn, changing)
        return value.view(len(piece), *self.w.shape)

    def _level(self, piece: NDArray[np.int64], turn: NDArray[np.int64], of: Any) -> Tensor:
        after = piece[:, None, None] >= turn[None, :, of]
        above = np.where(self.moves[:, of], after == self.up[of], self.always[:, of])
        return self.grid[torch.from_numpy(above.sum(1)).to(self.grid.device)]

    def flips(self, edges: Array) -> NDArray[np.int64]:
        """Return how many weights have a level other than at t = 0, per piece: of each, the first event on either side counts."""
        before, after = np.where(self.t <= 0, self.t, -np.inf), np.where(self.t > 0, self.t, np.inf)
        # at t = 0 itself a rising weight has passed its threshold and a falling one has not: it still stands on the threshold
        falls = (self.t == 0) & ~self.up
        before, after = np.where(falls, -np.inf, before), np.where(falls, 0.0, after)
        left, right = np.sort(before.max(0)), np.sort(after.min(0))
        passed = np.searchsorted(right, edges[:-1], side="right")
        behind = len(left) - np.searchsorted(left, edges[1:], side="left")
        return np.asarray(np.where(edges[:-1] >= 0, passed, np.where(edges[1:] <= 0, behind, 0)), dtype=np.int64)


def _pieces(parts: Mapping[str, _Part], low: float, high: float) -> tuple[Array, dict[str, NDArray[np.int64]]]:
    """Return the edges (P + 1,) of the plateaus and, per tensor, the first piece after each event (m, n).

    Events at the same t are one edge; an event at or before `low` lies before piece 0, one at or after `high` after the last.
    """
    events = np.concatenate([part.t.ravel() for part in parts.values()])
    inner = np.unique(events[(events > low) & (events < high)])
    if len(inner) >= _MOST:
        raise InputError(f"the line has {len(inner):,} events; take a shorter one, or fewer weights")
    edges = np.concatenate([[low], inner, [high]])
    count = len(edges) - 1
    turn = {}
    for name, part in parts.items():
        first = np.searchsorted(inner, part.t, side="left") + 1  # event number e begins piece e + 1
        turn[name] = np.where(part.t <= low, 0, np.where(part.t >= high, count, first)).astype(np.int64)
    return edges, turn
