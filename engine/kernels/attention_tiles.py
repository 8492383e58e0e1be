"""The inner loops of attention: a few queries at once against the keys and values of neighbouring slots.

What several queries share is the widening of keys and values. A query's own sums are made in the same order whatever it
shares a tile with.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.intrinsics import (
    F32,
    I64,
    LANES,
    VF32,
    constant,
    fma,
    load,
    offset,
    reduce_four,
    reduce_tree,
    splat,
    store,
    widen,
)  # fmt: skip

# Queries of a tile at most, lanes of their sums of products, and vectors of 16 values that they are mixed from at once: what
# the processor has registers for.
_MANY_REGISTERS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
TOGETHER, _SUM_LANES, VECTORS = (4, LANES, 2) if _MANY_REGISTERS else (3, 8, 1)


def score_tile(queries: int, lanes: int = _SUM_LANES) -> Any:
    """Products of ``queries`` queries, ``x_step`` bytes apart, with keys ``first .. last - 1`` of rows ``key_step`` bytes
    apart, times ``scale``; to ``out[query][key]``, whose rows lie ``out_step`` bytes apart. ``size`` in 16s."""

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, x: Any, x_step: Any, keys: Any, key_step: Any, first: Any, last: Any, size: Any,
        scale: Any, out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def products(builder: Any, signature: Any, args: Any, key: Any, count: int) -> list[list[Any]]:
            """Of each query with ``count`` keys from number ``key`` on, some lanes each."""
            _, left, left_step, base, step, _, _, length, *_ = args
            rows = [offset(builder, base, builder.mul(step, builder.add(key, I64(n)))) for n in range(count)]
            xs = [offset(builder, left, builder.mul(left_step, I64(q))) for q in range(queries)]
            floats = ir.VectorType(F32, lanes)
            totals = [[cgutils.alloca_once(builder, floats) for _ in rows] for _ in xs]
            for cell in (cell for row in totals for cell in row):
                builder.store(constant(0.0, floats), cell)
            with cgutils.for_range_slice(builder, I64(0), length, I64(lanes), I64) as (index, _):
                wide = [widen(builder, row, signature.args[0], index, lanes) for row in rows]
                for query, cells in zip(xs, totals, strict=True):
                    value = widen(builder, query, types.float32, index, lanes)
                    for cell, other in zip(cells, wide, strict=True):
                        builder.store(fma(builder, value, other, builder.load(cell)), cell)
            return [[builder.load(cell) for cell in cells] for cells in totals]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            *_, begin, end, _, factor, target, target_step = args
            whole = builder.and_(builder.sub(end, begin), I64(-4))
            middle = builder.add(begin, whole)
            factors = splat(builder, factor, 4)
            with cgutils.for_range_slice(builder, begin, middle, I64(4), I64) as (key, _):
                for query, sums in enumerate(products(builder, signature, args, key, 4)):
                    at = offset(
                        builder, target, builder.mul(target_step, I64(query)), builder.mul(key, I64(4))
                    )
                    store(builder, builder.fmul(reduce_four(builder, sums), factors), at)
            with cgutils.for_range_slice(builder, middle, end, I64(1), I64) as (key, _):
                for query, sums in enumerate(products(builder, signature, args, key, 1)):
                    at = offset(
                        builder, target, builder.mul(target_step, I64(query)), builder.mul(key, I64(4))
                    )
                    store(builder, builder.fmul(reduce_tree(builder, sums[0]), factor), at)
            return context.get_dummy_value()

        kinds = [types.int64] * 7
        return types.void(tag, *kinds, types.float32, types.int64, types.int64), codegen

    return tile


def mix_tile(queries: int, vectors: int) -> Any:
    """``out[query][0:16 * vectors] += sum over first .. last - 1 of weights[query][s] * values[s]``; the steps are bytes
    from one query's weights and outputs to the next one's, and from row to row of the values."""

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, weights: Any, weight_step: Any, values: Any, value_step: Any, first: Any, last: Any,
        out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, left, left_step, base, step, begin, end, target, target_step = args
            places = [
                [
                    offset(builder, target, builder.mul(target_step, I64(q)), 4 * LANES * v)
                    for v in range(vectors)
                ]
                for q in range(queries)
            ]
            totals = [[cgutils.alloca_once(builder, VF32) for _ in row] for row in places]
            for row, cells in zip(places, totals, strict=True):
                for place, cell in zip(row, cells, strict=True):
                    builder.store(load(builder, place, VF32), cell)
            with cgutils.for_range_slice(builder, begin, end, I64(1), I64) as (slot, _):
                source = offset(builder, base, builder.mul(slot, step))
                wide = [widen(builder, source, signature.args[0], I64(LANES * v)) for v in range(vectors)]
                for q, cells in enumerate(totals):
                    at = offset(builder, left, builder.mul(left_step, I64(q)), builder.mul(slot, I64(4)))
                    weight = splat(builder, load(builder, at, F32))
                    for cell, value in zip(cells, wide, strict=True):
                        builder.store(fma(builder, weight, value, builder.load(cell)), cell)
            for row, cells in zip(places, totals, strict=True):
                for place, cell in zip(row, cells, strict=True):
                    store(builder, builder.load(cell), place)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 8), codegen

    return tile
