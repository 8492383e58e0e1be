"""How much experts are worth keeping: the policies of :mod:`engine.experts.eviction`, on the same arrays, in native code."""

from __future__ import annotations

from engine.kernels.compiling import compiled
from engine.kernels.intrinsics import get_f32, get_i64, put_i64
from engine.kernels.scalars import get_f64, put_f64
from engine.kernels.slot_loads import at, get, put
from engine.kernels.turn_fields import (
    ASKED,
    CHANCES,
    CLOCK,
    FADE,
    FORESEEN,
    LEAST_STALE,
    LFU,
    LRU,
    NUM_ASKED,
    NUM_EXPERTS,
    NUM_LAYERS,
    POLICY,
    REPLAYED,
    SHARES,
    UPDATE_FIRSTS,
    UPDATE_KEYS,
    UPDATE_WORTHS,
    WAIT,
    WORTH,
)  # fmt: skip


@compiled
def used(block: int, layer: int) -> None:
    """The layer's turn has come: its router has chosen what is asked for."""
    policy, experts = get_i64(block + 8 * POLICY), get_i64(block + 8 * NUM_EXPERTS)
    asked, first = get_i64(block + 8 * NUM_ASKED), layer * experts
    if policy == REPLAYED:
        _replay(block)
        return
    clock = at(block, CLOCK, 0)
    put_f64(clock, get_f64(clock) + 1.0)
    if policy == LRU:
        for i in range(asked):
            put_f64(at(block, WORTH, first + get(block, ASKED, i)), get_f64(clock))
    elif policy in (LFU, FORESEEN):
        for key in range(first, first + experts):
            put_f64(at(block, SHARES, key), get_f64(at(block, SHARES, key)) * FADE)
        for i in range(asked):
            share = at(block, SHARES, first + get(block, ASKED, i))
            put_f64(share, get_f64(share) + (1 - FADE))
        _join(block, layer)
    elif policy == LEAST_STALE:
        turns = at(block, CLOCK, 1 + layer)
        put_f64(turns, get_f64(turns) + 1.0)
        for i in range(asked):
            put_f64(at(block, SHARES, first + get(block, ASKED, i)), get_f64(turns))
        for key in range(first, first + experts):
            stale = get_f64(at(block, SHARES, key)) - get_f64(turns)
            put_f64(at(block, WORTH, key), stale * get_i64(block + 8 * NUM_LAYERS) - get_f64(clock))


@compiled
def foresee(block: int, layer: int, chances: int) -> None:
    """How likely each of a layer's experts is to be chosen the next time, float32."""
    first = layer * get_i64(block + 8 * NUM_EXPERTS)
    if get_i64(block + 8 * POLICY) == FORESEEN:
        for number in range(get_i64(block + 8 * NUM_EXPERTS)):
            put_f64(at(block, CHANCES, first + number), get_f32(chances + 4 * number) * 1.0)
        _join(block, layer)


@compiled
def _join(block: int, layer: int) -> None:
    experts = get_i64(block + 8 * NUM_EXPERTS)
    wait = WAIT * get_f64(at(block, CLOCK, 0)) / get_i64(block + 8 * NUM_LAYERS)
    for key in range(layer * experts, (layer + 1) * experts):
        value = get_f64(at(block, SHARES, key))
        if get_i64(block + 8 * POLICY) == FORESEEN:
            value = (get_f64(at(block, CHANCES, key)) + value) / 2
        put_f64(at(block, WORTH, key), value - wait)


@compiled
def _replay(block: int) -> None:
    clock = at(block, CLOCK, 0)
    turn = get_i64(clock)
    if get(block, UPDATE_FIRSTS, turn + 1) < 0:  # behind the trace's end
        return
    for place in range(get(block, UPDATE_FIRSTS, turn), get(block, UPDATE_FIRSTS, turn + 1)):
        put(block, WORTH, get(block, UPDATE_KEYS, place), get(block, UPDATE_WORTHS, place))
    put_i64(clock, turn + 1)
