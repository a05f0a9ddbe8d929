"""DeepLift is complete with the rule on every elementwise module, tells what it cannot repair, and leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qlab.diagnose.attribution import attribute
from qlab.diagnose.attribution_deeplift import deeplift, nonlinearities, rescaled
from qlab.errors import InputError
from qlab.quantizers import Sign, Uniform, harden, quantize
from tests.diagnose.attribution_nets import Functional, batch, cnn, difference, fresh, mlp


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("activation", [Sign, lambda: Uniform(3, signed=True, limit=1.0), nn.GELU, nn.Hardtanh])
def test_deeplift_is_complete_with_the_rule_on_every_activation(
    make: Callable[[Callable[[], nn.Module]], nn.Module], activation: Callable[[], nn.Module]
) -> None:
    net, x = make(activation), batch(8, 6) if make is mlp else batch(8, 1, 6, 6)
    m = attribute(net, x, 1, ("deeplift",))["deeplift"]
    assert m.relative.max() < 1e-5
    assert m.explains == "deployed"


def test_deeplift_without_the_rule_misses_the_difference_of_a_sign_net() -> None:
    from captum.attr import DeepLift

    net, x = mlp(Sign), batch(8, 6)
    with pytest.warns(UserWarning, match="Setting forward"):
        scores = DeepLift(net).attribute(x.requires_grad_(), torch.zeros_like(x), target=1)
    gap = np.abs(scores.detach().sum(1).numpy() - difference(net, x, 1)) / np.abs(difference(net, x, 1))
    assert np.median(gap) > 0.1


def test_deeplift_of_binary_weights_and_activations_is_that_of_the_hard_net() -> None:
    net, x = quantize(mlp(nn.ReLU), Sign, Sign), batch(8, 6)
    m = attribute(net, x, 1, ("deeplift",))["deeplift"]
    assert m.relative.max() < 1e-5
    np.testing.assert_allclose(m.values.sum(1), difference(harden(net), x, 1), rtol=1e-5)


def test_deeplift_of_a_linear_net_is_weight_times_difference() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(8, 6)
    m = attribute(net, x, 1, ("deeplift",), baseline=0.5)["deeplift"]
    np.testing.assert_allclose(m.values, ((x - 0.5) * net.get_parameter("weight")[1]).detach().numpy(), rtol=1e-12)


def test_nonlinearities_on_top_of_each_other_are_kept_apart() -> None:
    from captum.attr import DeepLift

    make = lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.ReLU(), nn.Linear(16, 3))  # noqa: E731
    net, x = fresh(make), batch(8, 6)
    assert attribute(net, x, 1, ("deeplift",))["deeplift"].relative.max() < 1e-5
    with pytest.warns(UserWarning, match="Setting forward"):  # captum alone takes a stale gradient
        alone = DeepLift(net).attribute(x.requires_grad_(), torch.zeros_like(x), target=1)
    assert np.abs(alone.detach().sum(1).numpy() - difference(net, x, 1)).max() > 0.01


def test_a_reused_activation_is_refused_with_its_name() -> None:
    act = Sign()
    net = fresh(lambda: nn.Sequential(nn.Linear(6, 16), act, nn.Linear(16, 12), act, nn.Linear(12, 3)))
    with pytest.raises(InputError, match=r"module '.*1' \(Sign\) runs 2 times"):
        attribute(net, batch(8, 6), 1, ("deeplift",))


def test_a_functional_sign_cannot_be_repaired_and_is_told() -> None:
    m = attribute(fresh(Functional), batch(8, 6), 1, ("deeplift", "integrated_gradients"))
    assert np.median(m["deeplift"].relative) > 0.1
    assert m["deeplift"].explains == "surrogate"
    assert m["deeplift"].verdict.word == "incomplete"
    assert "cannot be repaired" in m["deeplift"].verdict.reason
    assert m["integrated_gradients"].explains == "surrogate"


def test_the_rule_goes_to_elementwise_modules_only() -> None:
    net = fresh(lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3), nn.LogSoftmax(1)))
    assert set(nonlinearities(net, batch(4, 6))) == {"2"}


def test_a_linear_layer_of_one_unit_does_not_take_all_linear_layers_with_it() -> None:
    net = fresh(lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3)))
    assert set(nonlinearities(net, batch(8, 6))) == {"1", "3"}
    assert attribute(net, batch(8, 6), 1, ("deeplift",))["deeplift"].relative.max() < 1e-5


def test_a_channel_shuffle_is_not_elementwise() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ChannelShuffle(2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))  # noqa: E731
    net, x = fresh(make), batch(3, 1, 6, 6)
    assert set(nonlinearities(net, x)) == {"2"}
    assert attribute(net, x, 1, ("deeplift",))["deeplift"].relative.max() < 1e-5


def test_windows_that_overlap_are_not_taken_for_a_function_in_forward() -> None:
    net = fresh(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(16, 3)
        )
    )
    m = attribute(net, batch(3, 1, 6, 6), 1, ("deeplift",))["deeplift"]
    assert (m.explains, m.verdict.word) == ("surrogate", "incomplete")
    assert "max pooling with windows that overlap" in m.verdict.reason


def test_rounding_is_not_incompleteness_where_the_outputs_are_equal() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 2), Sign(), nn.Linear(2, 2))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[0.3, 0.7, 0.11], [0.21, -0.4, 0.9]]))
            net[0].bias.fill_(-0.1)
            net[2].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))  # both units flip: +2 - 2
        return net

    net, x = fresh(make), 0.7 + 0.05 * batch(8, 3).sigmoid()
    assert (difference(net, x, 0) == 0).all()
    m = attribute(net, x, 0, ("deeplift",))["deeplift"]
    assert np.abs(m.scores).min() > 0
    assert m.residual.max() > 0
    assert m.relative.max() < 1e-5
    assert (m.explains, m.verdict.word != "incomplete") == ("deployed", True)


# ---- nothing is left behind ---------------------------------------------------------------------------------------------


def test_the_table_of_captum_is_restored_after_an_exception() -> None:
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    table = dict(SUPPORTED_NON_LINEAR)
    with rescaled([Sign, nn.ReLU]):
        assert SUPPORTED_NON_LINEAR[Sign] is SUPPORTED_NON_LINEAR[nn.ReLU]
    assert table == SUPPORTED_NON_LINEAR
    with pytest.raises(ZeroDivisionError), rescaled([Sign, nn.ReLU]):
        raise ZeroDivisionError
    assert table == SUPPORTED_NON_LINEAR


def left(net: nn.Module) -> dict[str, Any]:
    """Return all that captum and we could leave on a net: hooks, attributes, gradients, flags."""
    return {
        name: {
            key: len(value) if key.endswith("_hooks") else sorted(value) if isinstance(value, dict) else value
            for key, value in m.__dict__.items()
        }
        for name, m in net.named_modules()
    } | {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Compare captum's table, hooks, marks and random states before and after."""
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    table, marks, state, python = dict(SUPPORTED_NON_LINEAR), left(net), torch.random.get_rng_state(), random.getstate()
    numbers = repr(np.random.get_state())  # noqa: NPY002
    yield
    assert table == SUPPORTED_NON_LINEAR
    assert marks == left(net)
    assert torch.equal(state, torch.random.get_rng_state())
    assert python == random.getstate()
    assert numbers == repr(np.random.get_state())  # noqa: NPY002


