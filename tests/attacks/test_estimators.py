"""Gradient estimators against closed forms, enumeration and the declared backward rules."""

from __future__ import annotations

import copy
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.attacks.base import Attack
from qlab.attacks.estimators import BACKPROP, BPDA, EOT, NES, SPSA, Backprop, FiniteDifference, Smoothed
from qlab.attacks.losses import ce, margin
from qlab.attacks.pgd import PGD
from qlab.attacks.scaling import NJS
from qlab.attacks.stand_in import STAND_INS, stand_in, with_stand_ins
from qlab.attacks.victim import Victim
from qlab.diagnose.functions import Hard, variant
from qlab.errors import InputError, UnknownNameError
from qlab.methods.binary_networks.xnor_net import InputSign
from qlab.quantizers import Sign, Uniform, hard_sign, harden, surrogate
from qlab.quantizers.kbit import KBit
from qlab.quantizers.repair import FeatureSign
from qlab.quantizers.sawb import SAWBActivation
from tests.diagnose.small_nets import HandSign, conv, detached_sign, mlp

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(d: int = 3, inputs: int = 7) -> nn.Linear:
    net = nn.Linear(inputs, d).double()
    with torch.no_grad():
        net.weight.normal_(0, 1, generator=draw(1))
        net.bias.normal_(0, 1, generator=draw(2))
    return net.eval()


