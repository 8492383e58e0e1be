"""Belady's policy: that expert leaves whose next use is farthest in the future. The bound for all others.

It needs the future, so it replays a trace that an earlier run of the same request has recorded (L. A. Belady,
"A study of replacement algorithms for a virtual-storage computer", 1966).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.eviction.base import NativeForm
from engine.experts.store import Shape
from engine.kernels import turn_fields as fields

Trace = Sequence[tuple[int, Sequence[int]]]  # of each layer's turn: the layer, and what its router chose
_NEVER = -np.inf


class Belady:
    """``trace``: all turns to come, in order. Behind its end nothing is needed any more."""

    name = "belady"

    def __init__(self, trace: Trace, shape: Shape) -> None:
        self.worth = np.full(shape, _NEVER)
        uses: list[
            list[tuple[int, float]]
        ] = []  # turn after turn from its end: each use, and worth behind it
        coming: dict[int, float] = {}
        for turn in range(len(trace) - 1, -1, -1):
            layer, numbers = trace[turn]
            keys = [layer * shape[1] + number for number in numbers]
            uses.append([(key, coming.get(key, _NEVER)) for key in keys])
            coming.update(dict.fromkeys(keys, float(-turn)))
        for key, worth in coming.items():
            self.worth.ravel()[key] = worth
        flat = [use for turn in reversed(uses) for use in turn]
        firsts = np.cumsum([0, *(len(turn) for turn in reversed(uses)), -len(flat) - 1])  # -1: the end
        self._firsts, self._turn = firsts.astype(np.int64), np.zeros(1, np.int64)
        self._keys = np.array([key for key, _ in flat], np.int64)
        self._worths = np.array([worth for _, worth in flat], np.float64)

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        turn = self._turn[0]
        first, end = self._firsts[turn : turn + 2]
        if end >= 0:
            self.worth.ravel()[self._keys[first:end]] = self._worths[first:end]
            self._turn += 1

    def native_form(self) -> NativeForm:
        return {
            fields.POLICY: fields.REPLAYED,
            fields.WORTH: self.worth,
            fields.CLOCK: self._turn,
            fields.UPDATE_FIRSTS: self._firsts,
            fields.UPDATE_KEYS: self._keys,
            fields.UPDATE_WORTHS: self._worths,
        }
