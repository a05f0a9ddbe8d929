"""Mean field, against closed forms, brute-force integrals and wide random nets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from qlab.diagnose.meanfield import (
    ACTIVATIONS,
    chi,
    correlation_map,
    length_map,
    meanfield,
    simulate,
)
from qlab.diagnose.meanfield_chain import predicted_gradients
from qlab.diagnose.signal import signal
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import SURROGATES, Sign, quantize
from qlab.quantizers.surrogates import surrogate

PHI = {
    "sign": lambda u: np.where(u >= 0, 1.0, -1.0),
    "hardtanh": lambda u: np.clip(u, -1, 1),
    "relu": lambda u: np.maximum(u, 0),
    "tanh": np.tanh,
    "identity": lambda u: u,
}


def mean(f: object, points: tuple[float, ...] = ()) -> float:
    """Return E[f(z)] by adaptive quadrature."""
    inside = sorted(p for p in points if abs(p) < 12) or None
    return float(integrate.quad(lambda z: f(z) * stats.norm.pdf(z), -12, 12, points=inside, limit=400)[0])  # type: ignore[operator]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("q", [0.01, 0.7, 3.0, 256.0])
def test_the_length_map_is_the_integral(activation: str, q: float) -> None:
    s = math.sqrt(q)
    exact = mean(lambda z: PHI[activation](s * z) ** 2, (-1 / s, 0, 1 / s))
    assert length_map(q, activation, 1.7, 0.2) == pytest.approx(1.7 * exact + 0.2, rel=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("q", [0.3, 4.0, 100.0])
@pytest.mark.parametrize("c", [-0.6, 0.0, 0.5, 0.95])
def test_the_correlation_map_is_the_double_integral(activation: str, q: float, c: float) -> None:
    # An even grid over both Gaussians, fine enough for 1e-4.
    z = np.linspace(-8, 8, 1601)
    p = stats.norm.pdf(z) * (z[1] - z[0])
    u1 = math.sqrt(q) * z[:, None]
    u2 = math.sqrt(q) * (c * z[:, None] + math.sqrt(1 - c**2) * z[None])
    phi = PHI[activation]
    cross = float(p @ (phi(u1) * phi(u2)) @ p)
    square = float(p @ phi(u1[:, 0]) ** 2)
    expected = (1.3 * cross + 0.1) / (1.3 * square + 0.1)
    assert correlation_map(c, q, activation, 1.3, 0.1) == pytest.approx(expected, abs=2e-3)  # type: ignore[arg-type]


def test_the_arcsin_law_and_the_ends_of_the_correlation_map() -> None:
    for c in (-1.0, -0.3, 0.0, 0.8, 1.0):
        assert correlation_map(c, 5.0, "sign") == pytest.approx(2 / math.pi * math.asin(c), abs=1e-15)
    for activation in ACTIVATIONS:
        assert correlation_map(1.0, 0.8, activation, 1.5, 0.3) == pytest.approx(1, abs=1e-12)
    for activation in ("hardtanh", "tanh", "identity", "sign"):
        assert correlation_map(-1.0, 0.8, activation) == pytest.approx(-1, abs=1e-12)  # type: ignore[arg-type]
        assert correlation_map(0.0, 0.8, activation) == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["hardtanh", "relu", "tanh", "identity"])
def test_chi_is_the_slope_of_the_correlation_map_at_one_at_the_fixed_point(activation: str) -> None:
    found = meanfield(activation, 5, 1.6, 0.05) if activation != "identity" else meanfield("identity", 5, 0.9, 0.05)  # type: ignore[arg-type]
    q, w = found.q_star, found.sigma_w2
    assert length_map(q, activation, w, 0.05) == pytest.approx(q, rel=1e-10)  # type: ignore[arg-type]
    h = 1e-4
    below = [correlation_map(1 - k * h, q, activation, w, 0.05) for k in (1, 4)]  # type: ignore[arg-type]
    # The map is 1 - chi eps + k eps^{3/2} where phi has a kink: extrapolated in sqrt(eps).
    slopes = [(1 - b) / (k * h) for b, k in zip(below, (1, 4), strict=True)]
    smooth = activation in ("tanh", "identity")
    slope = (4 * slopes[0] - slopes[1]) / 3 if smooth else 2 * slopes[0] - slopes[1]
    assert found.chi_forward == pytest.approx(slope, rel=1e-4)
    assert found.chi_backward == found.chi_forward


def test_relu_at_two_is_critical_and_keeps_lengths_and_gradients() -> None:
    found = meanfield("relu", 30, 2.0)
    assert np.allclose(found.q, 1)
    assert np.allclose(found.gradient, 1)
    assert found.chi_backward == 1
    assert found.depth_scale == math.inf
    assert "are kept" in found.summary()
    assert meanfield("relu", 5, 2.5).q_star == math.inf
    assert meanfield("relu", 5, 1.5).q_star == 0


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("q", [0.5, 2.0, 64.0])
def test_the_backward_chi_of_sign_is_the_integral_of_its_surrogate(name: str, q: float) -> None:
    d = surrogate(name).derivative
    s = math.sqrt(q)
    points = (-1 / s, -0.1 / s, 0, 0.1 / s, 1 / s)
    exact = mean(lambda z: float(d(torch.tensor(s * z, dtype=torch.float64))) ** 2, points)
    assert chi(q, "sign", 3.0, name) == pytest.approx(3 * exact, rel=1e-6)


def test_a_net_of_sign_forgets_its_input_and_has_an_infinite_forward_slope() -> None:
    found = meanfield("sign", 60, 1.0, 0.0, c0=0.9)
    assert found.c_star == pytest.approx(0, abs=1e-6)
    assert found.q_star == 1
    assert found.chi_forward == math.inf
    assert found.chi_backward == pytest.approx(math.erf(1 / math.sqrt(2)))
    assert (found.gradient[0] / found.gradient[1]) == pytest.approx(found.chi_backward)
    # Unscaled +-1 weights: u grows to sqrt(n), so few pre-activations are within the rule, and yet gradients explode.
    wide = meanfield("sign", 3, 256.0)
    assert wide.chi_backward == pytest.approx(256 * math.erf(1 / math.sqrt(512)))
    assert "explode" in wide.summary()


@pytest.mark.parametrize("weights", ["gaussian", "sign"])
@pytest.mark.parametrize(
    ("activation", "sigma_w2", "sigma_b2"),
    [("sign", 1.0, 0.1), ("tanh", 1.5, 0.05), ("hardtanh", 1.5, 0.05), ("relu", 2.0, 0.0)],
)
def test_wide_random_nets_do_what_mean_field_says(
    weights: str, activation: str, sigma_w2: float, sigma_b2: float
) -> None:
    found = meanfield(activation, 6, sigma_w2, sigma_b2, q0=0.8, c0=0.6)  # type: ignore[arg-type]
    found = simulate(found, 300, 60, weights=weights, seed=0)  # type: ignore[arg-type]
    measured = found.measured
    assert measured is not None
    assert np.allclose(measured.q, found.q, rtol=0.08)
    assert np.allclose(measured.c, found.c, atol=0.04)
    assert np.allclose(np.log(measured.gradient), np.log(found.gradient), atol=0.15)
    assert f"{weights} weights" in found.summary()


@pytest.mark.parametrize(("width", "factor"), [(256, 1), (257, 2)])
def test_bare_signs_have_even_or_odd_preactivations_and_an_odd_fan_in_doubles_the_clipped_chi(
    width: int, factor: int
) -> None:
    # Of u = sum of n signs, the clipped rule lets |u| <= 1 pass: u = 0 for even n, but u = -1 and 1 for odd n.
    found = simulate(meanfield("sign", 3, float(width), q0=0.5), width, 200, weights="sign")
    measured = found.measured
    assert measured is not None
    # The first layer back, whose pre-activations are Gaussian, is as predicted; the two behind it are on the lattice.
    growth = measured.gradient[:-1] / measured.gradient[1:]
    assert growth[0] == pytest.approx(found.gradient[0] / found.gradient[1], rel=0.1)
    assert np.allclose(growth[1:], factor * found.gradient[1:-1] / found.gradient[2:], rtol=0.15)


def test_the_distance_to_mean_field_falls_with_the_width() -> None:
    found = meanfield("tanh", 5, 1.5, 0.05)
    wrong = []
    for width, nets in ((20, 200), (320, 40)):
        measured = simulate(found, width, nets).measured
        assert measured is not None
        wrong.append(abs(math.log(measured.gradient[0] / found.gradient[0])))
    assert wrong[1] < wrong[0]


def random_chain(hidden: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        n = 64
        for _ in range(3):
            layers += [nn.Linear(n, hidden, bias=False), nn.BatchNorm1d(hidden, affine=False), nn.ReLU()]
            n = hidden
        net = nn.Sequential(*layers, nn.Linear(n, 10, bias=False)).double()
    net = quantize(net, weights=Sign, activations=Sign)
    for latent in net.parameters():
        latent.data = torch.randn(latent.shape, generator=g, dtype=torch.float64)
    x = torch.randn(512, 64, generator=g, dtype=torch.float64)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = None
    with torch.no_grad():
        net(x)  # the running statistics of these random weights
    return net.eval(), x, torch.randint(0, 10, (512,), generator=g)


def test_gradients_of_a_random_binary_net_with_batch_norm_are_predicted_layer_by_layer() -> None:
    net, x, y = random_chain(400)
    predicted = predicted_gradients(net, x)
    found = signal(net, x, y, beta=1e-3)
    assert list(predicted) == list(found.names)
    relative = np.sqrt((found.gradient**2).mean(1) / (found.gradient[-1] ** 2).mean())
    for name, value in zip(found.names, relative, strict=True):
        assert predicted[name] == pytest.approx(value, rel=0.12), name


def test_the_variance_over_examples_is_not_biased_by_few_of_them() -> None:
    # 1 / ||g||^2 before a batch norm is linear in the variance, whose unbiased estimate is the mean of those of all pairs.
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, affine=False)).double().eval()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    pairs = [predicted_gradients(net, x[[i, j]])["input"] ** -2 for i in range(5) for j in range(i)]
    assert predicted_gradients(net, x)["input"] ** -2 == pytest.approx(np.mean(pairs), rel=1e-10)
    with pytest.raises(InputError, match="at least two"):
        predicted_gradients(net, x[:1])


def test_random_nets_take_the_surrogate_of_their_prediction() -> None:
    prediction = meanfield("sign", 4, q0=1.0, which="identity")
    measured = simulate(prediction, 200, 20).measured
    assert measured is not None
    assert np.allclose(np.log(measured.gradient), np.log(prediction.gradient), atol=0.1)


@pytest.mark.parametrize("norm", [True, False])
def test_biases_and_affine_norms_are_predicted_too(norm: bool) -> None:
    g = torch.Generator().manual_seed(3)
    hidden, layers, n = 500, [], 100
    for _ in range(2):
        layers += [nn.Linear(n, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.Tanh()]
        n = hidden
    net = nn.Sequential(*layers, nn.Linear(n, 10)).double()
    with torch.no_grad():
        for m in net:
            if isinstance(m, nn.Linear):
                m.weight.normal_(0, 1.5 / math.sqrt(m.in_features), generator=g)
                m.bias.normal_(0, 1.2, generator=g)
            elif isinstance(m, nn.BatchNorm1d):
                m.weight.fill_(1.4)  # scales that differ make units no samples of one Gaussian
                m.bias.normal_(0, 0.8, generator=g)
                m.momentum = None
        x = torch.randn(512, 100, generator=g, dtype=torch.float64)
        net.train()(x)
    net.eval()
    predicted = predicted_gradients(net, x)
    found = signal(net, x, torch.randint(0, 10, (512,), generator=g), beta=1e-3)
    relative = np.sqrt((found.gradient**2).mean(1) / (found.gradient[-1] ** 2).mean())
    for name, value in zip(found.names, relative, strict=True):
        assert predicted[name] == pytest.approx(value, rel=0.1), name


def test_flat_pictures_and_linear_nets_are_chains_too() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False)).double().eval()
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = predicted_gradients(net, x)
    assert found["input"] == pytest.approx(float(net[1].weight.detach().square().mean() * 16) ** 0.5)
    assert found["1"] == 1


def test_what_mean_field_does_not_cover_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lin(x)

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match="chain"):
        predicted_gradients(Residual().eval(), x)
    with pytest.raises(InputError, match="knows no GELU"):
        predicted_gradients(nn.Sequential(nn.Linear(6, 3), nn.GELU()).double().eval(), x)
    with pytest.raises(UnknownNameError):
        meanfield("swish")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="variance"):
        meanfield("tanh", sigma_w2=-1)
    with pytest.raises(InputError, match="depth"):
        meanfield("tanh", 0)
    with pytest.raises(InputError, match="correlation"):
        correlation_map(1.5, 1.0, "tanh")
    with pytest.raises(InputError, match="surrogate is for sign"):
        meanfield("tanh", which="clipped")
    with pytest.raises(UnknownNameError):
        simulate(meanfield("tanh"), weights="cauchy")  # type: ignore[arg-type]


def test_results_can_be_read_drawn_and_repeated() -> None:
    found = simulate(meanfield("sign", 4), 50, 3)
    assert list(found.frame()["layer"]) == [0, 1, 2, 3, 4]
    assert str(found.figure().get_label()) == found.summary()
    again = simulate(meanfield("sign", 4), 50, 3)
    assert again.measured is not None
    assert found.measured is not None
    assert np.array_equal(found.measured.q, again.measured.q)
    assert meanfield("sign", 4).figure() is not None
