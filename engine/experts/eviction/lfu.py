"""LFU: the expert that was used least often leaves. Old uses fade, so that a new topic gets its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.store import Shape

_FADE = 0.9  # of a layer's counts, at each of its turns (our choice)
# Of a pass's wait for a layer's turn, as a share of turns. Layers take their turns in a circle: of two experts that are
# used as often the one should leave whose layer has just had its turn. Without it those leave that are wanted next, as
# LRU does, wherever many are used in every turn and memory does not hold them all.
_WAIT = 0.15


class LeastFrequentlyUsed:
    """An expert's worth is the share of its layer's latest turns in which it was chosen, less what waiting for the next
    turn costs.

    Attributes:
        shares: of the latest turns, ``[layers, experts]``.
    """

    name = "lfu"

    def __init__(self, shape: Shape) -> None:
        self.worth, self.shares = np.zeros(shape), np.zeros(shape)
        self._turns = 0

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._turns += 1
        self.shares[layer] *= _FADE
        self.shares[layer, list(numbers)] += 1 - _FADE
        self.worth[layer] = self.shares[layer] - self.wait

    @property
    def wait(self) -> float:
        """What waiting costs of the layer that has just had its turn. Only differences count: to bring the others' nearer
        at each turn would come to the same."""
        return _WAIT * self._turns / len(self.worth)
