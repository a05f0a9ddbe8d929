"""The straight-through estimator: its surrogate is what back-propagates, for weights and activations, the user's own included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import CheckpointError, InputError, UnknownNameError
from qlab.methods import create
from qlab.methods.binary_networks.ste import STE
from qlab.quantizers import NONLINEARITIES, SURROGATES, Sign, quantized_tensors
from tests.methods.conftest import moons, small_net


def places(net: nn.Module) -> list[nn.Module]:
    """The modules of a net that are no parametrization of a weight."""
    return [m for name, m in net.named_modules() if "parametrizations" not in name]


def triangle(x: Tensor) -> Tensor:
    return (1 - x.abs() / 2).clamp(min=0)


@pytest.mark.parametrize("surrogate", [*SURROGATES, pytest.param(triangle, id="own")])
def test_latent_gradient_is_the_surrogate_times_the_weight_gradient(surrogate: object) -> None:
    torch.manual_seed(0)
    method = create("ste", small_net(), surrogate=surrogate).double()
    x, y = torch.randn(32, 2, dtype=torch.float64), torch.randint(0, 2, (32,))
    method.loss(method(x), y).backward()
    # the same net with the signs as ordinary weights gives the gradient that reaches them
    twin = qlab.harden(method.net).train()
    method.loss(twin(x), y).backward()
    plain = {name: layer.weight.grad for name, layer in qlab.quantizers.layers(twin).items()}
    for t in quantized_tensors(method.net):
        d = t.quantizer.surrogate.derivative(t.latent.detach())
        assert torch.allclose(t.latent.grad, d * plain[t.name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("surrogate", [*SURROGATES, pytest.param(triangle, id="own")])
def test_every_surrogate_learns_two_moons(surrogate: object) -> None:
    run = qlab.fit(create("ste", small_net(), surrogate=surrogate), moons(n=1000), epochs=20, progress=False)
    assert run.metrics["test/acc"] > 0.9


def test_binary_activations_replace_the_nonlinearities_and_learn() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32, 32), seed=0)
    method = create("ste", net, activations="sign", activation_surrogate="polynomial", keep=("first", "last"))
    # Three hidden layers: the nonlinearities before layers 2 and 3 become signs; the one before the kept last layer stays.
    kinds = [
        type(m)
        for m in method.net.modules()
        if isinstance(m, NONLINEARITIES) or (isinstance(m, Sign) and m in places(method.net))
    ]
    assert kinds == [Sign, Sign, nn.ReLU]
    run = qlab.fit(method, moons(n=1000), epochs=30, progress=False)
    assert run.metrics["test/acc"] > 0.9
    activations = [m for m in run.deployed.modules() if isinstance(m, Sign)]
    assert activations
    assert all(m.surrogate.name == "polynomial" for m in activations)
    seen: list[Tensor] = []
    activations[0].register_forward_hook(lambda m, i, o: seen.append(o))
    net = run.deployed
    first = next(m for m in net.modules() if isinstance(m, Sign))
    first.register_forward_hook(lambda m, i, o: seen.append(o))
    net(moons().calibration(1)[0])
    assert set(seen[-1].unique().tolist()) == {-1.0, 1.0}


def test_without_clamp_latents_may_leave_the_interval_with_it_they_stay() -> None:
    for clamp in (True, False):
        method = create("ste", small_net(), surrogate="identity", clamp=clamp, lr=0.3, lr_schedule="constant")
        qlab.fit(method, moons(), epochs=3, progress=False, test=False)
        largest = max(float(w.abs().max()) for w in method.latent_weights().values())
        assert (largest <= 1) == clamp


def test_checkpoint_of_a_users_own_surrogate_asks_for_it_again(tmp_path: Path) -> None:
    run = qlab.fit(create("ste", small_net(), surrogate=triangle), moons(), epochs=1, progress=False)
    path = run.save(tmp_path) / "checkpoint.ckpt"
    with pytest.raises(CheckpointError, match="surrogate=d"):
        qlab.load(path)
    method = STE.load(path, surrogate=triangle)
    assert method.hparams["surrogate"] == "custom"


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tanh'"):
        create("ste", small_net(), surrogate="tan")
    with pytest.raises(InputError, match="activations"):
        create("ste", small_net(), activations="binary")
    with pytest.raises(InputError, match="elementwise"):
        create("ste", small_net(), surrogate=lambda x: x.sum())


def test_reading_weights_of_a_float_layer_is_its_weight() -> None:
    method = create("ste", small_net(), keep=("last",))
    last = list(method.latent_weights())[-1]
    assert torch.equal(method.latent_weights()[last], qlab.quantizers.layers(method.net)[last].weight)
    assert last not in method.hard_weights()
