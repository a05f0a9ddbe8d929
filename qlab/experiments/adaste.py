"""AdaSTE is never stuck: saturated weights change sign where the exact derivative of the same forward map moves none.

With mu = 100 and alpha = 0.01 the binary weight w*(theta) is exactly sign(theta) from the first step on. Its true derivative
is zero, so gradient descent on the latent theta moves nothing. AdaSTE takes, per weight and step, the largest finite
difference of w* instead, which is never zero for a weight that the loss pushes towards the other sign. That is the claim
judged here (arms "A ..."). The accuracy table beside it (arms "B ...") puts the authors' rule and the derived one next to
plain straight-through in the very same optimizer, BinaryConnect and the float net. It is shown as it falls: on small data
plain straight-through is as good, and no verdict rests on it.

Arms:
    A exact derivative           forward sign, backward dw*/dtheta = 0
    A AdaSTE                     forward sign, derived rule, c_max 0.5, no dead zone
    A AdaSTE, tol 1e-3           with dead zone |l'| <= 1e-3, inside of which it is plain straight-through
    A ... from ±3                latents start at ±3; clipped STE, which has no slope beyond ±1, beside the two
    B AdaSTE reference, tol ...  the authors' code: S = (10 n)^2, lr 3e-4, cosine, theta = ±10 at the start
    B AdaSTE derived, tol 1e-3   the derived rule with c_max 1 in the same optimizer
    B sign STE                   the same optimizer with a dead zone that holds everything: c = 1, w = sign(theta)
    B BinaryConnect              Adam at 0.01 with cosine, the calibrated setting of the comparisons, not the method's defaults
    B full precision

Reported per run: accuracy deployed (batch norm re-estimated for the final signs) and with the running statistics of
training; share of weights whose sign differs from the start; flips in the last epoch; median |theta|; share of entries with
|l'| > 1e-3; share of entries with zero slope among those with a gradient.

Source: Le, Høier, Lin, Zach, AdaSTE, CVPR 2022, arXiv 2112.02880; settings of the authors' code (intellhave/AdaSTE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from qlab.data import DataModule
from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, prepared, trained
from qlab.experiments.verdict import Difference, Every, Metric, Rule
from qlab.methods.base import Method
from qlab.quantizers import hard_sign, layers, quantized_tensors

__all__ = ["EXPERIMENT", "plan", "train"]

ACCURACY = Metric("test/acc", "deployed accuracy", "%", 100)
CHANGED = Metric("quant/changed", "signs changed", "%", 100)
METRICS = (
    ACCURACY,
    CHANGED,
    Metric("quant/median_latent", "median |theta|", log=True),
    Metric("test/acc_latent", "accuracy before re-estimation", "%", 100),
    Metric("quant/flip_ratio", "flips, last epoch", "%", 100, digits=2),
    Metric("quant/large_gradient", "|l'| > 1e-3", "%", 100),
    Metric("quant/zero_slope", "zero slope", "%", 100),
)

LARGE_GRADIENT = 1e-3  # the dead zone of the authors' code
PANEL_BATCHES = 8

EXACT, ADASTE, DEAD_ZONE = "A exact derivative", "A AdaSTE", "A AdaSTE, tol 1e-3"
EXACT_3, ADASTE_3, CLIPPED_3 = "A exact derivative from ±3", "A AdaSTE from ±3", "A clipped STE from ±3"


# ------------------------------------------------------------------------------------------------------------- one run


def train(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed and report the metrics above.

    Args:
        settings: `data`, `data_options`, `net`, `net_options`, `method`, `options` (its hyperparameters), `epochs`, and
            `start` (None, or the absolute value at which every latent starts, with a random sign).
        seed: of the starting net, the latents and the order of the batches.
    """
    method, data = prepared(settings, seed)
    if settings.get("start") is not None:
        _start_at(method, settings["start"], seed)
    before = {name: w.clone() for name, w in method.hard_weights().items()}
    run = trained(method, data, settings["epochs"], seed)
    metrics = {name: run.metrics[name] for name in ("test/acc", "test/acc_latent")}
    return metrics | _weights_panel(method, before, run.metrics) | _gradient_panel(method, data)


