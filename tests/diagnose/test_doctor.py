"""Every planted fault is named first; healthy nets raise no alarm."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qlab
from qlab.diagnose import symptoms_gradients
from qlab.diagnose.doctor import SEVERITIES, Diagnosis, doctor
from qlab.errors import InputError
from qlab.quantizers import (
    Sign,
    Surrogate,
    Uniform,
    harden,
    quantize,
    quantized_tensors,
    reestimate_batch_norm,
)

Net = Any  # indexable


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1500], y[:1500], x[1500:1700], y[1500:1700]


def train(net: Net, epochs: int = 4, seed: int = 0, lr: float = 3e-3) -> Net:
    """Train in place with a plain loop."""
    x, y, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(100):
            loss = F.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def build(kind: str, seed: int = 0) -> Net:
    """Return an untrained net of a kind."""
    torch.manual_seed(seed)
    if kind.startswith("plain"):  # no batch norm
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
        )
    model = "lenet" if "lenet" in kind else "mlp"
    options = {} if model == "lenet" else {"hidden": (96, 64)}
    side = 16 if model == "lenet" else 8
    net: Net = qlab.build(model, (1, side, side), 10, seed=seed, **options)
    if model == "lenet":
        net = nn.Sequential(nn.Upsample(scale_factor=2), net)
    if "signs" in kind:
        return quantize(net, weights=Sign, activations=Sign, keep=("first", "last"), seed=seed)
    if "weights" in kind:
        return quantize(net, weights=Sign, keep=("last",), seed=seed)
    if "bits" in kind:
        return quantize(
            net, weights=lambda: Uniform(4), activations=lambda: Uniform(4, signed=False, limit=4.0), keep=("last",)
        )
    return net


KINDS = ("plain", "mlp", "mlp weights", "mlp signs", "mlp bits", "lenet", "lenet weights", "lenet signs")


@cache
def trained(kind: str, seed: int = 0) -> Net:
    net = train(build(kind, seed), seed=seed)
    x, *_ = digits()
    return reestimate_batch_norm(net, list(x.split(500)))


def examine(net: Net) -> Diagnosis:
    *_, x, y = digits()
    return doctor(net, x, y)


def fresh(kind: str) -> Net:
    return copy.deepcopy(trained(kind))


# ---- healthy nets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "mlp", "mlp signs", "lenet weights"])
def test_a_healthy_net_raises_no_alarm(kind: str) -> None:
    found = examine(trained(kind))
    assert found.accuracy > 0.85
    assert [(f.name, f.layer, f.evidence) for f in found.alarms] == []
    assert found.healthy
    assert "no alarm" in found.summary()
    deployed = examine(harden(trained(kind)))
    assert deployed.healthy


@pytest.mark.slow
def test_no_false_alarm_over_twenty_trained_nets() -> None:
    alarms = []
    for kind in KINDS:
        for seed in range(3):
            found = examine(trained(kind, seed))
            assert found.accuracy > 0.8
            alarms += [(kind, seed, f.name, f.layer, f.evidence) for f in found.alarms]
    assert alarms == []


AT_THE_END = {"pmf": {"saturated weights"}, "prox_quant": {"saturated weights", "zero gradients"}}
"""What is true of a method whose schedule ends with weights that cannot move: the doctor says it, and it is no false alarm."""


@pytest.mark.parametrize("name", sorted(qlab.methods.CATALOG))
def test_methods_of_the_lab_raise_no_alarm_in_training_or_deployed(name: str) -> None:
    run = qlab.fit(name, "digits", epochs=6, progress=False)
    split = run.data.split("test")
    x, y = run.data.transform(split.x[:200]), split.y[:200]
    run.method.train()
    for net in (run.method, run.deployed):
        alarms = [f for f in doctor(net, x, y).alarms if net is run.deployed or f.name not in AT_THE_END.get(name, ())]
        assert [(f.name, f.layer, f.evidence) for f in alarms] == []


@pytest.mark.parametrize("name", sorted(AT_THE_END))
def test_weights_that_a_schedule_has_brought_to_rest_are_named_as_such(name: str) -> None:
    run = qlab.fit(name, "digits", epochs=6, progress=False)
    split = run.data.split("test")
    x, y = run.data.transform(split.x[:200]), split.y[:200]
    assert AT_THE_END[name] <= {f.name for f in doctor(run.method.train(), x, y).alarms}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_quantity_of_a_quantizer_may_be_infinite_but_not_nan(value: float) -> None:
    run = qlab.fit("ir_net", "digits", epochs=1, progress=False)
    split = run.data.split("test")
    x, y = run.data.transform(split.x[:200]), split.y[:200]
    next(b for name, b in run.method.named_buffers() if name.endswith(".cap")).fill_(value)
    assert ("NaN weights" in {f.name for f in doctor(run.method.eval(), x, y).findings}) == math.isnan(value)


# ---- planted faults: each is named first ------------------------------------------------------------------------------


def first_layer(net: Net) -> Net:
    return next(m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def norms(net: Net) -> list[Net]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def last_layer(net: Net) -> Net:
    return [m for m in net.modules() if isinstance(m, nn.Linear)][-1]


@torch.no_grad()
def dead_relu(net: Net) -> None:
    (norms(net) or [first_layer(net)])[0].bias.fill_(-100)


@torch.no_grad()
def zero_weights(net: Net) -> None:
    first_layer(net).weight.zero_()


@torch.no_grad()
def beyond_reach(net: Net) -> None:
    norms(net)[0].weight.mul_(500)


@torch.no_grad()
def huge_weights(net: Net) -> None:
    (norms(net) or [first_layer(net)])[0].weight.mul_(1e7)


@torch.no_grad()
def explode(net: Net) -> None:
    last_layer(net).weight.mul_(1e7)


def forgotten_statistics(net: Net) -> None:
    for m in norms(net):
        m.reset_running_stats()


@torch.no_grad()
def other_statistics(net: Net) -> None:
    """As if the weights of a layer had changed after its statistics were taken."""
    g = torch.Generator().manual_seed(1)
    m = norms(net)[0]
    m.running_mean.copy_(m.running_mean + 3 * m.running_var.sqrt() * torch.randn(m.running_mean.shape, generator=g))


@torch.no_grad()
def wide_statistics(net: Net) -> None:
    """A running variance that is far too large."""
    norms(net)[0].running_var.mul_(1e4)


def training(net: Net) -> None:
    net.train()


def one_in_training(net: Net) -> None:
    norms(net)[-1].train()


@torch.no_grad()
def dead_behind(net: Net) -> None:
    """As `dead_relu`, in the last norm."""
    norms(net)[-1].bias.fill_(-100)


@torch.no_grad()
def no_scale(net: Net) -> None:
    norms(net)[0].weight.zero_()


@torch.no_grad()
def zero_last_but_one(net: Net) -> None:
    [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-2].weight.zero_()


@torch.no_grad()
def beyond_reach_behind(net: Net) -> None:
    norms(net)[1].weight.mul_(500)


@torch.no_grad()
def latents_beyond_reach(net: Net) -> None:
    for tensor in quantized_tensors(net):
        tensor.latent.mul_(1e4)


def dead_and_training(net: Net) -> None:
    dead_behind(net)
    net.train()


def dead_and_silent(net: Net) -> None:
    dead_relu(net)
    no_answer(net)


def cut_off(net: Net) -> None:
    """A detached tensor behind the first nonlinearity."""

    class Detached(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    name, module = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.ReLU))
    net.set_submodule(name, Detached(module))


@torch.no_grad()
def no_answer(net: Net) -> None:
    last_layer(net).weight.zero_()


@torch.no_grad()
def not_a_number(net: Net) -> None:
    first_layer(net).weight[0, 0] = float("nan")


@torch.no_grad()
def infinite_statistics(net: Net) -> None:
    norms(net)[0].running_var[0] = float("inf")


def cut(net: Net) -> None:
    """A sign without a backward rule."""

    class Hard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sign(x)

    for name, module in list(net.named_modules()):
        if isinstance(module, Sign) and "parametrizations" not in name:
            net.set_submodule(name, Hard())


def turned(net: Net) -> None:
    """A surrogate of the wrong sign."""
    for name, module in list(net.named_modules()):
        if isinstance(module, Sign) and "parametrizations" not in name:
            net.set_submodule(name, Sign(Surrogate("turned", lambda x: -(x.abs() <= 1).to(x.dtype))))


@pytest.mark.parametrize(
    ("kind", "plant", "expected"),
    [
        ("plain", dead_relu, "dead layer"),
        ("mlp", dead_relu, "dead layer"),
        ("lenet", dead_relu, "dead layer"),
        ("mlp signs", dead_relu, "dead layer"),
        ("plain", zero_weights, "dead layer"),
        ("lenet", zero_weights, "dead layer"),
        ("mlp signs", beyond_reach, "saturated signs"),
        ("lenet signs", beyond_reach, "saturated signs"),
        ("plain", huge_weights, "exploding scale"),
        ("mlp signs", huge_weights, "exploding scale"),
        ("mlp", explode, "exploding scale"),
        ("lenet weights", explode, "exploding scale"),
        ("mlp", forgotten_statistics, "batch-norm statistics"),
        ("mlp weights", forgotten_statistics, "batch-norm statistics"),
        ("lenet signs", forgotten_statistics, "batch-norm statistics"),
        ("mlp signs", other_statistics, "batch-norm statistics"),
        ("lenet", other_statistics, "batch-norm statistics"),
        ("lenet", huge_weights, "exploding scale"),
        ("mlp", wide_statistics, "batch-norm statistics"),
        ("lenet weights", wide_statistics, "batch-norm statistics"),
        ("mlp", training, "training mode"),
        ("lenet", one_in_training, "training mode"),
        ("lenet", dead_and_training, "training mode"),
        ("lenet", dead_behind, "dead layer"),
        ("lenet signs", dead_behind, "dead layer"),
        ("mlp bits", dead_relu, "dead layer"),
        ("mlp", no_scale, "dead layer"),
        ("mlp signs", no_scale, "dead layer"),
        ("lenet", zero_last_but_one, "dead layer"),
        ("mlp signs", dead_and_silent, "dead layer"),
        ("lenet signs", beyond_reach_behind, "saturated signs"),
        ("mlp bits", beyond_reach, "saturated signs"),
        ("mlp weights", latents_beyond_reach, "saturated weights"),
        ("lenet", cut_off, "zero gradients"),
        ("plain", cut_off, "zero gradients"),
        ("lenet signs", training, "training mode"),
        ("mlp", no_answer, "constant logits"),
        ("plain", no_answer, "constant logits"),
        ("mlp signs", no_answer, "constant logits"),
        ("plain", not_a_number, "NaN weights"),
        ("lenet signs", not_a_number, "NaN weights"),
        ("mlp", infinite_statistics, "NaN weights"),
        ("mlp signs", cut, "zero gradients"),
        ("lenet signs", cut, "zero gradients"),
        ("mlp signs", turned, "gradient mismatch"),
    ],
)
def test_a_planted_fault_is_named_first(kind: str, plant: Callable[[Net], None], expected: str) -> None:
    net = fresh(kind)
    plant(net)
    found = examine(net)
    assert found.findings[0].name == expected, found.summary()
    assert found.findings[0].severity == "high"
    assert not found.healthy
    assert f"First: {expected}" in found.summary()


def test_the_layer_at_fault_is_named() -> None:
    net = fresh("mlp signs")
    signs = [n for n, m in net.named_modules() if isinstance(m, Sign) and "parametrizations" not in n]
    beyond_reach(net)
    assert examine(net).findings[0].layer == signs[0]
    net = fresh("plain")
    dead_relu(net)
    assert examine(net).findings[0].layer == "2"
    net = fresh("plain")
    not_a_number(net)
    assert examine(net).findings[0].layer == "1"
    net = fresh("mlp signs")
    cut(net)
    finding = examine(net).findings[0]
    assert "no gradient passes" in finding.evidence


def test_the_norm_at_fault_is_the_first_that_is_off() -> None:
    net = fresh("mlp")
    wide_statistics(net)
    finding = examine(net).findings[0]
    assert finding.layer == "hidden.1"
    assert "by a factor of" in finding.evidence


def clipped_sign(x: Tensor) -> Tensor:
    s = x.clamp(-1, 1)
    return s + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - s).detach()


class Functional(nn.Module):
    """A net whose activations are no modules."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc, self.act = nn.Linear(128, 10), act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        h = self.act(self.norm2(self.conv2(h)))
        return self.fc(F.avg_pool2d(h, 2).flatten(1))


