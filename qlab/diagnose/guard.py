r"""What an attribution map may be believed about, checked against the deployed net itself.

F is the deployed net's output for the target class, x an input, x0 its baseline, m = 1..M its features, a a map's scores:

    ablation_m = F(x) - F(x with feature m at its baseline)             exact: two runs of the deployed net
    flip_m     = F(x) - F(x with feature m mirrored, low + high - x)    tells of features that stand at the baseline too
    residual   = | sum_m a_m - (F(x) - F(x0)) |                         0 for a complete map
    rank       = Spearman(a, ablation), Spearman(a, flip)               over features, per example

What a map explains follows from what it asks the net:

| explains  | the method asks for                                                                         |
|-----------|---------------------------------------------------------------------------------------------|
| deployed  | values of the deployed net only                                                             |
| exact     | derivatives, and they are those of the deployed net (float activations)                     |
| surrogate | derivatives that belong to another function: those of the declared backward rules           |

A score of exactly zero is not taken for unimportance: `zero_codes` tells a feature that changes nothing from one that stands at its
baseline and from one where the net changes and the map says nothing.

Source: Sundararajan et al. 2017, arXiv 1703.01365 (completeness); Adebayo et al. 2018, arXiv 1810.03292 (checks of maps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "AGREED",
    "CONSTRUCTION",
    "SILENT",
    "Explains",
    "Verdict",
    "ablations",
    "flips",
    "gradient_explains",
    "hidden_step",
    "spearman",
    "verdict",
    "zero_codes",
]

Explains = Literal["deployed", "exact", "surrogate"]
Output = Callable[[Tensor], Tensor]
"""Inputs (B, ...) to outputs (B, d)."""

AGREED, CONSTRUCTION, SILENT = 1, 2, 3
"""Codes of an exact zero: the references change nothing either; zero by construction; the net changes and the map is silent."""

INCOMPLETE = 0.05  # relative residual from which a map that claims completeness is told incomplete
LOW_RANK = 0.5  # median rank correlation with the references below which a map is told to rank differently
MEMORY = 64 * 2**20
PARTS = 4  # of a path, looked at one by one


class Verdict(NamedTuple):
    """One word or two on a map, and the reason with numbers."""

    word: str
    reason: str


def ablations(F: Output, x: Tensor, x0: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Return F(x) - F(x with feature m at its baseline), shape (N, M), by running the net.

    Args:
        F: inputs to outputs (B, d).
        x: (N, *shape) inputs.
        x0: (N, *shape) baselines.
        target: (N,) classes.
        groups: (*shape) numbers of features, 0 to M - 1.
    """
    return _replaced(F, x, x0, target, groups)


