"""Schedules of many methods on one time axis, and the figures of the cockpit."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.cockpit import LR, Curve, compare, schedules, smoothed
from qlab.errors import InputError, UnknownNameError
from qlab.methods import CATALOG, create
from qlab.plots.cockpit import telemetry_figure
from qlab.steering import steer
from tests.methods.conftest import small_net


def test_every_method_of_the_catalog_is_there_with_its_own_values() -> None:
    found = schedules(points=11)
    assert set(found.methods) | set(found.left_out) == set(CATALOG)
    assert not set(found.methods) & set(found.left_out)
    for name in found.methods:
        method = create(name, small_net())
        curves = {c.quantity: c for c in found.curves if c.method == name}
        assert set(curves) == {*method.schedule(0.0), LR}
        for k, p in enumerate(np.linspace(0, 1, 11)):
            assert curves[LR].values[k] == method.lr_factor(float(p))
            for quantity, value in method.schedule(float(p)).items():
                assert curves[quantity].values[k] == value


def test_options_reach_the_method() -> None:
    found = schedules(["adaste"], {"adaste": {"alpha": 0.5, "mu": 0.1}})
    mu = next(c for c in found.curves if c.quantity == "mu")
    assert mu.high == 2.0  # capped at 1 / alpha


def test_a_curve_is_normalised_to_its_own_range() -> None:
    linear = Curve("m", "q", np.array([2.0, 4.0, 6.0]))
    assert linear.normalised.tolist() == [0.0, 0.5, 1.0]
    assert not linear.log
    wide = Curve("m", "q", np.array([0.01, 1.0, 100.0]))
    assert wide.log
    assert wide.normalised == pytest.approx([0.0, 0.5, 1.0])
    falling = Curve("m", "q", np.array([3.0, 0.0]))
    assert falling.normalised.tolist() == [1.0, 0.0]
    assert "from 3 to 0" in falling.summary()
    constant = Curve("m", "q", np.full(3, 7.0))
    assert constant.normalised.tolist() == [0.5] * 3
    assert constant.summary() == "q stays at 7"
    endless = Curve("m", "q", np.array([1.0, 2.0, np.inf]))
    assert endless.normalised.tolist() == [0.0, 1.0, 1.0]
    hump = Curve("m", "q", np.array([1.0, 3.0, 1.0]))
    assert "between 1 and 3" in hump.summary()


def test_equal_learning_rates_stand_together() -> None:
    found = schedules(["ste", "full_precision", "binary_connect"])
    assert set(found.rates()) == {("ste", "full_precision"), ("binary_connect",)}


def test_frame_figure_and_summary_have_the_numbers() -> None:
    found = schedules(["adaste", "ste"], points=5)
    frame = found.frame()
    assert len(frame) == 5 * 3
    assert frame["normalised"].between(0, 1).all()
    words = found.summary()
    assert "mu goes from 0.0105 to 100" in words
    assert "ste: nothing but the learning rate" in words
    assert found.figure().get_label() == words


def test_what_cannot_be_asked_for_is_told() -> None:
    with pytest.raises(UnknownNameError):
        schedules(["nothing"])
    with pytest.raises(InputError, match="names of methods"):
        schedules("adaste")
    with pytest.raises(InputError, match="names of methods"):
        schedules([])
    with pytest.raises(InputError, match="points"):
        schedules(["ste"], points=1)
    with pytest.raises(InputError, match="not asked for"):
        schedules(["ste"], {"adaste": {}})
    with pytest.raises(UnknownNameError):
        schedules(["adaste"], {"adaste": {"speed": 3}})


def test_the_running_mean_is_that_of_the_last_values_and_passes_over_gaps() -> None:
    values = np.array([np.nan, 1.0, 2.0, 6.0, np.nan, 4.0])
    assert smoothed(values, 3)[1:] == pytest.approx([1.0, 1.5, 3.0, 4.0, 5.0])
    assert np.isnan(smoothed(values, 3)[0])


def test_two_runs_are_compared_at_the_last_step_that_both_have() -> None:
    run = steer("mirror_descent", epochs=4)
    run.advance()
    frozen = run.branch(18, frozen=True)
    frozen.advance(9)
    found = compare(run.telemetry(), frozen.telemetry())
    a, b = (t.values["residual"][27] for t in (run.telemetry(), frozen.telemetry()))
    assert (found.measure, found.step, found.a, found.b) == ("residual", 27, a, b)
    assert b > a
    assert found.verdict == ("larger" if b > 1.25 * a else "equal")
    same = compare(run.telemetry(), run.telemetry())
    assert (same.step, same.verdict) == (36, "equal")


def test_runs_whose_forward_weights_are_deployed_are_compared_by_their_flips_and_float_ones_by_their_loss() -> None:
    for name, measure in (("ste", "flips"), ("full_precision", "loss")):
        run = steer(name, epochs=2)
        values = run.advance().values
        found = compare(run.telemetry(), run.branch(9).telemetry())
        assert (found.measure, found.step) == (measure, 9)
        assert found.a == pytest.approx(values[measure][8:10].mean())  # the last quarter
        assert found.verdict == "equal"
        assert f"{found.a:.2g}" in found.summary()


def test_runs_are_drawn_over_one_another_before_and_after_training() -> None:
    run = steer("adaste", epochs=2)
    assert "nothing trained yet" in run.telemetry().summary()
    assert run.telemetry().figure().get_label()
    run.advance()
    other = run.branch(9, frozen=True)
    other.advance(9)
    figure = telemetry_figure({"as planned": run.telemetry(), "frozen": other.telemetry()})
    assert "branched off at step 9" in figure.get_label()
    assert len(run.telemetry().frame()) == 19
    with pytest.raises(InputError):
        telemetry_figure({})


def test_a_run_of_a_few_steps_has_its_numbers_in_words_and_picture() -> None:
    run = steer("ste", epochs=2)
    told = run.advance(1)
    flips = told.values["flips"][1]  # of the row before any step there are none
    assert f"{100 * flips:.2g} % of the weights flip a step" in told.summary()
    figure = told.figure()
    assert not [text for axes in figure.axes for text in axes.texts]
    assert "nothing trained yet" in [t.get_text() for t in steer("ste", epochs=2).telemetry().figure().axes[1].texts]
    floats = steer("full_precision", epochs=2).advance(1).figure()
    assert [t.get_text() for t in floats.axes[1].texts] == ["no quantized weights"]
