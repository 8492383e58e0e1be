"""What a ridge gate (:mod:`engine.experts.prediction.ridge_gate`), or the next gate, reads from rows of one layer, as native
code: it is asked between any two phases of the kernels, where each little operation of numpy's takes some microseconds."""

from __future__ import annotations

import numpy as np

from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.foretell_fields import (
    AHEAD,
    CHANCES,
    EPS,
    LEAST,
    MATRIX,
    NAMED,
    NUM_CHOSEN,
    NUM_EXPERTS,
    NUM_MAPS,
    OFFSETS,
    SCALES,
    SCRATCH,
    SIZE,
    SIZE_STEP,
)
from engine.kernels.intrinsics import dot, get_f32, get_i64, put_f32, put_i64
from engine.kernels.rows import exp_row

_FLOAT32 = np.float32(0.0)
_ONE = np.float32(1.0)


@compiled
def _insert(values: int, numbers: int, count: int, value: float, number: int) -> None:
    """Into ``count`` values in descending order, and the numbers beside them, if there are any."""
    place = count
    while place > 0 and get_f32(values + 4 * (place - 1)) < value:
        put_f32(values + 4 * place, get_f32(values + 4 * (place - 1)))
        if numbers != 0:
            put_i64(numbers + 8 * place, get_i64(numbers + 8 * (place - 1)))
        place -= 1
    put_f32(values + 4 * place, value)
    if numbers != 0:
        put_i64(numbers + 8 * place, number)


@compiled
def _edge(logits: int, num_experts: int, num_chosen: int, scratch: int) -> float:
    """Between the last that is chosen and the first that is not."""
    for number in range(num_experts):
        value, held = get_f32(logits + 4 * number), min(number, num_chosen + 1)
        if held <= num_chosen:
            _insert(scratch, 0, held, value, 0)
        elif value > get_f32(scratch + 4 * num_chosen):
            _insert(scratch, 0, num_chosen, value, 0)
    last, first = get_f32(scratch + 4 * (num_chosen - 1)), get_f32(scratch + 4 * num_chosen)
    return (last + first) * np.float32(0.5)


@compiled
def _read(task: int, state: int) -> None:
    """The maps' logits of one row into the scratch."""
    size, num_experts = get_i64(task + 8 * SIZE), get_i64(task + 8 * NUM_EXPERTS)
    matrix, offsets = get_i64(task + 8 * MATRIX), get_i64(task + 8 * OFFSETS)
    mean = dot(_FLOAT32, state, state, size) / np.float32(size)
    factor = _ONE / np.sqrt(np.float32(mean + get_f32(task + 8 * EPS)))
    for row in range(get_i64(task + 8 * NUM_MAPS) * num_experts):
        value = dot(_FLOAT32, state, matrix + 4 * row * size, size) * factor
        put_f32(get_i64(task + 8 * SCRATCH) + 4 * row, value + get_f32(offsets + 4 * row))


@compiled
def _odds_against(task: int, index: int, target: int, order: int) -> None:
    """Each expert's odds against being chosen, by the logits of a map."""
    num_experts = get_i64(task + 8 * NUM_EXPERTS)
    logits = get_i64(task + 8 * SCRATCH) + 4 * index * num_experts
    edge = _edge(logits, num_experts, get_i64(task + 8 * NUM_CHOSEN), order)
    scale = get_f32(get_i64(task + 8 * SCALES) + 4 * index)
    for number in range(num_experts):
        put_f32(target + 4 * number, (edge - get_f32(logits + 4 * number)) * scale)
    exp_row(target, _FLOAT32, (num_experts + SIZE_STEP - 1) // SIZE_STEP * SIZE_STEP)


@compiled
def _vote(task: int, votes: int, order: int, numbers: int) -> None:
    """One vote more for each expert that the router of the first map would choose."""
    num_experts, chosen = get_i64(task + 8 * NUM_EXPERTS), get_i64(task + 8 * NUM_CHOSEN)
    for number in range(num_experts):
        value, held = get_f32(get_i64(task + 8 * SCRATCH) + 4 * number), min(number, chosen)
        if held < chosen:
            _insert(order, numbers, held, value, number)
        elif value > get_f32(order + 4 * (chosen - 1)):
            _insert(order, numbers, chosen - 1, value, number)
    for place in range(chosen):
        vote = votes + 4 * get_i64(numbers + 8 * place)
        # Of as many votes those of the latest row's better ones go first.
        more = _ONE - np.float32(place) / np.float32(2 * chosen)
        put_f32(vote, get_f32(vote) + more)


@compiled
def foretell_rows(task: int, states: int, rows: int) -> None:
    """The maps of a task (:mod:`engine.kernels.foretell_fields`), read with the floats of ``rows`` states."""
    size, num_experts = get_i64(task + 8 * SIZE), get_i64(task + 8 * NUM_EXPERTS)
    step = 4 * ((num_experts + SIZE_STEP - 1) // SIZE_STEP * SIZE_STEP)
    scratch, num_maps = get_i64(task + 8 * SCRATCH), get_i64(task + 8 * NUM_MAPS)
    wanted = scratch + num_maps * step
    order, own = wanted + step, wanted + 2 * step
    named, least = get_i64(task + 8 * NAMED), get_f32(task + 8 * LEAST)
    ahead, chances = get_i64(task + 8 * AHEAD) != 0, get_i64(task + 8 * CHANCES)
    for number in range(num_experts):  # that no row wants it, or its votes
        put_f32(wanted + 4 * number, _ONE if least > _FLOAT32 else _FLOAT32)
    for row in range(rows):
        _read(task, states + 4 * row * size)
        if ahead and least > _FLOAT32:
            _odds_against(task, 0, own, order)
            for number in range(num_experts):
                odds = get_f32(own + 4 * number)
                put_f32(wanted + 4 * number, get_f32(wanted + 4 * number) * odds / (_ONE + odds))
        elif ahead:
            _vote(task, wanted, order, named + 8)
    if chances != 0:
        _odds_against(task, num_maps - 1, chances, order)
        for number in range(num_experts):
            put_f32(chances + 4 * number, _ONE / (_ONE + get_f32(chances + 4 * number)))
    count = 0
    if ahead:
        for number in range(num_experts):
            value, enough = get_f32(wanted + 4 * number), _FLOAT32
            if least > _FLOAT32:  # of chances near 1 what is left to it keeps them apart
                value, enough = -value, least - _ONE
            if value > enough:
                _insert(order, named + 8, count, value, number)
                count += 1
    put_i64(named, count)


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file. ``foretell(task, states, rows)``:
    :func:`foretell_rows`."""

    def foretell(task: int, states: int, rows: int) -> None:
        foretell_rows(task, states, rows)

    return compile_entry_points(foretell)
