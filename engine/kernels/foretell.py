"""What a ridge gate reads from one row (:mod:`engine.experts.prediction.ridge_gate`), as native code: it is asked between
any two commands of the kernels, where each little operation of numpy's takes some microseconds."""

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
)
from engine.kernels.intrinsics import LANES, dot, get_f32, get_i64, put_f32, put_i64
from engine.kernels.rows import exp_row

_FLOAT32 = np.float32(0.0)


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


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file.

    ``foretell(task, state)``: the maps of a task (:mod:`engine.kernels.foretell_fields`), read with a state's floats.
    """

    def foretell(task: int, state: int) -> None:
        size, num_experts = get_i64(task + 8 * SIZE), get_i64(task + 8 * NUM_EXPERTS)
        matrix, offsets = get_i64(task + 8 * MATRIX), get_i64(task + 8 * OFFSETS)
        scratch, num_maps = get_i64(task + 8 * SCRATCH), get_i64(task + 8 * NUM_MAPS)
        mean = dot(_FLOAT32, state, state, size) / np.float32(size)
        factor = np.float32(1.0) / np.sqrt(np.float32(mean + get_f32(task + 8 * EPS)))
        # Distances from the edge, of all maps; behind them room to put some in order.
        for row in range(num_maps * num_experts):
            value = dot(_FLOAT32, state, matrix + 4 * row * size, size) * factor
            put_f32(scratch + 4 * row, value + get_f32(offsets + 4 * row))
        order = scratch + 4 * num_maps * num_experts
        for index in range(num_maps):
            logits = scratch + 4 * index * num_experts
            edge = _edge(logits, num_experts, get_i64(task + 8 * NUM_CHOSEN), order)
            scale = get_f32(get_i64(task + 8 * SCALES) + 4 * index)
            for number in range(num_experts):
                put_f32(logits + 4 * number, (get_f32(logits + 4 * number) - edge) * scale)
        named = get_i64(task + 8 * NAMED)
        count = 0
        if get_i64(task + 8 * AHEAD) != 0:
            for number in range(num_experts):
                distance = get_f32(scratch + 4 * number)
                if distance > get_f32(task + 8 * LEAST):
                    _insert(order, named + 8, count, distance, number)
                    count += 1
        put_i64(named, count)
        chances = get_i64(task + 8 * CHANCES)
        if chances != 0:
            distances = scratch + 4 * (num_maps - 1) * num_experts
            for number in range(num_experts):
                put_f32(chances + 4 * number, -get_f32(distances + 4 * number))
            exp_row(chances, _FLOAT32, (num_experts + LANES - 1) // LANES * LANES)
            for number in range(num_experts):
                odds = get_f32(chances + 4 * number)
                put_f32(chances + 4 * number, np.float32(1.0) / (np.float32(1.0) + odds))

    return compile_entry_points(foretell)
