"""A compiled net gives the bits of the deployed net, on every backend, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.binary.packed import PackedNet
from qlab.errors import InputError, QlabError, UnknownNameError
from qlab.methods import CATALOG
from qlab.quantizers import Sign, Uniform
from tests.binary.conftest import binary_net, images, randomised, signs

BACKENDS = ["torch", "numpy", "numba"]


def exact(net: nn.Module, x: Tensor) -> PackedNet:
    """Compile a net and assert that every backend gives its very bits."""
    packed = qlab.binary.compile(net.eval(), x[:2])
    certificate = packed.verify(x, BACKENDS)
    assert certificate.exact, f"{certificate.summary()}\n{certificate.frame()}"
    with torch.no_grad():
        assert torch.equal(packed(x), net(x))
    return packed


def how(packed: PackedNet) -> dict[str, str]:
    return {row["layer"]: row["runs"] for row in packed.graph.layers}


# ---- the shelf ------------------------------------------------------------------------------------------------------

NETS: list[tuple[str, tuple[int, ...], dict]] = [
    ("mlp", (2,), {}),
    ("mlp", (1, 9, 9), {"hidden": (65, 130)}),
    ("lenet", (1, 28, 28), {}),
    ("vgg_small", (3, 17, 19), {"width": 20}),
    ("resnet20", (3, 16, 16), {}),
    ("resnet18", (3, 16, 16), {"width": 8}),
    ("resnet18", (3, 9, 11), {"width": 8, "shortcut": "A"}),
    ("bireal18", (3, 15, 17), {"width": 8}),
]


@pytest.mark.parametrize(("name", "shape", "options"), NETS)
@pytest.mark.parametrize("keep", [("first", "last"), ()])
def test_every_net_of_the_shelf_gives_the_bits_of_the_deployed_net(
    name: str, shape: tuple[int, ...], options: dict, keep: tuple[str, ...]
) -> None:
    packed = exact(binary_net(name, shape, keep=keep, **options), images(3, *shape))
    assert "bits" in how(packed).values()


FEW_BIT_ACTIVATIONS = (
    "askewsgd_low_bit",
    "luq",
    "qnn_rnn",
)  # their grids are none of the packed format's; said in one error


@pytest.mark.parametrize("name", sorted(CATALOG))
@pytest.mark.parametrize("model", ["mlp", "vgg_small"])
def test_every_method_of_the_catalog_compiles_to_the_bits_of_its_deployed_net(name: str, model: str) -> None:
    shape = (2,) if model == "mlp" else (3, 8, 8)
    net = randomised(qlab.build(model, shape, 2, seed=0, **({} if model == "mlp" else {"width": 12})))
    info = CATALOG[name]
    options = {"activations": "sign", "keep": ["first", "last"]} if name == "ste" else {}
    method = qlab.methods.create(name, net, **options)
    x = images(4, *shape)
    deployed = method.hardened([images(8, *shape, seed=5)])  # untrained, which a method that draws does not deploy
    if name in FEW_BIT_ACTIVATIONS:
        with pytest.raises(InputError, match="the packed format knows sign and uniform"):
            qlab.binary.compile(deployed, x)
        return
    if name == "xnor_net":  # torch rounds its sums of +-a, the packed net scales an exact sum: reported, not hidden
        packed = qlab.binary.compile(deployed, x[:2])
        certificate = packed.verify(x, BACKENDS)
        assert not certificate.exact
        assert "logits differ" in certificate.summary()
        with torch.no_grad():
            assert torch.allclose(packed(x), deployed(x), atol=1e-5)
    else:
        packed = exact(deployed, x)
    runs = set(how(packed).values())
    if info.weight_bits > 1:
        assert runs == {"float"}
    elif info.activation_bits == 1 or name == "ste":
        assert "bits" in runs  # the first layer, and what a method keeps, beside them
        assert runs <= {"bits", "sign weights", "float"}
    else:
        assert runs == {"sign weights"}


@pytest.mark.parametrize("input_scale", ["mean", "map"])
def test_signs_with_a_scale_of_their_input_are_refused_by_name(input_scale: str) -> None:
    for model, shape in (("mlp", (5,)), ("vgg_small", (3, 8, 8))):
        net = qlab.build(model, shape, 2, seed=0, **({} if model == "mlp" else {"width": 12}))
        deployed = qlab.methods.create("xnor_net", net, input_scale=input_scale, reestimate_bn=False).deployed()
        with pytest.raises(InputError, match="InputSign quantizer"):
            qlab.binary.compile(deployed, images(2, *shape))


def test_batch_of_one_and_other_batch_sizes_than_the_examples() -> None:
    net = binary_net("lenet", (1, 28, 28))
    packed = qlab.binary.compile(net, images(2, 1, 28, 28))
    for n in (1, 2, 5, 1):
        x = images(n, 1, 28, 28, seed=n)
        with torch.no_grad():
            assert torch.equal(packed(x), net(x))


def test_input_that_is_not_contiguous() -> None:
    net = binary_net("vgg_small", (3, 16, 16), width=8)
    x = images(4, 16, 16, 3).permute(0, 3, 1, 2)
    packed = qlab.binary.compile(net, x)
    with torch.no_grad():
        assert torch.equal(packed(x), net(x.contiguous()))


# ---- every kind of layer --------------------------------------------------------------------------------------------


class Signs(nn.Module):
    """A layer with sign weights."""

    def __new__(cls, layer: nn.Module, scale: Tensor | None = None) -> nn.Module:  # type: ignore[misc]
        with torch.no_grad():
            w = signs(*layer.weight.shape, seed=layer.weight.numel())
            layer.weight.copy_(w if scale is None else w * scale.view(-1, *(1 for _ in w.shape[1:])))
        return layer


def conv(i: int, o: int, k: int | tuple[int, int] = 3, **options: object) -> nn.Module:
    return Signs(nn.Conv2d(i, o, k, **{"bias": False} | options))  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "stride, padding": lambda: nn.Sequential(
        Sign(), conv(6, 9, stride=(2, 1), padding=(2, 1)), nn.BatchNorm2d(9), Sign(), conv(9, 4)
    ),
    "dilation, groups": lambda: nn.Sequential(
        Sign(), conv(6, 8, dilation=2, groups=2, padding=2), nn.BatchNorm2d(8), Sign(), conv(8, 8, groups=8)
    ),
    "1x1": lambda: nn.Sequential(Sign(), conv(6, 65, 1), nn.BatchNorm2d(65), Sign(), conv(65, 3, 1, stride=2)),
    "no batch norm": lambda: nn.Sequential(Sign(), conv(6, 7), Sign(), conv(7, 3)),
    "bias": lambda: nn.Sequential(Sign(), conv(6, 7, bias=True), nn.BatchNorm2d(7), Sign(), conv(7, 3, bias=True)),
    "hardtanh before sign": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.BatchNorm2d(7), nn.Hardtanh(), Sign(), conv(7, 3)
    ),
    "prelu before sign": lambda: nn.Sequential(Sign(), conv(6, 7), nn.PReLU(7), nn.BatchNorm2d(7), Sign(), conv(7, 3)),
    "relu between": lambda: nn.Sequential(Sign(), conv(6, 7), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 3)),
    "relu, then sign: constant": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.BatchNorm2d(7), nn.ReLU(), Sign(), conv(7, 3)
    ),
    "silu": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.BatchNorm2d(7), nn.SiLU(), nn.BatchNorm2d(7), Sign(), conv(7, 3)
    ),
    "pool before batch norm": lambda: nn.Sequential(
        Sign(), conv(6, 70), nn.MaxPool2d(2), nn.BatchNorm2d(70), Sign(), conv(70, 3)
    ),
    "pool after batch norm": lambda: nn.Sequential(
        Sign(), conv(6, 70), nn.BatchNorm2d(70), nn.MaxPool2d(3, 2, 1), Sign(), conv(70, 3)
    ),
    "pool after sign": lambda: nn.Sequential(
        Sign(), conv(6, 70), nn.BatchNorm2d(70), Sign(), nn.MaxPool2d(3, 2, 1), conv(70, 3)
    ),
    "pool that rounds up": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(7), Sign(), conv(7, 3)
    ),
    "bias, pool, relu": lambda: nn.Sequential(Sign(), conv(6, 7, bias=True), nn.MaxPool2d(2), nn.ReLU(), conv(7, 3)),
    "pool of a float": lambda: nn.Sequential(nn.MaxPool2d(2), Sign(), conv(6, 7)),
    "batch norm, then pool, in float": lambda: nn.Sequential(
        nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.MaxPool2d(3, 2, 1), Sign(), conv(7, 3)
    ),
    "average pool": lambda: nn.Sequential(Sign(), conv(6, 7), nn.AvgPool2d(2), nn.BatchNorm2d(7), Sign(), conv(7, 3)),
    "two batch norms": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.BatchNorm2d(7), nn.BatchNorm2d(7), Sign(), conv(7, 3)
    ),
    "sign of a sign": lambda: nn.Sequential(
        Sign(), Sign(), conv(6, 7), nn.Dropout(0.5), nn.Identity(), Sign(), conv(7, 3)
    ),
    "linear after flattening": lambda: nn.Sequential(
        Sign(), conv(6, 7), nn.BatchNorm2d(7), Sign(), nn.Flatten(), Signs(nn.Linear(7 * 49, 5, bias=False))
    ),
    "float layer on signs": lambda: nn.Sequential(
        Sign(), nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), Sign(), nn.Flatten(), nn.Linear(343, 3)
    ),
    "uniform activations": lambda: nn.Sequential(
        Uniform(4, limit=2.0), conv(6, 7), nn.BatchNorm2d(7), Uniform(2, False, 1.0), conv(7, 3)
    ),
    "sign weights on floats, grouped": lambda: nn.Sequential(
        conv(6, 8, groups=2, bias=True), nn.Tanh(), conv(8, 3, stride=2)
    ),
    "linear along the columns of a picture": lambda: nn.Sequential(Sign(), Signs(nn.Linear(9, 5)), nn.ReLU()),
    "padding same": lambda: nn.Sequential(
        Sign(), conv(6, 7, padding="same"), Sign(), conv(7, 3, (3, 5), padding="same")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_exact(kind: str) -> None:
    exact(randomised(KINDS[kind](), seed=4), images(3, 6, 9, 9))


def test_half_integers_land_on_ties_and_stay_exact() -> None:
    net = nn.Sequential(Sign(), conv(6, 64, padding=1), nn.BatchNorm2d(64, eps=0.0), Sign(), conv(64, 8))
    norm = net[2]
    norm.running_var.fill_(1.0)
    norm.running_mean.copy_(torch.arange(64.0) % 9 - 4)  # every channel is zero at an integer
    norm.weight.data = signs(64)
    packed = exact(net, images(8, 6, 9, 9))
    assert packed.report().set_index("layer").ties["1"] == 64


class Functions(nn.Module):
    """Calls instead of modules, and the reshape that every second net has."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = Sign()
        self.first, self.second = conv(6, 6, padding=1), Signs(nn.Linear(2 * 6 * 16 + 4, 5, bias=False))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(self.sign(x)))
        z = torch.relu(y) * 0.5 + F.hardtanh(x) - y
        z = torch.cat([F.max_pool2d(z, 2), F.avg_pool2d(y, 2)], 1)
        corner = torch.flatten(x[:, :1, :2, :2], 1)
        return self.second(self.sign(torch.cat([z.view(z.size(0), -1), corner], dim=1))) + F.pad(corner, (0, 1)).mean(
            1, keepdim=True
        )


