"""Raw memory, atomics and vector arithmetic for numba code, written as LLVM IR.

Addresses are int64. Vectors are 16 floats wide whatever the machine; LLVM splits them where registers
are narrower. Every multiply-add is an explicit ``fma``, and every sum has a fixed order, so that a row's
bits never depend on how many rows were computed together.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF32, VI32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_BF16_SHIFT = 16


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """``address`` as a pointer to ``kind``."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Any, kind: Any) -> Any:
    """Load ``kind`` from an address that may be unaligned."""
    value = builder.load(pointer(builder, address, kind))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    """Store to an address that may be unaligned."""
    builder.store(value, pointer(builder, address, value.type)).align = 1


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    """A vector with ``scalar`` in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return _lanes(builder, first, None, [0] * lanes)


def constant(value: float | int, kind: Any = VF32) -> Any:
    """A vector constant."""
    return ir.Constant(kind, [value] * kind.count)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def offset(builder: Any, address: Any, *terms: Any) -> Any:
    """``address`` plus the terms, which are Python ints or i64 values."""
    for term in terms:
        address = builder.add(address, I64(term) if isinstance(term, int) else term)
    return address


def widen(builder: Any, address: Any, element: Any, index: Any) -> Any:
    """16 elements from ``address + index * size`` as floats; ``element`` is a numba scalar type."""
    if element == types.float32:
        return load(builder, offset(builder, address, builder.mul(index, I64(4))), VF32)
    if element == types.uint16:  # bfloat16 bits
        bits = load(builder, offset(builder, address, builder.mul(index, I64(2))), ir.VectorType(I16, LANES))
        return builder.bitcast(builder.shl(builder.zext(bits, VI32), constant(_BF16_SHIFT, VI32)), VF32)
    raise TypeError(f"no vector load for {element}")


def round_bf16(builder: Any, value: Any) -> Any:
    """The bits of 16 floats as bfloat16, rounded to nearest even."""
    bits = builder.bitcast(value, VI32)
    odd = builder.and_(builder.lshr(bits, constant(_BF16_SHIFT, VI32)), constant(1, VI32))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF, VI32)))
    return builder.trunc(builder.lshr(rounded, constant(_BF16_SHIFT, VI32)), ir.VectorType(I16, LANES))


def reduce_tree(builder: Any, vector: Any) -> Any:
    """Sum of 16 lanes, halves added to halves."""
    return _reduce(builder, vector, builder.fadd)


def reduce_max(builder: Any, vector: Any) -> Any:
    """The largest of 16 floats."""
    return _reduce(builder, vector, lambda low, high: larger(builder, low, high))


def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of two floats, lane by lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduce(builder: Any, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    while vector.type.count > 1:
        half = vector.type.count // 2
        vector = join(
            _lanes(builder, vector, None, list(range(half))),
            _lanes(builder, vector, None, list(range(half, 2 * half))),
        )
    return builder.extract_element(vector, I32(0))


def _lanes(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of ``a`` and, counted on, of ``b``."""
    b = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def pick(builder: Any, vector: Any, lanes: list[int]) -> Any:
    """Some lanes of a vector, in that order."""
    return _lanes(builder, vector, None, lanes)


def lanes_of(builder: Any, vector: Any, first: int, count: int, step: int = 1) -> Any:
    """``count`` lanes of a vector, every ``step``-th from ``first`` on."""
    return _lanes(builder, vector, None, list(range(first, first + step * count, step)))


def join(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors as one."""
    return _lanes(builder, low, high, list(range(2 * low.type.count)))


# Bytes by which a stream of weights is asked for before it is used. Measured from 0 to 16384, into either cache: near
# ones leave the memory idle while rows are computed, and cost a second row as much time as it computes.
AHEAD = 8192


# Locality of LLVM's prefetch: to the second-level cache, or to be read once. What the latter does differs. Zen takes such lines
# into the second-level cache too and spares the last level; Intel's cores take them into the first level alone, where a
# dozen can be on their way: with int4 a pass took 9.2 ms so, and 2.0 the other way. Elsewhere it was not measured.
_SECOND_LEVEL, _READ_ONCE = 2, 0


def streaming_locality(cpu: str) -> int:
    """How weights that are read once a step are best asked for on ``cpu``, by LLVM's name of it."""
    return _READ_ONCE if cpu.startswith("znver") else _SECOND_LEVEL


def prefetch(builder: Any, address: Any, keep: bool) -> None:
    """Ask for the cache line at ``address``, into the second-level cache. What is not to be ``keep``-t leaves it for good,
    where that costs nothing, and so pushes nothing else out of the last-level cache."""
    locality = _SECOND_LEVEL if keep else streaming_locality(llvm.get_host_cpu_name())
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [pointer(builder, address, I8), I32(0), I32(locality), I32(1)])


