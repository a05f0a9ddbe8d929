"""The exact line is the deployed net itself between any two flips: dense sampling finds nothing else, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.directions import Direction, random_direction
from qlab.diagnose.exact_line import exact_line, flip_share
from qlab.diagnose.landscape import landscape
from qlab.errors import InputError
from qlab.quantizers import Quantizer, Sign, Uniform, quantize
from tests.diagnose.nets import batch, trained


@pytest.mark.parametrize("kind", ["weights", "both"])
def test_dense_sampling_between_the_events_gives_the_same_numbers_to_the_bit(kind: str) -> None:
    net, (x, y) = trained(kind), batch(40)
    d = random_direction(net, 4)
    line = exact_line(net, x, y, d, -0.3, 0.3)
    dense = landscape(net, x, y, d, span=0.3, points=12001, functions=["deployed"])
    at = line.at(dense.a)
    np.testing.assert_array_equal(line.loss[at], dense.loss["deployed"][:, 0])
    np.testing.assert_array_equal(line.accuracy[at], dense.accuracy["deployed"][:, 0])
    np.testing.assert_array_equal(line.flipped[at], dense.flipped[:, 0])
    assert len(np.unique(at)) > 0.9 * len(line.loss)  # the sampling saw nearly all plateaus


def test_every_plateau_is_the_net_with_those_signs(tmp_path: Any) -> None:
    net, (x, y) = trained("both"), batch(30)
    d = random_direction(net, 0)
    line = exact_line(net, x, y, d, -0.05, 0.05)
    middles = (line.edges[1:] + line.edges[:-1]) / 2
    with torch.no_grad():
        for t, loss in zip(middles, line.loss, strict=True):
            there = copy.deepcopy(net)
            for name, p in there.named_parameters():
                if name in d:
                    p += t * d[name]
            np.testing.assert_allclose(loss, float(F.cross_entropy(there(x), y)), rtol=1e-12)
    line.figure().savefig(tmp_path / "line.png")


def test_there_are_as_many_plateaus_as_events_and_one_and_their_edges_are_minus_w_over_d() -> None:
    net, (x, y) = trained("weights"), batch(20)
    d = random_direction(net, 2)
    line = exact_line(net, x, y, d, -2.0, 2.0)
    events = np.sort(
        np.concatenate([(-net.get_parameter(n) / v).detach().numpy().ravel() for n, v in d.items() if v.any()])
    )
    inside = events[(events > -2) & (events < 2)]
    np.testing.assert_array_equal(line.edges[1:-1], inside)
    assert len(line.loss) == len(inside) + 1 <= line.weights + 1
    assert np.isclose(line.widths.sum(), 4)
    assert line.flips[line.at(0.0)] == 0
    assert np.array_equal(np.abs(np.diff(line.flips)), np.ones(len(inside)))


def test_normal_weights_flip_as_the_arctangent_says() -> None:
    g = torch.Generator().manual_seed(0)
    net = quantize(nn.Sequential(nn.Linear(100, 60, bias=False)).double(), Sign).eval()
    name = "0.parametrizations.weight.original"
    with torch.no_grad():
        net.get_parameter(name).copy_(torch.randn(60, 100, generator=g, dtype=torch.float64))
    d = {name: torch.randn(60, 100, generator=g, dtype=torch.float64)}
    x = torch.randn(2, 100, generator=g, dtype=torch.float64)
    line = exact_line(net, x, torch.tensor([3, 4]), d, -1.0, 1.0)
    assert np.allclose(flip_share([0.25, 1.0]), [0.078, 0.25], atol=4e-4)
    for t in (-1.0, -0.25, 0.25, 1.0):
        assert abs(line.flipped[line.at(t)] - flip_share(t)) < 0.015


def toy(w: list[float], d: list[float], quantizer: Any = Sign) -> tuple[nn.Module, Direction]:
    """Return a linear layer of two units, of which the first has weights w, and a direction."""
    net = quantize(nn.Sequential(nn.Linear(len(w), 2, bias=False)).double(), quantizer).eval()
    name = "0.parametrizations.weight.original"
    with torch.no_grad():
        net.get_parameter(name).copy_(torch.tensor([w, [1.0] * len(w)]))
    return net, {name: torch.tensor([d, [0.0] * len(d)], dtype=torch.float64)}


X = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
Y = torch.tensor([0])


def test_ties_zeros_and_weights_that_stay_are_handled() -> None:
    # events at 0.5 (twice), at 0 (w = 0 rising: already +1 at 0), none for d = 0
    net, d = toy([-0.5, -1.0, 0.0, 0.0], [1.0, 2.0, 1.0, 0.0])
    line = exact_line(net, X, Y, d, -1.0, 1.0, loss=lambda z, y: z[:, 0])
    np.testing.assert_array_equal(line.edges, [-1, 0, 0.5, 1])
    np.testing.assert_array_equal(line.loss, [-1 - 2 - 4 + 8, -1 - 2 + 4 + 8, 15])
    np.testing.assert_array_equal(line.flips, [1, 0, 2])
    # w = 0 falling is +1 at 0 and -1 after it
    net, d = toy([0.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 0.0])
    line = exact_line(net, X, Y, d, -1.0, 1.0, loss=lambda z, y: z[:, 0])
    np.testing.assert_array_equal(line.loss, [15, 13])
    np.testing.assert_array_equal(line.flips, [0, 1])


def test_a_line_that_does_not_hold_zero_counts_flips_from_zero() -> None:
    net, d = toy([-0.5, -1.0, 3.0, 3.0], [1.0, 1.0, 1.0, -1.0])
    line = exact_line(net, X, Y, d, 0.75, 4.0, loss=lambda z, y: z[:, 0])
    np.testing.assert_array_equal(line.edges, [0.75, 1, 3, 4])
    np.testing.assert_array_equal(line.flips, [1, 2, 3])
    line = exact_line(net, X, Y, d, -4.0, -2.0, loss=lambda z, y: z[:, 0])
    np.testing.assert_array_equal(line.edges, [-4, -3, -2])
    np.testing.assert_array_equal(line.flips, [1, 0])
    np.testing.assert_array_equal(line.loss, [-1 - 2 - 4 + 8, -1 - 2 + 4 + 8])


def test_levels_of_a_staircase_are_passed_one_after_the_other() -> None:
    net, d = toy([-1.0, 1.0, 1.0, 0.2], [1.0, 0.0, 0.0, -1.0], lambda: Uniform(2, limit=1.0))
    line = exact_line(net, X, Y, d, 0.0, 2.0, loss=lambda z, y: z[:, 0])
    dense = landscape(net, X, Y, d, span=(0.0, 2.0), points=801, functions=["deployed"], loss=lambda z, y: z[:, 0])
    inside = np.abs(dense.a[:, None] - line.edges).min(1) > 1e-9
    np.testing.assert_array_equal(line.loss[line.at(dense.a)][inside], dense.loss["deployed"][inside, 0])
    np.testing.assert_array_equal(line.flipped[line.at(dense.a)][inside], dense.flipped[inside, 0])
    np.testing.assert_allclose(line.edges, [0, 0.5, 0.7, 1.5, 2])  # thresholds at +-1/2


class Scaled(Quantizer):
    """alpha sign(w), alpha the mean of |w|."""

    bits = 1

    def forward(self, latent: Tensor) -> Tensor:
        return torch.where(latent >= 0, 1.0, -1.0).to(latent) * latent.abs().mean()


class Mislabelled(Scaled):
    """The same, with a grid it does not keep to."""

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([-1, 1], dtype=dtype)


def test_what_is_smooth_between_the_events_is_refused_or_held() -> None:
    net, (x, y) = trained("weights"), batch(20)
    d = random_direction(net, 0)
    bias = {"6.bias": torch.ones(10, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"'6\.bias', which is not quantized.*float_parts='hold'"):
        exact_line(net, x, y, d | bias)
    held = exact_line(net, x, y, d | bias, -0.1, 0.1, float_parts="hold")
    assert held.held == ("6.bias",)
    assert "Held still: 6.bias" in held.summary()
    np.testing.assert_array_equal(held.loss, exact_line(net, x, y, d, -0.1, 0.1).loss)
    for quantizer in (Scaled, Mislabelled):
        scaled, toward = toy([1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 0.0, 0.0], quantizer)
        with pytest.raises(InputError, match="grid"):
            exact_line(scaled, X, Y, toward)


def test_what_makes_no_line_is_refused() -> None:
    net, (x, y) = trained("weights"), batch(20)
    d = random_direction(net, 0)
    for change, words in (
        ({"low": 1.0, "high": 0.0}, "low < high"),
        ({"float_parts": "move"}, "float_parts"),
        ({"d": {n: 0 * t for n, t in d.items()}}, "moves no quantized weight"),
        ({"y": None}, "needs labels"),
        ({"x": x * 0}, "constant"),
    ):
        with pytest.raises(InputError, match=words):
            exact_line(**({"net": net, "x": x, "y": y, "d": d} | change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not quantized"):
        exact_line(trained("float"), x, y, random_direction(trained("float"), 0))
    with pytest.raises(InputError, match="t must lie in"):
        exact_line(net, x, y, d, -0.01, 0.01).at(1.0)


def test_the_result_knows_its_frame_and_summary() -> None:
    net, (x, y) = trained("both"), batch(20)
    line = exact_line(net, x, y, random_direction(net, 0), -0.2, 0.2)
    frame = line.frame()
    assert len(frame) == len(line.loss)
    assert f"{len(line.loss):,} plateaus" in line.summary()
    assert "deployed" in line.summary()
    assert line.figure().get_label() == line.summary()
