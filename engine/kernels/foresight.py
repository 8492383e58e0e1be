"""What a layer's states say of the experts that later layers will want, and loading those, within a pass."""

from __future__ import annotations

from engine.kernels.compiling import compiled
from engine.kernels.foretell import foretell_rows
from engine.kernels.foretell_fields import CHANCES, TARGET
from engine.kernels.foretell_fields import NAMED as NAMED_BY
from engine.kernels.intrinsics import get_i64, put_i64
from engine.kernels.scalars import get_f64
from engine.kernels.slot_loads import at, get, load_ahead, put
from engine.kernels.turn_fields import (
    ABSENT,
    ACTIVE,
    BY_TASKS,
    BY_TRACE,
    LOOKAHEAD,
    NAMED,
    NUM_EXPERTS,
    NUM_TASKS,
    NUM_TURNS,
    PRECISIONS,
    PREDICTOR,
    RANKS,
    STATUS,
    TASKS,
    TRACE_FIRSTS,
    TRACE_LAYERS,
    TRACE_NUMBERS,
    TURN,
    WORTH_LOADING,
)  # fmt: skip
from engine.kernels.worths import foresee


@compiled
def look_ahead(block: int, layer: int, states: int, rows: int) -> None:
    """Ask the predictor about the residual states of a layer, before its feed-forward part, and have loaded what it names,
    as far as that was right often enough."""
    predictor, many = get_i64(block + 8 * PREDICTOR), 0
    if predictor == BY_TASKS:
        task = get(block, TASKS, layer) if layer < get_i64(block + 8 * NUM_TASKS) else 0
        if task == 0:
            return
        foretell_rows(task, states, rows)
        if get_i64(task + 8 * CHANCES) != 0:
            foresee(block, layer, get_i64(task + 8 * CHANCES))
        if get_i64(block + 8 * ACTIVE) == 0:
            return
        named = get_i64(task + 8 * NAMED_BY)
        first = get_i64(task + 8 * TARGET) * get_i64(block + 8 * NUM_EXPERTS)
        for rank in range(get_i64(named)):
            many = _name(block, first, get_i64(named + 8 * (1 + rank)), rank, many)
    elif predictor == BY_TRACE:
        many = _replay(block, layer)
    if many > 0:
        load_ahead(block, at(block, NAMED, 0), many)


@compiled
def _name(block: int, first: int, number: int, rank: int, many: int) -> int:
    """Note that an expert was named, and that it is to be loaded if its rank is right often enough; how many are now."""
    key = first + number
    if get(block, STATUS, key) == ABSENT:
        put(block, RANKS, key, rank + 1)
        if get_f64(at(block, PRECISIONS, rank)) < WORTH_LOADING:
            return many
    put(block, NAMED, many, key)
    return many + 1


@compiled
def _replay(block: int, layer: int) -> int:
    """What the trace of an earlier run of the same request says of the next turns."""
    turns, place = get_i64(block + 8 * NUM_TURNS), get_i64(block + 8 * TURN)
    turn, many = get_i64(place), 0
    for later in range(turn, turns):
        if (
            get(block, TRACE_LAYERS, later) == layer
        ):  # else it has no experts, or turns that nobody watched come first
            turn = later + 1
            break
    put_i64(place, turn)
    for later in range(turn, min(turn + get_i64(block + 8 * LOOKAHEAD), turns)):
        first, end = get(block, TRACE_FIRSTS, later), get(block, TRACE_FIRSTS, later + 1)
        for i in range(first, end):
            key = get(block, TRACE_LAYERS, later) * get_i64(block + 8 * NUM_EXPERTS)
            many = _name(block, key, get(block, TRACE_NUMBERS, i), i - first, many)
    return many
