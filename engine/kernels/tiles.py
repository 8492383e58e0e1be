"""The inner loops of matmuls with row-major weights: a few rows times a few outputs, held in registers.

How many fit depends on the machine: 32 registers of 16 floats with AVX-512, else 16 registers of 8.

A tile of R rows does for each row exactly what a tile of one row does, in the same order; only the
unpacking of the weights is shared. That is what makes rows batch-invariant bit for bit.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.intrinsics import (
    I64,
    LANES,
    constant,
    fma,
    offset,
    reduce_tree,
    store,
    widen,
)  # fmt: skip

DOT_OUTPUTS = 4  # weight rows per tile of the row-major formats


def _has_wide_registers() -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


# Sums of 16 floats that a tile can hold beside its weights and inputs.
_SUMS = 16 if _has_wide_registers() else 4


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


dot_1, dot_2, dot_3, dot_4 = (_dot_tile(rows, DOT_OUTPUTS) for rows in (1, 2, 3, 4))
dot_single = _dot_tile(1, 1)
