"""DIR-Net keeps information: balanced weights carry a bit each, and the cap keeps clustered weights updatable.

A. The parts of DIR-Net one after another on a small Bi-Real style net; first and last layer and the 1x1 convolutions of
   shortcuts are float. Shown as they fall: at this size accuracies lie within each other's spread.
       A 0 clip STE                 signs of weights and activations, slope 1 on [-1, 1]
       A 1 + IMB                    balanced, standardised, scaled by a power of two
       A 2 + EDE                    slope k tanh(t x), t from 0.1 to 10
       A 3 + DTE                    t of the weights capped, eps = 0.1
       A 4 + RBD                    representations drawn to those of a float teacher, trained first for as many epochs
       A full precision
B. Latent weights of one layer as they are, without training: what each part does to weights that are shifted, or stand in two
   clusters, as long training tends to leave them.
       B shifted, raw | IMB         N(0.8, 1): the sign of the raw weight carries 0.74 bit
       B clustered, EDE | DTE       +-1 + 0.3 N(0, 1): along the schedule few weights keep a slope | a share eps always does

Reported: accuracy; entropy of the signs in bits (the mean over filters); the share of weights with at least a tenth of the
largest slope (of the layer where it is smallest; in B the least along the schedule); the largest t in force at the end; flips.

The claim is about entropy and live share. Trained weights of small data stay far from two clusters: the cap does not bind, and
arms 2 and 3 are then the same run; nor are their raw signs unbalanced: in arm 0
they carry a bit without IMB, and training skews balanced filters, so that theirs carry less. No verdict rests on that. That DIR-Net
is more accurate needs larger data and long training (scale "paper": the recipe of IR-Net's authors for ResNet-20 on CIFAR-10, on a
Bi-Real net of 18 layers).

Source: Qin et al., IJCV 2023, arXiv 2109.12338; Qin et al., IR-Net, CVPR 2020, arXiv 1909.10788 and htqin/IR-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlab.data.seeding import generator
from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, FLIPS, prepared, trained
from qlab.experiments.verdict import Every, Metric, Rule
from qlab.methods.base import Method
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.information import IMB, TanhSign, balanced, entropy, slope

__all__ = ["EXPERIMENT", "plan", "run"]

ENTROPY = Metric("quant/entropy", "entropy of signs", "bit", digits=3)
LIVE = Metric("quant/live", "live weights", "%", 100)
METRICS = (
    Metric("test/acc", "deployed accuracy", "%", 100),
    ENTROPY,
    LIVE,
    Metric("quant/t", "largest t of weights", digits=2),
    Metric("test/acc_latent", "accuracy before re-estimation", "%", 100),
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
)

CLIP, WITH_IMB, WITH_EDE, WITH_DTE, WITH_RBD = "A 0 clip STE", "A 1 + IMB", "A 2 + EDE", "A 3 + DTE", "A 4 + RBD"
FLOAT = "A full precision"
SHIFTED_RAW, SHIFTED = "B shifted, raw", "B shifted, IMB"
CLUSTERED_EDE, CLUSTERED_DTE = "B clustered, EDE", "B clustered, DTE"

TAU = 0.1  # a weight is live while its slope is at least this share of the slope at zero
EPS = 0.1
FILTERS, WEIGHTS = 64, 576  # of the layer in B: 64 filters of 64 x 3 x 3
STEPS = 100  # points of the schedule in B


def run(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Run one arm with one seed: latent weights as they are where `settings` has "latents", else a training run."""
    return at_rest(**settings, seed=seed) if "latents" in settings else train(settings, seed)


