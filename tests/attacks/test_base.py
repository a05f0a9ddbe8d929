"""What every attack promises, shown with an attack that proposes what it is told to."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
import qlab.methods
from qlab.attacks.ball import NORMS, Ball, Norm, norms
from qlab.attacks.base import Attack, Attacked, Ledger
from qlab.attacks.losses import margin
from qlab.attacks.pgd import PGD
from qlab.attacks.victim import Victim, pixels
from qlab.data.seeding import generator
from qlab.errors import InputError, UnknownNameError

Digits = tuple[nn.Module, Tensor, Tensor]


@dataclass(frozen=True)
class Proposals(Attack):
    """Proposes uniform points of a box about as large as the ball, in ball and range or not."""

    count: int = 20

    def search(
        self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
    ) -> Generator[float, None, None]:
        for k in range(self.count):
            at = ledger.active
            points = self.points(ledger, noise)[at]
            ledger.ask(at, points)
            ledger.step(at, points, torch.zeros(len(at)))
            yield k / self.count

    def points(self, ledger: Ledger, noise: torch.Generator) -> Tensor:
        return proposed(ledger.ball.x, float(ledger.ball.eps[0]), ledger.ball.norm, noise)


def proposed(x: Tensor, eps: float, norm: Norm, noise: torch.Generator) -> Tensor:
    size = (eps if math.isfinite(eps) else 0.2) * {"linf": 1.2, "l2": 1.0, "l1": 0.5}[norm]
    return x + size * (2 * torch.rand(x.shape, generator=noise, dtype=torch.float64) - 1)


@dataclass(frozen=True)
class Nearest(Proposals):
    keep = "nearest"
    needs_eps = False


@pytest.fixture(scope="module")
def planes() -> Digits:
    """Return a linear net of 4 classes on 6 numbers, 40 examples, a tenth of the labels wrong."""
    draw = generator("test_base", 0)
    net = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(net.weight, generator=draw)
    nn.init.zeros_(net.bias)
    x = torch.rand(40, 6, generator=draw, dtype=torch.float64)
    y = net(x).argmax(1)
    y[::10] = (y[::10] + 1) % 4
    return net.eval(), x, y


def replay(attack: Proposals, x: Tensor, eps: float, norm: Norm) -> list[Tensor]:
    """Return the points that the attack proposes for each example, whether it asks about them or not."""
    assert len(x) <= attack.batch
    noise = generator("attack", attack.seed, 0)
    return [proposed(x, eps, norm, noise) for _ in range(attack.count)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [True, False])
def test_the_worst_allowed_point_is_kept_by_brute_force(planes: Digits, norm: Norm, early_stop: bool) -> None:
    net, x, y = planes
    attack, eps = Proposals(early_stop=early_stop), {"linf": 0.2, "l2": 0.5, "l1": 1.2}[norm]
    found = attack(net, x, y, eps, norm=norm)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    for i in range(len(x)):
        z = net(x[i])
        best, broken, value = x[i], bool(z.argmax() != y[i]), float(margin(z[None], y[i : i + 1]))
        last = broken
        assert found.clean[i] == (not broken)
        for points in replay(attack, x, eps, norm) if not broken else []:
            p = points[i]
            inside = bool(((p >= 0) & (p <= 1)).all())
            inside &= bool(np.linalg.norm((p - x[i]).numpy(), order) <= eps)
            wrong, m = bool(net(p).argmax() != y[i]), float(margin(net(p)[None], y[i : i + 1]))
            last = wrong and inside
            if inside and (wrong, m) > (broken, value):
                best, broken, value = p, wrong, m
            if broken and early_stop:
                break
        assert torch.equal(found.adversarial[i], best)
        assert bool(found.success[i]) == broken
        assert bool(found.at_end[i]) == last
        np.testing.assert_allclose(found.margin[i], value, rtol=1e-5, atol=1e-6)
        delta = (best - x[i]).numpy()
        np.testing.assert_allclose(found.distance[i], np.linalg.norm(delta, order) if broken else np.inf, rtol=1e-14)
    assert 0 < found.success[found.clean].mean() < 1


@pytest.mark.parametrize("eps", [None, 0.25])
def test_the_nearest_broken_point_is_kept_by_brute_force(planes: Digits, eps: float | None) -> None:
    net, x, y = planes
    attack = Nearest()
    found = attack(net, x, y, eps, norm="l2")
    for i in np.flatnonzero(found.clean):
        points = torch.stack([p[i] for p in replay(attack, x, eps or math.inf, "l2")])
        distance = (points - x[i]).norm(dim=1)
        ok = (net(points).argmax(1) != y[i]) & ((points >= 0) & (points <= 1)).all(1) & (distance <= (eps or math.inf))
        nearest = float(distance[ok].min()) if bool(ok.any()) else math.inf
        np.testing.assert_allclose(found.distance[i], nearest, rtol=1e-14)
        if not found.success[i]:  # the worst of what was allowed
            inside = ((points >= 0) & (points <= 1)).all(1) & (distance <= (eps or math.inf))
            asked = torch.cat([x[i : i + 1], points[inside]])
            np.testing.assert_allclose(found.margin[i], margin(net(asked), y[i].expand(len(asked))).max(), rtol=1e-12)
    assert found.eps == (eps or math.inf)
    assert bool(Ball.of(x, eps or math.inf, "l2").contains(found.adversarial).all())
    assert not found.success.all()
    assert (found.within(0.2) == (found.distance <= 0.2)).all()


def test_an_example_that_is_wrong_from_the_start_counts_as_broken_at_distance_zero(planes: Digits) -> None:
    net, x, y = planes
    for attack in (Proposals(), Nearest()):
        found = attack(net, x, y, 0.1)
        assert (found.clean == (net(x).argmax(1) == y).numpy()).all()
        assert found.success[~found.clean].all()
        assert (found.distance[~found.clean] == 0).all()
        assert torch.equal(found.adversarial[~torch.from_numpy(found.clean)], x[~torch.from_numpy(found.clean)])
        assert found.accuracy == 1 - found.success.mean()


def test_a_broken_point_stays_broken_when_a_right_one_of_larger_margin_comes() -> None:
    """Ties: argmax lets the first of equal logits win, so a margin of 0 may be broken and a margin of 0 may be not."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.eye(2)
    net.eval()

    @dataclass(frozen=True)
    class Tie(Attack):
        def search(
            self, victim: Victim, ledger: Ledger, noise: torch.Generator, session: Any
        ) -> Generator[float, None, None]:
            for point in ([0.5, 0.5], [0.25, 0.3], [0.5, 0.5]):
                ledger.ask(ledger.active, torch.tensor([point]).expand(len(ledger.active), 2))
            yield 1.0

    x, y = torch.tensor([[0.2, 0.3], [0.4, 0.3]]), torch.tensor([1, 0])
    found = Tie(early_stop=False)(net, x, y, 0.9)
    assert found.success.tolist() == [True, True]
    assert found.margin[0] == 0.0  # the tie is a find for label 1
    np.testing.assert_allclose(found.margin[1], 0.05, rtol=1e-6)  # and none for label 0
    assert found.at_end.tolist() == [True, False]