def _start_at(method: Method, size: float, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for tensor in quantized_tensors(method.net):
        with torch.no_grad():
            tensor.latent.copy_(size * hard_sign(torch.rand(tensor.latent.shape, generator=draws) - 0.5))


def _weights_panel(method: Method, before: Mapping[str, Tensor], final: Mapping[str, float]) -> dict[str, float]:
    """Return what the weights did; nothing for a float net."""
    if not before:
        return {}
    after = method.hard_weights()
    changed = torch.cat([(after[name] != w).flatten() for name, w in before.items()])
    latent = torch.cat([tensor.latent.detach().abs().flatten() for tensor in quantized_tensors(method.net)])
    return {
        "quant/changed": changed.double().mean().item(),
        "quant/flip_ratio": final["quant/flip_ratio"],
        "quant/median_latent": latent.median().item(),
    }


def _gradient_panel(method: Method, data: DataModule) -> dict[str, float]:
    """Return the share of large l' = dl/dw* and of zero slopes c = g_theta / l' over a few training batches."""
    net = method.net.train()
    parametrized = [layer for layer in layers(net).values() if parametrize.is_parametrized(layer)]
    if not parametrized:
        return {}
    large = zero = moved = entries = 0
    for x, y in islice(data.train_dataloader(), PANEL_BATCHES):
        with parametrize.cached():  # `layer.weight` is then the very tensor that the forward pass uses
            hard = [getattr(layer, name) for layer in parametrized for name in layer.parametrizations]  # type: ignore[union-attr]
            latent = [chain.original for layer in parametrized for chain in layer.parametrizations.values()]  # type: ignore[operator]
            gradients = torch.autograd.grad(method.loss(net(x), y), hard + latent)
        for dl, g in zip(gradients[: len(hard)], gradients[len(hard) :], strict=True):
            large += int((dl.abs() > LARGE_GRADIENT).sum())
            zero += int(((g == 0) & (dl != 0)).sum())
            moved += int((dl != 0).sum())
            entries += dl.numel()
    return {"quant/large_gradient": large / entries, "quant/zero_slope": zero / max(moved, 1)}


# --------------------------------------------------------------------------------------------------------------- plans

SATURATED = {"mu": 100.0, "alpha": 0.01, "mu_rate": 1.0}  # mu alpha = 1: w* is sign(theta) from the first step
STUCK = {
    **SATURATED,
    "scale": 1.0,
    "decay": 0.0,
    "lr": 1.0,
    "momentum": 0.9,
    "theta_init": "uniform",
    "theta_scale": 1.0,
}
FROM_3 = {**STUCK, "theta_init": "signs", "theta_scale": 3.0}
EVERYTHING = 1e9  # a dead zone that holds every gradient

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"hidden": [64, 32]}),
    "lenet": ("lenet", {}),
    "resnet20": ("resnet20", {}),
    "resnet18": ("resnet18", {}),
}


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Args:
        net: a name of `NETS`.
        epochs_a: of the arms that test the claim.
        epochs_b: of the arms of the accuracy table.
        seeds: how many by default.
        parallel: runs side by side.
        options: of AdaSTE in the arms B, where the authors' own differ from its defaults.
        data_options: besides batch size and validation part.
    """

    net: str
    epochs_a: int
    epochs_b: int
    batch_size: int = 128
    val_fraction: float = 0.1
    seeds: int = 3
    parallel: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)


SIZES: dict[tuple[str, Scale], Size] = {
    ("digits", "laptop"): Size("mlp", 60, 200, batch_size=64),
    ("digits", "workstation"): Size("mlp", 60, 200, batch_size=64, seeds=10),
    ("digits", "paper"): Size("mlp", 60, 700, batch_size=64, seeds=10),
    ("fashion_mnist", "laptop"): Size("lenet", 2, 2),
    ("fashion_mnist", "workstation"): Size("lenet", 10, 50, seeds=5),
    ("fashion_mnist", "paper"): Size("resnet18", 30, 700, seeds=5, parallel=False),
    ("cifar10", "laptop"): Size("lenet", 3, 3),
    ("cifar10", "workstation"): Size("resnet20", 10, 100, seeds=3, parallel=False),
    ("cifar10", "paper"): Size("resnet18", 30, 700, seeds=5, parallel=False),
    ("cifar100", "laptop"): Size("lenet", 3, 3),
    ("cifar100", "workstation"): Size("resnet20", 10, 100, seeds=3, parallel=False),
    # The authors' momentum for CIFAR-100 is 0, its epochs 500.
    ("cifar100", "paper"): Size("resnet18", 30, 500, seeds=5, parallel=False, options={"momentum": 0.0}),
    ("image_folder", "laptop"): Size("lenet", 3, 3, data_options={"size": 32}),
    ("image_folder", "workstation"): Size("resnet20", 10, 100, parallel=False, data_options={"size": 32}),
    # The authors' rate for TinyImageNet: after 700 epochs mu is 5.3, and mu alpha never reaches 1.
    ("image_folder", "paper"): Size(
        "resnet18", 30, 700, seeds=5, parallel=False, options={"mu_rate": 1.009}, data_options={"size": 64}
    ),
}


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    size = SIZES[data, scale]
    net, net_options = NETS[size.net]
    common = {
        "data": data,
        "data_options": {"batch_size": size.batch_size, "val_fraction": size.val_fraction, **size.data_options},
        "net": net,
        # The convention of the paper: batch norm without scale and shift after every layer, the logits included.
        "net_options": {**net_options, "affine": False, "final_norm": True},
        "start": None,
    }

    def arm(method: str, epochs: int, start: float | None = None, **options: Any) -> dict[str, Any]:
        return {**common, "method": method, "epochs": epochs, "options": options, "start": start}

    def a(**options: Any) -> dict[str, Any]:
        return arm("adaste", size.epochs_a, **options)

    def b(**options: Any) -> dict[str, Any]:
        return arm("adaste", size.epochs_b, **{**size.options, **options})

    arms = {
        EXACT: a(mode="exact", **STUCK),
        ADASTE: a(mode="derived", c_max=0.5, tol=0.0, **STUCK),
        DEAD_ZONE: a(mode="derived", c_max=0.5, tol=1e-3, **STUCK),
        EXACT_3: a(mode="exact", **FROM_3),
        ADASTE_3: a(mode="derived", c_max=0.5, tol=0.0, **FROM_3),
        # lr 0.1 of torch's momentum, which does not average, is lr 1 of AdaSTE's, which does
        CLIPPED_3: arm("ste", size.epochs_a, start=3.0, surrogate="clipped", clamp=False, optimizer="sgd", lr=0.1),
        "B AdaSTE reference, tol 1e-3": b(mode="reference", tol=1e-3),
        "B AdaSTE reference, tol 1e-2": b(mode="reference", tol=1e-2),
        "B AdaSTE reference, tol 0": b(mode="reference", tol=0.0),
        "B AdaSTE derived, tol 1e-3": b(mode="derived", c_max=1.0, tol=1e-3),
        "B sign STE, same optimizer": b(mode="reference", tol=EVERYTHING, **SATURATED),
        "B BinaryConnect": arm("binary_connect", size.epochs_b, lr=0.01, scale_lr=False, lr_schedule="cosine"),
        "B full precision": arm("full_precision", size.epochs_b),
    }
    return Plan(arms, seeds=size.seeds, parallel=size.parallel)


MARGIN = 0.1

EXPERIMENT = Experiment(
    name="adaste",
    title="AdaSTE is never stuck",
    claim=(
        "where every weight is saturated from the first step, AdaSTE changes signs and learns, while the exact derivative of the "
        "same forward map (and a clipped straight-through estimator beyond its clip) changes none"
    ),
    rule=Rule(
        (
            Difference(ACCURACY, ADASTE, EXACT, MARGIN),
            Every(CHANGED, (ADASTE, DEAD_ZONE, ADASTE_3), ">", 0.0),
            Every(CHANGED, (EXACT, EXACT_3, CLIPPED_3), "==", 0.0),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("digits", "fashion_mnist", "cifar10", "cifar100", "image_folder"),
    code=CODE,
)
