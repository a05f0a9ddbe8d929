"""The experiment of QNN: plans that fit, arms that are what they are named after, a panel that is a plain count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import qlab
from qlab.experiments.base import Plan, Scale
from qlab.experiments.qnn import (
    ARMS,
    EXPERIMENT,
    FLOAT,
    GRADIENT,
    LOG_6,
    METRICS,
    PANEL_BATCHES,
    WEIGHTS,
    gradient_panel,
    plan,
    train,
)
from qlab.experiments.training import prepared
from qlab.methods.binary_networks.shift import ShiftBatchNorm
from qlab.quantizers import Quantizer, layers, quantized_tensors


def short(arm: str) -> dict[str, Any]:
    """The settings of an arm, one epoch of a small net."""
    settings = plan("laptop", "digits").arms[arm]
    net = {**settings["net_options"], "hidden": [16, 16]}
    return {**settings, "net_options": net, "epochs": 1, "data_options": {"batch_size": 100}}


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_scale_and_data_set_has_a_plan_with_all_arms(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert list(arms) == list(ARMS)
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    for settings in arms.values():
        accepted = {h.name for h in qlab.methods.hyperparameters(qlab.CATALOG.load(settings["method"]))}
        assert settings["options"].keys() <= accepted
        assert settings["options"]["loss"] == "squared_hinge"
        shared = {k: v for k, v in settings.items() if k not in ("options", "method")}
        assert shared == {k: v for k, v in arms[FLOAT].items() if k not in ("options", "method")}
        qlab.data.load(data, **settings["data_options"])
        with torch.device("meta"):
            qlab.build("mlp", (1, 8, 8), 10, **settings["net_options"])


def test_arms_of_the_rule_are_arms() -> None:
    for check in EXPERIMENT.rule.checks:
        named = check.arms if hasattr(check, "arms") else (check.arm, check.other)  # type: ignore[attr-defined]
        assert set(named) <= set(ARMS)
        assert check.metric in METRICS  # type: ignore[attr-defined]


@pytest.mark.parametrize("arm", list(ARMS))
def test_arms_quantize_what_they_are_named_after(arm: str) -> None:
    method, _ = prepared(short(arm), 0)
    tensors, all_layers = list(quantized_tensors(method.net)), layers(method.net)
    assert len(tensors) == (0 if arm == FLOAT else len(all_layers))
    assert all(t.quantizer.bits == 1 for t in tensors)
    places = [m.bits for n, m in method.net.named_modules() if isinstance(m, Quantizer) and "parametrizations" not in n]
    assert places == ([] if arm in (FLOAT, WEIGHTS) else [2, 2] if arm.startswith("G") else [1, 1])
    assert any(isinstance(m, ShiftBatchNorm) for m in method.net.modules()) == ("shifts" in arm)
    bits = method.hparams.get("gradient_bits")
    assert bits == (int(arm.split()[2]) if arm.startswith("G l") else None)


@pytest.mark.parametrize("arm", [FLOAT, LOG_6])
def test_cells_report_the_declared_metrics_and_repeat(arm: str) -> None:
    first = train(short(arm), 1)
    names = {metric.name for metric in METRICS}
    assert set(first) == ({"test/acc", "test/acc_latent"} if arm == FLOAT else names)
    assert train(short(arm), 1) == first
    assert train(short(arm), 2) != first


def test_the_panel_counts_what_rounding_does_to_the_gradient_of_the_logits() -> None:
    settings = short(GRADIENT)
    settings["net_options"] = {"hidden": []}  # one layer, whose output the loss is of
    method, data = prepared(settings, 0)
    panel = gradient_panel(method, data, bits=4)
    zeroed, cosine = [], []
    method.net.train()
    for i, (x, y) in enumerate(data.train_dataloader()):
        if i < PANEL_BATCHES:
            z = method.net(x).detach().requires_grad_()
            (g,) = torch.autograd.grad(method.loss(z, y), z)
            step = g.abs().max() / 7
            zeroed.append(float(((g.abs() < step / 2) & (g != 0)).sum() / (g != 0).sum()))
            q = (g / step).round() * step
            cosine.append(float((q * g).sum() / (q.norm() * g.norm())))
    assert panel["quant/zeroed_linear"] == pytest.approx(sum(zeroed) / len(zeroed), abs=2e-3)
    assert panel["quant/cosine_linear"] == pytest.approx(sum(cosine) / len(cosine), abs=1e-5)
    assert panel["quant/zeroed_more"] == panel["quant/zeroed_linear"] - panel["quant/zeroed_log"]


def test_the_panel_leaves_the_method_as_it_was() -> None:
    method, data = prepared(short(GRADIENT), 0)
    before = {k: v.clone() for k, v in method.net.named_parameters()}
    gradient_panel(method, data)
    assert all(torch.equal(v, before[k]) for k, v in method.net.named_parameters())
    assert all(p.grad is None for p in method.net.parameters())
    assert gradient_panel(prepared(short(FLOAT), 0)[0], data) == {}


@pytest.mark.slow
def test_the_whole_experiment_runs_at_toy_size(tmp_path: Path) -> None:
    arms = {arm: short(arm) for arm in ARMS}
    toy = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=2, parallel=False))
    result = toy.run(progress=False, workers=1, cache=tmp_path)
    assert not result.failures
    assert result.verdict in ("holds", "fails", "undecided")
    assert list(result.table().index) == list(ARMS)
