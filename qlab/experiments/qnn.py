"""Training with one bit, with shifts in place of products, and with gradients of a few bits.

Every net has batch norm after every layer, the logits included, and all its layers are quantized, as in the paper: squared
hinge, latents from U(-1, 1), Adam with an exponential decay. Judged are what the paper says of its devices, not its accuracies:
shift-based training costs nothing to speak of, the layers' multipliers of the learning rate matter, and six bits are enough for
gradients. The paper also finds that only logarithmic codes work for gradients. On small data either trains; what the codes do
to the gradients of a trained net is measured instead.

Arms:
    A float ReLU             the same net in float
    A 1-bit weights          activations in float
    A BNN                    one bit for weights and activations, to the nearest
    A BNN, drawn neurons     activations drawn in training
    A BNN, shifts            shift-based batch norm and AdaMax, the learning rate halved eight times
    A BNN, shifts, drawn     with drawn activations
    A BNN, no multiplier     the learning rate of latents is that of all parameters
    A BNN, no clamp          latents may leave [-1, 1]
    G float                  1-bit weights, 2-bit activations, gradients in float
    G log 6, G log 4         gradients on powers of two, to the nearest (the paper's are log 6)
    G log 6 drawn            at random, without bias
    G linear 6, ...          gradients on an even grid up to the largest of the tensor

Reported per run: accuracy deployed and before re-estimation, flips of the last epoch, and for nets with binary weights what six
bits, to the nearest, do to the gradients of layers' outputs over a few training batches of the trained net: the share of entries
that are not zero and become zero, and the cosine with the gradient, each the mean over layers.

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, JMLR 18 (2018), arXiv 1609.07061; settings of
the paper scale from the authors' code (MatthieuCourbariaux/BinaryNet, itayhubara/BinaryNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qlab.data import DataModule
from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, FLIPS, prepared, trained
from qlab.experiments.verdict import Difference, Every, Metric, Rule
from qlab.methods.base import Method
from qlab.quantizers import quantized_tensors
from qlab.quantizers.gradients import quantized_outputs
from qlab.quantizers.kbit import linear_scaled, log_quantize

__all__ = ["ARMS", "EXPERIMENT", "gradient_panel", "plan", "train"]

ACCURACY = Metric("test/acc", "deployed accuracy", "%", 100, digits=2)
ZEROED = Metric("quant/zeroed_more", "zeroed by linear 6 beyond log 6", "%", 100)
COSINE = Metric("quant/cosine_less", "cosine, log 6 minus linear 6", digits=3)
METRICS = (
    ACCURACY,
    Metric("test/acc_latent", "accuracy before re-estimation", "%", 100, digits=2),
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
    ZEROED,
    Metric("quant/zeroed_linear", "zeroed by linear 6", "%", 100),
    Metric("quant/zeroed_log", "zeroed by log 6", "%", 100, digits=3),
    COSINE,
    Metric("quant/cosine_linear", "cosine, linear 6", digits=3),
    Metric("quant/cosine_log", "cosine, log 6", digits=3),
)

BITS = 6
PANEL_BATCHES = 8

FLOAT, WEIGHTS, BNN, DRAWN = "A float ReLU", "A 1-bit weights", "A BNN", "A BNN, drawn neurons"
SHIFTS, SHIFTS_DRAWN = "A BNN, shifts", "A BNN, shifts, drawn"
UNSCALED, UNCLAMPED = "A BNN, no multiplier", "A BNN, no clamp"
GRADIENT, LOG_6 = "G float", "G log 6"

_SHIFT: dict[str, Any] = {"shift_norm": True, "optimizer": "shift_adamax", "halvings": 8}
_W1A2: dict[str, Any] = {"weight_bits": 1, "activation_bits": 2}

ARMS: dict[str, dict[str, Any]] = {
    FLOAT: {},
    WEIGHTS: {"activation_bits": None},
    BNN: {},
    DRAWN: {"stochastic_neurons": True},
    SHIFTS: _SHIFT,
    SHIFTS_DRAWN: {**_SHIFT, "stochastic_neurons": True},
    UNSCALED: {"glorot_lr": False},
    UNCLAMPED: {"clamp": False},
    GRADIENT: _W1A2,
    LOG_6: {**_W1A2, "gradient_bits": 6},
    "G log 4": {**_W1A2, "gradient_bits": 4},
    "G log 6 drawn": {**_W1A2, "gradient_bits": 6, "gradient_stochastic": True},
    "G linear 6": {**_W1A2, "gradient_bits": 6, "gradient_grid": "linear"},
    "G linear 4": {**_W1A2, "gradient_bits": 4, "gradient_grid": "linear"},
    "G linear 6 drawn": {**_W1A2, "gradient_bits": 6, "gradient_grid": "linear", "gradient_stochastic": True},
}
"""Options of `qnn` in each arm, besides those of all."""


# ------------------------------------------------------------------------------------------------------------- one run


def train(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed and report the metrics above.

    Args:
        settings: those of `qlab.experiments.training`.
        seed: of the starting net, the latents, the draws and the order of the batches.
    """
    method, data = prepared(settings, seed)
    run = trained(method, data, settings["epochs"], seed)
    kept = {name: run.metrics[name] for name in ("test/acc", "test/acc_latent", FLIPS) if name in run.metrics}
    return kept | gradient_panel(method, data)


