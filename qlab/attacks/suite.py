r"""The standard suite: the worst case over an ensemble of attacks, per example, with the honesty panel beside it.

    A(eps) = mean_n [ classified correctly and no attack of the ensemble broke n within eps ]

Attacks run in turn, from cheap to expensive, and each only on the examples that the ones before it have left. A point found within
a smaller eps lies within every larger one, so what is broken once stays broken along the grid: A never rises with eps.

standard   APGD on cross-entropy, PGD++ with both temperatures, transfer from a twin, APGD-T, FAB-T, Square:
           AutoAttack's four, and what quantized nets need
quick      PGD++ with both temperatures, APGD on DLR, transfer, Square with few queries
search     random corners, coordinate search, Square: no gradient at all, for packed nets

A robust accuracy is an upper bound: another attack may find more. It is not stated without the panel (`qlab.attacks.honesty`) of
the same net on the same examples, nor where the budget ended before the panel or the ensemble had run.

Every finished attack is kept in `root`, if one is given: a run that was stopped goes on where it stopped. A file there is read
only if it belongs to the same net, examples, attack and seed.

Source: Croce, Hein 2020, arXiv 2003.01690; Carlini et al. 2019, arXiv 1902.06705 (per example, worst case).

Shapes: N examples, E radii, K attacks.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Norm
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.evaluation import BROKEN, LEFT, NOT_ASKED, Evaluation
from qlab.attacks.records import read_record, write_record
from qlab.attacks.victim import checked, pixels
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last

__all__ = ["SUITES", "evaluate", "evaluating", "examples", "suite"]

SUITES = ("standard", "quick", "search")
SuiteName = Literal["standard", "quick", "search"]


def suite(name: str, norm: Norm = "linf", twin: nn.Module | None = None, seed: int = 0) -> dict[str, Attack]:
    """Return the attacks of a suite by name, in the order they run.

    Args:
        name: one of `SUITES`.
        norm: attacks that are not made for it are left out.
        twin: a float net for the transfer attack; none is made where there is none.
        seed: of all of them.

    Raises:
        UnknownNameError: no such suite.
    """
    from qlab.attacks.apgd import APGD, APGDT
    from qlab.attacks.fab import FABT
    from qlab.attacks.pgd import PGD
    from qlab.attacks.random_search import CoordinateSearch, RandomSearch
    from qlab.attacks.scaling import HNS, NJS
    from qlab.attacks.square import Square
    from qlab.attacks.transfer import Transfer

    plus: dict[str, Attack] = {
        "PGD++ HNS": PGD(40, scaling=HNS(), seed=seed),
        "PGD++ NJS": PGD(40, scaling=NJS(), seed=seed),
    }
    transfer: dict[str, Attack] = {} if twin is None else {"transfer": Transfer(twin, PGD(40, seed=seed), seed=seed)}
    known: dict[str, dict[str, Attack]] = {
        "standard": {
            "APGD-CE": APGD(100, loss="ce", seed=seed),
            **plus,
            **transfer,
            "APGD-T": APGDT(100, seed=seed),
            "FAB-T": FABT(seed=seed),
            "Square": Square(5000, seed=seed),
        },
        "quick": {**plus, "APGD-DLR": APGD(40, loss="dlr", seed=seed), **transfer, "Square": Square(300, seed=seed)},
        "search": {
            "random corners": RandomSearch(200, seed=seed),
            "coordinate search": CoordinateSearch(seed=seed),
            "Square": Square(5000, seed=seed),
        },
    }
    if name not in known:
        raise UnknownNameError("suite of attacks", name, SUITES)
    return {title: attack for title, attack in known[name].items() if norm in attack.norms}


def examples(data: Any, samples: int | None = 1000) -> tuple[Tensor, Tensor]:
    """Return the first test examples of a data set in its own units, x (N, ...) floats, y (N,): pixels on the [0, 1] scale.

    Raises:
        InputError: for something that is no data set of the lab; a number of samples below one.
    """
    split = getattr(data, "split", None)
    if not callable(split):
        raise InputError(
            f"data is a {type(data).__name__}; expected a data set of the lab, or inputs and labels (x, y)"
        )
    if samples is not None and (isinstance(samples, bool) or samples < 1):
        raise InputError(f"samples is {samples!r}; expected a positive number of test examples, or None for all")
    test = split("test")
    x = test.x[:samples]
    return (x.float() / 255 if x.dtype == torch.uint8 else x.float()), test.y[:samples]


def evaluate(net: nn.Module, data: Any, eps: Sequence[float] | float, **options: Any) -> Evaluation:
    """Return the robust accuracy of a net at each eps, by the worst case over a suite, with the honesty panel.

    Args:
        net: a torch module in eval mode, or a method of the lab, of which what it deploys is attacked.
        data: a data set of the lab (its first test examples in its own units; the net gets its normalisation in front), or
            inputs and labels (x, y) as the net takes them.
        eps: radii in the units of the data.
        options: those of `evaluating`.

    Raises:
        InputError: what `evaluating` says.
    """
    return last(evaluating(net, data, eps, **options), Evaluation)


def evaluating(
    net: nn.Module,
    data: Any,
    eps: Sequence[float] | float,
    *,
    attacks: str | Mapping[str, Attack] = "standard",
    norm: Norm = "linf",
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    samples: int | None = 1000,
    twin: nn.Module | None = None,
    fast: Any = None,
    panel: bool = True,
    root: str | Path | None = None,
    budget: float = math.inf,
    seed: int = 0,
) -> Generator[Update, None, None]:
    """Yield progress and what is known so far: `Evaluation`s that grow.

    Args:
        net, data, eps: as in `evaluate`.
        attacks: a name of `SUITES`, or attacks by title in the order they are to run.
        norm: of the balls.
        low, high: range of the inputs; [0, 1] for tensors and pictures, and for other data sets of the lab their own range with
            half its width beyond either end.
        samples: how many test examples of a data set; all for None.
        twin: a float net of the same task for the transfer attack; it takes what `net` takes.
        fast: a packed net of the same logits, for questions without gradients.
        panel: whether the honesty panel is run, at the smallest eps that leaves anything to judge.
        root: folder where finished attacks are kept, to go on from.
        budget: seconds after which no further attack is started.
        seed: of all attacks.

    Raises:
        InputError: no eps, or one that is not positive; what an attack says of net, inputs and labels.
        UnknownNameError: no such suite or norm.
    """
    began = time.monotonic()
    radii = _radii(eps)
    if isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
    else:
        x, y = examples(data, samples)
        low, high = _range(data, low, high)
        net, twin, fast = _in_units(net, data), _in_units(twin, data), _fast_in_units(fast, data)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}; expected data as a data set of the lab, or tensors (x, y)"
            )
    net = checked(net, x, y, 256)
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    chosen = suite(attacks, norm, twin, seed) if isinstance(attacks, str) else dict(attacks)
    if norm not in NORMS:
        raise UnknownNameError("norm", norm, NORMS)
    if not chosen:
        raise InputError(f"no attack is left for {norm}; expected at least one")
    store = None if root is None else Path(root)
    clean = _clean(net, x, y)
    broken = np.full((len(radii), len(chosen), len(y)), NOT_ASKED, dtype=np.int8)
    distance = np.full((len(radii), len(y)), np.inf)
    margins = np.full((len(radii), len(y)), -np.inf)
    worst = x.detach().clone().unsqueeze(0).repeat(len(radii), *(1,) * x.dim())
    done = np.zeros((len(radii), len(chosen)), dtype=bool)
    distance[:, ~clean] = 0.0
    identity = "" if store is None else _identity(net, x, y, norm, low, high, seed)
    honesty = None

    def state(honesty: Any = None) -> Evaluation:
        return Evaluation(
            norm, radii, tuple(chosen), clean, broken.copy(), done.copy(), distance.copy(), worst.clone(), x, y, honesty
        )

    total = len(radii) * len(chosen) + (len(chosen) if panel else 0)
    count = 0
    yield Update(0.0, "clean accuracy", state())
    for e, radius in enumerate(radii):
        if e:  # what lies within a smaller ball lies within this one
            inherited = np.isfinite(distance[e - 1])
            distance[e, inherited], worst[e, inherited] = distance[e - 1, inherited], worst[e - 1, inherited]
        for k, (title, attack) in enumerate(chosen.items()):
            left = np.flatnonzero(~np.isfinite(distance[e]))
            count += 1
            if not len(left):
                done[e, k] = True
                continue
            if time.monotonic() - began > budget:
                continue
            key = f"{identity} {title} {_settings(attack)} {radius!r} {left.tobytes().hex()}"
            found = None if store is None else read_record(store, key, x[left], y[left])
            if found is None:
                run = attack.attacking(net, x[left], y[left], radius, norm=norm, low=low, high=high, fast=fast)
                for update in run:
                    found = update.value if update.value is not None else found
                    share = (count - 1 + update.fraction) / total
                    yield Update(share, f"eps {radius:.4g}, {title}: {len(left)} examples left", None)
                assert isinstance(found, Attacked)
                if store is not None:
                    write_record(store, key, found)
            _book(found, left, e, k, broken, distance, margins, worst)
            done[e, k] = True
            yield Update(count / total, f"eps {radius:.4g}, {title}: {found.accuracy:.1%} of {len(left)} left", state())
    if panel and time.monotonic() - began <= budget:
        from qlab.attacks.honesty import examining

        radius = radii[_telling(distance, clean)]
        for update in examining(net, x, y, radius, norm=norm, low=low, high=high, fast=fast, twin=twin, seed=seed):
            honesty = update.value if update.value is not None else honesty
            share = (len(radii) * len(chosen) + update.fraction * len(chosen)) / total
            yield Update(min(share, 1.0), f"honesty panel: {update.text}", None)
    yield Update(1.0, "", state(honesty))


def _book(found: Attacked, left: Any, e: int, k: int, broken: Any, distance: Any, margins: Any, worst: Tensor) -> None:
    """Write what an attack found for the examples `left` at radius e; of the others the point of largest margin stays."""
    broken[e, k, left] = np.where(found.success, BROKEN, LEFT)
    better = found.success | (found.margin > margins[e, left])
    worst[e, left[better]] = found.adversarial[torch.as_tensor(better)].to(worst.dtype)
    margins[e, left] = np.maximum(margins[e, left], found.margin)
    distance[e, left[found.success]] = found.distance[found.success]


def _telling(distance: Any, clean: Any) -> int:
    """Return the index of the smallest eps at which half of what was right is broken; the largest where none is."""
    share = np.isfinite(distance[:, clean]).mean(1) if clean.any() else np.ones(len(distance))
    enough = np.flatnonzero(share >= 0.5)
    return int(enough[0]) if len(enough) else len(distance) - 1


def _radii(eps: Sequence[float] | float) -> tuple[float, ...]:
    values = [eps] if isinstance(eps, int | float) else list(eps)
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < math.inf for v in values):
        raise InputError(f"eps is {eps!r:.60}; expected one or more positive numbers, in the units of the inputs")
    return tuple(sorted({float(v) for v in values}))


def _range(data: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Return the range of a data set: [0, 1] for pictures in bytes."""
    splits = [data.split(part).x for part in ("train", "test")]
    if all(x.dtype == torch.uint8 for x in splits):
        ends = (0.0, 1.0)
    else:
        ends = (min(float(x.min()) for x in splits), max(float(x.max()) for x in splits))
        ends = (1.5 * ends[0] - 0.5 * ends[1], 1.5 * ends[1] - 0.5 * ends[0])
    return ends[0] if low is None else low, ends[1] if high is None else high


