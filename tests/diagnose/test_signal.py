"""Signal propagation, against finite differences, plain autograd and what IEEE 754 says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.recording import record
from qlab.diagnose.signal import signal, thresholds
from qlab.diagnose.wake import wake
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize

Data = tuple[Tensor, Tensor]


def made(seed: int = 0, activation: type[nn.Module] = nn.Tanh, width: int = 12) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 4)
        ).double().eval()  # fmt: skip


def data(n: int = 16, seed: int = 1) -> Data:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g, dtype=torch.float64), torch.randint(0, 4, (n,), generator=g)


def binary(seed: int = 0) -> nn.Module:
    return quantize(made(seed), weights=Sign, activations=Sign).eval()


def gaps(values: list[float] | Tensor, dtype: torch.dtype, classes: int = 2, lonely: bool = False) -> Tensor:
    """Return logits (gap, 0, ..., 0), or with all but one competitor far below."""
    z = torch.zeros(len(values), classes, dtype=torch.float64)
    z[:, 0] = torch.as_tensor(values)
    if lonely:
        z[:, 2:] = -3e4
    return z.to(dtype)


LOGITS = nn.Sequential(nn.Identity()).eval()  # a net whose input is its logits: the input gradient is p - e_y
FIRST = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("dtype", "wrong", "zero"),
    [(torch.float64, 37, 746), (torch.float32, 17, 104), (torch.bfloat16, 6, 93), (torch.float16, 8, 18)],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_the_gradient_dies_where_the_floating_point_standard_says(
    dtype: torch.dtype, wrong: int, zero: int, classes: int
) -> None:
    first, second = thresholds(dtype)
    assert (math.ceil(first), math.ceil(second)) == (wrong, zero)
    grid = torch.arange(0.0, 800, 0.25, dtype=torch.float64)
    for lonely in (True, False):
        a = gaps(grid, dtype, classes, lonely).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(a, torch.zeros(len(a), dtype=torch.int64), reduction="sum"), a)
        held = a[:, 0].detach().double()  # a half holds some of the gaps only
        own = float(held[(g[:, 0] == 0)].min())
        whole = float(held[(g == 0).all(1)].min())
        step = max(0.25, float(torch.finfo(dtype).eps) * own)
        assert first - 1e-9 <= own <= thresholds(dtype, 2 if lonely else classes).wrong + step
        assert whole == pytest.approx(second, abs=0.5)


@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_a_mean_over_a_batch_lowers_the_second_threshold_by_its_logarithm(batch: int) -> None:
    for dtype in (torch.float32, torch.float64):
        expected = thresholds(dtype, 2, batch)
        assert expected.wrong == thresholds(dtype).wrong
        assert expected.zero == pytest.approx(thresholds(dtype).zero - math.log(batch))
        x = gaps([expected.zero - 0.3, expected.zero + 0.3], dtype)
        found = signal(LOGITS, x, FIRST[:2], batch=batch)
        assert (found.zeros[0] == 1).tolist() == [False, True]
        assert found.dtype == dtype
        assert found.regimes["zero"] == 0.5


def test_exactly_the_wrong_direction_is_left_between_the_thresholds() -> None:
    x = gaps([16, 18, 103, 105], torch.float32)
    found = signal(LOGITS, x, FIRST)
    assert found.certain.tolist() == [False, True, True, True]
    assert found.gap.tolist() == [16, 18, 103, 105]
    assert found.regimes == {"healthy": 0.25, "wrong direction": 0.5, "zero": 0.25}
    double = signal(LOGITS, x, FIRST, dtype=torch.float64)
    assert double.certain.tolist() == [False, False, True, True]
    assert double.regimes["zero"] == 0


def test_gradient_norms_are_those_of_finite_differences_in_a_float_net() -> None:
    net, (x, y) = made(), data()
    found = signal(net, x, y)
    assert found.names == ("input", "0", "1", "2", "3", "4", "5")
    assert all(found.exact)
    assert found.smoothed is None
    layers = list(net.children())  # type: ignore[arg-type]
    for l in (0, 3, 6):
        h = x
        for module in layers[:l]:
            h = module(h)
        assert np.allclose(found.activation[l], h.detach().norm(dim=1).numpy(), atol=1e-12)

        def tail(h: Tensor, l: int = l) -> Tensor:
            for module in layers[l:]:
                h = module(h)
            return F.cross_entropy(h, y, reduction="none")

        columns = []
        with torch.no_grad():
            for j in range(h.shape[1]):
                e = torch.zeros_like(h)
                e[:, j] = 1e-6
                columns.append((tail(h + e) - tail(h - e)) / 2e-6)
        assert np.allclose(found.gradient[l], torch.stack(columns, 1).norm(dim=1).numpy(), atol=1e-8)


def test_the_mean_over_a_batch_and_beta_scale_as_the_chain_rule_says() -> None:
    net, (x, y) = made(), data()
    one = signal(net, x, y)
    assert np.allclose(signal(net, x, y, batch=16).gradient * 16, one.gradient, rtol=1e-12)
    small = signal(net, x, y, beta=1e-6, loss="cross_entropy")
    uniform = torch.full((16, 4), 0.25, dtype=torch.float64) - F.one_hot(y, 4)
    assert np.allclose(small.gradient[-1] / 1e-6, uniform.norm(dim=1).numpy(), atol=1e-5)
    assert np.allclose(small.gap, 1e-6 * one.gap)


def test_wake_is_signal_at_every_beta() -> None:
    net, (x, y) = binary(), data()
    betas = [0.01, 1.0, 30.0]
    found = wake(net, x, y, betas)
    for i, beta in enumerate(betas):
        one = signal(net, x, y, beta=beta)
        assert found.names == one.names
        assert np.allclose(found.gradient[i], one.gradient, rtol=1e-12)
        assert np.allclose(found.lost[i], (one.zeros == 1).mean(1))
        assert found.certain[i] == one.certain.mean()
    assert len(found.frame()) == 3 * len(found.names)


def test_a_small_beta_wakes_up_a_saturated_net_and_float64_does_too() -> None:
    net, (x, _) = made(), data()
    with torch.no_grad():
        net[5].weight.mul_(3000)  # type: ignore[index]
        y = net(x).argmax(1)
    net, x = net.float(), x.float()
    found = wake(net, x, y, [1e-3, 1.0])
    assert found.lost[1, 0] > 0.5
    assert found.lost[0, 0] == 0
    assert found.certain[1] > 0.9
    assert signal(net, x, y, dtype=torch.float64).lost < found.lost[1, 0]
    assert found.best == 0


def test_straight_through_gradients_are_marked_and_the_smoothed_one_is_a_true_gradient() -> None:
    net, (x, y) = binary(), data()
    found = signal(net, x, y, k=2.0)
    signs = [i for i, kind in enumerate(found.kinds) if kind == "Sign"]
    assert not any(found.exact[: signs[-1]])
    assert all(found.exact[signs[-1] :])

    # The smoothed function, written out: deployed weights, tanh(k u) for sign(u).
    layers = dict(net.named_modules())
    with torch.no_grad():
        W = [layers[n].weight.clone() for n in ("0", "3", "5")]
        b = [layers[n].bias.clone() for n in ("0", "3", "5")]
        bn = layers["1"]

    def smooth(x: Tensor) -> Tensor:
        h = torch.tanh(2.0 * bn(x @ W[0].T + b[0]))
        h = torch.tanh(2.0 * (h @ W[1].T + b[1]))
        return F.cross_entropy(h @ W[2].T + b[2], y, reduction="none")

    assert found.smoothed is not None
    columns = []
    with torch.no_grad():
        for j in range(6):
            e = torch.zeros_like(x)
            e[:, j] = 1e-6
            columns.append((smooth(x + e) - smooth(x - e)) / 2e-6)
    norms = torch.stack(columns, 1).norm(dim=1).numpy()
    assert np.allclose(found.smoothed[0], norms, rtol=1e-5, atol=1e-8)
    # The back-propagated one is what backward() gives.
    probe = x.clone().requires_grad_()
    F.cross_entropy(net(probe), y, reduction="sum").backward()
    assert probe.grad is not None
    assert np.allclose(found.gradient[0], probe.grad.norm(dim=1).numpy(), rtol=1e-12)


def clipped_sign(u: Tensor) -> Tensor:
    c = u.clamp(-1, 1)
    return c + (torch.where(u >= 0, 1.0, -1.0).to(u.dtype) - c).detach()


class Handwritten(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return clipped_sign(u)


class Between(nn.Module):
    """A sign in functional code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(clipped_sign(self.b(torch.tanh(self.a(x)))))


