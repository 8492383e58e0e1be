"""Least stale: experts stay that their layer's last turns have used, and of those the ones whose layer comes next.

Layers take their turns in a circle, which is what LRU handles worst: what was used longest ago belongs to the
layer that comes next. Here an expert's age is counted in turns of its own layer, and among equally stale ones that
leaves whose layer comes last. The name is known from papers that we have not read; the rule is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.experts.store import Key


class LeastStale:
    """See the module."""

    name = "least-stale"

    def __init__(self) -> None:
        self._layer = 0
        self._num_layers = 1
        self._turns: dict[int, int] = {}
        self._last: dict[Key, int] = {}

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._layer, self._num_layers = layer, max(self._num_layers, layer + 1)
        turn = self._turns[layer] = self._turns.get(layer, 0) + 1
        for number in numbers:
            self._last[layer, number] = turn

    def worth(self, key: Key) -> tuple[int, int]:
        layer = key[0]
        # Layers still to come in this pass have had one turn less.
        stale = self._turns.get(layer, 0) - self._last.get(key, -1)
        distance = (layer - self._layer - 1) % self._num_layers
        return -stale, -distance
