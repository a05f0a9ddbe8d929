"""The repair bench: every switch does what its formula says, and all of them go together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import Method, create, hyperparameters
from qlab.methods.binary_networks.bnn_repair import SWITCHES, BNNRepair, recu_tau
from qlab.methods.binary_networks.repair_losses import activation_loss, bnnplus, inputs_of_signs, sign_entropy
from qlab.methods.binary_weights.bop import flipped
from qlab.models.repair_blocks import CHOICES
from qlab.quantizers import Uniform, layers, quantized_tensors, quantizers
from qlab.quantizers.repair import FeatureSign, RepairWeight
from tests.methods.conftest import moons, small_net
from tests.methods.test_contract import StopAt

VALUES = {h.name: h.choices for h in hyperparameters(BNNRepair) if h.name in SWITCHES}
BACKWARD_ONLY = [("feature_binarizer", value) for value in VALUES["feature_binarizer"]] + [
    ("weight_binarizer", value) for value in VALUES["weight_binarizer"] if value not in ("recu", "magnitude_aware")
]


def tiny(seed: int = 0, **options: Any) -> Any:
    return qlab.build("repair20", (1, 8, 8), 10, width=4, blocks=(1, 1), seed=seed, **options).double()


def number(x: Tensor) -> float:
    return x.detach().item()


def images(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 10


def made(net: nn.Module | None = None, **options: Any) -> BNNRepair:
    method = create("bnn_repair", tiny() if net is None else net, **options)
    assert isinstance(method, BNNRepair)
    return method


def step(method: Method, x: Tensor, y: Tensor, total: int = 10) -> Tensor:
    """One step as a trainer takes it, without its schedule of the learning rate."""
    method._run_length = total
    method.train()
    method.begin_step(total)
    optimizer = method.make_optimizer()
    loss = method.objective(x, y)
    loss.backward()
    optimizer.step()
    method.end_step()
    return loss.detach()


# ---- what changes the forward map, and what does not ----------------------------------------------------------------


@pytest.mark.parametrize(("switch", "value"), BACKWARD_ONLY)
def test_surrogates_change_gradients_and_no_output(switch: str, value: str) -> None:
    x, _ = images()
    plain, other = made(), made(**{switch: value})
    assert torch.equal(plain(x), other(x))


def test_surrogates_do_change_gradients() -> None:
    x, y = images()

    def gradients(**options: Any) -> list[Tensor]:
        method = made(**options)
        return list(torch.autograd.grad(method.objective(x, y), [t.latent for t in quantized_tensors(method.net)]))

    plain = gradients()
    for value in VALUES["feature_binarizer"]:
        if value != "clipped":
            assert not torch.allclose(plain[0], gradients(feature_binarizer=value)[0]), value


@pytest.mark.parametrize(
    "options", [{"scaling": "alpha"}, {"scaling": "pow2"}, {"weight_binarizer": "magnitude_aware"}]
)
def test_a_factor_of_each_filter_is_absorbed_by_the_batch_norm_behind(options: dict[str, Any]) -> None:
    net = tiny()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-15
    x, _ = images()
    torch.testing.assert_close(made(net, **options)(x), made(net)(x), atol=1e-9, rtol=1e-9)


def test_clipped_and_identity_weights_train_alike_until_a_latent_weight_leaves_the_window() -> None:
    x, y = images()

    def after(value: str, scale: float, steps: int) -> list[Tensor]:
        net = tiny()
        with torch.no_grad():
            for layer in layers(net).values():
                layer.weight.mul_(scale)
        method = made(net, weight_binarizer=value, latent_clip=0.0, lr=1e-3)
        for _ in range(steps):
            step(method, x, y)
        return [t.latent.detach() for t in quantized_tensors(method.net)]

    assert all(torch.equal(a, b) for a, b in zip(after("clipped", 1, 3), after("identity", 1, 3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after("clipped", 20, 1), after("identity", 20, 1), strict=True))


def test_latent_weights_are_clipped_after_a_step() -> None:
    x, y = images()
    for clip in (0.05, 0.0):
        method = made(latent_clip=clip)
        step(method, x, y)
        largest = max(number(t.latent.abs().max()) for t in quantized_tensors(method.net))
        assert (largest <= 0.05) == (clip > 0)


def test_halfwave_features_are_zero_or_one() -> None:
    method = made(features="halfwave")
    seen: list[Tensor] = []
    for q in quantizers(method.net):
        if isinstance(q, FeatureSign):
            q.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    method(images()[0])
    assert torch.cat([s.flatten() for s in seen]).unique().tolist() == [0.0, 1.0]


def test_float_features_leave_the_nets_own_nonlinearities() -> None:
    method = made(features="float")
    assert not any(isinstance(m, FeatureSign) for m in method.net.modules())
    assert sum(isinstance(m, nn.Hardtanh) for m in method.net.modules()) == 4


@pytest.mark.parametrize(("first_last", "ends"), [("float", None), ("int8", Uniform), ("binary", RepairWeight)])
def test_first_and_last_layer(first_last: str, ends: type | None) -> None:
    method = made(first_last=first_last)
    by_name = {t.name: t.quantizer for t in quantized_tensors(method.net)}
    names = list(layers(method.net))
    assert all(isinstance(by_name[name], RepairWeight) for name in names[1:-1])
    for name in (names[0], names[-1]):
        assert isinstance(by_name[name], ends) if ends else name not in by_name
    deployed = method.deployed([images()[0]])
    levels = len(layers(deployed)[names[0]].weight.unique())
    assert levels == 2 if first_last == "binary" else levels > 2
    if first_last == "int8":
        step = 2 * tiny().stem[0].weight.abs().max() / 127
        codes = layers(deployed)[names[0]].weight / step
        torch.testing.assert_close(codes, codes.round(), atol=1e-9, rtol=0)


# ---- regularizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.3, None])
def test_bnnplus_is_its_sum_and_least_at_plus_and_minus_alpha(power: Any, alpha: float | None) -> None:
    u = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for row in u.tolist():
        target = sum(map(abs, row)) / 7 if alpha is None else alpha
        expected += sum(abs(target - abs(v)) ** power for v in row)
    assert number(bnnplus(u, power, alpha)) == pytest.approx(expected, rel=1e-12)
    if alpha is not None:
        assert bnnplus(alpha * torch.sign(u), power, alpha) == 0


def test_activation_loss_is_zero_for_spread_centred_features_and_its_three_terms_elsewhere() -> None:
    z = torch.randn(4000, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean((0, 2), keepdim=True)) / z.std((0, 2), correction=0, keepdim=True)
    assert number(activation_loss(3 * z)) == 0
    assert number(activation_loss(5 * z)) == pytest.approx(1)  # (5 - 4)^2
    assert number(activation_loss(0.5 * z)) == pytest.approx(2.25)  # (2 - 0.5)^2
    assert number(activation_loss(0.5 * z + 3)) == pytest.approx(9 - 0.25)  # 3^2 - 0.5^2
    one = z.clone()
    one[:, 1:] *= 3
    assert number(activation_loss(one)) == pytest.approx(1 / 3)  # the mean over channels; (2 - 1)^2 of the first


def test_activation_loss_gradient() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation_loss, (x + 0.3,))
    assert torch.autograd.gradcheck(sign_entropy, (x,))


def test_sign_entropy_is_one_bit_for_balanced_features_and_less_else() -> None:
    half = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert number(sign_entropy(torch.cat([half, -half]))) == pytest.approx(1, abs=1e-12)
    p = torch.sigmoid(torch.tensor(5.0, dtype=torch.float64)).item()
    expected = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert number(sign_entropy(torch.ones(4, 1, dtype=torch.float64))) == pytest.approx(expected)


def test_regularizers_are_added_to_the_loss_with_their_weight() -> None:
    x, y = images()
    plain = number(made().objective(x, y))
    method = made(weight_norm="center", regularizer="bnnplus_l2", regularizer_weight=0.01, bnnplus_alpha=0.5)
    terms = [bnnplus(t.quantizer.prepared(t.latent), 2, 0.5) for t in quantized_tensors(method.net)]  # type: ignore[attr-defined]
    base = number(made(weight_norm="center").objective(x, y))
    assert number(method.objective(x, y)) == pytest.approx(base + 0.01 * number(sum(terms)), rel=1e-12)

    decay = made(regularizer="wd", regularizer_weight=0.1)
    squares = sum(number((t.latent**2).sum()) for t in quantized_tensors(decay.net))
    assert number(decay.objective(x, y)) == pytest.approx(plain + 0.1 * squares, rel=1e-12)

    for name, term in (("distribution", activation_loss), ("entropy", lambda v: -sign_entropy(v))):
        method = made(regularizer=name, regularizer_weight=0.2)
        with inputs_of_signs(method.net) as found:
            method(x)
        assert len(found) == 4
        added = sum(number(term(v)) for v in found)
        assert number(method.objective(x, y)) == pytest.approx(plain + 0.2 * added, rel=1e-10)
    assert not any(m._forward_pre_hooks for m in method.net.modules() if isinstance(m, FeatureSign))


def test_label_smoothing_is_torchs_and_evaluation_stays_without() -> None:
    x, y = images()
    method = made(regularizer="label_smoothing", regularizer_weight=0.1)
    logits = method(x)
    assert torch.equal(method.objective(x, y), F.cross_entropy(logits, y, label_smoothing=0.1))
    assert torch.equal(method.loss(logits, y), F.cross_entropy(logits, y))


def test_weight_decay_of_two_stages_ends_with_the_first() -> None:
    x, y = images()
    method, plain = (
        made(stages="two", regularizer="wd", regularizer_weight=0.1),
        made(stages="two"),
    )
    for steps, same in ((0, False), (4, False), (5, True), (9, True)):
        for m in (method, plain):
            m.steps, m._run_length = steps, 10
            m.begin_step(10)
        assert (number(method.objective(x, y)) == number(plain.objective(x, y))) == same


# ---- teachers -------------------------------------------------------------------------------------------------------


def test_teacher_losses_are_what_their_formulas_say() -> None:
    x, y = images()
    teacher = tiny(seed=5)
    zt = teacher.eval()(x).detach()
    plain = made()
    z, ce = plain(x), F.cross_entropy(plain(x), y)
    T = 3.0
    p, log_q = (zt / T).softmax(1), (z / T).log_softmax(1)
    kl = (p * (p.log() - log_q)).sum(1).mean()
    kd = made(teacher=teacher, teacher_weight=0.3, temperature=T).objective(x, y)
    torch.testing.assert_close(kd, 0.7 * ce + 0.3 * T**2 * kl)
    soft = made(teacher=teacher, teacher_loss="distribution").objective(x, y)
    torch.testing.assert_close(soft, -(zt.softmax(1) * z.log_softmax(1)).sum(1).mean())
    for name in ("attention", "rbd"):
        taught = made(teacher=teacher, teacher_loss=name, teacher_weight=2.0)
        assert taught.objective(x, y) > ce
        none = made(teacher=teacher, teacher_loss=name, teacher_weight=0.0)
        torch.testing.assert_close(none.objective(x, y), ce)


def test_a_teacher_that_is_the_student_costs_nothing() -> None:
    x, y = images()
    method = made().eval()
    twin = method.net
    for name in ("attention", "rbd"):
        taught = made(teacher=twin, teacher_loss=name, teacher_weight=5.0).eval()
        torch.testing.assert_close(taught.objective(x, y), method.objective(x, y), atol=1e-9, rtol=0)
    taught = made(teacher=twin, teacher_weight=1.0).eval()
    torch.testing.assert_close(taught.objective(x, y), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_teacher_is_no_part_of_state_or_hyperparameters() -> None:
    method = made(teacher=tiny(seed=5))
    assert method.h.teacher == "given"
    assert method.state_dict().keys() == made().state_dict().keys()


# ---- stages and schedules -------------------------------------------------------------------------------------------


def test_two_stages_train_float_weights_first_and_then_their_signs() -> None:
    method = made(stages="two")
    method.anneal(0.49)
    assert all(torch.equal(t.quantizer(t.latent), t.latent) for t in quantized_tensors(method.net))
    float_signs = [torch.sign(t.latent) for t in quantized_tensors(method.net)]
    method.anneal(0.5)
    binary = [t.quantizer(t.latent) for t in quantized_tensors(method.net)]
    assert all(torch.equal(a, b) for a, b in zip(float_signs, binary, strict=True))
    method.anneal(0.0)
    for w in method.hard_weights().values():
        assert set(w.unique().tolist()) == {-1.0, 1.0}


def test_the_learning_rate_of_two_stages_runs_twice() -> None:
    method, plain = made(stages="two"), made()
    assert [method.lr_factor(p) for p in (0.0, 0.25)] == [plain.lr_factor(p) for p in (0.0, 0.5)]
    assert method.lr_factor(0.4999) < 1e-6
    assert method.lr_factor(0.5) == 1
    assert method.lr_factor(0.75) == pytest.approx(0.5)
    assert method.lr_factor(1.0) == pytest.approx(0)


def test_ramps_rise_and_end_binary() -> None:
    for stages, quantity in (("progressive", "lam"), ("soft_sign", "beta"), ("two", "lam")):
        method = made(stages=stages)
        track = [method.schedule(i / 100)[quantity] for i in range(101)]
        assert all(a <= b for a, b in pairwise(track))
        method.anneal(0.99)
        for t in quantized_tensors(method.net):
            assert torch.equal(t.quantizer(t.latent), t.quantizer.hard(t.latent))
    assert made(stages="progressive", stage_end=0.5).schedule(0.25) == {"lam": 0.5}
    soft = made(stages="soft_sign", stage_end=0.5, beta_end=16.0).schedule(0.25)
    assert soft == {"beta": pytest.approx(4.0), "hardened": 0.0}


def test_recu_tau_goes_from_085_to_099() -> None:
    assert recu_tau(0) == pytest.approx(0.85)
    assert recu_tau(1) == pytest.approx(0.99)
    assert made(weight_binarizer="recu").schedule(1.0)["tau"] == pytest.approx(0.99)


@pytest.mark.parametrize("stages", VALUES["stages"])
def test_every_scheduled_quantity_reaches_a_buffer(stages: str) -> None:
    for features, weights in (("ede", "recu"), ("fourier", "rbnn"), ("reste", "dte")):
        method = made(feature_binarizer=features, weight_binarizer=weights, stages=stages)
        method.anneal(0.3)
        for quantity, value in method.schedule(0.3).items():
            buffers = [b for name, b in method.named_buffers() if name.endswith(f".{quantity}")]
            assert buffers
            assert all(number(b) == pytest.approx(value) for b in buffers)


# ---- optimizers -----------------------------------------------------------------------------------------------------


def test_adamw_and_sgd_take_the_steps_of_torch() -> None:
    x, y = images()
    for name, make in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)),
    ):
        method, twin = made(optimizer=name), made()
        for _ in range(1):
            step(method, x, y)
            optimizer = make(list(twin.parameters()))
            twin.objective(x, y).backward()
            optimizer.step()
        for a, b in zip(method.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach().clamp(-9, 9), atol=1e-12, rtol=1e-12)


def test_weight_decay_is_of_float_matrices_only() -> None:
    method = made(tiny(activation="rprelu", feature_norm="rsign", squeeze_excite="gate"), weight_decay=0.1)
    latent = {id(t.latent) for t in quantized_tensors(method.net)}
    for group in method.make_optimizer().param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1 and id(p) not in latent)


def test_bop_flips_signs_by_its_rule_and_keeps_its_gamma() -> None:
    x, y = images()
    method = made(optimizer="bop", bop_gamma=1.0, bop_tau=1e-6)
    before = [t.latent.detach().clone() for t in quantized_tensors(method.net)]
    assert all(set(w.unique().tolist()) == {-1.0, 1.0} for w in before)
    gradients = torch.autograd.grad(method.objective(x, y), [t.latent for t in quantized_tensors(method.net)])
    step(method, x, y)
    for w, g, t in zip(before, gradients, quantized_tensors(method.net), strict=True):
        assert torch.equal(t.latent.detach(), flipped(w, g, 1e-6))  # gamma = 1: the raw gradient
    assert any(not torch.equal(w, t.latent) for w, t in zip(before, quantized_tensors(method.net), strict=True))
    optimizer = method.make_optimizer()
    method._run_length = 10
    scheduler = method.with_schedule(optimizer)["lr_scheduler"]["scheduler"]
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    rates = {group["tau"]: group["lr"] for group in optimizer.param_groups}
    assert rates[1e-6] == 1.0
    assert rates[None] == pytest.approx(0, abs=1e-12)


def test_bop_with_an_unreachable_threshold_flips_nothing() -> None:
    x, y = images()
    method = made(optimizer="bop", bop_tau=1e9)
    before = [t.latent.detach().clone() for t in quantized_tensors(method.net)]
    for _ in range(3):
        step(method, x, y)
    assert all(torch.equal(w, t.latent) for w, t in zip(before, quantized_tensors(method.net), strict=True))


# ---- all together ---------------------------------------------------------------------------------------------------


COMBINATIONS = 40


def shuffled(name: str, values: Sequence[Any]) -> list[Any]:
    """One value for each combination, every value about equally often."""
    repeated = [values[i % len(values)] for i in range(COMBINATIONS)]
    random.Random(name).shuffle(repeated)
    return repeated


def draw(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A random value for every switch of the net and of the method."""
    rng = random.Random(seed)
    topology: dict[str, Any] = {name: shuffled(name, values)[seed] for name, values in CHOICES.items()}
    topology |= {"double_residual": rng.random() < 0.5, "ensemble": rng.choice([1, 1, 2])}
    training: dict[str, Any] = {name: shuffled(name, values)[seed] for name, values in VALUES.items()}
    training["latent_clip"] = rng.choice([0.0, 1.0])
    if training["optimizer"] == "bop":
        training |= {"weight_binarizer": "identity", "weight_norm": "none", "stages": "one"}
    if training["features"] == "float" and training["regularizer"] in ("distribution", "entropy"):
        training["regularizer"] = "none"
    return topology, training


