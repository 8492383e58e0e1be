"""A layer's turn: what its router has chosen is found in the slots, or brought there, in native code.

:class:`engine.experts.native_cache.NativeCache` makes the block (:mod:`engine.kernels.turn_fields`) and gives layers their turns
from Python; within a pass :mod:`engine.kernels.expert_pass` does, which calls this code by its address: it is compiled once, for
all weights. One thread at a time may.
"""

from __future__ import annotations

from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.foresight import look_ahead
from engine.kernels.intrinsics import get_i64, put_i64
from engine.kernels.load_fields import DEMANDED
from engine.kernels.load_fields import EXPECTED as WHEN_EXPECTED
from engine.kernels.loads import nanoseconds, wait_for_more
from engine.kernels.lying import leave_there, lies
from engine.kernels.scalars import get_f64, put_f64
from engine.kernels.slot_loads import (
    at,
    count,
    first_to_leave,
    get,
    give_back,
    hurry,
    leave,
    load,
    load_ahead,
    put,
    take_back,
    take_in,
    take_slot,
    worth,
)
from engine.kernels.turn_fields import (
    ABSENT,
    AHEAD,
    AHEAD_OF_TIME,
    ASKED,
    AT_ONCE,
    CLEAR,
    COMPUTED_IN_PLACE,
    DONE,
    EXPECTED,
    FINISH,
    GIVE_UP,
    GROUP,
    HELD,
    HITS,
    IN_USE,
    IN_USE_THERE,
    LATE,
    LAYER,
    LOADS,
    LOOK_AHEAD,
    LYING,
    MISSES,
    MISSING,
    NOTE,
    NUM_ASKED,
    NUM_EXPERTS,
    NUM_FREE,
    PINNED,
    PRECISIONS,
    RANK_FADE,
    RANKS,
    READY,
    SEEN,
    STALLED,
    START,
    STATES,
    STATUS,
    TROUBLE,
    USED,
    USES,
    WAITING,
    WORTH_A_COPY,
)  # fmt: skip
from engine.kernels.worths import used


@compiled
def _key(block: int, i: int) -> int:
    """Of what is asked for, number ``i``."""
    return get_i64(block + 8 * LAYER) * get_i64(block + 8 * NUM_EXPERTS) + get(block, ASKED, i)


@compiled
def begin_turn(block: int, layer: int) -> None:
    """Count and pin what a layer asks for, and have what is missing loaded."""
    take_in(block)
    put_i64(block + 8 * TROUBLE, 0)
    put_i64(block + 8 * LAYER, layer)
    _learn(block)
    used(block, layer)
    for i in range(get_i64(block + 8 * NUM_ASKED)):
        key = _key(block, i)
        put(block, USES, key, get(block, USES, key) + 1)
        put(block, STATES, i, _find(block, key))
    _end_expectations(block)
    _start(block)


@compiled
def _find(block: int, key: int) -> int:
    """The state of an expert that is asked for; pinned, if it is in a slot or on its way there."""
    status = get(block, STATUS, key)
    if status == ABSENT:
        if lies(block, key):
            count(block, COMPUTED_IN_PLACE, 1)
            _keep(block, key)
            return LYING
        count(block, MISSES, 1)
        return MISSING
    put(block, STATUS, key, (status | PINNED) & ~EXPECTED)
    count(block, USED, get(block, AHEAD, key))
    put(block, AHEAD, key, 0)
    if status & READY:
        count(block, HITS, 1)
        return HELD
    count(block, LATE, 1)
    hurry(block, key)
    return WAITING


@compiled
def _learn(block: int) -> None:
    """Compare what was named for this turn, and was not in memory, with what is asked for."""
    experts = get_i64(block + 8 * NUM_EXPERTS)
    first = get_i64(block + 8 * LAYER) * experts
    for number in range(experts):
        rank = get(block, RANKS, first + number)
        if rank == 0:
            continue
        put(block, RANKS, first + number, 0)
        right = 0.0
        for i in range(get_i64(block + 8 * NUM_ASKED)):
            if get(block, ASKED, i) == number:
                right = 1.0
        precision = at(block, PRECISIONS, rank - 1)
        put_f64(precision, get_f64(precision) + RANK_FADE * (right - get_f64(precision)))


@compiled
def _keep(block: int, key: int) -> None:
    """What is computed in place gets a slot as well, if it is worth one: there it cannot be given up."""
    if get_i64(block + 8 * NUM_FREE) == 0:
        leaving = first_to_leave(block, 0)
        if leaving < 0 or worth(block, key) <= worth(block, leaving) + WORTH_A_COPY:
            return
        give_back(block, leave(block, leaving))
    load(block, key, take_slot(block, WHEN_EXPECTED), WHEN_EXPECTED)