def test_gradients_through_foreign_signs_are_not_called_exact() -> None:
    net, (x, y) = made(activation=Handwritten), data()
    found = signal(net, x, y)
    assert found.exact == (False,) * 5 + (True, True)  # the second sign is module 4
    assert found.smoothed is None
    assert "surrogate backward" in found.summary()
    torch.manual_seed(0)
    found = signal(Between().double().eval(), x, y)
    assert dict(zip(found.names, found.exact, strict=True)) == {"input": False, "a": False, "b": False, "c": True}
    mixed = nn.Sequential(nn.Linear(6, 8), Sign(), nn.Linear(8, 8), Handwritten(), nn.Linear(8, 4)).double().eval()
    assert signal(mixed, x, y).smoothed is None  # no function is known for one of the two


def test_weights_of_signs_alone_leave_activation_gradients_exact() -> None:
    x, y = data()
    found = signal(quantize(made(), weights=Sign).eval(), x, y)
    assert all(found.exact)
    assert found.smoothed is None


def test_saturation_counts_preactivations_beyond_one_and_degeneration_units_that_lean_to_one_side() -> None:
    net, (x, y) = binary(), data()
    with torch.no_grad():
        net[1].bias[:3] = 5  # type: ignore[index]
    found = signal(net, x, y)
    u = net[1](net[0](x))  # type: ignore[index]
    i = found.names.index("2")
    assert found.kinds[i] == "Sign"
    assert found.saturation[i] == pytest.approx(float((u.abs() > 1).double().mean()))
    assert found.degenerate[i] == pytest.approx(float((u.mean(0).abs() > u.std(0, correction=0)).double().mean()))
    assert 0 < found.degenerate[i] < 1
    assert math.isnan(found.saturation[1])
    assert math.isnan(found.degenerate[1])


