"""`BatchLoader`: order, slices, augmentation, and a state from which a run continues exactly."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from qlab.data import Augmentation, BatchLoader, DataModule, Split, base
from qlab.errors import CheckpointError, InputError


def loader(n=23, batch_size=5, rows=None, **options):
    """A loader of the numbers 0 to n - 1, so that a batch shows which samples it holds."""
    x = torch.arange(n, dtype=torch.float32).view(-1, 1)
    return BatchLoader(Split(x, torch.arange(n)), rows, lambda x: x, batch_size=batch_size, **options)


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return [y.tolist() for _, y in loader]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def test_without_shuffling_all_samples_come_in_their_order():
    plain = loader()
    assert flat(epoch_of(plain, 0)) == flat(epoch_of(plain, 1)) == list(range(23))
    assert [len(batch) for batch in epoch_of(plain, 0)] == [5, 5, 5, 5, 3]


def test_shuffled_epochs_are_different_permutations_that_depend_on_seed_and_epoch_alone():
    first = loader(shuffle=True, seed=1)
    epochs = [flat(epoch_of(first, e)) for e in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = loader(shuffle=True, seed=1)
    assert flat(epoch_of(again, 2)) == epochs[2], "no epoch before it was drawn here"
    assert flat(epoch_of(loader(shuffle=True, seed=2), 2)) != epochs[2]


def test_inputs_and_labels_stay_together_and_rows_choose_the_samples():
    rows = torch.tensor([3, 9, 10, 20])
    for x, y in loader(rows=rows, shuffle=True, batch_size=3):
        assert x[:, 0].tolist() == y.tolist()
    assert sorted(flat(epoch_of(loader(rows=rows, shuffle=True, batch_size=3), 0))) in (
        [3, 9, 10, 20],
        [3, 9, 10],
        [3, 9, 20],
    )


@pytest.mark.parametrize(
    ("n", "batch_size", "shuffle", "sizes"),
    [
        (11, 5, True, [5, 5]),  # a single sample has no variance for batch norm
        (12, 5, True, [5, 5, 2]),
        (10, 5, True, [5, 5]),
        (11, 5, False, [5, 5, 1]),  # evaluation leaves nothing out
        (3, 1, True, [1, 1, 1]),
        (1, 5, True, [1]),
    ],
)
def test_only_a_training_batch_of_a_single_sample_is_left_out(n, batch_size, shuffle, sizes):
    batches = loader(n, batch_size, shuffle=shuffle)
    assert [len(batch) for batch in epoch_of(batches, 0)] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("n", [20, 22, 23])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_one_permutation_in_equal_parts(n, world_size):
    ranks = [loader(n, 4, shuffle=True, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    whole = flat(epoch_of(loader(n, 4, shuffle=True, seed=3), 1))
    parts = [epoch_of(rank, 1) for rank in ranks]
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1, "the same batches in number and size"
    seen = flat(flat(parts))
    assert len(set(seen)) == len(seen) == n - n % world_size - (n // world_size % 4 == 1) * world_size
    # Batch b of all processes together is batch b of one process with larger batches.
    assert sorted(flat([part[0] for part in parts])) == sorted(whole[: 4 * world_size])


def test_processes_evaluate_every_sample_and_repeat_fewer_than_there_are_processes():
    parts = [epoch_of(loader(23, 4, rank=r, world_size=3), 0) for r in range(3)]
    assert len({len(flat(part)) for part in parts}) == 1
    assert sorted(flat(flat(parts))) == [0, *range(23)]


def test_more_processes_than_samples_are_refused():
    with pytest.raises(InputError, match="2 samples cannot be dealt out to 3 processes"):
        loader(2, world_size=3)


def test_processes_augment_differently():
    x = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    same = Split(x[:1].expand(4, -1, -1, -1), torch.zeros(4, dtype=torch.int64))
    batches = []
    for rank in range(2):
        ours = BatchLoader(
            same, None, lambda x: x, batch_size=2, shuffle=True, augment=Augmentation(), rank=rank, world_size=2
        )
        batches.append(next(iter(ours))[0])
    assert not torch.equal(*batches)


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_loader_restored_from_its_state_continues_with_the_next_batch(stop):
    options = {"shuffle": True, "seed": 1}
    whole = epoch_of(loader(**options), 2)
    first = loader(**options)
    first.set_epoch(2)
    batches = iter(first)
    for _ in range(stop):
        next(batches)
    second = loader(**options)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert epoch_of(second, 2) == whole[stop:]
    assert epoch_of(second, 2) == whole, "only the first iteration continues"


def test_another_epoch_starts_at_its_first_batch_whatever_was_restored():
    first = loader(shuffle=True)
    batches = iter(first)
    next(batches)
    second = loader(shuffle=True)
    second.load_state_dict(first.state_dict())
    assert epoch_of(second, 1) == epoch_of(first, 1)


@pytest.mark.parametrize("other", [{"batch_size": 6}, {"seed": 9}, {"n": 24}])
def test_a_position_in_other_batches_is_refused_but_the_end_of_an_epoch_is_not(other):
    first = loader(shuffle=True)
    batches = iter(first)
    next(batches)
    second = loader(**{"shuffle": True, **other})
    with pytest.raises(CheckpointError, match=r"stopped after batch 1 of epoch 0 with .* \(now"):
        second.load_state_dict(first.state_dict())
    list(batches)
    second.load_state_dict(first.state_dict())
    assert len(epoch_of(second, 1)) == len(second)


def test_augmentation_of_a_batch_depends_on_seed_epoch_and_batch_alone():
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = DataModule.from_arrays(x, torch.arange(40) % 2, augment=True, cutout=3, batch_size=8, val_fraction=0)
    first, second = data.train_dataloader(), data.train_dataloader()
    first.set_epoch(3)
    second.set_epoch(3)
    whole = list(first)
    second.load_state_dict({**second.state_dict(), "epoch": 3, "batch": 2})
    for (x1, y1), (x2, y2) in zip(whole[2:], second, strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)
    first.set_epoch(4)
    assert not torch.equal(next(iter(first))[0], whole[0][0])


def test_batches_of_one_epoch_are_augmented_differently():
    picture = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    same = Split(picture.repeat(20, 1, 1, 1), torch.zeros(20, dtype=torch.int64))
    batches = list(BatchLoader(same, None, lambda x: x, batch_size=10, shuffle=True, augment=Augmentation()))
    assert not torch.equal(batches[0][0], batches[1][0])


def test_a_training_batch_is_the_augmented_and_normalised_slice():
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = DataModule.from_arrays(x, torch.arange(40) % 2, augment=True, batch_size=8, val_fraction=0)
    batches = data.train_dataloader()
    assert batches.augment == Augmentation(padding=4, mirror=True)
    batch, labels = next(iter(batches))
    rows = batches.order()[:8]
    assert labels.tolist() == batches.split.y[rows].tolist()
    raw = batch * data.std.view(-1, 1, 1) + data.mean.view(-1, 1, 1)
    for picture, row in zip(torch.round(raw * 255).to(torch.uint8), rows, strict=True):
        padded = np.pad(batches.split.x[row].numpy(), ((0, 0), (4, 4), (4, 4)))
        windows = [padded[:, i : i + 8, j : j + 8][:, :, ::s] for i in range(9) for j in range(9) for s in (1, -1)]
        assert sum(np.array_equal(picture.numpy(), window) for window in windows) >= 1


# ---- devices and processes


def trainer(device="cpu", rank=0, world_size=1):
    """What a data module asks a trainer for."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, global_rank=rank, world_size=world_size)