@cache
def functional(act: Callable[[Tensor], Tensor]) -> Net:
    return train(Functional(act), 6)


@pytest.mark.parametrize("act", [F.relu, clipped_sign])
@pytest.mark.parametrize(("norm", "reader"), [("norm", "conv2"), ("norm2", "fc")])
def test_a_dead_activation_that_is_no_module_is_named_first(
    act: Callable[[Tensor], Tensor], norm: str, reader: str
) -> None:
    assert examine(functional(act)).healthy
    net = copy.deepcopy(functional(act))
    with torch.no_grad():
        net.get_submodule(norm).bias.fill_(-100)
    first = examine(net).findings[0]
    assert (first.name, first.layer) == ("dead layer", reader)
    assert "functional code" in first.evidence


@pytest.mark.parametrize("norm", ["norm", "norm2"])
def test_saturated_signs_that_are_no_modules_are_named_first(norm: str) -> None:
    net = copy.deepcopy(functional(clipped_sign))
    with torch.no_grad():
        net.get_submodule(norm).weight.mul_(2000)
    first = examine(net).findings[0]
    assert (first.name, first.severity) == ("saturated signs", "high")
    assert first.evidence.startswith(("At 99", "At 100"))
    assert norm in [f.layer for f in examine(net).findings if f.name == "saturated signs"]


