"""ASkewSGD ends at rest: its loss is lower at the end than BinaryConnect's, and its weights flip far less often.

Both are given the convex problem of the paper, logistic regression whose true weights are signs:

    x ~ U[-1, 1]^10,   w* in {-1, +1}^10,   y ~ Bernoulli(sigmoid(x . w*)),   6000 samples,   SGD with lr 1, 50 epochs

BinaryConnect computes with signs and keeps flipping those that gradient noise pushes over zero; ASkewSGD computes with float
weights in intervals that close around the signs. What is compared is the training loss at the weights of the forward pass, over
the last ten epochs, and the number of sign changes. The minimum over all signs, at w*, is shown beside it.

The accuracy table (arms "C ...") shows how ASkewSGD depends on the learning rate of Adam: with a small one the weights are still
near their start when eps begins to fall, and are then rounded to their present sign. It is shown as it falls.

Arms:
    A float                      SGD on the float weights
    A ASkewSGD, batch ...        eps = 1 for 25 epochs, then times 0.9 an epoch, alpha 0.1
    A BinaryConnect, batch ...   sign in the forward pass, latent weights clipped to [-1, 1]
    C ASkewSGD, lr ...           Adam with cosine (at paper scale halved at 20 % and 40 %), U(-1, 1) at the start, alpha 0.5
    C BinaryConnect              Adam 0.01 with cosine
    C full precision             Adam 0.01 with cosine

Source: Leconte, Schechtman, Moulines, AISTATS 2023, arXiv 2211.03741, section 5 and its public notebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, FLIPS, accuracy
from qlab.experiments.verdict import Difference, Metric, Rule
from qlab.methods.binary_weights.askewsgd import direction
from qlab.quantizers import hard_sign

__all__ = ["EXPERIMENT", "logistic", "plan", "train"]

TAIL = Metric("toy/tail", "loss at the end", digits=4)
SIGN_CHANGES = Metric("toy/flips", "log10 of sign changes", digits=2)
ACCURACY = Metric("test/acc", "deployed accuracy", "%", 100)
METRICS = (
    TAIL,
    SIGN_CHANGES,
    Metric("toy/excess", "its excess over the loss at w*", digits=4),
    ACCURACY,
    Metric("test/acc_latent", "accuracy of the float weights", "%", 100),
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
)

SAMPLES, DIMENSION, EPOCHS, LAST = 6000, 10, 50, 10
ASKEW, ASKEW_SMALL = "A ASkewSGD, batch 1000", "A ASkewSGD, batch 100"
CONNECT, CONNECT_SMALL = "A BinaryConnect, batch 1000", "A BinaryConnect, batch 100"


def train(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Run one arm with one seed: the convex problem where `settings` has a "rule", else a training run."""
    return logistic(settings["rule"], settings["batch"], seed) if "rule" in settings else accuracy(settings, seed)


def logistic(rule: str, batch: int, seed: int) -> dict[str, float]:
    """Train logistic regression with sign weights; return the tail of the loss, its excess over w*, and sign changes.

    Args:
        rule: "float", "askewsgd" or "binary_connect".
        batch: samples of a step.
        seed: of data, start and order.
    """
    g = torch.Generator().manual_seed(seed)
    f64: dict[str, Any] = {"generator": g, "dtype": torch.float64}
    x = 2 * torch.rand(SAMPLES, DIMENSION, **f64) - 1
    best = hard_sign(torch.rand(DIMENSION, **f64) - 0.5)
    y = (torch.rand(SAMPLES, **f64) < torch.sigmoid(x @ best)).double()
    w = 2 * torch.rand(DIMENSION, **f64) - 1
    levels = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def loss(v: Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(x @ v, y))

    def forward(w: Tensor) -> Tensor:
        return hard_sign(w) if rule == "binary_connect" else w

    flips, tail = 0, []
    for epoch in range(EPOCHS):
        eps = 0.9 ** max(epoch - EPOCHS // 2, 0)
        for rows in torch.randperm(SAMPLES, generator=g).split(batch):
            v = forward(w)
            u = x[rows].T @ (torch.sigmoid(x[rows] @ v) - y[rows]) / len(rows)
            step = direction(u, w, eps, 0.1, 10.0, levels) if rule == "askewsgd" else -u
            new = w + step
            if rule != "float":
                new = new.clamp(-1, 1)
            flips += int((hard_sign(new) != hard_sign(w)).sum())
            w = new
            if epoch >= EPOCHS - LAST:
                tail.append(loss(forward(w)))
    mean = sum(tail) / len(tail)
    return {"toy/tail": mean, "toy/excess": mean - loss(best), "toy/flips": math.log10(max(flips, 1))}


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    toy = {
        "A float": {"rule": "float", "batch": 1000},
        ASKEW: {"rule": "askewsgd", "batch": 1000},
        ASKEW_SMALL: {"rule": "askewsgd", "batch": 100},
        CONNECT: {"rule": "binary_connect", "batch": 1000},
        CONNECT_SMALL: {"rule": "binary_connect", "batch": 100},
    }
    if data == "digits":
        net, epochs, options = "mlp", 60, {"hidden": [64, 32]}
    else:
        net, options = ("lenet" if scale == "laptop" else "resnet18" if scale == "paper" else "resnet20"), {}
        epochs = {"laptop": 2, "workstation": 20, "paper": 100}[scale]
    common = {
        "data": data,
        "data_options": {"batch_size": 64 if data == "digits" else 100},
        "net": net,
        "net_options": {**options, "affine": False, "final_norm": True},
        "epochs": epochs,
    }
    cosine = {"lr": 0.01, "lr_schedule": "cosine"}
    halved = {"lr_schedule": "constant", "halvings": [0.2, 0.4]} if scale == "paper" else {}
    arms: dict[str, dict[str, Any]] = {
        f"C ASkewSGD, lr {lr:g}": {**common, "method": "askewsgd", "options": {"lr": lr, **halved}}
        for lr in (0.02, 0.06, 0.2, 0.5)
    }
    arms["C BinaryConnect"] = {**common, "method": "binary_connect", "options": {**cosine, "scale_lr": False}}
    arms["C full precision"] = {**common, "method": "full_precision", "options": cosine}
    return Plan({**toy, **arms}, seeds=10 if data == "digits" else 5, parallel=scale == "laptop")


EXPERIMENT = Experiment(
    name="askewsgd",
    title="ASkewSGD ends at rest",
    claim=(
        "on logistic regression with sign weights, ASkewSGD's training loss at the weights it computes with is lower at the end "
        "than BinaryConnect's; BinaryConnect's weights change sign over ten times as often at batch 100, five times at batch 1000"
    ),
    rule=Rule(
        (
            Difference(TAIL, CONNECT, ASKEW),
            Difference(TAIL, CONNECT_SMALL, ASKEW_SMALL),
            Difference(SIGN_CHANGES, CONNECT_SMALL, ASKEW_SMALL, 1.0),
            Difference(SIGN_CHANGES, CONNECT, ASKEW, math.log10(5)),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("digits", "fashion_mnist", "cifar10"),
    code=CODE,
)
