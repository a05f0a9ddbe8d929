"""Packed nets on disk: one safetensors file, every byte of which is accounted for.

    8 bytes   length of the header, a little-endian uint64
    header    JSON: dtype, shape and offsets of every tensor; under "__metadata__" the net itself, as JSON in a string
    data      the tensors one after the other, 8-byte ones first

The header is written in one way only (sorted keys, no spaces, ASCII), holds a SHA-256 of every tensor and one of itself, and a
reader refuses whatever it would not have written. So no changed byte loads silently, and no code can hide in a file.

Reading takes at most four times the file's size (and 16 KB that any call takes), for hostile files too. A header of H characters, S
of them {, [, comma or colon, is copied four times at most and takes less than 80 S bytes as Python objects, so the file must have
H + 20 S bytes, which is seen before anything is parsed. Tensors, read one by one, make up for it but in tiny nets, the headers of
which are filled up with spaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from qlab import provenance
from qlab.binary.graph import Graph, Step
from qlab.errors import InputError, PackedFileError

if TYPE_CHECKING:
    from qlab.binary.certificate import Certificate
    from qlab.binary.packed import PackedNet

__all__ = ["FORMAT", "MAX_HEADER", "VERSION", "load", "replace_file", "save"]

FORMAT = "qlab.packed"
VERSION = 2
MAX_HEADER = 2**20  # bytes; resnet18 takes 27 thousand
ROOM = 20  # bytes that a file must have for each {, [, comma and colon of its header
MAX_DIMS = 4
DIGITS = 19  # of an integer: more than 64 bits are never meant
DTYPES: dict[str, np.dtype] = {"U64": np.dtype("<u8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
CODES = {(dtype.kind, dtype.itemsize): code for code, dtype in DTYPES.items()}

Entries = dict[str, dict[str, Any]]


def save(packed: PackedNet, path: str | os.PathLike[str]) -> None:
    """Write a packed net to a file; where that is interrupted, an older file of that name stays as it was.

    Args:
        packed: with its certificate, if it has one.
        path: of the file, which is replaced if it exists.

    Raises:
        InputError: the path cannot be written; a number of the net is NaN or infinite, which JSON has not.
    """
    graph = packed.graph
    order = sorted(graph.tensors, key=lambda name: (-graph.tensors[name].itemsize, name))
    blocks = {name: _little_endian(graph.tensors[name]) for name in order}
    header = _header(packed, blocks)
    replace_file(Path(path), [len(header).to_bytes(8, "little"), header, *(block.data for block in blocks.values())])


def replace_file(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all: under another name beside it, which then takes its place.

    Args:
        target: the file, which need not exist.
        parts: what it holds, one after the other.

    Raises:
        InputError: the path cannot be written.
    """
    if target.is_dir() or not target.parent.is_dir():
        wrong = "is a folder" if target.is_dir() else f"is in {target.parent}, which is no folder"
        raise InputError(f"cannot save to {target}: it {wrong}; give the path of a file in an existing folder")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot save to {target}: {error.strerror}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> PackedNet:
    """Read a packed net from a file; nothing of it is used before all its digests were found right.

    Args:
        path: of a file that `save` wrote.

    Raises:
        PackedFileError: the file is missing, truncated, changed, hostile, or of another version.
    """
    source = Path(path)
    try:
        with source.open("rb") as stream:
            return _parse(stream, os.fstat(stream.fileno()).st_size)
    except PackedFileError as error:
        raise PackedFileError(f"{source}: {error}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PackedFileError(
            f"cannot read {source}: {why}; expected a packed net, as packed.save(path) writes"
        ) from error


# ---- writing --------------------------------------------------------------------------------------------------------


def _little_endian(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, DTYPES[CODES[array.dtype.kind, array.itemsize]], order="C")


