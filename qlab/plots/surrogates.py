"""Surrogate derivatives of sign, each under the function it is the derivative of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.plots.figure import Figure
from qlab.plots.training import COLOURS
from qlab.quantizers import Surrogate, hard_sign, surrogate

__all__ = ["surrogate_figure"]

_POINTS = 4001  # odd: zero is one of them


def surrogate_figure(which: Sequence[str | Surrogate], reach: float = 2.0) -> Figure:
    """Draw F over sign in the upper row and d = F' in the lower one, a column for each surrogate.

    Args:
        which: names of `SURROGATES` or surrogates; F is integrated numerically where a surrogate does not state it.
        reach: the axis goes from -reach to reach.
    """
    family = [surrogate(entry) for entry in which]
    x = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    figure = Figure(figsize=(1.9 * len(family), 3.6), dpi=80, layout="constrained")
    grid = figure.subplots(2, len(family), squeeze=False, sharex=True, sharey="row")
    said = []
    for (upper, lower), entry in zip(grid.T, family, strict=True):
        d = entry.derivative(x)
        upper.plot(x, hard_sign(x), color="0.6", lw=1.2)
        upper.plot(x, _primitive(entry, x), color=COLOURS[0], lw=1.6, ls="--")
        lower.fill_between(x, d, color=COLOURS[1], alpha=0.3)
        lower.plot(x, d, color=COLOURS[1], lw=1.6)
        k = "" if entry.sharpness is None else f", {entry.sharpness:g}"
        upper.set_title(entry.name + k, fontsize=9)
        lower.set_xlabel("x")
        said.append(
            f"{entry.name}: d(0) = {float(entry.derivative(x.new_zeros(1))):.3g}, d({reach:g}) = {float(d[-1]):.3g}"
        )
        for axis in (upper, lower):
            axis.axhline(0, color="0.8", lw=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set(ylabel="F (dashed), sign (grey)", ylim=(-1.6, 1.6))
    grid[1, 0].set_ylabel("d = F'")
    figure.set_label(f"Surrogates of sign on [-{reach:g}, {reach:g}]. " + "; ".join(said) + ".")
    return figure


def _primitive(entry: Surrogate, x: Tensor) -> Tensor:
    """Return F on the grid x, symmetric about 0, with F(0) = 0."""
    if entry.primitive is not None:
        return entry.primitive(x)
    area = torch.cumulative_trapezoid(entry.derivative(x), x)
    area = torch.cat([area.new_zeros(1), area])
    return area - area[len(x) // 2]
