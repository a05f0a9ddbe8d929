"""`BatchLoader`: ready batches, cut out of the set where it lies.

Batch b of epoch e is a function of (seed, e, b): the permutation comes from (seed, e), the augmentation from (seed, e, b). The
loader's whole state is therefore two integers, and a run resumed in the middle of an epoch continues with the batch that the
uninterrupted run would have seen next.

Lightning (2.6) meets it at three places. It calls `loader.sampler.set_epoch(epoch)` at the start of each epoch, so `sampler` is
the loader itself. It creates the iterator of the first epoch before that call, so `__iter__` is a generator, which reads the
epoch when the first batch is asked for. And it stores `state_dict()` in every checkpoint. To continue within an epoch, the
checkpoint must be saved in `on_train_batch_end`: once `fit` has returned, Lightning counts an epoch that was stopped as done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlab.data.augment import Augmentation, augmented
from qlab.data.seeding import generator
from qlab.data.splits import Split
from qlab.errors import CheckpointError, InputError

__all__ = ["BatchLoader", "take"]


def take(split: Split, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the samples `rows` of a part on `device`: indexed where the part lies, then moved."""
    x = split.x.index_select(0, rows.to(split.x.device)).to(device, non_blocking=True)
    y = split.y.index_select(0, rows.to(split.y.device)).to(device, non_blocking=True)
    return x, y


class BatchLoader:
    """An iterable of ready batches `(x, y)`: x normalised float32 (N, C, H, W) or (N, D), y int64 (N,).

    The last batch may be smaller. When shuffling it is left out if it would be a single sample, which batch norm cannot
    normalise.

    With `world_size` processes, process `rank` takes every world_size-th sample of the common permutation, so that together
    the processes see what one process with batches of `world_size * batch_size` sees. All have the same number of batches:
    when shuffling, the few samples that remain are left out (others in each epoch); otherwise the first few samples are
    repeated, at most `world_size - 1`.

    Args:
        split: the tensors that `rows` refers to, on any device.
        rows: (M,) int64, the samples to go through; None for all.
        transform: maps raw inputs to normalised float.
        batch_size: samples per batch and process.
        shuffle: draw a permutation for each epoch; else the order of `rows`.
        seed: of permutations and augmentation.
        augment: applied to each batch, or None.
        device: where batches come out.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        InputError: there are fewer samples than processes.
    """

    batch_sampler = None  # Lightning asks every loader that has a sampler

    def __init__(
        self,
        split: Split,
        rows: Tensor | None,
        transform: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augmentation | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split = split
        self.rows = torch.arange(len(split)) if rows is None else rows
        self.transform = transform
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._next = 0  # number of batches given out in this epoch
        self._resume = False  # whether the next iteration starts at batch `_next` instead of 0
        if 0 < len(self.rows) < world_size:
            raise InputError(f"{len(self.rows)} samples cannot be dealt out to {world_size} processes: use fewer.")

    @property
    def sampler(self) -> BatchLoader:
        """The loader itself: Lightning looks here for `set_epoch`."""
        return self

    @property
    def num_samples(self) -> int:
        """Samples that this process goes through in one epoch."""
        samples = len(self.rows) // self.world_size if self.shuffle else -(-len(self.rows) // self.world_size)
        single = self.shuffle and self.batch_size > 1 and samples > 1 and samples % self.batch_size == 1
        return samples - 1 if single else samples

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def order(self) -> Tensor:
        """Return the samples of this process in the order of the present epoch: (num_samples,) int64, rows of `split`."""
        n = len(self.rows)
        if self.shuffle:
            order = torch.randperm(n, generator=generator("order", self.seed, self.epoch))
        else:
            order = torch.arange(n + -n % self.world_size) % max(n, 1)
        return self.rows[order[self.rank :: self.world_size][: self.num_samples]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: nothing below runs before the first batch is asked for (see the module's docstring).
        start = self._next if self._resume else 0
        self._resume = False
        epoch = self.epoch
        rows = self.order().to(self.split.x.device)
        for batch in range(start, len(self)):
            self._next = batch + 1
            yield self._batch(rows[batch * self.batch_size : (batch + 1) * self.batch_size], epoch, batch)

    def _batch(self, rows: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        x, y = take(self.split, rows, self.device)
        draws = generator("augment", self.seed, epoch, batch, self.rank)
        return augmented(x, self.transform, self.augment, draws), y

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next. The epoch that was loaded with `load_state_dict` continues where it stood."""
        if epoch != self.epoch:
            self._next = 0
            self._resume = False
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, and what that position depends on; the same for every rank."""
        return {"epoch": self.epoch, "batch": self._next, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            CheckpointError: the state was written in the middle of an epoch of another set, batch size or seed, where a
                position means nothing.
        """
        epoch, batch = int(state["epoch"]), int(state["batch"])
        different = [
            f"{key}={state.get(key)} (now {now})" for key, now in self._identity().items() if state.get(key) != now
        ]
        if different and 0 < batch < -(-int(state["samples"]) // int(state["batch_size"])):
            raise CheckpointError(
                f"the run was stopped after batch {batch} of epoch {epoch} with {', '.join(different)}. Resume it with the "
                "same data options, or from a checkpoint that was written at the end of an epoch."
            )
        self.epoch = epoch
        self._next = batch
        self._resume = True

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "samples": self.num_samples,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }
