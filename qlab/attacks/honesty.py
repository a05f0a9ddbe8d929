r"""Is a net robust, or is the attack broken? Seventeen necessary conditions, and a verdict in words.

    panel = honesty(net, x, y, eps=0.1)
    print(panel.summary())
    panel.figure()

A quantized net can look robust because its softmax is saturated, its gradients underflow or its surrogate points elsewhere. A
single adversarial accuracy does not show it. The panel attacks the net with plain PGD and asks what must hold of a sound attack:

V  vanishing    the gradient is right but tiny or rounded away      repair: temperature, float64, margin loss
S  shattered    the true gradient is zero, or points elsewhere      repair: BPDA, smoothing, search
R  randomness   the net answers twice differently                   repair: average over draws (EOT)

Checks 1 to 5, 7 and 8 fail under V and S alike, and by a few examples also under an attack that is merely too weak: ten restarts or
a thousand questions find more on honest nets too. What their failure means is decided by the witnesses, the checks that look at
gradients themselves, and by its size:

S       13 fails (the margin's gradient in float64 against the smoothed one), or 12 finds that gradient zero
V       9, 10, 11, 12 or 17 find gradients that have vanished; or no witness speaks, 13 passes, so the gradient is right, and yet
        one of these checks puts more than a tenth of the examples in question
V or S  both kinds of witness speak; or none does, 13 does not pass, and a tenth of the examples is in question
tuning  no witness speaks, and fewer examples are in question: no sign of masking, and an attack that should be made stronger

To pass all is no proof of robustness: the checks are neither necessary nor sufficient, and each has its chance of a false alarm.

Source: Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705; Croce, Hein 2020, arXiv 2003.01690; Pintor et
al. 2022, arXiv 2106.09947; Gupta, Ajanthan 2022, arXiv 2003.13511.

Shapes: x (N, ...), y (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qlab.attacks import checks_attacks, checks_net
from qlab.attacks.ball import Ball, Norm
from qlab.attacks.checks import MECHANISMS, Check, Mechanism, wilson
from qlab.attacks.checks_runs import Budget, Exam, Work, budget_of
from qlab.attacks.indicators import Indicator, indicators
from qlab.attacks.victim import checked, deployed
from qlab.diagnose.base import Result
from qlab.errors import InputError
from qlab.jobs import Update, last

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots.figure import Figure

__all__ = ["CHECKS", "Honesty", "examining", "honesty"]

CheckWork = Callable[[Exam], Work[Check]]

# number -> (name, how it is made, needs gradients, its share of the work), in the order of the work: what is cheap comes first.
CHECKS: dict[int, tuple[str, CheckWork, bool, int]] = {
    16: ("determinism", checks_net.determinism, False, 1),
    17: ("logits, not probabilities", checks_net.outputs, False, 1),
    12: ("zero gradients", checks_net.zero_gradients, False, 1),
    13: ("gradient agreement", checks_net.agreement, False, 6),
    1: ("iterative beats one step", checks_attacks.one_step, True, 3),
    9: ("dtype", checks_attacks.precision, True, 3),
    10: ("temperature", checks_attacks.temperature, True, 12),
    11: ("loss swap", checks_attacks.losses, True, 8),
    3: ("unbounded attack reaches all", checks_attacks.unbounded, True, 1),
    8: ("high distortion gives chance", checks_attacks.chance, True, 1),
    4: ("monotone in eps", checks_attacks.monotone, True, 6),
    6: ("converged", checks_attacks.converged, True, 4),
    15: ("silent success", checks_attacks.silent, True, 1),
    14: ("step size", checks_attacks.step_size, True, 8),
    7: ("restarts do not matter much", checks_attacks.restarts, True, 10),
    5: ("gradient beats random", checks_attacks.random_points, False, 10),
    2: ("white box beats black box", checks_attacks.black_box, False, 12),
}
BEFORE_ATTACKS = (12, 16, 17)
BATCH = 256  # examples that are looked at before all else
TELL_V = (9, 10, 11, 12, 17)
TELL_S = (12, 13)
LARGE = 0.1  # share of examples in question from which on a failure needs no witness


@dataclass(frozen=True, eq=False)
class Honesty(Result):
    """What the checks say of a net under attack.

    Attributes:
        checks: those made so far, by number.
        indicators: of attack failure, of the plain attack's run.
        n, clean: examples, and how many of them are classified correctly.
        eps, norm: of the ball.
        plain: share that is still right after plain PGD; NaN where it could not be run.
        worst: share that is still right after everything that was tried within eps; NaN for a random net, which has no such share.
        forward, backward: questions asked and backward passes made.
        complete: whether all checks were made.
    """

    checks: tuple[Check, ...]
    indicators: tuple[Indicator, ...]
    n: int
    clean: int
    eps: float
    norm: Norm
    plain: float
    worst: float
    forward: int
    backward: int
    complete: bool

    def __getitem__(self, number: int) -> Check:
        """Return a check by its number."""
        for check in self.checks:
            if check.number == number:
                return check
        raise InputError(f"there is no check {number!r}; made so far: {[c.number for c in self.checks]}")

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed and speak of masking."""
        return tuple(c for c in self.checks if c.masking)

    @property
    def weak(self) -> tuple[Check, ...]:
        """The checks that failed and speak of an attack that could be tuned better."""
        return tuple(c for c in self.checks if c.state == "fail" and not c.masking)

    @property
    def masked(self) -> bool:
        """Whether there is a sign of masking."""
        return bool(self.failed)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What masks the gradients: of "V", "S", "R"; "V or S" only where nothing tells them apart."""
        found = {c.mechanism for c in self.failed}
        if found & {"V", "S"}:
            found.discard("V or S")
        order: tuple[Mechanism, ...] = ("R", "V", "S", "V or S")
        return tuple(m for m in order if m in found)

    def frame(self) -> pd.DataFrame:
        """Return one row per check: number, name, state, mechanism of a failure, condition, evidence in words, repair."""
        import pandas as pd

        rows = [
            {
                "number": c.number,
                "name": c.name,
                "state": c.state,
                "mechanism": c.mechanism if c.state in ("fail", "warn") else "",
                "condition": c.condition,
                "evidence": c.words,
                "repair": c.repair if c.state in ("fail", "warn") else "",
            }
            for c in self.checks
        ]
        columns = ["number", "name", "state", "mechanism", "condition", "evidence", "repair"]
        return pd.DataFrame(rows, columns=columns)

    def figure(self) -> Figure:
        """Draw the checks as a table, a colour and a mark for each state."""
        from qlab.plots.honesty import honesty_figure

        return honesty_figure(self)

    def summary(self) -> str:
        """Return the verdict in words, with the numbers."""
        made = [c for c in self.checks if c.state != "skipped"]
        where = f"{self.n} examples, {self.norm} eps {self.eps:.4g}, {len(made)} of {len(CHECKS)} checks made"
        text = self._verdict() + f" ({where}.)"
        if np.isfinite(self.plain):
            text += f" Plain PGD leaves {self.plain:.1%} right."
        if np.isfinite(self.worst):
            low, high = wilson(round(self.worst * self.n), self.n)
            text += f" The worst case over all that was tried leaves {self.worst:.1%} (95 % interval {low:.1%} to {high:.1%})."
        if self.weak:
            text += f" The plain attack is not at its best: {_listed(self.weak)}."
        raised = [i.name for i in self.indicators if i.raised]
        if raised:
            text += f" Indicators of attack failure: {', '.join(raised)}."
        if not self.complete:
            text += " Not all checks have been made yet."
        return text

    def _verdict(self) -> str:
        if not self.masked:
            return "No sign of masking found; that is no proof of robustness."
        names = " and ".join(MECHANISMS[m] for m in self.mechanisms)
        repairs = dict.fromkeys(c.repair for m in self.mechanisms for c in self.failed if c.mechanism == m)
        first = next(iter(repairs))
        return f"Masking: found by {_listed(self.failed)}. Mechanism: {names}. Repair: {first}."


def _listed(checks: tuple[Check, ...]) -> str:
    numbers = ", ".join(f"{c.number} ({c.name})" for c in checks)
    return f"check{'s' if len(checks) > 1 else ''} {numbers}"


def honesty(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    fast: Any = None,
    twin: nn.Module | None = None,
    budget: str | Budget = "standard",
    seed: int = 0,
) -> Honesty:
    """Examine whether an attack on a net can be trusted.

    Args:
        net: a torch module in eval mode, inputs to logits; of a method of the lab, what it deploys. It may be random.
        x: (N, ...) inputs within the range; a hundred tell most, five hundred tell small differences.
        y: (N,) int64 labels.
        eps: radius of the ball, in the units of x.
        norm: "linf", "l2" or "l1".
        low, high: the range of inputs.
        fast: answers questions without gradients in the net's place: a packed net of the same logits.
        twin: a float net of the same task, for transfer.
        budget: a name of `checks_runs.BUDGETS`, or a budget.
        seed: of all random choices.

    Raises:
        InputError: what an attack says of net, inputs, labels, range and eps, but for random answers.
        UnknownNameError: no such norm or budget.
    """
    work = examining(net, x, y, eps, norm=norm, low=low, high=high, fast=fast, twin=twin, budget=budget, seed=seed)
    return last(work, Honesty)


def examining(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    fast: Any = None,
    twin: nn.Module | None = None,
    budget: str | Budget = "standard",
    seed: int = 0,
) -> Generator[Update, None, None]:
    """Yield progress and, after each check, the panel so far; arguments as those of `honesty`."""
    exam = _admitted(net, x, y, eps, norm, low, high, fast, twin, budget_of(budget), seed)
    total, done = sum(weight for *_, weight in CHECKS.values()), 0
    made: list[Check] = []
    for number, (name, work, needs_gradients, weight) in CHECKS.items():
        why = _skipped(exam, number, needs_gradients)
        if why:
            made.append(Check(number, name, "", "skipped", "tuning", why, ""))
        else:
            try:
                for share, text in (run := _Shares(work(exam))):
                    yield Update((done + weight * share) / total, f"check {number}, {name}: {text}")
                made.append(run.result)
            except InputError as error:
                made.append(Check(number, name, "", "skipped", "tuning", str(error), ""))
        done += weight
        yield Update(done / total, f"check {number}, {name}: {made[-1].state}", _panel(exam, made))
    for _, text in (run := _Shares(_indicators(exam))):
        yield Update(1.0, f"indicators: {text}")
    yield Update(1.0, "", _panel(exam, made, run.result, complete=True))


class _Shares:
    """A check's work as shares done that never fall: each of its runs counts from 0 to 1, and gets half of what is left."""

    def __init__(self, work: Work[Any]) -> None:
        self.work = work

    def __iter__(self) -> Generator[tuple[float, str], None, None]:
        before, left = 0.0, 1.0
        try:
            while True:
                update = next(self.work)
                left = left / 2 if update.fraction < before else left
                before = update.fraction
                yield 1 - left * (1 - before / 2), update.text
        except StopIteration as end:
            self.result: Any = end.value


