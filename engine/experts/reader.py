"""I/O threads that load experts: what is waited for before what is only expected.

A load goes in pieces. Between two pieces a thread looks whether something more urgent has come, so a load ahead
of time delays a demanded one by one piece at most.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.experts.slots import Slot
from engine.experts.store import ExpertStore, Key

_PIECE = 1 << 18  # bytes
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

    def carry(self, num_bytes: int, first: bool) -> None:
        """Wait until ``num_bytes`` more have passed."""
        with self._lock:
            begin = max(time.perf_counter(), self._free)
            self._free = begin + num_bytes / self.bytes_per_second + (self.latency if first else 0.0)
            until = self._free
        # Sleeping a little too long shifts no later load: each begins where the last one should have ended.
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)


class Reader:
    """Loads experts from a store on threads of its own.

    Args:
        on_done: called on an I/O thread with each load that has ended, and the error if it failed.
        link: None: as fast as the store is.
        keeps_pieces: see :attr:`engine.experts.slots.SlotMaker.keeps_pieces`.
    """

    def __init__(
        self,
        store: ExpertStore,
        on_done: Callable[[Load, Exception | None], None],
        num_threads: int = 2,
        link: Link | None = None,
        keeps_pieces: bool = True,
    ) -> None:
        self._store, self._on_done, self._link = store, on_done, link
        self._keeps_pieces = keeps_pieces
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
            load.order = self._count
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
        """Take back a load that has not begun; whether that was so. ``on_done`` is not called for it."""
        with self._wake:
            if load.started:
                return False
            load.cancelled = True
            return True

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
        while (load := self._next()) is not None:
            error: Exception | None = None
            try:
                if not self._carry(load):
                    continue
            except Exception as problem:  # whoever waits for the expert is told
                error = problem
            self._on_done(load, error)

    def _carry(self, load: Load) -> bool:
        """Bring the rest of a load into its slot; False if it was put back."""
        target, filled = load.slot.buffer(load.key)
        size = len(target)
        while not filled and load.done < size:
            end = min(load.done + _PIECE, size)
            self._store.read(load.key, target, load.done, end)
            if self._link is not None:
                self._link.carry(end - load.done, load.done == 0)
            load.done = end
            if load.done < size and self._keeps_pieces and (self._closed or self._give_way(load)):
                return False
        self._store.check(load.key, target)
        load.slot.settle(load.key)
        return True
