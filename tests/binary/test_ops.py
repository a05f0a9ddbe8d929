"""The packed operations as torch operators: right, typed, seen by torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.binary import ops, pack
from qlab.binary.kernels import reference
from qlab.errors import InputError
from tests.binary.conftest import generator, signs


def words(*shape: int, seed: int = 2) -> Tensor:
    """Return packed random signs; the last size is the number of signs."""
    return pack(signs(*shape, seed=seed))


def integers(*shape: int) -> Tensor:
    return torch.randint(-50, 50, shape, generator=generator(), dtype=torch.int32)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(), dtype=torch.uint8)


def digits(*shape: int) -> Tensor:
    return pack(-torch.randint(0, 2, shape, generator=generator()))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator())


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "binary_matmul": (ops.binary_matmul, (words(5, 77), words(3, 77, seed=3), 77)),
    "binary_conv2d": (
        ops.binary_conv2d,
        (words(2, 5, 6, 70), words(4, 3, 3, 70, seed=3), 70, [2, 1], [1, 1], [1, 1], 1, "one"),
    ),
    "digits_conv2d": (ops.digits_conv2d, (digits(8, 2, 5, 6, 3), words(4, 3, 3, 3, seed=3), 3, [1, 1], [1, 1])),
    "bitplane_matmul": (ops.bitplane_matmul, (digits(2, 5, 77), words(3, 4, 77), 77, floats(2), floats(3, 4))),
    "bitplane_conv2d": (
        ops.bitplane_conv2d,
        (words(2, 1, 5, 6, 3), words(2, 4, 3, 3, 3), 3, floats(2), floats(2), "signs", [1, 1], [1, 1]),
    ),
    "bitplane_input": (ops.bitplane_input, (pixels(2, 5, 70),)),
    "max_pool2d": (ops.max_pool2d, (words(2, 5, 6, 70), [3, 2], [2, 2], [1, 0])),
    "threshold_pack": (ops.threshold_pack, (integers(4, 70), integers(70), words(70))),
    "signed_sum_matmul": (
        ops.signed_sum_matmul,
        (floats(4, 77).round(), words(5, 77)),
    ),  # whole numbers: sums are exact
}


def referred(name: str, arguments: tuple[Any, ...]) -> np.ndarray:
    def plain(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return tuple(a) if isinstance(a, list) else a
        return a.numpy().view(np.uint64) if a.dtype == torch.int64 else a.numpy()

    return getattr(reference, name)(*map(plain, arguments))


@pytest.mark.parametrize("name", CALLS)
def test_operator_gives_what_the_reference_gives(name: str) -> None:
    call, arguments = CALLS[name]
    y = call(*arguments)
    expected = referred(name, arguments)
    found = y.numpy().view(np.uint64) if expected.dtype == np.uint64 else y.numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_operator_is_registered_with_shapes_that_tracing_sees(name: str) -> None:
    _, arguments = CALLS[name]
    torch.library.opcheck(
        getattr(torch.ops.qlab, name).default, arguments, test_utils=("test_schema", "test_faketensor")
    )


class PackedLayer(nn.Module):
    """Two operators in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", words(6, 3, 3, 70))
        self.register_buffer("threshold", torch.zeros(6, dtype=torch.int32))
        self.register_buffer("flip", words(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.ops.qlab.binary_conv2d(x, self.weight, 70, [1, 1], [1, 1])
        return torch.ops.qlab.threshold_pack(z, self.threshold, self.flip)


def test_compiled_and_exported_modules_give_the_same_words() -> None:
    layer, x = PackedLayer(), words(2, 5, 5, 70)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), expected)
    assert sum("qlab" in str(node.target) for node in program.graph.nodes) == 2


BAD: list[tuple[str, Callable[[], Tensor], str]] = [
    ("floats for words", lambda: ops.binary_matmul(floats(2, 1), words(3, 64), 64), "packed by qlab.binary.pack"),
    ("k too large", lambda: ops.binary_matmul(words(2, 64), words(3, 64), 65), "65 signs take 2"),
    ("k negative", lambda: ops.binary_matmul(words(2, 64), words(3, 64), -1), "-1 signs"),
    ("channels", lambda: ops.binary_conv2d(words(1, 5, 5, 64), words(2, 3, 3, 64), 65), "65 channels take 2 words"),
    ("groups", lambda: ops.binary_conv2d(words(1, 5, 5, 64), words(2, 3, 3, 64), 64, groups=3), "divide into 3 groups"),
    ("kernel too large", lambda: ops.binary_conv2d(words(1, 2, 2, 64), words(2, 3, 3, 64), 64), "does not fit"),
    ("stride", lambda: ops.binary_conv2d(words(1, 5, 5, 64), words(2, 3, 3, 64), 64, [0, 1]), "stride is"),
    ("padding", lambda: ops.binary_conv2d(words(1, 5, 5, 64), words(2, 3, 3, 64), 64, padding=[-1, 0]), "padding is"),
    ("pad", lambda: ops.binary_conv2d(words(1, 5, 5, 64), words(2, 3, 3, 64), 64, pad="two"), "'zero' or 'one'"),
    ("dimensions", lambda: ops.binary_conv2d(words(5, 5, 64), words(2, 3, 3, 64), 64), "N, H, W"),
    (
        "bases",
        lambda: ops.bitplane_matmul(words(2, 3, 64), words(2, 3, 64), 64, floats(3), floats(2)),
        "expected \\(2,\\)",
    ),
    (
        "codes",
        lambda: ops.bitplane_matmul(words(2, 3, 64), words(2, 3, 64), 64, floats(2), floats(2), "bits"),
        "'digits'",
    ),
    ("float image", lambda: ops.bitplane_input(floats(2, 3)), "uint8"),
    ("pool padding", lambda: ops.max_pool2d(words(1, 5, 5, 64), [2, 2], [1, 1], [2, 2]), "more than half"),
    ("pool too large", lambda: ops.max_pool2d(words(1, 2, 2, 64), [3, 3], [1, 1]), "does not fit"),
    ("threshold length", lambda: ops.threshold_pack(integers(2, 5), integers(4), words(5)), "4 thresholds"),
    ("threshold type", lambda: ops.threshold_pack(integers(2, 5).long(), integers(5), words(5)), "int32"),
    ("features", lambda: ops.signed_sum_matmul(floats(2, 65), words(3, 64)), "65 features take 2"),
]


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_mismatched_shapes_and_types_say_what_was_expected(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
