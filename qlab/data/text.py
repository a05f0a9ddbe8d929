"""Text for language models: windows of T symbols, and of each symbol the one that comes next.

    x[n] = s[nT], ..., s[nT + T - 1]        y[n] = s[nT + 1], ..., s[nT + T]        s the stream of the text's symbols

The task is to predict y[n, t] from x[n, 0 .. t]; a net starts every window anew. With the mean cross-entropy L in nats,

    perplexity = exp(L)        bits per symbol = L / ln 2

Symbols are characters, or words: what stands between blanks, with `<eos>` at the end of every line that is not empty. The
vocabulary holds the most frequent symbols of all parts together, most frequent first; the others become `<unk>`.

`text` is the text that comes with Python (the help on the language, `pydoc_data.topics`: about 465,000 characters in Python
3.11, other versions differ a little), or a file of your own. Its last fifth is the test part, for every seed; validation
windows are drawn from the rest. `penn_treebank` is a folder with the three files of Mikolov et al. (2010), which are not
shipped: one sentence a line, rare words already `<unk>`, 10,000 words with `<eos>`.

Shapes: x and y (N, T) int64; no part is longer than its text, the symbols that fill no window are left out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qlab.data.base import TEST_FRACTION, DataModule, whole_number
from qlab.data.splits import Source, Split
from qlab.errors import DataFileError, DataNotFoundError, InputError

__all__ = ["PennTreebank", "Text", "bits_per_symbol", "perplexity"]

Unit: TypeAlias = Literal["character", "word"]
Parts: TypeAlias = tuple[str, str | None, str | None]

END, UNKNOWN = "<eos>", "<unk>"


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean cross-entropy in nats: how many equally likely symbols would be as hard to predict."""
    return math.exp(loss) if loss < 709 else math.inf  # the largest exponent of a double


def bits_per_symbol(loss: float) -> float:
    """Return loss / ln 2 of a mean cross-entropy in nats."""
    return loss / math.log(2)


class _Corpus(DataModule):
    """A text in up to three parts, as windows of symbols; see the module's docstring."""

    def __init__(
        self,
        unit: Unit,
        length: int,
        vocabulary: int,
        batch_size: int,
        val_fraction: float,
        seed: int,
        augment: bool | None,
        subset: int | None,
        root: str | None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, augment, subset, root)
        if unit not in ("character", "word"):
            raise InputError(f"unit must be 'character' or 'word', got {unit!r}.")
        self.unit = unit
        self.length = whole_number("length", length, 1)
        self.vocabulary = whole_number("vocabulary", vocabulary, 2)
        if augment:
            raise InputError(f"{self.name!r} holds text, not images: there is no augmentation for it.")
        del self.hparams["cutout"]
        self.hparams.update({"unit": self.unit, "length": self.length, "vocabulary": self.vocabulary})

    def texts(self) -> Parts:
        """Return the text to train on, and those to validate and to test on where there are such."""
        raise NotImplementedError

    def read(self) -> Source:
        """Cut the texts into symbols, number them, and cut the numbers into windows."""
        parts = [None if text is None else _symbols(text, self.unit) for text in self.texts()]
        names = _vocabulary([part for part in parts if part is not None], self.vocabulary)
        if len(names) < 2:
            held = f"no {self.unit} but {names[0]!r}" if names else f"no {self.unit} at all"
            raise DataFileError(f"{self.name} holds {held}: there is nothing to predict. Give another text.")
        code = {name: i for i, name in enumerate(names)}
        unknown = code.get(UNKNOWN, -1)
        train, val, test = (
            None if part is None else self._windows([code.get(symbol, unknown) for symbol in part]) for part in parts
        )
        assert train is not None
        if test is None:
            kept = len(train) - max(1, round(TEST_FRACTION * len(train)))
            test = Split(train.x[kept:], train.y[kept:])
            train = Split(train.x[:kept], train.y[:kept])
        return Source(train, tuple(names), test, val)

    def _windows(self, codes: Sequence[int]) -> Split:
        """Return the windows of a part: two views of one stream, one symbol apart."""
        stream = torch.from_numpy(np.array(codes, dtype=np.int64))
        n = (len(stream) - 1) // self.length
        if n < 3:  # one each to train, validate and test
            raise DataFileError(
                f"{self.name} has a part of {len(stream)} {self.unit}s; windows of {self.length} need at least "
                f"{3 * self.length + 1}. Give a longer text, or a smaller length."
            )
        shape = (n, self.length)
        return Split(stream[: n * self.length].view(shape), stream[1 : n * self.length + 1].view(shape))

    def transform(self, x: Tensor) -> Tensor:
        """Return the tokens as they are: there is nothing to normalise.

        Raises:
            InputError: for inputs of another shape or type.
        """
        if x.dtype != torch.int64 or x.shape[1:] != (self.length,):
            raise InputError(f"{self.name!r} has inputs (N, {self.length}) int64, got {tuple(x.shape)} {x.dtype}.")
        return x

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        raise InputError(f"{self.name!r} holds tokens, which have no mean and no deviation.")

    def decode(self, tokens: Tensor) -> str:
        """Return tokens of any shape as text: words with blanks between them, `<eos>` as the end of a line."""
        symbols = [self.class_names[int(t)] for t in tokens.reshape(-1)]
        if self.unit == "character":
            return "".join(symbols)
        return " ".join(symbols).replace(f" {END} ", "\n").replace(f" {END}", "\n").replace(f"{END} ", "\n")


