"""int4 weights times activations rounded to 8 bits (:mod:`engine.kernels.rounding`), in integers.

A group's ``sum((code - 8) * q)`` is the sum of ``code * q`` and of ``-8 * sum(q)``. Integer sums have no order, and
each row's floats are combined group by group as if it were alone: rows are batch-invariant bit for bit, and the same
whichever instructions the processor has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.byte_dots import SMALL, ByteDots, available
from engine.kernels.control import BLOCK
from engine.kernels.intrinsics import (
    AHEAD,
    F32,
    I8,
    I32,
    I64,
    LANES,
    constant,
    fma,
    load,
    offset,
    prefetch,
    splat,
    store,
)  # fmt: skip
from engine.kernels.rounding import GROUP, GROUP_BYTES, STEP, SUM, TOO_MUCH_INT4

_LINE = 64  # bytes: four inputs of all outputs of a block
_CODE_BYTES, _PAIR_BYTES = GROUP * BLOCK // 2, 4 * BLOCK  # of a group


def int4_tile(rows: int, dots: ByteDots, keep: bool = False) -> Any:
    """Tile of ``rows`` rows by 32 outputs of the layout that :mod:`engine.quantization.int4_layout` describes: codes and,
    as pairs of bf16, scales and zeros of ``groups`` groups, one behind the other."""
    lanes = dots.lanes
    codes_kind, ints = ir.VectorType(I8, 4 * lanes), ir.VectorType(I32, lanes)
    floats = ir.VectorType(F32, lanes)
    # Bytes of a line that are taken at once: their low halves are outputs from ``j`` on, their high ones from 16 + j.
    pieces = range(0, LANES, lanes)
    cells = [(r, v) for r in range(rows) for v in range(0, BLOCK, lanes)]

    @intrinsic
    def tile(
        typingctx: Any, packed: Any, scales: Any, groups: Any,
        x: Any, x_step: Any, extras: Any, extras_step: Any, out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def add_group(
            builder: Any, codes: Any, pairs: Any, inputs: list[Any], own: list[Any], result: Any
        ) -> None:
            first = [
                splat(builder, load(builder, offset(builder, at, TOO_MUCH_INT4), I32), lanes) for at in own
            ]
            for ahead in range(0, _CODE_BYTES, _LINE):
                prefetch(builder, offset(builder, codes, AHEAD + ahead), keep)
            for ahead in range(0, _PAIR_BYTES, _LINE):
                prefetch(builder, offset(builder, pairs, AHEAD * _PAIR_BYTES // _CODE_BYTES + ahead), keep)
            for piece in pieces:
                totals = {
                    (r, half): dots.start(builder, first[r]) for r in range(rows) for half in (0, LANES)
                }
                for line in range(GROUP // 4):
                    raw = load(builder, offset(builder, codes, _LINE * line + 4 * piece), codes_kind)
                    low = builder.and_(raw, constant(15, codes_kind))
                    high = builder.lshr(raw, constant(4, codes_kind))
                    for r in range(rows):
                        four = splat(builder, load(builder, offset(builder, inputs[r], 4 * line), I32), lanes)
                        four = builder.bitcast(four, codes_kind)
                        for half, unsigned in ((0, low), (LANES, high)):
                            totals[r, half] = dots.add(builder, totals[r, half], unsigned, four)
                for half in (0, LANES):
                    both = load(builder, offset(builder, pairs, 4 * (half + piece)), ints)
                    scale = builder.bitcast(builder.shl(both, constant(16, ints)), floats)
                    zero = builder.bitcast(builder.and_(both, constant(-65536, ints)), floats)
                    for r in range(rows):
                        # Read where they are used: held from the beginning on they would take registers.
                        step = splat(builder, load(builder, offset(builder, own[r], STEP), F32), lanes)
                        sum_ = splat(builder, load(builder, offset(builder, own[r], SUM), F32), lanes)
                        value = builder.sitofp(dots.sums(builder, totals[r, half], first[r]), floats)
                        value = fma(builder, zero, sum_, builder.fmul(scale, value))
                        cell = result[r, half + piece]
                        builder.store(fma(builder, step, value, builder.load(cell)), cell)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, pairs, count, left, left_step, extra, extra_step, target, target_step = args
            result = {cell: cgutils.alloca_once(builder, floats) for cell in cells}
            for total in result.values():
                builder.store(constant(0.0, floats), total)
            row_x = [offset(builder, left, builder.mul(left_step, I64(r))) for r in range(rows)]
            row_extra = [offset(builder, extra, builder.mul(extra_step, I64(r))) for r in range(rows)]
            with cgutils.for_range(builder, count, intp=I64) as loop:
                add_group(
                    builder,
                    offset(builder, codes, builder.mul(loop.index, I64(_CODE_BYTES))),
                    offset(builder, pairs, builder.mul(loop.index, I64(_PAIR_BYTES))),
                    [offset(builder, at, builder.mul(loop.index, I64(GROUP))) for at in row_x],
                    [offset(builder, at, builder.mul(loop.index, I64(GROUP_BYTES))) for at in row_extra],
                    result,
                )
            for (r, v), total in result.items():
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)), 4 * v)
                store(builder, builder.load(total), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


# Of a tile. For more, or where registers are few, two tiles take less time.
MOST_ROWS = 6 if SMALL[available()[0]].lanes == LANES else 4
STREAMED, KEPT = (
    tuple(int4_tile(rows, SMALL[available()[0]], keep) for rows in range(1, MOST_ROWS + 1))
    for keep in (False, True)
)
