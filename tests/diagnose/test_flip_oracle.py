"""The flip oracle is exact: the same numbers as one forward pass per flip, whatever the net."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.diagnose.agreement import weight_names
from qlab.diagnose.behind import Behind
from qlab.diagnose.flip_oracle import FlipOracle, binary_layers, flip_oracle, flipping, hard_net
from qlab.diagnose.objective import Objective
from qlab.errors import InputError, UnknownNameError
from qlab.methods.binary_networks.ste import STE
from qlab.quantizers import Sign, Uniform, harden, quantize
from tests.diagnose.small_nets import (
    HandLinear,
    batch,
    conv,
    cross_entropy,
    detached_sign,
    flipped,
    foreign,
    generator,
    mlp,
    settled,
)


def weight_name(net: nn.Module, layer: str) -> str:
    return weight_names(harden(net))[layer]


def assert_exact(net: nn.Module, x: Tensor, y: Tensor, layer: str, path: str) -> FlipOracle:
    result = flip_oracle(net, x, y, layer)
    expected = flipped(net, x, y, weight_name(net, layer), cross_entropy)
    np.testing.assert_allclose(result.delta, expected.numpy(), rtol=0, atol=1e-12)
    assert float(expected.abs().max()) > 1e-3  # flips matter, so equality says something
    assert result.path == path
    return result


@pytest.mark.parametrize(
    ("activations", "paths"),
    [
        (Sign, ("columns", "table", "table", "table")),
        (None, ("columns",) * 4),
        (lambda: Uniform(2, signed=False, limit=1.0), ("columns", "table", "columns", "columns")),
    ],
    ids=["sign", "float", "two bits"],
)
def test_every_flip_of_an_mlp_is_exact(activations, paths) -> None:
    net, (x, y) = mlp(activations), batch(12, 8)
    assert binary_layers(net, x) == ["hidden.0", "hidden.3", "hidden.6", "fc"]
    for layer, path in zip(binary_layers(net, x), paths, strict=True):
        assert_exact(net, x, y, layer, path)


def test_inputs_of_few_levels_need_a_table_only() -> None:
    x, y = batch(12, 40)
    net = mlp(inputs=40)
    assert_exact(net, x.sign(), y, "hidden.0", "table")
    assert_exact(net, x, y, "hidden.0", "columns")
    assert_exact(mlp(None, inputs=40), x.sign(), y, "hidden.0", "table")


@pytest.mark.parametrize("activations", [Sign, None], ids=["sign", "float"])
def test_every_flip_of_a_convolution_is_exact(activations) -> None:
    net, (x, y) = conv(activations), batch(5, 2, 6, 6)
    for layer in ("0", "3"):
        assert_exact(net, x, y, layer, "columns")
    assert_exact(net, x, y, "7", "table" if activations else "columns")


def test_every_flip_in_a_residual_net_is_exact() -> None:
    net = settled(quantize(qlab.build("resnet20", (1, 8, 8), 3, seed=0).double(), Sign, Sign, ("first", "last")))
    x, y = batch(3, 1, 8, 8)
    index = torch.arange(0, 2304, 60)
    result = flip_oracle(net, x, y, "stages.0.0.conv1", index=index)
    expected = flipped_some(net, x, y, "stages.0.0.conv1.weight", index)
    np.testing.assert_allclose(result.delta, expected, rtol=0, atol=1e-12)
    assert result.path == "columns"
    assert np.abs(expected).max() > 1e-6


def flipped_some(net: nn.Module, x: Tensor, y: Tensor, name: str, index: Tensor) -> np.ndarray:
    hard = harden(net)
    w = hard.get_parameter(name).detach().view(-1)
    changes = []
    with torch.no_grad():
        before = F.cross_entropy(hard(x), y)
        for i in index:
            w[i] *= -1
            changes.append(float(F.cross_entropy(hard(x), y) - before))
            w[i] *= -1
    return np.array(changes)


@pytest.mark.parametrize("old_style", [False, True], ids=["detach", "autograd function of the old style"])
def test_a_foreign_net_with_hand_written_signs_is_exact(old_style: bool) -> None:
    net, (x, y) = foreign(old_style), batch(10, 8)
    assert binary_layers(net, x) == ["0", "2", "4"]
    for layer in ("0", "2", "4"):
        result = assert_exact(net, x, y, layer, "whole")
        assert np.all(result.alpha == 1)


def test_nets_with_control_flow_shared_layers_or_a_batch_that_sees_itself_run_whole() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
            with torch.no_grad():
                for layer in (self.a, self.b):
                    layer.weight.copy_(torch.where(layer.weight >= 0, 0.5, -0.5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.tanh() if float(h.detach().sum()) > -1e9 else h)

    class Twice(Flow):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).tanh()))

    class Mixing(Flow):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h - h.mean(0))

    class Beside(Flow):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh()) + x.mean(0)[:3]

    class Sized(Flow):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh().view(9, 8))

    x, y = batch(9, 8)
    for kind in (Flow, Twice, Mixing, Beside, Sized):
        torch.manual_seed(0)
        net = kind().double().eval()
        assert_exact(net, x, y, "a", "whole")
    alone = flip_oracle(Mixing().double().eval(), x[:1], y[:1], "a")
    assert alone.path == "whole"
    assert not alone.delta.any()  # the only example is its own mean


class Scaled(Sign):
    def forward(self, latent: Tensor) -> Tensor:
        return super().forward(latent) * latent.detach().abs().mean()


@pytest.mark.parametrize("inputs", [8, 7])
def test_ties_that_rounding_decides_are_decided_as_the_net_does(inputs: int) -> None:
    """Sums of eight (or, behind, six) times +-alpha are often 0 but for rounding, and sign is not the same on both sides."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(inputs, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    )
    x, y = batch(16, inputs)
    for weights, path in ((Scaled, "whole"), (Sign, "table")):
        for dtype in (torch.float64, torch.float32):
            net = quantize(plain.to(dtype), weights, Sign).eval()
            result = flip_oracle(net, x.sign().to(dtype), y, "0", loss="margin")
            expected = flipped(net, x.sign().to(dtype), y, "0.weight", _margin)
            np.testing.assert_allclose(result.delta, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
            assert result.path == path


def test_activations_in_place_and_branches_are_not_mixed_up() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 6)
            self.relu, self.c = nn.ReLU(inplace=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.a(x))
            g = self.relu(self.b(h)) + h
            return self.c(g.view(g.size(0), -1))

    torch.manual_seed(0)
    net = quantize(Branches().double(), Sign, None).eval()
    x, y = batch(7, 8)
    for layer in ("a", "b", "c"):
        result = flip_oracle(net, x, y, layer)
        expected = flipped(net, x, y, f"{layer}.weight", cross_entropy)
        np.testing.assert_allclose(result.delta, expected.numpy(), rtol=0, atol=1e-12)


