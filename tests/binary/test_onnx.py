"""ONNX of packed nets: another runtime gives the same bits, or says by how much its float sums differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.binary import BACKENDS, export_onnx
from qlab.binary.backend_onnx import OnnxRuntime
from qlab.binary.backends import Simulation
from qlab.binary.graph import OPS, Graph, Step
from qlab.binary.onnx import RAW, build, unsupported
from qlab.binary.onnx_steps import WRITERS
from qlab.binary.packed import PackedNet, compile
from qlab.errors import InputError, QlabError
from tests.strategies import Small, deployed

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def batch(shape: tuple[int, ...], count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class Signs(nn.Module):
    """A net whose sums are all of signs: the input's own signs first, batch norm last."""

    def __init__(self) -> None:
        super().__init__()
        self.act0, self.conv1, self.norm1 = nn.ReLU(), nn.Conv2d(3, 70, 3, padding=1, bias=False), nn.BatchNorm2d(70)
        self.act1, self.conv2, self.norm2 = nn.ReLU(), nn.Conv2d(70, 70, 3, padding=1, bias=False), nn.BatchNorm2d(70)
        self.act2, self.conv3, self.norm3 = nn.ReLU(), nn.Conv2d(70, 6, 3, 2, bias=False, groups=2), nn.BatchNorm2d(6)
        self.pool, self.act3 = nn.MaxPool2d(2, padding=1), nn.ReLU()
        self.last, self.norm4 = nn.Linear(6 * 9, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.act0(x)))
        x = self.norm2(self.conv2(self.act1(x))) + x
        x = self.act3(self.pool(self.norm3(self.conv3(self.act2(x)))))
        return self.norm4(self.last(x.flatten(1)))


@pytest.fixture(scope="module")
def signs() -> PackedNet:
    torch.manual_seed(0)
    return compile(deployed(Signs(), (3, 11, 11), keep=()), batch((3, 11, 11), 2))


def bits_of(graph: Graph, backend: Any, x: Tensor) -> dict[str, Tensor]:
    """The hidden bits of a batch, as +-1; a flattened picture's are those before it."""
    found: dict[str, Tensor] = {}

    def note(step: Step, results: tuple[Any, ...]) -> None:
        bits = (
            ["bits" if "threshold" in step.tensors else "float", "bits"] if step.op.startswith("binary") else ["bits"]
        )
        for name, value, kind in zip(step.outputs, results, bits, strict=False):
            if kind == "bits" and step.op in ("pack", "binary_conv2d", "binary_linear", "max_pool_bits"):
                found[name] = value.clone()

    backend(graph).run(x, note)
    return found


# ---- equal bits -----------------------------------------------------------------------------------------------------


def test_a_net_of_signs_has_the_same_logits_and_hidden_bits_elsewhere(signs: PackedNet) -> None:
    x = batch((3, 11, 11), 32, seed=1)
    assert OnnxRuntime(signs.graph).promised
    assert torch.equal(OnnxRuntime(signs.graph).run(x), Simulation(signs.graph).run(x))
    mine, theirs = bits_of(signs.graph, Simulation, x), bits_of(signs.graph, OnnxRuntime, x)
    assert set(mine) == set(theirs)
    assert len(mine) >= 4
    for name, bits in mine.items():
        assert torch.equal(bits.abs(), torch.ones_like(bits))
        assert torch.equal(bits, theirs[name])


def test_the_certificate_of_a_net_of_signs_counts_the_other_runtime(signs: PackedNet) -> None:
    certificate = signs.verify(batch((3, 11, 11)), ["torch", "numpy", "onnxruntime"])
    assert certificate.exact
    assert set(certificate.outputs) == {"torch", "numpy", "onnxruntime"}
    assert certificate.float_sums == {}
    assert certificate.versions["onnxruntime"] == onnxruntime.__version__


def test_sign_of_zero_is_plus_one() -> None:
    steps = (
        Step("pack", ("input",), ("b",), options={"fused": False}),
        Step("unpack", ("b",), ("y",), options={"channels": 4}),
    )
    x = torch.tensor([[0.0, -0.0, -1e-45, 1e-45]])
    assert OnnxRuntime(Graph((4,), steps, {}, "y").check()).run(x).tolist() == [[1.0, 1.0, -1.0, 1.0]]


def test_a_fused_batch_norm_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(500, generator=generator).numpy() for name in ("alpha", "beta")}
    weight = np.zeros((500, 1), np.uint64)
    options = {"features": 9, "fused": True}
    roles = {"weight": "weight", "alpha": "alpha", "beta": "beta"}
    steps = (
        Step("pack", ("input",), ("b",), options={"fused": False}),
        Step("binary_linear", ("b",), ("y",), tensors=roles, options=options),
    )
    graph = Graph((9,), steps, {"weight": weight, **tensors}, "y").check()
    x = batch((9,), 64)
    fused = OnnxRuntime(graph).run(x)
    assert torch.equal(fused, Simulation(graph).run(x))
    twice = Graph(
        (9,),
        (steps[0], Step("binary_linear", ("b",), ("y",), "", roles, options | {"fused": False})),
        graph.tensors,
        "y",
    )
    assert not torch.equal(fused, OnnxRuntime(twice.check()).run(x))