@pytest.mark.parametrize("fits", [True, False])
def test_batches_come_out_on_the_device_of_the_trainer(monkeypatch, fits):
    # The meta device stands for an accelerator: an operation that mixes it with the CPU is an error there too.
    monkeypatch.setattr(base, "_fits", lambda device, x: fits)
    data = images()
    data.trainer = trainer("meta")
    batches = data.train_dataloader()
    assert batches.split.x.device.type == ("meta" if fits else "cpu")
    assert data.val_dataloader().split is batches.split, "train and val share one copy of the set"
    for x, y in (next(iter(batches)), next(iter(data.test_dataloader()))):
        assert x.device.type == y.device.type == "meta"
        assert (x.shape, x.dtype, y.dtype) == ((10, 3, 4, 4), torch.float32, torch.int64)
    assert data.calibration(1)[0].device.type == "meta"
    assert data.split("train").x.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    here, there = images(), images()
    there.trainer = trainer("cuda:0")
    for (x1, y1), (x2, y2) in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        torch.testing.assert_close(x2.cpu(), x1)
        assert torch.equal(y2.cpu(), y1)


def test_each_process_of_a_trainer_gets_its_own_slice():
    whole = flat(y.tolist() for _, y in images().train_dataloader())
    parts = []
    for rank in range(2):
        data = images()
        data.trainer = trainer(rank=rank, world_size=2)
        parts.append(flat(y.tolist() for _, y in data.train_dataloader()))
    assert parts == [whole[0::2], whole[1::2]]


