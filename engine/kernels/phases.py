"""The phases of a layer, and of one matmul, as every thread of the team runs them between barriers.

What is cheap is computed by every thread for itself (residual sums, norms, low-rank adapters) rather than
shared behind another barrier. A layer has six phases: qkv | rotate, attend | join | output | gate and up, SiLU | down.

In a draft step row 0 is the slow stream's and row 1 the accelerated stream's; row 1 alone is given the
layer's adapters. Row 0 goes through the same arithmetic as without them, to the last bit.
"""

from __future__ import annotations

from typing import Any

from engine.kernels.adapter_phases import add_raised, add_raised_rows, lower
from engine.kernels.attention_phases import ask_for_first, attention_phase
from engine.kernels.barrier import take, wait
from engine.kernels.compiling import NONE, ONE, compiled
from engine.kernels.control import (
    ACT,
    ACT_EXTRAS,
    ACT_ROUNDED,
    ATTN_NORM,
    BLOCK,
    DOWN_ADAPTER,
    DOWN_PROJ,
    EPS,
    GATE_UP,
    GATE_UP_ADAPTER,
    GATE_UP_PROJ,
    HIDDEN_SIZE,
    INPUTS,
    MIXED,
    MIXED_EXTRAS,
    MIXED_ROUNDED,
    MLP_NORM,
    O_ADAPTER,
    O_PROJ,
    OUTPUTS,
    OWN_EXTRAS,
    OWN_H,
    OWN_POSITIONS,
    OWN_ROUNDED,
    OWN_ROWS,
    OWN_SLOTS,
    OWN_X,
    PARTS,
    PARTS_BUFFER,
    POSITIONS,
    Q_ADAPTER,
    QKV,
    QKV_BUFFER,
    SLOTS,
)  # fmt: skip
from engine.kernels.intrinsics import get_f32, get_i64, put_i64
from engine.kernels.matmul import multiply_block, prepare_part, prepare_rows, prepared
from engine.kernels.parts import are_joined, join_parts, parts_left
from engine.kernels.rows import add_parts, norm_row, silu_times


@compiled
def use_rows(control: int, own: int, first: int, rows: int) -> None:
    """Have the phases that follow work on ``rows`` rows, at the command's positions from number ``first`` on."""
    put_i64(own + 8 * OWN_ROWS, rows)
    put_i64(own + 8 * OWN_POSITIONS, get_i64(control + 8 * POSITIONS) + 8 * first)
    put_i64(own + 8 * OWN_SLOTS, get_i64(control + 8 * SLOTS) + 8 * first)


@compiled
def matmul_phase(tag: Any, control: int, own: int, linear: int, x: int, rows: int, out: int) -> None:
    """All outputs of one linear into ``out [parts, rows, N]``."""
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    x = prepare_rows(tag, x, rows, get_i64(linear + 8 * INPUTS), rounded, extras)
    _multiply_phase(tag, control, own, linear, x, extras, rows, out)


@compiled
def _multiply_phase(
    tag: Any, control: int, own: int, linear: int, x: int, extras: int, rows: int, out: int
) -> None:
    """:func:`matmul_phase` of rows that are prepared."""
    outputs, parts = get_i64(linear + 8 * OUTPUTS), get_i64(linear + 8 * PARTS)
    blocks = (outputs + BLOCK - 1) // BLOCK
    once = parts if are_joined(control, linear) else 1
    tasks = blocks * parts // once
    task = take(control, own, tasks)
    while task >= 0:
        output = task * once // parts * BLOCK
        for part in range(task * once % parts, task * once % parts + once):
            target = out + 4 * (part * rows * outputs + output)
            multiply_block(tag, linear, output, part, x, extras, target, outputs, rows)
        if once > 1:
            for row in range(rows):
                target = out + 4 * (row * outputs + output)
                join_parts(target, target, 4 * rows * outputs, parts, min(BLOCK, outputs - output))
        task = take(control, own, tasks)
    wait(control, own)


