"""Symptoms in what back-propagation gives: rules that pass nothing, zeros, wrong directions. See `qlab.diagnose.symptoms`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.coordinates import coordinate_cosine, temperature
from qlab.diagnose.exam import ALMOST_ALL, Exam, Finding, constant, rms
from qlab.quantizers import NONLINEARITIES, Quantizer, harden, quantized_tensors

__all__ = ["gradient_mismatch", "saturated_signs", "softmax_underflow", "zero_gradients"]

COORDINATES = 48
LAYERS_COMPARED = 8
WORK = 2**29  # activations that may be computed for them
MISMATCH, VANISHING = "07_gradient_mismatch", "09_vanishing_gradients"


def saturated_signs(exam: Exam) -> Iterator[Finding]:
    """Quantizers and other bounded activations whose derivative is zero where their inputs lie."""
    foreign = {f.module for f in exam.flats if f.kind == "input"}
    bounded = tuple(t for t in NONLINEARITIES if t in (nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.ReLU6))
    for record in exam.layers:
        quantizer = isinstance(record.module, Quantizer) or record.name in foreign
        if record.input is None or not (quantizer or isinstance(record.module, bounded)):
            continue
        share = _blocked(record.module, record.input)
        if _blocked(record.module, 0.5 * record.input / max(rms(record.input), 1e-12)) >= 0.9:
            continue  # there is no rule that could pass anything: `zero_gradients` says it
        if share >= 0.9 and constant(record.output) < ALMOST_ALL:
            name = "saturated signs" if quantizer else "saturated activation"
            yield _saturated(
                name, record.name, record.name, share, record.input, "surrogate" if quantizer else exam.function
            )
    yield from _saturated_between(exam)
    for t in quantized_tensors(exam.net):
        if t.quantizer.primitive() is not None:
            share = _blocked(t.quantizer, t.latent.detach())
            if share >= 0.9:
                yield Finding(
                    "saturated weights",
                    "high" if share >= ALMOST_ALL else "medium",
                    t.name,
                    f"At {share:.1%} of the latent weights of {t.name} the backward rule is zero (rms {rms(t.latent):.3g}): they "
                    "cannot move any more.",
                    "surrogate",
                    VANISHING,
                    "Clamp latent weights to the reach of the surrogate after every step, or take the identity surrogate.",
                    share,
                )


def _saturated_between(exam: Exam) -> Iterator[Finding]:
    """Functional quantizers whose backward rule is zero where their inputs lie: next to no gradient arrives before them."""
    if not exam.finite:
        return
    # Only examples from which a gradient comes at all.
    alive = (exam.logits.softmax(1) - F.one_hot(exam.y, exam.classes)).any(1)
    starved: dict[str, tuple[float, Tensor]] = {}
    for record in exam.layers[:-1]:
        g = record.gradient
        if g is not None and len(g) == len(alive) and bool(alive.any()):
            share = float((g[alive] == 0).double().mean())
            if share >= 0.9 and constant(record.output) < ALMOST_ALL:
                starved[record.name] = share, record.output
    if starved:
        for flat in exam.all_flats:
            if flat.kind == "between" and flat.gradient == "straight-through" and flat.module in starved:
                share, u = starved[flat.module]
                where = f"the functional code after {flat.module}"
                yield _saturated("saturated signs", flat.module, where, share, u, "surrogate")


def _saturated(name: str, layer: str, where: str, share: float, u: Tensor, function: str) -> Finding:
    return Finding(
        name,
        "high" if share >= ALMOST_ALL else "medium",
        layer,
        f"At {share:.1%} of the inputs of {where} the backward rule is zero (rms {rms(u):.3g}), so that almost no gradient passes.",
        function,
        VANISHING,
        "Put batch norm before it or shrink the layer before it; or take a surrogate that reaches further.",
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


def gradient_mismatch(exam: Exam) -> Iterator[Finding]:
    """Back-propagation against exact differences: sign weights are flipped, float weights moved by their rms, one at a time."""
    if not exam.finite or not exam.quantized:
        return
    net = harden(exam.net).double()
    signs = {t.name for t in quantized_tensors(exam.net) if t.quantizer.bits == 1}
    generator = torch.Generator().manual_seed(exam.seed)
    # A big net is compared in fewer layers and on fewer examples, so that the doctor stays a matter of seconds.
    size = 2 * COORDINATES * max(1, sum(r.output.numel() for r in exam.layers) // len(exam.x))
    examples = min(64, max(4, WORK // (LAYERS_COMPARED * size)))
    layers = min(LAYERS_COMPARED, max(1, WORK // (examples * size)))
    names = [name for name, p in net.named_parameters() if p.dim() >= 2][:layers]
    for name in names:
        layer = name.removesuffix(".weight")
        cosine = coordinate_cosine(
            net,
            exam.x[:examples].double(),
            exam.y[:examples],
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