def _admitted(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: Norm,
    low: float | Tensor,
    high: float | Tensor,
    fast: Any,
    twin: nn.Module | None,
    budget: Budget,
    seed: int,
) -> Exam:
    """Return the exam; raise what an attack would raise, but admit random nets, their noise fixed."""
    if not isinstance(eps, int | float) or not 0 < eps < float("inf"):
        raise InputError(f"eps is {eps!r:.60}; expected a positive number, in the units of the inputs")
    net = deployed(net)
    Ball.of(x.detach() if isinstance(x, Tensor) else torch.as_tensor(x), float(eps), norm, low, high)
    random = False
    try:
        checked(net, x, y, BATCH)
    except InputError:
        random = _random(net, x)  # that is what check 16 is for
        if not random:
            raise
        try:
            checked(net, x, y, BATCH, random=True)
        except InputError as error:
            if "twice differently" not in str(
                error
            ):  # noise that is not torch's own cannot be fixed; all else is wrong
                raise
    if twin is not None:
        twin = checked(twin, x, y, BATCH)
    return Exam(net, x.detach(), y, float(eps), norm, low, high, fast, twin, budget, seed, random)


def _random(net: nn.Module, x: Tensor) -> bool:
    """Return whether a net in eval mode answers twice differently."""
    if any(m.training for m in net.modules()):
        return False
    try:
        return checks_net.spread_of(net, x[:BATCH]) > 0
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # something else is wrong with it


