"""Experts in fast memory: a fixed number of slots, filled from a store on I/O threads.

Whatever is in the slots, what is computed is the same: a layer asks for the experts that its router has chosen
and gets each of them once it is whole, those in memory first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from engine.errors import OutOfMemoryError
from engine.experts.eviction import EvictionPolicy
from engine.experts.reader import DEMANDED, EXPECTED, Link, Load, Reader
from engine.experts.slots import HostSlots, Slot, SlotMaker
from engine.experts.store import ExpertStore, Key
from engine.metrics import ExpertStats
from engine.models.feed_forward import FeedForward, Group


@dataclass
class _Entry:
    """An expert that is in a slot or on its way into one."""

    slot: Slot
    load: Load
    ready: bool = False
    pins: int = 0  # layers that wait for it or compute with it
    expected: bool = False  # predicted; stays until its layer's turn
    ahead: bool = False  # loaded because it was predicted, and not used yet
    last_turn: int = 0  # when its layer asked for it


class ExpertCache:
    """``num_slots`` experts of a store.

    One thread at a time may ask; the I/O threads are the cache's own.

    Args:
        link: a stated bandwidth for the store, for measurements.
        slots: where the experts are held; None: in RAM.

    Attributes:
        stats: counters since the cache was made.
        uses: how often each expert was chosen, ``[layer, expert]`` int64.
        chosen: of each layer, what its router chose at its last turn.
        recording: a list that is given the layer and the experts of each turn, if somebody wants a trace.

    Raises:
        OutOfMemoryError: there is no memory for the slots.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        eviction: EvictionPolicy,
        link: Link | None = None,
        num_threads: int = 2,
        slots: SlotMaker | None = None,
    ) -> None:
        self.store, self.eviction = store, eviction
        self._slots = slots or HostSlots(store.layout)
        self.stats = ExpertStats()
        self.uses = np.zeros((max(store.index.layers) + 1, store.index.num_experts), np.int64)
        self.chosen: dict[int, tuple[int, ...]] = {}
        self.recording: list[tuple[int, tuple[int, ...]]] | None = None
        self.num_slots = 0
        self._free: list[Slot] = []
        self._entries: dict[Key, _Entry] = {}
        self._expected: dict[int, list[_Entry]] = {}  # by layer
        self._failed: dict[Key, Exception] = {}
        self._upcoming: list[Key] = []
        self._turn, self._last_layer = 0, -1
        self._leaving: list[Key] = []  # in the order in which they may leave, the first at the end
        self._ranked = -1  # the turn when that was found out
        self._changed = threading.Condition()
        self.resize(num_slots)
        self._reader = Reader(store, self._done, num_threads, link, self._slots.keeps_pieces)

    def fetch(self, layer: int, numbers: Sequence[int]) -> Iterator[Group]:
        """The experts ``numbers`` of ``layer`` in groups: those in memory, none perhaps, then the others as they come.
        A group may be used until the next one is asked for.

        Raises:
            ExpertStoreError: one of them cannot be loaded.
        """
        keys = [(layer, number) for number in numbers]
        missing, waiting = self._demand(layer, keys)
        ready = [key for key in keys if key not in missing and key not in waiting]
        held = set(keys) - set(missing)
        try:
            while True:
                yield [(key[1], self._entries[key].slot.expert) for key in ready]
                with self._changed:
                    for key in ready:
                        self._entries[key].pins -= 1
                        self._entries[key].slot.release()
                        held.remove(key)
                    self._start(missing, waiting, held)
                if not waiting and not missing:
                    return
                ready = self._wait(waiting, missing, held)
        finally:
            with self._changed:
                for key in held:
                    if key in self._entries:
                        self._entries[key].pins -= 1

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Experts that a layer to come will probably want: those in memory stay, the others are loaded as far as
        slots can be had without what else is expected."""
        keys = list(keys)
        with self._changed:
            absent = []
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    self._expect(entry)
                else:
                    absent.append(key)
            for key in absent:
                slot = self._take_slot(EXPECTED)
                if slot is None:
                    return
                self._load(key, slot, EXPECTED)
                self.stats.prefetch_issued += 1

    def expect(self, keys: Iterable[Key]) -> None:
        """As :meth:`prefetch`, but behind what the layer whose turn it is will ask for."""
        self._upcoming = list(keys)

    def resize(self, num_slots: int) -> None:
        """Have ``num_slots`` slots from now on; experts leave if they become fewer.

        Raises:
            OutOfMemoryError: there is no memory for more.
        """
        with self._changed:
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
        """Where the experts compute."""
        return self._slots.device

    @property
    def resident_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.store.layout.nbytes

    def holds(self, key: Key) -> bool:
        """Whether an expert is in memory or on its way."""
        return key in self._entries

    def residents(self) -> list[Key]:
        """The experts in memory now."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.ready]

    def stop(self) -> None:
        """Stop loading; the store stays open."""
        self._reader.close()

    def close(self) -> None:
        """Stop loading, and close the store."""
        self.stop()
        self.store.close()

    def _demand(self, layer: int, keys: list[Key]) -> tuple[list[Key], list[Key]]:
        """Count and pin what the router chose; what is missing, and what is on its way."""
        missing: list[Key] = []
        waiting: list[Key] = []
        numbers = tuple(number for _, number in keys)
        with self._changed:
            self._failed.clear()
            if self.recording is not None:
                self.recording.append((layer, numbers))
            self.uses[layer, list(numbers)] += 1
            self.chosen[layer] = numbers
            self.eviction.used(layer, numbers)
            self._turn += 1
            if layer <= self._last_layer:
                self._leaving.clear()  # a new pass: what is worth keeping has changed
            self._last_layer = layer
            for key in keys:
                entry = self._entries.get(key)
                if entry is None:
                    self.stats.expert_misses += 1
                    missing.append(key)
                    continue
                entry.pins += 1
                entry.last_turn = self._turn
                self.stats.prefetch_used += entry.ahead
                entry.expected = entry.ahead = False
                if entry.ready:
                    self.stats.expert_hits += 1
                else:
                    self.stats.expert_late += 1
                    waiting.append(key)
                    self._reader.hurry(entry.load)
            # A layer's turn is over for what was expected of it and not wanted.
            for entry in self._expected.pop(layer, ()):
                entry.expected = False
            self._start(missing, waiting, set())
        upcoming, self._upcoming = self._upcoming, []
        self.prefetch(upcoming)
        return missing, waiting

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
        with self._changed:
            while True:
                for key in waiting:
                    if key in self._failed:
                        raise self._failed.pop(key)
                ready = [key for key in waiting if self._entries[key].ready]
                if ready:
                    break
                self._start(missing, waiting, held)
                self._changed.wait()
            for key in ready:
                waiting.remove(key)
        self.stats.stall_seconds += perf_counter() - began
        return ready

    def _load(self, key: Key, slot: Slot, urgency: int) -> _Entry:
        load = Load(key, slot, urgency)
        entry = self._entries[key] = _Entry(slot, load)
        if urgency == EXPECTED:
            entry.ahead = True
            self._expect(entry)
        self._reader.submit(load)
        return entry

    def _expect(self, entry: _Entry) -> None:
        entry.expected = True
        self._expected.setdefault(entry.load.key[0], []).append(entry)

    def _take_slot(self, urgency: int) -> Slot | None:
        """A slot that nobody needs any more; for a demanded expert also one of those that were expected."""
        if self._free:
            return self._free.pop()
        key = self._first_to_leave()
        if key is None and urgency == DEMANDED:
            idle = [key for key, entry in self._entries.items() if entry.ready and not entry.pins]
            key = min(idle, key=self.eviction.worth, default=None)
        if key is not None:
            return self._entries.pop(key).slot
        if urgency == DEMANDED:
            for key, entry in self._entries.items():
                if not entry.ready and not entry.pins and self._reader.cancel(entry.load):
                    return self._entries.pop(key).slot
        return None

    def _first_to_leave(self) -> Key | None:
        """The least worthy of those in memory that nobody uses or expects.

        They are ranked once for many: to rank all of them for each one that leaves would take longer than to
        load it. Whoever was used since then has become worth more, and is passed over.
        """
        while True:
            while self._leaving:
                key = self._leaving.pop()
                entry = self._entries.get(key)
                if entry is not None and self._may_leave(entry) and entry.last_turn <= self._ranked:
                    return key
            candidates = [key for key, entry in self._entries.items() if self._may_leave(entry)]
            if not candidates:
                return None
            self._leaving = sorted(candidates, key=self.eviction.worth, reverse=True)
            self._ranked = self._turn

    @staticmethod
    def _may_leave(entry: _Entry) -> bool:
        return entry.ready and not entry.pins and not entry.expected

    def _done(self, load: Load, error: Exception | None) -> None:
        with self._changed:
            entry = self._entries[load.key]
            if error is None:
                entry.ready = True
                self.stats.bytes_loaded += self.store.layout.nbytes
            else:
                # A demanded expert's failure is told; one that was only expected is tried again on demand.
                del self._entries[load.key]
                self._free.append(entry.slot)
                if entry.pins:
                    self._failed[load.key] = error
            self._changed.notify_all()


class LayerExperts:
    """A layer's experts in a cache, as the decoder asks for them (:class:`engine.models.feed_forward.ExpertSource`)."""

    def __init__(self, cache: ExpertCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def fetch(self, numbers: Sequence[int]) -> Iterator[Group]:
        return self._cache.fetch(self._layer, numbers)

    def resident(self) -> Sequence[FeedForward]:
        return ()

    @property
    def expert_bytes(self) -> int:
        return self._cache.store.layout.weight_bytes

    @property
    def num_parameters(self) -> int:
        index = self._cache.store.index
        return index.num_experts * self._cache.store.layout.num_parameters