def test_functional_calls_are_understood() -> None:
    packed = exact(randomised(Functions()), images(3, 6, 8, 8))
    assert how(packed) == {"first": "bits", "second": "bits"}


class Shared(nn.Module):
    """A residual stream, and a sum that two places read."""

    def __init__(self) -> None:
        super().__init__()
        self.sign, self.conv, self.norm, self.last = Sign(), conv(6, 6, padding=1), nn.BatchNorm2d(6), conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(self.sign(x))
        y = self.norm(z) + x
        return self.last(self.sign(y + z))


def test_sums_that_are_read_twice_are_written_once() -> None:
    packed = exact(randomised(Shared()), images(3, 6, 8, 8))
    assert [step.op for step in packed.graph.steps].count("binary_conv2d") == 2


def test_batch_norm_and_shortcut_ride_along_in_a_bireal_net() -> None:
    packed = exact(binary_net("bireal18", (3, 16, 16), width=8), images(2, 3, 16, 16))
    steps = [s for s in packed.graph.steps if s.op == "binary_conv2d"]
    assert len(steps) == 16
    assert all(len(s.inputs) == 2 and "alpha" in s.tensors for s in steps)


def test_scaled_signs_run_on_bits_and_agree_to_rounding() -> None:
    # XNOR-Net's form: torch sums +-a in its own order and rounds; the packed net multiplies the exact sum by a once.
    scale = torch.rand(9, generator=torch.Generator().manual_seed(0)) + 0.1
    net = nn.Sequential(Sign(), Signs(nn.Conv2d(6, 9, 3), scale), nn.BatchNorm2d(9)).eval()
    x = images(3, 6, 9, 9)
    packed = qlab.binary.compile(randomised(net), x)
    certificate = packed.verify(x, BACKENDS)
    assert how(packed) == {"1": "bits"}
    assert certificate.equal
    with torch.no_grad():
        torch.testing.assert_close(packed(x), net(x), rtol=1e-5, atol=1e-5)


