"""What the CPU kernels share: memory, vectors and a work counter as Numba intrinsics that emit LLVM code directly.

The kernels take one argument, the address of a block of int64 words (addresses, sizes, strides), so that a call from Python
costs about a microsecond whatever a kernel needs. Every thread runs the same kernel on the same block and takes chunks of work
until none is left, one thread from the front, the next from the back. That balances the threads, keeps the same part of an
image in the same thread's cache from layer to layer, and gives the same result for any number of threads, for a chunk
always computes the same thing.

Numba caches a kernel by the file that it stands in: after a change here, delete `__pycache__` to see its effect.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic as typed_intrinsic

from qlab.binary.kernels.cpu_block import CHUNKS, COLUMNS, COUNTERS

__all__ = [
    "F32",
    "I1",
    "I16",
    "I32",
    "I64",
    "Columns",
    "affine",
    "arrive",
    "call",
    "clear",
    "constant",
    "copy",
    "fetch",
    "intrinsic",
    "join",
    "load",
    "poke",
    "read",
    "read_byte",
    "signature",
    "splat",
    "store",
    "take",
    "vector",
    "wide_registers",
]

intrinsic: Any = typed_intrinsic  # the first argument, a typing context, is Numba's: callers leave it out

I1, I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType())


def wide_registers() -> bool:
    """Whether Numba compiles for 32 registers of 512 bits (AVX-512)."""
    settings: Any = config
    features = settings.CPU_FEATURES
    return "+avx512f" in (get_host_cpu_features() if features is None else features)


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Return the type of `lanes` elements."""
    return ir.VectorType(element, lanes)


def constant(value: int, kind: ir.Type = I64) -> ir.Constant:
    """Return a constant, the same in every lane if `kind` is a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0, align: int = 8) -> ir.Value:
    """Return the value of type `kind` that stands `offset` bytes after `address`."""
    place = builder.add(address, constant(offset)) if offset else address
    value = builder.load(_pointer(builder, place, kind), align=align)
    value.align = align
    return value


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    """Store a value at an address."""
    builder.store(value, _pointer(builder, address, value.type), align=align).align = align


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Return a vector with `value` in every lane."""
    kind = vector(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, constant(0, I32))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), constant(0, vector(I32, lanes)))


def join(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Return the lanes of `low` followed by those of `high`."""
    lanes = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(vector(I32, lanes), list(range(lanes))))


def call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """Return the value of an LLVM intrinsic whose result and arguments are of one type."""
    kind = arguments[0].type
    function = ir.FunctionType(kind, [kind] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


class Columns:
    """Sixteen columns of a row in memory, or fewer in the last panel: those go through a buffer on the stack."""

    def __init__(self, builder: ir.IRBuilder, valid: ir.Value) -> None:
        self.builder, self.valid = builder, valid
        self.partial = builder.icmp_signed("<", valid, constant(COLUMNS))
        self.buffer = builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(I32, COLUMNS)), I64)

    def _copy(self, source: ir.Value, target: ir.Value) -> None:
        with cgutils.for_range(self.builder, self.valid) as loop:
            at = self.builder.mul(loop.index, constant(4))
            word = load(self.builder, self.builder.add(source, at), I32, align=4)
            store(self.builder, word, self.builder.add(target, at))

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """Return the columns at an address, 0 for those that are none."""
        with self.builder.if_then(self.partial, likely=False):
            store(self.builder, constant(0, vector(I32, COLUMNS)), self.buffer)
            self._copy(address, self.buffer)
        return load(self.builder, self.builder.select(self.partial, self.buffer, address), kind, align=4)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Store the columns at an address."""
        store(self.builder, value, self.builder.select(self.partial, self.buffer, address))
        with self.builder.if_then(self.partial, likely=False):
            self._copy(self.buffer, address)


def affine(builder: ir.IRBuilder, z: ir.Value, alpha: ir.Value, beta: ir.Value, fused: ir.Value) -> ir.Value:
    """Return z alpha + beta, rounded once or twice. Both ways are written out: the compiler never contracts the second."""
    with builder.if_else(fused) as (once, twice):
        with once:
            first = call(builder, f"llvm.fma.v{z.type.count}f32", z, alpha, beta)
            first_block = builder.block
        with twice:
            second = builder.fadd(builder.fmul(z, alpha), beta)
            second_block = builder.block
    y = builder.phi(z.type)
    y.add_incoming(first, first_block)
    y.add_incoming(second, second_block)
    return y


def signature(arguments: int, result: Any = types.void) -> Any:
    """Return the Numba signature of that many int64 arguments."""
    return result(*[types.int64] * arguments)


@intrinsic
def read(_context: Any, address: Any) -> Any:
    """read(address): one word."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return load(builder, arguments[0], I64)

    return signature(1, types.int64), emit


@intrinsic
def read_byte(_context: Any, address: Any) -> Any:
    """read_byte(address): one byte, 0 to 255."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.zext(load(builder, arguments[0], I8, align=1), I64)

    return signature(1, types.int64), emit


@intrinsic
def fetch(_context: Any, block: Any, index: Any) -> Any:
    """fetch(block, index): one word of an argument block."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return load(builder, builder.add(arguments[0], builder.mul(arguments[1], constant(8))), I64)

    return signature(2, types.int64), emit


@intrinsic
def copy(_context: Any, target: Any, source: Any, words: Any) -> Any:
    """copy(target, source, words): of memory that does not overlap."""

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        target, source = (_pointer(builder, place, I8) for place in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 8, align=8)
        return context.get_dummy_value()

    return signature(3), emit


@intrinsic
def clear(_context: Any, target: Any, words: Any) -> Any:
    """clear(target, words): set them to 0."""

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        cgutils.memset(builder, _pointer(builder, arguments[0], I8), builder.mul(arguments[1], constant(8)), 0)
        return context.get_dummy_value()

    return signature(2), emit


@intrinsic
def poke(_context: Any, address: Any, value: Any) -> Any:
    """poke(address, value): store one word."""

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        store(builder, arguments[1], arguments[0], align=8)
        return context.get_dummy_value()

    return signature(2), emit


def _count(builder: ir.IRBuilder, block: ir.Value, counter: ir.Value) -> ir.Value:
    """Return a counter's value and add one to it."""
    place = builder.add(block, builder.mul(builder.add(counter, constant(COUNTERS)), constant(8)))
    return builder.atomic_rmw("add", _pointer(builder, place, I64), constant(1), "monotonic")


@intrinsic
def arrive(_context: Any, block: Any) -> Any:
    """arrive(block): 0 for a thread that takes chunks from the front, 1 for one that takes them from the back."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.and_(_count(builder, arguments[0], constant(0)), constant(1))

    return signature(1, types.int64), emit


@intrinsic
def take(_context: Any, block: Any, side: Any) -> Any:
    """take(block, side): the number of a chunk that no other thread has, or -1 where none is left.

    Only a thread that has been promised one (counter 1) counts at its side: the sides then never meet or miss a chunk.
    """

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        block, side = arguments
        chunks = load(builder, block, I64, 8 * CHUNKS)
        promised = builder.icmp_signed("<", _count(builder, block, constant(1)), chunks)
        before = builder.block
        with builder.if_then(promised):
            index = _count(builder, block, builder.add(side, constant(2)))
            back = builder.sub(builder.sub(chunks, constant(1)), index)
            chunk = builder.select(builder.icmp_signed("==", side, constant(0)), index, back)
            inside = builder.block
        result = builder.phi(I64)
        result.add_incoming(constant(-1), before)
        result.add_incoming(chunk, inside)
        return result

    return signature(2, types.int64), emit
