"""Two moons: a net that learns, the same every time, and stops where it is told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlab.diagnose.moons import MoonsRun, moons, moons_data, moons_training
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign
from qlab.quantizers.surrogates import Surrogate


def test_a_binary_net_learns_the_moons_and_a_dead_surrogate_learns_less() -> None:
    good = moons("clipped", steps=150)
    dead = moons(Surrogate("dead", torch.zeros_like), steps=150)
    assert good.accuracies[-1] > 0.93
    assert good.losses[-1] < dead.losses[-1]
    assert good.accuracies[-1] > dead.accuracies[-1]


def test_the_same_seed_is_the_same_run_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    a, b = (moons("tanh", steps=20, seed=1) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(a.losses, b.losses)
    np.testing.assert_array_equal(a.decisions, b.decisions)


def test_updates_hold_the_run_so_far() -> None:
    runs = [u.value for u in moons_training("clipped", 25)]
    assert all(isinstance(run, MoonsRun) for run in runs)
    assert [run.steps[-1] for run in runs] == [0, 10, 20, 25]
    np.testing.assert_array_equal(runs[1].losses, runs[3].losses[:2])


def test_decisions_are_the_deployed_nets_scores_on_the_grid() -> None:
    run = moons("clipped", steps=20)
    x, y, x_test, y_test = moons_data()
    assert all(isinstance(m, Sign) for n, m in run.net.named_modules() if n in ("hidden.2", "hidden.5"))
    left, right, bottom, top = run.extent
    corner = torch.tensor([[left, bottom], [right, bottom], [left, top]], dtype=torch.float64)
    z = run.net(corner)
    expected = (z[:, 1] - z[:, 0]).detach().float()
    np.testing.assert_allclose([run.decisions[0, 0], run.decisions[0, -1], run.decisions[-1, 0]], expected, rtol=1e-5)
    assert run.accuracies[-1] == float((run.net(x_test).argmax(1) == y_test).double().mean())
    assert len(x) == len(y) == 512
    assert "step 20" in run.summary()
    assert run.figure().get_label() == run.summary()
    assert len(run.frame()) == 3


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(UnknownNameError, match="surrogate"):
        moons("nothing")
    with pytest.raises(InputError, match="steps is 0"):
        moons(steps=0)
