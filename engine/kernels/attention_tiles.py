"""The inner loops of attention: a few queries at once against the keys and values of neighbouring slots.

What several queries share is the reading and widening of keys and values. Keys lie slot beside slot
(:mod:`engine.models.kv_cache`), so that a register holds one dimension of many of them, and nothing has to be added up across
it. A query's own sums are made in the same order whatever it shares a tile with, and however wide registers are.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.intrinsics import (
    F32,
    I16,
    I32,
    I64,
    VF32,
    constant,
    fma,
    join,
    lanes_of,
    load,
    offset,
    pick,
    prefetch,
    round_bf16,
    splat,
    store,
)  # fmt: skip
from engine.models.kv_cache import KEY_BLOCK

TOGETHER = 5  # queries of a tile at most: as many as any processor has registers for


def _registers() -> tuple[int, int]:
    """How many floats one holds, and how many there are."""
    if llvmlite.binding.get_host_cpu_features().get("avx512f"):
        return 16, 32
    return (4, 32) if platform.machine().lower() in ("arm64", "aarch64") else (8, 16)


LANES, _REGISTERS = _registers()


def vectors_of(queries: int, registers: int = _REGISTERS) -> int:
    """How many vectors of keys or values a tile for so many queries takes at once: all sums stay in registers."""
    return 4 if (queries + 1) * 4 < registers else 2


def score_tile(queries: int, vectors: int, lanes: int = LANES) -> Any:
    """Products of ``queries`` queries ``[size]``, ``x_step`` bytes apart, with the keys of slots ``first .. last - 1`` of a
    block, times ``scale``; to ``out[query][slot]``, whose rows lie ``out_step`` bytes apart. Slots beside them, as far as
    whole vectors go, get scores too. What lies ``ahead`` bytes behind those keys is asked for."""
    width = lanes * vectors
    # The last of a head's tasks may have few slots, and the next one all of them.
    asked = width if vectors == vectors_of(queries) else KEY_BLOCK

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, x: Any, x_step: Any, keys: Any, first: Any, last: Any, size: Any, scale: Any,
        out: Any, out_step: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, left, left_step, base, begin, end, length, factor, target, target_step, ahead = args
            element = signature.args[0]
            begin = builder.and_(begin, I64(-width))
            factors = splat(builder, factor, lanes)
            xs = [offset(builder, left, builder.mul(left_step, I64(query))) for query in range(queries)]
            with cgutils.for_range_slice(builder, begin, end, I64(width), I64) as (slot, _):
                totals = _zeros(builder, queries, vectors, lanes)
                block = offset(builder, base, builder.mul(slot, I64(_bytes(element))))
                with cgutils.for_range_slice(builder, I64(0), length, I64(1), I64) as (index, _):
                    row = offset(builder, block, builder.mul(index, I64(KEY_BLOCK * _bytes(element))))
                    _ask_for(builder, offset(builder, row, ahead), asked * _bytes(element))
                    wide = _widen(builder, element, row, lanes, vectors)
                    _add(builder, xs, index, wide, totals)
                for query, cells in enumerate(totals):
                    place = builder.mul(target_step, I64(query))
                    at = offset(builder, target, place, builder.mul(slot, I64(4)))
                    sums = _in_order(builder, element, [builder.load(cell) for cell in cells])
                    for number, vector in enumerate(sums):
                        store(builder, builder.fmul(vector, factors), offset(builder, at, 4 * lanes * number))
            return context.get_dummy_value()

        whole = [types.int64] * 6
        return types.void(tag, *whole, types.float32, *[types.int64] * 3), codegen

    return tile


def mix_tile(queries: int, vectors: int, lanes: int = LANES) -> Any:
    """``out[query][0:lanes * vectors] += sum over first .. last - 1 of weights[query][s] * values[s]``; the steps are bytes
    from one query's weights and outputs to the next one's, and from row to row of the values. What lies ``ahead`` bytes
    behind those values is asked for."""

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, weights: Any, weight_step: Any, values: Any, value_step: Any, first: Any, last: Any,
        out: Any, out_step: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, left, left_step, base, step, begin, end, target, target_step, ahead = args
            element, floats = signature.args[0], ir.VectorType(F32, lanes)
            totals = _zeros(builder, queries, vectors, lanes)
            rows = [offset(builder, target, builder.mul(target_step, I64(query))) for query in range(queries)]
            for row, cells in zip(rows, totals, strict=True):
                before = [load(builder, offset(builder, row, 4 * lanes * v), floats) for v in range(vectors)]
                for cell, vector in zip(cells, _apart(builder, element, before), strict=True):
                    builder.store(vector, cell)
            xs = [offset(builder, left, builder.mul(left_step, I64(query))) for query in range(queries)]
            with cgutils.for_range_slice(builder, begin, end, I64(1), I64) as (slot, _):
                row = offset(builder, base, builder.mul(slot, step))
                _ask_for(builder, offset(builder, row, ahead), lanes * vectors * _bytes(element))
                _add(builder, xs, slot, _widen(builder, element, row, lanes, vectors), totals)
            for row, cells in zip(rows, totals, strict=True):
                sums = _in_order(builder, element, [builder.load(cell) for cell in cells])
                for number, vector in enumerate(sums):
                    store(builder, vector, offset(builder, row, 4 * lanes * number))
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 9), codegen

    return tile


@intrinsic
def score_alone(typingctx: Any, tag: Any, x: Any, key: Any, size: Any, scale: Any) -> Any:
    """One query's score of the slot whose first dimension is at ``key``, the same as a tile's."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, left, base, length, factor = args
        element, single = signature.args[0], ir.VectorType(F32, 1)
        total = cgutils.alloca_once_value(builder, constant(0.0, single))
        builder.store(constant(0.0, single), total)
        with cgutils.for_range_slice(builder, I64(0), length, I64(1), I64) as (index, _):
            at = offset(builder, base, builder.mul(index, I64(KEY_BLOCK * _bytes(element))))
            value = load(builder, offset(builder, left, builder.mul(index, I64(4))), single)
            if element == types.float32:
                other = load(builder, at, single)
            else:
                bits = builder.shl(builder.zext(load(builder, at, I16), I32), I32(16))
                other = splat(builder, builder.bitcast(bits, F32), 1)
            builder.store(fma(builder, value, other, builder.load(total)), total)
        return builder.fmul(builder.extract_element(builder.load(total), I32(0)), factor)

    return types.float32(tag, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def spread_row(typingctx: Any, tag: Any, out: Any, x: Any, size: Any) -> Any:
    """Write a key ``x [size]``, floats, into the slot whose first dimension is at ``out``, in the type of ``tag``: float32, or
    uint16 for bfloat16 (to nearest even)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, target, base, length = args
        step = KEY_BLOCK * _bytes(signature.args[0])
        with cgutils.for_range_slice(builder, I64(0), length, I64(16), I64) as (index, _):
            value = load(builder, offset(builder, base, builder.mul(index, I64(4))), VF32)
            row = value if signature.args[0] == types.float32 else round_bf16(builder, value)
            first = offset(builder, target, builder.mul(index, I64(step)))
            for lane in range(16):
                store(builder, builder.extract_element(row, I32(lane)), offset(builder, first, step * lane))
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 3), codegen


@intrinsic
def copy_key(typingctx: Any, tag: Any, out: Any, key: Any, size: Any) -> Any:
    """A key from one slot into another; both are named by where their first dimensions are."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, target, base, length = args
        kind = ir.IntType(8 * _bytes(signature.args[0]))
        with cgutils.for_range_slice(builder, I64(0), length, I64(1), I64) as (index, _):
            at = builder.mul(index, I64(KEY_BLOCK * _bytes(signature.args[0])))
            store(builder, load(builder, offset(builder, base, at), kind), offset(builder, target, at))
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 3), codegen