class SignNeuron(nn.Module):
    """Logits (0, sign(w . x)), with no gradient at all."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        s = hard_sign(x.flatten(1) @ self.w).detach()
        return torch.stack([torch.zeros_like(s), s], 1)


def second(z: Tensor) -> Tensor:
    return z[:, 1]


def gradient(estimator, net: nn.Module, x: Tensor, f=second, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return estimator.gradient(estimator.bind(Victim(net)), x, f, draw(seed))


# ------------------------------------------------------------------------------------------------------- linear nets


@pytest.mark.parametrize("shape", [(7,), (1, 7, 1)])
@pytest.mark.parametrize("estimator", [BACKPROP, FiniteDifference(0.3), Smoothed(0.5, 3)])
def test_of_a_linear_net_the_gradient_is_its_weight(estimator, shape):
    net = nn.Sequential(nn.Flatten(), linear()).eval()
    x = torch.rand(5, *shape, generator=draw(3), dtype=F64)
    z, v, g = gradient(estimator, net, x)
    assert torch.equal(z, net(x))
    assert torch.equal(v, z[:, 1])
    assert g.shape == x.shape
    assert torch.allclose(g.flatten(1), net[1].weight[1].expand(5, 7), rtol=1e-12, atol=1e-12)
    assert not any(t.requires_grad for t in (z, v, g))


@pytest.mark.parametrize("estimator", [NES(2000, 0.4), NES(2000, 0.4, antithetic=False), SPSA(2000, 0.4)])
def test_of_a_linear_net_the_questions_give_its_weight_without_bias(estimator):
    net, x = linear(), torch.rand(60, 7, generator=draw(3), dtype=F64)
    g = gradient(estimator, net, x)[2]
    w = net.weight[1]
    error = g.std(0) / math.sqrt(60)
    assert bool(((g.mean(0) - w).abs() < 4 * error).all())
    # and the noise is that of the method: Var(g_i) = (|w|^2 + w_i^2) / K for normal directions, (|w|^2 - w_i^2) / K for signs
    sign = -1 if isinstance(estimator, SPSA) else 1
    expected = ((w.square().sum() + sign * w.square()) / 2000).sqrt()
    assert torch.allclose(g.std(0), expected, rtol=0.35)


def test_antithetic_pairs_cancel_what_is_even():
    class Parabola(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.zeros(len(x), dtype=x.dtype), x.square().sum(1)], 1)

    x = torch.zeros(4, 3, dtype=F64)
    assert float(gradient(NES(10, 0.1), Parabola().eval(), x)[2].abs().max()) < 1e-12
    assert float(gradient(NES(10, 0.1, antithetic=False), Parabola().eval(), x)[2].abs().max()) > 1e-3


def test_coordinates_that_were_not_drawn_have_no_gradient():
    net, x = linear(), torch.rand(50, 7, generator=draw(3), dtype=F64)
    g = gradient(FiniteDifference(0.1, coordinates=2), net, x)[2]
    w = net.weight[1].expand(50, 7)
    asked = g != 0
    assert asked.sum(1).tolist() == [2] * 50
    assert torch.allclose(g[asked], w[asked], rtol=1e-10)
    assert bool(asked.any(0).all())  # every coordinate has its turn


# -------------------------------------------------------------------------------------------- a sign has no gradient


def test_nes_of_a_sign_neuron_is_the_derivative_of_its_smooth_mean():
    w, s, n = 0.3, 0.5, 4000
    x = torch.full((n, 1), w, dtype=F64)
    net = SignNeuron(torch.ones(1, dtype=F64))
    truth = 2 * math.exp(-((w / s) ** 2) / 2) / math.sqrt(2 * math.pi) / s
    assert truth == pytest.approx(1.33290, abs=1e-5)
    for estimator in (NES(20, s), NES(40, s, antithetic=False)):
        g = gradient(estimator, net, x)[2][:, 0]
        error = float(g.std()) / math.sqrt(n)
        assert error < 0.02
        assert abs(float(g.mean()) - truth) < 4 * error


def test_differences_of_a_sign_neuron_are_the_derivative_of_its_mean_over_an_interval():
    net = SignNeuron(torch.ones(1, dtype=F64))
    x = torch.tensor([[0.3], [0.5], [-0.39]], dtype=F64)
    for estimator in (FiniteDifference(0.4), SPSA(7, 0.4)):
        assert gradient(estimator, net, x)[2][:, 0].tolist() == pytest.approx([2.5, 0, 2.5])


def test_spsa_of_a_sign_neuron_is_the_mean_over_all_corners():
    w, delta, n = torch.tensor([0.7, -0.4, 0.2], dtype=F64), 0.3, 3000
    point = torch.tensor([0.3, 0.2, 0.1], dtype=F64)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=F64)
    values = hard_sign((point + delta * corners) @ w) - hard_sign((point - delta * corners) @ w)
    truth = (values[:, None] * corners).mean(0) / (2 * delta)
    assert bool((truth != 0).all())
    g = gradient(SPSA(10, delta), SignNeuron(w), point.expand(n, 3).clone())[2]
    assert bool(((g.mean(0) - truth).abs() < 4 * g.std(0) / math.sqrt(n)).all())


def test_a_net_without_gradient_is_told_so_by_backprop_and_broken_by_questions():
    w = torch.ones(4, dtype=F64)
    net = SignNeuron(w)
    x = torch.rand(30, 4, generator=draw(5), dtype=F64) / 2 + 0.3
    shifted = nn.Sequential(Shift(1.9), net).eval()  # sum x - 1.9 > 0 on most: class 1
    y = shifted(x).argmax(1)
    with pytest.raises(InputError, match="NES"):
        PGD(steps=3)(shifted, x, y, 0.3)
    found = PGD(steps=10, loss="margin", estimator=NES(30, 0.2))(shifted, x, y, 0.4)
    assert found.clean.all()
    assert found.accuracy < 0.1
    assert found.backward == 0


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x - self.by / x.shape[1]


@pytest.fixture(scope="module")
def dead_signs(digits_net) -> tuple[nn.Module, Tensor, Tensor]:
    """A net whose sign layer lets no gradient through where the pre-activations are: all of them are far from 0."""
    net, x, y = digits_net
    binary = nn.Sequential(*copy.deepcopy(net)[:2], Sign(lambda u: (u.abs() < 1e-9).to(u.dtype)), nn.Linear(64, 10))
    with torch.no_grad():
        features = binary[:3](x)
        ridge = torch.linalg.solve(features.T @ features + 10 * torch.eye(64), features.T @ F.one_hot(y, 10).float())
        binary[3].weight.copy_(10 * ridge.T)
        binary[3].bias.zero_()
    return binary.eval().requires_grad_(False), x[:60], y[:60]


def test_dead_signs_hold_against_backprop_and_fall_to_the_other_estimators(dead_signs):
    net, x, y = dead_signs
    accuracy = {
        name: PGD(steps=8, loss="margin", random_start=False, estimator=estimator)(net, x, y, 0.25)
        for name, estimator in {
            "backprop": Backprop(),
            "nes": NES(40, 0.1),
            "spsa": SPSA(40, 0.1),
            "differences": FiniteDifference(0.5),
            "bpda": BPDA("tanh", sharpness=1.0),
        }.items()
    }
    assert accuracy["backprop"].accuracy == accuracy["backprop"].clean.mean()
    for name in ("nes", "spsa", "differences", "bpda"):
        assert accuracy[name].accuracy < 0.5 * accuracy["backprop"].accuracy


# -------------------------------------------------------------------------------------------------------------- BPDA


@pytest.mark.parametrize("which", STAND_INS)
@pytest.mark.parametrize(("net", "shape"), [(mlp(), (8,)), (conv(), (2, 5, 5))], ids=["mlp", "conv"])
def test_bpda_answers_as_the_net_does_bit_for_bit(net, shape, which):
    net = harden(net)
    x = torch.randn(20, *shape, generator=draw(4), dtype=F64)
    assert torch.equal(gradient(BPDA(which), net, x)[0], net(x))


@pytest.mark.parametrize("which", [n for n in STAND_INS if n not in ("relu", "swish")])
def test_bpda_goes_backward_as_a_net_trained_with_that_surrogate(which):
    x = torch.randn(20, 8, generator=draw(4), dtype=F64)
    net = mlp(lambda: Sign("clipped"))
    other = mlp(lambda: Sign(which))
    other.load_state_dict(net.state_dict())
    f = lambda z: ce(0.1 * z, torch.zeros(20, dtype=torch.int64))  # noqa: E731
    assert torch.equal(gradient(BPDA(which), net, x, f)[2], gradient(BACKPROP, other, x, f)[2])


@pytest.mark.parametrize(
    ("which", "sharpness", "derivative"),
    [
        ("identity", None, lambda u: 0 * u + 1),
        ("clipped", None, lambda u: (abs(u) <= 1) * 1.0),
        ("polynomial", None, lambda u: max(0, 2 - 2 * abs(u))),
        ("tanh", 3.0, lambda u: 3 / math.cosh(3 * u) ** 2),
        ("erf", 2.0, lambda u: 4 / math.sqrt(math.pi) * math.exp(-4 * u * u)),
        ("relu", None, lambda u: (u > 0) * 1.0),
        (lambda u: u.square(), None, lambda u: u * u),
        (surrogate("tanh", 2.0), None, lambda u: 2 / math.cosh(2 * u) ** 2),
    ],
)
def test_the_backward_rule_of_a_sign_is_the_declared_derivative(which, sharpness, derivative):
    net = nn.Sequential(Sign("clipped"), nn.Flatten()).eval()
    x = torch.tensor([[-1.5, -1.0, -0.4, 0.0, 0.2, 1.0, 1.2]], dtype=F64)
    g = gradient(BPDA(which, sharpness), net, x, lambda z: z.sum(1))[2]
    assert g[0].tolist() == pytest.approx([derivative(float(u)) for u in x[0]], rel=1e-12)


@pytest.mark.parametrize(
    ("quantizer", "centre", "half"),
    [
        (Uniform(3, signed=False, limit=2.0), 1.0, 1.0),
        (Uniform(3, signed=True, limit=2.0), 0.0, 2.0),
        (KBit(2), 0.0, None),
        (FeatureSign(halfwave=True), 0.0, 0.5),
        (SAWBActivation(4), None, None),
        (Sign(), 0.0, 1.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_stand_ins_are_scaled_to_the_range_of_the_quantizer(quantizer, centre, half):
    quantizer.eval()
    ends = quantizer(torch.tensor([-1e5, 1e5], dtype=F64)).detach()
    half = float(ends[1] - ends[0]) / 2 if half is None else half
    assert half == pytest.approx(float(ends[1] - ends[0]) / 2)
    centre = half if centre is None else centre  # a rectifier: from 0 to 2 h
    net = nn.Sequential(quantizer, nn.Flatten()).eval()
    u = torch.tensor([[-1.01, -0.99, 0.99, 1.01]], dtype=F64)
    g = gradient(BPDA("clipped"), net, centre + half * u, lambda z: z.sum(1))[2]
    assert g[0].tolist() == [0, 1, 1, 0]


def test_a_quantizer_that_scales_each_sample_keeps_its_scale_backward():
    net = nn.Sequential(InputSign("mean"), nn.Flatten()).eval()
    x = torch.randn(3, 5, generator=draw(1), dtype=F64)
    z, _, g = gradient(BPDA("clipped"), net, x, lambda z: z.sum(1))
    assert torch.equal(z, net(x).detach())
    assert torch.allclose(g, gradient(BACKPROP, net, x, lambda z: z.sum(1))[2], rtol=1e-12)


def test_stand_ins_take_the_place_of_quantizers_of_activations_alone():
    net = mlp()  # latent weights under a sign, activations under a sign
    taught = with_stand_ins(net, "identity")
    names = [type(m).__name__ for m in taught.modules()]
    assert names.count("_Other") == 3
    assert all(p is q for p, q in zip(net.parameters(), taught.parameters(), strict=True))
    assert not any("_Other" in type(m).__name__ for m in net.modules())  # the net itself is as it was
    hard = variant(net, "deployed")
    assert any(isinstance(m, Hard) for m in hard.modules())
    x = torch.randn(4, 8, generator=draw(), dtype=F64)
    assert torch.equal(with_stand_ins(hard, "clipped")(x), hard(x))


def test_the_copy_is_made_once_follows_the_weights_and_is_let_go():
    net = harden(mlp())
    estimator = BPDA("tanh")
    first = estimator.bind(Victim(net)).net
    assert BPDA("tanh").bind(Victim(net)).net is first
    assert BPDA("identity").bind(Victim(net)).net is not first
    x = torch.randn(4, 8, generator=draw(), dtype=F64)
    with torch.no_grad():
        next(net.parameters()).mul_(-1)
    assert torch.equal(estimator.bind(Victim(net)).net(x), net(x))
    with torch.no_grad():
        net.get_submodule(next(n for n, m in net.named_modules() if isinstance(m, nn.Linear))).weight = nn.Parameter(
            next(net.parameters()).clone()
        )
    again = estimator.bind(Victim(net)).net
    assert again is not first
    assert torch.equal(again(x), net(x))
    gone = weakref.ref(again)
    del first, again, net
    assert gone() is None


def test_the_range_of_a_stand_in_follows_the_quantizer():
    quantizer = Uniform(2, signed=False, limit=1.0)
    net = nn.Sequential(quantizer, nn.Flatten()).eval()
    x = torch.tensor([[1.5]], dtype=F64)
    total = lambda z: z.sum(1)  # noqa: E731
    assert float(gradient(BPDA("clipped"), net, x, total)[2]) == 0
    quantizer.limit.fill_(2.0)
    assert float(gradient(BPDA("clipped"), net, x, total)[2]) == 1


def test_a_quantizer_that_stands_in_two_places_is_replaced_in_both():
    sign = Sign("clipped")
    net = nn.Sequential(sign, nn.Linear(3, 3).double(), sign, nn.Linear(3, 2).double()).eval()
    other = nn.Sequential(Sign("identity"), net[1], Sign("identity"), net[3]).eval()
    x = 3 * torch.randn(6, 3, generator=draw(), dtype=F64)
    assert torch.equal(gradient(BPDA("identity"), net, x)[2], gradient(BACKPROP, other, x)[2])


def test_hand_written_signs_are_stood_in_for_by_name():
    net = nn.Sequential(linear(5), HandSign(detached_sign), linear(3, 5)).eval()
    dead = nn.Sequential(net[0], HandSign(lambda x: hard_sign(x).detach()), net[2]).eval()
    x = torch.randn(9, 7, generator=draw(), dtype=F64)
    z, _, g = gradient(BPDA("identity", layers=("1",)), dead, x)
    assert torch.equal(z, dead(x).detach())
    assert torch.equal(g, gradient(BACKPROP, net, x)[2])


def test_bpda_of_a_net_without_quantized_activations_says_what_to_do():
    with pytest.raises(InputError, match="Backprop"):
        BPDA().bind(Victim(linear()))
    with pytest.raises(UnknownNameError, match="act9"):
        BPDA(layers=("act9",)).bind(Victim(linear()))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: BPDA("relux"), UnknownNameError),
        (lambda: BPDA("relu", 2.0), InputError),
        (lambda: BPDA("clipped", 2.0), InputError),
        (lambda: BPDA("tanh", -1.0), InputError),
        (lambda: BPDA(layers="act"), InputError),
        (lambda: NES(0), InputError),
        (lambda: NES(sigma=0.0), InputError),
        (lambda: SPSA(delta=-1.0), InputError),
        (lambda: SPSA(samples=1.5), InputError),
        (lambda: FiniteDifference(math.nan), InputError),
        (lambda: FiniteDifference(0.1, 0), InputError),
        (lambda: Smoothed(0.0), InputError),
        (lambda: EOT(samples=0), InputError),
    ],
)
def test_settings_out_of_range_are_refused(make, error):
    with pytest.raises(error):
        make()


def test_relu_as_a_stand_in_is_the_derivative_of_the_rectifier():
    x = torch.linspace(-2, 2, 41, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert torch.equal(stand_in("relu").derivative(x.detach()), g)


# -------------------------------------------------------------------------------------------------- smoothed, random


def test_smoothed_gradients_average_what_points_all_over_the_place():
    class Shattered(nn.Module):
        """A straight line with a fast wave on it: (0, x + sin(200 x) / 20); the wave's slope is ten times the line's."""

        def forward(self, x: Tensor) -> Tensor:
            v = (x + torch.sin(200 * x) / 20).sum(1)
            return torch.stack([torch.zeros_like(v), v], 1)

    net = Shattered().eval()
    x = torch.rand(40, 3, generator=draw(1), dtype=F64)
    assert float((gradient(BACKPROP, net, x)[2] < 0).double().mean()) > 0.3
    g = gradient(Smoothed(0.1, 400), net, x)[2]
    # E cos(200 (x + r u)) = cos(200 x) exp(-200) is 0: the mean gradient is 1, its noise 10 / sqrt(2 K)
    assert float((g - 1).abs().max()) < 5 * 10 / math.sqrt(800)
    assert float(g.mean()) == pytest.approx(1, abs=4 * 10 / math.sqrt(800 * 120))


class Noisy(nn.Module):
    """A linear net with normal noise on its logits, from torch's global generator, in eval mode too."""

    def __init__(self, net: nn.Module, noise: float) -> None:
        super().__init__()
        self.net, self.noise = net, noise
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z * (1 + self.noise * torch.randn(len(z), 1, dtype=z.dtype)) + self.noise * torch.randn_like(z)


