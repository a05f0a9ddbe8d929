"""Curvature, against full Hessians, PyHessian, closed forms and exact trust regions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.curvature import Hessian, constant_weights, curvature, curving
from qlab.diagnose.discrete import flip_pairs, stein
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, Uniform, quantize

Data = tuple[Tensor, Tensor]


def made(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double().eval()


def data(n: int = 20, seed: int = 1) -> Data:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def full(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the dense Hessian of the mean cross-entropy, (n, n)."""
    theta = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in theta.values()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split(sizes)
        some = {name: part.reshape(theta[name].shape) for name, part in zip(theta, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, some, (x,)), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch scripts its own forward-mode rules and warns of that
        return torch.func.hessian(loss)(torch.cat([p.flatten() for p in theta.values()]))


class Weights(nn.Module):
    """A net whose logits are its weights, whatever the input: the loss is any function of the weights."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


ONE: Data = (torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0]))


def quadratic(A: Tensor, c: Tensor) -> object:
    return lambda z, y: (z * (z @ A)).sum(-1) / 2 + z @ c


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_eigenvalues_trace_and_density_are_those_of_the_full_hessian(activation: type[nn.Module]) -> None:
    net, (x, y) = made(activation=activation), data()
    H = full(net, x, y)
    n = len(H)
    exact = torch.linalg.eigvalsh(H)
    top = exact[exact.abs().argsort(descending=True)][:3]
    found = curvature(net, x, y, top=3, tolerance=1e-12, probes=400, runs=40, steps=n)
    assert found.function == "the net"
    assert found.parameters == n
    assert np.allclose(found.eigenvalues, top.numpy(), atol=1e-9)
    assert found.trace == pytest.approx(float(H.trace()), abs=1e-10)  # a sketch wider than the net is all of it
    assert found.trace_error == pytest.approx(0, abs=1e-10)
    # As many steps as weights: every node that carries weight is an eigenvalue.
    distance = np.abs(found.nodes[:, :, None] - exact.numpy()).min(2)
    assert distance[found.weights > 1e-10].max() < 1e-8
    # The density's moments are Hutchinson's estimates of tr H^p / n from its own starts: so is their error.
    V = torch.randint(0, 2, (4000, n), generator=torch.Generator().manual_seed(8)).double() * 2 - 1
    for power in (1, 2, 3):
        spread = float(((V @ torch.linalg.matrix_power(H, power)) * V).sum(1).std()) / n
        assert abs(found.moment(power) - float((exact**power).mean())) < 4 * spread / math.sqrt(40)
    assert np.allclose(found.weights.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("probes", [5, 24])
def test_the_trace_is_unbiased_and_its_standard_error_is_the_spread_of_its_estimates(probes: int) -> None:
    net, (x, y) = made(), data()
    exact = float(full(net, x, y).trace())
    all_of = [curvature(net, x, y, top=0, probes=probes, runs=0, rho=0, seed=seed) for seed in range(150)]
    estimates, errors = np.array([f.trace for f in all_of]), np.array([f.trace_error for f in all_of])
    spread = estimates.std(ddof=1)
    assert abs(estimates.mean() - exact) < 4 * spread / math.sqrt(len(all_of))
    assert math.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.25)


def test_the_products_are_the_full_hessian_row_by_row() -> None:
    net, (x, y) = made(), data()
    theta = {name: p.detach() for name, p in net.named_parameters()}
    H = Hessian(lambda w: F.cross_entropy(torch.func.functional_call(net, w, (x,)), y), theta)
    eye = torch.eye(H.n, dtype=torch.float64)
    assert torch.allclose(H.products(eye), full(net, x, y), atol=1e-14)
    assert H.products_done == H.n


def test_one_diagonal_hessian_exactly() -> None:
    A = torch.diag(torch.tensor([10.0, 5, 1, 0.5, -3], dtype=torch.float64))
    net = Weights(torch.zeros(5, dtype=torch.float64)).eval()
    found = curvature(net, *ONE, loss=quadratic(A, torch.ones(5, dtype=torch.float64)), top=5, steps=5, probes=3)  # type: ignore[arg-type]
    assert found.eigenvalues.tolist() == pytest.approx([10, 5, -3, 1, 0.5], abs=1e-9)
    assert found.trace == pytest.approx(13.5, abs=1e-12)  # random signs give the trace of a diagonal matrix exactly
    assert found.trace_error == pytest.approx(0, abs=1e-12)
    assert np.allclose(found.nodes, [-3, 0.5, 1, 5, 10], atol=1e-12)
    assert np.allclose(found.weights, 0.2, atol=1e-12)


def test_pyhessian_finds_the_same() -> None:
    pyhessian = pytest.importorskip("pyhessian")
    net, (x, y) = made(), data(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its create_graph
        peer = pyhessian.hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            eigenvalues, _ = peer.eigenvalues(maxIter=2000, tol=1e-9, top_n=2)
            traces = peer.trace(maxIter=500, tol=0)
    net.zero_grad()
    found = curvature(net, x, y, top=2, tolerance=1e-10, probes=40, runs=0, rho=0)
    assert found.eigenvalues.tolist() == pytest.approx(eigenvalues, rel=1e-4)
    theirs = float(np.std(traces) / math.sqrt(len(traces)))
    assert abs(found.trace - float(np.mean(traces))) < 4 * math.hypot(found.trace_error, theirs)


def test_the_ball_sharpness_of_a_quadratic_is_its_trust_region() -> None:
    g = torch.Generator().manual_seed(4)
    A = torch.randn(6, 6, generator=g, dtype=torch.float64)
    A = (A + A.T) / 2
    c = torch.randn(6, generator=g, dtype=torch.float64)
    w, rho = torch.zeros(6, dtype=torch.float64), 0.7
    found = curvature(Weights(w).eval(), *ONE, loss=quadratic(A, c), rho=rho)  # type: ignore[arg-type]
    sam = rho * c / c.norm()
    assert found.sam == pytest.approx(float(sam @ A @ sam / 2 + c @ sam), abs=1e-12)
    # max e'Ae/2 + c'e on the sphere: (mu I - A) e = c with mu above the spectrum and ||e|| = rho
    values, vectors = torch.linalg.eigh(A)
    low, high = float(values[-1]), float(values[-1]) + 100.0
    for _ in range(200):
        mu = (low + high) / 2
        size = float(((vectors.T @ c) / (mu - values)).norm())
        low, high = (mu, high) if size > rho else (low, mu)
    e = vectors @ ((vectors.T @ c) / (mu - values))
    exact = float(e @ A @ e / 2 + c @ e)
    assert found.ball <= exact + 1e-12
    assert found.ball == pytest.approx(exact, rel=1e-3)
    assert found.ball >= found.sam


def binary(weights: bool, activations: bool, seed: int = 0) -> nn.Module:
    return quantize(
        made(seed), weights=Sign if weights else None, activations=(lambda: Sign()) if activations else None
    ).eval()


@pytest.mark.parametrize(("weights", "activations"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("function", [None, "deployed"])
def test_a_piecewise_constant_loss_is_refused_with_the_reason(
    weights: bool, activations: bool, function: object
) -> None:
    x, y = data()
    with pytest.raises(InputError, match=r"piecewise constant in .*(quantized by Sign|step function).*smoothed"):
        curvature(binary(weights, activations), x, y, function)  # type: ignore[arg-type]


def test_sign_activations_make_the_layers_before_them_constant_and_leave_the_last_one() -> None:
    x, y = data()
    net = binary(False, True)
    assert set(constant_weights(net, x)) == {"0.weight", "0.bias"}
    found = curvature(net, x, y, names=["2.weight", "2.bias"], runs=0, rho=0, tolerance=1e-12)
    head = nn.Sequential(nn.Linear(5, 3)).double().eval()
    head.load_state_dict({"0.weight": net[2].weight, "0.bias": net[2].bias})  # type: ignore[index]
    exact = torch.linalg.eigvalsh(full(head, net[1](net[0](x)).detach(), y))  # type: ignore[index]
    assert found.eigenvalues[0] == pytest.approx(float(exact[-1]), abs=1e-10)


def test_a_float_net_has_no_constant_weights_and_a_uniform_quantizer_makes_some() -> None:
    x, _ = data()
    assert constant_weights(made(activation=nn.ReLU), x) == {}
    net = quantize(made(), weights=lambda: Uniform(4)).eval()
    reasons = constant_weights(net, x)
    assert all("Uniform" in reason for reason in reasons.values())
    assert len(reasons) == 2


def test_a_hand_made_step_without_the_labs_quantizers_is_found_numerically() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.sign(x) - x).detach() + x

    net = nn.Sequential(made()[0], Step(), made()[2]).eval()  # type: ignore[index]
    x, y = data()
    assert set(constant_weights(net, x)) == {"0.weight", "0.bias"}
    with pytest.raises(InputError, match="step function"):
        curvature(net, x, y)


class Shortcut(nn.Module):
    """A layer whose output goes on both through a map and past it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.b = made()[0], act, made()[2]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.act(h) + h)


