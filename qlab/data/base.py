"""`DataModule`: what every data set promises, on top of one method that reads it.

A set is a subclass with `read() -> Source`. Everything else is here and the same for all: the cut into train, val and test,
normalisation, augmentation, loaders.

    transform(x) = (x / 255 - mean) / std      per channel, mean and std of the training part (without the 255 for floats)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from qlab.data.augment import Augmentation, augmented
from qlab.data.loader import BatchLoader, take
from qlab.data.seeding import generator
from qlab.data.splits import Source, Split, channel_statistics, strata, stratified_order
from qlab.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from qlab.data.arrays import ArrayData, Arrays

__all__ = ["DataModule", "whole_number"]

TEST_FRACTION = 0.2  # of a set that has no test part of its own
TEST_SEED = 0  # never the user's seed: every run is tested on the same samples


def whole_number(option: str, value: object, least: int) -> int:
    """Return `value` if it is an int of at least `least`, else raise InputError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{option} must be a whole number of at least {least}, got {value!r}.")
    return value


class DataModule(pl.LightningDataModule):
    """A data set: its parts as raw tensors, and loaders of normalised batches on the training device.

    Args:
        batch_size: samples per batch and process.
        val_fraction: share of the training samples that is held out for validation, in [0, 1); not used by a set that has a
            validation part of its own.
        seed: decides the validation part, the subset, the order of the batches and their augmentation; not the test part.
        augment: True for random crop and, where a mirrored picture keeps its class, random mirror; False for none; None for
            what is usual for the set.
        subset: train on this many samples only, each class in proportion.
        root: folder that holds the files, instead of the places where they are sought otherwise.
        cutout: side of a random square to erase from every training picture, pixels; 0 for none.

    Raises:
        InputError: an option out of range, at once; a set that is empty, holds NaN or has fewer training samples than classes,
            when it is first used.
    """

    name: str
    default_augment: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False  # whether a mirrored picture keeps its class
    crop_padding: ClassVar[int] = 4
    takes_root: ClassVar[bool] = False

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        root: str | None = None,
        cutout: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = whole_number("batch_size", batch_size, 1)
        if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction must be in [0, 1), got {val_fraction!r}.")
        self.val_fraction = float(val_fraction)
        self.seed = whole_number("seed", seed, 0)
        if augment is not None and not isinstance(augment, bool):
            raise InputError(f"augment must be True, False or None (the default of the set), got {augment!r}.")
        self.augment = augment
        self.subset = None if subset is None else whole_number("subset", subset, 1)
        if root is not None and not self.takes_root:
            raise InputError(f"data set {self.name!r} comes without files, so it takes no root; got root={root!r}.")
        self.root = None if root is None else os.fspath(root)
        self.cutout = whole_number("cutout", cutout, 0)
        if cutout and augment is False:
            raise InputError(f"cutout={cutout} contradicts augment=False: leave augment out, or set cutout=0.")
        # Filled in by hand: `save_hyperparameters` would gather a caller's arrays from the frames above, and log names (seed)
        # that a method logs too, which Lightning refuses.
        self.hparams.update(
            {
                "batch_size": self.batch_size,
                "val_fraction": self.val_fraction,
                "seed": self.seed,
                "augment": self.augment,
                "subset": self.subset,
                "root": self.root,
                "cutout": self.cutout,
            }
        )
        self._copies: dict[tuple[int, torch.device], Split] = {}

    @staticmethod
    def from_arrays(
        x: Arrays,
        y: Arrays,
        x_test: Arrays | None = None,
        y_test: Arrays | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> ArrayData:
        """Return a data set of your own arrays or tensors.

        Args:
            x: uint8 images (N, H, W) or (N, C, H, W), or floats (N, C, H, W) or (N, D).
            y: (N,) whole numbers from 0 to number of classes - 1.
            x_test: like x; None sets a fifth of x aside.
            y_test: like y.
            class_names: one per class.
            **options: `batch_size`, `val_fraction`, `seed`, `augment`, `subset`, `cutout`, see `DataModule`.

        Raises:
            InputError: for wrong shapes or types, NaN or infinity (with their count and the first place), a class without samples.
        """
        from qlab.data.arrays import ArrayData

        return ArrayData(x, y, x_test, y_test, class_names, **options)

    # ---- to be written by a set

    def read(self) -> Source:
        """Read the set from wherever it lies."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Bring the files to this machine: called in one process per machine, before `read` is called in all."""

    # ---- what Lightning calls

    def prepare_data(self) -> None:
        """Download or decode what is not yet on this machine."""
        if "_parts" not in self.__dict__:
            self.fetch()

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the set, once."""
        _ = self._parts

    def train_dataloader(self) -> BatchLoader:
        """Return the shuffled, augmented batches of the training part."""
        return self._loader("train", shuffle=True, augment=self.augmentation)

    def val_dataloader(self) -> BatchLoader:
        """Return the batches of the validation part in fixed order; none where val_fraction is 0."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Return the batches of the test part in fixed order."""
        return self._loader("test")

    # ---- what the set is

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W), (D,), or (T,) of tokens."""
        return tuple(self._source.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self._source.class_names

    @property
    def mean(self) -> Tensor:
        """Mean of every channel over the training part, (C,) or (D,), on the [0, 1] scale for uint8."""
        return self._statistics[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation of every channel over the training part, like `mean`."""
        return self._statistics[1]

    @property
    def augmentation(self) -> Augmentation | None:
        """What is done to training batches, or None."""
        moves = self.default_augment if self.augment is None else self.augment
        if not moves and not self.cutout:
            return None
        if len(self.input_shape) != 3:
            raise InputError(
                f"{self.name!r} has inputs of shape {self.input_shape}; only images (C, H, W) can be augmented."
            )
        return Augmentation(
            padding=self.crop_padding if moves else 0, mirror=moves and self.mirrors, cutout=self.cutout
        )

    def num_samples(self, part: str) -> int:
        """Return the number of samples of "train", "val" or "test"."""
        split, rows = self._part(part)
        return len(split) if rows is None else len(rows)

    def split(self, part: str, samples: int | None = None) -> Split:
        """Return the raw tensors of "train", "val" or "test" on the CPU.

        A part that is stored as such is returned as it lies (do not write into it); one that is cut out of another is a copy.

        Args:
            part: which.
            samples: only so many of them, mixed, each class in proportion, as is every beginning of them; always the same ones.
                A set may lie sorted by class: its first samples are no sample.
        """
        split, rows = self._part(part)
        if samples is not None:
            whole_number("samples", samples, 1)
            y = split.y if rows is None else split.y[rows]
            some = stratified_order(strata(y), generator("samples", TEST_SEED))[:samples]
            rows = some if rows is None else rows[some]
        return split if rows is None else Split(*take(split, rows, torch.device("cpu")))

    def transform(self, x: Tensor) -> Tensor:
        """Normalise raw inputs; differentiable where x is a float.

        Args:
            x: (N, *input_shape); uint8, or float on the [0, 1] scale for sets that are stored as uint8.

        Returns:
            Float tensor of the same shape on the same device.

        Raises:
            InputError: for inputs of another shape.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise InputError(f"{self.name!r} has inputs (N, {str(self.input_shape)[1:]}, got {tuple(x.shape)}.")
        shape = (-1, *(1,) * (x.ndim - 2))
        mean, std = (value.to(x.device).view(shape) for value in self._statistics)
        if x.dtype == torch.uint8:
            return x.to(torch.float32).div_(255).sub_(mean).div_(std)
        return (x - mean) / std

    def calibration(self, batches: int) -> list[Tensor]:
        """Return a fixed sequence of training inputs, normalised and augmented as in training, for batch-norm statistics.

        Augmented, because the net was trained behind statistics of such inputs and is another function behind others: random crops
        have black edges. ResNet-20 after 3 epochs of 10,000 CIFAR-10 pictures, in float: 44.6 % on the test part as trained, 44.5 %
        with statistics of augmented inputs, 39.7 % with those of inputs as they lie.

        Args:
            batches: how many batches; fewer come back where the training part ends before.

        Returns:
            Tensors (batch_size, *input_shape) on the training device. No sample occurs twice.
        """
        whole_number("batches", batches, 1)
        device, _, _ = self._target()
        split, rows = self._part("train")
        order = torch.randperm(self.num_samples("train"), generator=generator("calibration", self.seed))
        order = order if rows is None else rows[order]
        found = []
        for number, chunk in enumerate(order.split(self.batch_size)[:batches]):
            x, draws = take(split, chunk, device)[0], generator("calibration", self.seed, number)
            found.append(augmented(x, self.transform, self.augmentation, draws))
        return found

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.hparams.items())
        return f"{type(self).__name__}({options})"

    __str__ = __repr__  # Lightning's would build every loader

    # ---- inside

    def _part(self, part: str) -> tuple[Split, Tensor | None]:
        if part not in ("train", "val", "test"):
            raise UnknownNameError("part", part, ("train", "val", "test"))
        return self._parts[part]

    @cached_property
    def _source(self) -> Source:
        source = self.read()
        for part in ("train", "val", "test"):
            split = getattr(source, part)
            if split is not None:
                _check(f"{self.name} ({part})", split, source)
        return source

    @cached_property
    def _parts(self) -> dict[str, tuple[Split, Tensor | None]]:
        """Of each part the tensors it lies in and its rows there; None stands for all rows in their order."""
        source = self._source
        train, val, test = source.train, source.val, source.test
        rows = torch.arange(len(train))
        parts: dict[str, tuple[Split, Tensor | None]] = {}

        if test is not None:
            parts["test"] = (test, None)
        else:
            held_out, rows = _cut(train.y, rows, TEST_FRACTION, generator("test", TEST_SEED))
            parts["test"] = (train, held_out)
        if val is not None:
            parts["val"] = (val, None)
        else:
            held_out, rows = _cut(train.y, rows, self.val_fraction, generator("val", self.seed))
            parts["val"] = (train, held_out)
        if self.subset is not None:
            if self.subset > len(rows):
                raise InputError(f"subset={self.subset} of {self.name!r}, which has {len(rows)} training samples.")
            order = stratified_order(strata(train.y)[rows], generator("subset", self.seed))
            rows = rows[order[: self.subset].sort().values]
        if len(rows) < (self.num_classes if train.y.ndim == 1 else 1):  # a window holds many labels
            raise InputError(
                f"{self.name!r} is left with {len(rows)} training samples for {self.num_classes} classes: "
                "give it more samples, a larger subset or a smaller val_fraction."
            )
        parts["train"] = (train, None if len(rows) == len(train) else rows)
        return parts

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        split, rows = self._parts["train"]
        return channel_statistics(split.x, rows)

    def _target(self) -> tuple[torch.device, int, int]:
        """Device, rank and world size of the trainer; the CPU on its own without one."""
        if self.trainer is None:
            return torch.device("cpu"), 0, 1
        return self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size

    def _loader(self, part: str, shuffle: bool = False, augment: Augmentation | None = None) -> BatchLoader:
        device, rank, world_size = self._target()
        split, rows = self._part(part)
        return BatchLoader(
            self._on(device, split),
            rows,
            self.transform,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            augment=augment,
            device=device,
            rank=rank,
            world_size=world_size,
        )

    def _on(self, device: torch.device, split: Split) -> Split:
        """Return the part on `device`, moved there once, or where it lies if it is too large for that."""
        if device.type == "cpu" or not _fits(device, split.x):
            return split
        key = (id(split), device)
        if key not in self._copies:
            self._copies[key] = Split(split.x.to(device), split.y.to(device))
        return self._copies[key]


def _fits(device: torch.device, x: Tensor) -> bool:
    """Whether a part may live on the device: in at most a quarter of its free memory; 1 GiB where that is not known."""
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 1 << 30
    return x.numel() * x.element_size() <= room


def _cut(y: Tensor, rows: Tensor, fraction: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a stratified fraction off `rows`: what is cut off and what is left, both ascending. At least one sample if any."""
    count = max(1, round(fraction * len(rows))) if fraction else 0
    order = stratified_order(strata(y)[rows], draws)
    return rows[order[:count].sort().values], rows[order[count:].sort().values]


