r"""What a doctor looks for: one small function per symptom, from an `Exam` to findings.

| symptom             | alarm when                                                                                   |
|---------------------|----------------------------------------------------------------------------------------------|
| NaN weights         | any parameter or buffer is not finite                                                        |
| training mode       | batch norm or dropout is in training mode                                                    |
| batch-norm statistics | with statistics of the batch at hand, accuracy rises by 10 points or more                  |
| exploding scale     | the rms of a layer's output exceeds 10^5 times that of the net's input, or logits overflow    |
| dead layer          | 99 % of a layer's outputs are constant over the batch though its inputs are not              |
| saturated signs     | the declared derivative is zero at 99 % of a quantizer's inputs                              |
| zero gradients      | a layer's weight gradient is exactly zero, or none arrives                                   |
| softmax underflow   | p_y == 1 in the working dtype for 99 % of the examples: their gradient is exactly zero        |
| constant logits     | the logits do not depend on the input                                                        |
| labels out of step  | the loss is far above log d, and right answers are no more frequent than by chance            |
| gradient mismatch   | cosine of back-propagation with exact differences below -0.4 (low finding: below 0.1)         |

d classes. Thresholds are wide on purpose: a healthy net must raise no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.coordinates import coordinate_cosine, temperature
from qlab.diagnose.exam import Exam, Finding, LayerRecord
from qlab.quantizers import NONLINEARITIES, Quantizer, harden, quantized_tensors

__all__ = ["CHECKS", "Check"]

Check = Callable[[Exam], Iterator[Finding]]

ALMOST_ALL = 0.99
COORDINATES = 48
LAYERS_COMPARED = 8
TOUR, MISMATCH, VANISHING = "00_tour", "07_gradient_mismatch", "09_vanishing_gradients"


def nan_weights(exam: Exam) -> Iterator[Finding]:
    """NaN or infinite parameters and buffers."""
    tensors = [*exam.net.named_parameters(), *exam.net.named_buffers()]
    for name, value in tensors:
        bad = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
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
    better = float((exam.recalibrated.argmax(1) == exam.y).double().mean())
    loss = float(F.cross_entropy(exam.recalibrated, exam.y))
    if better - exam.accuracy >= 0.1 and loss < exam.loss:
        worst, distance = max(((n, _distance(exam, n)) for n, _ in norms), key=lambda pair: pair[1])
        yield Finding(
            "batch-norm statistics",
            "high",
            worst,
            f"With statistics of this batch accuracy is {better:.1%} instead of {exam.accuracy:.1%} and loss {loss:.3g} instead of "
            f"{exam.loss:.3g}; in {worst} the running mean is {distance:.1f} standard deviations off.",
            exam.function,
            TOUR,
            "Re-estimate the statistics with the weights that are shipped: qlab.quantizers.reestimate_batch_norm(net, batches), or "
            "method.deployed(calibration).",
            better - exam.accuracy,
        )


def _distance(exam: Exam, name: str) -> float:
    record = next((r for r in exam.layers if r.name == name), None)
    if record is None or record.input is None:
        return 0.0
    u, m = _units(record.input), record.module
    std = u.std(1).clamp(min=1e-12)
    return float(((u.mean(1) - m.running_mean).abs() / std).median())  # type: ignore[operator]


def exploding_scale(exam: Exam) -> Iterator[Finding]:
    """Activations that grow without measure."""
    before = max(_rms(exam.x), 1e-12)
    known = _rms(exam.x)
    steps: list[tuple[float, LayerRecord, float]] = []
    for record in exam.layers:
        rms = _rms(record.output)
        if math.isfinite(rms):
            source = _rms(record.input) if record.input is not None else known
            steps.append((rms / max(source, 1e-12), record, rms))
    overflow = not exam.finite and all(bool(p.isfinite().all()) for p in exam.net.parameters())
    largest = max((rms for *_, rms in steps), default=0.0)
    if not overflow and largest < 1e5 * before:
        return
    gain, record, rms = max(steps, key=lambda step: step[0])
    yield Finding(
        "exploding scale",
        "high",
        record.name,
        f"The input has rms {before:.3g}, the largest layer output {largest:.3g}"
        + (", and the logits are not finite" if overflow else "")
        + f"; {record.name} multiplies the scale by {gain:.3g}.",
        exam.function,
        TOUR,
        "Divide by sqrt(fan-in), as an initialisation or as a fixed scale after sign weights, or put batch norm after the layer.",
        min(1.0, math.log10(max(gain, 1)) / 10),
    )


def dead_layers(exam: Exam) -> Iterator[Finding]:
    """Layers whose outputs do not depend on the input of the net."""
    for record in exam.layers[:-1]:
        if record.input is None or not bool(record.output.isfinite().all()):
            continue
        share, before = _constant(record.output), _constant(record.input)
        if share >= ALMOST_ALL and before < 0.9:
            zero = " (all zero)" if not bool(record.output.any()) else ""
            yield Finding(
                "dead layer",
                "high",
                record.name,
                f"{share:.0%} of the {_units(record.output).shape[0]} outputs of {record.name} are constant over "
                f"{len(exam.x)} examples{zero}, though its inputs vary.",
                exam.function,
                TOUR,
                "Look at the bias and the batch norm before it; lower the learning rate; start the layer anew. A sign after a ReLU "
                "is always +1: take the ReLU out.",
                share,
            )
            return  # what follows is constant because of it


def saturated_signs(exam: Exam) -> Iterator[Finding]:
    """Quantizers and other bounded activations whose derivative is zero where their inputs lie."""
    foreign = {f.module for f in exam.flats if f.kind == "input"}
    bounded = tuple(t for t in NONLINEARITIES if t in (nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.ReLU6))
    for record in exam.layers:
        quantizer = isinstance(record.module, Quantizer) or record.name in foreign
        if record.input is None or not (quantizer or isinstance(record.module, bounded)):
            continue
        share = _blocked(record.module, record.input)
        if _blocked(record.module, 0.5 * record.input / max(_rms(record.input), 1e-12)) >= 0.9:
            continue  # there is no rule that could pass anything: `zero_gradients` says it
        if share >= 0.9 and _constant(record.output) < ALMOST_ALL:
            name = "saturated signs" if quantizer else "saturated activation"
            yield Finding(
                name,
                "high" if share >= ALMOST_ALL else "medium",
                record.name,
                f"At {share:.1%} of the inputs of {record.name} the backward rule is zero (rms {_rms(record.input):.3g}), so that "
                "almost no gradient passes.",
                "surrogate" if quantizer else exam.function,
                VANISHING,
                "Put batch norm before it or shrink the layer before it; or take a surrogate that reaches further.",
                share,
            )
    for t in quantized_tensors(exam.net):
        if t.quantizer.primitive() is not None:
            share = _blocked(t.quantizer, t.latent.detach())
            if share >= ALMOST_ALL:
                yield Finding(
                    "saturated weights",
                    "high",
                    t.name,
                    f"At {share:.1%} of the latent weights of {t.name} the backward rule is zero (rms {_rms(t.latent):.3g}): they "
                    "cannot move any more.",
                    "surrogate",
                    VANISHING,
                    "Clamp latent weights to the reach of the surrogate after every step, or take the identity surrogate.",
                    share,
                )


def _blocked(module: nn.Module, u: Tensor) -> float:
    """Return the share of inputs at which an elementwise module's backward rule is zero."""
    leaf = u.clone().requires_grad_()
    with torch.enable_grad():
        out = module(leaf)
        if out.shape != u.shape or not out.requires_grad:
            return 0.0
        (g,) = torch.autograd.grad(out.sum(), leaf, allow_unused=True)
    return 1.0 if g is None else float((g.abs() < 1e-4).double().mean())


