"""DIR-Net and IR-Net: schedule, promise of the caps, teacher, switches, and the packed net."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.errors import CheckpointError, InputError
from qlab.methods import Method, create
from qlab.methods.teacher import features, over_places, places, rbd
from qlab.quantizers import Sign, quantized_tensors, quantizers
from qlab.quantizers.information import IMB, TanhSign, balanced, live_share
from tests.methods.conftest import moons, small_net, train


def bits(method: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in method.state_dict().items() if isinstance(v, Tensor)}


def same(a: Method, b: Method) -> bool:
    left, right = bits(a), bits(b)
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def estimators(method: Method) -> list[TanhSign]:
    return [t.quantizer.estimator for t in quantized_tensors(method.net)]


def batch(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=g), torch.randint(0, 2, (n,), generator=g)


def wide() -> Any:
    """Three hidden layers, so that two are binary."""
    return qlab.build("mlp", (2,), 2, hidden=(16, 16, 16), affine=False, final_norm=True, seed=1)


def clustered(method: Method, spread: float = 0.3) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in quantized_tensors(method.net):
            side = 2.0 * torch.randint(0, 2, t.latent.shape, generator=g) - 1
            t.latent.copy_(side + spread * torch.randn(t.latent.shape, generator=g))


# ---- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t_min", "middle"), [(0.1, 0.5), (1e-3, 0.75)])
def test_schedule_is_linear_in_the_logarithm_and_passes_one_where_it_should(t_min: float, middle: float) -> None:
    method = create("ir_net", small_net(), t_min=t_min, t_max=10.0)
    assert method.schedule(0.0) == {"t": t_min}
    assert method.schedule(1.0)["t"] == pytest.approx(10)
    assert math.log(1 / t_min) / math.log(10 / t_min) == pytest.approx(middle)
    assert method.schedule(middle)["t"] == pytest.approx(1)
    track = [method.schedule(i / 400)["t"] for i in range(400)]
    assert all(a < b for a, b in itertools.pairwise(track))
    assert track == pytest.approx([t_min * 10 ** (i / 400 * math.log10(10 / t_min)) for i in range(400)])
    for progress in (0.0, middle / 2, middle + 1e-9, 1.0):
        method.anneal(progress)
        for q in (q for q in quantizers(method.net) if isinstance(q, TanhSign)):
            assert float(q.t) == method.schedule(progress)["t"]
            assert (float(q.k) == 1) == (progress > middle)


def test_weights_and_activations_have_the_quantizers_of_the_switches() -> None:
    def kinds(**options: Any) -> tuple[Any, Any]:
        method = create("dir_net", small_net(), **options)
        (weight,) = (t.quantizer for t in quantized_tensors(method.net))
        return weight, method.net.hidden[2]

    weight, activation = kinds()
    assert isinstance(weight, IMB)
    assert weight.estimator.eps == 0.1
    assert isinstance(activation, TanhSign)
    assert activation.eps == 0
    weight, activation = kinds(imb=False, estimator="clip", activations="clip")
    assert isinstance(weight, Sign)
    assert isinstance(activation, Sign)
    weight, activation = kinds(estimator="ede", activations="float")
    assert weight.estimator.eps == 0
    assert isinstance(activation, nn.ReLU)
    assert isinstance(kinds(imb=False)[0], TanhSign)
    assert kinds(activation_eps=0.2)[1].eps == 0.2


# ---- the promise of the caps ----------------------------------------------------------------------------------------


class Shares(pl.Callback):
    """The least share of usable slopes of any layer, where the caps were just set: at the first step of every epoch."""

    def __init__(self) -> None:
        self.least: list[float] = []
        self.sharpness: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, method: Any, optimizer: Any) -> None:
        if method.steps % trainer.num_training_batches == 0:
            shares = [
                live_share(balanced(t.latent), t.quantizer.estimator.sharpness, 0.1 * (1 - 1e-5), "relative")
                for t in quantized_tensors(method.net)
            ]
            self.least.append(float(min(shares)))
            self.sharpness.append(max(float(e.sharpness) for e in estimators(method)))


def test_share_of_usable_slopes_never_falls_below_eps_and_without_the_cap_it_does() -> None:
    found = {}
    for estimator in ("dte", "ede"):
        method = create("dir_net", wide(), estimator=estimator, eps=0.3, lr=0.01)
        clustered(method, 0.2)
        found[estimator] = Shares()
        qlab.fit(method, moons(), epochs=6, progress=False, test=False, callbacks=[found[estimator]])
    assert len(found["dte"].least) == 6
    assert min(found["dte"].least) >= 0.3
    assert min(found["ede"].least) < 0.1
    assert all(a <= b for a, b in zip(found["dte"].sharpness, found["ede"].sharpness, strict=True))
    assert found["dte"].sharpness[-1] < found["ede"].sharpness[-1]


def test_caps_follow_the_weights_once_an_epoch_or_every_so_many_steps() -> None:
    for refresh, due in ((0, {0, 9}), (4, {0, 4, 8, 12, 16})):
        method = create("dir_net", small_net(), refresh=refresh)
        (estimator,) = estimators(method)
        moved = set()
        before = [math.nan]

        class Watch(pl.Callback):
            def on_before_optimizer_step(
                self, *_: Any, m: Method = method, moved: set[int] = moved, before: list[float] = before
            ) -> None:
                now = float(estimators(m)[0].cap)
                if now != before[0]:
                    moved.add(m.steps)
                before[0] = now

        qlab.fit(method, moons(), epochs=2, progress=False, test=False, callbacks=[Watch()])
        assert method.steps == 18
        assert moved == due
        assert math.isfinite(float(estimator.cap))


def test_no_share_and_no_teacher_is_ir_net_bit_for_bit() -> None:
    dir_net = create("dir_net", wide(), eps=0.0, gamma=0.0)
    ir_net = create("ir_net", wide())
    for method in (dir_net, ir_net):
        qlab.fit(method, moons(), epochs=3, progress=False, test=False)
    assert same(dir_net, ir_net)


# ---- teacher --------------------------------------------------------------------------------------------------------


def test_objective_is_the_loss_plus_the_distance_of_block_outputs() -> None:
    teacher, (x, y) = wide(), batch()
    method = create("dir_net", wide(), teacher=teacher, gamma=0.7, kd_weight=0.3).train()
    at = places(method.net)
    assert at == method.compared() == ["hidden.4", "hidden.7"]
    student, plain = copy.deepcopy(method.net), copy.deepcopy(teacher).eval()
    z = student.hidden[:5](x)
    H = plain.hidden[:5](x)
    z2, H2 = student.hidden[5:8](z), plain.hidden[5:8](H)
    logits, expected = student.fc(student.hidden[8:](z2)), plain(x)
    distance = (rbd(z, H) + rbd(z2, H2)) / 2
    log_p = expected.log_softmax(1)
    divergence = (log_p.exp() * (log_p - logits.log_softmax(1))).sum(1).mean()
    assert torch.allclose(
        method.objective(x, y), F.cross_entropy(logits, y) + 0.7 * distance + 0.3 * divergence, rtol=1e-5
    )
    assert not any(m._forward_hooks for m in method.net.modules())


def test_gamma_zero_is_the_run_without_teacher_bit_for_bit() -> None:
    without, zero = create("dir_net", wide()), create("dir_net", wide(), teacher=wide(), gamma=0.0)
    with_one = create("dir_net", wide(), teacher=wide())
    for method in (without, zero, with_one):
        qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    assert same(without, zero)
    assert not same(without, with_one)


def test_teacher_gets_no_gradient_and_never_changes() -> None:
    teacher = wide()
    before = copy.deepcopy(teacher.state_dict())
    method = create("dir_net", wide(), teacher=teacher)
    assert bits(method).keys() == bits(create("dir_net", wide())).keys()
    qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    held = method._teacher.net
    for net in (teacher, held):
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())


def test_distance_from_the_teacher_falls_with_its_weight() -> None:
    teacher = create("full_precision", wide(), lr=0.03)
    qlab.fit(teacher, moons(), epochs=5, progress=False, test=False)
    x = moons().calibration(4)[0]
    distances = {}
    for gamma in (0.0, 5.0):
        method = create("dir_net", wide(), teacher=teacher, gamma=gamma)
        qlab.fit(method, moons(), epochs=10, progress=False, test=False, validate_every=0)
        net = method.deployed()
        with torch.no_grad(), features(net, method.compared()) as h:
            net(x)
        distances[gamma] = float(over_places(rbd, h, method._teacher(x, method.compared())[1]))
    assert distances[5.0] < 0.8 * distances[0.0]


def test_weight_of_the_distance_rises_over_its_share_of_the_run() -> None:
    x, y = batch()
    method = create("dir_net", wide(), teacher=wide(), gamma=2.0, gamma_ramp=0.5).train()
    full = create("dir_net", wide(), teacher=wide(), gamma=2.0).train()
    method._run_length = 40
    plain = method.loss(method.net(x), y).detach()
    whole = full.objective(x, y).detach() - plain
    for step, share in ((0, 0.0), (5, 0.25), (20, 1.0), (30, 1.0)):
        method.steps = step
        assert float(method.objective(x, y).detach() - plain) == pytest.approx(float(share * whole), rel=1e-4, abs=1e-6)


def test_resumed_run_with_a_given_teacher_equals_the_uninterrupted_one_and_evaluation_needs_no_teacher(
    tmp_path: Path,
) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 12

    def method() -> Method:
        return create("dir_net", small_net(), teacher=small_net(5), eps=0.6)

    whole = train("dir_net", epochs=3, method=method())
    part = train("dir_net", epochs=3, method=method(), callbacks=[Stop()])
    rest = train("dir_net", epochs=3, method=method(), resume=part)
    assert same(whole.method, rest.method)

    path = whole.save(tmp_path) / "checkpoint.ckpt"
    loaded = qlab.load(path)
    assert loaded.hparams["teacher"] == "given"
    x = moons().calibration(1)[0]
    assert torch.equal(loaded.deployed()(x), whole.deployed(x))
    with pytest.raises(InputError, match="teacher=net"):
        loaded.objective(*batch())
    qlab.load(path, teacher=small_net(5)).objective(*batch())


def test_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    teacher = train("full_precision", epochs=1)
    path = str(teacher.save(tmp_path) / "checkpoint.ckpt")
    by_path = create("dir_net", small_net(), teacher=path)
    assert by_path.hparams["teacher"] == path
    by_net = create("ir_net", small_net(), teacher=teacher.method)
    assert by_net.hparams["teacher"] == "given"
    x, y = batch()
    assert torch.equal(by_path.objective(x, y), by_net.objective(x, y))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        create("dir_net", small_net(), teacher="nowhere.ckpt").objective(x, y)


def test_teacher_of_another_topology_is_said_in_one_error() -> None:
    other = qlab.build("mlp", (2,), 2, hidden=(8, 8), affine=False, final_norm=True)
    with pytest.raises(InputError, match="topology"):
        create("dir_net", small_net(), teacher=other).objective(*batch())


# ---- deployment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dir_net", "ir_net"])
def test_packed_net_equals_the_deployed_one(name: str) -> None:
    net = qlab.build("bireal18", (1, 8, 8), 10, width=8, seed=0)
    shortcuts = [f"stages.{i}.0.shortcut.1" for i in (1, 2, 3)]
    method = create(name, net, keep=("first", "last", *shortcuts))
    with torch.no_grad():  # powers other than 1 too: heavy tails make mean |z| small
        for t in quantized_tensors(method.net):
            t.latent[::2] = (t.latent[::2] / t.latent.abs().max()) ** 7
    scales = torch.cat([t.quantizer.scale(t.latent).flatten() for t in quantized_tensors(method.net)])
    assert len(scales.unique()) >= 2
    assert scales.max() <= 1
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    deployed = method.deployed(calibration=[x])
    packed = qlab.binary.compile(deployed, x)
    report = packed.report().set_index("layer")
    assert all(report.loc[t.name, "weight_bits"] == 1 for t in quantized_tensors(method.net))
    with torch.no_grad():
        expected = deployed(x).numpy()
    assert np.allclose(packed(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_is_popcount_over_the_taps_that_are_there_and_a_shift(padding: int) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.where(torch.randn(2, 5, 7, 7, generator=g) >= 0, 1.0, -1.0).double()
    w = torch.randn(4, 5, 3, 3, generator=g, dtype=torch.float64) ** 3
    q = IMB(TanhSign())
    found = F.conv2d(a, q.hard(w), padding=padding)
    columns = F.unfold(a, 3, padding=padding)  # (N, taps, positions); padding is 0, which no bit can be
    bits_w = q.level(w).flatten(1) > 0
    valid = columns != 0
    differ = ((columns > 0)[:, None] != bits_w[None, :, :, None]) & valid[:, None]
    dots = valid.sum(1)[:, None] - 2 * differ.sum(2)
    assert valid.sum(1).min() == (45 if padding == 0 else 20)
    exponent = torch.log2(q.scale(w)).flatten()
    assert torch.equal(exponent, exponent.round())
    expected = torch.ldexp(dots.double(), exponent[None, :, None].int())
    assert torch.equal(found.flatten(2), expected)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"t_min": 0.0},
        {"t_min": 2.0, "t_max": 1.0},
        {"t_max": math.inf},
        {"eps": -0.1},
        {"eps": 1.1},
        {"tau": 0.0},
        {"tau": 1.0},
        {"cap": "soft"},
        {"refresh": -1},
        {"gamma": -1.0},
        {"gamma_ramp": 2.0},
        {"kd_weight": math.nan},
        {"estimator": "ste"},
        {"activations": "sign"},
        {"representation": "map"},
        {"places": "hidden"},
        {"activation_eps": 2.0},
        {"teacher": 3},
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(reversed(options))):
        create("dir_net", small_net(), **options)


def test_filters_of_one_weight_are_refused_with_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="keep="):
        create("dir_net", net)
    create("dir_net", net, imb=False)


def test_learns_two_moons_with_every_switch() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32), seed=0)  # with shifts
    teacher = create("full_precision", net, lr=0.03)
    qlab.fit(teacher, moons(n=1000), epochs=10, progress=False, test=False)
    for options in (
        {"estimator": "ede", "activations": "clip"},
        {"estimator": "dte", "cap": "absolute", "activation_eps": 0.1},
        {"teacher": teacher, "kd_weight": 1.0},
    ):
        run = qlab.fit(create("dir_net", net, **options), moons(n=1000), epochs=15, progress=False, validate_every=0)
        assert run.metrics["test/acc"] > 0.9, options
