"""Square: what it may change, what it keeps, how often it asks, and what it finds on nets whose optimum is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.attacks.ball import Ball
from qlab.attacks.base import Ledger
from qlab.attacks.boundary import Boundary
from qlab.attacks.pgd import PGD
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.square import HALVED, Square, _Bumps, _Moves, _Stripes, bumps, share, side
from qlab.attacks.victim import Victim
from qlab.errors import InputError
from qlab.quantizers import Sign, quantize
from tests.binary.conftest import binary_net

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(inputs: int, classes: int = 4, seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes)).double()
    for i, p in enumerate(net.parameters()):
        with torch.no_grad():
            p.normal_(0, 1, generator=draw(seed + 10 * i))
    return net.eval()


def pictures(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand(n, *shape, generator=draw(seed), dtype=F64)


def labelled(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


class Counting(nn.Module):
    """A net that keeps what it was asked."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return self.net(x)


class After(nn.Module):
    """A net with a function of its logits behind it."""

    def __init__(self, net: nn.Module, f: Any) -> None:
        super().__init__()
        self.net, self.f = net, f
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.net(x))


def moves(kind: type[_Moves], x: Tensor, eps: float, low: float = -9.0, high: float = 9.0, seed: int = 0) -> Any:
    net = mlp(x[0].numel())
    ball = Ball.of(x, eps, "linf" if kind is _Stripes else "l2", low, high)
    return kind(Ledger(Victim(net), ball, labelled(net, x), "worst", True, False), draw(seed))  # type: ignore[call-arg]


# ---- schedule and windows -------------------------------------------------------------------------------------------


def test_the_share_is_halved_at_the_places_of_the_paper() -> None:
    p = [share(0.8, t, 10_000) for t in range(10_000)]
    falls = [t for t in range(1, 10_000) if p[t] < p[t - 1]]
    assert falls == [limit + 1 for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)]
    assert all(p[t] == p[t - 1] / 2 for t in falls)
    assert p[0] == 0.8
    assert p[-1] == 0.8 / 2**9


@pytest.mark.parametrize("queries", [100, 500, 5000, 20_000])
def test_the_places_are_rescaled_to_the_questions(queries: int) -> None:
    for t in range(0, queries, max(1, queries // 97)):
        assert share(0.8, t, queries) == share(0.8, int(t * 10_000 / queries), 10_000)
    assert share(0.8, queries - 1, queries) == 0.8 / 2 ** len(HALVED)


@pytest.mark.parametrize(("h", "w"), [(28, 28), (32, 32), (8, 8), (6, 20), (20, 6), (1, 64), (1, 1), (64, 1)])
def test_windows_fit_and_cover_their_share(h: int, w: int) -> None:
    for p in (1.0, 0.8, 0.4, 0.1, 0.05, 0.8 / 2**9):
        a, b = side(p, h, w)
        assert 1 <= a <= h
        assert 1 <= b <= w
        if round((p * h * w) ** 0.5) <= min(h, w):
            assert a == b == max(1, round((p * h * w) ** 0.5))
        else:
            assert min(h, w) in (a, b)
            assert abs(a * b - p * h * w) <= min(h, w) / 2


def test_flat_windows_are_runs_of_a_share_of_the_inputs() -> None:
    assert [side(p, 1, 100) for p in (0.8, 0.4, 0.2, 0.05, 0.004)] == [(1, 80), (1, 40), (1, 20), (1, 5), (1, 1)]


# ---- l_inf candidates -----------------------------------------------------------------------------------------------


def test_every_coordinate_of_the_first_point_is_at_an_end_and_columns_share_signs() -> None:
    x = pictures(20, 3, 7, 5)
    first = moves(_Stripes, x, 0.1).first()
    signs = (first - x).sign()
    torch.testing.assert_close((first - x).abs(), torch.full_like(x, 0.1), rtol=0, atol=1e-15)
    assert torch.equal(signs, signs[:, :, :1].expand_as(signs))
    assert 0.4 < (signs > 0).double().mean() < 0.6


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 6, 11), (4, 12), (40,), (2, 2, 3, 4)])
def test_a_candidate_differs_from_the_best_point_in_one_window_and_there_lies_at_an_end(shape: tuple[int, ...]) -> None:
    x = pictures(30, *shape)
    m = moves(_Stripes, x, 0.1, 0.0, 1.0)
    best, at = m.first(), torch.arange(30)
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    for t in range(40):
        p = share(0.8, t, 40)
        a, b = side(p, m.h, m.w)
        new = m.next(best, at, p)
        ends = torch.minimum((new - low).abs(), (new - high).abs())
        assert float(ends.max()) < 1e-15
        changed = m.pictures(new != best).any(1)
        assert bool(changed.flatten(1).any(1).all())  # no question is spent on the point where it stands
        for mask in changed:
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert rows[-1] - rows[0] < a
            assert columns[-1] - columns[0] < b
        ups = m.pictures((new > best).double() - (new < best).double())
        # One sign per channel: where pixels move, they move to the same end.
        assert bool(((ups.amax((2, 3)) <= 0) | (ups.amin((2, 3)) >= 0)).all())
        best = new


