"""Blocks of matmuls: which outputs and which part of the inputs one task computes.

A linear's descriptor is six int64: weights, scales, bias (0: none), N, K, number of parts. Splitting the
inputs into parts gives even work to the threads; it depends on the shape alone, never on the threads, and
the reader adds the parts in order.

The weight type is told by a tag argument: uint8 int4, int8, uint16 bfloat16, float32. Such weights are read once a step
and leave the caches behind them. What a draft step reads comes again soon and is little: uint32 is int4 and int32 int8
whose weights are left in the last-level cache, where the others leave them in peace. Each type is compiled only when
it is used. Where weights are integers, so are the inputs: rounded first (:mod:`engine.kernels.rounding`). Where the
processor multiplies pairs of bfloat16, inputs of such weights are rounded to it, as they are in torch; elsewhere they stay
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from engine.kernels import int4_tiles, int8_tiles, tiles
from engine.kernels.compiling import compiled
from engine.kernels.control import BIAS, BLOCK, INPUTS, OUTPUTS, PARTS, SCALES
from engine.kernels.intrinsics import get_f32, get_i8, get_i64, get_wide, put_f32
from engine.kernels.rounding import GROUP, GROUP_BYTES, STEP, SUM, round_row
from engine.kernels.rows import narrow_row

_BF16 = np.uint16(0)
_TILE = int8_tiles.OUTPUTS  # which divides a block


def prepare_part(
    tag: Any, x: int, row: int, first: int, count: int, inputs: int, rounded: int, extras: int
) -> None:
    """Prepare ``count`` of a row's ``inputs`` for :func:`multiply_block`, those from number ``first`` on, a multiple of 32:
    the floats at ``x`` are rounded into ``rounded`` and ``extras`` for int4 and int8, and for bfloat16 perhaps into
    ``rounded``, where those of all rows lie (numba functions only)."""
    raise NotImplementedError


def prepared(tag: Any, x: int, rounded: int) -> int:
    """Where :func:`multiply_block` finds its inputs: ``rounded``, or the floats ``x`` themselves (numba functions only)."""
    raise NotImplementedError


@compiled
def prepare_rows(tag: Any, x: int, rows: int, count: int, rounded: int, extras: int) -> int:
    """Prepare the floats ``x [rows, count]``; returns where they are to be found."""
    for row in range(rows):
        prepare_part(tag, x + 4 * row * count, row, 0, count, count, rounded, extras)
    return prepared(tag, x, rounded)


def multiply_block(
    tag: Any, linear: int, output: int, part: int, x: int, extras: int, out: int, out_step: int, rows: int
) -> None:
    """Outputs ``output .. output + block`` of ``rows`` prepared rows ``x`` (numba functions only).

    ``output`` is a multiple of 32 with int4, of 16 with int8. ``out`` is where the block's first row goes; rows lie ``out_step`` floats apart. The bias is added
    by part 0.
    """
    raise NotImplementedError


@compiled
def _int4_tail(
    linear: int, output: int, first: int, last: int, x: int, extras: int, out: int, out_step: int, rows: int
) -> None:
    """The last outputs of a matrix, fewer than a block: torch packs them as neighbouring pairs."""
    packed, scales = get_i64(linear), get_i64(linear + 8 * SCALES)
    n, k = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * INPUTS)
    width = n - output
    base, pairs = packed + output * k // 2, scales + 4 * (output * k // GROUP)
    for row in range(rows):
        for j in range(width):
            total = np.float32(0.0)
            for group in range(first, last):
                extra = extras + GROUP_BYTES * (row * (k // GROUP) + group)
                products = 0
                for i in range(group * GROUP, (group + 1) * GROUP):
                    code = (get_i8(base + (i * width + j) // 2) >> (4 * (j & 1))) & 15
                    rounded = get_i8(x + row * k + i)
                    products += (code - 8) * (rounded - 256 * (rounded >> 7))
                pair = pairs + 4 * (group * width + j)
                scale, zero = get_wide(_BF16, pair), get_wide(_BF16, pair + 2)
                total += get_f32(extra + STEP) * (scale * np.float32(products) + zero * get_f32(extra + SUM))
            put_f32(out + 4 * (row * out_step + j), total)


@compiled
def _add_bias(linear: int, output: int, width: int, out: int, out_step: int, rows: int) -> None:
    bias = get_i64(linear + 8 * BIAS)
    if bias != 0:
        for row in range(rows):
            for j in range(width):
                at = out + 4 * (row * out_step + j)
                put_f32(at, get_f32(at) + get_f32(bias + 4 * (output + j)))


@compiled
def _evenly(rows: int, most: int) -> int:
    """Rows of a tile: as few tiles as can be, and alike."""
    tiles = (rows + most - 1) // most
    return (rows + tiles - 1) // tiles


def _up_to_eight(tiles: Sequence[Callable[..., None]]) -> list[Callable[..., None]]:
    """The tiles by their rows; what there is none for is never asked for."""
    return [tiles[min(rows, len(tiles)) - 1] for rows in range(1, 9)]


def _int4_blocks(tiles: Sequence[Callable[..., None]]) -> Any:
    n1, n2, n3, n4, n5, n6, n7, n8 = _up_to_eight(tiles)
    most = len(tiles)

    @compiled
    def block(
        linear: int, output: int, part: int, x: int, extras: int, out: int, out_step: int, rows: int
    ) -> None:
        n, k = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * INPUTS)
        groups, parts = k // GROUP, get_i64(linear + 8 * PARTS)
        first, last = part * groups // parts, (part + 1) * groups // parts
        width = min(BLOCK, n - output)
        if width < BLOCK:
            _int4_tail(linear, output, first, last, x, extras, out, out_step, rows)
        else:
            codes = get_i64(linear) + output * k // 2 + first * (GROUP * BLOCK // 2)
            pairs = get_i64(linear + 8 * SCALES) + 4 * (output * groups + first * BLOCK)
            count, step, together = last - first, GROUP_BYTES * groups, _evenly(rows, most)
            for row in range(0, rows, together):
                a = x + row * k + first * GROUP
                e = extras + row * step + first * GROUP_BYTES
                o = out + 4 * row * out_step
                left = min(together, rows - row)
                if left == 1:
                    n1(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 2:
                    n2(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 3:
                    n3(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 4:
                    n4(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 5:
                    n5(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 6:
                    n6(codes, pairs, count, a, k, e, step, o, out_step)
                elif left == 7:
                    n7(codes, pairs, count, a, k, e, step, o, out_step)
                else:
                    n8(codes, pairs, count, a, k, e, step, o, out_step)
        if part == 0:
            _add_bias(linear, output, width, out, out_step, rows)

    return block


@compiled
def _int8_tail(
    linear: int, output: int, first: int, last: int, x: int, extras: int, out: int, out_step: int, rows: int
) -> None:
    """The last outputs of a matrix, fewer than a tile: they lie as rows."""
    scales, n, k = get_i64(linear + 8 * SCALES), get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * INPUTS)
    step = GROUP_BYTES * ((k + GROUP - 1) // GROUP)
    for row in range(rows):
        for j in range(output, n):
            total = np.float32(0.0)
            for group in range(first, last):
                products = 0
                for i in range(group * GROUP, min((group + 1) * GROUP, k)):
                    code, rounded = get_i8(get_i64(linear) + j * k + i), get_i8(x + row * k + i)
                    products += (code - 256 * (code >> 7)) * (rounded - 256 * (rounded >> 7))
                total += get_f32(extras + row * step + group * GROUP_BYTES + STEP) * np.float32(products)
            scale = get_wide(_BF16, scales + 2 * j)
            put_f32(out + 4 * (row * out_step + j - output), scale * total)


def _int8_blocks(tiles: Sequence[Callable[..., None]]) -> Any:
    b1, b2, b3, b4, b5, b6, b7, b8 = _up_to_eight(tiles)
    most = len(tiles)

    @compiled
    def block(
        linear: int, output: int, part: int, x: int, extras: int, out: int, out_step: int, rows: int
    ) -> None:
        n, k = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * INPUTS)
        groups, parts = (k + GROUP - 1) // GROUP, get_i64(linear + 8 * PARTS)
        first, last = part * groups // parts, (part + 1) * groups // parts
        begin, count, step = first * GROUP, min(last * GROUP, k) - first * GROUP, GROUP_BYTES * groups
        width = min(BLOCK, n - output)
        tiled, together = width // _TILE * _TILE, _evenly(rows, most)
        for j in range(0, tiled, _TILE):
            codes = get_i64(linear) + (output + j) * k + begin * _TILE
            scales = get_i64(linear + 8 * SCALES) + 2 * (output + j)
            for row in range(0, rows, together):
                a, e = x + row * k + begin, extras + row * step + first * GROUP_BYTES
                o, left = out + 4 * (row * out_step + j), min(together, rows - row)
                if left == 1:
                    b1(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 2:
                    b2(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 3:
                    b3(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 4:
                    b4(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 5:
                    b5(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 6:
                    b6(codes, scales, count, a, k, e, step, o, out_step)
                elif left == 7:
                    b7(codes, scales, count, a, k, e, step, o, out_step)
                else:
                    b8(codes, scales, count, a, k, e, step, o, out_step)
        if tiled < width:
            _int8_tail(linear, output + tiled, first, last, x, extras, out + 4 * tiled, out_step, rows)
        if part == 0:
            _add_bias(linear, output, width, out, out_step, rows)

    return block


_BLOCKS = {
    types.uint8: _int4_blocks(int4_tiles.STREAMED), types.uint32: _int4_blocks(int4_tiles.KEPT),
    types.int8: _int8_blocks(int8_tiles.STREAMED), types.int32: _int8_blocks(int8_tiles.KEPT),
}  # fmt: skip


def _row_major_blocks(dots: Sequence[Callable[..., None]], w_size: int, x_size: int) -> Any:
    d1, d2, d3, d4, d5, d6, d7, d8 = dots

    @compiled
    def block(
        tag: Any, linear: int, output: int, part: int, x: int, out: int, out_step: int, rows: int
    ) -> None:
        n, k, parts = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * INPUTS), get_i64(linear + 8 * PARTS)
        steps = k // 16
        first, last = part * steps // parts * 16, (part + 1) * steps // parts * 16
        count, step = last - first, k * w_size
        base = get_i64(linear) + output * step + first * w_size
        width = min(BLOCK, n - output)
        for row in range(0, rows, tiles.MOST_ROWS):
            a, left = x + x_size * (row * k + first), rows - row
            for j in range(width):
                w, o = base + j * step, out + 4 * (row * out_step + j)
                if left == 1:
                    d1(tag, w, count, a, k, o, out_step)
                elif left == 2:
                    d2(tag, w, count, a, k, o, out_step)
                elif left == 3:
                    d3(tag, w, count, a, k, o, out_step)
                elif left == 4:
                    d4(tag, w, count, a, k, o, out_step)
                elif left == 5:
                    d5(tag, w, count, a, k, o, out_step)
                elif left == 6:
                    d6(tag, w, count, a, k, o, out_step)
                elif left == 7:
                    d7(tag, w, count, a, k, o, out_step)
                else:
                    d8(tag, w, count, a, k, o, out_step)
        if part == 0:
            _add_bias(linear, output, width, out, out_step, rows)

    return block


_PAIRED = tiles.has_pairs()
_ROW_MAJOR_BLOCKS = {
    types.uint16: _row_major_blocks(tiles.PAIRS, 2, 2) if _PAIRED else _row_major_blocks(tiles.DOTS, 2, 4),
    types.float32: _row_major_blocks(tiles.DOTS, 4, 4),
}


@overload(prepare_part)
def _prepare_part(
    tag: Any, x: Any, row: Any, first: Any, count: Any, inputs: Any, rounded: Any, extras: Any
) -> Any:
    if tag == types.uint16 and _PAIRED:

        def narrow(
            tag: Any, x: Any, row: Any, first: Any, count: Any, inputs: Any, rounded: Any, extras: Any
        ) -> None:
            narrow_row(tag, rounded + 2 * (row * inputs + first), x, count)

        return narrow
    if tag not in _BLOCKS:

        def leave(
            tag: Any, x: Any, row: Any, first: Any, count: Any, inputs: Any, rounded: Any, extras: Any
        ) -> None:
            pass

        return leave

    def round_(
        tag: Any, x: Any, row: Any, first: Any, count: Any, inputs: Any, rounded: Any, extras: Any
    ) -> None:
        group = row * ((inputs + GROUP - 1) // GROUP) + first // GROUP
        round_row(x, rounded + row * inputs + first, extras + GROUP_BYTES * group, count)

    return round_


@overload(prepared)
def _prepared(tag: Any, x: Any, rounded: Any) -> Any:
    is_rounded = tag in _BLOCKS or (tag == types.uint16 and _PAIRED)

    def find(tag: Any, x: Any, rounded: Any) -> Any:
        return rounded if is_rounded else x

    return find


@overload(multiply_block)
def _multiply_block(
    tag: Any, linear: Any, output: Any, part: Any, x: Any, extras: Any, out: Any, out_step: Any, rows: Any
) -> Any:
    if tag in _BLOCKS:
        block = _BLOCKS[tag]

        def multiply(
            tag: Any,
            linear: Any,
            output: Any,
            part: Any,
            x: Any,
            extras: Any,
            out: Any,
            out_step: Any,
            rows: Any,
        ) -> None:
            block(linear, output, part, x, extras, out, out_step, rows)

        return multiply
    row_major = _ROW_MAJOR_BLOCKS[tag]

    def multiply_rows(
        tag: Any, linear: Any, output: Any, part: Any, x: Any, extras: Any, out: Any, out_step: Any, rows: Any
    ) -> None:
        row_major(tag, linear, output, part, x, out, out_step, rows)

    return multiply_rows
