"""Gradient mismatch: references against closed forms, honest nets against crooked ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qlab
from qlab.diagnose.agreement import agreement, cosine
from qlab.diagnose.coordinates import coordinate_cosine
from qlab.diagnose.flip_oracle import flip_oracle
from qlab.diagnose.gradients import Mismatch, believing, mismatch, mismatching
from qlab.diagnose.saturation import angle
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, harden, quantize, surrogate
from qlab.quantizers.drawn import redrawn
from tests.diagnose.small_nets import batch, conv, cross_entropy, flipped, foreign, generator, mlp


class Vector(nn.Module):
    """A net whose answer is (f(w), 0) for every input."""

    def __init__(self, w: list[float], f, hard: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(len(w), 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([w], dtype=torch.float64))
        self.f, self.sign = f, Sign("identity") if hard else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        value = self.f(self.sign(self.layer.weight)[0])
        return torch.stack([value, 0 * value]).expand(len(x), 2)


def first(z: Tensor, y: Tensor) -> Tensor:
    return z[..., 0]


X, Y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


def row(result: Mismatch, layer: str, reference: str):
    return next(r for r in result.rows if (r.layer, r.reference) == (layer, reference))


def test_of_a_linear_model_every_reference_is_the_weight() -> None:
    a = torch.tensor([0.5, -1.5, 2.0, 0.25], dtype=torch.float64)
    net = Vector([0.3, -0.2, 0.1, 0.4], lambda w: w @ a, hard=False).double().eval()
    for eps in (1e-3, 1.0, 50.0):
        found = mismatch(net, X, Y, loss=first, eps=eps, s=eps, pairs=4000)
        g, t = found.points["layer", "coordinate"]
        np.testing.assert_allclose(t, a, atol=1e-9)
        np.testing.assert_allclose(g, a, atol=1e-12)
        assert row(found, "layer", "coordinate").cosine == pytest.approx(1, abs=1e-9)
        assert row(found, "layer", "smoothed").cosine > 0.995
    assert [r.reference for r in found.rows] == ["coordinate", "smoothed"]  # no bits to flip


def test_the_coordinate_gradient_of_a_sign_is_one_over_eps_within_eps() -> None:
    net = Vector([0.3, -0.5], lambda w: w[0] + 3 * w[1], hard=True).double().eval()
    _, t = mismatch(net, X, Y, references=["coordinate"], loss=first, eps=0.4).points["layer", "coordinate"]
    np.testing.assert_allclose(t, [2.5, 0.0])  # 1 / 0.4 within reach, 0 beyond
    _, t = mismatch(net, X, Y, references=["coordinate"], loss=first, eps=0.6).points["layer", "coordinate"]
    np.testing.assert_allclose(t, [1 / 0.6, 3 / 0.6])


def test_the_coordinate_gradient_is_the_derivative_of_the_loss_averaged_over_the_interval() -> None:
    net = Vector([0.3, -0.5], lambda w: (w**3).sum() + w[0] * w[1], hard=False).double().eval()
    _, t = mismatch(net, X, Y, references=["coordinate"], loss=first, eps=0.4).points["layer", "coordinate"]
    # mean over [a - e, a + e] of 3 w^2 is 3 a^2 + e^2
    np.testing.assert_allclose(t, [3 * 0.09 + 0.16 - 0.5, 3 * 0.25 + 0.16 + 0.3], atol=1e-12)


def test_flip_identities_of_a_quadratic() -> None:
    draw = generator(0)
    A = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    A, c = A + A.T, torch.randn(5, generator=draw, dtype=torch.float64)
    w = [0.3, -0.2, 0.7, -0.9, 0.1]
    net = Vector(w, lambda b: b @ A @ b / 2 + c @ b, hard=True).double().eval()
    b = torch.tensor(w, dtype=torch.float64).sign()
    g, flip = mismatch(net, X, Y, references=["flip"], loss=first).points["layer", "flip"]
    np.testing.assert_allclose(flip, A @ b + c - b * A.diag(), atol=1e-12)
    np.testing.assert_allclose(g - flip, b * A.diag(), atol=1e-12)  # the mismatch is the diagonal curvature
    eps = 0.5
    _, cdg = mismatch(net, X, Y, references=["coordinate"], loss=first, eps=eps).points["layer", "coordinate"]
    np.testing.assert_allclose(cdg, np.where(np.abs(w) < eps, flip / eps, 0), atol=1e-12)
    before = flip_oracle(net, X, Y, "layer", loss=first).delta
    for i, j in ((0, 1), (2, 4)):  # what flipping j does differs by 4 b_i b_j A_ij once i is flipped
        v = [-u if k == i else u for k, u in enumerate(w)]
        after = flip_oracle(Vector(v, net.f, hard=True).double().eval(), X, Y, "layer", loss=first).delta
        assert after[j] - before[j] == pytest.approx(float(4 * b[i] * b[j] * A[i, j]), abs=1e-12)


def test_in_a_smooth_float_net_every_reference_tends_to_the_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, y = batch(9, 6)
    found = mismatch(net, x, y, loss="cross_entropy", eps=1e-5, s=1e-3, pairs=3000)
    w = net[0].weight
    (truth,) = torch.autograd.grad(cross_entropy(net(x), y).mean(), w)
    g, t = found.points["0", "coordinate"]
    np.testing.assert_allclose(g, truth.flatten(), atol=1e-14)
    np.testing.assert_allclose(t, truth.flatten(), atol=1e-9)
    assert row(found, "0", "coordinate").sign_agreement == 1
    smoothed = row(found, "0", "smoothed")
    assert smoothed.cosine > 0.98
    assert smoothed.reliability > 0.95
    assert smoothed.corrected == pytest.approx(1, abs=0.02)
    assert smoothed.low < smoothed.cosine < smoothed.high


def test_flips_are_those_of_the_oracle_and_sparse_layers_take_a_sample() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    found = mismatch(net, x, y, ["hidden.3"], ["flip"], coordinates=20, seed=3)
    whole = flip_oracle(net, x, y, "hidden.3", loss="margin")
    _, t = found.points["hidden.3", "flip"]
    assert len(t) == 20
    assert {round(v, 12) for v in t} <= {round(v, 12) for v in whole.gradient}
    again = mismatch(net, x, y, ["hidden.3"], ["flip"], coordinates=20, seed=3)
    np.testing.assert_array_equal(again.points["hidden.3", "flip"], found.points["hidden.3", "flip"])
    other = mismatch(net, x, y, ["hidden.3"], ["flip"], coordinates=20, seed=4)
    assert not np.array_equal(other.points["hidden.3", "flip"][1], t)


def test_the_surrogate_agrees_better_in_the_last_layer_than_in_the_first() -> None:
    """Source: the mismatch grows away from the output (measured on digits, layer 1 / 2 / 3: 0.24, 0.30, 0.99)."""
    net, x, y = trained_digits()
    found = mismatch(net, x, y, references=["flip"], loss="cross_entropy", beta=0.05)
    c = {r.layer: r.cosine for r in found.rows}
    assert c["fc"] > 0.6
    assert c["fc"] > c["hidden.3"] > 0.1
    assert c["fc"] > c["hidden.0"] > 0.1


def trained_digits() -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 8 - 1), torch.tensor(digits.target)
    # weights in [-0.5, 0.5]: none leaves the surrogate's window during this short training
    net = quantize(qlab.build("mlp", (64,), 10, hidden=(32, 24), seed=0).double(), Sign, Sign)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    draw = generator(0)
    for _ in range(120):
        k = torch.randint(1500, (128,), generator=draw)
        loss = cross_entropy(net(x[k]) / 5, y[k]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), x[1500:1600], y[1500:1600]


def test_a_single_threshold_unit_smoothed_in_its_input() -> None:
    """d/dx E sign(x + s u) = 2 phi(x / s) / s, example by example."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), Sign("clipped")).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[0.3, 0.1], [-0.2, 0.6]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    found = mismatch(net, x, y, of="inputs", references=["smoothed"], loss=lambda z, y: z.sum(-1), s=0.5, pairs=30_000)
    _, t = found.points["input", "smoothed"]
    expected = 2 * torch.exp(-((x / 0.5) ** 2) / 2) / math.sqrt(2 * math.pi) / 0.5
    assert float(expected[0, 0]) == pytest.approx(1.33290, abs=5e-6)
    np.testing.assert_allclose(t, expected.flatten(), atol=0.05)
    found = mismatch(net, x, y, of="inputs", references=["coordinate"], loss=lambda z, y: z.sum(-1), eps=0.4)
    g, t = found.points["input", "coordinate"]
    np.testing.assert_allclose(t, [2.5, 2.5, 2.5, 0])  # 0.6 is out of reach
    np.testing.assert_allclose(g, 1)


