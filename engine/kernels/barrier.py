"""How the threads of a team keep step.

Tasks of a phase are handed out by a shared counter, so a thread that the machine holds up takes fewer; each
task writes its own outputs, so who ran it leaves no trace in the result.
"""

from __future__ import annotations

from numba import njit

from engine.kernels.control import ARRIVED, BASE, EPOCH, THREADS, TICKETS
from engine.kernels.intrinsics import atomic_add, atomic_get, get_i64, give_way, pause, put_i64

SPINS = 500  # pauses (about 20 us) before a waiting thread lets others have its core


@njit(nogil=True, error_model="numpy")
def wait(control: int, own: int) -> None:
    """Barrier: returns when all threads have arrived."""
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
def take(control: int, own: int) -> int:
    """The next task of this phase."""
    return atomic_add(control + 8 * TICKETS, 1) - get_i64(own + 8 * BASE)


@njit(nogil=True, error_model="numpy")
def finish(control: int, own: int, tasks: int) -> None:
    """End a phase of ``tasks`` tasks. Each thread has drawn one ticket too many."""
    put_i64(own + 8 * BASE, get_i64(own + 8 * BASE) + tasks + get_i64(control + 8 * THREADS))
    wait(control, own)