def test_last_row_and_last_column_are_reached() -> None:
    x = pictures(400, 1, 6, 6)
    for kind in (_Stripes, _Bumps):
        m = moves(kind, x, 0.1)
        best = m.first()
        changed = (m.next(best, torch.arange(400), 0.1) != best).any(0)[0]
        assert bool(changed.all())


def test_candidates_of_an_example_do_not_hang_on_who_is_left() -> None:
    x = pictures(12, 2, 6, 6)
    for kind in (_Stripes, _Bumps):
        everyone, few = moves(kind, x, 0.2), moves(kind, x, 0.2)
        best = everyone.first()
        assert torch.equal(best, few.first())
        some = torch.tensor([1, 4, 9])
        torch.testing.assert_close(
            everyone.next(best, torch.arange(12), 0.2)[some], few.next(best, some, 0.2), rtol=0, atol=1e-15
        )


# ---- l_2 candidates -------------------------------------------------------------------------------------------------


def test_bumps_have_length_one_and_two_signs() -> None:
    for a, b in itertools.product((1, 2, 3, 5, 8), (2, 3, 5, 8)):
        eta = bumps(a, b)
        assert eta.shape == (a, b)
        assert float(eta.norm()) == pytest.approx(1, abs=1e-14)
        halves = eta.chunk(2, 1) if b >= a else eta.chunk(2, 0)
        assert bool((eta != 0).all())
        assert float(eta.max()) > 0 > float(eta.min())
        if max(a, b) % 2 == 0:
            assert bool((halves[0] > 0).all())
            assert bool((halves[1] < 0).all())


def test_a_bump_is_the_sum_of_nested_rectangles() -> None:
    # 3 x 6: two bumps of 3 x 3, whose middle pixel is in both rectangles: 1 + 1/4 against 1/4.
    one = torch.full((3, 3), 0.25, dtype=F64)
    one[1, 1] = 1.25
    expected = torch.cat([one, -one], 1)
    torch.testing.assert_close(bumps(3, 6), expected / expected.norm())


@pytest.mark.parametrize("shape", [(3, 10, 10), (1, 4, 7), (30,), (2, 9)])
def test_l2_points_keep_their_length_where_the_range_is_far(shape: tuple[int, ...]) -> None:
    x = pictures(25, *shape)
    m = moves(_Bumps, x, 0.7)
    best, at = m.first(), torch.arange(25)
    for t in range(30):
        assert bool(m.ball.contains(best).all())
        torch.testing.assert_close(m.ball.distance(best), torch.full((25,), 0.7, dtype=F64), rtol=0, atol=1e-12)
        best = m.next(best, at, share(0.8, t, 30))


