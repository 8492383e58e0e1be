"""I/O threads that load experts: what is waited for before what is only expected.

A load ahead of time goes in pieces. Between two pieces a thread looks whether something more urgent has come, so it delays
a demanded one by one piece at most.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from engine.experts.slots import Slot
from engine.experts.store import ExpertStore, Key

_PIECE = 1 << 18  # bytes
_TIMER_SLACK = 29  # PR_SET_TIMERSLACK
DEMANDED, EXPECTED = 0, 1


@dataclass
class Load:
    """One expert on its way into a slot.

    Attributes:
        urgency: ``DEMANDED`` or ``EXPECTED``.
        done: bytes that have arrived.
        cancelled: it is not wanted any more; honoured only before the first piece.
    """

    key: Key
    slot: Slot
    urgency: int
    done: int = 0
    cancelled: bool = False
    started: bool = field(default=False, init=False)
    order: int = field(default=0, init=False)
    asked: float = field(default=0.0, init=False)


class Link:
    """A stated bandwidth for the slow tier, for measurements: bytes pass one after the other.

    Args:
        bytes_per_second: of the imitated disk or bus.
        latency: seconds that each load takes besides.
    """

    def __init__(self, bytes_per_second: float, latency: float = 0.0) -> None:
        self.bytes_per_second, self.latency = bytes_per_second, latency
        self._lock = threading.Lock()
        self._free = 0.0

    def open(self) -> None:
        """To be called once on each thread that carries: its sleeps end on time, where the system would else take
        some 50 microseconds more (Linux)."""
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_TIMER_SLACK, ctypes.c_ulong(1), 0, 0, 0)

    def carry(self, num_bytes: int, first: bool, asked: float) -> None:
        """Wait until ``num_bytes`` more have passed of what was asked for at ``asked``, in ``perf_counter``'s seconds."""
        with self._lock:
            begin = max(asked, self._free)
            self._free = begin + num_bytes / self.bytes_per_second + (self.latency if first else 0.0)
            until = self._free
        # Sleeping a little too long shifts no later load: each begins when the link is free.
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)


Ended: TypeAlias = tuple[Load, Exception | None]  # a load that has ended, and the error if it failed


class Reader:
    """Loads experts from a store on threads of its own, for one thread that asks: in Python, for every kind of slot.

    Args:
        link: None: as fast as the store is.
        keeps_pieces: see :attr:`engine.experts.slots.SlotMaker.keeps_pieces`.
    """

    def __init__(
        self, store: ExpertStore, num_threads: int = 2, link: Link | None = None, keeps_pieces: bool = True
    ) -> None:
        self._store, self._link = store, link
        self._keeps_pieces = keeps_pieces
        self._ended: list[Ended] = []
        self._news = threading.Condition()
        self._waiting: list[tuple[int, int, Load]] = []
        self._count = 0
        self._wake = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"experts-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: Load) -> None:
        """Queue ``load``."""
        with self._wake:
            self._count += 1
            load.order, load.asked = self._count, time.perf_counter()
            self._push(load)
            self._wake.notify()

    def hurry(self, load: Load) -> None:
        """A load that was only expected is waited for now."""
        with self._wake:
            if load.urgency != DEMANDED:
                load.urgency = DEMANDED
                self._push(load)  # its old place in the queue is skipped
                self._wake.notify()

    def cancel(self, load: Load) -> bool:
        """Take back a load that has not begun; whether that was so. Nobody hears of it again."""
        with self._wake:
            if load.started:
                return False
            load.cancelled = True
            return True

    def ended(self) -> Sequence[Ended]:
        """The loads that have ended since the last call."""
        if not self._ended:
            return ()
        with self._news:
            ended, self._ended = self._ended, []
        return ended

    def wait(self) -> None:
        """Until a load ends; returns at once if one has ended since :meth:`ended`, and now and then for nothing."""
        with self._news:
            if not self._ended:
                self._news.wait()

    def close(self) -> None:
        """Stop the threads; loads that have not ended are dropped."""
        with self._wake:
            self._closed = True
            self._waiting.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _push(self, load: Load) -> None:
        heapq.heappush(self._waiting, (load.urgency, load.order, load))

    def _next(self) -> Load | None:
        """The most urgent load, now this thread's own; None: the reader is closed."""
        with self._wake:
            while True:
                if self._closed:
                    return None
                while self._waiting:
                    urgency, _, load = heapq.heappop(self._waiting)
                    # Another entry may stand for it: it was hurried, or a thread has it.
                    if not load.cancelled and not load.started and urgency == load.urgency:
                        load.started = True
                        return load
                self._wake.wait()

    def _give_way(self, load: Load) -> bool:
        """Whether ``load`` was put back because something more urgent waits."""
        if load.urgency == DEMANDED or not self._waiting:
            return False
        with self._wake:
            if any(entry[0] < load.urgency and not entry[2].started for entry in self._waiting[:1]):
                load.started = False
                self._push(load)
                self._wake.notify()
                return True
        return False

    def _serve(self) -> None:
        if self._link is not None:
            self._link.open()
        while (load := self._next()) is not None:
            error: Exception | None = None
            try:
                if not self._carry(load):
                    continue
            except Exception as problem:  # whoever waits for the expert is told
                error = problem
            with self._news:
                self._ended.append((load, error))
                self._news.notify()

    def _carry(self, load: Load) -> bool:
        """Bring the rest of a load into its slot; False if it was put back."""
        target, filled = load.slot.buffer(load.key)
        size = len(target)
        while not filled and load.done < size:
            end = size if load.urgency == DEMANDED else min(load.done + _PIECE, size)
            self._store.read(load.key, target, load.done, end)
            if self._link is not None:
                self._link.carry(end - load.done, load.done == 0, load.asked)
            load.done = end
            if load.done < size and self._keeps_pieces and (self._closed or self._give_way(load)):
                return False
        self._store.check(load.key, target)
        load.slot.settle(load.key)
        return True
