r"""The standard suite: the worst case over an ensemble of attacks, per example, with the honesty panel beside it.

    A(eps) = mean_n [ classified correctly and no attack of the ensemble broke n within eps ]

Attacks run in turn, from cheap to expensive, and each only on the examples that the ones before it have left. A point found within
a smaller eps lies within every larger one, so what is broken once stays broken along the grid: A never rises with eps.

standard   APGD on cross-entropy, PGD++ with both temperatures, transfer from a twin, APGD-T, FAB-T, Square:
           AutoAttack's four, and what quantized nets need
quick      PGD, PGD++ with both temperatures, APGD on DLR, transfer, Square with few queries
search     random corners, coordinate search, Square: no gradient at all, for packed nets

A robust accuracy is an upper bound: another attack may find more. It is not stated without the panel (`qlab.attacks.honesty`) of
the same net on the same examples, nor where the budget ended before the panel or the ensemble had run.

Every finished attack is kept in `root`, if one is given: a run that was stopped goes on where it stopped. What is read there, and
which attacks are not kept, says `qlab.attacks.records`.

Source: Croce, Hein 2020, arXiv 2003.01690; Carlini et al. 2019, arXiv 1902.06705 (per example, worst case).

Shapes: N examples, E radii, K attacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qlab.attacks.ball import NORMS, Ball, Norm
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.evaluation import BROKEN, LEFT, NOT_ASKED, Evaluation
from qlab.attacks.losses import misclassified
from qlab.attacks.records import answers, identity, key_of, read_record, write_record
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
    transfer: dict[str, Attack] = (
        {} if twin is None else {"transfer": Transfer(twin, PGD(40, early_stop=False, seed=seed), seed=seed)}
    )
    known: dict[str, dict[str, Attack]] = {
        "standard": {
            "APGD-CE": APGD(
                100, loss="ce", restarts=5 if norm == "l1" else 1, seed=seed
            ),  # as AutoAttack for each norm
            **plus,
            **transfer,
            "APGD-T": APGDT(100, seed=seed),
            "FAB-T": FABT(seed=seed),
            "Square": Square(5000, seed=seed),
        },
        # Plain PGD too: at a small eps on a net that is not saturated, cross-entropy as it is can be the strongest.
        "quick": {
            "PGD": PGD(40, seed=seed),
            **plus,
            "APGD-DLR": APGD(40, loss="dlr", seed=seed),
            **transfer,
            "Square": Square(300, seed=seed),
        },
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
    """Return test examples of a data set in its own units, x (N, ...) floats, y (N,): pixels on the [0, 1] scale.

    They are mixed, each class in proportion, and the same every time.

    Raises:
        InputError: for something that is no data set of the lab; a number of samples below one.
    """
    split = getattr(data, "split", None)
    if not callable(split):
        raise InputError(
            f"data is a {type(data).__name__}; expected a data set of the lab, or inputs and labels (x, y)"
        )
    test = split("test", data.num_samples("test") if samples is None else samples)
    return (test.x.float() / 255 if test.x.dtype == torch.uint8 else test.x.float()), test.y


def evaluate(net: nn.Module, data: Any, eps: Sequence[float] | float, **options: Any) -> Evaluation:
    """Return the robust accuracy of a net at each eps, by the worst case over a suite, with the honesty panel.

    Args:
        net: a torch module in eval mode, or a method of the lab, of which what it deploys is attacked.
        data: a data set of the lab (its test examples in its own units; the net gets its normalisation in front), or
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
        fast: a packed net of the same logits, for questions without gradients. What is found with it counts where the net
            itself is wrong.
        panel: whether the honesty panel is run, at the smallest eps at which half of what was right is broken, else at the
            largest; with less work (`checks_runs.BUDGETS`) for the suite "quick".
        root: folder where finished attacks are kept, to go on from.
        budget: seconds after which no further attack is started.
        seed: of all attacks.

    Raises:
        InputError: no eps, or one that is not positive; a budget that is no number; attacks that are none; a `fast` that decides
            otherwise than the net; what an attack says of net, inputs and labels.
        UnknownNameError: no such suite or norm.
    """
    began = time.monotonic()
    radii = _radii(eps)
    if isinstance(budget, bool) or not isinstance(budget, Real) or math.isnan(budget):
        raise InputError(f"budget is {budget!r:.40}; expected a number of seconds")
    if not isinstance(net, nn.Module):
        raise InputError(
            f"net is a {type(net).__name__}; expected a torch module, or a method of the lab. A packed net has no gradients: give "
            "the net that it was compiled from, and the packed one as fast"
        )
    if isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
    else:
        x, y = examples(data, samples)
        low, high = _range(data, low, high)
        x, y = _beside(net, x), _beside(net, y)
        net, twin, fast = _in_units(net, data), _in_units(twin, data), _fast_in_units(fast, data)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}; expected data as a data set of the lab, or tensors (x, y)"
            )
    x = x.detach()
    net = checked(net, x, y, 256)
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    chosen = suite(attacks, norm, twin, seed) if isinstance(attacks, str) else _named(attacks)
    if norm not in NORMS:
        raise UnknownNameError("norm", norm, NORMS)
    if not chosen:
        raise InputError(f"no attack is left for {norm}; expected at least one")
    store = None if root is None else Path(root)
    clean = _clean(net, fast, x, y)
    broken = np.full((len(radii), len(chosen), len(y)), NOT_ASKED, dtype=np.int8)
    distance = np.full((len(radii), len(y)), np.inf)
    margins = np.full((len(radii), len(y)), -np.inf)
    worst = x.clone().unsqueeze(0).repeat(len(radii), *(1,) * x.dim())
    done = np.zeros((len(radii), len(chosen)), dtype=bool)
    distance[:, ~clean] = 0.0
    whole = "" if store is None else identity(net, x, y, norm, low, high, seed)
    balls = [Ball.of(x, radius, norm, low, high) for radius in radii]
    honesty = None

    def state(honesty: Any = None) -> Evaluation:
        return Evaluation(
            norm, radii, tuple(chosen), clean, broken.copy(), done.copy(), distance.copy(), worst.clone(), x, y, honesty
        )

    total = len(radii) * len(chosen) + (len(chosen) if panel else 0)
    count = 0
    yield Update(0.0, "clean accuracy", state())
    for e, radius in enumerate(radii):
        for k, (title, attack) in enumerate(chosen.items()):
            left = np.flatnonzero(~np.isfinite(distance[e]))
            count += 1
            if not len(left):
                done[e, k] = True
                yield Update(count / total, f"eps {radius:.4g}, {title}: none is left", state())
                continue
            if time.monotonic() - began > budget:
                continue
            key = None if store is None else key_of(whole, title, attack, radius, left)
            ball = balls[e].take(torch.as_tensor(left, device=x.device))
            found = None if store is None or key is None else read_record(store, key, net, ball, y[left])
            if found is None:
                run = attack.attacking(net, x[left], y[left], radius, norm=norm, low=low, high=high, fast=fast)
                for update in run:
                    found = update.value if update.value is not None else found
                    share = (count - 1 + update.fraction) / total
                    yield Update(share, f"eps {radius:.4g}, {title}: {len(left)} examples left", None)
                assert isinstance(found, Attacked)
                if fast is not None:  # where it rounds otherwise than the net, the net decides
                    wrong = misclassified(answers(net, found.adversarial), y[left]).cpu().numpy()
                    found = replace(found, success=found.success & wrong)
                if store is not None and key is not None:
                    write_record(store, key, found)
            _book(found, left, e, k, broken, distance, margins, worst)
            done[e, k] = True
            broke = f"{int(found.success.sum())} of {len(left)} broken"
            yield Update(count / total, f"eps {radius:.4g}, {title}: {broke}", state())
    if panel and time.monotonic() - began <= budget:
        from qlab.attacks.honesty import examining

        radius = radii[_telling(distance, clean)]
        work = "quick" if attacks == "quick" else "standard"
        ends = {"norm": norm, "low": low, "high": high}
        for update in examining(net, x, y, radius, **ends, fast=fast, twin=twin, budget=work, seed=seed):
            honesty = update.value if update.value is not None else honesty
            share = (len(radii) * len(chosen) + update.fraction * len(chosen)) / total
            yield Update(min(share, 1.0), f"honesty panel: {update.text}", None)
    yield Update(1.0, "", state(honesty))


def _book(found: Attacked, left: Any, e: int, k: int, broken: Any, distance: Any, margins: Any, worst: Tensor) -> None:
    """Write what an attack found for the examples `left` at radius e; of the others the point of largest margin stays.

    What lies within a smaller ball lies within the larger ones: all later rows are those of e so far.
    """
    broken[e, k, left] = np.where(found.success, BROKEN, LEFT)
    better = found.success | (found.margin > margins[e, left])
    worst[e:, left[better]] = found.adversarial[torch.as_tensor(better)].to(worst.dtype)
    margins[e:, left] = np.maximum(margins[e, left], found.margin)
    distance[e:, left[found.success]] = found.distance[found.success]


def _telling(distance: Any, clean: Any) -> int:
    """Return the index of the smallest eps at which half of what was right is broken; the largest where none is."""
    share = np.isfinite(distance[:, clean]).mean(1) if clean.any() else np.ones(len(distance))
    enough = np.flatnonzero(share >= 0.5)
    return int(enough[0]) if len(enough) else len(distance) - 1


def _radii(eps: Any) -> tuple[float, ...]:
    given = eps.tolist() if isinstance(eps, Tensor | np.ndarray) else eps
    values = list(given) if isinstance(given, Sequence) else [given]
    if not values or any(isinstance(v, bool) or not isinstance(v, Real) or not 0 < float(v) < math.inf for v in values):
        raise InputError(f"eps is {eps!r:.60}; expected one or more positive numbers, in the units of the inputs")
    return tuple(sorted({float(v) for v in values}))


def _named(attacks: Any) -> dict[str, Attack]:
    if not isinstance(attacks, Mapping) or not all(isinstance(attack, Attack) for attack in attacks.values()):
        raise InputError(
            f"attacks is {attacks!r:.80}; expected a name of {', '.join(SUITES)}, or attacks by title, such as {{'PGD': PGD()}}"
        )
    return dict(attacks)


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


def _beside(net: nn.Module, value: Tensor) -> Tensor:
    """Return a tensor on the device of a net."""
    return value.to(next(chain(net.parameters(), net.buffers()), value).device)


def _clean(net: nn.Module, fast: Any, x: Tensor, y: Tensor) -> Any:
    """Return which examples the net has right, (N,).

    Raises:
        InputError: `fast` decides otherwise.
    """
    z = answers(net, x)
    if fast is not None:
        other = int((answers(fast, x).argmax(-1) != z.argmax(-1)).sum())
        if other:
            raise InputError(
                f"fast decides otherwise than the net on {other} of {len(x)} examples; it must answer in the net's place, with the "
                "same logits: compile it from this very net, or leave it out"
            )
    return (~misclassified(z, y)).cpu().numpy()
