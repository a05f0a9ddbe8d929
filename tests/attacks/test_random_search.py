"""Random and coordinate search: where their points lie, and what they find where the optimum is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.ball import Ball
from qlab.attacks.random_search import CoordinateSearch, RandomSearch, blocks, score
from qlab.errors import InputError, UnknownNameError
from tests.attacks.test_square import After, Counting, draw, labelled, mlp, pictures

F64 = torch.float64


def linear(inputs: int, classes: int = 2, seed: int = 5) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)).double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(generator=draw(seed + i))
    return net


def asked(attack: Any, net: nn.Module, x: Tensor, eps: float, norm: str = "linf", **range_: float) -> Tensor:
    """Return the points that an attack asked about."""
    counting = Counting(net)
    attack(counting, x, labelled(net, x), eps, norm=norm, **range_)
    return torch.cat(counting.asked[3:])  # two calls of the check, one for the clean logits


# ---- score ----------------------------------------------------------------------------------------------------------


def test_the_score_is_positive_exactly_where_the_net_decides_against_the_label() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    y = torch.tensor([0, 1, 0, 1])
    assert (score(z, y) > 0).tolist() == [False, True, False, True]
    torch.testing.assert_close(score(z, y), torch.tensor([0.0, 0.0, -1.0, 1.0], dtype=F64))


# ---- random points --------------------------------------------------------------------------------------------------


def test_corners_are_corners() -> None:
    x = pictures(1, 7)
    points = asked(RandomSearch(300), linear(7), x, 1e-6, low=-2.0, high=2.0)
    signs = ((points - x) / 1e-6).round()
    assert points.shape == (300, 7)
    torch.testing.assert_close((points - x).abs(), torch.full_like(points, 1e-6), rtol=1e-8, atol=0)
    assert abs(float(signs.mean())) < 0.1
    assert len(signs.unique(dim=0)) == pytest.approx(
        128 * (1 - (127 / 128) ** 300), abs=12
    )  # all of 2^7, drawn at random


def test_corners_are_clipped_to_the_range() -> None:
    x = pictures(1, 2, 3, 3)
    points = asked(RandomSearch(50, early_stop=False), mlp(18), x, 0.3)
    low, high = (x - 0.3).clamp(min=0), (x + 0.3).clamp(max=1)
    assert float(torch.minimum((points - low).abs(), (points - high).abs()).max()) < 1e-15


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_corners_of_round_balls_are_sign_vectors_of_length_eps(norm: str) -> None:
    x = pictures(1, 10)
    delta = asked(RandomSearch(40), linear(10), x, 1e-6, norm, low=-2.0, high=2.0) - x
    each = {"l2": 1e-6 / 10**0.5, "l1": 1e-7}[norm]
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, each), rtol=1e-6, atol=0)


def test_points_of_the_cube_are_uniform() -> None:
    x = pictures(1, 5)
    delta = (asked(RandomSearch(2000, "ball"), linear(5), x, 1e-5, low=-2.0, high=2.0) - x) / 1e-5
    assert float(delta.abs().max()) <= 1 + 1e-9
    assert float(delta.mean().abs()) < 0.03
    assert float(delta.var()) == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_points_of_round_balls_have_a_uniform_radius(norm: str) -> None:
    x = pictures(1, 5)
    points = asked(RandomSearch(2000, "ball"), linear(5), x, 1e-5, norm, low=-2.0, high=2.0)
    radius = Ball.of(x.expand(2000, 5), 1.0, norm, -2.0, 2.0).distance(points) / 1e-5  # type: ignore[arg-type]
    assert float(radius.max()) <= 1 + 1e-9
    quarters = torch.histc(radius, 4, 0, 1) / 2000
    torch.testing.assert_close(quarters, torch.full_like(quarters, 0.25), rtol=0, atol=0.04)


def test_the_best_corner_is_found_where_all_of_them_are_asked_about() -> None:
    net, x = mlp(5), 0.5 + 0.1 * pictures(6, 5)
    y = labelled(net, x)
    found = RandomSearch(600, early_stop=False)(net, x, y, 0.2)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=F64)
    with torch.no_grad():
        margins = [score(net(x[i] + 0.2 * every), y[i].expand(32)).max().item() for i in range(6)]
    np.testing.assert_allclose(found.margin, margins, rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [1, 63, 64, 65, 200])
def test_each_example_is_asked_about_k_times_in_questions_of_a_batch(points: int) -> None:
    net, x = mlp(36), pictures(10, 1, 6, 6)
    counting = Counting(net)
    found = RandomSearch(points, batch=40)(counting, x, labelled(net, x), 1e-9)
    assert found.forward == 10 * (points + 1)  # and once about itself
    assert max(map(len, counting.asked)) <= 40
    assert found.backward == 0


def test_what_is_found_for_an_example_does_not_hang_on_others() -> None:
    net, x = mlp(36), pictures(30, 1, 6, 6)
    y = labelled(net, x)
    attack = RandomSearch(100)
    together = attack(net, x, y, 0.1)
    some = torch.tensor([3, 11, 29])
    alone = attack(net, x[some], y[some], 0.1)
    np.testing.assert_array_equal(together.success[some], alone.success)
    assert 0 < together.success.sum() < 30


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("where", ["corners", "ball"])
def test_random_points_lie_in_ball_and_range(norm: str, where: str) -> None:
    net, x = mlp(18).float(), (4 * pictures(5, 2, 3, 3) - 2).float()
    points = asked(RandomSearch(20, where, early_stop=False), net, x, 0.73, norm, low=-2.0, high=2.0)  # type: ignore[arg-type]
    ball = Ball.of(x.repeat_interleave(20, 0), 0.73, norm, -2.0, 2.0)  # type: ignore[arg-type]
    assert bool(ball.contains(points).all())


def test_any_increasing_function_of_the_logits_gives_the_same_success() -> None:
    net, x = mlp(36), pictures(30, 1, 6, 6)
    y = labelled(net, x)
    plain = RandomSearch(64)(net, x, y, 0.1)
    for f in (torch.atan, lambda z: 3 * z - 7, lambda z: z**3):
        np.testing.assert_array_equal(RandomSearch(64)(After(net, f), x, y, 0.1).success, plain.success)


# ---- coordinates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 4, 4), (11,), (2, 6)])
@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_part_the_coordinates(shape: tuple[int, ...], block: int) -> None:
    which = blocks(torch.Size(shape), block)
    assert which.shape == (int(np.prod(shape)),)
    assert which.unique().tolist() == list(range(int(which.max()) + 1))
    if len(shape) == 3:
        for k in range(int(which.max()) + 1):
            c, rows, columns = (which.reshape(shape) == k).nonzero(as_tuple=True)
            assert len(c.unique()) == 1
            assert int(rows.max() - rows.min()) < block
            assert int(columns.max() - columns.min()) < block
        assert int(which.max()) + 1 == shape[0] * -(-shape[1] // block) * -(-shape[2] // block)


@pytest.mark.parametrize("together", [1, 3, 8, 64])
@pytest.mark.parametrize("shape", [(12,), (3, 2, 2)])
def test_one_pass_over_a_linear_net_raises_the_margin_by_eps_times_the_l1_norm(
    shape: tuple[int, ...], together: int
) -> None:
    net, x = linear(12), pictures(9, *shape)
    y = labelled(net, x)
    with torch.no_grad():
        z = net(x)
    w = net[1].weight[1 - y] - net[1].weight[y]  # type: ignore[index]
    clean = z.gather(1, 1 - y[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
    attack = CoordinateSearch(passes=1, together=together, early_stop=False)
    found = attack(net, x, y, 0.1, low=-1.0, high=2.0)
    exact = clean + 0.1 * w.abs().sum(1)
    np.testing.assert_allclose(found.margin, exact.detach().numpy(), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.success, (exact > 0).numpy())


def test_on_a_linear_net_the_range_bounds_each_coordinate_alone() -> None:
    net, x = linear(12), pictures(9, 12)
    y = labelled(net, x)
    w = net[1].weight[1 - y] - net[1].weight[y]  # type: ignore[index]
    best = torch.where(w > 0, (x + 0.4).clamp(max=1), (x - 0.4).clamp(min=0))
    with torch.no_grad():
        exact = score(net(best), y)
    found = CoordinateSearch(passes=1, early_stop=False)(net, x, y, 0.4)
    np.testing.assert_allclose(found.margin, exact.numpy(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.adversarial, best, rtol=0, atol=1e-15)


def test_a_second_pass_over_a_linear_net_changes_nothing() -> None:
    net, x = linear(12), pictures(9, 12)
    y = labelled(net, x)
    once, twice = (CoordinateSearch(passes=r, early_stop=False)(net, x, y, 0.1) for r in (1, 5))
    assert torch.equal(once.adversarial, twice.adversarial)
    # The second pass asks about the other end of each coordinate alone, and the search ends there.
    assert twice.forward == once.forward + 9 * 12


def test_blocks_of_one_corner_each_are_searched_greedily() -> None:
    # Against a search written out by hand, with blocks of two inputs and one block at a time.
    net, x = mlp(8), 0.5 + 0.1 * pictures(5, 8)
    y = labelled(net, x)
    found = CoordinateSearch(block=2, passes=20, together=1, ties=False, early_stop=False)(net, x, y, 0.2)
    for i in range(5):
        end = found.adversarial[i]
        value = score(net(end[None]), y[i : i + 1]).item()
        for k in range(0, 8, 2):
            for side in (-0.2, 0.2):
                moved = end.clone()
                moved[k : k + 2] = x[i, k : k + 2] + side
                assert score(net(moved[None]), y[i : i + 1]).item() <= value + 1e-12  # no move is left


def test_the_margin_never_falls_along_the_coordinates() -> None:
    net, x = mlp(36), pictures(12, 1, 6, 6)
    y = labelled(net, x)
    found = CoordinateSearch(passes=3, early_stop=False)(net, x, y, 0.3, trace=True)
    assert found.trace is not None
    losses = torch.stack([step.loss for step in found.trace])
    rises = losses.diff(dim=0)
    assert bool(((rises >= 0) | rises.isnan()).all())
    with torch.no_grad():
        np.testing.assert_allclose(score(net(found.adversarial), y).numpy(), found.margin, atol=1e-12)


def test_each_coordinate_is_where_it_was_or_at_an_end() -> None:
    net, x = mlp(36), pictures(12, 1, 6, 6)
    found = CoordinateSearch(early_stop=False)(net, x, labelled(net, x), 0.3)
    a = found.adversarial
    places = torch.stack([x, (x - 0.3).clamp(min=0), (x + 0.3).clamp(max=1)])
    assert float((a - places).abs().amin(0).max()) < 1e-15
    assert bool(Ball.of(x, 0.3, "linf").contains(a).all())


def test_moves_that_change_nothing_are_made_only_where_ties_are_allowed() -> None:
    # z_1 - z_0 = floor(sum / 0.35): no single move of 0.1 shows, all four of them do.
    class Floor(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = (x - 0.5).sum(1)
            return torch.stack([torch.zeros_like(total), (total / 0.35).floor()], 1)

    x, y = torch.full((2, 4), 0.5, dtype=F64) + 1e-3 * pictures(2, 4), torch.zeros(2, dtype=torch.int64)
    net = Floor().eval()
    moving, standing = (
        [CoordinateSearch(passes=8, together=1, ties=ties, seed=seed)(net, x, y, 0.1) for seed in range(10)]
        for ties in (True, False)
    )
    assert all(torch.equal(found.adversarial, x) for found in standing)
    assert sum(found.success.all() for found in moving) >= 3


def test_questions_of_coordinates_come_in_batches() -> None:
    net, x = mlp(64), pictures(40, 1, 8, 8)
    counting = Counting(net)
    CoordinateSearch(batch=40, passes=1)(counting, x, labelled(net, x), 1e-9)
    assert max(map(len, counting.asked)) <= 40


def test_coordinates_of_broken_examples_are_left_alone() -> None:
    net, x = mlp(36), pictures(40, 1, 6, 6)
    y = labelled(net, x)
    stopped, whole = (CoordinateSearch(early_stop=stop)(net, x, y, 0.2) for stop in (True, False))
    assert stopped.success.any()
    assert stopped.forward < whole.forward
    np.testing.assert_array_equal(stopped.success, whole.success)


def test_the_scale_of_logits_changes_no_coordinate() -> None:
    net, x = mlp(36), pictures(20, 1, 6, 6)
    y = labelled(net, x)
    plain, scaled = (CoordinateSearch()(n, x, y, 0.1) for n in (net, After(net, lambda z: z * 2.0**20)))
    assert torch.equal(plain.adversarial, scaled.adversarial)


@pytest.mark.parametrize(
    "attack", [RandomSearch(30), CoordinateSearch(), RandomSearch(30, "ball")], ids=lambda a: a.described
)
def test_seeds_give_the_same_result_and_leave_the_global_generator_alone(attack: Any) -> None:
    net, x = mlp(36), pictures(10, 1, 6, 6)
    y = labelled(net, x)
    before = torch.get_rng_state()
    one, again = (attack(net, x, y, 0.1) for _ in range(2))
    assert torch.equal(one.adversarial, again.adversarial)
    assert torch.equal(before, torch.get_rng_state())


def test_a_net_of_signs_breaks_by_corners(digits_net: tuple[nn.Module, Tensor, Tensor]) -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_net[0]

        def forward(self, x: Tensor) -> Tensor:
            h = self.net[1](x.flatten(1))  # type: ignore[index]
            return self.net[5](self.net[3](torch.where(h >= 0, 1.0, -1.0)).relu())  # type: ignore[index]

    net, x = Signs().eval(), digits_net[1][:60]
    y = labelled(net, x)
    few, many = (RandomSearch(k)(net, x, y, 0.2) for k in (5, 200))
    assert few.success.mean() < many.success.mean()
    assert (many.success | ~few.success).all()  # the first 5 of 200 are the same 5
    assert CoordinateSearch(block=2)(net, x, y, 0.2).success.any()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="points"):
        RandomSearch(0)
    with pytest.raises(UnknownNameError, match="sphere"):
        RandomSearch(where="sphere")  # type: ignore[arg-type]
    for name in ("block", "passes", "together"):
        with pytest.raises(InputError, match=name):
            CoordinateSearch(**{name: 0})
    net, x = mlp(6), pictures(3, 6)
    with pytest.raises(InputError, match="l2"):
        CoordinateSearch()(net, x, labelled(net, x), 0.1, norm="l2")
