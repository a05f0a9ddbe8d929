"""Temperature scaling: Proposition 1, network Jacobian scaling, Hessian norm scaling, against closed forms and autograd."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from qlab.attacks.losses import ce
from qlab.attacks.pgd import PGD
from qlab.attacks.scaling import (
    HNS,
    NJS,
    UNSCALED,
    Fixed,
    beta_rho,
    hessian_norm,
    hns_beta,
    hns_grid,
    jacobians,
    njs_beta1,
    scaled,
)
from qlab.attacks.victim import Victim
from qlab.diagnose.jacobian import jacobian
from qlab.errors import InputError, UnknownNameError
from tests.diagnose.small_nets import foreign

F64 = torch.float64


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(n: int, d: int, seed: int = 0) -> Tensor:
    """Logits whose scale runs over five powers of ten."""
    z = torch.randn(n, d, generator=draw(seed), dtype=F64)
    return z * 10 ** (4 * torch.rand(n, 1, generator=draw(seed + 1), dtype=F64) - 2)


def relu_net(seed: int = 0, inputs: int = 6, classes: int = 4) -> nn.Module:
    net = nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, classes)).double()
    for i, p in enumerate(net.parameters()):
        with torch.no_grad():
            p.normal_(0, 1, generator=draw(seed + 10 * i))
    return net.eval()


class Times(nn.Module):
    """A net whose logits are multiplied by c."""

    def __init__(self, net: nn.Module, c: float) -> None:
        super().__init__()
        self.net, self.c = net, c
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c * self.net(x)


def linear(W: Tensor, b: Tensor | None = None) -> nn.Module:
    net = nn.Linear(W.shape[1], W.shape[0], bias=b is not None).double()
    with torch.no_grad():
        net.weight.copy_(W)
        if b is not None:
            net.bias.copy_(b)
    return net.eval()


# ------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("rule", [Fixed(0.03), NJS(), HNS("log"), HNS("reference")])
def test_every_rule_gives_a_positive_factor_that_keeps_the_decision(rule):
    net = relu_net()
    x = torch.randn(500, 6, generator=draw(3), dtype=F64)
    y = net(x).argmax(-1).roll(1)
    victim = Victim(net)
    bound = rule.bind(victim, x, y)
    z = net(x).detach()
    beta = rule.factors(bound, rule.start(bound, victim, x, y), z, y)
    assert beta.shape == (500,)
    assert bool((beta > 0).all() and beta.isfinite().all())
    assert torch.equal((beta[:, None] * z).argmax(-1), z.argmax(-1))


def test_unscaled_and_one_give_the_same_attack_bit_for_bit():
    net = relu_net()
    x = torch.rand(40, 6, generator=draw(1), dtype=F64)
    y = net(x).argmax(-1)
    a, b = (PGD(steps=5, scaling=rule, seed=3)(net, x, y, 0.1) for rule in (UNSCALED, Fixed(1.0)))
    assert torch.equal(a.adversarial, b.adversarial)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_changes_decisions_is_refused(beta):
    with pytest.raises(InputError, match="beta"):
        Fixed(beta)


# ------------------------------------------------------------------------------------------------- Proposition 1, NJS


@pytest.mark.parametrize("d", [2, 3, 10, 100])
def test_below_beta_rho_the_softmax_leaves_more_than_rho(d):
    z = random_logits(5000, d)
    for rho in (1e-6, 0.01, 0.3 * (d - 1) / d, 0.9 * (d - 1) / d):
        beta = beta_rho(z, rho)
        p = torch.softmax(0.999 * beta[:, None] * z, -1)
        assert bool((1 - p.amax(-1) > rho).all())


def test_beta_rho_is_attained_where_all_other_logits_are_equal_and_only_there():
    z = torch.tensor([[7.0, 2, 2, 2, 2], [7, 2.5, 2, 2, 2]], dtype=F64)
    rest = 1 - torch.softmax(beta_rho(z, 0.01)[:, None] * z, -1).amax(-1)
    assert float(rest[0]) == pytest.approx(0.01, rel=1e-12)
    assert float(rest[1]) > 0.0101


def test_saturated_logits_are_scaled_down_never_up():
    z = random_logits(20_000, 10)
    y = z.argmax(-1)
    rest = 1 - torch.softmax(z, -1).amax(-1)
    beta = NJS(rho=0.01).factors(1.0, None, z, y)
    saturated = rest <= 0.01
    assert 0.2 < float(saturated.double().mean()) < 0.9  # both branches are there
    assert bool((beta[saturated] <= 1).all())
    assert torch.equal(beta[saturated], beta_rho(z[saturated], 0.01))
    assert bool((beta[~saturated] == 1).all())


def test_njs_uses_the_prediction_of_the_scaled_logits():
    z = torch.tensor([[30.0, 0.0, 1.0]], dtype=F64)
    y = torch.tensor([0])
    # At beta1 = 0.1 the gap is 3: 1 - p_y = 0.096 > rho; at 1 it would be saturated.
    assert float(NJS().factors(0.1, None, z, y)) == pytest.approx(0.1, rel=1e-15)
    assert float(NJS().factors(1.0, None, z, y)) == pytest.approx(math.log(2 * 0.99 / 0.01) / 30, rel=1e-14)


def test_njs_of_a_misclassified_example_is_beta1():
    z = torch.tensor([[300.0, 0.0, 1.0]], dtype=F64)
    assert float(NJS().factors(0.5, None, z, torch.tensor([1]))) == 0.5


def test_beta1_of_a_linear_net_is_the_classes_over_the_nuclear_norm():
    W = torch.randn(5, 9, generator=draw(), dtype=F64)
    x = torch.rand(7, 9, generator=draw(1), dtype=F64)
    assert njs_beta1(linear(W), x) == pytest.approx(5 / np.linalg.norm(W.numpy(), "nuc"), rel=1e-13)


def test_after_njs_the_mean_singular_value_is_one():
    net = relu_net()
    x = torch.randn(30, 6, generator=draw(4), dtype=F64)
    beta1 = njs_beta1(net, x)
    scaled_net = Times(net, beta1)
    mu = torch.stack(
        [torch.linalg.svdvals(torch.autograd.functional.jacobian(scaled_net, row[None])[0, :, 0]) for row in x]
    )
    assert float(mu.mean()) == pytest.approx(1, rel=1e-13)
    assert jacobian(scaled_net, x).beta1 == pytest.approx(1, rel=1e-12)  # and the diagnosis says the same


def test_njs_takes_the_first_images_and_books_its_questions():
    net = relu_net()
    x = torch.randn(30, 6, generator=draw(4), dtype=F64)
    y = torch.zeros(30, dtype=torch.int64)
    victim = Victim(net)
    assert NJS(images=8).bind(victim, x, y) == njs_beta1(net, x[:8])
    assert victim.count == {"forward": 8, "backward": 32}


def test_a_net_without_gradient_has_no_temperature():
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.floor(4 * x[:, :3].detach())

    x = torch.rand(5, 6, generator=draw(), dtype=F64)
    assert njs_beta1(Steps(), x) == 1.0
    y = Steps()(x).argmax(-1)
    assert bool((HNS().start(None, Victim(Steps()), x, y) > 0).all())


@pytest.mark.parametrize("old", [False, True])
def test_jacobians_of_hand_written_straight_through_nets_are_those_of_single_backward_passes(old):
    net = foreign(old_style=old)
    x = torch.randn(6, 8, generator=draw(2), dtype=F64)
    z, J = (torch.cat(parts) for parts in zip(*jacobians(net, x), strict=True))
    for k in range(3):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(leaf)[:, k].sum(), leaf)
        assert torch.allclose(J[:, k], g, rtol=1e-13, atol=1e-13)
    assert torch.equal(z, net(x).detach())


def test_jacobians_come_in_parts_that_fit_the_memory(monkeypatch):
    net = relu_net()
    x = torch.randn(7, 6, generator=draw(2), dtype=F64)
    whole = torch.cat([J for _, J in jacobians(net, x)])
    monkeypatch.setattr("qlab.attacks.scaling._NUMBERS", 2 * 4 * 6)
    parts = [J for _, J in jacobians(net, x)]
    assert [len(J) for J in parts] == [1, 2, 2, 2]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-14)


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.1, math.nan])
def test_njs_refuses_a_rho_that_two_classes_cannot_reach(rho):
    with pytest.raises(InputError, match="rho"):
        NJS(rho=rho)


def test_beta_rho_refuses_a_rho_that_the_classes_cannot_reach():
    with pytest.raises(InputError, match="3 classes"):
        beta_rho(torch.zeros(1, 3), 0.7)


# --------------------------------------------------------------------------------------------------------------- HNS


def test_the_gram_formula_is_the_norm_of_the_autograd_hessian():
    net = relu_net()
    x = torch.randn(12, 6, generator=draw(5), dtype=F64)
    z, J = (torch.cat(parts) for parts in zip(*jacobians(net, x), strict=True))
    betas = torch.tensor([0.05, 0.3, 1.0, 2.5], dtype=F64)
    h = hessian_norm(betas, z, J @ J.transpose(1, 2))
    for i, row in enumerate(x):
        for k, beta in enumerate(betas.tolist()):
            H = torch.autograd.functional.hessian(
                lambda v, beta=beta: F.cross_entropy(beta * net(v[None]), torch.tensor([1])), row
            )
            p = torch.softmax(beta * z[i], -1)
            explicit = beta**2 * J[i].T @ (torch.diag(p) - p[:, None] * p) @ J[i]
            assert torch.allclose(H, explicit, rtol=0, atol=1e-12 * max(1.0, float(H.norm())))
            assert float(h[i, k]) == pytest.approx(float(H.norm()), rel=1e-10, abs=1e-12)


def test_the_gram_formula_holds_where_the_softmax_is_saturated():
    # p is one-hot to 1e-52: the plain trace would be rounding noise.
    z = torch.tensor([[120.0, 0.0, -5.0]], dtype=F64)
    J = torch.randn(1, 3, 7, generator=draw(6), dtype=F64)
    h = float(hessian_norm(torch.ones(1, dtype=F64), z, J @ J.transpose(1, 2)))
    # to first order in q = p_2: S = q (e1 - e2)(e1 - e2)'
    assert h == pytest.approx(math.exp(-120) * float((J[0, 0] - J[0, 1]).square().sum()), rel=1e-2)
    q = torch.softmax(z, -1)[0, 1:]
    D = J[0, 1:] - J[0, :1]  # H = D' (diag(q) - q q') D exactly, with q the other classes' probabilities
    assert h == pytest.approx(float((D.T @ (torch.diag(q) - q[:, None] * q) @ D).norm()), rel=1e-12)


def test_h_vanishes_at_both_ends_and_has_its_maximum_between():
    z = random_logits(50, 10).sort(-1, descending=True).values
    z = z / (z[:, :1] - z[:, 1:2])  # gap of the top two: 1
    J = torch.randn(50, 10, 20, generator=draw(7), dtype=F64)
    betas = torch.logspace(-6, 3, 400, dtype=F64)
    h = hessian_norm(betas, z, J @ J.transpose(1, 2))
    peak = h.amax(-1)
    assert bool((h[:, 0] < 1e-6 * peak).all() and (h[:, -1] < 1e-12 * peak).all())


def test_equal_rows_of_the_jacobian_leave_no_curvature_at_any_temperature():
    z = torch.tensor([[3.0, 1.0, 0.5]], dtype=F64)
    row = torch.randn(1, 1, 5, generator=draw(), dtype=F64)
    J = row.expand(1, 3, 5)
    G = J @ J.transpose(1, 2)
    assert float(hessian_norm(torch.logspace(-3, 2, 50, dtype=F64), z, G).abs().max()) < 1e-12
    assert float(hns_beta(z, torch.ones(1, 3, 3, dtype=F64), torch.tensor([0]))) == 1.0  # and the rule falls back


STAR = {
    2: (2.3994, 0.9168),
    3: (2.6228, 0.8732),
    5: (2.9466, 0.8264),
    10: (3.4463, 0.7771),
    100: (5.3636, 0.6832),
    1000: (7.4548, 0.6337),
}


@pytest.mark.parametrize("d", STAR)
def test_hns_of_symmetric_logits_is_where_the_table_says(d):
    z = torch.zeros(1, d, dtype=F64)
    z[0, 0] = 1  # so that t = beta
    G = torch.eye(d, dtype=F64)[None]
    best = minimize_scalar(
        lambda t: -float(hessian_norm(torch.tensor([t], dtype=F64), z, G)),
        bounds=(0.5, 12),
        method="bounded",
        options={"xatol": 1e-9},
    ).x
    t, p = STAR[d]
    assert best == pytest.approx(t, abs=6e-5)
    assert float(torch.softmax(best * z, -1)[0, 0]) == pytest.approx(p, abs=6e-5)
    # independent: h from its two distinct entries of p
    grid = np.linspace(0.5, 12, 200_001)
    q = 1 / (np.exp(grid) + d - 1)
    P = 1 - (d - 1) * q
    S2 = (P * (1 - P)) ** 2 + 2 * (d - 1) * (P * q) ** 2 + (d - 1) * (q * (1 - q)) ** 2 + (d - 1) * (d - 2) * q**4
    assert best == pytest.approx(grid[(grid**2 * np.sqrt(S2)).argmax()], abs=2e-4)
    ratio = float(hns_beta(z, G, torch.tensor([0]))) / t
    betas = hns_grid(z)[0]
    assert abs(math.log(ratio)) <= math.log(float(betas[1] / betas[0]))  # within one point of the grid


@pytest.mark.parametrize("seed", range(3))
def test_hns_of_two_classes_is_2_39936_over_the_gap_whatever_the_jacobian(seed):
    z = random_logits(200, 2, seed)
    J = torch.randn(200, 2, 5, generator=draw(seed), dtype=F64)
    beta = hns_beta(z, J @ J.transpose(1, 2), z.argmax(-1))
    t = beta * (z.amax(-1) - z.amin(-1))
    assert torch.allclose(t, t[:1].expand_as(t), rtol=1e-9)
    assert float(t[0]) == pytest.approx(2.39936, rel=0.022)  # half a step of the grid: (165.8 / 0.04)^(1/199) = 1.043
    root = 2.3993573
    assert root * math.tanh(root / 2) == pytest.approx(2, abs=1e-6)


def test_the_grids_are_those_of_the_paper_and_two_hundred_by_logarithm():
    z = torch.tensor([[5.0, 3.0, *[0.0] * 8]], dtype=F64)  # gap of the top two: 2
    reference = 2 * hns_grid(z, "reference")[0]
    assert len(reference) == 100
    assert float(reference[0]) == pytest.approx(0.1065, abs=5e-5)
    assert float(reference[-1]) == pytest.approx(167.98, abs=5e-3)
    assert float((reference[1:] - reference[:-1]).std()) < 1e-12
    assert float(reference[1] - reference[0]) == pytest.approx(1.696, abs=5e-4)
    log = 2 * hns_grid(z, "log")[0]
    assert len(log) == 200
    assert torch.allclose(log[[0, -1]], reference[[0, -1]], rtol=1e-12)
    assert float((log[1:] / log[:-1]).std()) < 1e-12


def test_hns_falls_back_to_one_for_misclassified_examples_and_to_gamma_for_ties():
    z = torch.tensor([[3.0, 1, 0], [3, 1, 0], [3, 3, 1], [2, 2, 2]], dtype=F64)
    G = torch.eye(3, dtype=F64).expand(4, 3, 3)
    beta = hns_beta(z, G, torch.tensor([0, 1, 0, 0]))
    assert float(beta[0]) not in (1.0, 0.5)
    assert beta[1:].tolist() == [1.0, 0.5, 1.0]


def test_hns_at_an_end_of_the_grid_is_one():
    # Only the difference of two other classes' rows counts: h has its maximum where these classes have any weight, below t_0.
    z = torch.tensor([[1.0, 0.0, -400.0]], dtype=F64)
    J = torch.tensor([[[1.0, 0], [1, 0], [0, 3]]], dtype=F64)
    G = J @ J.transpose(1, 2)
    assert int(hessian_norm(hns_grid(z)[0], z, G).argmax()) == 0
    assert float(hns_beta(z, G, torch.tensor([0]))) == 1.0


def test_an_unknown_grid_is_named():
    with pytest.raises(UnknownNameError, match="linear"):
        HNS("linear")


# ------------------------------------------------------------------------------------- logit scale, gradient identity


@pytest.fixture(scope="module")
def float64_digits(digits_net):
    net, x, y = digits_net
    return copy.deepcopy(net).double(), x[:80].double(), y[:80]


@pytest.mark.parametrize("rule", [NJS(), HNS()])
def test_scaled_attacks_do_not_see_a_factor_on_the_logits(float64_digits, rule):
    net, x, y = float64_digits
    found = {
        c: PGD(steps=5, scaling=rule, random_start=False, early_stop=False)(Times(net, c), x, y, 0.1)
        for c in (0.01, 1.0, 100.0)
    }
    # HNS falls back to 1 where it finds no maximum, whatever the scale: those examples may differ
    same = torch.ones(80, dtype=torch.bool)
    if isinstance(rule, HNS):
        start = [rule.start(None, Victim(Times(net, c)), x, y) for c in (1.0, 100.0)]
        same = (start[0] / start[1] - 100).abs() < 1e-6
        assert float(same.double().mean()) > 0.8
    for c in (0.01, 100.0):
        assert torch.allclose(found[c].adversarial[same], found[1.0].adversarial[same], atol=1e-12, rtol=0)
        assert np.array_equal(found[c].success[same.numpy()], found[1.0].success[same.numpy()])


def test_plain_cross_entropy_sees_a_factor_on_the_logits(digits_net):
    net, x, y = digits_net
    accuracy = {c: PGD(steps=20)(Times(net, c), x[:150], y[:150], 0.2).accuracy for c in (1.0, 100.0)}
    repaired = PGD(steps=20, scaling=NJS())(Times(net, 100.0), x[:150], y[:150], 0.2).accuracy
    assert accuracy[100.0] > accuracy[1.0] + 0.3  # robust by rounding
    assert repaired < accuracy[1.0] + 0.1


@pytest.mark.parametrize("rule", [UNSCALED, NJS(), HNS()])
def test_a_shift_of_all_logits_changes_nothing(rule):
    W, b = torch.randn(4, 6, generator=draw(), dtype=F64), torch.zeros(4, dtype=F64)
    x = torch.rand(20, 6, generator=draw(1), dtype=F64)
    y = linear(W, b)(x).argmax(-1)
    plain, shifted = (PGD(steps=4, scaling=rule)(linear(W, b + c), x, y, 0.05) for c in (0.0, 64.0))
    assert torch.allclose(plain.adversarial, shifted.adversarial, atol=1e-12, rtol=0)


def test_the_scaled_gradient_is_beta_psi_j_and_has_its_limits():
    net = relu_net()
    x = torch.randn(10, 6, generator=draw(8), dtype=F64)
    z, J = (torch.cat(parts) for parts in zip(*jacobians(net, x), strict=True))
    order = z.argsort(-1, descending=True)
    top, second = order[:, 0], order[:, 1]

    def direction(beta: float | Tensor, y: Tensor) -> Tensor:
        beta = torch.as_tensor(beta, dtype=F64).expand(10)[:, None]
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(ce(beta * net(leaf), y).sum(), leaf)
        p = torch.softmax(beta * z, -1)
        assert torch.allclose(g, beta * pull(p - one[y]), rtol=1e-9, atol=1e-13)
        return g / beta

    def pull(weights: Tensor) -> Tensor:
        return torch.einsum("nd,ndi->ni", weights, J)

    one = torch.eye(4, dtype=F64)
    ranked = z.gather(1, order)
    ahead, behind = ranked[:, 0] - ranked[:, 1], ranked[:, 1] - ranked[:, 2]
    assert torch.allclose(direction(1e-9, top), pull(0.25 - one[top]), atol=1e-6)  # uniform pull
    large = 40 / torch.minimum(ahead, behind)
    assert torch.allclose(direction(large, second), pull(one[top] - one[second]), atol=1e-9)  # the margin's gradient
    assert float(direction(large, top).norm(dim=1).max()) < 1e-12  # of a correct example nothing is left
    # but its direction, as long as rounding leaves it, is the pull to the nearest class
    some = ahead < 2 * behind
    assert int(some.sum()) >= 3
    g = direction(12 / behind, top)[some]
    wanted = pull(one[second] - one[top])[some]
    assert float(F.cosine_similarity(g / g.abs().amax(1, keepdim=True), wanted).min()) > 1 - 1e-8


def test_one_step_of_length_eps_is_the_fast_gradient_sign_method():
    net = relu_net()
    x = torch.rand(30, 6, generator=draw(9), dtype=F64)
    y = net(x).argmax(-1)
    rule, eps = NJS(), 0.03
    found = PGD(steps=1, eta=eps, scaling=rule, random_start=False, early_stop=False)(net, x, y, eps)
    beta = rule.factors(njs_beta1(net, x), None, net(x).detach(), y)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(beta[:, None] * net(leaf), y, reduction="sum"), leaf)
    step = (x + eps * g.sign()).clamp(0, 1)
    better = net(step).argmax(-1) != y
    assert bool(better.any())
    assert torch.allclose(found.adversarial[better], step[better], atol=1e-15)


def test_scaled_keeps_the_factor_of_the_points_themselves():
    rule, y = NJS(), torch.tensor([0])
    near, far = torch.tensor([[40.0, 0.0]]), torch.tensor([[80.0, 0.0]])
    f = scaled(ce, rule, 1.0, None, y)
    first = f(near)
    beta = rule.factors(1.0, None, near, y)
    assert torch.equal(first, ce(beta[:, None] * near, y))
    assert torch.equal(f(far), ce(beta[:, None] * far, y))  # not the factor of `far`, which would give the same loss


# ------------------------------------------------------------------------------------------------------- where it dies


def error_signal(gap: float, dtype: torch.dtype, d: int = 10, others: float = 0.0) -> Tensor:
    """p - e_y of logits whose label is ahead of one class by the gap and of the others by gap + others, as autograd finds it."""
    z = torch.full((1, d), -others, dtype=dtype)
    z[0, 0], z[0, 1] = gap, 0
    z.requires_grad_()
    (g,) = torch.autograd.grad(ce(z, torch.tensor([0])).sum(), z)
    return g[0]


@pytest.mark.parametrize(("dtype", "kept", "lost"), [(torch.float32, 16, 17), (torch.float64, 36, 37.5)])
def test_the_pull_away_from_the_label_is_rounded_away_at_its_threshold(dtype, kept, lost):
    for others in (0.0, 1000.0):
        assert float(error_signal(kept, dtype, others=others)[0]) < 0
    assert float(error_signal(lost, dtype, others=1000.0)[0]) == 0
    assert float(error_signal(lost, dtype, others=1000.0)[1]) > 0  # only the pull to the other class is left


@pytest.mark.parametrize(("dtype", "kept", "lost"), [(torch.float32, 103, 104), (torch.float64, 745, 746)])
def test_the_whole_error_signal_is_zero_from_its_threshold_on(dtype, kept, lost):
    assert bool((error_signal(kept, dtype) != 0).any())
    assert bool((error_signal(lost, dtype) == 0).all())


def test_a_temperature_wakes_what_float32_lost():
    z = torch.tensor([[200.0, 0.0, 1.0]])
    y = torch.tensor([0])
    beta = NJS().factors(1.0, None, z, y)
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(ce(beta[:, None] * leaf, y).sum(), leaf)
    assert bool((g != 0).all())


def test_the_sign_of_a_gradient_is_at_most_as_long_as_the_root_of_its_size():
    g = torch.randn(50, 17, generator=draw(), dtype=F64) * (torch.rand(50, 17, generator=draw(1)) > 0.3)
    length = g.sign().norm(dim=1)
    assert bool((length <= math.sqrt(17)).all())
    assert torch.allclose(length.square(), (g != 0).sum(1).double())
