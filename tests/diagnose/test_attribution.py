"""What maps explain is told from how they behave; nothing is touched; wrong arguments are told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qlab
from qlab.diagnose.attribution import attribute, attributing, patches
from qlab.diagnose.attribution_maps import marks, plane
from qlab.diagnose.attribution_methods import METHODS
from qlab.diagnose.attribution_twins import agreement, twins
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Quantizer, Sign, harden, quantize
from tests.diagnose.attribution_nets import Functional, batch, cnn, difference, fresh, mlp

# ---- completeness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_integrated_gradients_of_smooth_nets_become_complete_with_steps(activation: Callable[[], nn.Module]) -> None:
    net, x = mlp(activation), batch(8, 6)
    gaps = [attribute(net, x, 1, ("integrated_gradients",), steps=n)["integrated_gradients"].relative for n in (4, 400)]
    assert np.median(gaps[1]) < 2e-3
    assert np.median(gaps[1]) < np.median(gaps[0]) / 5


def test_integrated_gradients_are_complete_from_any_baseline() -> None:
    net, x = mlp(nn.Tanh), batch(8, 6)
    m = attribute(net, x, 1, ("integrated_gradients",), baseline=0.7, steps=60)["integrated_gradients"]
    with torch.no_grad():
        expected = (net(x) - net(torch.full_like(x, 0.7)))[:, 1].numpy()
    np.testing.assert_allclose(m.values.sum(1), expected, rtol=1e-7)  # captum's weights are float32


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


def test_gradcam_of_a_layer_behind_all_quantizers_is_exact() -> None:
    net = fresh(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), Sign(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    a = attribute(net, batch(4, 1, 6, 6), 1, ("layer_gradcam", "saliency"))
    assert (a["layer_gradcam"].explains, a["saliency"].explains) == ("exact", "surrogate")
    assert attribute(net, batch(4, 1, 6, 6), 1, ("layer_gradcam",), layer="0")["layer_gradcam"].explains == "surrogate"


class SignBehind(nn.Module):
    """A quantizer before the last convolution, and behind it a sign written as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.sign, self.b, self.c = nn.Conv2d(1, 4, 3), Sign(), nn.Conv2d(4, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(self.sign(self.a(x)))
        return self.c((z + (z.sign() - z).detach()).flatten(1))


def test_gradcam_before_a_hidden_step_is_not_exact() -> None:
    assert (
        attribute(fresh(SignBehind), batch(6, 1, 6, 6), 1, ("layer_gradcam",))["layer_gradcam"].explains == "surrogate"
    )


def test_gradcam_of_a_layer_that_runs_before_and_behind_a_sign_is_not_exact() -> None:
    a = nn.Conv2d(1, 1, 3, padding=1)
    net = fresh(lambda: nn.Sequential(a, Sign(), a, nn.Flatten(), nn.Linear(36, 3)))
    assert attribute(net, batch(6, 1, 6, 6), 1, ("layer_gradcam",))["layer_gradcam"].explains == "surrogate"


def test_gradcam_with_a_way_round_its_layer_is_exact() -> None:
    class WayRound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.sign, self.b, self.c = (
                nn.Conv2d(1, 4, 3),
                Sign(),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(128, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            z = self.sign(self.a(x))
            return self.c(torch.cat((z, self.b(z)), 1).flatten(1))

    for n in (1, 6, 9):
        a = attribute(fresh(WayRound), batch(n, 1, 6, 6), 1, ("layer_gradcam", "saliency"))
        assert [m.explains for m in a.maps] == ["exact", "surrogate"]


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
    np.testing.assert_allclose(table["rank_ablation"], frame.groupby("method", sort=False)["rank_ablation"].median())
    assert f"misses F(x) - F(x0) by {medians['integrated_gradients']:.1%}" in a.summary()
    assert a.figure().get_label() == a.summary()
    assert list(table["explains"]) == ["surrogate", "deployed"]
    with pytest.raises(UnknownNameError, match="saliency"):
        a["saliency"]


def test_the_median_rank_leaves_out_examples_without_an_order() -> None:
    m = attribute(mlp(Sign), batch(4, 6), 1, ("saliency",))["saliency"]
    assert replace(m, rank_ablation=np.array([np.nan, 0.1, 0.7, 0.3])).median_rank == 0.3
    assert np.isnan(replace(m, rank_ablation=np.full(4, np.nan)).median_rank)


def test_the_summary_does_not_call_hidden_steps_float_activations() -> None:
    assert "float activations" in attribute(mlp(nn.ReLU), batch(4, 6), 1).summary()
    assert "quantized activations" in attribute(mlp(Sign), batch(4, 6), 1).summary()
    assert "whose gradient is not that of its values" in attribute(fresh(Functional), batch(4, 6), 1).summary()


def test_a_pixel_is_marked_where_all_its_channels_are_zero() -> None:
    zeros = np.array([[[0, 1], [2, 3]], [[1, 1], [2, 1]]], dtype=np.uint8)  # (2, 2, 2): channels first
    np.testing.assert_array_equal(marks(zeros), [[0, 1], [2, 3]])
    np.testing.assert_array_equal(marks(zeros[0]), zeros[0])
    np.testing.assert_array_equal(marks(zeros[0, 1]), [[2, 3]])
    assert marks(zeros).dtype == np.uint8
    np.testing.assert_array_equal(plane(zeros), [[1, 2], [4, 4]])


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


class Annealed(Quantizer):
    """A quantizer that trains with other values than it deploys."""

    def forward(self, latent: Tensor) -> Tensor:
        return -latent.tanh()

    def hard(self, latent: Tensor) -> Tensor:
        return latent.sign()


def test_twins_are_compared_as_deployed() -> None:
    net, x = mlp(nn.ReLU), batch(16, 6)
    quantized = quantize(net, Annealed)
    classes = [n(x).argmax(1) for n in (net, harden(quantized), quantized)]
    assert not torch.equal(classes[0] == classes[1], classes[0] == classes[2])
    t = twins(net, quantized, x, 1, methods=("saliency",))
    np.testing.assert_array_equal(t.same_class, classes[0] == classes[1])


def test_the_ranks_of_twins_are_those_between_their_maps() -> None:
    net, x = mlp(nn.ReLU), batch(4, 6)
    t = twins(net, quantize(net, activations=Sign), x, 1, methods=("saliency",))
    pairs = zip(t.float_net["saliency"].scores, t.quantized_net["saliency"].scores, strict=True)
    np.testing.assert_allclose(t.rank["saliency"], [spearmanr(p, q).statistic for p, q in pairs])
    assert t.rank["saliency"].max() < 1
    pairs = zip(t.float_net.ablation, t.quantized_net.ablation, strict=True)
    np.testing.assert_allclose(t.rank["exact ablation"], [spearmanr(p, q).statistic for p, q in pairs])


def test_agreement_counts_shared_top_features() -> None:
    a = np.array([[5.0, -4, 3, 2, 1, 0, 0, 0, 0, 0]])
    b = np.array([[5.0, 0, 3, 2, 1, 0, 0, 0, 0, 9]])
    np.testing.assert_allclose(agreement(a, b, share=0.2), [0.5])
    np.testing.assert_allclose(agreement(a, -a, share=0.3), [1.0])
    np.testing.assert_allclose(agreement(np.array([[3.0, 2, 1]]), np.array([[2.0, 3, 1]])), [0.0])  # the first only


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
