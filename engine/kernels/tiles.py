"""The inner loops of matmuls with row-major weights: a few rows times one output, held in registers.

A tile of R rows does for each row exactly what a tile of one row does, in the same order; only the
unpacking of the weights is shared. That is what makes rows batch-invariant bit for bit.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.intrinsics import (
    AHEAD,
    I64,
    LANES,
    VF32,
    constant,
    fma,
    offset,
    prefetch,
    reduce_tree,
    store,
    widen,
)  # fmt: skip


MOST_ROWS = 8  # of a tile: with two sums each, half of AVX-512's registers
_SUMS = 2  # of a row, each of every other 16 inputs: a single one would wait for each multiply-add before the next


def _dot_tile(rows: int) -> Any:
    """``rows`` rows times one weight row of the type of ``tag``.

    One at a time: several weight rows side by side were measured, and take up to twice as long, for memory likes
    one long stream.
    """

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, weights: Any, count: Any, x: Any, x_step: Any, out: Any, out_step: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, base, length, left, left_step, target, target_step = args
            result = [[cgutils.alloca_once(builder, VF32) for _ in range(_SUMS)] for _ in range(rows)]
            for totals in result:
                for total in totals:
                    builder.store(constant(0.0), total)
            row_x = [offset(builder, left, builder.mul(left_step, I64(4 * r))) for r in range(rows)]

            def add(k: Any, number: int) -> None:
                weight = widen(builder, base, signature.args[0], k)
                for r, totals in enumerate(result):
                    value, total = widen(builder, row_x[r], types.float32, k), totals[number]
                    builder.store(fma(builder, value, weight, builder.load(total)), total)

            size = signature.args[0].bitwidth // 8
            whole = builder.and_(length, I64(-LANES * _SUMS))
            with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES * _SUMS), I64) as (k, _):
                for line in range(0, LANES * _SUMS * size, 64):
                    prefetch(builder, offset(builder, base, builder.mul(k, I64(size)), AHEAD + line), keep=False)
                for number in range(_SUMS):
                    add(offset(builder, k, LANES * number), number)
            with cgutils.for_range_slice(builder, whole, length, I64(LANES), I64) as (k, _):
                add(k, 0)
            for r, totals in enumerate(result):
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)))
                total = builder.fadd(*(builder.load(each) for each in totals))
                store(builder, reduce_tree(builder, total), at)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 6), codegen

    return tile


DOTS = tuple(_dot_tile(rows) for rows in range(1, MOST_ROWS + 1))
