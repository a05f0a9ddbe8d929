"""Steered runs: the bits of qlab.fit, moments that are gone back to, branches, held clocks."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.cockpit import distance, residual
from qlab.errors import InputError
from qlab.jobs import Job
from qlab.methods import create
from qlab.quantizers import Sign, Uniform, quantize, quantized_tensors
from qlab.steering import SteeredRun, steer
from qlab.stepping import Stepper
from tests.methods.conftest import moons, name, small_net, train  # noqa: F401  # name runs over the catalog

ANNEALED = next(n for n in ("mirror_descent", "adaste") if n in qlab.CATALOG)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_rows(a: SteeredRun, b: SteeredRun, upto: int | None = None) -> bool:
    left, right = a.telemetry().values, b.telemetry().values
    return left.keys() == right.keys() and all(
        np.array_equal(left[k][:upto], right[k][:upto], equal_nan=True) for k in left
    )


def small(which: str = ANNEALED, epochs: int = 4, **options: Any) -> SteeredRun:
    method = create(which, small_net(), seed=0, **options)
    return steer(method, moons(), epochs=epochs)


# ---- the bits of qlab.fit ---------------------------------------------------------------------------------------------


def test_a_training_taken_apart_has_the_bits_of_fit(name: str) -> None:  # noqa: F811
    run = train(name, epochs=2)
    steered = steer(create(name, small_net(), seed=0), moons(), epochs=2)
    for steps in (1, 4, 7, None):  # however it is cut into pieces
        steered.advance(steps)
    assert steered.step == run.method.steps
    assert same(bits(run.method), bits(steered.method))


def test_losses_and_learning_rates_are_those_that_fit_logs() -> None:
    from qlab.callbacks import AnnealLog

    run = train(ANNEALED, epochs=2, callbacks=[AnnealLog(every=1)], log_every_n_steps=1)
    steered = small(epochs=2)
    values = steered.advance().values
    logged = run.history.pivot_table(index="step", columns="metric", values="value").dropna(subset=["train/loss"])
    assert values["loss"][1:].astype(np.float32) == pytest.approx(logged["train/loss"].to_numpy(np.float32), rel=1e-6)
    quantity = steered.telemetry().quantities[0]
    assert values[quantity][1:] == pytest.approx(logged[f"quant/anneal/{quantity}"].to_numpy(), rel=1e-6)
    assert values["lr"][2:] == pytest.approx(logged["quant/anneal/lr"].to_numpy()[:-1])  # the log has the next step's


def test_a_run_by_name_is_that_of_the_parts() -> None:
    one, two = steer("ste", epochs=2), steer("ste", epochs=2)
    one.advance(9)
    two.advance(9)
    assert same(bits(one.method), bits(two.method))
    assert not same(bits(steer("ste", seed=1).method), bits(steer("ste").method))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    small("binary_connect", stochastic=True).advance(5)
    assert torch.equal(torch.get_rng_state(), before)


# ---- going back ---------------------------------------------------------------------------------------------------------


def test_going_back_and_training_on_gives_the_same_bits(name: str) -> None:  # noqa: F811
    run = steer(create(name, small_net(), seed=0), moons(), epochs=2, keep_every=4)
    run.advance(8)
    middle = bits(run.method)
    run.advance()
    end, rows = bits(run.method), run.telemetry().values
    run.rewind(8)
    assert same(bits(run.method), middle)
    assert run.step == 8
    assert len(run.telemetry().values["step"]) == 9
    run.advance()
    assert same(bits(run.method), end)
    again = run.telemetry().values
    assert all(np.array_equal(rows[k], again[k], equal_nan=True) for k in rows)


def test_going_back_within_an_epoch_and_to_the_start_gives_the_same_bits() -> None:
    run = steer(create("adaste", small_net(), seed=0), moons(), epochs=2, keep_every=5)
    run.advance()
    end = bits(run.method)
    for step in (10, 5, 0):
        run.rewind(step)
        run.advance()
        assert same(bits(run.method), end)


def test_going_back_undoes_what_was_set_since() -> None:
    run = small()
    run.advance(9)
    run.freeze()
    run.advance(9)
    run.rewind(9)
    assert not run.frozen
    run.advance(9)
    other = small()
    other.advance(18)
    assert same(bits(run.method), bits(other.method))


def test_a_step_that_was_not_kept_is_told_with_the_nearest() -> None:
    run = small()
    run.advance(12)
    assert run.kept == (0, 9)
    with pytest.raises(InputError, match=r"step 11 was not kept.*from 0 to 9.*nearest is 9"):
        run.rewind(11)
    with pytest.raises(InputError, match="was not kept"):
        run.branch(True)
    assert run.step == 12


# ---- holding the clock ----------------------------------------------------------------------------------------------------


def test_a_held_schedule_gives_every_step_the_same_quantities_and_learning_rate() -> None:
    run = small()
    run.advance(13)
    run.freeze()
    values = run.advance(20).values
    quantity = run.telemetry().quantities[0]
    for column in (quantity, "lr", "progress", "tick"):
        assert len(set(values[column][14:])) == 1
    assert values["progress"][14] == 13 / (4 * 9)
    assert len(set(values["loss"][14:])) == 20  # training goes on
    buffer = next(q for q in run.method.net.modules() if quantity in getattr(q, "_buffers", {}))
    assert float(buffer.get_buffer(quantity)) == pytest.approx(run.method.schedule(13 / 36)[quantity])


def test_a_held_step_is_the_step_of_the_plan_with_its_own_noise() -> None:
    """The second frozen step is written out: quantities and rate of tick 9, noise and batch of step 10."""
    run = small("binary_connect", stochastic=True)
    run.advance(9)
    run.freeze()
    run.advance(1)
    twin = Stepper(create("binary_connect", small_net(), seed=0, stochastic=True), moons(), 4)
    for _ in range(9):
        twin.step()
    rates = [group["lr"] for group in twin.optimizer.param_groups]
    twin.step()
    assert same(bits(run.method), bits(twin.method))  # the first frozen step is still that of the plan
    run.advance(1)
    x, y = twin.next_batch()
    for group, lr in zip(twin.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    twin.method.begin_step(36)
    twin.method.anneal(9 / 36)
    twin.optimizer.zero_grad()
    twin.method.objective(x, y).backward()
    twin.optimizer.step()
    twin.method.end_step()
    assert same(bits(run.method), bits(twin.method))


def test_a_released_schedule_goes_on_from_where_it_was_held() -> None:
    run = small()
    run.advance(9)
    run.freeze()
    run.advance(5)
    run.release()
    values = run.advance().values
    ticks = values["tick"][1:].astype(int).tolist()
    assert ticks == [*range(9), *[9] * 5, *range(9, 36)]
    assert run.step == 36 + 5
    assert run.progress == 1.0


def test_a_held_run_has_no_end_of_its_own() -> None:
    run = small()
    run.freeze()
    with pytest.raises(InputError, match="say how many steps"):
        run.advance()


# ---- branches -------------------------------------------------------------------------------------------------------------


def test_a_branch_shares_the_past_and_without_changes_the_future(name: str) -> None:  # noqa: F811
    run = steer(create(name, small_net(), seed=0), moons(), epochs=2)
    run.advance(14)
    before = bits(run.method)
    branch = run.branch(9)
    assert same_rows(run, branch, 10)
    assert branch.step == 9
    branch.advance(5)
    assert same(bits(branch.method), before)
    assert same_rows(run, branch)
    branch.advance()
    assert same(bits(run.method), before)  # the parent stays
    run.advance()
    assert same(bits(run.method), bits(branch.method))


@pytest.mark.parametrize("change", [{"frozen": True}, {"speed": 2.0}, {"lr": 0.3}])
def test_a_branch_with_changes_parts_after_its_beginning(change: dict[str, Any]) -> None:
    run = small()
    run.advance(27)
    branch = run.branch(9, **change)
    branch.advance(18)
    assert same_rows(run, branch, 10)
    assert not same(bits(run.method), bits(branch.method))
    assert branch.telemetry().branched == 9
    branch.rewind(9)  # to its beginning, as it was set
    branch.advance(18)
    twin = run.branch(9, **change)
    twin.advance(18)
    assert same(bits(twin.method), bits(branch.method))


def test_a_slower_or_faster_clock_passes_through_the_values_of_the_plan() -> None:
    plan = small()
    quantity = plan.telemetry().quantities[0]
    planned = plan.advance().values
    run = small()
    slow, fast = run.branch(speed=0.5), run.branch(speed=2.0)
    for branch, ticks in ((slow, np.arange(72) // 2), (fast, np.arange(18) * 2)):
        values = branch.advance().values
        assert values["tick"][1:].astype(int).tolist() == ticks.tolist()
        for column in (quantity, "lr"):
            assert np.array_equal(values[column][1:], planned[column][1:][ticks]), column


def test_a_branch_scales_every_learning_rate_for_the_rest_of_the_plan() -> None:
    run = small("binary_connect")
    run.advance(9)
    branch = run.branch(lr=0.25)
    assert branch.advance().values["lr"][10:] == pytest.approx(0.25 * run.advance().values["lr"][10:])
    mine, theirs = branch._stepper.optimizer.param_groups, run._stepper.optimizer.param_groups
    assert [g["lr"] for g in mine] == pytest.approx([0.25 * g["lr"] for g in theirs])


# ---- what is measured -------------------------------------------------------------------------------------------------------


def test_residual_and_distance_against_numbers_by_hand() -> None:
    net = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-2.5, 0.25, 1.0]]))
    tensors = list(quantized_tensors(quantize(net, Sign)))
    assert residual(tensors) == 0.0
    assert distance(tensors) == pytest.approx((1.5 + 0.75 + 0.0) / 3)
    grid = list(quantized_tensors(quantize(net, lambda: Uniform(3, limit=1.0))))
    levels = grid[0].quantizer.levels()
    assert levels is not None
    expected = np.mean([min(abs(w - float(v)) for v in levels) for w in (-2.5, 0.25, 1.0)])
    assert distance(grid) == pytest.approx(expected)
    assert np.isnan(residual([]))


def test_distance_is_in_the_units_of_the_latent_where_levels_have_a_scale() -> None:
    class Scaled(Sign):
        def scale(self, latent: Tensor) -> Tensor:
            return latent.abs().mean()

        def level(self, latent: Tensor) -> Tensor:
            return super().forward(latent)

        def hard(self, latent: Tensor) -> Tensor:
            return self.scale(latent) * self.level(latent)

    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, 3.0]]))
    tensors = list(quantized_tensors(quantize(net, Scaled)))
    assert distance(tensors) == pytest.approx(1.0)  # levels at -2 and 2
    assert residual(tensors) == pytest.approx((1 + 1) / 2)  # forward is the sign, deployed the scaled one


def test_residual_of_an_annealed_weight_is_that_of_its_forward_map() -> None:
    run = small()
    run.advance(9)
    tensors = [(t.quantizer, t.latent.detach()) for t in quantized_tensors(run.method.net)]
    gaps = torch.cat([(q(w) - q.hard(w)).abs().flatten() for q, w in tensors])
    assert run.telemetry().values["residual"][-1] == pytest.approx(float(gaps.double().mean()))


def test_flips_of_the_steps_are_those_that_a_bit_history_counts() -> None:
    from qlab.callbacks import BitHistory
    from qlab.diagnose.flips import flips

    bit_history = BitHistory()
    train("ste", epochs=2, callbacks=[bit_history])
    run = small("ste", epochs=2)
    found = flips(bit_history.history)
    values = run.advance().values
    assert values["flips"][1:] == pytest.approx(found.counts.sum(1) / sum(found.sizes))


def test_a_float_net_has_neither_residual_nor_flips() -> None:
    run = small("full_precision", epochs=1)
    telemetry = run.advance()
    for column in ("residual", "distance", "flips"):
        assert np.isnan(telemetry.values[column]).all()
    assert "right on" in telemetry.summary()
    assert telemetry.figure().get_label()


def test_accuracy_is_that_of_the_deployed_net_at_the_moment() -> None:
    run = small()
    values = run.advance(9).values
    test = moons().split("test")
    right = (run.deployed(moons().transform(test.x)).argmax(1) == test.y).double().mean()
    assert values["accuracy"][9] == float(right)
    assert np.isnan(values["accuracy"][1:9]).all()


# ---- as a piece of work -----------------------------------------------------------------------------------------------------


def test_work_that_is_cancelled_can_be_gone_on_with() -> None:
    run = small()
    job = Job(lambda: run.advancing(every=0.0), lambda job: job.cancel() if run.step >= 5 else None)
    job.start().wait(60)
    assert job.status == "cancelled"
    stopped = run.step
    assert 5 <= stopped < 36
    assert job.value.values["step"][-1] == stopped
    run.advance()
    whole = small()
    whole.advance()
    assert same(bits(run.method), bits(whole.method))


def test_a_run_is_not_steered_while_it_is_being_trained() -> None:
    run = small()
    work = run.advancing(5)
    next(iter(islice(work, 2, 3)))
    for steer_it in (run.freeze, run.release, lambda: run.rewind(0), run.branch, lambda: run.advance(1)):
        with pytest.raises(InputError, match="being trained just now"):
            steer_it()
    work.close()  # type: ignore[attr-defined]
    run.freeze()


# ---- what is refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_steered_is_refused_in_one_clear_error() -> None:
    dropping = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    with pytest.raises(InputError, match="without dropout"):
        steer("ste", net=dropping)
    with pytest.raises(InputError, match="go with the name of a method"):
        steer(create("ste", small_net()), net="mlp")
    begun = small("ste")
    begun.advance(2)
    with pytest.raises(InputError, match="has 2 steps behind it"):
        steer(begun.method)
    for epochs in (0, 1.5, True):
        with pytest.raises(InputError, match="epochs"):
            steer("ste", epochs=epochs)  # type: ignore[arg-type]
    run = small("ste")
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="steps"):
            run.advance(wrong)  # type: ignore[arg-type]
    for wrong in (0, 1000, float("nan"), True, "2"):
        with pytest.raises(InputError, match="ticks of the clock per step"):
            run.branch(speed=wrong)  # type: ignore[arg-type]
    for wrong in (0, -1, float("inf"), True):
        with pytest.raises(InputError, match="positive factor"):
            run.branch(lr=wrong)
    with pytest.raises(InputError, match="keep_every"):
        steer("ste", keep_every=0)


def test_a_loss_that_is_not_finite_is_told_and_not_trained_on() -> None:
    net = qlab.build("mlp", (2,), 2, hidden=(8,), norm=False, seed=0)
    run = steer("full_precision", net=net, options={"lr": 1e30, "optimizer": "sgd"})
    with pytest.raises(InputError, match="NaN or infinite"):
        run.advance(200)
