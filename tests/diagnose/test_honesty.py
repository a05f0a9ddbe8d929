"""Circulation: zero for gradients, and not for what only looks like one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.functions import variant
from qlab.diagnose.honesty import Circulation, circulating, circulation
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize
from tests.diagnose.small_nets import batch, foreign, mlp


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def straight_through(surrogate="clipped") -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return quantize(plain, lambda: Sign(surrogate), lambda: Sign(surrogate)).eval()


def test_a_true_gradient_has_none() -> None:
    found = circulation(smooth(), *batch(12, 6))
    assert [s.space for s in found.spaces] == ["0", "2", "4", "input"]
    for s in found.spaces:
        assert s.circulation.shape == (8,)
        assert s.circulation.max() < 1e-6
        assert s.residual.max() < 1e-6


@pytest.mark.parametrize("surrogate", ["identity", "clipped", "tanh"])
def test_the_straight_through_field_has_some_far_above_its_quadrature_error(surrogate: str) -> None:
    found = circulation(straight_through(surrogate), *batch(12, 6), beta=0.2, points=256)
    for s in found.spaces[:2]:
        assert s.circulation.mean() > 0.02
        assert s.circulation.mean() > 5 * s.error.mean()
        assert s.residual.mean() > 0.05
        assert s.circulation.max() <= 1
        assert s.residual.max() <= 1


def test_its_surrogate_function_is_honest() -> None:
    x, y = batch(12, 6)
    honest = circulation(variant(straight_through("tanh"), "surrogate"), x, y, beta=0.2, points=128)
    crooked = circulation(straight_through("tanh"), x, y, beta=0.2, points=128)
    for a, b in zip(honest.spaces, crooked.spaces, strict=True):
        assert a.circulation.max() < 1e-6
        assert a.residual.max() < 1e-6
        assert b.circulation.mean() > 1e3 * a.circulation.max()


def test_a_vortex_has_circulation_one() -> None:
    """g = (-w_2, w_1) around the origin: the field is tangential everywhere."""

    class Vortex(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(w: Tensor) -> Tensor:
            return w.sum() * 0

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            (w,) = ctx.saved_tensors
            return g * torch.stack([-w[0, 1], w[0, 0]])[None]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[1e-9, 0.0]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] * 0 + Vortex.apply(self.w)

    x, y = batch(3, 2, classes=2)
    found = circulation(Net().eval(), x, y, ["w"], radius=1e9, loss=lambda z, y: z[..., 0])
    np.testing.assert_allclose(found.spaces[0].circulation, 1, atol=1e-6)


def test_the_integral_around_a_known_curl_is_its_area() -> None:
    """g = B w has curl B_21 - B_12: the integral around a circle of radius r in the plane is pi r^2 times that."""

    class Affine(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(w: Tensor) -> Tensor:
            return w.sum() * 0

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            (w,) = ctx.saved_tensors
            return g * torch.stack([w[0, 0] - 0.5 * w[0, 1], 1.5 * w[0, 0] + 2 * w[0, 1]])[None]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] * 0 + Affine.apply(self.w)

    x, y = batch(3, 2, classes=2)
    found = circulation(Net().eval(), x, y, ["w"], radius=0.5, points=64, loss=lambda z, y: z[..., 0])
    r = 2.5
    t = np.linspace(0, 2 * np.pi, 200_000, endpoint=False)
    w = np.stack([3 + r * np.cos(t), 4 + r * np.sin(t)])
    size = np.hypot(w[0] - 0.5 * w[1], 1.5 * w[0] + 2 * w[1]).mean() * 2 * np.pi * r
    np.testing.assert_allclose(found.spaces[0].circulation, np.pi * r**2 * 2 / size, rtol=1e-6)
    assert found.spaces[0].radius == pytest.approx(r)


def test_without_a_surrogate_nothing_flows_and_the_jumps_are_all_residual() -> None:
    found = circulation(straight_through(torch.zeros_like), *batch(12, 6), ["0"], radius=2.0)
    assert np.isnan(found.spaces[0].circulation).all()
    moved = found.spaces[0].residual[np.isfinite(found.spaces[0].residual)]
    assert len(moved) > 0
    np.testing.assert_array_equal(moved, 1.0)
    assert math.isnan(found.mean)


def test_quadrature_errors_shrink_with_the_points_where_the_field_jumps() -> None:
    x, y = batch(12, 6)
    few, many = (circulation(straight_through(), x, y, ["0"], beta=0.2, points=n).spaces[0] for n in (16, 1024))
    assert many.error.mean() < few.error.mean() / 8
    exact = circulation(straight_through(), x, y, ["0"], beta=0.2, points=4096).spaces[0]
    assert np.abs(many.circulation - exact.circulation).mean() < 5 * many.error.mean() + 1e-4


def test_nets_of_the_old_style_take_the_slow_way_to_the_same_numbers() -> None:
    class Slow(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    x, y = batch(10, 8)
    a = circulation(foreign(False), x, y, ["0"], loops=2, points=8)
    b = circulation(foreign(True), x, y, ["0"], loops=2, points=8)
    assert np.isfinite(b.spaces[0].circulation).all()
    assert len(a.spaces[0].circulation) == len(b.spaces[0].circulation) == 2


def test_a_seed_repeats_and_updates_grow() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    updates = [u.value for u in circulating(net, x, y, loops=2, points=8, seed=3)]
    assert [len(u.spaces) for u in updates] == [1, 2, 3, 4, 5]
    again = circulation(net, x, y, loops=2, points=8, seed=3)
    other = circulation(net, x, y, loops=2, points=8, seed=4)
    np.testing.assert_array_equal(again.spaces[0].circulation, updates[-1].spaces[0].circulation)
    assert not np.array_equal(other.spaces[0].circulation, again.spaces[0].circulation)


def test_frame_figure_and_summary_hold_the_numbers() -> None:
    found = circulation(mlp(), *batch(12, 8), loops=3, points=8)
    assert isinstance(found, Circulation)
    frame = found.frame()
    assert len(frame) == 5 * 3
    assert found.mean == pytest.approx(frame["circulation"].mean())
    assert found.figure().get_label() == found.summary()
    assert f"hidden.0 {found.spaces[0].circulation.mean():.2g}" in found.summary()


def test_what_cannot_be_integrated_is_said() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    with pytest.raises(UnknownNameError, match="nowhere"):
        circulation(net, x, y, ["nowhere"])
    with pytest.raises(InputError, match="even number"):
        circulation(net, x, y, points=7)
    with pytest.raises(InputError, match="radius is 0"):
        circulation(net, x, y, radius=0)
    with pytest.raises(InputError, match="training mode"):
        circulation(net.train(), x, y)
    with pytest.raises(InputError, match="NaN"):
        circulation(net.eval(), x * float("nan"), y)
    with pytest.raises(InputError, match="needs labels"):
        circulation(net, x, None)  # type: ignore[arg-type]
