"""The suite: worst case per example, never rising with eps, resumable, silent without its panel."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.attacks.adapters import Foreign
from qlab.attacks.apgd import APGD, APGDT
from qlab.attacks.base import Attack, Ledger
from qlab.attacks.checks import wilson
from qlab.attacks.estimators import EOT, NES, Backprop
from qlab.attacks.evaluation import BROKEN, NOT_ASKED, Evaluation
from qlab.attacks.fab import FABT
from qlab.attacks.honesty import Honesty
from qlab.attacks.losses import ce, margin, misclassified
from qlab.attacks.pgd import PGD
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.records import identity, key_of
from qlab.attacks.report import document, html
from qlab.attacks.scaling import HNS, Fixed
from qlab.attacks.square import Square
from qlab.attacks.suite import _range, _telling, evaluate, evaluating, examples, suite
from qlab.attacks.transfer import Transfer
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Update
from qlab.plots.robustness import evaluation_figure

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
    others = [
        (_scaled(net, 2.0), x, y),
        (_scaled(net, 3.0), x, y),
        (net, x[1:], y[1:]),
    ]  # two of the same words and weights
    for k, (another, *batch) in enumerate(others):
        evaluate(another, batch, 0.1, attacks=one, panel=False, root=tmp_path)
        assert len(list(tmp_path.iterdir())) == 2 + k
    evaluate(net, (x, y), 0.1, attacks={"PGD": PGD(3, seed=5)}, panel=False, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
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
    raw = data.split("test", 20).x
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
    with pytest.raises(InputError, match=r"net is a function; .* the packed one as fast"):
        evaluate(lambda x: x, some[1:], 0.1)  # type: ignore[arg-type]
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


# ---- what is kept on disk --------------------------------------------------------------------------------------------------

ONE = {"PGD": PGD(3, random_start=False)}


def _kept(some: Net, root: Path, **options: Any) -> Evaluation:
    return evaluate(some[0], some[1:], 0.1, panel=False, root=root, **({"attacks": ONE} | options))


def _changed(file: Path, **arrays: Any) -> None:
    with np.load(file) as stored:
        whole = {name: stored[name] for name in stored.files}
    np.savez_compressed(file, **(whole | arrays))


def _all_found(stored: Any) -> dict[str, Any]:
    n = len(stored["success"])
    return {"success": np.ones(n, dtype=bool), "distance": np.zeros(n), "margin": np.ones(n)}


HOSTILE: dict[str, Any] = {
    "finds that are none": _all_found,
    "finds that are denied": lambda stored: {"success": np.zeros_like(stored["success"])},
    "points outside the ball": lambda stored: {"points": np.roll(stored["points"], 1, axis=0)},
    "points of another size": lambda stored: {"points": stored["points"][:, :-1]},
    "another number of examples": lambda stored: {"success": stored["success"][:-1]},
    "numbers in the place of truth values": lambda stored: {"success": stored["success"].astype(float)},
    "words in the place of numbers": lambda stored: {"margin": stored["margin"].astype(str)},
    "points that are not finite": lambda stored: {"points": np.full_like(stored["points"], 255)},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_what_a_file_says_is_not_believed(some: Net, tmp_path: Path, how: str) -> None:
    truth = _kept(some, tmp_path)
    (file,) = tmp_path.iterdir()
    with np.load(file) as stored:
        change = HOSTILE[how](stored)
    _changed(file, **change)
    again = _kept(some, tmp_path)
    np.testing.assert_array_equal(again.outcome, truth.outcome)
    assert torch.equal(again.worst, truth.worst)


def test_distances_and_margins_are_measured_again_where_a_file_is_read(some: Net, tmp_path: Path) -> None:
    truth = _kept(some, tmp_path)
    (file,) = tmp_path.iterdir()
    with np.load(file) as stored:
        change = {"distance": stored["distance"] / 2, "margin": stored["margin"] + 9}
    _changed(file, **change)
    before = file.read_bytes()
    np.testing.assert_array_equal(_kept(some, tmp_path).distance, truth.distance)
    assert file.read_bytes() == before  # it was read, and not written anew


def test_a_file_with_any_byte_turned_over_changes_nothing(some: Net, tmp_path: Path) -> None:
    net, x, y = some
    few = (net, x[:4], y[:4])
    truth = _kept(few, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        np.testing.assert_array_equal(_kept(few, tmp_path).distance, truth.distance)


def test_an_attack_whose_settings_do_not_tell_what_it_does_is_not_kept(some: Net, tmp_path: Path) -> None:
    def still(net: nn.Module, ball: Any, y: Tensor) -> Tensor:
        return ball.x

    unknown = {
        "another package's": Foreign(still, "title"),
        "a loss of one's own": PGD(2, loss=lambda z, y: z.sum(1)),
        "and deep inside": PGD(2, estimator=EOT(Unknown(), 2)),
    }
    for attack in unknown.values():
        _kept(some, tmp_path, attacks={"it": attack})
    assert not list(tmp_path.iterdir())
    _kept(some, tmp_path, attacks={"it": PGD(2, loss=ce)})
    assert len(list(tmp_path.iterdir())) == 1


class Unknown(Backprop):
    """An estimator that is not of the lab."""


def test_what_is_kept_is_not_read_for_another_range_or_by_other_code(
    some: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors that differ in the middle alone: their words in short are the same.
    wide = torch.full((1, 40, 40), 1.0)
    wider = wide.clone()
    wider[0, 20, 20] = 2.0
    assert repr(wide) == repr(wider)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1600, 3)).eval()
    x = torch.rand(4, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x).argmax(1)
    for high in (wide, wider):
        _kept((net, x, y), tmp_path, high=high)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("qlab.experiments.cells.source_digest", lambda modules: "another")
    _kept((net, x, y), tmp_path, high=wide)
    assert len(list(tmp_path.iterdir())) == 3


def test_scalings_and_estimators_tell_attacks_apart() -> None:
    attacks = [
        PGD(2),
        PGD(2, scaling=HNS()),
        PGD(2, scaling=Fixed(0.5)),
        PGD(2, scaling=Fixed(0.25)),
        PGD(2, estimator=NES()),
        PGD(2, estimator=NES(samples=3)),
        PGD(2, loss=ce),
        Transfer(nn.Linear(2, 2), PGD(2)),
        Transfer(nn.Linear(2, 2), PGD(2)),  # of other weights
        Transfer(nn.Linear(2, 2), PGD(3)),
    ]
    keys = [key_of("", "", attack, 0.1, [0, 1]) for attack in attacks]
    assert None not in keys
    assert len(set(keys)) == len(attacks)
    assert key_of("", "", PGD(2), 0.1, [0, 1]) == keys[0]
    assert key_of("", "", PGD(2), 0.1, [0, 2]) != keys[0]
    assert key_of("", "", PGD(2), 0.2, [0, 1]) != keys[0]


# ---- a packed net in the net's place ---------------------------------------------------------------------------------------


def test_a_fast_net_that_decides_otherwise_is_refused(some: Net) -> None:
    with pytest.raises(InputError, match="fast decides otherwise than the net on"):
        evaluate(some[0], some[1:], 0.1, attacks=ONE, panel=False, fast=lambda x: -some[0](x))


def test_what_is_found_with_a_fast_net_counts_where_the_net_itself_is_wrong(some: Net, tmp_path: Path) -> None:
    net, x, y = some

    def lying(points: Tensor) -> Tensor:  # right on the examples themselves, wrong about all other points
        known = (points[:, None] == x[None]).flatten(2).all(2).any(1)
        return torch.where(known[:, None], net(points), -net(points))

    search = {"random corners": RandomSearch(2)}
    for _ in range(2):  # the second time from what was kept
        found = evaluate(net, (x, y), 0.01, attacks=search, panel=False, fast=lying, root=tmp_path)
        hit = found.clean & ~found.robust(0.01)
        np.testing.assert_array_equal(misclassified(net(found.worst[0]), y).numpy()[hit], True)
        assert hit.mean() < 0.2


# ---- along the grid, and what is said -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift(Attack):
    """Asks about one point."""

    by: float = 0.0

    def search(self, victim: Any, ledger: Ledger, noise: torch.Generator, session: Any) -> Iterator[float]:
        at = ledger.active
        ledger.ask(at, ledger.ball.x[at] + self.by)
        yield 1.0


def test_what_is_kept_of_each_example_is_what_can_be_counted_by_hand() -> None:
    net = nn.Linear(1, 2).double().eval()  # the margin of class 0 is x - 0.9
    net.weight.data, net.bias.data = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([0.0, -0.9]).double()
    x = torch.tensor([[0.25], [0.6875], [0.95]], dtype=torch.float64)
    shifts = {str(by): Shift(by=by) for by in (0.25, 0.0625, 0.125)}  # the first alone breaks 0.6875
    found = evaluate(net, (x, torch.zeros(3, dtype=torch.int64)), [0.1, 0.2, 0.3], attacks=shifts, panel=False)
    assert found.clean.tolist() == [True, True, False]
    assert found.worst[..., 0].tolist() == [[0.3125, 0.75, 0.95], [0.375, 0.8125, 0.95], [0.5, 0.9375, 0.95]]
    np.testing.assert_array_equal(found.distance, [[np.inf, np.inf, 0], [np.inf, np.inf, 0], [np.inf, 0.25, 0]])
    assert found.outcome[2].tolist() == [[0, 1, -1], [0, -1, -1], [0, -1, -1]]
    assert [found.accuracy(eps)[0] for eps in (0.1, 0.2, 0.3)] == [2 / 3, 2 / 3, 1 / 3]
    assert found.accuracy(0.3)[1:] == wilson(1, 3)
    assert [_telling(found.distance[:, i], found.clean[i]) for i in ([0, 1], [0], [1, 2])] == [2, 2, 2]
    assert _telling(np.array([[np.inf, 1.0, 2.0], [0.5, 1.0, 2.0]]), np.ones(3, dtype=bool)) == 0
    assert _telling(np.array([[np.inf, np.inf, 2.0], [0.5, np.inf, 2.0]]), np.ones(3, dtype=bool)) == 1


def test_the_point_of_largest_margin_of_a_smaller_ball_is_kept_in_a_larger_one(some: Net) -> None:
    net, x, y = some

    @dataclass(frozen=True)
    class Shy(PGD):
        """Finds good points in small balls alone."""

        def length(self, ball: Any) -> Tensor:
            return torch.where(ball.eps < 0.02, ball.eps / 4, 1e-6)

    found = evaluate(net, (x, y), [0.01, 0.05], attacks={"shy": Shy(10, random_start=False)}, panel=False)
    z = [margin(net(points), y) for points in found.worst]
    left = torch.from_numpy(found.robust(0.05))
    assert bool((z[1] >= z[0])[left].all())
    assert bool((z[0] > margin(net(x), y) + 0.01)[left].any())


def test_what_was_broken_before_a_run_was_stopped_is_broken_at_larger_radii_too(some: Net, found: Evaluation) -> None:
    work = evaluating(some[0], some[1:], EPS, attacks=TWO, panel=False)
    part = next(update.value for update in work if update.value is not None and update.value.done.sum() == 2)
    work.close()
    assert part.done.tolist() == [[True, True], [False, False], [False, False]]
    assert not part.complete
    np.testing.assert_array_equal(part.distance, part.distance[:1].repeat(3, axis=0))
    np.testing.assert_array_equal(part.distance[0], found.distance[0])
    assert not part.records().query("eps == 0.2 and not clean")["robust"].any()
    assert torch.equal(part.worst[2], found.worst[0])


def test_no_accuracy_is_shown_in_tables_and_figures_before_the_panel(found: Evaluation) -> None:
    table = found.frame()
    assert table[["accuracy", "low", "high"]].isna().all(axis=None)
    assert table["broken"].sum() > 0
    words = found.figure().get_label()
    assert "no robust accuracy is stated" in words
    assert " at 0.05" not in words
    assert f"{100 * found.clean.mean():.1f} % at 0" in words
    (line,) = found.figure().axes[0].get_lines()
    assert len(line.get_xdata()) == 1
    told = document(found, "title")
    assert told["robust_accuracy"] is None
    assert all(row["accuracy"] is None for row in told["attacks"])
    page = html(found, "title").split("<table")[1].split("</table")[0]
    assert f"{found.accuracy(EPS[-1])[0]:.4g}" not in re.findall(r"<td>([^<]*)</td>", page)


def test_no_accuracy_is_shown_while_the_panel_is_half_done(found: Evaluation) -> None:
    half = replace(found, honesty=Honesty((), (), 80, 78, 0.1, "linf", np.nan, np.nan, 0, 0, complete=False))
    assert not half.complete
    assert "No robust accuracy is stated: the honesty panel has not been finished" in half.summary()
    whole = replace(half, honesty=replace(half.honesty, complete=True))  # type: ignore[type-var]
    assert whole.complete
    assert whole.frame()["accuracy"].iloc[-1] == whole.accuracy(EPS[-1])[0]
    assert f"{whole.accuracy(0.1)[0]:.1%} at eps 0.1" in whole.summary()


def test_a_single_eps_has_a_visible_interval_and_nearby_ones_a_bar_each(some: Net) -> None:
    done = Honesty((), (), 80, 78, 0.1, "linf", np.nan, np.nan, 0, 0, complete=True)
    one = replace(evaluate(some[0], some[1:], 0.1, attacks=ONE, panel=False), honesty=done)
    (band,) = one.figure().axes[0].collections
    assert np.ptp(band.get_paths()[0].vertices[:, 0]) == pytest.approx(0.1)
    at_eps = [y for x, y in band.get_paths()[0].vertices if x == 0.1]
    assert (min(at_eps), max(at_eps)) == pytest.approx(tuple(100 * v for v in one.accuracy(0.1)[1:]))
    two = evaluate(some[0], some[1:], 0.1, attacks=TWO, panel=False)
    first, second = two.figure().axes[1].patches  # one bar after the other
    assert (first.get_x(), first.get_width()) == (0, two.alone("one step", 0.1))
    assert (second.get_x(), second.get_width()) == (first.get_width(), two.alone("PGD", 0.1))
    near = evaluate(some[0], some[1:], [0.1, 0.1001], attacks=ONE, panel=False)
    assert len({bar.get_y() for bar in near.figure().axes[1].patches}) == 2
    with pytest.raises(InputError, match="norms are linf, l2"):
        evaluation_figure([one, replace(one, norm="l2")])


def test_nothing_is_left_to_attack_where_all_is_wrong_from_the_start(some: Net) -> None:
    net, x, _ = some
    with torch.no_grad():
        wrong = (net(x).argmax(1) + 1) % 10
    found = evaluate(net, (x[:10], wrong[:10]), EPS, attacks=TWO)
    assert found.complete
    assert found.accuracy(0.1)[0] == 0
    assert (found.outcome == NOT_ASKED).all()
    assert set(found.records()["broken by"]) == {"wrong from the start"}


@pytest.mark.parametrize(
    "eps", [np.float32(0.125), np.array([0.125, 0.25], np.float32), torch.tensor(0.125), torch.tensor([0.125])]
)
def test_radii_may_be_numbers_of_numpy_and_torch(some: Net, eps: Any) -> None:
    found = evaluate(some[0], some[1:], eps, attacks=ONE, panel=False)
    assert found.eps[0] == 0.125


@pytest.mark.parametrize("attacks", [[PGD(2)], PGD(2), {"PGD": 3}, {"PGD": PGD}])
def test_attacks_that_are_none_are_named(some: Net, attacks: Any) -> None:
    with pytest.raises(InputError, match="expected a name of standard, quick, search, or attacks by title"):
        evaluate(some[0], some[1:], 0.1, attacks=attacks, panel=False)


@pytest.mark.parametrize("budget", [float("nan"), "3", None, True])
def test_a_budget_that_is_no_number_is_named(some: Net, budget: Any) -> None:
    with pytest.raises(InputError, match="expected a number of seconds"):
        evaluate(some[0], some[1:], 0.1, attacks=ONE, panel=False, budget=budget)


def test_the_standard_suite_holds_autoattacks_four_with_its_settings() -> None:
    for norm, restarts in (("linf", 1), ("l2", 1), ("l1", 5)):
        chosen = suite("standard", norm, seed=3)  # type: ignore[arg-type]
        assert chosen["APGD-CE"] == APGD(100, loss="ce", restarts=restarts, seed=3)
        assert chosen["APGD-T"] == APGDT(100, loss="dlr", targets=9, seed=3)
        assert chosen["FAB-T"] == FABT(100, 1, 0.1, 1.05, 0.9, targets=9, seed=3)
        assert list(chosen)[-1] == ("FAB-T" if norm == "l1" else "Square")
    assert suite("standard", seed=3)["Square"] == Square(5000, 0.8, seed=3)


def test_the_suites_transfer_attack_goes_on_past_the_twins_boundary() -> None:
    attack = suite("standard", twin=nn.Linear(2, 2))["transfer"]
    assert isinstance(attack, Transfer)
    assert not attack.attack.early_stop


def test_a_file_of_another_attack_or_of_a_larger_ball_is_not_read(some: Net, tmp_path: Path) -> None:
    weak, strong = {"PGD": PGD(1, eta=0.01, random_start=False)}, {"PGD": PGD(10, random_start=False)}
    truth = _kept(some, tmp_path / "strong", attacks=strong)
    _kept(some, tmp_path / "weak", attacks=weak)
    evaluate(some[0], some[1:], 0.3, attacks=strong, panel=False, root=tmp_path / "large")
    (file,), (other,), (large,) = ((tmp_path / name).iterdir() for name in ("strong", "weak", "large"))
    whole = file.read_bytes()
    file.write_bytes(other.read_bytes())
    np.testing.assert_array_equal(_kept(some, tmp_path / "strong", attacks=strong).outcome, truth.outcome)
    file.write_bytes(whole)
    with np.load(large) as stored:
        _changed(file, **{name: stored[name] for name in stored.files if name != "key"})
    np.testing.assert_array_equal(_kept(some, tmp_path / "strong", attacks=strong).outcome, truth.outcome)


def test_the_panel_looks_at_the_radius_that_tells_most_and_at_the_same_nets(
    some: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def panel(net: Any, x: Tensor, y: Tensor, eps: float, **options: Any) -> Iterator[Update]:
        asked.update(options, net=net, x=x, eps=eps)
        yield Update(1.0, "", Honesty((), (), len(x), len(x), eps, "linf", np.nan, np.nan, 0, 0, complete=True))

    monkeypatch.setattr(importlib.import_module("qlab.attacks.honesty"), "examining", panel)
    found = evaluate(some[0], some[1:], [0.2, 0.01, 0.2, 0.4], attacks=ONE)
    assert found.eps == (0.01, 0.2, 0.4)
    assert found.accuracy(0.2)[0] < found.clean.mean() / 2 < found.accuracy(0.01)[0]
    assert asked["eps"] == 0.2
    assert found.complete
    data = qlab.data.load("digits")
    net, twin = (qlab.build("mlp", data.input_shape, data.num_classes, hidden=[16], seed=i).eval() for i in (0, 1))
    evaluate(net, data, 0.1, attacks=ONE, samples=20, twin=twin, fast=net)
    raw = data.split("test", 20).x
    with torch.no_grad():
        seen = data.transform(raw)
        for name, plain in (("net", net), ("twin", twin), ("fast", net)):
            torch.testing.assert_close(asked[name](asked["x"]), plain(seen))


def test_the_range_of_a_data_set_is_its_own() -> None:
    digits, moons = qlab.data.load("digits"), qlab.data.load("two_moons")
    assert _range(digits, None, None) == (0.0, 1.0)
    assert _range(digits, -1.0, None) == (-1.0, 1.0)
    x = torch.cat([moons.split(part).x for part in ("train", "test")])
    least, most = float(x.min()), float(x.max())
    half = (most - least) / 2
    assert _range(moons, None, None) == pytest.approx((least - half, most + half))
    assert _range(moons, None, 9.0) == pytest.approx((least - half, 9.0))


def test_everything_that_a_finished_attack_depends_on_is_in_its_identity(
    some: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = some
    plain = (net, x, y, "linf", 0.0, 1.0, 0)
    moved = copy.deepcopy(net)
    moved[-1].bias.data[0] += 1e-6
    others = [
        (moved, *plain[1:]),
        (net, x * 0.5, *plain[2:]),
        (net, x, y.flip(0), *plain[3:]),
        (net, x, y, "l2", *plain[4:]),
        (*plain[:4], -1e-12, 1.0, 0),
        (*plain[:5], 2.0, 0),
        (*plain[:6], 1),
    ]
    found = [identity(*given) for given in (plain, *others)]  # type: ignore[arg-type]
    assert identity(*plain) == found[0]  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    found.append(identity(*plain))  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