def zero_gradients(exam: Exam) -> Iterator[Finding]:
    """Layers whose weights get a gradient of exactly zero, or none, though examples are not all fitted to rounding."""
    if not exam.finite or _fitted(exam) >= ALMOST_ALL:
        return
    blocked = [layer for layer, g, _ in exam.weight_gradients() if g is None or not bool(g.any())]
    if not blocked:
        return
    names = [r.name for r in exam.layers]
    last = max(blocked, key=lambda n: max((i for i, name in enumerate(names) if name.startswith(n)), default=-1))
    total = sum(1 for _ in exam.weight_gradients())
    places = [str(f) for f in exam.all_flats if f.gradient == "zero"]
    yield Finding(
        "zero gradients",
        "high",
        last,
        f"The weight gradient is exactly zero in {len(blocked)} of {total} layers, the last of them {last}, at loss "
        f"{exam.loss:.3g}." + (f" {places[0]}." if places else ""),
        exam.honest,
        VANISHING,
        "Give what stands after it a backward rule: qlab.quantizers.Sign instead of torch.sign or a detached tensor.",
        len(blocked) / total,
    )


def softmax_underflow(exam: Exam) -> Iterator[Finding]:
    """Examples whose gradient is zero because p_y rounds to one."""
    share = _fitted(exam)
    if exam.finite and share >= 0.5:
        gap = exam.logits.topk(2, 1).values
        yield Finding(
            "softmax underflow",
            "high" if share >= ALMOST_ALL else "low",
            "",
            f"p_y == 1 in {str(exam.logits.dtype).removeprefix('torch.')} for {share:.1%} of the examples: their gradient is "
            f"exactly zero. The median gap between the two largest logits is {float((gap[:, 0] - gap[:, 1]).median()):.3g}.",
            exam.honest,
            VANISHING,
            "Divide the logits by sqrt(fan-in) of the last layer or by a learned scale; for attacks use a margin loss or a "
            "temperature.",
            share,
        )


