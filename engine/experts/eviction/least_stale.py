"""Least stale: experts stay that their layer's last turns have used, and of those the ones whose layer comes next.

Layers take their turns in a circle, which is what LRU handles worst: what was used longest ago belongs to the
layer that comes next. Here an expert's age is counted in turns of its own layer, and among equally stale ones that
leaves whose layer comes last. The name is known from papers that we have not read; the rule is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.eviction.base import NativeForm
from engine.experts.store import Shape
from engine.kernels import turn_fields as fields


class LeastStale:
    """See the module."""

    name = "least-stale"

    def __init__(self, shape: Shape) -> None:
        self.worth = np.full(shape, float(-shape[0]))
        self._last = np.full(shape, -1.0)  # turn of its layer in which an expert was used
        self._clock = np.zeros(1 + shape[0])  # turns, of all layers and of each

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._clock[[0, 1 + layer]] += 1
        turns = self._clock[1 + layer]
        self._last[layer, list(numbers)] = turns
        # Only differences count: what the clock takes off those whose turn comes later, all others gain as time goes by.
        self.worth[layer] = (self._last[layer] - turns) * len(self.worth) - self._clock[0]

    def native_form(self) -> NativeForm:
        return {
            fields.POLICY: fields.LEAST_STALE,
            fields.WORTH: self.worth,
            fields.SHARES: self._last,
            fields.CLOCK: self._clock,
        }
