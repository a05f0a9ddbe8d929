"""Attribution maps equal brute force, closed forms and captum's own; what they explain is told from how they behave."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.diagnose.attribution import attribute, attributing, patches
from qlab.diagnose.attribution_deeplift import nonlinearities, rescaled
from qlab.diagnose.attribution_methods import METHODS
from qlab.diagnose.attribution_twins import agreement, twins
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, Uniform, harden, quantize


def fresh(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def mlp(activation: Callable[[], nn.Module], inputs: int = 6, seed: int = 0) -> nn.Module:
    return fresh(
        lambda: nn.Sequential(nn.Linear(inputs, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, 3)),
        seed,
    )


def cnn(activation: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return fresh(
        lambda: nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1),
            activation(),
            nn.Conv2d(5, 4, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        seed,
    )


def batch(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def difference(net: nn.Module, x: Tensor, target: int) -> np.ndarray:
    with torch.no_grad():
        return (net(x) - net(torch.zeros_like(x)))[:, target].numpy()


class Functional(nn.Module):
    """A sign written as a function, straight-through: no module that a rule could be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.b(z + (z.sign() - z).detach())


# ---- completeness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_integrated_gradients_of_smooth_nets_become_complete_with_steps(activation: Callable[[], nn.Module]) -> None:
    net, x = mlp(activation), batch(8, 6)
    gaps = [attribute(net, x, 1, ("integrated_gradients",), steps=n)["integrated_gradients"].relative for n in (4, 400)]
    assert np.median(gaps[1]) < 2e-3
    assert np.median(gaps[1]) < np.median(gaps[0]) / 5


def test_integrated_gradients_of_sign_nets_stay_incomplete_with_steps() -> None:
    net, x = mlp(Sign), batch(8, 6)
    gaps = [
        attribute(net, x, 1, ("integrated_gradients",), steps=n)["integrated_gradients"].relative for n in (50, 500)
    ]
    assert np.median(gaps[1]) > 0.1
    assert np.median(gaps[1]) > np.median(gaps[0]) / 2


def test_residual_is_the_gap_between_scores_and_difference_of_outputs() -> None:
    net, x = mlp(Sign), batch(8, 6)
    a = attribute(net, x, 2, ("integrated_gradients", "input_x_gradient"))
    expected = difference(net, x, 2)
    np.testing.assert_allclose(a.difference, expected, rtol=1e-12)
    for m in a.maps:
        np.testing.assert_allclose(m.residual, np.abs(m.values.sum(1) - expected), atol=1e-12)
        np.testing.assert_allclose(m.relative, m.residual / np.abs(expected), rtol=1e-9)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("activation", [Sign, lambda: Uniform(3, signed=True, limit=1.0), nn.GELU, nn.Hardtanh])
def test_deeplift_is_complete_with_the_rule_on_every_activation(
    make: Callable[[Callable[[], nn.Module]], nn.Module], activation: Callable[[], nn.Module]
) -> None:
    net, x = make(activation), batch(8, 6) if make is mlp else batch(8, 1, 6, 6)
    m = attribute(net, x, 1, ("deeplift",))["deeplift"]
    assert m.relative.max() < 1e-5
    assert m.explains == "deployed"


def test_deeplift_without_the_rule_misses_the_difference_of_a_sign_net() -> None:
    from captum.attr import DeepLift

    net, x = mlp(Sign), batch(8, 6)
    with pytest.warns(UserWarning, match="Setting forward"):
        scores = DeepLift(net).attribute(x.requires_grad_(), torch.zeros_like(x), target=1)
    gap = np.abs(scores.detach().sum(1).numpy() - difference(net, x, 1)) / np.abs(difference(net, x, 1))
    assert np.median(gap) > 0.1


def test_deeplift_of_binary_weights_and_activations_is_that_of_the_hard_net() -> None:
    net, x = quantize(mlp(nn.ReLU), Sign, Sign), batch(8, 6)
    m = attribute(net, x, 1, ("deeplift",))["deeplift"]
    assert m.relative.max() < 1e-5
    np.testing.assert_allclose(m.values.sum(1), difference(harden(net), x, 1), rtol=1e-5)


def test_deeplift_of_a_linear_net_is_weight_times_difference() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(8, 6)
    m = attribute(net, x, 1, ("deeplift",), baseline=0.5)["deeplift"]
    np.testing.assert_allclose(m.values, ((x - 0.5) * net.get_parameter("weight")[1]).detach().numpy(), rtol=1e-12)


