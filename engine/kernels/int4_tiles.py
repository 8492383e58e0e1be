"""int4 weights times activations rounded to 8 bits, in integers.

Activations are rounded per group of 32 inputs, ``x = step * q`` with ``q`` in -127 .. 127 (as llama.cpp does
for its Q8_1). A group's products then add up exactly in 16 bits: ``sum((code - 8) * q)`` lies within
8 * 127 * 32 = 32512, so the sum of ``code * q`` may wrap around on the way once ``-8 * sum(q)`` is added. Integer
sums have no order, and each row's floats are combined group by group as if it were alone: rows are
batch-invariant bit for bit.
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
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    constant,
    fma,
    larger,
    load,
    offset,
    prefetch,
    reduce_max,
    reduce_tree,
    splat,
    store,
)  # fmt: skip

GROUP = 32  # inputs per scale, of weights and of activations
# What is kept of a row's group beside its 32 int8 inputs: step (float), sum(q) (float), -8 * sum(q) (int32).
GROUP_BYTES = 16
_SCALE_AHEAD = 4  # groups by which scales are prefetched: their lines are far apart
_BYTES, _WORDS = ir.VectorType(I8, 2 * LANES), ir.VectorType(I16, LANES)
_TWICE = ir.VectorType(
    I32, LANES // 2
)  # pairs of inputs, each stored twice: the load that spreads 4 bytes is free
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even


def _is_x86_with_avx2() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _pair_products(builder: Any, unsigned: Any, signed: Any) -> Any:
    """``u[2i] * s[2i] + u[2i + 1] * s[2i + 1]`` of 32 bytes each, in 16 words."""
    if _is_x86_with_avx2():
        kind = ir.FunctionType(_WORDS, [_BYTES, _BYTES])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.ub.sw")
        return builder.call(function, [unsigned, signed])
    words = ir.VectorType(I16, 2 * LANES)
    products = builder.mul(builder.zext(unsigned, words), builder.sext(signed, words))
    undefined = ir.Constant(words, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(products, undefined, ir.Constant(VI32, list(range(first, 2 * LANES, 2))))
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _splat(builder: Any, scalar: Any, kind: Any = _WORDS) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    )


def _int4_tile(rows: int, block: int) -> Any:
    """Tile of ``rows`` rows by ``block`` outputs of the layout that
    :meth:`engine.quantization.int4.Int4Linear.interleave` makes. Scale and zero are a pair of bf16."""
    vectors, half = block // LANES, block // LANES // 2

    @intrinsic
    def tile(
        typingctx: Any, packed: Any, scales: Any, scale_step: Any, groups: Any,
        x: Any, x_step: Any, extras: Any, extras_step: Any, out: Any, out_step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, pairs, pair_step, count, left, left_step, extra, extra_step, target, target_step = args
            grid = [(r, v) for r in range(rows) for v in range(vectors)]
            result = {cell: cgutils.alloca_once_value(builder, constant(0.0)) for cell in grid}
            total = {cell: cgutils.alloca_once(builder, _WORDS) for cell in grid}
            row_x = [offset(builder, left, builder.mul(left_step, I64(2 * r))) for r in range(rows)]
            row_extra = [offset(builder, extra, builder.mul(extra_step, I64(r))) for r in range(rows)]
            with cgutils.for_range(builder, count, intp=I64) as loop:
                group = loop.index
                group_pairs = offset(builder, pairs, builder.mul(group, pair_step))
                ahead = offset(builder, group_pairs, builder.mul(pair_step, I64(_SCALE_AHEAD)))
                for v in range(vectors):
                    prefetch(builder, offset(builder, ahead, 4 * LANES * v))
                own = [
                    offset(builder, row_extra[r], builder.mul(group, I64(GROUP_BYTES))) for r in range(rows)
                ]
                start = [
                    builder.trunc(load(builder, offset(builder, own[r], 8), I32), I16) for r in range(rows)
                ]
                base = offset(builder, codes, builder.mul(group, I64(GROUP * block // 2)))
                for cell in grid:
                    builder.store(_splat(builder, start[cell[0]]), total[cell])
                inputs = [offset(builder, row_x[r], builder.mul(group, I64(2 * GROUP))) for r in range(rows)]
                with cgutils.for_range(builder, I64(GROUP // 2), intp=I64) as inner:
                    line = offset(builder, base, builder.mul(inner.index, I64(block)))
                    prefetch(builder, offset(builder, line, AHEAD))
                    pair = builder.mul(inner.index, I64(4))
                    twice = [load(builder, offset(builder, inputs[r], pair), I32) for r in range(rows)]
                    signed = [builder.bitcast(_splat(builder, t, _TWICE), _BYTES) for t in twice]
                    for b in range(half):
                        raw = load(builder, offset(builder, line, 2 * LANES * b), _BYTES)
                        low = builder.and_(raw, ir.Constant(_BYTES, [15] * 2 * LANES))
                        high = builder.lshr(raw, ir.Constant(_BYTES, [4] * 2 * LANES))
                        for r in range(rows):
                            for v, unsigned in ((b, low), (half + b, high)):
                                products = _pair_products(builder, unsigned, signed[r])
                                cell = total[r, v]
                                builder.store(builder.add(builder.load(cell), products), cell)
                steps = [splat(builder, load(builder, own[r], F32)) for r in range(rows)]
                sums = [splat(builder, load(builder, offset(builder, own[r], 4), F32)) for r in range(rows)]
                for v in range(vectors):
                    both = load(builder, offset(builder, group_pairs, 4 * LANES * v), VI32)
                    scale = builder.bitcast(builder.shl(both, constant(16, VI32)), VF32)
                    zero = builder.bitcast(builder.and_(both, constant(-65536, VI32)), VF32)
                    for r in range(rows):
                        value = builder.sitofp(builder.sext(builder.load(total[r, v]), VI32), VF32)
                        value = fma(builder, zero, sums[r], builder.fmul(scale, value))
                        cell = result[r, v]
                        builder.store(fma(builder, steps[r], value, builder.load(cell)), cell)
            for r, v in grid:
                at = offset(builder, target, builder.mul(target_step, I64(4 * r)), 4 * LANES * v)
                store(builder, builder.load(result[r, v]), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


@intrinsic
def round_groups(typingctx: Any, x: Any, out: Any, extras: Any, groups: Any) -> Any:
    """Round ``groups`` groups of float inputs ``x`` to int8 ``out`` and their ``extras``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, extra, count = args
        with cgutils.for_range(builder, count, intp=I64) as loop:
            at = offset(builder, source, builder.mul(loop.index, I64(4 * GROUP)))
            halves = [load(builder, offset(builder, at, 4 * LANES * h), VF32) for h in range(2)]
            top = reduce_max(builder, larger(builder, *(_magnitude(builder, h) for h in halves)))
            step = builder.fmul(top, F32(1.0 / 127))
            some = builder.fcmp_ordered(">", step, F32(1e-30))
            inverse = splat(builder, builder.select(some, builder.fdiv(F32(127.0), top), F32(0.0)))
            total = None
            for h, value in enumerate(halves):
                scaled = builder.fadd(builder.fmul(value, inverse), constant(_ROUNDER))
                rounded = builder.fsub(scaled, constant(_ROUNDER))
                total = rounded if total is None else builder.fadd(total, rounded)
                codes = builder.trunc(builder.fptosi(rounded, VI32), ir.VectorType(I8, LANES))
                pairs = builder.bitcast(codes, ir.VectorType(I16, LANES // 2))
                twice = ir.Constant(VI32, [i // 2 for i in range(LANES)])
                pairs = builder.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), twice)
                at_out = offset(builder, target, builder.mul(loop.index, I64(2 * GROUP)), 2 * LANES * h)
                store(builder, pairs, at_out)
            sum_ = reduce_tree(builder, total)
            own = offset(builder, extra, builder.mul(loop.index, I64(GROUP_BYTES)))
            store(builder, step, own)
            store(builder, sum_, offset(builder, own, 4))
            store(builder, builder.fptosi(builder.fmul(sum_, F32(-8.0)), I32), offset(builder, own, 8))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _magnitude(builder: Any, value: Any) -> Any:
    bits = builder.and_(builder.bitcast(value, VI32), constant(0x7FFFFFFF, VI32))
    return builder.bitcast(bits, VF32)


int4_64_1, int4_64_2, int4_64_3, int4_64_4 = (_int4_tile(rows, 64) for rows in (1, 2, 3, 4))
int4_32_1, int4_32_2, int4_32_3, int4_32_4 = (_int4_tile(rows, 32) for rows in (1, 2, 3, 4))
