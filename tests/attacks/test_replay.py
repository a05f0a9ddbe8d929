"""Attack replay: the plane against brute force, paths against hand-written attacks, exact zeros against autograd."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.path import Path as Polygon
from torch import Tensor, nn

from qlab.attacks.ball import Norm
from qlab.attacks.pgd import PGD
from qlab.attacks.replay import ATTACKERS, Replay, attackers_for, replay, replaying
from qlab.attacks.replay_examples import FAULTS, Example, example
from qlab.attacks.replay_plane import allowed, in_plane, landscape, outline, plane_of
from qlab.attacks.scaling import Fixed
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def relu_net(inputs: int = 12, classes: int = 4, scale: float = 1.0, seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes), Times(scale)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 0.6, generator=draw(seed + 10 * i))
    return net.eval().requires_grad_(False)


def inputs(net: nn.Module, *shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs in [0.2, 0.8] that the net has right, for their labels are what it says."""
    x = 0.2 + 0.6 * torch.rand(5, *shape, generator=draw(seed), dtype=F64)
    return x, net(x).argmax(1)


@pytest.fixture(scope="module")
def several() -> Replay:
    net = relu_net()
    x, y = inputs(net, 1, 3, 4)
    return replay(net, x, y, 2, 0.2, ("plain", "hns", "nes", "square"), steps=6, side=9)


def brute_margin(z: Tensor, y: int) -> float:
    return max(float(v) for i, v in enumerate(z) if i != y) - float(z[y])


# ------------------------------------------------------------------------------------------------------------- the plane


def random_paths(D: int, seed: int = 0) -> list[np.ndarray]:
    return [np.cumsum(np.random.default_rng(seed + k).normal(size=(7, D)), 0) * 0.05 for k in range(3)]


@pytest.mark.parametrize("D", [3, 12, 200])
def test_the_axes_are_orthonormal_and_the_first_points_to_the_worst_point(D: int) -> None:
    x, deltas = np.random.default_rng(9).random(D), random_paths(D)
    plane = plane_of(x, deltas, deltas[1][4], 0.1, "linf")
    assert np.allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-14)
    assert np.allclose(plane.axes[0], deltas[1][4] / np.linalg.norm(deltas[1][4]), atol=1e-14)
    assert np.allclose(plane.points(plane.coordinates(x)), x, atol=1e-14)
    c = np.array([[0.3, -0.2], [1.0, 2.0]])
    assert np.allclose(plane.coordinates(plane.points(c)), c, atol=1e-13)


def test_the_second_axis_is_the_leading_remaining_direction() -> None:
    D = 15
    x, deltas = np.zeros(D), random_paths(D)
    u, v = plane_of(x, deltas, deltas[0][-1], 0.1, "linf").axes
    rows = np.concatenate(deltas)
    rest = rows @ (np.eye(D) - np.outer(u, u))
    values, vectors = np.linalg.eigh(rest.T @ rest)
    assert abs(v @ vectors[:, -1]) == pytest.approx(1, abs=1e-12)
    assert ((rest @ v) ** 2).sum() == pytest.approx(values[-1], rel=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e-9, 1e9])
def test_paths_that_stand_still_or_lie_on_a_line_or_are_tiny_still_get_a_plane(size: float) -> None:
    line = size * np.outer([0.0, 1.0, 2.0], np.random.default_rng(0).normal(size=6))
    plane = plane_of(np.full(6, 0.5), [line], line[-1], 0.1, "linf", seed=3)
    again = plane_of(np.full(6, 0.5), [line], line[-1], 0.1, "linf", seed=3)
    other = plane_of(np.full(6, 0.5), [line], line[-1], 0.1, "linf", seed=4)
    assert np.allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-14)
    assert np.array_equal(plane.axes, again.axes)
    assert not np.allclose(plane.axes[1], other.axes[1])
    if size:
        assert in_plane(plane, line) == pytest.approx(1, abs=1e-12)
    else:
        assert math.isnan(in_plane(plane, line))


def test_two_inputs_are_the_plane_themselves() -> None:
    net = relu_net(2, 2)
    x, y = inputs(net, 2)
    found = replay(net, x, y, 0, 0.15, ("plain", "hns", "square"), steps=5, side=5)
    assert np.array_equal(found.plane.axes, np.eye(2))
    assert np.array_equal(found.plane.centre, x[0].numpy())
    for path in found.paths:
        assert np.array_equal(found.coordinates(path.name), path.points.numpy())
        assert not path.moved or found.in_plane(path.name) == pytest.approx(1)
    lengths = np.linalg.norm(found.arrows("plain")[:-1], axis=1)
    assert np.allclose(lengths, 1)
    corners = x[0].numpy() + 0.15 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    assert {tuple(np.round(p, 12)) for p in found.ball} == {tuple(np.round(p, 12)) for p in corners}
    assert "space of inputs itself" in found.summary()