def _header(packed: PackedNet, blocks: Mapping[str, np.ndarray]) -> bytes:
    graph, certificate = packed.graph, packed.certificate
    content: dict[str, Any] = {
        "version": VERSION,
        "qlab": provenance.versions()["qlab"],
        "input_shape": list(graph.input_shape),
        "image": graph.image,
        "steps": [
            {
                "op": step.op,
                "inputs": list(step.inputs),
                "outputs": list(step.outputs),
                "layer": step.layer,
                "tensors": dict(step.tensors),
                "options": dict(step.options),
            }
            for step in graph.steps
        ],
        "output": graph.output,
        "layers": [dict(row) for row in graph.layers],
        "certificate": None if certificate is None else certificate.to_dict(),
        "tensors": {name: hashlib.sha256(block.data).hexdigest() for name, block in blocks.items()},
    }
    shapes = [(name, CODES[block.dtype.kind, block.itemsize], list(block.shape)) for name, block in blocks.items()]
    entries = _entries(shapes)
    try:
        content["digest"] = _digest(entries, content)
        header = _joined(entries, content)
    except ValueError as error:
        raise InputError(f"a number of this net cannot be written: {error}; find the layer that diverged") from error
    if len(header) > MAX_HEADER:
        raise InputError(f"this net's header takes {len(header):,} bytes; the format allows {MAX_HEADER:,}")
    return header


def _entries(shapes: list[tuple[str, str, list[int]]]) -> Entries:
    """Return the entries of tensors (name, dtype, shape) that lie one after the other."""
    entries: Entries = {}
    begin = 0
    for name, code, shape in shapes:
        end = begin + prod(shape) * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return entries


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _joined(entries: Entries, content: Mapping[str, Any]) -> bytes:
    """Return the header: with spaces up to the room it needs, and to a multiple of 8 bytes, where the tensors begin."""
    text = _canonical({"__metadata__": {"format": FORMAT, "qlab": _canonical(content)}, **entries})
    least = max(len(text), _room(text) - _total(entries) - 8)
    return text.ljust(least + -least % 8).encode("ascii")


def _total(entries: Entries) -> int:
    """Return the bytes of all tensors."""
    return max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def _room(text: str) -> int:
    """Return the size that a file with this header must have; see the module docstring."""
    return len(text.rstrip(" ")) + ROOM * sum(map(text.count, "{[,:"))


