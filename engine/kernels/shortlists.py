"""Short lists of places and weights in compiled code: what reaches a bound, what is heaviest, what arrives first.

A list is the address of int64 places, or what stands there for them, and that of float64 weights.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.compiling import compiled
from engine.kernels.control import BLOCK
from engine.kernels.intrinsics import I16, I64, LANES, VF32, get_f32, get_i64, load, put_i64, splat
from engine.kernels.scalars import arrival, get_f64


@intrinsic
def _which_reach(typingctx: Any, x: Any, least: Any) -> Any:
    """Which of 16 floats are not below ``least``, a bit each; what is no number is not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.fcmp_unordered(">=", load(builder, args[0], VF32), splat(builder, args[1]))
        return builder.zext(builder.bitcast(found, I16), I64)

    return types.int64(types.int64, types.float32), codegen


@intrinsic
def _lowest(typingctx: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64, ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(function, [args[0], ir.IntType(1)(1)])

    return types.int64(types.int64), codegen


@compiled
def collect(x: int, begin: int, end: int, least: float, places: int, count: int, most: int) -> int:
    """Behind ``count`` places those of the floats from number ``begin`` up to ``end`` that are not below ``least``. Returns how
    many there are then: up to ``most``, else one more."""
    whole = begin + (end - begin) // LANES * LANES
    for first in range(begin, whole, LANES):
        found = _which_reach(x + 4 * first, least)
        while found != 0:
            if count == most:
                return most + 1
            put_i64(places + 8 * count, first + _lowest(found))
            count += 1
            found &= found - 1
    for place in range(whole, end):
        if not get_f32(x + 4 * place) < least:
            if count == most:
                return most + 1
            put_i64(places + 8 * count, place)
            count += 1
    return count


@compiled
def collect_from_blocks(x: int, size: int, maxima: int, least: float, places: int, most: int) -> int:
    """As :func:`collect`, of all ``size`` floats, without a look at blocks whose maxima are below ``least``."""
    count, blocks = 0, (size + BLOCK - 1) // BLOCK
    for first in range(0, blocks, LANES):  # maxima are filled up to so many
        found = _which_reach(maxima + 4 * first, least)
        while found != 0:
            begin = (first + _lowest(found)) * BLOCK
            count = collect(x, begin, min(begin + BLOCK, size), least, places, count, most)
            if count > most:
                return count
            found &= found - 1
    return count


@compiled
def first_of(tokens: int, weights: int, count: int, stream: int) -> int:
    """Which of the tokens arrives first."""
    first, earliest = -1, math.inf
    for number in range(count):
        time = arrival(stream, get_i64(tokens + 8 * number)) / get_f64(weights + 8 * number)
        if time < earliest:
            first, earliest = number, time
    return first


@compiled
def _swap(tokens: int, weights: int, a: int, b: int) -> None:
    for base in (tokens, weights):
        left, right = get_i64(base + 8 * a), get_i64(base + 8 * b)
        put_i64(base + 8 * a, right)
        put_i64(base + 8 * b, left)


@compiled
def _is_before(tokens: int, weights: int, a: int, b: int) -> bool:
    """The heavier, of equals the one with the lower number."""
    left, right = get_f64(weights + 8 * a), get_f64(weights + 8 * b)
    return left > right or (left == right and get_i64(tokens + 8 * a) < get_i64(tokens + 8 * b))


@compiled
def _sink(tokens: int, weights: int, place: int, count: int) -> None:
    """Mend a heap whose entry at ``place`` may be too light."""
    while True:
        child = 2 * place + 1
        if child >= count:
            return
        if child + 1 < count and _is_before(tokens, weights, child + 1, child):
            child += 1
        if not _is_before(tokens, weights, child, place):
            return
        _swap(tokens, weights, place, child)
        place = child


@compiled
def sort_heaviest(tokens: int, weights: int, count: int, wanted: int, enough: float) -> int:
    """Put the heaviest behind the others, the very heaviest last: up to ``wanted``, or until they weigh ``enough``. Returns how
    many they are."""
    for place in range(count // 2 - 1, -1, -1):
        _sink(tokens, weights, place, count)
    found, mass = 0, 0.0
    while found < min(wanted, count) and mass < enough:
        mass += get_f64(weights)
        found += 1
        _swap(tokens, weights, 0, count - found)
        _sink(tokens, weights, 0, count - found)
    return found


@compiled
def keep_from(tokens: int, weights: int, count: int, least: float) -> int:
    """Move those that weigh ``least`` or more to the front, and return how many they are."""
    kept = 0
    for number in range(count):
        if get_f64(weights + 8 * number) >= least:
            _swap(tokens, weights, kept, number)
            kept += 1
    return kept


@compiled
def mass_of(weights: int, first: int, count: int) -> float:
    """Of sorted weights behind ``first``, from the largest on."""
    mass = 0.0
    for number in range(count - 1, first - 1, -1):
        mass += get_f64(weights + 8 * number)
    return mass


@compiled
def heaviest(weights: int, first: int, count: int, share: float) -> int:
    """Where those begin, of the sorted weights behind ``first``, that have ``share`` of their mass."""
    enough, mass, place = share * mass_of(weights, first, count), 0.0, count
    while place > first and mass < enough:
        place -= 1
        mass += get_f64(weights + 8 * place)
    return place
