"""The expert cache for slots in RAM whose decisions are native code (:mod:`engine.kernels.turns`): they take some
microseconds within a pass, where Python takes a tenth of a millisecond and more for each layer."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch

from engine.errors import ExpertStoreError, OutOfMemoryError
from engine.experts.blob import BlobLayout
from engine.experts.eviction.base import EvictionPolicy
from engine.experts.in_place import InPlace
from engine.experts.native_loads import NativeLoads
from engine.experts.reader import Link
from engine.experts.slots import HostSlot, HostSlots
from engine.experts.store import ExpertStore, Key, Shape, unreadable
from engine.kernels import load_fields
from engine.kernels import turn_fields as fields
from engine.kernels.linears import LinearTable
from engine.kernels.native import load_turns
from engine.metrics import ExpertStats
from engine.models.feed_forward import FeedForward, Group

_BY_KEY = {  # arrays of a number for each expert, and what they hold at first
    fields.STATUS: fields.ABSENT, fields.SLOT_OF: -1, fields.AHEAD: 0, fields.USES: 0, fields.CHECKED: 0,
    fields.SEEN_UNTIL: 0, fields.LIES: 0, fields.IN_WINDOW: 0, fields.RANKS: 0, fields.NAMED: 0, fields.ASKED: 0,
    fields.STATES: fields.DONE,
}  # fmt: skip
_log = logging.getLogger(__name__)
_ANSWER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@runtime_checkable
class Foreseeing(Protocol):
    """A predictor that passes of native code can ask."""

    def native_form(self) -> dict[int, int] | None:
        """Fields of the block (:mod:`engine.kernels.turn_fields`), the addresses among them of what this keeps alive;
        None: not this one."""


class NativeCache:
    """An :class:`engine.experts.cache.ExpertCache`; arguments as of :func:`engine.experts.cache.make_cache`.

    Attributes:
        address: of the block.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        eviction: Callable[[Shape], EvictionPolicy],
        link: Link | None,
        num_threads: int,
        slots: HostSlots,
        in_place: InPlace | None,
    ) -> None:
        self.store, self.num_slots = store, 0
        self.chosen: dict[int, tuple[int, ...]] = {}
        self.recording: list[tuple[int, tuple[int, ...]]] | None = None
        self._program, self._slots, self._in_place = load_turns(), slots, in_place
        self._upcoming: list[Key] = []
        self._errors: dict[int, ExpertStoreError] = {}
        self._kept: dict[int, np.ndarray] = {}  # by field
        self._block = np.zeros(fields.NUM_FIELDS, np.int64)
        self._fields, self.address = self._block.data, self._block.ctypes.data
        shape = store.index.shape
        self._fields[fields.NUM_LAYERS], self._fields[fields.NUM_EXPERTS] = self._shape = shape
        size = shape[0] * shape[1]
        for field, value in _BY_KEY.items():
            self._keep(field, np.full(size, value, np.int64))
        places = {key: store.offset(key) for key in store.keys}
        offsets = [places.get(key, -1) for key in np.ndindex(*shape)]
        self._keep(fields.OFFSETS, np.array(offsets, np.int64))
        self._keep(fields.PRECISIONS, np.ones(shape[1]))
        self._keep(fields.FREE_ENTRIES, np.arange(load_fields.NUM_ENTRIES))
        self._keep(fields.PENDING, np.zeros(load_fields.NUM_ENTRIES, np.int64))
        self._fields[fields.NUM_FREE_ENTRIES] = load_fields.NUM_ENTRIES
        me = weakref.ref(self)  # so that the slots' memory goes with the last reference

        def answer(question: int, flat: int) -> int:
            cache = me()
            return 0 if cache is None else cache._say(question, flat)

        self._answer = _ANSWER(answer)
        self._fields[fields.CALL] = ctypes.cast(self._answer, ctypes.c_void_p).value or 0
        self._fields[fields.CODE], self._fields[fields.LAYER] = self._program.address, -1
        self._keep(fields.BLOB_LINEARS, _linears(store.layout))
        self.eviction = eviction(shape)
        if in_place is not None:
            self._compute_in_place(in_place)
        self._held: list[HostSlot | None] = []
        self._loads = NativeLoads(self._program, store, num_threads, link)
        self._fields[fields.LOADS] = self._loads.address
        try:
            self.resize(num_slots)
        except OutOfMemoryError:
            self._loads.close()
            raise

    @property
    def eviction(self) -> EvictionPolicy:
        return self._eviction

    @eviction.setter
    def eviction(self, policy: EvictionPolicy) -> None:
        self._eviction = policy
        for field, value in policy.native_form().items():
            if isinstance(value, np.ndarray):
                self._keep(field, value)
            else:
                self._fields[field] = value

    def follow(self, predictor: Foreseeing | None) -> bool:
        """Have passes of native code ask ``predictor`` from now on; whether they can, and nobody wants a trace."""
        form = {fields.PREDICTOR: fields.NOBODY} if predictor is None else predictor.native_form()
        if form is None or self.recording is not None:
            return False
        for field, value in form.items():
            self._fields[field] = value
        return True

    def load_ahead(self, on: bool) -> None:
        """Whether passes load what the predictor names."""
        self._fields[fields.ACTIVE] = on

    @property
    def precisions(self) -> np.ndarray:
        """Of each rank, the share of loads ahead of time that would have been right, ``[E]``."""
        return self._kept[fields.PRECISIONS]

    def raise_trouble(self) -> None:
        """To be called behind a pass of native code.

        Raises:
            ExpertStoreError: an expert could not be loaded.
        """
        if key := self._fields[fields.TROUBLE]:
            self._fields[fields.TROUBLE] = 0
            raise self._errors.pop(key - 1, None) or unreadable(self.store.file)

    def fetch(self, layer: int, numbers: Sequence[int]) -> Iterator[Group]:
        asked, states = self._kept[fields.ASKED], self._kept[fields.STATES]
        if self.recording is not None:
            self.recording.append((layer, tuple(numbers)))
        self.chosen[layer] = tuple(numbers)
        count = self._fields[fields.NUM_ASKED] = len(numbers)
        asked[:count] = numbers
        self._act(fields.START, layer)
        if self._upcoming:
            upcoming, self._upcoming = self._upcoming, []
            self.prefetch(upcoming)
        try:
            begun = False
            while True:
                if begun or any(states[i] in (fields.HELD, fields.LYING) for i in range(count)):
                    self._program.wait(self.address, fields.GROUP, 1, 0, 0)
                    self.raise_trouble()
                begun = True
                in_use = [i for i in range(count) if states[i] in (fields.IN_USE, fields.IN_USE_THERE)]
                yield [(numbers[i], self._expert(layer, numbers[i], int(states[i]))) for i in in_use]
                self._act(fields.FINISH)
                if all(states[:count] == fields.DONE):
                    return
        finally:
            self._act(fields.GIVE_UP)

    def prefetch(self, keys: Iterable[Key]) -> None:
        named = np.array([self._flat(key) for key in keys], np.int64)
        self._act(fields.AHEAD_OF_TIME, named.ctypes.data, len(named))

    def expect(self, keys: Iterable[Key], behind: int) -> None:
        if behind == self._fields[fields.LAYER]:
            self.prefetch(keys)
        else:
            self._upcoming = list(keys)

    def resize(self, num_slots: int) -> None:
        self._act(fields.NOTE)
        free = self._free_slots()
        try:
            more = self._slots.make(max(0, num_slots - self.num_slots))
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                "There is not enough memory for the model's experts; give a smaller --memory."
            ) from error
        left = [place for place, held in enumerate(self._held) if held is None]
        for slot in more:
            place = left.pop() if left else len(self._held)
            self._held[place : place + 1] = [cast(HostSlot, slot)]
            free.append(place)
        self.num_slots = max(self.num_slots, num_slots)
        self._describe_slots(free)
        while self.num_slots > max(1, num_slots):
            if self._fields[fields.NUM_FREE] == 0:
                self._act(fields.CLEAR)
            if self._fields[fields.NUM_FREE] == 0:
                break  # all are in use at this moment; the next call may find them free
            self._fields[fields.NUM_FREE] -= 1
            self._held[self._kept[fields.FREE][self._fields[fields.NUM_FREE]]] = None
            self.num_slots -= 1

    @property
    def device(self) -> torch.device:
        return self._slots.device

    @property
    def resident_bytes(self) -> int:
        return self.num_slots * self.store.layout.nbytes

    @property
    def stats(self) -> ExpertStats:
        block = self._fields
        return ExpertStats(
            expert_hits=block[fields.HITS],
            expert_late=block[fields.LATE],
            expert_misses=block[fields.MISSES],
            expert_in_place=block[fields.COMPUTED_IN_PLACE],
            prefetch_issued=block[fields.ISSUED],
            prefetch_used=block[fields.USED],
            bytes_loaded=block[fields.LOADED] * self.store.layout.nbytes,
            stall_seconds=block[fields.STALLED] / 1e9,
        )

    @property
    def uses(self) -> Sequence[Sequence[int]]:
        uses: list[list[int]] = self._kept[fields.USES].reshape(self._shape).tolist()
        return uses

    def holds(self, key: Key) -> bool:
        return bool(self._kept[fields.STATUS][self._flat(key)])

    def residents(self) -> list[Key]:
        ready = np.flatnonzero(self._kept[fields.STATUS] & fields.READY).tolist()
        return [divmod(key, self._shape[1]) for key in ready]

    def stop(self) -> None:
        if self._in_place is not None:
            self._in_place.close()
        self._loads.close()

    def close(self) -> None:
        self.stop()
        self.store.close()

    def _flat(self, key: Key) -> int:
        return key[0] * self._shape[1] + key[1]

    def _act(self, command: int, first: int = 0, second: int = 0) -> None:
        self._program.act(self.address, command, first, second, 0)

    def _keep(self, field: int, array: np.ndarray) -> None:
        """Have the block point at an array, and keep that alive."""
        self._kept[field] = array
        self._fields[field] = array.ctypes.data

    def _expert(self, layer: int, number: int, state: int) -> FeedForward:
        if state == fields.IN_USE_THERE:
            assert self._in_place is not None
            return self._in_place.found((layer, number))
        slot = self._held[self._kept[fields.SLOT_OF][self._flat((layer, number))]]
        assert slot is not None
        return slot.expert

    def _free_slots(self) -> list[int]:
        count = self._fields[fields.NUM_FREE]
        free: list[int] = self._kept[fields.FREE][:count].tolist() if count else []
        return free

    def _describe_slots(self, free: Sequence[int]) -> None:
        """Have the block's arrays of slots as long as there are slots."""
        count, kept = len(self._held), self._kept
        if fields.KEY_OF not in kept or len(kept[fields.KEY_OF]) < count:
            keys = np.full(count, -1)
            if fields.KEY_OF in kept:
                keys[: len(kept[fields.KEY_OF])] = kept[fields.KEY_OF]
            self._keep(fields.KEY_OF, keys)
            self._keep(fields.FREE, np.zeros(count, np.int64))
        addresses = np.array([0 if slot is None else slot.address for slot in self._held], np.int64)
        offsets, is_address = self._kept[fields.BLOB_LINEARS]
        self._keep(fields.ADDRESSES, addresses)
        self._keep(fields.LINEARS, offsets + addresses[:, None] * is_address)
        kept[fields.FREE][: len(free)] = free
        self._fields[fields.NUM_FREE], self._fields[fields.NUM_SLOTS] = len(free), count

    def _compute_in_place(self, lying: InPlace) -> None:
        self._fields[fields.MAPPED], self._fields[fields.FILE] = lying.address, self.store.descriptor
        self._fields[fields.BLOB_BYTES] = self.store.layout.nbytes
        self._fields[fields.AT_ONCE] = self._fields[fields.WINDOW_SIZE] = lying.at_once
        self._keep(fields.WINDOW, np.zeros(lying.at_once, np.int64))

    def _say(self, question: int, flat: int) -> int:
        """Answer the native code; what goes wrong here must not pass through it."""
        try:
            return int(self._find_out(question, flat))
        except ExpertStoreError as error:
            self._errors[flat] = error
        except Exception:
            _log.exception("expert %d", flat)
        return 0

    def _find_out(self, question: int, flat: int) -> bool:
        key, kept, lying = divmod(flat, self._shape[1]), self._kept, self._in_place
        if question == fields.IS_WHOLE:
            slot = self._held[kept[fields.SLOT_OF][flat]]
            assert slot is not None
            self.store.check(key, slot.buffer(key)[0])
            kept[fields.CHECKED][flat] = 1
            return True
        assert lying is not None
        if question == fields.IS_CACHED:
            if not lying.holds(key):
                return False
            kept[fields.SEEN_UNTIL][flat] = int(1e9 * lying.trusted_until(key))
            return True
        if lying.expert(key) is None:
            return False
        kept[fields.LIES][flat] = 1
        return True


def _linears(layout: BlobLayout) -> np.ndarray:
    """The descriptors of both matrices of an expert whose blob lies at address 0, and which of their fields are addresses:
    those in which the same expert at two places differs, int64 ``[2, fields]``."""
    table, blobs = LinearTable(), [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    one, other = (
        np.concatenate([table.describe_passing(linear) for linear in layout.view(blob).matrices()])
        for blob in blobs
    )
    is_address = (one != other).astype(np.int64)
    return np.stack((one - is_address * blobs[0].data_ptr(), is_address))