@compiled
def _gate_up_phase(tag: Any, control: int, own: int, linear: int, x: int, act: int, adapter: int) -> None:
    """SiLU(gate) * up into ``act [rows, F]``, and prepared for the next matmul: otherwise every thread would round all of
    it. Each task computes the same block of both."""
    rows = get_i64(own + 8 * OWN_ROWS)
    inputs, size = get_i64(linear + 8 * INPUTS), get_i64(linear + 8 * OUTPUTS) // 2
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    raw = get_i64(control + 8 * GATE_UP)
    act_rounded, act_extras = get_i64(control + 8 * ACT_ROUNDED), get_i64(control + 8 * ACT_EXTRAS)
    if adapter != 0:
        lower(own, adapter, x + 4 * inputs, ONE)
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
                add_raised(own, adapter, column, count, raw + 4 * (2 * size + column))
        for row in range(rows):
            gate = raw + 4 * (row * 2 * size + output)
            target = act + 4 * (row * size + output)
            silu_times(target, gate, gate + 4 * size, count)
            prepare_part(tag, target, row, output, count, size, act_rounded, act_extras)
        task = take(control, own, tasks)
    wait(control, own)


@compiled
def norm_rows(control: int, own: int, weight: int) -> None:
    """RMSNorm of this thread's own copy of the residual rows, into its own scratch."""
    rows, size = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    h, x, eps = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X), get_f32(control + 8 * EPS)
    for row in range(rows):
        norm_row(x + 4 * row * size, h + 4 * row * size, weight, eps, size)


@compiled
def _add_residual(control: int, own: int, linear: int, adapter: int, x: int) -> None:
    """Add a linear's parts to this thread's own copy of the residual rows; to row 1 also what an adapter
    makes of the linear's input ``x``."""
    size = get_i64(control + 8 * HIDDEN_SIZE)
    count = get_i64(own + 8 * OWN_ROWS) * size
    h = get_i64(own + 8 * OWN_H)
    add_parts(h, get_i64(control + 8 * PARTS_BUFFER), 4 * count, parts_left(control, linear), count)
    if adapter != 0:
        lower(own, adapter, x + 4 * get_i64(linear + 8 * INPUTS), ONE)
        add_raised(own, adapter, 0, size, h + 4 * size)


@compiled
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
        lower(own, beside, x + first, last)
    ask_for_first(kv_size, control, own, layer)
    matmul_phase(tag, control, own, layer + 8 * QKV, x, rows, get_i64(control + 8 * QKV_BUFFER))
    attention_phase(tag, kv, kv_size, control, own, layer, x, query)
    between, extras = (
        prepared(tag, mixed, get_i64(control + 8 * MIXED_ROUNDED)),
        get_i64(control + 8 * MIXED_EXTRAS),
    )
    _multiply_phase(tag, control, own, layer + 8 * O_PROJ, between, extras, rows, parts)
    _add_residual(control, own, layer + 8 * O_PROJ, output, mixed)
    if beside != 0:
        add_raised_rows(own, beside, last, get_i64(own + 8 * OWN_H) + first)


@compiled
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
    attend_layer(tag, kv, kv_size, control, own, layer, query, output, NONE, NONE)
    feed_forward(tag, control, own, layer, gate_up, down, last)


@compiled
def feed_forward(tag: Any, control: int, own: int, layer: int, gate_up: int, down: int, last: bool) -> None:
    """The other part of a dense layer; as :func:`run_layer`."""
    x, act = get_i64(own + 8 * OWN_X), get_i64(control + 8 * ACT)
    norm_rows(control, own, get_i64(layer + 8 * MLP_NORM))
    _gate_up_phase(tag, control, own, layer + 8 * GATE_UP_PROJ, x, act, gate_up)
    rows, parts = get_i64(own + 8 * OWN_ROWS), get_i64(control + 8 * PARTS_BUFFER)
    between = prepared(tag, act, get_i64(control + 8 * ACT_ROUNDED))
    extras = get_i64(control + 8 * ACT_EXTRAS)
    _multiply_phase(tag, control, own, layer + 8 * DOWN_PROJ, between, extras, rows, parts)
    if not last:
        _add_residual(control, own, layer + 8 * DOWN_PROJ, down, act)