# ---- sums in another order ------------------------------------------------------------------------------------------

NETS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("mlp", (1, 8, 8), {}),
    ("lenet", (1, 28, 28), {}),
    ("vgg_small", (3, 17, 19), {"width": 20, "final_norm": True}),
    ("resnet18", (3, 16, 16), {"width": 8, "shortcut": "A"}),
    ("bireal18", (3, 16, 16), {"width": 8}),
]


@pytest.mark.parametrize(("model", "shape", "options"), NETS, ids=[n[0] for n in NETS])
def test_float_layers_differ_in_rounding_and_decide_the_same(model: str, shape: tuple[int, ...], options: Any) -> None:
    x = batch(shape)
    packed = compile(deployed(model, shape, **options), x[:2])
    certificate = packed.verify(x, ["torch", "onnxruntime"])
    logits, others = packed(x, "torch"), packed(x, "onnxruntime")
    differing = others.argmax(1) != logits.argmax(1)
    assert list(certificate.outputs) == ["torch"]
    assert certificate.float_sums["onnxruntime"] == {
        "differing logits": int((others != logits).sum()),
        "largest difference": float((others - logits).abs().max()),
        "differing decisions": int(differing.sum()),
    }
    assert "onnxruntime sums floats in its own order" in certificate.summary()
    mine, theirs = bits_of(packed.graph, Simulation, x), bits_of(packed.graph, OnnxRuntime, x)
    same = torch.stack([(theirs[name] == bits).flatten(1).all(1) for name, bits in mine.items()]).all(0)
    assert int(same.sum()) >= len(x) - 1  # a sum within rounding of zero may fall on the other side, rarely
    rounding = 64 * torch.finfo(torch.float32).eps * float(logits.abs().max())
    assert float((others - logits)[same].abs().max()) <= rounding
    assert not differing[same].any()


# ---- every operation ------------------------------------------------------------------------------------------------


def alone(op: str, shape: tuple[int, ...], options: dict[str, Any], inputs: int = 1, **tensors: np.ndarray) -> Graph:
    step = Step(op, ("input",) * inputs, ("y",), "layer", {role: role for role in tensors}, options)
    return Graph(shape, (step,), tensors, "y").check()


def pool(**options: Any) -> dict[str, Any]:
    return {"kernel": [3, 2], "stride": [2, 2], "padding": [0, 0], "ceil": False, **options}


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)


