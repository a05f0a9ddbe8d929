"""The DIR-Net experiment: its plans fit the method, its arms do what they are named after, its metrics are what they say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import qlab
from qlab.experiments import EXPERIMENTS, dir_net
from qlab.experiments.base import Plan, Scale
from qlab.experiments.dir_net import (
    CLIP,
    CLUSTERED_DTE,
    CLUSTERED_EDE,
    EXPERIMENT,
    FLOAT,
    SHIFTED,
    SHIFTED_RAW,
    WITH_DTE,
    WITH_EDE,
    WITH_IMB,
    WITH_RBD,
    plan,
    run,
)
from qlab.quantizers import Sign
from qlab.quantizers.information import IMB, TanhSign

RUNGS = (CLIP, WITH_IMB, WITH_EDE, WITH_DTE, WITH_RBD)


def toy(arm: str) -> dict[str, Any]:
    """The settings of an arm on digits, cut short."""
    settings = dict(plan("laptop", "digits").arms[arm])
    if "latents" in settings:
        return settings
    settings |= {"epochs": 1, "net_options": {"width": 2}, "data_options": {"batch_size": 256}}
    return settings | ({"teacher": 1} if settings["teacher"] else {})


def test_shelf_has_the_experiment() -> None:
    assert EXPERIMENTS.load("dir_net") is EXPERIMENT


@pytest.mark.parametrize("arm", [*RUNGS, FLOAT])
def test_a_rung_runs_at_toy_size_and_repeats(arm: str) -> None:
    found = run(toy(arm), seed=1)
    assert found.keys() <= {m.name for m in EXPERIMENT.metrics}
    assert all(math.isfinite(v) for v in found.values())
    assert ("quant/entropy" in found) == (arm != FLOAT)
    assert ("quant/t" in found) == (arm in (WITH_EDE, WITH_DTE, WITH_RBD))
    if arm == WITH_RBD:
        assert found == run(toy(arm), seed=1)


def test_weights_at_rest_do_what_the_claim_says() -> None:
    for seed in range(3):
        raw, balanced = run(toy(SHIFTED_RAW), seed), run(toy(SHIFTED), seed)
        p = norm.cdf(0.8)
        assert raw["quant/entropy"] == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), abs=0.01)
        assert balanced["quant/entropy"] > 0.999
        ede, dte = run(toy(CLUSTERED_EDE), seed), run(toy(CLUSTERED_DTE), seed)
        half = math.acosh(1 / math.sqrt(0.1)) / 10  # of the interval in which a slope is live at t = 10
        size = math.sqrt(1 + 0.3**2)  # deviation of the clusters
        share = norm.cdf((half * size - 1) / 0.3) - norm.cdf((-half * size - 1) / 0.3)
        assert ede["quant/live"] == pytest.approx(share, abs=1.5e-3)
        assert dte["quant/live"] >= 0.1
        assert dte["quant/t"] < ede["quant/t"] == pytest.approx(10)


def test_claim_holds_on_weights_at_rest(tmp_path: Path) -> None:
    arms = {arm: toy(arm) for arm in (SHIFTED_RAW, SHIFTED, CLUSTERED_EDE, CLUSTERED_DTE)}
    frame = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=2))
    assert frame.run(progress=False, workers=1, cache=tmp_path).verdict == "holds"


@pytest.mark.parametrize("form", [TanhSign(3.0), IMB(TanhSign(3.0)), Sign("clipped"), IMB(Sign("clipped"))])
def test_live_share_counts_slopes_taken_by_autograd(form: Any) -> None:
    w = 0.6 * torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True) if isinstance(form, IMB) else w
    x = x.clone().requires_grad_()
    sign = form.estimator if isinstance(form, IMB) else form
    (g,) = torch.autograd.grad(sign(x).sum(), x)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (largest,) = torch.autograd.grad(sign(zero).sum(), zero)
    assert dir_net.live(form, w) == pytest.approx(float((g >= 0.1 * largest).double().mean()))


def test_entropy_is_that_of_each_filter() -> None:
    signs: Tensor = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, 1, -1]])
    assert dir_net.sign_entropy(signs).tolist() == pytest.approx([0, 1, 0.811278], abs=1e-6)


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_scale_and_data_set_has_a_plan_that_fits(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert set(RUNGS) < set(arms)
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    shape = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}.get(data, (3, 32, 32))
    for arm in (*RUNGS, FLOAT):
        settings = arms[arm]
        net = qlab.build(settings["net"], shape, 10, **{**settings["net_options"], "width": 2})
        method = qlab.methods.create(settings["method"], net, **settings["options"])
        binary = list(method.hard_weights())
        assert len(binary) == (0 if arm == FLOAT else 16)
        assert not any("shortcut" in name for name in binary)


def test_paper_scale_holds_the_settings_of_the_authors_code() -> None:
    settings = plan("paper", "cifar10").arms[WITH_DTE]
    assert settings["epochs"] == 400
    assert settings["data_options"] == {"batch_size": 128}
    expected = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "t_min": 1e-3}
    assert {name: settings["options"][name] for name in expected} == expected
