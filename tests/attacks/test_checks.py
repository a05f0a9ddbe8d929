"""The rules of the honesty panel and what each check does with them, on successes made by hand."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from qlab.attacks import checks_attacks, checks_net
from qlab.attacks.base import Attack
from qlab.attacks.checks import Check, Comparison, compare, strongest, too_many, wilson
from qlab.attacks.checks_runs import BUDGETS, Budget, Exam, budget_of
from qlab.attacks.pgd import PGD
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.scaling import Fixed
from qlab.attacks.square import Square
from qlab.errors import InputError, UnknownNameError

N = 100


def first(k: int, n: int = N) -> np.ndarray:
    """Return successes on the first k of n examples."""
    return np.arange(n) < k


def last(k: int, n: int = N) -> np.ndarray:
    """Return successes on the last k of n examples."""
    return np.arange(n) >= n - k


# The rules


def test_a_comparison_counts_who_broke_what_alone() -> None:
    c = compare(first(30), last(80))
    assert (c.gained, c.lost, c.n) == (70, 20, N)
    assert c.gap == pytest.approx(0.5)


def test_p_is_the_exact_one_sided_binomial_test() -> None:
    for b, c in product(range(8), range(8)):
        p = Comparison(N, b, c).p
        brute = sum(bin(k).count("1") >= b for k in range(2 ** (b + c))) / 2 ** (b + c)
        assert p == pytest.approx(brute, abs=1e-14)
        if b + c:
            assert p == pytest.approx(binomtest(b, b + c, alternative="greater").pvalue, abs=1e-14)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "beaten"),
    [
        (4, 0, 100, False),  # 1/16
        (5, 0, 100, True),  # 1/32
        (7, 2, 100, False),  # 46/512
        (0, 50, 100, False),  # the reference is the stronger one
        (5, 0, 500, False),  # by chance or not, one point at most
        (6, 0, 500, True),
        (106, 100, 500, False),  # more than a point, and chance
        (60, 0, 10_000, False),
        (101, 0, 10_000, True),
    ],
)
def test_beaten_is_more_than_chance_and_for_many_examples_more_than_a_point(
    gained: int, lost: int, n: int, beaten: bool
) -> None:
    assert Comparison(n, gained, lost).beaten() is beaten


def test_the_best_of_many_must_be_better_than_the_best_of_one() -> None:
    others = {"a": first(6), "b": first(3), "c": first(1)}
    name, c = strongest(first(0), others)
    assert (name, c.gained, c.trials) == ("a", 6, 3)
    assert c.beaten()  # 3/64
    assert not strongest(first(0), others | {"d": first(0)})[1].beaten()  # 4/64


@pytest.mark.parametrize(
    ("count", "n", "allowed", "many"),
    [(2, 100, 0.02, False), (3, 100, 0.02, False), (4, 100, 0.02, True), (10, 540, 0.02, False), (11, 540, 0.02, True)],
)
def test_a_few_examples_are_no_alarm(count: int, n: int, allowed: float, many: bool) -> None:
    assert too_many(count, n, allowed) is many
    test = float(binomtest(count, n, allowed / 2, alternative="greater").pvalue)
    assert many is (count > allowed * n and test < 0.05)


def test_the_interval_solves_wilson_s_equation() -> None:
    # Both ends p solve (k/n - p)^2 = z^2 p (1 - p) / n.
    z = 1.959963984540054
    for k, n in [(0, 20), (7, 20), (20, 20), (3, 540)]:
        for p in wilson(k, n):
            assert (k / n - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-12)
    with pytest.raises(InputError, match="5 of 4"):
        wilson(5, 4)


def test_successes_of_different_examples_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="same examples"):
        compare(first(1, 3), first(1, 4))


# The checks

Answer = Callable[[Attack, float, bool], np.ndarray]


@dataclass
class Made(Exam):
    """An exam whose runs are made by hand."""

    answer: Answer = lambda attack, eps, precise: first(0)

    def successes(
        self, attack: Attack, eps: float | None = None, *, precise: bool = False, only: Any = None, **_: Any
    ) -> Generator[Any, None, np.ndarray]:
        yield from ()
        found = self.answer(attack, self.eps if eps is None else eps, precise)
        return found if only is None else found & only


class Gap(nn.Module):
    """Logits (c, -c, 0, 0) plus a little of the input: a gap of 2 c."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.new_tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]) + x.new_tensor([self.c, -self.c, 0, 0])