def test_flips_are_differences_in_the_table_of_all_nets() -> None:
    x, y = batch(6, 3)
    net = quantize(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double(), Sign, Sign).eval()
    hard = harden(net)
    table = {}
    for bits in itertools.product((-1.0, 1.0), repeat=9):
        W = torch.tensor(bits, dtype=torch.float64).reshape(3, 3)
        h = torch.where(x @ W.T >= 0, 1.0, -1.0).double()
        table[bits] = float(F.cross_entropy((h @ hard[2].weight.T + hard[2].bias).detach(), y))
    here = tuple(hard[0].weight.detach().flatten().tolist())
    result = flip_oracle(net, x, y, "0")
    assert result.loss == pytest.approx(table[here], abs=1e-12)
    for i in range(9):
        other = (*here[:i], -here[i], *here[i + 1 :])
        assert result.delta[i] == pytest.approx(table[other] - table[here], abs=1e-12)
        plus, minus = ((*here[:i], b, *here[i + 1 :]) for b in (1.0, -1.0))
        assert result.gradient[i] == pytest.approx((table[plus] - table[minus]) / 2, abs=1e-12)


def test_integers_are_exact_to_the_last_bit() -> None:
    net = quantize(nn.Sequential(nn.Linear(30, 20, bias=False), nn.Tanh(), nn.Linear(20, 4, bias=False)), Sign, Sign)
    net = net.double().eval()
    x, y = batch(16, 30, classes=4)
    x = x.sign()
    for layer, name in (("0", "0.weight"), ("2", "2.weight")):
        result = flip_oracle(net, x, y, layer, loss="margin")
        expected = flipped(net, x, y, name, lambda z, y: _margin(z, y))
        assert np.array_equal(result.delta, expected.numpy())
        assert len(np.unique(result.delta)) > 3


def _margin(z: Tensor, y: Tensor) -> Tensor:
    rows = torch.arange(len(z))
    others = z.clone()
    others[rows, y] = -1e9
    return others.max(1).values - z[rows, y]


def test_a_part_of_the_flips_is_a_part_of_all() -> None:
    index = torch.tensor([5, 40, 3])
    for net, layer, x, y in ((mlp(), "hidden.3", *batch(12, 8)), (conv(), "3", *batch(5, 2, 6, 6))):
        whole = flip_oracle(net, x, y, layer)
        part = flip_oracle(net, x, y, layer, index=index)
        np.testing.assert_allclose(part.delta, whole.delta[index], rtol=0, atol=1e-13)
        np.testing.assert_array_equal(part.predicted, whole.predicted[index])
        assert part.frame()["index"].tolist() == [5, 40, 3]


def test_weights_that_are_plus_minus_alpha_per_unit_are_bits_and_others_are_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    x, y = batch(8, 6)
    assert binary_layers(net, x) == []
    with pytest.raises(InputError, match=r"no bits: they take 30 values.*none; quantize the net first"):
        flip_oracle(net, x, y, "0")
    with torch.no_grad():
        net[0].weight.copy_(torch.where(net[0].weight >= 0, 1.0, -1.0) * torch.rand(5, 1, dtype=torch.float64))
    assert binary_layers(net, x) == ["0"]
    assert_exact(net, x, y, "0", "columns")


