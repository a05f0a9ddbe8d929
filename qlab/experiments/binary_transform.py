"""The group transform (power family, a reconstruction) trains binary weights with the recipe of a float net.

The same momentum SGD with a large rate and L2, the same schedule, once on the float net and once through the transform, whose
deployed signs ("hard") are compared with the float net; "soft" is the training-time net, T(theta; p) at the end of the schedule.

Arms:
    full precision                   SGD lr 0.1, momentum 0.9, weight decay 5e-4, cosine
    BinaryConnect                    the same SGD, no weight decay
    power                            the same recipe as the float net, p_end 0.02, delta 1e-3
    power, decay ... / lr ...        the recipe varied
    power, p_end ... / centred       the transform varied
    poly, soft, tanh group, tanh     other maps, the last three saturating

Source: Shulman 2021, arXiv 2107.01400, whose abstract makes the claim; the formula is a reconstruction, so a verdict here speaks
of the power family only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, FLIPS, accuracy
from qlab.experiments.verdict import Difference, Metric, Rule

__all__ = ["EXPERIMENT", "plan", "train"]

HARD = Metric("test/acc", "hard accuracy", "%", 100)
LOST = Metric("test/lost", "soft minus hard", "%", 100, digits=2)
METRICS = (
    HARD,
    Metric("test/acc_latent", "soft accuracy", "%", 100),
    LOST,
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
)
FLOAT, POWER, EARLY, SLOW = "full precision", "power", "power, p_end 0.2", "power, lr 0.01"


def train(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed; `test/lost` is what the signs lose against the training-time net."""
    found = accuracy(settings, seed)
    return found | {"test/lost": found["test/acc_latent"] - found["test/acc"]}


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    if data == "digits":
        net, epochs, options = "mlp", 60, {"hidden": [64, 32]}
    else:
        net, options = ("lenet" if scale == "laptop" else "resnet18" if scale == "paper" else "resnet20"), {}
        epochs = {"laptop": 3, "workstation": 30, "paper": 200}[scale]
    common = {
        "data": data,
        "data_options": {"batch_size": 64 if data == "digits" else 128},
        "net": net,
        "net_options": {**options, "affine": False, "final_norm": True},
        "epochs": epochs,
    }
    recipe = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "lr_schedule": "cosine"}

    def arm(**changed: Any) -> dict[str, Any]:
        return {**common, "method": "group_transform", "options": {**recipe, **changed}}

    arms = {
        FLOAT: {**common, "method": "full_precision", "options": recipe},
        "BinaryConnect": {
            **common,
            "method": "binary_connect",
            "options": {**recipe, "weight_decay": 0.0, "scale_lr": False},
        },
        POWER: arm(),
        "power, decay 0": arm(weight_decay=0.0),
        "power, decay 5e-3": arm(weight_decay=5e-3),
        "power, lr 0.5": arm(lr=0.5),
        SLOW: arm(lr=0.01),
        EARLY: arm(p_end=0.2),
        "power, p_end 0": arm(p_end=0.0),
        "power, centred": arm(center=True),
        "poly": arm(family="poly"),
        "soft (saturates)": arm(family="soft"),
        "tanh group (saturates)": arm(family="tanh_group"),
        "tanh (saturates)": arm(family="tanh_el"),
    }
    return Plan(arms, seeds=5, parallel=scale == "laptop")


EXPERIMENT = Experiment(
    name="binary_transform",
    title="Binary weights with the recipe of a float net (group transform, power family)",
    claim=(
        "the deployed signs of the power family come within 2 points of the float net that is trained with the same momentum SGD, "
        "rate and weight decay; stopping the annealing early loses more in the step to signs; a large rate beats a small one"
    ),
    rule=Rule(
        (
            Difference(HARD, POWER, FLOAT, -0.02),
            Difference(LOST, EARLY, POWER),
            Difference(HARD, POWER, SLOW),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("digits", "fashion_mnist", "cifar10"),
    code=CODE,
)
