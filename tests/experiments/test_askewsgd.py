"""The experiments of ASkewSGD and of the group transform, at toy size."""

from __future__ import annotations

from typing import get_args

import pytest

import qlab
from qlab.experiments import EXPERIMENTS
from qlab.experiments.askewsgd import ASKEW, ASKEW_SMALL, CONNECT, CONNECT_SMALL, logistic
from qlab.experiments.base import Scale
from qlab.methods import CATALOG, hyperparameters


@pytest.mark.parametrize("name", ["askewsgd", "binary_transform"])
def test_every_plan_names_known_methods_nets_and_options(name: str) -> None:
    experiment = EXPERIMENTS.load(name)
    for scale in get_args(Scale):
        for data in experiment.data:
            for arm in experiment.plan(scale, data).arms.values():
                if "rule" not in arm:
                    known = {h.name for h in hyperparameters(CATALOG.load(arm["method"]))}
                    assert set(arm["options"]) <= known
                    assert arm["net"] in qlab.models.MODELS


def test_the_arms_of_the_rules_are_in_the_plans() -> None:
    for name in ("askewsgd", "binary_transform"):
        experiment = EXPERIMENTS.load(name)
        arms = experiment.plan("laptop", "digits").arms
        for check in experiment.rule.checks:
            assert {check.arm, check.other} <= set(arms)


@pytest.mark.parametrize("seed", [0, 1])
def test_askewsgd_ends_below_binary_connect_on_the_convex_problem(seed: int) -> None:
    arms = EXPERIMENTS.load("askewsgd").plan("laptop", "digits").arms
    for askew, connect, factor in ((ASKEW, CONNECT, 5), (ASKEW_SMALL, CONNECT_SMALL, 10)):
        ours, theirs = (logistic(arms[a]["rule"], arms[a]["batch"], seed) for a in (askew, connect))
        assert theirs["toy/tail"] > ours["toy/tail"] + 0.005
        assert 10 ** theirs["toy/flips"] > factor * 10 ** ours["toy/flips"]


def test_float_weights_end_below_the_best_signs() -> None:
    assert -0.01 < logistic("float", 1000, 0)["toy/excess"] < 0


def test_a_training_arm_reports_what_the_table_shows() -> None:
    experiment = EXPERIMENTS.load("binary_transform")
    arm = dict(experiment.plan("laptop", "digits").arms["power"]) | {"epochs": 1}
    found = experiment.function(arm, 0)
    assert found["test/lost"] == pytest.approx(found["test/acc_latent"] - found["test/acc"])
    assert {m.name for m in experiment.metrics} <= set(found)
