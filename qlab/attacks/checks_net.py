r"""Checks of the net itself, before any attack: randomness, outputs, zero gradients, agreement of gradients.

12  share of correct examples whose input gradient is exactly zero, and share with p_y == 1 in the net's precision
13  mean_n cos(grad_x margin(x_n), grad_x E margin(x_n + s u)),   u ~ N(0, I)
16  max |z - z'| / (max z - min z) over five answers
17  all outputs in [0, 1], and rows sum to 1 or more than half of all outputs within 0.01 of 0 or 1

The gradients of 13 are those of the margin in float64: what the softmax or the precision makes vanish is no matter of it. An
example with a zero gradient where the smoothed one is not zero counts as cosine 0. s is a quarter of eps (of eps / sqrt(D) for l2),
the scale of the steps that the attack takes; the mean cosine is divided by the square root of the smoothed gradient's reliability.

A zero gradient of the cross-entropy means vanishing if the margin's gradient in float64 is alive, and shattering if it is zero too.

Source: Athalye et al. 2018, arXiv 1802.00420; Croce, Hein 2020, arXiv 2003.01690 (16, 17).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlab.attacks.checks import Check, Curve, State, wilson
from qlab.attacks.checks_runs import Exam, Work
from qlab.attacks.losses import misclassified
from qlab.errors import InputError
from qlab.jobs import Update

__all__ = ["agreement", "determinism", "outputs", "spread_of", "zero_gradients"]

PASSES = 5
SAME = 1e-4  # relative difference of logits from which on a net counts as random
SUM_TOL = 1e-5
SQUEEZED = 0.01
FEW_DEAD = 0.01
SATURATED = 0.1
AGREES = 0.8
NOISY = 0.1  # reliability of the smoothed gradient below which nothing can be said
COORDINATES = 64
PAIRS = 20  # per coordinate
DRAWS = 16


def spread_of(net: nn.Module, x: torch.Tensor) -> float:
    """Return the largest difference of logits over five answers, relative to their range in an example."""
    with torch.no_grad():
        first = net(x)
        wide = (first.amax(1) - first.amin(1)).clamp(min=torch.finfo(first.dtype).tiny)
        return max(float(((net(x) - first).abs().amax(1) / wide).max()) for _ in range(PASSES - 1))


def determinism(exam: Exam) -> Work[Check]:
    """Check 16; a random net is attacked on one draw and on the mean of several, and both are judged by fresh draws."""
    from qlab.attacks.estimators import EOT

    yield Update(0.0, "asking five times")
    difference = spread_of(exam.net, exam.x)
    evidence = {"difference": difference}
    words = f"{PASSES} answers differ by {difference:.2g} of the logits' range"
    if difference >= SAME and exam.differentiable:
        for name, draws in (("one draw", 1), (f"mean of {DRAWS} draws", DRAWS)):
            try:
                found = yield from exam.run(exam.pgd(estimator=EOT(samples=draws)))
            except InputError:
                words += (
                    "; the noise does not follow torch's global generator, so no attack can average over it from here"
                )
                break
            with torch.no_grad():
                fresh = [misclassified(exam.net(found.adversarial), exam.y) for _ in range(PASSES)]
            evidence[f"accuracy, {name}"] = 1 - float(torch.stack(fresh).double().mean())
            words += f"; accuracy after an attack on the {name} {evidence[f'accuracy, {name}']:.1%}"
    return Check(
        16,
        "determinism",
        f"logits of {PASSES} answers differ by less than {SAME:g} of their range",
        "fail" if difference >= SAME else "pass",
        "R",
        words,
        "average gradients over draws (EOT), and fix the noise to see whether the attack then succeeds",
        evidence,
    )


def outputs(exam: Exam) -> Work[Check]:
    """Check 17: logits, and not probabilities."""
    yield Update(0.0, "looking at the outputs")
    z = exam.z.double()
    bounded = bool(((z >= -SUM_TOL) & (z <= 1 + SUM_TOL)).all())
    sums = float((z.sum(1) - 1).abs().max())
    squeezed = float(((z < SQUEEZED) | (z > 1 - SQUEEZED)).double().mean())
    distribution = sums <= SUM_TOL
    state: State = "pass"
    if bounded:
        state = "fail" if distribution or squeezed > 0.5 else "warn"
    words = f"outputs from {float(z.min()):.4g} to {float(z.max()):.4g}"
    if bounded and distribution:
        words += ", and all rows sum to 1: probabilities"
    elif bounded:
        words += f": all within [0, 1], as behind a sigmoid; {squeezed:.1%} within {SQUEEZED:g} of its ends"
    return Check(
        17,
        "logits, not probabilities",
        "the outputs do not all lie in [0, 1], with rows that sum to 1 or most of them at its ends",
        state,
        "V",
        words,
        "attack the logits: take the softmax (or sigmoid) off the net",
        {"smallest": float(z.min()), "largest": float(z.max()), "row sum - 1": sums, "at the ends": squeezed},
    )


def zero_gradients(exam: Exam) -> Work[Check]:
    """Check 12: examples without a gradient, and examples whose softmax is saturated."""
    yield Update(0.0, "looking for zero gradients")
    condition = f"no correct example has a gradient of exactly zero, and p_y == 1 for at most {SATURATED:.0%}"
    name = "zero gradients"
    if not exam.differentiable:
        words = "no gradient reaches the inputs: an operation in the net is not differentiable"
        repair = "BPDA: give the operation a backward rule; or attack without gradients: Square, NES, random search"
        return Check(12, name, condition, "fail", "S", words, repair, {"zero": 1.0}, examples=exam.clean.copy())
    correct = max(1, int(exam.clean.sum()))
    dead, rounded = exam.dead, exam.rounded & exam.clean
    zero, saturated = int(dead.sum()) / correct, int(rounded.sum()) / correct
    state: State = "pass"
    if zero > FEW_DEAD:
        state = "fail"
    elif zero > 0 or saturated > SATURATED:
        state = "warn"
    low, high = wilson(int(dead.sum()), correct)
    words = f"{zero:.1%} ({low:.1%} to {high:.1%}) of the correct examples have a zero gradient, p_y == 1 for {saturated:.1%}"
    evidence = {"zero": zero, "p_y == 1": saturated}
    shattered = False
    if dead.any():
        try:
            alive = (exam.gradients("margin", precise=True).flatten(1) != 0).any(1).cpu().numpy()
        except InputError:
            alive = (exam.gradients("margin", precise=False).flatten(1) != 0).any(1).cpu().numpy()
        evidence["of these alive in float64 with the margin"] = float(alive[dead].mean())
        shattered = bool(alive[dead].mean() < 0.5)
        words += f"; of the former {alive[dead].mean():.1%} have one in float64 with the margin as loss"
    return Check(
        12,
        name,
        condition,
        state,
        "S" if shattered else "V",
        words,
        "BPDA, smoothing (NES) or search: the true gradient is zero"
        if shattered
        else "a small temperature (NJS, HNS), the margin as loss, or float64",
        evidence,
        curve=_gaps(exam),
        examples=dead if dead.any() else None,
    )


def _gaps(exam: Exam) -> Curve:
    """Return the share of correct examples by how far the label's logit is ahead."""
    z = exam.z.double()
    top = z.topk(2, dim=1).values
    gaps = np.sort((top[:, 0] - top[:, 1]).cpu().numpy()[exam.clean])
    return Curve.of(
        gaps, np.arange(1, len(gaps) + 1) / max(1, len(gaps)), "gap of the two largest logits", "share below"
    )


