"""Computing a missing expert where it lies: from the mapped store, if the system has that part in its file cache.

Without a GPU the slow tier is the disk behind the system's file cache, and what is in that cache is in RAM already: to
copy it into a slot first would take longer than to compute with it. The cache is the system's own, which takes it from
whatever memory nobody needs and gives it up before anything else; so slots and file cache hold different experts after a
while, those that the system has given up being the ones that are loaded.

Where there is room for all of a store, the system is made to read it at the beginning, from end to end: expert by expert, here
and there, it would fill its cache with single pages, which take twenty times as long to map as the large ones of a file that is read
in order. (Linux 6.18, an expert of 4 MB: 0.4 and 0.02 ms.)

Linux alone tells cheaply what is in its file cache.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from time import monotonic

import numpy as np
import torch

from engine.errors import ExpertStoreError
from engine.experts.blob import PAGE
from engine.experts.slots import SlotMaker
from engine.experts.store import ExpertStore, Key
from engine.mapped_files import guard_mapping
from engine.models.feed_forward import FeedForward

_TRUST = 5.0  # seconds for which what is in the file cache is taken to stay there
WINDOW = 32 << 20  # bytes of it that stay this process's memory when they have been used
_AHEAD = 1 << 17  # bytes of a read from end to end: of more at once the system would not see the order
_log = logging.getLogger(__name__)
_DROP: int = getattr(mmap, "MADV_DONTNEED", 0)


class InPlace:
    """The experts of a store as they lie.

    Attributes:
        at_once: how many may be computed with before some :meth:`leave`, so that little memory is theirs.
        address: of the mapped file.

    Raises:
        OSError: the store cannot be mapped, or the system does not tell what is in its file cache.
    """

    def __init__(self, store: ExpertStore) -> None:
        if sys.platform != "linux" or store.direct:
            raise OSError("this system does not tell what is in its file cache")
        self._store, self._size = store, store.layout.nbytes
        self.at_once = max(1, WINDOW // self._size)
        self._mincore = ctypes.CDLL(None).mincore
        self._mapped = mmap.mmap(store.descriptor, 0, access=mmap.ACCESS_COPY)
        guard_mapping(self._mapped, store.file)
        self._bytes = np.frombuffer(self._mapped, np.uint8)
        self.address: int = self._bytes.ctypes.data
        self._present = np.zeros(self._size // PAGE, np.uint8)
        self._experts: dict[Key, FeedForward] = {}
        self._seen: dict[Key, float] = {}  # when an expert was last found in the file cache
        self._window: dict[Key, None] = {}  # what has been computed with, the earliest first
        self._warming: threading.Thread | None = None
        self._closed = threading.Event()

    def warm(self, room: int) -> None:
        """Have the system read all of the store into its file cache, on a thread, if that takes no more than ``room``
        bytes."""
        if os.fstat(self._store.descriptor).st_size <= room:
            self._warming = threading.Thread(target=self._read_all, name="experts-warming", daemon=True)
            self._warming.start()

    def wait_for_warmth(self) -> None:
        """Until all of it has been read, if it is being read."""
        if self._warming is not None:
            self._warming.join()

    def close(self) -> None:
        """Stop warming; closing twice is harmless."""
        self._closed.set()
        self.wait_for_warmth()

    def _read_all(self) -> None:
        target, place = bytearray(_AHEAD), 0
        try:
            # With a descriptor of its own: the system keeps for each how far it is being read.
            with open(self._store.file, "rb", buffering=0) as file:
                while not self._closed.is_set() and (count := file.readinto(target)):
                    place += count
        except OSError as error:  # whoever needs the expert is told
            _log.info("the experts' file was read ahead up to byte %d: %s", place, error)

    def holds(self, key: Key) -> bool:
        """Whether the system has all of an expert in its file cache, or had it a moment ago."""
        now = monotonic()
        if now - self._seen.get(key, -_TRUST) < _TRUST:
            return True
        place, size = self.address + self._store.offset(key), self._size
        present = ctypes.c_void_p(self._present.ctypes.data)
        if self._mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), present) != 0:
            return False
        if not (self._present & 1).all():  # of each page the lowest bit tells
            return False
        self._seen[key] = now
        return True

    def trusted_until(self, key: Key) -> float:
        """Until when an expert that is held is taken to stay so, as :func:`time.monotonic` counts."""
        return self._seen[key] + _TRUST

    def found(self, key: Key) -> FeedForward:
        """The expert, if :meth:`expert` has found it before."""
        return self._experts[key]

    def expert(self, key: Key) -> FeedForward | None:
        """The expert, to compute with until :meth:`leave`; None: it has to be loaded."""
        begin, size = self._store.offset(key), self._size
        # A mapped file that has become shorter ends the process when it is touched.
        if not self.holds(key) or not _has_byte(self._store.descriptor, begin + size - 1):
            return None
        if (found := self._experts.get(key)) is None:
            blob = self._bytes[begin : begin + size]
            try:
                self._store.check(key, blob.data)
            except ExpertStoreError:
                return None  # loading it tells
            self._mapped.madvise(
                _DROP, begin, size
            )  # a whole layer of a prompt's may be looked at before one is used
            found = self._experts[key] = self._store.layout.view(torch.from_numpy(blob))
        return found

    def leave(self, keys: Iterable[Key]) -> None:
        """Nobody computes with these any more: they may cease to be this process's memory."""
        for key in keys:
            self._window.pop(key, None)
            self._window[key] = None
        while len(self._window) * self._size > WINDOW:
            first = next(iter(self._window))
            del self._window[first]
            self._mapped.madvise(_DROP, self._store.offset(first), self._size)


def find_in_place(store: ExpertStore, slots: SlotMaker) -> InPlace | None:
    """What can be computed where it lies, if the experts compute in RAM and the system has what that takes."""
    if slots.device.type != "cpu":
        return None
    try:
        return InPlace(store)
    except (OSError, AttributeError, ValueError) as error:
        _log.info("missing experts are always loaded: %s", error)
        return None


def _has_byte(descriptor: int, place: int) -> bool:
    try:
        return len(os.pread(descriptor, 1, place)) == 1
    except OSError:
        return False
