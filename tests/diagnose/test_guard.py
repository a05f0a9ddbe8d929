"""The guard fires where a map was made to fail, and is quiet on a float net."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from qlab.diagnose import guard
from qlab.diagnose.attribution import attribute
from qlab.quantizers import Sign
from tests.diagnose.attribution_nets import Functional, batch, cnn, fresh, mlp

GRADIENTS = ("saliency", "input_x_gradient", "integrated_gradients", "smoothgrad")


class Scaled(nn.Module):
    """A net whose logits are multiplied by 1000."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.net(x)


class Rounded(nn.Module):
    """A net on inputs rounded to quarters: autograd's gradient of rounding is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((4 * x).round() / 4)


class OutOfRange(nn.Module):
    """A sign of inputs far from zero: the clipped straight-through rule passes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sign, self.net = Sign(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.sign(10 * x))


class Detached(nn.Module):
    """A net whose input is rounded outside of autograd's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((4 * x.detach()).round() / 4)


class Broken(torch.autograd.Function):
    """A step whose backward rule divides by zero."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g / 0


class Custom(Broken):
    """A sign with a rule of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


class WithStep(nn.Module):
    """A net with a step that is an autograd Function, no module."""

    def __init__(self, step: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.step, self.a, self.b = step, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.step.apply(self.a(x)))


def test_a_float_net_raises_no_alarm() -> None:
    a = attribute(mlp(nn.ReLU), batch(16, 6), 1, (*GRADIENTS, "deeplift", "feature_ablation"), steps=200)
    assert not any(m.silent.any() for m in a.maps)
    assert not any((m.zeros > 0).any() for m in a.maps)
    assert {m.explains for m in a.maps} <= {"exact", "deployed"}
    for name in ("integrated_gradients", "deeplift", "feature_ablation"):
        assert a[name].verdict == ("holds", "")
    assert a.why == ""


@pytest.mark.parametrize("output", ["probability", "log_probability"])
def test_saturated_softmax_is_no_information_and_the_logit_is_named_as_the_way_out(output: str) -> None:
    net, x = Scaled(mlp(nn.ReLU)).float().eval(), batch(16, 6).float()
    top = net(x).topk(2).values
    x = x[top[:, 0] - top[:, 1] > 110]  # e^-104 is zero in float32
    assert len(x) >= 8
    y = net(x).argmax(1)
    a = attribute(net, x, y, ("saliency", "input_x_gradient"), output=output)
    for m in a.maps:
        assert (m.scores == 0).all()
        assert m.silent.all()
        assert m.verdict.word == "no information"
        assert "explain the logit" in m.verdict.reason
        assert m.explains == "exact"  # saturation is no surrogate
        assert not (m.zeros == guard.AGREED).any()  # no zero is passed off as unimportance
    logit = attribute(net, x, y, ("saliency",))["saliency"]
    assert not logit.silent.any()


@pytest.mark.parametrize("make", [Rounded, OutOfRange, Detached])
@pytest.mark.parametrize("method", ["saliency", "input_x_gradient"])
def test_a_flat_gradient_of_a_quantized_input_is_no_information(make: type[nn.Module], method: str) -> None:
    net, x = fresh(make), batch(16, 6) + batch(16, 6).sign()
    a = attribute(net, x, 1, (method, "feature_ablation"), baseline=-x)
    assert (a[method].scores == 0).all()
    assert a[method].verdict.word == "no information"
    assert "exactly zero where the net changes" in a[method].verdict.reason
    assert "16 of 16" in a[method].verdict.reason
    assert (a[method].zeros == guard.SILENT).mean() > 0.9
    assert a["feature_ablation"].verdict.word == "holds"
    assert "no information" in a.summary()
    hatches = [c.get_hatch() for panel in a.figure(1).axes for c in panel.collections if c.get_paths()]
    assert "/////" in hatches


def test_a_map_of_nan_is_no_information() -> None:
    a = attribute(fresh(lambda: WithStep(Broken)), batch(4, 6), 1, ("saliency", "feature_ablation"))
    assert a["saliency"].silent.all()
    assert a["saliency"].verdict == ("no information", "the map holds NaN or infinite values (4 of 4 examples)")
    assert a["feature_ablation"].verdict.word == "holds"
    assert a.summary()


def test_a_net_without_any_gradient_is_incomplete_for_deeplift_too() -> None:
    m = attribute(fresh(Detached), batch(8, 6), 1, ("deeplift",))["deeplift"]
    assert (m.scores == 0).all()
    assert m.explains == "surrogate"
    assert m.verdict.word == "no information"


def test_zeros_of_a_feature_that_the_net_does_not_read_are_agreed_on() -> None:
    net = mlp(nn.ReLU)
    with torch.no_grad():
        net[0].weight[:, 2] = 0  # type: ignore[index]
    m = attribute(net, batch(8, 6), 1, ("saliency",))["saliency"]
    assert (m.zeros[:, 2] == guard.AGREED).all()
    assert (np.delete(m.zeros, 2, 1) == 0).all()
    assert not m.silent.any()


def test_zeros_at_the_baseline_are_by_construction() -> None:
    x = batch(8, 6)
    x[:, 4] = 0
    a = attribute(mlp(nn.ReLU), x, 1, ("integrated_gradients", "saliency"))
    assert (a["integrated_gradients"].zeros[:, 4] == guard.CONSTRUCTION).all()
    assert (a["saliency"].zeros == 0).all()


def test_one_silent_example_is_counted_without_damning_the_map() -> None:
    net = fresh(OutOfRange)
    x = batch(8, 6) / 40 + 0.001
    x[0] = 3 * batch(1, 6)[0].sign()
    m = attribute(net, x, 1, ("saliency",), baseline=-x)["saliency"]
    assert m.silent.tolist() == [True] + [False] * 7
    assert m.verdict.word != "no information"


@pytest.mark.parametrize(("make", "named"), [(Functional, False), (lambda: WithStep(Custom), True)])
def test_steps_that_are_no_modules_are_found(make: Callable[[], nn.Module], named: bool) -> None:
    a = attribute(fresh(make), batch(8, 6), 1, ("integrated_gradients", "deeplift"))
    assert [m.explains for m in a.maps] == ["surrogate", "surrogate"]
    assert [m.verdict.word for m in a.maps] == ["incomplete", "incomplete"]
    assert ("Custom" in a.why) == named


def hidden(net: nn.Module, x: Tensor) -> str:
    return guard.hidden_step(net.requires_grad_(False), x, torch.zeros_like(x), torch.ones(len(x), dtype=torch.int64))


@pytest.mark.parametrize("n", [1, 5])
def test_a_hidden_sign_is_found_in_every_net_and_a_float_net_is_never_accused(n: int) -> None:
    for seed in range(40):
        x = batch(n, 6, seed=seed)
        assert "whatever the number of steps" in hidden(fresh(Functional, seed), x)
        for activation in (nn.ReLU, nn.Hardtanh, nn.Tanh):
            assert hidden(mlp(activation, seed=seed), x) == ""


def test_jumps_up_and_down_that_cancel_are_found() -> None:
    class Window(nn.Module):
        """1 between 0.3 and 0.6 of the path, 0 at both ends; the straight-through rule's slope is zero everywhere."""

        def forward(self, x: Tensor) -> Tensor:
            z = torch.cat((x - 0.3, x - 0.6), 1)
            z = z + (z.sign() - z).detach()
            return (z[:, :1] - z[:, 1:]) / 2 * torch.ones(3, dtype=x.dtype)

    assert "whatever the number of steps" in hidden(Window(), torch.ones(1, 1, dtype=torch.float64))


