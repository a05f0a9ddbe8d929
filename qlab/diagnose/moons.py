r"""A small binary net learning two moons, step by step: what a surrogate is worth, in a second.

2 - 32 - 32 - 2, batch norm, signs for activations and for the weights of the middle layer; the first and last layer have float
weights, for two inputs times signs would give four directions only. Adam on full batches of cross-entropy. Everything is drawn
from the seed, so two surrogates start from the same net and see the same points.

Shapes: T recorded steps, G x G grid over the plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.diagnose.base import Result
from qlab.errors import InputError
from qlab.jobs import Update, last
from qlab.quantizers import Sign, quantize, surrogate
from qlab.quantizers.surrogates import Surrogate

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["MoonsRun", "moons", "moons_data", "moons_training"]

HIDDEN = (32, 32)
EVERY = 10


@dataclass(frozen=True)
class MoonsRun(Result):
    """A run so far.

    Args:
        surrogate: its name.
        steps: (T,) recorded steps.
        losses: (T,) cross-entropy of the batch at that step.
        accuracies: (T,) of the deployed net on points it has not seen.
        decisions: (G, G) score of class 1 minus class 0; rows from the lowest y up.
        extent: (left, right, bottom, top) of the grid.
        net: as trained, in eval mode.
    """

    surrogate: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    decisions: NDArray[np.float32]
    extent: tuple[float, float, float, float]
    net: nn.Module

    def frame(self) -> pd.DataFrame:
        """Return a row per recorded step: step, loss, accuracy."""
        import pandas as pd

        return pd.DataFrame({"step": self.steps, "loss": self.losses, "accuracy": self.accuracies})

    def figure(self) -> Figure:
        """Return the curves of loss and accuracy."""
        from qlab.plots import lines_figure

        curves: dict[str, dict[str, tuple[Any, Any]]] = {
            "loss": {self.surrogate: (self.steps, self.losses)},
            "deployed accuracy": {self.surrogate: (self.steps, self.accuracies)},
        }
        return lines_figure(curves, "step", alt=self.summary())

    def summary(self) -> str:
        """Return where the run stands."""
        return (
            f"Two moons with the {self.surrogate} surrogate, step {self.steps[-1]}: loss {self.losses[-1]:.3f}, accuracy of the "
            f"deployed net {self.accuracies[-1]:.1%}."
        )


@cache
def moons_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 512 training points (512, 2), their labels, and those of 400 unseen points, float64."""
    from qlab.data import load

    data = load("two_moons", noise=0.15)
    train, test = data.split("train"), data.split("test")
    x, other = (data.transform(split.x).double() for split in (train, test))
    return x[:512], train.y[:512].long(), other[:400], test.y[:400].long()


def moons(which: str | Surrogate = "clipped", steps: int = 300, lr: float = 0.02, seed: int = 0) -> MoonsRun:
    """Train to the end and return the run; see `moons_training`."""
    return last(moons_training(which, steps, lr=lr, seed=seed), MoonsRun)


def moons_training(
    which: str | Surrogate = "clipped", steps: int = 300, *, lr: float = 0.02, seed: int = 0, grid: int = 48
) -> Iterator[Update]:
    """Train a binary net on two moons with a surrogate; an update every 10 steps, with the run so far.

    Args:
        which: the surrogate of all its signs.
        steps: full batches of 512 points.
        lr: of Adam.
        seed: of the net.
        grid: G.

    Raises:
        UnknownNameError: no such surrogate.
        InputError: numbers that are not positive.
    """
    entry = surrogate(which)
    if steps < 1 or not lr > 0 or grid < 2:
        raise InputError(f"steps is {steps}, lr {lr} and grid {grid}; expected positive numbers")
    from qlab.models import build

    x, y, x_test, y_test = moons_data()
    plain = build("mlp", (2,), 2, hidden=HIDDEN, seed=seed).double()
    net = quantize(plain, lambda: Sign(entry), lambda: Sign(entry), keep=("first", "last"))
    # `keep` leaves the activation before the last layer in float; here all activations are signs
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, Sign(entry))
    optimizer = torch.optim.Adam(net.parameters(), lr)
    low, high = x.amin(0) - 0.4, x.amax(0) + 0.4
    axes = [torch.linspace(float(a), float(b), grid, dtype=x.dtype) for a, b in zip(low, high, strict=True)]
    yy, xx = torch.meshgrid(axes[1], axes[0], indexing="ij")
    plane = torch.stack([xx.flatten(), yy.flatten()], 1)
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    rows: list[tuple[int, float, float]] = []
    for step in range(steps + 1):
        net.train()
        loss = F.cross_entropy(net(x), y)
        if step % EVERY == 0 or step == steps:
            net.eval()
            with torch.no_grad():
                accuracy = float((net(x_test).argmax(1) == y_test).double().mean())
                z = net(plane)
            rows.append((step, float(loss.detach()), accuracy))
            at, losses, accuracies = (np.array(column) for column in zip(*rows, strict=True))
            decisions = (z[:, 1] - z[:, 0]).reshape(grid, grid).float().numpy()
            run = MoonsRun(entry.name, at, losses, accuracies, decisions, extent, net)
            yield Update(step / steps, f"step {step} of {steps}: {accuracy:.1%} right", run)
        if step < steps:
            net.train()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
