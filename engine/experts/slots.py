"""Places for experts in fast memory, and how bytes from a store get there.

In RAM a slot is what the I/O threads read into. On a GPU it is filled through pinned RAM by a copy stream of its own,
while the stream that computes goes on.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import torch
from torch import Tensor

from engine.experts.blob import BlobLayout, page_aligned
from engine.experts.store import ExpertStore, Key, view_bytes
from engine.models.cuda_graph import GraphedFeedForward
from engine.models.feed_forward import FeedForward

_SLAB = 64 << 20  # bytes of memory taken at once: torch rounds small requests up by much
_log = logging.getLogger(__name__)


class Slot(Protocol):
    """A place for one expert."""

    @property
    def expert(self) -> FeedForward:
        """Computes with whatever the slot holds."""

    def buffer(self, key: Key) -> tuple[memoryview, bool]:
        """Where an I/O thread reads expert ``key`` to, and whether it is there already."""

    def settle(self, key: Key) -> None:
        """The buffer holds the expert: returns when the slot does, too."""

    def release(self) -> None:
        """All work with the expert has been given to the device, before the maker's latest mark; what is loaded next
        has to wait for it."""


class SlotMaker(Protocol):
    """Makes the slots of one cache."""

    device: torch.device
    keeps_pieces: bool  # whether a load that was put back finds its first part where it left it

    def make(self, count: int) -> list[Slot]:
        """``count`` more.

        Raises:
            OSError, MemoryError, torch.cuda.OutOfMemoryError: there is no memory.
        """

    def mark(self) -> None:
        """For the slots that are released from now on: this is all that has been given to the device."""


class HostSlots:
    """Slots in RAM: I/O threads read straight into them."""

    device = torch.device("cpu")
    keeps_pieces = True

    def __init__(self, layout: BlobLayout) -> None:
        self._layout = layout

    def make(self, count: int) -> list[Slot]:
        return [HostSlot(self._layout) for _ in range(count)]

    def mark(self) -> None:
        pass


class HostSlot:
    """A place in RAM, at ``address``."""

    def __init__(self, layout: BlobLayout) -> None:
        blob = page_aligned(layout.nbytes)
        self._bytes = view_bytes(blob)
        self.address = blob.data_ptr()
        self.expert = layout.view(blob)

    def buffer(self, key: Key) -> tuple[memoryview, bool]:
        return self._bytes, False

    def settle(self, key: Key) -> None:
        pass

    def release(self) -> None:
        pass


class DeviceSlots:
    """Slots in a GPU's memory.

    Args:
        host_bytes: pinned RAM in which experts that have been read stay, so that they are read from disk once.
    """

    keeps_pieces = False

    def __init__(self, layout: BlobLayout, device: torch.device, host_bytes: int = 0) -> None:
        self._layout, self.device = layout, device
        self.host = PinnedExperts(layout.nbytes, host_bytes)
        self.stream = torch.cuda.Stream(device)
        self.graphs = torch.cuda.graph_pool_handle()
        self.launched: torch.cuda.Event | None = None

    def mark(self) -> None:
        self.launched = torch.cuda.Event()
        self.launched.record(torch.cuda.current_stream(self.device))

    def make(self, count: int) -> list[Slot]:
        size, slabs = self._layout.nbytes, list[Tensor]()
        for begin in range(0, count, per_slab := max(1, _SLAB // size)):
            some = min(per_slab, count - begin)
            slabs.append(torch.empty(some * size, dtype=torch.uint8, device=self.device))
        return [_DeviceSlot(self, self._layout, blob) for slab in slabs for blob in slab.split(size)]


class _DeviceSlot:
    def __init__(self, slots: DeviceSlots, layout: BlobLayout, blob: Tensor) -> None:
        self._slots, self._blob = slots, blob
        expert = layout.view(blob)
        self.expert = GraphedFeedForward(expert.gate_up, expert.down, slots.graphs)
        self._last_use: torch.cuda.Event | None = None

    def buffer(self, key: Key) -> tuple[memoryview, bool]:
        blob, filled = self._slots.host.place(key)
        return view_bytes(blob), filled

    def settle(self, key: Key) -> None:
        stream, host = self._slots.stream, self._slots.host
        blob, _ = host.place(key)
        with torch.cuda.stream(stream), torch.inference_mode():  # the slot may have been made in it
            if self._last_use is not None:
                stream.wait_event(self._last_use)
            self._blob.copy_(blob, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        arrived.synchronize()
        host.filled(key)

    def release(self) -> None:
        self._last_use = self._slots.launched


class PinnedExperts:
    """RAM that a GPU copies from at full speed: experts stay in it as far as there is room; the others pass through a
    buffer of the I/O thread's own."""

    def __init__(self, size: int, capacity: int) -> None:
        self._size, self._left = size, capacity // size
        self._blobs: dict[Key, Tensor] = {}
        self._whole: set[Key] = set()
        self._slab: list[Tensor] = []
        self._own = threading.local()
        self._lock = threading.Lock()

    def place(self, key: Key) -> tuple[Tensor, bool]:
        """Pinned bytes for ``key`` on this thread, uint8, and whether they hold it already."""
        with self._lock:
            if key not in self._blobs and (blob := self._take()) is not None:
                self._blobs[key] = blob
            if key in self._blobs:
                return self._blobs[key], key in self._whole
        if not hasattr(self._own, "blob"):
            self._own.blob = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
        return self._own.blob, False

    def filled(self, key: Key) -> None:
        """The bytes at the place of ``key`` are whole."""
        if key in self._blobs:
            self._whole.add(key)

    def _take(self) -> Tensor | None:
        """Room for one more; None: there is none left."""
        if not self._slab and self._left > 0:
            count = min(max(1, _SLAB // self._size), self._left)
            try:
                slab = torch.empty(count * self._size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # the system gives no more of it
                _log.warning("%d experts fewer stay in RAM: %s", self._left, error)
                self._left = 0
                return None
            self._left -= count
            self._slab = list(slab.split(self._size))
        return self._slab.pop() if self._slab else None


def slot_maker(store: ExpertStore, device: torch.device, host_bytes: int = 0) -> SlotMaker:
    """The slots for experts of ``store`` that compute on ``device``."""
    if device.type == "cpu":
        return HostSlots(store.layout)
    return DeviceSlots(store.layout, device, host_bytes)
