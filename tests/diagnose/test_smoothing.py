"""The smoothed gradient is unbiased, and says how far it can be trusted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from qlab.diagnose.smoothing import compared, reliability, rms, smoothed_gradient, subset
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize
from tests.diagnose.small_nets import batch, cross_entropy, foreign, generator, mlp


def enumerable() -> nn.Module:
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)).double(), Sign, Sign).eval()


def exact(net: nn.Module, x: Tensor, y: Tensor, s: float) -> np.ndarray:
    """Return grad L_s in the six weights of layer 0: a sum over all 64 sign patterns, weighted by normal probabilities.

    P(sign(w_i + s u_i) = b_i) = Phi(b_i w_i / s), whose derivative is b_i phi(w_i / s) / s.
    """
    latent = net[0].parametrizations.weight.original.detach()
    w = latent.flatten().numpy()
    last = net[2].weight.detach()
    g = np.zeros(6)
    for b in itertools.product((-1.0, 1.0), repeat=6):
        h = torch.where(x @ torch.tensor(b, dtype=torch.float64).reshape(2, 3).T >= 0, 1.0, -1.0).double()
        loss = float(cross_entropy(h @ last.T + net[2].bias.detach(), y).mean())
        P = norm.cdf(np.array(b) * w / s)
        for i in range(6):
            g[i] += loss * b[i] * norm.pdf(w[i] / s) / s * np.prod(np.delete(P, i))
    return g


@pytest.mark.parametrize("s", [0.2, 0.6])
def test_intervals_cover_the_enumerated_gradient(s: float) -> None:
    net, (x, y) = enumerable(), batch(6, 3)
    truth = exact(net, x, y, s)
    assert np.abs(truth).max() > 0.02
    inside = []
    for seed in range(40):
        found = smoothed_gradient(net, x, y, "0", s=s, pairs=200, loss="cross_entropy", seed=seed)
        low, high = found.interval
        inside.append((low.numpy() <= truth) & (truth <= high.numpy()))
    rate = np.mean(inside)  # 240 intervals of 95 %, of which 6 are drawn together: 0.95 +- 0.03 at two deviations
    assert 0.91 <= rate <= 0.985


def test_many_pairs_come_close_to_the_enumerated_gradient() -> None:
    net, (x, y) = enumerable(), batch(6, 3)
    found = smoothed_gradient(net, x, y, "0", s=0.5, pairs=20_000, loss="cross_entropy")
    truth = exact(net, x, y, 0.5)
    assert np.all(np.abs(found.gradient.numpy() - truth) < 4 * found.error.numpy())
    assert found.error.max() < 0.02 * np.abs(truth).max() + 0.005
    assert found.cosine(torch.from_numpy(truth)).raw > 0.99


def test_one_smoothed_sign_is_twice_the_normal_density() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[0.3]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out = torch.where(self.w >= 0, 1.0, -1.0).to(x) * torch.ones_like(x[:, :1])
            return torch.cat([out, torch.zeros_like(out)], 1)

    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    found = smoothed_gradient(One().eval(), x, y, "w", s=0.5, pairs=40_000, loss=lambda z, y: z[..., 0])
    assert 2 * norm.pdf(0.6) / 0.5 == pytest.approx(1.33290, abs=5e-6)
    assert float(found.gradient) == pytest.approx(1.33290, abs=4 * float(found.error))
    assert float(found.error) < 0.02


@pytest.mark.parametrize("s", [0.01, 1.0, 30.0])
def test_of_a_linear_loss_it_is_the_gradient_for_every_width(s: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 2, bias=False).double().eval()
    x, y = batch(7, 5, classes=2)
    found = smoothed_gradient(net, x, y, "weight", s=s, pairs=4000, loss=lambda z, y: z[..., 0] - 2 * z[..., 1])
    truth = torch.stack([x.mean(0), -2 * x.mean(0)]).flatten()
    assert bool(((found.gradient - truth).abs() < 4 * found.error).all())
    assert float(found.error.max()) < 0.05 * float(truth.norm())


def test_reliability_is_the_spearman_brown_formula_and_corrects_a_cosine() -> None:
    draw = generator(0)
    truth = torch.randn(4000, generator=draw, dtype=torch.float64)
    samples = truth + 12 * torch.randn(100, 4000, generator=draw, dtype=torch.float64)
    r = torch.cosine_similarity(samples[:50].mean(0), samples[50:].mean(0), dim=0)
    assert reliability(samples) == pytest.approx(float(2 * r / (1 + r)))
    c = compared(samples, truth)
    assert c.raw < 0.75  # the noise is larger than the signal
    assert c.corrected == pytest.approx(1, abs=0.08)
    assert c.corrected == pytest.approx(c.raw / math.sqrt(c.reliability))


def test_the_interval_of_a_cosine_is_the_jackknife() -> None:
    draw = generator(1)
    g = torch.randn(30, generator=draw, dtype=torch.float64)
    samples = g + 2 * torch.randn(20, 30, generator=draw, dtype=torch.float64)
    left_out = [
        torch.cosine_similarity(torch.cat([samples[:k], samples[k + 1 :]]).mean(0), g, dim=0) for k in range(20)
    ]
    c = torch.stack(left_out)
    error = float((19 / 20 * (c - c.mean()).square().sum()).sqrt())
    found = compared(samples, g)
    assert found.high - found.raw == pytest.approx(norm.ppf(0.975) * error, rel=1e-9)
    assert found.raw - found.low == pytest.approx(norm.ppf(0.975) * error, rel=1e-9)


def test_noise_has_no_corrected_cosine() -> None:
    noise = torch.randn(10, 50, generator=generator(0), dtype=torch.float64)
    noise[5:] = -noise[:5]  # the halves point in opposite directions
    assert math.isnan(compared(noise, torch.ones(50, dtype=torch.float64)).corrected)


def test_an_estimate_of_zero_has_no_reliability_and_an_interval_stays_among_the_cosines() -> None:
    assert math.isnan(reliability(torch.zeros(6, 4, dtype=torch.float64)))
    samples = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    found = compared(samples, samples.mean(0))
    assert found.raw == pytest.approx(1)
    assert found.high == 1
    assert -1 <= found.low < 1


def test_only_the_chosen_coordinates_are_smoothed_and_a_seed_repeats() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    index = torch.tensor([1, 30, 8])
    a, b = (smoothed_gradient(net, x, y, "hidden.3", index=index, pairs=20, seed=4) for _ in range(2))
    assert a.samples.shape == (20, 3)
    assert torch.equal(a.samples, b.samples)
    other = smoothed_gradient(net, x, y, "hidden.3", index=index, pairs=20, seed=5)
    assert not torch.equal(a.samples, other.samples)


def test_a_net_that_torch_func_does_not_know_is_run_one_by_one() -> None:
    x, y = batch(10, 8)
    a, b = (smoothed_gradient(foreign(old), x, y, "0", pairs=10, loss="cross_entropy") for old in (False, True))
    assert float(a.gradient.abs().max()) > 0
    torch.testing.assert_close(a.samples, b.samples, atol=1e-10, rtol=0)


def test_a_subset_is_drawn_without_replacement_in_order() -> None:
    chosen = subset(1000, 50, 0)
    assert len(set(chosen.tolist())) == 50
    assert chosen.tolist() == sorted(chosen.tolist())
    assert subset(10, 50, 0).tolist() == subset(10, None, 0).tolist() == list(range(10))
    assert rms(torch.tensor([3.0, -4.0])) == pytest.approx(math.sqrt(12.5))


def test_what_cannot_be_estimated_is_said() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    with pytest.raises(UnknownNameError, match="nowhere"):
        smoothed_gradient(net, x, y, "nowhere")
    with pytest.raises(InputError, match="at least 4 pairs"):
        smoothed_gradient(net, x, y, "fc", pairs=2)
    with pytest.raises(InputError, match="positive width"):
        smoothed_gradient(net, x, y, "fc", s=0.0)
    with pytest.raises(InputError, match="index runs from -1 to 99; there are 15 weights"):
        smoothed_gradient(net, x, y, "fc", index=torch.tensor([-1, 99]))
    with pytest.raises(InputError, match="a position twice"):
        smoothed_gradient(net, x, y, "fc", index=torch.tensor([3, 3]))
    with pytest.raises(InputError, match="training mode"):
        smoothed_gradient(net.train(), x, y, "fc")
