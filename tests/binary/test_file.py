"""Packed nets on disk: the same bits come back, and nothing that was changed loads."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlab.binary import file, shapes
from qlab.binary.certificate import digest
from qlab.binary.graph import OPS
from qlab.binary.packed import PackedNet, compile
from qlab.errors import InputError, PackedFileError
from tests.strategies import Small, damaged, deployed, edited, rebuilt, replaced, taken_apart

BATCH = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
FUZZ = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.fixture(scope="module")
def packed() -> PackedNet:
    torch.manual_seed(0)
    net = compile(deployed(Small(), (2, 8, 8)), BATCH)
    net.verify(BATCH, ["torch", "numpy"])
    return net


@pytest.fixture(scope="module")
def data(packed: PackedNet, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "net.safetensors"
    packed.save(path)
    return path.read_bytes()


def parsed(data: bytes) -> PackedNet:
    """Return the net of a file's bytes."""
    return file._parse(io.BytesIO(data), len(data))


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_a_loaded_net_has_the_same_graph_certificate_and_logits(packed: PackedNet, tmp_path: Path) -> None:
    packed.save(tmp_path / "net.safetensors")
    loaded = file.load(tmp_path / "net.safetensors")
    assert loaded.graph.steps == packed.graph.steps
    assert loaded.graph.layers == packed.graph.layers
    assert loaded.certificate == packed.certificate
    assert loaded.certificate is not None
    assert loaded.certificate.exact
    for name, tensor in packed.graph.tensors.items():
        assert loaded.graph.tensors[name].dtype == tensor.dtype
        assert loaded.graph.tensors[name].flags.writeable
        np.testing.assert_array_equal(loaded.graph.tensors[name], tensor)
    assert torch.equal(loaded(BATCH, "numpy"), packed(BATCH, "torch"))


