"""What tests of the binary path draw from: small deployed nets, and ways to damage a file."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import qlab
from qlab.binary import file

__all__ = ["Content", "Small", "damaged", "deployed", "edited", "randomise", "rebuilt", "replaced", "taken_apart"]

Content = tuple[dict[str, Any], dict[str, np.ndarray]]  # the net's description, its tensors


class Small(nn.Module):
    """A net with every kind of step on bits: residual sum, strided and padded convolution, max-pool, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1, self.act1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv3, self.norm3, self.act3 = nn.Conv2d(4, 66, 3, 2, 1, bias=False), nn.BatchNorm2d(66), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.hidden, self.norm4, self.act4 = nn.Linear(66 * 4, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU()
        self.last = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x))
        x = self.act2(self.norm2(self.conv2(self.act1(x))) + x)
        x = self.pool(self.act3(self.norm3(self.conv3(x))))
        return self.last(self.act4(self.norm4(self.hidden(torch.flatten(x, 1)))))


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and weights of both signs, so that thresholds differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.running_mean is not None and m.running_var is not None:
            m.running_mean.normal_(0, 3, generator=generator)
            m.running_var.uniform_(1, 40, generator=generator)
            if m.affine:
                m.weight.data.normal_(generator=generator)
                m.bias.data.normal_(generator=generator)
    return net


def deployed(
    model: str | nn.Module,
    shape: tuple[int, ...],
    activations: str = "sign",
    keep: tuple[str, ...] = ("first", "last"),
    **options: Any,
) -> nn.Module:
    """Return a net as STE deploys it, with random batch norms."""
    net = model if isinstance(model, nn.Module) else qlab.build(model, shape, 10, seed=0, **options)
    method = qlab.methods.create("ste", randomise(net), activations=activations, keep=keep, reestimate_bn=False)
    return method.deployed()


# ---- damage without a new digest ------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return the bytes of a file with something wrong in them: cut, flipped, inserted, deleted, exchanged."""
    place = st.one_of(st.integers(0, len(data) - 1), st.integers(0, 200))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "delete", "exchange", "length", "replace"]))
    at = draw(place)
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    if kind == "delete":
        return data[:at] + data[at + draw(st.integers(1, 9)) :]
    if kind == "exchange":
        other, size = draw(place), draw(st.integers(1, 16))
        one, two = sorted((at, other))
        two = max(two, one + size)
        return (
            data[:one] + data[two : two + size] + data[one + size : two] + data[one : one + size] + data[two + size :]
        )
    if kind == "length":
        length = draw(st.one_of(st.integers(0, 2 * len(data)), st.integers(0, 2**64 - 1)))
        return length.to_bytes(8, "little") + data[8:]
    return replaced(data, *draw(st.sampled_from(REPLACED)))


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """Return a file whose header has other text in one place, and says its new length."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(old, new, 1)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


REPLACED = [
    (b'"U64"', b'"I64"'),
    (b'"F32"', b'"I32"'),
    (b"qlab.packed", b"qlab.pickle"),
    (b'"version\\":1', b'"version\\":2'),
    (b'"stride\\":[1,1]', b'"stride\\":[0,1]'),
    (b'"groups\\":1', b'"groups\\":NaN'),
    (b'"groups\\":1', b'"groups\\":1e999'),
    (b'"groups\\":1', b'"groups\\":' + b"9" * 5000),
    (b'"groups\\":1', b'"groups\\":1,\\"groups\\":1'),
    (b'"layers\\":[', b'"layers\\":' + b"[" * 100_000),
    (b'{"__metadata__"', b'{"a":' * 100_000),
    (b'"certificate\\":null', b'"certificate\\":{}'),
    (b'"shape":[', b'"shape":[1,'),
    (b'"shape":[', b'"shape":[4294967296,4294967296,'),
    (b'"shape":[', b'"shape":[-1,'),
    (b"[1,1]", b"[1, 1]"),
    (b'"dtype"', b'"dtyp\\u0065"'),
]


# ---- edits with new digests -----------------------------------------------------------------------------------------


def taken_apart(data: bytes) -> Content:
    """Return what a file holds: the net's description and its tensors."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    content = json.loads(header.pop("__metadata__")["qlab"])
    tensors = {
        name: np.frombuffer(body[slice(*e["data_offsets"])], file.DTYPES[e["dtype"]]).reshape(e["shape"]).copy()
        for name, e in header.items()
    }
    return content, tensors


