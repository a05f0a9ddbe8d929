"""Looking into a packed net: every dot product word by word is the kernels' integer, and costs are those of the net at hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.binary import inspect
from qlab.binary.cost import KINDS, Crossover, Point, costing, crossing
from qlab.binary.dots import compared
from qlab.binary.kernels import reference
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job
from qlab.quantizers import Sign
from tests.binary.conftest import binary_net, images, randomised


class Binary(nn.Module):
    """Signs, one binary layer with its own options, batch norm, and a float end."""

    def __init__(self, layer: nn.Module, channels: int, flat: bool = False) -> None:
        super().__init__()
        self.sign = Sign()
        self.layer = layer
        norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
        self.norm = norm(channels)
        self.last = Sign()
        self.end = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs of the normalised layer, flattened."""
        return self.end(self.last(self.norm(self.layer(self.sign(x)))))


def packed_layer(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Any:
    """Return a packed net of one layer with random signs."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.weight.copy_(1.0 - 2 * torch.randint(0, 2, layer.weight.shape, generator=g))
    net = randomised(Binary(layer, layer.weight.shape[0], isinstance(layer, nn.Linear))).eval()
    return qlab.binary.compile(net, x)


@pytest.fixture(scope="module")
def lenet() -> tuple[Any, Tensor]:
    x = images(3, 1, 28, 28)
    return qlab.binary.compile(binary_net("lenet", (1, 28, 28)), x), x


def conv_places(run: inspect.LayerRun) -> list[tuple[int, int]]:
    """Return corners, edges and the middle of a layer's result."""
    ends = [sorted({0, 1, n // 2, n - 1} & set(range(n))) for n in run.grid]
    return list(product(*ends))


CONVOLUTIONS = {
    "border": {"padding": 1},
    "stride": {"padding": 1, "stride": 2},
    "wide border": {"padding": (2, 3), "dilation": (2, 1), "stride": (1, 2)},
    "no border": {},
    "two groups": {"padding": 1, "groups": 2},
    "six groups": {"padding": 1, "groups": 6},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("channels", [6, 66, 128])
def test_a_convolution_is_the_integer_of_the_reference_kernel_everywhere(
    options: dict[str, Any], channels: int
) -> None:
    channels -= channels % options.get("groups", 1)
    x = images(2, channels, 6, 7)
    layer = nn.Conv2d(channels, 2 * options.get("groups", 2), 3, bias=False, **options)
    packed = packed_layer(layer, x)
    run = inspect.follow(packed, x, "layer", example=1)
    o = run.step.options
    window = (tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]), o["groups"])
    weight = packed.graph.tensors[run.step.tensors["weight"]]
    words = reference.pack(np.moveaxis(x.numpy(), 1, -1))
    z = reference.binary_conv2d(words, weight, o["channels"], *window, pad=o["pad"])[1]
    expected = packed(x)[1].reshape(len(weight), *run.grid)
    for unit in range(0, len(weight), max(1, len(weight) // 5)):
        for row, column in conv_places(run):
            found = run.dot(unit, (row, column))
            assert found.z == z[row, column, unit] == found.simulated
            assert found.decision == found.bit == int(expected[unit, row, column] < 0)


def test_words_outside_a_zero_padded_picture_count_nothing() -> None:
    x = images(1, 70, 4, 4)
    packed = packed_layer(nn.Conv2d(70, 3, 3, padding=1, bias=False), x)
    corner, middle = (inspect.dot(packed, x, "layer", 1, place) for place in ((0, 0), (1, 1)))
    assert middle.k == 9 * 70
    assert corner.k == 4 * 70
    outside = ~corner.inside
    assert outside.sum() == 5 * 2  # five taps of two words
    assert not corner.signs[outside].any()
    assert not corner.xor[outside].any()
    assert middle.inside.all()


def test_a_border_of_ones_counts_as_plus_one() -> None:
    x = images(1, 5, 4, 4)
    packed = packed_layer(nn.Conv2d(5, 3, 3, padding=1, bias=False), x)
    step = next(s for s in packed.graph.steps if s.layer == "layer")
    step.options["pad"] = "one"  # type: ignore[index]
    run = inspect.follow(qlab.binary.PackedNet(packed.graph), x, "layer")
    z = reference.binary_conv2d(
        reference.pack(np.moveaxis(x.numpy(), 1, -1)), run.bits.words, 5, padding=(1, 1), pad="one"
    )[0]
    for unit, place in product(range(3), conv_places(run)):
        found = run.dot(unit, place)
        assert found.k == 45
        assert found.z == z[place][unit] == found.simulated
        assert found.decision == found.bit


@pytest.mark.parametrize("features", [1, 63, 64, 65, 200])
def test_a_linear_layer_is_the_integer_of_the_reference_kernel(features: int) -> None:
    x = images(4, features)
    packed = packed_layer(nn.Linear(features, 9, bias=False), x)
    words = packed.graph.tensors[next(s.tensors["weight"] for s in packed.graph.steps if s.layer == "layer")]
    z = reference.binary_matmul(reference.pack(x.numpy()), words, features)
    for example, unit in product(range(4), range(9)):
        found = inspect.dot(packed, x, "layer", unit, example=example)
        assert (found.z, found.k) == (z[example, unit], features)
        assert found.simulated == found.z
        assert found.decision == found.bit == int(packed(x)[example, unit] < 0)


def test_a_layer_on_a_flattened_picture_has_the_picture_as_its_taps(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    layer = inspect.bits(packed, "hidden.0")
    assert layer.words.shape == (120, 5, 5, 1)
    assert layer.axes == ("unit", "row", "column", "word")
    weight = packed.source.get_submodule("hidden.0").weight.detach().reshape(120, 16, 5, 5)
    np.testing.assert_array_equal(np.moveaxis(layer.signs, -1, 1), weight.numpy())
    for unit in range(0, 120, 7):
        found = inspect.dot(packed, x, "hidden.0", unit, example=2)
        assert found.z == found.simulated
        assert found.decision == found.bit
        assert found.k == 400


def test_all_layers_of_a_net_with_shortcuts_agree_with_the_simulation_and_with_their_own_output() -> None:
    x = images(2, 3, 16, 16)
    packed = qlab.binary.compile(binary_net("bireal18", (3, 16, 16)), x)
    names = inspect.layers(packed)
    assert len(names) > 10
    floats = 0
    for name in names:
        run = inspect.follow(packed, x, name, example=1)
        for place in ((0, 0), None):
            found = run.dot(run.bits.units - 1, place)
            assert found.z == found.simulated
            if found.value is not None and found.bit is not None:
                assert found.bit == int(found.value < 0)
            floats += found.value is not None
    assert floats > 10  # here sums are normalised and added to, not compared


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_backends_hold_the_same_bits(lenet: tuple[Any, Tensor], backend: str) -> None:
    packed, x = lenet
    run, other = (inspect.follow(packed, x, "features.4", 1, name) for name in (backend, "numpy"))
    np.testing.assert_array_equal(run.inputs, other.inputs)
    np.testing.assert_array_equal(run.outputs, other.outputs)


def test_bits_are_the_signs_of_the_weights(lenet: tuple[Any, Tensor]) -> None:
    packed, _ = lenet
    layer = inspect.bits(packed, "features.4")
    weight = packed.source.get_submodule("features.4").weight.detach()
    np.testing.assert_array_equal(np.moveaxis(layer.signs, -1, 1), weight.numpy())
    assert (layer.units, layer.taps, layer.channels, layer.k) == (16, (5, 5), 6, 150)
    assert layer.padding == pytest.approx(1 - 6 / 64)
    frame = layer.frame()
    np.testing.assert_array_equal(frame["minus"], (weight < 0).flatten(1).sum(1))
    np.testing.assert_array_equal(frame["minus"] + frame["plus"], np.full(16, 150))
    np.testing.assert_array_equal(frame["threshold"], layer.threshold)
    assert "150 signs in 25 words" in layer.summary()


def test_bits_of_a_layer_with_float_inputs_can_be_seen_too() -> None:
    x = images(2, 100)
    net = nn.Sequential(nn.Linear(100, 7, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(0.5 - torch.randint(0, 2, (7, 100)).float())  # type: ignore[operator]
    packed = qlab.binary.compile(net, x)
    layer = inspect.bits(packed, "0")
    np.testing.assert_array_equal(layer.signs, net[0].weight.sign().int().numpy())  # type: ignore[operator]
    assert layer.threshold is None
    with pytest.raises(InputError, match="no layer of this net runs on bits"):
        inspect.dot(packed, x, "0", 0)


def test_a_frame_has_a_row_per_word_that_adds_up(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    found = inspect.dot(packed, x, "hidden.3", 5)
    frame = found.frame()
    assert len(frame) == 2
    assert (frame["signs"] - 2 * frame["popcount"]).cumsum().tolist() == frame["sum"].tolist() == found.sums.tolist()
    for row in frame.itertuples():
        assert int(row.activation, 16) ^ int(row.weight, 16) == int(row.xor, 16)
        assert int(row.xor, 16).bit_count() == row.popcount
    assert f"z = 120 - 2 x {found.popcount.sum()} = {found.z}" in found.summary()


def test_comparisons_are_said_in_words() -> None:
    assert compared(3, 4, False) == "z is below the threshold 4: the bit is 1, the sign -1."
    assert compared(4, 4, False) == "z is not below the threshold 4: the bit is 0, the sign +1."
    assert "flips it: the bit is 1" in compared(4, 4, True)
    assert compared(-9, int(np.iinfo(np.int32).min), True) == "Whatever the sum, the unit gives -1."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: inspect.dot(p, x, "features.4", 16), "unit is 16; expected a whole number from 0 to 15"),
        (lambda p, x: inspect.dot(p, x, "features.4", 1.5), "unit is 1.5"),
        (lambda p, x: inspect.dot(p, x, "features.4", True), "unit is True"),
        (lambda p, x: inspect.dot(p, x, "features.4", 0, (0, 10)), "column is 10; expected a whole number from 0 to 9"),
        (lambda p, x: inspect.dot(p, x, "features.4", 0, 3), r"position is 3; expected \(row, column\)"),
        (lambda p, x: inspect.dot(p, x, "hidden.0", 0, (0, 0)), "hidden.0 is a linear layer"),
        (lambda p, x: inspect.dot(p, x, "features.4", 0, example=3), "example is 3; expected a whole number from 0 to 2"),
        (lambda p, x: inspect.dot(p, x[:, :, 1:], "features.4", 0), r"expected \(N, 1, 28, 28\)"),
        (lambda p, x: inspect.dot(p, x * float("nan"), "features.4", 0), "NaN"),
        (lambda p, x: inspect.dot(p, x, "fc", 0), "layer 'fc' is a linear step; expected one that runs on bits"),
        (lambda p, x: inspect.bits(p, "fc"), "expected one that has bits as weights: features.4, hidden.0, hidden.3"),
        (lambda p, x: inspect.bits(p.source, "fc"), "packed is a LeNet; expected a packed net"),
        (lambda p, x: inspect.follow(p, x, "hidden.0", backend="torch"), "backend 'torch' keeps no words"),
        (lambda p, x: inspect.cost(p, x, rounds=0), "rounds is 0"),
        (lambda p, x: inspect.cost(p, x[0]), "the input has shape"),
        (lambda p, x: inspect.cost(p.source, x), "packed is a LeNet"),
        (lambda p, x: inspect.crossover(sizes=[]), "sizes are"),
        (lambda p, x: inspect.crossover(sizes=[0]), "sizes are"),
        (lambda p, x: inspect.crossover(kinds=["cube"]), "kinds are"),
        (lambda p, x: inspect.crossover(seconds=0), "seconds 0"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_told(lenet: tuple[Any, Tensor], call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(*lenet)


def test_an_unknown_layer_is_told_with_the_known_ones(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    with pytest.raises(UnknownNameError, match=r"Known: features\.4, hidden\.0, hidden\.3"):
        inspect.dot(packed, x, "hidden.9", 0)


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_stored_tensors(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    found = inspect.cost(packed, x, rounds=1)
    frame = found.frame().set_index("layer")
    assert frame["packed_bytes"].sum() == packed.nbytes == found.nbytes
    for name in inspect.layers(packed):
        assert frame.loc[name, "packed_bytes"] == inspect.bits(packed, name).words.nbytes
        assert frame.loc[name, "float_bytes"] == 4 * packed.source.get_submodule(name).weight.numel()
    assert frame["float_bytes"].sum() == found.float_nbytes


def test_latencies_are_medians_of_every_backend_and_steps_of_the_cpu_kernels(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    updates = [update for update in costing(packed, x, rounds=3) if update.value is not None]
    found = updates[-1].value
    assert {"original", "torch", "numba"} <= set(found.rounds)
    assert not {"numpy", "shim"} & set(found.rounds)
    assert {len(times) for times in found.rounds.values()} == {3}
    assert found.seconds["numba"] == sorted(found.rounds["numba"])[1] > 0
    assert [(layer, op) for layer, op, _ in found.steps] == [(s.layer, s.op) for s in packed.graph.steps]
    assert found.frame()["seconds"].sum() == pytest.approx(sum(s for _, _, s in found.steps))
    assert [len(u.value.rounds["numba"]) for u in updates] == [0, 1, 2, 3]  # partial results on the way
    assert found.latencies()["ms per example"].iloc[0] == pytest.approx(1e3 * found.seconds["original"] / 3)
    assert "KB" in found.summary()


def test_a_loaded_net_is_timed_without_its_source(lenet: tuple[Any, Tensor]) -> None:
    packed, x = lenet
    found = inspect.cost(qlab.binary.PackedNet(packed.graph), x, ["numpy"], rounds=1)
    assert set(found.rounds) == {"numpy"}
    assert found.steps == ()
    assert "seconds" not in found.frame()


def test_products_that_are_compared_are_equal() -> None:
    from qlab.binary.cost import _products

    for kind, n in product(KINDS, (1, 65)):
        runs = _products(kind, n)
        expected = runs["float"]().int().numpy()  # type: ignore[attr-defined]
        for way in ("packed", "packing"):
            np.testing.assert_array_equal(runs[way](), expected)


def test_a_crossover_is_measured_at_every_size_and_can_be_cancelled() -> None:
    found = inspect.crossover(sizes=(8, 16), rounds=1)
    assert [(p.kind, p.n) for p in found.points] == [(k, n) for n in (8, 16) for k in KINDS]
    assert found.frame()[["float_s", "packed_s", "packing_s"]].to_numpy().min() > 0
    work = crossing(sizes=(8, 16), rounds=1)
    job = Job(work, lambda job: job.cancel() if job.value.points else None)
    assert job.start().wait(60)
    assert job.status == "cancelled"
    assert len(job.value.points) == 2  # the size that was under way when cancel was asked for is kept


def test_sizes_that_would_take_too_long_are_left_out_and_named() -> None:
    found = inspect.crossover(sizes=(256, 2**14), kinds=["matrix"], rounds=1, seconds=3)
    assert [p.n for p in found.points] == [256]
    assert found.left_out == (("matrix", 2**14),)


def points(*gains: tuple[int, float, float]) -> Crossover:
    return Crossover(tuple(Point("matrix", n, g, 1.0, g / p, g, p) for n, g, p in gains), (), 1, "a machine")


def test_the_crossover_is_the_size_from_which_all_larger_ones_win() -> None:
    found = points((64, 2.0, 0.5), (32, 1.5, 0.2), (128, 0.9, 0.6), (256, 3.0, 1.1), (512, 9.0, 4.0))
    assert found.smallest() == 256
    assert found.smallest(packing=True) == 256
    assert found.smallest("vector") is None
    assert points((64, 2.0, 2.0), (128, 1.0, 0.5)).smallest() is None
    assert "win from n = 256 on" in found.summary()
    assert "at no size measured" in points((64, 0.5, 0.4)).summary()
    assert points().summary() == "Nothing was measured yet."
