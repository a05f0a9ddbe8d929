"""XNOR-Net: the scale of inputs is the closest one, and what of K is exact in front of a layer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_networks.xnor_net import InputSign, input_scale
from qlab.methods.binary_weights.bwn import ScaledSign
from qlab.quantizers import Sign, quantized_tensors
from tests.methods.conftest import moons

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def paper_product(x: Tensor, w: Tensor, padding: int) -> Tensor:
    """(sign(I) * sign(W)) . K a with K = A * box, written out from the paper."""
    k = w.shape[-1]
    A = x.abs().mean(1, keepdim=True)
    K = F.conv2d(A, torch.full((1, 1, k, k), 1 / k**2, dtype=x.dtype), padding=padding)
    a = w.abs().mean((1, 2, 3))
    return F.conv2d(x.sign(), w.sign(), padding=padding) * K * a[:, None, None]


def ours(x: Tensor, w: Tensor, which: str, padding: int) -> Tensor:
    return F.conv2d(InputSign(which)(x), ScaledSign().hard(w), padding=padding)  # type: ignore[arg-type]


def test_map_is_the_papers_product_for_layers_of_one_by_one() -> None:
    x, w = draw(2, 5, 6, 6), draw(4, 5, 1, 1, seed=1)
    assert torch.allclose(ours(x, w, "map", 0), paper_product(x, w, 0), rtol=1e-12, atol=1e-13)


def test_map_is_the_papers_product_for_linear_layers() -> None:
    x, w = draw(7, 12), draw(3, 12, seed=1)
    expected = (x.sign() @ w.sign().T) * x.abs().mean(1, keepdim=True) * w.abs().mean(1)
    assert torch.allclose(InputSign("map")(x) @ ScaledSign().hard(w).T, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(InputSign("mean")(x), InputSign("map")(x))  # a vector has one position


def test_map_is_the_papers_product_where_magnitudes_do_not_vary_within_a_window() -> None:
    x = draw(2, 5, 6, 6).sign() * torch.tensor([0.7, 2.0], dtype=F64)[:, None, None, None]
    w = draw(4, 5, 3, 3, seed=1)
    assert torch.allclose(ours(x, w, "map", 0), paper_product(x, w, 0), rtol=1e-12, atol=1e-13)


def test_difference_to_the_papers_product_is_the_sum_of_the_docstring() -> None:
    x, w = draw(1, 3, 5, 5), draw(2, 3, 3, 3, seed=1)
    A, H, B, a = x.abs().mean(1)[0], x.sign()[0], w.sign(), w.abs().mean((1, 2, 3))
    difference = (ours(x, w, "map", 0) - paper_product(x, w, 0))[0]
    for o in range(2):
        for p in range(3):
            for q in range(3):
                window = A[p : p + 3, q : q + 3]
                spread = window - window.mean()
                expected = a[o] * (spread * (H[:, p : p + 3, q : q + 3] * B[o]).sum(0)).sum()
                assert float(difference[o, p, q]) == pytest.approx(float(expected), abs=1e-12)
    assert difference.abs().max() > 0.1


def test_mean_is_the_papers_product_with_k_averaged_over_the_image() -> None:
    x, w = draw(3, 5, 6, 6), draw(4, 5, 3, 3, seed=1)
    K = x.abs().mean((1, 2, 3), keepdim=True)
    expected = F.conv2d(x.sign(), w.sign()) * K * w.abs().mean((1, 2, 3))[:, None, None]
    assert torch.allclose(ours(x, w, "mean", 0), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("which", ["mean", "map"])
def test_scale_is_the_one_of_least_squared_error(which: str) -> None:
    """Against least squares of I on sign(I) for each sample or position."""
    x = draw(2, 5, 3, 3)
    A = input_scale(x, which)  # type: ignore[arg-type]
    dims = (1,) if which == "map" else (1, 2, 3)
    s = x.sign()
    assert torch.allclose(A, (x * s).sum(dims, keepdim=True) / (s * s).sum(dims, keepdim=True), rtol=1e-13)
    error = (x - A * s).square().sum()
    for other in (0.99 * A, 1.01 * A):
        assert (x - other * s).square().sum() > error
    assert (x - InputSign(which)(x)).square().sum() == pytest.approx(float(error))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["mean", "map"])
def test_gradient_is_clipped_straight_through_times_the_scale(which: str) -> None:
    x, g = draw(4, 5, 3, 3), draw(4, 5, 3, 3, seed=1)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(InputSign(which)(leaf), leaf, g)  # type: ignore[arg-type]
    assert torch.allclose(found, input_scale(x, which) * (x.abs() <= 1) * g, rtol=1e-13, atol=0)  # type: ignore[arg-type]
    q = InputSign(which)  # type: ignore[arg-type]
    assert torch.equal(q.hard(x), q.scale(x) * q.level(x))


@pytest.mark.parametrize("which", ["none", "mean", "map"])
def test_net_learns_deploys_and_comes_back_from_a_checkpoint(which: str, tmp_path: Path) -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(32, 32, 32), seed=0)
    method = create("xnor_net", net, input_scale=which)
    run = qlab.fit(method, moons(n=1000), epochs=20, progress=False, validate_every=0)
    assert run.metrics["test/acc"] > 0.95
    x = moons().calibration(1)[0]
    shipped = run.deployed
    assert torch.equal(copy.deepcopy(shipped)(x), shipped(x))
    assert torch.equal(qlab.load(run.save(tmp_path) / "checkpoint.ckpt").deployed()(x), shipped(x))
    kind = Sign if which == "none" else InputSign
    assert sum(type(m) is kind for m in shipped.modules()) == 2


def test_first_and_last_layer_stay_in_float_with_their_activations() -> None:
    method = create("xnor_net", qlab.build("lenet", (1, 28, 28), 10, seed=0))
    names = list(qlab.quantizers.layers(method.net))
    assert [t.name for t in quantized_tensors(method.net)] == names[1:-1]
    assert any(isinstance(m, nn.ReLU) for m in method.net.modules())


def test_unknown_scale_of_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="input_scale must be"):
        create("xnor_net", qlab.build("mlp", (2,), 2), input_scale="full")
