"""What every thread of the team runs: a range of layers, or one matmul, in phases between barriers.

All threads run the same code on the same control block (an int64 array whose fields are named below).
Tasks of a phase are handed out by a shared counter, so a thread that the machine holds up takes fewer;
each task writes its own outputs, so who ran it leaves no trace in the result. What is cheap is computed by
every thread for itself (residual sums, norms) rather than shared behind another barrier.

A layer has five phases: qkv | rotate, attend | output | gate and up, SiLU | down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from engine.kernels.intrinsics import (
    atomic_add,
    atomic_get,
    dot,
    get_f32,
    get_i64,
    give_way,
    mix,
    pause,
    put_f32,
    put_i64,
    put_rounded,
)  # fmt: skip
from engine.kernels.matmul import INPUTS, LINEAR_FIELDS, OUTPUTS, PARTS, block_width, multiply_block
from engine.kernels.rows import (
    add_parts,
    copy_row,
    exp_row,
    group_sums,
    norm_row,
    rotate_row,
    silu_times,
)

# Control block, in int64 fields; the three counters have cache lines of their own.
SEQUENCE, ARRIVED, TICKETS = 0, 16, 32
(
    COMMAND, THREADS, ROWS, FIRST, LAST, HIDDEN, OUT, POSITIONS, WRITES, LAYERS, COS, SIN, CAPACITY,
    HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, EPS, QKV_BUFFER, MIXED, PARTS_BUFFER, ACT, GATE_UP, NORM, LINEAR,
) = range(48, 73)  # fmt: skip
RANKS = 96  # per thread RANK_FIELDS: epoch, base, h, x, sums, scores, keys
RANK_FIELDS = 16
EPOCH, BASE, OWN_H, OWN_X, OWN_SUMS, OWN_SCORES, OWN_KV = range(7)
RUN_LAYERS, RUN_MATMUL, STOP = 1, 2, 3

# A layer's record: norms, window (0: none), cache, then four linears.
ATTN_NORM, MLP_NORM, Q_NORM, K_NORM, WINDOW, KEYS, VALUES, QKV = range(8)
O_PROJ, GATE_UP_PROJ, DOWN_PROJ = QKV + LINEAR_FIELDS, QKV + 2 * LINEAR_FIELDS, QKV + 3 * LINEAR_FIELDS
LAYER_FIELDS = QKV + 4 * LINEAR_FIELDS

_SPINS = 500  # pauses (about 20 us) before a waiting thread lets others have its core
_FLOAT32 = np.float32(0.0)
_MINUS_INFINITY = np.float32(-np.inf)


@njit(nogil=True, error_model="numpy")
def _wait(control: int, own: int) -> None:
    """Barrier: returns when all threads have arrived."""
    target = get_i64(own + 8 * EPOCH) + get_i64(control + 8 * THREADS)
    put_i64(own + 8 * EPOCH, target)
    atomic_add(control + 8 * ARRIVED, 1)
    spins = 0
    while atomic_get(control + 8 * ARRIVED) < target:
        pause()
        spins += 1
        if spins > _SPINS:
            give_way()


@njit(nogil=True, error_model="numpy")
def _take(control: int, own: int) -> int:
    """The next task of this phase."""
    return atomic_add(control + 8 * TICKETS, 1) - get_i64(own + 8 * BASE)


@njit(nogil=True, error_model="numpy")
def _finish(control: int, own: int, tasks: int) -> None:
    """End a phase of ``tasks`` tasks. Each thread has drawn one ticket too many."""
    put_i64(own + 8 * BASE, get_i64(own + 8 * BASE) + tasks + get_i64(control + 8 * THREADS))
    _wait(control, own)


@njit(nogil=True, error_model="numpy")
def _sums(x: int, sums: int, rows: int, count: int) -> None:
    for row in range(rows):
        group_sums(x + 4 * row * count, sums + 4 * row * (count // 32), count // 32)


@njit(nogil=True, error_model="numpy")
def _matmul_phase(tag: Any, control: int, own: int, linear: int, x: int, out: int) -> None:
    """All outputs of one linear into ``out [parts, rows, N]``."""
    rows = get_i64(control + 8 * ROWS)
    outputs, parts = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * PARTS)
    sums = get_i64(own + 8 * OWN_SUMS)
    _sums(x, sums, rows, get_i64(linear + 8 * INPUTS))
    width = block_width(tag)
    blocks = (outputs + width - 1) // width
    tasks = blocks * parts
    task = _take(control, own)
    while task < tasks:
        block, part = task // parts, task % parts
        output = block * width
        target = out + 4 * (part * rows * outputs + output)
        multiply_block(tag, linear, output, part, x, sums, target, outputs, rows)
        task = _take(control, own)
    _finish(control, own, tasks)


@njit(nogil=True, error_model="numpy")
def _gate_up_phase(tag: Any, control: int, own: int, linear: int, x: int, act: int) -> None:
    """SiLU(gate) * up into ``act [rows, F]``; each task computes the same block of both."""
    rows = get_i64(control + 8 * ROWS)
    size = get_i64(linear + 8 * OUTPUTS) // 2
    sums, raw = get_i64(own + 8 * OWN_SUMS), get_i64(control + 8 * GATE_UP)
    _sums(x, sums, rows, get_i64(linear + 8 * INPUTS))
    width = block_width(tag)
    tasks = (size + width - 1) // width
    task = _take(control, own)
    while task < tasks:
        output = task * width
        for half in range(2):
            column = half * size + output
            multiply_block(tag, linear, column, 0, x, sums, raw + 4 * column, 2 * size, rows)
        for row in range(rows):
            gate = raw + 4 * (row * 2 * size + output)
            silu_times(act + 4 * (row * size + output), gate, gate + 4 * size, min(width, size - output))
        task = _take(control, own)
    _finish(control, own, tasks)


@njit(nogil=True, error_model="numpy")
def _norm_rows(control: int, own: int, weight: int) -> None:
    rows, size = get_i64(control + 8 * ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    h, x, eps = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X), get_f32(control + 8 * EPS)
    for row in range(rows):
        norm_row(x + 4 * row * size, h + 4 * row * size, weight, eps, size)


@njit(nogil=True, error_model="numpy")
def _add_residual(control: int, own: int, linear: int) -> None:
    """Add a linear's parts to this thread's own copy of the residual rows."""
    count = get_i64(control + 8 * ROWS) * get_i64(control + 8 * HIDDEN_SIZE)
    add_parts(
        get_i64(own + 8 * OWN_H),
        get_i64(control + 8 * PARTS_BUFFER),
        4 * count,
        get_i64(linear + 8 * PARTS),
        count,
    )


@njit(nogil=True, error_model="numpy")
def _head(control: int, out: int, source: int, part_step: int, parts: int, norm: int, position: int) -> None:
    """One query or key head: parts added, normed if ``norm``, rotated."""
    size = get_i64(control + 8 * HEAD_DIM)
    copy_row(out, source, size)
    if parts > 1:
        add_parts(out, source + part_step, part_step, parts - 1, size)
    if norm != 0:
        norm_row(out, out, norm, get_f32(control + 8 * EPS), size)
    if position >= 0:
        at = 4 * position * (size // 2)
        rotate_row(out, get_i64(control + 8 * COS) + at, get_i64(control + 8 * SIN) + at, size // 2)


@njit(nogil=True, error_model="numpy")
def _write_cache(kv: Any, kv_size: int, control: int, own: int, layer: int) -> None:
    """Rotated keys and values of all rows that write, into the cache. Every thread writes the same bits,
    which is cheaper than a barrier."""
    rows, heads, kv_heads = (
        get_i64(control + 8 * ROWS),
        get_i64(control + 8 * HEADS),
        get_i64(control + 8 * KV_HEADS),
    )
    size, capacity = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * CAPACITY)
    width = (heads + 2 * kv_heads) * size
    buffer, scratch = get_i64(control + 8 * QKV_BUFFER), get_i64(own + 8 * OWN_KV)
    parts = get_i64(layer + 8 * (QKV + PARTS))
    norm = get_i64(layer + 8 * K_NORM)
    for row in range(rows):
        if get_i64(get_i64(control + 8 * WRITES) + 8 * row) == 0:
            continue
        position = get_i64(get_i64(control + 8 * POSITIONS) + 8 * row)
        for head in range(2 * kv_heads):
            source = buffer + 4 * (row * width + (heads + head) * size)
            if head < kv_heads:
                _head(control, scratch, source, 4 * rows * width, parts, norm, position)
                target = get_i64(layer + 8 * KEYS) + (head * capacity + position) * size * kv_size
            else:
                _head(control, scratch, source, 4 * rows * width, parts, 0, -1)
                target = (
                    get_i64(layer + 8 * VALUES) + ((head - kv_heads) * capacity + position) * size * kv_size
                )
            for i in range(size):
                put_rounded(kv, target + i * kv_size, get_f32(scratch + 4 * i))


@njit(nogil=True, error_model="numpy")
def _attend(kv: Any, kv_size: int, control: int, own: int, layer: int, row: int, head: int) -> None:
    """One query head of one row over the slots it sees."""
    rows, heads, kv_heads = (
        get_i64(control + 8 * ROWS),
        get_i64(control + 8 * HEADS),
        get_i64(control + 8 * KV_HEADS),
    )
    size, capacity = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * CAPACITY)
    width = (heads + 2 * kv_heads) * size
    position = get_i64(get_i64(control + 8 * POSITIONS) + 8 * row)
    query, scores = get_i64(own + 8 * OWN_KV), get_i64(own + 8 * OWN_SCORES)
    source = get_i64(control + 8 * QKV_BUFFER) + 4 * (row * width + head * size)
    _head(
        control, query, source, 4 * rows * width, get_i64(layer + 8 * (QKV + PARTS)),
        get_i64(layer + 8 * Q_NORM), position,
    )  # fmt: skip
    window = get_i64(layer + 8 * WINDOW)
    begin = max(0, position + 1 - window) if window > 0 else 0
    count = position + 1 - begin
    slot = ((head // (heads // kv_heads)) * capacity + begin) * size * kv_size
    keys, values = get_i64(layer + 8 * KEYS) + slot, get_i64(layer + 8 * VALUES) + slot
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    top = _MINUS_INFINITY
    for i in range(count):
        score = dot(kv, query, keys + i * size * kv_size, size) * scale
        put_f32(scores + 4 * i, score)
        top = max(top, score)
    padded = (count + 15) // 16 * 16
    for i in range(count, padded):
        put_f32(scores + 4 * i, _MINUS_INFINITY)
    # exp clamps at -87: a padding lane weighs 1e-38, which no sum of a top score's 1 can notice
    share = np.float32(1.0) / exp_row(scores, top, padded)
    out = get_i64(control + 8 * MIXED) + 4 * (row * heads + head) * size
    for i in range(0, size, 16):
        mix(kv, scores, values + i * kv_size, size * kv_size, count, out + 4 * i)
    for i in range(size):
        put_f32(out + 4 * i, get_f32(out + 4 * i) * share)


@njit(nogil=True, error_model="numpy")
def _attention_phase(kv: Any, kv_size: int, control: int, own: int, layer: int) -> None:
    heads = get_i64(control + 8 * HEADS)
    tasks = get_i64(control + 8 * ROWS) * heads
    _write_cache(kv, kv_size, control, own, layer)
    task = _take(control, own)
    while task < tasks:
        _attend(kv, kv_size, control, own, layer, task // heads, task % heads)
        task = _take(control, own)
    _finish(control, own, tasks)


@njit(nogil=True, error_model="numpy")
def _run_layers(tag: Any, kv: Any, kv_size: int, control: int, own: int, rank: int) -> None:
    rows, size = get_i64(control + 8 * ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    h, x = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X)
    parts = get_i64(control + 8 * PARTS_BUFFER)
    copy_row(h, get_i64(control + 8 * HIDDEN), rows * size)
    last = get_i64(control + 8 * LAST)
    for index in range(get_i64(control + 8 * FIRST), last):
        layer = get_i64(control + 8 * LAYERS) + index * (8 * LAYER_FIELDS)
        _norm_rows(control, own, get_i64(layer + 8 * ATTN_NORM))
        _matmul_phase(tag, control, own, layer + 8 * QKV, x, get_i64(control + 8 * QKV_BUFFER))
        _attention_phase(kv, kv_size, control, own, layer)
        _matmul_phase(tag, control, own, layer + 8 * O_PROJ, get_i64(control + 8 * MIXED), parts)
        _add_residual(control, own, layer + 8 * O_PROJ)
        _norm_rows(control, own, get_i64(layer + 8 * MLP_NORM))
        act = get_i64(control + 8 * ACT)
        _gate_up_phase(tag, control, own, layer + 8 * GATE_UP_PROJ, x, act)
        _matmul_phase(tag, control, own, layer + 8 * DOWN_PROJ, act, parts)
        if rank != 0 and index == last - 1:
            return  # past the last barrier the caller may already be writing the next command
        _add_residual(control, own, layer + 8 * DOWN_PROJ)
    if rank == 0:
        copy_row(get_i64(control + 8 * OUT), h, rows * size)


@njit(nogil=True, error_model="numpy")
def _run_matmul(tag: Any, control: int, own: int) -> None:
    """``out = linear(norm(hidden))``; the norm is left out where its address is 0."""
    linear, x, norm = (
        get_i64(control + 8 * LINEAR),
        get_i64(control + 8 * HIDDEN),
        get_i64(control + 8 * NORM),
    )
    if norm != 0:
        copy_row(
            get_i64(own + 8 * OWN_H), x, get_i64(control + 8 * ROWS) * get_i64(control + 8 * HIDDEN_SIZE)
        )
        _norm_rows(control, own, norm)
        x = get_i64(own + 8 * OWN_X)
    _matmul_phase(tag, control, own, linear, x, get_i64(control + 8 * OUT))


@njit(nogil=True, cache=True, error_model="numpy")
def execute(tag: Any, kv: Any, kv_size: int, control: int, rank: int) -> None:
    """Run the command in the control block as thread ``rank``."""
    own = control + 8 * (RANKS + rank * RANK_FIELDS)
    if get_i64(control + 8 * COMMAND) == RUN_LAYERS:
        _run_layers(tag, kv, kv_size, control, own, rank)
    elif get_i64(control + 8 * COMMAND) == RUN_MATMUL:
        _run_matmul(tag, control, own)


@njit(nogil=True, cache=True, error_model="numpy")
def serve(tag: Any, kv: Any, kv_size: int, control: int, rank: int, seen: int, patience: int) -> int:
    """A worker's loop: run each new command; return the last one's number when none came for a while.

    ``patience`` is in spins of about 40 ns.
    """
    spins = 0
    while spins < patience:
        if atomic_get(control + 8 * SEQUENCE) == seen:
            pause()
            spins += 1
            continue
        seen += 1
        if get_i64(control + 8 * COMMAND) == STOP:
            return -1
        execute(tag, kv, kv_size, control, rank)
        spins = 0
    return seen


@njit(nogil=True, cache=True, error_model="numpy")
def publish(control: int) -> None:
    """Tell the workers that a command is in the control block."""
    atomic_add(control + 8 * SEQUENCE, 1)
