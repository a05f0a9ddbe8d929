"""Shapes of packed nets: what is inferred is what runs, and nothing that would index past an array gets through."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.binary.backends import Simulation
from qlab.binary.graph import OPS, Graph, Step
from qlab.binary.lower import lower
from qlab.binary.shapes import BIT_RULES, MAX_ELEMENTS, MAX_STEPS, MAX_TERMS, infer
from qlab.errors import InputError
from tests.strategies import Small, deployed

Tensors = dict[str, np.ndarray]


NETS: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (Small, (2, 8, 8), {}),
    ("mlp", (1, 8, 8), {"keep": ()}),
    ("lenet", (1, 28, 28), {}),
    ("vgg_small", (3, 17, 19), {"width": 40, "final_norm": True}),
    ("resnet18", (3, 16, 16), {"width": 8, "shortcut": "A"}),
    ("bireal18", (3, 16, 16), {"width": 8, "activations": "float"}),
]


@pytest.mark.parametrize(("model", "shape", "options"), NETS, ids=[str(n[0]) for n in NETS])
def test_inferred_shapes_are_those_of_the_simulation(model: Any, shape: tuple[int, ...], options: Any) -> None:
    net = deployed(model() if isinstance(model, type) else model, shape, **options)
    graph = lower(net, torch.zeros(2, *shape), "unpack")
    for batch in (1, 3):
        seen = {"input": (batch, *shape)}

        def note(step: Step, results: tuple[Tensor, ...], seen: dict[str, Any] = seen) -> None:
            seen.update({name: tuple(y.shape) for name, y in zip(step.outputs, results, strict=True)})

        Simulation(graph).run(torch.zeros(batch, *shape), note)
        assert infer(graph, batch) == seen


# ---- one step at a time ---------------------------------------------------------------------------------------------


def _conv(
    change: Callable[[dict[str, Any], Tensors], object] = lambda o, t: None,
    channels: int = 66,
    op: str = "binary_conv2d",
    after: tuple[Step, ...] = (),
) -> Graph:
    """A convolution of (66, 5, 6) signs with 8 outputs, changed."""
    options: dict[str, Any] = {"channels": 66, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    tensors: Tensors = {"weight": np.zeros((8, 3, 3, 2), np.uint64)}
    if op == "binary_conv2d":
        options |= {"pad": "zero", "fused": False}
        tensors |= {"threshold": np.zeros(8, np.int32), "flip": np.zeros(1, np.uint64)}
    change(options, tensors)
    value = "x" if op == "binary_conv2d" else "input"
    steps = [
        Step("pack", ("input",), ("x",), options={"fused": False}),
        Step(op, (value,), ("y",), "layer", {role: role for role in tensors}, options),
        *after,
    ]
    bits = op == "binary_conv2d" and "threshold" in tensors and not after
    steps += [Step("unpack", ("y",), ("z",), options={"channels": 8})] if bits else []
    return Graph((channels, 5, 6), tuple(steps), tensors, steps[-1].outputs[0])


def _set(options: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Callable[..., None]:
    def change(o: dict[str, Any], t: Tensors) -> None:
        o.update(options or {})
        for role, tensor in tensors.items():
            if tensor is None:
                del t[role]
            else:
                t[role] = tensor

    return change


def words(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint64)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


CONVS: dict[str, tuple[Callable[..., None], str]] = {
    "weight of too few words": (
        _set(weight=words(8, 3, 3, 1)),
        r"weight has shape (8, 3, 3, 1); expected (8, 3, 3, 2)",
    ),
    "weight of too many words": (_set(weight=words(8, 3, 3, 3)), "expected (8, 3, 3, 2)"),
    "weight past its end": (_set(weight=words(8, 3, 3, 2) + np.uint64(4)), "bits set past its 66 values"),
    "no output": (_set(weight=words(0, 3, 3, 2)), "expected"),
    "no tap": (_set(weight=words(8, 0, 3, 2)), "kernel is [0, 3]"),
    "kernel too large": (_set(weight=words(8, 8, 3, 2)), "larger than the padded picture"),
    "other channels": (_set({"channels": 65}), "channels is 65; expected 66"),
    "stride 0": (_set({"stride": [0, 1]}), "stride is [0, 1]; expected two integers of at least 1"),
    "one stride": (_set({"stride": [1]}), "stride is [1]"),
    "negative padding": (_set({"padding": [-1, 0]}), "padding is [-1, 0]"),
    "dilation 0": (_set({"dilation": [0, 1]}), "dilation is [0, 1]"),
    "dilation too large": (_set({"dilation": [4, 1]}), "larger than the padded picture"),
    "groups 0": (_set({"groups": 0}), "groups is 0"),
    "groups that do not divide": (_set({"groups": 4}), "groups is 4; expected a divisor of 66 inputs and 8 outputs"),
    "groups with plain weights": (_set({"groups": 2}), "expected (8, 3, 3, 1)"),
    "unknown padding": (_set({"pad": "two"}), "pad is 'two'; expected 'zero' or 'one'"),
    "integers beyond 32 bits": (_set({"padding": [2**31, 0]}), "fit into 32 bits"),
    "a padded picture beyond memory": (
        _set({"padding": [2**30, 0], "stride": [2**30, 1]}),
        f"at most {MAX_ELEMENTS:,}",
    ),
    "short threshold": (_set(threshold=ints(7)), "threshold has shape (7,); expected (8,)"),
    "long flip": (_set(flip=words(2)), "flip has shape (2,); expected (1,)"),
    "flip past its end": (_set(flip=words(1) + np.uint64(256)), "bits set past its 8 values"),
    "threshold without flip": (_set(flip=None), "threshold and flip; they come together"),
    "threshold and alpha": (_set(alpha=floats(8), beta=floats(8)), "both a threshold and alpha"),
    "short alpha": (_set(threshold=None, flip=None, alpha=floats(7), beta=floats(8)), "alpha has shape (7,)"),
    "long beta": (_set(threshold=None, flip=None, alpha=floats(8), beta=floats(9)), "beta has shape (9,)"),
    "NaN": (_set(threshold=None, flip=None, alpha=floats(8) * np.nan, beta=floats(8)), "alpha holds NaN"),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_that_does_not_fit_is_refused(name: str) -> None:
    change, message = CONVS[name]
    with pytest.raises(InputError, match="layer.*" + re.escape(message)):
        _conv(change).check()


def test_the_convolutions_that_were_changed_fit_as_they_were() -> None:
    assert infer(_conv().check())["y"] == (1, 8, 5, 6)
    assert infer(_conv(_set({"groups": 2}, weight=words(8, 3, 3, 1))).check())["y"] == (1, 8, 5, 6)
    floated = _set(threshold=None, flip=None, alpha=floats(8), beta=floats(8))
    assert infer(_conv(floated).check(), 4)["y"] == (4, 8, 5, 6)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_scales_of_sign_weights_are_one_for_each_output(name: str) -> None:
    assert infer(_conv(_set({}, **{name: floats(8)}), op="sign_weight_conv2d").check())["y"] == (1, 8, 5, 6)
    with pytest.raises(InputError, match=rf"{name} has shape \(9,\)"):
        _conv(_set({}, **{name: floats(9)}), op="sign_weight_conv2d").check()


def _single(op: str, example: tuple[int, ...], tensors: Tensors, inputs: int = 1, **options: Any) -> Graph:
    """A graph of one step on floats."""
    step = Step(op, ("input",) * inputs, ("y",), "layer", {role: role for role in tensors}, options)
    return Graph(example, (step,), tensors, "y" if op != "pack" else "input")


WINDOW: dict[str, Any] = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
POOL: dict[str, Any] = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil": False}
STEPS: dict[str, tuple[Graph, str]] = {
    "conv2d": (_single("conv2d", (2, 5, 5), {"weight": floats(4, 3, 3, 3)}, **WINDOW), "weight has shape"),
    "conv2d's bias": (
        _single("conv2d", (2, 5, 5), {"weight": floats(4, 2, 3, 3), "bias": floats(5)}, **WINDOW),
        "bias has shape",
    ),
    "conv2d on vectors": (_single("conv2d", (2,), {"weight": floats(4, 2, 3, 3)}, **WINDOW), "4 dimensions"),
    "linear": (_single("linear", (3,), {"weight": floats(4, 2)}), "weight has shape (4, 2); expected (4, 3)"),
    "linear's bias": (_single("linear", (2,), {"weight": floats(4, 2), "bias": floats(3)}), "bias has shape"),
    "batch_norm": (
        _single("batch_norm", (3, 2, 2), {"mean": floats(3), "var": floats(2)}, eps=1e-5),
        "var has shape (2,); expected (3,)",
    ),
    "prelu": (_single("prelu", (3, 2, 2), {"weight": floats(2)}), "weight has shape"),
    "uniform": (_single("uniform", (3,), {"step": floats()}, low=2, high=1), "low <= high"),
    "avg_pool2d": (_single("avg_pool2d", (3, 4, 4), {}, **{**POOL, "padding": [2, 0]}, count_padding=True), "half of"),
    "max_pool2d": (
        _single("max_pool2d", (3, 4, 4), {}, **{**POOL, "kernel": [5, 5]}, dilation=[1, 1]),
        "larger than the padded picture",
    ),
    "adaptive_avg_pool2d": (_single("adaptive_avg_pool2d", (3, 4, 4), {}, size=[0, 1]), "size is [0, 1]"),
    "a mean of the batch": (_single("mean", (3, 4, 4), {}, dims=[0], keepdim=True), "other than the first"),
    "a mean of everything": (_single("mean", (3, 4, 4), {}, dims=[], keepdim=True), "other than the first"),
    "a flattened batch": (_single("flatten", (3, 4, 4), {}, start=0, end=-1), "other than the first"),
    "a reshaped batch": (_single("reshape", (3, 4, 4), {}, shape=[-1, 3]), "of product 48"),
    "a padded batch": (_single("pad", (3,), {}, pads=[0, 0, 1, 1], value=0.0), "each dimension but the first"),
    "a sliced batch": (_single("slice", (3,), {}, slices=[[0, 1, None]]), "the whole batch"),
    "an empty slice": (_single("slice", (3,), {}, slices=[[None, None, None], [3, None, None]]), "shape (1, 0)"),
    "a backward slice": (_single("slice", (3,), {}, slices=[[None] * 3, [None, None, -1]]), "step must be"),
    "a joined batch": (_single("cat", (3,), {}, inputs=2, dim=0), "other than the first"),
    "an output beyond memory": (_single("pad", (3,), {}, pads=[0, 2**30], value=0.0), f"at most {MAX_ELEMENTS:,}"),
    "sign_weight_linear of few words": (
        _single("sign_weight_linear", (65,), {"weight": words(4, 1)}, features=65, product="sums"),
        "weight has shape (4, 1); expected (4, 2)",
    ),
    "sign_weight_linear's features": (
        _single("sign_weight_linear", (65,), {"weight": words(4, 2)}, features=66, product="sums"),
        "features is 66; expected 65",
    ),
    "sign_weight_linear's scale": (
        _single("sign_weight_linear", (65,), {"weight": words(4, 2), "scale": floats(3)}, features=65, product="sums"),
        "scale has shape (3,); expected (4,)",
    ),
    "sign_weight_linear's product": (
        _single("sign_weight_linear", (65,), {"weight": words(4, 2)}, features=65, product="best"),
        "product is 'best'; expected 'unpack' or 'sums'",
    ),
    "sums of pictures": (
        _single("sign_weight_linear", (2, 65), {"weight": words(4, 2)}, features=65, product="sums"),
        "2 dimensions",
    ),
    "pack's alpha": (
        _single("pack", (3,), {"alpha": floats(3), "beta": floats(2)}, fused=False),
        "beta has shape (2,); expected (3,)",
    ),
    "pack of sequences": (_single("pack", (3, 4), {}, fused=False), "(N, D) or (N, C, H, W), but it has (1, 3, 4)"),
    "gelu": (_single("gelu", (3,), {}, approximate="some"), "approximate"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_float_step_that_does_not_fit_is_refused(name: str) -> None:
    graph, message = STEPS[name]
    with pytest.raises(InputError, match="step 0 .'layer'.: .*" + re.escape(message)):
        graph.check()


def _linear(shape: tuple[int, ...], features: int, weight: np.ndarray, flatten: bool) -> Graph:
    steps = [Step("pack", ("input",), ("x",), options={"fused": False})]
    steps += [Step("flatten_bits", ("x",), ("f",))] if flatten else []
    options = {"features": features, "fused": False}
    steps += [Step("binary_linear", (steps[-1].outputs[0],), ("y",), "layer", {"weight": "w"}, options)]
    return Graph(shape, tuple(steps), {"w": weight}, "y")


def test_the_weights_of_a_flattened_picture_are_padded_pixel_by_pixel() -> None:
    past = words(7, 12)
    past[0, 1] = 4  # the second word of the first pixel holds channels 64 and 65
    shapes = infer(_linear((66, 2, 3), 66 * 6, words(7, 12), flatten=True).check())
    assert shapes["f"] == (1, 6 * 128)
    assert shapes["y"] == (1, 7)
    with pytest.raises(InputError, match="bits set past its 66 values"):
        _linear((66, 2, 3), 66 * 6, past, flatten=True).check()
    with pytest.raises(InputError, match="features is 768; expected 396"):
        _linear((66, 2, 3), 768, words(7, 12), flatten=True).check()
    with pytest.raises(InputError, match=r"weight has shape \(7, 7\); expected \(7, 12\)"):
        _linear((66, 2, 3), 66 * 6, words(7, 7), flatten=True).check()


def test_a_vector_of_bits_has_its_own_features() -> None:
    assert infer(_linear((66,), 66, words(7, 2), flatten=False).check())["y"] == (1, 7)
    for features, weight in ((65, words(7, 2)), (66, words(7, 1)), (66, words(7, 3))):
        with pytest.raises(InputError, match=r"features|weight"):
            _linear((66,), features, weight, flatten=False).check()
    with pytest.raises(InputError, match="2 dimensions"):
        _linear((66, 2, 3), 66, words(7, 2), flatten=False).check()


def test_bits_of_a_flattened_picture_have_no_other_use() -> None:
    steps = (
        Step("pack", ("input",), ("x",), options={"fused": False}),
        Step("flatten_bits", ("x",), ("f",)),
        Step("unpack", ("f",), ("y",), options={"channels": 384}),
    )
    with pytest.raises(InputError, match="only a binary_linear"):
        Graph((3, 2, 3), steps, {}, "y").check()


def test_a_residual_has_the_shape_of_the_sum() -> None:
    floated = _set(threshold=None, flip=None, alpha=floats(8), beta=floats(8))
    for channels, message in ((8, None), (4, r"adds a value of shape \(1, 4, 5, 6\)"), (1, r"adds a value of shape")):
        graph = _conv(floated)
        first = Step("slice", ("input",), ("r",), options={"slices": [[None] * 3, [None, channels, None]]})
        conv = replace(graph.steps[1], inputs=("x", "r"))
        graph = replace(graph, steps=(first, graph.steps[0], conv))
        if message is None:
            assert infer(graph.check())["y"] == (1, 8, 5, 6)
        else:
            with pytest.raises(InputError, match=message):
                graph.check()


def _packed(op: str, tensors: Tensors, **options: Any) -> Graph:
    """A graph of a step on the bits of a (66, 4, 4) picture."""
    steps = (
        Step("pack", ("input",), ("x",), options={"fused": False}),
        Step(op, ("x",), ("y",), "layer", {role: role for role in tensors}, options),
        Step("unpack", ("y",), ("z",), options={"channels": 66}),
    )
    return Graph((66, 4, 4), steps if op != "unpack" else steps[:2], tensors, "z" if op != "unpack" else "y")


def test_a_pooling_of_bits_that_does_not_fit_is_refused() -> None:
    pool = {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 1]}
    assert infer(_packed("max_pool_bits", {"flip": words(2)}, **pool).check())["y"] == (1, 66, 3, 3)
    with pytest.raises(InputError, match="half of the kernel"):  # a window of nothing but padding has no maximum
        _packed("max_pool_bits", {}, **{**pool, "padding": [2, 1]}).check()
    with pytest.raises(InputError, match=r"flip has shape \(1,\); expected \(2,\)"):
        _packed("max_pool_bits", {"flip": words(1)}, **pool).check()


def test_unpacking_asks_for_the_channels_that_were_packed() -> None:
    assert infer(_packed("unpack", {}, channels=66).check())["y"] == (1, 66, 4, 4)
    with pytest.raises(InputError, match="channels is 128; expected 66"):
        _packed("unpack", {}, channels=128).check()


def test_values_of_different_dimensions_are_not_added() -> None:
    """(N, 2) would broadcast against (N, 2, 3, 2) for one example, and not for two."""
    steps = (
        Step("mean", ("input",), ("m",), options={"dims": [2, 3], "keepdim": False}),
        Step("add", ("input", "m"), ("y",), "layer"),
    )
    with pytest.raises(InputError, match="shapes that broadcast"):
        Graph((2, 3, 2), steps, {}, "y").check()


def test_a_sum_of_signs_stays_exact_in_float32() -> None:
    with pytest.raises(InputError, match="sums 16,777,216 signs"):
        _linear((MAX_TERMS,), MAX_TERMS, words(1, MAX_TERMS // 64), flatten=False).check()


def test_there_is_an_end_of_steps() -> None:
    steps = [Step("relu", ("input",), ("v0",))]
    steps += [Step("relu", (f"v{i}",), (f"v{i + 1}",)) for i in range(MAX_STEPS)]
    Graph((2,), tuple(steps[:-1]), {}, steps[-2].outputs[0]).check()
    with pytest.raises(InputError, match="2,001 steps; expected at most 2,000"):
        Graph((2,), tuple(steps), {}, steps[-1].outputs[0]).check()


def test_bits_beside_floats_need_batch_norm() -> None:
    graph = _conv(_set(threshold=None, flip=None))
    steps = (graph.steps[0], replace(graph.steps[1], outputs=("y", "b")))
    with pytest.raises(InputError, match="only after batch norm"):
        replace(graph, steps=steps).check()


def test_every_operation_on_bits_has_a_rule() -> None:
    on_bits = {name for name, op in OPS.items() if "bits" in " ".join((*op.inputs, *op.outputs))}
    assert on_bits <= set(BIT_RULES)
