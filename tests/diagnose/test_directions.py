"""Directions are those of the papers: filter norms, running statistics, principal components with their null."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import nn

import qlab
from qlab.diagnose.directions import (
    between,
    given,
    gradient_direction,
    normalised,
    orthogonal,
    principal_axes,
    random_direction,
    random_walk_variance,
)
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize
from tests.diagnose.nets import batch, trained


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_every_filter_is_as_long_as_the_nets_own_and_vectors_stay(model: str) -> None:
    shape = (6,) if model == "mlp" else (1, 16, 16)
    net = quantize(qlab.build(model, shape, 3, seed=0).double(), Sign)
    d = random_direction(net, seed=3)
    raws = random_direction(net, seed=3, normalise=None)
    for name, p in net.named_parameters():
        w = p.detach()
        if w.dim() == 1:
            assert not d.get(name, torch.zeros(1)).any()
            continue
        for f in range(len(w)):
            raw = raws[name][f]
            torch.testing.assert_close(d[name][f], raw * w[f].norm() / (raw.norm() + 1e-10), rtol=1e-12, atol=0)
            assert abs(float(d[name][f].norm() - w[f].norm())) < 1e-8


def test_layer_normalisation_scales_whole_tensors() -> None:
    net = trained("float")
    d, raw = (random_direction(net, 1, n) for n in ("layer", None))
    for name, w in net.named_parameters():
        if w.dim() > 1:
            torch.testing.assert_close(d[name], raw[name] * w.norm() / (raw[name].norm() + 1e-10), rtol=1e-12, atol=0)


def test_the_same_seed_is_the_same_direction_in_either_precision_and_the_global_generator_stays() -> None:
    net = trained("float")
    state = torch.get_rng_state()
    a, b, c = random_direction(net, 5, None), random_direction(net, 5, None), random_direction(net, 6, None)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    single = random_direction(nn.Sequential(*net).float(), 5, None)
    trained("float").double()
    assert all(torch.equal(single[n], a[n].float()) for n in a)


def test_a_filter_of_zeros_is_not_moved() -> None:
    net = nn.Sequential(nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        net[0].weight[1] = 0
    assert not random_direction(net, 0)["0.weight"][1].any()


def test_between_ends_at_the_other_net_with_its_running_statistics() -> None:
    net, other = trained("both"), trained("both", epochs=2)
    d = between(net, other)
    assert any("running_var" in name for name in d)
    assert not any("num_batches" in name for name in d)
    state = net.state_dict()
    for name, value in other.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name] + d[name], value, rtol=1e-14, atol=1e-14)
    with pytest.raises(InputError, match="different builds"):
        between(net, trained("float"))
    with pytest.raises(InputError, match="shape"):
        between(net, {"0.parametrizations.weight.original": torch.zeros(3, 3)})


def test_the_gradient_direction_is_minus_what_backward_gives() -> None:
    net, (x, y) = trained("weights"), batch()
    d = gradient_direction(net, x, y, normalise=None)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(d[name], -p.grad, rtol=1e-12, atol=1e-15)
    net.zero_grad()
    assert all(
        math.isclose(float(v.norm()), float(net.get_parameter(n).detach().norm()), rel_tol=1e-6)
        for n, v in gradient_direction(net, x, y).items()
        if v.dim() > 1
    )


def test_own_tensors_may_be_named_after_the_quantized_layer() -> None:
    net = trained("weights")
    flips = torch.randn(24, 64, dtype=torch.float64)
    assert torch.equal(given(net, {"0": flips})["0.parametrizations.weight.original"], flips)
    with pytest.raises(UnknownNameError, match="unknown parameter 'nine'"):
        given(net, {"nine": flips})
    with pytest.raises(InputError, match=r"expected a tensor of shape \(24, 64\)"):
        given(net, {"0": flips.T})
    with pytest.raises(InputError, match="NaN"):
        given(net, {"0": flips * float("nan")})
    with pytest.raises(InputError, match="no tensors"):
        given(net, {})
    with pytest.raises(InputError, match="normalise is 'rows'"):
        normalised(net, {}, "rows")  # type: ignore[arg-type]


def test_orthogonal_takes_the_other_direction_out() -> None:
    net = trained("float")
    d1, d2 = random_direction(net, 0), random_direction(net, 1)
    d = orthogonal(d2, d1)
    assert abs(sum(float((d[n] * d1[n]).sum()) for n in d1)) < 1e-10
    with pytest.raises(InputError, match="one line"):
        orthogonal({n: 3 * t for n, t in d1.items()}, d1)


def test_principal_axes_are_those_of_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(12, 7, 5, generator=g, dtype=torch.float64).cumsum(0)
    axes = principal_axes([{"w": w} for w in walk], 3)
    rows = (walk - walk[-1]).flatten(1).numpy()
    pca = PCA(3).fit(rows)
    np.testing.assert_allclose(axes.explained[:3], pca.explained_variance_ratio_, rtol=1e-10)
    ours = np.stack([d["w"].flatten().numpy() for d in axes.directions])
    np.testing.assert_allclose(np.abs((ours * pca.components_).sum(1)), 1, rtol=1e-10)
    np.testing.assert_allclose(ours @ ours.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(axes.coordinates, rows @ ours.T, atol=1e-10)
    assert axes.coordinates[-1].abs().max() == 0
    assert bool((axes.coordinates[0] >= 0).all())  # where the path begins: the sign of an axis is free
    assert bool((axes.inside <= 1 + 1e-12).all())


def test_a_path_in_a_plane_lies_in_its_plane() -> None:
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, 30, generator=g, dtype=torch.float64)
    t = torch.linspace(0, 3, 9, dtype=torch.float64)[:, None]
    axes = principal_axes([{"w": row[None]} for row in torch.cos(t) * u + torch.sin(t) * v])
    np.testing.assert_allclose(axes.explained[:2].sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(axes.inside, 1, rtol=1e-10)


def test_a_random_walk_explains_what_the_null_says() -> None:
    shares = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        walk = torch.randn(200, 5000, generator=g).cumsum(0)
        shares.append(principal_axes([{"w": w[None]} for w in walk]).explained[:3])
    mean = torch.stack(shares).mean(0)
    assert abs(float(mean[0]) - 0.608) < 0.02
    for k in (1, 2, 3):
        assert abs(float(mean[k - 1]) - random_walk_variance(k)) < 0.02
    assert math.isclose(sum(random_walk_variance(k) for k in range(1, 100_000)), 1, rel_tol=1e-4)


def test_paths_without_a_plane_are_refused() -> None:
    w = torch.ones(3, 3)
    with pytest.raises(InputError, match="at least three"):
        principal_axes([{"w": w}] * 2)
    with pytest.raises(InputError, match="does not move in 2 dimensions"):
        principal_axes([{"w": i * w} for i in range(5)])
    with pytest.raises(InputError, match="NaN"):
        principal_axes([{"w": w * v} for v in (1.0, 2.0, float("nan"), 3.0)])
    with pytest.raises(InputError, match="no 'w' of shape"):
        principal_axes([{"w": w}, {"v": w}, {"w": w}])