def test_the_share_in_the_plane_is_that_of_the_lengths(several: Replay) -> None:
    u, v = several.plane.axes
    for path in several.paths:
        points = path.points.flatten(1).numpy()
        whole = part = 0.0
        for p, q in pairwise(points):
            d = q - p
            whole += math.dist(q, p)
            part += math.hypot(float(d @ u), float(d @ v))
        assert several.in_plane(path.name) == pytest.approx(part / whole, rel=1e-12)
        assert 0 < part / whole <= 1 + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("D", [2, 3, 9])
def test_the_outlines_hold_exactly_the_points_of_ball_and_range(norm: Norm, D: int) -> None:
    rng = np.random.default_rng(D)
    x = np.where(rng.random(D) < 0.3, 0.0, rng.random(D))  # some at the edge of the range, as a picture's background
    low, high, eps = np.zeros(D), np.ones(D), 0.4
    deltas = [np.clip(x + 0.3 * rng.normal(size=(6, D)), 0, 1) - x for _ in range(2)]
    plane = plane_of(x, deltas, deltas[0][-1], eps, norm)
    ball = outline(plane, eps, norm)
    part = allowed(plane, ball, x, low, high)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    corners = np.linalg.norm(plane.points(ball) - x, ord=order, axis=1)
    assert np.allclose(corners, eps, atol=1e-12)
    if norm != "l2":  # between two corners runs an edge of the ball, not a chord
        middles = plane.points((ball + np.roll(ball, 1, 0)) / 2)
        assert np.allclose(np.linalg.norm(middles - x, ord=order, axis=1), eps, atol=1e-12)
    samples = plane.centre + rng.uniform(-1, 1, (4000, 2)) * 1.2 * np.abs(ball - plane.centre).max()
    points = plane.points(samples)
    far = np.linalg.norm(points - x, ord=order, axis=1)
    sure = np.abs(far - eps) > 2e-3 * eps  # a polygon of 240 corners is a circle up to 1e-4
    assert np.array_equal(Polygon(ball).contains_points(samples)[sure], (far < eps)[sure])
    room = np.minimum((points - low).min(1), (high - points).min(1))
    sure &= np.abs(room) > 1e-9
    inside = Polygon(part).contains_points(samples) if len(part) > 2 else np.zeros(len(samples), bool)
    assert np.array_equal(inside[sure], ((far < eps) & (room > 0))[sure])


