"""Activations rounded to 8 bits, which weights in integers are multiplied by.

They are rounded per group of 32 inputs, ``x = step * q`` with ``q`` in -127 .. 127 (as llama.cpp does for its Q8_0). The
last group may have 16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    constant,
    larger,
    load,
    offset,
    reduce_max,
    reduce_tree,
    splat,
    store,
)  # fmt: skip

GROUP = 32  # inputs per step
# What is kept of a row's group beside its int8 inputs: step (float), sum(q) (float), and, int32, what the codes of int4
# and of int8 weights make too much: -8 * sum(q), -128 * sum(q).
GROUP_BYTES = 16
STEP, SUM, TOO_MUCH_INT4, TOO_MUCH_INT8 = 0, 4, 8, 12  # bytes
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even


@intrinsic
def round_row(typingctx: Any, x: Any, out: Any, extras: Any, count: Any) -> Any:
    """Round ``count`` float inputs ``x``, a multiple of 16, to int8 ``out`` and their groups' ``extras``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, extra, inputs = args

        def round_group(number: Any, halves: int) -> None:
            _round_group(
                builder,
                offset(builder, source, builder.mul(number, I64(4 * GROUP))),
                offset(builder, target, builder.mul(number, I64(GROUP))),
                offset(builder, extra, builder.mul(number, I64(GROUP_BYTES))),
                halves,
            )

        whole = builder.udiv(inputs, I64(GROUP))
        with cgutils.for_range(builder, whole, intp=I64) as loop:
            round_group(loop.index, 2)
        with builder.if_then(builder.icmp_unsigned("!=", builder.urem(inputs, I64(GROUP)), I64(0))):
            round_group(whole, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _round_group(builder: Any, source: Any, target: Any, extra: Any, halves: int) -> None:
    values = [load(builder, offset(builder, source, 4 * LANES * h), VF32) for h in range(halves)]
    highest = _magnitude(builder, values[0])
    for value in values[1:]:
        highest = larger(builder, highest, _magnitude(builder, value))
    top = reduce_max(builder, highest)
    step = builder.fmul(top, F32(1.0 / 127))
    some = builder.fcmp_ordered(">", step, F32(1e-30))
    inverse = splat(builder, builder.select(some, builder.fdiv(F32(127.0), top), F32(0.0)))
    total = None
    for h, value in enumerate(values):
        scaled = builder.fadd(builder.fmul(value, inverse), constant(_ROUNDER))
        rounded = builder.fsub(scaled, constant(_ROUNDER))
        total = rounded if total is None else builder.fadd(total, rounded)
        codes = builder.trunc(builder.fptosi(rounded, VI32), ir.VectorType(I8, LANES))
        store(builder, codes, offset(builder, target, LANES * h))
    sum_ = reduce_tree(builder, total)
    whole = builder.fptosi(sum_, I32)
    for value, at in (
        (step, STEP),
        (sum_, SUM),
        (builder.mul(whole, I32(-8)), TOO_MUCH_INT4),
        (builder.mul(whole, I32(-128)), TOO_MUCH_INT8),
    ):
        store(builder, value, offset(builder, extra, at))


def _magnitude(builder: Any, value: Any) -> Any:
    bits = builder.and_(builder.bitcast(value, VI32), constant(0x7FFFFFFF, VI32))
    return builder.bitcast(bits, VF32)
