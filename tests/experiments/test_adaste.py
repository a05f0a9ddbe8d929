"""The AdaSTE experiment: its plans fit the methods, its arms do what they are named after, its metrics are what they say."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import qlab
from qlab.experiments import adaste
from qlab.experiments.adaste import ADASTE, ADASTE_3, CLIPPED_3, DEAD_ZONE, EXACT, EXACT_3, EXPERIMENT, plan, train
from qlab.experiments.base import Plan, Result, Scale
from qlab.methods.base import Method
from qlab.quantizers import quantized_tensors

NEVER_STUCK = (EXACT, ADASTE, DEAD_ZONE, EXACT_3, ADASTE_3, CLIPPED_3)
SIGN_STE = "B sign STE, same optimizer"


def short(arm: str, epochs: int = 2) -> dict[str, Any]:
    """The settings of an arm on digits, cut short."""
    return {**plan("laptop", "digits").arms[arm], "epochs": epochs}


def method_of(arm: str, seed: int = 0) -> tuple[Method, qlab.data.DataModule]:
    settings = short(arm)
    data = qlab.data.load("digits", batch_size=64, seed=seed)
    net = qlab.build(settings["net"], data.input_shape, data.num_classes, seed=seed, **settings["net_options"])
    return qlab.methods.create(settings["method"], net, seed=seed, **settings["options"]), data


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The arms of the claim on digits, a few epochs instead of 60, one seed."""
    arms = {arm: short(arm, epochs=10 if arm == ADASTE else 2) for arm in NEVER_STUCK}
    experiment = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=1))
    return experiment.run(progress=False, workers=1, cache=tmp_path_factory.mktemp("cache"))


def values(result: Result, metric: str, *arms: str) -> list[float]:
    rows = result.frame[(result.frame["metric"] == metric) & result.frame["arm"].isin(arms)]
    assert len(rows) == len(arms)
    return rows["value"].tolist()


def test_exact_derivative_moves_no_weight(result: Result) -> None:
    for metric in ("quant/changed", "quant/flip_ratio"):
        assert set(values(result, metric, EXACT, EXACT_3, CLIPPED_3)) == {0.0}
    assert set(values(result, "quant/zero_slope", EXACT, EXACT_3, CLIPPED_3)) == {1.0}


def test_adaste_changes_signs_and_learns_where_the_exact_derivative_is_stuck(result: Result) -> None:
    assert min(values(result, "quant/changed", ADASTE, DEAD_ZONE)) > 0.01
    assert min(values(result, "test/acc", ADASTE)) > max(values(result, "test/acc", EXACT)) + 0.3


def test_result_reports_every_metric_of_every_run(result: Result) -> None:
    assert set(result.frame["metric"]) == {metric.name for metric in EXPERIMENT.metrics}
    assert len(result.frame) == len(NEVER_STUCK) * len(EXPERIMENT.metrics)
    assert result.frame["value"].notna().all()


def test_runs_are_paired_both_arms_start_from_the_same_net(result: Result) -> None:
    (a, _), (b, _) = method_of(EXACT, seed=1), method_of(ADASTE, seed=1)
    assert all(torch.equal(a.hard_weights()[name], w) for name, w in b.hard_weights().items())


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert train(short(ADASTE, 1), seed=3) == train(short(ADASTE, 1), seed=3)
    assert train(short(ADASTE, 1), seed=3) != train(short(ADASTE, 1), seed=4)


def test_sign_ste_arm_is_identity_straight_through() -> None:
    method, _ = method_of(SIGN_STE)
    for tensor in quantized_tensors(method.net):
        w = tensor.quantizer(tensor.latent)
        assert w.detach().unique().tolist() == [-1.0, 1.0]
        dl = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        (g,) = torch.autograd.grad(w, tensor.latent, dl)
        assert torch.equal(g, dl)


