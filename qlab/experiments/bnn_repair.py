"""Which repairs of a binary net help: one change at a time, together, and against what they cost.

The net is a residual one of 16 binary convolutions (`repair20` with blocks 6-1-1) between a float stem and a float linear layer;
every repair is an option of the net or of the method `bnn_repair`. Two baselines, because what a repair does "in isolation" depends
on where it is put in:

    P   plain: one shortcut for each block, no feature normalization, identity as activation, clipped surrogates
    G   P with double residual and batch norm before each sign

Arms:
    float                               the float net of G's topology; its cost is that of 8 bits everywhere
    P, P + ..., G, G + ...              one change at a time
    ReLU ..., PReLU ...                 activations behind the sum, with and without feature normalization
    shallow ...                         6 binary convolutions: a ReLU right before the next sign leaves nothing but +1
    ReActNet set, IR-Net set            the combinations of two papers
    G + ensemble of 2, G + wider        two uses of about the same cost

Judged is what is large in a short run. Not judged, for on the digits the differences drown in the spread over seeds: polynomial
and EDE against the clipped surrogate, weight normalization, scales, two stages. On the digits the gaps are about the speed of
learning: with three times the epochs most of them close. That the feature binarizer is among the three best repairs, as the
chapter finds, needs CIFAR-size data: its two benchmarks are ResNet-20 on CIFAR-10 and ResNet-18 on CIFAR-100, at "paper" scale
here. The settings of the chapter's runs could not be had; those of "paper" scale are usual ones for such nets (Adam, cosine, 200
epochs).

Costs are those of `qlab.experiments.repair_cost`: derived counts, recalled energy figures.

Source: de Putter, Corporaal, How to train accurate BNNs for embedded systems?, 2022, arXiv 2206.12322.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import qlab
from qlab.experiments.base import Experiment, Plan, Result, Scale
from qlab.experiments.repair_cost import ACCELERATOR, TEXTBOOK, Cost, count, energy
from qlab.experiments.training import CODE, FLIPS, prepared, trained
from qlab.experiments.verdict import Difference, Every, Metric, Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "plan", "train"]

ACCURACY = Metric("test/acc", "deployed accuracy", "%", 100)
ENERGY = Metric("cost/energy", "energy", "uJ", digits=3)
STORED = Metric("cost/features", "features kept, 8-bit where real", "KiB")
METRICS = (
    ACCURACY,
    ENERGY,
    STORED,
    Metric("cost/energy_textbook", "energy, other constants", "uJ", digits=3),
    Metric("test/acc_latent", "accuracy before re-estimation", "%", 100),
    Metric("train/loss", "training loss", digits=3),
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
)

PLAIN, BEST, FLOAT = "P", "G = P + double residual + feature bn", "float"
RELU_BN, RELU_BOTH = "ReLU, feature bn", "ReLU, double residual, feature bn"
PRELU, PRELU_BOTH = "PReLU, double residual", "PReLU, double residual, feature bn"
SHALLOW_RELU, SHALLOW_RELU_BN = "shallow, ReLU", "shallow, ReLU, feature bn"
SWISH = "G + swish features"


# ------------------------------------------------------------------------------------------------------------- one run


def train(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed and report its accuracy and what it costs.

    Args:
        settings: as of `qlab.experiments.training`.
        seed: of the starting net and the order of the batches.
    """
    method, data = prepared(settings, seed)
    net = qlab.build(settings["net"], data.input_shape, data.num_classes, seed=seed, **settings["net_options"])
    run = trained(method, data, settings["epochs"], seed)
    names = ("test/acc", "test/acc_latent", "train/loss", FLIPS)
    return {name: run.metrics[name] for name in names if name in run.metrics} | costs(net, settings["method"])


def costs(net: Any, method: str) -> dict[str, float]:
    """Return the cost metrics of a net; a float one is taken with 8 bits everywhere."""
    cost = count(net)
    if method == "full_precision":
        cost = eight_bits(cost)
    return {
        "cost/energy": energy(cost, ACCELERATOR)["total"],
        "cost/energy_textbook": energy(cost, TEXTBOOK)["total"],
        "cost/features": cost.feature_bits(8) / 8 / 1024,
    }


def eight_bits(cost: Cost) -> Cost:
    """Return the cost of the same net with 8 bits in the place of one."""
    return replace(
        cost,
        binary_macs=0,
        float_macs=cost.binary_macs + cost.float_macs,
        binary_weights=0,
        float_weights=cost.binary_weights + cost.float_weights,
        real_features=cost.binary_features + cost.real_features,
        binary_features=0,
    )


