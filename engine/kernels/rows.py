"""Operations on rows of floats: sums, norms, SiLU, softmax. Lengths are multiples of 16 unless said otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.compiling import compiled
from engine.kernels.intrinsics import (
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    constant,
    dot,
    fma,
    get_f32,
    load,
    offset,
    put_f32,
    reduce_tree,
    round_bf16,
    splat,
    store,
    widen,
)  # fmt: skip

_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
_EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def _exp(builder: Any, x: Any) -> Any:
    """Vector exp by Cephes' polynomial, within 2 ulp; arguments are clamped to [-87, 88]."""
    x = _select(builder, ">", x, constant(-87.0))
    x = _select(builder, "<", x, constant(88.0))
    shifted = fma(builder, x, constant(_LOG2_E), constant(_ROUNDER))
    power = builder.fsub(shifted, constant(_ROUNDER))
    x = fma(builder, power, constant(-_LN2_HIGH), x)
    x = fma(builder, power, constant(-_LN2_LOW), x)
    series = constant(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        series = fma(builder, series, x, constant(coefficient))
    value = builder.fadd(fma(builder, series, builder.fmul(x, x), x), constant(1.0))
    bits = builder.shl(builder.add(builder.fptosi(power, VI32), constant(127, VI32)), constant(23, VI32))
    return builder.fmul(value, builder.bitcast(bits, VF32))


def _select(builder: Any, order: str, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(order, a, b), a, b)


def _at(builder: Any, address: Any, index: Any) -> Any:
    return offset(builder, address, builder.mul(index, I64(4)))


@intrinsic
def add_parts(typingctx: Any, out: Any, parts: Any, step: Any, num_parts: Any, count: Any) -> Any:
    """``out[i] += parts[0][i] + parts[1][i] + ...``, part by part; parts lie ``step`` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, base, part_step, number, length = args
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            total = cgutils.alloca_once_value(builder, load(builder, _at(builder, base, index), VF32))
            builder.store(load(builder, _at(builder, base, index), VF32), total)
            with cgutils.for_range_slice(builder, I64(1), number, I64(1), I64) as (part, _):
                row = offset(builder, base, builder.mul(part, part_step))
                builder.store(
                    builder.fadd(builder.load(total), load(builder, _at(builder, row, index), VF32)), total
                )
            where = _at(builder, target, index)
            store(builder, builder.fadd(load(builder, where, VF32), builder.load(total)), where)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def copy_row(typingctx: Any, out: Any, source: Any, count: Any) -> Any:
    """``out = source``, floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, base, length = args
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            store(builder, load(builder, _at(builder, base, index), VF32), _at(builder, target, index))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def copy_wide(typingctx: Any, tag: Any, out: Any, source: Any, count: Any) -> Any:
    """``out = source`` as floats; ``source`` is of the type of ``tag``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, target, base, length = args
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            store(builder, widen(builder, base, signature.args[0], index), _at(builder, target, index))
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 3), codegen


@intrinsic
def scale_row(typingctx: Any, out: Any, x: Any, weight: Any, factor: Any, count: Any) -> Any:
    """``out = weight * (x * factor)``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, base, gain, scalar, length = args
        wide = splat(builder, scalar)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            value = builder.fmul(load(builder, _at(builder, base, index), VF32), wide)
            value = builder.fmul(value, load(builder, _at(builder, gain, index), VF32))
            store(builder, value, _at(builder, target, index))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def add_scaled(typingctx: Any, out: Any, x: Any, factor: Any, count: Any) -> Any:
    """``out += factor * x``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, base, scalar, length = args
        wide = splat(builder, scalar)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            where = _at(builder, target, index)
            value = builder.fmul(load(builder, _at(builder, base, index), VF32), wide)
            store(builder, builder.fadd(load(builder, where, VF32), value), where)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def times_row(typingctx: Any, x: Any, factor: Any, count: Any) -> Any:
    """``x *= factor``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, scalar, length = args
        wide = splat(builder, scalar)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            where = _at(builder, base, index)
            store(builder, builder.fmul(load(builder, where, VF32), wide), where)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic
def fill_row(typingctx: Any, out: Any, value: Any, count: Any) -> Any:
    """``out = value``, ``count`` floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, scalar, length = args
        wide = splat(builder, scalar)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            store(builder, wide, _at(builder, base, index))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic
def narrow_row(typingctx: Any, tag: Any, out: Any, x: Any, count: Any) -> Any:
    """``out = x`` in the type of ``tag``: float32, or uint16 for bfloat16 (to nearest even)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, target, base, length = args
        size = signature.args[0].bitwidth // 8
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            value = load(builder, _at(builder, base, index), VF32)
            where = offset(builder, target, builder.mul(index, I64(size)))
            store(builder, value if size == 4 else round_bf16(builder, value), where)
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 3), codegen