def train(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train one arm; `teacher` is the number of epochs its teacher is trained for, or None for no teacher."""
    options = dict(settings["options"])
    if settings["teacher"] is not None:
        float_net = {**settings, "method": "full_precision", "options": settings["float_options"]}
        teacher, data = prepared(float_net, seed)
        trained(teacher, data, settings["teacher"], seed)
        options["teacher"] = teacher.deployed()
    method, data = prepared({**settings, "options": options}, seed)
    result = trained(method, data, settings["epochs"], seed)
    found = {name: result.metrics[name] for name in ("test/acc", "test/acc_latent", FLIPS) if name in result.metrics}
    return found | _weights_panel(method)


@torch.no_grad()
def _weights_panel(method: Method) -> dict[str, float]:
    """Return entropy, live share and sharpness of the binary weights; nothing for a float net."""
    tensors = list(quantized_tensors(method.net))
    if not tensors:
        return {}
    signs = [sign_entropy(t.quantizer.level(t.latent)) for t in tensors]
    sharpness = [float(e.sharpness) for t in tensors if isinstance(e := _estimator(t.quantizer), TanhSign)]
    found = {
        "quant/entropy": torch.cat(signs).mean().item(),
        "quant/live": min(live(t.quantizer, t.latent) for t in tensors),
    }
    return found | ({"quant/t": max(sharpness)} if sharpness else {})


def sign_entropy(signs: Tensor) -> Tensor:
    """Return the entropy of each filter's signs in bits, (O,)."""
    return entropy((signs.flatten(1) > 0).double().mean(1))


def live(quantizer: Quantizer, latent: Tensor) -> float:
    """Return the share of a weight's entries with at least TAU of the slope at zero; the clipped slope is 1 or 0."""
    x = balanced(latent) if isinstance(quantizer, IMB) else latent
    estimator = _estimator(quantizer)
    if not isinstance(estimator, TanhSign):
        return (x.abs() <= 1).double().mean().item()
    t = estimator.sharpness
    # Less a rounding error of single precision: at the cap itself one weight stands exactly on the border.
    least = TAU * (1 - 1e-5) * slope(torch.zeros((), dtype=x.dtype), t)
    return (slope(x, t) >= least).double().mean().item()


def _estimator(quantizer: Quantizer) -> Quantizer:
    return quantizer.estimator if isinstance(quantizer, IMB) else quantizer


@torch.no_grad()
def at_rest(latents: str, imb: bool, eps: float, t_min: float, t_max: float, seed: int) -> dict[str, float]:
    """Return entropy and the least live share along the schedule of latent weights that stay where they are.

    Args:
        latents: "shifted" or "clustered"; see the module's docstring.
        imb: balance and standardise.
        eps: of the cap; 0 is EDE.
        t_min: sharpness at the start.
        t_max: sharpness at the end.
        seed: of the weights.
    """
    g = generator("latents", seed)
    noise = torch.randn(FILTERS, WEIGHTS, generator=g, dtype=torch.float64)
    sides = hard_sign(torch.rand(FILTERS, WEIGHTS, generator=g, dtype=torch.float64) - 0.5)
    w = 0.8 + noise if latents == "shifted" else sides + 0.3 * noise
    estimator = TanhSign(t_min, eps, TAU)
    quantizer: Quantizer = IMB(estimator) if imb else estimator
    estimator.refresh(balanced(w) if imb else w)
    shares = []
    for i in range(STEPS + 1):
        estimator.anneal(t=t_min * (t_max / t_min) ** (i / STEPS))
        shares.append(live(quantizer, w))
    return {
        "quant/entropy": sign_entropy(quantizer.level(w)).mean().item(),
        "quant/live": min(shares),
        "quant/t": float(estimator.sharpness),
    }


# --------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Args:
        width: channels of the first stage.
        epochs: of every arm, and of the teacher.
        options: of the optimizer, for every arm.
        t_min: sharpness at the start.
        data_options: of the data set.
        seeds: how many by default.
        parallel: runs side by side.
    """

    width: int
    epochs: int
    options: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.0})
    t_min: float = 0.1
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 128})
    seeds: int = 3
    parallel: bool = True


PAPER = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
FIFTH = {"batch_size": 128, "val_fraction": 0.8}  # train on a fifth

SIZES: dict[tuple[str, Scale], Size] = {
    ("digits", "laptop"): Size(8, 20, data_options={"batch_size": 64}),
    ("digits", "workstation"): Size(8, 60, data_options={"batch_size": 64}, seeds=10),
    ("digits", "paper"): Size(16, 400, PAPER, 1e-3, seeds=10),
    ("fashion_mnist", "laptop"): Size(4, 3, data_options=FIFTH),
    ("fashion_mnist", "workstation"): Size(16, 30, seeds=5, parallel=False),
    ("fashion_mnist", "paper"): Size(64, 400, PAPER, 1e-3, seeds=5, parallel=False),
    ("cifar10", "laptop"): Size(4, 3, data_options=FIFTH),
    ("cifar10", "workstation"): Size(16, 60, seeds=3, parallel=False),
    ("cifar10", "paper"): Size(64, 400, PAPER, 1e-3, seeds=5, parallel=False),
}
FLOAT_LAYERS = ["first", "last", *(f"stages.{stage}.0.shortcut.1" for stage in (1, 2, 3))]


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    size = SIZES[data, scale]
    common = {
        "data": data,
        "data_options": dict(size.data_options),
        "net": "bireal18",
        "net_options": {"width": size.width},
        "epochs": size.epochs,
        "float_options": dict(size.options),
    }

    def rung(teacher: int | None = None, **options: Any) -> dict[str, Any]:
        options = {**size.options, "keep": FLOAT_LAYERS, "t_min": size.t_min, **options}
        return {**common, "method": "dir_net", "options": options, "teacher": teacher}

    def rest(latents: str, imb: bool = True, eps: float = 0.0) -> dict[str, Any]:
        return {"latents": latents, "imb": imb, "eps": eps, "t_min": size.t_min, "t_max": 10.0}

    arms = {
        CLIP: rung(imb=False, estimator="clip", activations="clip"),
        WITH_IMB: rung(estimator="clip", activations="clip"),
        WITH_EDE: rung(estimator="ede"),
        WITH_DTE: rung(estimator="dte", eps=EPS, tau=TAU),
        WITH_RBD: rung(estimator="dte", eps=EPS, tau=TAU, gamma=1.0, teacher=size.epochs),
        FLOAT: {**common, "method": "full_precision", "options": dict(size.options), "teacher": None},
        SHIFTED_RAW: rest("shifted", imb=False),
        SHIFTED: rest("shifted"),
        CLUSTERED_EDE: rest("clustered"),
        CLUSTERED_DTE: rest("clustered", eps=EPS),
    }
    return Plan(arms, seeds=size.seeds, parallel=size.parallel)


EXPERIMENT = Experiment(
    name="dir_net",
    title="DIR-Net keeps information: a bit in every balanced weight, a slope for a share of clustered ones",
    claim=(
        "the signs of balanced weights carry at least 0.99 bit where the raw weights are shifted and carry less than 0.8; of "
        "clustered weights the cap keeps at least the share eps = 10 % live along the whole schedule, where the schedule alone "
        "falls below 2 %"
    ),
    rule=Rule(
        (
            Every(ENTROPY, (SHIFTED,), ">=", 0.99),
            Every(ENTROPY, (SHIFTED_RAW,), "<", 0.8),
            Every(LIVE, (CLUSTERED_DTE,), ">=", EPS),
            Every(LIVE, (CLUSTERED_EDE,), "<", 0.02),
        )
    ),
    metrics=METRICS,
    function=run,
    plan=plan,
    data=("digits", "fashion_mnist", "cifar10"),
    code=CODE,
)
