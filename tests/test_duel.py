"""Two methods in lockstep: the same batches, each with the bits of its own training, and what differs counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import qlab
from qlab.duel import Duel, duel, dueling, p_value
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job
from qlab.methods import create
from qlab.quantizers import layers
from qlab.stepping import Stepper
from tests.methods.conftest import moons, small_net


@pytest.fixture(scope="module")
def fought() -> Duel:
    return duel("adaste", "ste", epochs=3, grid=21)


def made(name: str, **options: Any) -> Any:
    return create(name, small_net(), seed=0, **options)


def test_each_side_has_the_bits_of_its_own_training() -> None:
    a, b = made("adaste"), made("binary_connect", stochastic=True)
    duel(a, b, moons(), epochs=2)
    for mine, options in ((a, {}), (b, {"stochastic": True})):
        alone = qlab.fit(made(mine.info.name, **options), moons(), epochs=2, progress=False)
        theirs = alone.method.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.state_dict().items() if isinstance(v, torch.Tensor))


def test_both_see_the_same_batches_and_the_same_start() -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def spied(name: str) -> Any:
        method = made(name)
        kept = seen.setdefault(name, [])
        objective = method.objective
        vars(method)["objective"] = lambda x, y: (kept.append(x), objective(x, y))[1]
        return method

    duel(spied("ste"), spied("full_precision"), moons(), epochs=2)
    assert len(seen["ste"]) == 18
    assert all(torch.equal(x, y) for x, y in zip(seen["ste"], seen["full_precision"], strict=True))
    by_name = duel("ste", "full_precision", epochs=1, every=100)
    assert by_name.apart[0] == 0.0  # the sign net deploys the signs of the float net
    assert by_name.loss[0, 0] != by_name.loss[0, 1]


def test_a_method_against_itself_is_a_draw() -> None:
    d = duel("binary_connect", "binary_connect", epochs=2)
    assert np.array_equal(d.loss[:, 0], d.loss[:, 1])
    assert not d.differ.any()
    assert not d.disagree.any()
    assert d.p_value == 1.0
    assert d.plane is not None
    assert d.plane.disagree == 0.0
    assert "neither is better" in d.summary()


def test_identity_within_the_clamp_is_the_clipped_estimator() -> None:
    d = duel("ste", "ste", options_a={"surrogate": "identity"}, epochs=3)
    assert np.array_equal(d.loss[:, 0], d.loss[:, 1])


def test_what_differs_is_counted_as_by_hand() -> None:
    a, b = made("adaste"), made("ste")
    d = duel(a, b, moons(), epochs=2)
    nets = [m.deployed(moons().calibration(8)) for m in (a, b)]
    for i, name in enumerate(d.layers):
        one, two = (layers(net)[name].weight for net in nets)
        assert d.differ[-1, i] == pytest.approx(float((one.sign() != two.sign()).float().mean()))
        assert d.weights[i] == one.numel()
    assert d.apart[-1] == pytest.approx((d.differ[-1] * d.weights).sum() / d.weights.sum())
    test = moons().split("test", 2000)
    decided = torch.stack([net(moons().transform(test.x)).argmax(1) for net in nets], 1)
    assert np.array_equal(d.decisions, decided.numpy())
    assert d.disagree[-1] == float((decided[:, 0] != decided[:, 1]).double().mean())
    right = (decided == test.y[:, None]).numpy()
    assert d.accuracy[-1] == pytest.approx(right.mean(0))
    assert d.only_a == sum(r[0] and not r[1] for r in right)
    assert d.only_b == sum(r[1] and not r[0] for r in right)
    assert d.table.sum() == len(test.y)


def test_the_decisions_over_the_plane_are_those_of_the_deployed_nets() -> None:
    a, b = made("adaste"), made("ste")
    d = duel(a, b, moons(), epochs=2, grid=15)
    assert d.plane is not None
    net = b.deployed(moons().calibration(8))
    for i, j in ((0, 0), (3, 11), (14, 2)):  # row of v, column of u
        point = torch.tensor([[d.plane.u[j], d.plane.v[i]]], dtype=torch.float32)
        assert d.plane.b[i, j] == int(net(moons().transform(point)).argmax())
    assert d.plane.disagree == np.mean(d.plane.a != d.plane.b)


def test_data_that_are_no_plane_have_none() -> None:
    data = qlab.data.load("digits", subset=200, batch_size=100)
    d = duel("ste", "full_precision", data, epochs=1)
    assert d.plane is None
    assert d.figure().get_label() == d.summary()
    assert len(d.y) == data.num_samples("test")


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 11), (10, 12), (4, 8), (0, 0)])
def test_the_p_value_is_the_sum_over_outcomes_as_unlikely(k: int, n: int) -> None:
    chances = binom.pmf(np.arange(n + 1), n, 0.5)
    assert p_value(k, n - k) == pytest.approx(chances[chances <= chances[k] * (1 + 1e-9)].sum())


def test_frame_figure_and_summary_have_the_numbers(fought: Duel) -> None:
    frame = fought.frame()
    assert frame["step"].tolist() == fought.at.tolist()
    assert fought.at[0] == 0
    assert fought.at[-1] == fought.total == len(fought.loss) == 27
    assert frame["loss_adaste_a"].iloc[-1] == pytest.approx(fought.loss[fought.at[-2] :, 0].mean())
    assert f"{100 * fought.apart[-1]:.1f} % have another sign" in fought.summary()
    assert fought.figure().get_label() == fought.summary()


def test_a_duel_that_is_stopped_compares_what_there_is() -> None:
    job = Job(lambda: dueling("ste", "adaste", epochs=20), lambda job: job.cancel() if job.fraction > 0.1 else None)
    job.start().wait(60)
    assert job.status == "cancelled"
    d = job.value
    assert 0 < len(d.loss) < d.total
    assert d.at[-1] == len(d.loss)
    whole = duel("ste", "adaste", epochs=20)
    assert np.array_equal(whole.loss[: len(d.loss)], d.loss)


def test_the_first_update_comes_before_any_training() -> None:
    first = next(iter(dueling("ste", "adaste", epochs=1)))
    assert len(first.value.loss) == 0
    assert first.value.figure().get_label()
    assert first.value.frame()["step"].tolist() == [0]


def test_what_cannot_fight_is_told() -> None:
    with pytest.raises(UnknownNameError):
        duel("ste", "nothing")
    with pytest.raises(UnknownNameError):
        duel("ste", "adaste", options_b={"speed": 3})
    method = made("ste")
    with pytest.raises(InputError, match="same object"):
        duel(method, method, moons())
    with pytest.raises(InputError, match="no layer in common"):
        duel(made("ste"), create("ste", qlab.build("mlp", (2,), 2, hidden=(5,), final_norm=True)), moons(), epochs=1)
    for wrong in ({"grid": 1}, {"grid": True}, {"every": 0}, {"epochs": 0}):
        with pytest.raises(InputError):
            duel("ste", "adaste", **wrong)
    assert Stepper(made("ste"), moons(), 1).total == 9


def test_two_runs_of_one_method_are_told_apart_in_words() -> None:
    found = duel("ste", "ste", epochs=1, options_b={"lr": 0.5})
    assert "ste (A) against ste (B)" in found.summary()
    assert "only by ste (A)" in found.summary()
