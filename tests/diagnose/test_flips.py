"""A history of bits gives back every step, counts flips as one would by hand, and names the flip that changed a prediction."""

from __future__ import annotations

import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.diagnose.course import course
from qlab.diagnose.flips import flips, scrub
from qlab.diagnose.history import History, Recorder, Signs, Tracked
from qlab.diagnose.which_flip import tracing, which_flip
from qlab.errors import DataFileError, InputError, UnknownNameError
from qlab.quantizers import Sign, Uniform, harden, quantize

SIGNS = (-1.0, 1.0)


def recorded(
    steps: int = 30, seed: int = 0, levels: tuple[float, ...] = SIGNS
) -> tuple[History, list[dict[str, Tensor]]]:
    """Return a history of two tensors whose weights change at random, and the weights themselves."""
    g = torch.Generator().manual_seed(seed)
    grid = torch.tensor(levels)
    tensors = [Tracked("0", (5, 13), levels), Tracked("2", (3, 5), levels)]
    recorder = Recorder(tensors)
    now = {t.name: grid[torch.randint(len(levels), t.shape, generator=g)] for t in tensors}
    truth = []
    for step in range(steps):
        truth.append({name: w.clone() for name, w in now.items()})
        recorder.append(step, now)
        for name, w in now.items():
            moved = torch.rand(w.shape, generator=g) < 0.1
            now[name] = torch.where(moved, grid[torch.randint(len(levels), w.shape, generator=g)], w)
    return recorder.history(), truth


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


@pytest.mark.parametrize("levels", [SIGNS, (-0.5, 0.0, 0.5), tuple(float(k) for k in range(-3, 4)), (0.25, 0.75)])
def test_every_step_comes_back(levels: tuple[float, ...]) -> None:
    history, truth = recorded(levels=levels)
    for step, weights in enumerate(truth):
        found = history.at(step)
        assert set(found) == set(weights)
        for name, w in weights.items():
            assert torch.equal(found[name], w)


def test_a_bit_is_one_for_minus_one_and_takes_one_bit() -> None:
    w = torch.ones(1, 70)
    w[0, 65] = -1
    recorder = Recorder([Tracked("w", (1, 70), SIGNS)])
    recorder.append(0, {"w": w})
    assert recorder.history().words.tolist() == [[0, 2]]
    ten_thousand = Tracked("w", (100, 100), SIGNS)
    assert 5000 * 8 * ten_thousand.words < 6.3e6


def test_signs_are_read_off_latent_tensors_wherever_their_memory_is() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [Tracked("a", (5, 13), SIGNS), Tracked("b", (64,), SIGNS), Tracked("c", (3, 3), SIGNS)]
    latents = [torch.randn(t.shape, generator=g) for t in tensors]
    latents[0][0, 0], latents[0][0, 1] = 0.0, -0.0
    signs = Signs(tensors, latents)

    def expected() -> list[int]:
        hard = [torch.where(w >= 0, 1.0, -1.0) for w in latents]
        return np.concatenate([t.encode(h) for t, h in zip(tensors, hard, strict=True)]).tolist()

    assert signs().tolist() == expected()
    latents[1].mul_(-1)
    assert signs().tolist() == expected()
    latents[0].data = torch.randn(5, 13, generator=g)
    latents[2].data = torch.randn(3, 3, generator=g).T  # not contiguous
    assert signs().tolist() == expected()
    latents[2].mul_(-1)
    assert signs().tolist() == expected()


def test_steps_between_two_records_show_the_earlier_one() -> None:
    history, truth = recorded()
    thin = History(history.tensors, history.steps[::5], history.words[::5])
    assert torch.equal(thin.at(14)["0"], truth[10]["0"])
    with pytest.raises(InputError, match="runs from 0 to 29"):
        history.at(30)
    with pytest.raises(UnknownNameError, match="recorded tensor"):
        history.codes("nothing")


def test_a_full_recorder_keeps_what_a_coarser_one_would_have() -> None:
    tracked = Tracked("w", (4,), SIGNS)
    recorder, coarse = Recorder([tracked], limit=20 * 8), Recorder([tracked], every=4)
    g = torch.Generator().manual_seed(1)
    for step in range(60):
        w = {"w": torch.randint(2, (4,), generator=g) * 2.0 - 1}
        for r in (recorder, coarse):
            if r.due(step):
                r.append(step, w)
    assert recorder.every == 4
    a, b = recorder.history(), coarse.history()
    assert a.steps.tolist() == b.steps.tolist()
    assert np.array_equal(a.words, b.words)


