"""Which expert is in which slot, and its way there: what :class:`engine.experts.python_cache.PythonCache` does, in native
code (:mod:`engine.kernels.turns`)."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels.compiling import compiled
from engine.kernels.intrinsics import I64, atomic_get, get_i64, put_i64
from engine.kernels.load_fields import (
    BANDWIDTH,
    COMPLETED,
    DEMANDED,
    DONE,
    ENTRIES,
    ENTRY_FIELDS,
    FAILED,
    NEW,
    OFFSET,
    STATE,
    TARGET,
    WHOSE,
)
from engine.kernels.load_fields import (
    EXPECTED as WHEN_EXPECTED,
)
from engine.kernels.loads import cancel, carry, nanoseconds, submit
from engine.kernels.scalars import get_f64
from engine.kernels.turn_fields import (
    ABSENT,
    ADDRESSES,
    AHEAD,
    CALL,
    CHECKED,
    COMING,
    EXPECTED,
    FREE,
    FREE_ENTRIES,
    IS_CACHED,
    IS_WHOLE,
    ISSUED,
    KEY_OF,
    LOADED,
    LOADS,
    MAPPED,
    NUM_FREE,
    NUM_FREE_ENTRIES,
    NUM_PENDING,
    NUM_SLOTS,
    OFFSETS,
    PENDING,
    PINNED,
    READY,
    SEEN,
    SEEN_UNTIL,
    SLOT_OF,
    STATUS,
    TROUBLE,
    WORTH,
)  # fmt: skip


@intrinsic
def _call(typingctx: Any, address: Any, question: Any, key: Any) -> Any:
    """A function of C's, of two integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64, I64]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), args[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


@compiled
def ask(block: int, question: int, key: int) -> bool:
    """Have Python answer a question about an expert."""
    return _call(get_i64(block + 8 * CALL), question, key) == 1


@compiled
def at(block: int, array: int, index: int) -> int:
    """The address of an array's element."""
    return get_i64(block + 8 * array) + 8 * index


@compiled
def get(block: int, array: int, index: int) -> int:
    return get_i64(at(block, array, index))


@compiled
def put(block: int, array: int, index: int, value: int) -> None:
    put_i64(at(block, array, index), value)


@compiled
def count(block: int, field: int, more: int) -> None:
    """Add to a field of the block."""
    put_i64(block + 8 * field, get_i64(block + 8 * field) + more)


@compiled
def worth(block: int, key: int) -> float:
    """How much an expert is worth keeping."""
    return get_f64(at(block, WORTH, key))


@compiled
def is_cached(block: int, key: int) -> bool:
    """Whether the system has an expert in its file cache, or had it a moment ago, and it could be computed there."""
    if get_i64(block + 8 * MAPPED) == 0:
        return False
    return get(block, SEEN_UNTIL, key) > nanoseconds() or ask(block, IS_CACHED, key)


@compiled
def take_in(block: int) -> None:
    """Note which loads have ended."""
    loads, i = get_i64(block + 8 * LOADS), 0
    if get_i64(loads + 8 * BANDWIDTH) > 0:
        carry(loads)
    if atomic_get(loads + 8 * COMPLETED) == get_i64(block + 8 * SEEN):
        return
    while i < get_i64(block + 8 * NUM_PENDING):
        entry = get_i64(loads + 8 * ENTRIES) + 8 * ENTRY_FIELDS * get(block, PENDING, i)
        state = atomic_get(entry + 8 * STATE)
        if state != DONE and state != FAILED:
            i += 1
            continue
        key = get_i64(entry + 8 * WHOSE)
        _forget(block, i)
        count(block, SEEN, 1)
        status = get(block, STATUS, key)
        if state == DONE and (get(block, CHECKED, key) != 0 or ask(block, IS_WHOLE, key)):
            put(block, STATUS, key, status - COMING + READY)
            count(block, LOADED, 1)
        else:  # of an expert that was only expected it is not told: it is tried again on demand
            if status & PINNED:
                put_i64(block + 8 * TROUBLE, key + 1)
            give_back(block, leave(block, key))


@compiled
def _forget(block: int, place: int) -> None:
    """Take a load off the pending ones."""
    last = get_i64(block + 8 * NUM_PENDING) - 1
    entry = get(block, PENDING, place)
    put(block, PENDING, place, get(block, PENDING, last))
    put_i64(block + 8 * NUM_PENDING, last)
    put(block, FREE_ENTRIES, get_i64(block + 8 * NUM_FREE_ENTRIES), entry)
    count(block, NUM_FREE_ENTRIES, 1)


@compiled
def _pending(block: int, key: int) -> int:
    """The place of an expert's load among the pending ones; -1: it has ended."""
    entries = get_i64(get_i64(block + 8 * LOADS) + 8 * ENTRIES)
    for place in range(get_i64(block + 8 * NUM_PENDING)):
        if get_i64(entries + 8 * (ENTRY_FIELDS * get(block, PENDING, place) + WHOSE)) == key:
            return place
    return -1


