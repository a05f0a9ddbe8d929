"""QNN: what training keeps invariant, which gradients are rounded, and that the packed net is the deployed one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_networks.qnn import QNN
from qlab.methods.binary_networks.shift import ShiftAdaMax, ShiftBatchNorm
from qlab.methods.binary_weights.binary_connect import glorot
from qlab.quantizers import Sign, hard_sign, layers, quantized_tensors, quantizers
from qlab.quantizers.kbit import KBit, ap2, linear_scaled, log_quantize
from tests.methods.conftest import moons, small_net, train
from tests.methods.test_contract import StopAt

PAPER: dict[str, Any] = {"keep": ()}
SHIFT: dict[str, Any] = {"shift_norm": True, "optimizer": "shift_adamax", "lr": 2.0**-6, "halvings": 3}


def digits_net(**options: Any) -> Any:
    return qlab.build("mlp", (1, 8, 8), 10, **{"hidden": (65, 64), "final_norm": True, "seed": 0} | options)


def digits() -> Any:
    return qlab.data.load("digits", batch_size=50)


# ---- invariants of training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, SHIFT, {"stochastic_neurons": True, "stochastic_weights": True}, {"weight_bits": 2}]
)
def test_latents_start_and_stay_within_one(options: dict[str, Any]) -> None:
    method = create("qnn", small_net(), **PAPER, **options)
    start = torch.cat([t.latent.detach().flatten() for t in quantized_tensors(method.net)])
    assert start.abs().max() <= 1
    assert start.abs().mean() == pytest.approx(0.5, abs=0.06)  # U(-1, 1), not the net's own
    run = train("qnn", method=method)
    for t in quantized_tensors(run.method.net):
        assert t.latent.abs().max() <= 1


def test_without_the_clamp_they_leave() -> None:
    run = train("qnn", method=create("qnn", small_net(), **PAPER, clamp=False, lr=0.3), epochs=3)
    assert max(float(t.latent.detach().abs().max()) for t in quantized_tensors(run.method.net)) > 1


def test_only_the_signs_of_latents_matter_to_the_output() -> None:
    method = create("qnn", small_net(), **PAPER)
    x = moons().calibration(1)[0]
    before = method(x)
    with torch.no_grad():
        for t in quantized_tensors(method.net):
            t.latent.mul_(0.5)
    assert torch.equal(method(x), before)


def test_first_layer_reads_real_inputs_and_all_others_signs() -> None:
    method = create("qnn", digits_net(), **PAPER)
    seen: dict[str, Tensor] = {}
    for name, layer in layers(method.net).items():
        layer.register_forward_hook(lambda m, i, y, name=name: seen.update({name: i[0], f"{name}.weight": m.weight}))
    method(digits().calibration(1)[0])
    first, *rest = layers(method.net)
    assert len(seen[first].unique()) > 2
    for name in rest:
        assert torch.equal(seen[name].abs(), torch.ones_like(seen[name]))
    for name in layers(method.net):
        assert torch.equal(seen[f"{name}.weight"].abs(), torch.ones_like(seen[f"{name}.weight"]))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("grid", ["odd", "linear", "log"])
def test_weights_and_activations_of_more_bits_are_on_their_levels(bits: int, grid: Any) -> None:
    method = create("qnn", digits_net(), **PAPER, weight_bits=bits, activation_bits=bits, grid=grid)
    assert all(isinstance(q, KBit) and q.bits == bits and q.grid == grid for q in quantizers(method.net))
    seen: list[Tensor] = []
    for layer in list(layers(method.net).values())[1:]:
        layer.register_forward_hook(lambda m, i, y: seen.extend((i[0], m.weight)))
    method(digits().calibration(1)[0])
    levels = KBit(bits, grid).levels()
    assert all(torch.isin(v, levels).all() for v in seen)


# ---- stochastic neurons and weights ----------------------------------------------------------------------------------


def test_stochastic_training_is_tested_and_deployed_without_draws() -> None:
    method = create("qnn", small_net(), **PAPER, stochastic_neurons=True, stochastic_weights=True)
    x = moons().calibration(1)[0]
    method.begin_step(10)
    first = method(x)
    assert torch.equal(method(x), first)  # the draw of a step stays for the step
    method.steps = 1
    method.begin_step(10)
    assert not torch.equal(method(x), first)
    method.eval()
    assert torch.equal(method(x), method(x))
    net = method.deployed([x])
    for t in quantized_tensors(method.net):
        assert torch.equal(dict(net.named_parameters())[f"{t.name}.weight"], hard_sign(t.latent.detach()))
    assert torch.equal(net(x), net(x))


def test_every_place_has_draws_of_its_own() -> None:
    method = create("qnn", small_net(), **PAPER, stochastic_neurons=True, stochastic_weights=True)
    method.begin_step(10)
    draws = [q.draw for q in quantizers(method.net) if isinstance(q, KBit)]
    assert len(set(draws)) == len(draws) == 5


# ---- window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1.0, 1.25])
def test_gradient_of_activations_passes_up_to_the_window(window: float) -> None:
    method = create("qnn", small_net(), window=window)
    sign = next(m for m in method.net.hidden if isinstance(m, Sign))
    x = torch.tensor([-1.3, -1.25, -1.1, -1.0, -0.0, 0.0, 1.0, 1.25, 1.3], requires_grad=True)
    y = sign(x)
    assert torch.equal(y, hard_sign(x))
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, (x.abs() <= window).float())
    primitive = sign.primitive()
    assert primitive is not None
    (slope,) = torch.autograd.grad(primitive(x).sum(), x)
    assert torch.equal(slope, g)


# ---- quantized gradients ---------------------------------------------------------------------------------------------


def gradients(method: QNN, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    parameters = dict(method.net.named_parameters())
    found = torch.autograd.grad(method.objective(x, y), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize(("grid", "quantize"), [("log", log_quantize), ("linear", linear_scaled)])
def test_both_products_of_the_last_layer_use_the_rounded_gradient(grid: Any, quantize: Any) -> None:
    method: QNN = create("qnn", digits_net(final_norm=False), **PAPER, gradient_bits=4, gradient_grid=grid)
    data = digits()
    x, y = next(iter(data.train_dataloader()))
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["input"] = inputs[0]
        inputs[0].register_hook(lambda g: kept.update(g_input=g))

    layer = method.net.fc
    handle = layer.register_forward_hook(keep)
    found = gradients(method, x, y)
    handle.remove()
    logits = method.net(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(method.loss(logits, y), logits)
    rounded = quantize(g, 4)
    weight = layer.weight.detach()
    assert len(rounded.abs().unique()) <= 8
    assert not torch.allclose(rounded, g)
    assert torch.allclose(kept["g_input"], rounded @ weight, atol=1e-6)
    assert torch.allclose(found["fc.parametrizations.weight.original"], rounded.T @ kept["input"], atol=1e-6)
    assert torch.allclose(found["fc.bias"], rounded.sum(0), atol=1e-6)


def test_every_layer_gets_a_rounded_gradient_and_only_in_a_training_step() -> None:
    method: QNN = create("qnn", digits_net(), **PAPER, gradient_bits=3)
    x, y = next(iter(digits().train_dataloader()))
    seen: list[Tensor] = []
    method.rewrite = lambda g, noise: seen.append(g) or QNN.rewrite(method, g, noise)  # type: ignore[method-assign]
    gradients(method, x, y)
    assert [g.shape for g in seen] == [(50, 10), (50, 64), (50, 65)]  # from the last layer to the first
    plain = copy.deepcopy(method)
    plain.h["gradient_bits"] = None
    seen.clear()
    torch.autograd.grad(method.loss(method.net(x), y), list(method.net.parameters()))
    assert not seen  # a tool that takes gradients of the net gets those of the net
    assert gradients(plain, x, y).keys() == gradients(method, x, y).keys()


@pytest.mark.parametrize("grid", ["log", "linear"])
def test_random_rounding_of_gradients_repeats_by_step_and_averages_to_the_float_gradient(grid: Any) -> None:
    method: QNN = create("qnn", digits_net(), **PAPER, gradient_bits=6, gradient_grid=grid, gradient_stochastic=True)
    x, y = next(iter(digits().train_dataloader()))
    name = "fc.0.parametrizations.weight.original"  # behind one rounding only, so the mean is exact

    def at(step: int) -> Tensor:
        method.steps, method._passes = step, 0
        return gradients(method, x, y)[name]

    assert torch.equal(at(3), at(3))
    assert not torch.equal(at(3), at(4))
    draws = torch.stack([at(step) for step in range(120)]).double()
    plain: QNN = create("qnn", digits_net(), **PAPER)
    exact = gradients(plain, x, y)[name].double()
    error = (draws.mean(0) - exact) / (draws.std(0) / 120**0.5)
    assert error.abs().median() < 1  # 0.67 for normal errors
    assert (error.abs() < 4).double().mean() > 0.99
    assert torch.equal(method.net.fc[0].weight, plain.net.fc[0].weight)


# ---- optimizers and learning rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "power"), [("adam", 1), ("sgd", 2)])
def test_updates_of_latents_are_multiplied_by_the_layers_factor(optimizer: Any, power: int) -> None:
    method = create("qnn", small_net(), **PAPER, optimizer=optimizer, lr=0.01)
    groups = {id(p): g for g in method.make_optimizer().param_groups for p in g["params"]}
    for t in quantized_tensors(method.net):
        assert groups[id(t.latent)]["lr"] == pytest.approx(0.01 / glorot(t.latent.shape) ** power)
    plain = create("qnn", small_net(), **PAPER, optimizer=optimizer, lr=0.01, glorot_lr=False)
    assert {g["lr"] for g in plain.make_optimizer().param_groups} == {0.01}


def test_shift_adamax_gets_the_power_of_two_next_to_the_factor() -> None:
    method = create("qnn", digits_net(), **PAPER, **SHIFT)
    optimizer = method.make_optimizer()
    assert isinstance(optimizer, ShiftAdaMax)
    scale = {id(p): g["scale"] for g in optimizer.param_groups for p in g["params"]}
    for t in quantized_tensors(method.net):
        assert scale[id(t.latent)] == float(ap2(torch.tensor(1 / glorot(t.latent.shape))))
    assert all(scale[id(p)] == 1 for n, p in method.net.named_parameters() if "original" not in n)


def test_halvings_are_shifts_at_even_distances() -> None:
    method = create("qnn", small_net(), halvings=3)
    assert [method.lr_factor(p) for p in (0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 0.999, 1.0)] == [
        1, 1, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125,
    ]  # fmt: skip
    assert create("qnn", small_net()).lr_factor(1.0) == pytest.approx(1e-3)


# ---- the shift-based net through the life of a method ----------------------------------------------------------------


def test_shift_based_training_resumes_bit_for_bit_and_loads_from_a_checkpoint(tmp_path: Any) -> None:
    def fresh() -> Any:
        return create("qnn", small_net(), seed=0, **PAPER, **SHIFT, stochastic_neurons=True, gradient_bits=4)

    whole = train("qnn", method=fresh(), epochs=2)
    part = train("qnn", method=fresh(), epochs=2, callbacks=[StopAt(7)])
    rest = train("qnn", method=fresh(), epochs=2, resume=part)
    ours, theirs = whole.method.state_dict(), rest.method.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if isinstance(v, Tensor))
    method = qlab.load(whole.save(tmp_path) / "checkpoint.ckpt")
    assert any(isinstance(m, ShiftBatchNorm) for m in method.net.modules())
    x = moons().calibration(1)[0]
    assert torch.equal(method.deployed()(x), whole.deployed(x))
    assert torch.equal(copy.deepcopy(method).eval()(x), method.eval()(x))


def test_deployed_shift_based_net_has_ordinary_norms_with_powers_of_two() -> None:
    method = create("qnn", digits_net(), **PAPER, **SHIFT)
    run = qlab.fit(method, digits(), epochs=1, progress=False)
    norms = [m for m in run.deployed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(m) for m in norms] == [nn.BatchNorm1d] * 3
    for norm in norms[:2]:
        for t in (norm.weight, norm.running_var):
            assert torch.equal(ap2(t), t)
        assert norm.eps == 0
    twin = copy.deepcopy(run.method.net)  # the same function: hard weights are the weights of one bit
    for theirs, ours in zip(twin.modules(), run.method.net.modules(), strict=True):
        assert type(theirs) is type(ours)
    batches = digits().calibration(32)
    qlab.quantizers.reestimate_batch_norm(twin.eval(), batches)
    assert torch.allclose(run.method.deployed(batches)(batches[0]), twin(batches[0]), atol=1e-4)


# ---- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, PAPER, {**PAPER, **SHIFT}, {**PAPER, "stochastic_neurons": True, "window": 1.25}], ids=str
)
def test_packed_net_has_the_logits_of_the_deployed_one(options: dict[str, Any]) -> None:
    method = create("qnn", digits_net(), **options)
    with torch.no_grad():  # scales of both signs, and one of zero
        for m in method.net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.copy_(torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(0)))
                m.weight[0] = 0.0
    data = digits()
    run = qlab.fit(method, data, epochs=2, progress=False, test=False)
    x = data.transform(data.split("test").x)
    weights = [m.weight for m in run.deployed.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all((w < 0).any() and (w > 0).any() for w in weights)
    packed = qlab.binary.compile(run.deployed, x[:2])
    assert packed.verify(x).equal
    if "keep" in options:
        assert torch.equal(packed(x), run.deployed(x))
    else:  # a float layer on bits is another order of the same sums
        torch.testing.assert_close(packed(x), run.deployed(x))
        assert torch.equal(packed(x).argmax(1), run.deployed(x).argmax(1))
    runs = [row["runs"] for row in packed.graph.layers]
    assert runs == ["sign weights", "bits", "bits" if "keep" in options else "float"]


def test_the_first_layer_runs_on_the_bit_planes_of_the_image() -> None:
    data = digits()
    run = qlab.fit(create("qnn", digits_net(), **PAPER), data, epochs=1, progress=False, test=False)
    raw = data.split("test").x
    packed = qlab.binary.compile(run.deployed, raw[:2], image=(data.mean, data.std))
    assert [row["runs"] for row in packed.graph.layers] == ["bit planes", "bits", "bits"]
    assert torch.equal(packed(raw).argmax(1), run.deployed(data.transform(raw)).argmax(1))
    assert packed.verify(raw).equal


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamax"},
        {"gradient_grid": "odd"},
        {"gradient_bits": 1},
        {"gradient_bits": 9},
        {"halvings": -1},
        {"halvings": 1.5},
        {"weight_bits": 0},
        {"activation_bits": 17},
        {"weight_bits": 2, "grid": "none"},
        {"activation_bits": 9, "grid": "log"},
        {"window": 0.9},
    ],
    ids=str,
)
def test_what_is_out_of_range_is_said_in_one_error(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"must be"):
        create("qnn", small_net(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": None, "gradient_bits": 6}, "give weight_bits too"),
        ({"optimizer": "shift_adamax", "weight_decay": 1e-4}, "weight_decay must be 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create("qnn", small_net(), **options)


def test_shift_norm_needs_batch_norm() -> None:
    with pytest.raises(InputError, match="no batch norm"):
        create("qnn", qlab.build("mlp", (2,), 2, norm=False), shift_norm=True)
