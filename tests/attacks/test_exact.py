"""The exact adversary knows the true distance: geometry by hand, brute force, and three methods that share no search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.attacks.exact import Exact, exact_adversary, exact_search, overestimation, rounding
from qlab.attacks.exact_milp import _thresholds
from qlab.attacks.exact_patterns import MAX_PATTERNS
from qlab.attacks.pgd import PGD
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, Uniform, harden, quantize

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), dtype=torch.float64)
    layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


def random_net(
    D: int, hidden: tuple[int, ...], act=Sign, classes: int = 3, seed: int = 0, around: float = 1.0
) -> nn.Sequential:
    """A net whose first layer's boundaries cross the range [-2, 2], with batch norms that scale by both signs."""
    draw = generator(seed)
    modules: list[nn.Module] = []
    for n_in, n in itertools.pairwise((D, *hidden)):
        norm = nn.BatchNorm1d(n, dtype=torch.float64)
        layer = nn.Linear(n_in, n, dtype=torch.float64)
        for p in (layer.weight, norm.weight):
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        for p in (layer.bias, norm.bias, norm.running_mean):
            p.data = around * torch.randn(p.shape, generator=draw, dtype=torch.float64) / 2
        norm.running_var.uniform_(0.5, 2, generator=draw)
        modules += [layer, norm, act()]
    last = nn.Linear(hidden[-1], classes, dtype=torch.float64)
    last.weight.data = torch.randn(last.weight.shape, generator=draw, dtype=torch.float64)
    last.bias.data = torch.zeros(classes, dtype=torch.float64)
    net = nn.Sequential(*modules, last).eval()
    with torch.no_grad():  # every class somewhere
        last.bias -= net(4 * torch.rand(200, D, generator=draw, dtype=torch.float64) - 2).median(0).values
    return net


def points(n: int, D: int, seed: int = 1) -> Tensor:
    return 4 * torch.rand(n, D, generator=generator(seed), dtype=torch.float64) - 2


