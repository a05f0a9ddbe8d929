"""The suite: worst case per example, never rising with eps, resumable, silent without its panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.attacks.evaluation import BROKEN, NOT_ASKED, Evaluation
from qlab.attacks.losses import misclassified
from qlab.attacks.pgd import PGD
from qlab.attacks.suite import evaluate, evaluating, examples, suite
from qlab.errors import InputError, UnknownNameError

Net = tuple[nn.Module, Tensor, Tensor]
# From x itself: what an attack finds for an example then does not depend on which others are asked about with it.
TWO = {"one step": PGD(1, eta=0.05, random_start=False), "PGD": PGD(10, random_start=False)}
EPS = (0.05, 0.1, 0.2)


class Counting(nn.Module):
    """A net that counts how many inputs it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.net(x)


@pytest.fixture(scope="module")
def some(digits_net: Net) -> Net:
    net, x, y = digits_net
    return net, x[:80], y[:80]


@pytest.fixture(scope="module")
def found(some: Net) -> Evaluation:
    return evaluate(some[0], some[1:], EPS, attacks=TWO, panel=False)


def test_the_worst_case_is_at_most_every_attack_alone(some: Net, found: Evaluation) -> None:
    net, x, y = some
    for eps in EPS:
        for attack in TWO.values():
            alone = attack(net, x, y, eps)
            assert found.accuracy(eps)[0] <= alone.accuracy


