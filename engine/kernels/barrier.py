"""How the threads of a team keep step.

Tasks of a phase are shared out evenly, neighbours to the same thread, for which its part of a matrix is one stream. A
thread that is done says so at once, and helps one that the machine holds up: which then says so only when its helper is
done as well. Each task writes its own outputs, so who ran it leaves no trace in the result.

What one thread writes and another reads travels from cache to cache, which takes 40 to 200 ns where we measured it. So a thread says that it
has arrived in a cache line of its own, which nobody else writes, and its tickets are left alone as long as it is in time.

How many threads a command is for (``CREW``) each keeps for itself: while one is still on its way out of the last phase, the
caller may write the next command.
"""

from __future__ import annotations

from engine.kernels.compiling import compiled
from engine.kernels.control import (
    ARRIVED,
    CREW,
    GUEST,
    HELD_UP,
    HELPED,
    MINE,
    OWED,
    PHASE,
    PHASE_SHIFT,
    RANK_FIELDS,
    RANKS,
    SINCE,
    TICKETS,
)
from engine.kernels.intrinsics import (
    atomic_add,
    atomic_exchange_if,
    atomic_get,
    atomic_put,
    get_i64,
    give_way,
    pause,
    put_i64,
    ticks,
)

SPINS = 500  # pauses (about 20 us) before a waiting thread lets others have its core
_GRACE = 20  # pauses (about 0.5 us) before it looks for work that others have left, and again each time
_SPARE = (
    2  # tasks that it leaves them: the weights of the next one are on their way into their caches already
)


@compiled
def wait(control: int, own: int) -> None:
    """Barrier, and end of a phase: returns when all threads have arrived."""
    phase, spins = get_i64(own + 8 * PHASE), 0
    if get_i64(own + 8 * ARRIVED) <= phase:
        _arrive(own, phase)
    for rank in range(get_i64(own + 8 * CREW)):
        while atomic_get(control + 8 * (RANKS + rank * RANK_FIELDS + ARRIVED)) <= phase:
            spins = _rest(own, spins)
    _count_lost(own, spins)
    put_i64(own + 8 * PHASE, phase + 1)


@compiled
def take(control: int, own: int, tasks: int) -> int:
    """The next of this phase's ``tasks``; -1 when all are done, by all threads, and have to be waited for no more."""
    threads, phase, spins = get_i64(own + 8 * CREW), get_i64(own + 8 * PHASE), 0
    rank = (own - control - 8 * RANKS) // (8 * RANK_FIELDS)
    if get_i64(own + 8 * GUEST) != 0:  # the task before was another thread's
        atomic_add(get_i64(own + 8 * GUEST), 1)
        put_i64(own + 8 * GUEST, 0)
    first, last = rank * tasks // threads, (rank + 1) * tasks // threads
    number = _draw(own, phase, last - first, 1)
    if number >= 0:
        put_i64(own + 8 * MINE, get_i64(own + 8 * MINE) + 1)
        return first + number
    if get_i64(own + 8 * ARRIVED) <= phase:
        owed = get_i64(own + 8 * OWED) + last - first - get_i64(own + 8 * MINE)
        while atomic_get(own + 8 * HELPED) < owed:
            spins = _rest(own, spins)
        put_i64(own + 8 * OWED, owed)
        put_i64(own + 8 * MINE, 0)
        _arrive(own, phase)
    spins = 0
    for step in range(1, threads):
        whose = rank + step if rank + step < threads else rank + step - threads
        other = control + 8 * (RANKS + whose * RANK_FIELDS)
        while atomic_get(other + 8 * ARRIVED) <= phase:
            spins = _rest(own, spins)
            if spins % _GRACE == 0:
                first, last = whose * tasks // threads, (whose + 1) * tasks // threads
                number = _draw(other, phase, last - first, _SPARE)
                if number >= 0:
                    put_i64(own + 8 * GUEST, other + 8 * HELPED)
                    _count_lost(own, spins)
                    return first + number
    _count_lost(own, spins)
    return -1


@compiled
def _arrive(own: int, phase: int) -> None:
    """Say that this thread has done its share of a phase."""
    put_i64(own + 8 * TICKETS, (phase + 1) << PHASE_SHIFT)
    atomic_put(own + 8 * ARRIVED, phase + 1)


@compiled
def _draw(whose: int, phase: int, share: int, least: int) -> int:
    """The number of the next task of a thread's ``share``, if ``least`` are left of it; or -1."""
    while True:
        seen = atomic_get(whose + 8 * TICKETS)
        number = seen - (phase << PHASE_SHIFT)
        if not 0 <= number <= share - least:
            return -1
        if atomic_exchange_if(whose + 8 * TICKETS, seen, seen + 1):
            return number


@compiled
def _rest(own: int, spins: int) -> int:
    """Wait a little, and let another thread have the core if it has been long."""
    pause()
    if spins == SPINS:
        put_i64(own + 8 * SINCE, ticks())
    if spins >= SPINS:
        give_way()
    return spins + 1


@compiled
def _count_lost(own: int, spins: int) -> None:
    """Note what a wait of so many pauses took, if it was long: somebody had no core."""
    if spins > SPINS:
        put_i64(own + 8 * HELD_UP, get_i64(own + 8 * HELD_UP) + ticks() - get_i64(own + 8 * SINCE))