def test_a_range_that_leaves_no_room_on_the_plane_leaves_a_point_or_a_segment() -> None:
    x = np.zeros(3)  # at a corner of the range; the plane a + b + c = 0 meets it there alone
    best = np.array([1.0, -1.0, 0.0])
    plane = plane_of(x, [np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) * 0.1], best, 0.1, "linf")
    part = allowed(plane, outline(plane, 0.1, "linf"), x, np.zeros(3), np.ones(3))
    assert np.allclose(part, 0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- the landscape


def test_points_of_the_plane_have_the_margins_of_the_net() -> None:
    net = relu_net(12, 3)
    x, y = inputs(net, 1, 3, 4)
    found = replay(net, x, y, 1, 0.2, ("plain",), steps=4, side=7)
    land = found.landscape
    u, v = (axis.reshape(1, 3, 4) for axis in found.plane.axes)
    for i, a in enumerate(land.a):
        for j, b in enumerate(land.b):
            z = net(x[1:2] + a * torch.from_numpy(u) + b * torch.from_numpy(v))[0]
            assert land.margin[j, i] == pytest.approx(brute_margin(z, int(y[1])), abs=1e-12)
    left, right, bottom, top = found.plane.extent
    assert (land.a[0], land.a[-1], land.b[0], land.b[-1]) == (left, right, bottom, top)
    assert right - left == pytest.approx(top - bottom)
    assert land.lost == (land.margin > 0).mean()


def test_a_landscape_does_not_depend_on_how_many_points_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = relu_net(12, 3)
    x, y = inputs(net, 12)
    plane = plane_of(x[0].numpy(), random_paths(12), random_paths(12)[0][-1], 0.2, "l2")
    once = landscape(net, plane, x[:1], y[:1], 11)
    monkeypatch.setattr("qlab.attacks.replay_plane.CHUNK", 100)
    assert np.allclose(landscape(net, plane, x[:1], y[:1], 11).margin, once.margin, atol=1e-12)


def test_the_drawing_shows_all_of_all_paths(several: Replay) -> None:
    left, right, bottom, top = several.plane.extent
    for path in several.paths:
        a, b = several.coordinates(path.name).T
        assert left < a.min() <= a.max() < right
        assert bottom < b.min() <= b.max() < top


# --------------------------------------------------------------------------------------------------------------- the paths


def test_the_plain_path_is_projected_gradient_descent() -> None:
    net = relu_net()
    x, y = inputs(net, 1, 3, 4)
    eps, eta = 0.2, 0.03
    path = replay(net, x, y, 3, eps, ("plain",), steps=7, eta=eta, side=2)["plain"]
    at = x[3:4].clone()
    for t in range(8):
        assert torch.allclose(path.points[t], at[0], atol=1e-15)
        assert path.margin[t] == pytest.approx(brute_margin(net(at)[0], int(y[3])), abs=1e-12)
        assert path.wrong[t] == (int(net(at).argmax()) != int(y[3]))
        if t < 7:
            here = at.clone().requires_grad_()
            loss = F.cross_entropy(net(here), y[3:4])
            (g,) = torch.autograd.grad(loss, here)
            loss = loss.detach()
            assert path.loss[t] == pytest.approx(float(loss), rel=1e-12)
            assert torch.allclose(path.gradient[t], g[0], rtol=1e-9, atol=1e-300)
            assert path.steepness[t] == pytest.approx(float(g.norm()), rel=1e-9)
            at = torch.minimum(torch.maximum(at + eta * g.sign(), x[3:4] - eps), x[3:4] + eps).clamp(0, 1)
    assert path.broke == (int(np.flatnonzero(path.wrong)[0]) if path.wrong.any() else None)
    assert path.backward == 7
    assert np.array_equal(path.follows, [True] * 7 + [False])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flags_of_zero_gradients_are_the_exact_zeros(scale: float, dtype: torch.dtype) -> None:
    net = relu_net(scale=scale).to(dtype)
    x, y = inputs(relu_net(), 1, 3, 4)
    x = x.to(dtype)
    for i in range(len(x)):
        found = replay(net, x, y, i, 0.2, ("plain", "nes"), steps=5, side=2)
        path = found["plain"]
        exact = []
        for p in path.points[:-1]:
            here = p[None].clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(net(here), y[i : i + 1]), here)
            exact.append(not g.any())
        assert path.zero.tolist() == [*exact, False]
        assert np.array_equal(np.isnan(found.arrows("plain")).all(1), [*exact, True])
        assert np.array_equal(path.steepness[:-1] == 0, exact)
        for t in np.flatnonzero(path.zero):  # no gradient, no step
            assert torch.equal(path.points[t + 1], path.points[t])
        nes = found["nes"]
        assert np.array_equal(nes.zero[:-1], [not g.any() for g in nes.gradient[:-1]])
        assert path.moved == (path.points != path.points[0]).any()
    if scale == 1e6:
        assert exact[0]
        assert "does not move in 5 steps (gradient exactly zero at 5 of 5 points)" in found.summary()
    if scale == 1:
        assert not any(exact)


def test_arrows_are_directions_on_the_plane_even_of_gradients_whose_squares_underflow() -> None:
    net = relu_net(scale=300.0)  # cross-entropy's gradient is about exp(-gap) here
    x, y = inputs(net, 1, 3, 4)
    small = []
    for i in range(len(x)):
        found = replay(net, x, y, i, 0.02, ("plain",), steps=2, side=2)
        path, arrow = found["plain"], found.arrows("plain")[0]
        if path.zero[0]:
            continue
        g = path.gradient[0].flatten().numpy()
        g = g / np.abs(g).max()
        assert np.allclose(arrow, found.plane.axes @ g / np.linalg.norm(g), rtol=1e-9)
        assert np.linalg.norm(arrow) <= 1 + 1e-12
        assert path.steepness[0] > 0
        small.append(path.steepness[0])
    assert min(small) < 1e-160


