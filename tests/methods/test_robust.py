"""Training for robustness: the inner maximum, the papers' steps written by hand, and that it goes with every method."""

from __future__ import annotations

import copy
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

import qlab
from qlab.cli import main
from qlab.data.seeding import generator
from qlab.errors import CheckpointError, InputError, UnknownNameError
from qlab.methods import Method, create
from qlab.methods.robust import ROBUST, TRADES, FastTraining, FreeTraining, PGDTraining, RobustTraining
from qlab.methods.robust.base import aside, robust_training
from qlab.methods.robust.trades import divergence
from qlab.stepping import Stepper
from tests.methods.conftest import moons, small_net, train
from tests.methods.test_contract import StopAt, bits, same

ALL: list[RobustTraining] = [
    PGDTraining(eps=0.2, steps=2),
    TRADES(eps=0.2, steps=2),
    FastTraining(eps=0.2),
    FreeTraining(eps=0.2, replays=3),
]

QUICK = ("full_precision", "ste", "binary_connect", "adaste", "bop")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in qlab.methods.CATALOG]

NOTHING = 1e-60  # an eps that is 0 in float32: an adversary without reach


def flat_data(N: int = 96, D: int = 5, **options: Any) -> Any:
    """Two classes of float vectors whose values differ in mean and deviation."""
    draws = torch.Generator().manual_seed(3)
    y = torch.arange(N) % 2
    x = torch.randn(N, D, generator=draws) * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])[:D] + 3 + y[:, None]
    return qlab.data.DataModule.from_arrays(x, y, **options)


