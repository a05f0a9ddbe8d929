"""ProxQuant: the proximal step within training, the freeze, and its difference from BinaryConnect on one weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.prox_quant import Pulled
from qlab.proximal import prox_distance
from qlab.quantizers import hard_sign, quantized_tensors
from tests.methods.conftest import moons, small_net


def latents(method: Any) -> list[Tensor]:
    return [t.latent.detach().clone() for t in quantized_tensors(method.net)]


class Track(pl.Callback):
    """Keep every step's latents, and the float parameters."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.floats: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        binary = {id(t.latent) for t in quantized_tensors(module.net)}
        self.weights.append(latents(module))
        self.floats.append([p.detach().clone() for p in module.parameters() if id(p) not in binary])


@pytest.mark.parametrize("regularizer", ["l1", "squared"])
def test_step_is_the_prox_of_the_regularizer_with_the_learning_rate_times_lambda(regularizer: str) -> None:
    method = create("prox_quant", small_net(), regularizer=regularizer, reg_rate=0.5, schedule_epochs=10, freeze=1.0)
    method.anneal(0.4)
    before, l = latents(method), 0.2 * 0.5 * 4
    method.prox_step(lr=0.2)
    for x, found in zip(before, latents(method), strict=True):
        s = x.sign()
        expected = s * (1 + (x.abs() - 1).sign() * ((x.abs() - 1).abs() - l).clamp(min=0))
        expected = expected if regularizer == "l1" else (x + l * s) / (1 + l)
        assert torch.allclose(found, expected, atol=1e-6)
        assert not torch.equal(found, x)


def test_training_takes_an_optimizer_step_then_the_prox_then_the_clip() -> None:
    """Against the same loop by hand with torch's SGD."""
    method = create("prox_quant", small_net(), reg_rate=2.0, schedule_epochs=10, freeze=1.0, optimizer="sgd", lr=0.3)
    twin = create("prox_quant", small_net(), reg_rate=2.0, schedule_epochs=10, freeze=1.0, optimizer="sgd", lr=0.3)
    qlab.fit(method, moons(), epochs=2, progress=False, test=False)

    data = moons()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    batches = []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        batches += list(loader)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin.net(x), y).backward()
        optimizer.step()
        l = 0.3 * 2.0 * int(step / len(batches) * 10 + 1e-9)
        with torch.no_grad():
            for t in quantized_tensors(twin.net):
                t.latent.copy_(prox_distance(t.latent, hard_sign(t.latent), l).clamp(-1, 1))
    for a, b in zip(latents(method), latents(twin), strict=True):
        assert torch.equal(a, b)


def test_without_regularizer_training_is_that_of_the_float_net_bit_for_bit() -> None:
    net, common = small_net(), {"lr": 0.003, "lr_schedule": "constant"}
    prox = create("prox_quant", net, reg_rate=0.0, freeze=1.0, start="net", **common)
    plain = create("full_precision", net, **common)
    for method in (prox, plain):
        qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    for found, w in zip(latents(prox), plain.latent_weights().values(), strict=True):
        assert w.abs().max() < 1  # so that the clip does nothing
        assert torch.equal(found, w)


@pytest.mark.parametrize("optimizer", [{"optimizer": "adam"}, {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.1}])
def test_frozen_weights_are_signs_and_stay_while_the_rest_trains_on(optimizer: dict[str, Any]) -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(16, 16), affine=True, seed=1)
    track = Track()
    method = create("prox_quant", net, freeze=0.5, **optimizer)
    qlab.fit(method, moons(), epochs=4, progress=False, test=False, callbacks=[track])
    first = len(track.weights) // 2  # the step with progress 1/2 is the first that is frozen
    for w in track.weights[first]:
        assert w.abs().unique().tolist() == [1.0]
    assert any((w.abs() < 1).any() for w in track.weights[first - 1])
    for later in track.weights[first + 1 :]:
        assert all(torch.equal(a, b) for a, b in zip(track.weights[first], later, strict=True))
    before = track.weights[first - 1]
    assert all(torch.equal(hard_sign(a), b) for a, b in zip(before, track.weights[first], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(track.floats[first], track.floats[-1], strict=True))


def test_frozen_forward_is_the_sign_and_its_gradient_is_zero() -> None:
    quantizer, x = Pulled(), torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    assert torch.equal(quantizer(x), x)
    (g,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert torch.equal(g, torch.ones_like(x))
    quantizer.anneal(frozen=1.0)
    assert torch.equal(quantizer(x), hard_sign(x.detach()))
    (g,) = torch.autograd.grad(quantizer(x).sum(), x)
    assert torch.equal(g, torch.zeros_like(x))


@pytest.mark.parametrize("regularizer", ["l1", "squared"])
def test_one_weight_on_a_quadratic_settles_at_the_nearer_sign_where_binary_connect_oscillates(regularizer: str) -> None:
    """(w - 0.3)^2: the gradient at the float weight is 0 at 0.3, so a growing pull takes it to +1."""
    from qlab.methods.binary_weights.prox_quant import REGULARIZERS

    w, lr = torch.tensor(-0.1, dtype=torch.float64), 0.01
    seen = []
    for step in range(20_000):
        w = w - lr * 2 * (w - 0.3)
        w = REGULARIZERS[regularizer](w, hard_sign(w), lr * 0.02 * step).clamp(-1, 1)
        seen.append(float(w))
    settled = torch.tensor(seen[-2000:])
    assert (settled > 0.99).all()
    assert (settled.diff() >= 0).all()


def test_lambda_grows_with_the_epoch_and_the_freeze_comes_at_its_share() -> None:
    method = create("prox_quant", small_net(), reg_rate=1e-4, schedule_epochs=300)
    grid = [method.schedule(epoch / 300) for epoch in range(300)]
    assert [g["lambda_"] for g in grid] == pytest.approx([1e-4 * epoch for epoch in range(300)])
    assert [g["frozen"] for g in grid] == [0.0] * 200 + [1.0] * 100
    assert create("prox_quant", small_net(), freeze=1.0).schedule(1.0)["frozen"] == 0


def test_weights_start_of_order_one_unless_told_otherwise() -> None:
    net = small_net()
    drawn, own = create("prox_quant", net), create("prox_quant", net, start="net")
    largest = torch.cat([w.flatten() for w in latents(drawn)]).abs()
    assert 0.95 < largest.max() <= 1
    assert 0.4 < largest.mean() < 0.6
    plain = create("full_precision", net).latent_weights().values()
    assert all(torch.equal(a, b) for a, b in zip(latents(own), plain, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("regularizer", "l3"),
        ("reg_rate", -1.0),
        ("schedule_epochs", 0),
        ("schedule_epochs", math.inf),
        ("reg_rate", 1e308),
        ("freeze", 0.0),
        ("start", "zero"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        create("prox_quant", small_net(), **{name: value})
