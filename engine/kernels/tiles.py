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
            result = [cgutils.alloca_once(builder, VF32) for _ in range(rows)]
            for total in result:
                builder.store(constant(0.0), total)
            row_x = [offset(builder, left, builder.mul(left_step, I64(4 * r))) for r in range(rows)]
            with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (k, _):
                place = builder.mul(k, I64(signature.args[0].bitwidth // 8))
                prefetch(builder, offset(builder, base, place, AHEAD), keep=False)
                weight = widen(builder, base, signature.args[0], k)
                for r, total in enumerate(result):
                    value = widen(builder, row_x[r], types.float32, k)
                    builder.store(fma(builder, value, weight, builder.load(total)), total)
            for r, total in enumerate(result):
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)))
                store(builder, reduce_tree(builder, builder.load(total)), at)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 6), codegen

    return tile


dot_1, dot_2, dot_3, dot_4 = (_dot_tile(rows) for rows in (1, 2, 3, 4))
