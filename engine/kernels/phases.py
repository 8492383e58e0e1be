"""The phases of a layer, and of one matmul, as every thread of the team runs them between barriers.

What is cheap is computed by every thread for itself (residual sums, norms, low-rank adapters) rather than
shared behind another barrier. A layer has five phases: qkv | rotate, attend | output | gate and up, SiLU | down.

In a draft step row 0 is the slow stream's and row 1 the accelerated stream's; row 1 alone is given the
layer's adapters. Row 0 goes through the same arithmetic as without them, to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from engine.kernels.barrier import take, wait
from engine.kernels.control import (
    ACT,
    ATTN_NORM,
    BLOCK,
    CAPACITY,
    COS,
    DOWN_ADAPTER,
    DOWN_PROJ,
    EPS,
    GATE_UP,
    GATE_UP_ADAPTER,
    GATE_UP_PROJ,
    HEAD_DIM,
    HEADS,
    HIDDEN_SIZE,
    INPUTS,
    K_NORM,
    KEYS,
    KV_HEADS,
    LINEAR_FIELDS,
    MIXED,
    MLP_NORM,
    O_ADAPTER,
    O_PROJ,
    OUTPUTS,
    OWN_EXTRAS,
    OWN_FACTORS,
    OWN_H,
    OWN_KV,
    OWN_LOW,
    OWN_POSITIONS,
    OWN_RAISED,
    OWN_ROUNDED,
    OWN_ROWS,
    OWN_SCORES,
    OWN_WRITES,
    OWN_X,
    PARTS,
    PARTS_BUFFER,
    POSITIONS,
    Q_ADAPTER,
    Q_NORM,
    QKV,
    QKV_BUFFER,
    SIN,
    VALUES,
    WHOLE_NORM,
    WINDOW,
    WRITES,
)  # fmt: skip
from engine.kernels.intrinsics import (
    dot,
    dots,
    get_f32,
    get_i64,
    mix,
    mix_narrow,
    put_f32,
    put_i64,
    put_rounded,
    top,
)
from engine.kernels.matmul import multiply_block, prepare_rows
from engine.kernels.rows import add_parts, copy_row, exp_row, norm_row, rotate_row, scale_row, silu_times

_FLOAT32 = np.float32(0.0)
ADAPTER_TAG = np.int8(0)  # adapters and maps are int8, whatever the model's own format
_MINUS_INFINITY = np.float32(-np.inf)


@njit(nogil=True, error_model="numpy")
def use_rows(control: int, own: int, first: int, rows: int) -> None:
    """Have the phases that follow work on ``rows`` rows, at the command's positions from number ``first`` on."""
    put_i64(own + 8 * OWN_ROWS, rows)
    put_i64(own + 8 * OWN_POSITIONS, get_i64(control + 8 * POSITIONS) + 8 * first)
    put_i64(own + 8 * OWN_WRITES, get_i64(control + 8 * WRITES) + 8 * first)


@njit(nogil=True, error_model="numpy")
def matmul_phase(tag: Any, control: int, own: int, linear: int, x: int, rows: int, out: int) -> None:
    """All outputs of one linear into ``out [parts, rows, N]``."""
    outputs, parts = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * PARTS)
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    x = prepare_rows(tag, x, rows, get_i64(linear + 8 * INPUTS), rounded, extras)
    blocks = (outputs + BLOCK - 1) // BLOCK
    tasks = blocks * parts
    task = take(control, own, tasks)
    while task >= 0:
        block, part = task // parts, task % parts
        output = block * BLOCK
        target = out + 4 * (part * rows * outputs + output)
        multiply_block(tag, linear, output, part, x, extras, target, outputs, rows)
        task = take(control, own, tasks)
    wait(control, own)


@njit(nogil=True, error_model="numpy")
def _lower(own: int, adapter: int, x: int) -> None:
    """An adapter's first half on one row, into this thread's own scratch."""
    low = get_i64(own + 8 * OWN_LOW)
    rank = get_i64(adapter + 8 * OUTPUTS)
    for output in range(0, rank, BLOCK):
        multiply_block(ADAPTER_TAG, adapter, output, 0, x, x, low + 4 * output, rank, 1)


@njit(nogil=True, error_model="numpy")
def _add_raised(own: int, adapter: int, first: int, count: int, out: int) -> None:
    """Add outputs ``first .. first + count`` of an adapter's second half to ``out``; ``count`` in 16s."""
    up = adapter + 8 * LINEAR_FIELDS
    low, raised = get_i64(own + 8 * OWN_LOW), get_i64(own + 8 * OWN_RAISED)
    for output in range(0, count, BLOCK):
        multiply_block(ADAPTER_TAG, up, first + output, 0, low, low, raised, BLOCK, 1)
        add_parts(out + 4 * output, raised, 0, 1, min(BLOCK, count - output))