def test_broken_examples_are_asked_about_no_more(planes: Digits) -> None:
    net, x, y = planes
    found = Proposals(count=30)(net, x, y, 0.3)
    clean, steps = int(found.clean.sum()), 30
    assert found.forward < len(x) + clean * steps
    assert Proposals(count=30, early_stop=False)(net, x, y, 0.3).forward == len(x) + clean * steps


# ---- batches, seeds, progress ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_and_the_global_generator_is_left_alone(digits_net: Digits) -> None:
    net, x, y = digits_net
    before = torch.get_rng_state()
    one, two, other = (PGD(steps=3, seed=seed)(net, x[:60], y[:60], 0.08) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.adversarial, two.adversarial)
    assert not torch.equal(one.adversarial, other.adversarial)


@pytest.mark.parametrize("batch", [1, 7, 25, 1000])
def test_batches_of_any_size_give_the_same_result_where_nothing_is_random(digits_net: Digits, batch: int) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).double(), digits_net[1][:25].double(), digits_net[2][:25]
    whole = PGD(steps=5, random_start=False)(net, x, y, 0.08, trace=True)
    parts = PGD(steps=5, random_start=False, batch=batch)(net, x, y, 0.08, trace=True)
    torch.testing.assert_close(parts.adversarial, whole.adversarial, rtol=0, atol=1e-12)
    assert (parts.success == whole.success).all()
    assert (parts.forward, parts.backward) == (whole.forward, whole.backward)
    assert parts.trace is not None
    assert whole.trace is not None
    assert len(parts.trace) == len(whole.trace)
    for a, b in zip(parts.trace, whole.trace, strict=True):
        torch.testing.assert_close(a.points, b.points, rtol=0, atol=1e-12)


