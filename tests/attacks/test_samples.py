"""What is told of single examples of an evaluation, against the net and the evaluation's own records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks import FGSM, PGD
from qlab.attacks.evaluation import Evaluation
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.robustness_examples import NETS, preparing
from qlab.attacks.samples import samples
from qlab.attacks.suite import evaluate, evaluating
from qlab.errors import InputError

EPS = (0.05, 0.1, 0.3)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 0.6, generator=torch.Generator().manual_seed(i))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Examples of which the last two are labelled wrong."""
    x = torch.rand(30, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[28:] = (y[28:] + 1) % 3
    return x, y


@pytest.fixture(scope="module")
def found(net: nn.Module, data: tuple[Tensor, Tensor]) -> Evaluation:
    attacks = {"random": RandomSearch(5), "FGSM": FGSM(), "PGD": PGD(20)}
    return evaluate(net, data, EPS, attacks=attacks, panel=False)


def gap(net: nn.Module, x: Tensor, label: int) -> float:
    z = net(x[None])[0]
    return float(max(z[i] for i in range(len(z)) if i != label) - z[label])


def test_classes_and_margins_are_those_of_the_net_at_the_points_found(net: nn.Module, found: Evaluation) -> None:
    index = [3, 28, 0]
    s = samples(net, found, index)
    for i, n in enumerate(index):
        label = int(found.y[n])
        assert s.said[i] == int(net(found.x[n][None]).argmax())
        assert s.margin[i] == pytest.approx(gap(net, found.x[n], label), abs=1e-12)
        for e in range(len(EPS)):
            assert s.worst_margin[e, i] == pytest.approx(gap(net, found.worst[e, n], label), abs=1e-12)
            assert s.worst_said[e, i] == int(net(found.worst[e, n][None]).argmax())


def test_who_broke_an_example_agrees_with_the_records_of_the_evaluation(net: nn.Module, found: Evaluation) -> None:
    s, table = samples(net, found), found.records()
    by, first = s.broken_by, s.first_broken()
    assert {*by.ravel()} >= {"FGSM", "wrong from the start"}
    for e, eps in enumerate(EPS):
        records = table[table["eps"] == eps]
        for n, record in enumerate(records.to_dict("records")):
            if record["broken by"] == "a smaller eps":
                assert by[e, n] == by[e - 1, n] != ""
                assert 0 <= first[n] < e
            else:
                assert by[e, n] == record["broken by"]
                assert (first[n] == e) == (record["broken by"] not in ("", "wrong from the start"))
    assert (first[~found.clean] == -1).all()


def test_an_example_is_told_with_what_broke_it_where_and_by_how_much(net: nn.Module, found: Evaluation) -> None:
    s = samples(net, found)
    n = int(np.flatnonzero(s.first_broken() >= 0)[0])
    e = s.first_broken()[n]
    told = s.story(n)
    assert f"{s.broken_by[e, n]} broke it first, at eps {EPS[e]}" in told
    assert f"distance {found.distance[e, n]:.4g}" in told
    assert f"says {s.worst_said[e, n]}, margin {s.worst_margin[e, n]:.4g}" in told
    assert "wrong from the start" in s.story(29)
    held = [i for i in range(30) if found.clean[i] and s.first_broken()[i] < 0]
    assert held
    for i in held:
        assert f"largest margin found {s.worst_margin[-1, i]:.4g}" in s.story(i)


def test_nothing_is_told_of_attacks_before_one_has_run(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    start = next(evaluating(net, data, EPS, attacks={"FGSM": FGSM()})).value
    s = samples(net, start, [0])
    assert s.story(0).endswith("No attack has run yet.")
    assert (s.worst_margin == s.margin).all()


def test_the_frame_has_a_row_for_each_example_and_radius_and_the_summary_counts_them(
    net: nn.Module, found: Evaluation
) -> None:
    s = samples(net, found, [0, 29])
    frame = s.frame()
    assert frame[["example", "eps"]].to_numpy().tolist() == [[n, eps] for n in (0, 29) for eps in EPS]
    assert frame["robust"].tolist() == [not np.isfinite(found.distance[e, n]) for n in (0, 29) for e in range(3)]
    counts = [int((s.first_broken() == e).sum()) for e in range(3)]
    assert "2 examples, 1 wrong from the start" in s.summary()
    assert all(f"{count} at eps {eps}" in s.summary() for count, eps in zip(counts, EPS, strict=True))
    assert s.figure().get_label()


@pytest.mark.parametrize("index", [[], [30], [-1], [True]])
def test_an_example_that_there_is_not_is_told(net: nn.Module, found: Evaluation, index: list[int]) -> None:
    with pytest.raises(InputError, match="0 to 29"):
        samples(net, found, index)


def test_the_binary_net_of_the_lab_only_looks_robust_to_plain_pgd() -> None:
    pairs = [update.value for update in preparing(60) if update.value is not None]
    assert [list(p.nets) for p in pairs] == [[], ["float"], list(NETS)]
    nets, x, y = pairs[-1].nets, pairs[-1].x, pairs[-1].y
    left = {name: PGD(20)(net, x, y, 0.1).accuracy for name, net in nets.items()}
    assert left["binary"] > left["float"]  # by plain PGD the binary net is the robust one
    searched = evaluate(nets["binary"], (x, y), 0.1, attacks="quick", panel=False).robust(0.1).mean()
    assert searched < left["float"] - 0.1
    again = preparing(60)
    *_, last = again
    assert all(
        torch.equal(a, b)
        for a, b in zip(last.value.nets["float"].parameters(), nets["float"].parameters(), strict=True)
    )