@intrinsic
def ask_for(typingctx: Any, address: Any, count: Any) -> Any:
    """Have the cache lines of ``count`` bytes on their way into the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with cgutils.for_range_slice(builder, I64(0), args[1], I64(64), I64) as (index, _):
            prefetch(builder, offset(builder, args[0], index), keep=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def get_i64(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], I64)

    return types.int64(types.int64), codegen


@intrinsic
def get_f32(typingctx: Any, address: Any) -> Any:
    """The float32 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], F32)

    return types.float32(types.int64), codegen


@intrinsic
def put_f32(typingctx: Any, address: Any, value: Any) -> Any:
    """Store a float32 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def put_i64(typingctx: Any, address: Any, value: Any) -> Any:
    """Store an int64 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def get_wide(typingctx: Any, tag: Any, address: Any) -> Any:
    """The float32 or bfloat16 (``tag`` uint16) at ``address`` as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return load(builder, args[1], F32)
        bits = builder.zext(load(builder, args[1], I16), I32)
        return builder.bitcast(builder.shl(bits, I32(_BF16_SHIFT)), F32)

    return types.float32(tag, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at ``address`` and return what it held (sequentially consistent)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_exchange_if(typingctx: Any, address: Any, seen: Any, value: Any) -> Any:
    """Whether the int64 at ``address`` was ``seen``; then it is ``value`` now (sequentially consistent)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where = pointer(builder, args[0], I64)
        return builder.extract_value(builder.cmpxchg(where, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_get(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``, with acquire ordering."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_put(typingctx: Any, address: Any, value: Any) -> Any:
    """Store an int64 at ``address``, with release ordering."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64", "i386", "i686"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif machine in ("arm64", "aarch64"):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def ticks(typingctx: Any) -> Any:
    """A counter that runs evenly, at a rate of its own; 0 on CPUs where we know of none that a program may read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        machine, kind = platform.machine().lower(), ir.FunctionType(I64, [])
        if machine in ("x86_64", "amd64"):
            return builder.call(
                cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), []
            )
        if machine in ("arm64", "aarch64"):
            return builder.call(ir.InlineAsm(kind, "mrs $0, cntvct_el0", "=r", side_effect=True), [])
        return I64(0)

    return types.int64(), codegen


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have the core (``slipstream_give_way`` is registered by :mod:`engine.kernels.native`)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "slipstream_give_way"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def dot(typingctx: Any, tag: Any, x: Any, y: Any, count: Any) -> Any:
    """Sum of ``x[i] * y[i]``: ``x`` float32, ``y`` of the type of ``tag``, ``count`` a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, left, right, length = args
        total = cgutils.alloca_once_value(builder, constant(0.0))
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            a = widen(builder, left, types.float32, index)
            b = widen(builder, right, signature.args[0], index)
            builder.store(fma(builder, a, b, builder.load(total)), total)
        return reduce_tree(builder, builder.load(total))

    return types.float32(tag, types.int64, types.int64, types.int64), codegen


@intrinsic
def top(typingctx: Any, x: Any, count: Any) -> Any:
    """The largest of ``count`` floats, a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, length = args
        # Four at once, which do not wait for one another.
        best = [cgutils.alloca_once_value(builder, load(builder, base, VF32)) for _ in range(4)]
        for each in best:
            builder.store(load(builder, base, VF32), each)

        def look(index: Any, number: int) -> None:
            value = widen(builder, base, types.float32, offset(builder, index, LANES * number))
            builder.store(larger(builder, builder.load(best[number]), value), best[number])

        whole = builder.and_(length, I64(-4 * LANES))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(4 * LANES), I64) as (index, _):
            for number in range(4):
                look(index, number)
        with cgutils.for_range_slice(builder, whole, length, I64(LANES), I64) as (index, _):
            look(index, 0)
        left, right = (larger(builder, *map(builder.load, pair)) for pair in (best[:2], best[2:]))
        return reduce_max(builder, larger(builder, left, right))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def get_i8(typingctx: Any, address: Any) -> Any:
    """The unsigned byte at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(load(builder, args[0], I8), I64)

    return types.int64(types.int64), codegen


@intrinsic
def get_u32(typingctx: Any, address: Any) -> Any:
    """The unsigned 32 bits at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(load(builder, args[0], I32), I64)

    return types.int64(types.int64), codegen


@intrinsic
def put_u32(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the low 32 bits of an int64 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, builder.trunc(args[1], I32), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def put_i8(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the low 8 bits of an int64 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, builder.trunc(args[1], I8), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