def made(answer: Answer, c: float = 1.0, twin: nn.Module | None = None) -> Made:
    x = torch.rand(N, 2, generator=torch.Generator().manual_seed(0))
    return Made(Gap(c), x, torch.zeros(N, dtype=torch.int64), 0.1, "linf", 0.0, 1.0, twin=twin, answer=answer)


def result(check: Any, exam: Exam) -> Check:
    work = check(exam)
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value


def by(special: Callable[[PGD, float, bool], bool], then: np.ndarray, plain: np.ndarray) -> Answer:
    """Return what breaks `then` where a gradient attack is special, and `plain` else."""
    return lambda attack, eps, precise: then if isinstance(attack, PGD) and special(attack, eps, precise) else plain


def test_1_fails_where_one_step_breaks_what_many_do_not() -> None:
    one = lambda attack, eps, precise: attack.steps == 1  # noqa: E731
    assert result(checks_attacks.one_step, made(by(one, first(60), first(50)))).state == "fail"
    assert result(checks_attacks.one_step, made(by(one, first(54), first(50)))).state == "pass"
    assert result(checks_attacks.one_step, made(by(one, first(10), first(50)))).state == "pass"


def test_2_fails_where_a_search_breaks_more_than_a_few_that_the_gradient_missed() -> None:
    def answer(k: int, also: int) -> Answer:
        return lambda attack, eps, precise: last(k) | first(also) if isinstance(attack, Square) else first(50)

    assert result(checks_attacks.black_box, made(answer(2, 20))).state == "pass"
    assert result(checks_attacks.black_box, made(answer(3, 20))).state == "warn"
    check = result(checks_attacks.black_box, made(answer(4, 20)))
    assert check.state == "fail"
    assert check.evidence["only Square"] == 4
    assert check.examples is not None
    assert check.examples.sum() == 4


def test_2_without_a_search_for_the_norm_or_a_twin_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Square, "norms", ("linf",))
    exam = made(by(lambda *_: False, first(0), first(0)))
    exam.norm = "l1"
    with pytest.raises(InputError, match="no twin"):
        result(checks_attacks.black_box, exam)


@pytest.mark.parametrize(("left", "state"), [(0, "pass"), (1, "warn"), (2, "fail")])
def test_3_fails_where_something_withstands_the_whole_range(left: int, state: str) -> None:
    everything = lambda attack, eps, precise: eps == 1.0  # noqa: E731
    assert result(checks_attacks.unbounded, made(by(everything, first(N - left), first(0)))).state == state


def test_4_fails_where_a_larger_ball_loses_examples() -> None:
    rising = made(lambda attack, eps, precise: first(50) if eps > 0.3 else first(60) if eps > 0.15 else first(10))
    check = result(checks_attacks.monotone, rising)
    assert check.state == "fail"
    assert check.evidence["largest rise"] == pytest.approx(0.1)
    assert check.curve is not None
    assert np.array_equal(check.curve.x, np.unique(check.curve.x))
    falling = made(lambda attack, eps, precise: first(min(N, int(eps * 100))))
    assert result(checks_attacks.monotone, falling).state == "pass"


@pytest.mark.parametrize(("found", "state"), [(1, "pass"), (2, "warn"), (3, "fail")])
def test_5_fails_where_random_points_break_what_the_gradient_missed(found: int, state: str) -> None:
    exam = made(lambda attack, eps, precise: last(found) if isinstance(attack, RandomSearch) else first(50))
    check = result(checks_attacks.random_points, exam)
    assert (check.state, check.evidence["only random"]) == (state, found)


def test_5_counts_only_what_the_gradient_missed() -> None:
    exam = made(lambda attack, eps, precise: first(50))
    assert result(checks_attacks.random_points, exam).evidence["only random"] == 0