def test_progress_rises_and_what_comes_early_is_the_result_on_the_first_examples(digits_net: Digits) -> None:
    net, x, y = digits_net
    updates = list(PGD(steps=4, batch=100).attacking(net, x, y, 0.05))
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] == 1
    values = [u.value for u in updates if u.value is not None]
    assert [len(v) for v in values] == [100, 200, 300]
    assert (values[0].success == values[-1].success[:100]).all()
    assert (PGD(steps=4, batch=100)(net, x[:100], y[:100], 0.05).success == values[0].success).all()


def test_questions_are_counted_as_they_were_asked(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Counting(nn.Module):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.seen += len(x)
            return net(x)

    counting = Counting().eval()
    found = PGD(steps=5)(counting, x[:50], y[:50], 0.05)
    assert Counting.seen == found.forward + 2 * 32  # the check before the attack asks about some, twice
    asked: list[int] = []

    def fast(x: Tensor) -> Tensor:
        asked.append(len(x))
        return net(x)

    found = PGD(steps=5, early_stop=False)(net, x[:50], y[:50], 0.05, fast=fast)
    assert sum(asked) == found.forward - found.backward > 0


# ---- the attacked net is left as it was -----------------------------------------------------------------------------


def test_the_net_and_the_inputs_are_left_as_they_were(digits_net: Digits) -> None:
    net, x, y = copy.deepcopy(digits_net[0]).requires_grad_(True), digits_net[1][:30].clone(), digits_net[2][:30]
    weights = copy.deepcopy(net.state_dict())
    inputs = x.clone().requires_grad_()
    found = PGD(steps=3)(net, inputs, y, 0.1)
    assert torch.equal(inputs, x)
    assert inputs.grad is None
    assert not found.adversarial.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(w, weights[k]) for k, w in net.state_dict().items())


def test_an_attack_under_no_grad_is_the_same_and_leaves_it_on(digits_net: Digits) -> None:
    net, x, y = digits_net
    plain = PGD(steps=3)(net, x[:30], y[:30], 0.1)
    with torch.no_grad():
        same = PGD(steps=3)(net, x[:30], y[:30], 0.1)
        assert not torch.is_grad_enabled()
        for _ in PGD(steps=3).attacking(net, x[:30], y[:30], 0.1):
            assert not torch.is_grad_enabled()
    assert torch.equal(plain.adversarial, same.adversarial)


@pytest.mark.parametrize("activations", ["float", "sign"])
def test_of_a_method_of_the_lab_what_it_deploys_is_attacked(digits_net: Digits, activations: str) -> None:
    _, x, y = digits_net
    net = qlab.build("mlp", (1, 8, 8), 10, seed=0)
    method = qlab.methods.create("ste", net, activations=activations, reestimate_bn=False)
    shipped = method.deployed()
    y = shipped(x).argmax(1)
    found = PGD(steps=3)(method, x[:40], y[:40], 0.1)
    assert found.clean.all()
    assert torch.equal(found.adversarial, PGD(steps=3)(shipped, x[:40], y[:40], 0.1).adversarial)
    assert found.backward > 0