class Failing(nn.Module):
    """An identity that fails at its nth call, or in its backward pass."""

    def __init__(self, call: int, backward: bool = False) -> None:
        super().__init__()
        self.call, self.backward = [call], backward  # a list, so that counting leaves the attributes as they are

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.call[0] -= 1
        if self.call[0] == 0 and not self.backward:
            raise ZeroDivisionError
        if self.backward and x.requires_grad:
            x.register_hook(lambda _: 1 / 0)
        return x


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_leaves_net_table_and_random_numbers_as_they_were(call: int, backward: bool) -> None:
    net = mlp(Sign)
    net.insert(2, Failing(call, backward))  # type: ignore[operator]
    x = batch(8, 6)
    with untouched(net), pytest.raises(ZeroDivisionError):
        deeplift(net, x, torch.zeros_like(x), torch.ones(8, dtype=torch.int64))


@pytest.mark.parametrize("method", ["smoothgrad", "deeplift", "guided_backprop", "shapley_sampling", "layer_gradcam"])
def test_an_exception_in_any_method_leaves_the_net_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    for module in ("_core.deep_lift", "_core.shapley_value"):
        monkeypatch.setattr(f"captum.attr.{module}._run_forward", fail)
    monkeypatch.setattr("captum._utils.gradient._run_forward", fail)
    net = cnn(nn.ReLU)
    with untouched(net), pytest.raises(ZeroDivisionError):
        attribute(net, batch(4, 1, 6, 6), 1, (method,), features=3)
