"""The microscope's numbers: the same as those of the functions they come from, part by part."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.signal import signal
from qlab.diagnose.vanishing import DTYPES, Vanishing, smallest, vanishing, vanishings
from qlab.diagnose.wake import wake
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize

BETAS = (0.01, 0.1, 1.0, 10.0)


def made(binary: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 40, bias=False), nn.BatchNorm1d(40, affine=False), nn.ReLU(), nn.Linear(40, 4, bias=False)
        )
    return quantize(net, weights=Sign, activations=Sign).eval() if binary else net.eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, made()(x).argmax(1)


@pytest.fixture(scope="module")
def found(batch: tuple[Tensor, Tensor]) -> Vanishing:
    return vanishing(made(), *batch, betas=BETAS)


def test_every_part_is_what_its_function_gives(found: Vanishing, batch: tuple[Tensor, Tensor]) -> None:
    net, (x, y) = made(), batch
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64), ("float16", torch.float16)):
        one = wake(net, x, y, BETAS, dtype=dtype)
        assert np.array_equal(found.wakes[name].gradient, one.gradient)
        assert np.array_equal(found.wakes[name].lost, one.lost)
    at_one = signal(net.double(), x.double(), y)
    assert found.smoothed is not None
    assert at_one.smoothed is not None
    assert np.allclose(found.smoothed.gradient[2], at_one.smoothed, rtol=1e-9)
    assert found.jacobian is not None
    assert found.jacobian.sources == found.names
    assert np.array_equal(found.layers.saturation, signal(made(), x, y).saturation, equal_nan=True)


def test_mean_field_starts_from_the_gradient_at_the_logits(found: Vanishing) -> None:
    for i, beta in enumerate(BETAS):
        expected = found.expected(beta)
        assert expected is not None
        assert expected[-1] == pytest.approx(np.median(found.wakes["float64"].gradient[i, -1]))
        assert expected[0] / expected[-1] == pytest.approx(found.predicted[0])  # type: ignore[index]


def test_the_nearest_beta_is_so_in_its_logarithm(found: Vanishing) -> None:
    assert [found.nearest(beta) for beta in (1e-9, 0.3, 0.4, 1.0, 4.0, 99.0)] == [0, 1, 2, 2, 3, 3]


def test_a_small_beta_and_float64_bring_back_what_float32_lost(found: Vanishing) -> None:
    lost = {name: w.lost[:, 0] for name, w in found.wakes.items()}
    assert lost["float16"][3] > lost["float32"][3] > lost["float64"][3] == 0
    assert lost["float16"][0] == 0
    assert np.all(np.diff(lost["float32"]) >= 0)  # a larger beta never brings one back


def test_regimes_are_those_of_signal(found: Vanishing, batch: tuple[Tensor, Tensor]) -> None:
    for i, beta in enumerate(BETAS):
        one = signal(made(), *batch, beta=beta, dtype=torch.float16)
        assert found.regimes("float16")[i] == pytest.approx(list(one.regimes.values()))
    assert np.allclose(found.regimes("float32").sum(1), 1)


def test_histograms_hold_every_example(found: Vanishing) -> None:
    edges, shares, wrong = found.gaps()
    assert float(shares.sum()) + wrong == pytest.approx(1)
    assert 10 ** edges[-1] == pytest.approx(found.wakes["float32"].gap.max())
    edges, shares = found.spectrum()
    assert found.jacobian is not None
    values = found.jacobian.values[0]
    assert float(shares.sum()) == pytest.approx((values > 0).mean())
    assert 10 ** edges[-1] == pytest.approx(values.max(), rel=1e-6)


def test_logarithms_are_of_quartiles_and_of_what_mean_field_expects(found: Vanishing) -> None:
    w = found.wakes["float16"]
    logs = w.log_quartiles()
    assert logs.shape == (3, len(BETAS), len(found.names))
    middle = np.median(w.gradient, axis=2)
    assert (middle == 0).any()
    assert np.array_equal(10 ** logs[1], 10 ** np.where(middle > 0, np.log10(np.where(middle > 0, middle, 1)), -np.inf))
    expected = found.log_expected()
    assert expected is not None
    for i, beta in enumerate(BETAS):
        assert np.allclose(10 ** expected[i], found.expected(beta))


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_the_smallest_number_is_the_last_before_zero(name: str) -> None:
    dtype = DTYPES[name]
    x = torch.tensor(1.0, dtype=dtype)
    while x / 2 > 0:
        x = x / 2
    assert smallest(name) == pytest.approx(math.log10(float(x)), abs=1e-9)
    with pytest.raises(UnknownNameError):
        smallest("float8")


def test_a_dtype_that_is_too_small_for_the_net_is_named_and_the_others_stand(batch: tuple[Tensor, Tensor]) -> None:
    net = made(False)
    with torch.no_grad():
        net[3].weight.mul_(1e6)  # type: ignore[index]
    found = vanishing(net, *batch, betas=BETAS)
    assert set(found.wakes) == {"float32", "float64"}
    assert set(found.failed) == {"float16"}
    assert "No float16: the net's logits are not finite" in found.summary()


def test_results_come_part_by_part_and_every_part_can_be_shown(batch: tuple[Tensor, Tensor]) -> None:
    parts = list(vanishings(made(), *batch, betas=BETAS, dtypes=("float32", "bfloat16")))
    assert [p.fraction for p in parts] == sorted(p.fraction for p in parts)
    assert parts[0].value.jacobian is None
    for part in (parts[0].value, parts[-1].value):
        assert "exactly zero" in part.summary(0.1)
        assert str(part.figure(0.1).get_label()) == part.summary(0.1)
    assert len(parts[-1].value.frame()) == 3 * len(BETAS) * 5
    assert math.isclose(parts[-1].value.thresholds("bfloat16").wrong, 8 * math.log(2))


def test_a_float_net_has_nothing_to_smooth_and_one_without_a_prediction_says_why(batch: tuple[Tensor, Tensor]) -> None:
    found = vanishing(made(False), *batch, betas=BETAS, dtypes=("float32",), images=0)
    assert found.smoothed is None
    assert found.jacobian is None
    assert found.expected(1.0) is not None
    assert "exact)" in found.summary()
    odd = nn.Sequential(nn.Linear(6, 4), nn.GELU()).eval()
    found = vanishing(odd, *batch, betas=BETAS, dtypes=("float32",), images=0)
    assert found.expected(1.0) is None
    assert "GELU" in found.summary()


def test_what_makes_no_sense_is_refused(found: Vanishing, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UnknownNameError, match="dtype"):
        vanishing(made(), *batch, dtypes=("float8",))
    with pytest.raises(InputError, match="at least one dtype"):
        vanishing(made(), *batch, dtypes=())
    with pytest.raises(UnknownNameError, match="computed"):
        found.summary(1.0, "bfloat16")
    with pytest.raises(InputError, match="beta"):
        found.summary(-1.0)
    with pytest.raises(InputError, match="training mode"):
        vanishing(made().train(), *batch)
