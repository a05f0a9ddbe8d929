"""The repairable nets: contract of the models for every switch, formulas of their parts, what is redundant and what is not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qlab
from qlab.errors import InputError
from qlab.models.repair_blocks import (
    CHOICES,
    Centre,
    ChannelScale,
    Deviation,
    Duplicate,
    Ensemble,
    Gate,
    InputScale,
    PadChannels,
    RankOneScale,
    Repairs,
    RPReLU,
    Threshold,
    Unit,
    shortcut,
)
from qlab.quantizers import Sign, hard_sign, layers, quantize, quantized_tensors

ONE_AT_A_TIME: list[dict[str, Any]] = [{name: value} for name, values in CHOICES.items() for value in values]
ONE_AT_A_TIME += [{"double_residual": True}, {"ensemble": 3}, {"affine": False}, {"final_norm": True}]


def random_options(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    options: dict[str, Any] = {name: rng.choice(values) for name, values in CHOICES.items()}
    return options | {"double_residual": rng.random() < 0.5, "ensemble": rng.choice([1, 2])}


SETTINGS = ONE_AT_A_TIME + [random_options(seed) for seed in range(8)]


def built(options: dict[str, Any], name: str = "repair20", shape: tuple[int, ...] = (3, 9, 8)) -> Any:
    return qlab.build(name, shape, 5, **{"width": 4, "blocks": (1, 1), "seed": 0, **options}).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def binary(net: nn.Module) -> nn.Module:
    return quantize(net, Sign, Sign, keep=("first", "last"))


# ---- the contract of the models, for every switch ---------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_modules_run_in_the_order_of_their_registration(options: dict[str, Any]) -> None:
    net = built(options)
    leaves = [name for name, module in net.named_modules() if not list(module.children())]
    ran: list[str] = []
    for name in leaves:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    net(draw(2, 3, 9, 8))
    assert ran == leaves


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_every_binary_layer_reads_signs_and_nothing_else_is_replaced(options: dict[str, Any]) -> None:
    net = built(options)
    q = binary(net)
    inner = list(layers(q))[1:-1]
    signs = [m for name, m in q.named_modules() if isinstance(m, Sign) and "parametrizations" not in name]
    assert len(signs) == len(inner) == len(list(quantized_tensors(q)))
    assert not any(isinstance(m, nn.Hardtanh | nn.ReLU) for m in q.modules())
    read = []
    for name in inner:
        q.get_submodule(name).register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].detach()))
    q(draw(2, 3, 9, 8))
    assert len(read) == len(inner)
    assert all(set(x.unique().tolist()) <= {-1.0, 1.0} for x in read)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_fx_vmap_and_gradients_go_through(options: dict[str, Any]) -> None:
    net = built(options)
    x = draw(4, 3, 9, 8)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    one_by_one = torch.cat([net(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(net(x), one_by_one, atol=1e-10, rtol=1e-10)
    params = {k: torch.stack([v, 1.1 * v]).detach() for k, v in net.named_parameters()}
    buffers = {k: torch.stack([v, v]) for k, v in net.named_buffers()}
    both = torch.vmap(lambda p, b: torch.func.functional_call(net, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(both[0], net(x), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_spec_builds_the_net_again(options: dict[str, Any]) -> None:
    net = built(options)
    again = qlab.build(net.spec)
    assert again.spec == net.spec
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [(k, v.shape) for k, v in net.state_dict().items()]


@pytest.mark.parametrize("name", ["repair20", "repair18"])
def test_defaults_have_the_layers_of_the_residual_nets(name: str) -> None:
    with torch.device("meta"):
        net = qlab.build(name, (3, 32, 32), 10)
        plain = qlab.build(name.replace("repair", "resnet"), (3, 32, 32), 10)
    # in repair18 the three 1x1 convolutions of the shortcuts are no layers that a method would binarize
    shapes = [tuple(m.weight.shape) for m in layers(net).values()]
    expected = [tuple(m.weight.shape) for m in layers(plain).values() if m.weight.shape[-1] != 1 or m.weight.dim() == 2]
    assert shapes == expected
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain.parameters())


def test_large_stem_and_measured_topology() -> None:
    net = qlab.build("repair18", (3, 64, 48), 10, width=4, stem="large", scaling="xnorpp")
    assert net(torch.zeros(2, 3, 64, 48)).shape == (2, 10)
    digits = qlab.build("repair20", (1, 8, 8), 10, width=8, blocks=(6, 1, 1), multiples=(1, 2, 2))
    assert [m.out_channels for m in layers(digits).values() if isinstance(m, nn.Conv2d)] == [8] * 13 + [16] * 4


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_double_residual_is_one_shortcut_for_each_convolution() -> None:
    x = draw(2, 4, 6, 6)
    for double in (False, True):
        block = built({"double_residual": double, "blocks": (1,), "activation": "prelu"}, shape=(3, 6, 6)).stages[0][0]
        one, two = block.unit1, block.unit2

        def unit(u: Any, v: Tensor) -> Tensor:
            return u.bn(F.conv2d(F.hardtanh(v), u.conv[1].weight, padding=1))

        h = F.prelu(unit(one, x) + (x if double else 0), one.activation.weight)
        out = F.prelu(unit(two, h) + (h if double else x), two.activation.weight)
        torch.testing.assert_close(block(x), out)


def test_order_bn_conv_normalises_before_the_sign_and_not_after() -> None:
    unit = Unit(4, 4, 1, (5, 5), Repairs(order="bn_conv"), None).double()
    x = 3 + 2 * draw(8, 4, 5, 5)
    z = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(unit(x, x), F.conv2d(F.hardtanh(z), unit.conv[1].weight, padding=1))


# ---- shortcuts --------------------------------------------------------------------------------------------------------


def test_shortcuts_are_what_their_names_say() -> None:
    x = draw(2, 3, 6, 6)
    pooled = x.reshape(2, 3, 3, 2, 3, 2).mean((3, 5))
    zeros = torch.zeros(2, 2, 3, 3, dtype=torch.float64)

    def made(downsample: str) -> nn.Module:
        return shortcut(3, 6, 2, Repairs(downsample=downsample)).double().eval()

    torch.testing.assert_close(made("pool")(x), torch.cat([zeros[:, :1], pooled, zeros], 1))
    assert torch.equal(made("subsample")(x), torch.cat([zeros[:, :1], x[:, :, ::2, ::2], zeros], 1))
    torch.testing.assert_close(made("duplicate")(x), torch.cat([pooled, pooled], 1))
    one = (1 + 1e-5) ** -0.5  # batch norm at its start
    conv = made("float")
    torch.testing.assert_close(conv(x), one * torch.einsum("oi,nihw->nohw", conv[1].weight[:, :, 0, 0], pooled))
    conv = made("binary")
    inside = F.hardtanh(pooled)
    torch.testing.assert_close(conv(x), one * torch.einsum("oi,nihw->nohw", conv[2].weight[:, :, 0, 0], inside))
    assert isinstance(shortcut(4, 4, 1, Repairs()), nn.Identity)


def test_duplicated_shortcut_is_two_convolutions_that_add_the_same_input() -> None:
    """ReActNet's: two convolutions C -> C, both add the pooled input, side by side; here one convolution C -> 2C."""
    unit = Unit(3, 6, 2, (3, 3), Repairs(downsample="duplicate"), (3, 2)).double().eval()
    x = draw(2, 3, 6, 6)
    pooled = F.avg_pool2d(x, 2)
    halves = [
        F.conv2d(F.hardtanh(x), half, stride=2, padding=1) / (1 + 1e-5) ** 0.5 + pooled
        for half in unit.conv[1].weight.chunk(2)
    ]
    torch.testing.assert_close(unit(x, x), torch.cat(halves, 1))


