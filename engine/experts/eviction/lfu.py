"""LFU: the expert that was used least often leaves. Old uses fade, so that a new topic gets its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.store import Shape

_FADE = 0.9  # of a layer's counts, at each of its turns (our choice)


class LeastFrequentlyUsed:
    """An expert's worth is the share of its layer's latest turns in which it was chosen."""

    name = "lfu"

    def __init__(self, shape: Shape) -> None:
        self.worth = np.zeros(shape)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self.worth[layer] *= _FADE
        self.worth[layer, list(numbers)] += 1 - _FADE
