"""The experiment on temperature-scaled attacks: plans build, a cell runs, the metrics are what they say."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import qlab
from qlab.errors import QlabError
from qlab.experiments import EXPERIMENTS
from qlab.experiments.attacks import EXPERIMENT, METRICS, SIZES, measured, plan, run
from qlab.methods import create
from qlab.quantizers import Sign


def test_it_stands_on_the_shelf() -> None:
    assert EXPERIMENTS.load("attacks") is EXPERIMENT


@pytest.mark.parametrize(("data", "scale"), list(SIZES))
def test_every_plan_has_three_nets_that_differ_in_the_method_alone(data: str, scale: str) -> None:
    arms = plan(scale, data).arms  # type: ignore[arg-type]
    assert len(arms) == 3
    rest = [{k: v for k, v in arm.items() if k not in ("method", "options")} for arm in arms.values()]
    assert rest[0] == rest[1] == rest[2]
    for arm in arms.values():
        create(arm["method"], nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), **arm["options"])


def test_the_three_nets_have_the_bits_they_are_named_for() -> None:
    net = qlab.build("mlp", (1, 8, 8), 10, hidden=[16, 16], seed=0)
    found = {}
    for name, arm in plan("laptop", "digits").arms.items():
        method = create(arm["method"], net, **arm["options"])
        signs = [m for m in method.net.modules() if isinstance(m, Sign) and not _weight(method.net, m)]
        found[name] = (len(method.hard_weights()), len(signs))
    assert found == {"float": (0, 0), "binary weights": (3, 0), "binary weights and activations": (3, 2)}


def _weight(net: nn.Module, quantizer: nn.Module) -> bool:
    return any(".parametrizations." in f".{name}." for name, m in net.named_modules() if m is quantizer)


def test_a_cell_reports_every_metric() -> None:
    settings = plan("laptop", "digits").arms["binary weights and activations"]
    found = run({**settings, "epochs": 1, "samples": 20, "steps": 2, "net_options": {"hidden": [16]}}, seed=0)
    assert set(found) == {metric.name for metric in METRICS}
    assert found["PGD - PGD++ HNS"] == found["PGD"] - found["PGD++ HNS"]
    assert found["FGSM - FGSM++ HNS"] == found["FGSM"] - found["FGSM++ HNS"]


def test_a_saturated_float_net_has_dead_images_and_a_temperature_breaks_it() -> None:
    # Two classes, logits +-w.x with a gap of some hundreds: softmax in float32 has no gradient, the margin falls by eps ||w||_1.
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(16, 2, bias=False)
    w = torch.where(torch.rand(16, generator=generator) < 0.5, -1.0, 1.0)
    net.weight.data = torch.stack([400 * w, -400 * w])
    x = (0.5 + 0.04 * torch.where(torch.rand(64, 16, generator=generator) < 0.5, -1.0, 1.0)).float()
    x = x + 0.04 * torch.where((x - 0.5) @ w >= 0, 1.0, -1.0)[:, None] * w
    y = (x @ w < 0).long()
    net = nn.Sequential(_Centred(), net).eval()
    y = net(x).argmax(1)
    found = measured(net, x, y, eps=0.3, steps=5, eps_l2=0.19, seed=0)
    assert found["clean"] == 1
    assert found["gap"] > 104
    assert found["dead"] > 0.9
    assert found["PGD"] > 0.5  # the random start alone breaks some
    assert found["PGD++ HNS"] == found["PGD++ NJS"] == found["PGD margin"] == 0
    # In l2 w.x falls by eps ||w||_2 = 0.76 at most; w.(x - 0.5) is a multiple of 0.08.
    far = ((x - 0.5) @ w).abs() > 0.76
    assert 0 < float(far.double().mean()) < 1
    assert found["PGD++ L2 HNS"] == float(far.double().mean())


def test_a_net_that_is_always_wrong_is_named_and_not_attacked() -> None:
    net = nn.Linear(4, 3).eval()
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(QlabError, match="wrong on all of the 8 examples"):
        measured(net, x, (net(x).argmax(1) + 1) % 3, eps=0.1, steps=1, eps_l2=0.1, seed=0)


def test_nets_that_are_not_saturated_leave_the_claim_open() -> None:
    rows = [
        {"arm": arm, "seed": seed, "metric": metric.name, "value": 5.0 if metric.name == "gap" else 0.0}
        for arm in plan("laptop", "digits").arms
        for seed in range(5)
        for metric in METRICS
    ]
    verdict, evidence = EXPERIMENT.rule.judge(pd.DataFrame(rows), range(5))
    assert verdict == "undecided"
    assert evidence[0].statement.startswith("the claim presupposes median logit gap")
    for row in rows:
        row["value"] = 20.0 if row["metric"] == "gap" else row["value"]
    assert EXPERIMENT.rule.judge(pd.DataFrame(rows), range(5))[0] == "fails"  # a temperature gains nothing


class _Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5
