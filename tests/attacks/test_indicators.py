"""Indicators of attack failure, on paths made by hand on a net that is a line."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.base import Attacked, Step
from qlab.attacks.indicators import LAST, POINTS, SMALL, indicators
from qlab.attacks.pgd import PGD
from qlab.errors import InputError

Y = torch.zeros(1, dtype=torch.int64)


class Line(nn.Module):
    """Logits (0, s x): class 0 where x <= 0, margin s x for it."""

    def __init__(self, s: float = 1.0) -> None:
        super().__init__()
        self.s = s

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([0 * x, self.s * x], 1)


def path(
    points: Sequence[float], gradients: Sequence[float | None] | None = None, losses: Sequence[float] | None = None
) -> Attacked:
    """Return a run on one example at x = -1 that stood at these points."""
    steps = tuple(
        Step(
            torch.tensor([[p]], dtype=torch.float64),
            torch.tensor([loss], dtype=torch.float64),
            None if g is None else torch.tensor([[g]], dtype=torch.float64),
        )
        for p, g, loss in zip(points, gradients or [1.0] * len(points), losses or points, strict=True)
    )
    x = torch.tensor([[-1.0]], dtype=torch.float64)
    best = max(points)
    return Attacked(
        "by hand", "linf", 2.0, x, Y, torch.tensor([[best]], dtype=torch.float64), np.array([True]), np.array([best > 0]),
        np.array([best + 1 if best > 0 else math.inf]), np.array([best]), np.array([points[-1] > 0]), 0, 0, steps,
    )  # fmt: skip


def of(found: Attacked, name: str, net: nn.Module | None = None, **how: object) -> tuple[float, bool]:
    settings = {"low": -10.0, "high": 10.0} | how
    for indicator in indicators((net or Line()).eval(), found, **settings):  # type: ignore[arg-type]
        if indicator.name == name:
            assert indicator.value == indicator.each.mean()
            return indicator.value, indicator.raised
    raise AssertionError(f"no indicator {name}")


def test_a_gradient_of_zero_is_unavailable_unless_the_example_is_broken_already() -> None:
    name = "unavailable gradients"
    assert of(path([-1, -0.5, -0.1], [1, 1, 1]), name) == (0, False)
    assert of(path([-1, -0.5, -0.1], [1, 0, 1]), name) == (1, True)
    assert of(path([-1, 0.5, 0.6], [1, 1, 0]), name) == (0, False)


def test_an_attack_without_gradients_has_none_that_could_be_unavailable() -> None:
    found = path([-1, -0.5, -0.1], [None, None, None])
    assert "unavailable gradients" not in [i.name for i in indicators(Line().eval(), found, low=-10.0, high=10.0)]


def test_a_success_on_the_way_that_is_lost_at_the_end_is_silent() -> None:
    assert of(path([-1, 0.5, -0.1]), "silent success") == (1, True)
    assert of(path([-1, -0.5, 0.1]), "silent success") == (0, False)
    assert of(path([-1, -0.5, -0.1]), "silent success") == (0, False)


@pytest.mark.parametrize(("drop", "raised"), [(0.049, False), (0.051, True)])
def test_optimisation_is_incomplete_where_the_last_ten_steps_gain_more_than_a_twentieth(
    drop: float, raised: bool
) -> None:
    losses = [0.0, *[1 - drop] * 5, *[1 - drop + 0.0] * (LAST - 1), 1.0]
    losses = [7 + 3 * v for v in losses]  # rescaled, whatever the loss is
    found = path([-1.0] * len(losses), losses=losses)
    assert of(found, "incomplete optimisation") == (float(raised), raised)


def test_a_loss_that_falls_back_or_a_broken_example_is_no_incomplete_optimisation() -> None:
    back = [0.0, *[1.0] * 5, *[0.2] * LAST]
    assert of(path([-1.0] * len(back), losses=back), "incomplete optimisation") == (0, False)
    points = [-1 + 0.1 * t for t in range(25)]
    assert of(path(points), "incomplete optimisation") == (0, False)
    assert of(path([0.1 * t - 5 for t in range(25)]), "incomplete optimisation") == (1, True)
    constant = path([-1.0] * 20, losses=[3.0] * 20)
    assert of(constant, "incomplete optimisation") == (0, False)
    short = path([-1, -0.5], losses=[0, 1])
    assert of(short, "incomplete optimisation") == (0, False)


def test_the_loss_that_was_not_looked_at_counts_for_nothing() -> None:
    found = path([-1.0] * 13, losses=[0.0, 1.0, *[1.0] * 10, math.nan])
    assert of(found, "incomplete optimisation") == (0, False)


def test_stability_of_a_line_is_the_mean_relative_change_in_a_small_ball() -> None:
    # At x = -1 the margin is -1; r is uniform in +-0.1 eps = +-0.2: E |r| = 0.1, with POINTS draws.
    value, raised = of(path([-1.0]), "unstable predictions")
    sd = 0.2 / math.sqrt(12)
    assert value == pytest.approx(SMALL * 2.0 / 2, abs=4 * sd / math.sqrt(POINTS))
    assert not raised
    # The scale of the logits changes nothing; near the boundary the change is large and is cut off at 1.
    assert of(path([-1.0]), "unstable predictions", Line(1000.0))[0] == pytest.approx(value, rel=1e-12)
    assert of(path([-1e-6]), "unstable predictions")[0] == pytest.approx(1, abs=0.01)


def test_a_noisy_net_is_unstable() -> None:
    class Rough(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([0 * x, -1.5 + torch.sign(torch.sin(1e4 * x))], 1)

    assert of(path([-1.0]), "unstable predictions", Rough())[1]


def test_transfer_fails_where_the_shipped_net_decides_otherwise() -> None:
    name = "transfer failure"
    assert of(path([-1, 0.5]), name, fast=Line()) == (0, False)
    assert of(path([-1, 0.5]), name, fast=lambda x: Line()(x - 1)) == (1, True)
    assert of(path([-1, -0.5]), name, fast=lambda x: Line()(x + 1)) == (0, False)


def test_an_attack_that_fails_without_a_bound_is_broken() -> None:
    name = "unconstrained failure"
    assert of(path([-1, -0.5]), name, unbounded=path([-1, 0.5])) == (0, False)
    assert of(path([-1, -0.5]), name, unbounded=path([-1, -0.5])) == (1, True)


def test_a_run_without_iterates_has_no_indicators() -> None:
    x = torch.full((2, 1), 0.5)
    found = PGD(steps=2)(
        nn.Linear(1, 2).eval(), x + torch.tensor([[0.0], [0.1]]), torch.zeros(2, dtype=torch.int64), 0.1
    )
    with pytest.raises(InputError, match="trace=True"):
        indicators(nn.Linear(1, 2), found)


def test_the_same_seed_draws_the_same_points() -> None:
    a, b, c = (of(path([-1.0]), "unstable predictions", seed=s)[0] for s in (1, 1, 2))
    assert a == b != c


def test_a_real_run_of_a_sound_attack_raises_nothing() -> None:
    torch_x = torch.linspace(-1, -0.05, 20, dtype=torch.float64)[:, None]
    y = torch.zeros(20, dtype=torch.int64)
    net = Line().eval()
    attack = PGD(steps=20, early_stop=False)
    found = attack(net, torch_x, y, 0.5, low=-10.0, high=10.0, trace=True)
    free = attack(net, torch_x, y, 20.0, low=-10.0, high=10.0)
    assert found.success.sum() == (torch_x[:, 0] > -0.5).sum()
    raised = [i.name for i in indicators(net, found, fast=net, unbounded=free, low=-10.0, high=10.0) if i.raised]
    assert raised == []
