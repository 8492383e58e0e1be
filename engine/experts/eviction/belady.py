"""Belady's policy: that expert leaves whose next use is farthest in the future. The bound for all others.

It needs the future, so it replays a trace that an earlier run of the same request has recorded (L. A. Belady,
"A study of replacement algorithms for a virtual-storage computer", 1966).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.experts.store import Key, Shape

Trace = Sequence[tuple[int, Sequence[int]]]  # of each layer's turn: the layer, and what its router chose
_NEVER = -np.inf


class Belady:
    """``trace``: all turns to come, in order. Behind its end nothing is needed any more."""

    name = "belady"

    def __init__(self, trace: Trace, shape: Shape) -> None:
        self.worth = np.full(shape, _NEVER)
        self._left: list[
            list[tuple[Key, float]]
        ] = []  # turn after turn from its end: each use, and worth behind it
        coming: dict[Key, float] = {}
        for turn in range(len(trace) - 1, -1, -1):
            layer, numbers = trace[turn]
            keys = [(layer, number) for number in numbers]
            self._left.append([(key, coming.get(key, _NEVER)) for key in keys])
            coming.update(dict.fromkeys(keys, float(-turn)))
        for key, worth in coming.items():
            self.worth[key] = worth

    def used(self, layer: int, numbers: Sequence[int]) -> None:
        for key, worth in self._left.pop() if self._left else ():
            self.worth[key] = worth
