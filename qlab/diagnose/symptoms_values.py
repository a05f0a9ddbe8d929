"""Symptoms in what a net holds and gives: weights, statistics, outputs of layers, logits. See `qlab.diagnose.symptoms`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.exam import ALMOST_ALL, Exam, Finding, LayerRecord, constant, rms, units
from qlab.quantizers import Quantizer

__all__ = [
    "constant_logits",
    "dead_layers",
    "exploding_scale",
    "labels_out_of_step",
    "nan_weights",
    "norm_scales",
    "norm_statistics",
    "training_mode",
]

TOUR = "00_tour"
EXPLODED = 1e5  # rms of an output over that of the net's input


def nan_weights(exam: Exam) -> Iterator[Finding]:
    """NaN or infinite parameters and buffers; a quantizer's own quantity may be infinite: a cap that caps nothing."""
    quantities = {id(b) for m in exam.net.modules() if isinstance(m, Quantizer) for b in m.buffers(recurse=False)}
    for name, value in [*exam.net.named_parameters(), *exam.net.named_buffers()]:
        wrong = value.isnan() if id(value) in quantities else ~value.isfinite()
        bad = int(wrong.sum()) if value.is_floating_point() else 0
        if bad:
            yield Finding(
                "NaN weights",
                "high",
                _layer(name),
                f"{bad} of {value.numel()} values of {name} are NaN or infinite.",
                exam.function,
                TOUR,
                "Go back to the last checkpoint and lower the learning rate; clip gradients; look for a division by zero or a "
                "logarithm of zero in the loss.",
                bad / value.numel(),
            )


def training_mode(exam: Exam) -> Iterator[Finding]:
    """Batch norm or dropout in training mode."""
    if exam.in_training:
        n = len(exam.in_training)
        yield Finding(
            "training mode",
            "high",
            exam.in_training[0],
            f"{n} batch-norm or dropout module{'s are' if n > 1 else ' is'} in training mode: an answer then depends on the other "
            "examples of the batch, or on chance.",
            exam.function,
            TOUR,
            "Call net.eval() before evaluating, or evaluate method.deployed().",
            1.0,
        )