class Text(_Corpus):
    """The text that comes with Python, or a text file of your own.

    Args:
        path: a text file in UTF-8; None for the text that comes with Python.
        unit: what a symbol is, "character" or "word".
        length: T, symbols of a window.
        vocabulary: at most so many different symbols.
        batch_size: windows per batch and process.
        val_fraction: see `DataModule`, as are the others.

    Raises:
        DataNotFoundError: there is no such file.
        DataFileError: it is not UTF-8, too short, or holds one symbol only.
    """

    name = "text"

    def __init__(
        self,
        path: str | None = None,
        unit: Unit = "character",
        length: int = 40,
        vocabulary: int = 10_000,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        root: str | None = None,
    ) -> None:
        if root is not None:
            raise InputError(f"data set 'text' takes no root; name the file itself: path=... (got root={root!r}).")
        super().__init__(unit, length, vocabulary, batch_size, val_fraction, seed, augment, subset, None)
        self.path = None if path is None else os.fspath(path)
        self.hparams.update({"path": self.path})

    def texts(self) -> Parts:
        """Return the text in one part."""
        if self.path is not None:
            return _file(Path(self.path)), None, None
        from pydoc_data.topics import topics

        return "".join(topics.values()), None, None


class PennTreebank(_Corpus):
    """The Penn Treebank as prepared by Mikolov et al.: `ptb.train.txt`, `ptb.valid.txt`, `ptb.test.txt`.

    Args:
        root: folder with the three files; None for `penn_treebank` or `ptb` in the folder `QLAB_DATA`.
        unit: what a symbol is, "character" or "word".
        length: T, symbols of a window.
        vocabulary: at most so many different symbols.
        batch_size: windows per batch and process.
        val_fraction: not used, for the set has a validation part of its own.
        seed: see `DataModule`, as are the others.

    Raises:
        DataNotFoundError: the files are not there; says where they were sought.
        DataFileError: one is not UTF-8, too short, or holds one symbol only.
    """

    name = "penn_treebank"
    takes_root = True

    def __init__(
        self,
        unit: Unit = "word",
        length: int = 35,
        vocabulary: int = 10_000,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool | None = None,
        subset: int | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__(unit, length, vocabulary, batch_size, val_fraction, seed, augment, subset, root)

    def texts(self) -> Parts:
        """Return the three parts."""
        data = os.environ.get("QLAB_DATA")
        places = [Path(data, folder) for folder in ("penn_treebank", "ptb")] if data else []
        if self.root is not None:
            places = [Path(self.root)]
        for place in places:
            if (place / "ptb.train.txt").is_file():
                train, valid, test = (_file(place / f"ptb.{part}.txt") for part in ("train", "valid", "test"))
                return train, valid, test
        sought = ", ".join(map(str, places)) or "$QLAB_DATA (not set)"
        raise DataNotFoundError(
            f"data set 'penn_treebank': ptb.train.txt was not found. Sought in: {sought}. Put ptb.train.txt, ptb.valid.txt and "
            "ptb.test.txt into a folder F/penn_treebank and set QLAB_DATA=F, or give that folder as root=..."
        )


def _file(path: Path) -> str:
    """Return the text of a file in UTF-8, its ends of lines as newlines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path} cannot be read: {error.strerror}. Give the path of a text file.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"{path} is not UTF-8 (byte {error.start} of {len(content)}): save it as UTF-8 text."
        ) from None
    if not text.strip():
        raise DataFileError(f"{path} is empty ({len(content)} bytes): give a text file.")
    return text.replace("\r\n", "\n")


def _symbols(text: str, unit: Unit) -> Sequence[str]:
    if unit == "character":
        return text
    return [word for line in text.splitlines() if (words := line.split()) for word in (*words, END)]


def _vocabulary(parts: Sequence[Sequence[str]], largest: int) -> list[str]:
    """Return the symbols of all parts, most frequent first, equal ones in alphabetical order; `<unk>` last where some are cut."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part)
    names = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
    if len(names) <= largest:
        return names
    return [*[name for name in names if name != UNKNOWN][: largest - 1], UNKNOWN]
