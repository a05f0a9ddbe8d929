"""Exact properties of QNN's recurrent part: its levels, row scales, gradients, and the clips of weights and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.methods import create
from qlab.quantizers import hard_sign, layers, quantized_tensors
from qlab.quantizers.kbit import KBit, q_k

F64 = torch.float64
BITS = (1, 2, 3, 4, 8)


def row_levels(k: int) -> KBit:
    """The quantizer of a matrix."""
    return KBit(k, rows=True, window=math.inf)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def grid(k: int) -> Tensor:
    n = 2**k - 1
    return torch.tensor([(2 * j - n) / n for j in range(n + 1)], dtype=F64)


def lstm(**options: object) -> qlab.methods.Method:
    return create("qnn_rnn", qlab.build("lstm", (9,), 13, hidden=8, embedding=5, seed=0).double(), **options)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    s = torch.randint(13, (6, 10), generator=torch.Generator().manual_seed(seed))
    return s[:, :-1], s[:, 1:]


# ---- levels


@pytest.mark.parametrize("k", BITS)
def test_level_is_the_nearest_one(k: int) -> None:
    x = draw(5000).clamp(-1, 1)
    nearest = grid(k)[(x[:, None] - grid(k)).abs().argmin(1)]
    torch.testing.assert_close(q_k(x, k), nearest, atol=1e-15, rtol=0)


@pytest.mark.parametrize("k", BITS)
def test_level_is_that_of_the_formula_with_rounding(k: int) -> None:
    n, x = 2**k - 1, draw(5000).clamp(-1, 1)
    torch.testing.assert_close(q_k(x, k), 2 * torch.round(n * (x + 1) / 2) / n - 1, atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", BITS)
def test_levels_lie_on_the_declared_grid_exactly_and_stay_there(k: int, dtype: torch.dtype) -> None:
    levels = KBit(k).levels(dtype)
    assert len(levels) == 2**k
    assert torch.equal(levels, -levels.flip(0))
    assert levels[-1] == 1
    q = q_k(3 * draw(5000).to(dtype), k)
    assert torch.isin(q, levels).all()
    assert torch.equal(q_k(levels, k), levels)


@pytest.mark.parametrize("k", BITS)
def test_levels_are_odd_symmetric(k: int) -> None:
    x = draw(1000)
    assert torch.equal(q_k(-x, k), -q_k(x, k))


def test_one_bit_is_the_sign_with_zero_positive() -> None:
    x = torch.cat([draw(1000), torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1.0, -1.0], dtype=F64)])
    assert torch.equal(q_k(x, 1), hard_sign(x))
    assert q_k(torch.zeros(1), 1) == 1


@pytest.mark.parametrize("k", BITS)
def test_error_is_at_most_half_a_step(k: int) -> None:
    x = draw(5000).clamp(-1, 1)
    assert (q_k(x, k) - x).abs().max() <= 1 / (2**k - 1) + 1e-15


def test_nan_stays_nan() -> None:
    assert q_k(torch.tensor([float("nan")]), 4).isnan().all()


def test_product_of_levels_is_a_sum_of_products_of_bits() -> None:
    """A' W' = sum_ij 2^(i+j) XnorDot(A^i, W^j) in integers, A' = 2A - (2^k - 1) the levels times 2^k - 1."""
    for ka, kw in ((1, 1), (2, 3), (4, 4)):
        a, w = draw(50, seed=1).clamp(-1, 1), draw(50, seed=2).clamp(-1, 1)
        A, W = ((q_k(x, k) * (2**k - 1)).round().long() for x, k in ((a, ka), (w, kw)))
        codes = ((A + 2**ka - 1) // 2, (W + 2**kw - 1) // 2)
        planes = [[2 * (code >> i & 1) - 1 for i in range(k)] for code, k in zip(codes, (ka, kw), strict=True)]
        total = sum(2 ** (i + j) * int((p * q).sum()) for i, p in enumerate(planes[0]) for j, q in enumerate(planes[1]))
        assert total == int((A * W).sum())


# ---- weights


@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 5), (4, 3, 2, 2), (7,)])
@pytest.mark.parametrize("k", BITS)
def test_scale_of_a_row_is_its_largest_weight_or_for_one_bit_its_mean(k: int, shape: tuple[int, ...]) -> None:
    W = draw(*shape)
    scale = row_levels(k).scale(W)
    rows = W.abs().reshape(shape[0] if len(shape) > 1 else 1, -1)
    expected = rows.mean(1) if k == 1 else rows.max(1).values
    assert torch.equal(scale.flatten(), expected)
    assert torch.broadcast_shapes(scale.shape, W.shape) == W.shape


