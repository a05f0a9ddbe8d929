"""Attacks on weights: single flips against a forward pass each, greedy search against brute force, packed bits against floats."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.attacks.weight_bits import flip_packed, packed_place, scanning_bits, weakest_bits
from qlab.attacks.weights import BitSearch, bit_search, searching_bits
from qlab.diagnose.flip_oracle import binary_layers
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, harden, quantize
from tests.diagnose.small_nets import batch, conv, foreign, generator, mlp

FLIPS = 12


def labelled(net: nn.Module, x: Tensor, wrong: int = 3) -> Tensor:
    """The net's own classes, some of them changed, so that flips can win and lose."""
    with torch.no_grad():
        z = net(x)
    y = z.argmax(1)
    y[:wrong] = (y[:wrong] + 1) % z.shape[1]
    return y


def measured(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    with torch.no_grad():
        z = net(x)
    return float(F.cross_entropy(z, y)), int((z.argmax(1) != y).sum())


def brute_force(net: nn.Module, layer: str, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Changes of loss and errors, a forward pass of a fresh copy per flip."""
    hard = harden(net)
    before = measured(hard, x, y)
    rows = []
    for i in range(hard.get_submodule(layer).weight.numel()):
        other = copy.deepcopy(hard)
        w = other.get_submodule(layer).weight.data.view(-1)
        w[i] = -w[i]
        after = measured(other, x, y)
        rows.append((after[0] - before[0], after[1] - before[1]))
    delta, errors = zip(*rows, strict=True)
    return np.array(delta), np.array(errors)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A binary net trained on digits, with 200 examples that it has not seen."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = torch.from_numpy(raw.data / 8 - 1).float(), torch.from_numpy(raw.target).long()
    plain = qlab.build("mlp", (64,), 10, hidden=(32, 32), seed=0)
    net = quantize(plain, Sign, Sign, keep=())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(25):
        for at in torch.randperm(1500, generator=generator(0)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
    return harden(net), x[1500:1700], y[1500:1700]


# ---- single flips


@pytest.mark.parametrize("activations", [Sign, None], ids=["sign", "float"])
def test_every_flip_changes_loss_and_errors_as_one_forward_pass_says(activations) -> None:
    net, (x, _) = mlp(activations), batch(30, 8)
    y = labelled(net, x, 12)
    found = weakest_bits(net, x, y)
    names = binary_layers(net, x)
    assert list(dict.fromkeys(found.layer.tolist())) == names
    assert (found.loss, found.errors) == (pytest.approx(measured(net, x, y)[0], abs=1e-12), 12)
    for name in names:
        delta, errors = brute_force(net, name, x, y)
        at = found.layer == name
        np.testing.assert_array_equal(found.index[at], np.arange(len(delta)))
        np.testing.assert_allclose(found.delta[at], delta, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.more_errors[at], errors)
    assert (found.more_errors > 0).any()
    assert (found.delta < 0).any()
    assert (found.more_errors < 0).any() or activations is None


def test_convolutions_and_hand_written_layers_too() -> None:
    net, x = conv(), batch(8, 2, 6, 6)[0]
    y = labelled(net, x, 1)
    found = weakest_bits(net, x, y, layers=["3"])
    delta, errors = brute_force(net, "3", x, y)
    np.testing.assert_allclose(found.delta, delta, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.more_errors, errors)
    hand, v = foreign(), batch(20, 8)[0]
    labels = labelled(hand, v)
    found = weakest_bits(hand, v, labels, layers=["2"])
    delta, errors = brute_force(hand, "2", v, labels)
    np.testing.assert_allclose(found.delta, delta, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.more_errors, errors)
    search = bit_search(hand, v, labels, 1, candidates=35, layers=["2"], seeds=0)
    assert search.index == (int(delta.argmax()),)


def test_the_ranking_puts_lost_accuracy_first_and_the_loss_second() -> None:
    net, (x, _) = mlp(), batch(30, 8)
    y = labelled(net, x)
    frame = weakest_bits(net, x, y).frame()
    key = list(zip(frame.accuracy_change, -frame.delta, strict=True))
    assert key == sorted(key)
    assert frame.accuracy_change.iloc[0] < 0
    np.testing.assert_allclose(frame.accuracy, 27 / 30 + frame.accuracy_change, atol=1e-12)


# ---- the search


@pytest.mark.parametrize("rank", ["gradient", "exact"])
def test_each_flip_is_the_worst_of_its_candidates_by_brute_force(rank) -> None:
    net, (x, _) = mlp(), batch(40, 8)
    y = labelled(net, x)
    n = 4
    found = bit_search(net, x, y, flips=3, candidates=n, rank=rank, seeds=0)
    assert len(found) == 3
    now = harden(net)
    flipped: set[tuple[str, int]] = set()
    for t in range(3):
        before = measured(now, x, y)[0]
        options = []
        for name in binary_layers(net, x):
            delta, _ = brute_force(now, name, x, y)
            if rank == "gradient":
                w = now.get_submodule(name).weight
                w.requires_grad_(True)
                (g,) = torch.autograd.grad(F.cross_entropy(now(x), y), w)
                score = (-2 * w.detach() * g).flatten().numpy()
            else:
                score = delta.copy()
            score[[i for at, i in flipped if at == name]] = -np.inf
            top = np.argsort(-score, kind="stable")[:n]
            options += [(delta[i], name, int(i)) for i in top]
        worst = max(options)
        assert (found.layer[t], found.index[t]) == worst[1:]
        w = now.get_submodule(worst[1]).weight.data.view(-1)
        w[worst[2]] = -w[worst[2]]
        flipped.add(worst[1:])
        loss, errors = measured(now, x, y)
        assert found.loss[t + 1] == pytest.approx(loss, abs=1e-12)
        assert found.accuracy[t + 1] == pytest.approx(1 - errors / len(x), abs=1e-12)
        assert loss > before


def test_the_first_exact_flip_is_the_worst_bit_of_all() -> None:
    net, (x, _) = mlp(), batch(40, 8)
    y = labelled(net, x)
    every = weakest_bits(net, x, y)
    search = bit_search(net, x, y, flips=1, candidates=1, rank="exact", seeds=0)
    worst = int(every.delta.argmax())
    assert (search.layer[0], search.index[0]) == (every.layer[worst], every.index[worst])
    assert search.loss[1] - search.loss[0] == pytest.approx(every.delta[worst], abs=1e-12)
    for n in (1, 5, 1000):  # a gradient's candidates are some of the bits: no better than all
        some = bit_search(net, x, y, flips=1, candidates=n, seeds=0)
        assert some.loss[-1] <= search.loss[1] + 1e-12
    assert some.loss[-1] == pytest.approx(search.loss[1], abs=1e-12)  # all of them as candidates


def test_the_search_on_a_trained_net_beats_random_flips(trained) -> None:
    net, x, y = trained
    found = bit_search(net, x, y, FLIPS, candidates=5, seeds=4, test=(x[:50], y[:50]))
    assert found.accuracy[0] > 0.75
    assert (np.diff(found.loss) > 0).all()
    assert found.accuracy[-1] < found.random_accuracy[:, -1].min()
    assert (found.loss[1:] > found.random_loss.mean(0)[1:]).all()
    assert found.test_accuracy is not None
    flipped = copy.deepcopy(net)
    for name, i in zip(found.layer, found.index, strict=True):
        w = flipped.get_submodule(name).weight.data.view(-1)
        w[i] = -w[i]
    assert found.accuracy[-1] == pytest.approx(1 - measured(flipped, x, y)[1] / len(x))
    assert found.test_accuracy[-1] == pytest.approx(1 - measured(flipped, x[:50], y[:50])[1] / 50)


def test_random_flips_are_distinct_uniform_bits_and_the_same_for_a_seed() -> None:
    net, (x, _) = mlp(), batch(20, 8)
    y = labelled(net, x)
    one, again, other = (bit_search(net, x, y, 5, seeds=3, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.random_loss, again.random_loss)
    assert (one.random_loss != other.random_loss).any()
    np.testing.assert_array_equal(one.loss, other.loss)
    assert one.random_loss.shape == (3, len(one) + 1)
    assert (one.random_loss[:, 0] == one.loss[0]).all()
    assert len(np.unique(one.random_loss, axis=0)) == 3

    from qlab.attacks.weights import _Memory

    memory = _Memory(net, x, y, binary_layers(net, x), "cross_entropy", 1.0, None)
    drawn = memory.draw(memory.bits, generator(0))
    assert len(set(drawn)) == memory.bits == sum(w.numel() for w in memory.weights.values())
    assert all(0 <= i < memory.weights[name].numel() for name, i in drawn)


def test_the_net_is_left_as_it_was_and_the_search_ends_where_nothing_hurts() -> None:
    net, (x, _) = mlp(hidden=(3,)), batch(10, 8)
    y = labelled(net, x)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = bit_search(net, x, y, flips=500, candidates=1000, rank="exact", seeds=1)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert len(found) < 33
    assert len(set(zip(found.layer, found.index, strict=True))) == len(found)
    assert found.random_loss.shape == (1, len(found) + 1)


def test_vanished_gradients_are_told_and_exact_ranking_still_finds_the_bits() -> None:
    """A huge logit scale underflows the gradient of correct examples to exactly zero in float32."""
    net, x = mlp().float(), batch(40, 8)[0].float()
    y = labelled(net, x, 0)
    loud = nn.Sequential(net, _Times(1e4)).eval()
    blind = bit_search(loud, x, y, 1, candidates=2, seeds=0)
    seeing = bit_search(loud, x, y, 1, candidates=2, rank="exact", seeds=0)
    assert seeing.loss[-1] >= blind.loss[-1]
    if len(blind):
        assert blind.silent[0] > 0.5
        assert "exactly zero" in blind.summary()
    assert len(seeing) == 1
    assert seeing.silent[0] > 0.5


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


# ---- packed bits


def binary_conv_net() -> tuple[nn.Module, Tensor]:
    """Pictures to bits, a convolution on bits with 70 channels (two words), a linear layer on the flattened bits, a float end."""
    draw = generator(5)
    net = nn.Sequential(
        nn.Conv2d(1, 70, 3, bias=False),
        nn.BatchNorm2d(70),
        nn.ReLU(),
        nn.Conv2d(70, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 2 * 3, 9, bias=False),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Linear(9, 4),
    )
    for p in net.parameters():
        p.data.normal_(0, 1, generator=draw)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_(0, 1, generator=draw)
            m.running_var.uniform_(0.5, 4, generator=draw)
    x = torch.randn(16, 1, 6, 7, generator=draw)
    return harden(quantize(net.eval(), Sign, Sign)).eval(), x


@pytest.mark.parametrize("layer", ["0", "3", "7", "10"])
def test_a_flipped_packed_bit_is_the_flipped_weight_and_no_other(layer) -> None:
    from qlab.binary import compile

    net, x = binary_conv_net()
    packed = compile(net, x)
    size = net.get_submodule(layer).weight.numel()
    draw = np.random.default_rng(0)
    changed = 0
    for i in sorted({0, size - 1, *draw.integers(0, size, 4).tolist()}):
        other = copy.deepcopy(net)
        w = other.get_submodule(layer).weight.data.view(-1)
        w[i] = -w[i]
        again, flipped = compile(other, x), flip_packed(packed, layer, i)
        for name, words in again.graph.tensors.items():
            np.testing.assert_array_equal(flipped.graph.tensors[name], words)
        differ = [
            n for n in packed.graph.tensors if not np.array_equal(packed.graph.tensors[n], again.graph.tensors[n])
        ]
        assert len(differ) == 1
        one = packed.graph.tensors[differ[0]] ^ flipped.graph.tensors[differ[0]]
        assert int(np.bitwise_count(one).sum()) == 1
        with torch.no_grad():
            z = other(x)
        assert torch.equal(flipped(x, "numpy"), z)
        changed += not torch.equal(z, packed(x, "numpy"))
    assert changed > 0


def test_the_place_of_a_bit_is_that_of_the_format() -> None:
    from qlab.binary import compile

    net, x = binary_conv_net()
    packed = compile(net, x)
    conv_index = int(np.ravel_multi_index((2, 66, 1, 2), (5, 70, 3, 3)))
    assert packed_place(packed, "3", conv_index) == ((2, 1, 2, 1), 2)  # channel 66 is bit 2 of the second word
    picture = int(np.ravel_multi_index((8, 3, 1, 2), (9, 5, 2, 3)))
    assert packed_place(packed, "7", picture) == ((8, 1, 2, 0), 3)
    assert packed_place(packed, "10", 9 * 2 + 4) == ((2, 0), 4)


def test_a_packed_net_is_scanned_by_the_net_behind_it_and_its_accuracy_after_a_flip_is_the_one_found(tmp_path) -> None:
    from qlab.binary import compile, load

    net, x = binary_conv_net()
    y = labelled(net, x, 2)
    packed = compile(net, x)
    found = weakest_bits(packed, x, y, layers=["7", "10"])
    np.testing.assert_array_equal(found.delta, weakest_bits(net, x, y, layers=["7", "10"]).delta)
    assert (found.more_errors != 0).any()
    for k in found.order[:5]:
        flipped = flip_packed(packed, str(found.layer[k]), int(found.index[k]))
        assert int((flipped(x).argmax(1) != y).sum()) == found.errors + found.more_errors[k]
    packed.save(tmp_path / "net.safetensors")
    read = load(tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="read from a file"):
        weakest_bits(read, x, y)
    assert torch.equal(flip_packed(read, "7", 3)(x), flip_packed(packed, "7", 3)(x))


# ---- results and errors


def test_frames_figures_and_summaries_tell_the_same(trained) -> None:
    net, x, y = trained
    every = weakest_bits(net, x[:40], y[:40])
    worst = every.frame().iloc[0]
    assert f"leaves {worst.accuracy:.1%} right" in every.summary()
    assert len(every.figure().axes) == 2
    search = bit_search(net, x[:40], y[:40], 3, seeds=2)
    frame = search.frame()
    assert list(frame.columns) == ["search", "seed", "flips", "loss", "accuracy", "layer", "index"]
    assert len(frame) == 3 * (len(search) + 1)
    np.testing.assert_array_equal(frame[frame.search == "progressive"].accuracy, search.accuracy)
    assert f"from {search.accuracy[0]:.1%} to {search.accuracy[-1]:.1%}" in search.summary()
    assert search.figure().get_label() == search.summary()
    assert search.flips_to(1.0) == 0
    assert search.flips_to(-1.0) is None


def test_progress_comes_with_the_result_so_far() -> None:
    net, (x, _) = mlp(), batch(20, 8)
    y = labelled(net, x)
    updates = list(scanning_bits(net, x, y))
    assert [u.fraction for u in updates] == sorted(u.fraction for u in updates)
    assert updates[-1].fraction == 1
    assert sorted({len(u.value) for u in updates if u.value is not None}) == [72, 135, 170, 185]
    steps = [u for u in searching_bits(net, x, y, 3, seeds=2) if u.value is not None]
    assert [len(u.value) for u in steps][:3] == [1, 2, 3]
    assert isinstance(steps[-1].value, BitSearch)
    assert steps[-1].fraction == 1


def test_what_cannot_be_done_is_said() -> None:
    net, (x, _) = mlp(), batch(20, 8)
    y = labelled(net, x)
    with pytest.raises(UnknownNameError, match="layer of bits"):
        weakest_bits(net, x, y, layers=["hidden.9"])
    with pytest.raises(UnknownNameError, match="ranking"):
        bit_search(net, x, y, rank="luck")
    with pytest.raises(InputError, match="at least 1"):
        bit_search(net, x, y, 0)
    plain = qlab.build("mlp", (8,), 3, hidden=(4,), seed=0).double().eval()
    with pytest.raises(InputError, match="no layer of bits"):
        weakest_bits(plain, x, y)
    with pytest.raises(InputError, match="labels"):
        weakest_bits(net, x, y + 3)
    from qlab.binary import compile

    packed = compile(*binary_conv_net())
    with pytest.raises(InputError, match="counted from 0"):
        flip_packed(packed, "7", 9 * 30)
