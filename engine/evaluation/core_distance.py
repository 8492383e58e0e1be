"""How far apart two cores are: what a cache line takes from one to the other.

A few tens of nanoseconds where they share a last-level cache, 200 where they do not. A virtual machine's cores may be moved
from the one to the other at any moment, and so may threads on a processor of several such clusters. Steps of a small
model wait for one another some 180 times, so its speed, and what a row more costs, cannot be told without it.
"""

from __future__ import annotations

import threading
import time
from statistics import median

import numpy as np
from numba import njit

from engine.hardware import usable_threads
from engine.kernels.intrinsics import atomic_add, atomic_get

_FIRST, _HOPS = 100, 500  # until both threads run, and then
_SETTLE = 0.005  # seconds for threads that still wait for their next command to fall asleep


@njit(nogil=True, error_model="numpy")
def _hop(address: int, parity: int, first: int, last: int) -> None:
    """Wait for every other number at ``address``, and count on."""
    for number in range(first, last):
        while atomic_get(address) != 2 * number + parity:
            pass
        atomic_add(address, 1)


class CoreDistance:
    """Measures now and then; with a single thread, or a single core, there is nothing to measure."""

    def __init__(self, threads: int) -> None:
        self._seconds: list[float] = []
        self._possible = min(threads, usable_threads()) > 1
        if self._possible:
            _hop(np.zeros(1, np.int64).ctypes.data, 0, 0, 0)  # compiled

    def measure(self) -> None:
        """Take one measurement; a few milliseconds."""
        if not self._possible:
            return
        time.sleep(_SETTLE)
        cell = np.zeros(16, np.int64)
        other = threading.Thread(target=_hop, args=(cell.ctypes.data, 1, 0, _FIRST + _HOPS))
        other.start()
        _hop(cell.ctypes.data, 0, 0, _FIRST)
        started = time.perf_counter()
        _hop(cell.ctypes.data, 0, _FIRST, _FIRST + _HOPS)
        self._seconds.append((time.perf_counter() - started) / (2 * _HOPS))
        other.join()

    def summary(self) -> dict[str, float] | None:
        """Nanoseconds, one way: the lowest, the median and the highest of all measurements."""
        if not self._seconds:
            return None
        found = {"lowest": min(self._seconds), "median": median(self._seconds), "highest": max(self._seconds)}
        return {name: round(1e9 * seconds, 1) for name, seconds in found.items()}