def pictures(N: int = 50, **options: Any) -> Any:
    """Three classes of byte pictures (2, 3, 4), black and white pixels among them."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randint(-80, 336, (N, 2, 3, 4), generator=draws).clamp(0, 255).to(torch.uint8)
    x[:, 1] //= 3
    x[0, 1] = 255
    y = torch.arange(N) % 3
    return qlab.data.DataModule.from_arrays(x, y, augment=False, **({"batch_size": 16} | options))


def ready(method: Method, training: RobustTraining, data: Any) -> Method:
    """Return the method as it is once training on the data has started."""
    method.robust = training
    method._units = training.units(data)
    return method


def batch(data: Any) -> tuple[Tensor, Tensor]:
    loader = data.train_dataloader()
    loader.set_epoch(0)
    return next(iter(loader))


def picture_net(seed: int = 1) -> nn.Module:
    return qlab.build("mlp", (2, 3, 4), 3, hidden=(16, 8), seed=seed)


def sgd(net: Any, **options: Any) -> Method:
    plain = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "lr_schedule": "constant"}
    return create("full_precision", net, **(plain | options))


# ---- the inner maximum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training",
    [
        PGDTraining(eps=0.3, steps=10),
        PGDTraining(eps=0.3, steps=5, random_start=False),
        FastTraining(eps=0.3, eta=0.6),
    ],
    ids=["pgd", "pgd from x", "fast"],
)
def test_worst_loss_of_a_linear_net_is_that_of_the_margin_less_eps_times_the_l1_norm(training: PGDTraining) -> None:
    data = flat_data()
    torch.manual_seed(0)
    method = ready(create("full_precision", nn.Linear(5, 2)).double(), training, data)
    x, y = batch(data)
    x = x.double()
    W, b = method.net.weight.detach(), method.net.bias.detach()
    w, sign = W[1] - W[0], 2.0 * y - 1
    margin = sign * (x @ w + b[1] - b[0]) - 0.3 * (w.abs() / data.std.double()).sum()
    expected = torch.log1p(torch.exp(-margin)).mean()
    torch.testing.assert_close(method.training_loss(x, y).detach(), expected, rtol=1e-12, atol=1e-12)


def test_worst_loss_of_a_linear_net_stops_at_the_range_of_the_data() -> None:
    data = pictures()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    training = PGDTraining(eps=0.4, steps=8)
    method = ready(create("full_precision", net).double(), training, data)
    x, y = batch(data)
    x, y = x.double(), y % 2
    W, b = method.net[1].weight.detach(), method.net[1].bias.detach()
    std, mean = data.std.double().view(-1, 1, 1), data.mean.double().view(-1, 1, 1)
    raw = x * std + mean
    w = ((W[1] - W[0]).view(2, 3, 4) / std) * (2.0 * y - 1).view(-1, 1, 1, 1)
    worst = torch.where(w > 0, (raw - 0.4).clamp(min=0), (raw + 0.4).clamp(max=1))
    margin = (w * worst).flatten(1).sum(1) + (2.0 * y - 1) * (
        b[1] - b[0] - ((W[1] - W[0]).view(2, 3, 4) * mean / std).sum()
    )
    expected = torch.log1p(torch.exp(-margin)).mean()
    torch.testing.assert_close(method.training_loss(x, y).detach(), expected, rtol=1e-6, atol=1e-6)  # raw from float32


@pytest.mark.parametrize("name", ["pgd", "trades", "fast"])
def test_points_lie_in_the_ball_and_in_the_range_of_the_pictures(name: str) -> None:
    data = pictures()
    training = robust_training({"name": name, "eps": 0.2})
    method = ready(create("ste", picture_net()), training, data)
    x, y = batch(data)
    points = training.adversarial(method, x) if isinstance(training, TRADES) else training.adversarial(method, x, y)
    ends = data.transform(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 3, 4).contiguous())
    assert (points >= ends[0]).all()
    assert (points <= ends[1]).all()
    distance = ((points - x).double() * data.std.double().view(-1, 1, 1)).abs()
    assert float(distance.max()) <= 0.2 * (1 + 1e-6)
    assert float(distance.max()) > 0.15
    assert not points.requires_grad


def test_more_steps_find_a_larger_loss() -> None:
    data = pictures()
    x, y = batch(data)
    found = []
    for steps in (1, 10):
        method = ready(create("full_precision", picture_net()), PGDTraining(eps=0.2, eta=0.05, steps=steps), data)
        found.append(float(method.training_loss(x, y).detach()))
    plain = float(method.objective(x, y).detach())
    assert plain < found[0] < found[1]


# ---- TRADES ---------------------------------------------------------------------------------------------------------


def smooth_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 3))


def test_divergence_is_that_of_the_distributions() -> None:
    draws = torch.Generator().manual_seed(0)
    clean, moved = (torch.randn(6, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    p, q = (torch.distributions.Categorical(logits=z) for z in (clean, moved))
    torch.testing.assert_close(divergence(clean, moved), torch.distributions.kl_divergence(p, q).sum())
    assert float(divergence(clean, clean + 7)) == pytest.approx(0, abs=1e-14)


def test_divergence_vanishes_with_eps() -> None:
    data = pictures()
    x, y = batch(data)
    added = []
    for eps in (1e-1, 1e-2, 1e-3, 1e-7):
        method = ready(create("full_precision", smooth_net()).double(), TRADES(eps=eps), data)
        added.append(float((method.training_loss(x.double(), y) - method.objective(x.double(), y)).detach()))
    assert added == sorted(added, reverse=True)
    assert added[2] / added[1] == pytest.approx(1e-2, rel=0.1)  # of second order in eps
    assert 0 <= added[3] < 1e-10


def test_gradient_of_trades_flows_through_both_answers() -> None:
    data = pictures()
    training = TRADES(eps=0.1, beta=2.5)
    method = ready(create("full_precision", smooth_net()).double(), training, data)
    x, y = batch(data)
    x = x.double()
    moved = training.adversarial(method, x)
    method.training_loss(x, y).backward()

    def total() -> float:
        z, moved_z = method.net(x).log_softmax(1), method.net(moved).log_softmax(1)
        kl = (z.exp() * (z - moved_z)).sum(1).mean()
        return float(F.nll_loss(z, y) + 2.5 * kl)

    h = 1e-6
    with torch.no_grad():
        for p in method.net.parameters():
            for i in range(0, p.numel(), 5):
                flat = p.view(-1)
                start = float(flat[i])
                ends = []
                for side in (h, -h):
                    flat[i] = start + side
                    ends.append(total())
                flat[i] = start
                assert float(p.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_trades_is_the_loss_of_the_authors_code() -> None:
    data = pictures()
    eps, eta, beta = 0.1, 0.03, 6.0
    method = ready(create("full_precision", picture_net()).double(), TRADES(eps=eps, eta=eta, beta=beta, steps=4), data)
    x, y = batch(data)
    x = x.double()
    net = copy.deepcopy(method.net)
    for m in (method.net, net):  # running statistics that are not those of the start
        m(2 * x)

    # trades_loss of the public code, in normalised units, with this lab's noise
    std, mean = data.std.double().view(-1, 1, 1), data.mean.double().view(-1, 1, 1)
    low, high = (((end - data.mean) / data.std).double().view(-1, 1, 1) for end in (0.0, 1.0))
    assert mean.shape == std.shape
    net.eval()
    noise = torch.randn(x.shape, generator=generator("robust", 0, 0), dtype=x.dtype)
    x_adv = x + 0.001 / std * noise
    for _ in range(4):
        x_adv = x_adv.detach().requires_grad_()
        kl = F.kl_div(F.log_softmax(net(x_adv), 1), F.softmax(net(x).detach(), 1), reduction="sum")
        (g,) = torch.autograd.grad(kl, x_adv)
        x_adv = x_adv.detach() + eta / std * torch.sign(g)
        x_adv = torch.min(torch.max(x_adv, x - eps / std), x + eps / std)
        x_adv = torch.min(torch.max(x_adv, low), high)
    net.train()
    robust = F.kl_div(F.log_softmax(net(x_adv), 1), F.softmax(net(x), 1), reduction="sum") / len(x)
    total = F.cross_entropy(net(x), y) + beta * robust
    total.backward()

    ours = method.training_loss(x, y)
    ours.backward()
    torch.testing.assert_close(ours, total, rtol=1e-12, atol=1e-12)
    for p, q in zip(method.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


# ---- steps written by hand ------------------------------------------------------------------------------------------


def test_a_step_of_fast_training_is_the_papers_in_plain_torch_bit_for_bit() -> None:
    data = pictures()
    net = picture_net()
    run = qlab.fit(sgd(net), data, epochs=1, max_steps=1, robust=FastTraining(eps=0.1), progress=False, test=False)

    x, y = batch(pictures())
    std, mean = data.std.view(-1, 1, 1), data.mean.view(-1, 1, 1)
    r, low, high = 0.1 / std, (0 - mean) / std, (1 - mean) / std
    u = torch.rand(x.shape, generator=generator("robust", 0, 0))
    delta = r * (2 * u - 1)
    edges = torch.maximum(x - r, low), torch.minimum(x + r, high)
    point = torch.clamp(x + delta, *edges).requires_grad_()
    buffers = copy.deepcopy(dict(net.named_buffers()))
    (g,) = torch.autograd.grad(F.cross_entropy(net(point), y), point)
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    point = torch.clamp(point.detach() + (1.25 * 0.1) / std * g.sign(), *edges)
    F.cross_entropy(net(point), y).backward()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(p.grad, alpha=-0.1)
    assert same(bits(net), bits(run.method.net))


def test_free_training_replays_every_batch_and_keeps_the_perturbation_bit_for_bit() -> None:
    m, eps, lr = 3, 0.1, 0.1
    data = pictures()
    net = picture_net()
    run = qlab.fit(sgd(net), data, epochs=2, robust=FreeTraining(eps=eps, replays=m), progress=False, test=False)

    std, mean = data.std.view(-1, 1, 1), data.mean.view(-1, 1, 1)
    low, high = (0 - mean) / std, (1 - mean) / std
    loader = pictures().train_dataloader()
    delta = torch.zeros(16, 2, 3, 4)
    steps = 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            n = len(x)
            for _ in range(m):
                noise = delta[:n].clone().requires_grad_()
                loss = F.cross_entropy(net(torch.clamp(x + noise / std, low, high)), y)
                net.zero_grad()
                loss.backward()
                delta[:n] = (noise.detach() + eps * noise.grad.sign()).clamp(-eps, eps)
                with torch.no_grad():
                    for p in net.parameters():
                        p.add_(p.grad, alpha=-lr)
                steps += 1
    assert len({len(x) for x, _ in loader}) == 2  # a smaller last batch is among them
    assert run.method.steps == steps == 2 * m * len(loader)
    assert same(bits(net), bits(run.method.net))
    assert torch.equal(run.method.perturbation, delta)


def test_learning_rate_and_schedules_of_free_training_move_with_every_replay() -> None:
    seen: list[tuple[float, float]] = []

    class Looking(Method):
        info = qlab.methods.CATALOG["full_precision"]

        def begin_step(self, total: int) -> None:
            super().begin_step(total)
            seen.append((self.steps / total, self.optimizers().param_groups[0]["lr"]))

    data = moons()
    qlab.fit(Looking(small_net(), lr=0.5), data, epochs=1, robust=FreeTraining(replays=3), progress=False, test=False)
    total = 3 * len(data.train_dataloader())
    assert [p for p, _ in seen] == [k / total for k in range(total)]
    cosine = create("full_precision", small_net()).lr_factor
    assert [lr for _, lr in seen] == pytest.approx([0.5 * cosine(k / total) for k in range(total)])


# ---- it does what it is for -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_precision", "ste"])
def test_robust_training_raises_the_accuracy_under_pgd(name: str) -> None:
    # Binary weights with float activations: gradients of the inputs are exact, so PGD is not blind.
    from qlab.attacks.pgd import PGD
    from qlab.attacks.victim import pixels

    data, eps = qlab.data.load("digits"), 0.15
    test = data.split("test")
    accuracy = {}
    for training in (None, PGDTraining(eps=eps), TRADES(eps=eps)):
        net = qlab.build("mlp", (1, 8, 8), 10, hidden=(128, 128), final_norm=True, seed=0)
        method = create(name, net, seed=0)
        run = qlab.fit(method, data, epochs=20, robust=training, progress=False, validate_every=0)
        victim = pixels(run.deployed, data)
        found = PGD(steps=40, restarts=2, loss="margin")(victim, test.x / 255, test.y, eps)
        accuracy[training.name if training else "plain"] = found.accuracy
        assert run.metrics["test/acc"] > 0.9
    assert accuracy["plain"] < 0.1
    assert accuracy["pgd"] > 0.4
    assert accuracy["trades"] > 0.4


# ---- with every method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_goes_with_every_method(name: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for training in ALL:
        method = create(name, small_net())
        before = bits(method.net)
        run = qlab.fit(method, moons(), epochs=1, max_steps=1, robust=training, progress=False, test=False)
        assert run.method.steps == training.repeats
        after = bits(run.method.net)
        trained = [k for k, _ in method.net.named_parameters()]
        assert all(bool(after[k].isfinite().all()) for k in trained)
        assert any(not torch.equal(before[k], after[k]) for k in trained)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", EVERY)
def test_an_adversary_without_reach_leaves_plain_training_bit_for_bit(name: str) -> None:
    # Points are the inputs then, so what differs would be a trace of the inner attack: gradients, statistics, noise.
    plain = train(name, epochs=1)
    for training in (
        PGDTraining(eps=NOTHING, steps=2),
        FastTraining(eps=NOTHING),
        FreeTraining(eps=NOTHING, replays=1),
    ):
        run = train(name, epochs=1, robust=training)
        assert same(bits(plain.method), bits(run.method))
        assert run.metrics["test/acc"] == plain.metrics["test/acc"]


NOISY: list[tuple[str, dict[str, Any]]] = [
    ("binary_connect", {"stochastic": True}),
    ("dorefa", {"gradient_bits": 4}),
    ("qnn", {"stochastic_neurons": True, "gradient_bits": 6, "gradient_stochastic": True}),
    ("bayes_binn", {"samples": 3, "tau": 1.0}),
    ("luq", {}),
]


@pytest.mark.parametrize(("name", "options"), NOISY, ids=[n for n, _ in NOISY])
def test_noise_of_a_step_is_the_same_with_and_without_an_inner_attack(name: str, options: dict[str, Any]) -> None:
    plain = train(name, epochs=1, method=create(name, small_net(), **options))
    run = train(name, epochs=1, method=create(name, small_net(), **options), robust=PGDTraining(eps=NOTHING, steps=2))
    assert same(bits(plain.method), bits(run.method))


@pytest.mark.parametrize("training", ["pgd", "trades", "fast"])
def test_training_taken_apart_has_the_bits_of_fit(training: str) -> None:
    run = train("ste", epochs=1, robust={"name": training, "eps": 0.1})
    method = create("ste", small_net(), seed=0)
    method.robust = {"name": training, "eps": 0.1}
    stepper = Stepper(method, moons(0), 1)
    for _ in range(stepper.total):
        stepper.step()
    assert same(bits(run.method), bits(method))


# ---- what the inner attack leaves -----------------------------------------------------------------------------------


class Drifting(nn.Module):
    """A layer that replaces its buffer in training, and counts in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            self.count += 1
        return x


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("kind", ["pgd", "trades"])
def test_the_inner_attack_leaves_no_trace(kind: str, statistics: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        Drifting(),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    data = pictures()
    training = robust_training({"name": kind, "eps": 0.1, "batch_norm": statistics})
    method = ready(create("luq", net), training, data)
    method.begin_step(10)
    x, y = batch(data)
    method.objective(x, y).backward()
    before, grads = bits(method), [None if p.grad is None else p.grad.clone() for p in method.parameters()]
    objects = [id(b) for b in method.buffers()]
    modes, state, given = [m.training for m in method.modules()], torch.get_rng_state(), x.clone()

    points = training.adversarial(method, x) if isinstance(training, TRADES) else training.adversarial(method, x, y)
    assert not torch.equal(points, x)
    assert same(before, bits(method))
    assert objects == [id(b) for b in method.buffers()]
    for g, p in zip(grads, method.parameters(), strict=True):
        assert (g is None and p.grad is None) or torch.equal(g, p.grad)
    assert modes == [m.training for m in method.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


def test_batch_norm_of_the_inner_attack_is_in_the_mode_that_was_asked_for() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    for statistics, expected in (("batch", [True, False]), ("running", [False, False])):
        with aside(net, statistics):  # type: ignore[arg-type]
            assert [m.training for m in net] == expected
        assert [m.training for m in net] == [True, True]
    assert PGDTraining().batch_norm == FastTraining().batch_norm == "batch"
    assert TRADES().batch_norm == "running"


def test_modes_and_buffers_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), aside(net, "batch"):
        net(1 + torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert all(m.training for m in net)
    assert torch.equal(net[0].running_mean, torch.zeros(3))


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ALL, ids=[t.name for t in ALL])
@pytest.mark.parametrize("method", ["full_precision", "binary_connect"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method: str, training: RobustTraining) -> None:
    whole = train(method, epochs=2, robust=training)
    part = train(method, epochs=2, robust=training, callbacks=[StopAt(5)])
    assert part.method.steps == 5 * training.repeats
    rest = train(
        method, epochs=2, method=create(method, small_net(), seed=0), resume=part
    )  # which training, the file says
    assert rest.completed
    assert rest.method.robust == training
    assert same(bits(whole.method), bits(rest.method))
    assert rest.metrics["test/acc"] == whole.metrics["test/acc"]
    if isinstance(training, FreeTraining):
        assert torch.equal(whole.method.perturbation, rest.method.perturbation)
        assert float(whole.method.perturbation.abs().max()) == pytest.approx(0.2)


def test_training_and_its_settings_travel_in_the_checkpoint(tmp_path: Path) -> None:
    training = FreeTraining(eps=0.05, replays=2, low=-9.0, high=9.0)
    run = train("ste", epochs=1, robust=training)
    path = run.save(tmp_path) / "checkpoint.ckpt"
    assert json.loads((tmp_path / "run.json").read_text())["config"]["hyperparameters"]["robust"]["eps"] == 0.05
    torch.load(path, weights_only=True)
    method = qlab.load(path)
    assert method.robust == training
    assert torch.equal(method.perturbation, run.method.perturbation)
    assert dict(method.hparams) == dict(run.method.hparams)
    assert qlab.load(path, robust=None).robust is None
    with pytest.raises(CheckpointError, match=r"unknown setting of free 'esp'. Did you mean 'eps'"):
        qlab.load(path, robust={"name": "free", "esp": 1})


def test_another_training_starts_anew_and_none_is_plain() -> None:
    run = train("ste", epochs=1, robust="free")
    assert run.method.perturbation is not None
    run.method.robust = "pgd"
    assert run.method.perturbation is None
    run.method.robust = None
    assert "robust" not in run.method.hparams
    assert run.method.repeats == 1


def test_settings_survive_their_record() -> None:
    assert list(ROBUST) == ["pgd", "trades", "fast", "free"]
    for training in ALL:
        assert robust_training(json.loads(json.dumps(training.record()))) == training
        assert type(training) is ROBUST.load(training.name)


def test_a_run_says_how_it_was_trained_and_a_plain_one_is_as_before() -> None:
    assert train("ste", epochs=1, robust="fast").config["hyperparameters"]["robust"] == FastTraining().record()
    plain = train("ste", epochs=1)
    assert "robust" not in plain.config["hyperparameters"]
    assert set(plain.method.get_extra_state()) == {"steps", "statistics"}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDTraining(eps=0), "eps of pgd must be a number above 0, not 0"),
        (lambda: TRADES(eps=float("nan")), "eps of trades must be a number above 0"),
        (lambda: FastTraining(eps=True), "eps of fast must be a number"),
        (lambda: PGDTraining(steps=0), "steps of pgd must be a whole number of at least 1, not 0"),
        (lambda: PGDTraining(eta=-1), "eta of pgd must be a number above 0, not -1"),
        (lambda: PGDTraining(random_start=1), "random_start of pgd must be True or False"),
        (lambda: FastTraining(batch_norm="train"), "batch_norm of fast must be 'batch' or 'running', not 'train'"),
        (lambda: TRADES(beta=float("inf")), "beta of trades must be a number above 0"),
        (lambda: TRADES(start=0), "start of trades must be a number above 0"),
        (lambda: FreeTraining(replays=2.0), "replays of free must be a whole number of at least 1"),
        (lambda: FreeTraining(low=1, high=0), "range of free runs from 1 to 0; expected low < high"),
        (lambda: FreeTraining(low="0"), "low of free must be a number"),
        (lambda: robust_training({"eps": 0.1}), "robust must be one of pgd, trades, fast, free"),
        (lambda: robust_training(3), "robust must be one of pgd, trades, fast, free"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown training for robustness 'trade'. Did you mean 'trades'"):
        train("ste", robust="trade")
    with pytest.raises(UnknownNameError, match=r"unknown setting of trades 'betta'. Did you mean 'beta'"):
        train("ste", robust={"name": "trades", "betta": 1})


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_data_without_units_tokens_and_a_wrong_range_are_refused() -> None:
    loader = torch.utils.data.DataLoader([(torch.randn(8, 2), torch.arange(8) % 2)], batch_size=None)
    method = create("ste", small_net())
    method.robust = "pgd"
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with qlab.runs.quiet(), pytest.raises(InputError, match="pgd has its eps in the units of the data set"):
        pl.Trainer(max_epochs=1, **quiet).fit(method, loader)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="outside the range 0 to 1 that trades keeps to"):
        train("ste", robust=TRADES(low=0, high=1))
    with pytest.raises(InputError, match="pgd moves inputs by small amounts, but these are tokens"):
        PGDTraining().units(qlab.data.load("text"))
    with pytest.raises(InputError, match="units of the data are known once training has started"):
        _ = create("ste", small_net()).units


def test_free_training_takes_its_batches_one_at_a_time() -> None:
    with pytest.raises(InputError, match="accumulate_grad_batches must be 1"):
        train("ste", robust="free", accumulate_grad_batches=2)
    method = create("ste", small_net())
    method.robust = "free"
    with pytest.raises(InputError, match="free adversarial training takes several steps for each batch"):
        Stepper(method, moons(), 1)


def test_gathered_batches_train() -> None:
    run = train("ste", epochs=1, robust=PGDTraining(eps=0.1, steps=1), accumulate_grad_batches=2)
    assert run.method.steps == 5  # of 9 batches


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command owns its process: give the next test the folder, seeds, handlers and settings that it would find in a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(sys, "argv", ["qlab"])
    handler, deterministic = signal.getsignal(signal.SIGINT), torch.are_deterministic_algorithms_enabled()
    with isolate_rng():
        yield
    torch.use_deterministic_algorithms(deterministic)
    signal.signal(signal.SIGINT, handler)


FIT = [
    "fit",
    "--method",
    "ste",
    "--data",
    "two_moons",
    "--data.n",
    "200",
    "--net.hidden",
    "[8]",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.mark.usefixtures("process")
def test_command_line_trains_for_robustness_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([*FIT, "--trainer.max_epochs", "1", "--robust", "trades", "--robust.eps", "0.1", "--robust.steps", "2"])
        == 0
    )
    first = Path("runs/ste-two_moons/version_0/last.ckpt")
    assert qlab.load(first).robust == TRADES(eps=0.1, steps=2)
    assert main(["fit", "--ckpt_path", str(first), "--trainer.max_epochs", "2"]) == 0
    second = Path("runs/ste-two_moons/version_1/last.ckpt")
    assert qlab.load(second).robust == TRADES(eps=0.1, steps=2)
    assert main(["test", "--ckpt_path", str(second)]) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--robust.eps", "0.1"],
            "--robust.eps needs to know of which training: --robust NAME, one of pgd, trades, fast, free",
        ),
        (["--robust", "trade"], "unknown training for robustness 'trade'"),
        (["--robust", "pgd", "--robust.eps", "-1"], "eps of pgd must be a number above 0, not -1"),
        (["--robust", "pgd", "--robust.beta", "1"], "robust.beta"),
    ],
)
def test_command_line_answers_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *words]) == 2
    assert message in capsys.readouterr().err