def test_pgd_attackers_share_their_start_and_seeds_repeat() -> None:
    net = quantized_net()
    x, y = inputs(net, 6)

    def run(seed: int) -> Replay:
        return replay(net, x, y, 0, 0.2, steps=3, side=3, random_start=True, seed=seed)

    first, again, other = run(5), run(5), run(6)
    names = [path.name for path in first.paths]
    assert names == ["plain", "hns", "bpda", "nes", "square"]
    for name in names:
        assert torch.equal(first[name].points, again[name].points)
    assert np.array_equal(first.landscape.margin, again.landscape.margin)
    for name in ("hns", "bpda", "nes"):
        assert torch.equal(first[name].points[0], first["plain"].points[0])
    assert torch.equal(first["square"].points[0], x[0])
    assert not torch.equal(first["plain"].points[0], other["plain"].points[0])
    still = replay(net, x, y, 0, 0.2, steps=3, side=3)
    assert all(torch.equal(path.points[0], x[0]) for path in still.paths)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_iterate_lies_in_ball_and_range(norm: Norm) -> None:
    net = relu_net()
    x, y = inputs(net, 1, 3, 4)
    found = replay(net, x, y, 0, 0.9, ("plain", "hns", "nes", "square"), norm=norm, steps=4, side=2)
    table = found.frame()
    assert (table["distance"] <= 0.9).all()
    for path in found.paths:
        assert bool(((path.points >= 0) & (path.points <= 1)).all())
    assert len(table) == 4 * 5
    assert table.loc[table["attacker"] == "nes", "margin"].tolist() == found["nes"].margin.tolist()
    assert np.array_equal(table[["a", "b"]].to_numpy()[:5], found.coordinates("plain"))


def test_search_without_gradients_has_no_arrows_and_never_gets_worse(several: Replay) -> None:
    path = several["square"]
    assert len(path.points) == 7
    assert not path.follows.any()
    assert not path.zero.any()
    assert np.isnan(several.arrows("square")).all()
    assert (np.diff(path.margin[1:]) >= 0).all()
    assert path.forward == 6 * 20 + 1
    assert path.backward == 0
    assert several["nes"].forward > 6 * 20
    assert several["nes"].backward == 0


def test_the_first_to_break_it_is_who_has_the_earliest_wrong_iterate() -> None:
    net = relu_net(12, 3)
    x, y = inputs(net, 12)
    for i in range(len(x)):
        found = replay(net, x, y, i, 0.3, ("plain", "hns", "square"), steps=8, eta=0.05, side=2)
        steps = {path.name: path.wrong.tolist().index(True) for path in found.paths if True in path.wrong.tolist()}
        assert set(found.first()) == {name for name, step in steps.items() if step == min(steps.values())}


def test_attacks_of_ones_own_are_replayed_too() -> None:
    net = relu_net()
    x, y = inputs(net, 12)
    mine = {"cold": PGD(steps=4, scaling=Fixed(0.1), random_start=False), "long": PGD(steps=9, loss="margin")}
    found = replay(net, x, y, 0, 0.1, mine, side=3)
    assert [(path.name, len(path.points)) for path in found.paths] == [("cold", 5), ("long", 10)]


# -------------------------------------------------------------------------------------------------------------- progress


def test_progress_brings_the_first_path_then_the_others_then_finer_landscapes() -> None:
    net = relu_net()
    x, y = inputs(net, 12)
    updates = list(replaying(net, x, y, 0, 0.1, ("plain", "hns", "square"), steps=3, side=33))
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    values = [u.value for u in updates if u.value is not None]
    assert [len(v.paths) for v in values] == [1, 2, 3, 3, 3]
    assert [len(v.landscape.a) for v in values] == [9, 9, 9, 17, 33]
    whole = replay(net, x, y, 0, 0.1, ("plain", "hns", "square"), steps=3, side=33)
    assert np.array_equal(values[-1].landscape.margin, whole.landscape.margin)
    assert np.array_equal(values[-1].landscape.margin[::2, ::2], values[-2].landscape.margin)
    assert values[0].summary()


# ------------------------------------------------------------------------------------------------------ nets and mistakes


def quantized_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 1, generator=draw(i))
    return quantize(net, weights=Sign, activations=Sign).eval().requires_grad_(False)


def test_another_backward_rule_is_offered_only_where_there_is_one() -> None:
    assert "bpda" in attackers_for(quantized_net())
    assert "bpda" not in attackers_for(relu_net())
    weights_only = quantize(nn.Sequential(nn.Linear(6, 3)), weights=Sign, activations=None).eval()
    assert "bpda" not in attackers_for(weights_only)
    assert set(attackers_for(relu_net())) <= set(ATTACKERS)