@pytest.mark.parametrize("kind", ["plain", "mlp", "lenet", "mlp signs"])
def test_one_example_alone_or_many_times_is_no_dead_layer(kind: str) -> None:
    *_, x, y = digits()
    net = trained(kind)
    for few in (x[:1], x[:1].repeat(20, 1, 1, 1)):
        assert "dead layer" not in [f.name for f in doctor(net, few, y[:1].repeat(len(few))).findings]


def test_a_big_net_is_compared_on_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(symptoms_gradients, "coordinate_cosine", lambda net, x, *a, **k: seen.append(len(x)) or 1.0)
    examine(trained("mlp signs"))
    assert seen == [64, 64, 64]
    seen.clear()
    monkeypatch.setattr(symptoms_gradients, "WORK", 2**18)
    examine(trained("mlp signs"))
    assert seen == [4]


def test_softmax_underflow_is_named_where_the_gradient_is_exactly_zero() -> None:
    net = fresh("plain")
    *_, x, y = digits()
    with torch.no_grad():
        right = net(x).argmax(1) == y
        last_layer(net).weight.mul_(3000)
        last_layer(net).bias.mul_(3000)
    found = doctor(net, x[right], y[right])
    assert found.findings[0].name == "softmax underflow"
    assert "exactly zero" in found.findings[0].evidence
    loss = F.cross_entropy(net(x[right]), y[right])
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert sum(float(g.abs().sum()) for g in grads) < 1e-3


