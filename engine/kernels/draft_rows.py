"""A row of a model's head put into a row of a draft head, as native code: behind a pass that swept the caches numpy takes up to
ten times as long, and torch longer.

The draft head is int4 in tiles (:mod:`engine.quantization.int4_layout`). A row is copied out of a head of that kind code by
code, and rounded to it from others, as :func:`engine.quantization.int4.quantize_groups` does.
"""

from __future__ import annotations

import numpy as np

from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.control import BLOCK
from engine.kernels.head_kinds import BF16, FP32, INT4, INT8_BLOCK
from engine.kernels.intrinsics import get_f32, get_i8, get_u32, get_wide, put_f32, put_u32
from engine.kernels.rounding import GROUP

_HALF = BLOCK // 2
_LINE = 64  # bytes
_CODES = 0x0F0F0F0F  # of a word, where an output of a block's first half has them
_BF16 = np.uint16(0)
_STEPS, _LEAST = np.float32(15), np.float32(1e-8)


@compiled
def _line(codes: int, row: int, inputs: int) -> int:
    """Where the first four codes of a row lie, which it shares with another; the next four a line behind them."""
    return codes + row // BLOCK * (inputs * _HALF) + 4 * (row % _HALF)


@compiled
def _pair(pairs: int, row: int, inputs: int) -> int:
    """Where the scale and zero of its first group lie; the next ``4 * BLOCK`` bytes behind them."""
    return pairs + 4 * (row // BLOCK * (inputs // GROUP) * BLOCK + row % BLOCK)


@compiled
def _put(line: int, row: int, word: int) -> None:
    shift = 4 * (row % BLOCK // _HALF)
    put_u32(line, (get_u32(line) & ~(_CODES << shift)) | (word << shift))


@compiled
def _copy(source: int, pairs: int, token: int, codes: int, own_pairs: int, row: int, inputs: int) -> None:
    before, line = _line(source, token, inputs), _line(codes, row, inputs)
    shift = 4 * (token % BLOCK // _HALF)
    for step in range(0, _LINE * (inputs // 4), _LINE):
        _put(line + step, row, (get_u32(before + step) >> shift) & _CODES)
    pair, own_pair = _pair(pairs, token, inputs), _pair(own_pairs, row, inputs)
    for step in range(0, 4 * BLOCK * (inputs // GROUP), 4 * BLOCK):
        put_u32(own_pair + step, get_u32(pair + step))


@compiled
def _value(kind: int, source: int, scales: int, token: int, number: int, inputs: int) -> float:
    """One weight of a row of a head."""
    if kind == BF16:
        return get_wide(_BF16, source + 2 * (token * inputs + number))
    if kind == FP32:
        return get_f32(source + 4 * (token * inputs + number))
    tile = source + token // INT8_BLOCK * INT8_BLOCK * inputs
    code = get_i8(tile + _LINE * (number // 4) + 4 * (token % INT8_BLOCK) + number % 4) - 128
    return get_wide(_BF16, scales + 2 * token) * np.float32(code)


@compiled
def _narrow(at: int, value: float) -> int:
    """The bits of ``value`` in bfloat16, to even; ``at`` is room for four bytes."""
    put_f32(at, value)
    bits = get_u32(at)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@compiled
def _widened(at: int, bits: int) -> float:
    put_u32(at, bits)
    return get_wide(_BF16, at)


@compiled
def _code(value: float) -> int:
    """The nearest of 0 to 15, to even."""
    code = int(value + np.float32(0.5))
    if np.float32(code) - value == np.float32(0.5) and code & 1:
        code -= 1
    return min(15, max(0, code))


@compiled
def _round(
    kind: int, source: int, scales: int, token: int, codes: int, pairs: int, row: int, inputs: int
) -> None:
    line, pair = _line(codes, row, inputs), _pair(pairs, row, inputs)
    for first in range(0, inputs, GROUP):
        low = high = _value(kind, source, scales, token, first, inputs)
        for number in range(first + 1, first + GROUP):
            value = _value(kind, source, scales, token, number, inputs)
            low, high = min(low, value), max(high, value)
        scale_bits = _narrow(pair, max((high - low) / _STEPS, _LEAST))
        scale = _widened(pair, scale_bits)
        zero_bits = _narrow(pair, low + np.float32(8) * scale)
        zero = _widened(pair, zero_bits)
        for number in range(first, first + GROUP, 4):
            word = 0
            for place in range(4):
                value = _value(kind, source, scales, token, number + place, inputs)
                word |= _code((value - zero) / scale + np.float32(8)) << (8 * place)
            _put(line + _LINE * (number // 4), row, word)
        put_u32(pair, scale_bits | (zero_bits << 16))
        pair += 4 * BLOCK


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file.

    ``take_row(kind, source, scales, token, codes, pairs, row, inputs)``: the row ``token`` of a head of that kind becomes the
    row ``row`` of a draft head.
    """

    def take_row(
        kind: int, source: int, scales: int, token: int, codes: int, pairs: int, row: int, inputs: int
    ) -> None:
        if kind == INT4:
            _copy(source, scales, token, codes, pairs, row, inputs)
        else:
            _round(kind, source, scales, token, codes, pairs, row, inputs)

    return compile_entry_points(take_row)
