"""Auto-PGD: its path against the algorithm of the paper written out for one example at a time; success; every number of classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks import apgd
from qlab.attacks.apgd import APGD, APGDT, checkpoints
from qlab.attacks.ball import NORMS, Ball, Norm, norms
from qlab.attacks.estimators import Backprop
from qlab.attacks.losses import LOSSES, margin, targeted_dlr, targeted_margin
from qlab.attacks.pgd import PGD
from qlab.attacks.scaling import UNSCALED, Fixed, Scaling
from qlab.attacks.victim import Victim
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError

Digits = tuple[nn.Module, Tensor, Tensor]
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 0.6, "l1": 2.0}


def double(digits: Digits, n: int) -> Digits:
    return copy.deepcopy(digits[0]).double(), digits[1][:n].double(), digits[2][:n]


# ---- the algorithm, one example, as the paper has it ------------------------------------------------------------------


def projected(point: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the nearest point of ball and [0, 1]: a clip, or s by bisection."""
    if norm == "linf":
        return point.clamp(x - eps, x + eps).clamp(0, 1)
    delta = point - x

    def at(s: float) -> Tensor:
        return (x + s * delta).clamp(0, 1)

    low, high = 0.0, 1.0
    if float((at(1.0) - x).norm()) <= eps:
        return at(1.0)
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if float((at(mid) - x).norm()) <= eps else (low, mid)
    return at(low)


def walk(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    eps: float,
    norm: Norm,
    steps: int,
    as_published: bool = False,
) -> tuple[list[Tensor], list[float]]:
    """Return the iterates of APGD for one example (D,), and eta at every checkpoint.

    `as_published` counts rises as the public code does: against 0 at first, and against the loss of the point that was left.
    """

    def look(point: Tensor) -> tuple[float, Tensor]:
        point = point.detach().requires_grad_()
        v = value(point)
        return float(v.detach()), torch.autograd.grad(v, point)[0]

    windows, at = [max(int(0.22 * steps), 1)], [0]
    while at[-1] + windows[-1] <= steps:
        at.append(at[-1] + windows[-1])
        windows.append(max(windows[-1] - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)))
    points, etas, eta = [start], [], 2 * eps
    here, before, (loss, g) = start, start, look(start)
    best, best_g, best_loss = here, g, loss
    rises, last_best, halved_last, left_loss = 0, best_loss, False, 0.0 if as_published else loss
    for k in range(steps):
        way = g.sign() if norm == "linf" else g / g.norm()
        z = projected(here + eta * way, x, eps, norm)
        alpha = 1.0 if k == 0 else 0.75
        moved = projected(here + alpha * (z - here) + (1 - alpha) * (here - before), x, eps, norm)
        before, here = here, moved
        points.append(here)
        loss, g = look(here)
        rises += loss > left_loss
        left_loss = loss
        if loss > best_loss:
            best, best_g, best_loss = here, g, loss
        if k + 1 in at:
            j = at.index(k + 1)
            first = rises <= 0.75 * (at[j] - at[j - 1])
            second = not halved_last and best_loss <= last_best
            halved_last, last_best, rises = first or second, best_loss, 0
            if halved_last:
                eta /= 2
                here, g = best, best_g
                left_loss = loss if as_published else best_loss
            etas.append(eta)
    return points, etas


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(20) == (4, 7, 9, *range(10, 21))
    assert checkpoints(1) == (1,)
    for steps in range(1, 300):
        at = checkpoints(steps)
        assert len(set(at)) == len(at)
        assert list(at) == sorted(at)
        assert at[-1] <= steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_the_path_is_that_of_the_algorithm_written_out(digits_net: Digits, norm: Norm, loss: str) -> None:
    net, x, y = double(digits_net, 8)
    steps, eps = 40, EPS[norm]
    found = APGD(steps=steps, loss=loss, early_stop=False)(net, x, y, eps, norm=norm, trace=True)
    assert found.trace is not None
    assert len(found.trace) == steps + 1
    for i in np.flatnonzero(found.clean):

        def value(point: Tensor, i: int = int(i)) -> Tensor:
            return LOSSES[loss](net(point.reshape(1, 1, 8, 8)), y[i : i + 1])[0]

        points, _ = walk(value, x[i].flatten(), found.trace[0].points[i].flatten(), eps, norm, steps)
        for k, step in enumerate(found.trace):
            torch.testing.assert_close(step.points[i].flatten(), points[k], rtol=0, atol=1e-7)
            if k < steps:
                np.testing.assert_allclose(float(step.loss[i]), float(value(points[k])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_step_lengths_only_halve_and_the_best_loss_never_falls(
    digits_net: Digits, norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = double(digits_net, 40)
    steps, eps, seen = 50, EPS[norm], []
    plain = apgd._check

    def spy(w: Any, window: int) -> None:
        plain(w, window)
        seen.append((w.eta, w.loss_best, window))

    monkeypatch.setattr(apgd, "_check", spy)
    found = APGD(steps=steps, early_stop=False)(net, x, y, eps, norm=norm, trace=True)
    assert found.trace is not None
    assert [window for _, _, window in seen] == np.diff([0, *(c for c in checkpoints(steps) if c < steps)]).tolist()
    before = torch.full_like(seen[0][0], 2 * eps)
    for eta, _, _ in seen:
        assert bool(((eta == before) | (eta == before / 2)).all())
        before = eta
    for (_, loss, _), (_, later, _) in pairwise(seen):
        assert bool((later >= loss).all())
    # Near a maximum inside an l2 ball losses differ by rounding alone; the corners of an l_inf ball are reached exactly.
    for row, i in enumerate(np.flatnonzero(found.clean)[: 10 if norm == "linf" else 0]):

        def value(point: Tensor, i: int = int(i)) -> Tensor:
            return LOSSES["ce"](net(point.reshape(1, 1, 8, 8)), y[i : i + 1])[0]

        _, etas = walk(value, x[i].flatten(), found.trace[0].points[i].flatten(), eps, norm, steps)
        assert [float(eta[row]) for eta, _, _ in seen] == etas[: len(seen)]


def test_the_first_window_compares_with_the_loss_of_the_start(digits_net: Digits) -> None:
    """The margin is below 0 where an example is right: compared with 0, as the public code does, a first rise would not count."""
    net, x, y = double(digits_net, 60)
    steps, eps = 40, 0.05
    found = APGD(steps=steps, loss="margin", early_stop=False)(net, x, y, eps, trace=True)
    assert found.trace is not None
    other = 0
    for i in np.flatnonzero(found.clean):

        def value(point: Tensor, i: int = int(i)) -> Tensor:
            return margin(net(point.reshape(1, 1, 8, 8)), y[i : i + 1])[0]

        start, end = found.trace[0].points[i].flatten(), found.trace[-1].points[i].flatten()
        ours, _ = walk(value, x[i].flatten(), start, eps, "linf", steps)
        published, _ = walk(value, x[i].flatten(), start, eps, "linf", steps, as_published=True)
        torch.testing.assert_close(end, ours[-1], rtol=0, atol=1e-9)
        other += not torch.allclose(ours[-1], published[-1], rtol=0, atol=1e-6)
    assert other > 0


# ---- constraints, starts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [APGD(steps=12), APGD(steps=12, loss="dlr"), APGDT(steps=6, targets=3)])
def test_every_iterate_lies_in_ball_and_range(digits_net: Digits, norm: Norm, attack: APGD) -> None:
    net, x, y = digits_net[0], digits_net[1][:60], digits_net[2][:60]
    found = type(attack)(**(vars(attack) | {"early_stop": False}))(net, x, y, EPS[norm], norm=norm, trace=True)
    ball = Ball.of(x, EPS[norm], norm)
    assert found.trace is not None
    for step in found.trace:
        assert bool(ball.contains(step.points).all())
    assert bool(ball.contains(found.adversarial).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_walk_starts_on_the_border_of_the_ball(norm: Norm) -> None:
    x = torch.full((50, 3, 4), 0.5, dtype=torch.float64)
    start = apgd._start(Ball.of(x, 0.3, norm), generator("start", 0))
    torch.testing.assert_close(norms(start - x, norm), torch.full((50,), 0.3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert len(start.unique(dim=0)) == 50
    clipped = apgd._start(Ball.of(x, float("inf"), norm), generator("start", 0))
    assert bool(((clipped >= 0) & (clipped <= 1)).all())


def test_an_l1_step_has_length_one_and_as_many_coordinates_as_it_is_told() -> None:
    g = torch.randn(6, 2, 5, generator=generator("sparse", 0), dtype=torch.float64)
    support = torch.tensor([0.0, 0.4, 1.0, 2.5, 9.9, 50.0], dtype=torch.float64)
    step = apgd._sparse(g, support)
    assert (step != 0).flatten(1).sum(1).tolist() == [1, 1, 1, 3, 10, 10]
    torch.testing.assert_close(norms(step, "l1"), torch.ones(6, dtype=torch.float64))
    assert bool((step[step != 0].sign() == g[step != 0].sign()).all())
    least = torch.where(step != 0, g.abs(), torch.inf).flatten(1).amin(1)
    most = torch.where(step == 0, g.abs(), 0.0).flatten(1).amax(1)
    assert bool((least >= most).all())
    assert bool((apgd._sparse(torch.zeros_like(g), support) == 0).all())


# ---- success ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_it_breaks_what_pgd_breaks_in_as_many_steps_and_targets_break_more(digits_net: Digits, norm: Norm) -> None:
    net, x, y = digits_net
    broken = dict.fromkeys(("pgd", "auto", "targeted"), 0)
    for factor in (0.6, 1.0, 1.4):
        for name, attack in (
            ("pgd", PGD(steps=20)),
            ("auto", APGD(steps=20)),
            ("targeted", APGDT(steps=20, targets=3)),
        ):
            broken[name] += int(attack(net, x, y, factor * EPS[norm], norm=norm).success.sum())
    assert broken["auto"] >= 0.98 * broken["pgd"]  # both converge; they start elsewhere
    assert broken["targeted"] > max(broken["auto"], broken["pgd"])


def test_it_finds_its_step_length_where_pgd_depends_on_one(digits_net: Digits) -> None:
    net, x, y = digits_net
    assert APGD(steps=20)(net, x, y, 0.1).accuracy < PGD(steps=20, eta=0.001)(net, x, y, 0.1).accuracy - 0.1


def test_on_a_linear_net_it_finds_the_corner() -> None:
    draw = generator("linear", 0)
    net = nn.Linear(10, 2, dtype=torch.float64).eval().requires_grad_(False)
    x = 0.5 + 0.1 * torch.rand(30, 10, generator=draw, dtype=torch.float64)
    y = net(x).argmax(1)
    w = (net.weight[0] - net.weight[1]) * torch.where(y == 0, 1.0, -1.0)[:, None]
    for loss in LOSSES:
        found = APGD(steps=20, loss=loss, early_stop=False)(net, x, y, 0.2, trace=True)
        gap = -margin(net(x), y) - 0.2 * w.abs().sum(1)
        np.testing.assert_allclose(found.margin, -gap.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attack", [APGD, APGDT])
def test_the_worst_over_more_runs_is_at_most_that_over_fewer(digits_net: Digits, attack: type[APGD]) -> None:
    net, x, y = digits_net[0], digits_net[1][:150], digits_net[2][:150]
    one, three = (attack(steps=6, restarts=r)(net, x, y, 0.08) for r in (1, 3))
    assert three.success.sum() >= one.success.sum()
    few, many = (APGDT(steps=6, targets=t)(net, x, y, 0.08) for t in (1, 9))
    assert (many.success >= few.success).all()
    worst = one.success | three.success
    for other in (one, three):
        assert 1 - worst.mean() <= other.accuracy


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [APGD, APGDT])
def test_leaving_broken_examples_alone_changes_no_success(digits_net: Digits, norm: Norm, attack: type[APGD]) -> None:
    net, x, y = double(digits_net, 80)
    settings: dict[str, Any] = {"steps": 12, "restarts": 2}
    if attack is APGDT:
        settings["targets"] = 3
    early, late = (attack(**settings, early_stop=stop)(net, x, y, EPS[norm], norm=norm) for stop in (True, False))
    assert (early.success == late.success).all()
    assert early.forward < late.forward


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_logit_scale_changes_nothing_for_margin_losses(digits_net: Digits, loss: str) -> None:
    net, x, y = double(digits_net, 100)

    class Times(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 128 * net(x)

    for attack in (APGD(steps=10, loss=loss), APGDT(steps=10, loss=loss, targets=2)):
        one, other = (attack(n.eval(), x, y, 0.1) for n in (net, Times()))
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-8)
        assert (one.success == other.success).all()


# ---- seeds, settings, classes -------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result(digits_net: Digits) -> None:
    net, x, y = digits_net[0], digits_net[1][:50], digits_net[2][:50]
    for attack in (APGD, APGDT):
        one, two, other = (attack(steps=5, seed=s)(net, x, y, 0.1) for s in (3, 3, 4))
        assert torch.equal(one.adversarial, two.adversarial)
        assert not torch.equal(one.adversarial, other.adversarial)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_any_number_of_classes_is_attacked(classes: int, loss: str) -> None:
    draw = generator("classes", classes)
    net = nn.Linear(9, classes).eval()
    nn.init.normal_(net.weight, generator=draw)
    x = torch.rand(40, 9, generator=draw)
    y = net(x).argmax(1)
    for attack in (APGD(steps=10, loss=loss), APGDT(steps=10, loss=loss)):
        found = attack(net, x, y, 0.4)
        assert found.clean.all()
        assert found.success.any()
        assert found.success.sum() >= PGD(steps=10, loss="margin")(net, x, y, 0.4).success.sum() - 1


@pytest.mark.parametrize(("classes", "loss"), [(3, targeted_margin), (4, targeted_dlr), (12, targeted_dlr)])
def test_targets_are_the_nearest_classes_and_no_more_than_there_are(classes: int, loss: Any) -> None:
    @dataclass
    class Booked:
        z: Tensor
        y: Tensor
        classes: int

    z = torch.randn(30, classes, generator=generator("targets", 0))
    y = torch.arange(30) % classes
    goals = APGDT().goals(Booked(z, y, classes))  # type: ignore[arg-type]
    assert len(goals) == min(9, classes - 1)
    assert all(objective is loss for objective, _ in goals)
    for i in range(30):
        order = [k for k in np.argsort(-z[i].numpy()) if k != int(y[i])]
        assert [int(t[i]) for _, t in goals] == order[:9]
    assert len(APGDT(targets=1).goals(Booked(z, y, classes))) == 1  # type: ignore[arg-type]


def test_a_batch_that_is_wrong_from_the_start_is_asked_nothing(digits_net: Digits) -> None:
    net, x, _ = digits_net
    wrong = (net(x).argmax(1) + 1) % 10
    for attack in (APGD(), APGDT()):
        found = attack(net, x, wrong, 0.1)
        assert found.accuracy == 0
        assert found.forward == len(x)
        assert found.backward == 0


@pytest.mark.parametrize("shape", [(64,), (4, 16), (2, 8, 4), (1, 16, 4)])
@pytest.mark.parametrize("norm", NORMS)
def test_shapes_mean_nothing(digits_net: Digits, shape: tuple[int, ...], norm: Norm) -> None:
    net, x, y = digits_net
    square, other = (
        APGD(steps=6)(net, x[:50].reshape(50, *s), y[:50], EPS[norm], norm=norm) for s in ((1, 8, 8), shape)
    )
    assert torch.equal(other.adversarial.flatten(), square.adversarial.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_every_dtype_is_attacked_in_itself(digits_net: Digits, dtype: torch.dtype, norm: Norm) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).to(dtype), digits_net[1][:100].to(dtype), digits_net[2][:100]
    for attack in (APGD(steps=8), APGDT(steps=8, targets=2)):
        found = attack(net, x, y, EPS[norm], norm=norm)
        reference = attack(digits_net[0], digits_net[1][:100], y, EPS[norm], norm=norm)
        assert found.adversarial.dtype == dtype
        assert bool(Ball.of(x, EPS[norm], norm).contains(found.adversarial).all())
        if norm != "l1":  # where rounding towards x costs half floats, of 8 to 11 bits, a good part of a sparse step
            assert abs(found.accuracy - reference.accuracy) <= 0.05


# ---- scaling and estimators ---------------------------------------------------------------------------------------------


def test_a_scaling_of_one_is_no_scaling_bit_for_bit(digits_net: Digits) -> None:
    net, x, y = digits_net
    plain, one = (APGD(steps=6, scaling=s)(net, x, y, 0.1) for s in (UNSCALED, Fixed(1.0)))
    assert torch.equal(plain.adversarial, one.adversarial)


def test_a_temperature_wakes_up_a_net_of_large_logits(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Times(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1000 * net(x)

    masked = APGD(steps=10)(Times().eval(), x, y, 0.1)
    woken = APGD(steps=10, scaling=Fixed(1e-3))(Times().eval(), x, y, 0.1)
    plain = APGD(steps=10)(net, x, y, 0.1)
    assert masked.accuracy > plain.accuracy + 0.3
    assert abs(woken.accuracy - plain.accuracy) <= 0.01


def test_beta_is_found_at_the_start_of_a_walk_and_kept(digits_net: Digits) -> None:
    net, x, y = digits_net[0], digits_net[1][:20], digits_net[2][:20]
    asked: list[tuple[Tensor, Any, Any]] = []

    class Rule(Scaling):
        def bind(self, victim: Victim, x: Tensor, y: Tensor) -> Any:
            return "the net"

        def start(self, bound: Any, victim: Victim, x1: Tensor, y: Tensor) -> Tensor:
            return torch.arange(len(x1))

        def factors(self, bound: Any, started: Tensor | None, z: Tensor, y: Tensor) -> Tensor:
            asked.append((z, bound, started))
            return torch.full((len(z),), 0.5)

    found = APGD(steps=5, restarts=2, scaling=Rule(), early_stop=False)(net, x, y, 0.05, trace=True)
    assert len(asked) == 2
    assert found.trace is not None
    right = torch.from_numpy(found.clean)
    torch.testing.assert_close(asked[0][0], net(found.trace[0].points[right]))
    assert asked[0][1] == "the net"
    for step in found.trace[:5]:
        loss = LOSSES["ce"](0.5 * net(step.points), y)[right]
        torch.testing.assert_close(step.loss[right].float(), loss, rtol=1e-5, atol=1e-6)


def test_gradients_come_from_the_estimator(digits_net: Digits) -> None:
    net, x, y = digits_net[0], digits_net[1][:30], digits_net[2][:30]
    calls: list[int] = []

    class Mean(Backprop):
        """The mean over the noise of a net, here of none."""

        def gradient(
            self, victim: Victim, x: Tensor, f: Any, generator: torch.Generator
        ) -> tuple[Tensor, Tensor, Tensor]:
            several = [super(Mean, self).gradient(victim, x, f, generator) for _ in range(4)]
            calls.append(len(x))
            z, v, g = (torch.stack(parts).mean(0) for parts in zip(*several, strict=True))
            return z, v, g

    plain = APGD(steps=6, early_stop=False)(net, x, y, 0.05)
    mean = APGD(steps=6, early_stop=False, estimator=Mean())(net, x, y, 0.05)
    assert len(calls) == 6
    assert mean.backward == 4 * plain.backward == 4 * sum(calls)
    assert torch.equal(mean.adversarial, plain.adversarial)


@pytest.mark.parametrize(
    ("attack", "settings", "error", "words"),
    [
        (APGD, {"steps": 0}, InputError, "at least 1"),
        (APGD, {"restarts": 0}, InputError, "at least 1"),
        (APGD, {"loss": "cee"}, UnknownNameError, "Did you mean 'ce'"),
        (APGDT, {"targets": 0}, InputError, "at least 1"),
        (APGDT, {"loss": "ce"}, UnknownNameError, "targeted loss"),
        (APGDT, {"loss": margin}, InputError, "needs a target"),
    ],
)
def test_settings_that_are_none_are_said(
    attack: type[APGD], settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attack(**settings)


def test_a_radius_of_any_size(digits_net: Digits) -> None:
    net, x, y = digits_net[0], digits_net[1][:60], digits_net[2][:60]
    for norm in NORMS:
        tiny = APGD(steps=5)(net, x, y, 1e-30, norm=norm)
        assert (tiny.success == ~tiny.clean).all()
    assert APGD(steps=20)(net, x, y, float("inf")).accuracy == 0
    assert APGD(steps=20)(net, x, y, 1.0).accuracy == 0
