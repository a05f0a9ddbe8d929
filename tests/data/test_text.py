"""Text as windows of symbols: what comes next, where parts are cut, and which texts are refused."""

import math
from pydoc_data.topics import topics

import pytest
import torch

import qlab.data
from qlab.data import DATA
from qlab.data.text import bits_per_symbol, perplexity
from qlab.errors import DataFileError, DataNotFoundError, InputError
from qlab.experiments.inputs import data_digest

SENTENCES = "the cat sat on the mat\nthe <unk> sat on the cat\n"


@pytest.fixture(scope="module")
def shipped():
    return qlab.data.load("text")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def whole(data):
    """All windows in the order of the text; val_fraction must be 0."""
    return torch.cat([data.split(part).x for part in ("train", "test")])


def treebank(folder, **parts):
    for part in ("train", "valid", "test"):
        write(folder / f"ptb.{part}.txt", parts.get(part, SENTENCES * 10))
    return str(folder)


# ---- windows


def test_shipped_text_is_that_of_python():
    data = qlab.data.load("text", val_fraction=0)
    text = "".join(topics.values())
    assert data.decode(whole(data)) == text[: len(text) // 40 * 40]
    assert data.num_classes == len(set(text))
    assert data.input_shape == (40,)


def test_label_of_every_symbol_is_the_one_that_comes_next():
    data = qlab.data.load("text", val_fraction=0)
    stream = whole(data).reshape(-1)
    labels = torch.cat([data.split(part).y for part in ("train", "test")]).reshape(-1)
    assert torch.equal(labels[:-1], stream[1:])


def test_test_part_is_the_last_fifth_for_every_seed(shipped):
    other = qlab.data.load("text", seed=5)
    assert torch.equal(shipped.split("test").x, other.split("test").x)
    assert not torch.equal(shipped.split("val").x, other.split("val").x)
    whole_text = qlab.data.load("text", val_fraction=0)
    n = sum(whole_text.num_samples(part) for part in ("train", "test"))
    assert whole_text.num_samples("test") == round(n / 5)
    assert torch.equal(whole(whole_text)[-round(n / 5) :], shipped.split("test").x)


def test_parts_share_no_window_and_are_the_whole(shipped):
    parts = {part: shipped.split(part) for part in ("train", "val", "test")}
    whole_text = qlab.data.load("text", val_fraction=0)
    rows = torch.cat([part.x for part in parts.values()])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, whole(whole_text).tolist()))
    assert len(parts["val"]) == round(0.1 * whole_text.num_samples("train"))


def test_vocabulary_is_ordered_by_frequency(shipped):
    text = "".join(topics.values())
    counts = [text.count(symbol) for symbol in shipped.class_names]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == len(text)


def test_rare_symbols_become_unknown(tmp_path):
    path = write(tmp_path / "a.txt", "aaaabbbccd" * 20)
    data = qlab.data.load("text", path=path, length=5, vocabulary=3, val_fraction=0)
    assert data.class_names == ("a", "b", "<unk>")
    assert data.decode(whole(data)[:2]) == "aaaabbb<unk><unk><unk>"


def test_words_end_their_line_with_a_symbol_and_empty_lines_have_none(tmp_path):
    path = write(tmp_path / "a.txt", "one  two\r\n\n three\n" * 8)
    data = qlab.data.load("text", path=path, unit="word", length=5, val_fraction=0)
    assert set(data.class_names) == {"one", "two", "three", "<eos>"}
    assert data.decode(whole(data)[0]) == "one two\nthree\n"


def test_byte_order_mark_and_windows_line_ends_are_no_symbols(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + b"ab\r\n" * 40)
    assert set(qlab.data.load("text", path=path, length=4).class_names) == {"a", "b", "\n"}