def test_7_asks_for_more_than_two_points() -> None:
    def answer(each: int) -> Answer:
        return lambda attack, eps, precise: first(50) | (np.arange(N) == 50 + each * attack.seed)

    check = result(checks_attacks.restarts, made(answer(1)))
    assert check.state == "fail"
    assert check.evidence["A(10)"] == pytest.approx(0.40)  # the seed under examination breaks number 50
    assert check.curve is not None
    assert np.allclose(np.diff(check.curve.y)[1:], -0.01)
    two = lambda attack, eps, precise: first(52 if attack.seed else 50)  # noqa: E731
    assert result(checks_attacks.restarts, made(two)).state == "pass"
    four = lambda attack, eps, precise: first(54 if attack.seed else 50)  # noqa: E731
    assert result(checks_attacks.restarts, made(four)).state == "warn"


def test_8_fails_above_chance() -> None:
    half = lambda attack, eps, precise: eps == 0.5  # noqa: E731
    assert result(checks_attacks.chance, made(by(half, first(75), first(0)))).state == "pass"  # d = 4
    assert result(checks_attacks.chance, made(by(half, first(70), first(0)))).state == "pass"  # chance may do that
    assert result(checks_attacks.chance, made(by(half, first(60), first(0)))).state == "fail"


def test_9_10_and_11_speak_of_vanishing_only_where_gradients_have_vanished() -> None:
    special = {
        checks_attacks.precision: lambda attack, eps, precise: precise,
        checks_attacks.temperature: lambda attack, eps, precise: attack.scaling == Fixed(0.1),
        checks_attacks.losses: lambda attack, eps, precise: attack.loss == "margin",
    }
    for check, which in special.items():
        woken = by(which, first(80), first(50))
        saturated, sound = result(check, made(woken, c=20.0)), result(check, made(woken, c=1.0))
        assert (saturated.state, saturated.mechanism, saturated.masking) == ("fail", "V", True)
        assert (sound.state, sound.mechanism, sound.masking) == ("fail", "tuning", False)
        assert result(check, made(by(which, first(52), first(50)), c=20.0)).state == "pass"
        assert result(check, made(by(which, first(20), first(50)), c=20.0)).state == "pass"


def test_10_a_larger_temperature_that_helps_is_a_matter_of_tuning() -> None:
    warm = by(lambda attack, eps, precise: attack.scaling == Fixed(10.0), first(80), first(50))
    check = result(checks_attacks.temperature, made(warm, c=20.0))
    assert (check.state, check.mechanism) == ("fail", "tuning")
    assert check.curve is not None
    assert check.curve.x.tolist() == sorted([*checks_attacks.BETAS, 1.0])


def test_9_has_nothing_to_say_of_float64() -> None:
    exam = made(by(lambda *_: False, first(0), first(0)))
    exam.x = exam.x.double()
    assert result(checks_attacks.precision, exam).state == "skipped"


def test_11_two_classes_have_no_dlr() -> None:
    exam = made(lambda attack, eps, precise: first(50))
    exam.net = nn.Linear(2, 2)
    assert "A(DLR)" not in result(checks_attacks.losses, exam).evidence


def test_14_is_a_matter_of_tuning() -> None:
    small = by(lambda attack, eps, precise: attack.eta == checks_attacks.STEPS[0] * 0.1, first(80), first(50))
    check = result(checks_attacks.step_size, made(small))
    assert (check.state, check.mechanism, check.masking) == ("fail", "tuning", False)


# The checks of the net


def exam_of(net: nn.Module, n: int = 40, D: int = 6, random: bool = False) -> Exam:
    x = torch.rand(n, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x).argmax(1)
    return Exam(net, x, y, 0.1, "linf", 0.0, 1.0, budget=Budget(steps=5, looked=16), random=random)


def linear(scale: float = 1.0) -> nn.Module:
    net = nn.Linear(6, 4, bias=False)
    net.weight.data = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    return net.eval()


class Around(nn.Module):
    """A linear net with something before or after it."""

    def __init__(self, before: Any = lambda x: x, after: Any = lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = linear(), before, after
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.net(self.before(x)))


