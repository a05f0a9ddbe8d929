"""Packing signs into words, for torch, numpy and CuPy; the bit convention of the whole lab.

    bit 1 means -1, bit 0 means +1;  sign(0) = +1;  the bits past the end are 0
    bit i of word j is element 64 j + i;  words are little-endian uint64

so that a dot product of K signs is K - 2 popcount(a xor b), and words past the end never count. docs/bit-format.md writes it
out byte by byte.

Words are uint64 arrays in numpy and CuPy. In torch they are int64 tensors of the same bits, for torch has few operators
on uint64.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qlab.binary.kernels import reference
from qlab.binary.kernels.reference import WORD, words_for
from qlab.errors import InputError

__all__ = ["WORD", "array_to_words", "pack", "unpack", "words_for", "words_to_array"]

Array = TypeVar("Array")  # torch.Tensor, numpy.ndarray or cupy.ndarray


def pack(x: Array, dim: int = -1) -> Array:
    """Return the words of the signs of x along `dim`, of length W(K) there; the same kind of array, on the same device.

    Args:
        x: any real array; what is below zero is -1, everything else, zero included, +1.
        dim: the axis that is packed.

    Raises:
        InputError: for NaN, which has no sign; for a scalar, a `dim` out of range, or something that is no array.
    """
    array, axis = _checked(x, dim)
    real = (
        not array.is_complex() if isinstance(array, Tensor) else array.dtype.kind in "fiub"
    )  # numpy: float, int, uint, bool
    if not real:
        raise InputError(f"cannot take the sign of values of dtype {array.dtype}; expected real numbers")
    if isinstance(array, Tensor):
        _refuse_nan(array.is_floating_point() and bool(array.isnan().any()))
        if array.device.type != "cpu":
            return _torch_pack(array, axis)  # type: ignore[return-value]
        return words_to_array(reference.pack(array.detach().numpy(), axis))  # type: ignore[return-value]
    if isinstance(array, np.ndarray):
        _refuse_nan(array.dtype.kind == "f" and bool(np.isnan(array).any()))
        return reference.pack(array, axis)  # type: ignore[return-value]
    return _as_cupy(pack(torch.from_dlpack(array), axis)).view(np.uint64)


def unpack(words: Array, length: int, dim: int = -1) -> Array:
    """Return the signs +-1 that `pack` took, as int8.

    Args:
        words: from `pack`: uint64, or int64 in torch.
        length: K, how many signs there are along `dim`.
        dim: the axis that is unpacked.

    Raises:
        InputError: for arrays that hold no words, or too few or too many words for `length`.
    """
    array, axis = _checked(words, dim)
    expected = torch.int64 if isinstance(array, Tensor) else np.dtype(np.uint64)
    if array.dtype != expected:
        raise InputError(
            f"these are no packed words: dtype {array.dtype}; expected {expected}, as qlab.binary.pack gives"
        )
    if length < 0 or array.shape[axis] != words_for(length):
        raise InputError(
            f"{length} signs take {words_for(max(length, 0))} words, but dimension {dim} has {array.shape[axis]}; "
            "give the length that was packed"
        )
    if isinstance(array, np.ndarray):
        return reference.unpack(array, length, axis)  # type: ignore[return-value]
    if not isinstance(array, Tensor):
        return _as_cupy(unpack(torch.from_dlpack(array.view(np.int64)), length, axis))
    moved = array.movedim(axis, -1)
    bits = ((moved[..., None] >> torch.arange(WORD, device=array.device)) & 1).flatten(-2)[..., :length]
    return (1 - 2 * bits).to(torch.int8).movedim(-1, axis)  # type: ignore[return-value]


def words_to_array(words: np.ndarray) -> Tensor:
    """Return numpy words (uint64) as a torch tensor (int64); they share memory where the words are contiguous."""
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def array_to_words(tensor: Tensor) -> np.ndarray:
    """Return a torch tensor of words (int64, on the CPU) as numpy words (uint64); they share memory where it is contiguous.

    Raises:
        InputError: for a tensor that holds no words.
    """
    if tensor.dtype != torch.int64:
        raise InputError(
            f"these are no packed words: dtype {tensor.dtype}; expected torch.int64, as qlab.binary.pack gives"
        )
    return tensor.detach().contiguous().numpy().view(np.uint64)


def _checked(x: Any, dim: int) -> tuple[Any, int]:
    if not isinstance(x, Tensor | np.ndarray) and not hasattr(x, "__cuda_array_interface__"):
        raise InputError(f"expected a torch, numpy or CuPy array, not {type(x).__name__}")
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim:
        raise InputError(f"dim is {dim}, but the array has shape {tuple(x.shape)}; expected a dimension that it has")
    return x, dim % x.ndim


def _refuse_nan(found: bool) -> None:
    if found:
        raise InputError("the array holds NaN, which has no sign: clean the data, or find the layer that diverged")


def _torch_pack(x: Tensor, axis: int) -> Tensor:
    bits = (x < 0).movedim(axis, -1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    # Bit 63 makes the word negative: int64 holds the same 64 bits, and the sum wraps as it should.
    return (bits.long() << torch.arange(WORD, device=x.device)).sum(-1).movedim(-1, axis)


def _as_cupy(tensor: Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(tensor.contiguous())