def _bytes(element: Any) -> int:
    """Of one, as the cache has it: float32, or bfloat16 (uint16)."""
    return 4 if element == types.float32 else 2


def _ask_for(builder: Any, address: Any, count: int) -> None:
    """Have the cache lines of ``count`` bytes on their way."""
    for line in range(0, count, 64):
        prefetch(builder, offset(builder, address, line), keep=True)


def _zeros(builder: Any, queries: int, vectors: int, lanes: int) -> list[list[Any]]:
    floats = ir.VectorType(F32, lanes)
    cells = [[cgutils.alloca_once(builder, floats) for _ in range(vectors)] for _ in range(queries)]
    for cell in (cell for row in cells for cell in row):
        builder.store(constant(0.0, floats), cell)
    return cells


def _add(builder: Any, xs: list[Any], index: Any, wide: list[Any], totals: list[list[Any]]) -> None:
    """Each query's ``x[index]`` times the vectors, to its sums."""
    for x, cells in zip(xs, totals, strict=True):
        factor = splat(
            builder,
            load(builder, offset(builder, x, builder.mul(index, I64(4))), F32),
            wide[0].type.count,
        )
        for cell, vector in zip(cells, wide, strict=True):
            builder.store(fma(builder, factor, vector, builder.load(cell)), cell)


def _widen(builder: Any, element: Any, address: Any, lanes: int, vectors: int) -> list[Any]:
    """Neighbours as floats. Of bfloat16 numbers a 32-bit word holds two, one of which is its upper half: vectors come in
    pairs, of the even and of the odd ones."""
    floats, words = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    if element == types.float32:
        return [load(builder, offset(builder, address, 4 * lanes * v), floats) for v in range(vectors)]
    wide = []
    for pair in range(vectors // 2):
        both = load(builder, offset(builder, address, 4 * lanes * pair), words)
        for half in (
            builder.shl(both, constant(16, words)),
            builder.and_(both, constant(-(1 << 16), words)),
        ):
            wide.append(builder.bitcast(half, floats))
    return wide


def _apart(builder: Any, element: Any, vectors: list[Any]) -> list[Any]:
    """Neighbours as :func:`_widen` has them."""
    if element == types.float32:
        return vectors
    lanes, found = vectors[0].type.count, []
    for low, high in zip(vectors[::2], vectors[1::2], strict=True):
        both = join(builder, low, high)
        found += [lanes_of(builder, both, first, lanes, 2) for first in (0, 1)]
    return found


def _in_order(builder: Any, element: Any, vectors: list[Any]) -> list[Any]:
    """As they were before :func:`_apart`."""
    if element == types.float32:
        return vectors
    lanes, found = vectors[0].type.count, []
    for even, odd in zip(vectors[::2], vectors[1::2], strict=True):
        both = join(builder, even, odd)
        order = [lane for n in range(lanes) for lane in (n, lanes + n)]
        found += [pick(builder, both, order[half : half + lanes]) for half in (0, lanes)]
    return found
