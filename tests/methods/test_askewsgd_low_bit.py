"""ASkewSGD of a few bits: the velocity in units of the grid, the two phases, the grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.methods.binary_weights.askewsgd import widest
from qlab.methods.low_bit.askewsgd_low_bit import ASkewSGDLowBit, IntervalGrid
from qlab.quantizers import quantized_tensors
from qlab.quantizers.sawb import sawb_clip
from qlab.stepping import Stepper
from tests.methods.conftest import moons, small_net

GRIDS = [(2, "narrow"), (2, "half"), (2, "wide"), (4, "narrow"), (4, "half"), (4, "wide")]


def draws(n: int, seed: int = 0, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=torch.float64), reach * torch.randn(n, generator=g, dtype=torch.float64)


def grid(bits: int, kind: str, clip: float, eps: float) -> IntervalGrid:
    q = IntervalGrid(bits, kind)  # type: ignore[arg-type]
    q.clip = torch.tensor(clip, dtype=torch.float64)
    q.anneal(eps=eps, frozen=1.0)
    return q


def authors(u: Tensor, w: Tensor, scale: float, eps: float, alpha: float, lr: float) -> tuple[Tensor, Tensor]:
    """The rule of the authors' code for whole numbers from -8 to 8, without its guard 1e-6 against division by zero.

    Returns:
        The velocity, and where their clip took part in it.
    """
    levels = torch.arange(-8.0, 9.0, dtype=w.dtype)
    y = (w / scale).clamp(-8, 8)
    distance = (y[:, None] - levels).abs()
    nearest = levels[distance.argsort(1)[:, :2]]  # the two nearest levels, as they find them: by sorting all distances
    a, b = nearest[:, 0], nearest[:, 1]
    on_level = distance.min(1).values == 0
    phi = ((y - a) * (y - b)).square()
    K = scale * alpha * (eps - phi) / (2 * (y - a) * (y - b) * ((y - a) + (y - b)))
    limit = scale / (4 * lr)
    clipped = (K.abs() > limit) & (eps - phi < 0) & ~on_level
    K = K.clamp(-limit, limit)
    free = on_level | (eps - phi >= 0) | (-u * K > K**2)
    return torch.where(free, -u, K), clipped


def test_velocity_is_that_of_the_authors_code() -> None:
    scale, lr = 0.013, 0.06
    for eps, alpha in ((1 / 16 + 1e-6, 1.0), (0.02, 1.0), (1e-3, 0.3)):
        for size in (1e-3, 1.0, 50.0):
            u, w = draws(3000, reach=4 * scale)
            q = grid(4, "wide", 8 * scale, eps)
            found = q.velocity(size * u, w, alpha, 0.25 / lr)
            expected, clipped = authors(size * u, w, scale, eps, alpha, lr)
            assert clipped.double().mean() < 0.8
            assert torch.allclose(found[~clipped], expected[~clipped], rtol=1e-9, atol=1e-12)
            # Clipped first, as theirs, the test for "free" lets more pass: our speed is then the limit, theirs is |u|.
            assert torch.equal(found[clipped].sign(), expected[clipped].sign())
            assert (found[clipped].abs() <= expected[clipped].abs() * (1 + 1e-9)).all()


@pytest.mark.parametrize(("bits", "kind"), GRIDS)
def test_intervals_meet_at_e0_and_no_weight_is_constrained_before(bits: int, kind: str) -> None:
    q = grid(bits, kind, 1.0, 1.0)
    levels = q.levels(torch.float64)
    e0 = widest(levels)
    assert e0 == q.gap**4 / 16
    u, w = draws(2000, reach=2.0)
    q.anneal(eps=e0 + 1e-6)
    assert torch.allclose(q.velocity(u, w, 1.0, 5.0), -u, rtol=1e-12)
    q.anneal(eps=0.5 * e0)
    assert not torch.allclose(q.velocity(u, w, 1.0, 5.0), -u)


@pytest.mark.parametrize(("bits", "kind"), GRIDS)
def test_constrained_weights_reach_their_nearest_level(bits: int, kind: str) -> None:
    q = grid(bits, kind, 0.4, 1e-8)
    w = draws(500, seed=2, reach=0.2)[1].clamp(-0.4, 0.4)
    aim, s = q.hard(w), float(q.scale(w))
    for _ in range(3000):
        w = w + 0.01 * q.velocity(torch.zeros_like(w), w, 1.0, 25.0 * q.gap)
    assert torch.equal(q.hard(w), aim)
    assert float((w - aim).abs().max()) < 0.1 * s * q.gap


@pytest.mark.parametrize(("bits", "kind"), GRIDS)
def test_deployed_weight_is_the_nearest_level(bits: int, kind: str) -> None:
    q = grid(bits, kind, 0.7, 1.0)
    w = draws(800, seed=3)[1]
    values = q.levels(torch.float64) * 0.7 / q.top
    assert len(values) == {"narrow": 2**bits - 1, "half": 2**bits, "wide": 2**bits + 1}[kind]
    nearest = values[(w[:, None] - values).abs().argmin(1)]
    assert torch.allclose(q.hard(w), nearest, rtol=1e-12)
    assert torch.equal(q.hard(w), q.scale(w) * q.level(w))


def test_velocity_scales_with_the_grid() -> None:
    """One unit for weights and gradients, another for the grid: times 10 everywhere is times 10 for the velocity."""
    u, w = draws(1000, seed=4, reach=0.5)
    one, ten = grid(4, "narrow", 1.0, 0.01), grid(4, "narrow", 10.0, 0.01)
    assert torch.allclose(10 * one.velocity(u, w, 1.0, 3.0), ten.velocity(10 * u, 10 * w, 1.0, 3.0), rtol=1e-9)


def test_schedule_is_that_of_the_paper() -> None:
    method = create("askewsgd_low_bit", small_net())
    at = method.schedule
    assert at(0.0) == at(0.499) == {"eps": 1 / 16 + 1e-6, "frozen": 0.0}
    assert at(0.5) == {"eps": 1 / 16 + 1e-6, "frozen": 1.0}
    assert at(0.75)["eps"] == pytest.approx(0.95**50 / 16 + 1e-6)


def test_clip_follows_the_weights_until_it_is_frozen() -> None:
    q = IntervalGrid(4, "wide")
    first, second = draws(4000, seed=5)[1], 3 * draws(4000, seed=6)[1]
    q.init(first, torch.Generator())
    assert float(q.clip) == pytest.approx(
        float(12.1 * first.square().mean().sqrt() - 12.2 * first.abs().mean()), rel=1e-6
    )
    q.follow(second)
    assert float(q.clip) == pytest.approx(float(sawb_clip(second, coefficients=(12.1, 12.2))), rel=1e-6)
    q.anneal(frozen=1.0)
    before = float(q.clip)
    q.follow(first)
    assert float(q.clip) == before


def test_before_the_freeze_it_is_plain_training_in_float() -> None:
    options = {"keep": ("first", "last"), "lr": 0.02, "seed": 1}
    method = create("askewsgd_low_bit", small_net(), freeze=1.0, activation_bits=None, **options)
    plain = create("full_precision", small_net(), lr=0.02, seed=1)
    for one in (method, plain):
        qlab.fit(one, moons(), epochs=2, progress=False, test=False)
    ours, theirs = method.latent_weights(), plain.latent_weights()
    assert all(torch.allclose(w, theirs[name], atol=1e-6) for name, w in ours.items())


@pytest.mark.parametrize("bits", [2, 4])
def test_at_the_end_of_a_run_weights_are_within_their_intervals(bits: int) -> None:
    method = create("askewsgd_low_bit", small_net(), weight_bits=bits)
    run = qlab.fit(method, moons(n=1000), epochs=20, progress=False, validate_every=0)
    for t in quantized_tensors(method.net):
        s = float(t.quantizer.scale(t.latent.detach()))  # type: ignore[arg-type]
        off = (t.latent - t.quantizer.hard(t.latent)).detach().abs() / s
        eps = float(t.quantizer.get_buffer("eps"))
        inner = (1 - math.sqrt(1 - 4 * math.sqrt(eps))) / 2  # how far a feasible weight is from its level
        assert float(off.max()) <= inner + 0.1
    assert abs(run.metrics["test/acc"] - run.metrics["test/acc_latent"]) < 0.1


def test_without_a_learning_rate_a_weight_between_two_levels_stays_there() -> None:
    method = create("askewsgd_low_bit", small_net(), grid="half", keep=[], lr=0.0, freeze=0.0)
    latents = [t.latent for t in quantized_tensors(method.net)]
    for latent in latents:
        latent.data.view(-1)[0] = 0.0  # the middle of two levels of "half", where the constraint has no slope
    stepper = Stepper(method, moons(), epochs=1)
    for _ in range(5):
        assert math.isfinite(stepper.step())
    assert all(float(latent.detach().view(-1)[0]) == 0 for latent in latents)


@pytest.mark.parametrize(
    "options",
    [{"weight_bits": 1}, {"activation_bits": 9}, {"grid": "round"}, {"alpha": -1.0}, {"largest_step": 0.0},
     {"eps_rate": 0.0}, {"freeze": 2.0}, {"schedule_epochs": 0}, {"schedule_epochs": math.inf}, {"weight_bits": [4]}],
)  # fmt: skip
def test_impossible_values_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ASkewSGDLowBit(small_net(), **options)  # type: ignore[arg-type]