def test_renamed_and_shuffled_labels_are_out_of_step() -> None:
    net = fresh("mlp")
    *_, x, y = digits()
    renamed = doctor(net, x, (y + 1) % 10)
    assert renamed.findings[0].name == "labels out of step"
    assert "with the classes renamed" in renamed.findings[0].evidence
    shuffled = doctor(net, x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))])
    assert shuffled.findings[0].name == "labels out of step"
    assert shuffled.findings[0].severity == "medium"


def test_negative_batch_norm_scales_are_a_remark_not_an_alarm() -> None:
    net = fresh("mlp signs")
    with torch.no_grad():
        norms(net)[0].weight[:3] *= -1
        first_layer(net).weight  # noqa: B018
    found = [f for f in examine(net).findings if f.name == "batch-norm scale"]
    assert found
    assert found[0].severity == "info"
    assert found[0].evidence.startswith("3 of ")


def test_a_hand_written_saturated_sign_is_found_too() -> None:
    class Hand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = x.clamp(-1, 1)
            return s + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - s).detach()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), Hand(), nn.Linear(64, 10))
    train(net)
    assert examine(net).healthy
    with torch.no_grad():
        net[2].weight.mul_(500)  # type: ignore[union-attr, operator]
    assert (examine(net).findings[0].name, examine(net).findings[0].layer) == ("saturated signs", "3")


# ---- the result -------------------------------------------------------------------------------------------------------


def test_the_diagnosis_is_ranked_complete_and_repeatable() -> None:
    net = fresh("mlp")
    dead_relu(net)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    first, second = examine(net), examine(net)
    assert first.findings == second.findings
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    ranks = [SEVERITIES.index(f.severity) for f in first.findings]
    assert ranks == sorted(ranks)
    frame = first.frame()
    assert len(frame) == len(first.findings)
    for f in first.findings:
        assert f.fix
        assert f.evidence.endswith(".")
        assert f.function in ("deployed", "training-time", "surrogate")
        assert any(ch.isdigit() for ch in f.evidence)
    assert first.figure().get_label() == first.summary()
    examine(trained("plain")).figure()


def test_a_batch_may_be_given_as_a_pair_and_in_float64() -> None:
    net = fresh("mlp signs").double()
    *_, x, y = digits()
    assert doctor(net, (x.double(), y)).findings == doctor(net, x.double(), y).findings


def test_a_batch_that_fits_no_net_is_an_error() -> None:
    net = trained("mlp")
    *_, x, y = digits()
    with pytest.raises(InputError, match="labels"):
        doctor(net, x)
    with pytest.raises(InputError, match="constant"):
        doctor(net, torch.zeros_like(x), y)
    with pytest.raises(InputError, match="does not take"):
        doctor(net, x[:, :, :5], y)
    with pytest.raises(InputError, match="classes 0 to 9"):
        doctor(net, x, y + 1)
    with pytest.raises(InputError, match="expected logits"):
        doctor(nn.Flatten(0), x, y)
