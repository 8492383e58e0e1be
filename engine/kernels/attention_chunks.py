"""What a chunk of the cache gives for the queries that look at it, and how chunks are joined.

A query makes a record of a chunk: the best score, the sum of the weights, the weighted values. Records are joined chunk by
chunk, in the same order for a row whatever rows it shares the call with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.attention_tiles import TOGETHER, VECTORS, mix_tile, score_tile
from engine.kernels.compiling import compiled
from engine.kernels.control import (
    ATTENTION_CHUNK as CHUNK,
)  # fmt: skip
from engine.kernels.control import (
    CAPACITY,
    CREW,
    HEAD_DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    MIXED,
    MIXED_EXTRAS,
    MIXED_ROUNDED,
    OWN_POSITIONS,
    OWN_QUERIES,
    OWN_SCORES,
    OWN_SLOTS,
    RANK_FIELDS,
    RANKS,
    VALUES,
    WINDOW,
)
from engine.kernels.intrinsics import get_f32, get_i64, put_f32, top
from engine.kernels.matmul import prepare_part
from engine.kernels.rows import (
    add_parts,
    add_scaled,
    copy_row,
    exp_one,
    exp_row,
    fill_row,
    times_row,
)

_FLOAT32 = np.float32(0.0)
_MINUS_INFINITY = np.float32(-np.inf)
_HEADER = 16  # floats of a record before its weighted values: best score, sum of weights

_s1, _s2, _s3, _s4 = (score_tile(queries) for queries in (1, 2, 3, 4))
_m1, _m2, _m3, _m4 = (mix_tile(queries, VECTORS) for queries in (1, 2, 3, 4))
_WIDTH = 16 * VECTORS
_narrow = mix_tile(1, 1)


@compiled
def first_seen(position: int, window: int) -> int:
    """The first slot that a row sees."""
    return max(0, position + 1 - window) if window > 0 else 0


@compiled
def _seen(position: int, window: int, low: int) -> tuple[int, int]:
    """Which slots of the chunk that begins with slot ``low`` a row sees: from, and up to, counted in the chunk."""
    before = max(0, first_seen(position, window) - low)
    return before, max(before, min(CHUNK, position + 1 - low))


@compiled
def _apart(position: int, slot: int, low: int) -> int:
    """How many slots behind its position a row's own key and value lie, if the position is in the chunk that begins with
    slot ``low``; 0 for all but alternatives."""
    return slot - position if slot >= 0 and low <= position < low + CHUNK else 0


@compiled
def record_size(control: int) -> int:
    """Bytes of what a query makes of a chunk. Those of a task lie one behind the other, query by query, and the tasks' too,
    ``[kv heads, chunks, rows, heads of each]``."""
    return 4 * (get_i64(control + 8 * HEAD_DIM) + _HEADER)


@compiled
def attend_chunk(
    kv: Any,
    kv_size: int,
    control: int,
    own: int,
    layer: int,
    first: int,
    count: int,
    group: int,
    chunk: int,
    records: int,
) -> None:
    """One chunk of one head of keys and values, for all its queries of ``count`` rows from ``first`` on."""
    each = get_i64(control + 8 * HEADS) // get_i64(control + 8 * KV_HEADS)
    size, low, record_bytes = get_i64(control + 8 * HEAD_DIM), chunk * CHUNK, record_size(control)
    step = size * kv_size
    slot = (group * get_i64(control + 8 * CAPACITY) + low) * step
    keys, values = get_i64(layer + 8 * KEYS) + slot, get_i64(layer + 8 * VALUES) + slot
    window, positions = get_i64(layer + 8 * WINDOW), get_i64(own + 8 * OWN_POSITIONS) + 8 * first
    slots = get_i64(own + 8 * OWN_SLOTS) + 8 * first
    queries, scores = get_i64(own + 8 * OWN_QUERIES), get_i64(own + 8 * OWN_SCORES)
    for query in range(0, count * each, TOGETHER):
        many = min(TOGETHER, count * each - query)
        # What some of these queries see of the chunk, and what all of them do.
        some_begin, some_end, all_begin, all_end = CHUNK, 0, 0, CHUNK
        for one in range(query, query + many):
            position, slot = get_i64(positions + 8 * (one // each)), get_i64(slots + 8 * (one // each))
            begin, end = _seen(position, window, low)
            some_begin, some_end = min(some_begin, begin), max(some_end, end)
            shared = end - 1 if _apart(position, slot, low) != 0 else end
            all_begin, all_end = max(all_begin, begin), min(all_end, shared)
        if all_begin >= all_end:
            all_begin, all_end = CHUNK, CHUNK
        _score(kv, many, queries + 4 * query * size, keys, step, some_begin, some_end, size, scores)
        # What not all see is added alone: of a slot that a row does not see not even zero times a value may come.
        for one in range(many):
            weights, record = scores + 4 * one * CHUNK, records + (query + one) * record_bytes
            row = (query + one) // each
            begin, end = _seen(get_i64(positions + 8 * row), window, low)
            apart = _apart(get_i64(positions + 8 * row), get_i64(slots + 8 * row), low)
            if apart != 0:
                single = queries + 4 * (query + one) * size
                _score(kv, 1, single, keys + apart * step, step, end - 1, end, size, weights)
            _weigh(weights, begin, end, record)
            mixed, shared = record + 4 * _HEADER, end - 1 if apart != 0 else end
            fill_row(mixed, _FLOAT32, size)
            _mix(kv, kv_size, 1, weights, values, begin, min(all_begin, shared), size, mixed, 0)
        mixed = records + query * record_bytes + 4 * _HEADER
        _mix(kv, kv_size, many, scores, values, all_begin, all_end, size, mixed, record_bytes)
        for one in range(many):
            row = (query + one) // each
            _, end = _seen(get_i64(positions + 8 * row), window, low)
            apart = _apart(get_i64(positions + 8 * row), get_i64(slots + 8 * row), low)
            weights, own_mixed = scores + 4 * one * CHUNK, mixed + one * record_bytes
            shared = end - 1 if apart != 0 else end
            _mix(kv, kv_size, 1, weights, values, all_end, shared, size, own_mixed, 0)
            _mix(kv, kv_size, 1, weights, values + apart * step, shared, end, size, own_mixed, 0)


@compiled
def _score(
    kv: Any, many: int, queries: int, keys: int, step: int, begin: int, end: int, size: int, scores: int
) -> None:
    """Slots ``begin .. end - 1`` of the chunk, for ``many`` queries, to ``scores [many, CHUNK]``."""
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    if many == 4:
        _s4(kv, queries, 4 * size, keys, step, begin, end, size, scale, scores, 4 * CHUNK)
    elif many == 3:
        _s3(kv, queries, 4 * size, keys, step, begin, end, size, scale, scores, 4 * CHUNK)
    elif many == 2:
        _s2(kv, queries, 4 * size, keys, step, begin, end, size, scale, scores, 4 * CHUNK)
    else:
        _s1(kv, queries, 4 * size, keys, step, begin, end, size, scale, scores, 4 * CHUNK)


@compiled
def _weigh(scores: int, begin: int, end: int, record: int) -> None:
    """A query's scores of a chunk become weights, the best one's 1; the best score and their sum go to ``record``."""
    for slot in range(begin):
        put_f32(scores + 4 * slot, _MINUS_INFINITY)
    for slot in range(end, CHUNK):
        put_f32(scores + 4 * slot, _MINUS_INFINITY)
    best = top(scores, CHUNK)
    put_f32(record, best)
    # exp clamps at -87: a slot that is not seen weighs 1e-38, which no sum of the best one's 1 can notice
    put_f32(record + 4, exp_row(scores, best, CHUNK))


@compiled
def _mix(
    kv: Any,
    kv_size: int,
    many: int,
    weights: int,
    values: int,
    begin: int,
    end: int,
    size: int,
    out: int,
    out_step: int,
) -> None:
    """Add the weighted values of slots ``begin .. end - 1`` of the chunk to ``many`` queries' ``out``."""
    if begin >= end:
        return
    step, whole = size * kv_size, size // _WIDTH * _WIDTH
    for at in range(0, whole, _WIDTH):
        source, target = values + at * kv_size, out + 4 * at
        if many == 4:
            _m4(kv, weights, 4 * CHUNK, source, step, begin, end, target, out_step)
        elif many == 3:
            _m3(kv, weights, 4 * CHUNK, source, step, begin, end, target, out_step)
        elif many == 2:
            _m2(kv, weights, 4 * CHUNK, source, step, begin, end, target, out_step)
        else:
            _m1(kv, weights, 4 * CHUNK, source, step, begin, end, target, out_step)
    if whole < size:
        for one in range(many):
            source, target = values + whole * kv_size, out + one * out_step + 4 * whole
            _narrow(kv, weights + 4 * one * CHUNK, 0, source, step, begin, end, target, 0)