def test_nonlinearities_on_top_of_each_other_are_kept_apart() -> None:
    from captum.attr import DeepLift

    make = lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.ReLU(), nn.Linear(16, 3))  # noqa: E731
    net, x = fresh(make), batch(8, 6)
    assert attribute(net, x, 1, ("deeplift",))["deeplift"].relative.max() < 1e-5
    with pytest.warns(UserWarning, match="Setting forward"):  # captum alone takes a stale gradient
        alone = DeepLift(net).attribute(x.requires_grad_(), torch.zeros_like(x), target=1)
    assert np.abs(alone.detach().sum(1).numpy() - difference(net, x, 1)).max() > 0.01


def test_a_reused_activation_is_refused_with_its_name() -> None:
    act = Sign()
    net = fresh(lambda: nn.Sequential(nn.Linear(6, 16), act, nn.Linear(16, 12), act, nn.Linear(12, 3)))
    with pytest.raises(InputError, match=r"module '.*1' \(Sign\) runs 2 times"):
        attribute(net, batch(8, 6), 1, ("deeplift",))


def test_a_functional_sign_cannot_be_repaired_and_is_told() -> None:
    m = attribute(fresh(Functional), batch(8, 6), 1, ("deeplift", "integrated_gradients"))
    assert np.median(m["deeplift"].relative) > 0.1
    assert m["deeplift"].explains == "surrogate"
    assert m["deeplift"].verdict.word == "incomplete"
    assert "cannot be repaired" in m["deeplift"].verdict.reason
    assert m["integrated_gradients"].explains == "surrogate"


def test_the_rule_goes_to_elementwise_modules_only() -> None:
    net = fresh(lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3), nn.LogSoftmax(1)))
    assert set(nonlinearities(net, batch(4, 6))) == {"2"}


# ---- equal to brute force -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, Sign])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ablation_equals_brute_force(activation: Callable[[], nn.Module], size: int) -> None:
    net, x = cnn(activation), batch(3, 1, 6, 6)
    a = attribute(net, x, torch.tensor([0, 2, 1]), ("feature_ablation",), baseline=0.3, features=size)
    M = math.ceil(6 / size) ** 2
    expected = np.empty((3, M))
    with torch.no_grad():
        for n, c in enumerate((0, 2, 1)):
            for m, (r, k) in enumerate(itertools.product(range(0, 6, size), repeat=2)):
                z = x[n : n + 1].clone()
                z[..., r : r + size, k : k + size] = 0.3
                expected[n, m] = net(x[n : n + 1])[0, c] - net(z)[0, c]
    np.testing.assert_allclose(a["feature_ablation"].scores, expected, atol=1e-12)
    np.testing.assert_allclose(a.ablation, expected, atol=1e-12)


def test_flips_equal_brute_force() -> None:
    net, x = mlp(Sign), batch(4, 6).sign()
    a = attribute(net, x, 0, ("saliency",))
    with torch.no_grad():
        for m in range(6):
            z = x.clone()
            z[:, m] *= -1
            np.testing.assert_allclose(a.flips[:, m], (net(x) - net(z))[:, 0].numpy(), atol=1e-12)


def shapley(net: nn.Module, x: Tensor, target: int) -> np.ndarray:
    """Return the exact Shapley values (N, M) by enumerating all subsets; the baseline is zero."""
    M = x.shape[1]
    subsets = torch.tensor(list(itertools.product([0, 1], repeat=M)), dtype=x.dtype)
    with torch.no_grad():
        v = torch.stack([net(x * s)[:, target] for s in subsets])
    index = {tuple(map(int, s)): i for i, s in enumerate(subsets)}
    out = torch.zeros_like(x)
    for s, i in index.items():
        for m in range(M):
            if not s[m]:
                weight = math.factorial(sum(s)) * math.factorial(M - sum(s) - 1) / math.factorial(M)
                joined = index[(*s[:m], 1, *s[m + 1 :])]
                out[:, m] += weight * (v[joined] - v[i])
    return out.numpy()


def test_shapley_sampling_converges_to_exact_shapley_values() -> None:
    net, x = mlp(Sign), batch(5, 6)
    exact = shapley(net, x, 1)
    np.testing.assert_allclose(exact.sum(1), difference(net, x, 1), rtol=1e-9)  # the reference itself is complete
    errors = []
    for samples in (8, 800):
        m = attribute(net, x, 1, ("shapley_sampling",), samples=samples, seed=3)["shapley_sampling"]
        assert (m.residual <= samples * 2**-24 * np.abs(m.scores).sum(1)).all()  # captum adds up in float32
        errors.append(np.sqrt(((m.scores - exact) ** 2).mean()))
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("relu", [True, False])
def test_gradcam_equals_a_hand_written_one(relu: bool) -> None:
    net, x = cnn(Sign), batch(4, 1, 6, 6)
    got = attribute(net, x, 1, ("layer_gradcam",), layer="0", relu=relu)["layer_gradcam"].values
    A = net[0](x).detach().requires_grad_()  # type: ignore[index]
    (g,) = torch.autograd.grad(net[1:](A)[:, 1].sum(), A)  # type: ignore[index]
    cam = (g.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)
    np.testing.assert_allclose(got, (cam.relu() if relu else cam).detach().numpy(), atol=1e-12)
    assert (got < 0).any() != relu


