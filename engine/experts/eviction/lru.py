"""LRU: the expert that was used longest ago leaves."""

from __future__ import annotations

from collections.abc import Sequence

from engine.experts.store import Key


class LeastRecentlyUsed:
    """What has never been used counts as used before everything else."""

    name = "lru"

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._clock += 1
        for number in numbers:
            self._last[layer, number] = self._clock

    def worth(self, key: Key) -> int:
        return self._last.get(key, 0)