class HandMade(nn.Module):
    """A straight-through sign."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sign(x) - x).detach() + x


@pytest.mark.parametrize(("act", "function"), [(Sign(), None), (Sign(), "deployed"), (HandMade(), None)])
def test_a_straight_through_rule_beside_a_shortcut_is_refused(act: nn.Module, function: object) -> None:
    """No weight is piecewise constant there, and yet what back-propagation gives is the slope of no function."""
    net, (x, y) = Shortcut(act).eval(), data()
    assert constant_weights(net, x) == {}
    with pytest.raises(InputError, match=r"has slope .*back-propagation claims .*straight-through"):
        curvature(net, x, y, function)  # type: ignore[arg-type]
    behind = curvature(net, x, y, function, names=["b.weight"], runs=0, rho=0, tolerance=1e-12)  # type: ignore[arg-type]
    assert np.isfinite(behind.eigenvalues).all()


def test_kinks_and_weights_of_zero_are_no_straight_through_rule() -> None:
    x, y = data()
    x = torch.cat([x, torch.zeros(20, 4, dtype=torch.float64)]).roll(
        20, 0
    )  # the first examples are zero: on every kink
    net = made(activation=nn.ReLU)
    with torch.no_grad():
        net[0].bias.zero_()  # type: ignore[index]
    assert np.isfinite(curvature(net, x, y.repeat(2), runs=0, rho=0).eigenvalues).all()


def test_a_net_that_casts_to_float32_is_told_so() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.float())

    x, y = data()
    with pytest.raises(InputError, match="does not run in float64"):
        curvature(Casting().eval(), x.float(), y)


@pytest.mark.parametrize("function", ["smoothed", "surrogate"])
def test_the_functions_that_have_a_hessian_are_looked_at_instead(function: object) -> None:
    from qlab.diagnose.functions import variant

    x, y = data()
    net = binary(True, True)
    found = curvature(net, x, y, function, tolerance=1e-12, k=2.0, top=2, probes=4, runs=1, steps=5)  # type: ignore[arg-type]
    exact = torch.linalg.eigvalsh(full(variant(net, function, 2.0), x, y))  # type: ignore[arg-type]
    exact = exact[exact.abs().argsort(descending=True)]
    assert found.eigenvalues.tolist() == pytest.approx(exact[:2].tolist(), abs=1e-9)
    assert found.function == function
    assert str(function) in found.summary()


def test_stein_gives_the_hessian_of_a_quadratic_within_its_standard_errors() -> None:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=g, dtype=torch.float64)
    A = A + A.T
    c = torch.randn(4, generator=g, dtype=torch.float64)
    net = Weights(torch.randn(4, generator=g, dtype=torch.float64)).eval()
    V = torch.randn(5, 4, generator=g, dtype=torch.float64)
    found = stein(net, *ONE, {"w": V}, s=0.3, pairs=20000, loss=quadratic(A, c))  # type: ignore[arg-type]
    exact = ((V @ A) * V).sum(1).numpy()
    assert np.all(np.abs(found.values - exact) < 4 * found.errors)
    fewer = stein(net, *ONE, {"w": V}, s=0.3, pairs=5000, loss=quadratic(A, c))  # type: ignore[arg-type]
    assert np.allclose(fewer.errors / found.errors, 2, rtol=0.2)
    assert "deployed" in found.summary()


def test_stein_differentiates_a_sign_where_the_hessian_is_zero() -> None:
    class Bit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, 0.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.w >= 0, 1.0, -1.0).double().expand(len(x), -1)

    s, w = 0.5, 0.3
    # E sign(w + s u) = erf(w / (s sqrt 2)); its second derivative is -2 w / s^3 phi(w / s)
    exact = -2 * w / s**3 * math.exp(-((w / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    v = {"w": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    found = stein(Bit().eval(), *ONE, v, s=s, pairs=40000, loss=lambda z, y: z[:, 0])
    assert abs(found.values[0] - exact) < 4 * found.errors[0]
    assert found.errors[0] < 0.1 * abs(exact)


def test_discrete_curvature_of_a_quadratic_is_4_b_i_b_j_A_ij() -> None:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=g, dtype=torch.float64)
    A = A + A.T
    c = torch.randn(6, generator=g, dtype=torch.float64)
    b = torch.tensor([1.0, -1, -1, 1, 1, -1], dtype=torch.float64)
    found = flip_pairs(Weights(b.clone()).eval(), *ONE, "w", range(6), loss=quadratic(A, c))  # type: ignore[arg-type]
    expected = 4 * torch.outer(b, b) * A
    off = ~np.eye(6, dtype=bool)
    assert np.allclose(found.second[off], expected.numpy()[off], atol=1e-12)
    assert np.allclose(found.first, (-2 * b * (A @ b + c) + 2 * A.diagonal()).numpy(), atol=1e-12)
    assert np.allclose(np.diag(found.second), -2 * found.first, atol=1e-12)


def test_a_latent_weight_of_zero_counts_as_plus_one_and_flips_to_minus_one() -> None:
    net, (x, y) = binary(True, False), data()
    latent = net[0].parametrizations.weight.original  # type: ignore[index]
    with torch.no_grad():
        latent[0, 0] = 0
    zero = flip_pairs(net, x, y, "0", [0, 1])
    with torch.no_grad():
        latent[0, 0] = 0.5
    half = flip_pairs(net, x, y, "0", [0, 1])
    assert np.array_equal(zero.first, half.first)
    assert zero.first[0] != 0


def test_flips_of_a_binary_net_are_differences_of_its_own_losses() -> None:
    x, y = data()
    net = binary(True, True)
    found = flip_pairs(net, x, y, "0", count=4, seed=3)
    latent = net[0].parametrizations.weight.original  # type: ignore[index]

    def loss(*which: int) -> float:
        with torch.no_grad():
            before = latent.clone()
            for i in which:
                latent.view(-1)[i] *= -1
            value = float(F.cross_entropy(net(x), y))
            latent.copy_(before)
        return value

    i, j = (int(k) for k in found.indices[:2])
    assert found.second[0, 1] == pytest.approx(loss(i, j) - loss(i) - loss(j) + loss(), abs=1e-12)
    assert found.first[0] == pytest.approx(loss(i) - loss(), abs=1e-12)
    assert len(found.frame()) == 6


def test_results_come_part_by_part_and_the_last_is_the_whole() -> None:
    net, (x, y) = made(), data()
    updates = list(curving(net, x, y, runs=2, steps=5))
    assert [u.fraction for u in updates] == sorted(u.fraction for u in updates)
    first, last = updates[0].value, updates[-1].value
    assert first.eigenvalues.size == 0
    assert math.isnan(first.trace)
    for part in (first, last):
        assert part.summary()
        assert str(part.figure().get_label()) == part.summary()
        assert len(part.frame()) == 5 + len(part.eigenvalues)
    again = curvature(net, x, y, runs=2, steps=5)
    assert np.array_equal(again.nodes, last.nodes)
    assert again.trace == last.trace


def test_the_global_generator_is_left_alone_and_the_net_unchanged() -> None:
    net, (x, y) = made(), data()
    before = torch.default_generator.get_state()
    weights = [p.clone() for p in net.parameters()]
    curvature(net, x, y, runs=1, steps=3, probes=2)
    assert torch.equal(before, torch.default_generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_nets_and_arguments_that_make_no_sense_are_refused() -> None:
    x, y = data()
    with pytest.raises(InputError, match="training mode"):
        curvature(made().train(), x, y)
    broken = made()
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(InputError, match="NaN"):
        curvature(broken, x, y)
    with pytest.raises(InputError, match="not finite"):
        curvature(made(), x, y, loss=lambda z, y: (z[:, 0] * 0).sqrt() * math.inf)
    with pytest.raises(UnknownNameError):
        curvature(made(), x, y, names=["nobody"])
    with pytest.raises(InputError, match="negative"):
        curvature(made(), x, y, probes=-1)
    with pytest.raises(InputError, match="distinct"):
        flip_pairs(made(), x, y, "0.weight", [1, 1])
    with pytest.raises(UnknownNameError):
        flip_pairs(made(), x, y, "nobody")
    with pytest.raises(InputError, match="s must be"):
        stein(made(), x, y, {"0.weight": torch.zeros(1, 5, 4, dtype=torch.float64)}, s=0)