def agreement(exam: Exam) -> Work[Check]:
    """Check 13: the back-propagated gradient of the margin against the gradient of the smoothed margin."""
    condition = f"mean cosine of the gradient with the smoothed one above {AGREES:g}"
    name, repair = (
        "gradient agreement",
        "BPDA with another stand-in, smoothing (NES), or search without gradients (Square)",
    )
    if not exam.differentiable:
        return Check(13, name, condition, "fail", "S", "there is no gradient to compare", repair, {"cosine": 0.0})
    at = np.flatnonzero(exam.clean)[: exam.budget.looked]
    if not len(at):
        return Check(13, name, condition, "skipped", "S", "no example is classified correctly", repair)
    D = exam.x[0].numel()
    scale = exam.eps * {"linf": 1.0, "l2": 1 / math.sqrt(D), "l1": 1 / D}[exam.norm]
    widths = [scale / 8, scale / 4, scale / 2]
    found = []
    for k, width in enumerate(widths):
        yield Update(k / len(widths), f"smoothing over {width:.3g}")
        some = at if width == widths[1] else at[: max(1, len(at) // 4)]  # the other widths are for the curve alone
        found.append(_cosines(exam, some, width))
    cosines, reliability = found[1]
    curve = Curve.of(widths, [_corrected(c, R) for c, R in found], "width of the smoothing", "cosine", log=True)
    evidence = {"reliability": reliability, "width": widths[1], "examples": float(len(cosines))}
    if not len(cosines) or reliability < NOISY:
        words = "the smoothed gradient is too noisy to compare with, or the margin is flat"
        return Check(13, name, condition, "skipped", "S", words, repair, evidence, curve)
    c = _corrected(cosines, reliability)
    error = 1.96 * float(np.std(cosines)) / math.sqrt(len(cosines) * reliability)
    evidence |= {"cosine": c, "low": c - error, "high": c + error}
    state: State = "pass" if c > AGREES else "fail" if c + error < AGREES else "warn"
    words = (
        f"cosine {c:.2f} ({c - error:.2f} to {c + error:.2f}) at width {widths[1]:.3g}, reliability {reliability:.2f}"
    )
    return Check(13, name, condition, state, "S", words, repair, evidence, curve)


def _corrected(cosines: NDArray[np.float64], reliability: float) -> float:
    return float(cosines.mean()) / math.sqrt(reliability) if len(cosines) and reliability > 0 else math.nan


def _cosines(exam: Exam, at: NDArray[np.int64], width: float) -> tuple[NDArray[np.float64], float]:
    """Return the cosine of each example that has a smoothed gradient, and the mean reliability of these gradients."""
    from qlab.diagnose.input_gradients import input_pairs
    from qlab.diagnose.objective import Objective

    index = torch.from_numpy(at).to(exam.x.device)
    x, y = exam.x[index], exam.y[index]
    try:
        J = Objective(exam.double, x.double(), y, "margin")
    except InputError:
        J = Objective(exam.net, x, y, "margin")
    F = min(COORDINATES, x[0].numel())
    row, (g, truth) = input_pairs(J, "smoothed", width, PAIRS * F, F, exam.seed)
    exam.forward += 2 * PAIRS * F * len(x)
    pairs = zip(g.reshape(len(x), F), truth.reshape(len(x), F), strict=True)
    # A gradient of zero points nowhere: it agrees with no other one.
    each = [float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300) for a, b in pairs if b.any()]
    R = float(row["reliability"])
    return np.array(each), R if math.isfinite(R) else 0.0
