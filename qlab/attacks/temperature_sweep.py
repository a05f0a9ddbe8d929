r"""Temperature curves for somebody who waits: coarse first, one dtype after the other; and a factor c on the logits.

`temperature` of the net c f(x). c > 0 changes no decision, and in exact arithmetic it only shifts the curves,

    psi_cf(beta) = psi_f(c beta),        h_cf(beta) = h_f(c beta),

so NJS and HNS, whose betas shift along, do the same to the net for every c. An attack at beta = 1 stands still while the curves
move: beyond their cliff a net looks robust that is not.

Order: gradients of the first 16 examples, gradients of all; the attack at beta 1, every 5th beta and under the rules, then at the
betas between; after that the next dtype. Whatever was yielded last is a result to look at.

Source: Gupta, Ajanthan, AAAI 2022, arXiv 2003.13511.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.attacks.base import Attack
from qlab.attacks.temperature import BETAS, Temperature, temperature, tempering
from qlab.attacks.victim import deployed
from qlab.diagnose.vanishing import DTYPES
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

__all__ = ["FEW", "STRIDE", "Louder", "Sweep", "sweep", "sweeping"]

FEW = 16
STRIDE = 5


class Louder(nn.Module):
    """c f(x): the same decisions, logits c times as large.

    Args:
        net: f, a torch module; its mode stays.
        c: a positive number.

    Raises:
        InputError: another c.
    """

    def __init__(self, net: nn.Module, c: float) -> None:
        super().__init__()
        if isinstance(c, bool) or not isinstance(c, int | float) or not (math.isfinite(c) and c > 0):
            raise InputError(f"c is {c!r:.40}; expected a positive number: another would change the net's decisions")
        self.net, self.c = net, float(c)
        self.training = net.training

    def forward(self, x: Tensor) -> Tensor:
        """Return c f(x)."""
        return self.c * self.net(x)


@dataclass(frozen=True)
class Sweep:
    """What there is so far.

    Attributes:
        c: factor on the logits.
        found: of c f(x), for the dtypes that were reached.
        failed: by dtype, why the net does not run in it.
        examples: N, that all results will be about; `found` begins with fewer.
    """

    c: float
    found: Temperature
    failed: Mapping[str, str] = field(default_factory=dict)
    examples: int = 0

    def finished(self, dtype: str) -> bool:
        """Return whether gradients of all examples and the accuracies at all betas are there."""
        w = self.found.dtypes.get(dtype)
        if w is None or len(self.found.labels) < self.examples:
            return False
        return bool(np.isfinite(w.accuracy).all()) and all(map(math.isfinite, w.rules.values()))


def sweep(net: nn.Module, x: Tensor, y: Tensor, betas: Sequence[float] = BETAS, **settings: Any) -> Sweep:
    """Return all temperature curves of c f(x); arguments and errors as of `sweeping`."""
    return last(sweeping(net, x, y, betas, **settings), Sweep)


def sweeping(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    betas: Sequence[float] = BETAS,
    *,
    c: float = 1.0,
    dtypes: Sequence[str] = ("float32", "float64", "float16"),
    eps: float,
    attack: Attack | None = None,
    start: Sweep | None = None,
    **settings: Any,
) -> Generator[Update, None, None]:
    """Yield a `Sweep`, growing; see the module docstring.

    Args:
        net: a method of the lab (what it deploys is looked at) or a torch module, in eval mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        betas: (K,) positive factors on the logits, rising.
        c: one more, on those of the net itself.
        dtypes: names of `qlab.diagnose.vanishing.DTYPES`, in this order; those that the net does not run in are left out.
        eps: radius of the attack, in the units of x.
        attack: as in `qlab.attacks.temperature.tempering`.
        start: what was found before, with the same arguments, when the work was stopped: it goes on from there.
        settings: norm, low and high, as there.

    Raises:
        InputError: see `tempering`; the net runs in none of the dtypes; c is not positive.
        UnknownNameError: no such dtype.
    """
    names = list(dict.fromkeys(dtypes))
    for name in names:
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, DTYPES)
    if not names:
        raise InputError(f"name at least one dtype of {', '.join(DTYPES)}")
    net = Louder(deployed(net), c)
    now = start if start is not None and len(start.found.labels) == len(x) else None
    failed = {} if now is None else dict(now.failed)
    for at, name in enumerate(names):
        first, share = at / len(names), 1 / len(names)
        if name in failed:
            continue
        if now is None or name not in now.found.dtypes:
            try:
                if now is None:
                    few = temperature(net, x[:FEW], y[:FEW], betas, dtypes=(name,))
                    text = f"gradients of the first {len(few.labels)} examples in {name}"
                    yield Update(first, text, Sweep(float(c), few, dict(failed), len(x)))
                new = temperature(net, x, y, betas, dtypes=(name,))
            except InputError as error:
                failed[name] = str(error)
                now = None if now is None else replace(now, failed=dict(failed))
                continue
            found = new if now is None else replace(now.found, dtypes={**now.found.dtypes, **new.dtypes})
            now = Sweep(float(c), found, dict(failed), len(x))
        yield Update(first + 0.1 * share, f"gradients in {name}", now)
        for part in () if now.finished(name) else _parts(now.found, name):
            options: dict[str, Any] = {"dtypes": (name,), "eps": eps, "attack": attack, **settings}
            work = tempering(net, x, y, now.found.betas[part], **options)
            next(work)  # gradients, which are there already
            for update in work:
                now = replace(now, found=_with(now.found, name, part, update.value))
                done = float(np.isfinite(now.found.dtypes[name].accuracy).mean())
                yield Update(first + share * (0.1 + 0.9 * done), update.text, now)
                if now.finished(name):
                    break  # so are the rules, for the betas between
    if now is None:
        raise InputError(next(iter(failed.values())))
    yield Update(1.0, "all there", now)


def _parts(found: Temperature, dtype: str) -> list[NDArray[np.int64]]:
    """Return indices of the betas without an accuracy: the coarse ones, then the others; one where only rules are missing."""
    at, missing = found.nearest(1.0), np.flatnonzero(np.isnan(found.dtypes[dtype].accuracy))
    coarse = (missing % STRIDE == 0) | (missing == at)
    return [part for part in (missing[coarse], missing[~coarse]) if len(part)] or [np.array([at])]


def _with(found: Temperature, dtype: str, part: NDArray[np.int64], new: Temperature) -> Temperature:
    """Return `found` with the accuracies of some of its betas."""
    old, got = found.dtypes[dtype], new.dtypes[dtype]
    accuracy = old.accuracy.copy()
    accuracy[part] = np.where(np.isnan(got.accuracy), accuracy[part], got.accuracy)
    rules = {name: value if math.isfinite(value) else got.rules[name] for name, value in old.rules.items()}
    woken = replace(old, accuracy=accuracy, rules=rules)
    dtypes = {**found.dtypes, dtype: woken}
    return replace(found, dtypes=dtypes, attack=new.attack, eps=new.eps, norm=new.norm)
