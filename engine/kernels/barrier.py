"""How the threads of a team keep step.

Tasks of a phase are shared out evenly, neighbours to the same thread, for which its part of a matrix is one stream. A
thread that is done goes on with what others have left, so one that the machine holds up does fewer. Each task writes
its own outputs, so who ran it leaves no trace in the result.
"""

from __future__ import annotations

from numba import njit

from engine.kernels.control import ARRIVED, EPOCH, PHASE, RANK_FIELDS, RANKS, THREADS, TICKETS
from engine.kernels.intrinsics import atomic_add, atomic_get, get_i64, give_way, pause, put_i64

SPINS = 500  # pauses (about 20 us) before a waiting thread lets others have its core


@njit(nogil=True, error_model="numpy")
def wait(control: int, own: int) -> None:
    """Barrier, and end of a phase: returns when all threads have arrived."""
    phase = get_i64(own + 8 * PHASE) + 1
    put_i64(own + 8 * PHASE, phase)
    # Phases count their tickets in two counters by turns: nobody has drawn from this one since the last barrier.
    put_i64(own + 8 * (TICKETS + phase % 2), 0)
    target = get_i64(own + 8 * EPOCH) + get_i64(control + 8 * THREADS)
    put_i64(own + 8 * EPOCH, target)
    atomic_add(control + 8 * ARRIVED, 1)
    spins = 0
    while atomic_get(control + 8 * ARRIVED) < target:
        pause()
        spins += 1
        if spins > SPINS:
            give_way()


@njit(nogil=True, error_model="numpy")
def take(control: int, own: int, tasks: int) -> int:
    """The next of this phase's ``tasks``; -1 if all are taken."""
    threads = get_i64(control + 8 * THREADS)
    rank = (own - control - 8 * RANKS) // (8 * RANK_FIELDS)
    counter = TICKETS + get_i64(own + 8 * PHASE) % 2
    for step in range(threads):
        whose = rank + step
        if whose >= threads:
            whose -= threads
        tickets = control + 8 * (RANKS + whose * RANK_FIELDS + counter)
        first, last = whose * tasks // threads, (whose + 1) * tasks // threads
        if atomic_get(tickets) < last - first:
            task = first + atomic_add(tickets, 1)
            if task < last:
                return task
    return -1