def test_eot_is_the_mean_of_gradients_over_draws():
    net, n, K = linear(), 400, 25
    x = torch.rand(1, 7, generator=draw(), dtype=F64).expand(n, 7).clone()
    _, _, g = gradient(EOT(samples=K), Noisy(net, 0.5), x)
    w = net.weight[1].detach()
    assert torch.allclose(g.std(0), 0.5 * w.abs() / math.sqrt(K), rtol=0.2)
    assert bool(((g.mean(0) - w).abs() < 4 * g.std(0) / math.sqrt(n)).all())


def test_random_nets_are_refused_without_eot_and_attacked_with_it():
    net = Noisy(linear(), 0.3)
    x = torch.rand(20, 7, generator=draw(4), dtype=F64)
    y = net.net(x).argmax(1)
    with pytest.raises(InputError, match="twice"):
        PGD(steps=2)(net, x, y, 0.2)
    attack = PGD(steps=4, loss="margin", estimator=EOT(samples=12), seed=1)
    state = torch.random.get_rng_state()
    one, two = attack(net, x, y, 0.2), attack(net, x, y, 0.2)
    assert torch.equal(one.adversarial, two.adversarial)  # same seed, same result
    assert torch.equal(torch.random.get_rng_state(), state)  # and the global generator is as it was
    assert one.success.any()
    assert one.backward == 12 * (one.backward // 12)
    scaled = PGD(steps=2, scaling=NJS(), estimator=EOT(NES(5, 0.1), samples=3))(net, x, y, 0.2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scaled.success.any()


def test_a_lucky_draw_breaks_nothing():
    # Logits (1, 0) with noise of deviation 1: a single draw decides for class 1 in 24 % of questions, the mean of 50 never.
    class Coin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1) + 1e-6 * x[:, :2]
            return z + torch.randn_like(z)

    x, y = torch.rand(12, 4, generator=draw()), torch.zeros(12, dtype=torch.int64)
    assert PGD(steps=4, estimator=EOT(samples=50))(Coin().eval(), x, y, 0.1).accuracy == 1.0


def test_eot_of_a_net_that_is_not_random_is_back_propagation():
    net, x = linear(), torch.rand(5, 7, generator=draw(), dtype=F64)
    for a, b in zip(gradient(EOT(samples=4), net, x), gradient(BACKPROP, net, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-14)


# ---------------------------------------------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("estimator", [NES(6, 0.1), SPSA(6, 0.1), FiniteDifference(0.1, 3), Smoothed(0.1, 4)])
def test_the_same_seed_gives_the_same_gradient_and_no_global_draw(estimator):
    net, x = linear(), torch.rand(5, 7, generator=draw(), dtype=F64)
    state = torch.random.get_rng_state()
    a, b, c = (gradient(estimator, net, x, lambda z: z.square().sum(1), seed)[2] for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("estimator", "forward", "backward"),
    [
        (BACKPROP, 1, 1),
        (NES(6), 13, 0),
        (NES(6, antithetic=False), 7, 0),
        (SPSA(6), 13, 0),
        (FiniteDifference(), 15, 0),
        (FiniteDifference(coordinates=3), 7, 0),
        (Smoothed(samples=4), 5, 5),
        (EOT(samples=3), 3, 3),
        (EOT(NES(6), samples=3), 39, 0),
    ],
)
def test_questions_are_counted(estimator, forward, backward):
    victim = Victim(linear())
    x = torch.rand(5, 7, generator=draw(), dtype=F64)
    estimator.gradient(estimator.bind(victim), x, second, draw())
    assert victim.count == {"forward": 5 * forward, "backward": 5 * backward}


@pytest.mark.parametrize("estimator", [SPSA(9, 0.1), FiniteDifference(0.1), FiniteDifference(0.1, 5)])
def test_neighbours_come_in_parts_that_fit_the_memory(estimator, monkeypatch):
    net, x = linear(), torch.rand(5, 7, generator=draw(), dtype=F64)
    whole = gradient(estimator, net, x, margin_of_0)[2]
    seen: list[int] = []
    monkeypatch.setattr("qlab.attacks.estimators._NUMBERS", 2 * x.numel())
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    parts = gradient(estimator, net, x, margin_of_0)[2]
    assert max(seen) == 10
    assert torch.allclose(parts, whole, rtol=1e-12) or isinstance(estimator, SPSA)  # which draws part by part


def margin_of_0(z: Tensor) -> Tensor:
    return margin(z, torch.zeros(len(z), dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [BACKPROP, NES(8, 0.1), SPSA(8, 0.1), FiniteDifference(0.1), Smoothed(0.1, 3)])
def test_gradients_have_the_dtype_of_the_inputs(estimator, dtype):
    net, x = linear().to(dtype), torch.rand(5, 7, generator=draw()).to(dtype)
    z, v, g = gradient(estimator, net, x)
    assert z.dtype == v.dtype == g.dtype == dtype
    assert bool(g.isfinite().all())


def test_questions_go_to_the_fast_net():
    net, asked = linear(), []

    def fast(x: Tensor) -> Tensor:
        asked.append(len(x))
        return net(x)

    x = torch.rand(5, 7, generator=draw(), dtype=F64)
    y = net(x).argmax(1)
    slow = nn.Sequential(net).eval()
    slow.register_forward_pre_hook(lambda *_: asked.append(-1))
    PGD(steps=1, loss="margin", estimator=NES(3, 0.1), random_start=False)(slow, x, y, 0.01, fast=fast)
    assert asked[:2] == [-1, -1]  # the checks before the attack look at the net itself
    assert all(n > 0 for n in asked[2:])


def test_every_estimator_serves_an_attack_and_is_hashable():
    net, x = linear(), torch.rand(12, 7, generator=draw(), dtype=F64)
    y = net(x).argmax(1)
    for estimator in (BACKPROP, NES(20, 0.1), SPSA(20, 0.1), FiniteDifference(0.1), Smoothed(0.05, 2), EOT(samples=2)):
        attack: Attack = PGD(steps=5, loss="margin", estimator=estimator)
        assert hash(attack) == hash(PGD(steps=5, loss="margin", estimator=estimator))
        assert attack(net, x, y, 1.0).accuracy < 0.2


def test_a_net_that_cuts_its_inputs_off_is_named_though_its_weights_have_gradients() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.detach())

    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    net = Cut().eval()
    with pytest.raises(InputError, match="no gradient reaches the inputs"):
        PGD(2)(net, x, net(x).argmax(1), 0.1)
