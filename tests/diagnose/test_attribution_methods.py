"""The methods equal brute force, closed forms, autograd and captum's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.attribution import attribute
from qlab.diagnose.attribution_methods import METHODS
from qlab.quantizers import Sign
from tests.diagnose.attribution_nets import batch, cnn, difference, fresh, mlp


@pytest.mark.parametrize("activation", [nn.ReLU, Sign])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ablation_equals_brute_force(activation: Callable[[], nn.Module], size: int) -> None:
    net, x = cnn(activation), batch(3, 1, 6, 6)
    a = attribute(net, x, torch.tensor([0, 2, 1]), ("feature_ablation",), baseline=0.3, features=size)
    M = math.ceil(6 / size) ** 2
    expected = np.empty((3, M))
    with torch.no_grad():
        for n, c in enumerate((0, 2, 1)):
            for m, (r, k) in enumerate(itertools.product(range(0, 6, size), repeat=2)):
                z = x[n : n + 1].clone()
                z[..., r : r + size, k : k + size] = 0.3
                expected[n, m] = net(x[n : n + 1])[0, c] - net(z)[0, c]
    np.testing.assert_allclose(a["feature_ablation"].scores, expected, atol=1e-12)
    np.testing.assert_allclose(a.ablation, expected, atol=1e-12)


def test_flips_equal_brute_force() -> None:
    net, x = mlp(Sign), batch(4, 6).sign()
    a = attribute(net, x, 0, ("saliency",))
    with torch.no_grad():
        for m in range(6):
            z = x.clone()
            z[:, m] *= -1
            np.testing.assert_allclose(a.flips[:, m], (net(x) - net(z))[:, 0].numpy(), atol=1e-12)


def shapley(net: nn.Module, x: Tensor, target: int) -> np.ndarray:
    """Return the exact Shapley values (N, M) by enumerating all subsets; the baseline is zero."""
    M = x.shape[1]
    subsets = torch.tensor(list(itertools.product([0, 1], repeat=M)), dtype=x.dtype)
    with torch.no_grad():
        v = torch.stack([net(x * s)[:, target] for s in subsets])
    index = {tuple(map(int, s)): i for i, s in enumerate(subsets)}
    out = torch.zeros_like(x)
    for s, i in index.items():
        for m in range(M):
            if not s[m]:
                weight = math.factorial(sum(s)) * math.factorial(M - sum(s) - 1) / math.factorial(M)
                joined = index[(*s[:m], 1, *s[m + 1 :])]
                out[:, m] += weight * (v[joined] - v[i])
    return out.numpy()


def test_shapley_sampling_converges_to_exact_shapley_values() -> None:
    net, x = mlp(Sign), batch(5, 6)
    exact = shapley(net, x, 1)
    np.testing.assert_allclose(exact.sum(1), difference(net, x, 1), rtol=1e-9)  # the reference itself is complete
    errors = []
    for samples in (8, 800):
        m = attribute(net, x, 1, ("shapley_sampling",), samples=samples, seed=3)["shapley_sampling"]
        assert (m.residual <= samples * 2**-24 * np.abs(m.scores).sum(1)).all()  # captum adds up in float32
        errors.append(np.sqrt(((m.scores - exact) ** 2).mean()))
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("relu", [True, False])
def test_gradcam_equals_a_hand_written_one(relu: bool) -> None:
    net, x = cnn(Sign), batch(4, 1, 6, 6)
    got = attribute(net, x, 1, ("layer_gradcam",), layer="0", relu=relu)["layer_gradcam"].values
    A = net[0](x).detach().requires_grad_()  # type: ignore[index]
    (g,) = torch.autograd.grad(net[1:](A)[:, 1].sum(), A)  # type: ignore[index]
    cam = (g.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)
    np.testing.assert_allclose(got, (cam.relu() if relu else cam).detach().numpy(), atol=1e-12)
    assert (got < 0).any() != relu


def test_gradient_maps_equal_autograd() -> None:
    net, x = mlp(nn.Tanh), batch(4, 6).requires_grad_()
    (g,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    a = attribute(net, x, 2, ("saliency", "input_x_gradient"))
    np.testing.assert_allclose(a["saliency"].values, g.abs().numpy(), atol=1e-14)
    np.testing.assert_allclose(a["input_x_gradient"].values, (x * g).detach().numpy(), atol=1e-14)


def test_smoothgrad_equals_noise_tunnel_with_the_same_noise() -> None:
    from captum.attr import NoiseTunnel, Saliency

    net, x = mlp(nn.Tanh, inputs=16).float(), batch(1, 16).float()
    got = attribute(net, x, 1, ("smoothgrad",), samples=8, noise=0.1, seed=7)["smoothgrad"].values
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        spread = 0.1 * float(x.max() - x.min())
        peer = NoiseTunnel(Saliency(net)).attribute(
            x.requires_grad_(), nt_samples=8, stdevs=spread, target=1, abs=False
        )
    np.testing.assert_allclose(got, peer.detach().numpy(), atol=1e-6)


def test_the_place_in_the_batch_does_not_matter() -> None:
    net, x = mlp(Sign), batch(4, 6)
    methods = [name for name in METHODS if name not in ("layer_gradcam", "guided_backprop", "deconvolution")]
    a, b = attribute(net, x, 1, methods, samples=3), attribute(net, x.flip(0), 1, methods, samples=3)
    for p, q in zip(a.maps, b.maps, strict=True):
        np.testing.assert_allclose(p.values, q.values[::-1], atol=1e-7)


def test_occlusion_with_a_window_of_one_is_ablation() -> None:
    net, x = mlp(Sign), batch(4, 6)
    a = attribute(net, x, 1, ("occlusion", "feature_ablation"), window=1)
    np.testing.assert_allclose(a["occlusion"].scores, a["feature_ablation"].scores, atol=1e-12)


def test_infidelity_is_zero_for_a_linear_net_and_not_for_shuffled_scores() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(4, 6)
    a = attribute(net, x, 1, ("input_x_gradient", "saliency"), scores=True)
    assert a["input_x_gradient"].infidelity.max() < 1e-12
    assert a["saliency"].infidelity.min() > 1e-4
    assert a["input_x_gradient"].sensitivity.max() < 1.0
    assert a["saliency"].sensitivity.max() < 1e-12  # the gradient of a linear net does not move


@pytest.mark.parametrize(("output", "of"), [("probability", torch.softmax), ("log_probability", torch.log_softmax)])
def test_outputs_are_per_example(output: str, of: Callable[[Tensor, int], Tensor]) -> None:
    net, x = mlp(nn.Tanh), batch(4, 6)
    with torch.no_grad():
        expected = (of(net(x), 1) - of(net(torch.zeros_like(x)), 1))[:, 2]
    np.testing.assert_allclose(attribute(net, x, 2, ("saliency",), output=output).difference, expected, rtol=1e-12)


def test_gradcam_of_a_small_layer_is_spread_bilinearly() -> None:
    net, x = cnn(nn.ReLU), batch(4, 1, 6, 6)
    got = attribute(net, x, 1, ("layer_gradcam",), layer="4", relu=False)["layer_gradcam"].values
    A = net[:5](x).detach().requires_grad_()  # type: ignore[index]
    (g,) = torch.autograd.grad(net[5:](A)[:, 1].sum(), A)  # type: ignore[index]
    cam = (g.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)
    expected = nn.functional.interpolate(cam, (6, 6), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-12)


def test_occlusion_of_pictures_takes_all_channels_and_averages_over_windows() -> None:
    net = fresh(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = batch(2, 3, 4, 4)
    total, count = np.zeros((2, 4, 4)), np.zeros((4, 4))
    with torch.no_grad():
        for r, c in itertools.product(range(3), repeat=2):
            z = x.clone()
            z[:, :, r : r + 2, c : c + 2] = 0
            total[:, r : r + 2, c : c + 2] += (net(x) - net(z))[:, 1].numpy()[:, None, None]
            count[r : r + 2, c : c + 2] += 1
    got = attribute(net, x, 1, ("occlusion",), window=2)["occlusion"].values
    np.testing.assert_allclose(got, np.broadcast_to((total / count)[:, None], x.shape), atol=1e-6)


# ---- scores of the scores -----------------------------------------------------------------------------------------------


def test_infidelity_is_the_mean_over_all_subsets_at_the_best_scale() -> None:
    net, x = mlp(Sign), batch(3, 6)
    m = attribute(net, x, 1, ("saliency",), baseline=0.5, samples=4000, scores=True)["saliency"]
    S = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    with torch.no_grad():
        change = torch.stack([(net(x) - net(torch.where(s > 0, torch.full_like(x, 0.5), x)))[:, 1] for s in S]).numpy()
    told = S.numpy() @ m.scores.T
    beta = (told * change).mean(0) / (told**2).mean(0)
    np.testing.assert_allclose(m.infidelity, ((beta * told - change) ** 2).mean(0), rtol=0.05)


def test_sensitivity_of_a_linear_net_is_within_its_closed_form() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(8, 6)
    m = attribute(net, x, 1, ("input_x_gradient",), scores=True)["input_x_gradient"]
    w = net.get_parameter("weight")[1].detach()
    most = (0.02 * (x.max() - x.min()) * w.norm() / (w * x).norm(dim=1)).numpy()  # at a corner of the box
    assert (m.sensitivity <= most).all()
    assert (m.sensitivity > most / 3).all()


def test_neighbours_keep_the_target_and_the_baseline_of_their_example() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(3, 6)
    x0 = torch.tensor([0.0, 50.0, -50.0], dtype=torch.float64)[:, None]
    a = attribute(net, x, torch.tensor([0, 1, 2]), ("saliency", "deeplift"), baseline=x0, scores=True)
    assert a["saliency"].sensitivity.max() < 1e-12
    assert a["deeplift"].sensitivity.max() < 0.2