def test_pixels_puts_the_normalisation_into_the_net(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Data:
        def transform(self, x: Tensor) -> Tensor:
            return (x - 0.25) / 0.5

    inside = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    assert torch.equal(pixels(inside, Data())(x), inside((x - 0.25) / 0.5))
    training = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match="training mode"):
        PGD(steps=1)(pixels(training, Data()), x, y, 0.1)
    assert training.training
    with pytest.raises(InputError, match="transform"):
        pixels(net, object())


def test_a_copy_of_a_net_before_its_data_set_shares_the_set_and_not_the_weights() -> None:
    class Data:
        def transform(self, x: Tensor) -> Tensor:
            return x - 0.5

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a data set holds its trainer: it is not to be copied")

    net = pixels(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), Data())
    twin = copy.deepcopy(net).double()
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(twin(x.double()).float(), net(x))
    assert not twin.training
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert net(x).abs().sum() > 0


# ---- what makes no sense is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0, 0.0, -0.1, math.nan, True, "0.1"])
def test_a_radius_that_is_none_is_said(digits_net: Digits, eps: Any) -> None:
    with pytest.raises(InputError, match="positive number"):
        PGD()(*digits_net, eps)


def test_a_radius_may_be_any_real_number(digits_net: Digits) -> None:
    net, x, y = digits_net
    a, b = (PGD(steps=2)(net, x[:20], y[:20], eps) for eps in (1, np.float32(1)))
    assert torch.equal(a.adversarial, b.adversarial)
    with pytest.raises(InputError, match="needs a radius"):
        PGD()(net, x, y)


def test_a_norm_that_is_none_is_said(digits_net: Digits) -> None:
    net, x, y = digits_net
    with pytest.raises(UnknownNameError, match="l2"):
        PGD()(net, x, y, 0.1, norm="L2")  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class OnlyOne(Proposals):
        norms = ("linf",)

    with pytest.raises(InputError, match="OnlyOne is made for linf, not for l1"):
        OnlyOne()(net, x, y, 0.1, norm="l1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net, x, y: (net, x, torch.full_like(y, 10)), "classes 0 to 9"),
        (lambda net, x, y: (net, x, torch.where(torch.arange(len(y)) == 290, -1, y)), "0 to 9"),
        (lambda net, x, y: (net, x, y.int()), "int64"),
        (lambda net, x, y: (net, x, y[:-1]), "299"),
        (lambda net, x, y: (net, x, y.tolist()), "labels"),
        (lambda net, x, y: (net, x * 2, y), "outside the stated range"),
        (lambda net, x, y: (net, x - 0.5, y), "outside the stated range"),
        (lambda net, x, y: (net, torch.where(torch.arange(300)[:, None, None, None] == 0, math.nan, x), y), "NaN"),
        (lambda net, x, y: (net, torch.where(torch.arange(300)[:, None, None, None] == 299, math.nan, x), y), "NaN"),
        (lambda net, x, y: (net, x[:0], y[:0]), "at least one example"),
        (lambda net, x, y: (net, (x * 16).long(), y), "floats"),
        (lambda net, x, y: (net, x[:, :, 1:], y), "does not take inputs"),
        (lambda net, x, y: (copy.deepcopy(net).train(), x, y), "training mode"),
        (lambda net, x, y: (nn.Sequential(net, AlwaysDropout()).eval(), x, y), "answers twice differently"),
        (lambda net, x, y: (nn.Sequential(net, nn.Linear(10, 1)).eval(), x, y * 0), "one logit"),
        (lambda net, x, y: (net[0], x[:, :, :, :0], y), "inputs"),
        (lambda net, x, y: (lambda x: net(x), x, y), "expected a torch module"),
        (lambda net, x, y: (nn.Sequential(net, Divide()).eval(), x, y), "NaN or infinite"),
    ],
)  # fmt: skip
def test_what_an_attack_cannot_take_is_said(digits_net: Digits, change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PGD(steps=1)(*change(*digits_net), 0.1)


class AlwaysDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.training = False  # as a quantizer that rounds at random even in eval mode

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.dropout(z, 0.5, training=True)


class Divide(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z / 0


def test_logits_that_are_nan_in_the_ball_are_no_find_but_said() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(x.sum(1, keepdim=True) - 0.9).sqrt(), torch.zeros(len(x), 1)], 1)

    with pytest.raises(InputError, match="proposed"):
        PGD(steps=3)(Root().eval(), torch.tensor([[0.6, 0.4], [0.9, 0.9]]), torch.tensor([0, 0]), 0.3)


