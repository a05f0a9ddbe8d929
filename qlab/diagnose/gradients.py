r"""Gradient mismatch: the back-propagated gradient of every layer against references that need no derivative.

| reference  | truth for coordinate i                                              | function            |
|------------|---------------------------------------------------------------------|---------------------|
| coordinate | CDG_i = (L(w + eps e_i) - L(w - eps e_i)) / (2 eps)                 | deployed            |
| smoothed   | grad L_s, L_s(w) = E L(w + s u), antithetic pairs (`smoothing`)     | deployed, smoothed  |
| flip       | (L(b_i = +1) - L(b_i = -1)) / (2 alpha), binary layers only         | deployed, in bits   |

CDG_i is the derivative of L averaged over [w_i - eps, w_i + eps]; for a binary weight it is flip_i alpha / eps where
|w_i| < eps, else 0. In a layer where the loss is smooth all references tend to the gradient for small eps and s, and the cosine
to 1.

Beside them stand the indirect measures of each layer, defined in `saturation`: pre-activations beyond +-1, zero gradients, dead
units, the angle of binarization.

The loss is the margin by default: cross-entropy of saturated logits would mix a vanishing gradient with a wrong one; a small
beta does the same for cross-entropy. All gradients are of the same batch.

Source: Kim et al., BinaryDuo, ICLR 2020, arXiv 2002.06517 (coordinate discrete gradient).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.agreement import agreement, weight_names
from qlab.diagnose.base import Result, check
from qlab.diagnose.flip_oracle import flip_oracle, hard_net, not_bits
from qlab.diagnose.functions import variant
from qlab.diagnose.input_gradients import input_pairs
from qlab.diagnose.objective import Loss, Objective
from qlab.diagnose.saturation import LayerState, layer_states
from qlab.diagnose.smoothing import perturbed_losses, rms, smoothed_gradient, subset
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["REFERENCES", "Compared", "Mismatch", "believing", "mismatch", "mismatching"]

Reference = Literal["coordinate", "smoothed", "flip"]
REFERENCES: tuple[Reference, ...] = ("coordinate", "smoothed", "flip")


@dataclass(frozen=True)
class Compared:
    """The surrogate's gradient of one layer against one reference.

    Args:
        layer, reference: names; the layer is "input" for inputs.
        cosine: c.
        low, high: 95 % interval of c, NaN for references without noise.
        corrected: c / sqrt(R) for "smoothed", c else.
        reliability: R for "smoothed", 1 else.
        spearman, sign_agreement: as in `Agreement`.
        n: coordinates compared.
        nonzero: those whose truth is not zero.
        width: eps or s; NaN for flips.
        pairs: antithetic pairs; 0 where none are drawn.
    """

    layer: str
    reference: str
    cosine: float
    low: float
    high: float
    corrected: float
    reliability: float
    spearman: float
    sign_agreement: float
    n: int
    nonzero: int
    width: float
    pairs: int


@dataclass(frozen=True)
class Mismatch(Result):
    """Gradient mismatch by layer and reference.

    Args:
        rows: one per layer and reference.
        states: one per layer: what indirect measures say.
        points: (layer, reference) -> surrogate and truth (n,).
        index: layer -> (n,) positions of the compared coordinates in the flat weight; empty for inputs.
        examples: N.
        of: "weights" or "inputs".
    """

    rows: tuple[Compared, ...]
    states: tuple[LayerState, ...]
    points: dict[tuple[str, str], tuple[NDArray[np.float64], NDArray[np.float64]]]
    index: dict[str, NDArray[np.int64]]
    examples: int
    of: str

    def frame(self) -> pd.DataFrame:
        """Return a row per layer and reference, with the layer's indirect measures beside it."""
        import pandas as pd

        states = {state.layer: asdict(state) for state in self.states}
        return pd.DataFrame([asdict(row) | states.get(row.layer, {}) for row in self.rows])

    def figure(self) -> Figure:
        """Return a scatter of the surrogate against the truth, a panel per layer and reference."""
        from qlab.plots.mismatch import mismatch_figure

        return mismatch_figure(self)

    def summary(self) -> str:
        """Return the cosines in words."""
        what = "weights" if self.of == "weights" else "inputs"
        parts = []
        for layer in dict.fromkeys(row.layer for row in self.rows):
            told = "; ".join(_told(row) for row in self.rows if row.layer == layer)
            parts.append(f"{layer}: {told}")
        states = ", ".join(f"{s.layer} {s.saturation:.0%}" for s in self.states if not math.isnan(s.saturation))
        beyond = f" Pre-activations beyond +-1: {states}." if states else ""
        return (
            f"Back-propagated gradient of the {what} (surrogate) against derivative-free gradients of the deployed net, "
            f"{self.examples} examples. Cosines: {'. '.join(parts)}.{beyond}"
        )