def flips(F: Output, x: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    """Return F(x) - F(x with feature m mirrored in the range of the data), shape (N, M); +1 becomes -1 for inputs of signs."""
    return _replaced(F, x, x.min() + x.max() - x, target, groups)


@torch.no_grad()
def _replaced(F: Output, x: Tensor, other: Tensor, target: Tensor, groups: Tensor) -> Tensor:
    M = int(groups.max()) + 1
    n = len(x)
    at = torch.arange(n, device=x.device)
    whole = F(x)[at, target]
    chunk = max(1, MEMORY // max(1, 8 * x.element_size() * x.numel()))
    columns = []
    for ids in torch.arange(M, device=x.device).split(chunk):
        taken = groups == ids.view(-1, *[1] * groups.dim())  # (k, *shape)
        mixed = torch.where(taken[:, None], other, x).reshape(-1, *x.shape[1:])
        columns.append(whole - F(mixed).reshape(len(ids), n, -1)[:, at, target])
    return torch.cat(columns).T


def spearman(a: NDArray, b: NDArray, where: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Return Spearman's rank correlation of each row, ties at their average rank.

    A row of which fewer than three entries count, or on which one side is constant, gives NaN: there is no order to compare.

    Args:
        a, b: (N, M).
        where: (N, M), the entries that count; all by default.
    """
    from scipy.stats import rankdata

    rows = []
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        if where is not None:
            p, q = p[where[i]], q[where[i]]
        p, q = (rankdata(p) - (len(p) + 1) / 2, rankdata(q) - (len(q) + 1) / 2) if len(p) else (p, q)
        scale = np.sqrt((p**2).sum() * (q**2).sum())
        rows.append((p * q).sum() / scale if len(p) >= 3 and scale > 0 else np.nan)
    return np.array(rows, dtype=np.float64)


def gradient_explains(F: nn.Module, x: Tensor, x0: Tensor, target: Tensor) -> tuple[Explains, str]:
    """Return whether gradients of F with respect to its input are those of its values, and why not.

    Three checks, the cheapest first: quantizers of the lab among the activations; a custom backward rule in the graph; and the
    integral of the gradient from x0 to x, which must come to the difference of the outputs on every part of the path, and does not
    where a sign is written as a function.

    Args:
        F: the deployed net to its logits (a saturated softmax on top would hide the gradient), its parameters frozen, so that the
            graph is that of the input.
        x, x0: (N, ...) inputs and baselines.
        target: (N,) classes.
    """
    from qlab.quantizers.apply import quantizers

    steps = [type(q).__name__ for q in quantizers(F)]
    if steps:
        return "surrogate", f"activations pass {len(steps)} x {steps[0]}, whose backward rule is declared, not derived"
    why = hidden_step(F, x, x0, target)
    return ("surrogate", why) if why else ("exact", "")


def hidden_step(F: nn.Module, x: Tensor, x0: Tensor, target: Tensor) -> str:
    """Return how a gradient of F that is not that of its values shows, whatever modules F is made of; empty where it does not."""
    probe = x[:1].detach().requires_grad_()
    with torch.enable_grad():
        rule = _custom_rule(F(probe).sum().grad_fn)
    if rule:
        return f"the input's gradient passes a custom backward rule ({rule})"
    few = slice(None, None, max(1, len(x) // 4))
    gaps = [_path_gap(F, x[few], x0[few], target[few], n) for n in (32, 128)]
    if gaps[1] > INCOMPLETE and gaps[1] > gaps[0] / 2:
        return (
            f"the integral of the gradient misses the differences of the outputs by {gaps[1]:.0%}, whatever the number of steps: "
            "the net holds steps that are no modules of their own"
        )
    return ""


def _custom_rule(node: object) -> str:
    """Return the name of a Python autograd Function behind a node of the graph; empty where there is none."""
    seen: set[object] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
        waiting += [after for after, _ in node.next_functions]  # type: ignore[attr-defined]
    return ""


def _path_gap(F: nn.Module, x: Tensor, x0: Tensor, target: Tensor, steps: int) -> float:
    """Return by how much the integral of the gradient misses differences of F, as a share of the way that F goes.

    With the midpoint rule, on each of 4 parts of the path: over all of it, jumps that were missed up and down cancel. The way is
    the difference or the integral of the magnitude of the slope, whichever is larger: F may come back to where it began.
    """
    at = torch.arange(len(x), device=x.device)
    total, way = torch.zeros(2, PARTS, len(x), dtype=x.dtype, device=x.device)
    for i in range(steps):
        point = (x0 + (i + 0.5) / steps * (x - x0)).detach().requires_grad_()
        with torch.enable_grad():
            out = F(point)[at, target].sum()
            (g,) = torch.autograd.grad(out, point, allow_unused=True) if out.requires_grad else (None,)
        if g is not None:
            step = (g * (x - x0)).flatten(1).sum(1) / steps
            total[i * PARTS // steps] += step
            way[i * PARTS // steps] += step.abs()
    with torch.no_grad():
        ends = torch.stack([F(x0 + k / PARTS * (x - x0))[at, target] for k in range(PARTS + 1)])
    difference = ends.diff(dim=0)
    size = float(torch.maximum(difference.abs(), way).sum())
    return float((total - difference).abs().sum()) / size if size > 0 else 0.0


def zero_codes(
    scores: NDArray,
    changes: NDArray[np.bool_],
    constructed: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Return for every score 0 where it is not exactly zero, else `AGREED`, `CONSTRUCTION` or `SILENT`.

    Args:
        scores: (N, M).
        changes: (N, M), whether the net changes with the feature.
        constructed: (N, M), whether the method gives zero there whatever the net.
    """
    return np.where(scores != 0, 0, np.where(constructed, CONSTRUCTION, np.where(changes, SILENT, AGREED))).astype(
        np.uint8
    )


def verdict(
    explains: Explains,
    complete: bool,
    relative: NDArray[np.float64],
    silent: NDArray[np.bool_],
    reason: str,
    rank: NDArray[np.float64],
    why: str,
) -> Verdict:
    """Return the verdict on one map; the gravest finding decides.

    Args:
        explains: what the map explains.
        complete: whether its method claims completeness.
        relative: (N,) residual, relative to |F(x) - F(x0)|.
        silent: (N,), whether the map gives no information on the example.
        reason: why it gives none.
        rank: (N,) rank correlation with exact ablation; NaN where there is no order.
        why: why gradients explain a surrogate.
    """
    if silent.mean() >= 0.5:
        return Verdict("no information", f"{reason} ({int(silent.sum())} of {len(silent)} examples)")
    gap = float(np.median(relative))
    if complete and gap > INCOMPLETE:
        end = f": {why}" if why else ""
        return Verdict("incomplete", f"the scores miss F(x) - F(x0) by {gap:.0%} (median){end}")
    ranked = rank[~np.isnan(rank)]
    if len(ranked) and float(np.median(ranked)) < LOW_RANK:
        end = f"; {why}" if explains == "surrogate" else ""
        return Verdict(
            "ranks differently", f"rank correlation with exact ablation {np.median(ranked):.2f} (median){end}"
        )
    if explains == "surrogate":
        return Verdict("surrogate", why)
    return Verdict(
        "holds", "" if not silent.any() else f"no information on {int(silent.sum())} of {len(silent)} examples"
    )