def norm_statistics(exam: Exam) -> Iterator[Finding]:
    """Running statistics that do not belong to the weights: those of this batch do much better."""
    norms = [(n, m) for n, m in exam.net.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or len(exam.x) < 16 or not all(bool(m.running_var.isfinite().all()) for _, m in norms):  # type: ignore[union-attr]
        return
    logits, layers = exam.recalibrated
    better = float((logits.argmax(1) == exam.y).double().mean())
    loss = float(F.cross_entropy(logits, exam.y))
    if better - exam.accuracy >= 0.1 and loss < exam.loss:
        records = {r.name: r for r in exam.layers}
        off = [(n, *_distance(m, records[n].input)) for n, m in norms if n in records]
        # What comes after the first that is off is off because of it.
        where, mean, std = next((entry for entry in off if max(entry[1:]) >= 0.5), max(off, key=lambda e: max(e[1:])))
        yield Finding(
            "batch-norm statistics",
            # A scale that explodes whatever the statistics is the cause of what they are.
            "medium" if _largest(layers) >= EXPLODED * rms(exam.x) else "high",
            where,
            f"With statistics of this batch accuracy is {better:.1%} instead of {exam.accuracy:.1%} and loss {loss:.3g} instead of "
            f"{exam.loss:.3g}; in {where} the running mean is {mean:.1f} standard deviations off, the running deviation by "
            f"a factor of {math.exp(std):.3g}.",
            exam.function,
            TOUR,
            "Re-estimate the statistics with the weights that are shipped: qlab.quantizers.reestimate_batch_norm(net, batches), or "
            "method.deployed(calibration).",
            better - exam.accuracy,
        )


def _distance(m: nn.Module, u: Tensor | None) -> tuple[float, float]:
    """Return how far a batch norm is from its inputs: medians of |mean - running mean| / std and |log(std / running std)|."""
    if u is None:
        return 0.0, 0.0
    u = units(u)
    std = u.std(1).clamp(min=1e-12)
    mean = (u.mean(1) - m.running_mean).abs() / std  # type: ignore[operator]
    return float(mean.median()), float((std / (m.running_var + m.eps).sqrt()).log().abs().median())  # type: ignore[operator]


def exploding_scale(exam: Exam) -> Iterator[Finding]:
    """Activations that grow without measure."""
    before = max(rms(exam.x), 1e-12)
    overflow = not exam.finite and all(bool(p.isfinite().all()) for p in exam.net.parameters())
    largest = _largest(exam.layers)
    if not overflow and largest < EXPLODED * before:
        return
    gains = []
    for record in exam.layers:
        out = rms(record.output)
        if math.isfinite(out):
            gains.append((out / max(before if record.input is None else rms(record.input), 1e-12), record.name))
    if not gains:
        return
    gain, name = max(gains)
    yield Finding(
        "exploding scale",
        "high",
        name,
        f"The input has rms {before:.3g}, the largest layer output {largest:.3g}"
        + (", and the logits are not finite" if overflow else "")
        + f"; {name} multiplies the scale by {gain:.3g}.",
        exam.function,
        TOUR,
        "Divide by sqrt(fan-in), as an initialisation or as a fixed scale after sign weights, or put batch norm after the layer.",
        min(1.0, math.log10(max(gain, 1)) / 10),
    )


def _largest(layers: list[LayerRecord]) -> float:
    """Return the largest rms of the layers whose outputs are finite."""
    return max((r for r in (rms(record.output) for record in layers) if math.isfinite(r)), default=0.0)


def dead_layers(exam: Exam) -> Iterator[Finding]:
    """Layers whose outputs do not depend on the input of the net."""
    if len(exam.x) < 2 or _alike(exam.x):
        return
    silent = exam.finite and constant(exam.logits) >= ALMOST_ALL
    for i, record in enumerate(exam.layers):
        x, out = record.input, record.output
        if x is None or not x.is_floating_point() or not bool(x.isfinite().all() and out.isfinite().all()):
            continue
        if len(x) == len(exam.x) and _alike(x):
            if silent:  # else it may be a constant that the net starts from, such as a first hidden state
                yield _dead(
                    exam,
                    record.name,
                    f"What reaches {record.name} is the same for all {len(x)} examples, though no module before it is constant: "
                    "functional code between them is, or a module that runs again.",
                    1.0,
                )
                return
            continue
        share = constant(out)
        if i < len(exam.layers) - 1 and share >= ALMOST_ALL and constant(x) < 0.9:
            zero = " (all zero)" if not bool(out.any()) else ""
            yield _dead(
                exam,
                record.name,
                f"{share:.0%} of the {len(units(out))} outputs of {record.name} are constant over {len(x)} examples{zero}, though "
                "its inputs vary.",
                share,
            )
            return  # what follows is constant because of it


def _alike(x: Tensor) -> bool:
    """Return whether a tensor is the same for all examples."""
    return bool((x == x[:1]).all())


def _dead(exam: Exam, layer: str, evidence: str, share: float) -> Finding:
    return Finding(
        "dead layer",
        "high",
        layer,
        evidence,
        exam.function,
        TOUR,
        "Look at the bias and the batch norm before it; lower the learning rate; start the layer anew. A sign after a ReLU is "
        "always +1: take the ReLU out.",
        share,
    )


def constant_logits(exam: Exam) -> Iterator[Finding]:
    """A net that gives one answer to everything."""
    if not exam.finite or len(exam.x) < 2:
        return
    share = constant(exam.logits)
    one = float(F.one_hot(exam.logits.argmax(1), exam.classes).double().mean(0).max())
    present = len(exam.y.unique())
    if share >= ALMOST_ALL or (one >= 0.98 and present >= 3):
        flat = share >= ALMOST_ALL
        yield Finding(
            "constant logits",
            "high" if flat else "medium",
            exam.layers[-1].name if exam.layers else "",
            (
                f"All {exam.classes} logits are the same for all {len(exam.x)} examples."
                if flat
                else f"{one:.0%} of the examples get the same answer, though {present} classes are present."
            ),
            exam.function,
            TOUR,
            "Look for a dead layer, all-zero weights or inputs that were not normalised; compare with the net before training.",
            max(share, one),
        )


def labels_out_of_step(exam: Exam) -> Iterator[Finding]:
    """A loss far above chance: the net is sure, and sure of something else."""
    chance = math.log(exam.classes)
    if not exam.finite or exam.loss < 1.5 * chance or exam.accuracy > 1.5 / exam.classes:
        return
    guessed = exam.logits.argmax(1)
    table = torch.zeros(exam.classes, exam.classes)
    table.index_put_((guessed, exam.y), torch.ones(len(exam.y)), accumulate=True)
    renamed = float(table.max(1).values.sum() / len(exam.y))
    sure = renamed >= max(0.5, 2 / exam.classes)
    yield Finding(
        "labels out of step",
        "high" if sure else "medium",
        "",
        f"The loss is {exam.loss:.3g}, chance is log {exam.classes} = {chance:.3g}; accuracy is {exam.accuracy:.1%}"
        + (f", but would be {renamed:.1%} with the classes renamed." if sure else "."),
        exam.function,
        TOUR,
        "Compare the order of the classes and of the examples with those of the training set; look at a few pictures with their "
        "labels.",
        min(1.0, exam.loss / (10 * chance)),
    )


def norm_scales(exam: Exam) -> Iterator[Finding]:
    """Batch-norm scales below zero or next to zero: worth knowing where signs follow."""
    for name, m in exam.net.named_modules():
        if isinstance(m, _BatchNorm) and m.affine and bool(m.weight.isfinite().all()):
            gamma = m.weight.detach()
            negative = int((gamma < 0).sum())
            tiny = int((gamma.abs() < 1e-3 * gamma.abs().max()).sum())
            if negative or tiny:
                yield Finding(
                    "batch-norm scale",
                    "info",
                    name,
                    f"{negative} of {gamma.numel()} scales of {name} are negative, {tiny} are next to zero: a sign after them is "
                    "turned around, or constant.",
                    exam.function,
                    "02_bits",
                    "Nothing, if it is known: a threshold for a negative scale compares the other way round.",
                    (negative + tiny) / gamma.numel(),
                )


def _layer(parameter: str) -> str:
    return parameter.split(".parametrizations.")[0].rpartition(".")[0] or parameter