def _told(row: Compared) -> str:
    if math.isnan(row.cosine):
        return f"{row.reference} none (a gradient is zero)"
    if row.reference == "smoothed":
        return (
            f"smoothed {row.cosine:.2f} ({row.low:.2f} to {row.high:.2f}, reliability {row.reliability:.2f}, "
            f"without noise {row.corrected:.2f})"
        )
    return f"{row.reference} {row.cosine:.2f} (signs {row.sign_agreement:.0%} of {row.nonzero})"


def mismatch(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str] | None = None,
    references: Sequence[str] = REFERENCES,
    *,
    of: Literal["weights", "inputs"] = "weights",
    loss: str | Loss = "margin",
    beta: float = 1.0,
    eps: float | None = None,
    s: float | None = None,
    pairs: int = 200,
    coordinates: int | None = 300,
    seed: int = 0,
) -> Mismatch:
    """Compare the back-propagated gradient with derivative-free gradients of the deployed net, layer by layer.

    Args:
        net: a method of the lab or any torch module, in eval mode; latent weights stay latent.
        x: (N, ...) inputs.
        y: (N,) labels.
        layers: names of `weight_names(net)`; all by default. Not for inputs.
        references: names of `REFERENCES`; "flip" passes over layers that are not binary, and over inputs.
        of: gradients with respect to weights, or to the inputs, example by example.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        beta: what the logits are multiplied by.
        eps: half the step of "coordinate"; by default the root mean square of the layer, a quarter of it for inputs.
        s: width of "smoothed"; the same default.
        pairs: antithetic pairs of "smoothed".
        coordinates: at most so many of a layer, or of each input, drawn at random; None takes all.
        seed: of coordinates and directions.

    Raises:
        UnknownNameError: no such layer or reference.
        InputError: nothing to compare, a width or number that is not positive; and what `check` says.
    """
    return last(mismatching(
        net, x, y, layers, references, of=of, loss=loss, beta=beta, eps=eps, s=s, pairs=pairs,
        coordinates=coordinates, seed=seed,
    ), Mismatch)  # fmt: skip