@compiled
def hurry(block: int, key: int) -> None:
    """An expert that was only expected is waited for now."""
    place = _pending(block, key)
    if place >= 0:
        submit(get_i64(block + 8 * LOADS), get(block, PENDING, place), DEMANDED)


@compiled
def take_back(block: int, key: int) -> bool:
    """Take back an expert's load that has not begun, and leave its slot free; whether that was so."""
    place = _pending(block, key)
    if place < 0 or not cancel(get_i64(block + 8 * LOADS), get(block, PENDING, place)):
        return False
    _forget(block, place)
    count(block, ISSUED, -get(block, AHEAD, key))
    give_back(block, leave(block, key))
    return True


@compiled
def leave(block: int, key: int) -> int:
    """An expert leaves; its slot."""
    slot = get(block, SLOT_OF, key)
    put(block, STATUS, key, ABSENT)
    put(block, SLOT_OF, key, -1)
    put(block, KEY_OF, slot, -1)
    return slot


@compiled
def give_back(block: int, slot: int) -> None:
    """A slot is free."""
    put(block, FREE, get_i64(block + 8 * NUM_FREE), slot)
    count(block, NUM_FREE, 1)


@compiled
def first_to_leave(block: int, besides: int) -> int:
    """The least worthy of those in memory that nobody uses or expects, or may be ``besides``; -1: there is none."""
    found, least = -1, math.inf
    for slot in range(get_i64(block + 8 * NUM_SLOTS)):
        key = get(block, KEY_OF, slot)
        if key < 0 or get(block, STATUS, key) & ~besides != READY:
            continue
        value = worth(block, key)
        if found < 0 or value < least or (value == least and key < found):
            found, least = key, value
    return found


@compiled
def take_slot(block: int, urgency: int) -> int:
    """A slot that nobody needs any more, for a demanded expert also one of those that were expected; -1: there is none."""
    if get_i64(block + 8 * NUM_FREE) == 0:
        key = first_to_leave(block, 0)
        if key < 0 and urgency == DEMANDED:
            key = first_to_leave(block, EXPECTED)
        if key >= 0:
            return leave(block, key)
        if urgency == DEMANDED:
            _take_one_back(block)
    free = get_i64(block + 8 * NUM_FREE)
    if free == 0:
        return -1
    put_i64(block + 8 * NUM_FREE, free - 1)
    return get(block, FREE, free - 1)


@compiled
def _take_one_back(block: int) -> None:
    """Any load that nobody waits for and that has not begun."""
    entries = get_i64(get_i64(block + 8 * LOADS) + 8 * ENTRIES)
    for place in range(get_i64(block + 8 * NUM_PENDING)):
        key = get_i64(entries + 8 * (ENTRY_FIELDS * get(block, PENDING, place) + WHOSE))
        if get(block, STATUS, key) & PINNED == 0 and take_back(block, key):
            return


@compiled
def load(block: int, key: int, slot: int, urgency: int) -> bool:
    """Have an expert loaded into a slot; False: more is on its way than anybody should ask for, and the slot is free."""
    left = get_i64(block + 8 * NUM_FREE_ENTRIES) - 1
    if left < 0:
        give_back(block, slot)
        return False
    put_i64(block + 8 * NUM_FREE_ENTRIES, left)
    number, loads = get(block, FREE_ENTRIES, left), get_i64(block + 8 * LOADS)
    entry = get_i64(loads + 8 * ENTRIES) + 8 * ENTRY_FIELDS * number
    put_i64(entry + 8 * OFFSET, get(block, OFFSETS, key))
    put_i64(entry + 8 * TARGET, get(block, ADDRESSES, slot))
    put_i64(entry + 8 * WHOSE, key)
    put_i64(entry + 8 * STATE, NEW)
    put(block, PENDING, get_i64(block + 8 * NUM_PENDING), number)
    count(block, NUM_PENDING, 1)
    put(block, STATUS, key, COMING)
    put(block, AHEAD, key, 0)
    put(block, SLOT_OF, key, slot)
    put(block, KEY_OF, slot, key)
    submit(loads, number, urgency)
    return True


@compiled
def load_ahead(block: int, keys: int, many: int) -> None:
    """Experts that a layer to come will probably want: those in memory stay, the others are loaded as far as slots can be
    had without what else is expected."""
    take_in(block)
    for i in range(many):
        key = get_i64(keys + 8 * i)
        status = get(block, STATUS, key)
        if status != ABSENT:
            put(block, STATUS, key, status | EXPECTED)
    for i in range(many):
        key = get_i64(keys + 8 * i)
        if get(block, STATUS, key) != ABSENT or is_cached(block, key):
            continue
        slot = take_slot(block, WHEN_EXPECTED)
        if slot < 0 or not load(block, key, slot, WHEN_EXPECTED):
            return
        put(block, STATUS, key, COMING + EXPECTED)
        put(block, AHEAD, key, 1)
        count(block, ISSUED, 1)
