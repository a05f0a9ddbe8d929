"""Gradients over temperatures: against autograd example by example, closed forms, and what the attack itself finds."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.attacks.pgd import PGD
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.scaling import HNS, NJS, Fixed, njs_beta1
from qlab.attacks.temperature import REGIMES, Temperature, temperature, tempering
from qlab.attacks.victim import Victim
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job

BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)


class Times(nn.Module):
    def __init__(self, net: nn.Module, c: float) -> None:
        super().__init__()
        self.net, self.c = net, c
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c * self.net(x)


@pytest.fixture(scope="module")
def loud(digits_net) -> tuple[nn.Module, Tensor, Tensor]:
    """The digits net with logits so large that its softmax saturates, and 60 pictures."""
    net, x, y = digits_net
    return Times(net, 8.0), x[:60], y[:60]


@pytest.fixture(scope="module")
def found(loud) -> Temperature:
    net, x, y = loud
    return temperature(net, x, y, BETAS, dtypes=("float32", "float64", "float16"), eps=0.15)


def test_norms_are_those_of_autograd_example_by_example(found, loud):
    net, x, y = loud
    w = found.dtypes["float32"]
    for k, beta in enumerate(BETAS):
        for n in (0, 7, 31):
            row = x[n : n + 1].clone().requires_grad_()
            z = net(row)
            (g,) = torch.autograd.grad(F.cross_entropy(beta * z, y[n : n + 1]), row)
            psi = torch.softmax(beta * z.detach().double(), -1)[0] - F.one_hot(y[n], 10)
            assert w.psi[k, n] == pytest.approx(float(psi.norm()), rel=1e-4, abs=1e-6)
            assert w.gradient[k, n] == pytest.approx(float(g.double().norm()), rel=1e-3, abs=1e-6)
            assert w.signs[k, n] == pytest.approx(float(g.sign().norm()) / 8, abs=0.02)
            assert (w.signs[k, n] == 0) == bool((g == 0).all())


def test_in_float64_the_gradient_is_beta_psi_j(found, loud):
    net, x, y = loud
    net64 = copy.deepcopy(net).double()
    for n in (0, 7, 31):
        J = torch.autograd.functional.jacobian(net64, x[n : n + 1].double())[0].reshape(10, -1)
        z = net64(x[n : n + 1].double())[0].detach()
        assert found.singular[n] == pytest.approx(torch.linalg.svdvals(J).numpy(), rel=1e-4)
        for k, beta in enumerate(BETAS):
            p = torch.softmax(beta * z, -1)
            psi = p - F.one_hot(y[n], 10)
            w = found.dtypes["float64"]
            assert w.gradient[k, n] == pytest.approx(float((beta * psi @ J).norm()), rel=1e-6, abs=1e-12)
            H = beta**2 * J.T @ (torch.diag(p) - p[:, None] * p) @ J
            assert found.h[k, n] == pytest.approx(float(H.norm()), rel=1e-3, abs=1e-9)


def test_the_jacobian_is_stretched_by_beta(found):
    assert found.spread == pytest.approx(np.array(BETAS) * found.singular.mean())
    assert found.beta1 * found.singular.mean() == pytest.approx(1, rel=1e-6)


def test_the_marks_are_the_betas_of_the_rules(found, loud):
    net, x, y = loud
    assert found.beta1 == pytest.approx(njs_beta1(net, x))
    z = net(x)
    assert found.njs == pytest.approx(NJS().factors(found.beta1, None, z.double(), y).numpy())
    assert found.hns == pytest.approx(HNS().start(None, Victim(net), x, y).numpy())


@pytest.mark.parametrize(("name", "kept", "wrong", "dead"), [("float32", 16, 17, 104), ("float64", 36, 38, 746)])
def test_regimes_begin_where_the_dtype_rounds(name, kept, wrong, dead):
    # The logits are the first two inputs, times 1, and so is the gap.
    net = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.9, 0.0]])
    w = temperature(net, x, torch.tensor([0, 0]), (1.0, kept, wrong, dead), dtypes=(name,)).dtypes[name]
    assert [REGIMES[i] for i in w.regime[:, 0]] == ["healthy", "healthy", "wrong direction", "dead"]
    assert w.underflow[:, 0].tolist() == [0, 0, 0.5, 1]
    assert w.signs[:, 0].tolist() == pytest.approx([1, 1, math.sqrt(0.5), 0])
    assert w.lost.tolist() == [0, 0, 0, 0.5]
    assert w.shares.sum(0).tolist() == [1, 1, 1, 1]


def test_shares_and_means_are_over_the_examples_that_are_right(found, loud):
    net, x, y = loud
    right = (net(x).argmax(1) == y).numpy()
    assert 0.8 < right.mean() < 1
    w = found.dtypes["float32"]
    assert np.array_equal(w.counted, right)
    assert w.mean(w.psi) == pytest.approx(w.psi[:, right].mean(1))
    assert found.clean == right.mean()
    assert (w.regime[:, ~right] == 0).all()  # the error signal of a mistake never vanishes
    assert w.shares[2, -1] > 0.5  # and that of the others does


def test_more_digits_lose_less_and_a_small_beta_loses_nothing(found):
    half, single, double = (found.dtypes[name].lost for name in ("float16", "float32", "float64"))
    assert (half >= single).all()
    assert (single >= double).all()
    assert half[3] > single[3] > double[3]
    assert half[0] == single[0] == double[0] == 0


def test_decisions_are_the_same_at_every_temperature(found):
    assert found.dtypes["float32"].same.all()
    assert found.dtypes["float64"].same.all()


def test_accuracies_are_those_of_the_attack(found, loud):
    net, x, y = loud
    w = found.dtypes["float32"]
    for k in (0, 2, 4):
        assert w.accuracy[k] == PGD(scaling=Fixed(BETAS[k]))(net, x, y, 0.15).accuracy
    assert w.rules == {
        "NJS": PGD(scaling=NJS())(net, x, y, 0.15).accuracy,
        "HNS": PGD(scaling=HNS())(net, x, y, 0.15).accuracy,
    }
    assert w.accuracy[-1] > w.accuracy[0] + 0.3  # the cliff: robust by rounding
    assert max(w.rules.values()) < w.accuracy[-1] - 0.3


def test_a_factor_on_the_logits_is_a_shift_of_the_curves(digits_net):
    net, x, y = digits_net
    net, x, y = copy.deepcopy(net).double(), x[:30].double(), y[:30]
    a = temperature(net, x, y, (0.1, 1.0, 10.0))
    b = temperature(Times(net, 0.1), x, y, (1.0, 10.0, 100.0))
    assert list(a.dtypes) == ["float64"]  # its own, once
    for name in ("psi", "gradient"):
        assert getattr(a.dtypes["float64"], name) == pytest.approx(
            getattr(b.dtypes["float64"], name), rel=1e-9, abs=1e-14
        )
    assert a.h == pytest.approx(b.h, rel=1e-9, abs=1e-14)
    assert a.njs == pytest.approx(b.njs / 10, rel=1e-9)


def test_a_dead_backward_rule_is_no_matter_of_temperature(digits_net):
    net, x, y = digits_net

    class Dead(Times):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).detach() + 0 * x.flatten(1)[:, :10]

    w = temperature(Dead(net, 1.0), x[:20], y[:20], (0.01, 1.0)).dtypes["float64"]
    assert w.lost.tolist() == [1, 1]
    assert (w.regime[0] == 0).all()


def test_a_net_without_any_gradient_is_looked_at_too(digits_net):
    net, x, y = digits_net

    class Cut(Times):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).detach()

    seen = temperature(Cut(net, 1.0), x[:20], y[:20], (0.01, 1.0))
    assert seen.dtypes["float32"].lost.tolist() == [1, 1]
    assert seen.beta1 == 1


def test_probabilities_of_an_example(found, loud):
    net, x, _ = loud
    z = net(x[4:5]).double()
    for k, beta in enumerate(BETAS):
        assert found.probabilities(4)[k] == pytest.approx(torch.softmax(beta * z, -1)[0].numpy(), abs=1e-6)
    assert found.nearest(3.0) == 2
    assert found.nearest(4.0) == 3


def test_results_grow_and_can_be_stopped(loud):
    net, x, y = loud
    updates = list(tempering(net, x[:10], y[:10], (0.1, 1.0), eps=0.1, attack=PGD(steps=2)))
    assert [len(u.value.dtypes) for u in updates] == [1] + [2] * 9
    assert [int(np.isfinite(u.value.dtypes["float32"].accuracy).sum()) for u in updates] == [
        0,
        0,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
        2,
    ]
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    job = Job(lambda: tempering(net, x[:10], y[:10], (0.1, 1.0)))
    assert job.start().result(30).attack == ""


def test_frame_figure_and_summary(found, loud):
    frame = found.frame()
    assert len(frame) == 3 * len(BETAS)
    row = frame[(frame["dtype"] == "float32") & (frame["beta"] == 1.0)].iloc[0]
    w = found.dtypes["float32"]
    assert row["accuracy"] == w.accuracy[2]
    assert row["lost"] == w.lost[2]
    assert row[list(REGIMES)].tolist() == pytest.approx(w.shares[:, 2])
    assert len(found.figure().axes) == 3
    net, x, y = loud
    plain = temperature(net, x[:10], y[:10], (1.0,))
    assert len(plain.figure().axes) == 2
    assert "PGD" in found.summary()
    assert f"{w.accuracy[2]:.1%}" in found.summary()
    assert "PGD" not in plain.summary()
    assert found.figure().get_label() == found.summary()


@pytest.mark.parametrize("betas", [(), (0.0, 1.0), (1.0, 0.5), (math.nan,), (1.0, math.inf)])
def test_betas_have_to_be_positive_and_to_rise(loud, betas):
    with pytest.raises(InputError, match="betas"):
        temperature(*loud, betas)


def test_what_makes_no_sense_is_said(loud):
    with pytest.raises(UnknownNameError, match="float8"):
        temperature(*loud, dtypes=("float8",))
    held = [loud[0]]  # out of reach of `.to`

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return held[0](x)

    with pytest.raises(InputError, match="does not run in float64"):
        temperature(Hidden().eval(), *loud[1:])
    with pytest.raises(InputError, match="dtype"):
        temperature(*loud, dtypes=())
    with pytest.raises(InputError, match="scaling"):
        temperature(*loud, eps=0.1, attack=RandomSearch())