def _in_units(net: Any, data: Any) -> Any:
    return None if net is None else pixels(net, data)


def _fast_in_units(fast: Any, data: Any) -> Any:
    return None if fast is None else lambda x: fast(data.transform(x))


def _clean(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    with torch.no_grad():
        right = [net(a).argmax(-1) == b for a, b in zip(x.split(256), y.split(256), strict=True)]
    return torch.cat(right).cpu().numpy()


def _identity(net: nn.Module, x: Tensor, y: Tensor, norm: Norm, low: Any, high: Any, seed: int) -> str:
    """Return a digest of all that a finished attack depends on, but the attack itself."""
    digest = hashlib.sha256(repr((norm, low, high, seed, torch.__version__)).encode())
    _add_net(digest, net)
    with torch.no_grad():  # what no state tells (a constant in the code) the logits do
        digest.update(net(x[:64]).double().cpu().numpy().tobytes())
    for value in (x, y):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _settings(attack: Attack) -> str:
    """Return what tells an attack's results from another's: its settings, nets among them by their weights."""
    digest = hashlib.sha256()
    parts = [type(attack).__qualname__]
    for field in fields(attack):
        value = getattr(attack, field.name)
        if isinstance(value, nn.Module):
            _add_net(digest, value)
        else:
            parts.append(f"{field.name}={_settings(value) if isinstance(value, Attack) else _named(value)}")
    return f"{' '.join(parts)} {digest.hexdigest()[:16]}"


def _named(value: object) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def _add_net(digest: Any, net: nn.Module) -> None:
    digest.update(repr(net).encode())
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
