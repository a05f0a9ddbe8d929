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
from qlab.diagnose.chain import mapped
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


@pytest.mark.parametrize("last", [True, False])
def test_folded_batch_norm_bears_biases_and_negative_scales(last: bool) -> None:
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.BatchNorm1d(10)]
    net = nn.Sequential(*layers[: 5 if last else 4]).double().eval()
    with torch.no_grad():
        for t in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.running_var.abs_()  # type: ignore[union-attr]
    x, y = batch(40)
    points = torch.tensor([[-1.0], [0.0], [0.4]], dtype=torch.float64)
    every = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in net.named_parameters()}
    for some in (every, {"0.weight": every["0.weight"]}, {"3.weight": every["3.weight"]}, {"3.bias": every["3.bias"]}):
        many = Many(net, x, y)
        assert many.way == "chain"
        np.testing.assert_allclose(Affine(many, [some])(points).loss, by_hand(net, [some], points, x, y)[0], rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_that_batch_norm_puts_on_the_jump_of_a_sign_stays_on_its_side(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10, bias=False))
    net = quantize(net, Sign, Sign).to(dtype).eval()
    x = (torch.randint(0, 17, (50, 20), generator=g) / 16).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        norm = net[1]
        assert isinstance(norm, nn.BatchNorm1d)
        sums = net[0](x)
        norm.running_mean.copy_(sums[:40].diagonal())  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 3, generator=g)  # type: ignore[union-attr]
        norm.bias.zero_()
        assert int((norm(sums) == 0).sum()) > 5  # sums of sixteenths are exact, so that these are no accident
        d = {name: torch.ones_like(p) for name, p in net.named_parameters() if name.startswith("0.")}
        many = Many(variant(net, "deployed"), x, torch.arange(50) % 10)
        assert many.way == "chain"
        here = float(Affine(many, [d])(torch.zeros(1, 1)).loss)
        np.testing.assert_allclose(here, float(F.cross_entropy(net(x), torch.arange(50) % 10)), rtol=1e-5)


def test_minus_zero_has_sign_plus_one_in_place_or_not() -> None:
    for own in (True, False):
        assert mapped(Sign(), torch.tensor([-0.0, 0.0, -1.0]), own).tolist() == [1, 1, -1]


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


class Signed(nn.Linear):
    """Takes the signs of its weights in a forward pass of its own, as foreign binary nets do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.where(self.weight >= 0, 1.0, -1.0).to(x), self.bias)


def odd(kind: str) -> nn.Module:
    """Return a net that runs layer after layer, and yet is no chain of what these layers usually do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
        if kind == "own forward":
            net[0] = Signed(64, 8)
        elif kind == "own hard map":
            net = quantize(net, AlphaSign)
        elif kind == "tied":
            net[1], net[3] = nn.Identity(), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            net[3][0].weight = net[2].weight
        elif kind == "weight norm":
            net[2] = nn.utils.parametrizations.weight_norm(net[2])
        elif kind == "hook":
            net[2].register_forward_hook(lambda module, given, found: 2 * found)
        elif kind == "batch statistics":
            net[1] = nn.BatchNorm1d(8, track_running_stats=False)
    return net.double().eval()


class AlphaSign(Sign):
    """A sign with a scale that follows the weights."""

    def forward(self, latent: Tensor) -> Tensor:
        return super().forward(latent) * latent.abs().mean()


@pytest.mark.parametrize("kind", ["own forward", "own hard map", "tied", "weight norm", "hook", "batch statistics"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_that_do_more_than_their_class_are_run_as_they_are(kind: str) -> None:
    net, (x, y) = odd(kind), batch(40)
    g = torch.Generator().manual_seed(0)
    d = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in net.named_parameters()}
    land = landscape(net, x, y, d, points=3, functions=["deployed"])
    for a, loss in zip(land.a, land.loss["deployed"][:, 0], strict=True):
        with torch.no_grad():
            there = {n: p + a * d[n] for n, p in net.named_parameters()}
            np.testing.assert_allclose(
                loss, F.cross_entropy(torch.func.functional_call(net, there, (x,)), y), rtol=1e-10
            )


class Failing(Residual):
    """Breaks where its weights have moved."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((self.a.weight.detach().abs() > 0.5).any()):
            raise RuntimeError("the seventh seal")
        return super().forward(x)


def test_an_error_of_the_net_or_of_the_loss_comes_out_and_a_loss_that_cannot_be_batched_is_run_by_rows() -> None:
    net, (x, y) = trained("both"), batch(30)
    d = plane(net, 1)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failing = Failing().double().eval()
    with pytest.raises(RuntimeError, match="the seventh seal"):
        landscape(failing, x, y, random_direction(failing, 0), points=3, span=50.0)

    def by_item(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z / max(1.0, float(z.abs().max())), y, reduction="none")

    def batched(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z / z.abs().amax().clamp(min=1.0), y, reduction="none")

    one, other = (landscape(net, x, y, d, points=3, loss=loss) for loss in (by_item, batched))
    for f in one.functions:
        np.testing.assert_allclose(one.loss[f], other.loss[f], rtol=1e-12)

    def broken(z: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("the eighth seal")

    with pytest.raises(RuntimeError, match="the eighth seal"):
        landscape(net, x, y, d, points=3, loss=broken)
    with pytest.raises(InputError, match=r"shape \(\) for 30 examples"):
        landscape(net, x, y, d, points=3, loss=F.cross_entropy)


def test_points_without_a_finite_loss_are_counted_and_zero_is_written_as_zero() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False)).double().eval()
    with torch.no_grad():
        net[0].weight.zero_()
    x, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([0, 1])
    d = {"0.weight": torch.tensor([[1.0], [-1.0]], dtype=torch.float64)}

    def steep(z: Tensor, y: Tensor) -> Tensor:
        return 1 / (z[..., 0] - z[..., 1]).clamp(min=0)

    land = landscape(net, x, y, d, span=(-0.3, 0.3), points=7, loss=steep)
    assert "At 4 of the 7 points evaluated it is infinite or NaN" in land.summary()
    land.figure()
    nowhere = landscape(net, x, y, d, points=3, loss=lambda z, y: z[..., 0] * float("nan"))
    assert "At 3 of the 3 points evaluated" in nowhere.summary()
    nowhere.figure()
    land = landscape(net, x, torch.zeros_like(y), d, span=(-0.7, 1.4), points=10, loss=lambda z, y: z[..., 0] ** 2)
    assert 0 < abs(land.a[3]) < 1e-15
    assert "at a = 0 to" in land.summary()


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


@pytest.mark.parametrize("kind", ["weights", "both"])
def test_the_smoothed_function_tends_to_the_deployed_one(kind: str) -> None:
    net, (x, y) = trained(kind), batch(100)
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