def test_a_column_of_different_weights_is_not_taken_for_bits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    assert binary_layers(net, batch(5, 1)[0]) == []  # one weight a unit: all are +-alpha of their own


def test_the_prediction_is_exact_where_the_loss_is_linear_in_the_weight() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    net = quantize(Linear().double(), Sign).eval()
    x, y = batch(9, 6)
    result = flip_oracle(net, x, y, "layer", loss=lambda z, y: z.gather(1, y[:, None])[:, 0])
    np.testing.assert_allclose(result.predicted, result.delta, atol=1e-12)
    assert result.agreement.cosine == pytest.approx(1)
    assert result.agreement.spearman == pytest.approx(1)
    assert result.agreement.sign_agreement == 1


def test_a_layer_written_by_hand_is_told_the_same_as_the_lab_s() -> None:
    """Latent weights of all sizes: a flip moves the bit, so the prediction is -2 b g, whatever the size of the latent."""
    latent = torch.randn(3, 8, generator=generator(3), dtype=torch.float64)

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(latent.clone())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, detached_sign(self.weight))

    lab = nn.Linear(8, 3, bias=False).double()
    with torch.no_grad():
        lab.weight.copy_(latent)
    x, y = batch(10, 8)
    a = flip_oracle(nn.Sequential(Hand()).eval(), x, y, "0")
    b = flip_oracle(quantize(nn.Sequential(lab), lambda: Sign("identity")).eval(), x, y, "0")
    np.testing.assert_allclose(a.delta, b.delta, atol=1e-12)
    np.testing.assert_allclose(a.predicted, b.predicted, atol=1e-12)
    np.testing.assert_allclose(a.gradient, b.gradient, atol=1e-12)


def test_dropout_between_layers_does_not_slow_it_down() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net = quantize(plain.double(), Sign, Sign).eval()
    x, y = batch(9, 8)
    assert_exact(net, x, y, "0", "columns")
    J = Objective(hard_net(net), x, y)
    assert Behind(J, "0", "0.weight").next is not None  # a rank-one update into the next layer


def test_a_method_is_taken_as_its_net_and_annealing_is_looked_through() -> None:
    method = STE(qlab.build("mlp", (8,), 3, seed=0).double(), activations="sign").eval()
    x, y = batch(6, 8)
    result = flip_oracle(method, x, y, "fc")
    np.testing.assert_array_equal(result.delta, flip_oracle(method.net, x, y, "fc").delta)
    assert set(np.abs(result.weight)) == {1.0}


def test_updates_count_up_and_end_with_the_result() -> None:
    updates = list(flipping(conv(), *batch(5, 2, 6, 6), "0"))
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert len(fractions) > 5
    assert isinstance(updates[-1].value, FlipOracle)
    assert all(u.value is None for u in updates[:-1])


def test_summary_figure_and_frame_hold_the_numbers() -> None:
    result = flip_oracle(mlp(), *batch(12, 8), "hidden.3")
    assert f"cosine {result.agreement.cosine:.2f}" in result.summary()
    assert result.summary().startswith("Deployed net, hidden.3: 63 single flips")
    assert result.figure().get_label() == result.summary()
    frame = result.frame()
    assert len(frame) == 63
    assert frame["unit"].tolist() == [i // 9 for i in range(63)]


def test_the_global_generator_and_the_net_are_left_alone() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    flip_oracle(net, x, y, "hidden.3")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_cannot_be_answered_is_said() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    with pytest.raises(UnknownNameError, match=r"layer 'hidden\.1'"):
        flip_oracle(net, x, y, "hidden.1")
    with pytest.raises(InputError, match="training mode"):
        flip_oracle(mlp().train(), x, y, "fc")
    with pytest.raises(InputError, match="NaN"):
        flip_oracle(net, x * float("nan"), y, "fc")
    with pytest.raises(InputError, match="needs labels"):
        flip_oracle(net, x, None, "fc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="index runs from 0 to 99; there are 15 weights"):
        flip_oracle(net, x, y, "fc", index=torch.tensor([0, 99]))
    with pytest.raises(InputError, match="a position twice"):
        flip_oracle(net, x, y, "fc", index=torch.tensor([2, 2]))
    with pytest.raises(InputError, match=r"index is torch.float32"):
        flip_oracle(net, x, y, "fc", index=torch.tensor([0.5]))


def test_a_zero_in_a_hand_written_layer_flips_to_the_other_side() -> None:
    net = nn.Sequential(HandLinear(8, 3, detached_sign, 3)).eval()
    with torch.no_grad():
        net[0].weight[0, 0] = 0.0  # sign(0) = +1
    x, y = batch(10, 8)
    result = flip_oracle(net, x, y, "0", index=torch.tensor([0]))
    with torch.no_grad():
        before = F.cross_entropy(net(x), y)
        net[0].weight[0, 0] = -1e-300
        assert result.delta[0] == pytest.approx(float(F.cross_entropy(net(x), y) - before), abs=1e-12)
        assert result.delta[0] != 0
