"""The comparison of binary-weight methods: none is left out, arms differ in nothing but the method, the rule does what it says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import qlab
from qlab.experiments.base import Plan, Result, Scale
from qlab.experiments.binary_weights import (
    EXPERIMENT,
    FLOAT,
    LINEAR,
    SETTINGS,
    SHOWN,
    SIGNED,
    WEAKEST,
    Weakest,
    _warm,
    binary_weight_methods,
    float_then_sign,
    plan,
    train,
)
from qlab.experiments.training import prepared, trained
from qlab.experiments.verdict import Metric
from qlab.methods import CATALOG
from qlab.quantizers import layers

METHODS = binary_weight_methods()


def short(arm: str, epochs: int = 1, scale: Scale = "laptop") -> dict[str, Any]:
    settings = plan(scale, "digits").arms[arm]
    return {**settings, "epochs": epochs, "float_epochs": min(settings["float_epochs"], epochs)}


def test_every_binary_weight_method_of_the_catalog_has_a_setting_and_an_arm() -> None:
    assert set(SETTINGS) == set(METHODS)
    for scale in get_args(Scale):
        arms = plan(scale, "digits").arms
        assert set(arms) == {*METHODS, FLOAT, SIGNED, LINEAR, *SHOWN}
        assert all(arms[name]["method"] == name for name in METHODS)
    for name in METHODS:
        assert (CATALOG[name].weight_bits, CATALOG[name].activation_bits) == (1, 32)
        assert SETTINGS[name].source
        assert SETTINGS[name].paper_source


def test_rule_judges_every_method() -> None:
    (check,) = EXPERIMENT.rule.checks
    assert isinstance(check, Weakest)
    assert check.arms == METHODS
    assert all(f"[{name}]" in EXPERIMENT.rule.words for name in METHODS)


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_arms_differ_in_nothing_but_the_method(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    for name, settings in arms.items():
        accepted = {h.name for h in qlab.methods.hyperparameters(CATALOG.load(settings["method"]))}
        assert settings["options"].keys() <= accepted
        shared = {k: v for k, v in settings.items() if k not in ("method", "options", "sign", "float_epochs")}
        if name != LINEAR:
            assert shared == {k: arms[FLOAT][k] for k in shared}
    shape = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}.get(data, (3, 32, 32))
    with torch.device("meta"):
        net = qlab.build(arms[FLOAT]["net"], shape, 10, **arms[FLOAT]["net_options"])
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    assert not any(norm.affine for norm in norms)
    assert len(norms) >= len(layers(net))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_settings_build_the_method_they_name(name: str, scale: Scale) -> None:
    method, _ = prepared(short(name, scale=scale), seed=0)
    assert method.info is CATALOG[name]
    assert all((method.hparams[k] == v) for k, v in plan(scale, "digits").arms[name]["options"].items())


def test_linear_classifier_has_one_float_layer() -> None:
    method, _ = prepared(short(LINEAR), seed=0)
    assert len(layers(method.net)) == 1
    assert not any(isinstance(m, _BatchNorm) for m in method.net.modules())


def test_float_then_sign_deploys_the_signs_of_the_trained_net() -> None:
    method, data = prepared(short(SIGNED), seed=0)
    trained(method, data, 1, 0)
    net = float_then_sign(method.net, data)
    for name, layer in layers(net).items():
        assert torch.equal(layer.weight, torch.where(method.latent_weights()[name] >= 0, 1.0, -1.0))
    batches = data.calibration(method.calibration_batches)
    first, norm = next(iter(layers(net).values())), next(m for m in net.modules() if isinstance(m, _BatchNorm))
    assert norm.running_mean is not None
    mean = torch.stack([first(x.flatten(1)).mean(0) for x in batches]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-4)  # of the signs, not of the float weights
    split = data.split("test")
    accuracy = (net(data.transform(split.x)).argmax(1) == split.y).float().mean()
    assert train(short(SIGNED), seed=0) == {"test/acc": pytest.approx(float(accuracy))}


def test_a_warm_start_trains_the_float_net_first() -> None:
    settings = short("prox_quant", scale="paper")
    assert settings["float_epochs"] == 1
    plain, data = prepared({**settings, "method": FLOAT, "options": {}}, seed=0)
    trained(plain, data, 1, 0)
    method = _warm(settings, data, 0)
    assert method.net.training
    for a, b in zip(method.latent_weights().values(), plain.latent_weights().values(), strict=True):
        assert torch.equal(a, b)
    assert {"test/acc", "test/acc_latent"} <= train(settings, seed=0).keys()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    arms = {name: short(name) for name in plan("laptop", "digits").arms}
    experiment = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=1))
    return experiment.run(progress=False, workers=1, cache=tmp_path_factory.mktemp("cache"))


def test_every_arm_runs_and_reports_its_accuracy(result: Result) -> None:
    assert not result.failures
    accuracies = result.frame[result.frame["metric"] == "test/acc"]
    assert sorted(accuracies["arm"]) == sorted(plan("laptop", "digits").arms)
    assert accuracies["value"].between(0, 1).all()
    assert set(result.frame["metric"]) == {metric.name for metric in EXPERIMENT.metrics}
    assert result.verdict == "undecided"  # of one seed


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert train(short("bayes_binn"), seed=3) == train(short("bayes_binn"), seed=3)


# ---- the rule ---------------------------------------------------------------------------------------------------------

ACC = Metric("acc", "accuracy", "%", 100)
CHECK = Weakest(ACC, WEAKEST, "base", 0.1, ("a", "b"))


def frame(**arms: list[float]) -> pd.DataFrame:
    rows = [(arm, seed, "acc", value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"])


def test_weakest_takes_the_lowest_arm_of_each_seed() -> None:
    found = CHECK.judge(frame(a=[0.9, 0.5, 0.8], b=[0.7, 0.8, 0.8], base=[0.1, 0.1, 0.1]), (0, 1, 2), 0.95)
    assert found.numbers["differences"] == pytest.approx([0.6, 0.4, 0.7])
    assert WEAKEST in found.statement


def test_one_weak_method_refutes_what_the_others_support() -> None:
    strong, base = [0.90, 0.91, 0.92], [0.50, 0.51, 0.50]
    assert CHECK.judge(frame(a=strong, b=strong, base=base), (0, 1, 2), 0.95).outcome == "holds"
    assert CHECK.judge(frame(a=strong, b=base, base=base), (0, 1, 2), 0.95).outcome == "fails"


def test_a_seed_in_which_a_method_did_not_finish_leaves_the_rule_undecided() -> None:
    found = CHECK.judge(frame(a=[0.90, 0.91, 0.92], b=[0.90, 0.91], base=[0.5, 0.5, 0.5]), (0, 1, 2), 0.95)
    assert found.outcome == "undecided"
    assert found.numbers["seeds"] == [0, 1]
