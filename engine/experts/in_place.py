"""Experts computed where they lie: the store mapped into memory, nothing copied into slots.

Without a GPU the slow tier is the system's file cache, or the disk behind it; computing there saves the copy, and
leaves to the system what stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.experts.store import ExpertStore
from engine.models.feed_forward import FeedForward, Group


class MappedExperts:
    """A layer's experts in a mapped store (:class:`engine.models.feed_forward.ExpertSource`).

    Raises (fetch): ExpertStoreError, if an expert is damaged; each is checked at its first use.
    """

    def __init__(self, store: ExpertStore, layer: int) -> None:
        self._store, self._layer = store, layer
        self._mapped = np.memmap(store.file, np.uint8, mode="c")
        self._experts: dict[int, FeedForward] = {}

    def fetch(self, numbers: Sequence[int]) -> Iterator[Group]:
        for number in numbers:
            if number not in self._experts:
                key, size = (self._layer, number), self._store.layout.nbytes
                begin = self._store.keys.index(key) * size
                blob = self._mapped[begin : begin + size]
                self._store.check(key, blob.data)
                self._experts[number] = self._store.layout.view(torch.from_numpy(blob))
        yield [(number, self._experts[number]) for number in numbers]

    def resident(self) -> Sequence[FeedForward]:
        return ()

    @property
    def expert_bytes(self) -> int:
        return self._store.layout.weight_bytes

    @property
    def num_parameters(self) -> int:
        return self._store.index.num_experts * self._store.layout.num_parameters