def test_a_new_process_gives_the_same_bits(packed: PackedNet, tmp_path: Path) -> None:
    packed.save(tmp_path / "net.safetensors")
    np.save(tmp_path / "batch.npy", BATCH.numpy())
    code = (
        "import numpy, torch; from qlab.binary.certificate import digest; from qlab.binary.file import load;"
        "x = torch.from_numpy(numpy.load('batch.npy')); print(digest(load('net.safetensors')(x, 'numpy')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(packed(BATCH, "torch"))


def test_saving_twice_writes_the_same_bytes(packed: PackedNet, data: bytes, tmp_path: Path) -> None:
    packed.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data
    file.load(tmp_path / "again").save(tmp_path / "once more")
    assert (tmp_path / "once more").read_bytes() == data


def test_any_safetensors_reader_reads_the_tensors(packed: PackedNet, tmp_path: Path) -> None:
    packed.save(tmp_path / "net.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "net.safetensors")
    assert set(tensors) == set(packed.graph.tensors)
    for name, tensor in packed.graph.tensors.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    packed: PackedNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed.save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_full_disk_is_reported_and_leaves_the_old_file(
    packed: PackedNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        packed.save(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_old_file_is_exchanged_not_written_into(packed: PackedNet, tmp_path: Path) -> None:
    path, other = tmp_path / "net.safetensors", tmp_path / "other name"
    path.write_bytes(b"old")
    other.hardlink_to(path)
    packed.save(path)
    assert other.read_bytes() == b"old"
    assert file.load(path).graph.steps == packed.graph.steps


def test_a_path_that_cannot_be_written_is_refused(packed: PackedNet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        packed.save(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        packed.save(tmp_path / "missing" / "net.safetensors")


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, "null\0byte"):
        with pytest.raises(PackedFileError, match="cannot read"):
            file.load(path)


# ---- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: b"", "too few"),
        (lambda d: d[:-1], "take"),
        (lambda d: d + b"\0", "take"),
        (lambda d: d[:50], "truncated"),
        (lambda d: (2**63).to_bytes(8, "little") + d[8:], "more than"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "SHA-256 differs"),
        (lambda d: d.replace(b'\\"fused\\":false', b'\\"fused\\":true ', 1), "not written as it should be"),
        (lambda d: replaced(d, b'\\"groups\\":1', b'\\"groups\\":1,\\"groups\\":1'), "needs a file of"),
        (lambda d: replaced(d, b'\\"groups\\":1', b'\\"groups\\":1e999'), "not written as it should be"),
        (lambda d: replaced(d, b'\\"groups\\":1', b'\\"groups\\":NaN'), "NaN is no number of JSON"),
        (lambda d: replaced(d, b'\\"groups\\":1', b'\\"groups\\":' + b"9" * 20), "an integer of 20 digits"),
        (
            lambda d: replaced(d, b'\\"layers\\":[', b'\\"layers\\":' + b"[" * 20_000) + bytes(500_000),
            "nested too deeply",
        ),
        (lambda d: replaced(d, b"{", b'{"a":' + b"[" * 20_000) + bytes(500_000), "nested too deeply"),
        (lambda d: replaced(d, b"{", b'{"a":' + b"[" * 100_000), "needs a file of"),
        (lambda d: d.replace(b'\\"output\\":\\"v1', b'\\"output\\":\\"v2', 1), "the digest is another"),
    ],
)
def test_each_kind_of_damage_is_named(data: bytes, edit: object, message: str) -> None:
    with pytest.raises(PackedFileError, match=message):
        parsed(edit(data))  # type: ignore[operator]


def test_a_key_that_stands_twice_is_refused_where_there_is_room_for_it(tmp_path: Path) -> None:
    compile(deployed("mlp", (1, 8, 8), hidden=(256, 256)), torch.zeros(1, 1, 8, 8)).save(tmp_path / "net")
    whole = (tmp_path / "net").read_bytes()
    assert parsed(whole)
    twice = replaced(whole, b'\\"image\\":false', b'\\"image\\":false,\\"image\\":false')
    with pytest.raises(PackedFileError, match="not written as it should be"):
        parsed(twice)


def test_another_version_says_to_update(data: bytes) -> None:
    content, tensors = taken_apart(data)
    with pytest.raises(PackedFileError, match=r"version 3 of the format; this qlab reads 2\. Update"):
        parsed(rebuilt({**content, "version": 3}, tensors))
    with pytest.raises(PackedFileError, match=r"version 1 of the format; this qlab reads 2\. Compile the net again"):
        parsed(rebuilt({**content, "version": 1}, tensors))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("examples", "3"),
        ("outputs", {"numpy": "0" * 64}),
        ("outputs", {"torch": 1}),
        ("source", {"differing logits": 0}),
        ("float_sums", {"onnxruntime": {"differing logits": 0}}),
        ("float_sums", {"onnxruntime": 0.0}),
        ("absent", {"cuda": None}),
        ("more", 1),
    ],
)
def test_a_certificate_that_is_none_is_refused(data: bytes, entry: str, value: object) -> None:
    content, tensors = taken_apart(data)
    content["certificate"][entry] = value
    with pytest.raises(PackedFileError, match="certificate"):
        parsed(rebuilt(content, tensors))


def test_a_description_has_all_its_entries_and_no_other(data: bytes) -> None:
    content, tensors = taken_apart(data)
    for key in set(content) - {"version", "tensors", "digest"}:
        with pytest.raises(PackedFileError, match="lacks an entry"):
            parsed(rebuilt({k: v for k, v in content.items() if k != key}, tensors))
    with pytest.raises(PackedFileError, match="one too many"):
        parsed(rebuilt({**content, "more": 1}, tensors))
    with pytest.raises(PackedFileError, match="does not say its version"):
        parsed(rebuilt({k: v for k, v in content.items() if k != "version"}, tensors))


def test_a_tensor_that_no_step_uses_is_refused(data: bytes) -> None:
    content, tensors = taken_apart(data)
    with pytest.raises(PackedFileError, match="tensors that no step uses"):
        parsed(rebuilt(content, {**tensors, "more": np.zeros(2, np.float32)}))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(PackedFileError, match=r"net\.pt"):
        file.load(path)


def test_no_changed_byte_loads_silently(data: bytes) -> None:
    seen: Counter[str] = Counter()

    @settings(FUZZ, max_examples=2000)
    @given(damaged(data))
    def check(bad: bytes) -> None:
        if bad == data:
            seen["as it was"] += 1
            return
        with pytest.raises(PackedFileError):
            parsed(bad)
        seen["refused"] += 1

    check()
    assert seen["refused"] >= 1500, seen


def test_no_flipped_bit_loads_silently(data: bytes) -> None:
    for at in range(len(data)):
        bad = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        with pytest.raises(PackedFileError):
            parsed(bad)


def test_a_hostile_net_with_right_digests_is_refused_or_runs(data: bytes) -> None:
    seen: Counter[str] = Counter()

    @settings(FUZZ, max_examples=1000)
    @given(edited(data), st.integers(1, 3))
    def check(bad: bytes, batch: int) -> None:
        try:
            net = parsed(bad)
        except PackedFileError:
            seen["refused"] += 1
            return
        sizes = shapes.infer(net.graph, batch)
        if sum(map(prod, sizes.values())) > 2**20:
            seen["too large to run here"] += 1
            return
        x = torch.randn(batch, *net.graph.input_shape, generator=torch.Generator().manual_seed(0))
        expected = net(x, "torch")
        assert expected.shape == sizes[net.graph.output]
        for backend in ("numpy", "numba"):
            try:
                found = net(x, backend)
            except InputError as error:  # huge weights: infinity minus infinity
                if "NaN, which has no sign" not in str(error):
                    raise
                seen["NaN"] += 1
                return
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        seen["ran"] += 1

    check()
    assert seen["refused"] > 300, seen
    assert seen["ran"] > 30, seen


# ---- docs/bit-format.md ---------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bit-format.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found
    return found.group(1)


def dump(data: bytes) -> list[str]:
    """The lines of `xxd`."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}: {' '.join(row[i : i + 2].hex() for i in range(0, 16, 2)):<39}  {text}")
    return lines


def test_the_documented_example_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlab.provenance.versions", lambda: {"qlab": "0.1.0"})
    exec(block("python"), {})
    data = (tmp_path / "tiny.safetensors").read_bytes()
    shown = block("text").splitlines()
    gap = shown.index("...")
    assert dump(data)[:gap] == shown[:gap]
    assert dump(data)[-(len(shown) - gap - 1) :] == shown[gap + 1 :]
    assert taken_apart(data)[0] == json.loads(block("json"))
    logits = file.load("tiny.safetensors")(torch.tensor([[-0.5, 1.0, -2.0]]), "numpy")
    assert logits.tolist() == [[3.0, -1.0]]


@pytest.mark.parametrize("limit", [file.MAX_HEADER, shapes.MAX_STEPS, shapes.MAX_ELEMENTS, shapes.MAX_TERMS])
def test_every_limit_is_documented(limit: int) -> None:
    assert f"{limit:,}" in DOCUMENT


@pytest.mark.parametrize("name", OPS)
def test_every_step_is_documented_with_its_tensors_and_options(name: str) -> None:
    op = OPS[name]
    cells = [" ".join(f"`{key}`" for key in keys) for keys in (op.tensors, op.options)]
    assert f"| `{name}` | {cells[0]} | {cells[1]} |" in DOCUMENT


# ---- memory ---------------------------------------------------------------------------------------------------------


EXPLODING = ["{},", "[],", "1,", '"",', "[[[],[]],[]],", '{"a":1,"b":{}},', "1.5,", '"ab",', "12345678,", '{"a":[1]},']
CONSTANT = 2**14  # what any call takes: frames, an error and its traceback


@pytest.mark.parametrize("element", [*EXPLODING, '"%d":1,', '"%d":{},', '"%d":"ab",', "x"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("length", [10_000, 100_000, 700_000])
def test_a_header_made_to_explode_takes_no_more_than_four_times_the_file(
    element: str, inner: bool, length: int
) -> None:
    keys = "%d" in element
    count = length // len(element)
    body = "".join(element % (1000 + i) if keys else element for i in range(count))
    text = f'{{"a":{{{body}"end":0}}}}' if keys else body if element == "x" else f'{{"a":[{body}0]}}'
    if inner:
        text = json.dumps({"__metadata__": {"format": file.FORMAT, "qlab": text}}, separators=(",", ":"))
    # The smallest file of which it is parsed, and one of which it is not.
    for size in (file._room(text) + 8, len(text) + 8):
        data = (len(text).to_bytes(8, "little") + text.encode("ascii")).ljust(size, b"0")
        tracemalloc.start()
        with pytest.raises(PackedFileError):
            file._parse(io.BytesIO(data), size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 4 * size + CONSTANT


@pytest.mark.parametrize("hidden", [(16, 16), (64, 64), (256, 256), (2048, 2048)])
def test_reading_takes_at_most_four_times_the_file(tmp_path: Path, hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = compile(deployed("mlp", (1, 8, 8), hidden=hidden), torch.zeros(1, 1, 8, 8))
    path = tmp_path / "net.safetensors"
    net.save(path)
    file.load(path)  # imports are not counted
    tracemalloc.start()
    file.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * path.stat().st_size + CONSTANT
