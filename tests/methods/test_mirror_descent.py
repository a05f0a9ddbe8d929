"""Mirror descent: stable and primal form, softmax and tanh, the optimizer in the mirror's coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.mirror_descent import MirrorAdam, MirrorSGD, MirrorWeight, xavier
from qlab.proximal import softmax_map, softmax_step, tanh_step
from qlab.quantizers import hard_sign, quantized_tensors
from tests.methods.conftest import moons, small_net

F64 = torch.float64
Q = torch.tensor([-1.0, 1.0], dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loss_gradient(w: Tensor) -> Tensor:
    target = torch.linspace(-0.8, 0.8, len(w), dtype=F64)
    return (w - target) + 0.2 * w.sum()


def mirrored(beta: float) -> MirrorWeight:
    quantizer = MirrorWeight()
    quantizer.anneal(beta=beta)
    return quantizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_primal_and_stable_form_are_one_trajectory_while_beta_is_constant(momentum: float) -> None:
    beta, lr = 1.7, 0.05
    theta = torch.nn.Parameter(normal(20))
    w = torch.nn.Parameter(torch.tanh(beta * theta).detach().clone())
    stable = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    primal = MirrorSGD([{"params": [w], "beta": beta}], lr=lr, momentum=momentum)
    quantizer = mirrored(beta)
    for _ in range(100):
        forward = quantizer(theta)
        (theta.grad,) = torch.autograd.grad(forward, theta, loss_gradient(forward.detach()))
        w.grad = loss_gradient(w.detach())
        stable.step()
        primal.step()
        assert torch.allclose(w.detach(), quantizer(theta).detach(), atol=1e-10)
        assert (w.detach().abs() < 1).all()
    assert (w.detach() - torch.tanh(beta * normal(20))).abs().max() > 0.1


def test_the_two_forms_part_when_beta_grows() -> None:
    theta = normal(20)
    w = torch.tanh(theta)
    zero = torch.zeros(20, dtype=F64)
    assert torch.allclose(tanh_step(w, 5.0 * zero), w, atol=1e-15)  # primal: without a gradient nothing moves
    sharper = torch.tanh(5.0 * theta)  # stable: all weights sharpen, none flips
    assert (sharper.abs() > w.abs()).all()
    assert torch.equal(hard_sign(sharper), hard_sign(w))


def test_pair_of_the_softmax_is_one_number_in_both_forms() -> None:
    lr = 0.07
    pair = normal(20, 2)
    h = (pair[:, 1] - pair[:, 0]) / 2
    u, w = softmax_map(pair), torch.tanh(h)
    for step in range(100):
        beta = 1.01**step
        stable = softmax_map(pair, beta) @ Q
        assert torch.allclose(stable, torch.tanh(beta * h), atol=1e-12)
        g = loss_gradient(stable)
        pair, h = pair - lr * g[:, None] * Q, h - lr * g
        assert torch.allclose(u @ Q, w, atol=1e-10)
        g = loss_gradient(w)
        u, w = softmax_step(u, beta * lr * g[:, None] * Q), tanh_step(w, beta * lr * g)


def test_gradient_has_no_jacobian_and_the_limit_of_beta_is_the_sign() -> None:
    theta, g = normal(40).requires_grad_(), normal(40, seed=1)
    for beta in (1.0, 30.0, 1e35):
        (found,) = torch.autograd.grad(mirrored(beta)(theta), theta, g)
        assert torch.equal(found, g)
    assert torch.equal(mirrored(1e35)(theta).detach(), hard_sign(theta.detach()))


@pytest.mark.parametrize(
    ("kind", "plain", "options"),
    [(MirrorAdam, torch.optim.Adam, {"lr": 0.03}), (MirrorSGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9})],
)
def test_optimizer_maps_the_step_of_the_plain_one(kind: Any, plain: Any, options: dict[str, float]) -> None:
    """Against the plain optimizer on a parameter beside it, whose difference is the step."""
    w, b = torch.nn.Parameter(torch.tanh(normal(10))), torch.nn.Parameter(normal(3))
    shadow, c = torch.nn.Parameter(torch.zeros(10, dtype=F64)), torch.nn.Parameter(b.detach().clone())
    optimizer = kind([{"params": [w], "beta": 1.5}, {"params": [b], "beta": 0.0}], **options)
    reference = plain([shadow, c], **options)
    expected = w.detach().clone()
    for step in range(20):
        g, gb = normal(10, seed=step), normal(3, seed=step)
        for p, q, gradient in ((w, shadow, g), (b, c, gb)):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        before = shadow.detach().clone()
        optimizer.step()
        reference.step()
        expected = torch.tanh(torch.atanh(expected) - 1.5 * (before - shadow.detach()))
        assert torch.allclose(w.detach(), expected, atol=1e-11)
        assert torch.equal(b.detach(), c.detach())


def test_an_interrupted_step_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.nn.Parameter(torch.tanh(normal(5)))
    before = w.detach().clone()
    optimizer = MirrorSGD([{"params": [w], "beta": 1.0}], lr=0.1)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(w.detach(), before)


def test_primal_training_uses_the_scheduled_beta_and_stays_inside() -> None:
    method = create("mirror_descent", small_net(), variant="primal", beta_rate=1.2, beta_updates=4)
    qlab.fit(method, moons(), epochs=2, progress=False, test=False)
    for t in quantized_tensors(method.net):
        assert float(t.quantizer.get_buffer("beta")) == pytest.approx(1.2**3)
        assert t.latent.abs().max() < 1
        assert torch.equal(t.quantizer(t.latent), t.latent)


def test_primal_and_stable_training_agree_with_constant_beta() -> None:
    """Whole runs through Lightning in float32, the biases and the schedule of the learning rate included."""
    runs = []
    for variant in ("stable", "primal"):
        method = create("mirror_descent", small_net(), variant=variant, beta_updates=0, optimizer="sgd", lr=0.05)
        qlab.fit(method, moons(), epochs=2, progress=False, test=False)
        runs.append([t.quantizer(t.latent).detach() for t in quantized_tensors(method.net)])
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form", ["tanh", "softmax"])
@pytest.mark.parametrize("variant", ["stable", "primal"])
def test_every_form_learns(form: str, variant: str) -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32), affine=False, final_norm=True, seed=0)
    # Without sharpening, the primal form has to walk to ±1: on two moons at lr 0.01 it ends before it is there.
    method = create("mirror_descent", net, form=form, variant=variant, lr=0.01 if variant == "stable" else 0.1)
    run = qlab.fit(method, moons(n=1000), epochs=30, progress=False, validate_every=0)
    assert run.metrics["test/acc"] >= 0.9


def test_start_is_xavier_and_of_the_softmax_half_the_difference_of_two_draws() -> None:
    shape = torch.Size([40, 30, 3, 3])
    a = xavier(shape)
    assert a == pytest.approx((6 / (9 * 70)) ** 0.5)
    weight = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
    assert weight.abs().max() <= a
    latent = torch.empty(shape)
    tanh, softmax, primal = (
        MirrorWeight(form, variant).init(latent, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        for form, variant in (("tanh", "stable"), ("softmax", "stable"), ("tanh", "primal"))
    )
    assert float(tanh.var()) == pytest.approx(a**2 / 3, rel=0.03)
    assert float(softmax.var()) == pytest.approx(a**2 / 6, rel=0.03)
    assert torch.allclose(primal, torch.tanh(tanh), atol=1e-7)


def test_table_of_the_authors_can_be_run() -> None:
    method = create("mirror_descent", small_net(), beta_rate=1.02, beta_updates=500)
    for iteration in (0, 199, 200, 50_000, 99_999):
        assert method.schedule(iteration / 100_000)["beta"] == pytest.approx(1.02 ** (iteration // 200))


@pytest.mark.parametrize(
    ("name", "value"),
    [("form", "sin"), ("variant", "dual"), ("start", "zero"), ("beta_rate", 0.5), ("beta_updates", -1)],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        create("mirror_descent", small_net(), **{name: value})