def test_deep_float_nets_with_many_kinks_are_not_accused() -> None:
    def deep() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), *[m for _ in range(5) for m in (nn.Linear(64, 64), nn.ReLU())])
        with torch.no_grad():
            for layer in net[::2]:
                layer.weight *= 2.5
        return net.append(nn.Linear(64, 3))

    assert not any(hidden(fresh(deep, seed), batch(1, 6, seed=seed)) for seed in range(40))


def test_rank_correlation_equals_scipy() -> None:
    g = np.random.default_rng(0)
    a, b = g.integers(0, 5, (7, 9)).astype(float), g.normal(size=(7, 9))
    expected = [spearmanr(p, q).statistic for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(guard.spearman(a, b), expected, atol=1e-12)
    where = g.random((7, 9)) < 0.7
    expected = [spearmanr(p[w], q[w]).statistic for p, q, w in zip(a, b, where, strict=True)]
    np.testing.assert_allclose(guard.spearman(a, b, where), expected, atol=1e-12)


def test_ranks_are_scipys_over_the_features_that_count_and_without_sign_where_a_map_has_none() -> None:
    x = batch(5, 8)
    x[:, 3] = 0  # at the baseline: no part of the order by ablation
    a = attribute(mlp(Sign, inputs=8), x, 1, ("saliency", "input_x_gradient", "deeplift"))
    for m, of in zip(a.maps, (np.abs, np.asarray, np.asarray), strict=True):
        kept = [0, 1, 2, 4, 5, 6, 7]
        rank = [spearmanr(p[kept], of(q)[kept]).statistic for p, q in zip(m.scores, a.ablation, strict=True)]
        np.testing.assert_allclose(m.rank_ablation, rank, atol=1e-12)
        rank = [spearmanr(p, of(q)).statistic for p, q in zip(m.scores, a.flips, strict=True)]
        np.testing.assert_allclose(m.rank_flips, rank, atol=1e-12)
    assert not np.allclose(a.maps[0].rank_ablation, a.maps[0].rank_flips)


def test_the_floor_under_small_differences_is_rounding_only() -> None:
    net = fresh(lambda: nn.Linear(2, 2))
    with torch.no_grad():
        net.get_parameter("weight").copy_(torch.tensor([[1.0, -0.999], [0, 1]], dtype=torch.float64))
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    m = attribute(net, x, 0, ("saliency",))["saliency"]
    np.testing.assert_allclose(m.relative, m.residual / np.array([0.001, 0.002]), rtol=1e-6)


def test_zeros_that_gradcams_relu_wrote_are_by_construction() -> None:
    m = attribute(cnn(nn.ReLU), batch(6, 1, 6, 6), 1, ("layer_gradcam",))["layer_gradcam"]
    some = (m.scores != 0).any(1)
    assert some.any()
    assert (m.scores[some] == 0).any()
    assert (m.zeros[some][m.scores[some] == 0] == guard.CONSTRUCTION).all()
    assert not m.silent[some].any()


def test_no_order_gives_no_rank() -> None:
    a = np.array([[1.0, 2, 3], [1, 1, 1], [1, 2, 3]])
    b = np.array([[3.0, 2, 1], [1, 2, 3], [1, 2, 3]])
    where = np.array([[True] * 3, [True] * 3, [True, True, False]])
    got = guard.spearman(a, b, where)
    assert got[0] == pytest.approx(-1)
    assert np.isnan(got[1:]).all()


def test_ranks_of_a_linear_net_are_perfect() -> None:
    x = batch(8, 6)
    a = attribute(fresh(lambda: nn.Linear(6, 3)), x, 1, ("input_x_gradient",))
    np.testing.assert_allclose(a["input_x_gradient"].rank_ablation, 1.0)
    signs = attribute(fresh(lambda: nn.Linear(6, 3)), x.sign(), 1, ("input_x_gradient",))
    np.testing.assert_allclose(signs["input_x_gradient"].rank_flips, 1.0)  # a flip of a sign is twice its ablation


def test_a_map_that_was_turned_round_ranks_differently() -> None:
    ones = np.ones(5)
    word, reason = guard.verdict("exact", False, 0 * ones, ones < 0, "", -0.8 * ones, "")
    assert word == "ranks differently"
    assert "-0.80" in reason


def test_the_gravest_finding_decides() -> None:
    ones = np.ones(4)
    assert guard.verdict("surrogate", True, ones, ones > 0, "flat", ones, "").word == "no information"
    half = np.array([True, True, False, False])
    assert guard.verdict("exact", False, 0 * ones, half, "flat", ones, "") == (
        "no information",
        "flat (2 of 4 examples)",
    )
    assert guard.verdict("exact", False, 0 * ones, ones.cumsum() < 2, "flat", ones, "").word == "holds"
    assert guard.verdict("surrogate", True, ones, ones < 0, "", ones, "").word == "incomplete"
    assert guard.verdict("surrogate", False, ones, ones < 0, "", ones, "why").word == "surrogate"
    assert guard.verdict("exact", False, ones, ones < 0, "", ones * np.nan, "").word == "holds"
