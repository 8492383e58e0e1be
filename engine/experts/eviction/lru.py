"""LRU: the expert that was used longest ago leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.store import Shape


class LeastRecentlyUsed:
    """What has never been used counts as used before everything else."""

    name = "lru"

    def __init__(self, shape: Shape) -> None:
        self.worth = np.zeros(shape)
        self._clock = 0

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._clock += 1
        self.worth[layer, list(numbers)] = self._clock
