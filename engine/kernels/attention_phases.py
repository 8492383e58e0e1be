"""Attention, as every thread of the team runs it between barriers.

The slots that rows look at are cut into chunks at fixed places, and a task is one chunk for all query heads that share
its keys and values, of several rows (:mod:`engine.kernels.attention_chunks`).

A row that is an alternative to another one has the same position, and its key and value in a slot behind all others'.
It takes them from there where plain decoding finds them at its position, so its bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.adapter_phases import add_raised, lower
from engine.kernels.attention_chunks import attend_chunk, first_seen, join_chunks, key_offset, record_size
from engine.kernels.attention_tiles import spread_row
from engine.kernels.barrier import take, wait
from engine.kernels.compiling import ONE, compiled
from engine.kernels.control import (
    ATTENTION_CHUNK as CHUNK,
)  # fmt: skip
from engine.kernels.control import (
    ATTENTION_ROWS as ROWS_AT_ONCE,
)
from engine.kernels.control import (
    CAPACITY,
    COS,
    CREW,
    EPS,
    HEAD_DIM,
    HEADS,
    INPUTS,
    K_NORM,
    KEYS,
    KV_HEADS,
    OWN_FACTORS,
    OWN_KV,
    OWN_POSITIONS,
    OWN_QUERIES,
    OWN_ROWS,
    OWN_SLOTS,
    PHASE,
    Q_NORM,
    QKV,
    QKV_BUFFER,
    RANK_FIELDS,
    RANKS,
    RECORDS,
    SIN,
    VALUES,
    WHOLE_NORM,
    WINDOW,
)
from engine.kernels.intrinsics import ask_for, dot, get_f32, get_i64, put_f32
from engine.kernels.parts import join_parts, parts_left
from engine.kernels.rows import (
    narrow_row,
    norm_row,
    rotate_row,
    scale_row,
)

_FLOAT32 = np.float32(0.0)


@compiled
def _chunks_seen(own: int, layer: int, first: int, count: int) -> tuple[int, int]:
    """The first of the chunks that ``count`` rows from ``first`` on see some slots of, and how many they are."""
    positions, window = get_i64(own + 8 * OWN_POSITIONS) + 8 * first, get_i64(layer + 8 * WINDOW)
    lowest, highest = get_i64(positions), 0
    for row in range(count):
        lowest = min(lowest, first_seen(get_i64(positions + 8 * row), window))
        highest = max(highest, get_i64(positions + 8 * row))
    return lowest // CHUNK, highest // CHUNK + 1 - lowest // CHUNK


@compiled
def _place(control: int, kv_size: int, task: int, begin: int, chunks: int) -> int:
    """Bytes from a layer's keys to those of a task, and from its values."""
    slot = task // chunks * get_i64(control + 8 * CAPACITY) + (begin + task % chunks) * CHUNK
    return slot * get_i64(control + 8 * HEAD_DIM) * kv_size


@compiled
def _first_task(control: int, own: int, tasks: int, further: int) -> int:
    """The first that :func:`engine.kernels.barrier.take` gives to this thread, or to one ``further`` on."""
    rank = (own - control - 8 * RANKS) // (8 * RANK_FIELDS)
    return (rank + further) * tasks // get_i64(own + 8 * CREW)


@compiled
def ask_for_first(kv_size: int, control: int, own: int, layer: int) -> None:
    """Have the keys and values of this thread's first task on their way before attention begins."""
    begin, chunks = _chunks_seen(own, layer, 0, min(ROWS_AT_ONCE, get_i64(own + 8 * OWN_ROWS)))
    task = _first_task(control, own, get_i64(control + 8 * KV_HEADS) * chunks, 0)
    place = _place(control, kv_size, task, begin, chunks)
    count = CHUNK * get_i64(control + 8 * HEAD_DIM) * kv_size
    ask_for(get_i64(layer + 8 * KEYS) + place, count)
    ask_for(get_i64(layer + 8 * VALUES) + place, count)


