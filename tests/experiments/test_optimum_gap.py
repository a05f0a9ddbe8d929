"""The optimum gap: the enumeration against nets one by one, and what a run reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

import qlab
from qlab.errors import InputError
from qlab.experiments import EXPERIMENTS, optimum_gap
from qlab.experiments.base import Plan, Scale
from qlab.experiments.optimum_gap import (
    ASKEW,
    CONNECT,
    EXPERIMENT,
    RANDOM,
    SIGNED,
    TinyNet,
    all_losses,
    all_signs,
    plan,
    sign_loss,
    train,
)
from qlab.quantizers import layers


def toy(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=draws)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def put(net: TinyNet, signs: torch.Tensor) -> TinyNet:
    at = 0
    with torch.no_grad():
        for layer in layers(net).values():
            n = layer.weight.numel()
            layer.weight.copy_(signs[at : at + n].reshape(layer.weight.shape))
            at += n
    return net


def test_all_signs_are_all_and_each_once() -> None:
    signs = all_signs(5)
    assert signs.shape == (32, 5)
    assert len(signs.unique(dim=0)) == 32
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(all_signs(5, 7, 11), signs[7:11])
    for row in (0, 13, 31):
        assert optimum_gap.row_of({"a": signs[row, :2], "b": signs[row, 2:].reshape(1, 3)}) == row


@pytest.mark.parametrize("widths", [(2, 3, 1), (2, 2, 2, 1), (2, 1)])
def test_enumerated_losses_are_those_of_the_nets_one_by_one(widths: tuple[int, ...]) -> None:
    """Torch's modules, for up to 64 sign vectors; the deployed net, and binary cross-entropy of its logit, to 1 / N."""
    x, y = toy()
    losses = all_losses(x, y, widths)
    n = sum(p.numel() for p in TinyNet(widths).parameters())
    assert len(losses) == 2**n
    net = TinyNet(widths)
    for row in range(0, 2**n, max(1, 2**n // 64)):
        put(net, all_signs(n, row, row + 1)[0])
        assert sign_loss(net, x, y) == pytest.approx(float(losses[row]), abs=1e-11)
    shipped = qlab.quantizers.reestimate_batch_norm(put(net, all_signs(n)[-1]).double().eval(), [x.double()])
    z = shipped.body(x.double())[:, 0].detach()
    direct = F.binary_cross_entropy_with_logits(z, y.double())
    assert float(direct) == pytest.approx(float(losses[-1]), rel=1 / len(x))  # it divides variances by N - 1


def test_chunks_do_not_change_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = toy()
    whole = all_losses(x, y, (2, 3, 1))
    monkeypatch.setattr(optimum_gap, "CHUNK", 17)
    assert torch.allclose(all_losses(x, y, (2, 3, 1)), whole, rtol=0, atol=1e-14)


def test_symmetries_of_the_net_are_symmetries_of_its_losses() -> None:
    """Hidden units can be exchanged: so can their weights."""
    x, y = toy()
    losses = all_losses(x, y, (2, 3, 1))
    signs = all_signs(9)
    hidden, out = signs[:, :6].reshape(-1, 3, 2), signs[:, 6:]
    swapped = torch.cat([hidden[:, [1, 0, 2]].reshape(-1, 6), out[:, [1, 0, 2]]], 1)
    rows = [optimum_gap.row_of({"w": s}) for s in swapped]
    assert torch.allclose(losses[rows], losses, atol=1e-12)
    assert len(losses.unique()) > 10


@pytest.mark.parametrize("n", [0, 17])
def test_too_many_weights_are_refused(n: int) -> None:
    with pytest.raises(InputError, match="can be enumerated"):
        all_signs(n)


def test_scales_of_filters_change_nothing() -> None:
    """The plain net of signs is judged; a deployed scale is taken up by the batch norm behind it."""
    x, y = toy()
    method = qlab.methods.create("bwn", TinyNet((2, 3, 1), seed=3))
    twin = put(TinyNet((2, 3, 1)), torch.cat([w.sign().flatten() for w in method.hard_weights().values()]))
    assert sign_loss(method.net, x, y) == pytest.approx(sign_loss(twin, x, y), abs=1e-12)


def short(arm: str, data: str = "two_moons", epochs: int = 2) -> dict[str, Any]:
    settings = plan("laptop", data).arms[arm]
    return {**settings, "epochs": epochs, "data_options": {**settings["data_options"], "n": 300}}


@pytest.mark.parametrize("arm", [ASKEW, CONNECT, "bwn", SIGNED, RANDOM])
def test_a_run_reports_what_the_enumeration_says(arm: str) -> None:
    result = train(short(arm), seed=1)
    assert result["optimum/gap"] >= -1e-9
    assert 0 <= result["optimum/better"] < 1
    assert (result["optimum/reached"] == 1.0) == (result["optimum/gap"] < 1e-3)
    assert ("optimum/movement" in result) == (arm != RANDOM)
    if arm != RANDOM:
        assert (result["optimum/moving"] == 1.0) == (result["optimum/movement"] > 0)
    assert result == train(short(arm), seed=1)


def test_random_signs_are_those_of_the_start() -> None:
    settings = short(RANDOM)
    data = qlab.data.load("two_moons", **settings["data_options"])
    split = data.split("train")
    x, y = data.transform(split.x), split.y
    losses = all_losses(x, y, (2, 3, 1))
    expected = sign_loss(TinyNet((2, 3, 1), 4), x, y) - float(losses.min())
    assert train(settings, seed=4)["optimum/gap"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("data", EXPERIMENT.data)
def test_every_plan_holds_every_method_with_arguments_it_takes_and_few_enough_weights(scale: Scale, data: str) -> None:
    arms = plan(scale, data).arms
    assert json.loads(json.dumps(arms)) == arms
    methods = {n for n, i in qlab.CATALOG.items() if i.weight_bits == 1 and i.family == "binary_weights"}
    assert methods < set(arms)
    for settings in arms.values():
        n = sum(p.numel() for p in TinyNet(settings["widths"]).parameters())
        assert n <= 16
        if settings["method"] is not None:
            accepted = {h.name for h in qlab.methods.hyperparameters(qlab.CATALOG.load(settings["method"]))}
            assert settings["options"].keys() <= accepted
            qlab.methods.create(settings["method"], TinyNet(settings["widths"]), **settings["options"])


def test_training_set_is_the_same_for_every_seed() -> None:
    options = plan("laptop", "two_moons").arms[ASKEW]["data_options"]
    sets = [qlab.data.load("two_moons", seed=s, **options).split("train") for s in (0, 5)]
    assert torch.equal(*(s.x[s.x[:, 0].argsort()] for s in sets))
    assert len(sets[0].x) == 2000


def test_shelf_lists_it_and_its_picture_names_every_row(tmp_path: Path) -> None:
    arms = {arm: short(arm, epochs=1) for arm in (CONNECT, ASKEW, RANDOM)}
    assert EXPERIMENTS.load("optimum_gap") is EXPERIMENT
    experiment = dataclasses.replace(EXPERIMENT, plan=lambda scale, data: Plan(arms, seeds=2))
    result = experiment.run(progress=False, workers=1, cache=tmp_path)
    figure = result.figure()
    figure.canvas.draw()
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == sorted(arms)
    means = result.frame[result.frame["metric"] == "optimum/gap"].groupby("arm")["value"].mean()
    assert labels == list(means.sort_values().index)  # the nearest to the optimum on top
    assert all(arm in figure.get_label() for arm in arms)
    assert len(figure.axes[0].lines) == 2 * len(arms) + 1