def gradient_panel(method: Method, data: DataModule, bits: int = BITS) -> dict[str, float]:
    """Return what linear and logarithmic codes do to the gradients of layers' outputs; nothing for a float net.

    Args:
        method: trained; its gradients are taken in training mode, as they are in a step.
        data: gives the batches.
        bits: of the codes.
    """
    if next(quantized_tensors(method.net), None) is None:
        return {}
    found: dict[str, list[float]] = {}

    def look(name: str, g: Tensor) -> Tensor:
        for code, quantize in (("linear", linear_scaled), ("log", log_quantize)):
            q, there = quantize(g, bits), g != 0
            if bool(there.any()):
                found.setdefault(f"quant/zeroed_{code}", []).append(float((q[there] == 0).double().mean()))
                cosine = torch.nn.functional.cosine_similarity(q.flatten().double(), g.flatten().double(), dim=0)
                found.setdefault(f"quant/cosine_{code}", []).append(float(cosine))
        return g

    net = method.net.train()
    for x, y in islice(data.train_dataloader(), PANEL_BATCHES):
        with quantized_outputs(net, look):
            logits = net(x)
        torch.autograd.grad(method.loss(logits, y), list(net.parameters()))
    if not found:  # every margin is kept: there are no gradients
        return {}
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    more = {ZEROED.name: mean["quant/zeroed_linear"] - mean["quant/zeroed_log"]}
    return mean | more | {COSINE.name: mean["quant/cosine_log"] - mean["quant/cosine_linear"]}


# --------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Args:
        hidden: widths of the perceptron.
        epochs: over the training part.
        batch_size: of training.
        lr: of Adam at the start; it decays exponentially to a thousandth.
        shift_lr: of shift-based AdaMax at the start.
        seeds: how many by default.
        parallel: runs side by side.
        data_options: besides the batch size.
    """

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int = 50
    lr: float = 3e-3
    shift_lr: float = 2.0**-6
    seeds: int = 3
    parallel: bool = True
    data_options: Mapping[str, Any] = field(default_factory=dict)


SIZES: dict[tuple[str, Scale], Size] = {
    ("digits", "laptop"): Size((128, 128, 128), 40, seeds=10),
    ("digits", "workstation"): Size((256, 256, 256), 200, seeds=10),
    ("digits", "paper"): Size((2048, 2048, 2048), 1000, seeds=5),
    ("fashion_mnist", "laptop"): Size((256, 256, 256), 6, batch_size=100, data_options={"subset": 20000}),
    ("fashion_mnist", "workstation"): Size((512, 512, 512), 60, batch_size=100, seeds=5),
    ("fashion_mnist", "paper"): Size((4096, 4096, 4096), 1000, batch_size=100, seeds=5, parallel=False),
}


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    size = SIZES[data, scale]
    common = {
        "data": data,
        "data_options": {"batch_size": size.batch_size, **size.data_options},
        "net": "mlp",
        "net_options": {"hidden": list(size.hidden), "final_norm": True},
        "epochs": size.epochs,
    }

    def settings(arm: str) -> dict[str, Any]:
        options: dict[str, Any] = {"lr": size.lr, "lr_schedule": "exponential", "loss": "squared_hinge"}
        if arm == FLOAT:
            return {**common, "method": "full_precision", "options": options}
        if ARMS[arm].get("optimizer") == "shift_adamax":
            options["lr"] = size.shift_lr
        return {**common, "method": "qnn", "options": {**options, "keep": [], **ARMS[arm]}}

    return Plan({arm: settings(arm) for arm in ARMS}, seeds=size.seeds, parallel=size.parallel)


MARGIN = 0.015  # a picture of the digits' test part is 0.3 points, and runs of one arm differ by about one point

EXPERIMENT = Experiment(
    name="qnn",
    title="One bit, trained with shifts and six-bit gradients",
    claim=(
        "shift-based batch norm and AdaMax cost less than 1.5 points of accuracy against batch norm and Adam, and so do "
        "gradients on powers of two with six bits against float gradients; without the layers' multipliers of the learning "
        "rate more than a point is lost; and six-bit linear codes zero entries of the gradient that logarithmic ones keep"
    ),
    rule=Rule(
        (
            Difference(ACCURACY, SHIFTS, BNN, -MARGIN),
            Difference(ACCURACY, LOG_6, GRADIENT, -MARGIN),
            Difference(ACCURACY, BNN, UNSCALED, 0.01),
            Every(ZEROED, (GRADIENT,), ">", 0.0),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("digits", "fashion_mnist"),
    code=CODE,
)