IMAGE = (4, 7, 6)
WINDOW = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
WORDS = {"weight": np.arange(4 * 3 * 2, dtype=np.uint64).reshape(4, 3, 2, 1) % np.uint64(4)}
ALONE: dict[str, Graph] = {
    "conv2d": alone("conv2d", IMAGE, WINDOW, weight=some(4, 2, 3, 2), bias=some(4)),
    "linear": alone("linear", (7,), {}, weight=some(3, 7), bias=some(3)),
    "linear of the last dimension": alone("linear", (2, 7), {}, weight=some(3, 7)),
    "sign_weight_conv2d": alone(
        "sign_weight_conv2d", IMAGE, {**WINDOW, "channels": 4}, scale=some(4), weight=WORDS["weight"]
    ),
    "sign_weight_linear": alone(
        "sign_weight_linear", (2,), {"features": 2, "product": "sums"}, scale=some(4), bias=some(4), weight=WORDS["weight"][:, 0, 0]
    ),
    "batch_norm": alone("batch_norm", IMAGE, {"eps": 1e-5}, mean=some(4), var=some(4), weight=some(4), bias=some(4)),
    "batch_norm without weights": alone("batch_norm", (4,), {"eps": 1e-5}, mean=some(4), var=some(4)),
    "prelu": alone("prelu", IMAGE, {}, weight=some(4)),
    "prelu of one weight": alone("prelu", IMAGE, {}, weight=some(1)),
    **{op: alone(op, IMAGE, {}) for op in ("relu", "relu6", "tanh", "sigmoid", "silu")},
    "gelu": alone("gelu", IMAGE, {"approximate": "none"}),
    "gelu tanh": alone("gelu", IMAGE, {"approximate": "tanh"}),
    "elu": alone("elu", IMAGE, {"alpha": 0.7}),
    "leaky_relu": alone("leaky_relu", IMAGE, {"slope": 0.1}),
    "hardtanh": alone("hardtanh", IMAGE, {"low": -0.5, "high": 0.25}),
    "uniform": alone("uniform", IMAGE, {"low": -2, "high": 1}, step=np.array(0.3, np.float32)),
    "max_pool2d": alone("max_pool2d", IMAGE, pool(dilation=[1, 2], padding=[1, 0])),
    "max_pool2d rounded up": alone("max_pool2d", (4, 8, 9), pool(dilation=[1, 1], padding=[1, 1], ceil=True)),
    "avg_pool2d": alone("avg_pool2d", IMAGE, pool(count_padding=True, padding=[1, 1])),
    "avg_pool2d of what is there": alone("avg_pool2d", IMAGE, pool(count_padding=False, padding=[1, 1])),
    "avg_pool2d rounded up": alone("avg_pool2d", (4, 8, 9), pool(count_padding=True, ceil=True)),
    "adaptive_avg_pool2d": alone("adaptive_avg_pool2d", (4, 6, 9), {"size": [2, 3]}),
    "mean": alone("mean", IMAGE, {"dims": [-1, 2], "keepdim": False}),
    "flatten": alone("flatten", IMAGE, {"start": 2, "end": -1}),
    "reshape": alone("reshape", IMAGE, {"shape": [-1, 2, 84]}),
    "pad": alone("pad", IMAGE, {"pads": [1, 2, 0, 3], "value": 0.5}),
    "pad that crops": alone("pad", IMAGE, {"pads": [-1, 2], "value": 0.5}),
    "slice": alone("slice", IMAGE, {"slices": [[None, None, None], [1, -1, None], [None, None, 2]]}),
    **{op: alone(op, IMAGE, {}, inputs=2) for op in ("add", "sub", "mul")},
    "add_number": alone("add_number", IMAGE, {"number": 0.3}),
    "mul_number": alone("mul_number", IMAGE, {"number": 0.3}),
    "cat": alone("cat", IMAGE, {"dim": 2}, inputs=2),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_each_float_operation_means_the_same_in_onnx(name: str) -> None:
    graph = ALONE[name]
    onnx.checker.check_model(build(graph), full_check=True)
    x = batch(graph.input_shape, 5)
    expected = Simulation(graph).run(x)
    backend = OnnxRuntime(graph)
    found = backend.run(x)
    if backend.promised:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("pad", ["zero", "one"])
@pytest.mark.parametrize("floats", [True, False])
def test_a_binary_convolution_means_the_same_in_onnx(pad: str, floats: bool) -> None:
    options = {**WINDOW, "channels": 4, "pad": pad, "fused": False}
    after: dict[str, np.ndarray] = {"threshold": np.array([0, 1, -2, -(2**31)], np.int32)}
    after["flip"] = np.array([0b1010], np.uint64)
    if floats:
        after = {"alpha": some(4), "beta": some(4)}
    tensors = WORDS | after
    steps = [
        Step("pack", ("input",), ("b",), options={"fused": False}),
        Step("binary_conv2d", ("b",), ("z",), "", {role: role for role in tensors}, options),
    ]
    steps += [] if floats else [Step("unpack", ("z",), ("y",), options={"channels": 4})]
    graph = Graph(IMAGE, tuple(steps), tensors, steps[-1].outputs[0]).check()
    x = batch(IMAGE, 5)
    assert torch.equal(OnnxRuntime(graph).run(x), Simulation(graph).run(x))


def test_every_operation_has_a_writer() -> None:
    assert set(WRITERS) == set(OPS) - RAW


# ---- the file -------------------------------------------------------------------------------------------------------


def test_an_exported_file_takes_batches_of_any_size(signs: PackedNet, tmp_path: Path) -> None:
    path = export_onnx(signs, batch((3, 11, 11)), tmp_path / "net.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )  # optimised, as a user runs it
    for count in (1, 7):
        x = batch((3, 11, 11), count)
        found = torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])
        torch.testing.assert_close(found, signs(x, "torch"), rtol=1e-6, atol=1e-6)  # batch norm may go into the weights


def test_a_deployed_net_is_compiled_on_the_way(tmp_path: Path) -> None:
    net, x = deployed(Small(), (2, 8, 8)), batch((2, 8, 8))
    path = export_onnx(net, x, tmp_path / "net.onnx")
    assert path.read_bytes() == export_onnx(compile(net, x), x, tmp_path / "other.onnx").read_bytes()


UNEVEN = [
    ("adaptive_avg_pool2d", (4, 7, 6), {"size": [2, 3]}, "windows differ in size"),
    ("avg_pool2d", (4, 8, 9), pool(count_padding=True, ceil=True, padding=[1, 1]), "counts padding"),
]


def test_all_that_onnx_cannot_say_is_named_before_anything_is_written(tmp_path: Path) -> None:
    for op, shape, options, message in UNEVEN:
        assert message in unsupported(alone(op, shape, options))[0]
    steps = (
        Step("avg_pool2d", ("input",), ("a",), "first", options=UNEVEN[1][2]),
        Step("adaptive_avg_pool2d", ("a",), ("b",), "second", options={"size": [2, 2]}),
    )
    packed = PackedNet(Graph((4, 8, 9), steps, {}, "b").check())
    with pytest.raises(InputError, match=r"first: .*; second: "):
        export_onnx(packed, batch((4, 8, 9)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    assert "cannot be said in ONNX" in packed.verify(batch((4, 8, 9)), ["onnxruntime"]).absent["onnxruntime"]


def test_without_the_package_the_extra_is_named(
    signs: PackedNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(QlabError, match=r"qlab\[onnx\]"):
        export_onnx(signs, batch((3, 11, 11)), tmp_path / "net.onnx")


def test_the_backend_is_on_the_list() -> None:
    assert "onnxruntime" in BACKENDS
    assert "onnxruntime" in qlab.binary.present()
