"""A landscape equals the net put at every point, one after the other, and the package loss-landscapes on float nets."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.diagnose.directions import Direction, between, random_direction
from qlab.diagnose.functions import FUNCTIONS, variant
from qlab.diagnose.landscape import Landscape, landscape, load_landscape
from qlab.diagnose.plane_eval import Affine, Many
from qlab.errors import DataFileError, InputError, UnknownNameError
from qlab.quantizers import Sign, Uniform, quantize, quantized_tensors, reestimate_batch_norm
from tests.diagnose.nets import batch, trained


def moved(net: nn.Module, directions: list[Direction], c: list[float]) -> nn.Module:
    """Return the net at a point of the plane, moved by hand."""
    net = copy.deepcopy(net)
    state = net.state_dict()
    for d, v in zip(directions, c, strict=True):
        for name, t in d.items():
            state[name] = state[name] + v * t
    net.load_state_dict(state)
    return net


def by_hand(
    net: nn.Module, directions: list[Direction], points: Tensor, x: Tensor, y: Tensor, again: bool = False
) -> Any:
    loss, right = [], []
    with torch.no_grad():
        for c in points.tolist():
            there = moved(net, directions, c)
            if again:
                reestimate_batch_norm(there, [x])
            z = there(x)
            loss.append(float(F.cross_entropy(z, y)))
            right.append(float((z.argmax(1) == y).double().mean()))
    return np.array(loss), np.array(right)


def plane(net: nn.Module, n: int = 2) -> list[Direction]:
    return [random_direction(net, seed) for seed in range(n)]


@pytest.mark.parametrize("kind", ["float", "weights", "both"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("way", ["chain", "vmap", "loop"])
def test_every_point_is_the_net_moved_there_by_hand(kind: str, norm: bool, way: Any) -> None:
    net, (x, y) = trained(kind, norm), batch(60)
    points = torch.rand(11, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    for which in FUNCTIONS:
        one = variant(net, which)
        found = Affine(Many(one, x, y, way=way), plane(net))(points)
        loss, right = by_hand(one, plane(net), points, x, y)
        np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
        np.testing.assert_allclose(found.accuracy, right, rtol=1e-12)


def test_biases_and_batch_norm_vectors_move_too_where_a_direction_says_so() -> None:
    net, (x, y) = trained("both"), batch(60)
    g = torch.Generator().manual_seed(0)
    d = {n: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in net.named_parameters()}
    points = torch.tensor([[-1.0], [0.0], [0.4]], dtype=torch.float64)
    for which in FUNCTIONS:
        one = variant(net, which)
        loss, right = by_hand(one, [d], points, x, y)
        found = Affine(Many(one, x, y, way="chain"), [d])(points)
        np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
        np.testing.assert_allclose(found.accuracy, right)


def test_a_line_between_two_nets_moves_the_running_statistics() -> None:
    net, other, (x, y) = trained("weights"), trained("weights", epochs=2), batch(100)
    d = between(net, other)
    land = landscape(net, x, y, d, span=(0.0, 1.0), points=5)
    for which in land.functions:
        with torch.no_grad():
            ends = [float(F.cross_entropy(variant(n, which)(x), y)) for n in (net, other)]
        np.testing.assert_allclose(land.loss[which][[0, -1], 0], ends, rtol=1e-9)
    still = {n: t for n, t in d.items() if "running" not in n}
    frozen = landscape(net, x, y, still, span=(0.0, 1.0), points=5).loss["deployed"][-1, 0]
    assert abs(frozen - land.loss["deployed"][-1, 0]) > 1e-3  # the curve would be another one
    wide = {n: -2 * t - (net.state_dict()[n] if "running_var" in n else 0) for n, t in d.items()}
    with pytest.raises(InputError, match="would become negative"):
        landscape(net, x, y, wide, span=(0.0, 2.0))


@pytest.mark.parametrize("kind", ["float", "weights", "both"])
def test_re_estimated_batch_norm_is_that_of_every_point(kind: str) -> None:
    net, (x, y) = trained(kind), batch(60)
    points = torch.tensor([[-0.5, 0.2], [0.0, 0.0], [0.7, -0.9]], dtype=torch.float64)
    for way in ("vmap", "loop"):
        one = variant(net, "deployed")
        found = Affine(Many(one, x, y, batch_norm="reestimated", way=way), plane(net))(points)  # type: ignore[arg-type]
        loss, right = by_hand(one, plane(net), points, x, y, again=True)
        np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
        np.testing.assert_allclose(found.accuracy, right)
    with pytest.raises(InputError, match="at least two"):
        landscape(net, x[:1] + 0.1, y[:1], plane(net, 1)[0], batch_norm="reestimated")


def test_convolutions_and_uniform_weights_go_the_general_way() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 16, 16, dtype=torch.float64, generator=g), torch.randint(0, 3, (12,), generator=g)
    net = qlab.build("lenet", (1, 16, 16), 3, seed=0).double()
    net = quantize(net, lambda: Uniform(3), Sign, keep=("first",)).eval()
    many = Many(variant(net, "deployed"), x, y)
    assert many.way == "vmap"
    points = torch.tensor([[-0.5, 0.2], [0.3, 0.9]], dtype=torch.float64)
    loss, right = by_hand(variant(net, "deployed"), plane(net), points, x, y)
    found = Affine(many, plane(net))(points)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-9)
    np.testing.assert_allclose(found.accuracy, right)
    land = landscape(net, x, y, *plane(net), points=3)
    here = [q.quantizer.hard(q.latent) for q in quantized_tensors(net)]
    there = [q.quantizer.hard(q.latent) for q in quantized_tensors(moved(net, plane(net), [1.0, -1.0]))]
    count = sum(int((a != b).sum()) for a, b in zip(here, there, strict=True))
    assert land.flipped[2, 0] == count / sum(t.numel() for t in here)


class Residual(nn.Module):
    """Linear layers with an addition that no chain has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) + x)