@pytest.mark.parametrize("k", BITS)
def test_weights_are_scale_times_level(k: int) -> None:
    quantizer, W = row_levels(k), draw(6, 20)
    assert torch.equal(quantizer.hard(W), quantizer.scale(W) * quantizer.level(W))
    assert torch.equal(quantizer(W), quantizer.hard(W))
    assert torch.isin(quantizer.level(W), quantizer.levels(F64)).all()
    for row, s, q in zip(W, quantizer.scale(W), quantizer.hard(W), strict=True):
        allowed = s * grid(k)
        assert (q - allowed[(row[:, None].clamp(-s, s) - allowed).abs().argmin(1)]).abs().max() < 1e-15


@pytest.mark.parametrize("k", [2, 4])
def test_largest_weight_of_a_row_stays_what_it_is(k: int) -> None:
    W = draw(6, 20)
    place = W.abs().argmax(1, keepdim=True)
    assert torch.equal(row_levels(k).hard(W).gather(1, place), W.gather(1, place))


@pytest.mark.parametrize("k", BITS)
def test_row_times_a_power_of_two_is_quantized_times_it(k: int) -> None:
    W, factor = draw(4, 20), torch.tensor([[1.0], [2.0], [0.25], [64.0]], dtype=F64)
    assert torch.equal(row_levels(k).hard(W * factor), row_levels(k).hard(W) * factor)


def test_one_bit_has_the_scale_of_least_squares() -> None:
    W = draw(6, 20)
    sign = hard_sign(W)
    best = (W * sign).sum(1, keepdim=True) / (sign * sign).sum(1, keepdim=True)
    torch.testing.assert_close(row_levels(1).hard(W), best * sign, atol=1e-15, rtol=0)


def test_row_of_zeros_is_finite_and_its_scale_positive() -> None:
    for k in BITS:
        W = torch.zeros(2, 5)
        assert row_levels(k).hard(W).isfinite().all()
        assert (row_levels(k).scale(W) > 0).all()


# ---- gradients


@pytest.mark.parametrize("k", BITS)
def test_gradient_passes_weights_unchanged_and_activations_within_the_range(k: int) -> None:
    x = torch.cat([2 * draw(50), torch.tensor([1.0, -1.0, 0.0, 1.0 + 1e-12], dtype=F64)]).requires_grad_()
    g = draw(54, seed=1)
    assert torch.equal(torch.autograd.grad(row_levels(k)(x[None]), x, g[None])[0], g)
    (a,) = torch.autograd.grad(KBit(k)(x), x, g)
    assert torch.equal(a, torch.where(x.abs() <= 1, g, 0.0))


def test_gradient_of_the_lstm_is_back_propagation_written_out() -> None:
    """Through two steps: dL/dW_h from delta_t = dL/dz_t with the quantized matrices and states, and the mask of Qa."""
    method = create("qnn_rnn", qlab.build("char_rnn", (2,), 13, hidden=8, embedding=5, seed=0).double())
    net, (s, y) = method.net, (batch()[0][:, :2], batch()[1][:, :2])
    method.loss(net(s), y).backward()
    W = {t.name: t.quantizer.hard(t.latent.detach()) for t in quantized_tensors(net)}
    latent = {t.name: t.latent for t in quantized_tensors(net)}
    b, b_s, n = net.input.bias.detach(), net.fc.bias.detach(), len(s)
    x = [q_k(W["embedding"][:, s[:, t]].t().clamp(-1, 1), 4) for t in range(2)]
    tanh1 = torch.tanh(x[0] @ W["input"].t() + b)
    h1 = q_k(tanh1, 4)
    tanh2 = torch.tanh(x[1] @ W["input"].t() + b + h1 @ W["recurrent"].t())
    h2 = q_k(tanh2, 4)
    error = [
        (torch.softmax(h @ W["fc"].t() + b_s, 1) - torch.eye(13, dtype=F64)[y[:, t]]) / (2 * n)
        for t, h in enumerate((h1, h2))
    ]
    delta2 = (error[1] @ W["fc"]) * (1 - tanh2**2)
    delta1 = (error[0] @ W["fc"] + delta2 @ W["recurrent"]) * (1 - tanh1**2)
    for name, expected in (
        ("fc", error[0].t() @ h1 + error[1].t() @ h2),
        ("recurrent", delta2.t() @ h1),
        ("input", delta1.t() @ x[0] + delta2.t() @ x[1]),
    ):
        torch.testing.assert_close(latent[name].grad, expected, atol=1e-12, rtol=0)


# ---- the method