@njit(nogil=True, error_model="numpy")
def _gate_up_phase(tag: Any, control: int, own: int, linear: int, x: int, act: int, adapter: int) -> None:
    """SiLU(gate) * up into ``act [rows, F]``; each task computes the same block of both."""
    rows = get_i64(own + 8 * OWN_ROWS)
    inputs, size = get_i64(linear + 8 * INPUTS), get_i64(linear + 8 * OUTPUTS) // 2
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    raw = get_i64(control + 8 * GATE_UP)
    if adapter != 0:
        _lower(own, adapter, x + 4 * inputs)
    x = prepare_rows(tag, x, rows, inputs, rounded, extras)
    tasks = (size + BLOCK - 1) // BLOCK
    task = take(control, own, tasks)
    while task >= 0:
        output = task * BLOCK
        count = min(BLOCK, size - output)
        for half in range(2):
            column = half * size + output
            multiply_block(tag, linear, column, 0, x, extras, raw + 4 * column, 2 * size, rows)
            if adapter != 0:
                _add_raised(own, adapter, column, count, raw + 4 * (2 * size + column))
        for row in range(rows):
            gate = raw + 4 * (row * 2 * size + output)
            silu_times(act + 4 * (row * size + output), gate, gate + 4 * size, count)
        task = take(control, own, tasks)
    wait(control, own)


@njit(nogil=True, error_model="numpy")
def norm_rows(control: int, own: int, weight: int) -> None:
    """RMSNorm of this thread's own copy of the residual rows, into its own scratch."""
    rows, size = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    h, x, eps = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X), get_f32(control + 8 * EPS)
    for row in range(rows):
        norm_row(x + 4 * row * size, h + 4 * row * size, weight, eps, size)


@njit(nogil=True, error_model="numpy")
def _add_residual(control: int, own: int, linear: int, adapter: int, x: int) -> None:
    """Add a linear's parts to this thread's own copy of the residual rows; to row 1 also what an adapter
    makes of the linear's input ``x``."""
    size = get_i64(control + 8 * HIDDEN_SIZE)
    count = get_i64(own + 8 * OWN_ROWS) * size
    h = get_i64(own + 8 * OWN_H)
    add_parts(h, get_i64(control + 8 * PARTS_BUFFER), 4 * count, get_i64(linear + 8 * PARTS), count)
    if adapter != 0:
        _lower(own, adapter, x + 4 * get_i64(linear + 8 * INPUTS))
        _add_raised(own, adapter, 0, size, h + 4 * size)


@njit(nogil=True, error_model="numpy")
def _join(out: int, source: int, part_step: int, parts: int, size: int) -> None:
    """One head of the projection, its parts added."""
    copy_row(out, source, size)
    if parts > 1:
        add_parts(out, source + part_step, part_step, parts - 1, size)