@compiled
def _end_expectations(block: int) -> None:
    """What was expected of the layer and is not wanted may leave, and is not loaded any more if that has not begun."""
    experts = get_i64(block + 8 * NUM_EXPERTS)
    first = get_i64(block + 8 * LAYER) * experts
    for key in range(first, first + experts):
        status = get(block, STATUS, key)
        if status & EXPECTED:
            put(block, STATUS, key, status & ~EXPECTED)
            if status & READY == 0:
                take_back(block, key)


@compiled
def _start(block: int) -> None:
    """Load what is missing, as far as there are slots."""
    for i in range(get_i64(block + 8 * NUM_ASKED)):
        if get(block, STATES, i) != MISSING:
            continue
        slot = take_slot(block, DEMANDED)
        if slot < 0 or not load(block, _key(block, i), slot, DEMANDED):
            return
        put(block, STATUS, _key(block, i), get(block, STATUS, _key(block, i)) | PINNED)
        put(block, STATES, i, WAITING)


@compiled
def next_group(block: int) -> int:
    """Some of what is asked for and can be computed now are ``IN_USE``; how many."""
    some, there = 0, 0
    for i in range(get_i64(block + 8 * NUM_ASKED)):
        state = get(block, STATES, i)
        if state == HELD:
            put(block, STATES, i, IN_USE)
        elif state == LYING and there < get_i64(block + 8 * AT_ONCE):
            put(block, STATES, i, IN_USE_THERE)
            there += 1
        else:
            continue
        some += 1
    return some


@compiled
def wait_for_some(block: int) -> bool:
    """Until something that is asked for and was not there has come; False: it cannot be loaded."""
    began = nanoseconds()
    while True:
        take_in(block)
        if get_i64(block + 8 * TROUBLE) != 0:
            return False
        found = False
        for i in range(get_i64(block + 8 * NUM_ASKED)):
            if get(block, STATES, i) == WAITING and get(block, STATUS, _key(block, i)) & READY:
                put(block, STATES, i, HELD)
                found = True
        if found:
            count(block, STALLED, nanoseconds() - began)
            return True
        _start(block)
        wait_for_more(get_i64(block + 8 * LOADS), get_i64(block + 8 * SEEN))


@compiled
def end_group(block: int) -> None:
    """What was in use has been computed."""
    for i in range(get_i64(block + 8 * NUM_ASKED)):
        state, key = get(block, STATES, i), _key(block, i)
        if state == IN_USE:
            put(block, STATUS, key, get(block, STATUS, key) & ~PINNED)
        elif state == IN_USE_THERE:
            leave_there(block, key)
        else:
            continue
        put(block, STATES, i, DONE)
    _start(block)


@compiled
def give_up_turn(block: int) -> None:
    """What is still asked for is not waited for any more."""
    for i in range(get_i64(block + 8 * NUM_ASKED)):
        status = get(block, STATUS, _key(block, i))
        put(block, STATUS, _key(block, i), status & ~PINNED)
        put(block, STATES, i, DONE)


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry point, compiled for this CPU: its symbol and its object file.

    ``turn(block, command, first, second, third)``: ``START`` begins the turn of layer ``first``. ``GROUP`` has some of what it
    asked for ``IN_USE``, and waits for that if ``first`` is not 0, unless there is trouble; ``FINISH`` is for when it has been
    computed, and ``GIVE_UP`` for any time. ``AHEAD_OF_TIME`` loads ``second`` keys that lie at ``first`` ahead of time,
    ``LOOK_AHEAD`` what the predictor names of layer ``first`` with ``third`` states at ``second``. ``NOTE`` notes what has come,
    and ``CLEAR`` has one more slot free, if one can be had.
    """

    def turn(block: int, command: int, first: int, second: int, third: int) -> None:
        if command == START:
            begin_turn(block, first)
        elif command == GROUP:
            while next_group(block) == 0 and first != 0 and wait_for_some(block):
                pass
        elif command == FINISH:
            end_group(block)
        elif command == GIVE_UP:
            give_up_turn(block)
        elif command == AHEAD_OF_TIME:
            load_ahead(block, first, second)
        elif command == LOOK_AHEAD:
            look_ahead(block, first, second, third)
        elif command == NOTE:
            take_in(block)
        elif command == CLEAR:
            slot = take_slot(block, DEMANDED)
            if slot >= 0:
                give_back(block, slot)

    return compile_entry_points(turn)