def test_attackers_that_are_not_made_for_the_norm_are_left_out_by_default() -> None:
    net = relu_net()
    x, y = inputs(net, 12)
    found = replay(net, x, y, 0, 0.5, norm="l1", steps=2, side=3)
    assert [path.name for path in found.paths] == ["plain", "hns", "nes"]
    assert (found.frame()["distance"] <= 0.5).all()
    with pytest.raises(InputError, match="not for l1"):
        replay(net, x, y, 0, 0.5, ("square",), norm="l1")
    with pytest.raises(UnknownNameError, match="norm"):
        replay(net, x, y, 0, 0.5, norm="l3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"example": 5}, "example is 5"),
        ({"example": True}, "whole number"),
        ({"eps": 0.0}, "eps"),
        ({"eps": math.inf}, "eps"),
        ({"steps": 0}, "steps"),
        ({"questions": 1}, "questions"),
        ({"side": 1}, "side"),
        ({"attackers": ()}, "attackers"),
        ({"attackers": ("plain", "plain")}, "once"),
        ({"attackers": {}}, "no attacker"),
        ({"low": 0.5}, "outside the stated range"),
    ],
)
def test_what_cannot_be_replayed_is_said(change: dict[str, object], words: str) -> None:
    net = relu_net()
    x, y = inputs(net, 12)
    with pytest.raises(InputError, match=words):
        replay(net, x, y, **({"eps": 0.1} | change))  # type: ignore[arg-type]


def test_an_example_that_is_lost_already_and_names_that_there_are_not_are_said() -> None:
    net = relu_net()
    x, y = inputs(net, 12)
    with pytest.raises(InputError, match="misclassified already"):
        replay(net, x, (y + 1) % 4, 0, 0.1)
    with pytest.raises(UnknownNameError, match="attacker"):
        replay(net, x, y, 0, 0.1, ("plain", "hsn"))
    with pytest.raises(UnknownNameError, match="attacker"):
        replay(net, x, y, 0, 0.1, ("plain",), steps=1, side=2)["square"]
    one = nn.Sequential(nn.Linear(1, 2)).eval()
    at = torch.tensor([[0.25], [0.5]])
    with pytest.raises(InputError, match="at least two"):
        replay(one, at, one(at).argmax(1), 0, 0.1)


# -------------------------------------------------------------------------------------------------- the built-in examples


@pytest.fixture(scope="module", params=["digits", "moons"])
def dresses(request: pytest.FixtureRequest) -> dict[str, Example]:
    return {fault: example(request.param, fault) for fault in FAULTS}


def test_the_examples_are_one_classifier_in_three_dresses(dresses: dict[str, Example]) -> None:
    plain = dresses["none"]
    noise = torch.rand(500, *plain.x.shape[1:], generator=draw(3))
    points = plain.low + (plain.high - plain.low) * noise
    with torch.no_grad():
        z = {fault: dresses[fault].net(points).double() for fault in FAULTS}
        assert torch.equal(plain.net(plain.x).argmax(1), plain.y)
    for fault in ("saturated", "dead"):
        assert torch.allclose(z[fault], z[fault].norm() / z["none"].norm() * z["none"], rtol=1e-5)


def test_each_fault_has_the_repair_that_the_docs_name(dresses: dict[str, Example]) -> None:
    def moved(fault: str) -> dict[str, bool]:
        e = dresses[fault]
        found = replay(
            e.net, e.x, e.y, e.index, e.eps, ("plain", "hns", "bpda", "square"), low=e.low, high=e.high, eta=e.eps / 10,
            steps=8, questions=2, side=2,
        )  # fmt: skip
        return {path.name: path.moved for path in found.paths}

    assert all(moved("none").values())
    assert moved("saturated") == {"plain": False, "hns": True, "bpda": False, "square": True}
    assert moved("dead") == {"plain": False, "hns": False, "bpda": True, "square": True}


def test_an_example_is_the_same_again() -> None:
    a, b = example("moons", "dead"), example("moons", "dead")
    for p, q in zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(UnknownNameError, match="fault"):
        example("moons", "tired")
    with pytest.raises(UnknownNameError, match="data"):
        example("faces")


# ------------------------------------------------------------------------------------------------------------ the picture


def test_the_picture_says_what_it_shows(several: Replay) -> None:
    figure = several.figure()
    assert figure.get_label() == several.summary()
    assert len(figure.axes) == 3
    assert "not move" in several.summary() or "break" in several.summary()