def test_input_gradients_of_a_smooth_net_agree_and_of_a_sign_net_less() -> None:
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    x, y = batch(20, 6)
    good = mismatch(smooth, x, y, of="inputs", eps=1e-5, s=1e-3, pairs=300)
    assert row(good, "input", "coordinate").cosine == pytest.approx(1, abs=1e-6)
    assert row(good, "input", "smoothed").corrected == pytest.approx(1, abs=0.03)
    bad = mismatch(mlp(inputs=6), x, y, of="inputs", eps=0.5, s=0.5, pairs=300)
    assert row(bad, "input", "smoothed").corrected < 0.95
    assert [r.reference for r in bad.rows] == ["coordinate", "smoothed"]
    assert bad.summary().startswith("Back-propagated gradient of the inputs (surrogate)")


def test_few_pairs_give_the_corrected_cosine_of_many() -> None:
    x, y = batch(40, 6)
    options = {"of": "inputs", "references": ["smoothed"], "s": 0.5}
    truth = row(mismatch(mlp(inputs=6), x, y, pairs=2000, **options), "input", "smoothed")
    assert truth.reliability > 0.98
    few = [row(mismatch(mlp(inputs=6), x, y, pairs=20, seed=k, **options), "input", "smoothed") for k in range(6)]
    # one seed scatters by 0.05, so the mean of six by 0.02; averaging 2 r_n / (1 + r_n) instead, single seeds reach 0.59
    assert np.mean([r.corrected for r in few]) == pytest.approx(truth.cosine, abs=0.06)
    assert np.mean([r.reliability for r in few]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("alpha", [[1.0, 1.0, 1.0], [0.3, 1.0, 4.0]])
def test_the_quick_cosine_of_sign_weights_is_that_of_exact_flips(alpha: list[float]) -> None:
    net, (x, y) = harden(mlp(hidden=(9, 3))), batch(12, 8)
    w = net.get_parameter("hidden.3.weight")
    with torch.no_grad():
        w *= torch.tensor(alpha, dtype=torch.float64)[:, None]
    quick = coordinate_cosine(net, x, y, "hidden.3.weight", signs=True, count=27, generator=generator(0))
    g = torch.autograd.grad(cross_entropy(net(x), y).mean(), w)[0]
    changes = flipped(net, x, y, "hidden.3.weight", cross_entropy).reshape(w.shape)
    assert quick == pytest.approx(cosine(g, -changes / (2 * w)), abs=1e-12)
    assert 0.1 < quick < 0.99


def test_a_net_that_is_one_layer_is_compared_under_its_weights_name() -> None:
    x, y = batch(9, 6)
    for net in (nn.Linear(6, 3).double().eval(), quantize(nn.Linear(6, 3).double(), Sign).eval()):
        found = mismatch(net, x, y, ["weight"], ["coordinate", "flip"])
        assert [r.layer for r in found.rows] == ["weight"] * len(found.rows)
    assert [r.reference for r in found.rows] == ["coordinate", "flip"]


def test_indirect_measures_are_what_they_say() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.s, self.b = nn.Linear(1, 4, bias=False), Sign("clipped"), nn.Linear(4, 2)
            with torch.no_grad():
                self.a.weight.copy_(torch.tensor([[0.5], [1.0], [2.0], [-3.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.s(self.a(x)))

    x = torch.tensor([[0.9], [0.6], [0.4]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    found = mismatch(Half().double().eval(), x, y, references=["coordinate"])
    state = {s.layer: s for s in found.states}["a"]
    # |z|: .45 .3 .2; .9 .6 .4; 1.8 1.2 .8; 2.7 1.8 1.2
    assert state.saturation == pytest.approx(5 / 12)
    assert state.blocked == pytest.approx(5 / 12)
    assert state.dead == 1.0  # all inputs are positive: no unit ever changes its sign
    assert state.zero == 0.25  # the last unit is saturated on every example
    assert state.angle == pytest.approx(6.5 / math.sqrt(4 * 14.25))
    assert math.isnan({s.layer: s for s in found.states}["b"].saturation)


def test_the_angle_of_gaussian_weights() -> None:
    w = torch.randn(400_000, generator=generator(0), dtype=torch.float64)
    assert angle(w) == pytest.approx(math.sqrt(2 / math.pi), abs=2e-3)
    assert math.sqrt(2 / math.pi) == pytest.approx(0.79788, abs=5e-6)
    assert angle(torch.tensor([1.0, -1.0])) == pytest.approx(1)
    assert math.isnan(angle(torch.zeros(3)))


def test_agreement_is_that_of_scipy_and_a_zero_vector_agrees_with_nothing() -> None:
    draw = generator(0)
    g, t = (torch.randn(50, generator=draw, dtype=torch.float64).mul(3).round() for _ in range(2))
    a = agreement(g, t)
    assert a.spearman == pytest.approx(spearmanr(g, t).statistic)
    assert a.cosine == pytest.approx(float(torch.cosine_similarity(g, t, dim=0)))
    both = t != 0
    assert a.sign_agreement == pytest.approx(float((g.sign() == t.sign())[both].double().mean()))
    assert (a.n, a.nonzero) == (50, int(both.sum()))
    nothing = agreement(torch.zeros(50), t)
    assert math.isnan(nothing.cosine)
    assert math.isnan(nothing.spearman)
    assert cosine(g * 1e-200, t * 1e-200) == pytest.approx(a.cosine)  # squares of these would be 0
    with pytest.raises(InputError, match="expected equal ones"):
        agreement(g, t[:3])


@pytest.mark.parametrize("old_style", [False, True])
def test_foreign_nets_are_compared_too(old_style: bool) -> None:
    x, y = batch(10, 8)
    found = mismatch(foreign(old_style), x, y, pairs=20)
    assert {r.layer for r in found.rows} == {"0", "2", "4"}
    assert {r.reference for r in found.rows} == {"coordinate", "smoothed", "flip"}
    states = {s.layer: s for s in found.states}
    assert 0 < states["0"].saturation < 1
    assert all(math.isnan(r.cosine) or -1 <= r.cosine <= 1 for r in found.rows)


def test_another_surrogate_is_compared_with_the_known_truths() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    other = redrawn(net, surrogate("tanh"))
    known = mismatch(net, x, y, references=["coordinate", "flip"], coordinates=20)
    quick = believing(known, other, x, y)
    slow = mismatch(other, x, y, references=["coordinate", "flip"], coordinates=20)
    assert [r.reference for r in quick.rows] == [r.reference for r in slow.rows]
    for a, b in zip(quick.rows, slow.rows, strict=True):
        assert a.cosine == pytest.approx(b.cosine, nan_ok=True)
        assert a.spearman == pytest.approx(b.spearman, nan_ok=True)
    assert [(s.norm, s.zero, s.angle) for s in quick.states] == [(s.norm, s.zero, s.angle) for s in slow.states]
    assert quick.rows[0].cosine != known.rows[0].cosine
    with pytest.raises(UnknownNameError, match="layer"):
        believing(known, nn.Sequential(nn.Linear(8, 3)).double().eval(), x, y)
    with pytest.raises(InputError, match="of inputs"):
        believing(mismatch(net, x, y, of="inputs", pairs=4), net, x, y)


def test_convolutions_are_compared() -> None:
    found = mismatch(conv(), *batch(5, 2, 6, 6), ["0", "3"], coordinates=30, pairs=20)
    assert len(found.rows) == 6
    assert all(r.n == 30 for r in found.rows)


def test_a_step_at_a_time_is_the_same_and_partial_results_grow() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    updates = [u.value for u in mismatching(net, x, y, coordinates=10, pairs=10)]
    rows = [len(u.rows) for u in updates]
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == 12
    assert updates[-1].rows == mismatch(net, x, y, coordinates=10, pairs=10).rows


def test_frame_figure_and_summary_hold_the_numbers() -> None:
    found = mismatch(mlp(), *batch(12, 8), coordinates=10, pairs=10)
    frame = found.frame()
    assert len(frame) == 12
    assert {"layer", "reference", "cosine", "reliability", "saturation", "angle"} <= set(frame)
    for r in found.rows:
        if not math.isnan(r.cosine):
            assert f"{r.reference} {r.cosine:.2f}" in found.summary()
    assert found.summary() == found.figure().get_label()
    assert len(found.figure().axes) == 12


def test_what_cannot_be_compared_is_said() -> None:
    net, (x, y) = mlp(), batch(12, 8)
    with pytest.raises(UnknownNameError, match="layer 'nowhere'"):
        mismatch(net, x, y, ["nowhere"])
    for layers in ("fc", []):
        with pytest.raises(InputError, match="expected a sequence of names"):
            mismatch(net, x, y, layers)
    with pytest.raises(UnknownNameError, match="reference 'truth'"):
        mismatch(net, x, y, references=["truth"])
    with pytest.raises(InputError, match="expected some of"):
        mismatch(net, x, y, references="flip")
    with pytest.raises(InputError, match="eps is -1"):
        mismatch(net, x, y, eps=-1)
    with pytest.raises(InputError, match="of is 'both'"):
        mismatch(net, x, y, of="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no bits to flip"):
        mismatch(net, x, y, of="inputs", references=["flip"])
    with pytest.raises(InputError, match="leave layers out"):
        mismatch(net, x, y, ["fc"], of="inputs")
    with pytest.raises(InputError, match="NaN"):
        mismatch(net, x * float("nan"), y)
    with pytest.raises(InputError, match="needs labels"):
        mismatch(net, x, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="training mode"):
        mismatch(net.train(), x, y)