def test_a_unit_is_degenerate_where_its_mean_exceeds_the_deviation_of_these_very_examples() -> None:
    # For u = (3, 0.2) the mean is 1.6 and the deviation 1.4, but 1.98 as an estimate for more examples than these.
    x = torch.tensor([[3.0, 3.0], [0.2, -0.2]], dtype=torch.float64)
    found = signal(nn.Sequential(Sign(), nn.Linear(2, 2)).double().eval(), x, torch.tensor([0, 1]))
    assert found.degenerate[1] == 0.5


def test_a_hardtanh_in_place_is_seen_before_it_writes_and_a_relu6_is_no_sign() -> None:
    x, y = data()
    net = nn.Sequential(nn.Linear(6, 12), nn.Hardtanh(inplace=True), nn.Linear(12, 4)).double().eval()
    u = net[0](3 * x)
    assert signal(net, 3 * x, y).saturation[2] == pytest.approx(float((u.abs() > 1).double().mean()))
    for other in (nn.ReLU6(), nn.Hardtanh(-2, 2)):
        found = signal(nn.Sequential(net[0], other, net[2]).eval(), 3 * x, y)
        assert np.isnan(found.saturation).all()


def test_dead_units_give_the_same_for_every_example_and_make_exact_zeros() -> None:
    net, (x, y) = made(activation=nn.ReLU), data()
    with torch.no_grad():
        net[3].bias[:3] = -1e3  # type: ignore[index]  # three ReLUs that never fire
    found = signal(net, x, y)
    i = found.names.index("4")
    h = net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[index]
    assert found.dead[i] == pytest.approx(float((h.amax(0) == h.amin(0)).double().mean()))
    assert found.dead[i] >= 3 / 12
    assert np.all(found.zeros[i - 1] >= 3 / 12)


def test_channels_are_units_of_a_convolution_and_inplace_modules_do_no_harm() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 16, 3)).double().eval()
        )
    with torch.no_grad():
        net[0].bias[0] = -1e3  # type: ignore[union-attr]
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(8) % 3
    found = signal(net, x, y)
    assert found.dead[found.names.index("1")] == 0.25
    plain = nn.Sequential(net[0], nn.ReLU(), net[2], net[3]).eval()
    other = signal(plain, x, y)
    assert np.allclose(found.gradient, other.gradient, rtol=1e-12)
    assert np.allclose(found.activation, other.activation, rtol=1e-12)


def test_a_module_that_runs_twice_is_recorded_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(torch.tanh(self.lin(x)))

    assert record(Twice().eval(), data()[0]).names == ("input", "lin", "lin#2")


def test_an_input_cut_off_from_the_logits_has_zero_gradients() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.detach())

    found = signal(Cut().eval(), *data())
    assert found.lost == 1
    assert np.all(found.gradient[-1] > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_run_on_a_copy(dtype: torch.dtype) -> None:
    net, (x, y) = binary(), data()
    found = signal(net, x, y, dtype=dtype)
    assert found.dtype == dtype
    assert next(net.parameters()).dtype == torch.float64
    assert str(dtype).removeprefix("torch.") in found.summary()


def test_results_can_be_read_drawn_and_repeated() -> None:
    net, (x, y) = binary(), data()
    found = signal(net, x, y)
    assert str(found.figure().get_label()) == found.summary()
    assert list(found.frame()["layer"]) == list(found.names)
    assert "surrogate backward" in found.summary()
    plain = signal(made(), x, y)
    assert np.allclose(plain.gain[:-1], np.median(plain.gradient[:-1] / plain.gradient[1:], axis=1))
    woken = wake(net, x, y, np.logspace(-2, 1, 5))
    assert str(woken.figure().get_label()) == woken.summary()
    assert np.array_equal(signal(net, x, y).gradient, found.gradient)


def test_nets_and_arguments_that_make_no_sense_are_refused() -> None:
    net, (x, y) = made(), data()
    with pytest.raises(InputError, match="training mode"):
        signal(made().train(), x, y)
    with pytest.raises(InputError, match="beta"):
        signal(net, x, y, beta=0)
    with pytest.raises(InputError, match="beta"):
        wake(net, x, y, [])
    with pytest.raises(InputError, match="batch"):
        signal(net, x, y, batch=0)
    with pytest.raises(InputError, match="floating"):
        signal(net, x, y, dtype=torch.int32)
    with pytest.raises(UnknownNameError):
        signal(net, x, y, loss="nobody")
    with pytest.raises(InputError, match="one logit"):
        signal(nn.Linear(6, 1).double().eval(), x, 0 * y)
    with torch.no_grad():
        net[5].weight.mul_(1e6)  # type: ignore[index]
    with pytest.raises(InputError, match="not finite in float16"):
        signal(net, x, y, dtype=torch.float16)
    with pytest.raises(InputError, match="classes"):
        thresholds(torch.float32, 1)
