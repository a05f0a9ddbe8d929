"""The repair experiment: plans build for every scale and data set, arms differ in what they are named after, cells run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import qlab
from qlab.errors import InputError
from qlab.experiments import EXPERIMENTS
from qlab.experiments.base import Plan, Result, Scale
from qlab.experiments.bnn_repair import (
    BEST,
    EXPERIMENT,
    FLOAT,
    PLAIN,
    PRELU,
    SHALLOW_RELU,
    SHALLOW_RELU_BN,
    SWISH,
    costs,
    eight_bits,
    plan,
    train,
)
from qlab.experiments.repair_cost import Cost, count
from qlab.experiments.training import prepared
from qlab.plots.repair import front, repair_figure
from qlab.quantizers import layers

SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}


def tiny(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an arm with a small net, few samples and one epoch."""
    options = {**settings["net_options"], "width": 4, "blocks": [1, 1], "multiples": []}
    data = {"batch_size": 32, "val_fraction": 0.0, "subset": 64}
    return {**settings, "net_options": options, "data_options": data, "epochs": 1}


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_scale_and_data_set_has_a_plan_with_the_arms_of_the_rule(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    named = {arm for check in EXPERIMENT.rule.checks for arm in getattr(check, "arms", ())}
    named |= {
        getattr(check, side) for check in EXPERIMENT.rule.checks for side in ("arm", "other") if hasattr(check, side)
    }
    assert named <= set(arms)
    for settings in arms.values():
        accepted = {h.name for h in qlab.methods.hyperparameters(qlab.CATALOG.load(settings["method"]))}
        assert settings["options"].keys() <= accepted


@pytest.mark.parametrize("arm", list(plan("laptop", "digits").arms))
def test_nets_of_the_papers_size_build(arm: str) -> None:
    settings = plan("paper", "cifar10").arms[arm]
    with torch.device("meta"):
        qlab.build(settings["net"], SHAPES["cifar10"], 10, **settings["net_options"])


def test_the_digits_net_is_the_one_the_margins_were_measured_on() -> None:
    arms = plan("laptop", "digits").arms
    method, data = prepared(arms[PLAIN], 0)
    assert len(layers(method.net)) == 16 + 2
    assert data.num_samples("train") == 898
    assert arms[PLAIN]["options"]["lr"] == 2e-3
    shallow, _ = prepared(arms[SHALLOW_RELU], 0)
    assert len(layers(shallow.net)) == 6 + 2


def test_arms_differ_in_what_they_are_named_after_and_in_nothing_else() -> None:
    arms = plan("laptop", "digits").arms

    def difference(a: str, b: str) -> set[tuple[str, str]]:
        found = set()
        for part in ("net_options", "options"):
            x, y = arms[a][part], arms[b][part]
            found |= {(part, key) for key in x.keys() | y.keys() if x.get(key) != y.get(key)}
        return found | {
            ("", key) for key in ("data", "epochs", "method", "net", "data_options") if arms[a][key] != arms[b][key]
        }

    assert difference(PLAIN, BEST) == {("net_options", "double_residual"), ("net_options", "feature_norm")}
    assert difference(BEST, SWISH) == {("options", "feature_binarizer")}
    assert difference(SHALLOW_RELU, SHALLOW_RELU_BN) == {("net_options", "feature_norm")}
    assert difference(BEST, FLOAT) == {("", "method")}
    for arm in arms:
        if arm.startswith("P + ") and arm != "P + gate":
            assert len(difference(PLAIN, arm)) == 1, arm


def test_runs_of_backward_only_arms_start_from_the_same_net() -> None:
    arms = plan("laptop", "digits").arms
    (a, _), (b, _) = prepared(arms[BEST], 1), prepared(arms[SWISH], 1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_costs_rise_where_a_repair_is_not_free() -> None:
    arms = plan("laptop", "digits").arms

    def energy(arm: str) -> float:
        settings = arms[arm]
        net = qlab.build(settings["net"], (1, 8, 8), 10, **settings["net_options"])
        return costs(net, settings["method"])["cost/energy"]

    assert energy("P + feature bn") == energy(PLAIN)
    assert energy(SWISH) == energy(BEST)
    assert energy(PLAIN) < energy(BEST) < energy(PRELU) < energy(FLOAT)
    assert energy("G + ensemble of 2") > energy(BEST) < energy("G + wider")


def test_eight_bits_in_the_place_of_one() -> None:
    cost = count(qlab.build("repair20", (1, 8, 8), 10, width=4))
    full = eight_bits(cost)
    assert full.float_macs == cost.binary_macs + cost.float_macs
    assert full.feature_bits(8) == 8 * (cost.real_features + cost.binary_features)
    assert isinstance(full, Cost)
    assert full.binary_weights == 0


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    arms = {arm: tiny(settings) for arm, settings in plan("laptop", "digits").arms.items()}
    few = {arm: arms[arm] for arm in (PLAIN, BEST, SWISH, "G + gate", FLOAT)}
    experiment = replace(EXPERIMENT, plan=lambda scale, data: Plan(few, seeds=2))
    return experiment.run(progress=False, workers=1, cache=tmp_path_factory.mktemp("cache"))


def test_cells_run_and_report_every_metric(result: Result) -> None:
    assert not result.failures
    reported = result.frame.groupby("arm")["metric"].apply(set)
    assert reported[BEST] == {metric.name for metric in EXPERIMENT.metrics}
    assert np.isfinite(result.frame["value"]).all()
    assert result.verdict == "undecided"  # arms of the rule are missing


@pytest.mark.slow
@pytest.mark.parametrize("arm", list(plan("laptop", "digits").arms))
def test_every_arm_runs(arm: str) -> None:
    metrics = train(tiny(plan("laptop", "digits").arms[arm]), seed=0)
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_experiment_is_on_the_shelf() -> None:
    assert EXPERIMENTS.load("bnn_repair") is EXPERIMENT


# ---- the figure -----------------------------------------------------------------------------------------------------


def test_front_holds_what_no_other_point_beats_in_both() -> None:
    cost, value = np.array([1.0, 2.0, 2.0, 3.0, 1.0]), np.array([5.0, 6.0, 4.0, 6.0, 5.0])
    assert front(cost, value).tolist() == [True, True, False, False, True]  # equal points do not beat each other
    generator = np.random.default_rng(0)
    cost, value = generator.random(60), generator.random(60)
    points = list(zip(cost, value, strict=True))
    slow = [not any(c <= a and v >= b and (c, v) != (a, b) for c, v in points) for a, b in points]
    assert front(cost, value).tolist() == slow


def test_figure_draws_every_arm_and_says_the_front_in_words(result: Result) -> None:
    figure = repair_figure(result)
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    legend = [text.get_text().split(maxsplit=1)[1] for text in axis.get_legend().get_texts()]
    assert legend == [PLAIN, BEST, SWISH, "G + gate", FLOAT]
    means = result.frame[result.frame["metric"] == "test/acc"].groupby("arm")["value"].mean()
    drawn = {tuple(np.round(a.xy, 6)) for a in axis.texts}
    energies = result.frame[result.frame["metric"] == "cost/energy"].groupby("arm")["value"].mean()
    assert drawn == {(round(energies[arm], 6), round(100 * means[arm], 6)) for arm in means.index}
    assert "deployed accuracy against energy of 5 arms" in str(figure.get_label())
    with pytest.raises(InputError, match="reports 'cost/price'"):
        repair_figure(result, cost="cost/price")


def test_no_two_texts_of_a_figure_of_every_arm_overlap() -> None:
    rows, arms = [], plan("laptop", "digits").arms
    for k, (arm, settings) in enumerate(arms.items()):
        net = qlab.build(settings["net"], (1, 8, 8), 10, **settings["net_options"])
        energy = costs(net, settings["method"])["cost/energy"]
        accuracy = 0.2 if arm == SHALLOW_RELU else 0.9 + 0.001 * k  # most arms on one spot
        rows += [(arm, 0, "cost/energy", energy), (arm, 0, "test/acc", accuracy)]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"])
    result = Result(
        "bnn_repair", "", "", "", "holds", (), frame, EXPERIMENT.metrics, "laptop", "digits", (0,), "cpu", {}
    )
    figure = repair_figure(result)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    ticks = [t for t in axis.get_xticklabels(which="both") if t.get_text()]
    for texts in (axis.texts, ticks):
        boxes = [Text.get_window_extent(text) for text in texts if text.get_visible()]
        assert len(boxes) > 1
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    frame_box = axis.get_window_extent()
    assert all(frame_box.contains(*Text.get_window_extent(text).min) for text in axis.texts)


def test_a_single_seed_is_drawn_without_a_deviation(result: Result) -> None:
    one = replace(result, frame=result.frame[result.frame["seed"] == 0], seeds=(0,))
    assert "of 5 arms" in str(repair_figure(one).get_label())