def own_class(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


def distance(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta, ord=ORDER[norm], dim=-1)


def square() -> nn.Sequential:
    """Class 1 exactly on the closed square [0.4, 0.6]^2."""
    first = linear([[1, 0], [-1, 0], [0, 1], [0, -1]], [-0.4, 0.6, -0.4, 0.6])
    return nn.Sequential(first, Sign(), linear([[0.0] * 4, [1.0] * 4], [0.0, -3.0])).eval()


def assert_proven(result: Exact, net: nn.Module) -> None:
    """Check that the distance is reached: the witness is misclassified by the net itself, and no farther than allowed."""
    there = result.clean & np.isfinite(result.upper)
    assert result.confirmed[there].all()
    x, w = result.x.double(), result.witness.double()
    d = distance((w - x).flatten(1), result.norm).numpy()
    width = distance((result.high - result.low).expand(result.x.shape[1:]).flatten().double(), result.norm)
    assert (d[there] <= result.upper[there] + float(width) * torch.finfo(result.x.dtype).eps ** 0.5).all()
    p = distance((result.point - x).flatten(1), result.norm).numpy()
    np.testing.assert_allclose(p[there], result.upper[there], rtol=0, atol=1e-9)
    assert (own_class(net, result.witness)[there] != result.y[there]).all()


# ---- geometry by hand


@pytest.mark.parametrize("method", ["plane", "patterns", "milp"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_distance_to_a_square_is_the_textbooks(norm, method) -> None:
    if norm == "l2" and method == "milp":
        pytest.skip("linear programs know no l2")
    net = square()
    x = torch.tensor([[0.1, 0.2], [0.5, 0.9], [0.7, 0.7], [0.45, 0.52], [0.55, 0.41]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1, 1])
    found = exact_adversary(net, x, y, norm=norm, method=method)
    outside = (torch.maximum(0.4 - x, x - 0.6)).clamp(min=0)
    inside = torch.minimum(x - 0.4, 0.6 - x).amin(1)
    expected = torch.where(y == 0, distance(outside, norm), inside)
    np.testing.assert_allclose(found.upper, expected.numpy(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.lower, expected.numpy(), rtol=0, atol=2e-6 if method == "milp" else 1e-9)
    # sign(0) = +1: the square owns its border, so it is reached from outside and never quite left from inside
    assert found.attained.tolist() == [True, True, True, False, False]
    assert_proven(found, net)


@pytest.mark.parametrize("method", ["plane", "milp"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_net_has_the_distance_of_its_hyperplane(norm, method) -> None:
    if norm == "l2" and method == "milp":
        pytest.skip("linear programs know no l2")
    D = 2 if method == "plane" else 6
    w = torch.randn(D, generator=generator(3), dtype=torch.float64)
    net = linear([[0.0] * D, w.tolist()], [0.0, 0.1]).eval()
    x = torch.rand(8, D, generator=generator(4), dtype=torch.float64)
    y = own_class(net, x)
    found = exact_adversary(net, x, y, norm=norm, low=-100.0, high=100.0, method=method)
    expected = (x @ w + 0.1).abs() / torch.linalg.vector_norm(w, ord=DUAL[norm])
    np.testing.assert_allclose(found.upper, expected.numpy(), rtol=0, atol=1e-9)
    # of equal logits the first wins: class 0 owns the boundary
    np.testing.assert_array_equal(found.attained, (y == 1).numpy())
    assert_proven(found, net)


@pytest.mark.parametrize("method", ["plane", "patterns", "milp"])
def test_a_class_that_only_a_line_has_is_found_and_a_pattern_that_no_point_has_is_not(method) -> None:
    both = linear([[1.0, 0.0], [-1.0, 0.0]], [-0.5, 0.5])  # (+, +) exactly on x_1 = 0.5; (-, -) nowhere
    x = torch.tensor([[0.2, 0.3], [0.9, 0.1]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    on_line = nn.Sequential(both, Sign(), linear([[0.0, 0.0], [1.0, 1.0]], [0.0, -1.0])).eval()
    found = exact_adversary(on_line, x, y, method=method)
    np.testing.assert_allclose(found.upper, [0.3, 0.4], atol=1e-9)
    assert found.attained.all()
    nowhere = nn.Sequential(both, Sign(), linear([[0.0, 0.0], [-1.0, -1.0]], [0.0, -1.0])).eval()
    found = exact_adversary(nowhere, x, y, method=method)
    assert np.isinf(found.lower).all()
    assert np.isinf(found.upper).all()
    assert not found.confirmed.any()


@pytest.mark.parametrize("method", ["plane", "patterns", "milp"])
def test_a_unit_that_switches_at_the_very_edge_of_the_range_counts(method) -> None:
    net = nn.Sequential(linear([[1.0, 0.0]], [-1.0]), Sign(), linear([[-1.0], [1.0]], [0.0, 0.0])).eval()
    x = torch.tensor([[0.25, 0.5], [0.75, 0.5]], dtype=torch.float64)
    found = exact_adversary(net, x, torch.tensor([0, 0]), method=method)
    np.testing.assert_allclose(found.upper, [0.75, 0.25], atol=1e-9)
    assert found.attained.all()
    attacked = PGD(steps=1, eta=1.0, random_start=False)(net, x, torch.tensor([0, 0]), eps=1.0)
    assert overestimation(found, [attacked]).below[0] == 0


def test_the_range_shuts_out_what_lies_beyond_it() -> None:
    net = square()
    x = torch.tensor([[0.5, 0.5], [0.1, 0.2]], dtype=torch.float64)
    found = exact_adversary(net, x, torch.tensor([1, 0]), low=0.0, high=torch.tensor([0.55, 0.9]))
    np.testing.assert_allclose(found.upper, [0.1, 0.3], atol=1e-12)
    narrow = exact_adversary(net, x[:1].clone().add_(torch.tensor([0.0, 0.01])), torch.tensor([1]), low=0.45, high=0.55)
    assert np.isinf(narrow.lower[0])
    beyond = exact_adversary(net, x[1:], torch.tensor([0]), high=0.3)
    assert np.isinf(beyond.lower[0])
    assert beyond.robust(1e9)[0]
    assert not beyond.broken(1e9)[0]


# ---- brute force


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "act", [Sign, nn.ReLU, lambda: Uniform(2, signed=False, limit=1.0)], ids=["sign", "relu", "uniform"]
)
def test_no_point_of_a_fine_grid_is_nearer_and_the_witness_is_as_near(norm, act) -> None:
    net = random_net(2, (7, 5), act, seed=2, around=0.5)
    x = points(12, 2)
    y = own_class(net, x)
    found = exact_adversary(net, x, y, norm=norm, low=-2.0, high=2.0)
    assert found.method == "plane"
    assert np.isfinite(found.upper).sum() >= 6
    axis = torch.linspace(-2, 2, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    of = own_class(net, grid)
    for i in range(len(x)):
        other = grid[of != y[i]]
        if len(other):
            assert float(distance(other - x[i], norm).min()) >= found.lower[i] - 1e-12
    assert_proven(found, net)


def test_the_cells_tile_the_range_and_have_the_nets_class_on_every_face() -> None:
    net = random_net(2, (9, 6), seed=3, around=0.5)
    found = exact_adversary(net, points(2, 2), own_class(net, points(2, 2)), low=-2.0, high=2.0)
    plane = found.plane
    assert plane is not None
    assert len(plane.classes) > 20
    area = sum(0.5 * np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1)) for p in plane.polygons)
    assert area == pytest.approx(16.0, abs=1e-9)
    draw = np.random.default_rng(0)
    for polygon, label in zip(plane.polygons, plane.classes, strict=True):
        weights = draw.dirichlet(np.ones(len(polygon)), size=4)
        assert (own_class(net, torch.from_numpy(weights @ polygon)) == label).all()


def test_a_unit_of_an_arrangement_cuts_as_many_cells_as_geometry_says() -> None:
    n = 12  # lines that all cross within a circle: 1 + n + C(n, 2) cells
    angle = np.arange(n) * np.pi / n
    offset = 0.3 * np.cos(5 * np.arange(n) + 1)
    first = linear(np.stack([np.cos(angle), np.sin(angle)], 1).tolist(), offset.tolist())
    net = nn.Sequential(first, Sign(), linear(np.eye(n).tolist(), [0.0] * n)).eval()
    x = points(1, 2)
    found = exact_adversary(net, x, own_class(net, x), low=-50.0, high=50.0)
    assert found.solved == 1 + n + n * (n - 1) // 2


# ---- the methods agree


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "act",
    [Sign, lambda: Uniform(2, signed=False, limit=1.0), lambda: Uniform(2, limit=0.7)],
    ids=["sign", "unsigned", "signed"],
)
def test_plane_patterns_and_programs_agree_on_what_is_attained_too(norm, act) -> None:
    net = random_net(2, (4,) if act is not Sign else (6, 5), act, seed=5, around=0.4)
    x = points(6, 2, seed=6)
    y = own_class(net, x)
    by = {
        method: exact_adversary(net, x, y, norm=norm, low=-2.0, high=2.0, method=method)
        for method in ("plane", "patterns", "milp")
        if (norm, method) != ("l2", "milp")
    }
    truth = by["plane"]
    assert np.isfinite(truth.upper).any()
    for found in by.values():
        np.testing.assert_allclose(found.upper, truth.upper, rtol=0, atol=1e-8)
        np.testing.assert_allclose(found.lower, truth.lower, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(found.attained, truth.attained)
        assert found.known.all()
        assert_proven(found, net)


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.Hardtanh, lambda: nn.LeakyReLU(0.2), nn.ReLU6], ids=["relu", "hardtanh", "leaky", "relu6"]
)
def test_programs_agree_with_the_plane_on_nets_of_lines(norm, act) -> None:
    net = random_net(2, (5, 4), act, seed=7, around=0.4)
    x = points(5, 2, seed=8)
    y = own_class(net, x)
    truth, found = (exact_adversary(net, x, y, norm=norm, low=-2.0, high=2.0, method=m) for m in ("plane", "milp"))
    assert np.isfinite(truth.upper).any()
    np.testing.assert_allclose(found.upper, truth.upper, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.lower, truth.lower, rtol=0, atol=2e-6)
    assert_proven(found, net)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_patterns_and_programs_agree_in_seven_dimensions(norm) -> None:
    net = random_net(7, (8, 5), seed=9, around=0.4)
    x = points(4, 7, seed=10)
    y = own_class(net, x)
    patterns, programs = (
        exact_adversary(net, x, y, norm=norm, low=-2.0, high=2.0, method=m) for m in ("patterns", "milp")
    )
    np.testing.assert_allclose(programs.upper, patterns.upper, rtol=0, atol=1e-8)
    np.testing.assert_allclose(programs.lower, patterns.lower, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(programs.attained, patterns.attained)
    assert_proven(patterns, net)


def test_patterns_equal_one_program_per_pattern() -> None:
    """The order of bounds leaves nothing out: all patterns, one by one, in scipy's own linear program."""
    from scipy.optimize import linprog

    net = random_net(4, (5,), seed=11, around=0.4)
    x = points(3, 4, seed=12)
    y = own_class(net, x)
    found = exact_adversary(net, x, y, low=-2.0, high=2.0, method="patterns")
    layer, norm, _, last = net
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    W = (scale[:, None] * layer.weight).detach().numpy()
    b = (scale * (layer.bias - norm.running_mean) + norm.bias).detach().numpy()
    for i in range(len(x)):
        best = math.inf
        for signs in itertools.product((-1.0, 1.0), repeat=5):
            s = np.array(signs)
            if int(own_class(last, torch.from_numpy(s)[None])) == int(y[i]):
                continue
            xi = x[i].numpy()
            A = np.hstack([-s[:, None] * W, np.zeros((5, 1))])
            ball = np.vstack([np.hstack([np.eye(4), -np.ones((4, 1))]), np.hstack([-np.eye(4), -np.ones((4, 1))])])
            lp = linprog(
                [0, 0, 0, 0, 1],
                np.vstack([A, ball]),
                np.concatenate([s * b, xi, -xi]),
                bounds=[(-2, 2)] * 4 + [(0, None)],
            )
            best = min(best, lp.fun if lp.status == 0 else math.inf)
        assert found.upper[i] == pytest.approx(best, abs=1e-7)


def test_ties_behind_signs_are_decided_as_the_net_does() -> None:
    """Sums of +-1 tie often: sign(0) = +1, and the first of equal logits wins; programs must not choose."""
    draw = generator(13)
    second, third = (torch.randint(0, 2, s, generator=draw).double().mul(2).sub(1) for s in ((4, 6), (3, 4)))
    first = random_net(3, (6,), seed=14, around=0.4)[:2]
    net = nn.Sequential(
        *first, Sign(), linear(second.tolist(), [0.0] * 4), Sign(), linear(third.tolist(), [0.0] * 3)
    ).eval()
    x = points(6, 3, seed=15)
    y = own_class(net, x)
    patterns, programs = (exact_adversary(net, x, y, low=-2.0, high=2.0, method=m) for m in ("patterns", "milp"))
    assert np.isfinite(patterns.upper).any()
    np.testing.assert_allclose(programs.upper, patterns.upper, rtol=0, atol=1e-8)
    np.testing.assert_allclose(programs.lower, patterns.lower, rtol=0, atol=2e-6)
    assert_proven(patterns, net)


@pytest.mark.parametrize("seed", range(8))
def test_methods_agree_where_lines_meet_in_one_point_and_lie_on_the_border(seed) -> None:
    """Weights in {-1, 0, 1} and offsets in quarters: opposite units on one line, many lines through one point, inputs on lines."""
    draw = np.random.default_rng(seed)
    h = int(draw.integers(2, 6))
    first = linear(draw.integers(-1, 2, size=(h, 2)).tolist(), (draw.integers(-3, 4, size=h) / 4).tolist())
    second = linear(draw.choice([-1.0, 1.0], size=(4, h)).tolist(), [0.0] * 4)
    net = nn.Sequential(
        first, Sign(), second, Sign(), linear(draw.choice([-1.0, 1.0], size=(3, 4)).tolist(), [0.0] * 3)
    )
    x = torch.from_numpy(draw.integers(0, 9, size=(5, 2)) / 8)
    y = own_class(net.eval(), x)
    axis = torch.arange(65, dtype=torch.float64) / 64
    grid = torch.cartesian_prod(axis, axis)
    of = own_class(net, grid)
    for norm in ("linf", "l1"):
        truth, *others = (exact_adversary(net, x, y, norm=norm, method=m) for m in ("plane", "patterns", "milp"))
        for found in others:
            np.testing.assert_allclose(found.upper, truth.upper, rtol=0, atol=1e-7)
            np.testing.assert_array_equal(found.attained, truth.attained)
        for i in range(
            len(x)
        ):  # these numbers are exact in binary: no point is nearer, and none as near unless it is attained
            d = distance(grid[of != y[i]] - x[i], norm)
            assert not len(d) or float(d.min()) >= truth.lower[i] - 1e-12
            assert not len(d) or truth.attained[i] or float(d.min()) > truth.lower[i] + 1e-12


@pytest.mark.parametrize("right", [True, False])
def test_thresholds_of_a_lattice_stand_between_its_points(right) -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        q = draw.uniform(0.1, 3)
        row = q * draw.choice([-2.0, -1.0, 1.0, 2.0], size=5)
        row[draw.integers(5)] = q
        c = q * draw.integers(-4, 5) + draw.choice([0.0, draw.uniform(-q, q)])
        off, on = _thresholds(row, c, right)
        assert off < on
        for b in itertools.product((0.0, 1.0), repeat=5):
            z = float(row @ np.array(b)) + c
            z = 0.0 if abs(z) < 1e-12 else z
            assert z >= on if (z >= 0 if right else z > 0) else z <= off
    assert _thresholds(np.array([1.0, math.pi]), 0.3, True) == (0.0, 0.0)


# ---- attacks against the truth


@pytest.mark.parametrize("norm", NORMS)
def test_no_attack_finds_less_than_the_truth(norm) -> None:
    net = random_net(5, (7, 5), seed=16, around=0.4)
    x = points(20, 5, seed=17)
    y = own_class(net, x)
    truth = exact_adversary(net, x, y, norm=norm, low=-2.0, high=2.0)
    assert truth.method == "patterns"
    assert (
        exact_adversary(random_net(5, (9,)), x[:1], own_class(random_net(5, (9,)), x[:1]), low=-2.0, high=2.0).method
        == "milp"
    )
    draw = generator(18)
    for i in range(len(x)):
        # corners of cubes of many sizes, and points of the whole range
        size = 4 * torch.rand(3000, 1, generator=draw, dtype=torch.float64)
        corners = torch.randint(0, 2, (3000, 5), generator=draw).double().mul(2).sub(1) * size
        tried = torch.cat(
            [(x[i] + corners).clamp(-2, 2), 4 * torch.rand(3000, 5, generator=draw, dtype=torch.float64) - 2]
        )
        wrong = own_class(net, tried) != y[i]
        if bool(wrong.any()):
            assert float(distance(tried[wrong] - x[i], norm).min()) >= truth.lower[i] - 1e-9
    eps = {"linf": 1.0, "l2": 1.6, "l1": 2.5}[norm]
    attacked = [PGD(steps=30, restarts=r)(net, x, y, eps, norm=norm, low=-2.0, high=2.0) for r in (1, 4)]
    table = overestimation(truth, attacked)
    assert (table.below == 0).all()
    assert (table.found > 0).all()
    assert (table.median_ratio >= 1 - 1e-9).all()
    assert table.missed[1] <= table.missed[0] <= 1
    assert table.examples[0] == int(((truth.upper < eps) | ((truth.upper == eps) & truth.attained)).sum())


def test_below_the_truth_is_counted() -> None:
    """A count that cannot rise says nothing: distances that are cut in half must show."""
    net = square()
    x = torch.tensor([[0.1, 0.2], [0.5, 0.9]], dtype=torch.float64)
    truth = exact_adversary(net, x, torch.tensor([0, 0]))
    attacked = PGD(steps=1, restarts=200, eta=1e-3)(net, x, torch.tensor([0, 0]), 0.45)
    assert attacked.success.any()
    assert overestimation(truth, [attacked]).below[0] == 0
    object.__setattr__(attacked, "distance", 0.5 * truth.lower)
    assert overestimation(truth, [attacked]).below[0] == attacked.success.sum()


def test_a_trained_net_of_pictures_in_float32_is_attacked_no_nearer_than_the_truth(digits_net) -> None:
    _, x, y = digits_net
    draw = generator(19)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), Sign("tanh"), nn.Linear(8, 10))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=draw) / 4
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    right = (own_class(net, x) == y).nonzero()[:6, 0]
    truth = exact_adversary(net, x[right], y[right])
    assert truth.method == "patterns"
    assert truth.point.shape == (6, 1, 8, 8)
    assert_proven(truth, net)
    attacked = PGD(steps=20, restarts=3)(net, x[right], y[right], 0.3)
    table = overestimation(truth, [attacked])
    assert table.below[0] == 0
    assert table.found[0] > 0
    assert (rounding(truth) < 1e-3).all()


# ---- what is read


def test_what_follows_the_signs_may_be_anything_elementwise_and_what_comes_before_may_not() -> None:
    x = points(4, 2, seed=20)
    behind = random_net(2, (5, 4), seed=21, around=0.4)
    behind[5] = nn.Tanh().eval()
    plane, patterns = (
        exact_adversary(behind, x, own_class(behind, x), low=-2.0, high=2.0, method=m) for m in ("plane", "patterns")
    )
    np.testing.assert_allclose(plane.upper, patterns.upper, rtol=0, atol=1e-8)
    with pytest.raises(InputError, match="Tanh"):
        exact_adversary(random_net(2, (5,), nn.Tanh), x, own_class(random_net(2, (5,), nn.Tanh), x), low=-2.0, high=2.0)


def test_a_net_with_latent_weights_is_read_as_it_is_deployed() -> None:
    net = quantize(
        qlab.build("mlp", (2,), 2, hidden=(6, 6), seed=0).double(), Sign, Sign, keep=("first", "last")
    ).eval()
    x = points(5, 2, seed=22)
    y = own_class(net, x)
    found = exact_adversary(net, x, y, low=-2.0, high=2.0)
    again = exact_adversary(harden(net), x, y, low=-2.0, high=2.0)
    np.testing.assert_array_equal(found.upper, again.upper)
    assert np.isfinite(found.upper).any()
    assert_proven(found, net)


def test_examples_that_are_wrong_to_begin_with_have_distance_zero() -> None:
    x = torch.tensor([[0.5, 0.5], [0.1, 0.1]], dtype=torch.float64)
    for method in ("plane", "patterns", "milp"):
        found = exact_adversary(square(), x, torch.tensor([0, 0]), method=method)
        assert found.upper[0] == found.lower[0] == 0
        assert not found.clean[0]
        assert found.attained[0]
        assert found.upper[1] == pytest.approx(0.3, abs=1e-6)


def test_time_that_runs_out_leaves_bounds_that_hold() -> None:
    net = random_net(12, (14, 10), nn.ReLU, seed=23, around=0.4)
    x = points(2, 12, seed=24)
    y = own_class(net, x)
    hurried = exact_adversary(net, x, y, low=-2.0, high=2.0, time_limit=1e-9)
    assert (hurried.lower == 0).all()
    assert np.isinf(hurried.upper).all()
    assert not hurried.known.any()
    assert not hurried.robust(0.1).any()
    assert not hurried.broken(0.1).any()
    assert "only bounds" in hurried.summary()


def test_progress_comes_with_the_result_so_far() -> None:
    net = random_net(3, (4,), seed=25, around=0.4)
    x = points(3, 3, seed=26)
    updates = list(exact_search(net, x, own_class(net, x), low=-2.0, high=2.0))
    assert [u.fraction for u in updates] == sorted(u.fraction for u in updates)
    assert updates[-1].fraction == 1
    assert [len(u.value) for u in updates] == [1, 2, 3]
    plane = list(exact_search(square(), x[:, :2].abs() / 4, torch.zeros(3, dtype=torch.int64)))
    assert len(plane) > 3
    assert isinstance(plane[-1].value, Exact)


def test_frame_figure_and_summary_tell_the_same() -> None:
    from qlab.plots.exact import overestimation_figure

    x = torch.tensor([[0.1, 0.2], [0.5, 0.9], [0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    found = exact_adversary(square(), x, y)
    frame = found.frame()
    assert list(frame.columns) == ["label", "clean", "lower", "upper", "attained", "confirmed"]
    np.testing.assert_array_equal(frame.upper, found.upper)
    assert "median 0.3" in found.summary()
    assert "attained for 2 of 3" in found.summary()
    assert len(found.figure().axes) == 2
    assert found.figure().get_label() == found.summary()
    attacked = PGD(steps=5, restarts=3)(square(), x, y, 0.4)
    assert "PGD" in overestimation_figure(found, [attacked]).get_label()
    assert len(exact_adversary(square(), x, y, method="patterns").figure().axes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "plane"}, "for two"),
        ({"method": "milp", "norm": "l2"}, "l_inf and l1"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"low": 0.5}, "outside the stated range"),
    ],
)
def test_what_cannot_be_done_is_said(change, message) -> None:
    net = random_net(3, (4,), seed=27)
    x = points(3, 3, seed=28)
    with pytest.raises(InputError, match=message):
        exact_adversary(net, x, own_class(net, x), **({"low": -2.0, "high": 2.0} | change))


def test_nets_that_are_too_large_or_no_chain_are_refused() -> None:
    x = points(3, 3, seed=29)
    wide = random_net(3, (int(math.log2(MAX_PATTERNS)) + 1,))
    with pytest.raises(InputError, match="patterns"):
        exact_adversary(wide, x, own_class(wide, x), low=-2.0, high=2.0, method="patterns")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + x

    net = Residual().eval()
    with pytest.raises(InputError, match="one after the other"):
        exact_adversary(net, x, own_class(net, x), low=-2.0, high=2.0)
    with pytest.raises(UnknownNameError, match="exact method"):
        exact_adversary(wide, x, own_class(wide, x), low=-2.0, high=2.0, method="magic")
    other = exact_adversary(square(), x[:, :2].abs() / 4, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="expected the 3 examples"):
        overestimation(other, [PGD(steps=1)(square(), x[:2, :2].abs() / 4, torch.zeros(2, dtype=torch.int64), 0.1)])
