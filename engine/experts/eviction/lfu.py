"""LFU: the expert that was used least often leaves. Old uses fade, so that a new topic gets its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.eviction.base import NativeForm
from engine.experts.store import Shape
from engine.kernels import turn_fields as fields
from engine.kernels.turn_fields import FADE, WAIT


class LeastFrequentlyUsed:
    """An expert's worth is the share of its layer's latest turns in which it was chosen, less what waiting for the next
    turn costs.

    Attributes:
        shares: of the latest turns, ``[layers, experts]``.
        clock: how many turns there have been, ``[1]``.
    """

    name = "lfu"

    def __init__(self, shape: Shape) -> None:
        self.worth, self.shares = np.zeros(shape), np.zeros(shape)
        self.clock = np.zeros(1)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        self.clock += 1
        self.shares[layer] *= FADE
        self.shares[layer, list(numbers)] += 1 - FADE
        self.worth[layer] = self.shares[layer] - self.wait

    @property
    def wait(self) -> float:
        """What waiting costs of the layer that has just had its turn. Only differences count: to bring the others' nearer
        at each turn would come to the same."""
        return float(WAIT * self.clock[0] / len(self.worth))

    def native_form(self) -> NativeForm:
        return {
            fields.POLICY: fields.LFU,
            fields.WORTH: self.worth,
            fields.SHARES: self.shares,
            fields.CLOCK: self.clock,
        }