def test_weighing_floats_with_bits_agrees_to_rounding_on_every_backend() -> None:
    net = qlab.harden(qlab.quantize(qlab.build("mlp", (70,), 10, hidden=(65, 130), seed=0), Sign))
    x = images(5, 70)
    packed = qlab.binary.compile(net, x, product="sums")
    certificate = packed.verify(x, BACKENDS)
    assert certificate.equal
    assert 0 < certificate.source["largest difference"] < 1e-3
    with pytest.raises(UnknownNameError, match="Known: sums, unpack"):
        qlab.binary.compile(net, x, product="sum")  # type: ignore[arg-type]


def test_powers_of_two_as_scales_stay_exact() -> None:
    scale = 2.0 ** torch.arange(-4, 5)
    exact(
        randomised(
            nn.Sequential(Sign(), Signs(nn.Conv2d(6, 9, 3, bias=False), scale), nn.BatchNorm2d(9), Sign(), conv(9, 2))
        ),
        images(3, 6, 9, 9),
    )


def test_pooling_gives_the_same_bits_in_both_memory_layouts() -> None:
    # On this the backends rely when they pool channels last.
    for seed in range(5):
        x = images(2, 17, 13, 15, seed=seed)
        last = x.to(memory_format=torch.channels_last)
        for options in (
            {"ceil_mode": True},
            {"stride": 2, "padding": 1},
            {"stride": 1, "padding": 1, "count_include_pad": False},
        ):
            assert torch.equal(F.avg_pool2d(x, 3, **options), F.avg_pool2d(last, 3, **options))  # type: ignore[arg-type]
        assert torch.equal(F.max_pool2d(x, 3, 2, 1), F.max_pool2d(last, 3, 2, 1))


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_says_for_every_layer_what_runs_how_and_why() -> None:
    net = binary_net("vgg_small", (3, 16, 16), width=64)
    rows = qlab.binary.compile(net, images(1, 3, 16, 16)).report().set_index("layer")
    assert list(rows.runs) == ["float"] + ["bits"] * 5 + ["float"]
    assert "values" in rows.reason["features.0"]
    assert rows.packed_bytes["features.3"] == 64 * 64 * 9 // 8
    assert rows.float_bytes["features.3"] == 64 * 64 * 9 * 4
    assert rows.binary_macs["features.3"] == 64 * 64 * 9 * 16 * 16
    assert rows.float_macs["features.0"] == 64 * 3 * 9 * 16 * 16