@compiled
def attention_phase(
    tag: Any, kv: Any, kv_size: int, control: int, own: int, layer: int, x: int, adapter: int
) -> None:
    """All heads of all rows, into ``MIXED [rows, heads * size]``, and prepared for a matmul with weights of the type of
    ``tag``; ``x`` is what the projection was made of, ``adapter`` the one of row 1's queries, or 0."""
    if adapter != 0:
        lower(own, adapter, x + 4 * get_i64(layer + 8 * (QKV + INPUTS)), ONE)
    if get_i64(control + 8 * WHOLE_NORM) != 0:
        _find_factors(control, own, layer)
    rows, window = get_i64(own + 8 * OWN_ROWS), get_i64(layer + 8 * WINDOW)
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        begin, chunks = _chunks_seen(own, layer, first, count)
        # Two buffers by turns: others may still be joining what these tasks made of the rows before.
        records = get_i64(control + 8 * (RECORDS + get_i64(own + 8 * PHASE) % 2))
        step = (
            count * (get_i64(control + 8 * HEADS) // get_i64(control + 8 * KV_HEADS)) * record_size(control)
        )
        tasks = get_i64(control + 8 * KV_HEADS) * chunks
        last = _first_task(control, own, tasks, 1) - 1  # of this thread's own
        prepared = -1
        task = take(control, own, tasks)
        while task >= 0:
            group, chunk = task // chunks, begin + task % chunks
            if group != prepared:  # a thread has neighbouring tasks, so most of its groups it has for itself
                _prepare_queries(control, own, layer, adapter, first, count, group)
                prepared = group
            _write_cache(kv, kv_size, control, own, layer, first, count, group, chunk)
            # The next task's keys and values are asked for meanwhile.
            here = _place(control, kv_size, task, begin, chunks)
            ahead = _place(control, kv_size, task + 1, begin, chunks) - here if task < last else 0
            attend_chunk(
                kv, kv_size, control, own, layer, first, count, group, chunk, records + task * step, ahead
            )
            task = take(control, own, tasks)
        wait(control, own)
        join_chunks(tag, control, own, window, first, count, begin, chunks, records)
    wait(control, own)


@compiled
def _turn(control: int, head: int, norm: int, position: int) -> None:
    """Norm a query or key head if ``norm``, and rotate it, in place."""
    size = get_i64(control + 8 * HEAD_DIM)
    if norm != 0:
        norm_row(head, head, norm, get_f32(control + 8 * EPS), size)
    at = 4 * position * (size // 2)
    rotate_row(head, get_i64(control + 8 * COS) + at, get_i64(control + 8 * SIN) + at, size // 2)


@compiled
def _find_factors(control: int, own: int, layer: int) -> None:
    """What an RMSNorm over all heads multiplies each row's queries by, and its keys, into this thread's own ``FACTORS
    [rows, 2]``."""
    rows, heads = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * HEADS)
    kv_heads, size = get_i64(control + 8 * KV_HEADS), get_i64(control + 8 * HEAD_DIM)
    width, parts = (heads + 2 * kv_heads) * size, parts_left(control, layer + 8 * QKV)
    for row in range(rows):
        source = get_i64(control + 8 * QKV_BUFFER) + 4 * row * width
        factors = get_i64(own + 8 * OWN_FACTORS) + 8 * row
        step = 4 * rows * width
        put_f32(factors, _whole_factor(control, own, source, step, parts, heads))
        put_f32(factors + 4, _whole_factor(control, own, source + 4 * heads * size, step, parts, kv_heads))


@compiled
def _whole_factor(control: int, own: int, source: int, part_step: int, parts: int, heads: int) -> float:
    """What an RMSNorm over ``heads`` neighbouring heads of the projection multiplies them by."""
    size, scratch = get_i64(control + 8 * HEAD_DIM), get_i64(own + 8 * OWN_KV)
    total = np.float32(0.0)
    for head in range(heads):
        join_parts(scratch, source + 4 * head * size, part_step, parts, size)
        total += dot(_FLOAT32, scratch, scratch, size)
    mean = total / np.float32(heads * size)
    return np.float32(1.0) / np.sqrt(np.float32(mean + get_f32(control + 8 * EPS)))


@compiled
def _write_cache(
    kv: Any,
    kv_size: int,
    control: int,
    own: int,
    layer: int,
    first: int,
    count: int,
    group: int,
    chunk: int,
) -> None:
    """Into the cache go one head's rotated keys, and values, of those of ``count`` rows from ``first`` on whose positions
    are in a chunk: nobody else looks at them before the next barrier."""
    rows, heads, kv_heads = (
        get_i64(own + 8 * OWN_ROWS),
        get_i64(control + 8 * HEADS),
        get_i64(control + 8 * KV_HEADS),
    )
    size, capacity = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * CAPACITY)
    width, scratch = (heads + 2 * kv_heads) * size, get_i64(own + 8 * OWN_KV)
    parts, part_step = parts_left(control, layer + 8 * QKV), 4 * rows * width
    norm, whole = get_i64(layer + 8 * K_NORM), get_i64(control + 8 * WHOLE_NORM) != 0
    for row in range(first, first + count):
        slot = get_i64(get_i64(own + 8 * OWN_SLOTS) + 8 * row)
        position = get_i64(get_i64(own + 8 * OWN_POSITIONS) + 8 * row)
        if slot < 0 or position // CHUNK != chunk:
            continue
        source = get_i64(control + 8 * QKV_BUFFER) + 4 * (row * width + (heads + group) * size)
        head = group * capacity * size * kv_size
        join_parts(scratch, source, part_step, parts, size)
        if whole:
            factor = get_f32(get_i64(own + 8 * OWN_FACTORS) + 8 * row + 4)
            scale_row(scratch, scratch, norm + 4 * group * size, factor, size)
        _turn(control, scratch, 0 if whole else norm, position)
        spread_row(kv, get_i64(layer + 8 * KEYS) + head + key_offset(slot, size, kv_size), scratch, size)
        join_parts(scratch, source + 4 * kv_heads * size, part_step, parts, size)
        narrow_row(kv, get_i64(layer + 8 * VALUES) + head + slot * size * kv_size, scratch, size)


@compiled
def _prepare_queries(
    control: int, own: int, layer: int, adapter: int, first: int, count: int, group: int
) -> None:
    """The queries of ``count`` rows from ``first`` on that share one head of keys and values, normed and rotated, into this
    thread's own ``QUERIES [count, heads of each, size]``."""
    rows, heads = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * HEADS)
    size, kv_heads = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * KV_HEADS)
    width, each = (heads + 2 * kv_heads) * size, heads // kv_heads
    parts, whole = parts_left(control, layer + 8 * QKV), get_i64(control + 8 * WHOLE_NORM) != 0
    norm, query = get_i64(layer + 8 * Q_NORM), get_i64(own + 8 * OWN_QUERIES)
    for row in range(first, first + count):
        position = get_i64(get_i64(own + 8 * OWN_POSITIONS) + 8 * row)
        for head in range(group * each, (group + 1) * each):
            source = get_i64(control + 8 * QKV_BUFFER) + 4 * (row * width + head * size)
            join_parts(query, source, 4 * rows * width, parts, size)
            if adapter != 0 and row == 1:
                add_raised(own, adapter, head * size, size, query)
            if whole:
                factor = get_f32(get_i64(own + 8 * OWN_FACTORS) + 8 * row)
                scale_row(query, query, norm + 4 * head * size, factor, size)
            _turn(control, query, 0 if whole else norm, position)
            query += 4 * size
