"""The checks before a diagnosis: what would make it say nothing true is said instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.diagnose.base import check, plain, run_hooked
from qlab.errors import InputError
from qlab.methods.binary_networks.ste import STE


@pytest.fixture
def net() -> nn.Module:
    return qlab.build("mlp", (4,), 3, seed=0).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


Y = torch.tensor([0, 1, 2, 0, 1])


def test_a_sound_net_gives_its_logits(net: nn.Module, x: Tensor) -> None:
    same, z = check(net, x, Y)
    assert same is net
    assert torch.equal(z, net(x))


def test_a_method_is_unwrapped_to_its_net() -> None:
    method = STE(qlab.build("mlp", (4,), 3, seed=0))
    assert plain(method) is method.net


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(InputError, match="net is a dict; expected a torch module"):
        check({}, torch.zeros(1, 2), None)  # type: ignore[arg-type]


def test_hooks_come_off_even_where_the_net_fails(x: Tensor) -> None:
    net = nn.Linear(4, 3)
    seen: list[Tensor] = []
    for data, fails in ((x, False), (x[:, :2], True)):
        handles = [net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
        if fails:
            with pytest.raises(RuntimeError, match="shapes"):
                run_hooked(net, data, handles)
        else:
            run_hooked(net, data, handles)
        assert not net._forward_pre_hooks
    assert [len(s[0]) for s in seen] == [4, 2]


def test_training_mode_is_named(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"in training mode.*net\.eval\(\)"):
        check(net.train(), x, Y)


def test_random_layers_that_stay_on_are_named(x: Tensor) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape)

    state = torch.random.get_rng_state()
    with pytest.raises(InputError, match=r"answers twice differently.*random layers"):
        check(nn.Sequential(Noisy()).eval(), x, None, labels=False)
    torch.random.set_rng_state(state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.round().long(), "inputs are torch.int64; expected floats"),
        (lambda x: x[:0], r"inputs have shape \(0, 4\)"),
        (lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "inputs hold NaN"),
        (lambda x: torch.full_like(x, 0.5), "inputs are constant"),
        (lambda x: x[:, :2], r"does not take inputs of shape \(5, 2\)"),
        (lambda x: None, "inputs are NoneType"),
    ],
)
def test_inputs_that_say_nothing_are_named(net: nn.Module, x: Tensor, spoil, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(net, spoil(x), Y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "needs labels"),
        (Y[:3], r"int64 of shape \(5,\)"),
        (Y.float(), "float32 of shape"),
        (Y + 1, "labels run from 1 to 3; the net has classes 0 to 2"),
        ([0, 1, 2, 0, 1], "labels are list"),
    ],
)
def test_labels_that_do_not_fit_are_named(net: nn.Module, x: Tensor, y, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(net, x, y)


def test_a_net_that_diverged_or_gives_no_logits_is_named(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"returns \(5, 2, 2\) for 5 inputs"):
        check(nn.Unflatten(1, (2, 2)).eval(), x, Y)
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="logits hold NaN"):
        check(net, x, Y)
