"""Single float64 numbers in compiled code: powers of e and logarithms with the same bits wherever they run, and random
times."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.extending import intrinsic

from engine.kernels.choice_fields import MIX, STEP
from engine.kernels.compiling import compiled
from engine.kernels.intrinsics import I64, load, put_i64

_F64 = ir.DoubleType()
_ONE = 1023 << 52  # the bits of 1.0
_MANTISSA = (1 << 52) - 1
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2 = 0.6931471805599453
_LOG_SERIES = tuple(1 / term for term in range(21, 1, -2))
_EXP_SERIES = tuple(1 / math.factorial(term) for term in range(13, -1, -1))


@intrinsic
def get_f64(typingctx: Any, address: Any) -> Any:
    """The float64 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], _F64)

    return types.float64(types.int64), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """A float64's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I64)

    return types.int64(types.float64), codegen


@intrinsic
def from_bits(typingctx: Any, bits: Any) -> Any:
    """The float64 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F64)

    return types.float64(types.int64), codegen


@intrinsic
def random_bits(typingctx: Any, stream: Any, number: Any) -> Any:
    """64 random bits that belong to a number in a stream; also the stream of a position, where ``stream`` is a key."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.add(args[0], builder.mul(args[1], I64(STEP)))
        for shift, factor in MIX:
            bits = builder.mul(builder.xor(bits, builder.lshr(bits, I64(shift))), I64(factor))
        return builder.xor(bits, builder.lshr(bits, I64(31)))

    return types.int64(types.int64, types.int64), codegen


@compiled
def put_f64(address: int, value: float) -> None:
    put_i64(address, bits_of(value))


@compiled
def log_of(x: float) -> float:
    """Of a positive number, within an ulp or two: the same wherever it runs."""
    bits = bits_of(x)
    exponent = (bits >> 52) - 1023
    mantissa = from_bits((bits & _MANTISSA) | _ONE)
    if mantissa > 1.4142135623730951:
        mantissa, exponent = mantissa * 0.5, exponent + 1
    f = (mantissa - 1.0) / (mantissa + 1.0)
    s = f * f
    series = 0.0
    for coefficient in _LOG_SERIES:
        series = (series + coefficient) * s
    return exponent * _LN2 + 2.0 * f * (1.0 + series)


@compiled
def exp_of(x: float) -> float:
    """Of a number that is not positive, likewise."""
    if not x > -700.0:
        return 0.0
    power = int64(x * _LOG2_E - 0.5)
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    series = 0.0
    for coefficient in _EXP_SERIES:
        series = series * rest + coefficient
    return series * from_bits((power + 1023) << 52)


@compiled
def arrival(stream: int, token: int) -> float:
    """When a token arrives, exponentially distributed."""
    return -log_of(((random_bits(stream, token) >> 12 & _MANTISSA) + 0.5) * 2.220446049250313e-16)
