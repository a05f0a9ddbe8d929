"""First layers on the bit planes of raw images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.binary.backend_cuda import Cuda
from qlab.binary.cost import cost
from qlab.binary.images import Normalise, taps
from qlab.errors import InputError
from qlab.quantizers import Sign
from tests.binary.conftest import generator, randomised
from tests.binary.test_backend_cuda import OnTensors
from tests.binary.test_compile import Signs, conv

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def exact_product(layer: nn.Module, u: Tensor) -> Tensor:
    """Return a layer's output on the normalised image, all in float64."""
    shape = (1, -1, 1, 1)
    x = (u.double() / 255 - torch.tensor(MEAN).double().view(shape)) / torch.tensor(STD).double().view(shape)
    return layer.double()(x).detach()


LAYERS: dict[str, Any] = {
    "padded": lambda: conv(3, 9, padding=1),
    "strided, dilated, biased": lambda: conv(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3), bias=True),
    "one tap": lambda: conv(3, 4, 1),
    "more taps than a word": lambda: conv(3, 4, 9, padding=4),
    "scaled": lambda: Signs(nn.Conv2d(3, 4, 3), torch.tensor([0.5, 0.7, 1.0, 3.0])),
    "linear": lambda: nn.Sequential(nn.Flatten(), Signs(nn.Linear(3 * 11 * 12, 7))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_on_bit_planes_is_the_product_with_the_normalised_image(kind: str) -> None:
    layer, u = LAYERS[kind]().eval(), pixels(2, 3, 11, 12)
    packed = qlab.binary.compile(layer, u, image=(MEAN, STD))
    assert [row["runs"] for row in packed.graph.layers] == ["bit planes"]
    certificate = packed.verify(u, ["torch", "numpy", "numba"])
    assert certificate.equal
    y = packed(u)
    assert torch.equal(Cuda(packed.graph, OnTensors(), "cpu").run(u), y)
    expected = exact_product(layer, u)
    # One rounding of the sum, and one each of scale and bias: nearer than float32 sums, which round at every addition.
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=3e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("keep", [(), ("first",)])
def test_whole_nets_on_raw_images_agree_with_the_net_on_normalised_ones(keep: tuple[str, ...]) -> None:
    plain = randomised(qlab.build("vgg_small", (3, 16, 16), 10, width=8, seed=0))
    net = qlab.harden(qlab.quantize(plain, Sign, Sign, (*keep, "last")))
    u = pixels(5, 3, 16, 16)
    packed = qlab.binary.compile(net, u, image=(MEAN, STD))
    certificate = packed.verify(u, ["torch", "numpy", "numba"])
    assert certificate.equal
    assert certificate.exact or not keep  # a float first layer is torch's own on the normalised image
    assert certificate.source["differing decisions"] == 0


def test_the_digits_of_the_lab_run_raw_and_survive_a_file(tmp_path: Any) -> None:
    data = qlab.data.load("digits")
    net = qlab.build("mlp", data.input_shape, 10, hidden=(65, 64), seed=0)
    net = qlab.harden(qlab.quantize(randomised(net), Sign, Sign, ("last",)))
    u = data.split("test").x[:20]
    packed = qlab.binary.compile(net, u, image=(data.mean, data.std))
    with torch.no_grad():
        assert torch.equal(packed(u).argmax(1), net(data.transform(u)).argmax(1))
    packed.save(tmp_path / "net.safetensors")
    again = qlab.binary.load(tmp_path / "net.safetensors")
    assert again.graph.image
    assert torch.equal(again(u), packed(u))


def test_normalisation_is_that_of_the_data_module() -> None:
    data = qlab.data.load("digits")
    u = data.split("test").x[:5]
    assert torch.equal(Normalise(data.mean, data.std)(u), data.transform(u))


def test_the_cost_of_a_net_on_raw_images_is_measured_too() -> None:
    packed = qlab.binary.compile(conv(3, 4).eval(), pixels(2, 3, 6, 6), image=(MEAN, STD))
    assert {"torch", "numba"} <= set(cost(packed, pixels(2, 3, 6, 6), rounds=1).seconds)


def test_taps_are_the_windows_of_unfold() -> None:
    u = pixels(2, 3, 9, 8)
    found = taps(u, (3, 2), (2, 1), (1, 2), (2, 3))
    expected = F.unfold(u.double(), (3, 2), dilation=(2, 3), padding=(1, 2), stride=(2, 1))
    assert torch.equal(found.flatten(3).flatten(1, 2).double(), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("image", "x", "message"),
    [
        ((MEAN, STD), torch.zeros(1, 3, 4, 4), "expected a uint8 tensor"),
        (((0.5,), (0.5,)), pixels(1, 3, 4, 4), "1 means and 1 deviations"),
        ((MEAN, (0.1, 0.0, 0.1)), pixels(1, 3, 4, 4), "positive deviations"),
        ((MEAN, STD), pixels(1, 3), "every channel of"),
        (None, pixels(1, 3, 4, 4), "expected a float32 tensor"),
    ],
)
def test_images_that_do_not_fit_say_so(image: Any, x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        qlab.binary.compile(conv(3, 4).eval(), x, image=image)