def _fitted(exam: Exam) -> float:
    p = exam.logits.softmax(1).gather(1, exam.y[:, None])
    return float((p == 1).double().mean())


def constant_logits(exam: Exam) -> Iterator[Finding]:
    """A net that gives one answer to everything."""
    if not exam.finite or len(exam.x) < 2:
        return
    share = _constant(exam.logits)
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


def gradient_mismatch(exam: Exam) -> Iterator[Finding]:
    """Back-propagation against exact differences: sign weights are flipped, float weights moved by their rms, one at a time."""
    if not exam.finite or not exam.quantized:
        return
    net = harden(exam.net).double()
    signs = {t.name for t in quantized_tensors(exam.net) if t.quantizer.bits == 1}
    generator = torch.Generator().manual_seed(exam.seed)
    names = [name for name, p in net.named_parameters() if p.dim() >= 2][:LAYERS_COMPARED]
    for name in names:
        layer = name.removesuffix(".weight")
        cosine = coordinate_cosine(
            net,
            exam.x[:64].double(),
            exam.y[:64],
            name,
            signs=layer in signs,
            count=COORDINATES,
            generator=generator,
            beta=temperature(exam.logits),
        )
        if cosine < 0.1:
            wrong = cosine < -0.4
            yield Finding(
                "gradient mismatch",
                "high" if wrong else "low",
                layer,
                f"In {layer} the cosine of the back-propagated gradient with exact differences of {COORDINATES} weights is "
                f"{cosine:.2f}" + (": it points the wrong way." if wrong else "."),
                "surrogate",
                MISMATCH,
                "Try another surrogate, or more levels of the activations, which help more than a nicer surrogate (Kim et al., "
                "arXiv 2002.06517).",
                (1 - cosine) / 2,
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


CHECKS: tuple[Check, ...] = (
    nan_weights,
    training_mode,
    norm_statistics,
    exploding_scale,
    dead_layers,
    saturated_signs,
    constant_logits,
    zero_gradients,
    softmax_underflow,
    labels_out_of_step,
    gradient_mismatch,
    norm_scales,
)
"""In the order of cause before effect: of two findings of one severity, the earlier is named first."""


def _layer(parameter: str) -> str:
    return parameter.split(".parametrizations.")[0].rpartition(".")[0] or parameter


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _units(x: Tensor) -> Tensor:
    """Return (units, values): channels of images (N, C, ...), features of vectors (N, F) and of sequences (N, T, F)."""
    axis = 1 if x.dim() in (2, 4, 5) else x.dim() - 1
    return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x[None]


def _constant(x: Tensor) -> float:
    """Return the share of units whose values are the same for all examples."""
    u = _units(x)
    low, high = u.aminmax(dim=1)
    return float((high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())).double().mean())