class Sneaky(Residual):
    """Changes a tensor in place between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(2)
        return self.b(h)


class Twice(Residual):
    """Runs one layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x)))


class Branching(Residual):
    """Does what torch.func cannot batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h if float(h.sum()) > 0 else -h)


@pytest.mark.parametrize(("make", "way"), [(Residual, "vmap"), (Sneaky, "vmap"), (Twice, "chain"), (Branching, "loop")])
def test_foreign_nets_have_one_function_and_any_forward(make: type[nn.Module], way: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double().eval()
    x, y = batch(40)
    land = landscape(net, x, y, *plane(net), points=3)
    assert land.functions == ("deployed",)
    assert np.isnan(land.flipped).all()
    many = Many(net, x, y)
    points = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 2)
    found = Affine(many, plane(net))(points)
    assert many.way == way
    loss, right = by_hand(net, plane(net), points, x, y)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
    np.testing.assert_allclose(land.loss["deployed"].ravel(), loss, rtol=1e-10)
    np.testing.assert_allclose(land.accuracy["deployed"].ravel(), right)
    assert "No weights are quantized" in land.summary()


def test_float_nets_equal_the_package_loss_landscapes_at_its_own_points() -> None:
    from loss_landscapes import planar_interpolation
    from loss_landscapes.metrics import Loss

    net, (x, y), steps = trained("float"), batch(100), 7
    directions = plane(net)
    ends = [moved(net, [d], [1.0]) for d in directions]
    theirs = planar_interpolation(net, *ends, Loss(F.cross_entropy, x, y), steps=steps, deepcopy_model=True)
    # it walks to and fro: even rows stand at j = 1 ... steps, odd ones at j = 0 ... steps - 1
    at = [[i / steps, (j + 1 - i % 2) / steps] for i in range(steps) for j in range(steps)]
    ours = Affine(Many(net, x, y), directions)(torch.tensor(at, dtype=torch.float64))
    np.testing.assert_allclose(ours.loss.numpy().reshape(steps, steps), theirs, rtol=1e-9)


def test_ties_are_decided_as_argmax_decides_them() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False)).double().eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2])
    d = {"0.weight": torch.zeros(3, 2, dtype=torch.float64) + torch.tensor([[0.0, 0], [0, 0], [0, 1]]).double()}
    found = Affine(Many(net, x, y), [d])(torch.tensor([[0.0]], dtype=torch.float64))
    assert float(found.accuracy) == float((net(x).argmax(1) == y).double().mean()) == 0.5


def test_the_smoothed_function_tends_to_the_deployed_one() -> None:
    net, (x, y) = trained("weights"), batch(100)
    gaps = []
    for k in (10, 1e3, 1e9):
        land = landscape(net, x, y, plane(net, 1)[0], points=9, sharpness=k)
        gaps.append(np.abs(land.loss["smoothed"] - land.loss["deployed"]).max())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_the_share_of_flipped_weights_is_counted_and_normal_weights_follow_the_arctangent() -> None:
    g = torch.Generator().manual_seed(0)
    net = quantize(nn.Sequential(nn.Linear(300, 200, bias=False)).double(), Sign).eval()
    name = "0.parametrizations.weight.original"
    with torch.no_grad():
        net.get_parameter(name).copy_(torch.randn(200, 300, generator=g, dtype=torch.float64))
    d = {name: torch.randn(200, 300, generator=g, dtype=torch.float64)}
    x = torch.randn(3, 300, generator=g, dtype=torch.float64)
    land = landscape(net, x, torch.tensor([0, 1, 2]), d, points=9, functions=["deployed"])
    w = net.get_parameter(name)
    expected = [float(((w >= 0) != (w + a * d[name] >= 0)).double().mean()) for a in land.a]
    np.testing.assert_array_equal(land.flipped[:, 0], expected)
    np.testing.assert_allclose(land.flipped[:, 0], np.arctan(np.abs(land.a)) / np.pi, atol=0.006)


def test_noise_is_the_spread_over_mini_batches() -> None:
    net, (x, y) = trained("weights"), batch(90)
    land = landscape(net, x, y, plane(net, 1)[0], points=3, functions=["deployed"], batches=3)
    with torch.no_grad():
        each = F.cross_entropy(net(x), y, reduction="none").reshape(3, 30).mean(1)
    np.testing.assert_allclose(land.noise["deployed"][1, 0], float(each.std()), rtol=1e-10)
    assert "3 mini-batches" in land.summary()
    assert np.isnan(landscape(net, x, y, plane(net, 1)[0], points=3).noise["latent"]).all()


def test_other_losses_are_taken() -> None:
    from qlab.diagnose.objective import margin

    net, (x, y) = trained("both"), batch(50)
    land = landscape(net, x, y, plane(net, 1)[0], points=3, loss="margin")
    with torch.no_grad():
        np.testing.assert_allclose(land.loss["deployed"][1, 0], float(margin(net(x), y).mean()), rtol=1e-12)
    own = landscape(net, x, y, plane(net, 1)[0], points=3, loss=margin)
    np.testing.assert_array_equal(own.loss["latent"], land.loss["latent"])


def test_the_result_knows_its_frame_figure_and_summary(tmp_path: Any) -> None:
    net, (x, y) = trained("both"), batch(50)
    land = landscape(net, x, y, *plane(net), points=(5, 7))
    frame = land.frame()
    assert len(frame) == 3 * 35
    row = frame[(frame["function"] == "latent") & (frame["a"] == land.a[1]) & (frame["b"] == land.b[4])]
    assert row["loss"].item() == land.loss["latent"][1, 4]
    for word in ("Deployed", "Latent", "Smoothed (k = 5)", "frozen", f"{land.accuracy['deployed'][2, 3]:.1%}"):
        assert word in land.summary()
    assert land.figure().get_label() == land.summary()
    land.figure().savefig(tmp_path / "plane.png")
    line = landscape(net, x, y, plane(net, 1)[0], points=5)
    line.figure().savefig(tmp_path / "line.png")


def test_a_saved_landscape_is_the_same_again_and_a_spoiled_file_is_told(tmp_path: Any) -> None:
    net, (x, y) = trained("both"), batch(50)
    land = landscape(net, x, y, *plane(net), points=5, names=("u", "v"))
    file = tmp_path / "land.npz"
    land.save(file)
    again = load_landscape(file)
    assert isinstance(again, Landscape)
    assert again.directions == ("u", "v")
    assert again.digest == land.digest
    for key in ("loss", "accuracy"):
        for f in land.functions:
            np.testing.assert_array_equal(getattr(again, key)[f], getattr(land, key)[f])
    np.testing.assert_array_equal(again.flipped, land.flipped)
    data = file.read_bytes()
    for spoiled in (data[: len(data) // 2], b"", b"hello", data[:300] + b"\0" * 100 + data[400:]):
        file.write_bytes(spoiled)
        with pytest.raises(DataFileError, match="corrupt"):
            load_landscape(file)
    with file.open("wb") as f:
        np.savez(f, a=np.array([object()], dtype=object))
    with pytest.raises(DataFileError, match="corrupt"):
        load_landscape(file)
    with pytest.raises(DataFileError, match="no file"):
        load_landscape(tmp_path / "other.npz")


def test_what_makes_no_landscape_is_refused() -> None:
    net, (x, y) = trained("both"), batch(30)
    d = plane(net, 1)[0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.full_like(x, 0.5)}, "constant"),
        ({"x": x * float("nan")}, "NaN"),
        ({"y": None}, "needs labels"),
        ({"span": -1.0}, "span"),
        ({"span": "wide"}, "span"),
        ({"span": (1.0, float("inf"))}, "span"),
        ({"points": 1}, "points"),
        ({"points": 10_000, "d2": random_direction(net, 1)}, "take fewer"),
        ({"functions": []}, "functions"),
        ({"batch_norm": "live"}, "batch_norm"),
        ({"batches": 31}, "batches"),
        ({"d1": {n: 0 * t for n, t in d.items()}}, "zero everywhere"),
    ]
    for change, words in cases:
        with pytest.raises(InputError, match=words):
            landscape(**({"net": net, "x": x, "y": y, "d1": d} | change))
    for change in ({"functions": ["float"]}, {"loss": "hinge"}, {"d1": {"nine": x}}):
        with pytest.raises(UnknownNameError):
            landscape(**({"net": net, "x": x, "y": y, "d1": d} | change))  # type: ignore[arg-type]
    training = copy.deepcopy(net).train()
    with pytest.raises(InputError, match="training mode"):
        landscape(training, x, y, d)


@pytest.mark.parametrize("first", [nn.ReLU(), nn.Dropout(), nn.Identity()])
def test_inputs_and_weights_are_left_as_they_were(first: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = (
            nn.Sequential(nn.Identity(), first, nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 10))
            .double()
            .eval()
        )
    x, y = batch(30)
    x = x - 0.3
    kept = [t.clone() for t in (x, *net.parameters())]
    land = landscape(net, x, y, *plane(net), points=3)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *net.parameters()), strict=True))
    assert Many(net, x, y).way == "chain"
    loss, _ = by_hand(net, plane(net), torch.cartesian_prod(*[torch.from_numpy(land.a)] * 2), x, y)
    np.testing.assert_allclose(land.loss["deployed"].ravel(), loss, rtol=1e-10)


def test_a_chain_is_asked_for_only_where_there_is_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Residual().double().eval()
    with pytest.raises(InputError, match="no chain"):
        Many(net, *batch(10), way="chain")