def _digest(entries: Entries, content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the header as it is without its digest."""
    return hashlib.sha256(_joined(entries, {k: v for k, v in content.items() if k != "digest"})).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def _parse(stream: BinaryIO, size: int) -> PackedNet:
    """Return the net of a file of some size, open at its beginning."""
    from qlab.binary.packed import PackedNet

    _expect(size >= 8, f"it has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(_read(stream, 8), "little")
    _expect(length <= MAX_HEADER, f"its header would take {length:,} bytes, more than the {MAX_HEADER:,} allowed")
    _expect(length <= size - 8, f"its header would take {length:,} bytes, but it is truncated at {size:,}")
    entries, content = _read_header(_read(stream, length), size)
    _expect(content.get("digest") == _digest(entries, content), "its header was changed: the digest is another")
    hashes = content["tensors"]
    _expect(isinstance(hashes, dict) and set(hashes) == set(entries), "its lists of tensors differ")
    tensors = {}
    for name, entry in entries.items():
        array = np.empty(entry["shape"], DTYPES[entry["dtype"]])
        _expect(stream.readinto(array.reshape(-1).view(np.uint8).data) == array.nbytes, "it ends too early")  # type: ignore[attr-defined]
        found = hashlib.sha256(array.data).hexdigest()
        _expect(found == hashes[name], f"tensor {name!r} was changed: its SHA-256 differs")
        tensors[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        graph = _graph(content, tensors).check()
        return PackedNet(graph, certificate=_certificate(content["certificate"]))
    except InputError as error:
        raise PackedFileError(f"its net does not fit together: {error}") from error


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    _expect(len(data) == count, "it ends too early")
    return data


def _expect(condition: bool, wrong: str) -> None:
    if not condition:
        raise PackedFileError(f"{wrong}; expected a file as packed.save writes it. Get it again, or save the net anew")


def _read_header(raw: bytes, size: int) -> tuple[Entries, dict[str, Any]]:
    """Return the tensors' entries and the net's description, both exactly as they would be written, in a file of some size."""
    text = str(raw, "latin-1")
    room = _room(text)
    _expect(room <= size, f"its header needs a file of {room:,} bytes, but it has {size:,}")
    header = _loads(text)
    metadata = header.pop("__metadata__", None)
    _expect(isinstance(metadata, dict) and metadata.get("format") == FORMAT, "it holds no packed net")
    net = metadata["qlab"] if isinstance(metadata.get("qlab"), str) else ""
    # What is written in it stands in the text as it is, not as escapes: so it was counted.
    _expect(bool(net) and _canonical(net) in text, "it holds no description of the net")
    del text, metadata
    content = _loads(net)
    version: Any = content.get("version")
    _expect(type(version) is int, "it does not say its version")
    if version != VERSION:
        todo = "Update qlab" if version > VERSION else "Compile the net again and save it"
        raise PackedFileError(f"it is of version {version} of the format; this qlab reads {VERSION}. {todo}")
    _expect(set(content) == _CONTENT, "its description of the net lacks an entry or has one too many")
    shapes = []
    for name, entry in header.items():
        _expect(_is_entry(entry), f"tensor {name!r} has no dtype and shape that a packed net has")
        shapes.append((name, entry["dtype"], entry["shape"]))
    entries = _entries(sorted(shapes, key=lambda s: (-DTYPES[s[1]].itemsize, s[0])))
    total, available = _total(entries), size - 8 - len(raw)
    _expect(total == available, f"its tensors take {total:,} bytes, but it has {available:,}")
    try:
        same = _joined(entries, content) == raw
    except (ValueError, RecursionError):
        same = False  # an infinite number, such as 1e999
    _expect(same, "its header is not written as it should be")
    return entries, content


_CONTENT = {
    "version",
    "qlab",
    "input_shape",
    "image",
    "steps",
    "output",
    "layers",
    "certificate",
    "tensors",
    "digest",
}


def _loads(text: str) -> dict[str, Any]:
    try:
        if not text.isascii():
            raise ValueError("a character that is not ASCII")
        content = json.loads(text, parse_int=_integer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PackedFileError(f"its header is no JSON that can be read ({why}); the file is damaged") from error
    _expect(isinstance(content, dict), "its header is no JSON object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    shape = entry["shape"]
    return (
        isinstance(entry["dtype"], str)
        and entry["dtype"] in DTYPES
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMS
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
    )


def _graph(content: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Graph:
    """Return the graph of a description, whose types are checked; that they fit together is `Graph.check`'s part."""
    steps, rows, shape, output = (content[key] for key in ("steps", "layers", "input_shape", "output"))
    _expect(isinstance(steps, list) and all(map(_is_step, steps)), "a step is none")
    _expect(isinstance(rows, list) and all(map(_is_row, rows)), "a row of its report is none")
    _expect(isinstance(shape, list) and isinstance(output, str), "its input_shape or output is none")
    _expect(isinstance(content["image"], bool), "whether it takes images is not said")
    used = {name for step in steps for name in step["tensors"].values()}
    _expect(used == set(tensors), "it has tensors that no step uses, or lacks some")
    return Graph(
        tuple(shape),
        tuple(
            Step(s["op"], tuple(s["inputs"]), tuple(s["outputs"]), s["layer"], s["tensors"], s["options"])
            for s in steps
        ),
        tensors,
        output,
        tuple(rows),
        content["image"],
    )


def _is_step(step: Any) -> bool:
    kinds = {"op": str, "inputs": list, "outputs": list, "layer": str, "tensors": dict, "options": dict}
    if not isinstance(step, dict) or set(step) != set(kinds):
        return False
    if not all(isinstance(step[key], kind) for key, kind in kinds.items()):
        return False
    return all(isinstance(name, str) for name in [*step["inputs"], *step["outputs"], *step["tensors"].values()])


_ROW = {"layer": str, "runs": str, "binary_macs": int, "float_macs": int, "float_bytes": int}


def _is_row(row: Any) -> bool:
    """Return whether a row of the report has what `PackedNet.summary` reads, and nothing but primitives and lists of them."""
    if not isinstance(row, dict) or not all(type(row.get(key)) is kind for key, kind in _ROW.items()):
        return False
    flat = [v for value in row.values() for v in (value if isinstance(value, list) else [value])]
    return all(isinstance(v, str | int | float) for v in flat)


def _certificate(content: Any) -> Certificate | None:
    if content is None:
        return None
    from qlab.binary.certificate import Certificate

    return Certificate.from_dict(content)