def test_batches_are_seeded_and_tokens_come_as_they_are(shipped):
    first, again = (list(qlab.data.load("text", seed=1, subset=300).train_dataloader()) for _ in range(2))
    assert [tuple(x.shape) for x, _ in first] == [(128, 40), (128, 40), (44, 40)]
    for (x, y), (u, v) in zip(first, again, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        assert torch.equal(x[:, 1:], y[:, :-1])
    other = next(iter(qlab.data.load("text", seed=2, subset=300).train_dataloader()))
    assert not torch.equal(other[0], first[0][0])
    assert torch.equal(shipped.calibration(1)[0], shipped.calibration(1)[0])


# ---- Penn Treebank


def test_penn_treebank_keeps_its_three_parts_and_its_unknown_word(tmp_path):
    root = treebank(tmp_path, valid="the dog sat\n" * 40, test="a cat sat\n" * 40)
    data = qlab.data.load("penn_treebank", root=root, length=7)
    assert data.decode(data.split("train").x[:2]) == SENTENCES
    assert data.decode(data.split("val").x[0]) == "the dog sat\nthe dog sat"
    assert data.decode(data.split("test").x[0, :4]) == "a cat sat\n"
    assert set(data.class_names) == {"the", "cat", "sat", "on", "mat", "<unk>", "dog", "a", "<eos>"}
    assert data.num_samples("train") == (140 - 1) // 7


@pytest.mark.parametrize("folder", ["penn_treebank", "ptb"])
def test_penn_treebank_is_found_in_the_data_folder(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    treebank(tmp_path / folder)
    monkeypatch.setenv("QLAB_DATA", str(tmp_path))
    assert qlab.data.load("penn_treebank").num_samples("test") == (140 - 1) // 35


def test_missing_treebank_says_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.delenv("QLAB_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match=r"not set.*set QLAB_DATA=F"):
        qlab.data.load("penn_treebank").setup()
    with pytest.raises(DataNotFoundError, match=str(tmp_path)):
        qlab.data.load("penn_treebank", root=tmp_path).setup()


def test_treebank_without_a_part_names_the_file(tmp_path):
    root = treebank(tmp_path)
    (tmp_path / "ptb.test.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"ptb\.test\.txt cannot be read"):
        qlab.data.load("penn_treebank", root=root).setup()


# ---- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\xff\xfe" * 99, "not UTF-8 .byte 3 of 495"),
        (b"abcdefgh" * 15, "a part of 120 characters; windows of 40 need at least 121"),
        (b"a" * 1000, "no character but 'a'"),
    ],
)
def test_a_text_that_makes_no_set_is_refused(tmp_path, content, message):
    with pytest.raises(DataFileError, match=message):
        qlab.data.load("text", path=write(tmp_path / "a.txt", content)).setup()


def test_shortest_text_has_one_window_for_each_part(tmp_path):
    data = qlab.data.load("text", path=write(tmp_path / "a.txt", "abcdefgh" * 15 + "a"))
    assert [data.num_samples(part) for part in ("train", "val", "test")] == [1, 1, 1]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"nowhere\.txt cannot be read"):
        qlab.data.load("text", path=tmp_path / "nowhere.txt").setup()
    with pytest.raises(DataNotFoundError, match="Give the path of a text file"):
        qlab.data.load("text", path=tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "letter"}, "unit must be"),
        ({"length": 0}, "length"),
        ({"vocabulary": 1}, "vocabulary"),
        ({"augment": True}, "no augmentation"),
        ({"root": "folder"}, "takes no root; name the file itself"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        qlab.data.load("text", **options)


def test_inputs_of_another_shape_or_type_are_refused(shipped):
    with pytest.raises(InputError, match=r"inputs \(N, 40\) int64, got \(2, 41\)"):
        shipped.transform(torch.zeros(2, 41, dtype=torch.int64))
    with pytest.raises(InputError, match=r"int64, got .* torch\.float32"):
        shipped.transform(torch.zeros(2, 40))
    with pytest.raises(InputError, match="no mean"):
        _ = shipped.mean


def test_subset_takes_windows_and_a_set_may_have_fewer_of_them_than_symbols():
    assert qlab.data.load("text", subset=5).num_samples("train") == 5
    with pytest.raises(InputError, match="subset=999999"):
        qlab.data.load("text", subset=999_999).setup()


# ---- what is made of it


def test_uniform_guess_has_the_perplexity_of_the_number_of_symbols():
    loss = torch.nn.functional.cross_entropy(torch.zeros(3, 16, 5), torch.randint(16, (3, 5))).item()
    assert perplexity(loss) == pytest.approx(16, rel=1e-6)
    assert bits_per_symbol(loss) == pytest.approx(4, rel=1e-6)
    assert perplexity(1e4) == math.inf


def test_experiments_recognise_a_text_by_every_symbol(tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_DATA", str(tmp_path))
    (tmp_path / "ptb").mkdir()
    digests = []
    swapped = "the cat on sat the mat\n" + SENTENCES.splitlines(keepends=True)[1] + SENTENCES * 9
    for text in (SENTENCES * 10, SENTENCES * 10, swapped):
        treebank(tmp_path / "ptb", train=text)
        digests.append(data_digest("penn_treebank"))
    assert digests[0] == digests[1] != digests[2]
    assert data_digest("text") == data_digest("text")


def test_text_stands_on_the_shelf_as_text():
    assert {name for name, entry in DATA.items() if entry.kind == "text"} == {"text", "penn_treebank"}