# --------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Args:
        net: the repairable net and its size.
        epochs: of every arm.
        lr: of Adam, with cosine.
        seeds: how many by default.
        parallel: runs side by side.
        data_options: of the data.
    """

    net: tuple[str, Mapping[str, Any]]
    epochs: int
    lr: float = 2e-3
    seeds: int = 3
    parallel: bool = True
    data_options: Mapping[str, Any] = field(default_factory=dict)


MEASURED: dict[str, Any] = {"width": 8, "blocks": [6, 1, 1], "multiples": [1, 2, 2]}
# Half of the digits, as in the measurements that the margins come from: 14 steps an epoch.
HALF = {"batch_size": 64, "val_fraction": 0.0, "subset": 898}
SMALL: dict[str, Any] = {"width": 8, "blocks": [1, 1, 1]}
IMAGES = {"batch_size": 128, "val_fraction": 0.1}

SIZES: dict[tuple[str, Scale], Size] = {
    ("digits", "laptop"): Size(("repair20", MEASURED), 20, seeds=8, data_options=HALF),
    ("digits", "workstation"): Size(("repair20", MEASURED), 20, seeds=20, data_options=HALF),
    ("digits", "paper"): Size(("repair20", {}), 60, seeds=10, data_options={**HALF, "subset": None}),
    ("fashion_mnist", "laptop"): Size(("repair20", SMALL), 1, data_options={**IMAGES, "subset": 10_000}),
    ("fashion_mnist", "workstation"): Size(("repair20", {}), 20, parallel=False, data_options=IMAGES),
    ("fashion_mnist", "paper"): Size(("repair20", {}), 100, 1e-3, seeds=5, parallel=False, data_options=IMAGES),
    ("cifar10", "laptop"): Size(("repair20", SMALL), 1, data_options={**IMAGES, "subset": 10_000}),
    ("cifar10", "workstation"): Size(("repair20", {}), 60, parallel=False, data_options=IMAGES),
    ("cifar10", "paper"): Size(("repair20", {}), 200, 1e-3, seeds=5, parallel=False, data_options=IMAGES),
    ("cifar100", "laptop"): Size(("repair20", SMALL), 1, data_options={**IMAGES, "subset": 10_000}),
    ("cifar100", "workstation"): Size(("repair20", {}), 60, parallel=False, data_options=IMAGES),
    ("cifar100", "paper"): Size(("repair18", {}), 200, 1e-3, seeds=5, parallel=False, data_options=IMAGES),
}

BN, DOUBLE = {"feature_norm": "bn"}, {"double_residual": True}
GATE = {"squeeze_excite": "gate", "reduction": 4, "gate_bias": True}


def arms_of(width: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the options of net and method of each arm, on top of the size."""
    good = {**DOUBLE, **BN}
    shallow = {"blocks": [1, 1, 1], "multiples": []}
    return {
        PLAIN: ({}, {}),
        "P + feature bn": (BN, {}),
        "P + double residual": (DOUBLE, {}),
        "P + rsign": ({"feature_norm": "rsign"}, {}),
        "P + gate": (GATE, {}),
        BEST: (good, {}),
        RELU_BN: ({**BN, "activation": "relu"}, {}),
        RELU_BOTH: ({**good, "activation": "relu"}, {}),
        PRELU: ({**DOUBLE, "activation": "prelu"}, {}),
        PRELU_BOTH: ({**good, "activation": "prelu"}, {}),
        SHALLOW_RELU: ({**shallow, "activation": "relu"}, {}),
        SHALLOW_RELU_BN: ({**shallow, **BN, "activation": "relu"}, {}),
        "G + identity features": (good, {"feature_binarizer": "identity"}),
        "G + polynomial features": (good, {"feature_binarizer": "polynomial"}),
        "G + EDE features": (good, {"feature_binarizer": "ede"}),
        SWISH: (good, {"feature_binarizer": "swish"}),
        "G + standardised weights": (good, {"weight_norm": "standardize", "latent_clip": 0.0}),
        "G + mean magnitude as scale": (good, {"scaling": "alpha"}),
        "G + two stages": (good, {"stages": "two"}),
        "G + gate": ({**good, **GATE}, {}),
        "ReActNet set": (
            {**DOUBLE, "feature_norm": "rsign", "activation": "rprelu"},
            {"feature_binarizer": "polynomial", "scaling": "alpha"},
        ),
        "IR-Net set": (
            {"activation": "hardtanh"},
            {
                "feature_binarizer": "ede",
                "weight_binarizer": "ede",
                "weight_norm": "standardize",
                "scaling": "pow2",
                "latent_clip": 0.0,
            },
        ),
        "G + ensemble of 2": ({**good, "ensemble": 2}, {}),
        "G + wider": ({**good, "width": round(2**0.5 * width)}, {}),
    }


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    size = SIZES[data, scale]
    name, own = size.net
    common = {"data": data, "data_options": dict(size.data_options), "net": name, "epochs": size.epochs}
    width = own.get("width", 64 if name == "repair18" else 16)
    arms = {
        arm: {**common, "net_options": {**own, **net}, "method": "bnn_repair", "options": {"lr": size.lr, **options}}
        for arm, (net, options) in arms_of(width).items()
    }
    topology = {**own, **DOUBLE, **BN}
    arms[FLOAT] = {**common, "net_options": topology, "method": "full_precision", "options": {"lr": size.lr}}
    return Plan(arms, seeds=size.seeds, parallel=size.parallel)


def _picture(result: Result) -> Figure:
    from qlab.plots.repair import repair_figure  # matplotlib loads only when a figure is wanted

    return repair_figure(result)


EXPERIMENT = Experiment(
    name="bnn_repair",
    title="Feature normalization and double residuals repair a binary net",
    claim=(
        "in a short training, feature normalization and double residuals together help a plain binary net; with an activation "
        "behind the sums each is needed; a net with a ReLU right before each sign and no normalization learns next to nothing; "
        "a narrow surrogate (swish) is worse than the clipped one"
    ),
    rule=Rule(
        (
            Difference(ACCURACY, BEST, PLAIN, 0.0),
            Difference(ACCURACY, PRELU_BOTH, PRELU, 0.02),
            Difference(ACCURACY, RELU_BOTH, RELU_BN, 0.0),
            Difference(ACCURACY, BEST, SWISH, 0.0),
            Every(ACCURACY, (SHALLOW_RELU,), "<", 0.4),
            Difference(ACCURACY, SHALLOW_RELU_BN, SHALLOW_RELU, 0.3),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("digits", "fashion_mnist", "cifar10", "cifar100"),
    code=(*CODE, "qlab.experiments.repair_cost"),
    drawing=_picture,
)