def test_a_net_without_gradients_is_said(digits_net: Digits) -> None:
    net, x, y = digits_net

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x.detach())

    with pytest.raises(InputError, match="no gradient reaches the inputs"):
        PGD(steps=1)(Detached().eval(), x, y, 0.1)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"seed": -1}])
def test_settings_that_are_none_are_said(digits_net: Digits, settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected at least"):
        PGD(**settings)(*digits_net, 0.1)  # type: ignore[arg-type]


# ---- results in words and tables ------------------------------------------------------------------------------------


def test_a_result_says_its_figures_and_promises_nothing(digits_net: Digits) -> None:
    net, x, y = digits_net
    found: Attacked = PGD(steps=5, eta=0.02)(net, x, y, 0.08)
    words = found.summary()
    assert words.startswith("PGD (steps=5, eta=0.02) (linf within eps 0.08) on 300 examples")
    assert f"{found.accuracy:.1%}" in words
    assert "proves no robustness" in words
    table = found.frame()
    assert len(table) == 300
    assert (table["success"] == found.success).all()
    assert (table["label"] == y.numpy()).all()
    assert len(found) == 300


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_reported_of_the_points_is_true_of_them(digits_net: Digits, norm: Norm) -> None:
    net, x, y = digits_net
    found = PGD(steps=5)(net, x, y, {"linf": 0.1, "l2": 0.6, "l1": 2.0}[norm], norm=norm)
    z = net(found.adversarial)
    assert ((z.argmax(1) != y).numpy() == found.success).all()
    np.testing.assert_allclose(margin(z, y).numpy(), found.margin, rtol=1e-4, atol=1e-4)
    size = norms(found.adversarial - x, norm)
    hit = found.success & found.clean
    np.testing.assert_allclose(norms(found.adversarial.double() - x.double(), norm).numpy()[hit], found.distance[hit])
    assert bool((size <= found.eps * (1 + 1e-6)).all())
    assert (found.distance[~found.success] == np.inf).all()


KEEPS: tuple[Literal["worst", "nearest"], ...] = ("worst", "nearest")


def test_joining_keeps_order_and_sums_questions(planes: Digits) -> None:
    net, x, y = planes
    for attack in (Proposals(batch=7), Nearest(batch=7)):
        assert attack.keep in KEEPS
        found = attack(net, x, y, 0.2)
        assert torch.equal(found.x, x)
        assert torch.equal(found.y, y)
        parts = [attack(net, x[i : i + 7], y[i : i + 7], 0.2) for i in range(0, 40, 7)]
        assert parts[0].forward > 7
        assert len(Attacked.joined(parts)) == 40
        assert Attacked.joined(parts).forward == sum(p.forward for p in parts)


def test_a_black_picture_can_be_attacked() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    net[1].weight.data = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]])
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    found = PGD(5, random_start=False, loss="margin", early_stop=False)(net, x, y, 0.1)
    assert found.clean.all()
    assert found.success.all()
    torch.testing.assert_close(found.adversarial.flatten(), torch.tensor([0.0, 0.0, 0.1, 0.1]))