def test_an_l2_step_moves_mass_between_two_windows_and_leaves_the_rest() -> None:
    x = pictures(40, 1, 15, 15)
    m = moves(_Bumps, x, 0.7)
    best = m.first()
    a, b = 3, 3
    new = m.next(best, torch.arange(40), 0.01)
    before, after = (best - x).flatten(1), (new - x).flatten(1)
    changed = (before - after).abs() > 1e-12
    assert int(changed.sum(1).max()) <= 2 * a * b
    torch.testing.assert_close(before.square().sum(1), after.square().sum(1), rtol=1e-12, atol=0)


def test_an_l2_step_gives_back_what_the_range_has_clipped() -> None:
    x = pictures(60, 1, 9, 9)
    m = moves(_Bumps, x, 3.0, 0.0, 1.0)
    best, at = m.first(), torch.arange(60)
    assert float(m.ball.distance(best).max()) < 3.0
    assert bool(m.ball.contains(m.next(best, at, 0.3)).all())


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_margin_never_falls_along_the_walk(norm: str) -> None:
    net, x = mlp(75), pictures(20, 3, 5, 5)
    found = Square(queries=120, early_stop=False)(net, x, labelled(net, x), 0.3, norm=norm, trace=True)  # type: ignore[arg-type]
    assert found.trace is not None
    losses = torch.stack([step.loss for step in found.trace])
    assert losses.shape == (119, 20)
    assert bool((losses.diff(dim=0) >= 0).all())
    assert bool((losses[-1] > losses[0]).all())
    assert bool((torch.as_tensor(found.margin) >= losses[-1]).all())


@pytest.mark.parametrize("queries", [2, 3, 50])
def test_no_example_is_asked_about_more_often_than_allowed(queries: int) -> None:
    net, x = mlp(36), pictures(9, 1, 6, 6)
    counting = Counting(net)
    # A tiny ball: nothing breaks, so every question is used.
    found = Square(queries=queries)(counting, x, labelled(net, x), 1e-9)
    assert not found.success.any()
    asked = sum(len(q) for q in counting.asked) - 2 * len(x)  # the check before asks twice
    assert found.forward == asked == queries * len(x)
    assert found.backward == 0


def test_broken_examples_are_left_alone_and_cost_no_more() -> None:
    net, x = mlp(36), pictures(50, 1, 6, 6)
    y = labelled(net, x)
    stopped = Square(queries=60)(net, x, y, 0.3)
    whole = Square(queries=60, early_stop=False)(net, x, y, 0.3)
    assert stopped.success.any()
    assert stopped.forward < whole.forward == 60 * 50
    np.testing.assert_array_equal(stopped.success, whole.success)  # the same walk, only longer
    assert (whole.margin >= stopped.margin).all()


@pytest.mark.parametrize(("norm", "shape"), [("linf", (2, 6, 9)), ("l2", (2, 6, 9)), ("linf", (30,)), ("l2", (30,))])
def test_every_point_asked_about_lies_in_ball_and_range(norm: str, shape: tuple[int, ...]) -> None:
    net = mlp(int(np.prod(shape))).float()
    x = (4 * pictures(8, *shape) - 2).float()
    counting = Counting(net)
    found = Square(queries=40, early_stop=False)(
        counting, x, labelled(net, x), 0.37, norm=norm, low=-2.0, high=2.0  # type: ignore[arg-type]
    )  # fmt: skip
    ball = Ball.of(x, 0.37, norm, -2.0, 2.0)  # type: ignore[arg-type]
    for q in counting.asked[3:]:
        assert q.dtype == torch.float32
        assert bool(ball.contains(q).all())
    assert bool(ball.contains(found.adversarial).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_scale_of_logits_changes_nothing(norm: str) -> None:
    net, x = mlp(48), pictures(20, 3, 4, 4)
    y = labelled(net, x)
    attack = Square(queries=80)
    plain = attack(net, x, y, 0.1, norm=norm)  # type: ignore[arg-type]
    for f in (lambda z: 1024 * z, lambda z: z / 4096, lambda z: 512 * z + 64):
        scaled = attack(After(net, f), x, y, 0.1, norm=norm)  # type: ignore[arg-type]
        assert torch.equal(plain.adversarial, scaled.adversarial)
        np.testing.assert_array_equal(plain.success, scaled.success)


def test_the_same_seed_gives_the_same_result_and_the_global_generator_is_left_alone() -> None:
    net, x = mlp(36), pictures(10, 1, 6, 6)
    y = labelled(net, x)
    before = torch.get_rng_state()
    one, again = (Square(queries=40, seed=3)(net, x, y, 0.05) for _ in range(2))
    assert torch.equal(one.adversarial, again.adversarial)
    assert not torch.equal(one.adversarial, Square(queries=40, seed=4)(net, x, y, 0.05).adversarial)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(12,), (1, 3, 4), (3, 2, 2)])