def test_12_a_huge_scale_kills_gradients_that_the_margin_keeps_alive() -> None:
    assert result(checks_net.zero_gradients, exam_of(linear())).state == "pass"
    check = result(checks_net.zero_gradients, exam_of(linear(1e4)))
    assert (check.state, check.mechanism) == ("fail", "V")
    assert check.evidence["of these alive in float64 with the margin"] == 1


def test_12_a_step_has_no_gradient_whatever_the_loss() -> None:
    check = result(checks_net.zero_gradients, exam_of(Around(before=lambda x: torch.round(x * 8) / 8)))
    assert (check.state, check.mechanism, check.evidence["zero"]) == ("fail", "S", 1)


def test_12_and_13_a_net_without_a_graph_is_shattered() -> None:
    exam = exam_of(Around(before=torch.detach, after=torch.detach))
    for check in (checks_net.zero_gradients, checks_net.agreement):
        found = result(check, exam)
        assert (found.state, found.mechanism) == ("fail", "S")


def test_13_the_gradient_of_a_linear_net_is_its_smoothed_gradient() -> None:
    two = Around(after=lambda z: z[:, :1] * z.new_tensor([1e4, -1e4]))  # of two classes: the margin has no kink
    check = result(checks_net.agreement, exam_of(two))
    assert check.state == "pass"
    # The corrected cosine is unbiased, not bounded by 1.
    assert check.evidence["cosine"] == pytest.approx(1, abs=0.02)


def test_13_a_gradient_that_points_the_other_way_fails() -> None:
    check = result(checks_net.agreement, exam_of(Around(after=lambda z: 2 * z.detach() - z)))
    assert check.state == "fail"
    assert check.evidence["cosine"] == pytest.approx(-1, abs=0.05)


def test_16_a_random_net_fails_and_both_its_attacks_are_reported() -> None:
    assert result(checks_net.determinism, exam_of(linear())).state == "pass"
    noisy = Around(before=lambda x: x + 0.1 * torch.randn(x.shape))
    check = result(checks_net.determinism, exam_of(noisy, random=True))
    assert (check.state, check.mechanism) == ("fail", "R")
    assert {"accuracy, one draw", "accuracy, mean of 16 draws"} < set(check.evidence)


@pytest.mark.parametrize(
    ("outputs", "state"),
    [("logits", "pass"), ("probabilities", "fail"), ("sigmoids", "warn")],
)
def test_17_tells_probabilities_from_logits(outputs: str, state: str) -> None:
    last_layer = {"logits": nn.Identity(), "probabilities": nn.Softmax(-1), "sigmoids": nn.Sigmoid()}[outputs]
    assert result(checks_net.outputs, exam_of(nn.Sequential(linear(), last_layer))).state == state


# The runs


def test_a_run_is_made_once() -> None:
    exam = exam_of(linear())
    result(checks_attacks.one_step, exam)
    asked = exam.forward
    again = result(checks_attacks.one_step, exam)
    assert exam.forward == asked
    assert again.evidence["A(PGD)"] == 1 - exam.tried[exam.pgd()].mean()


def test_every_success_within_eps_counts_for_the_worst_case_and_none_beyond() -> None:
    exam = exam_of(linear())
    result(checks_attacks.unbounded, exam)
    assert not exam.broken.any()
    result(checks_attacks.one_step, exam)
    result(checks_attacks.losses, exam)
    assert np.array_equal(exam.broken, np.any(list(exam.tried.values()), axis=0))
    assert exam.broken.any()


def test_the_worst_of_some_restarts_is_what_one_attack_with_restarts_of_these_seeds_finds() -> None:
    exam = exam_of(linear())
    check = result(checks_attacks.restarts, exam)
    x, y = exam.x, exam.y
    runs = [PGD(steps=5, seed=r)(exam.net, x, y, 0.1).success for r in range(10)]
    assert check.evidence["A(10)"] == pytest.approx(1 - np.any(runs, axis=0).mean())


def test_budgets_have_names() -> None:
    assert budget_of("quick") is BUDGETS["quick"]
    assert budget_of(own := Budget(steps=3)) is own
    with pytest.raises(UnknownNameError, match="standard"):
        budget_of("standart")
    with pytest.raises(InputError, match="restarts"):
        Budget(restarts=1)
