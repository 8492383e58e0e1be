"""A layer with experts, in commands: the attention part and the router, then the experts as they come into memory.

Between the two the caller has the router's choice, and between commands for experts it may wait for more of them. Each
expert gets the rows that chose it. The last command adds everything up, in an order that depends on nothing but the
row's own choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.kernels.adapter_phases import add_raised_rows, lower
from engine.kernels.barrier import take, wait
from engine.kernels.compiling import compiled
from engine.kernels.control import (
    ADD_UP,
    BLOCK,
    CHOSEN,
    EXPERT_ACT,
    EXPERT_COUNT,
    EXPERT_DOWN,
    EXPERT_FIELDS,
    EXPERT_GATE_UP,
    EXPERT_IN,
    EXPERT_OUT,
    EXPERTS,
    FIRST,
    HIDDEN,
    HIDDEN_SIZE,
    INPUTS,
    LAYER_FIELDS,
    LAYERS,
    MLP_NORM,
    NORMALIZE,
    NORMED,
    NUM_EXPERTS,
    NUM_PLACES,
    OUT,
    OUTPUTS,
    OWN_EXTRAS,
    OWN_H,
    OWN_LOGITS,
    OWN_PAIR,
    OWN_ROUNDED,
    OWN_X,
    PLACES,
    ROUTER,
    ROUTER_LOGITS,
    ROUTER_NUM_EXPERTS,
    ROUTER_SHARED,
    ROWS,
    SIDE_ATTENTION,
    SIDE_FEED_FORWARD,
    SIDE_OUT,
    SIDE_OUTPUT,
    SIDE_QUERY,
    SIDE_ROWS,
    TOP_K,
    WEIGHTS,
)  # fmt: skip
from engine.kernels.intrinsics import get_f32, get_i64, put_f32, put_i64, top
from engine.kernels.matmul import multiply_block, prepare_rows
from engine.kernels.phases import attend_layer, matmul_phase, norm_rows
from engine.kernels.rows import add_parts, add_scaled, copy_row, exp_row, silu_times

_LOWEST = np.float32(-3.0e38)  # of logits; one that is no number counts as this
_TAKEN = np.float32(-np.inf)


@compiled
def run_attention(tag: Any, kv: Any, kv_size: int, control: int, own: int, rank: int) -> None:
    """The attention part of layer ``FIRST`` from ``HIDDEN`` to ``OUT``, the normed rows that its experts take to
    ``NORMED``, and what the ``ROUTER``, if there is one (its matrix in the cache's type), chooses for them to
    ``CHOSEN`` and ``WEIGHTS``.

    The last ``SIDE_ROWS`` are an accelerated stream's and have adapters. They are not routed; what their adapter
    beside the feed-forward part gives goes to ``SIDE_OUT``.
    """
    rows, size = get_i64(control + 8 * ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    h, x = get_i64(own + 8 * OWN_H), get_i64(own + 8 * OWN_X)
    copy_row(h, get_i64(control + 8 * HIDDEN), rows * size)
    layer = get_i64(control + 8 * LAYERS) + get_i64(control + 8 * FIRST) * (8 * LAYER_FIELDS)
    query, output = get_i64(control + 8 * SIDE_QUERY), get_i64(control + 8 * SIDE_OUTPUT)
    beside, side = get_i64(control + 8 * SIDE_ATTENTION), get_i64(control + 8 * SIDE_ROWS)
    attend_layer(tag, kv, kv_size, control, own, layer, query, output, beside, side)
    norm_rows(control, own, get_i64(layer + 8 * MLP_NORM))
    router, adapter = get_i64(control + 8 * ROUTER), get_i64(control + 8 * SIDE_FEED_FORWARD)
    if rank == 0:
        copy_row(get_i64(control + 8 * OUT), h, rows * size)
        copy_row(get_i64(control + 8 * NORMED), x, rows * size)
        if adapter != 0:
            out = get_i64(control + 8 * SIDE_OUT)
            for i in range(side * size):
                put_f32(out + 4 * i, np.float32(0.0))
            lower(own, adapter, x + 4 * (rows - side) * size, side)
            add_raised_rows(own, adapter, side, out)
    if router != 0:
        logits = get_i64(control + 8 * ROUTER_LOGITS)
        matmul_phase(kv, control, own, router, x, rows - side, logits)
        if rank == 0:
            for row in range(rows - side):
                choose_experts(control, own, router, logits, row)
    else:  # nobody may return while another still reads what the caller will write next
        wait(control, own)


@compiled
def choose_experts(control: int, own: int, router: int, logits: int, row: int) -> None:
    """The best experts of one row by number, ascending, and what they weigh; of equal logits the first wins."""
    outputs, num_experts = get_i64(router + 8 * OUTPUTS), get_i64(router + 8 * ROUTER_NUM_EXPERTS)
    count, shared = get_i64(control + 8 * TOP_K), get_i64(router + 8 * ROUTER_SHARED)
    source, left = logits + 4 * row * outputs, get_i64(own + 8 * OWN_LOGITS)
    padded = (num_experts + 15) // 16 * 16
    shares = left + 4 * padded
    for i in range(padded):
        value = _LOWEST
        if i < num_experts and get_f32(source + 4 * i) > _LOWEST:
            value = get_f32(source + 4 * i)
        put_f32(left + 4 * i, value)
        put_f32(shares + 4 * i, value)
    places = count + (1 if shared != 0 else 0)
    chosen = get_i64(control + 8 * CHOSEN) + 8 * row * count
    weights = get_i64(control + 8 * WEIGHTS) + 4 * row * places
    total = exp_row(shares, top(shares, padded), padded)
    for place in range(count):
        best, highest = 0, _TAKEN
        for i in range(num_experts):
            if get_f32(left + 4 * i) > highest:
                best, highest = i, get_f32(left + 4 * i)
        put_f32(left + 4 * best, _TAKEN)
        share = get_f32(shares + 4 * best)
        at = place  # insertion keeps the numbers in order
        while at > 0 and get_i64(chosen + 8 * (at - 1)) > best:
            put_i64(chosen + 8 * at, get_i64(chosen + 8 * (at - 1)))
            put_f32(weights + 4 * at, get_f32(weights + 4 * (at - 1)))
            at -= 1
        put_i64(chosen + 8 * at, best)
        put_f32(weights + 4 * at, share)
    if get_i64(control + 8 * NORMALIZE) != 0:
        total = np.float32(0.0)
        for place in range(count):
            total += get_f32(weights + 4 * place)
    for place in range(count):
        put_f32(weights + 4 * place, get_f32(weights + 4 * place) / total)
    if shared == 1:
        put_f32(weights + 4 * count, np.float32(1.0))
    elif shared == 2:
        for i in range(16):
            put_f32(left + 4 * i, -get_f32(source + 4 * num_experts))
        exp_row(left, np.float32(0.0), 16)
        put_f32(weights + 4 * count, np.float32(1.0) / (np.float32(1.0) + get_f32(left)))


@compiled
def run_experts(tag: Any, control: int, own: int, rank: int) -> None:
    """``NUM_EXPERTS`` experts of the records at ``EXPERTS``. If ``ADD_UP``, then ``OUT = HIDDEN + `` the sum of
    ``PLACES [places, rows, D]``, place by place, each weighted by ``WEIGHTS [rows, places]``; the last ``SIDE_ROWS``
    have ``SIDE_OUT`` added."""
    experts_gate_up_phase(tag, control, own)
    experts_down_phase(tag, control, own)
    if rank == 0 and get_i64(control + 8 * ADD_UP) != 0:
        _add_up(control)


@compiled
def _blocks(expert: int, linear: int, halves: int) -> int:
    """Tasks of one expert's linear, whose outputs are as many ``halves`` computed together."""
    return (get_i64(expert + 8 * (linear + OUTPUTS)) // halves + BLOCK - 1) // BLOCK


@compiled
def _all_blocks(control: int, linear: int, halves: int) -> int:
    expert, tasks = get_i64(control + 8 * EXPERTS), 0
    for _ in range(get_i64(control + 8 * NUM_EXPERTS)):
        tasks += _blocks(expert, linear, halves)
        expert += 8 * EXPERT_FIELDS
    return tasks


@compiled
def _find(control: int, expert: int, begin: int, task: int, linear: int, halves: int) -> tuple[int, int]:
    """The expert of a task and its first task, looked for from another expert on and its first task."""
    if task < begin:  # what another thread has left
        expert, begin = get_i64(control + 8 * EXPERTS), 0
    while task >= begin + _blocks(expert, linear, halves):
        begin += _blocks(expert, linear, halves)
        expert += 8 * EXPERT_FIELDS
    return expert, begin


@compiled
def experts_gate_up_phase(tag: Any, control: int, own: int) -> None:
    """SiLU(gate) * up of every expert; each task computes the same block of both."""
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    pair, tasks = get_i64(own + 8 * OWN_PAIR), _all_blocks(control, EXPERT_GATE_UP, 2)
    expert, begin, prepared, many_prepared, x = get_i64(control + 8 * EXPERTS), 0, 0, 0, 0
    task = take(control, own, tasks)
    while task >= 0:
        expert, begin = _find(control, expert, begin, task, EXPERT_GATE_UP, 2)
        linear, rows = expert + 8 * EXPERT_GATE_UP, get_i64(expert + 8 * EXPERT_COUNT)
        size, source = get_i64(linear + 8 * OUTPUTS) // 2, get_i64(expert + 8 * EXPERT_IN)
        if prepared != source or many_prepared != rows:  # in decoding all experts take the same row
            x = prepare_rows(tag, source, rows, get_i64(linear + 8 * INPUTS), rounded, extras)
            prepared, many_prepared = source, rows
        output = (task - begin) * BLOCK
        many = min(BLOCK, size - output)
        multiply_block(tag, linear, output, 0, x, extras, pair, 2 * BLOCK, rows)
        multiply_block(tag, linear, size + output, 0, x, extras, pair + 4 * BLOCK, 2 * BLOCK, rows)
        for row in range(rows):
            gate = pair + 8 * row * BLOCK
            act = get_i64(expert + 8 * EXPERT_ACT) + 4 * (row * size + output)
            silu_times(act, gate, gate + 4 * BLOCK, many)
        task = take(control, own, tasks)
    wait(control, own)


@compiled
def experts_down_phase(tag: Any, control: int, own: int) -> None:
    rounded, extras = get_i64(own + 8 * OWN_ROUNDED), get_i64(own + 8 * OWN_EXTRAS)
    tasks = _all_blocks(control, EXPERT_DOWN, 1)
    expert, begin, prepared, x = get_i64(control + 8 * EXPERTS), 0, 0, 0
    task = take(control, own, tasks)
    while task >= 0:
        expert, begin = _find(control, expert, begin, task, EXPERT_DOWN, 1)
        linear, rows = expert + 8 * EXPERT_DOWN, get_i64(expert + 8 * EXPERT_COUNT)
        outputs, act = get_i64(linear + 8 * OUTPUTS), get_i64(expert + 8 * EXPERT_ACT)
        if prepared != act:
            x = prepare_rows(tag, act, rows, get_i64(linear + 8 * INPUTS), rounded, extras)
            prepared = act
        output = (task - begin) * BLOCK
        target = get_i64(expert + 8 * EXPERT_OUT) + 4 * output
        multiply_block(tag, linear, output, 0, x, extras, target, outputs, rows)
        task = take(control, own, tasks)
    wait(control, own)


@compiled
def _add_up(control: int) -> None:
    rows, size = get_i64(control + 8 * ROWS), get_i64(control + 8 * HIDDEN_SIZE)
    places, weights = get_i64(control + 8 * NUM_PLACES), get_i64(control + 8 * WEIGHTS)
    out, outputs = get_i64(control + 8 * OUT), get_i64(control + 8 * PLACES)
    side = get_i64(control + 8 * SIDE_ROWS)
    copy_row(out, get_i64(control + 8 * HIDDEN), rows * size)
    for row in range(rows):
        for place in range(places):
            weight = get_f32(weights + 4 * (row * places + place))
            if weight != np.float32(0.0):
                add_scaled(out + 4 * row * size, outputs + 4 * (place * rows + row) * size, weight, size)
    if side != 0:
        add_parts(out + 4 * (rows - side) * size, get_i64(control + 8 * SIDE_OUT), 0, 1, side * size)
