"""The inner loops of the matmuls: a few rows times a few outputs, held in registers.

How many fit depends on the machine: 32 registers of 16 floats with AVX-512, else 16 registers of 8.

A tile of R rows does for each row exactly what a tile of one row does, in the same order; only the
unpacking of the weights is shared. That is what makes rows batch-invariant bit for bit.
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
    I8,
    I64,
    LANES,
    VF32,
    VI32,
    constant,
    fma,
    load,
    offset,
    prefetch,
    reduce_tree,
    splat,
    store,
    widen,
)  # fmt: skip

GROUP = 32  # inputs per int4 scale
MAX_TILE_ROWS = 4
DOT_OUTPUTS = 4  # weight rows per tile of the row-major formats
_SCALE_AHEAD = 4  # groups by which scales are prefetched: their lines are far apart
_UNROLL = 4


def _has_wide_registers() -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


# Sums of 16 floats that a tile can hold beside its weights and inputs. (Two int4 rows are 4 of them. Parts of a
# block for more rows were measured: unpacking twice costs more than two rows at a time.)
_SUMS = 16 if _has_wide_registers() else 4


def _int4_tile(rows: int, block: int) -> Any:
    """Tile of ``rows`` rows by ``block`` outputs of torch's CPU int4 layout.

    In that layout each input of a block has ``block / 2`` bytes: output ``j`` in the low half of byte
    ``j``, output ``block / 2 + j`` in the high half. Scale and zero are a pair of bf16.
    """
    vectors, half = block // LANES, block // LANES // 2

    @intrinsic
    def tile(
        typingctx: Any, packed: Any, scales: Any, scale_step: Any, groups: Any,
        x: Any, x_step: Any, sums: Any, sums_step: Any, out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, pairs, pair_step, count, left, left_step, totals, totals_step, target, target_step = args
            grid = [(r, v) for r in range(rows) for v in range(vectors)]
            result = {cell: cgutils.alloca_once_value(builder, constant(0.0)) for cell in grid}
            partial = {cell: cgutils.alloca_once(builder, VF32) for cell in grid}
            row_x = [offset(builder, left, builder.mul(left_step, I64(4 * r))) for r in range(rows)]
            row_sums = [offset(builder, totals, builder.mul(totals_step, I64(4 * r))) for r in range(rows)]
            with cgutils.for_range(builder, count, intp=I64) as outer:
                group = outer.index
                for cell in grid:
                    builder.store(constant(0.0), partial[cell])
                group_pairs = offset(builder, pairs, builder.mul(group, pair_step))
                ahead = offset(builder, group_pairs, builder.mul(pair_step, I64(_SCALE_AHEAD)))
                for v in range(vectors):
                    prefetch(builder, offset(builder, ahead, 4 * LANES * v))
                first = builder.mul(group, I64(GROUP))
                with cgutils.for_range_slice(builder, I64(0), I64(GROUP), I64(_UNROLL), I64) as (inner, _):
                    for step in range(_UNROLL):
                        k = builder.add(builder.add(first, inner), I64(step))
                        line = offset(builder, codes, builder.mul(k, I64(block // 2)))
                        raw = [
                            builder.zext(
                                load(builder, offset(builder, line, LANES * b), ir.VectorType(I8, LANES)),
                                VI32,
                            )
                            for b in range(half)
                        ]
                        weights = [builder.sitofp(builder.and_(r, constant(15, VI32)), VF32) for r in raw]
                        weights += [builder.sitofp(builder.lshr(r, constant(4, VI32)), VF32) for r in raw]
                        for r in range(rows):
                            at = offset(builder, row_x[r], builder.mul(k, I64(4)))
                            scalar = splat(builder, load(builder, at, F32))
                            for v in range(vectors):
                                cell = partial[r, v]
                                builder.store(fma(builder, scalar, weights[v], builder.load(cell)), cell)
                for v in range(vectors):
                    pair = load(builder, offset(builder, group_pairs, 4 * LANES * v), VI32)
                    scale = builder.bitcast(builder.shl(pair, constant(16, VI32)), VF32)
                    zero = builder.bitcast(builder.and_(pair, constant(-65536, VI32)), VF32)
                    zero = fma(builder, constant(-8.0), scale, zero)
                    for r in range(rows):
                        at = offset(builder, row_sums[r], builder.mul(group, I64(4)))
                        total = splat(builder, load(builder, at, F32))
                        value = fma(builder, scale, builder.load(partial[r, v]), builder.load(result[r, v]))
                        builder.store(fma(builder, zero, total, value), result[r, v])
            for r, v in grid:
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)), 4 * LANES * v)
                store(builder, builder.load(result[r, v]), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


def _dot_tile(rows: int, outputs: int) -> Any:
    """Tile of ``rows`` rows by ``outputs`` row-major weight rows of the type of ``tag``."""
    at_once = max(1, min(outputs, _SUMS // rows))

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, weights: Any, weight_step: Any, count: Any, x: Any, x_step: Any,
        out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for begin in range(0, outputs, at_once):
                part = range(begin, min(begin + at_once, outputs))
                _dot_part(builder, signature.args[0], args, rows, part)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 7), codegen

    return tile


def _dot_part(builder: Any, kind: Any, args: Any, rows: int, part: range) -> None:
    """The weight rows ``part`` of a tile."""
    _, base, base_step, length, left, left_step, target, target_step = args
    grid = [(r, o) for r in range(rows) for o in part]
    result = {cell: cgutils.alloca_once_value(builder, constant(0.0)) for cell in grid}
    row_x = [offset(builder, left, builder.mul(left_step, I64(4 * r))) for r in range(rows)]
    row_w = {o: offset(builder, base, builder.mul(base_step, I64(o))) for o in part}
    with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (k, _):
        weights = {o: widen(builder, row_w[o], kind, k) for o in part}
        for r in range(rows):
            value = widen(builder, row_x[r], types.float32, k)
            for o in part:
                cell = result[r, o]
                builder.store(fma(builder, value, weights[o], builder.load(cell)), cell)
    for r, o in grid:
        at = offset(builder, target, builder.mul(target_step, I64(4 * r)), 4 * o)
        store(builder, reduce_tree(builder, builder.load(result[r, o])), at)


int4_64_1, int4_64_2, int4_64_3, int4_64_4 = (_int4_tile(rows, 64) for rows in (1, 2, 3, 4))
int4_32_1, int4_32_2 = (_int4_tile(rows, 32) for rows in (1, 2))
dot_1, dot_2, dot_3, dot_4 = (_dot_tile(rows, DOT_OUTPUTS) for rows in (1, 2, 3, 4))
dot_single = _dot_tile(1, 1)
