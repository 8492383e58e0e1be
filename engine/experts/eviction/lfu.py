"""LFU: the expert that was used least often leaves. Old uses fade, so that a new topic gets its experts."""

from __future__ import annotations

from collections.abc import Sequence

from engine.experts.store import Key

_FADE = 0.98  # of a layer's counts, at each of its turns (our choice)


class LeastFrequentlyUsed:
    """Counts are kept relative to a weight that grows, which is the same as letting all of them fade."""

    name = "lfu"

    def __init__(self) -> None:
        self._counts: dict[Key, float] = {}
        self._turns: dict[int, int] = {}

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        turn = self._turns.get(layer, 0) + 1
        self._turns[layer] = turn
        if turn % 1024 == 0:  # before the weights leave the range of a float
            for key in [key for key in self._counts if key[0] == layer]:
                self._counts[key] *= _FADE**turn
            self._turns[layer] = turn = 0
        for number in numbers:
            key = layer, number
            self._counts[key] = self._counts.get(key, 0.0) + _FADE**-turn

    def worth(self, key: Key) -> float:
        return self._counts.get(key, 0.0) * _FADE ** self._turns.get(key[0], 0)
