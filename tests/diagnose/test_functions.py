"""The four functions of a quantized net: each is what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.diagnose.functions import FUNCTIONS, steps, variant
from qlab.errors import InputError, UnknownNameError
from qlab.methods.binary_weights.adaste import AdaSTE
from qlab.methods.binary_weights.binary_connect import BinaryConnect
from qlab.quantizers import Sign, Uniform, harden, quantize
from qlab.quantizers.surrogates import SURROGATES


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def signs(surrogate: str = "clipped") -> nn.Module:
    net = qlab.build("mlp", (6,), 3, seed=0).double()
    return quantize(net, weights=lambda: Sign(surrogate), activations=lambda: Sign(surrogate)).eval()


def as_plain(net: nn.Module, weight, activation) -> nn.Module:
    """Return the net rebuilt by hand: its latent weights through `weight`, its signs replaced by `activation`."""
    twin = qlab.build("mlp", (6,), 3, seed=0).double().eval()
    state = {name.replace("parametrizations.weight.original", "weight"): p for name, p in net.state_dict().items()}
    twin.load_state_dict({k: v for k, v in state.items() if k in twin.state_dict()})
    with torch.no_grad():
        for name, layer in list(twin.named_modules()):
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(weight(layer.weight))
            if isinstance(layer, nn.ReLU):
                twin.set_submodule(name, activation)
    return twin


class Map(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def test_each_function_is_the_net_rebuilt_by_hand(x: Tensor) -> None:
    net = signs()
    clip = nn.Hardtanh()
    soft = lambda v: torch.tanh(3.0 * v)  # noqa: E731
    expected = {
        "deployed": as_plain(net, sign, Map(sign)),
        "latent": as_plain(net, lambda w: w, Map(sign)),
        "surrogate": as_plain(net, clip, clip),
        "smoothed": as_plain(net, soft, Map(soft)),
    }
    for which in FUNCTIONS:
        torch.testing.assert_close(variant(net, which, 3.0)(x), expected[which](x), rtol=1e-12, atol=1e-12)


def test_the_deployed_function_is_the_hardened_net_of_every_method(x: Tensor) -> None:
    for make in (AdaSTE, BinaryConnect):
        method = make(qlab.build("mlp", (6,), 3, seed=0)).eval()
        assert torch.equal(variant(method, "deployed")(x.float()), harden(method.net)(x.float()))


def test_all_functions_keep_names_and_values_of_the_parameters_and_leave_the_net_alone() -> None:
    net = signs()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for which in FUNCTIONS:
        twin = dict(variant(net, which).named_parameters())
        assert list(twin) == [name for name, _ in net.named_parameters()]
        assert all(torch.equal(twin[name], p) for name, p in net.named_parameters())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert sum(isinstance(m, Sign) for m in net.modules()) > 2


@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_of_the_surrogate_function_is_the_declared_rule(name: str) -> None:
    quantizer = Sign(name)
    v = torch.linspace(-1.9, 1.9, 38, dtype=torch.float64, requires_grad=True)  # misses the corners at -1, 0, 1
    (declared,) = torch.autograd.grad(quantizer(v).sum(), v)
    primitive = quantizer.primitive()
    assert primitive is not None
    h = 1e-6
    slope = (primitive(v.detach() + h) - primitive(v.detach() - h)) / (2 * h)
    torch.testing.assert_close(slope, declared, rtol=1e-7, atol=1e-7)


def test_uniform_has_the_clip_as_its_surrogate_function() -> None:
    v = torch.linspace(-2, 2, 40, dtype=torch.float64, requires_grad=True)
    for quantizer in (Uniform(3, limit=1.1), Uniform(2, signed=False, limit=0.9)):
        (declared,) = torch.autograd.grad(quantizer(v).sum(), v)
        (slope,) = torch.autograd.grad(quantizer.primitive()(v).sum(), v)
        assert torch.equal(slope, declared)


def test_the_smoothed_function_tends_to_the_deployed_one(x: Tensor) -> None:
    net = quantize(
        qlab.build("mlp", (6,), 3, seed=0).double(),
        weights=lambda: Uniform(3),
        activations=lambda: Uniform(2, signed=False, limit=2.0),
    ).eval()
    deployed = variant(net, "deployed")(x)
    gaps = [float((variant(net, "smoothed", k)(x) - deployed).abs().max().detach()) for k in (10.0, 1e3, 1e9)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_thresholds_stand_where_the_hard_map_jumps() -> None:
    levels, thresholds = steps(Uniform(3, limit=3.0))
    assert levels.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    torch.testing.assert_close(thresholds, torch.arange(-2.5, 3.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(steps(Sign())[1]) == pytest.approx(0.0, abs=1e-12)


def test_a_quantizer_that_stands_in_several_places_is_replaced_in_all(x: Tensor) -> None:
    torch.manual_seed(0)
    act, soft = Sign("tanh"), nn.Tanh()
    a, b, c = (layer.double() for layer in (nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)))
    net = nn.Sequential(a, act, b, act, c).eval()
    for which, by_hand in (("surrogate", soft), ("smoothed", soft), ("deployed", Map(sign))):
        expected = nn.Sequential(a, by_hand, b, by_hand, c)(x)
        torch.testing.assert_close(variant(net, which, 1.0)(x), expected, rtol=1e-12, atol=1e-12)


def test_a_rule_that_is_no_derivative_is_refused_as_surrogate() -> None:
    net = quantize(qlab.build("mlp", (6,), 3, seed=0), weights=lambda: Sign(lambda v: torch.ones_like(v)))
    with pytest.raises(InputError, match="not the derivative of a known function"):
        variant(net, "surrogate")


def test_unknown_functions_and_bad_sharpness_are_named() -> None:
    with pytest.raises(UnknownNameError, match="deployed, latent, smoothed, surrogate"):
        variant(signs(), "soft")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sharpness must be a positive number"):
        variant(signs(), "smoothed", 0)


def test_a_float_net_has_one_function(x: Tensor) -> None:
    net = qlab.build("mlp", (6,), 3, seed=0).double().eval()
    for which in FUNCTIONS:
        assert torch.equal(variant(net, which)(x), net(x))
