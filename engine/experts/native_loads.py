"""I/O threads in native code (:mod:`engine.kernels.loads`), for slots in RAM: what they do for a load takes some
microseconds and no interpreter lock, where a thread in Python costs both sides a tenth of a millisecond."""

from __future__ import annotations

import os
import threading

import numpy as np

from engine.experts.reader import DEMANDED, EXPECTED, Link
from engine.experts.store import ExpertStore
from engine.kernels import load_fields as fields
from engine.kernels.native import Turns


class NativeLoads:
    """Threads around a control block that :mod:`engine.kernels.turns` asks.

    Args:
        link: None: as fast as the store is. Else no thread reads: a link carries one load after the other by itself.

    Attributes:
        address: of the control block.
    """

    def __init__(self, program: Turns, store: ExpertStore, num_threads: int, link: Link | None) -> None:
        control = np.zeros(fields.CONTROL_FIELDS, np.int64)
        entries = np.zeros(fields.NUM_ENTRIES * fields.ENTRY_FIELDS, np.int64)
        control[fields.DESCRIPTOR], control[fields.NUM_BYTES] = store.descriptor, store.layout.nbytes
        control[fields.ENTRIES] = entries.ctypes.data
        self._pipes = (*os.pipe(), *os.pipe())
        control[[fields.SLEEP_AT, fields.WAKE_AT, fields.WAIT_AT, fields.TELL_AT]] = self._pipes
        if link is not None:
            num_threads = 0
            control[fields.BANDWIDTH], control[fields.LATENCY] = link.bytes_per_second, 1e9 * link.latency
        self.address, self._control, self._entries = control.ctypes.data, control.data, entries
        # One thread, if there are several, is kept for what is waited for.
        least_urgent = [
            DEMANDED if 0 == number < num_threads - 1 else EXPECTED for number in range(num_threads)
        ]
        self._closed = False
        self._threads = [
            threading.Thread(
                # The threads keep alive what they work with.
                target=_serve,
                args=(program, control, entries, lowest),
                name=f"experts-{number}",
                daemon=True,
            )
            for number, lowest in enumerate(least_urgent)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads; loads that have not ended are dropped. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._control[fields.CLOSED] = 1
            os.write(self._pipes[1], bytes(len(self._threads)))
            for thread in self._threads:
                thread.join()
            for end in self._pipes:
                os.close(end)


def _serve(program: Turns, control: np.ndarray, entries: np.ndarray, lowest: int) -> None:
    program.serve(control.ctypes.data, lowest)
