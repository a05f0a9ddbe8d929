r"""Maps of a float net and of its quantized twin, side by side.

    rank      = Spearman(scores of the float net, scores of the quantized net), per example and method
    agreement = |top_k(float) & top_k(quantized)| / k,  k = a tenth of the features, at least 1; by magnitude

Two nets may differ because they compute different things or because a map fails on one of them. Exact ablation, which fails
on neither, is compared too and tells the two apart.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.attribution import Attributions, attributing
from qlab.diagnose.base import Result, plain
from qlab.diagnose.guard import spearman
from qlab.jobs import Update, last
from qlab.quantizers.apply import harden

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["Twins", "agreement", "twinning", "twins"]

EXACT = "exact ablation"


@dataclass(frozen=True)
class Twins(Result):
    """Maps of two nets on the same batch.

    Attributes:
        float_net, quantized_net: the maps of each.
        same_class: (N,), whether both deployed nets predict the same class.
        rank: by method (and "exact ablation"), (N,) rank correlation between the twins.
        agreement: by method (and "exact ablation"), (N,) share of the top features they have in common.
    """

    float_net: Attributions
    quantized_net: Attributions
    same_class: NDArray[np.bool_]
    rank: dict[str, NDArray[np.float64]]
    agreement: dict[str, NDArray[np.float64]]

    def frame(self) -> pd.DataFrame:
        """Return a row per method and example."""
        import pandas as pd

        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "method": name,
                        "example": np.arange(len(rank)),
                        "rank": rank,
                        "agreement": self.agreement[name],
                        "same_class": self.same_class,
                    }
                )
                for name, rank in self.rank.items()
            ],
            ignore_index=True,
        )

    def figure(self, example: int = 0) -> Figure:
        """Return the maps of one example: the float net above, its twin below."""
        from qlab.plots.attribution import twins_figure

        return twins_figure(self, example)

    def summary(self) -> str:
        """Return how far the twins' maps agree, next to how far the nets themselves do."""
        from qlab.diagnose.attribution_methods import METHODS

        n = len(self.same_class)
        parts = [
            f"{METHODS[name].title if name in METHODS else name} {np.nanmedian(rank):.2f}"
            if not np.isnan(rank).all()
            else f"{METHODS[name].title if name in METHODS else name}: no order to compare"
            for name, rank in self.rank.items()
        ]
        words = [
            f"{m.title} {label}: {m.verdict.word}"
            for label, maps in (("float", self.float_net), ("quantized", self.quantized_net))
            for m in maps.maps
        ]
        return (
            f"The twins predict the same class for {int(self.same_class.sum())} of {n} examples. Rank correlation between them "
            f"(median): {', '.join(parts)}. Verdicts: {'; '.join(words)}. Gradient methods on the quantized net explain "
            f"{'its SURROGATE' if self.quantized_net.why else 'the deployed net, whose activations are float'}."
        )


def agreement(a: NDArray[np.float64], b: NDArray[np.float64], share: float = 0.1) -> NDArray[np.float64]:
    """Return the share (N,) of the top features by magnitude that two sets of scores (N, M) have in common."""
    k = max(1, round(share * a.shape[1]))
    tops = [np.argsort(-np.abs(s), axis=1, kind="stable")[:, :k] for s in (a, b)]
    return np.array([len(np.intersect1d(p, q)) / k for p, q in zip(*tops, strict=True)])


def twinning(
    float_net: nn.Module, quantized_net: nn.Module, x: Tensor, target: int | Tensor, **settings: Any
) -> Generator[Update, None, None]:
    """Yield updates whose values are `Twins` with one method more each, from the references alone on; arguments as of `twins`."""
    runs = [attributing(net, x, target, **settings) for net in (float_net, quantized_net)]
    same: NDArray[np.bool_] | None = None
    for a, b in zip(*runs, strict=True):
        if same is None:  # both nets and all arguments have been checked now
            with torch.no_grad():
                classes = [harden(plain(net))(x).argmax(1) for net in (float_net, quantized_net)]
            same = (classes[0] == classes[1]).cpu().numpy()
        yield Update(b.fraction, b.text, None if b.value is None else _paired(a.value, b.value, same))


def _paired(a: Attributions, b: Attributions, same_class: NDArray[np.bool_]) -> Twins:
    pairs = {EXACT: (a.ablation, b.ablation)} | {m.method: (a[m.method].scores, m.scores) for m in b.maps}
    return Twins(
        float_net=a,
        quantized_net=b,
        same_class=same_class,
        rank={name: spearman(p, q) for name, (p, q) in pairs.items()},
        agreement={name: agreement(p, q) for name, (p, q) in pairs.items()},
    )


def twins(float_net: nn.Module, quantized_net: nn.Module, x: Tensor, target: int | Tensor, **settings: Any) -> Twins:
    """Attribute the same output of two nets, and compare the maps.

    Args:
        float_net: in eval mode.
        quantized_net: a quantized net of the same inputs and classes, in eval mode.
        x: (N, *shape) inputs.
        target: a class, or one per example (N,) int64.
        settings: as of `qlab.diagnose.attribution.attribute`.

    Raises:
        InputError, UnknownNameError: as `attribute`.
    """
    return last(twinning(float_net, quantized_net, x, target, **settings), Twins)
