"""The expert cache for every kind of slot, on every system (:mod:`engine.experts.cache`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from engine.errors import OutOfMemoryError
from engine.experts.eviction import EvictionPolicy
from engine.experts.in_place import InPlace
from engine.experts.reader import DEMANDED, EXPECTED, Link, Load, Reader
from engine.experts.slots import HostSlots, Slot, SlotMaker
from engine.experts.store import ExpertStore, Key, Shape
from engine.metrics import ExpertStats
from engine.models.feed_forward import FeedForward, Group

_WORTH_A_COPY = 0.1  # more of its layer's turns than what it replaces (of policies that count these)


@dataclass
class _Entry:
    """An expert that is in a slot or on its way into one."""

    slot: Slot
    load: Load
    ready: bool = False
    pins: int = 0  # layers that wait for it or compute with it
    expected: bool = False  # predicted; stays until its layer's turn
    ahead: bool = False  # loaded because it was predicted, and not used yet


class PythonCache:
    """An :class:`engine.experts.cache.ExpertCache`; arguments as of :func:`engine.experts.cache.make_cache`."""

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        eviction: Callable[[Shape], EvictionPolicy],
        link: Link | None = None,
        num_threads: int = 3,
        slots: SlotMaker | None = None,
        in_place: InPlace | None = None,
    ) -> None:
        shape = store.index.shape
        self.store, self.eviction = store, eviction(shape)
        self._slots, self._in_place = slots or HostSlots(store.layout), in_place
        self.stats = ExpertStats()
        self.uses = [[0] * shape[1] for _ in range(shape[0])]
        self.chosen: dict[int, tuple[int, ...]] = {}
        self.recording: list[tuple[int, tuple[int, ...]]] | None = None
        self.num_slots = 0
        self._free: list[Slot] = []
        self._entries: dict[Key, _Entry] = {}
        self._expected: dict[int, list[_Entry]] = {}  # by layer
        self._failed: dict[Key, Exception] = {}
        self._upcoming: list[Key] = []
        self._layer = -1  # whose turn it was last
        self._may_leave = np.zeros(shape, np.bool_)  # in memory, and nobody uses or expects it
        self._lock = threading.Lock()
        self._reader = Reader(store, num_threads, link, self._slots.keeps_pieces)
        try:
            self.resize(num_slots)
        except OutOfMemoryError:
            self._reader.close()
            raise

    def fetch(self, layer: int, numbers: Sequence[int]) -> Iterator[Group]:
        keys = [(layer, number) for number in numbers]
        missing, waiting, lying = self._demand(layer, keys)
        ready = [key for key in keys if key not in missing and key not in waiting and key not in lying]
        held = set(keys) - set(missing) - lying.keys()
        try:
            while True:
                some = list(lying)[: self._in_place.at_once] if self._in_place is not None else []
                yield [
                    *((key[1], self._entries[key].slot.expert) for key in ready),
                    *((key[1], lying.pop(key)) for key in some),
                ]
                if self._in_place is not None:
                    self._in_place.leave(some)
                self._slots.mark()
                with self._lock:
                    for key in ready:
                        entry = self._entries[key]
                        entry.pins -= 1
                        entry.slot.release()
                        self._note(entry)
                        held.remove(key)
                    self._start(missing, waiting, held)
                if not waiting and not missing and not lying:
                    return
                ready = [] if lying else self._wait(waiting, missing, held)
        finally:
            with self._lock:
                for key in held:
                    if (left := self._entries.get(key)) is not None:
                        left.pins -= 1
                        self._note(left)

    def prefetch(self, keys: Iterable[Key]) -> None:
        keys = list(keys)
        with self._lock:
            self._take_in()
            absent = []
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    self._expect(entry)
                elif self._in_place is None or not self._in_place.holds(key):
                    absent.append(key)
            for key in absent:
                slot = self._take_slot(EXPECTED)
                if slot is None:
                    return
                coming = self._load(key, slot, EXPECTED)
                coming.ahead = True
                self._expect(coming)
                self.stats.prefetch_issued += 1

    def expect(self, keys: Iterable[Key], behind: int) -> None:
        if behind == self._layer:
            self.prefetch(keys)
        else:
            self._upcoming = list(keys)

    def resize(self, num_slots: int) -> None:
        with self._lock:
            try:
                self._free += self._slots.make(max(0, num_slots - self.num_slots))
                self.num_slots = max(self.num_slots, num_slots)
            except (OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
                raise OutOfMemoryError(
                    "There is not enough memory for the model's experts; give a smaller --memory."
                ) from error
            while self.num_slots > max(1, num_slots):
                slot = self._take_slot(DEMANDED)
                if slot is None:
                    break  # all are in use at this moment; the next call may find them free
                self.num_slots -= 1

    @property
    def device(self) -> torch.device:
        return self._slots.device

    @property
    def resident_bytes(self) -> int:
        return self.num_slots * self.store.layout.nbytes

    def holds(self, key: Key) -> bool:
        return key in self._entries

    def residents(self) -> list[Key]:
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.ready]

    def stop(self) -> None:
        if self._in_place is not None:
            self._in_place.close()
        self._reader.close()

    def close(self) -> None:
        self.stop()
        self.store.close()

    def _demand(self, layer: int, keys: list[Key]) -> tuple[list[Key], list[Key], dict[Key, FeedForward]]:
        """Count and pin what the router chose; what is missing, what is on its way, and what is computed in place."""
        missing: list[Key] = []
        waiting: list[Key] = []
        lying: dict[Key, FeedForward] = {}
        numbers = tuple(number for _, number in keys)
        with self._lock:
            self._take_in()
            self._failed.clear()
            if self.recording is not None:
                self.recording.append((layer, numbers))
            for number in numbers:
                self.uses[layer][number] += 1
            self.chosen[layer] = numbers
            self._layer = layer
            self.eviction.used(layer, numbers)
            for key in keys:
                entry = self._entries.get(key)
                if entry is None:
                    if self._in_place is not None and (expert := self._in_place.expert(key)) is not None:
                        self.stats.expert_in_place += 1
                        lying[key] = expert
                        self._keep(key)
                        continue
                    self.stats.expert_misses += 1
                    missing.append(key)
                    continue
                entry.pins += 1
                self.stats.prefetch_used += entry.ahead
                entry.expected = entry.ahead = False
                self._note(entry)
                if entry.ready:
                    self.stats.expert_hits += 1
                else:
                    self.stats.expert_late += 1
                    waiting.append(key)
                    self._reader.hurry(entry.load)
            self._end_expectations(layer)
            self._start(missing, waiting, set())
        if self._upcoming:
            upcoming, self._upcoming = self._upcoming, []
            self.prefetch(upcoming)
        return missing, waiting, lying

    def _start(self, missing: list[Key], waiting: list[Key], held: set[Key]) -> None:
        """Load what is missing, as far as there are slots."""
        while missing:
            slot = self._take_slot(DEMANDED)
            if slot is None:
                return
            key = missing.pop(0)
            self._load(key, slot, DEMANDED).pins += 1
            waiting.append(key)
            held.add(key)

    def _wait(self, waiting: list[Key], missing: list[Key], held: set[Key]) -> list[Key]:
        """Until at least one of ``waiting`` is there; returns those, and takes them off the list."""
        began = perf_counter()
        while True:
            with self._lock:
                self._take_in()
                for key in waiting:
                    if key in self._failed:
                        raise self._failed.pop(key)
                if ready := [key for key in waiting if self._entries[key].ready]:
                    break
                self._start(missing, waiting, held)
            self._reader.wait()
        for key in ready:
            waiting.remove(key)
        self.stats.stall_seconds += perf_counter() - began
        return ready

    def _keep(self, key: Key) -> None:
        """What is computed in place gets a slot as well, if it is worth one: there it cannot be given up."""
        if not self._free:
            leaving = self._first_to_leave()
            worth = self.eviction.worth
            if leaving is None or worth[key] <= worth[leaving] + _WORTH_A_COPY:
                return
            self._free.append(self._leave(leaving))
        self._load(key, self._free.pop(), EXPECTED)

    def _load(self, key: Key, slot: Slot, urgency: int) -> _Entry:
        load = Load(key, slot, urgency)
        entry = self._entries[key] = _Entry(slot, load)
        self._reader.submit(load)
        return entry

    def _expect(self, entry: _Entry) -> None:
        entry.expected = True
        self._note(entry)
        self._expected.setdefault(entry.load.key[0], []).append(entry)

    def _end_expectations(self, layer: int) -> None:
        """The layer's turn has come: what was expected of it and is not wanted may leave, and is not loaded any more
        if that has not begun."""
        for entry in self._expected.pop(layer, ()):
            if entry.expected:
                entry.expected = False
                self._note(entry)
                if not entry.ready and self._reader.cancel(entry.load):
                    self.stats.prefetch_issued -= entry.ahead
                    self._free.append(self._leave(entry.load.key))

    def _take_slot(self, urgency: int) -> Slot | None:
        """A slot that nobody needs any more; for a demanded expert also one of those that were expected."""
        if self._free:
            return self._free.pop()
        key = self._first_to_leave()
        if key is None and urgency == DEMANDED:
            idle = [key for key, entry in self._entries.items() if entry.ready and not entry.pins]
            key = min(idle, key=lambda key: self.eviction.worth[key], default=None)
        if key is not None:
            return self._leave(key)
        if urgency == DEMANDED:
            for key, entry in self._entries.items():
                if not entry.ready and not entry.pins and self._reader.cancel(entry.load):
                    self.stats.prefetch_issued -= entry.ahead
                    return self._leave(key)
        return None

    def _first_to_leave(self) -> Key | None:
        """The least worthy of those in memory that nobody uses or expects."""
        candidates = np.flatnonzero(self._may_leave)
        if not len(candidates):
            return None
        place = candidates[self.eviction.worth.ravel()[candidates].argmin()]
        layer, number = divmod(int(place), self._may_leave.shape[1])
        return layer, number

    def _leave(self, key: Key) -> Slot:
        entry = self._entries.pop(key)
        entry.expected = self._may_leave[key] = False
        return entry.slot

    def _note(self, entry: _Entry) -> None:
        """To be called whenever that may have changed."""
        self._may_leave[entry.load.key] = entry.ready and not entry.pins and not entry.expected

    def _take_in(self) -> None:
        """Note which loads have ended."""
        for load, error in self._reader.ended():
            entry = self._entries[load.key]
            if error is None:
                entry.ready = True
                self._note(entry)
                self.stats.bytes_loaded += self.store.layout.nbytes
            else:
                # A demanded expert's failure is told; one that was only expected is tried again on demand.
                self._free.append(self._leave(load.key))
                if entry.pins:
                    self._failed[load.key] = error
