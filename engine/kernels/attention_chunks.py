"""What a chunk of the cache gives for the queries that look at it, and how chunks are joined.

A query makes a record of a chunk: the best score, the sum of the weights, the weighted values. Records are joined chunk by
chunk, in the same order for a row whatever rows it shares the call with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.attention_tiles import LANES, TOGETHER, mix_tile, score_alone, score_tile, vectors_of
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

_narrow = mix_tile(1, 2, 8)


def _scorer(queries: int) -> Any:
    """``_score`` for so many; few slots are not worth the whole width."""
    whole, part, few = score_tile(queries, vectors_of(queries)), score_tile(queries, 2), 2 * LANES

    @compiled
    def run(
        kv: Any, x: int, keys: int, begin: int, end: int, size: int, scores: int, ahead: int
    ) -> None:  # fmt: skip
        scale = scale_of(size)
        if end - begin // few * few > few:
            whole(kv, x, 4 * size, keys, begin, end, size, scale, scores, 4 * CHUNK, ahead)
        else:
            part(kv, x, 4 * size, keys, begin, end, size, scale, scores, 4 * CHUNK, ahead)

    return run


def _mixer(queries: int) -> Any:
    """``_mix`` for so many."""
    tile, width = mix_tile(queries, vectors_of(queries)), LANES * vectors_of(queries)

    @compiled
    def run(
        kv: Any, kv_size: int, weights: int, values: int, begin: int, end: int, size: int, out: int, out_step: int,
        ahead: int,
    ) -> None:  # fmt: skip
        step, whole = size * kv_size, size // width * width
        for at in range(0, whole, width):
            tile(
                kv, weights, 4 * CHUNK, values + at * kv_size, step, begin, end, out + 4 * at, out_step, ahead
            )
        for one in range(queries):
            for at in range(whole, size, 16):
                source, target = values + at * kv_size, out + one * out_step + 4 * at
                _narrow(kv, weights + 4 * one * CHUNK, 0, source, step, begin, end, target, 0, 0)

    return run


@compiled
def scale_of(size: int) -> float:
    """What scores are multiplied by, for heads of ``size``."""
    return np.float32(1.0) / np.sqrt(np.float32(size))


_s1, _s2, _s3, _s4, _s5 = (_scorer(queries) for queries in range(1, TOGETHER + 1))
_m1, _m2, _m3, _m4, _m5 = (_mixer(queries) for queries in range(1, TOGETHER + 1))


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
    ahead: int,
) -> None:
    """One chunk of one head of keys and values, for all its queries of ``count`` rows from ``first`` on. What lies ``ahead``
    bytes behind its keys and values is on its way then."""
    each = get_i64(control + 8 * HEADS) // get_i64(control + 8 * KV_HEADS)
    size, low, record_bytes = get_i64(control + 8 * HEAD_DIM), chunk * CHUNK, record_size(control)
    step = size * kv_size
    head = group * get_i64(control + 8 * CAPACITY) * step
    keys, values = get_i64(layer + 8 * KEYS) + head, get_i64(layer + 8 * VALUES) + head + low * step
    block = keys + key_offset(low, size, kv_size)
    window, positions = get_i64(layer + 8 * WINDOW), get_i64(own + 8 * OWN_POSITIONS) + 8 * first
    slots = get_i64(own + 8 * OWN_SLOTS) + 8 * first
    queries, scores = get_i64(own + 8 * OWN_QUERIES), get_i64(own + 8 * OWN_SCORES)
    for query in range(0, count * each, TOGETHER):
        many, further = min(TOGETHER, count * each - query), ahead if query == 0 else 0
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
        _score(kv, many, queries + 4 * query * size, block, some_begin, some_end, size, scores, further)
        # What not all see is added alone: of a slot that a row does not see not even zero times a value may come.
        for one in range(many):
            weights, record = scores + 4 * one * CHUNK, records + (query + one) * record_bytes
            row = (query + one) // each
            begin, end = _seen(get_i64(positions + 8 * row), window, low)
            apart = _apart(get_i64(positions + 8 * row), get_i64(slots + 8 * row), low)
            if apart != 0:
                single = queries + 4 * (query + one) * size
                key = keys + key_offset(low + end - 1 + apart, size, kv_size)
                put_f32(weights + 4 * (end - 1), score_alone(kv, single, key, size, scale_of(size)))
            _weigh(weights, begin, end, record)
            mixed, shared = record + 4 * _HEADER, end - 1 if apart != 0 else end
            fill_row(mixed, _FLOAT32, size)
            _mix(kv, kv_size, 1, weights, values, begin, min(all_begin, shared), size, mixed, 0, 0)
        mixed = records + query * record_bytes + 4 * _HEADER
        _mix(kv, kv_size, many, scores, values, all_begin, all_end, size, mixed, record_bytes, further)
        for one in range(many):
            row = (query + one) // each
            _, end = _seen(get_i64(positions + 8 * row), window, low)
            apart = _apart(get_i64(positions + 8 * row), get_i64(slots + 8 * row), low)
            weights, own_mixed = scores + 4 * one * CHUNK, mixed + one * record_bytes
            shared = end - 1 if apart != 0 else end
            _mix(kv, kv_size, 1, weights, values, all_end, shared, size, own_mixed, 0, 0)
            _mix(kv, kv_size, 1, weights, values + apart * step, shared, end, size, own_mixed, 0, 0)


@compiled
def key_offset(slot: int, size: int, kv_size: int) -> int:
    """Bytes from a head's first key to the first dimension of the key in ``slot``; the others follow ``CHUNK`` numbers
    apart."""
    return (slot // CHUNK * CHUNK * size + slot % CHUNK) * kv_size


@compiled
def _score(
    kv: Any, many: int, queries: int, keys: int, begin: int, end: int, size: int, scores: int, ahead: int
) -> None:
    """Slots ``begin .. end - 1`` of the chunk, and maybe ones beside them, for ``many`` queries, to ``scores [many,
    CHUNK]``."""
    if many == 5:
        _s5(kv, queries, keys, begin, end, size, scores, ahead)
    elif many == 4:
        _s4(kv, queries, keys, begin, end, size, scores, ahead)
    elif many == 3:
        _s3(kv, queries, keys, begin, end, size, scores, ahead)
    elif many == 2:
        _s2(kv, queries, keys, begin, end, size, scores, ahead)
    else:
        _s1(kv, queries, keys, begin, end, size, scores, ahead)


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
    ahead: int,
) -> None:
    """Add the weighted values of slots ``begin .. end - 1`` of the chunk to ``many`` queries' ``out``."""
    if begin >= end:
        return
    if many == 5:
        _m5(kv, kv_size, weights, values, begin, end, size, out, out_step, ahead)
    elif many == 4:
        _m4(kv, kv_size, weights, values, begin, end, size, out, out_step, ahead)
    elif many == 3:
        _m3(kv, kv_size, weights, values, begin, end, size, out, out_step, ahead)
    elif many == 2:
        _m2(kv, kv_size, weights, values, begin, end, size, out, out_step, ahead)
    else:
        _m1(kv, kv_size, weights, values, begin, end, size, out, out_step, ahead)


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
