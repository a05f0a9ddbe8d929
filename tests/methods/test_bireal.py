"""Bi-Real Net: slopes of weights and activations, what deployment drops, and that batch norm takes it up."""

from __future__ import annotations

import pytest
import torch
from scipy.integrate import quad
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_networks.bireal import MagnitudeAware
from qlab.quantizers import Sign, quantized_tensors, reestimate_batch_norm, surrogate
from tests.methods.conftest import moons, small_net

F64 = torch.float64


def net(hidden: tuple[int, ...] = (32, 32, 32)) -> nn.Module:
    return qlab.build("mlp", (2,), 2, hidden=hidden, seed=0)


def test_activations_have_the_papers_surrogate() -> None:
    """F(x) = -1, 2x + x^2, 2x - x^2, 1 on the four pieces; the slope is its derivative, 2 - 2|x| within [-1, 1]."""

    def F(x: float) -> float:
        return -1.0 if x < -1 else 2 * x + x * x if x < 0 else 2 * x - x * x if x < 1 else 1.0

    signs = [m for m in create("bireal_net", net()).net.modules() if isinstance(m, Sign)]
    assert len(signs) == 2
    x = torch.linspace(-1.5, 1.5, 301, dtype=F64, requires_grad=True)
    for q in signs:
        (g,) = torch.autograd.grad(q(x).sum(), x)
        assert torch.allclose(g, (2 - 2 * x.detach().abs()).clamp(min=0), rtol=1e-14)
        assert [q.primitive()(v.detach()).item() for v in x] == pytest.approx([F(v.item()) for v in x], abs=1e-15)


def test_polynomial_is_nearer_to_sign_than_the_clipped_estimator() -> None:
    def area(name: str) -> float:
        F = surrogate(name).primitive
        assert F is not None
        return quad(lambda v: abs(float(F(torch.tensor(v, dtype=F64))) - (1 if v >= 0 else -1)), -1, 1, points=[0])[0]

    assert area("polynomial") == pytest.approx(2 / 3, abs=1e-9)
    assert area("clipped") == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("gradient", ["detached", "larq"])
def test_weights_train_scaled_and_deploy_as_signs(gradient: str) -> None:
    q = MagnitudeAware(gradient)  # type: ignore[arg-type]
    theta = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    a = theta.detach().abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(q(theta), a * theta.sign(), rtol=1e-14)
    assert torch.equal(q.hard(theta.detach()), theta.detach().sign())
    assert q.scale(theta) is None
    g = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    (found,) = torch.autograd.grad(q(theta), theta, g)
    d = (theta.detach().abs() <= 1).to(F64)
    assert torch.allclose(found, d * g * (a if gradient == "larq" else 1), rtol=1e-14)


def test_batch_norm_estimated_anew_takes_up_the_scale_that_deployment_drops() -> None:
    """Scaled and unscaled nets are one function once each has its own statistics and eps is next to 0."""
    scaled = create("bireal_net", net(), deploy="scaled").double()
    signs = create("bireal_net", net(), deploy="signs").double()
    batches = [torch.randn(64, 2, generator=torch.Generator().manual_seed(k), dtype=F64) for k in range(3)]
    outputs = []
    for method in (scaled, signs):
        shipped = qlab.harden(method.net)
        for m in shipped.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.eps = 1e-300
        outputs.append(reestimate_batch_norm(shipped, batches)(batches[0]))
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["detached", "larq"])
@pytest.mark.parametrize("deploy", ["signs", "scaled"])
def test_learns_two_moons(gradient: str, deploy: str) -> None:
    run = qlab.fit(
        create("bireal_net", net(), gradient=gradient, deploy=deploy), moons(n=1000), epochs=20, progress=False
    )
    assert run.metrics["test/acc"] > 0.95
    weights = torch.cat([w.flatten() for w in run.method.hard_weights().values()]).abs().unique()
    assert (weights.tolist() == [1.0]) == (deploy == "signs")


def test_trains_the_net_it_is_named_after() -> None:
    method = create("bireal_net", qlab.build("bireal18", (3, 8, 8), 4, width=2, seed=0))
    binary = [t.name for t in quantized_tensors(method.net)]
    assert len(binary) == len(list(qlab.quantizers.layers(method.net))) - 2
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    method.objective(x, torch.arange(8) % 4).backward()
    assert all(t.latent.grad is not None and t.latent.grad.abs().sum() > 0 for t in quantized_tensors(method.net))


def test_signs_without_a_batch_norm_are_refused() -> None:
    bare = qlab.build("mlp", (2,), 2, hidden=(8, 8), norm=False, seed=0)
    with pytest.raises(InputError, match="no batch norm"):
        create("bireal_net", bare)
    assert create("bireal_net", bare, deploy="scaled").hard_weights()


@pytest.mark.parametrize(("name", "value"), [("gradient", "paper"), ("deploy", "float")])
def test_what_there_is_none_of_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=name):
        create("bireal_net", small_net(), **{name: value})


def test_without_reestimation_the_scale_stays_and_the_deployed_net_is_the_trained_one() -> None:
    method = qlab.methods.create("bireal_net", small_net(), reestimate_bn=False)
    qlab.fit(method, moons(), epochs=1, progress=False, test=False)
    x = moons().calibration(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(method.deployed()(x), method.eval()(x))