@pytest.mark.parametrize("levels", [SIGNS, (-1.0, 0.0, 1.0, 2.0, 3.0)])
def test_flips_are_those_one_counts_by_hand(levels: tuple[float, ...]) -> None:
    history, truth = recorded(levels=levels)
    found = flips(history)
    for t in range(1, len(truth)):
        for j, name in enumerate(("0", "2")):
            assert found.counts[t - 1, j] == int((truth[t][name] != truth[t - 1][name]).sum())
    each = sum((truth[t]["0"] != truth[t - 1]["0"]).long() for t in range(1, len(truth)))
    assert isinstance(each, Tensor)
    assert np.array_equal(found.per_weight["0"], each.numpy())
    assert found.total == found.frame()["flips"].sum() == sum(n.sum() for n in found.per_weight.values())
    part = flips(history, since=10, until=20)
    assert part.steps.tolist() == list(range(11, 21))
    assert np.array_equal(part.counts, found.counts[10:20])


def test_an_oscillating_weight_is_listed_with_its_period() -> None:
    recorder = Recorder([Tracked("w", (2, 3), SIGNS)])
    for step in range(41):
        w = torch.ones(2, 3)
        w[1, 2] = 1 if (step // 4) % 2 == 0 else -1  # a full swing takes eight steps
        w[0, 1] = 1 if step < 25 else -1
        w[0, 2] = -1 if 5 <= step < 9 else 1  # two flips are no oscillation
        recorder.append(step, {"w": w})
    found = flips(recorder.history())
    assert found.oscillating == 1
    top, twice, other = found.swings.to_dict("records")
    assert (twice["index"], twice["flips"]) == ((0, 2), 2)
    assert (top["index"], top["flips"], top["period"], top["longest_run"]) == ((1, 2), 10, 8.0, 4)
    assert (other["index"], other["flips"], other["last_flip"], other["longest_run"]) == ((0, 1), 1, 25, 25)
    assert np.isnan(other["period"])
    assert "flipped at least three times" in found.summary()
    assert found.figure().get_label() == found.summary()


def test_one_record_has_no_flips() -> None:
    history, _ = recorded(steps=1)
    found = flips(history)
    assert found.total == 0
    assert "no flips to count" in found.summary()
    assert len(found.frame()) == 0
    found.figure()


def test_the_scrubbed_net_has_the_weights_of_its_step() -> None:
    history, truth = recorded()
    model = net()
    at = scrub(history, model, 7)
    assert torch.equal(at[0].weight, truth[7]["0"].double())  # type: ignore[index]
    assert torch.equal(at[2].bias, model[2].bias)  # type: ignore[index]
    assert not torch.equal(model[0].weight, truth[7]["0"].double())  # type: ignore[index]
    latent = quantize(net(), weights=Sign)
    assert torch.equal(scrub(history, latent, 7)[0].weight, truth[7]["0"].double())  # type: ignore[index]
    with pytest.raises(InputError, match="another net"):
        scrub(history, nn.Sequential(nn.Linear(13, 4)), 7)


def margin(model: nn.Module, x: Tensor, weights: dict[str, Tensor], c: int) -> tuple[float, int]:
    hard = harden(model)
    with torch.no_grad():
        for name, w in weights.items():
            hard.get_submodule(name).weight.copy_(w)  # type: ignore[operator, union-attr]
        z = hard(x)[0]
    return float(z[c] - max(v for i, v in enumerate(z) if i != c)), int(z.argmax())


def turning(seed: int = 3) -> tuple[History, list[dict[str, Tensor]], Tensor, int, int]:
    """Return a history, an example and an interval in which its prediction changes."""
    history, truth = recorded(seed=seed)
    model = net()
    xs = torch.randn(60, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for x in xs.split(1):
        for a in range(20):
            if margin(model, x, truth[a], 0)[1] != margin(model, x, truth[a + 3], 0)[1]:
                return history, truth, x, a, a + 3
    raise AssertionError("no prediction changed")


def test_every_flip_is_answered_by_running_the_net() -> None:
    history, truth, x, a, b = turning()
    model = net()
    found = which_flip(history, model, x, a, b)
    c = found.class_a
    assert (found.margin_a, c) == pytest.approx(margin(model, x, truth[a], c))
    assert (found.margin_b, found.class_b) == pytest.approx(margin(model, x, truth[b], c))
    now = {name: w.clone() for name, w in truth[a].items()}
    before = found.margin_a
    first = None
    for k, (step, layer, index) in enumerate(zip(found.steps, found.layers, found.indices, strict=True)):
        assert truth[step - 1][layer][index] == found.values[k, 0] != found.values[k, 1] == truth[step][layer][index]
        now[layer][index] = found.values[k, 1]
        value, predicted = margin(model, x, now, c)
        assert found.margins[k] == pytest.approx(value, abs=1e-12)
        assert found.changes[k] == pytest.approx(value - before, abs=1e-12)
        before = value
        if first is None and predicted != c:
            first = k
        single = {name: w.clone() for name, w in truth[a].items()}
        single[layer][index] = found.values[k, 1]
        assert found.alone[k] == pytest.approx(margin(model, x, single, c)[0] - found.margin_a, abs=1e-12)
        back = {name: w.clone() for name, w in truth[b].items()}
        back[layer][index] = truth[a][layer][index]
        if truth[a][layer][index] == truth[b][layer][index]:
            assert np.isnan(found.undone[k])
        else:
            assert found.undone[k] == pytest.approx(margin(model, x, back, c)[0] - found.margin_b, abs=1e-12)
    assert found.first == first is not None
    assert found.changes.sum() == pytest.approx(found.margin_b - found.margin_a, abs=1e-12)
    flipped = sum(int((truth[t + 1][name] != truth[t][name]).sum()) for t in range(a, b) for name in truth[t])
    assert len(found.steps) == flipped


@pytest.mark.parametrize("seed", [3, 4, 6])
def test_the_minimal_set_suffices_and_nothing_of_it_can_be_left_out(seed: int) -> None:
    history, truth, x, a, b = turning(seed)
    model = net()
    found = which_flip(history, model, x, a, b)
    assert found.first is not None
    assert found.minimal
    assert max(found.minimal) <= found.first

    def changes(numbers: tuple[int, ...]) -> bool:
        weights = {name: w.clone() for name, w in truth[a].items()}
        for k in sorted(numbers):
            weights[found.layers[k]][found.indices[k]] = found.values[k, 1]
        return margin(model, x, weights, found.class_a)[1] != found.class_a

    assert changes(found.minimal)
    for rest in combinations(found.minimal, len(found.minimal) - 1):
        assert not changes(rest)
    assert "is the first after which the prediction differs" in found.summary()
    assert found.frame()["minimal_set"].sum() == len(found.minimal)
    assert found.figure().get_label() == found.summary()


def test_the_course_is_that_of_the_nets_of_the_steps() -> None:
    history, truth, x, a, b = turning()
    model = net()
    found = course(history, model, x, points=len(truth))
    last = int(found.classes[-1])
    for step, weights in enumerate(truth):
        expected = margin(model, x, weights, last)
        assert (found.margins[step], found.classes[step]) == (pytest.approx(expected[0]), expected[1])
    assert any(a <= first and second <= b for first, second in found.turns)
    for first, second in found.turns:
        assert which_flip(history, model, x, first, second).first is not None
    assert f"changed {len(found.turns)} times" in found.summary()
    assert found.figure().get_label() == found.summary()
    assert course(history, model, x, points=7).steps[[0, -1]].tolist() == [0, 29]
    assert len(found.frame()) == len(truth)


def test_an_interval_without_flips_changes_nothing() -> None:
    history, *_ = recorded()
    x = torch.randn(1, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = which_flip(history, net(), x, 4, 4)
    assert len(found.steps) == 0
    assert found.first is None
    assert found.margin_a == found.margin_b
    assert len(found.frame()) == 0
    found.figure()


def test_partial_results_say_what_is_left() -> None:
    history, _, x, a, b = turning()
    updates = list(tracing(history, net(), x, a, b))
    assert [u.fraction for u in updates] == sorted(u.fraction for u in updates)
    assert updates[0].value.todo > 0
    assert updates[-1].value.todo == 0
    assert np.isfinite(updates[0].value.margins).all()


def test_the_net_sees_sign_activations_and_many_levels() -> None:
    history, _ = recorded(levels=(-0.5, 0.0, 0.5))
    model = quantize(net(), weights=lambda: Uniform(2, limit=0.5), activations=Sign)
    x = torch.randn(1, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = which_flip(history, model, x, 0, 9)
    assert found.changes.sum() == pytest.approx(found.margin_b - found.margin_a, abs=1e-12)


def test_wrong_input_is_said_in_one_error() -> None:
    history, *_ = recorded()
    x = torch.randn(2, 13, dtype=torch.float64)
    with pytest.raises(InputError, match="one example"):
        which_flip(history, net(), x, 0, 5)
    with pytest.raises(InputError, match="earlier step first"):
        which_flip(history, net(), x[:1], 5, 0)
    with pytest.raises(InputError, match="does not take inputs"):
        which_flip(history, net(), torch.randn(1, 12, dtype=torch.float64), 0, 5)


def test_too_many_flips_are_refused_before_any_work() -> None:
    recorder = Recorder([Tracked("0", (100, 130), SIGNS)])
    recorder.append(0, {"0": torch.ones(100, 130)})
    recorder.append(1, {"0": -torch.ones(100, 130)})
    recorder.append(2, {"0": torch.ones(100, 130)})
    model = nn.Sequential(nn.Linear(130, 100)).double().eval()
    x = torch.randn(1, 130, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="26,000 flips between steps 0 and 2"):
        which_flip(recorder.history(), model, x, 0, 2)


def test_a_saved_history_comes_back_without_pickle(tmp_path: Path) -> None:
    history, truth = recorded()
    path = history.save(tmp_path / "bits.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["bits.npz"]
    again = History.load(path)
    assert again.tensors == history.tensors
    assert np.array_equal(again.steps, history.steps)
    assert np.array_equal(again.words, history.words)
    assert torch.equal(again.at(17)["2"], truth[17]["2"])
    with np.load(path, allow_pickle=False) as parts:
        assert all(parts[key].dtype.kind in "iu" for key in parts.files)
    with pytest.raises(InputError, match="folder that exists"):
        history.save(tmp_path / "nowhere" / "bits.npz")


def test_any_broken_file_gives_one_clear_error(tmp_path: Path) -> None:
    history, _ = recorded()
    path = history.save(tmp_path / "bits.npz")
    data = path.read_bytes()
    broken = tmp_path / "broken.npz"
    rng = np.random.default_rng(0)
    for cut in (0, 1, 10, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:cut])
        with pytest.raises(DataFileError, match="not a readable bit history"):
            History.load(broken)
    for place in rng.integers(0, len(data), 60):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        broken.write_bytes(changed)
        try:  # a changed time stamp in the archive harms nobody; changed content must never be read
            again = History.load(broken)
        except DataFileError:
            continue
        assert np.array_equal(again.words, history.words)
        assert again.tensors == history.tensors
    with pytest.raises(DataFileError, match="no such file"):
        History.load(tmp_path / "nothing.npz")
    np.savez(broken, meta=np.array([{}], dtype=object), steps=history.steps, words=history.words, digest=history.steps)
    with pytest.raises(DataFileError, match="not a readable"):
        History.load(broken)
    with np.load(path) as parts:
        content = {key: parts[key] for key in parts.files}
    other = {**content, "words": content["words"] ^ np.uint64(1)}  # a sound archive of other words
    np.savez(broken, **other)
    with pytest.raises(DataFileError, match="digest"):
        History.load(broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("meta.npy", b"nothing")
    with pytest.raises(DataFileError):
        History.load(broken)


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_no_pickle_in_a_file_is_run(tmp_path: Path) -> None:
    history, _ = recorded()
    for key in ("meta", "steps", "words", "digest"):
        with np.load(history.save(tmp_path / "bits.npz")) as parts:
            content = {name: parts[name] for name in parts.files}
        content[key] = np.array([Trap(tmp_path / "sprung")], dtype=object)
        np.savez(tmp_path / "trap.npz", **content)
        with pytest.raises(DataFileError, match="not a readable bit history"):
            History.load(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, _ = recorded()
    path = history.save(tmp_path / "bits.npz")
    monkeypatch.setattr("qlab.diagnose.history.MAX_BYTES", 1000)
    with pytest.raises(DataFileError, match="too large"):
        History.load(path)


def test_a_recorder_goes_on_from_its_state() -> None:
    history, truth = recorded()
    whole, half = Recorder(history.tensors), Recorder(history.tensors)
    for step, weights in enumerate(truth):
        whole.append(step, weights)
        if step == 12:
            half = Recorder.of(half.state())
        half.append(step, weights)
    assert np.array_equal(whole.history().words, half.history().words)
