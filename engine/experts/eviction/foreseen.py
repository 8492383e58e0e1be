"""Least foreseen: the expert leaves that its layer was seldom seen to choose and is not expected to choose next.

A layer's state says something of what its router will choose for the next token
(:class:`engine.residuals.router_maps.RouterMaps`). Half of an expert's worth is that chance, half its share of the latest
turns as LFU counts them, which sees further than one token (our choice); less what waiting costs, as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.eviction.base import NativeForm
from engine.experts.eviction.lfu import LeastFrequentlyUsed
from engine.experts.store import Shape
from engine.kernels import turn_fields as fields


class LeastForeseen:
    """Without anybody to :meth:`foresee` anything it is LFU."""

    name = "foreseen"

    def __init__(self, shape: Shape) -> None:
        self.worth = np.zeros(shape)
        self._chances = np.zeros(shape)
        self._frequencies = LeastFrequentlyUsed(shape)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self._frequencies.used(layer, numbers)
        self._join(layer)

    def foresee(self, layer: int, chances: np.ndarray) -> None:
        """How likely each expert of ``layer`` is to be chosen the next time, ``[E]``; told in the layer's turn."""
        self._chances[layer] = chances
        self._join(layer)

    def _join(self, layer: int) -> None:
        frequencies = self._frequencies
        self.worth[layer] = (self._chances[layer] + frequencies.shares[layer]) / 2 - frequencies.wait

    def native_form(self) -> NativeForm:
        return {
            **self._frequencies.native_form(),
            fields.POLICY: fields.FORESEEN,
            fields.WORTH: self.worth,
            fields.CHANCES: self._chances,
        }
