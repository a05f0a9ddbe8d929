"""Jacobian singular values, against torch.func.jacrev, numpy and random matrix theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.jacobian import jacobian, sign_matrix_bounds
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize


def made(seed: int = 0, activation: type[nn.Module] = nn.Tanh, sizes: tuple[int, int, int] = (7, 9, 4)) -> nn.Module:
    a, b, c = sizes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), activation(), nn.Linear(b, c)).double().eval()


def inputs(n: int = 5, d: int = 7) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def singular(f: object, x: Tensor) -> np.ndarray:
    """Return singular values of the Jacobian of f at each row of x, by jacrev and numpy."""
    J = torch.stack([torch.func.jacrev(lambda v: f(v[None])[0])(v) for v in x])  # type: ignore[operator]
    return np.linalg.svd(J.detach().flatten(2).numpy(), compute_uv=False)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("sizes", [(7, 9, 4), (3, 9, 4)])
def test_the_input_output_jacobian_has_the_singular_values_of_jacrev(method: str, sizes: tuple[int, int, int]) -> None:
    net, x = made(sizes=sizes), inputs(d=sizes[0])
    found = jacobian(net, x, method=method)  # type: ignore[arg-type]
    exact = singular(net, x)
    assert found.complete == (True,)
    assert found.sizes == ((4, sizes[0]),)
    assert np.allclose(found.values[0], exact, atol=1e-10)
    assert found.mean[0] == pytest.approx(exact.mean())
    assert found.std[0] == pytest.approx(exact.std())
    assert np.allclose(found.condition[0], exact[:, 0] / exact[:, -1])
    assert found.beta1 == pytest.approx(1 / exact.mean())


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_jacobians_between_layers(method: str) -> None:
    net, x = made(), inputs()
    found = jacobian(net, x, "all", method=method)  # type: ignore[arg-type]
    assert found.sources == ("input", "0", "1", "2", "3")
    h = net[0](x)  # type: ignore[index]
    assert np.allclose(found.values[1], singular(lambda v: net[3](net[2](net[1](v))), h.detach()), atol=1e-10)  # type: ignore[index]
    assert np.allclose(found.values[4], 1, atol=1e-10)  # the last layer's output is the logits
    assert found.isometry[4] == pytest.approx(0, abs=1e-9)
    middle = jacobian(net, x, ["input"], "2", method=method)  # type: ignore[arg-type]
    assert np.allclose(middle.values[0], singular(lambda v: net[2](net[1](net[0](v))), x), atol=1e-10)  # type: ignore[index]
    assert middle.sizes == ((9, 7),)


def test_the_largest_values_of_a_big_jacobian_come_from_products() -> None:
    net, x = made(sizes=(60, 80, 50)), inputs(4, 60)
    found = jacobian(net, x, method="lanczos", top=3)
    assert found.complete == (False,)
    assert found.values[0].shape == (4, 3)
    # 2 * top = 6 steps: the first is close, and no Ritz value exceeds the true one.
    exact = singular(net, x)[:, :3]
    assert np.all(found.values[0] <= exact + 1e-10)
    more = jacobian(net, x, method="lanczos", top=15)
    assert np.allclose(more.values[0][:, :3], exact, rtol=1e-4)
    assert jacobian(net, x, memory=1).complete == (False,)
    assert math.isnan(found.beta1)  # the mean of the largest is not the mean
    assert "of the 3 largest singular values" in found.summary()
    assert "A factor" not in found.summary()
    assert math.isnan(found.frame()["smallest"][0])


def test_network_jacobian_scaling_of_a_linear_map_is_d_over_the_nuclear_norm() -> None:
    net = nn.Sequential(nn.Linear(8, 5)).double().eval()
    found = jacobian(net, inputs(3, 8))
    W = net[0].weight.detach()
    assert found.beta1 == pytest.approx(5 / float(torch.linalg.matrix_norm(W, "nuc")), rel=1e-12)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            return found.beta1 * self.inner(x)

    assert jacobian(Scaled().eval(), inputs(3, 8)).mean[0] == pytest.approx(1, abs=1e-12)


def test_an_orthogonal_net_is_an_isometry() -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double().eval()
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.linalg.qr(layer.weight).Q)  # type: ignore[operator]
    found = jacobian(net, inputs(3, 6))
    assert np.allclose(found.values[0], 1, atol=1e-12)
    assert found.isometry[0] < 1e-12
    assert found.condition[0].max() == pytest.approx(1)


def test_the_distance_from_isometry_is_that_of_logarithms_to_the_mean() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 6.0])))
    logs = np.log(np.array([1, 2, 6]) / 3)
    assert jacobian(net, inputs(2, 3)).isometry[0] == pytest.approx(math.sqrt((logs**2).mean()))


def test_through_signs_the_jacobian_is_that_of_the_backward_rules() -> None:
    net, x = quantize(made(), weights=Sign, activations=Sign).eval(), inputs()
    with torch.no_grad():
        W1, W2 = net[0].weight, net[3].weight  # type: ignore[index]
        u = net[1](net[0](x))  # type: ignore[index]
        scale = 1 / torch.sqrt(net[1].running_var + net[1].eps) * net[1].weight  # type: ignore[index]
        J = torch.stack([W2 @ torch.diag((row.abs() <= 1).double() * scale) @ W1 for row in u])
    exact = np.linalg.svd(J.numpy(), compute_uv=False)
    for method in ("exact", "lanczos"):
        found = jacobian(net, x, ["input", "2"], method=method)  # type: ignore[arg-type]
        assert np.allclose(found.values[0], exact, atol=1e-9)
        assert found.exact == (False, True)
        assert "surrogate" in found.summary()


def test_through_foreign_signs_the_jacobian_is_not_called_exact() -> None:
    class Handwritten(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            c = u.clamp(-1, 1)
            return c + (torch.where(u >= 0, 1.0, -1.0).to(u.dtype) - c).detach()

    net = made(activation=Handwritten)
    assert jacobian(net, inputs(), "all").exact == (False, False, False, True, True)
    assert jacobian(net, inputs(), ["input"], "1").exact == (True,)
    assert jacobian(net, inputs(), ["input"], "2").exact == (False,)


@pytest.mark.parametrize(("n", "d"), [(256, 10), (256, 64), (400, 100)])
def test_random_sign_matrices_keep_within_the_edges(n: int, d: int) -> None:
    low, high = sign_matrix_bounds(n, d)
    W = torch.randint(0, 2, (20, d, n), generator=torch.Generator().manual_seed(d)).double() * 2 - 1
    values = torch.linalg.svdvals(W)
    slack = 2 * n ** (-1 / 6)
    assert float(values.max()) < high + slack
    assert float(values.min()) > low - slack
    # The edges are where the values go, not bounds far away.
    assert float(values.max()) > math.sqrt(n) + 0.8 * (high - math.sqrt(n))
    assert float(values.min()) < math.sqrt(n) - 0.8 * (math.sqrt(n) - low)
    # All squared singular values average to n exactly: the rows have length sqrt(n).
    assert float(values.square().mean()) == pytest.approx(n)


def test_a_binary_last_layer_multiplies_gradients_by_the_root_of_its_width() -> None:
    net = quantize(nn.Sequential(nn.Linear(256, 10, bias=False)).double(), weights=Sign).eval()
    found = jacobian(net, inputs(2, 256))
    low, high = sign_matrix_bounds(256, 10)
    assert low - 1 < found.values[0].min()
    assert found.values[0].max() < high + 1
    assert found.exact == (True,)


def test_convolutions_and_flat_sources_work() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    x = inputs(3, 16).reshape(3, 1, 4, 4)
    for method in ("exact", "lanczos"):
        found = jacobian(net, x, ["input", "1"], method=method)  # type: ignore[arg-type]
        assert found.sizes == ((3, 16), (3, 8))
        assert np.allclose(found.values[0], singular(net, x), atol=1e-10)


def test_an_input_cut_off_from_the_logits_gives_zeros() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(7, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.detach())

    for method in ("exact", "lanczos"):
        found = jacobian(Cut().eval(), inputs(), method=method)  # type: ignore[arg-type]
        assert np.all(found.values[0] == 0)
        assert found.beta1 == math.inf
        assert np.all(np.isinf(found.condition[0]))
        assert found.summary()


def test_results_can_be_read_and_drawn() -> None:
    found = jacobian(made(), inputs(), "all")
    assert len(found.frame()) == 5
    assert str(found.figure().get_label()) == found.summary()
    assert "exact" in found.summary()


def test_nets_and_arguments_that_make_no_sense_are_refused() -> None:
    net, x = made(), inputs()
    with pytest.raises(UnknownNameError):
        jacobian(net, x, ["nobody"])
    with pytest.raises(InputError, match="does not run before"):
        jacobian(net, x, ["2"], "1")
    with pytest.raises(InputError, match="at least one source"):
        jacobian(net, x, [])
    with pytest.raises(UnknownNameError):
        jacobian(net, x, method="guess")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="training mode"):
        jacobian(made().train(), x)
    with pytest.raises(InputError, match="top"):
        jacobian(net, x, top=0)
    with pytest.raises(InputError, match="at least one row"):
        sign_matrix_bounds(0, 1)