def test_every_matrix_and_both_inputs_of_every_product_are_quantized() -> None:
    method = lstm(weight_bits=2, activation_bits=3)
    assert [t.name for t in quantized_tensors(method.net)] == list(layers(method.net))
    assert {m.bits for m in method.net.modules() if isinstance(m, KBit) and m.rows} == {2}
    assert [m.bits for m in method.net.modules() if isinstance(m, KBit) and not m.rows] == [3, 3]
    states = method.net.states(batch()[0])
    assert torch.isin(states, KBit(3).levels(F64)).all()


def test_sixteen_bits_are_close_to_float() -> None:
    plain = qlab.build("lstm", (9,), 13, hidden=8, embedding=5, seed=0).double()
    s, _ = batch()
    error = [(lstm(weight_bits=k, activation_bits=k).net(s) - plain(s)).abs().max().item() for k in (4, 8, 16)]
    assert error[2] < 1e-3 < error[1] < error[0]


def test_none_leaves_the_net_in_float() -> None:
    method, (s, _) = lstm(weight_bits=None, activation_bits=None), batch()
    plain = qlab.build("lstm", (9,), 13, hidden=8, embedding=5, seed=0).double()
    assert torch.equal(method.net(s), plain(s))
    assert method.hard_weights() == {}


def text(folder: object, **options: object) -> qlab.data.DataModule:
    path = folder / "a.txt"  # type: ignore[operator]
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return qlab.data.load("text", path=path, length=10, batch_size=32, **options)


def trained(folder: object, **options: object) -> qlab.Run:
    data = text(folder)
    net = qlab.build("lstm", data.input_shape, data.num_classes, hidden=16, embedding=8, seed=0)
    fit = {name: options.pop(name) for name in ("epochs", "max_steps", "gradient_clip_val") if name in options}
    return qlab.fit(create("qnn_rnn", net, **options), data, progress=False, **fit)


def test_four_bits_learn_a_sentence_by_heart(tmp_path: object) -> None:
    run = trained(tmp_path, epochs=40, lr=0.02)
    assert run.metrics["test/loss"] < 0.5 * math.log(28)
    assert run.metrics["test/acc"] > 0.6
    assert run.metrics["test/acc"] == run.metrics["test/acc_latent"]  # the trained net is the deployed one


def test_latent_weights_stay_within_one(tmp_path: object) -> None:
    sizes = [
        max(
            float(w.abs().max())
            for w in trained(tmp_path, epochs=2, lr=0.5, clip=clip).method.latent_weights().values()
        )
        for clip in (True, False)
    ]
    assert sizes[0] == 1.0
    assert sizes[1] > 1.0


@pytest.mark.parametrize(("options", "limit"), [({"grad_clip": 1e-3}, 1e-3), ({"gradient_clip_val": 1e-2}, 1e-2)])
def test_norm_of_the_gradient_is_clipped(tmp_path: object, options: dict[str, float], limit: float) -> None:
    """One step of SGD from the same start moves all parameters together by lr times the clipped norm."""
    data = text(tmp_path)
    net = qlab.build("lstm", data.input_shape, data.num_classes, hidden=16, embedding=8, seed=0)
    before = [p.detach().clone() for p in create("qnn_rnn", net).parameters()]
    common = {"optimizer": "sgd", "lr": 1.0, "lr_schedule": "constant", "epochs": 1, "max_steps": 1}
    after = list(trained(tmp_path, **common, **options).method.parameters())
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(after, before, strict=True)]).norm()
    assert float(moved) == pytest.approx(limit, rel=1e-3)


def test_no_limit_leaves_the_gradient(tmp_path: object) -> None:
    common = {"optimizer": "sgd", "lr": 1.0, "lr_schedule": "constant", "epochs": 1, "max_steps": 1}
    free, wide = (trained(tmp_path, **common, grad_clip=c).method for c in (0.0, 1e6))
    assert all(torch.equal(p, q) for p, q in zip(free.parameters(), wide.parameters(), strict=True))


def test_works_on_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    method = create("qnn_rnn", net, weight_bits=1, activation_bits=1)
    assert method.net(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))).shape == (2, 3)
    assert isinstance(method.net[1], KBit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight_bits must be a whole number from 1 to 16, or None"),
        ({"activation_bits": 17}, "activation_bits"),
        ({"weight_bits": True}, "weight_bits"),
        ({"weight_bits": 2.0}, "weight_bits"),
        ({"grad_clip": -1.0}, "grad_clip must be a number of at least 0"),
        ({"grad_clip": float("nan")}, "grad_clip"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lstm(**options)
