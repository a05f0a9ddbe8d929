"""Running one attribution method and checking its map against references that are computed once for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose import guard
from qlab.diagnose.attribution_maps import AttributionMap, Attributions
from qlab.diagnose.attribution_methods import METHODS, Head, Problem, gradcam_layer, values
from qlab.diagnose.attribution_scores import infidelity, sensitivity
from qlab.diagnose.guard import Explains
from qlab.quantizers.apply import quantizers

__all__ = ["References"]

ROUNDING = 1e-5  # share of the sum of the scores' magnitudes below which a sum of scores is rounding


def _array(t: Tensor) -> NDArray[np.float64]:
    return t.detach().double().cpu().numpy()


def _by_feature(v: Tensor, p: Problem, spread: bool) -> NDArray[np.float64]:
    """Return scores (N, M): the sum over a feature's inputs, or their mean where the score stands on each of them."""
    flat = p.groups.flatten()
    M = int(flat.max()) + 1
    total = torch.zeros(len(v), M, dtype=torch.float64, device=v.device).index_add_(1, flat, v.double().flatten(1))
    return _array(total / torch.bincount(flat) if spread else total)


@dataclass(frozen=True)
class References:
    """What every map of a problem is checked against."""

    difference: NDArray[np.float64]
    ablation: NDArray[np.float64]
    flips: NDArray[np.float64]
    moved: NDArray[np.bool_]  # (N, M) the net's output changes with the feature: by ablation
    moved_any: NDArray[np.bool_]  # by ablation or flip
    behind: NDArray[np.bool_]  # (N, M) the logits change, though the output is a probability
    same: NDArray[np.bool_]  # (N, M) the feature stands at its baseline
    gradient: Explains
    why: str
    float_above: bool  # no step comes after Grad-CAM's layer

    @classmethod
    def of(cls, p: Problem) -> References:
        """Run the net with one feature changed at a time."""
        at = torch.arange(len(p.x), device=p.x.device)
        with torch.no_grad():
            difference = (p.F(p.x).double() - p.F(p.x0).double())[at, p.target]
        ablation = guard.ablations(p.F, p.x, p.x0, p.target, p.groups)
        flips = guard.flips(p.F, p.x, p.target, p.groups)
        with torch.no_grad():
            size = max(1.0 if p.F.output == "probability" else 0.0, float(p.F(p.x).abs().max()))
        least = 64 * torch.finfo(p.x.dtype).eps * size
        behind = torch.zeros_like(ablation, dtype=torch.bool)
        if p.F.output != "logit":
            with torch.no_grad():
                least_z = 64 * torch.finfo(p.x.dtype).eps * float(p.F.net(p.x).abs().max())
            for z in (
                guard.ablations(p.F.net, p.x, p.x0, p.target, p.groups),
                guard.flips(p.F.net, p.x, p.target, p.groups),
            ):
                behind |= z.abs() > least_z
        explains, why = guard.gradient_explains(p.F.net, p.x, p.x0, p.target)
        flat = p.groups.flatten()
        differs = torch.zeros_like(ablation).index_add_(1, flat, (p.x != p.x0).to(ablation.dtype).flatten(1))
        moved = ablation.abs() > least
        return cls(
            difference=_array(difference),
            ablation=_array(ablation),
            flips=_array(flips),
            moved=moved.cpu().numpy(),
            moved_any=(moved | (flips.abs() > least)).cpu().numpy(),
            behind=behind.cpu().numpy(),
            same=(differs == 0).cpu().numpy(),
            gradient=explains,
            why=why,
            float_above=bool(p.layer) and _float_above(p),
        )

    def judged(self, name: str, p: Problem, with_scores: bool) -> AttributionMap:
        """Run one method and check its map."""
        info = METHODS[name]
        v = values(name, p)
        scores = _by_feature(v, p, info.spread)
        residual = np.abs(scores.sum(1) - self.difference)
        size = np.maximum(np.abs(self.difference), ROUNDING * np.abs(scores).sum(1))
        out = np.where(residual == 0, 0.0, np.inf)  # infinite where scores are
        relative = np.divide(residual, size, out=out, where=np.isfinite(residual) & (size > 0))
        explains: Explains = "deployed"
        if info.asks == "gradient":
            explains = "exact" if name == "layer_gradcam" and self.float_above else self.gradient
        elif info.asks == "rescale" and np.median(relative) > guard.INCOMPLETE:
            explains = "surrogate"  # some step was passed by its backward rule
        zeros, silent, reason = self._silence(name, p, scores)
        sign = (lambda a: a) if info.signed else np.abs
        rank = guard.spearman(scores, sign(self.ablation), ~self.same)
        nothing = np.full(len(scores), np.nan)
        why = self.why if explains == "surrogate" else ""
        if info.asks == "rescale" and explains == "surrogate":
            why = (
                "the rescale rule does not hold on a step of this net: a function inside forward, which cannot be repaired, or a "
                "module that is not elementwise, such as a normalization or max pooling with windows that overlap"
            )
        return AttributionMap(
            method=name,
            explains=explains,
            values=_array(v),
            scores=scores,
            residual=residual,
            relative=relative,
            complete=info.complete,
            zeros=zeros,
            silent=silent,
            rank_ablation=rank,
            rank_flips=guard.spearman(scores, sign(self.flips)),
            infidelity=infidelity(p, scores) if with_scores else nothing,
            sensitivity=sensitivity(name, p) if with_scores else nothing,
            verdict=guard.verdict(explains, info.complete, relative, silent, reason, rank, why),
        )

    def _silence(
        self, name: str, p: Problem, scores: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], str]:
        """Return codes of zeros (N, M), the examples without information (N,) and the reason."""
        info = METHODS[name]
        changes = (self.moved if info.asks == "values" else self.moved_any) | self.behind
        constructed = self.same if info.multiplies else np.zeros_like(self.same)
        if name == "layer_gradcam" and p.relu:
            # the final ReLU writes zeros; the map is silent only where nothing is left
            constructed = constructed | np.broadcast_to((scores != 0).any(1, keepdims=True), scores.shape)
        zeros = guard.zero_codes(scores, changes, constructed)
        asked = (changes & ~constructed).sum(1)
        broken = ~np.isfinite(scores).all(1)
        silent = broken | (asked > 0) & ((zeros == guard.SILENT).sum(1) >= 0.5 * asked)
        if broken.any():
            return zeros, silent, "the map holds NaN or infinite values"
        if not silent.any():
            return zeros, silent, ""
        return zeros, silent, self._reason(name, p, silent)

    def _reason(self, name: str, p: Problem, silent: NDArray[np.bool_]) -> str:
        if p.F.output != "logit" and bool((self.behind & ~self.moved_any)[silent].any()):
            return (
                f"saturation: the softmax is constant to the last bit of {str(p.x.dtype).removeprefix('torch.')} while the logits "
                "change; explain the logit"
            )
        if p.F.output != "logit" and bool(np.any(values(name, _logits(p)).flatten(1).cpu().numpy()[silent] != 0)):
            return (
                f"underflow: the gradient of the {p.F.output.replace('_', ' ')} is zero to the last bit of "
                f"{str(p.x.dtype).removeprefix('torch.')}, that of the logit is not; explain the logit"
            )
        if name == "layer_gradcam" and p.relu:
            return "the final ReLU left nothing: every part of the layer counts against the class; use relu=False"
        return (
            "the gradient is exactly zero where the net changes: a step passes none (a quantized input, a rounding, or a "
            "straight-through rule outside its range, a detached tensor)"
        )

    def attributions(self, p: Problem, maps: Sequence[AttributionMap]) -> Attributions:
        """Return the maps so far as a result."""
        return Attributions(
            maps=tuple(maps),
            x=_array(p.x),
            groups=p.groups.cpu().numpy(),
            target=p.target.cpu().numpy(),
            output=p.F.output,
            difference=self.difference,
            ablation=self.ablation,
            flips=self.flips,
            quantized=next(quantizers(p.F), None) is not None,
            why=self.why,
        )


class _Behind(nn.Module):
    """The net as a function of what a layer returns, at the first of the given inputs."""

    def __init__(self, net: nn.Module, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.layer, self.x = net, layer, x

    def forward(self, A: Tensor) -> Tensor:
        """Return logits (n, d) of the first n inputs, with A (n, ...) in place of what the layer returns."""
        handle = self.layer.register_forward_hook(lambda *_: A)
        try:
            return self.net(self.x[: len(A)])
        finally:
            handle.remove()

    @torch.no_grad()
    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return what the layer returns in one pass, once per call."""
        found: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda _, __, A: found.append(A))
        try:
            self.net(x)
        finally:
            handle.remove()
        return found


def _float_above(p: Problem) -> bool:
    """Return whether all steps of the net come before Grad-CAM's layer, so that its gradient is exact."""
    x, x0, target = p.x[:4], p.x0[:4], p.target[:4]
    behind = _Behind(p.F.net, gradcam_layer(p.F.net, p.layer)[1], x)
    A, A0 = behind.outputs(x), behind.outputs(x0)
    return len(A) == 1 and isinstance(A[0], Tensor) and not guard.hidden_step(behind, A[0], A0[0], target)


def _logits(p: Problem) -> Problem:
    return replace(p, F=Head(p.F.net, "logit").eval())