def mismatching(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str] | None = None,
    references: Sequence[str] = REFERENCES,
    *,
    of: Literal["weights", "inputs"] = "weights",
    loss: str | Loss = "margin",
    beta: float = 1.0,
    eps: float | None = None,
    s: float | None = None,
    pairs: int = 200,
    coordinates: int | None = 300,
    seed: int = 0,
) -> Iterator[Update]:
    """Compute `mismatch` step by step: an update after each layer and reference, with all there is so far."""
    net, _ = check(net, x, y)
    _check_options(references, of, eps, s, pairs, coordinates)
    J = Objective(net, x, y, loss=loss, beta=beta)
    rows: list[Compared] = []
    points: dict[tuple[str, str], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    if of == "inputs":
        if layers is not None:
            raise InputError("layers were named, but the gradients are of inputs; leave layers out")
        todo = [r for r in references if r != "flip"]
        if not todo:
            raise InputError("inputs have no bits to flip; expected 'coordinate' or 'smoothed' among the references")
        for done, reference in enumerate(todo):
            row, pair = input_pairs(J, reference, eps if reference == "coordinate" else s, pairs, coordinates, seed)
            rows.append(Compared("input", reference, **row))
            points["input", reference] = pair
            yield Update(
                (done + 1) / len(todo), f"input, {reference}", Mismatch(tuple(rows), (), dict(points), {}, len(x), of)
            )
        return
    names = weight_names(net)
    if layers is not None and (isinstance(layers, str) or not layers):
        raise InputError(f"layers is {layers!r}; expected a sequence of names, some of {', '.join(names)}")
    for layer in layers or ():
        if layer not in names:
            raise UnknownNameError("layer", layer, names)
    names = {layer: name for layer, name in names.items() if layers is None or layer in layers}
    if not names:
        raise InputError("this net has no weights to compare gradients of")
    g = J.gradient(list(names.values()))
    states = layer_states(net, x, names, g)
    hard = hard_net(net)
    deployed = Objective(variant(net, "deployed"), x, y, loss=loss, beta=beta)
    where: dict[str, NDArray[np.int64]] = {}
    steps = len(names) * len(references)
    done = 0
    yield Update(0.0, "Back-propagated", Mismatch((), states, {}, {}, len(x), of))
    for layer, name in names.items():
        w = J.theta[name]
        index = subset(w.numel(), coordinates, seed).to(w.device)
        believed = g[name].flatten()[index]
        where[layer] = index.cpu().numpy()
        binary = "flip" in references and not_bits(hard, x, weight_names(hard)[layer]) is None
        for reference in references:
            done += 1
            low = high = width = math.nan
            corrected, R, drawn = None, 1.0, 0
            if reference == "coordinate":
                width = eps or rms(w)
                step = width * torch.eye(len(index), dtype=w.dtype, device=w.device)
                up, down = (perturbed_losses(deployed, name, index, sign * step) for sign in (1, -1))
                truth = (up - down) / (2 * width)
            elif reference == "smoothed":
                smooth = smoothed_gradient(
                    net, x, y, layer, s=s, pairs=pairs, index=index, loss=loss, beta=beta, seed=seed
                )
                c = smooth.cosine(believed.cpu())
                truth, width, drawn = smooth.gradient, smooth.s, pairs
                low, high, corrected, R = c.low, c.high, c.corrected, c.reliability
            elif binary:
                truth = torch.from_numpy(flip_oracle(net, x, y, layer, loss=loss, beta=beta, index=index).gradient)
            else:
                continue
            a = agreement(believed, truth.reshape(believed.shape))
            corrected = a.cosine if corrected is None else corrected
            rows.append(
                Compared(
                    layer, reference, a.cosine, low, high, corrected, R, a.spearman, a.sign_agreement, a.n, a.nonzero,
                    width, drawn,
                )
            )  # fmt: skip
            points[layer, reference] = (believed.double().cpu().numpy(), truth.double().cpu().numpy())
            yield Update(
                done / steps,
                f"{layer}, {reference}",
                Mismatch(tuple(rows), states, dict(points), dict(where), len(x), of),
            )
    yield Update(1.0, "Compared", Mismatch(tuple(rows), states, points, where, len(x), of))


def believing(
    known: Mismatch, net: nn.Module, x: Tensor, y: Tensor, *, loss: str | Loss = "margin", beta: float = 1.0
) -> Mismatch:
    """Compare another surrogate with the truths of `known`: they belong to the deployed net, which it does not change.

    Args:
        known: from `mismatch` of weights, of the same net with whatever surrogate, batch, loss and beta; its smoothed
            references are left out, for their intervals depend on the surrogate.
        net, x, y, loss, beta: as in `mismatch`.

    Raises:
        UnknownNameError: a layer that the net does not have.
        InputError: gradients of inputs; and what `check` says.
    """
    if known.of != "weights":
        raise InputError("the known truths are of inputs; expected those of weights")
    J = Objective(net, x, y, loss=loss, beta=beta)
    names = weight_names(J.net)
    for layer in known.index:
        if layer not in names:
            raise UnknownNameError("layer", layer, names)
    names = {layer: names[layer] for layer in known.index}
    g = J.gradient(list(names.values()))
    rows, points = [], {}
    for row in known.rows:
        if row.reference == "smoothed":
            continue
        believed = g[names[row.layer]].flatten().double().cpu()[torch.from_numpy(known.index[row.layer])]
        _, truth = known.points[row.layer, row.reference]
        a = agreement(believed, torch.from_numpy(truth))
        rows.append(
            replace(row, cosine=a.cosine, corrected=a.cosine, spearman=a.spearman, sign_agreement=a.sign_agreement)
        )
        points[row.layer, row.reference] = (believed.numpy(), truth)
    return Mismatch(tuple(rows), layer_states(J.net, x, names, g), points, known.index, len(x), known.of)


def _check_options(
    references: Sequence[str], of: str, eps: float | None, s: float | None, pairs: int, coordinates: int | None
) -> None:
    if of not in ("weights", "inputs"):
        raise InputError(f"of is {of!r}; expected 'weights' or 'inputs'")
    if isinstance(references, str) or not references:
        raise InputError(f"references is {references!r}; expected some of {', '.join(REFERENCES)}")
    for reference in references:
        if reference not in REFERENCES:
            raise UnknownNameError("reference", reference, REFERENCES)
    for name, width in (("eps", eps), ("s", s)):
        if width is not None and not (math.isfinite(width) and width > 0):
            raise InputError(f"{name} is {width!r}; expected a positive number")
    if pairs < 4 or (coordinates is not None and coordinates < 2):
        raise InputError(f"pairs is {pairs} and coordinates {coordinates}; expected at least 4 and 2")
