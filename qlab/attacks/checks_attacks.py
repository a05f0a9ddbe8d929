r"""Checks by attacks: what must hold of any sound attack on a net whose gradients mean something.

A(attack) is the share of examples that are still right after it. The attack under examination is PGD with cross-entropy; each check
compares it with another one, example by example (`checks.compare`).

1  iterative beats one step           A(PGD) <= A(FGSM)
2  white box beats black box          A(PGD, R runs) <= A(transfer), A(Square), and few examples broken by these alone
3  unbounded reaches all              A(PGD, eps = the range) = 0
4  monotone in eps                    A does not rise with eps
5  gradient beats random              few examples broken by random corners of the ball and not by PGD
6  converged                          twice the steps change neither A nor the loss
7  restarts do not matter much        A(worst of R) >= A(1) - 2 points
8  high distortion gives chance       A(half the range) <= 1/d
9  dtype                              A(float64) not below A
10 temperature                        A(beta) not below A(1), beta of NJS, HNS and a grid
11 loss swap                          A(margin), A(DLR), A(targeted margin) not below A(cross-entropy)
14 step size                          A(best eta) not below A(eta)
15 silent success                     where an iterate is misclassified, the last one is

In 2, PGD has its restarts: a search asks many more questions than one run, and beats one run of few steps on honest nets too, by a
few examples.

9 to 11 speak of vanishing only if the gradients of the examples in question have vanished: p_y == 1 in the net's precision or a
zero gradient for at least half of them, and for 10 with a beta below 1. Otherwise another loss is merely the better attack.

Source: Athalye et al. 2018, arXiv 1802.00420 (1 to 5); Carlini et al. 2019, arXiv 1902.06705.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from qlab.attacks.base import Attack
from qlab.attacks.checks import TOL, Check, Curve, Mechanism, State, compare, share, strongest, too_many
from qlab.attacks.checks_runs import Exam, Successes, Work
from qlab.attacks.losses import ce, misclassified, nearest_classes, targeted_margin
from qlab.attacks.scaling import Fixed
from qlab.errors import InputError

FEW = {"black box": 0.02, "random": 0.01, "silent": 0.05}
BLACK_BOX_TOL = 0.002
RESTART_TOL = 0.02
LOSS_TOL = 0.05
GRID = (0.125, 0.25, 0.5, 1.0, 2.0)
BETAS = (1e-3, 1e-2, 1e-1, 0.3, 3.0, 10.0)
STEPS = (1 / 20, 1 / 10, 1 / 4, 1 / 2, 1.0)
TARGETS = 3

REPAIR: dict[Mechanism, str] = {
    "V": "a small temperature (NJS, HNS), the margin as loss, or float64",
    "S": "BPDA with another stand-in, smoothing (NES), or search without gradients (Square)",
    "tuning": "more steps and restarts, APGD, and the worst case over losses",
}
V_REPAIR = REPAIR["V"]
VS_REPAIR = f"{V_REPAIR}; if these do not help, {REPAIR['S']}"


def one_step(exam: Exam) -> Work[Check]:
    """Check 1: many small steps do better than one large one."""
    plain = yield from exam.plain()
    fgsm = yield from exam.successes(exam.pgd(steps=1, eta=exam.eps if exam.norm == "linf" else None))
    c = compare(plain, fgsm)
    return Check(
        1,
        "iterative beats one step",
        "A(PGD) is not above A(FGSM)",
        "fail" if c.beaten() else "pass",
        "V or S",
        f"PGD leaves {share(plain)}, FGSM {share(fgsm)}",
        VS_REPAIR + "; another step size",
        {"A(PGD)": 1 - plain.mean(), "A(FGSM)": 1 - fgsm.mean(), "only FGSM": c.gained, "p": c.p},
        examples=fgsm & ~plain,
    )


def black_box(exam: Exam) -> Work[Check]:
    """Check 2: a gradient finds what attacks without one find."""
    from qlab.attacks.square import Square
    from qlab.attacks.transfer import Transfer

    plain = (yield from exam.restarted())[-1]
    attacks: dict[str, Attack] = {}
    if exam.norm in Square.norms:
        attacks["Square"] = Square(queries=exam.budget.queries, seed=exam.seed)
    if exam.twin is not None:
        attacks["transfer"] = Transfer(exam.twin, exam.pgd(early_stop=False), seed=exam.seed)
    if not attacks:
        raise InputError(f"Square is not made for {exam.norm}, and there is no twin to transfer from")
    found: dict[str, Successes] = {}
    for name, attack in attacks.items():
        found[name] = yield from exam.successes(attack)
    evidence = {"A(PGD)": 1 - float(plain.mean())}
    state: State = "pass"
    for name, success in found.items():
        c = compare(plain, success, len(found))
        evidence |= {f"A({name})": 1 - float(success.mean()), f"only {name}": float(c.gained)}
        if c.beaten(BLACK_BOX_TOL) or too_many(c.gained, c.n, FEW["black box"]):
            state = "fail"
        elif state == "pass" and c.gained > FEW["black box"] * c.n:
            state = "warn"
    examples = np.any(list(found.values()), axis=0) & ~plain
    words = f"PGD with restarts leaves {share(plain)}, " + ", ".join(f"{k} {share(s)}" for k, s in found.items())
    words += f"; {int(examples.sum())} examples are broken without gradients alone"
    if exam.twin is None:
        words += "; no twin was given to transfer from"
    return Check(
        2,
        "white box beats black box",
        f"at most {FEW['black box']:.0%} are broken by black-box attacks alone, and these are not the stronger ones",
        state,
        "V or S",
        words,
        VS_REPAIR,
        evidence,
        examples=examples,
    )


def unbounded(exam: Exam) -> Work[Check]:
    """Check 3: where every input may become any other, nothing withstands."""
    success = yield from exam.successes(exam.pgd(), exam.whole())
    left, n = int((~success).sum()), len(exam)
    return Check(
        3,
        "unbounded attack reaches all",
        "A(PGD) is 0 where eps is the whole range",
        "fail" if left > TOL * n else "warn" if left else "pass",
        "V or S",
        f"within the whole range PGD leaves {share(success)}",
        VS_REPAIR,
        {"A(PGD)": left / n, "eps": exam.whole()},
        examples=~success,
    )


def monotone(exam: Exam) -> Work[Check]:
    """Check 4: a larger ball holds what a smaller one holds."""
    radii = sorted({r * exam.eps for r in GRID if r * exam.eps < exam.whole(0.5)} | {exam.whole(0.5), exam.whole()})
    found = []
    for eps in radii:
        found.append((yield from exam.successes(exam.pgd(), eps)))
    pairs = [compare(large, small, len(radii) - 1) for small, large in pairwise(found)]
    rises = [max(0.0, c.gap) for c in pairs]
    worst = int(np.argmax(rises))
    bad = any(c.beaten() for c in pairs)
    words = f"A falls along {len(radii)} radii" if not any(rises) else f"A rises by at most {rises[worst]:.1%}, "
    if any(rises):
        words += f"from eps {radii[worst]:.3g} to {radii[worst + 1]:.3g}"
    return Check(
        4,
        "monotone in eps",
        "A does not rise with eps",
        "fail" if bad else "pass",
        "V or S",
        words,
        "start from what a smaller eps found; " + VS_REPAIR,
        {"largest rise": rises[worst]},
        Curve.of(radii, [1 - s.mean() for s in found], "eps"),
        found[worst] & ~found[worst + 1],
    )


def random_points(exam: Exam) -> Work[Check]:
    """Check 5: a gradient finds what random corners of the ball find."""
    from qlab.attacks.random_search import RandomSearch

    plain = yield from exam.plain()
    left = ~plain
    found = np.zeros(len(exam), bool)
    if left.any():
        found = yield from exam.successes(RandomSearch(points=exam.budget.points, seed=exam.seed), only=left)
    count, n = int(found.sum()), len(exam)
    many = too_many(count, n, FEW["random"])
    return Check(
        5,
        "gradient beats random",
        f"at most {FEW['random']:.0%} are broken by random corners of the ball and not by PGD",
        "fail" if many else "warn" if count > FEW["random"] * n else "pass",
        "V or S",
        f"{exam.budget.points} random corners break {count} of {int(left.sum())} examples that PGD left",
        VS_REPAIR,
        {"only random": count, "left by PGD": int(left.sum()), "points": exam.budget.points},
        examples=found,
    )


def converged(exam: Exam) -> Work[Check]:
    """Check 6: twice the steps find no more."""
    T = exam.budget.steps
    plain = yield from exam.plain()
    twice = yield from exam.successes(exam.pgd(steps=2 * T, eta=exam.eta))
    c = compare(plain, twice)
    path = yield from exam.path()
    with torch.no_grad():
        z = [exam.net(step.points) for step in path.trace or ()]
    losses = torch.stack([ce(one, path.y) for one in z]).double()
    best = losses.cummax(0).values.mean(1).cpu().numpy()
    change = float((best[-1] - best[min(T, len(best) - 1)]) / max(abs(best[-1]), 1e-12))
    wrong = torch.stack([misclassified(one, path.y) for one in z]).cumsum(0) > 0
    accuracy = 1 - wrong.double().mean(1).cpu().numpy()
    return Check(
        6,
        "converged",
        f"twice the steps lower A by no more than chance, and change the loss by less than {LOSS_TOL:.0%}",
        "fail" if c.beaten() else "warn" if change > LOSS_TOL else "pass",
        "tuning",
        f"{T} steps leave {share(plain)}, {2 * T} steps {share(twice)}; the mean loss grows by {change:.1%}",
        "more steps",
        {"A(T)": 1 - plain.mean(), "A(2T)": 1 - twice.mean(), "growth of the loss": change, "p": c.p},
        Curve.of(np.arange(len(accuracy)), accuracy, "steps"),
        twice & ~plain,
    )


def restarts(exam: Exam) -> Work[Check]:
    """Check 7: other start points lead to the same places."""
    R = exam.budget.restarts
    points = yield from exam.restarted()
    plain = points[0]
    c = compare(plain, points[-1])
    return Check(
        7,
        "restarts do not matter much",
        f"A(worst of {R} restarts) is within {RESTART_TOL:.0%} of A(one)",
        "fail" if c.gap > RESTART_TOL and c.beaten(RESTART_TOL) else "warn" if c.gap > RESTART_TOL else "pass",
        "V or S",
        f"one run leaves {share(plain)}, the worst of {R} {share(points[-1])}",
        "many restarts, always; " + VS_REPAIR,
        {"A(1)": 1 - plain.mean(), f"A({R})": 1 - points[-1].mean(), "p": c.p},
        Curve.of(np.arange(1, R + 1), [1 - s.mean() for s in points], "restarts"),
        points[-1] & ~plain,
    )


def chance(exam: Exam) -> Work[Check]:
    """Check 8: where every input may become grey, no more than chance is left."""
    from scipy.stats import binom

    success = yield from exam.successes(exam.pgd(), exam.whole(0.5))
    n, left, level = len(exam), int((~success).sum()), 1 / exam.z.shape[1]
    above = left > level * n and binom.sf(left - 1, n, level) < 0.05
    return Check(
        8,
        "high distortion gives chance",
        f"A(PGD) is at most 1/d = {level:.1%} where eps is half the range",
        "fail" if above else "pass",
        "V or S",
        f"within half the range PGD leaves {share(success)}",
        VS_REPAIR,
        {"A(PGD)": left / n, "chance": level, "eps": exam.whole(0.5)},
        examples=~success,
    )


def precision(exam: Exam) -> Work[Check]:
    """Check 9: float64 finds no more."""
    name, condition = "dtype", "A(PGD in float64) is not below A(PGD)"
    if exam.x.dtype == torch.float64:
        words = "the net works in float64 already"
        return Check(9, name, condition, "skipped", "V", words, V_REPAIR)
    plain = yield from exam.plain()
    double = yield from exam.successes(exam.pgd(), precise=True)
    c = compare(plain, double)
    return Check(
        9,
        name,
        condition,
        "fail" if c.beaten() else "pass",
        blame(exam, double & ~plain),
        f"{str(exam.x.dtype).removeprefix('torch.')} leaves {share(plain)}, float64 {share(double)}",
        V_REPAIR,
        {"A": 1 - plain.mean(), "A(float64)": 1 - double.mean(), "only float64": c.gained, "p": c.p},
        Curve.of([torch.finfo(exam.x.dtype).bits, 64], [1 - plain.mean(), 1 - double.mean()], "bits"),
        double & ~plain,
    )


def temperature(exam: Exam) -> Work[Check]:
    """Check 10: no temperature wakes the attack up."""
    from qlab.attacks.scaling import HNS, NJS

    plain = yield from exam.plain()
    found: dict[str, Successes] = {}
    for beta in BETAS:
        found[f"{beta:g}"] = yield from exam.successes(exam.pgd(scaling=Fixed(beta)))
    for name, rule in (("NJS", NJS()), ("HNS", HNS())):
        found[name] = yield from exam.successes(exam.pgd(scaling=rule))
    best, c = strongest(plain, found)
    examples = found[best] & ~plain
    warmer = best not in ("NJS", "HNS") and float(best) > 1
    betas = sorted([*BETAS, 1.0])
    return Check(
        10,
        "temperature",
        "no temperature, NJS and HNS among them, leaves less than beta = 1",
        "fail" if c.beaten() else "pass",
        "tuning" if warmer else blame(exam, examples),
        f"beta = 1 leaves {share(plain)}, the best of {len(found)}, {best}, {share(found[best])}",
        "scale the logits by NJS or HNS" if not warmer else f"a larger temperature ({best}), or the margin as loss",
        _accuracies(found | {"1": plain}) | {"p": c.p * c.trials},
        Curve.of(betas, [1 - (plain if b == 1 else found[f"{b:g}"]).mean() for b in betas], "beta", log=True),
        examples,
    )


def losses(exam: Exam) -> Work[Check]:
    """Check 11: other losses find no more."""
    plain = yield from exam.plain()
    classes = exam.z.shape[1]
    found = {"margin": (yield from exam.successes(exam.pgd(loss="margin")))}
    if classes > 2:
        found["DLR"] = yield from exam.successes(exam.pgd(loss="dlr"))
        targeted = np.zeros(len(exam), bool)
        for k in range(min(TARGETS, classes - 1)):
            targeted |= yield from exam.successes(exam.pgd(loss=_towards(k)))
        found["targeted margin"] = targeted
    best, c = strongest(plain, found)
    examples = found[best] & ~plain
    return Check(
        11,
        "loss swap",
        "no other loss (margin, DLR, targeted margin) leaves less than cross-entropy",
        "fail" if c.beaten() else "pass",
        blame(exam, examples),
        f"cross-entropy leaves {share(plain)}, " + ", ".join(f"{k} {share(s)}" for k, s in found.items()),
        f"take the worst case over losses, {best} among them",
        _accuracies(found | {"cross-entropy": plain}) | {"p": c.p * c.trials},
        examples=examples,
    )


def step_size(exam: Exam) -> Work[Check]:
    """Check 14: no other step size finds more."""
    plain = yield from exam.plain()
    found: dict[str, Successes] = {}
    for part in STEPS:
        eta = part * exam.eps
        same = math.isclose(eta, exam.eta)  # the default itself: no run of its own
        found[f"{part:.3g}"] = yield from exam.successes(exam.pgd(eta=None if same else eta))
    best, c = strongest(plain, found)
    return Check(
        14,
        "step size",
        "no step size from eps/20 to eps leaves less than the default",
        "fail" if c.beaten() else "pass",
        "tuning",
        f"the default leaves {share(plain)}, {best} eps {share(found[best])}",
        f"steps of {best} eps, or APGD, which finds its own",
        _accuracies(found) | {"p": c.p * c.trials},
        Curve.of([p * exam.eps for p in STEPS], [1 - s.mean() for s in found.values()], "step size", log=True),
        found[best] & ~plain,
    )


def silent(exam: Exam) -> Work[Check]:
    """Check 15: the last iterate is misclassified wherever one was."""
    path = yield from exam.path()
    missed = path.success & ~path.at_end
    count, n = int(missed.sum()), len(path)
    many = too_many(count, n, FEW["silent"])
    return Check(
        15,
        "silent success",
        f"for at most {FEW['silent']:.0%} the last iterate is classified correctly though another one was not",
        "fail" if many else "warn" if count > FEW["silent"] * n else "pass",
        "bookkeeping",
        f"{count} of {n} examples: the attacks of the lab keep the best iterate, others return the last one",
        "keep the best iterate of each example",
        {"missed": count, "n": n},
    )


def blame(exam: Exam, examples: Successes) -> Mechanism:
    """Return V where at least half of the examples have lost their gradient to rounding, tuning else."""
    if not examples.any() or not exam.differentiable:
        return "V"
    return "V" if exam.vanished[examples].mean() >= 0.5 else "tuning"


def _accuracies(found: Mapping[str, Successes]) -> dict[str, float]:
    return {f"A({name})": 1 - float(s.mean()) for name, s in found.items()}


_TOWARDS: dict[int, Any] = {}


def _towards(k: int) -> Any:
    """Return the targeted margin towards the k-th largest other logit; the same function for the same k: runs are known by it."""

    def towards(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return targeted_margin(z, y, nearest_classes(z.detach(), y, k + 1)[:, k])

    return _TOWARDS.setdefault(k, towards)
