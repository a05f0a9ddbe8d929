r"""Attacks on weights: flip the bit in memory that hurts most, and the next, and the next (progressive bit search).

In each step, bits are ranked in every layer by what back-propagation predicts for the loss, -2 w_i g_i; the first n of each layer
are flipped for real, one at a time, and the one that raises the loss most stays flipped. With rank="exact" every bit is tried by
the flip oracle: where gradients vanish or lie, this is the better ranking, and the difference between both shows it. Random flips
of as many bits, over seeds, are what memory faults do. What each single flip does by itself is in `qlab.attacks.weight_bits`.

Deviations from the paper: its bits are those of 8-bit codes, ours are signs; it flips n bits of a layer together, we compare n
single flips; we rank by predicted gain, it ranks by |gradient| and then drops the bits that already stand right. A bit is flipped
once at most, and the search ends where no candidate raises the loss.

Source: Rakin, He, Fan 2019, arXiv 1903.12269.

Shapes: T flips, S seeds, N examples.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.losses import misclassified
from qlab.attacks.victim import checked
from qlab.attacks.weight_bits import WeakestBits, bit_layers, flip_packed, scanning_bits, source_of, weakest_bits
from qlab.data.seeding import generator
from qlab.diagnose.agreement import weight_names
from qlab.diagnose.base import Result
from qlab.diagnose.flip_oracle import flip_oracle
from qlab.diagnose.objective import Loss, Objective
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last
from qlab.quantizers import harden

if TYPE_CHECKING:
    import pandas as pd

    from qlab.binary.packed import PackedNet
    from qlab.plots.figure import Figure

__all__ = [
    "BitSearch",
    "WeakestBits",
    "bit_search",
    "flip_packed",
    "scanning_bits",
    "searching_bits",
    "weakest_bits",
]

Rank = Literal["gradient", "exact"]
Floats = NDArray[np.float64]
Bit = tuple[str, int]
"""A layer and a position in its flat weight."""


@dataclass(frozen=True)
class BitSearch(Result):
    """A progressive bit search against random flips.

    Attributes:
        layer, index: (T,) the bits that were flipped, in order.
        loss, accuracy: (T + 1,) after 0, 1, ..., T flips, on the batch that guides the search.
        random_loss, random_accuracy: (S, T + 1) after as many random flips.
        test_accuracy: (T + 1,) on other examples, None where none were given.
        rank: "gradient" or "exact".
        candidates: n of each layer.
        bits: how many there are in all.
        silent: (T,) share of the bits with a predicted change of exactly zero, when each flip was chosen.
        examples: N.
    """

    layer: tuple[str, ...]
    index: tuple[int, ...]
    loss: Floats
    accuracy: Floats
    random_loss: Floats
    random_accuracy: Floats
    test_accuracy: Floats | None
    rank: str
    candidates: int
    bits: int
    silent: Floats
    examples: int

    def __len__(self) -> int:
        return len(self.index)

    def flips_to(self, accuracy: float) -> int | None:
        """Return after how many flips the accuracy is at most this, None if it never is."""
        below = np.flatnonzero(self.accuracy <= accuracy)
        return int(below[0]) if len(below) else None

    def frame(self) -> pd.DataFrame:
        """Return a row per number of flips and search: search, seed, flips, loss, accuracy, layer, index."""
        import pandas as pd

        own = {"search": "progressive", "seed": 0, "loss": self.loss, "accuracy": self.accuracy}
        tables = [pd.DataFrame({**own, "layer": ["", *self.layer], "index": [-1, *self.index]})]
        for s, (loss, accuracy) in enumerate(zip(self.random_loss, self.random_accuracy, strict=True)):
            row = {"search": "random", "seed": s, "loss": loss, "accuracy": accuracy, "layer": "", "index": -1}
            tables.append(pd.DataFrame(row))
        for table in tables:
            table.insert(2, "flips", np.arange(len(self) + 1))
        return pd.concat(tables, ignore_index=True)

    def figure(self) -> Figure:
        """Return accuracy and loss over the number of flips."""
        from qlab.plots.bit_flips import search_figure

        return search_figure(self)

    def summary(self) -> str:
        """Return the figures in words."""
        ranked = "exact changes" if self.rank == "exact" else "back-propagated gradients"
        text = (
            f"Progressive bit search by {ranked} on {self.examples} examples: {len(self)} of {self.bits:,} bits take accuracy from "
            f"{self.accuracy[0]:.1%} to {self.accuracy[-1]:.1%}"
        )
        if len(self.random_accuracy):
            draws = self.random_accuracy[:, -1]
            text += f"; as many random flips leave {draws.mean():.1%} on average of {len(draws)} draws"
        if self.test_accuracy is not None:
            text += f"; on other examples {self.test_accuracy[0]:.1%} become {self.test_accuracy[-1]:.1%}"
        if len(self.silent) and self.silent.max() > 0.5:
            text += (
                f". The gradient was exactly zero for up to {self.silent.max():.0%} of the bits: rank='exact' sees more"
            )
        return text + "."


def bit_search(
    net: nn.Module | PackedNet,
    x: Tensor,
    y: Tensor,
    flips: int = 20,
    *,
    candidates: int = 10,
    rank: Rank = "gradient",
    layers: Sequence[str] | None = None,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seeds: int = 5,
    seed: int = 0,
    test: tuple[Tensor, Tensor] | None = None,
) -> BitSearch:
    """Flip the bits that hurt most, one after the other, and as many at random.

    Args:
        net, x, y, layers, loss, beta: as for `weakest_bits`.
        flips: T, at most.
        candidates: n, single flips that are tried in each layer for each flip; "exact" tries all.
        rank: "gradient" or "exact".
        seeds: S, random searches.
        seed: of their draws.
        test: other examples and labels, for the accuracy there.

    Raises:
        InputError, UnknownNameError: as `weakest_bits`; numbers that are not positive.
    """
    updates = searching_bits(
        net,
        x,
        y,
        flips,
        candidates=candidates,
        rank=rank,
        layers=layers,
        loss=loss,
        beta=beta,
        seeds=seeds,
        seed=seed,
        test=test,
    )
    return last(updates, BitSearch)


def searching_bits(
    net: nn.Module | PackedNet,
    x: Tensor,
    y: Tensor,
    flips: int = 20,
    *,
    candidates: int = 10,
    rank: Rank = "gradient",
    layers: Sequence[str] | None = None,
    loss: str | Loss = "cross_entropy",
    beta: float = 1.0,
    seeds: int = 5,
    seed: int = 0,
    test: tuple[Tensor, Tensor] | None = None,
) -> Generator[Update, None, None]:
    """Yield progress of `bit_search`; a value holds the flips so far, random searches of the same length come at the end."""
    if rank not in get_args(Rank):
        raise UnknownNameError("ranking of bits", rank, get_args(Rank))
    if flips < 1 or candidates < 1 or seeds < 0:
        raise InputError(
            f"flips is {flips!r}, candidates {candidates!r} and seeds {seeds!r}; expected at least 1, 1 and 0"
        )
    net = checked(source_of(net), x, y, len(x))
    if test is not None:
        checked(net, *test, len(test[0]))
    memory = _Memory(net, x, y, bit_layers(net, x, layers), loss, beta, test)
    loss0, accuracy0, tested = memory.measure(True)
    losses, accuracies, tests = [loss0], [accuracy0], [tested]
    found: list[Bit] = []
    silent: list[float] = []
    random: list[tuple[list[float], list[float]]] = []

    def result() -> BitSearch:
        T = len(found)
        curves = [np.array([r[k] for r in random]).reshape(len(random), T + 1) for k in (0, 1)]
        return BitSearch(
            tuple(name for name, _ in found),
            tuple(i for _, i in found),
            np.array(losses),
            np.array(accuracies),
            curves[0],
            curves[1],
            None if test is None else np.array(tests),
            rank,
            candidates,
            memory.bits,
            np.array(silent),
            len(x),
        )

    work = flips * (1 + seeds)
    for t in range(flips):
        best, still = memory.worst(candidates, rank, set(found), losses[-1])
        if best is None:
            break
        found.append(best)
        silent.append(still)
        memory.flip(*best)
        after, accuracy, tested = memory.measure(True)
        losses.append(after)
        accuracies.append(accuracy)
        tests.append(tested)
        yield Update((t + 1) / work, f"{t + 1} flips: {accuracy:.1%} right", result())
    for name, i in found:
        memory.flip(name, i)  # as it was
    for s in range(seeds if found else 0):
        curve = ([loss0], [accuracy0])
        drawn = memory.draw(len(found), generator("random bit flips", seed, s))
        for name, i in drawn:
            memory.flip(name, i)
            after, accuracy, _ = memory.measure(False)
            curve[0].append(after)
            curve[1].append(accuracy)
        for name, i in drawn:
            memory.flip(name, i)
        random.append(curve)
        yield Update((flips + (s + 1) * flips) / work, f"random flips, draw {s + 1} of {seeds}")
    yield Update(1.0, f"{len(found)} flips", result())


class _Memory:
    """The weights of a deployed net as memory whose bits flip; a copy, the net stays as it is."""

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        layers: list[str],
        loss: str | Loss,
        beta: float,
        test: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.net = harden(net)  # activations keep their backward rules, which rank by gradient needs
        self.J = Objective(self.net, x, y, loss=loss, beta=beta)
        self.names = {layer: weight_names(self.net)[layer] for layer in layers}
        self.weights = {layer: self.net.get_parameter(name).data for layer, name in self.names.items()}
        self.sizes = [w.numel() for w in self.weights.values()]
        self.bits = sum(self.sizes)
        self.loss, self.beta, self.test = loss, beta, test

    def flip(self, layer: str, i: int) -> None:
        """Flip one bit."""
        w = self.weights[layer]
        at = tuple(int(v) for v in np.unravel_index(i, w.shape))
        w[at] = -w[at] if w[at] != 0 else -torch.finfo(w.dtype).tiny  # sign(0) = +1

    @torch.no_grad()
    def measure(self, tested: bool) -> tuple[float, float, float]:
        """Return loss and accuracy, and the accuracy on other examples if wanted."""
        z = self.net(self.J.x)
        value = float(self.J.loss(self.beta * z, self.J.y).double().mean())
        other = np.nan
        if self.test is not None and tested:
            other = 1 - float(misclassified(self.net(self.test[0]), self.test[1]).double().mean())
        return value, 1 - float(misclassified(z, self.J.y).double().mean()), other

    def worst(self, n: int, rank: Rank, flipped: set[Bit], now: float) -> tuple[Bit | None, float]:
        """Return the candidate whose flip raises the loss most, None if none does, and the share of predictions that are zero."""
        best, top, still = None, now, 0
        gradients = self.J.gradient(list(self.names.values()))
        for layer, name in self.names.items():
            w = self.weights[layer]
            rows = w.abs().flatten(1)
            # +-alpha as it stands; of the latent weights of a hand-written layer the net reads the signs
            values = w if bool((rows == rows[:, :1]).all()) else torch.where(w >= 0, 1.0, -1.0).to(w)
            gain = (-2 * values * gradients[name]).flatten().double()
            still += int((gain == 0).sum())
            if rank == "exact":
                scan = flip_oracle(self.net, self.J.x, self.J.y, layer, loss=self.loss, beta=self.beta)
                gain = torch.from_numpy(scan.delta)
            gain = gain.cpu().clone()
            gain[[i for at, i in flipped if at == layer]] = -torch.inf
            for i in gain.argsort(descending=True, stable=True)[:n].tolist():
                if gain[i] == -torch.inf:
                    continue
                self.flip(layer, i)
                after = self.measure(False)[0]
                self.flip(layer, i)
                if after > top:
                    best, top = (layer, i), after
        return best, still / self.bits

    def draw(self, count: int, noise: torch.Generator) -> list[Bit]:
        """Return distinct bits, all equally likely."""
        ends = np.cumsum(self.sizes)
        out = []
        for k in torch.randperm(self.bits, generator=noise)[:count].tolist():
            j = int(np.searchsorted(ends, k, side="right"))
            out.append((list(self.names)[j], k - int(ends[j]) + self.sizes[j]))
        return out