def test_duplicate_refuses_what_is_no_multiple() -> None:
    with pytest.raises(InputError, match="no multiple"):
        Duplicate(4, 6)


def test_float_shortcut_stays_float_in_a_binary_net() -> None:
    q = binary(built({"downsample": "float"}))
    assert "stages.1.0.unit2.shortcut.1.weight" in dict(q.named_parameters())
    assert len(list(quantized_tensors(q))) == 4


# ---- feature normalization --------------------------------------------------------------------------------------------


def test_rsign_is_a_sign_at_a_threshold_with_the_negative_sum_of_slopes_as_its_gradient() -> None:
    threshold = Threshold(3).double()
    assert torch.equal(threshold.theta.detach(), torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        threshold.theta.copy_(torch.tensor([-0.5, 0.0, 0.7]))
    x, g = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    shifted = x - threshold.theta.detach()[:, None, None]
    out = Sign("polynomial")(threshold(x))
    assert torch.equal(out, hard_sign(shifted))
    got = torch.autograd.grad((out * g).sum(), threshold.theta)[0]
    expected = -((2 - 2 * shifted.abs()).clamp(min=0) * g).sum((0, 2, 3))
    torch.testing.assert_close(got, expected)


def test_rsign_behind_a_batch_norm_is_the_same_function_as_another_bias() -> None:
    x = draw(8, 3, 4, 4)
    bn, threshold = nn.BatchNorm2d(3).double(), Threshold(3).double()
    with torch.no_grad():
        threshold.theta.copy_(draw(3))
        moved = nn.BatchNorm2d(3).double()
        moved.bias.copy_(-threshold.theta)
    assert torch.equal(hard_sign(threshold(bn(x))), hard_sign(moved(x)))
    total = bn(x) + x  # behind a residual sum the threshold is not redundant: the sum is not the batch norm's
    assert not torch.equal(hard_sign(threshold(total)), hard_sign(moved(total)))


def test_sample_statistics() -> None:
    x = 3 + 2 * draw(4, 3, 5, 5)
    torch.testing.assert_close(Centre()(x).mean((2, 3)), torch.zeros(4, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    y = Deviation()(x)
    torch.testing.assert_close(y.flatten(1).std(1, correction=0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(hard_sign(y), hard_sign(x))
    assert Deviation()(torch.ones(2, 3, 4, 4)).isfinite().all()


def test_std_sample_changes_no_output_of_a_binary_net_and_its_gradients() -> None:
    x = draw(4, 3, 9, 8)
    plain, scaled = built({"blocks": (1,)}), built({"blocks": (1,), "feature_norm": "std_sample"})
    a, b = binary(plain), binary(scaled)
    assert torch.equal(a(x), b(x))
    ga, gb = (torch.autograd.grad(net(x).square().sum(), next(net.parameters()))[0] for net in (a, b))
    assert not torch.allclose(ga, gb)


# ---- activations ------------------------------------------------------------------------------------------------------


def test_rprelu_and_its_special_cases() -> None:
    f, x = RPReLU(3).double(), draw(2, 3, 4, 4)
    torch.testing.assert_close(f(x), F.leaky_relu(x, 0.25))  # gamma = zeta = 0: PReLU
    gamma, zeta = draw(3, seed=1), draw(3, seed=2)
    with torch.no_grad():
        f.gamma.copy_(gamma)
        f.zeta.copy_(zeta)
    c, d = gamma[:, None, None], zeta[:, None, None]
    torch.testing.assert_close(f(x), torch.where(x > c, x - c, 0.25 * (x - c)) + d)
    torch.testing.assert_close(f(c.expand(1, 3, 4, 4)), d.expand(1, 3, 4, 4))  # f(gamma) = zeta: continuous there
    with torch.no_grad():
        f.slope.fill_(1)
    torch.testing.assert_close(f(x), x + (d - c))
    with torch.no_grad():
        f.slope.fill_(0)
    torch.testing.assert_close(f(x), F.relu(x - c) + d)


@pytest.mark.parametrize("activation", ["hardtanh", "prelu"])
def test_monotone_activation_is_invisible_where_only_a_sign_reads_it(activation: str) -> None:
    """Of the first unit of a block without double residual; the second one's output is read by the residual sum too."""
    x = draw(4, 4, 6, 6)

    def block(name: str) -> Tensor:
        net = binary(built({"activation": name, "blocks": (1,)}, shape=(3, 6, 6)))
        read: list[Tensor] = []
        net.stages[0][0].unit2.conv[1].register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
        net.stages[0][0](x)
        return read[0]

    assert torch.equal(block(activation), block("identity"))


def test_relu_right_before_a_sign_destroys_all_information() -> None:
    net = binary(built({"activation": "relu", "blocks": (1,)}, shape=(3, 6, 6)))
    read: list[Tensor] = []
    net.stages[0][0].unit2.conv[1].register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
    net(draw(4, 3, 6, 6))
    assert (read[0] == 1).all()


# ---- scales, gates, ensembles -----------------------------------------------------------------------------------------


def test_scales_are_what_their_formulas_say() -> None:
    y = draw(2, 3, 4, 5)
    a, b, c = draw(3, seed=1), draw(4, seed=2), draw(5, seed=3)
    channel, rank_one = ChannelScale(3).double(), RankOneScale(3, 4, 5).double()
    assert torch.equal(channel(y), y)
    assert torch.equal(rank_one(y), y)
    with torch.no_grad():
        channel.alpha.copy_(a)
        rank_one.alpha.copy_(a)
        rank_one.beta.copy_(b)
        rank_one.gamma.copy_(c)
    torch.testing.assert_close(channel(y), torch.einsum("nchw,c->nchw", y, a))
    torch.testing.assert_close(rank_one(y), torch.einsum("nchw,c,h,w->nchw", y, a, b, c))


def test_channel_scale_is_absorbed_by_batch_norm_and_rank_one_scale_is_not() -> None:
    y, bn = draw(4, 3, 4, 4), nn.BatchNorm2d(3, eps=1e-15).double()
    channel, rank_one = ChannelScale(3).double(), RankOneScale(3, 4, 4).double()
    with torch.no_grad():
        channel.alpha.copy_(draw(3, seed=1).abs() + 0.1)
        rank_one.beta.copy_(draw(4, seed=2).abs() + 0.1)
    torch.testing.assert_close(bn(channel(y)), bn(y), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(bn(rank_one(y)), bn(y), atol=1e-2)


@pytest.mark.parametrize("stride", [1, 2])
def test_input_scale_is_the_mean_magnitude_under_a_box_filter(stride: int) -> None:
    v = draw(2, 3, 6, 7)
    A = v.abs().mean(1, keepdim=True)
    box = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    torch.testing.assert_close(InputScale(stride)(v), F.conv2d(A, box, stride=stride, padding=1))


def test_gate_is_the_r2b_formula_and_starts_neutral_where_its_last_matrix_is_zero() -> None:
    gate, v = Gate(8, 6, 4, True).double(), draw(3, 8, 4, 4)
    hidden = F.relu(v.mean((2, 3)) @ gate.squeeze.T + gate.squeeze_bias)
    torch.testing.assert_close(gate(v)[:, :, 0, 0], torch.sigmoid(hidden @ gate.excite.T + gate.excite_bias))
    with torch.no_grad():
        gate.excite.zero_()
    assert torch.equal(gate(v), torch.full((3, 6, 1, 1), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("place", ["gate", "output"])
def test_neutral_gate_is_absorbed_by_the_batch_norm_behind(place: str) -> None:
    x = draw(4, 4, 5, 5)
    torch.manual_seed(0)
    gated = Unit(4, 4, 1, (5, 5), Repairs(squeeze_excite=place), (4, 1)).double()
    plain = Unit(4, 4, 1, (5, 5), Repairs(), (4, 1)).double()
    plain.conv[1].weight = gated.conv[1].weight
    gated.bn.eps = plain.bn.eps = 1e-15
    assert not torch.allclose(gated(x, x), plain(x, x), atol=1e-2)
    with torch.no_grad():
        (gated.gate if place == "gate" else gated.output_gate).excite.zero_()
    torch.testing.assert_close(gated(x, x), plain(x, x), atol=1e-9, rtol=1e-9)


def test_ensemble_of_equal_branches_is_one_convolution() -> None:
    ensemble, v = Ensemble(3, 4, 5, 2).double(), draw(2, 4, 6, 6)
    starts = [branch[0].theta.item() for branch in ensemble.branches]
    assert starts == [-0.5, 0.0, 0.5]
    torch.testing.assert_close(ensemble.weights.detach(), torch.full((3,), 1 / 3, dtype=torch.float64))
    by_hand = sum(
        F.conv2d(F.hardtanh(v - t), b[2].weight, stride=2, padding=1) / 3
        for t, b in zip(starts, ensemble.branches, strict=True)
    )
    torch.testing.assert_close(ensemble(v), by_hand)
    with torch.no_grad():
        for branch in ensemble.branches:
            branch[0].theta.zero_()
            branch[2].weight.copy_(ensemble.branches[0][2].weight)
    one = F.conv2d(F.hardtanh(v), ensemble.branches[0][2].weight, stride=2, padding=1)
    torch.testing.assert_close(ensemble(v), one)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; expected one of identity, relu"),
        ({"order": "conv"}, "order is"),
        ({"downsample": "A"}, "downsample is 'A'"),
        ({"blocks": ()}, "blocks has 0 blocks"),
        ({"blocks": (65536,) * 64}, "expected from 1 to 64"),
        ({"blocks": (1,) * 64, "width": 4}, "channels; at most"),
        ({"blocks": (1, 1), "multiples": (1,)}, "multiples has 1 entries, blocks 2"),
        ({"blocks": (1, 1), "multiples": (2, 1)}, "never decrease"),
        ({"ensemble": 17}, "at most 16 branches"),
        ({"ensemble": 0}, "ensemble is 0"),
        ({"double_residual": 1}, "double_residual is 1; expected True or False"),
        ({"stem": "medium"}, "stem is"),
        ({"width": 4, "blocks": (1, 1), "multiples": (2, 3), "downsample": "duplicate"}, "no multiple"),
    ],
    ids=str,
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        qlab.build("repair20", (3, 8, 8), 5, **options)


def test_padding_of_channels_splits_what_is_missing() -> None:
    y = PadChannels(3, 8, False)(torch.ones(1, 3, 2, 2))
    assert y[0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