def rebuilt(content: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return a file with these contents and right digests, whether or not they make sense."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    codes = {"u": "U64", "i": "I32", "f": "F32"}
    entries = file._entries([(name, codes[tensors[name].dtype.kind], list(tensors[name].shape)) for name in order])
    hashes = {name: hashlib.sha256(tensors[name].tobytes()).hexdigest() for name in order}
    content = {**content, "tensors": hashes}
    content["digest"] = file._digest(entries, content)
    header = file._joined(entries, content)
    return len(header).to_bytes(8, "little") + header + b"".join(tensors[name].tobytes() for name in order)


INTEGERS = st.sampled_from(
    [-(2**40), -65, -1, 0, 1, 2, 3, 4, 5, 7, 63, 64, 65, 66, 264, 2**24, 2**31 - 1, 2**31, 2**40]
)
OPTIONS: st.SearchStrategy[Any] = st.one_of(
    INTEGERS,
    st.lists(INTEGERS, max_size=5),
    st.sampled_from([None, True, False, 0.5, 1e308, "zero", "one", "unpack", "sums", "", [], {}, [[None, None, None]]]),
)


def _some(draw: st.DrawFn, items: Any) -> Any:
    return draw(st.sampled_from(sorted(items)))


def _option(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    step = draw(st.sampled_from([s for s in content["steps"] if s["options"]]))
    step["options"][_some(draw, step["options"])] = draw(OPTIONS)


def _reshaped(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = _some(draw, tensors)
    tensor = tensors[name]
    if tensor.ndim == 0:
        return
    axis, size = draw(st.integers(0, tensor.ndim - 1)), draw(st.integers(1, 70))
    tensors[name] = np.ascontiguousarray(
        np.resize(np.moveaxis(tensor, axis, 0), (size, *np.delete(tensor.shape, axis)))
    )
    tensors[name] = np.ascontiguousarray(np.moveaxis(tensors[name], 0, axis))


def _refilled(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = _some(draw, tensors)
    kind = tensors[name].dtype.kind
    choices: dict[str, list[Any]] = {
        "u": [0, 1, 2**63, 2**64 - 1],
        "i": [-(2**31), -1, 0, 2**24 + 1, 2**31 - 1],
        "f": [0.0, -1.0, 1e-45, 3e38, np.inf, np.nan],
    }
    tensors[name].reshape(-1)[draw(st.integers(0, tensors[name].size - 1))] = draw(st.sampled_from(choices[kind]))


def _retyped(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = _some(draw, tensors)
    kinds = [dtype for dtype in file.DTYPES.values() if dtype != tensors[name].dtype]
    tensors[name] = np.nan_to_num(tensors[name]).clip(0, 2**30).astype(draw(st.sampled_from(kinds)))


def _exchanged(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    one, other = _some(draw, tensors), _some(draw, tensors)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _rewired(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    step = draw(st.sampled_from(content["steps"]))
    names = ["input", "nothing", *(name for s in content["steps"] for name in s["outputs"])]
    key = draw(st.sampled_from(["inputs", "outputs", "tensors", "op", "more"]))
    if key == "tensors" and step["tensors"]:
        step["tensors"][_some(draw, step["tensors"])] = _some(draw, [*tensors, "nothing"])
    elif key == "op":
        step["op"] = draw(st.sampled_from([*(s["op"] for s in content["steps"]), "system", "relu", "flatten"]))
    elif key == "more":
        step["inputs"] = [*step["inputs"], draw(st.sampled_from(names))]
    elif key != "tensors":
        step[key] = [draw(st.sampled_from(names))]


def _reordered(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    steps = content["steps"]
    i, j = draw(st.integers(0, len(steps) - 1)), draw(st.integers(0, len(steps) - 1))
    kind = draw(st.sampled_from(["drop", "swap", "repeat"]))
    if kind == "swap":
        steps[i], steps[j] = steps[j], steps[i]
    elif kind == "drop":
        gone = steps.pop(i)
        for name in gone["tensors"].values():
            tensors.pop(name, None)
    else:
        steps.insert(j, copy.deepcopy(steps[i]))


def _restated(draw: st.DrawFn, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    key = _some(draw, content)
    content[key] = draw(
        st.one_of(OPTIONS, st.sampled_from([[2, 5, 5], [2, 8, 9], [1, 8, 8], [2**31], "v1", [{}], {"batch": 1}]))
    )


EDITS: list[Callable[..., None]] = [
    _option,
    _option,
    _reshaped,
    _refilled,
    _retyped,
    _exchanged,
    _rewired,
    _reordered,
    _restated,
]


@st.composite
def edited(draw: st.DrawFn, data: bytes) -> bytes:
    """Return a file of one to three hostile edits, with right digests, so that what comes after them is reached."""
    content, tensors = taken_apart(data)
    for edit in draw(st.lists(st.sampled_from(EDITS), min_size=1, max_size=3)):
        if (
            isinstance(content.get("steps"), list)
            and all(isinstance(s, dict) and s for s in content["steps"])
            and (content["steps"] and tensors)
        ):
            edit(draw, content, tensors)
    return rebuilt(content, tensors)