@pytest.mark.parametrize("arm", [ADASTE, DEAD_ZONE, SIGN_STE, CLIPPED_3, "B BinaryConnect"])
def test_gradient_panel_counts_what_it_says(arm: str) -> None:
    """Against l' from plain weights in a plain net, and the slope from a backward pass through the quantizer alone."""
    method, data = method_of(arm)
    if arm == CLIPPED_3:
        adaste._start_at(method, 3.0, seed=0)
    panel = adaste._gradient_panel(method, data)
    large = zero = moved = entries = 0
    latent = [tensor.latent for tensor in quantized_tensors(method.net)]
    quantizers = [tensor.quantizer for tensor in quantized_tensors(method.net)]
    plain = qlab.harden(method.net).train()
    for _, (x, y) in zip(range(adaste.PANEL_BATCHES), data.train_dataloader(), strict=False):
        gradients = torch.autograd.grad(method.loss(plain(x), y), list(plain.parameters()))
        for theta, quantizer, dl in zip(latent, quantizers, gradients, strict=True):
            (g,) = torch.autograd.grad(quantizer(theta), theta, dl)
            large += int((dl.abs() > 1e-3).sum())
            zero += int(((g == 0) & (dl != 0)).sum())
            moved += int((dl != 0).sum())
            entries += dl.numel()
    assert panel["quant/large_gradient"] == pytest.approx(large / entries, abs=1e-6)
    assert panel["quant/zero_slope"] == pytest.approx(zero / moved, abs=1e-6)
    assert 0 < panel["quant/large_gradient"] < 1


def test_changed_signs_are_counted_from_the_start() -> None:
    method, _ = method_of(ADASTE)
    before = {name: w.clone() for name, w in method.hard_weights().items()}
    first = next(quantized_tensors(method.net))
    with torch.no_grad():
        first.latent[:3].neg_()
    total = sum(w.numel() for w in before.values())
    panel = adaste._weights_panel(method, before, {"quant/flip_ratio": 0.0})
    assert panel["quant/changed"] == pytest.approx(first.latent[:3].numel() / total)


def test_start_puts_every_latent_at_the_given_size_with_both_signs() -> None:
    method, _ = method_of(CLIPPED_3)
    adaste._start_at(method, 3.0, seed=0)
    latent = torch.cat([tensor.latent.flatten() for tensor in quantized_tensors(method.net)])
    assert latent.unique().tolist() == [-3.0, 3.0]
    assert abs((latent > 0).double().mean() - 0.5) < 0.05


def test_float_arm_has_accuracies_only() -> None:
    assert set(train(short("B full precision", 1), seed=0)) == {"test/acc", "test/acc_latent"}


def test_an_interrupted_run_is_not_taken_for_a_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlab, "fit", lambda *args, **options: SimpleNamespace(completed=False))
    with pytest.raises(KeyboardInterrupt):
        train(short(ADASTE), seed=0)


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_scale_and_data_set_has_a_plan_with_the_arms_of_the_rule(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert set(NEVER_STUCK) < set(arms)
    assert json.loads(json.dumps(arms)) == arms  # primitives only
    assert len({json.dumps([settings["net"], settings["net_options"]]) for settings in arms.values()}) == 1
    shape = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}.get(data, (3, 32, 32))
    with torch.device("meta"):
        net = _built(next(iter(arms.values())), shape)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert not any(norm.affine for norm in norms)
    assert norms[-1].num_features == 10
    for settings in arms.values():
        accepted = {h.name for h in qlab.methods.hyperparameters(qlab.CATALOG.load(settings["method"]))}
        assert settings["options"].keys() <= accepted


def _built(settings: dict[str, Any], shape: tuple[int, ...]) -> torch.nn.Module:
    return qlab.build(settings["net"], shape, 10, seed=None, **settings["net_options"])


def test_paper_scale_holds_the_settings_of_the_paper() -> None:
    settings = plan("paper", "cifar10").arms["B AdaSTE reference, tol 1e-3"]
    method, defaults = settings["options"], {h.name: h.default for h in qlab.methods.hyperparameters(_adaste())}
    assert settings["net"] == "resnet18"
    assert settings["epochs"] == 700
    assert settings["data_options"] == {"batch_size": 128, "val_fraction": 0.1}
    used = {**defaults, **method}
    expected = {
        "mode": "reference", "alpha": 0.01, "mu": 0.01, "mu_rate": 1.05, "schedule_epochs": 700, "c_max": 0.5, "tol": 1e-3,
        "theta_init": "signs", "theta_scale": 10.0, "scale": None, "decay": 1.0, "lr": 3e-4, "momentum": 0.9,
        "lr_schedule": "cosine", "biases": True, "keep": (),
    }  # fmt: skip
    assert {name: used[name] for name in expected} == expected


def _adaste() -> type[Method]:
    return qlab.CATALOG.load("adaste")