def test_accuracy_never_rises_with_eps_and_starts_at_the_clean_one(found: Evaluation) -> None:
    shares = [found.clean.mean(), *(found.accuracy(eps)[0] for eps in EPS)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


def test_every_point_it_counts_lies_in_ball_and_range_and_is_misclassified(some: Net, found: Evaluation) -> None:
    net, x, y = some
    for e, eps in enumerate(EPS):
        broken = np.isfinite(found.distance[e])
        points = found.worst[e]
        delta = (points.double() - x.double()).flatten(1).abs().amax(1)
        assert bool((delta <= eps).all())
        assert bool(((points >= 0) & (points <= 1)).all())
        assert misclassified(net(points), y).numpy()[broken].all()
        np.testing.assert_array_equal(delta.numpy()[broken], found.distance[e][broken])


def test_each_example_is_asked_about_until_it_is_broken_and_not_after(found: Evaluation) -> None:
    for e in range(len(EPS)):
        first, second = found.outcome[e]
        assert (first[~found.clean] == NOT_ASKED).all()
        assert (second[first == BROKEN] == NOT_ASKED).all()
        if e:
            assert (found.outcome[e][:, np.isfinite(found.distance[e - 1])] == NOT_ASKED).all()
    table = found.frame()
    for eps in EPS:
        rows = table[table["eps"] == eps]
        assert rows["accuracy"].iloc[-1] == pytest.approx(found.accuracy(eps)[0])
        assert list(rows["broken"]) == [found.alone(name, eps) for name in TWO]
    records = found.records()
    assert len(records) == len(EPS) * len(found)
    assert set(records.loc[records["robust"], "broken by"]) <= {""}
    assert (records.loc[~records["robust"], "broken by"] != "").all()


def test_no_robust_accuracy_is_stated_without_the_panel(found: Evaluation) -> None:
    assert not found.complete
    words = found.summary()
    assert "No robust accuracy is stated: the honesty panel has not run" in words
    assert "Robust accuracy, worst case" not in words


def test_a_run_goes_on_from_what_was_finished(some: Net, found: Evaluation, tmp_path: Path) -> None:
    net, x, y = some
    counting = Counting(net).eval()
    work = evaluating(counting, (x, y), EPS, attacks=TWO, panel=False, root=tmp_path)
    for update in work:  # stopped after the first two finished attacks
        if update.value is not None and update.value.done.sum() == 2:
            break
    work.close()
    kept = list(tmp_path.iterdir())
    assert len(kept) == 2
    asked = counting.asked
    again = evaluate(counting, (x, y), EPS, attacks=TWO, panel=False, root=tmp_path)
    np.testing.assert_array_equal(again.outcome, found.outcome)
    assert torch.equal(again.worst, found.worst)
    resumed = counting.asked - asked
    counting.asked = 0
    evaluate(counting, (x, y), EPS, attacks=TWO, panel=False, root=tmp_path)
    assert counting.asked < resumed  # all attacks are read now; what is left are the checks of the net


def test_what_is_kept_is_not_read_for_another_net_or_seed_or_when_it_is_damaged(some: Net, tmp_path: Path) -> None:
    net, x, y = some
    one = {"PGD": PGD(3)}
    evaluate(net, (x, y), 0.1, attacks=one, panel=False, root=tmp_path)
    (file,) = tmp_path.iterdir()
    other = _scaled(net, 2.0)
    evaluate(other, (x, y), 0.1, attacks=one, panel=False, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    evaluate(net, (x, y), 0.1, attacks={"PGD": PGD(3, seed=5)}, panel=False, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    whole = evaluate(net, (x, y), 0.1, attacks=one, panel=False)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(evaluate(net, (x, y), 0.1, attacks=one, panel=False, root=tmp_path).worst, whole.worst)


def _scaled(net: nn.Module, factor: float) -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return factor * self.net(x)

    return Scaled().eval()


def test_a_budget_that_is_used_up_starts_no_attack_and_says_so(some: Net) -> None:
    net, x, y = some
    found = evaluate(net, (x, y), 0.1, attacks=TWO, budget=-1.0)
    assert not found.done.any()
    assert found.honesty is None
    assert "2 attacks have not run" in found.summary()


def test_a_data_set_is_attacked_in_its_own_units() -> None:
    data = qlab.data.load("digits")
    net = qlab.build("mlp", data.input_shape, data.num_classes, hidden=[16], seed=0).eval()
    x, y = examples(data, 20)
    assert float(x.min()) >= 0
    assert float(x.max()) == 1
    found = evaluate(net, data, 0.1, attacks=TWO, samples=20, panel=False)
    raw = data.split("test").x[:20]
    with torch.no_grad():
        right = net(data.transform(raw)).argmax(1) == y
    np.testing.assert_array_equal(found.clean, right.numpy())


@pytest.mark.parametrize("eps", [0.0, -0.1, [], [0.1, float("nan")], float("inf"), True, "0.1"])
def test_an_eps_that_is_no_radius_is_named(some: Net, eps: Any) -> None:
    with pytest.raises(InputError, match="expected one or more positive numbers"):
        evaluate(some[0], some[1:], eps, attacks=TWO, panel=False)


def test_unknown_suites_data_and_samples_are_named(some: Net) -> None:
    with pytest.raises(UnknownNameError, match="standard"):
        suite("standart")
    with pytest.raises(InputError, match="data is a int"):
        evaluate(some[0], 3, 0.1)
    with pytest.raises(InputError, match="samples"):
        evaluate(some[0], qlab.data.load("digits"), 0.1, samples=0)


def test_suites_leave_out_what_is_not_made_for_a_norm() -> None:
    for name in ("standard", "quick", "search"):
        for norm in ("linf", "l2", "l1"):
            assert all(norm in attack.norms for attack in suite(name, norm).values())  # type: ignore[arg-type]
    assert "transfer" not in suite("standard")
    assert "transfer" in suite("standard", twin=nn.Linear(2, 2))


def test_a_set_that_is_no_pictures_has_a_range_of_its_own() -> None:
    data = qlab.data.load("two_moons")
    net = qlab.build("mlp", data.input_shape, data.num_classes, hidden=[8], seed=0).eval()
    found = evaluate(net, data, 0.5, attacks=TWO, samples=30, panel=False)
    assert float(found.x.min()) < 0
    assert float((found.worst[-1] - found.x).abs().max()) > 0.4
