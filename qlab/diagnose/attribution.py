r"""Attribution maps of float and quantized nets, each with what it explains, how complete it is and how it ranks.

    maps = attribute(net, x, y, methods=("integrated_gradients", "deeplift", "feature_ablation"), features=2)
    maps["integrated_gradients"].scores       # (N, M), a number per example and feature
    maps.summary()                            # which function, how complete, which ranking, a verdict per map
    twins(float_net, quantized_net, x, y)     # the same on two nets, side by side

The net is looked at as it is deployed: hard weights, quantizers among the activations. Gradients of such a net pass declared
backward rules, so gradient methods explain its *surrogate*; methods that only run the net explain the deployed one. Features are
numbers of the input, square patches of a picture, or any grouping. Every map carries the checks of `qlab.diagnose.guard`.

Source: Kokhlikyan et al. 2020, arXiv 2009.07896 (captum); Yeh et al. 2019, arXiv 1901.09392 (infidelity, sensitivity).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from qlab.diagnose.attribution_judge import References
from qlab.diagnose.attribution_maps import AttributionMap, Attributions
from qlab.diagnose.attribution_methods import METHODS, OUTPUTS, Head, Problem, gradcam_layer
from qlab.diagnose.base import check
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update, last
from qlab.quantizers.apply import harden

__all__ = ["DEFAULT", "AttributionMap", "Attributions", "attribute", "attributing", "patches"]

DEFAULT = ("saliency", "integrated_gradients", "deeplift", "feature_ablation")


def patches(shape: tuple[int, ...], size: int) -> Tensor:
    """Return the numbers (*shape) of the features that inputs of a shape (C, H, W) or (D,) are grouped into.

    Args:
        shape: of one input.
        size: side of the square patches of a picture, all channels together; length of the runs of a vector. Patches at the
            edge may be smaller.

    Raises:
        InputError: a size below 1, or inputs that are neither pictures nor vectors.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(
            f"features must be a patch size of at least 1, or a mask of the shape of one input; it is {size!r:.60}"
        )
    if len(shape) == 1:
        return torch.arange(shape[0]) // size
    if len(shape) != 3:
        raise InputError(
            f"patches are for pictures (C, H, W) and vectors (D,); inputs are {shape}. Give a mask of that shape"
        )
    _, height, width = shape
    columns = -(-width // size)
    rows = torch.arange(height)[:, None] // size
    return (rows * columns + torch.arange(width)[None] // size).expand(shape).contiguous()


def _groups(features: int | Tensor | None, x: Tensor) -> Tensor:
    shape = tuple(x.shape[1:])
    if features is None:
        return torch.arange(x[0].numel(), device=x.device).reshape(shape)
    if not isinstance(features, Tensor):
        return patches(shape, features).to(x.device)
    if features.dtype != torch.int64 or features.shape != shape:
        raise InputError(
            f"features is {features.dtype} of shape {tuple(features.shape)}; expected int64 of shape {shape}"
        )
    found = features.unique()
    if not torch.equal(found.cpu(), torch.arange(len(found))):
        raise InputError(f"features must be numbered 0, 1, ... without gaps; found {found[:8].tolist()}")
    return features.to(x.device)


def _target(target: object, n: int, classes: int, device: torch.device) -> Tensor:
    if target is None:
        raise InputError("attribution explains one class: give target, a class number or one per example (N,), int64")
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((n,), target)
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (n,):
        given = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)[:60]
        raise InputError(f"target is {given}; expected a class number, or int64 of shape ({n},)")
    if int(target.min()) < 0 or int(target.max()) >= classes:
        raise InputError(
            f"target runs from {int(target.min())} to {int(target.max())}; the net has classes 0 to {classes - 1}"
        )
    return target.to(device)


def _baseline(baseline: float | Tensor, x: Tensor) -> Tensor:
    try:
        x0 = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"baseline must be a number or a tensor that broadcasts to {tuple(x.shape)}: {error}"
        ) from error
    if not bool(x0.isfinite().all()):
        raise InputError("the baseline holds NaN or infinite values")
    if bool((x0 == x).flatten(1).all(1).any()):
        raise InputError(
            "an input equals its baseline, so there is no difference to attribute; choose another baseline"
        )
    return x0


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r:.40}")
    return value


