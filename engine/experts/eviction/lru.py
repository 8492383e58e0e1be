"""LRU: the expert that was used longest ago leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.eviction.base import NativeForm
from engine.experts.store import Shape
from engine.kernels import turn_fields as fields


class LeastRecentlyUsed:
    """What has never been used counts as used before everything else."""

    name = "lru"

    def __init__(self, shape: Shape) -> None:
        self.worth = np.zeros(shape)
        self._clock = np.zeros(1)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._clock += 1
        self.worth[layer, list(numbers)] = self._clock[0]

    def native_form(self) -> NativeForm:
        return {fields.POLICY: fields.LRU, fields.WORTH: self.worth, fields.CLOCK: self._clock}
