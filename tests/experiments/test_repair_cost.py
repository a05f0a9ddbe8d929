"""The cost model: counts against numbers derived by hand for ResNet-20, thresholds against batch norm itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qlab
from qlab.errors import InputError
from qlab.experiments.repair_cost import ACCELERATOR, TEXTBOOK, Cost, count, energy, fold, unit_area
from qlab.quantizers import hard_sign


def cost(**options: Any) -> Cost:
    return count(qlab.build("repair20", (3, 32, 32), 10, **{"downsample": "subsample", **options}))


def extra(base: Cost, other: Cost) -> dict[str, int]:
    """What changes, by count."""
    pairs = {f.name: getattr(other, f.name) - getattr(base, f.name) for f in fields(Cost)}
    return {name: difference for name, difference in pairs.items() if difference}


BASE, DOUBLE = cost(), cost(double_residual=True)
OUTPUTS, INPUTS = 172_032, 184_320  # of the 18 binary convolutions: 6 (16 32^2 + 32 16^2 + 64 8^2), and what they read


def test_resnet20_by_hand() -> None:
    assert BASE.binary_macs == 40_108_032
    assert BASE.float_macs == 442_368 + 640
    assert BASE.binary_weights == 267_264
    assert BASE.float_weights == 432 + 640
    assert BASE.binary_outputs == OUTPUTS
    assert BASE.channels == 672
    assert BASE.comparisons == INPUTS
    assert (BASE.real_features, BASE.binary_features) == (86_016, 86_016)
    assert BASE.adds == 86_016 + 86_016 + 4096  # residual sums, batch norms that feed them, global pooling
    assert BASE.multiplies == 86_016


def test_double_residual_keeps_every_feature_and_computes_every_batch_norm() -> None:
    change = extra(BASE, DOUBLE)
    assert change.pop("adds") == 86_016 + 86_016  # as many more sums, and the shifts of as many batch norms
    assert change == {"multiplies": 86_016, "real_features": 86_016, "binary_features": -86_016}
    assert DOUBLE.multiplies == OUTPUTS
    assert DOUBLE.feature_bits(8) == 8 * OUTPUTS


@pytest.mark.parametrize(
    "options",
    [{"feature_norm": "bn"}, {"feature_norm": "rsign"}, {"feature_norm": "std_sample"}, {"scaling": "learned"}],
)
@pytest.mark.parametrize("double", [False, True])
def test_what_folds_costs_nothing(options: dict[str, Any], double: bool) -> None:
    assert cost(double_residual=double, **options) == (DOUBLE if double else BASE)


def test_scales_that_do_not_fold() -> None:
    assert extra(DOUBLE, cost(double_residual=True, scaling="xnorpp")) == {"multiplies": OUTPUTS}
    positions = 6 * 32**2 + 6 * 16**2 + 6 * 8**2
    change = extra(DOUBLE, cost(double_residual=True, scaling="input_map"))
    assert change == {"adds": INPUTS + 8 * positions, "multiplies": OUTPUTS}


def test_activations_cost_only_where_a_sum_follows() -> None:
    assert extra(DOUBLE, cost(double_residual=True, activation="prelu")) == {"multiplies": OUTPUTS}
    change = extra(DOUBLE, cost(double_residual=True, activation="rprelu"))
    assert change == {"multiplies": OUTPUTS, "adds": 2 * OUTPUTS}
    assert extra(BASE, cost(activation="prelu")) == {"multiplies": OUTPUTS // 2}


def test_a_factor_of_each_channel_folds_only_into_a_batch_norm_or_a_gate_behind_it() -> None:
    late = cost(order="bn_conv", double_residual=True)
    assert extra(late, cost(order="bn_conv", double_residual=True, scaling="learned")) == {"multiplies": OUTPUTS}
    early = cost(order="bn_conv")  # the first unit of a block folds into the threshold of the second
    assert extra(early, cost(order="bn_conv", scaling="learned")) == {"multiplies": OUTPUTS // 2}
    gated = {"order": "bn_conv", "double_residual": True, "squeeze_excite": "gate"}
    assert cost(**gated, scaling="learned") == cost(**gated)


def test_gate() -> None:
    change = extra(DOUBLE, cost(double_residual=True, squeeze_excite="gate"))
    assert change == {"adds": INPUTS, "float_macs": 7264, "float_weights": 7264, "sigmoids": 672, "multiplies": OUTPUTS}


def test_a_gate_makes_the_features_that_it_reads_real() -> None:
    assert cost(squeeze_excite="gate").binary_features == 0
    assert cost(feature_norm="center_sample").binary_features == 0


def test_float_shortcut() -> None:
    change = extra(BASE, cost(downsample="float"))
    assert change["float_macs"] == 2 * 131_072
    assert change["multiplies"] == 32 * 16**2 + 64 * 8**2  # its batch norm
    binary = extra(BASE, cost(downsample="binary"))
    assert binary["binary_macs"] == 2 * 131_072
    assert "float_macs" not in binary


def test_an_ensemble_multiplies_binary_macs_and_weights() -> None:
    three = cost(ensemble=3)
    assert three.binary_macs == 3 * BASE.binary_macs
    assert three.binary_weights == 3 * BASE.binary_weights
    assert three.channels == BASE.channels


def test_width_is_the_competing_use_of_the_same_cost() -> None:
    assert cost(width=32).binary_macs == 4 * BASE.binary_macs


def test_binary_first_and_last_layer() -> None:
    net = qlab.build("repair20", (3, 32, 32), 10)
    both = count(net, first_last_binary=True)
    assert both.float_macs == 0
    assert both.binary_macs == BASE.binary_macs + BASE.float_macs


def test_counting_leaves_the_net_alone_and_takes_any_dtype() -> None:
    net = qlab.build("repair20", (1, 8, 8), 10, width=4, seed=0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = count(net)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert count(net.double()) == first


def test_other_nets_are_refused() -> None:
    with pytest.raises(InputError, match="repair20 and repair18, not in a ResNet20"):
        count(qlab.build("resnet20", (3, 32, 32), 10))


def test_energy_by_hand() -> None:
    parts = energy(BASE, ACCELERATOR)
    assert parts["binary"] == pytest.approx(2.81, abs=0.005)
    assert parts["float"] == pytest.approx(0.36, abs=0.005)
    all_int8 = energy(Cost(float_macs=BASE.binary_macs + BASE.float_macs), ACCELERATOR)["total"]
    assert all_int8 == pytest.approx(32.8, abs=0.05)
    assert all_int8 / (parts["binary"] + parts["float"]) == pytest.approx(10.4, abs=0.05)
    assert energy(Cost(multiplies=OUTPUTS), ACCELERATOR)["other"] == pytest.approx(0.07, abs=0.001)
    moved = BASE.binary_weights + 8 * 1072 + 2 * (8 * 86_016 + 86_016)
    assert energy(BASE, TEXTBOOK)["memory"] == pytest.approx(1e-6 * moved * 10 / 32)
    for constants in (ACCELERATOR, TEXTBOOK):
        total = energy(BASE, constants)
        assert total["total"] == pytest.approx(sum(v for k, v in total.items() if k != "total"))


def test_area_needs_a_second_multiplier_only_where_there_are_multiplies() -> None:
    plain = Cost(float_macs=1, comparisons=1)
    assert unit_area(plain) == 282 + 137 + 36
    assert unit_area(Cost(float_macs=1, comparisons=1, multiplies=1)) == 2 * 282 + 137 + 36
    assert unit_area(plain, ACCELERATOR) is None


def test_thresholds_reproduce_the_sign_of_batch_norm_for_every_integer() -> None:
    channels, n = 200, 27
    generator = torch.Generator().manual_seed(0)
    bn = nn.BatchNorm2d(channels).double().eval()
    with torch.no_grad():
        bn.weight.normal_(generator=generator)
        bn.weight[:5] = 0
        bn.bias.normal_(generator=generator)
        bn.running_mean.normal_(0, 5, generator=generator)
        bn.running_var.uniform_(1, 30, generator=generator)
    y = torch.arange(-n, n + 1, 2, dtype=torch.float64).expand(1, channels, -1)[..., None]  # the values of n products
    t, direction = (v[:, None, None] for v in fold(bn))
    up, down, flat = y >= t.ceil(), y <= t.floor(), hard_sign(bn.bias)[:, None, None] > 0
    folded = torch.where(direction > 0, up, torch.where(direction < 0, down, flat))
    assert torch.equal(2 * folded.double() - 1, hard_sign(bn(y)))
    assert {-1.0, 0.0, 1.0} == set(direction.unique().tolist())


def test_binary_convolution_without_padding_has_the_parity_of_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    x = hard_sign(torch.randn(4, 3, 8, 8, generator=generator))
    y = F.conv2d(x, hard_sign(torch.randn(5, 3, 3, 3, generator=generator)))
    assert ((y.abs() <= 27) & (y % 2 == 1)).all()