def attributing(
    net: nn.Module,
    x: Tensor,
    target: int | Tensor,
    methods: Sequence[str] = DEFAULT,
    baseline: float | Tensor = 0.0,
    features: int | Tensor | None = None,
    output: str = "logit",
    layer: str = "",
    relu: bool = True,
    steps: int = 50,
    samples: int = 25,
    noise: float = 0.1,
    window: int = 3,
    scores: bool = False,
    seed: int = 0,
) -> Generator[Update, None, None]:
    """Yield updates whose values are `Attributions`, with no map at first and one more each; arguments as of `attribute`."""
    if isinstance(methods, str):
        raise InputError(f"methods must be a sequence of names such as ('saliency',), not the string {methods!r:.40}")
    methods = tuple(dict.fromkeys(methods))
    for name in methods:
        if name not in METHODS:
            raise UnknownNameError("attribution method", name, METHODS)
    if not methods:
        raise InputError(f"no method was named; there are {', '.join(METHODS)}")
    if output not in OUTPUTS:
        raise UnknownNameError("output", output, OUTPUTS)
    if not (isinstance(noise, int | float) and 0 < noise < float("inf")):
        raise InputError(f"noise must be a positive number, not {noise!r:.40}")
    net, z = check(net, x, None, labels=False)
    hard = harden(net).requires_grad_(False)
    target = _target(target, len(x), z.shape[1], x.device)
    x = x.detach()
    p = Problem(
        F=Head(hard, output).eval(),
        x=x,
        x0=_baseline(baseline, x),
        target=target,
        groups=_groups(features, x),
        layer=gradcam_layer(hard, layer)[0] if "layer_gradcam" in methods else "",
        relu=relu,
        steps=_whole("steps", steps, 1),
        samples=_whole("samples", samples, 1),
        noise=noise,
        window=_whole("window", window, 1),
        seed=seed,
    )
    yield Update(0.0, "running the net with one feature changed at a time")
    references = References.of(p)
    maps: list[AttributionMap] = []
    for i, name in enumerate(methods):
        yield Update((i + 1) / (len(methods) + 1), METHODS[name].title, references.attributions(p, maps))
        maps.append(references.judged(name, p, scores))
    yield Update(1.0, "", references.attributions(p, maps))


def attribute(
    net: nn.Module,
    x: Tensor,
    target: int | Tensor,
    methods: Sequence[str] = DEFAULT,
    baseline: float | Tensor = 0.0,
    features: int | Tensor | None = None,
    output: str = "logit",
    layer: str = "",
    relu: bool = True,
    steps: int = 50,
    samples: int = 25,
    noise: float = 0.1,
    window: int = 3,
    scores: bool = False,
    seed: int = 0,
) -> Attributions:
    """Attribute an output of a net to the features of its inputs, by several methods, each map with its checks.

    Every map explains F = output of the target class; see `attribution_methods` for the equations and `guard` for the checks.

    Args:
        net: a method of the lab or any torch module in eval mode; it is looked at as deployed and not changed.
        x: (N, *shape) floating point inputs.
        target: a class, or one per example (N,) int64.
        methods: names of `METHODS`.
        baseline: x0, a number or a tensor that broadcasts to x.
        features: what ablation and rankings count as one feature. None: every number of the input; a whole number: patches of that
            side; a mask (*shape) int64 with numbers 0 to M - 1.
        output: "logit", "log_probability" or "probability".
        layer: the module Grad-CAM looks at; the last nn.Conv2d by default.
        relu: whether Grad-CAM ends in a ReLU, as in its paper.
        steps: points on the path of integrated gradients.
        samples: noisy inputs of SmoothGrad, orders of Shapley sampling, subsets of infidelity.
        noise: standard deviation of SmoothGrad's noise, as a share of the range of x.
        window: side of occlusion's window.
        scores: compute infidelity and sensitivity_max too; the latter runs every method again.
        seed: of everything random; the global generators are left alone.

    Raises:
        InputError: what `check` refuses; no target or one out of range; a baseline that is an input; features that are no grouping;
            a method that this net does not allow, with the reason.
        UnknownNameError: for an unknown method or output.
    """
    return last(
        attributing(
            net,
            x,
            target,
            methods,
            baseline,
            features,
            output,
            layer,
            relu,
            steps,
            samples,
            noise,
            window,
            scores,
            seed,
        ),
        Attributions,
    )
