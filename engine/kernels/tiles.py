"""The inner loops of matmuls with row-major weights: a few rows times one output, held in registers.

A tile of R rows does for each row exactly what a tile of one row does, in the same order; only the
unpacking of the weights is shared. That is what makes rows batch-invariant bit for bit.
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
    AHEAD,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    constant,
    fma,
    join,
    load,
    offset,
    prefetch,
    reduce_tree,
    store,
    widen,
)  # fmt: skip

MOST_ROWS = 8  # of a tile: with two sums each, half of AVX-512's registers
_SUMS = 2  # of a row, each of every other 16 inputs: a single one would wait for each multiply-add before the next


def _sums(builder: Any, rows: int) -> list[list[Any]]:
    """Each row's sums, in registers, 0 at first."""
    result = [[cgutils.alloca_once(builder, VF32) for _ in range(_SUMS)] for _ in range(rows)]
    for total in (total for totals in result for total in totals):
        builder.store(constant(0.0), total)
    return result


def _store_sums(builder: Any, result: list[list[Any]], out: Any, out_step: Any) -> None:
    """Each row's sums, added up, to its output."""
    for r, totals in enumerate(result):
        total = builder.fadd(*(builder.load(each) for each in totals))
        at = offset(builder, out, builder.mul(out_step, I64(4 * r)))
        store(builder, reduce_tree(builder, total), at)


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
            result = _sums(builder, rows)
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
                    prefetch(
                        builder, offset(builder, base, builder.mul(k, I64(size)), AHEAD + line), keep=False
                    )
                for number in range(_SUMS):
                    add(offset(builder, k, LANES * number), number)
            with cgutils.for_range_slice(builder, whole, length, I64(LANES), I64) as (k, _):
                add(k, 0)
            _store_sums(builder, result, target, target_step)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 6), codegen

    return tile


def _pair_tile(rows: int) -> Any:
    """As :func:`_dot_tile` with bfloat16 weights and inputs rounded to bfloat16: AVX-512's ``vdpbf16ps`` multiplies 32 of
    them and adds neighbouring products up, all in float32."""
    pairs, halves = ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
    width = 2 * LANES

    @intrinsic
    def tile(
        typingctx: Any, tag: Any, weights: Any, count: Any, x: Any, x_step: Any, out: Any, out_step: Any
    ) -> Any:
        def add(builder: Any, total: Any, weight: Any, value: Any) -> None:
            kind = ir.FunctionType(VF32, [pairs, pairs, VF32])
            multiply = ir.InlineAsm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0")
            builder.store(builder.call(multiply, [weight, value, builder.load(total)]), total)

        def rest(builder: Any, address: Any) -> Any:
            """16 of them and as many zeros."""
            return builder.bitcast(join(builder, load(builder, address, halves), constant(0, halves)), pairs)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, base, length, left, left_step, target, target_step = args
            result = _sums(builder, rows)
            row_x = [offset(builder, left, builder.mul(left_step, I64(2 * r))) for r in range(rows)]
            twice, once = (builder.and_(length, I64(-each)) for each in (width * _SUMS, width))
            with cgutils.for_range_slice(builder, I64(0), twice, I64(width * _SUMS), I64) as (k, _):
                for number in range(_SUMS):
                    at = builder.mul(offset(builder, k, width * number), I64(2))
                    prefetch(builder, offset(builder, base, at, AHEAD), keep=False)
                    weight = load(builder, offset(builder, base, at), pairs)
                    for row, totals in zip(row_x, result, strict=True):
                        add(builder, totals[number], weight, load(builder, offset(builder, row, at), pairs))
            with cgutils.for_range_slice(builder, twice, once, I64(width), I64) as (k, _):
                at = builder.mul(k, I64(2))
                weight = load(builder, offset(builder, base, at), pairs)
                for row, totals in zip(row_x, result, strict=True):
                    add(builder, totals[0], weight, load(builder, offset(builder, row, at), pairs))
            with cgutils.for_range_slice(builder, once, length, I64(LANES), I64) as (k, _):
                at = builder.mul(k, I64(2))
                weight = rest(builder, offset(builder, base, at))
                for row, totals in zip(row_x, result, strict=True):
                    add(builder, totals[1], weight, rest(builder, offset(builder, row, at)))
            _store_sums(builder, result, target, target_step)
            return context.get_dummy_value()

        return types.void(tag, *[types.int64] * 6), codegen

    return tile


def has_pairs() -> bool:
    """Whether this processor multiplies pairs of bfloat16."""
    features = llvmlite.binding.get_host_cpu_features()
    return platform.machine().lower() in ("x86_64", "amd64") and bool(features.get("avx512bf16"))


DOTS = tuple(_dot_tile(rows) for rows in range(1, MOST_ROWS + 1))
PAIRS = tuple(_pair_tile(rows) for rows in range(1, MOST_ROWS + 1))