@intrinsic
def exp_one(typingctx: Any, x: Any) -> Any:
    """``exp(x)``, with the bits of :func:`exp_row`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(_exp(builder, splat(builder, args[0])), I32(0))

    return types.float32(types.float32), codegen


@intrinsic
def silu_times(typingctx: Any, out: Any, gate: Any, up: Any, count: Any) -> Any:
    """``out = silu(gate) * up``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, left, right, length = args
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            value = load(builder, _at(builder, left, index), VF32)
            below = builder.fadd(constant(1.0), _exp(builder, builder.fsub(constant(0.0), value)))
            value = builder.fdiv(value, below)
            value = builder.fmul(value, load(builder, _at(builder, right, index), VF32))
            store(builder, value, _at(builder, target, index))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def exp_row(typingctx: Any, x: Any, top: Any, count: Any) -> Any:
    """``x = exp(x - top)`` in place; returns the sum of all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, maximum, length = args
        wide = splat(builder, maximum)
        total = cgutils.alloca_once_value(builder, constant(0.0))
        builder.store(constant(0.0), total)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            where = _at(builder, base, index)
            value = _exp(builder, builder.fsub(load(builder, where, VF32), wide))
            store(builder, value, where)
            builder.store(builder.fadd(builder.load(total), value), total)
        return reduce_tree(builder, builder.load(total))

    return types.float32(types.int64, types.float32, types.int64), codegen


def _exp_total(builder: Any, gains: Any, base: Any, maximum: Any, scalar: Any, length: Any) -> Any:
    """The sum of ``gains * exp((x - maximum) * scalar)`` over ``length`` floats ``x`` at ``base``; without gains: None."""
    wide, scale = splat(builder, maximum), splat(builder, scalar)
    total = cgutils.alloca_once_value(builder, constant(0.0))
    builder.store(constant(0.0), total)
    with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
        value = builder.fsub(load(builder, _at(builder, base, index), VF32), wide)
        value = _exp(builder, builder.fmul(value, scale))
        so_far = builder.load(total)
        if gains is None:
            value = builder.fadd(so_far, value)
        else:
            value = fma(builder, load(builder, _at(builder, gains, index), VF32), value, so_far)
        builder.store(value, total)
    return reduce_tree(builder, builder.load(total))


@intrinsic
def exp_total(typingctx: Any, x: Any, top: Any, factor: Any, count: Any) -> Any:
    """The sum of ``exp((x - top) * factor)``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _exp_total(builder, None, *args)

    return types.float32(types.int64, types.float32, types.float32, types.int64), codegen


@intrinsic
def weighed_total(typingctx: Any, weights: Any, x: Any, top: Any, factor: Any, count: Any) -> Any:
    """The sum of ``weights * exp((x - top) * factor)``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _exp_total(builder, *args)

    return types.float32(types.int64, types.int64, types.float32, types.float32, types.int64), codegen


_FLOAT32 = np.float32(0.0)


@compiled
def norm_row(out: int, x: int, weight: int, eps: float, count: int) -> None:
    """RMSNorm of one row; ``eps`` float32."""
    mean = dot(_FLOAT32, x, x, count) / np.float32(count)
    scale_row(out, x, weight, np.float32(1.0) / np.sqrt(np.float32(mean + eps)), count)


@intrinsic
def _rotate(typingctx: Any, x: Any, cos: Any, sin: Any, half: Any, count: Any) -> Any:
    """Pairs ``0 .. count - 1`` of a head, in 16s."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, cosines, sines, middle, length = args
        upper = _at(builder, base, middle)
        with cgutils.for_range_slice(builder, I64(0), length, I64(LANES), I64) as (index, _):
            places = [_at(builder, at, index) for at in (base, upper, cosines, sines)]
            first, second, c, s = (load(builder, place, VF32) for place in places)
            low = builder.fsub(builder.fmul(first, c), builder.fmul(second, s))
            high = builder.fadd(builder.fmul(second, c), builder.fmul(first, s))
            store(builder, low, places[0])
            store(builder, high, places[1])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@compiled
def rotate_row(x: int, cos: int, sin: int, half: int) -> None:
    """Rotate one head ``[2 * half]`` in place; its two halves form the pairs. ``half`` is any number."""
    whole = half // 16 * 16
    _rotate(x, cos, sin, half, whole)
    for i in range(whole, half):
        c, s = get_f32(cos + 4 * i), get_f32(sin + 4 * i)
        first, second = get_f32(x + 4 * i), get_f32(x + 4 * (half + i))
        put_f32(x + 4 * i, first * c - second * s)
        put_f32(x + 4 * (half + i), second * c + first * s)