@njit(nogil=True, error_model="numpy")
def _turn(control: int, head: int, norm: int, position: int) -> None:
    """Norm a query or key head if ``norm``, and rotate it, in place."""
    size = get_i64(control + 8 * HEAD_DIM)
    if norm != 0:
        norm_row(head, head, norm, get_f32(control + 8 * EPS), size)
    at = 4 * position * (size // 2)
    rotate_row(head, get_i64(control + 8 * COS) + at, get_i64(control + 8 * SIN) + at, size // 2)


@njit(nogil=True, error_model="numpy")
def _whole_factor(control: int, own: int, source: int, part_step: int, parts: int, heads: int) -> float:
    """What an RMSNorm over ``heads`` neighbouring heads of the projection multiplies them by."""
    size, scratch = get_i64(control + 8 * HEAD_DIM), get_i64(own + 8 * OWN_KV)
    total = np.float32(0.0)
    for head in range(heads):
        _join(scratch, source + 4 * head * size, part_step, parts, size)
        total += dot(_FLOAT32, scratch, scratch, size)
    mean = total / np.float32(heads * size)
    return np.float32(1.0) / np.sqrt(np.float32(mean + get_f32(control + 8 * EPS)))


@njit(nogil=True, error_model="numpy")
def _write_cache(kv: Any, kv_size: int, control: int, own: int, layer: int) -> None:
    """Rotated keys and values of all rows that write, into the cache. Every thread writes the same bits,
    which is cheaper than a barrier."""
    rows, heads, kv_heads = (
        get_i64(own + 8 * OWN_ROWS),
        get_i64(control + 8 * HEADS),
        get_i64(control + 8 * KV_HEADS),
    )
    size, capacity = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * CAPACITY)
    width = (heads + 2 * kv_heads) * size
    buffer, scratch = get_i64(control + 8 * QKV_BUFFER), get_i64(own + 8 * OWN_KV)
    parts = get_i64(layer + 8 * (QKV + PARTS))
    norm, whole = get_i64(layer + 8 * K_NORM), get_i64(control + 8 * WHOLE_NORM) != 0
    for row in range(rows):
        if get_i64(get_i64(own + 8 * OWN_WRITES) + 8 * row) == 0:
            continue
        position = get_i64(get_i64(own + 8 * OWN_POSITIONS) + 8 * row)
        factor = np.float32(1.0)
        if whole:
            keys = buffer + 4 * (row * width + heads * size)
            factor = _whole_factor(control, own, keys, 4 * rows * width, parts, kv_heads)
        for head in range(2 * kv_heads):
            source = buffer + 4 * (row * width + (heads + head) * size)
            _join(scratch, source, 4 * rows * width, parts, size)
            if head < kv_heads:
                if whole:
                    scale_row(scratch, scratch, norm + 4 * head * size, factor, size)
                _turn(control, scratch, 0 if whole else norm, position)
                target = get_i64(layer + 8 * KEYS) + (head * capacity + position) * size * kv_size
            else:
                target = (
                    get_i64(layer + 8 * VALUES) + ((head - kv_heads) * capacity + position) * size * kv_size
                )
            for i in range(size):
                put_rounded(kv, target + i * kv_size, get_f32(scratch + 4 * i))


@njit(nogil=True, error_model="numpy")
def _attend(
    kv: Any, kv_size: int, control: int, own: int, layer: int, row: int, head: int, adapter: int
) -> None:
    """One query head of one row over the slots it sees."""
    rows, heads, kv_heads = (
        get_i64(own + 8 * OWN_ROWS),
        get_i64(control + 8 * HEADS),
        get_i64(control + 8 * KV_HEADS),
    )
    size, capacity = get_i64(control + 8 * HEAD_DIM), get_i64(control + 8 * CAPACITY)
    width = (heads + 2 * kv_heads) * size
    position = get_i64(get_i64(own + 8 * OWN_POSITIONS) + 8 * row)
    query, scores = get_i64(own + 8 * OWN_KV), get_i64(own + 8 * OWN_SCORES)
    source = get_i64(control + 8 * QKV_BUFFER) + 4 * (row * width + head * size)
    _join(query, source, 4 * rows * width, get_i64(layer + 8 * (QKV + PARTS)), size)
    if adapter != 0 and row == 1:
        _add_raised(own, adapter, head * size, size, query)
    norm = get_i64(layer + 8 * Q_NORM)
    if get_i64(control + 8 * WHOLE_NORM) != 0:
        scale_row(
            query, query, norm + 4 * head * size, get_f32(get_i64(own + 8 * OWN_FACTORS) + 4 * row), size
        )
        norm = 0
    _turn(control, query, norm, position)
    window = get_i64(layer + 8 * WINDOW)
    begin = max(0, position + 1 - window) if window > 0 else 0
    count = position + 1 - begin
    slot = ((head // (heads // kv_heads)) * capacity + begin) * size * kv_size
    keys, values = get_i64(layer + 8 * KEYS) + slot, get_i64(layer + 8 * VALUES) + slot
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    step, fours = size * kv_size, count // 4 * 4
    for i in range(0, fours, 4):
        dots(kv, query, keys + i * step, step, size, scale, scores + 4 * i)
    for i in range(fours, count):
        put_f32(scores + 4 * i, dot(kv, query, keys + i * step, size) * scale)
    padded = (count + 15) // 16 * 16
    for i in range(count, padded):
        put_f32(scores + 4 * i, _MINUS_INFINITY)
    # exp clamps at -87: a padding lane weighs 1e-38, which no sum of a top score's 1 can notice
    share = np.float32(1.0) / exp_row(scores, top(scores, padded), padded)
    out = get_i64(control + 8 * MIXED) + 4 * (row * heads + head) * size
    pairs = size // 32 * 32
    for i in range(0, pairs, 32):
        mix(kv, scores, values + i * kv_size, step, count, out + 4 * i)
    if pairs < size:
        mix_narrow(kv, scores, values + pairs * kv_size, step, count, out + 4 * pairs)
    for i in range(size):
        put_f32(out + 4 * i, get_f32(out + 4 * i) * share)


@njit(nogil=True, error_model="numpy")
def _attention_phase(kv: Any, kv_size: int, control: int, own: int, layer: int, x: int, adapter: int) -> None:
    """All heads of all rows; ``x`` is what the projection was made of."""
    heads, rows = get_i64(control + 8 * HEADS), get_i64(own + 8 * OWN_ROWS)
    tasks = rows * heads
    _write_cache(kv, kv_size, control, own, layer)
    if get_i64(control + 8 * WHOLE_NORM) != 0:
        width = (heads + 2 * get_i64(control + 8 * KV_HEADS)) * get_i64(control + 8 * HEAD_DIM)
        buffer, parts = get_i64(control + 8 * QKV_BUFFER), get_i64(layer + 8 * (QKV + PARTS))
        for row in range(rows):
            factor = _whole_factor(control, own, buffer + 4 * row * width, 4 * rows * width, parts, heads)
            put_f32(get_i64(own + 8 * OWN_FACTORS) + 4 * row, factor)
    if adapter != 0:
        _lower(own, adapter, x + 4 * get_i64(layer + 8 * (QKV + INPUTS)))
    task = take(control, own, tasks)
    while task >= 0:
        _attend(kv, kv_size, control, own, layer, task // heads, task % heads, adapter)
        task = take(control, own, tasks)
    wait(control, own)


@njit(nogil=True, error_model="numpy")
def lower_rows(own: int, adapter: int, x: int, rows: int) -> None:
    """An adapter's first half on some rows, into this thread's own scratch."""
    low, rank = get_i64(own + 8 * OWN_LOW), get_i64(adapter + 8 * OUTPUTS)
    for output in range(0, rank, BLOCK):
        multiply_block(ADAPTER_TAG, adapter, output, 0, x, x, low + 4 * output, rank, rows)


@njit(nogil=True, error_model="numpy")
def add_raised_rows(own: int, adapter: int, rows: int, out: int) -> None:
    """Add an adapter's second half to ``out``, of the rows that :func:`lower_rows` was given."""
    up = adapter + 8 * LINEAR_FIELDS
    low, raised, size = get_i64(own + 8 * OWN_LOW), get_i64(own + 8 * OWN_RAISED), get_i64(up + 8 * OUTPUTS)
    for output in range(0, size, BLOCK):
        multiply_block(ADAPTER_TAG, up, output, 0, low, low, raised, BLOCK, rows)
        count = min(BLOCK, size - output)
        for row in range(rows):
            add_parts(out + 4 * (row * size + output), raised + 4 * row * BLOCK, 0, 1, count)


@njit(nogil=True, error_model="numpy")
def attend_layer(
    tag: Any,
    kv: Any,
    kv_size: int,
    control: int,
    own: int,
    layer: int,
    query: int,
    output: int,
    beside: int,
    last: int,
) -> None:
    """The attention part of a layer on every thread's own copy of the residual rows. ``query`` and ``output`` are
    adapters for row 1, ``beside`` is one beside the whole part, for the ``last`` rows; or 0."""
    rows, x = get_i64(own + 8 * OWN_ROWS), get_i64(own + 8 * OWN_X)
    mixed, parts = get_i64(control + 8 * MIXED), get_i64(control + 8 * PARTS_BUFFER)
    first = 4 * (rows - last) * get_i64(control + 8 * HIDDEN_SIZE)
    norm_rows(control, own, get_i64(layer + 8 * ATTN_NORM))
    if beside != 0:
        lower_rows(own, beside, x + first, last)
    matmul_phase(tag, control, own, layer + 8 * QKV, x, rows, get_i64(control + 8 * QKV_BUFFER))
    _attention_phase(kv, kv_size, control, own, layer, x, query)
    matmul_phase(tag, control, own, layer + 8 * O_PROJ, mixed, rows, parts)
    _add_residual(control, own, layer + 8 * O_PROJ, output, mixed)
    if beside != 0:
        add_raised_rows(own, beside, last, get_i64(own + 8 * OWN_H) + first)


@njit(nogil=True, error_model="numpy")
def run_layer(
    tag: Any, kv: Any, kv_size: int, control: int, own: int, layer: int, adapters: int, last: bool
) -> None:
    """One dense layer on every thread's own copy of the residual rows.

    ``adapters``: address of the layer's record of adapters for row 1, or 0. ``last``: leave out the sum
    behind the last barrier.
    """
    query, output, gate_up, down = 0, 0, 0, 0
    if adapters != 0:
        query, output = adapters + 8 * Q_ADAPTER, adapters + 8 * O_ADAPTER
        gate_up, down = adapters + 8 * GATE_UP_ADAPTER, adapters + 8 * DOWN_ADAPTER
    attend_layer(tag, kv, kv_size, control, own, layer, query, output, 0, 0)
    x, act = get_i64(own + 8 * OWN_X), get_i64(control + 8 * ACT)
    norm_rows(control, own, get_i64(layer + 8 * MLP_NORM))
    _gate_up_phase(tag, control, own, layer + 8 * GATE_UP_PROJ, x, act, gate_up)
    rows, parts = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * PARTS_BUFFER)
    matmul_phase(tag, control, own, layer + 8 * DOWN_PROJ, act, rows, parts)
    if not last:
        _add_residual(control, own, layer + 8 * DOWN_PROJ, down, act)
