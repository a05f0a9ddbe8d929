"""Temperature curves that grow: in the end they are those of `temperature`, whatever came first."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.pgd import PGD
from qlab.attacks.temperature import temperature
from qlab.attacks.temperature_sweep import FEW, Louder, Sweep, sweep, sweeping
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job
from qlab.quantizers import Sign, quantize

BETAS = tuple(float(b) for b in np.logspace(-2, 1, 13))
SETTINGS = {"eps": 0.2, "attack": PGD(steps=3)}


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 40, bias=False), nn.ReLU(), nn.Linear(40, 3, bias=False))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 1, generator=torch.Generator().manual_seed(i))
    net = quantize(net, weights=Sign, activations=Sign).eval()
    x = torch.rand(25, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def test_in_the_end_it_is_what_temperature_finds(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    got = sweep(*setting, BETAS, dtypes=("float32", "float64"), **SETTINGS)
    whole = temperature(*setting, BETAS, dtypes=("float32", "float64"), **SETTINGS)
    assert list(got.found.dtypes) == ["float32", "float64"]
    for name, w in whole.dtypes.items():
        assert got.finished(name)
        assert np.array_equal(got.found.dtypes[name].accuracy, w.accuracy)
        assert got.found.dtypes[name].rules == w.rules
        assert np.array_equal(got.found.dtypes[name].gradient, w.gradient)
    assert got.found.summary() == whole.summary()


def test_a_few_examples_come_first_and_coarse_betas_with_beta_1_before_the_others(
    setting: tuple[nn.Module, Tensor, Tensor],
) -> None:
    updates = list(sweeping(*setting, BETAS, dtypes=("float32", "float64"), **SETTINGS))
    values = [u.value for u in updates]
    assert len(values[0].found.labels) == FEW
    assert all(len(v.found.labels) == 25 for v in values[1:])
    counts = [int(np.isfinite(v.found.dtypes["float32"].accuracy).sum()) for v in values]
    coarse = next(v for v, n in zip(values, counts, strict=True) if n == 4)
    known = np.isfinite(coarse.found.dtypes["float32"].accuracy)
    assert known.nonzero()[0].tolist() == [0, 5, 8, 10]
    assert BETAS[8] == pytest.approx(1)
    assert counts == sorted(counts)
    assert [v.finished("float32") for v in values].index(True) < [list(v.found.dtypes) for v in values].index(
        ["float32", "float64"]
    )
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert not values[0].finished("float32")
    assert not values[0].finished("float16")


def test_a_factor_changes_no_decision_shifts_the_curves_and_leaves_the_rules_attacks(
    setting: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, x, y = setting
    net, x = copy.deepcopy(net).double(), x.double()
    betas = (1 / 64, 1 / 8, 1.0, 8.0)  # powers of two: nothing is rounded, so equal is equal
    one = sweep(net, x, y, betas, dtypes=("float64",), **SETTINGS).found
    ten = sweep(net, x, y, betas, dtypes=("float64",), c=8.0, **SETTINGS).found
    assert np.array_equal(one.logits.argmax(1), ten.logits.argmax(1))
    assert np.array_equal(ten.logits, 8 * one.logits)
    assert np.array_equal(ten.dtypes["float64"].psi[:-1], one.dtypes["float64"].psi[1:])
    assert np.array_equal(ten.dtypes["float64"].accuracy[:-1], one.dtypes["float64"].accuracy[1:])
    assert ten.h[:-1] == pytest.approx(one.h[1:], rel=1e-12)
    assert ten.beta1 == pytest.approx(one.beta1 / 8, rel=1e-12)
    assert ten.dtypes["float64"].rules == one.dtypes["float64"].rules


def test_a_dtype_that_the_net_does_not_run_in_is_told_and_the_others_go_on(
    setting: tuple[nn.Module, Tensor, Tensor],
) -> None:
    for order in (("float16", "float32"), ("float32", "float16")):
        got = sweep(*setting, (0.1, 1.0), dtypes=order, c=1e6, **SETTINGS)
        assert list(got.found.dtypes) == ["float32"]
        assert "finite" in got.failed["float16"]
        assert got.finished("float32")
    with pytest.raises(InputError, match="finite"):
        sweep(*setting, (0.1, 1.0), dtypes=("float16",), c=1e6, **SETTINGS)


def test_stopped_work_leaves_a_result(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    def stop(job: Job) -> None:
        if job.value is not None and np.isfinite(job.value.found.dtypes["float32"].accuracy).sum() == 2:
            job.cancel()

    job = Job(lambda: sweeping(*setting, BETAS, **SETTINGS), stop).start()
    assert job.wait(60)
    assert job.status == "cancelled"
    assert isinstance(job.value, Sweep)
    assert 2 <= np.isfinite(job.value.found.dtypes["float32"].accuracy).sum() < len(BETAS)
    assert "right at beta" in job.value.found.summary()


@pytest.mark.parametrize("stopped", [0, 1, 2, 5, 9, 18, 19, 25])
def test_work_goes_on_where_it_was_stopped(setting: tuple[nn.Module, Tensor, Tensor], stopped: int) -> None:
    settings = SETTINGS | {"dtypes": ("float32", "float64")}
    updates = list(sweeping(*setting, BETAS, **settings))
    whole, start = updates[-1].value, updates[stopped].value
    rest = list(sweeping(*setting, BETAS, start=start, **settings))
    for name in ("float32", "float64"):
        assert rest[-1].value.finished(name)
        assert np.array_equal(rest[-1].value.found.dtypes[name].accuracy, whole.found.dtypes[name].accuracy)
        assert rest[-1].value.found.dtypes[name].rules == whole.found.dtypes[name].rules
    assert len(rest) <= len(updates) - stopped + 4  # nothing is attacked twice, but for the rules


def test_what_makes_no_sense_is_refused(setting: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = setting
    for c in (0.0, -1.0, float("nan"), float("inf"), True, "3"):
        with pytest.raises(InputError, match="positive"):
            sweep(net, x, y, c=c, **SETTINGS)
    with pytest.raises(UnknownNameError):
        sweep(net, x, y, dtypes=("float8",), **SETTINGS)
    with pytest.raises(InputError):
        sweep(net, x, y, dtypes=(), **SETTINGS)
    with pytest.raises(InputError):
        sweep(net, x[:, :, :2], y, **SETTINGS)
    assert not Louder(net, 2.0).training
