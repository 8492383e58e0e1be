"""I/O threads in native code (:mod:`engine.kernels.loads`), for slots in RAM: what they do for a load takes some
microseconds and no interpreter lock, where a thread in Python costs both sides a tenth of a millisecond."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import cast

import numpy as np

from engine.errors import ExpertStoreError
from engine.experts.reader import DEMANDED, EXPECTED, Ended, Link, Load, Reader, ThreadedReader
from engine.experts.slots import HostSlot, HostSlots, SlotMaker
from engine.experts.store import ExpertStore, unreadable
from engine.kernels import load_fields as fields
from engine.kernels.native import Loads, load_loads

_log = logging.getLogger(__name__)


def make_reader(store: ExpertStore, slots: SlotMaker, num_threads: int, link: Link | None) -> Reader:
    """Reads into ``slots``: the native one where there is one for them, and for this system."""
    if isinstance(slots, HostSlots) and find_spec("numba") is not None:
        try:
            return NativeReader(store, load_loads(), num_threads, link)
        except Exception as error:  # an LLVM problem must not keep anyone from chatting
            _log.info("experts are read by Python's threads: %s", error)
    return ThreadedReader(store, num_threads, link, slots.keeps_pieces)


class NativeReader:
    """A :class:`engine.experts.reader.Reader`.

    Args:
        link: None: as fast as the store is. Else one thread carries everything, one load after the other.
    """

    def __init__(self, store: ExpertStore, program: Loads, num_threads: int, link: Link | None) -> None:
        self._store, self._program = store, program
        control = np.zeros(fields.CONTROL_FIELDS, np.int64)
        entries = np.zeros(fields.NUM_ENTRIES * fields.ENTRY_FIELDS, np.int64)
        control[fields.DESCRIPTOR], control[fields.NUM_BYTES] = store.descriptor, store.layout.nbytes
        control[fields.ENTRIES] = entries.ctypes.data
        self._pipes = (*os.pipe(), *os.pipe())
        control[[fields.SLEEP_AT, fields.WAKE_AT, fields.WAIT_AT, fields.TELL_AT]] = self._pipes
        if link is not None:
            num_threads = 1
            control[fields.BANDWIDTH], control[fields.LATENCY] = link.bytes_per_second, 1e9 * link.latency
        self._address, self._control, self._entries = control.ctypes.data, control.data, entries.data
        self._free = list(range(fields.NUM_ENTRIES))
        self._loads: dict[int, Load] = {}  # by entry
        self._seen = 0
        self._ended: list[Ended] = []  # and not told yet
        # One thread, if there are several, is kept for what is waited for.
        least_urgent = [
            DEMANDED if 0 == number < num_threads - 1 else EXPECTED for number in range(num_threads)
        ]
        self._threads = [
            threading.Thread(
                # The threads keep alive what they work with.
                target=_serve,
                args=(program, control, entries, link, lowest),
                name=f"experts-{number}",
                daemon=True,
            )
            for number, lowest in enumerate(least_urgent)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: Load) -> None:
        while not self._free:  # more at once than anybody should ask for
            self.wait()
            self._ended += self._collect()
        number = load.order = self._free.pop()
        self._loads[number] = load
        place = fields.ENTRY_FIELDS * number
        self._entries[place + fields.OFFSET] = self._store.offset(load.key)
        self._entries[place + fields.TARGET] = cast(HostSlot, load.slot).address
        self._entries[place + fields.STATE] = fields.NEW
        self._program.submit(self._address, number, load.urgency)

    def hurry(self, load: Load) -> None:
        if load.urgency != DEMANDED and self._loads.get(load.order) is load:
            load.urgency = DEMANDED
            self._program.submit(self._address, load.order, DEMANDED)

    def cancel(self, load: Load) -> bool:
        if self._loads.get(load.order) is not load:  # it has ended
            return False
        self._program.cancel(self._address, load.order)
        if self._state(load.order) != fields.CANCELLED:
            return False
        del self._loads[load.order]
        self._free.append(load.order)
        return True

    def ended(self) -> Sequence[Ended]:
        if self._control[fields.COMPLETED] == self._seen and not self._ended:
            return ()
        ended, self._ended = [*self._ended, *self._collect()], []
        return ended

    def _collect(self) -> Sequence[Ended]:
        ended = list[Ended]()
        for number, load in list(self._loads.items()):
            if (state := self._state(number)) in (fields.DONE, fields.FAILED):
                del self._loads[number]
                self._free.append(number)
                ended.append((load, self._error(load, state)))
        self._seen += len(ended)
        return ended

    def wait(self) -> None:
        if not self._ended:
            self._program.wait(self._address, self._seen)

    def close(self) -> None:
        if self._threads:
            self._control[fields.CLOSED] = 1
            os.write(self._pipes[1], bytes(len(self._threads)))
            for thread in self._threads:
                thread.join()
            for end in self._pipes:
                os.close(end)
            self._threads = []

    def _state(self, number: int) -> int:
        return self._entries[fields.ENTRY_FIELDS * number + fields.STATE]

    def _error(self, load: Load, state: int) -> Exception | None:
        if state == fields.FAILED:
            return unreadable(self._store.file)
        try:
            self._store.check(load.key, load.slot.buffer(load.key)[0])
        except ExpertStoreError as error:
            return error
        return None


def _serve(program: Loads, control: np.ndarray, entries: np.ndarray, link: Link | None, lowest: int) -> None:
    if link is not None:
        link.open()
    program.serve(control.ctypes.data, lowest)
