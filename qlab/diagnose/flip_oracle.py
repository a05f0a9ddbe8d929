r"""The exact loss change of flipping each binary weight of a layer.

    delta_oi = L(W with w_oi -> -w_oi) - L(W)                   of the deployed net, on one batch
    predicted_oi = -2 w_oi g_oi,  g = dL/dW as back-propagated   what a straight-through gradient says the change is;
                                                                 sign(w_oi) for w_oi where w is a hand-written layer's latent weight

A flip touches one unit of the layer, z'_no = z_no - 2 w_oi a_ni, and nothing before it. So only what lies behind is run
again, and only for what differs:

1. What follows unit by unit (batch norm, sign, ReLU) runs on the changed pre-activations of all units at once.
2. An example whose unit gives what it gave before keeps its loss. Examples do not see each other in eval mode.
3. If inputs have few levels u, as signs do, z'_no takes the values z_no -+ 2 alpha_o u only: a table T_us (N, O) of loss changes
   holds all flips, and delta = mean_n T_us(n, o) [a_ni = u] is a matrix product. If the activation has two levels, one table
   T (N, O), "unit o answers the other way for example n", does the same for inputs of any kind.
4. Into the next linear layer goes a rank-one update, z2' = z2 + (a'_o - a_o) W2[:, o].

Nothing is approximated. Nets that cannot be cut behind the layer (control flow, layers used twice, hand-written layers) run
whole, many flips at a time; so do nets whose signs see ties that only rounding decides (sums of +-alpha that would be 0), for a
sum taken another way would decide them otherwise.

Bits are the hard weights of quantizers, weights that are +-alpha per output channel as they stand, and weights of hand-written
layers where the net reads no more than their signs and mean magnitudes; these flip as w -> -w.

Shapes: layer O outputs, K inputs per output (I, or C kh kw); batch N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.agreement import Agreement, agreement, checked_index, weight_names
from qlab.diagnose.base import Result, check, plain
from qlab.diagnose.behind import Behind, Uncut
from qlab.diagnose.functions import variant
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last
from qlab.quantizers import harden

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["FlipOracle", "binary_layers", "flip_oracle", "flipping", "hard_net"]

_STACK = 2**24  # numbers in a stack of whole weights, at most


@dataclass(frozen=True)
class FlipOracle(Result):
    """Loss changes of single flips, exact and as the back-propagated gradient predicts them.

    Args:
        layer: whose weights flip.
        index: (F,) positions of the flipped weights in the flat weight.
        shape: of the weight.
        delta: (F,) exact changes of the loss.
        predicted: (F,) -2 alpha sign(w) g.
        weight: (F,) the weights before the flip.
        alpha: (F,) their magnitudes; 1 in a hand-written layer, whose weights are latent.
        loss: of the net before.
        agreement: of predicted with delta.
        path: "table", "columns" or "whole": how it was computed; see the module.
        examples: N.
    """

    layer: str
    index: NDArray[np.int64]
    shape: tuple[int, ...]
    delta: NDArray[np.float64]
    predicted: NDArray[np.float64]
    weight: NDArray[np.float64]
    alpha: NDArray[np.float64]
    loss: float
    agreement: Agreement
    path: str
    examples: int

    @property
    def gradient(self) -> NDArray[np.float64]:
        """Return flip_i = (L(b_i = +1) - L(b_i = -1)) / (2 alpha_i), (F,): the discrete gradient of the bits."""
        return -self.delta * np.where(self.weight >= 0, 1.0, -1.0) / (2 * self.alpha)

    def frame(self) -> pd.DataFrame:
        """Return a row per flip: layer, index, unit, weight, delta, predicted."""
        import pandas as pd

        unit = self.index // max(1, int(np.prod(self.shape[1:])))
        columns = {"index": self.index, "unit": unit, "weight": self.weight}
        return pd.DataFrame({"layer": self.layer, **columns, "delta": self.delta, "predicted": self.predicted})

    def figure(self) -> Figure:
        """Return a scatter of predicted against exact changes."""
        from qlab.plots.mismatch import flip_figure

        return flip_figure(self)

    def summary(self) -> str:
        """Return the agreement in words."""
        a = self.agreement
        better = int((self.delta < 0).sum())
        still = int((self.delta == 0).sum())
        return (
            f"Deployed net, {self.layer}: {a.n:,} single flips, exact on {self.examples} examples (loss {self.loss:.4g}). "
            f"{better:,} of them lower the loss, {still:,} do not change it. The back-propagated prediction -2wg: "
            f"cosine {a.cosine:.2f}, rank correlation {a.spearman:.2f}, right sign for {a.sign_agreement:.0%} of the "
            f"{a.nonzero:,} flips that matter."
        )


def hard_net(net: nn.Module) -> nn.Module:
    """Return the deployed net: hard weights as ordinary parameters, hard activations."""
    return variant(harden(plain(net)), "deployed")


def binary_layers(net: nn.Module, x: Tensor) -> list[str]:
    """Return the layers whose weights are bits in the deployed net, by name.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs, on which hand-written layers are tried.

    Raises:
        InputError: from `check`.
    """
    net, _ = check(net, x, None, labels=False)
    hard = hard_net(net)
    return [layer for layer, name in weight_names(hard).items() if not_bits(hard, x, name) is None]


def flip_oracle(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    layer: str,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    index: Tensor | None = None,
) -> FlipOracle:
    """Return delta_oi = L(w_oi -> -w_oi) - L of the deployed net for each binary weight of a layer, without approximation.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        layer: a name of `binary_layers(net, x)`.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        beta: what the logits are multiplied by.
        index: (F,) positions in the flat weight to flip, int64; all of them by default.

    Raises:
        UnknownNameError: no such layer.
        InputError: weights of that layer are no bits; an index out of range or twice; and what `check` says.
    """
    return last(flipping(net, x, y, layer, loss=loss, beta=beta, index=index), FlipOracle)


def flipping(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    layer: str,
    *,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    index: Tensor | None = None,
) -> Iterator[Update]:
    """Compute `flip_oracle` step by step; the last update holds the result."""
    net, _ = check(net, x, y)
    names = weight_names(net)
    if layer not in names:
        raise UnknownNameError("layer", layer, names)
    hard = hard_net(net)
    name = weight_names(hard)[layer]
    why = not_bits(hard, x, name)
    if why is not None:
        raise InputError(f"the weights of {layer!r} are no bits: {why}. Layers of bits: {_listed(net, x)}")
    J = Objective(hard, x, y, loss=loss, beta=beta)
    w = J.theta[name]
    index = checked_index(index, w)
    delta = torch.zeros(w.numel(), dtype=torch.float64)
    path = "whole"
    try:
        behind = Behind(J, layer, name)
    except Uncut:
        changes = _whole(J, name, index)
    else:
        path, changes = behind.path, behind.changes(index)
    done = 0
    for where, values in changes:
        delta[where] = values.double().cpu()
        done += len(where)
        yield Update(min(1.0, done / len(index)), f"Flipping weights of {layer}")
    g = _gradient(net, x, y, name, loss, beta)
    at = index.cpu()
    weight = w.flatten()[index].double().cpu()
    alpha = weight.abs() if _two_values_a_row(w) else torch.ones_like(weight)
    predicted = -2 * alpha * torch.where(weight >= 0, 1.0, -1.0) * g.flatten()[index].double().cpu()
    yield Update(
        1.0,
        f"Flipped {len(index):,} weights of {layer}",
        FlipOracle(
            layer=layer,
            index=at.numpy(),
            shape=tuple(w.shape),
            delta=delta[at].numpy(),
            predicted=predicted.numpy(),
            weight=weight.numpy(),
            alpha=alpha.numpy(),
            loss=float(J.loss(J.beta * J.base_logits, y).mean()),
            agreement=agreement(predicted, delta[at]),
            path=path,
            examples=len(x),
        ),
    )


def _gradient(net: nn.Module, x: Tensor, y: Tensor, name: str, loss: str | Loss, beta: float) -> Tensor:
    """Return dL/dW of the hard weights, back-propagated by the rules that the net declares for its activations."""
    return Objective(harden(net), x, y, loss=loss, beta=beta).gradient([name])[name]


def _whole(J: Objective, name: str, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield flat positions and loss changes, running the whole net for stacks of weights."""
    w = J.theta[name]
    before = J.loss(J.beta * J.base_logits, J.y)
    flipped = torch.where(w == 0, -torch.finfo(w.dtype).tiny, -w).flatten()
    for where in index.split(max(1, min(J.chunk, _STACK // w.numel()))):
        stack = w.flatten().repeat(len(where), 1)
        stack[torch.arange(len(where), device=w.device), where] = flipped[where]
        stack = stack.reshape(-1, *w.shape)
        try:
            z = J.logits({name: stack})
        except RuntimeError:  # an operation that torch.func does not know: one flip at a time
            with torch.no_grad():
                z = torch.stack([torch.func.functional_call(J.net, J.theta | {name: v}, (J.x,)) for v in stack])
        after = torch.stack([J.loss(J.beta * one, J.y) for one in z])
        yield where.cpu(), (after - before).mean(1)


def _listed(net: nn.Module, x: Tensor) -> str:
    found = binary_layers(net, x)
    return ", ".join(found) if found else "none; quantize the net first, with qlab.quantize(net, weights=Sign)"


@torch.no_grad()
def not_bits(hard: nn.Module, x: Tensor, name: str) -> str | None:
    """Return why a weight is no tensor of bits, None where it is one."""
    w = hard.get_parameter(name).detach()
    if _two_values_a_row(w):
        return None
    if _reads_signs_only(hard, x, name, w):
        return None
    return f"they take {len(torch.unique(w)):,} values, and the net's answer depends on more than their signs"


def _two_values_a_row(w: Tensor) -> bool:
    rows = w.abs().flatten(1) if w[0].numel() > 1 else w.abs().flatten()[None]  # one input each: compare over units
    return rows.numel() > 1 and bool((rows == rows[:, :1]).all()) and bool((rows > 0).all())


def _reads_signs_only(hard: nn.Module, x: Tensor, name: str, w: Tensor) -> bool:
    """Whether other magnitudes, of the same mean in each row, leave the answer as it is, and other signs do not."""

    def logits(value: Tensor) -> Tensor:
        return torch.func.functional_call(hard, {name: value}, (x,))

    z = hard(x)
    tolerance = 1e3 * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max()))
    signs = torch.where(w >= 0, 1.0, -1.0).to(w)
    if w[0].numel() == 1:  # a row of one weight is its own mean
        return False
    mean = w.abs().flatten(1).mean(1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        m = torch.randn(w.shape, generator=draw, dtype=torch.float64).mul(1.5).exp().to(w)
        m = m * (mean / m.flatten(1).mean(1)).reshape(-1, *[1] * (w.dim() - 1))
        if not torch.allclose(logits(signs * m), z, rtol=0.0, atol=tolerance):
            return False
    return not torch.allclose(logits(-w), z, rtol=0.0, atol=tolerance)