def test_on_a_linear_net_it_finds_the_largest_margin_of_the_ball(shape: tuple[int, ...]) -> None:
    x = pictures(6, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    with torch.no_grad():
        net[1].weight.normal_(generator=draw(5))
        net[1].bias.normal_(generator=draw(6))
    y = labelled(net, x)
    w = net[1].weight[1 - y] - net[1].weight[y]
    low, high = (x.flatten(1) - 0.2).clamp(min=0), (x.flatten(1) + 0.2).clamp(max=1)
    best = torch.where(w > 0, high, low)
    exact = (w * best).sum(1) + net[1].bias[1 - y] - net[1].bias[y]
    found = Square(queries=600, early_stop=False)(net, x, y, 0.2)
    np.testing.assert_allclose(found.margin, exact.detach().numpy(), rtol=0, atol=1e-12)


def test_l2_beats_random_points_and_stays_below_cauchy_schwarz() -> None:
    x = 0.5 + 0.1 * pictures(8, 30)
    net = nn.Linear(30, 2).double().eval()
    with torch.no_grad():
        net.weight.normal_(generator=draw(5))
        y = labelled(net, x)
        clean = net(x).gather(1, 1 - y[:, None])[:, 0] - net(x).gather(1, y[:, None])[:, 0]
        most = 0.2 * (net.weight[1 - y] - net.weight[y]).norm(dim=1)
    gained, by_chance = (
        attack(net, x, y, 0.2, norm="l2").margin - clean.numpy()
        for attack in (Square(queries=500, early_stop=False), RandomSearch(500, early_stop=False))
    )
    assert (gained <= most.numpy() * (1 + 1e-9)).all()
    assert (gained > by_chance + 0.05 * most.numpy()).all()


class Stairs(nn.Module):
    """z_1 grows by one with every third of 32 inputs that passes the middle on its right side; z_0 stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.side = torch.randint(0, 2, (32,), generator=draw(7)) * 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        count = ((x - 0.5) * self.side > 0).double().sum(1)
        return torch.stack([torch.full_like(count, 8.5), (count / 3).floor()], 1)


def test_moves_that_change_nothing_cross_stairs() -> None:
    x = 0.45 + 0.1 * pictures(40, 32)
    y = torch.zeros(40, dtype=torch.int64)
    drifting, standing = (Square(queries=400, ties=ties)(Stairs().eval(), x, y, 0.1) for ties in (True, False))
    assert drifting.accuracy < 0.1 < 0.9 < standing.accuracy


def test_on_a_picture_net_it_is_about_as_strong_as_gradients(digits_net: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits_net
    x, y = x[:100], y[:100]
    blind = Square(queries=400)(net, x, y, 0.15)
    gradients = PGD(steps=20, loss="margin")(net, x, y, 0.15)
    assert abs(blind.accuracy - gradients.accuracy) < 0.05
    assert blind.accuracy < blind.clean.mean() - 0.5


def test_a_net_of_signs_is_attacked_as_it_is() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        for i, p in enumerate(plain.parameters()):
            p.normal_(generator=draw(i))
    net = quantize(plain, Sign, Sign, keep=()).eval()
    x = pictures(20, 1, 6, 6).float()
    y = labelled(net, x)
    found = Square(queries=100)(net, x, y, 0.2)
    assert found.success.any()
    with torch.no_grad():
        np.testing.assert_array_equal(net(found.adversarial).argmax(1) != y, found.success)


def test_a_fast_net_answers_in_place_of_the_net() -> None:
    net, x = mlp(36), pictures(10, 1, 6, 6)
    y = labelled(net, x)
    fast, slow = Counting(net), Counting(net)
    found = Square(queries=20)(slow, x, y, 0.01, fast=fast)
    assert len(slow.asked) == 2  # the check alone
    assert sum(map(len, fast.asked)) == found.forward
    assert torch.equal(found.adversarial, Square(queries=20)(net, x, y, 0.01).adversarial)


def test_a_packed_net_leads_to_the_same_points() -> None:
    net = binary_net("mlp", (36,), hidden=(64, 64))
    x = pictures(12, 36).float()
    y = labelled(net, x)
    packed = qlab.binary.compile(net, x)
    for attack, norm in ((Square(queries=40), "linf"), (Square(queries=40), "l2"), (Boundary(steps=20), "l2")):
        eps = 0.1 if attack.needs_eps else None
        found = attack(net, x, y, eps, norm=norm, fast=packed)  # type: ignore[arg-type]
        assert torch.equal(found.adversarial, attack(net, x, y, eps, norm=norm).adversarial)  # type: ignore[arg-type]


def test_without_a_bound_the_range_is_the_ball() -> None:
    net, x = mlp(36), pictures(10, 1, 6, 6)
    for norm in ("linf", "l2"):
        found = Square(queries=30)(net, x, labelled(net, x), float("inf"), norm=norm)  # type: ignore[arg-type]
        assert bool(((found.adversarial >= 0) & (found.adversarial <= 1)).all())
        assert found.success.any()


def test_wrong_settings_and_norms_are_named() -> None:
    for settings in ({"queries": 1}, {"p": 0.0}, {"p": 1.5}):
        with pytest.raises(InputError, match=next(iter(settings))):
            Square(**settings)  # type: ignore[arg-type]
    net, x = mlp(12), pictures(3, 12)
    with pytest.raises(InputError, match="l1"):
        Square()(net, x, labelled(net, x), 0.1, norm="l1")


def test_logits_that_overflow_on_the_way_are_named() -> None:
    class Bursts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.stack([x.sum(1), -x.sum(1)], 1)
            return torch.where((x > 1).any(1, keepdim=True), torch.nan, z)

    x = pictures(4, 6)
    with pytest.raises(InputError, match="NaN"):
        Square(queries=10)(Bursts().eval(), x, torch.zeros(4, dtype=torch.int64), 0.5, high=2.0)


def test_a_search_whose_last_question_breaks_the_last_example_ends_well() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval().requires_grad_(False)
    net[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))  # class 1 as soon as a pixel is above 0
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    asked = [Square(queries, seed=0)(net, x, y, 0.5, low=-1.0) for queries in (2, 3, 4, 6, 10)]
    assert any(found.success.all() and found.forward == q for found, q in zip(asked, (2, 3, 4, 6, 10), strict=True))


@pytest.mark.parametrize("early", [True, False])
def test_what_is_not_broken_is_booked_at_its_best_point(early: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval().requires_grad_(False)
    net[1].weight.copy_(torch.stack([torch.ones(16), torch.zeros(16)]))
    net[1].bias.copy_(torch.tensor([0.0, -20.0]))  # out of reach: the margin falls by 16 eps at most
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    found = Square(300, early_stop=early)(net, x, y, 0.1)
    assert not found.success.any()
    np.testing.assert_allclose(found.margin, -20 - 16 * (0.5 - 0.1), rtol=1e-5)
    np.testing.assert_allclose(found.adversarial.numpy(), 0.4, rtol=1e-6)