# ---- with Lightning's own Trainer


class Net(pl.LightningModule):
    """Batch norm and momentum: every batch leaves a trace in the parameters."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.seen = []

    def training_step(self, batch, index):
        x, y = batch
        self.seen.append((self.current_epoch, x.double().sum().item(), y.tolist()))
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, index):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("test/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


class StopAt(pl.Callback):
    """Save and stop after a number of steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def images(**options):
    draws = np.random.default_rng(0)
    x, y = draws.integers(0, 256, (75, 3, 4, 4), dtype=np.uint8), np.arange(75) % 3
    return DataModule.from_arrays(x, y, augment=True, cutout=2, batch_size=10, **options)  # 54 train: 6 batches


def fit(epochs, callbacks=(), resume=None, data=None, **options):
    net = Net()
    run = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    run.fit(net, data or images(), ckpt_path=resume, weights_only=True)
    return net, run


def parameters(net):
    return torch.cat([value.flatten().double() for value in net.state_dict().values()])


def test_the_trainer_draws_a_new_permutation_in_every_epoch():
    net, _ = fit(3)
    assert [epoch for epoch, *_ in net.seen] == [0] * 6 + [1] * 6 + [2] * 6
    labels = ["".join(map(str, flat(y for e, _, y in net.seen if e == epoch))) for epoch in range(3)]
    assert len(set(labels)) == 3
    assert len({"".join(sorted(text)) for text in labels}) == 1


@pytest.mark.parametrize("step", [1, 4, 6, 8, 12, 13, 17])
@pytest.mark.parametrize("limit", [None, 4])
def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_same_bits(tmp_path, step, limit):
    options = {} if limit is None else {"limit_train_batches": limit}
    if limit is not None and step > 3 * limit - 1:
        step -= 6
    path = tmp_path / "stopped.ckpt"
    whole, _ = fit(3, **options)
    stopped, _ = fit(3, [StopAt(step, path)], **options)
    resumed, _ = fit(3, resume=path, **options)
    assert stopped.seen + resumed.seen == whole.seen
    assert torch.equal(parameters(resumed), parameters(whole))


def test_a_run_resumed_from_the_end_of_an_epoch_ends_with_the_same_bits(tmp_path):
    path = tmp_path / "epoch.ckpt"
    whole, _ = fit(3)
    _, run = fit(1)
    run.save_checkpoint(path)
    resumed, _ = fit(3, resume=path)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.seen == whole.seen[6:]


def test_resuming_with_another_batch_size_is_one_clear_error(tmp_path):
    path = tmp_path / "stopped.ckpt"
    fit(2, [StopAt(2, path)])
    data = images()
    data.batch_size = 9
    with pytest.raises(CheckpointError, match=r"batch_size=10 \(now 9\)"):
        fit(2, resume=path, data=data)


@pytest.mark.filterwarnings("ignore:Total length of `BatchLoader` across ranks is zero:UserWarning")
def test_evaluation_sees_every_sample_once_and_validation_may_be_off():
    data = images(val_fraction=0)
    net, run = fit(1, data=data)
    assert len(net.seen) == 6
    metrics = run.test(net, data, verbose=False)[0]
    x, y = data.split("test").x, data.split("test").y
    net.eval()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(net.net(data.transform(x)), y)
    assert metrics["test/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_checkpoints_hold_the_options_of_the_data_as_primitives(tmp_path):
    path = tmp_path / "epoch.ckpt"
    _, run = fit(1, data=images(seed=5))
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert saved["seed"] == 5
    assert saved["batch_size"] == 10
