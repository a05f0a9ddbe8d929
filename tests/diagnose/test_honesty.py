"""Circulation: zero for gradients, and not for what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.functions import variant
from qlab.diagnose.honesty import Circulation, circulating, circulation
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize
from tests.diagnose.small_nets import batch, detached_sign, foreign, mlp


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


def field(at: list[float], g: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a net of two weights (1, 2) whose back-propagated gradient of the first logit is g(w) (2,), and whose loss is 0."""

    class Field(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(w: Tensor) -> Tensor:
            return w.sum() * 0

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            (w,) = ctx.saved_tensors
            return grad * g(w[0])[None]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([at], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] * 0 + Field.apply(self.w)

    return Net().eval()


def first(z: Tensor, y: Tensor) -> Tensor:
    return z[..., 0]


def test_a_vortex_has_circulation_one() -> None:
    """g = (-w_2, w_1) around the origin: the field is tangential everywhere."""
    net = field([1e-9, 0.0], lambda w: torch.stack([-w[1], w[0]]))
    found = circulation(net, *batch(3, 2, classes=2), ["w"], radius=1e9, loss=first)
    np.testing.assert_allclose(found.spaces[0].circulation, 1, atol=1e-6)


def test_the_integral_around_a_known_curl_is_its_area() -> None:
    """g = B w has curl B_21 - B_12: the integral around a circle of radius r in the plane is pi r^2 times that."""
    net = field([3.0, 4.0], lambda w: torch.stack([w[0] - 0.5 * w[1], 1.5 * w[0] + 2 * w[1]]))
    found = circulation(net, *batch(3, 2, classes=2), ["w"], radius=0.5, points=64, loss=first)
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
    """The old style back-propagates through [-1, 1] only, as the sum of a clip and a constant does."""
    x, y = batch(10, 8)
    clipped = lambda v: (detached_sign(v) - v.clamp(-1, 1)).detach() + v.clamp(-1, 1)  # noqa: E731
    twin = foreign()
    for module in twin:
        module.sign = clipped
    a, b = (circulation(net, x, y, ["0", "input"], loops=2, points=8) for net in (twin, foreign(old_style=True)))
    for s, t in zip(a.spaces, b.spaces, strict=True):
        assert t.circulation.min() > 0
        np.testing.assert_allclose(s.circulation, t.circulation, rtol=1e-9)
        np.testing.assert_allclose(s.residual, t.residual, rtol=1e-9)


def test_a_layer_of_one_number_has_no_plane_and_is_passed_over() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3)).double().eval()
    x, y = batch(6, 4)
    assert [s.space for s in circulation(net, x, y, loops=1, points=8).spaces] == ["0", "4", "input"]
    with pytest.raises(InputError, match="2 holds one number"):
        circulation(net, x, y, ["2"])


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
    for spaces in ("fc", []):
        with pytest.raises(InputError, match="expected a sequence of names"):
            circulation(net, x, y, spaces)
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
