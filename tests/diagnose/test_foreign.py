"""Quantizers are recognised by what they compute; what merely looks flat is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.diagnose.foreign import Flat, piecewise_constant, undeclared
from qlab.errors import InputError
from qlab.quantizers import Sign, Uniform, quantize


class OldSign(torch.autograd.Function):
    """As hand-written in most repositories: no setup_context, clipped straight-through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1).to(x.dtype)


class HandSign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OldSign.apply(x)


class DetachRound(nn.Module):
    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.n = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        q = (x.clamp(0, 1) * self.n).round() / self.n
        return x + (q - x).detach()


class FakeQuantLinear(nn.Linear):
    """A layer of another library: it quantizes its weight inside its forward."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().mean()
        q = OldSign.apply(self.weight) * scale
        return F.linear(x, q, self.bias)


class Steep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(1000 * x)


class Functional(nn.Module):
    """Signs between modules, and a shortcut past one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + self.b(OldSign.apply(h))
        return self.c(F.relu(h))


def inputs(n: int = 12, d: int = 6) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).double().eval()


def named(found: list[Flat]) -> list[tuple[str, str, str]]:
    return [(f.module, f.kind, f.gradient) for f in found]


@pytest.mark.parametrize("module", [HandSign(), DetachRound(), DetachRound(1), DetachRound(12)])
def test_hand_written_activations_are_recognised(module: nn.Module) -> None:
    found = piecewise_constant(mlp(module), inputs())
    assert named(found) == [("1", "input", "straight-through")]
    assert not found[0].declared
    assert "autograd claims a gradient" in str(found[0])


def test_levels_and_jumps_are_those_of_the_grid() -> None:
    (sign,) = piecewise_constant(mlp(HandSign()), inputs())
    assert (sign.levels, sign.jump) == (2, 2.0)
    (two_bits,) = piecewise_constant(mlp(Uniform(2, signed=False, limit=1.0)), inputs())
    assert two_bits.levels == 4
    assert two_bits.jump == pytest.approx(1 / 3)
    assert two_bits.declared


def test_a_quantizer_without_a_gradient_is_told_from_a_straight_through_one() -> None:
    class Hard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sign(x)

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    for module in (Hard(), Cut()):
        found = piecewise_constant(mlp(module), inputs())
        assert named(found) == [("1", "input", "zero")]
        assert "no gradient passes" in str(found[0])


def test_a_rule_that_is_saturated_is_straight_through_all_the_same() -> None:
    net = mlp(HandSign())
    with torch.no_grad():
        net[0].weight.mul_(1e6)  # type: ignore[index, union-attr, operator]
    assert named(piecewise_constant(net, inputs())) == [("1", "input", "straight-through")]


def test_only_code_that_nobody_declared_and_that_claims_a_gradient_is_undeclared() -> None:
    x = inputs()
    torch.manual_seed(0)
    assert undeclared(mlp(Sign()), x) == []
    assert undeclared(mlp(nn.ReLU()), x) == []
    assert undeclared(mlp(Steep()), x) == []
    assert undeclared(mlp(nn.ReLU(), FakeQuantLinear(8, 8), nn.ReLU()), x) == []  # weights are no activations
    assert named(undeclared(mlp(Sign(), nn.Linear(8, 8), HandSign()), x)) == [("3", "input", "straight-through")]
    assert named(undeclared(Functional().double().eval(), x)) == [("a", "between", "straight-through")]


def test_weights_quantized_inside_a_layer_are_recognised() -> None:
    net = mlp(nn.ReLU(), FakeQuantLinear(8, 8), nn.ReLU())
    found = piecewise_constant(net, inputs())
    assert named(found) == [("2", "weight", "straight-through")]
    assert found[0].parameter == "weight"
    assert found[0].scaled
    assert "up to a scale" in str(found[0])


@pytest.mark.parametrize("per_row", [False, True])
def test_integers_with_a_dynamic_scale_are_recognised(per_row: bool) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = (x.abs().amax(-1, keepdim=True) if per_row else x.abs().max()) / 7
            q = (x / s).round() * s
            return x + (q - x).detach()

    found = piecewise_constant(mlp(Dynamic()), inputs())
    assert [(f.module, f.kind, f.scaled) for f in found] == [("1", "input", True)]


def test_a_layer_that_sees_one_direction_is_no_false_alarm() -> None:
    net = mlp(nn.ReLU())
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None] * torch.ones(6, dtype=torch.float64)
    assert piecewise_constant(net, x) == []


def test_quantizers_of_the_lab_are_found_where_they_are() -> None:
    net = quantize(mlp(nn.ReLU()), weights=Sign, activations=Sign).eval()
    found = piecewise_constant(net, inputs())
    assert [(f.module, f.kind, f.parameter) for f in found] == [
        ("0", "weight", "weight"),
        ("1", "input", None),
        ("2", "weight", "weight"),
    ]
    assert all(f.declared for f in found)


def test_functional_code_is_found_between_two_modules() -> None:
    torch.manual_seed(0)
    found = piecewise_constant(Functional().double().eval(), inputs())
    assert [(f.module, f.kind, f.to) for f in found] == [("a", "between", "b")]
    assert "functional code between a and b" in str(found[0])


def test_functional_code_before_the_first_module_and_after_the_last() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.round(4 * self.b(torch.tanh(self.a(OldSign.apply(x)))))

    torch.manual_seed(0)
    found = piecewise_constant(Ends().double().eval(), inputs())
    assert [(f.module, f.kind, f.to, f.gradient) for f in found] == [
        ("", "between", "a", "straight-through"),
        ("b", "between", "", "zero"),
    ]


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.Hardtanh(), nn.ReLU6(), nn.Tanh(), nn.GELU(), nn.Hardshrink(), nn.Threshold(0.1, 0.0), nn.Dropout(),
     nn.Softmax(-1), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.PReLU(), Steep(), nn.Identity()],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_continuous_modules_are_no_false_alarms(module: nn.Module) -> None:
    assert piecewise_constant(mlp(module), inputs()) == []


@pytest.mark.parametrize("bias", [-2.0, -5.0, -20.0])
def test_dead_units_are_no_false_alarms(bias: float) -> None:
    net = mlp(nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(bias)  # type: ignore[index, union-attr, operator]
    assert piecewise_constant(net, inputs()) == []


def test_saturated_clips_are_no_false_alarms() -> None:
    net = mlp(nn.Hardtanh())
    with torch.no_grad():
        net[0].weight.mul_(30)  # type: ignore[index, union-attr, operator]
    assert piecewise_constant(net, inputs()) == []


@pytest.mark.parametrize("model", ["lenet", "mlp"])
def test_pooling_and_shortcuts_are_no_false_alarms(model: str) -> None:
    shape = (1, 16, 16)
    net = qlab.build(model, shape, 4, seed=0).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert piecewise_constant(net, x) == []
    if model != "mlp":
        found = piecewise_constant(quantize(net, activations=Sign).eval(), x)
        assert found
        assert {f.kind for f in found} == {"input"}


def test_the_net_is_left_as_it_was_and_the_answer_is_the_same_again() -> None:
    net = mlp(HandSign()).float()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (piecewise_constant(net, inputs().float()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in net.state_dict().items())


def test_wrong_input_is_said_in_one_error() -> None:
    with pytest.raises(InputError, match="training mode"):
        piecewise_constant(mlp(HandSign()).train(), inputs())
    with pytest.raises(InputError, match="does not take inputs"):
        piecewise_constant(mlp(HandSign()), inputs(d=7))
