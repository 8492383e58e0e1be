"""Least stale: experts stay that their layer's last turns have used, and of those the ones whose layer comes next.

Layers take their turns in a circle, which is what LRU handles worst: what was used longest ago belongs to the
layer that comes next. Here an expert's age is counted in turns of its own layer, and among equally stale ones that
leaves whose layer comes last. The name is known from papers that we have not read; the rule is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.store import Shape


class LeastStale:
    """See the module."""

    name = "least-stale"

    def __init__(self, shape: Shape) -> None:
        self._turns = np.zeros((shape[0], 1))
        self._last = np.full(shape, -1.0)
        self._layer = 0

    @property
    def worth(self) -> np.ndarray:
        num_layers = len(self._turns)
        distance = (np.arange(num_layers)[:, None] - self._layer - 1) % num_layers
        # Layers still to come in this pass have had one turn less.
        return (self._last - self._turns) * num_layers - distance

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._layer = layer
        self._turns[layer] += 1
        self._last[layer, list(numbers)] = self._turns[layer]
