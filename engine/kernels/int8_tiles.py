"""int8 weights times activations rounded to 8 bits (:mod:`engine.kernels.rounding`), in integers.

A group's ``sum((code - 128) * q)`` is the sum of ``code * q`` and of ``-128 * sum(q)``. As with int4, rows are
batch-invariant bit for bit, and the same whichever instructions the processor has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.byte_dots import WHOLE, ByteDots, available
from engine.kernels.intrinsics import (
    AHEAD,
    F32,
    I8,
    I32,
    I64,
    LANES,
    constant,
    fma,
    lanes_of,
    load,
    offset,
    prefetch,
    splat,
    store,
    widen,
)  # fmt: skip
from engine.kernels.rounding import GROUP, GROUP_BYTES, STEP, TOO_MUCH_INT8

OUTPUTS = LANES  # of a tile
_LINE = 4 * OUTPUTS  # bytes: four inputs of all of them


def int8_tile(rows: int, dots: ByteDots, keep: bool = False) -> Any:
    """Tile of ``rows`` rows by 16 outputs of the layout that :mod:`engine.quantization.int8_layout` describes:
    ``codes`` of ``count`` inputs, a multiple of 16, and the outputs' ``scales``, bf16."""
    lanes = dots.lanes
    codes_kind, floats = ir.VectorType(I8, 4 * lanes), ir.VectorType(F32, lanes)
    pieces = range(0, OUTPUTS, lanes)  # outputs that are taken at once, by the first

    @intrinsic
    def tile(
        typingctx: Any, codes: Any, scales: Any, count: Any,
        x: Any, x_step: Any, extras: Any, extras_step: Any, out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def add_group(
            builder: Any, codes: Any, inputs: list[Any], own: list[Any], result: Any, count: int
        ) -> None:
            first = [
                splat(builder, load(builder, offset(builder, at, TOO_MUCH_INT8), I32), lanes) for at in own
            ]
            step = [splat(builder, load(builder, offset(builder, at, STEP), F32), lanes) for at in own]
            for ahead in range(0, count * OUTPUTS, _LINE):
                prefetch(builder, offset(builder, codes, AHEAD + ahead), keep)
            for piece in pieces:
                totals = [dots.start(builder, each) for each in first]
                for line in range(count // 4):
                    unsigned = load(builder, offset(builder, codes, _LINE * line + 4 * piece), codes_kind)
                    for r in range(rows):
                        four = splat(builder, load(builder, offset(builder, inputs[r], 4 * line), I32), lanes)
                        four = builder.bitcast(four, codes_kind)
                        totals[r] = dots.add(builder, totals[r], unsigned, four)
                for r in range(rows):
                    value = builder.sitofp(dots.sums(builder, totals[r], first[r]), floats)
                    cell = result[r, piece]
                    builder.store(fma(builder, step[r], value, builder.load(cell)), cell)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, scales, count, left, left_step, extra, extra_step, target, target_step = args
            result = {
                (r, piece): cgutils.alloca_once(builder, floats) for r in range(rows) for piece in pieces
            }
            for total in result.values():
                builder.store(constant(0.0, floats), total)
            row_x = [offset(builder, left, builder.mul(left_step, I64(r))) for r in range(rows)]
            row_extra = [offset(builder, extra, builder.mul(extra_step, I64(r))) for r in range(rows)]

            def add(number: Any, inputs: int) -> None:
                add_group(
                    builder,
                    offset(builder, codes, builder.mul(number, I64(GROUP * OUTPUTS))),
                    [offset(builder, at, builder.mul(number, I64(GROUP))) for at in row_x],
                    [offset(builder, at, builder.mul(number, I64(GROUP_BYTES))) for at in row_extra],
                    result,
                    inputs,
                )

            whole = builder.udiv(count, I64(GROUP))
            with cgutils.for_range(builder, whole, intp=I64) as loop:
                add(loop.index, GROUP)
            with builder.if_then(builder.icmp_unsigned("!=", builder.urem(count, I64(GROUP)), I64(0))):
                add(whole, GROUP // 2)
            scale = widen(builder, scales, types.uint16, I64(0))
            for (r, piece), total in result.items():
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)), 4 * piece)
                own = lanes_of(builder, scale, piece, lanes)
                store(builder, builder.fmul(builder.load(total), own), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


MOST_ROWS = (
    8 if WHOLE[available()[0]].lanes == LANES else 4
)  # of a tile, whose sums have to fit into the registers
STREAMED, KEPT = (
    tuple(int8_tile(rows, WHOLE[available()[0]], keep) for rows in range(1, MOST_ROWS + 1))
    for keep in (False, True)
)
