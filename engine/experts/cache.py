"""Experts in fast memory: a fixed number of slots, filled from a store on I/O threads.

Whatever is in the slots, what is computed is the same: a layer asks for the experts that its router has chosen
and gets each of them once it is whole, those in memory first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch

from engine.errors import OutOfMemoryError
from engine.experts.eviction.base import EvictionPolicy
from engine.experts.in_place import InPlace
from engine.experts.native_cache import NativeCache
from engine.experts.python_cache import PythonCache
from engine.experts.reader import Link
from engine.experts.slots import HostSlots, SlotMaker
from engine.experts.store import ExpertStore, Key, Shape
from engine.metrics import ExpertStats
from engine.models.feed_forward import FeedForward, Group

_log = logging.getLogger(__name__)


class ExpertCache(Protocol):
    """Some experts of a store. One thread at a time may ask; the I/O threads are the cache's own.

    Attributes:
        uses: how often each expert was chosen, by layer and number.
        chosen: of each layer, what its router chose at its last turn, unless that was in a pass of native code.
        recording: a list that is given the layer and the experts of each turn, if somebody wants a trace.
    """

    store: ExpertStore
    eviction: EvictionPolicy
    num_slots: int
    chosen: dict[int, tuple[int, ...]]
    recording: list[tuple[int, tuple[int, ...]]] | None

    @property
    def stats(self) -> ExpertStats:
        """Counters since the cache was made."""

    @property
    def uses(self) -> Sequence[Sequence[int]]:
        """How often each expert was chosen, by layer and number."""

    @property
    def device(self) -> torch.device:
        """Where the experts compute."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of all slots."""

    def fetch(self, layer: int, numbers: Sequence[int]) -> Iterator[Group]:
        """The experts ``numbers`` of ``layer`` in groups: those in memory, none perhaps, then the others as they come.
        A group may be used until the next one is asked for.

        Raises:
            ExpertStoreError: one of them cannot be loaded.
        """

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Experts that a layer to come will probably want: those in memory stay, the others are loaded as far as
        slots can be had without what else is expected."""

    def expect(self, keys: Iterable[Key], behind: int) -> None:
        """As :meth:`prefetch`, but behind what layer ``behind``, whose turn it is, asks for or has asked for."""

    def resize(self, num_slots: int) -> None:
        """Have ``num_slots`` slots from now on; experts leave if they become fewer.

        Raises:
            OutOfMemoryError: there is no memory for more.
        """

    def holds(self, key: Key) -> bool:
        """Whether an expert is in memory or on its way."""

    def residents(self) -> list[Key]:
        """The experts in memory now."""

    def stop(self) -> None:
        """Stop loading; the store stays open."""

    def close(self) -> None:
        """Stop loading, and close the store."""


def make_cache(
    store: ExpertStore,
    num_slots: int,
    eviction: Callable[[Shape], EvictionPolicy],
    link: Link | None = None,
    num_threads: int = 3,
    slots: SlotMaker | None = None,
    in_place: InPlace | None = None,
) -> ExpertCache:
    """``num_slots`` experts of a store: in native code, where there is one for such slots and this system.

    Args:
        link: a stated bandwidth for the store, for measurements.
        slots: where the experts are held; None: in RAM.
        in_place: what of the missing experts can be computed where it lies; None: they are loaded.

    Raises:
        OutOfMemoryError: there is no memory for the slots.
    """
    slots = slots or HostSlots(store.layout)
    if isinstance(slots, HostSlots) and find_spec("numba") is not None:
        try:
            return NativeCache(store, num_slots, eviction, link, num_threads, slots, in_place)
        except OutOfMemoryError:
            raise
        except Exception as error:  # an LLVM problem must not keep anyone from chatting
            _log.info("experts are kept by Python: %s", error)
    return PythonCache(store, num_slots, eviction, link, num_threads, slots, in_place)


class LayerExperts:
    """A layer's experts in a cache, as the decoder asks for them (:class:`engine.models.feed_forward.ExpertSource`)."""

    def __init__(self, cache: ExpertCache, layer: int) -> None:
        self.cache, self._layer = cache, layer

    def fetch(self, numbers: Sequence[int]) -> Iterator[Group]:
        return self.cache.fetch(self._layer, numbers)

    def resident(self) -> Sequence[FeedForward]:
        return ()

    @property
    def expert_bytes(self) -> int:
        return self.cache.store.layout.weight_bytes

    @property
    def num_parameters(self) -> int:
        index = self.cache.store.index
        return index.num_experts * self.cache.store.layout.num_parameters
