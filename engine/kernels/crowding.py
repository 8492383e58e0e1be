"""How many threads a team uses while other programs want the machine's cores too. All our choice.

A thread that has to share its core is away for milliseconds at a time, and all others wait for it at the next barrier:
with one core of two taken by another program, two threads are slower than one. So a team that loses much time in this way
does without a thread for a while, and tries again later.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

WINDOW = 0.008  # seconds of work to be judged by: a system lets a program have a core for half of that
_WORTH = 0.8  # of its share of the work, what a thread may cost in waiting
_SHORTEST, _LONGEST = 0.03, 1.0  # seconds without a thread: doubled each time that it is no use still


class Crowding:
    """Watches what a team loses, and says how many threads it should use.

    Args:
        clock: seconds.

    Attributes:
        threads: that is.
    """

    def __init__(self, num_threads: int, clock: Callable[[], float] = perf_counter) -> None:
        self.threads = self._most = num_threads
        self._clock = clock
        self._worked = self._lost = 0.0  # since it was judged last
        self._without, self._until = _SHORTEST, 0.0
        self._trying = False

    def observe(self, seconds: float, lost: float) -> None:
        """Commands took so long, for a share ``lost`` of which a thread was waited for."""
        self._worked += seconds
        self._lost += lost * seconds
        allowed = _WORTH / self.threads
        if self.threads > 1 and self._lost > allowed * max(self._worked, WINDOW):
            self._without = min(2 * self._without, _LONGEST) if self._trying else _SHORTEST
            self._until = self._clock() + self._without
            self._judge(self.threads - 1, trying=False)
        elif self._worked >= WINDOW:
            more = self.threads < self._most and self._clock() >= self._until
            self._judge(self.threads + more, trying=more)

    def _judge(self, threads: int, trying: bool) -> None:
        self.threads, self._trying = threads, trying
        self._worked = self._lost = 0.0