@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_any_combination_of_switches_builds_steps_and_deploys(seed: int) -> None:
    topology, training = draw(seed)
    net = qlab.build("repair20", (1, 8, 8), 10, width=4, blocks=(1, 1), seed=seed, **topology)
    teacher = net if seed % 2 else None
    method = made(net, teacher=teacher, **training, lr=1e-3)
    x, y = images()
    x = x.float()
    for i in range(3):
        method.steps = 4 * i  # steps 0, 4 and 8 of 10: through all stages
        assert math.isfinite(step(method, x, y)), (topology, training)
    deployed = method.deployed([x])
    assert not any(hasattr(m, "parametrizations") for m in deployed.modules())
    logits = deployed(x)
    assert logits.shape == (8, 10)
    assert logits.isfinite().all()
    for t in quantized_tensors(method.net):
        assert torch.isin(t.quantizer.level(t.latent), t.quantizer.levels()).all()  # type: ignore[arg-type]


def test_every_value_of_every_switch_is_drawn_above() -> None:
    draws = [draw(seed) for seed in range(COMBINATIONS)]
    for i, values in ((0, CHOICES), (1, VALUES)):
        for name, known in values.items():
            assert {d[i][name] for d in draws} == set(known), name


@pytest.mark.parametrize(
    "options",
    [
        {"stages": "two", "feature_binarizer": "ede", "weight_binarizer": "recu", "scaling": "pow2"},
        {"stages": "soft_sign", "optimizer": "sgd", "lr": 0.05, "first_last": "int8", "regularizer": "distribution"},
        {"optimizer": "bop", "features": "halfwave"},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any], tmp_path: Any) -> None:
    def run(epochs: int, **more: Any) -> qlab.Run:
        method = create("bnn_repair", small_net(), seed=0, **options)
        return qlab.fit(method, moons(), epochs=epochs, progress=False, **more)

    whole = run(2)
    half = run(2, callbacks=[StopAt(7)])
    assert half.method.steps == 7
    rest = run(2, resume=half.save(tmp_path) / "checkpoint.ckpt")
    a, b = whole.method.state_dict(), rest.method.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], Tensor))
    again = qlab.load(rest.save(tmp_path / "again") / "checkpoint.ckpt")
    assert dict(again.hparams) == dict(rest.method.hparams)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_binarizer": "recu"}, "feature_binarizer"),
        ({"weight_norm": "batch"}, "weight_norm must be one of none, center"),
        ({"first_last": "int4"}, "first_last must be one of"),
        ({"stages": "three"}, "stages must be one of"),
        ({"stage_end": 1.0}, r"stage_end must be in \(0, 1\)"),
        ({"latent_clip": -1.0}, "latent_clip"),
        ({"teacher_weight": 1.5}, "teacher_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"regularizer_weight": -1.0}, "regularizer_weight"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_end": 1e300, "stages": "soft_sign"}, "beta_end"),
        ({"teacher_weight": float("inf"), "teacher_loss": "rbd"}, "teacher_weight"),
        ({"bnnplus_alpha": float("nan"), "regularizer": "bnnplus_l2"}, "bnnplus_alpha"),
        ({"bop_gamma": 0.0}, "bop_gamma"),
        ({"gain": 0.0, "weight_norm": "l2"}, "gain must be positive"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"optimizer": "bop", "weight_norm": "center"}, "bop has no latent weights"),
        ({"optimizer": "bop", "stages": "two"}, "bop has no latent weights"),
        ({"optimizer": "bop", "weight_binarizer": "polynomial"}, "bop has no latent weights"),
        ({"features": "float", "regularizer": "distribution"}, "features='float' has none"),
        ({"regularizer": "label_smoothing", "loss": "squared_hinge"}, "label_smoothing is of the cross entropy"),
        ({"teacher": 3}, "teacher must be"),
    ],
)
def test_impossible_values_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**options)


def test_decay_ends_at_the_very_step_at_which_weights_are_binary() -> None:
    method = made(stages="two", stage_end=0.07, regularizer="wd", regularizer_weight=0.1)
    method._run_length = 100
    for step in (6, 7, 8):  # 0.07 * 100 is above 7 in floating point
        method.steps = step
        assert method._adds == (method.schedule(step / 100)["lam"] < 1)
