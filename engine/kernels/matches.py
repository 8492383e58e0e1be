"""Where a text's latest tokens occurred in it before, as native code: the runs of a few tokens, by their end, in a table with
open addresses."""

from __future__ import annotations

from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.intrinsics import get_i64, put_i64
from engine.kernels.round_fields import (
    FOUND,
    FOUND_LENGTH,
    LENGTHS,
    MOST_LENGTH,
    NUM_KNOWN,
    NUM_PLACES,
    TABLE,
    TEXT,
)
from engine.kernels.scalars import random_bits

_SHORTEST, _LONGEST = LENGTHS[0], LENGTHS[-1]


@compiled
def _place_of(index: int, end: int, length: int) -> int:
    """The address in the table of the run of that length, or of where it would be."""
    text, table = get_i64(index + 8 * TEXT), get_i64(index + 8 * TABLE)
    last, bits = get_i64(index + 8 * NUM_PLACES) - 1, length
    for place in range(end - length, end):
        bits = random_bits(bits, get_i64(text + 8 * place))
    number = bits & last
    while True:
        entry = get_i64(table + 8 * number)
        if entry == 0:
            return table + 8 * number
        if entry % MOST_LENGTH == length:
            same, back = entry // MOST_LENGTH, 1
            while back <= length and get_i64(text + 8 * (same - back)) == get_i64(text + 8 * (end - back)):
                back += 1
            if back > length:
                return table + 8 * number
        number = (number + 1) & last


@compiled
def find_match(index: int, known: int, end: int) -> int:
    """The length of the longest run that the first ``end`` tokens end with and that occurred among the first ``known`` with
    something behind it, and in ``FOUND`` what is behind its latest occurrence there; 0: none did."""
    for last in range(get_i64(index + 8 * NUM_KNOWN), known):
        for length in range(_SHORTEST, min(_LONGEST, last) + 1):
            put_i64(_place_of(index, last, length), last * MOST_LENGTH + length)
    put_i64(index + 8 * NUM_KNOWN, max(known, get_i64(index + 8 * NUM_KNOWN)))
    for length in range(min(_LONGEST, end), _SHORTEST - 1, -1):
        entry = get_i64(_place_of(index, end, length))
        if entry != 0:
            put_i64(index + 8 * FOUND, entry // MOST_LENGTH)
            return length
    return 0


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file.

    ``find(index, known, end)``: :func:`find_match`, whose length goes to ``FOUND_LENGTH``.
    """

    def find(index: int, known: int, end: int) -> None:
        put_i64(index + 8 * FOUND_LENGTH, find_match(index, known, end))

    return compile_entry_points(find)