def _skipped(exam: Exam, number: int, needs_gradients: bool) -> str:
    """Return why a check is not made, or nothing."""
    if exam.random and number not in BEFORE_ATTACKS:
        return "the net is random (check 16): two of its answers cannot be compared"
    if needs_gradients and not exam.differentiable:
        return "no gradient reaches the inputs (check 12)"
    return ""


def _panel(exam: Exam, made: list[Check], shown: tuple[Indicator, ...] = (), complete: bool = False) -> Honesty:
    plain = exam.tried.get(exam.pgd())
    return Honesty(
        tuple(sorted(_told_apart(made), key=lambda c: c.number)),
        shown,
        len(exam),
        int(exam.clean.sum()),
        exam.eps,
        exam.norm,
        float("nan") if plain is None else 1 - float(plain.mean()),
        float("nan") if exam.random else 1 - float((exam.broken | ~exam.clean).mean()),
        exam.forward,
        exam.backward,
        complete,
    )


def _told_apart(made: list[Check]) -> list[Check]:
    """Return the checks with "V or S" decided; see the module docstring."""
    failed = {c.number: c for c in made if c.state == "fail"}
    shattered = any(k in failed and failed[k].mechanism == "S" for k in TELL_S)
    vanishing = any(k in failed and failed[k].mechanism == "V" for k in TELL_V)
    large = any(
        c.mechanism == "V or S" and c.examples is not None and c.examples.mean() > LARGE for c in failed.values()
    )
    mechanism: Mechanism = "V or S"
    if not (shattered or vanishing or large):
        mechanism = "tuning"
    elif shattered != vanishing:
        mechanism = "S" if shattered else "V"
    elif not shattered and any(c.number == 13 and c.state == "pass" for c in made):
        mechanism = "V"
    if mechanism == "V or S":
        return made
    repair = checks_attacks.REPAIR[mechanism]
    return [replace(c, mechanism=mechanism, repair=repair) if c.mechanism == "V or S" else c for c in made]


def _indicators(exam: Exam) -> Work[tuple[Indicator, ...]]:
    """Return the indicators of the plain attack's run on the first examples."""
    if exam.random or not exam.differentiable:
        return ()
    path = yield from exam.path()
    only = np.arange(len(exam)) < exam.budget.traced
    free = yield from exam.run(exam.pgd(), exam.whole(), only=only)
    return indicators(exam.net, path, fast=exam.fast, unbounded=free, low=exam.low, high=exam.high, seed=exam.seed)