@compiled
def join_chunks(
    tag: Any,
    control: int,
    own: int,
    window: int,
    first: int,
    count: int,
    begin: int,
    chunks: int,
    records: int,
) -> None:
    """What rows ``first .. first + count - 1`` made of the chunks, joined in their order: this thread's share of heads."""
    heads, size = get_i64(control + 8 * HEADS), get_i64(control + 8 * HEAD_DIM)
    each, record_bytes = heads // get_i64(control + 8 * KV_HEADS), record_size(control)
    rounded, extras = get_i64(control + 8 * MIXED_ROUNDED), get_i64(control + 8 * MIXED_EXTRAS)
    # Two heads at a time where one is not whole groups of inputs of the next matmul.
    together = 1 if size % 32 == 0 else 2
    shares, threads = (heads + together - 1) // together, get_i64(own + 8 * CREW)
    rank = (own - control - 8 * RANKS) // (8 * RANK_FIELDS)
    from_ = min(heads, rank * shares // threads * together)
    to = min(heads, (rank + 1) * shares // threads * together)
    for row in range(first, first + count):
        position = get_i64(get_i64(own + 8 * OWN_POSITIONS) + 8 * row)
        seen = first_seen(position, window) // CHUNK - begin, position // CHUNK - begin
        mixed = get_i64(control + 8 * MIXED) + 4 * row * heads * size
        for head in range(from_, to):
            out = mixed + 4 * head * size
            best, total = _MINUS_INFINITY, _FLOAT32
            for chunk in range(seen[0], seen[1] + 1):
                place = ((head // each * chunks + chunk) * count + row - first) * each + head % each
                record = records + place * record_bytes
                score, part = get_f32(record), get_f32(record + 4)
                if best == _MINUS_INFINITY:
                    copy_row(out, record + 4 * _HEADER, size)
                    best, total = score, part
                elif score > best:
                    factor = exp_one(best - score)
                    times_row(out, factor, size)
                    add_parts(out, record + 4 * _HEADER, 0, 1, size)
                    best, total = score, total * factor + part
                else:
                    factor = exp_one(score - best)
                    add_scaled(out, record + 4 * _HEADER, factor, size)
                    total += factor * part
            times_row(out, np.float32(1.0) / total, size)
        if from_ < to:
            inputs, many = from_ * size, (to - from_) * size
            prepare_part(tag, mixed + 4 * inputs, row, inputs, many, heads * size, rounded, extras)