def test_gradcam_of_a_layer_behind_all_quantizers_is_exact() -> None:
    net = fresh(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), Sign(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    a = attribute(net, batch(4, 1, 6, 6), 1, ("layer_gradcam", "saliency"))
    assert (a["layer_gradcam"].explains, a["saliency"].explains) == ("exact", "surrogate")
    assert attribute(net, batch(4, 1, 6, 6), 1, ("layer_gradcam",), layer="0")["layer_gradcam"].explains == "surrogate"


def test_gradient_maps_equal_autograd() -> None:
    net, x = mlp(nn.Tanh), batch(4, 6).requires_grad_()
    (g,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    a = attribute(net, x, 2, ("saliency", "input_x_gradient"))
    np.testing.assert_allclose(a["saliency"].values, g.abs().numpy(), atol=1e-14)
    np.testing.assert_allclose(a["input_x_gradient"].values, (x * g).detach().numpy(), atol=1e-14)


def test_smoothgrad_equals_noise_tunnel_with_the_same_noise() -> None:
    from captum.attr import NoiseTunnel, Saliency

    net, x = mlp(nn.Tanh, inputs=16).float(), batch(4, 16).float()
    got = attribute(net, x, 1, ("smoothgrad",), samples=8, noise=0.1, seed=7)["smoothgrad"].values
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        spread = 0.1 * float(x.max() - x.min())
        peer = NoiseTunnel(Saliency(net)).attribute(
            x.requires_grad_(), nt_samples=8, stdevs=spread, target=1, abs=False
        )
    np.testing.assert_allclose(got, peer.detach().numpy(), atol=1e-6)


def test_occlusion_with_a_window_of_one_is_ablation() -> None:
    net, x = mlp(Sign), batch(4, 6)
    a = attribute(net, x, 1, ("occlusion", "feature_ablation"), window=1)
    np.testing.assert_allclose(a["occlusion"].scores, a["feature_ablation"].scores, atol=1e-12)


def test_infidelity_is_zero_for_a_linear_net_and_not_for_shuffled_scores() -> None:
    net, x = fresh(lambda: nn.Linear(6, 3)), batch(4, 6)
    a = attribute(net, x, 1, ("input_x_gradient", "saliency"), scores=True)
    assert a["input_x_gradient"].infidelity.max() < 1e-12
    assert a["saliency"].infidelity.min() > 1e-4
    assert a["input_x_gradient"].sensitivity.max() < 1.0
    assert a["saliency"].sensitivity.max() < 1e-12  # the gradient of a linear net does not move


# ---- what a map explains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "gradient"),
    [
        (lambda: mlp(nn.ReLU), "exact"),
        (lambda: quantize(mlp(nn.ReLU), weights=Sign), "exact"),
        (lambda: mlp(Sign), "surrogate"),
        (lambda: quantize(mlp(nn.ReLU), Sign, Sign), "surrogate"),
    ],
    ids=["float", "binary weights", "sign", "binary"],
)
def test_gradients_explain_the_surrogate_of_quantized_activations_only(
    make: Callable[[], nn.Module], gradient: str
) -> None:
    a = attribute(make(), batch(6, 6), 1, ("saliency", "integrated_gradients", "feature_ablation", "shapley_sampling"))
    assert [m.explains for m in a.maps] == [gradient, gradient, "deployed", "deployed"]
    assert ("SURROGATE" in a.summary()) == (gradient == "surrogate")


def test_a_method_of_the_lab_is_looked_at_as_deployed() -> None:
    net = quantize(mlp(nn.ReLU), Sign, Sign)
    with torch.no_grad():
        a = attribute(net, batch(6, 6), 1, ("feature_ablation",))
        np.testing.assert_allclose(a.difference, difference(harden(net), batch(6, 6), 1), rtol=1e-12)


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution"])
def test_methods_that_only_know_relu_are_refused_on_sign_nets(method: str) -> None:
    from captum.attr import Deconvolution, GuidedBackprop

    net, x = mlp(Sign), batch(4, 6).requires_grad_()
    with pytest.raises(InputError, match="plain gradient"):
        attribute(net, x, 1, (method,))
    (g,) = torch.autograd.grad(net(x)[:, 1].sum(), x)
    with pytest.warns(UserWarning, match="Setting backward hooks"):
        alone = {"guided_backprop": GuidedBackprop, "deconvolution": Deconvolution}[method](net).attribute(x, target=1)
    assert torch.equal(alone, g)  # which is why
    assert method in METHODS
    assert attribute(mlp(nn.ReLU), x, 1, (method,))[method].values.any()


# ---- nothing is touched -------------------------------------------------------------------------------------------------


def numpy_key() -> bytes:
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(state, dict)
    return bytes(state["state"]["key"]) + str(state["state"]["pos"]).encode()


def test_global_random_numbers_net_and_tables_are_left_alone() -> None:
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    net, x = cnn(Sign), batch(3, 1, 6, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    table = dict(SUPPORTED_NON_LINEAR)
    state, numpy_state = torch.random.get_rng_state(), numpy_key()
    names = [name for name in METHODS if name not in ("guided_backprop", "deconvolution")]
    runs = [attribute(net, x, 1, names, samples=3, features=3, scores=True) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert numpy_key() == numpy_state
    assert table == SUPPORTED_NON_LINEAR
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not x.requires_grad
    for a, b in zip(runs[0].maps, runs[1].maps, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.infidelity, b.infidelity)
        np.testing.assert_array_equal(a.sensitivity, b.sensitivity)


def test_another_seed_draws_other_orders_and_noise() -> None:
    net, x = mlp(Sign), batch(3, 6)
    a, b = (attribute(net, x, 1, ("smoothgrad", "shapley_sampling"), samples=3, seed=s) for s in (0, 1))
    assert all((p.values != q.values).any() for p, q in zip(a.maps, b.maps, strict=True))


def test_the_table_of_captum_is_restored_after_an_exception() -> None:
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    table = dict(SUPPORTED_NON_LINEAR)
    with rescaled([Sign, nn.ReLU]):
        assert SUPPORTED_NON_LINEAR[Sign] is SUPPORTED_NON_LINEAR[nn.ReLU]
    assert table == SUPPORTED_NON_LINEAR
    with pytest.raises(ZeroDivisionError), rescaled([Sign, nn.ReLU]):
        raise ZeroDivisionError
    assert table == SUPPORTED_NON_LINEAR


def test_nothing_is_left_behind_where_captum_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from captum.attr import DeepLift
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR

    def fail(self: DeepLift, *_: object, **__: object) -> None:
        raise ZeroDivisionError

    table, state = dict(SUPPORTED_NON_LINEAR), torch.random.get_rng_state()
    net = mlp(Sign)
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    monkeypatch.setattr(DeepLift, "_construct_forward_func", fail)
    with pytest.raises(ZeroDivisionError):
        attribute(net, batch(4, 6), 1, ("smoothgrad", "deeplift"))
    assert table == SUPPORTED_NON_LINEAR
    assert torch.equal(state, torch.random.get_rng_state())
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


def test_the_generator_takes_what_the_function_takes() -> None:
    assert inspect.signature(attribute).parameters == inspect.signature(attributing).parameters


def test_updates_bring_one_map_more_each() -> None:
    updates = list(attributing(mlp(Sign), batch(3, 6), 1, ("saliency", "deeplift", "feature_ablation")))
    counts = [len(u.value.maps) for u in updates if u.value is not None]
    assert counts == [0, 1, 2, 3]
    assert len(updates[1].value.frame()) == 0
    assert updates[1].value.figure().get_label()
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


# ---- results ------------------------------------------------------------------------------------------------------------


def test_frame_table_and_summary_tell_the_same_numbers() -> None:
    a = attribute(mlp(Sign), batch(4, 6), 1, ("integrated_gradients", "deeplift"))
    frame, table = a.frame(), a.table()
    assert len(frame) == 8
    medians = frame.groupby("method", sort=False)["relative"].median()
    np.testing.assert_allclose(table["relative_residual"], medians)
    assert f"misses F(x) - F(x0) by {medians['integrated_gradients']:.1%}" in a.summary()
    assert a.figure().get_label() == a.summary()
    assert list(table["explains"]) == ["surrogate", "deployed"]
    with pytest.raises(UnknownNameError, match="saliency"):
        a["saliency"]


def test_the_best_map_has_the_highest_rank_and_is_not_the_reference() -> None:
    a = attribute(mlp(Sign), batch(4, 6), 1, ("feature_ablation", "saliency", "integrated_gradients", "deeplift"))
    for i in range(4):
        ranks = [m.rank_ablation[i] for m in a.maps[1:]]
        assert a.best(i) == a.maps[1 + int(np.argmax(ranks))].method


def test_a_net_is_its_own_twin() -> None:
    net, x = mlp(nn.ReLU), batch(4, 6)
    t = twins(net, net, x, 1, methods=("saliency", "deeplift"))
    assert t.same_class.all()
    for name in ("exact ablation", "saliency", "deeplift"):
        np.testing.assert_allclose(t.rank[name], 1.0)
        np.testing.assert_allclose(t.agreement[name], 1.0)


def test_twins_tell_the_maps_of_both_nets_apart() -> None:
    net, x = mlp(nn.ReLU), batch(4, 6)
    t = twins(net, quantize(net, Sign, Sign), x, 1, methods=("integrated_gradients", "deeplift"))
    assert t.float_net["integrated_gradients"].explains == "exact"
    assert t.quantized_net["integrated_gradients"].explains == "surrogate"
    assert "SURROGATE" in t.summary()
    assert len(t.frame()) == 3 * 4
    assert t.figure().get_label() == t.summary()


def test_agreement_counts_shared_top_features() -> None:
    a = np.array([[5.0, -4, 3, 2, 1, 0, 0, 0, 0, 0]])
    b = np.array([[5.0, 0, 3, 2, 1, 0, 0, 0, 0, 9]])
    np.testing.assert_allclose(agreement(a, b, share=0.2), [0.5])
    np.testing.assert_allclose(agreement(a, -a, share=0.3), [1.0])


def test_patches_number_squares_row_by_row() -> None:
    assert patches((2, 4, 5), 2)[0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5]]
    assert patches((5,), 2).tolist() == [0, 0, 1, 1, 2]


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "give target"),
        ({"target": 3}, "classes 0 to 2"),
        ({"target": -1}, "classes 0 to 2"),
        ({"target": True}, "expected a class number"),
        ({"target": torch.zeros(4)}, "int64 of shape"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "int64 of shape"),
        ({"x": torch.full((4, 6), float("nan"), dtype=torch.float64)}, "NaN"),
        ({"x": torch.ones(4, 6, dtype=torch.float64)}, "constant"),
        ({"methods": ()}, "no method"),
        ({"methods": "saliency"}, "sequence"),
        ({"methods": ("layer_gradcam",)}, "convolution"),
        ({"methods": ("deeplift",), "output": "probability"}, "explains logits"),
        ({"baseline": float("nan")}, "NaN"),
        ({"baseline": torch.zeros(5)}, "broadcasts"),
        ({"baseline": batch(4, 6)}, "equals its baseline"),
        ({"features": 0}, "patch size"),
        ({"features": torch.zeros(5, dtype=torch.int64)}, "shape"),
        ({"features": torch.tensor([0, 0, 2, 2, 3, 3])}, "without gaps"),
        ({"steps": 0}, "steps"),
        ({"samples": 1.5}, "samples"),
        ({"noise": 0.0}, "noise"),
    ],
)
def test_wrong_arguments_are_told(changes: dict, message: str) -> None:
    arguments = {"net": mlp(nn.ReLU), "x": batch(4, 6), "target": 1} | changes
    with pytest.raises(InputError, match=message):
        attribute(**arguments)


def test_a_net_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        attribute(mlp(nn.ReLU).train(), batch(4, 6), 1)


@pytest.mark.parametrize("changes", [{"methods": ("lime",)}, {"output": "loss"}])
def test_unknown_names_are_told(changes: dict) -> None:
    with pytest.raises(UnknownNameError):
        attribute(mlp(nn.ReLU), batch(4, 6), 1, **changes)


def test_a_real_net_of_the_lab_goes_through() -> None:
    net = quantize(qlab.build("lenet", (1, 16, 16), 3, seed=0).double(), Sign, Sign, keep=("first", "last")).eval()
    a = attribute(
        net, batch(2, 1, 16, 16), 1, ("deeplift", "layer_gradcam", "integrated_gradients"), features=4, steps=8
    )
    assert a["deeplift"].relative.max() < 1e-5
    assert a["layer_gradcam"].values.shape == (2, 1, 16, 16)