def _check(what: str, split: Split, source: Source) -> None:
    """Refuse tensors that no method can train on."""
    x, y = split.x, split.y
    tokens = x.dtype == torch.int64 and x.ndim == 2
    if not tokens and (x.ndim not in (2, 4) or x.dtype not in (torch.uint8, torch.float32)):
        raise InputError(
            f"{what}: inputs must be (N, C, H, W) or (N, D), uint8 or float32, or tokens (N, T) int64; got "
            f"{tuple(x.shape)} {x.dtype}."
        )
    if len(x) == 0 or x[0].numel() == 0:
        raise InputError(f"{what} is empty: inputs have shape {tuple(x.shape)}.")
    if y.dtype != torch.int64 or y.shape != (x.shape if tokens else x.shape[:1]):
        needed = f"{tuple(x.shape)}" if tokens else f"{len(x)}"
        raise InputError(f"{what}: {len(x)} inputs need {needed} int64 labels, got {tuple(y.shape)} {y.dtype}.")
    if x.shape[1:] != source.train.x.shape[1:]:
        raise InputError(
            f"{what}: inputs are {tuple(x.shape[1:])}, those to train on {tuple(source.train.x.shape[1:])}."
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= len(source.class_names):
        raise InputError(f"{what}: labels must be 0 to {len(source.class_names) - 1}, found {low} to {high}.")
    if x.is_floating_point():
        bad = ~torch.isfinite(x)
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise InputError(
                f"{what}: {int(bad.sum())} of {x.numel()} input values are NaN or infinite, the first at index {first}. "
                "Remove these samples or fill the values in."
            )
