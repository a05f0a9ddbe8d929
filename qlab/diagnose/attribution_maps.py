"""Attribution maps and what is known of each: the results of `qlab.diagnose.attribution`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlab.diagnose import guard
from qlab.diagnose.attribution_methods import METHODS
from qlab.diagnose.base import Result
from qlab.diagnose.guard import Explains, Verdict
from qlab.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["AttributionMap", "Attributions", "marks", "plane"]


@dataclass(frozen=True)
class AttributionMap:
    """The map of one method.

    Attributes:
        method: a name of `METHODS`.
        explains: "deployed", "exact" or "surrogate"; see `qlab.diagnose.guard`.
        values: (N, *shape) as captum gives them.
        scores: (N, M), a score per feature.
        residual: (N,) |sum of scores - (F(x) - F(x0))|.
        relative: (N,) residual / max(|F(x) - F(x0)|, 1e-5 sum of |scores|): a sum below that is rounding.
        complete: whether the method claims a residual of zero.
        zeros: (N, M) codes of exact zeros; see `qlab.diagnose.guard.zero_codes`.
        silent: (N,), whether the map gives no information on the example.
        rank_ablation: (N,) rank correlation with exact ablation, over the features that differ from the baseline.
        rank_flips: (N,) the same with exact flips, over all features.
        infidelity: (N,) captum's, normalized, of features set to their baselines; NaN where it was not asked for.
        sensitivity: (N,) captum's sensitivity_max; NaN where it was not asked for.
        verdict: a word and its reason.
    """

    method: str
    explains: Explains
    values: NDArray[np.float64]
    scores: NDArray[np.float64]
    residual: NDArray[np.float64]
    relative: NDArray[np.float64]
    complete: bool
    zeros: NDArray[np.uint8]
    silent: NDArray[np.bool_]
    rank_ablation: NDArray[np.float64]
    rank_flips: NDArray[np.float64]
    infidelity: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    verdict: Verdict

    @property
    def title(self) -> str:
        """The method's name for readers."""
        return METHODS[self.method].title

    @property
    def median_rank(self) -> float:
        """The median of `rank_ablation` over the examples that have an order to compare; NaN where none has."""
        return _median(self.rank_ablation)


@dataclass(frozen=True)
class Attributions(Result):
    """Maps of one net on one batch.

    Attributes:
        maps: one per method, in the order asked for.
        x: (N, *shape) inputs.
        groups: (*shape) numbers of features.
        target: (N,) classes explained.
        output: what is explained: a name of `OUTPUTS`.
        difference: (N,) F(x) - F(x0) of the deployed net.
        ablation, flips: (N, M) exact references; see `qlab.diagnose.guard`.
        quantized: whether the net's activations pass quantizers of the lab.
        why: why gradients of this net explain a surrogate; empty where they are exact.
    """

    maps: tuple[AttributionMap, ...]
    x: NDArray[np.float64]
    groups: NDArray[np.int64]
    target: NDArray[np.int64]
    output: str
    difference: NDArray[np.float64]
    ablation: NDArray[np.float64]
    flips: NDArray[np.float64]
    quantized: bool
    why: str

    def __getitem__(self, method: str) -> AttributionMap:
        """Return the map of a method."""
        for m in self.maps:
            if m.method == method:
                return m
        raise UnknownNameError("map", method, [m.method for m in self.maps])

    def best(self, example: int) -> str:
        """Return the method whose map ranks the features of an example most like exact ablation, itself left out; "" for none."""
        ranks = {m.method: m.rank_ablation[example] for m in self.maps if m.method != "feature_ablation"}
        known = {name: rank for name, rank in ranks.items() if not np.isnan(rank)}
        return max(known, key=known.__getitem__, default="")

    def frame(self) -> pd.DataFrame:
        """Return a row per method and example."""
        import pandas as pd

        if not self.maps:
            return pd.DataFrame()
        n = len(self.x)
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "method": m.method,
                        "explains": m.explains,
                        "example": np.arange(n),
                        "target": self.target,
                        "residual": m.residual,
                        "relative": m.relative,
                        "exact_zeros": (m.zeros > 0).mean(1),
                        "silent_zeros": (m.zeros == guard.SILENT).mean(1),
                        "no_information": m.silent,
                        "rank_ablation": m.rank_ablation,
                        "rank_flips": m.rank_flips,
                        "infidelity": m.infidelity,
                        "sensitivity_max": m.sensitivity,
                        "verdict": m.verdict.word,
                    }
                )
                for m in self.maps
            ],
            ignore_index=True,
        )

    def table(self) -> pd.DataFrame:
        """Return a row per method: medians over the examples, the verdict and its reason."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "method": m.method,
                    "explains": m.explains,
                    "relative_residual": float(np.median(m.relative)),
                    "claims_completeness": m.complete,
                    "exact_zeros": float((m.zeros > 0).mean()),
                    "no_information": float(m.silent.mean()),
                    "rank_ablation": m.median_rank,
                    "rank_flips": _median(m.rank_flips),
                    "infidelity": _median(m.infidelity),
                    "sensitivity_max": _median(m.sensitivity),
                    "verdict": m.verdict.word,
                    "reason": m.verdict.reason,
                }
                for m in self.maps
            ]
        )

    def figure(self, examples: int = 3) -> Figure:
        """Return inputs, exact ablation and the maps of the first examples; exact zeros are hatched."""
        from qlab.plots.attribution import attribution_figure

        return attribution_figure(self, examples)

    def summary(self) -> str:
        """Return which function each map explains, its residual, its rank and its verdict."""
        kind = "with quantized activations" if self.quantized else "with float activations"
        if self.why and not self.quantized:
            kind = "whose gradient is not that of its values"
        head = (
            f"{len(self.maps)} maps of the target's {self.output.replace('_', ' ')} of a deployed net {kind}, "
            f"{len(self.x)} examples, "
            f"{self.ablation.shape[1]} features; medians."
        )
        return " ".join([head, *(_told(m) for m in self.maps)])


def plane(a: NDArray) -> NDArray:
    """Return an input's numbers as rows and columns: channels of a picture added up, a vector as one row."""
    return a.sum(0) if a.ndim == 3 else a.reshape(1, -1) if a.ndim != 2 else a


def marks(zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an input's codes of zeros as rows and columns: a pixel is marked where the scores of all its channels are zero."""
    return plane(np.where(zeros.all(0), zeros.max(0), 0)[None] if zeros.ndim == 3 else zeros).astype(np.uint8)


def _told(m: AttributionMap) -> str:
    subject = {
        "deployed": "the deployed net",
        "exact": "the deployed net (exact gradient)",
        "surrogate": "the SURROGATE",
    }[m.explains]
    order = (
        "no order to compare"
        if np.isnan(m.median_rank)
        else f"rank correlation with exact ablation {m.median_rank:.2f}"
    )
    gap = f", misses F(x) - F(x0) by {np.median(m.relative):.1%}" if m.complete else ""
    reason = f": {m.verdict.reason}" if m.verdict.reason else ""
    return f"{m.title} explains {subject}{gap}, {order}; verdict: {m.verdict.word}{reason}."


def _median(a: NDArray[np.float64]) -> float:
    known = a[~np.isnan(a)]
    return float(np.median(known)) if len(known) else float("nan")
