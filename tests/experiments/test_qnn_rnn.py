"""The experiment of the recurrent QNN: plans that fit, runs that are paired, metrics that are what they say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import qlab
from qlab.experiments.base import Plan, Scale
from qlab.experiments.qnn_rnn import ARMS, EXPERIMENT, FLOAT, W1A1, W2A3, W4A4, plan, train
from qlab.experiments.training import prepared


def short(arm: str, **data_options: Any) -> dict[str, Any]:
    """The settings of an arm, one epoch of a few windows of a small net."""
    settings = plan("laptop", "text").arms[arm]
    options = {**settings["data_options"], "subset": 96, "length": 12, **data_options}
    return {**settings, "data_options": options, "net_options": {"hidden": 8, "embedding": 4}, "epochs": 1}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return str(path)


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_scale_and_data_set_has_a_plan_with_all_arms(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert list(arms) == list(ARMS)
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    accepted = {h.name for h in qlab.methods.hyperparameters(qlab.CATALOG.load("qnn_rnn"))}
    for settings in arms.values():
        assert settings["options"].keys() <= accepted
        assert {k: v for k, v in settings.items() if k != "options"} == {
            k: v for k, v in arms[FLOAT].items() if k != "options"
        }
        qlab.data.load(data, **settings["data_options"])
        with torch.device("meta"):
            qlab.build("lstm", (settings["data_options"]["length"],), 50, **settings["net_options"])


def test_paper_scale_has_the_net_of_the_paper() -> None:
    settings = plan("paper", "penn_treebank").arms[W4A4]
    assert settings["net_options"]["hidden"] == 300
    assert "unit" not in settings["data_options"]  # words, as is usual for the set
    assert qlab.data.load("penn_treebank", **settings["data_options"]).unit == "word"


def test_arms_quantize_what_they_are_named_after(file: str) -> None:
    for arm in ARMS:
        method, _ = prepared(short(arm, path=file, subset=None), 0)
        bits = {m.bits for m in method.net.modules() if hasattr(m, "levels")}
        assert bits == ({int(part[1:]) for part in arm.split("/")} if arm != FLOAT else set())


def test_runs_are_paired_all_arms_start_from_the_same_weights_and_see_the_same_batches(file: str) -> None:
    (a, x), (b, y) = (prepared(short(arm, path=file, subset=None), 1) for arm in (FLOAT, W1A1))
    assert all(torch.equal(a.latent_weights()[name], w) for name, w in b.latent_weights().items())
    for first, second in zip(x.train_dataloader(), y.train_dataloader(), strict=True):
        assert torch.equal(first[0], second[0])


def test_metrics_are_those_of_the_deployed_net_on_the_test_part(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    fit = qlab.fit
    monkeypatch.setattr(qlab, "fit", lambda *args, **options: runs.append(fit(*args, **options)) or runs[-1])
    metrics = train(short(W2A3, path=file, subset=None), seed=0)
    (run,) = runs
    split = run.data.split("test")
    with torch.no_grad():
        logits = run.deployed(split.x).double()
    chosen = torch.log_softmax(logits, 1).gather(1, split.y[:, None]).squeeze(1)
    assert metrics["test/bits"] == pytest.approx(float(-chosen.mean()) / math.log(2), rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(float(torch.exp(-chosen.mean())), rel=1e-5)
    assert metrics["test/acc"] == pytest.approx(float((logits.argmax(1) == split.y).double().mean()), rel=1e-5)
    assert set(metrics) == {metric.name for metric in EXPERIMENT.metrics}


def test_the_same_seed_gives_the_same_numbers(file: str) -> None:
    first, again, other = (train(short(W4A4, path=file, subset=None), seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def judged(bits: dict[str, float]) -> str:
    """The verdict on runs that differ from seed to seed by a common amount."""
    import pandas as pd

    rows = [(arm, seed, "test/bits", value + 0.01 * seed) for arm, value in bits.items() for seed in range(3)]
    return EXPERIMENT.rule.judge(pd.DataFrame(rows, columns=["arm", "seed", "metric", "value"]), range(3))[0]


@pytest.mark.parametrize(
    ("worse", "verdict"),
    [
        ({W4A4: 1.04, W2A3: 1.10, W1A1: 1.30}, "holds"),
        ({W4A4: 0.98, W2A3: 1.10, W1A1: 1.30}, "holds"),
        ({W4A4: 1.06, W2A3: 1.20, W1A1: 1.30}, "fails"),
        ({W4A4: 1.02, W2A3: 1.05, W1A1: 1.30}, "fails"),
        ({W4A4: 1.02, W2A3: 1.10, W1A1: 1.20}, "fails"),
    ],
)
def test_rule_is_that_of_the_claim_in_perplexities(worse: dict[str, float], verdict: str) -> None:
    perplexities = {FLOAT: 4.0, **{arm: 4.0 * factor for arm, factor in worse.items()}}
    assert judged({arm: math.log2(value) for arm, value in perplexities.items()}) == verdict


def test_experiment_runs_on_the_shipped_text(tmp_path: Path) -> None:
    arms = {arm: short(arm) for arm in (FLOAT, W4A4, W2A3, W1A1)}
    experiment = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=1))
    result = experiment.run(progress=False, workers=1, cache=tmp_path)
    assert not result.failures
    assert result.verdict == "undecided"  # one seed decides nothing
    assert set(result.frame["arm"]) == set(arms)