def test_weights_take_a_thirty_second_of_their_float_size() -> None:
    packed = qlab.binary.compile(binary_net("vgg_small", (3, 16, 16), keep=()), images(1, 3, 16, 16))
    rows = packed.report()
    hidden = rows[rows.input_bits == 1]
    assert (hidden.float_bytes == 32 * hidden.packed_bytes).all()


# ---- bad input ------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "training mode"),
        (qlab.quantize(nn.Sequential(nn.Linear(4, 4)), Sign), "latent weights"),
        (Branching().eval(), "must not branch"),
        (Odd().eval(), "cumsum"),
        (nn.Sequential(nn.Softmax(1)).eval(), "Softmax"),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), Sign()).eval(), "Unflatten"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval(), "running statistics"),
        ("net", "expected a deployed net"),
    ],
)
def test_nets_that_cannot_be_compiled_say_why(net: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        qlab.binary.compile(net, images(2, 4))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(2, 5), r"expected \(N, 4\)"),
        (images(4), r"expected \(N, 4\)"),
        (images(0, 4), "at least 1"),
        (images(2, 4).double(), "float64"),
        (np.zeros((2, 4), np.float32), "ndarray"),
        (images(2, 4).fill_(float("nan")), "NaN"),
        (images(2, 4).fill_(float("inf")), "infinite"),
    ],
)
def test_batches_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    packed = qlab.binary.compile(nn.Sequential(Signs(nn.Linear(4, 3))).eval(), images(2, 4))
    with pytest.raises(InputError, match=message):
        packed(x)


def test_unknown_backends_are_named() -> None:
    packed = qlab.binary.compile(nn.Sequential(Signs(nn.Linear(4, 3))).eval(), images(2, 4))
    with pytest.raises(UnknownNameError, match="Did you mean 'numba'"):
        packed(images(2, 4), backend="nunba")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_that_the_machine_lacks_says_what_there_is() -> None:
    packed = qlab.binary.compile(nn.Sequential(Signs(nn.Linear(4, 3))).eval(), images(2, 4))
    with pytest.raises(QlabError, match="cannot run here; there are torch, numpy, numba"):
        packed(images(2, 4), backend="cuda")


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"feature_norm": "std_sample"}, "stages.0.0.unit1.norm"),
        ({"scaling": "input_map"}, "stages.0.0.unit1.input_scale"),
    ],
)
def test_a_call_that_the_format_does_not_know_is_refused_with_the_name_of_its_layer(
    options: dict[str, str], layer: str
) -> None:
    net = qlab.build("repair20", (3, 8, 8), 4, width=4, blocks=[1], seed=0, **options)
    deployed = qlab.methods.create("bnn_repair", net, reestimate_bn=False).deployed()
    with pytest.raises(InputError, match=rf"in {layer} calls"):
        qlab.binary.compile(deployed, images(2, 3, 8, 8))
